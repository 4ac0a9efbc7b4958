"""ROC and precision-recall curves: scikit-learn's points, and bands made by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_curve, roc_auc_score, roc_curve

from ich_keras.errors import DataError
from ich_keras.labels import LabelSet
from ich_keras.metrics.curves import POINTS, curves
from ich_keras.metrics.intervals import bootstrap, patient_draws


def drawn(seed, count=400, digits=None):
    random = np.random.default_rng(seed)
    truth = random.random(count) < 0.3
    values = 1 / (1 + np.exp(-random.normal(np.where(truth, 1, -1), 1.5)))
    return truth, values if digits is None else values.round(digits)


def among(points, all_points):
    """Whether each point is one of the others, up to rounding."""
    distance = np.abs(points[:, np.newaxis] - all_points[np.newaxis]).max(axis=2)
    return (distance.min(axis=1) < 1e-12).all()


@pytest.mark.parametrize("digits", [None, 2, 1])
@pytest.mark.parametrize("count", [7, 90, 5000])
def test_the_points_are_scikit_learns(count, digits):
    truth, values = drawn(count, count, digits)
    truth[:2] = True, False
    found = curves(truth, values)
    rate, sensitivity, _ = roc_curve(truth, values, drop_intermediate=False)
    points = np.stack([found.roc.across, found.roc.up], axis=1)
    assert among(points, np.stack([rate, sensitivity], axis=1))
    assert points[0].tolist() == [0, 0] and points[-1].tolist() == [1, 1]
    assert (np.diff(points, axis=0) >= 0).all()
    precision, recall, _ = precision_recall_curve(truth, values)
    points = np.stack([found.pr.across, found.pr.up], axis=1)
    # The first one is the second, drawn on to recall 0.
    assert among(points[1:], np.stack([recall, precision], axis=1))
    assert points[0].tolist() == [0, points[1, 1]] and points[-1, 0] == 1
    assert len(found.roc.across) <= POINTS + 1
    assert np.trapezoid(found.roc.up, found.roc.across) == pytest.approx(
        roc_auc_score(truth, values), abs=1e-12 if len(set(values)) <= POINTS else 0.003
    )


def test_bands_are_percentiles_of_curves_of_resampled_patients():
    truth, values = drawn(3, 60, 2)
    patients = np.arange(60) // 4
    found = curves(truth, values, patients, resamples=40, seed=5)
    lines, steps = [], []
    for counts in np.concatenate(list(patient_draws(15, 40, 5))):
        rows = np.repeat(np.arange(60), counts[patients])
        rate, sensitivity, _ = roc_curve(truth[rows], values[rows], drop_intermediate=False)
        lines.append(np.interp(found.roc.grid, rate, sensitivity))
        precision, recall, _ = precision_recall_curve(truth[rows], values[rows])
        # From the highest threshold; of those with this recall, the highest.
        order = [np.flatnonzero(recall[:-1] >= wanted - 1e-12).max() for wanted in found.pr.grid]
        lowest = np.flatnonzero(recall[:-1] > 0).max()
        steps.append(precision[np.minimum(order, lowest)])
    for curve, drawn_ones in ((found.roc, lines), (found.pr, steps)):
        low, high = np.quantile(drawn_ones, [0.025, 0.975], axis=0)
        np.testing.assert_allclose(curve.low, low, atol=1e-9)
        np.testing.assert_allclose(curve.high, high, atol=1e-9)


def test_bands_go_with_the_intervals_of_the_table():
    truth, values = drawn(8, 500)
    patients = np.arange(500) // 5
    band = curves(truth, values, patients).roc
    interval = bootstrap(
        truth[:, np.newaxis].astype(int),
        values[:, np.newaxis],
        patients,
        label_set=LabelSet(("a",)),
    )["auroc/a"]
    # Where each single curve is lowest it is not the area that is, so the band is wider.
    for bound, end in ((band.low, "low"), (band.high, "high")):
        assert np.trapezoid(bound, band.grid) == pytest.approx(interval[end], abs=0.03)


def test_what_is_not_defined_is_none():
    nothing = curves(np.zeros(3, bool), np.array([0.1, 0.2, 0.3]))
    assert nothing.roc is None and nothing.pr is None
    everything = curves(np.ones(3, bool), np.array([0.1, 0.2, 0.3]), ["a", "b", "c"])
    assert everything.roc is None and everything.pr.up.tolist() == [1, 1, 1, 1]
    one = curves(np.array([True, False]), np.array([0.1, 0.2]), ["a", "a"])
    assert len(one.roc.grid) == len(one.pr.grid) == 0
    # One patient has the only positive: more than a third of the resamples lack it.
    rare = curves(np.array([True, False, False]), np.array([0.9, 0.2, 0.1]), ["a", "b", "c"])
    assert len(rare.roc.grid) == 0


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=40))
def test_any_answers_have_curves_within_the_square(rows):
    truth, values = np.array([t for t, _ in rows]), np.array([v for _, v in rows])
    found = curves(truth, values, np.arange(len(rows)) % 3, resamples=10)
    for curve in (found.roc, found.pr):
        if curve is not None:
            for part in (curve.across, curve.up, curve.low, curve.high):
                assert np.isfinite(part).all() and ((part >= 0) & (part <= 1)).all()
            assert (curve.low <= curve.high + 1e-12).all()


def test_arrays_of_other_lengths_are_refused():
    with pytest.raises(DataError, match=r"truth \(2,\), probabilities \(3,\), no patients"):
        curves(np.zeros(2, bool), np.zeros(3))
    with pytest.raises(DataError, match=r"1 patients"):
        curves(np.zeros(2, bool), np.zeros(2), ["a"])
