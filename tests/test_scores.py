"""Aggregation, intervals, calibration and operating points against scikit-learn, SciPy and hand."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    log_loss,
    roc_auc_score,
    roc_curve,
)

from ich_keras.errors import DataError, UsageError
from ich_keras.labels import LABELS, NUM_LABELS, SIX
from ich_keras.metrics.aggregation import RULES, aggregate, choose_rule
from ich_keras.metrics.binary import binary_metrics
from ich_keras.metrics.calibration import calibration, fit_temperature, with_temperature
from ich_keras.metrics.intervals import (
    _Columns,
    bootstrap,
    mean_bootstrap,
    mean_paired_bootstrap,
    paired_bootstrap,
)
from ich_keras.metrics.operating import (
    THRESHOLDS,
    choose_thresholds,
    rates_at,
    threshold_at_specificity,
    threshold_table,
)


def table(n=400, seed=0, digits=2):
    """Truth, probabilities that know something of it (rounded: many are equal), patients."""
    random = np.random.default_rng(seed)
    truth = (random.random((n, NUM_LABELS)) < 0.3).astype(np.int8)
    values = np.clip(0.35 * truth + random.normal(0.3, 0.2, truth.shape), 0.01, 0.99)
    patients = random.integers(0, max(n // 5, 1), n).astype(str)
    return truth, values.round(digits), patients


# Aggregation.


def test_rules_by_hand():
    values = np.zeros((5, 6))
    values[:, 0] = [0.1, 0.8, 0.5, 0.2, 0.4]
    values[:, 5] = [0.5, 0.5, 0.5, 1.0, 0.0]
    uids = ["b", "b", "b", "a", "b"]
    expected = {
        "max": ([0.8, 0.2], [0.5, 1.0]),
        "mean of the top 3": ([(0.8 + 0.5 + 0.4) / 3, 0.2], [0.5, 1.0]),
        "noisy-or": ([1 - 0.9 * 0.2 * 0.5 * 0.6, 0.2], [0.875, 1.0]),
    }
    assert set(expected) == set(RULES)
    for rule, (epidural, any_bleed) in expected.items():
        found = aggregate(values, uids, rule)
        assert list(found.index) == ["b", "a"]
        assert list(found.columns) == list(LABELS)
        np.testing.assert_allclose(found["epidural"], epidural, atol=1e-6)
        np.testing.assert_allclose(found["any"], any_bleed, atol=1e-6)
    with pytest.raises(UsageError, match="aggregation 'median'; expected one of max, mean of"):
        aggregate(values, uids, "median")


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 99))
def test_rules_are_ordered_and_do_not_depend_on_the_order_of_slices(n, series, seed):
    random = np.random.default_rng(seed)
    values, uids = random.random((n, 6)), random.integers(0, series, n).astype(str)
    found = {rule: aggregate(values, uids, rule) for rule in RULES}
    expected = pd.DataFrame(values, columns=list(LABELS)).groupby(uids).max()
    np.testing.assert_array_equal(found["max"].loc[expected.index], expected)
    assert (found["mean of the top 3"] <= found["max"] + 1e-12).all(axis=None)
    assert (found["noisy-or"] >= found["max"] - 1e-12).all(axis=None)
    order = random.permutation(n)
    for rule, before in found.items():
        after = aggregate(values[order], uids[order], rule).loc[before.index]
        np.testing.assert_allclose(after, before, atol=1e-12)


def test_the_rule_is_the_one_with_the_least_loss():
    truth, values, _ = table(600)
    uids = np.repeat(np.arange(60), 10).astype(str)
    rule, losses = choose_rule(truth, values, uids)
    labels = aggregate(truth, uids).to_numpy().astype(int)
    for name, found in losses.items():
        again = binary_metrics(labels, aggregate(values, uids, name).to_numpy())["log_loss"]
        assert found == again
    assert losses[rule] == min(losses.values())
    # Slices that are all a little positive in negative series: their product is not.
    faint = np.full((600, 6), 0.2)
    negative = np.zeros((600, 6), int)
    assert choose_rule(negative, faint, uids)[0] != "noisy-or"


# Intervals.


def test_values_are_those_of_scikit_learn():
    truth, values, patients = table()
    found = bootstrap(truth, values, patients, resamples=60)
    whole = binary_metrics(truth, values)
    for column, name in enumerate(LABELS):
        y, p = truth[:, column], values[:, column]
        assert found[f"auroc/{name}"]["value"] == pytest.approx(roc_auc_score(y, p), abs=1e-12)
        assert found[f"ap/{name}"]["value"] == pytest.approx(average_precision_score(y, p))
        assert found[f"log_loss/{name}"]["value"] == pytest.approx(log_loss(y, p))
    brier = np.mean([brier_score_loss(y, p) for y, p in zip(truth.T, values.T, strict=True)])
    assert found["brier"]["value"] == pytest.approx(brier)
    for name in ("log_loss", "rsna_log_loss", "exact_match"):
        assert found[name]["value"] == pytest.approx(whole[name])
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]


@settings(max_examples=25)
@given(st.integers(2, 60), st.integers(0, 999), st.sampled_from([1, 2, 8]))
def test_weights_count_rows_as_often(n, seed, digits):
    truth, values, _ = table(n, seed, digits)
    values = np.clip(values, 0.01, 0.99)
    weights = np.random.default_rng(seed).integers(0, 4, n)
    if not weights.any():
        weights[0] = 1
    found = _Columns(truth, values, SIX).metrics(weights[np.newaxis].astype(float))
    again, chances = np.repeat(truth, weights, axis=0), np.repeat(values, weights, axis=0)
    expected = binary_metrics(again, chances)
    assert found["log_loss"][0] == pytest.approx(expected["log_loss"])
    assert found["exact_match"][0] == pytest.approx(expected["exact_match"])
    for name in LABELS:
        for metric in ("auroc", "ap"):
            value, known = found[f"{metric}/{name}"][0], expected[metric][name]
            if known is None:
                assert np.isnan(value)
            else:
                assert value == pytest.approx(known, abs=1e-9)


def test_the_interval_of_a_mean_is_scipys():
    truth, values, _ = table(300)
    patients = np.arange(300).astype(str)
    found = bootstrap(truth, values, patients, resamples=4000, seed=1)["exact_match"]
    exact = ((values >= 0.5) == (truth == 1)).all(axis=1).astype(float)
    scipys = stats.bootstrap(
        (exact,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert found["low"] == pytest.approx(scipys.low, abs=0.008)
    assert found["high"] == pytest.approx(scipys.high, abs=0.008)


def test_ten_copies_of_a_patients_slices_know_no_more():
    truth, values, patients = table(100)
    one = bootstrap(truth, values, patients, resamples=200)
    ten = bootstrap(
        np.repeat(truth, 10, axis=0),
        np.repeat(values, 10, axis=0),
        np.repeat(patients, 10),
        resamples=200,
    )
    for name, interval in one.items():
        for key in ("value", "low", "high"):
            assert ten[name][key] == pytest.approx(interval[key], abs=1e-9), name


def test_differences_are_paired():
    truth, values, patients = table(300)
    same = paired_bootstrap(truth, values, values, patients, resamples=50)
    assert all(row["value"] == row["low"] == row["high"] == 0 for row in same.values())
    assert all(row["share_above_0"] == 0 for row in same.values())
    better = np.clip(values + np.where(truth == 1, 0.1, -0.1), 0.01, 0.99)
    found = paired_bootstrap(truth, better, values, patients, resamples=200)
    one, other = (bootstrap(truth, v, patients, resamples=200) for v in (better, values))
    for name, row in found.items():
        assert row["value"] == pytest.approx(one[name]["value"] - other[name]["value"])
    assert found["log_loss"]["high"] < 0
    assert found["auroc/any"]["low"] > 0
    assert found["auroc/any"]["share_above_0"] == 1
    # Tighter than the difference of independent intervals: both saw the same patients.
    width = found["log_loss"]["high"] - found["log_loss"]["low"]
    assert width < one["log_loss"]["high"] - one["log_loss"]["low"]


def test_means_of_models_on_rows_of_their_own():
    truth, values, patients = table(300)
    both = truth, values, patients
    # Rows in another order, some of them missing: patients are matched by name.
    order = np.random.default_rng(0).permutation(300)[:200]
    fewer = tuple(part[order] for part in both)
    found = mean_bootstrap([both, fewer], resamples=100)
    expected = log_loss(truth[:, 5], values[:, 5]) + log_loss(truth[order, 5], values[order, 5])
    assert found["log_loss/any"]["value"] == pytest.approx(expected / 2)
    # The same rows twice know no more than once.
    assert mean_bootstrap([both, both], resamples=100) == bootstrap(*both, resamples=100)
    # Patients of their own do: the interval is narrower by the root of two.
    strangers = truth, values, np.array([f"other {name}" for name in patients])
    apart = mean_bootstrap([both, strangers], resamples=400)["log_loss"]
    alone = bootstrap(*both, resamples=400)["log_loss"]
    width = alone["high"] - alone["low"]
    assert apart["high"] - apart["low"] == pytest.approx(width / 2**0.5, rel=0.2)
    # A metric that one model has not, the mean has not.
    none = np.zeros_like(truth), values, patients
    assert mean_bootstrap([both, none], resamples=50)["auroc/any"]["value"] is None
    with pytest.raises(DataError, match="expected the same rows"):
        mean_bootstrap([both, (truth, values[:9], patients)])


def test_means_of_differences():
    truth, values, patients = table(300)
    worse = np.clip(values + np.where(truth == 1, -0.1, 0.1), 0.01, 0.99)
    pairs = [(truth, values, worse, patients), (truth, values, values, patients)]
    found = mean_paired_bootstrap(pairs, resamples=100)
    one = paired_bootstrap(truth, values, worse, patients, resamples=100)
    for name, row in one.items():
        for key in ("value", "low", "high"):
            assert found[name][key] == pytest.approx(row[key] / 2), name
        assert found[name]["share_above_0"] == row["share_above_0"]


def test_what_is_undefined_has_no_interval():
    truth, values, patients = table(40)
    truth[:, 0] = 0
    truth[:, 1] = 0
    truth[3, 1] = 1
    found = bootstrap(truth, values, patients, resamples=100)
    nothing = found["auroc/epidural"]
    assert (nothing["value"], nothing["low"], nothing["resamples"]) == (None, None, 0)
    rare = found["auroc/intraparenchymal"]
    assert rare["value"] is not None
    assert rare["low"] is None
    assert 40 < rare["resamples"] < 90
    with pytest.raises(DataError, match=r"1 patient\(s\); resampling needs at least two"):
        bootstrap(truth, values, ["a"] * 40)
    with pytest.raises(DataError, match="expected the same rows and labels"):
        bootstrap(truth, values[:9], patients)


# Calibration.


def test_reliability_and_errors_are_those_of_scikit_learn():
    truth, values, _ = table(500, digits=3)
    values[0, :] = 1.0
    for column, (name, found) in enumerate(calibration(truth, values).items()):
        y, p = truth[:, column], values[:, column]
        assert found["brier"] == pytest.approx(brier_score_loss(y, p))
        frequency, mean = calibration_curve(y, p, n_bins=10)
        np.testing.assert_allclose([row["frequency"] for row in found["bins"]], frequency)
        np.testing.assert_allclose([row["mean_probability"] for row in found["bins"]], mean)
        assert sum(row["count"] for row in found["bins"]) == 500
        assert name == LABELS[column]


def test_the_calibration_error_by_hand():
    truth = np.zeros((4, 6), int)
    truth[[0, 2], 0] = 1
    values = np.full((4, 6), 0.0)
    values[:, 0] = [0.92, 0.94, 0.12, 0.14]
    found = calibration(truth, values)["epidural"]
    # Two bins of two: |0.5 - 0.93| and |0.5 - 0.13|.
    assert found["ece"] == pytest.approx((0.43 + 0.37) / 2)
    assert calibration(truth, values)["any"]["ece"] == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_temperature_is_found_again(temperature):
    random = np.random.default_rng(0)
    logits = random.normal(-1, 2, (20000, 6))
    truth = (random.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(int)
    values = 1 / (1 + np.exp(-logits * temperature))
    found = fit_temperature(truth, values)
    assert found == pytest.approx(temperature, rel=0.03)
    better = with_temperature(values, found)
    assert log_loss(truth.ravel(), better.ravel()) <= log_loss(truth.ravel(), values.ravel())
    np.testing.assert_allclose(with_temperature(values, 1.0), values, atol=1e-7)
    order = np.argsort(values[:, 0], kind="stable")
    assert (np.diff(better[order, 0]) >= 0).all()
    with pytest.raises(DataError, match="expected equal"):
        fit_temperature(truth[:5], values)


# Operating points.


@given(st.integers(2, 80), st.integers(0, 999), st.sampled_from([0.5, 0.9, 0.95, 0.99, 1.0]))
def test_a_threshold_is_the_lowest_that_is_specific_enough(n, seed, wanted):
    truth, values, _ = table(n, seed)
    y, p = truth[:, 0] == 1, values[:, 0]
    limit = threshold_at_specificity(y, p, wanted)
    if y.all():
        assert limit is None
        return
    negatives = p[~y]
    assert (negatives < limit).mean() >= wanted - 1e-9
    lower = np.unique(p)[np.unique(p) < limit]
    if len(lower):
        assert (negatives < lower[-1]).mean() < wanted
    if not y.any():
        return
    # scikit-learn's curve reaches the same sensitivity at that specificity.
    false, true, _ = roc_curve(y, p, drop_intermediate=False)
    assert (p[y] >= limit).mean() == pytest.approx(true[false <= 1 - wanted + 1e-9].max())


def test_rates_at_thresholds():
    truth, values, _ = table()
    chosen = choose_thresholds(truth, values)
    assert list(chosen) == ["0.90", "0.95", "0.99"]
    for wanted, thresholds in chosen.items():
        rates = rates_at(truth, values, thresholds)
        for name in LABELS:
            assert rates[name]["specificity"] >= float(wanted) - 1e-9
            assert rates[name]["threshold"] == thresholds[name]
    recalls = [rates_at(truth, values, chosen[w])["any"]["recall"] for w in chosen]
    assert recalls == sorted(recalls, reverse=True)
    rows = threshold_table(truth, values)
    assert [row["threshold"] for row in rows] == list(THRESHOLDS)
    middle = next(row for row in rows if row["threshold"] == 0.5)["labels"]["any"]
    known = binary_metrics(truth, values)["per_label"]["any"]
    assert (middle["recall"], middle["specificity"]) == (known["recall"], known["specificity"])
    truth[:, 2] = 1
    missing = choose_thresholds(truth, values)["0.90"]
    assert missing["intraventricular"] is None
    assert rates_at(truth, values, missing)["intraventricular"]["recall"] is None
