"""The thesis's numbers and its convention for metrics."""

import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sk

from ich_keras.labels import ANY, LABELS, SUBTYPES
from ich_keras.metrics.binary import binary_metrics

# Not installed: it runs from a clone.
sys.path.append(str(Path(__file__).parents[1]))

from experiments.convention import thesis_metrics
from experiments.tables import (
    PUBLISHED,
    SERIES_HEALTHY,
    SERIES_POSITIVE,
    SERIES_VALIDATION,
)


def whole_series_validation():
    """A table with the counts of the thesis's validation set of whole series."""
    truth = np.zeros((SERIES_VALIDATION, len(LABELS)), int)
    positive = SERIES_VALIDATION - SERIES_HEALTHY
    assert positive == SERIES_POSITIVE[ANY]
    truth[:positive, -1] = 1
    place = 0
    for column, name in enumerate(SUBTYPES):
        for _ in range(SERIES_POSITIVE[name]):
            truth[place % positive, column] = 1
            place += 1
    np.testing.assert_array_equal(truth.sum(axis=0), list(SERIES_POSITIVE.values()))
    np.testing.assert_array_equal(truth[:, :-1].any(axis=1), truth[:, -1] == 1)
    return np.random.default_rng(0).permutation(truth)


def test_table_3_is_what_no_for_everyone_scores():
    truth = whole_series_validation()
    found = thesis_metrics(truth, np.zeros(truth.shape), batch_size=1)
    rounded = [round(found[n], 4) for n in ("accuracy", "hamming_loss", "hamming_score")]
    assert rounded == [0.6015, 0.1994, 0.6015]
    table = PUBLISHED["series"]
    for name in ("accuracy", "hamming_loss", "hamming_score"):
        assert found[name] == pytest.approx(getattr(table, name), abs=0.001)
    # And its loss is worse than that of always answering the prevalence.
    baseline = binary_metrics(truth, np.zeros(truth.shape))["baseline"]["prevalence"]
    assert baseline["log_loss"] == pytest.approx(0.4534, abs=5e-5)
    assert baseline["log_loss"] < table.loss


def test_one_batch_of_all_is_scikit_learn():
    random = np.random.default_rng(1)
    truth = (random.random((90, 6)) < 0.4).astype(int)
    values = np.clip(0.4 * truth + random.random((90, 6)) * 0.7, 0.01, 0.99)
    predicted = values >= 0.5
    found = thesis_metrics(truth, values, batch_size=90)
    assert found["loss"] == pytest.approx(sk.log_loss(truth.ravel(), values.ravel()))
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted))
    assert found["hamming_loss"] == pytest.approx(sk.hamming_loss(truth, predicted))
    for name, score in (
        ("precision", sk.precision_score),
        ("recall", sk.recall_score),
        ("f1", sk.f1_score),
    ):
        assert found[name] == pytest.approx(score(truth, predicted, average="macro"))
    ours = binary_metrics(truth, values)
    assert found["specificity"] == pytest.approx(ours["specificity"])
    assert found["hamming_score"] == pytest.approx(ours["hamming_score"])


def test_means_over_batches_depend_on_the_batches():
    truth = np.zeros((4, 6), int)
    truth[0] = 1
    values = np.where(truth == 1, 0.9, 0.1)
    # By hand: all is right, but three of four batches of one have nothing to be precise about.
    assert thesis_metrics(truth, values, 1)["precision"] == pytest.approx(0.25)
    assert thesis_metrics(truth, values, 1, zero_division=1)["precision"] == pytest.approx(1)
    assert thesis_metrics(truth, values, 2)["precision"] == pytest.approx(0.5)
    assert thesis_metrics(truth, values, 4)["precision"] == pytest.approx(1)
    # The last, smaller batch counts as much as the first.
    values[3] = 0.9
    assert thesis_metrics(truth, values, 3)["accuracy"] == pytest.approx((1 + 0) / 2)
