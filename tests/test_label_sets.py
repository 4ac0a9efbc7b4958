"""Labels other than the six: their names, and metrics of missing and of exclusive labels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from ich_keras.data.labels import is_positive
from ich_keras.errors import UsageError
from ich_keras.labels import SIX, LabelSet, label_set
from ich_keras.metrics.aggregation import aggregate, choose_rule
from ich_keras.metrics.binary import CLIP, binary_metrics
from ich_keras.metrics.calibration import calibration, fit_temperature, with_temperature
from ich_keras.metrics.intervals import bootstrap, paired_bootstrap
from ich_keras.metrics.operating import choose_thresholds, rates_at

TWO = LabelSet(("left", "right"))
THREE = LabelSet(("normal", "bleed", "mass"), exclusive=True)

BAD = {
    "a string": ("any", {}, "expected a sequence of names"),
    "none": ((), {}, "0 labels; expected 1 to 1000"),
    "empty": (("",), {}, "label '' is no usable name"),
    "comma": (("a,b",), {}, "label 'a,b' is no usable name"),
    "formula": (("=1",), {}, "no usable name"),
    "path": (("../a",), {}, "no usable name"),
    "line end": (("a\n",), {}, "no usable name"),
    "long": (("a" * 65,), {}, "no usable name"),
    "number": ((1, 2), {}, "label 1 is no usable name"),
    "twice": (("a", "b", "a"), {}, "label 'a' is given 2 times"),
    "as a result": (("a", "raw_a"), {}, "label 'raw_a' begins as columns of results do"),
    "no any": (("a", "b"), {"any_label": "c"}, "any_label 'c' is not one of the labels"),
    "exclusive any": (("a", "b"), {"any_label": "a", "exclusive": True}, "exclusive labels are"),
    "exclusive one": (("a",), {"exclusive": True}, "exclusive labels are two or more"),
}


@pytest.mark.parametrize(("names", "options", "message"), BAD.values(), ids=BAD)
def test_unusable_labels_are_refused(names, options, message):
    with pytest.raises(UsageError, match=message):
        LabelSet(names, **options)


def test_what_a_person_gives_becomes_a_label_set():
    assert label_set(None) is SIX
    assert label_set(SIX.names) == SIX
    assert label_set(["a", "any"]).any_label == "any"
    assert label_set(["any"]) == LabelSet(("any",))
    assert label_set(2).names == ("class_0", "class_1")
    assert label_set(("a", "any"), exclusive=True) == LabelSet(("a", "any"), exclusive=True)
    assert LabelSet.from_dict(THREE.to_dict()) == THREE and LabelSet.from_dict(None) == SIX
    assert SIX.competition_weights == (1, 1, 1, 1, 1, 2) and TWO.competition_weights is None
    assert SIX.parts == SIX.names[:5] and TWO.parts == TWO.names
    for wrong in (0, -1, True):
        with pytest.raises(UsageError, match="labels"):
            label_set(wrong)
    with pytest.raises(UsageError, match="beside a LabelSet that is not exclusive"):
        label_set(TWO, exclusive=True)
    with pytest.raises(UsageError, match="the six labels of RSNA are not exclusive"):
        label_set(None, exclusive=True)
    with pytest.raises(UsageError, match="label 'up' is unknown; expected one of left, right"):
        TWO.index("up")


def with_holes(n, seed, labels=6):
    random = np.random.default_rng(seed)
    truth = random.integers(0, 2, (n, labels))
    holes = random.random((n, labels)) < 0.4
    holes[:, 0] &= holes[:, 1:].all(axis=1) == 0  # every sample has a label
    holes[holes.all(axis=1), 0] = False
    values = random.random((n, labels)).round(2)
    return np.where(holes, -1, truth), values


@settings(max_examples=30)
@given(st.integers(4, 50), st.integers(0, 999))
def test_missing_labels_count_nowhere(n, seed):
    truth, values = with_holes(n, seed)
    found = binary_metrics(truth, values)
    losses = {}
    for column, name in enumerate(SIX.names):
        there = truth[:, column] >= 0
        row = found["per_label"][name]
        assert row["positive"] == (truth[:, column] == 1).sum()
        if not there.any():
            assert row["log_loss"] is None and row["auroc"] is None
            continue
        true, chances = truth[there, column], values[there, column]
        losses[name] = sk.log_loss(true, np.clip(chances, CLIP, 1 - CLIP), labels=[0, 1])
        assert row["log_loss"] == pytest.approx(losses[name])
        if 0 < true.sum() < len(true):
            assert row["auroc"] == pytest.approx(sk.roc_auc_score(true, chances))
            assert row["recall"] == pytest.approx(sk.recall_score(true, chances >= 0.5))
    clipped = np.clip(values, CLIP, 1 - CLIP)
    entropy = -np.log(np.where(truth == 1, clipped, 1 - clipped))
    assert found["log_loss"] == pytest.approx(entropy[truth >= 0].mean())
    weights = [2 if name == "any" else 1 for name in losses]
    assert found["rsna_log_loss"] == pytest.approx(np.average([*losses.values()], weights=weights))
    whole = (truth >= 0).all(axis=1)
    if whole.any():
        right = sk.accuracy_score(truth[whole], (values >= 0.5)[whole].astype(int))
        assert found["exact_match"] == pytest.approx(right)
    else:
        assert found["exact_match"] is None and found["skill"]["exact_match"] is None
    assert found["n"].get("present", dict.fromkeys(SIX.names, n)) == dict(
        zip(SIX.names, (truth >= 0).sum(axis=0).tolist(), strict=True)
    )


@settings(max_examples=15)
@given(st.integers(8, 40), st.integers(0, 999))
def test_intervals_and_metrics_agree_where_labels_are_missing(n, seed):
    truth, values = with_holes(n, seed)
    patients = [f"p{row // 2}" for row in range(n)]
    metrics, found = binary_metrics(truth, values), bootstrap(truth, values, patients, 20)
    for name in ("log_loss", "rsna_log_loss", "exact_match"):
        assert found[name]["value"] == pytest.approx(metrics[name])
    for name in SIX.names:
        assert found[f"auroc/{name}"]["value"] == pytest.approx(metrics["auroc"][name])
        assert found[f"log_loss/{name}"]["value"] == pytest.approx(
            metrics["per_label"][name]["log_loss"]
        )
    same = paired_bootstrap(truth, values, values, patients, 20)
    assert {row["value"] for row in same.values()} <= {0.0, None}


def test_a_hole_changes_what_its_probability_could_change():
    truth, values = with_holes(30, 1)
    other = np.where(truth < 0, 1 - values, values)
    patients = [f"p{row}" for row in range(30)]
    assert binary_metrics(truth, values) == binary_metrics(truth, other)
    assert bootstrap(truth, values, patients, 20) == bootstrap(truth, other, patients, 20)
    assert calibration(truth, values) == calibration(truth, other)
    assert fit_temperature(truth, values) == fit_temperature(truth, other)
    assert choose_thresholds(truth, values) == choose_thresholds(truth, other)


def test_exclusive_labels_are_scored_as_classes():
    random = np.random.default_rng(0)
    classes = random.integers(0, 3, 60)
    logits = random.normal(size=(60, 3)) + 1.5 * np.eye(3)[classes]
    values = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    truth = np.eye(3, dtype=int)[classes]
    found = binary_metrics(truth, values, label_set=THREE)
    assert found["log_loss"] == pytest.approx(sk.log_loss(classes, values))
    assert found["exact_match"] == pytest.approx(sk.accuracy_score(classes, values.argmax(axis=1)))
    recalls = sk.recall_score(classes, values.argmax(axis=1), average=None)
    assert [row["recall"] for row in found["per_label"].values()] == pytest.approx(recalls.tolist())
    assert found["auroc"]["mass"] == pytest.approx(sk.roc_auc_score(classes == 2, values[:, 2]))
    assert found["rsna_log_loss"] is None
    usual = np.bincount(classes).max() / 60
    assert found["baseline"]["all_negative"]["exact_match"] == pytest.approx(usual)
    intervals = bootstrap(truth, values, [f"p{row}" for row in range(60)], 50, label_set=THREE)
    assert intervals["log_loss"]["value"] == pytest.approx(found["log_loss"])
    assert intervals["exact_match"]["value"] == pytest.approx(found["exact_match"])
    assert "rsna_log_loss" not in intervals
    assert set(rates_at(truth, values, dict.fromkeys(THREE.names, 0.3), THREE)) == {*THREE.names}


def test_the_temperature_of_exclusive_labels_is_that_of_a_softmax():
    """Probabilities of a softmax at temperature 1/2 of what is true."""
    random = np.random.default_rng(3)
    logits = random.normal(size=(20_000, 3))
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    classes = (chances.cumsum(axis=1) < random.random((len(logits), 1))).sum(axis=1)
    sharp = np.exp(2 * logits) / np.exp(2 * logits).sum(axis=1, keepdims=True)
    found = fit_temperature(np.eye(3, dtype=int)[classes], sharp, THREE)
    assert found == pytest.approx(2, abs=0.06)
    np.testing.assert_allclose(with_temperature(sharp, 2.0, THREE), chances, atol=1e-5)


def test_series_of_exclusive_labels_get_the_mean():
    values = np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.1, 0.8]])
    truth = np.array([[0, 1, 0], [0, 1, 0], [0, 0, 1]])
    rule, losses = choose_rule(truth, values, ["a", "a", "b"], THREE)
    assert rule == "mean" and losses["mean"] == pytest.approx(-np.log([0.5, 0.8]).mean())
    assert aggregate(values, ["a", "a", "b"], rule, THREE).loc["a"].tolist() == pytest.approx(
        [0.4, 0.5, 0.1]
    )


def test_where_any_is_missing_a_named_bleed_is_positive():
    values = np.array([[1, -1], [0, -1], [0, 0], [-1, 1], [1, 0]])
    found = is_positive(values, LabelSet(("epidural", "any"), "any"))
    assert found.tolist() == [True, False, False, True, False]


def test_exclusive_labels_of_which_some_are_missing_everywhere_have_no_loss():
    truth = np.array([[1, -1, -1], [0, -1, 1]])
    found = binary_metrics(truth, np.full((2, 3), 1 / 3), label_set=THREE)
    assert found["log_loss"] is None and found["exact_match"] is None
