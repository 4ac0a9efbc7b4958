import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from ich_keras.errors import DataError
from ich_keras.labels import LABELS
from ich_keras.metrics.binary import METRICS, binary_metrics, format_metric


def named(*values):
    return dict(zip(LABELS, values, strict=True))


# Three samples by hand: one healthy and right; one subdural found, with a false epidural;
# one intraparenchymal missed.
TRUTH = np.array([[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1], [0, 1, 0, 0, 0, 1]])
PROBABILITIES = np.array(
    [
        [0.1, 0.1, 0.1, 0.1, 0.1, 0.2],
        [0.6, 0.1, 0.1, 0.1, 0.9, 0.9],
        [0.1, 0.4, 0.1, 0.1, 0.1, 0.5],
    ]
)


def test_by_hand():
    result = binary_metrics(TRUTH, PROBABILITIES)
    subtypes = -(12 * math.log(0.9) + math.log(0.4) + math.log(0.9) + math.log(0.4))
    any_label = -(math.log(0.8) + math.log(0.9) + math.log(0.5))
    assert result["log_loss"] == pytest.approx((subtypes + any_label) / 18, abs=1e-12)
    assert result["rsna_log_loss"] == pytest.approx((subtypes + 2 * any_label) / 21, abs=1e-12)
    assert result["exact_match"] == pytest.approx(1 / 3)
    assert result["hamming_loss"] == pytest.approx(2 / 18)
    # Healthy: both empty, 1. Second: {subdural, any} of {epidural, subdural, any}. Third: any of 2.
    assert result["hamming_score"] == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)
    rates = {
        metric: {name: row[metric] for name, row in result["per_label"].items()}
        for metric in ("precision", "recall", "f1", "specificity")
    }
    assert rates["precision"] == named(0.0, None, None, None, 1.0, 1.0)
    assert rates["recall"] == named(None, 0.0, None, None, 1.0, 1.0)
    assert rates["f1"] == named(0.0, 0.0, None, None, 1.0, 1.0)
    assert rates["specificity"] == named(2 / 3, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert result["precision"] == pytest.approx(2 / 3)
    assert result["recall"] == pytest.approx(2 / 3)
    assert result["f1"] == pytest.approx(2 / 4)
    assert result["specificity"] == pytest.approx((2 / 3 + 5) / 6)
    assert result["defined_labels"] == {"precision": 3, "recall": 3, "f1": 4, "specificity": 6}
    assert result["auroc"] == named(None, 1.0, None, None, 1.0, 1.0)
    assert result["ap"] == named(None, 1.0, None, None, 1.0, 1.0)
    assert result["n"] == {"samples": 3, "positive": named(0, 1, 0, 0, 1, 2)}


def test_baselines_and_skill_by_hand():
    result = binary_metrics(TRUTH, PROBABILITIES)
    entropy = -(math.log(1 / 3) + 2 * math.log(2 / 3)) / 3  # of one in three, and of two in three
    constant = result["baseline"]["prevalence"]
    assert constant["source"] == "evaluated set"
    assert constant["probabilities"] == named(0, 1 / 3, 0, 0, 1 / 3, 2 / 3)
    assert constant["log_loss"] == pytest.approx(3 * entropy / 6, abs=1e-6)
    assert constant["rsna_log_loss"] == pytest.approx(4 * entropy / 7, abs=1e-6)
    assert constant["exact_match"] == 0  # it always says any, and no subtype
    negative = result["baseline"]["all_negative"]
    assert negative == {
        "log_loss": None,
        "rsna_log_loss": None,
        "exact_match": pytest.approx(1 / 3),
        "hamming_loss": pytest.approx(4 / 18),
        "hamming_score": pytest.approx(1 / 3),
    }
    skill = result["skill"]
    assert skill["log_loss"] == pytest.approx(1 - result["log_loss"] / constant["log_loss"])
    assert skill["rsna_log_loss"] == pytest.approx(
        1 - result["rsna_log_loss"] / constant["rsna_log_loss"]
    )
    assert skill["hamming_loss"] == pytest.approx(0.5)
    assert skill["exact_match"] == pytest.approx(0)


def test_prevalence_of_the_training_set():
    prevalence = np.full(6, 0.25)
    constant = binary_metrics(TRUTH, PROBABILITIES, prevalence)["baseline"]["prevalence"]
    assert constant["source"] == "training set"
    assert constant["log_loss"] == pytest.approx(-(4 * math.log(0.25) + 14 * math.log(0.75)) / 18)
    with pytest.raises(DataError, match=r"probability 1\.5"):
        binary_metrics(TRUTH, PROBABILITIES, [0, 0, 0, 0, 0, 1.5])


def test_predicting_the_prevalence_has_no_skill():
    result = binary_metrics(TRUTH, np.tile(TRUTH.mean(axis=0), (3, 1)))
    assert result["skill"]["log_loss"] == pytest.approx(0, abs=1e-12)
    assert result["skill"]["rsna_log_loss"] == pytest.approx(0, abs=1e-12)
    assert result["auroc"]["any"] == 0.5


def test_baselines_of_the_thesis_whole_series_set():
    # 1,350 series, 812 of them healthy; thesis table 3, whose model does not beat these numbers.
    counts = named(22, 329, 240, 262, 224, 538)
    truth = np.zeros((1350, 6), int)
    for column, count in enumerate(counts.values()):
        truth[:538, column] = np.arange(538) < count
    assert (truth[:, 5] >= truth.max(axis=1)).all()
    result = binary_metrics(truth, np.zeros(truth.shape))
    negative = result["baseline"]["all_negative"]
    assert negative["exact_match"] == pytest.approx(0.6015, abs=5e-5)
    assert negative["hamming_loss"] == pytest.approx(0.1994, abs=5e-5)
    assert negative["hamming_score"] == pytest.approx(0.6015, abs=5e-5)
    assert result["baseline"]["prevalence"]["log_loss"] == pytest.approx(0.4534, abs=5e-5)
    assert result["exact_match"] == negative["exact_match"]
    assert result["skill"]["hamming_loss"] == 0
    assert result["n"]["positive"] == counts


def random_table(seed, samples):
    rng = np.random.default_rng(seed)
    truth = rng.random((samples, 6)) < rng.uniform(0.05, 0.6, 6)
    noise = rng.normal(0, 2, truth.shape)
    # Rounded, so that ties occur and 0.5 is met exactly.
    return truth.astype(np.int8), np.round(1 / (1 + np.exp(1 - 2 * truth + noise)), 2)


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), samples=st.integers(2, 300))
def test_agrees_with_scikit_learn(seed, samples):
    truth, probabilities = random_table(seed, samples)
    predicted = (probabilities >= 0.5).astype(int)
    result = binary_metrics(truth, probabilities)
    losses = [
        sk.log_loss(truth[:, k], np.clip(probabilities[:, k], 1e-7, 1 - 1e-7), labels=[0, 1])
        for k in range(6)
    ]
    assert result["log_loss"] == pytest.approx(np.mean(losses))
    assert result["rsna_log_loss"] == pytest.approx((sum(losses) + losses[5]) / 7)
    assert result["exact_match"] == pytest.approx(sk.accuracy_score(truth, predicted))
    assert result["hamming_loss"] == pytest.approx(sk.hamming_loss(truth, predicted))
    assert result["hamming_score"] == pytest.approx(
        sk.jaccard_score(truth, predicted, average="samples", zero_division=1)
    )
    inverted = sk.recall_score(1 - truth, 1 - predicted, average=None, zero_division=np.nan)
    oracle = sk.precision_recall_fscore_support(truth, predicted, zero_division=np.nan)
    for metric, values in zip(
        ("precision", "recall", "f1", "specificity"), (*oracle[:3], inverted), strict=True
    ):
        ours = [np.nan if (x := row[metric]) is None else x for row in result["per_label"].values()]
        np.testing.assert_allclose(ours, values, equal_nan=True)
        if not np.isnan(values).all():
            assert result[metric] == pytest.approx(np.nanmean(values))
        assert result["defined_labels"][metric] == np.isfinite(values).sum()
    for column, name in enumerate(LABELS):
        if 0 < truth[:, column].sum() < samples:
            pair = truth[:, column], probabilities[:, column]
            assert result["auroc"][name] == pytest.approx(sk.roc_auc_score(*pair))
            assert result["ap"][name] == pytest.approx(sk.average_precision_score(*pair))
        else:
            assert result["auroc"][name] is None
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("constant", [0.0, 0.3, 1.0])
def test_a_constant_prediction_orders_nothing(constant):
    truth = np.arange(60).reshape(10, 6) % 7 % 2
    metrics = binary_metrics(truth, np.full(truth.shape, constant))
    assert set(metrics["auroc"].values()) == {0.5}


def test_undefined_is_none_never_a_number():
    healthy = np.zeros((4, 6), int)
    result = binary_metrics(healthy, np.full(healthy.shape, 0.01))
    assert result["precision"] is result["recall"] is result["f1"] is None
    assert result["auroc"] == result["ap"] == named(*[None] * 6)
    assert result["specificity"] == result["exact_match"] == result["hamming_score"] == 1
    # The constant 0 is already perfect: nothing to be better than.
    assert set(result["skill"].values()) == {None}
    assert binary_metrics(1 - healthy, healthy + 0.9)["specificity"] is None
    json.dumps(result, allow_nan=False)


def test_certain_and_wrong_costs_the_clip():
    truth = np.ones((1, 6), int)
    result = binary_metrics(truth, np.zeros((1, 6)))
    assert result["log_loss"] == pytest.approx(-math.log(1e-7))
    assert result["rsna_log_loss"] == pytest.approx(-math.log(1e-7))


def changed(array, value):
    array = array.astype(float)
    array[1, 5] = value
    return array


BAD = {
    "label 2": (
        changed(TRUTH, 2),
        PROBABILITIES,
        r"row 1, any: label 2\.0; expected 0 or 1, or -1",
    ),
    "no label": (np.array([TRUTH[0], [-1] * 6, TRUTH[2]]), PROBABILITIES, "row 1 has no label"),
    "label NaN": (changed(TRUTH, np.nan), PROBABILITIES, "row 1, any: label nan"),
    "NaN": (TRUTH, changed(PROBABILITIES, np.nan), r"row 1, any: probability nan; .*\(1 such"),
    "infinite": (TRUTH, changed(PROBABILITIES, np.inf), "row 1, any: probability inf"),
    "a logit": (TRUTH, changed(PROBABILITIES, -3.5), r"row 1, any: probability -3\.5"),
    "no samples": (TRUTH[:0], PROBABILITIES[:0], r"labels have the shape \(0, 6\)"),
    "five labels": (TRUTH[:, :5], PROBABILITIES[:, :5], r"shape \(3, 5\)"),
    "other lengths": (TRUTH, PROBABILITIES[:2], r"shape \(2, 6\), the labels \(3, 6\)"),
}


@pytest.mark.parametrize(("truth", "probabilities", "message"), BAD.values(), ids=BAD)
def test_bad_values_are_refused(truth, probabilities, message):
    with pytest.raises(DataError, match=message):
        binary_metrics(truth, probabilities)


def test_format_metric():
    assert format_metric(0.98765) == "0.9877"
    assert format_metric(0.5, digits=2) == "0.50"
    assert format_metric(None) == "n/a"


def test_these_modules_start_light():
    program = (
        "import sys, ich_keras.metrics.binary, ich_keras.data.labels, ich_keras.data.split;"
        "print(*{'keras', 'torch', 'albumentations', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == ""


def test_the_table_of_metrics_names_what_is_computed():
    labels = np.repeat([[1], [0]], 6, axis=1)
    metrics = binary_metrics(labels, labels * 0.8 + 0.1)
    assert set(METRICS) <= set(metrics)
    for name, metric in METRICS.items():  # all labels are right: the best value of each
        if "log_loss" not in name:
            assert metrics[name] == float(metric.higher_is_better), name
