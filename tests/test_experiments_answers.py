"""The report on answers: choices never see the patients that they are judged on."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import log_loss

from experiments.answers import (
    ERROR_RATES,
    FOLDS,
    Answered,
    answered,
    calibration_errors,
    estimate,
    group_errors,
    log_losses,
    positives,
    reliability,
)
from experiments.report.answers import answers_section
from experiments.scores import Scored
from ich_keras.labels import ANY, LABELS
from ich_keras.metrics.conformal import HIGH, LOW, UNSURE

COLUMN = LABELS.index(ANY)


def part_of(num_patients, per_patient=3, seed=0, sharpness=1.0):
    """Samples whose probabilities are right, but for a factor of their logits."""
    random = np.random.default_rng(seed)
    patients = np.repeat(np.arange(num_patients), per_patient)
    logits = random.normal(0, 1, (num_patients, 1)).repeat(per_patient, 0) * 2
    logits = logits + random.normal(0, 0.5, (len(patients), len(LABELS)))
    truth = (random.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(int)
    values = 1 / (1 + np.exp(-sharpness * logits))
    return Scored(pd.Index([f"s{n}" for n in range(len(patients))]), patients, truth, values)


@pytest.fixture(scope="module")
def found():
    return [answered(part_of(60, seed=seed, sharpness=3), repeats=4) for seed in range(3)]


def test_choices_do_not_see_the_patients_that_they_are_judged_on():
    part = part_of(40)
    own = part.patients == 7
    plain = answered(part, repeats=2)
    truth, values = part.truth.copy(), part.values.copy()
    # The deal looks at whether a patient has `any`: that stays.
    truth[np.ix_(own, np.arange(COLUMN))] = 1 - truth[np.ix_(own, np.arange(COLUMN))]
    changed = answered(Scored(part.names, part.patients, truth, values), repeats=2)
    np.testing.assert_array_equal(plain.scaled[:, own], changed.scaled[:, own])
    assert not np.array_equal(plain.scaled, changed.scaled)
    values[own] = 0.999
    changed = answered(Scored(part.names, part.patients, part.truth, values), repeats=2)
    others = np.flatnonzero(~own)
    assert any(
        not np.array_equal(plain.decisions[rate][:, others], changed.decisions[rate][:, others])
        for rate in plain.decisions
    )
    assert (changed.groups[0.2][:, own] != LOW).all() and changed.decisions[0.9][:, own].all()


def test_temperature_makes_sure_probabilities_right(found):
    for one in found:
        assert one.temperatures.shape == (4, FOLDS)
        assert one.temperatures.mean() == pytest.approx(3, rel=0.25)
    errors = calibration_errors(found)
    assert np.mean(errors["after"]) < 0.75 * np.mean(errors["before"])
    losses = log_losses(found)
    expected = np.mean(
        [
            np.mean([log_loss(one.part.truth[:, n], one.part.values[:, n]) for n in range(6)])
            for one in found
        ]
    )
    assert losses["before"].value == pytest.approx(expected, abs=1e-4)
    difference = losses["difference"]
    assert difference.value == pytest.approx(losses["after"].value - losses["before"].value)
    assert difference.high < 0
    mean, frequency = reliability(found, is_scaled=False)
    again, right = reliability(found, is_scaled=True)
    assert np.abs(np.subtract(again, right)).max() < np.abs(np.subtract(mean, frequency)).max()


def test_groups_are_wrong_as_often_as_stated():
    answers = [answered(part_of(80, seed=seed), repeats=4) for seed in range(6)]
    for rate in (0.1, 0.2, 0.3):
        errors = group_errors(answers, rate)
        for name in ("low", "high"):
            # At high rates some samples are unlike both classes, which is no error.
            assert rate - (0.06 if rate < 0.3 else 0.15) < errors[name].value < rate + 0.06
            assert errors[name].low < errors[name].value < errors[name].high
            assert len(errors[name].seeds) == 6
    unsure = [group_errors(answers, rate)["unsure positive"].value for rate in (0.1, 0.2, 0.3)]
    assert unsure == sorted(unsure, reverse=True)


def by_hand(groups, yes, truth, patients):
    part = Scored(pd.Index(range(len(truth))), np.array(patients), np.array(truth), np.array(truth))
    groups = {0.1: np.array(groups, object)}
    return Answered(part, np.ones((2, 1)), np.ones((2, *part.truth.shape)), groups, {0.9: yes})


def test_shares_by_hand():
    truth = np.repeat([[1], [1], [1], [0], [0]], 6, axis=1)
    groups = [[LOW, HIGH, HIGH, HIGH, LOW], [LOW, LOW, HIGH, UNSURE, LOW]]
    yes = np.array([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]], bool)
    one = by_hand(groups, yes, truth, [1, 1, 2, 2, 3])
    errors = group_errors([one], 0.1)
    # Patient 1: a half of 1.5 and 0.5; patient 2 has none that is low.
    assert errors["low"].value == pytest.approx((0.75 + 0) / 2)
    assert errors["high"].value == pytest.approx((0.5 + 0) / 2)
    assert errors["unsure negative"].value == pytest.approx(0.25)
    assert errors["unsure positive"].value == 0
    shares = positives([one], 0.9, 0.1)
    assert shares["false"].value == pytest.approx((1 + 0.5) / 2)
    assert shares["false kept"].value == pytest.approx((0.5 + 0) / 2)
    assert shares["true"].value == pytest.approx((0.5 + 1 + 1) / 3)
    assert shares["true kept"].value == pytest.approx((0 + 0.5 + 1) / 3)
    assert group_errors([one], 0.2) is None and group_errors([], 0.1) is None
    assert positives([one], 0.9, 0.2) is None


def test_intervals_draw_patients_once_for_all_seeds():
    share, patients = np.array([1.0, 0.0]), np.array([1, 2])
    same = estimate([(share, np.ones(2), patients)] * 2)
    assert (same.value, same.low, same.high) == (0.5, 0.0, 1.0)
    # Where one seed has what the other lacks, their mean is certain.
    other = estimate([(share, np.ones(2), patients), (1 - share, np.ones(2), patients)])
    assert (other.value, other.low, other.high) == (0.5, 0.5, 0.5)
    # Nothing to count in most resamples: no interval.
    rare = estimate([(share, np.array([1.0, 0]), patients)])
    assert (rare.value, rare.low, rare.high) == (1.0, None, None)


def test_few_patients_have_no_groups_and_very_few_no_answers(tmp_path):
    few = answered(part_of(16, per_patient=1), repeats=2)
    assert set(few.groups) < set(ERROR_RATES) and 0.1 not in few.groups
    text = "\n".join(answers_section({"series": {"2d": [few], "slab": []}}))
    assert "n/a: too few patients" in text and "`slab`" not in text
    truth = np.zeros((12, 6), int)
    truth[:4] = 1
    lacking = Scored(pd.Index(range(12)), np.arange(12), truth, np.full((12, 6), 0.5))
    assert answered(lacking) is None
    assert answers_section({"series": {"2d": []}}) == []


def test_the_section_and_the_figure_hold_each_view(found):
    from experiments.report.answer_figures import draw_answers
    from experiments.report.figures import _pyplot

    answers = {"slice": {"2d": found}, "series": {"2d": found, "series": found}}
    lines = answers_section(answers)
    tables = [
        block for block in "\n".join(lines).strip().split("\n\n") if block.startswith("| level")
    ]
    assert [table.count("\n") - 1 for table in tables] == [3, 9, 9]
    errors = group_errors(found, 0.1)["low"]
    assert f"| 0.1 | {errors.value:.3f} ({errors.low:.3f} to {errors.high:.3f})" in tables[1]
    pyplot = _pyplot()
    figure = draw_answers(pyplot, answers)
    assert len(figure.axes) == 6
    drawn = [line.get_xydata() for line in figure.axes[1].lines]
    ends = [
        part[:, 1].tolist() for one in figure.axes[1].collections for part in one.get_segments()
    ]
    assert [errors.low, errors.high] in ends
    place = [rate in found[0].groups for rate in ERROR_RATES].index(True)
    shown = [points for points in drawn if len(points) > 2]
    at = ERROR_RATES.index(0.1) - place
    assert any(points[at, 1] == errors.value for points in shown)
    pyplot.close(figure)
    assert draw_answers(pyplot, {"slice": {"2d": []}}) is None
