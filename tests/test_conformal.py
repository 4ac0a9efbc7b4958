"""Conformal groups: p-values by their definition, and the error rate by simulation."""

import numpy as np
import pytest

from ich_keras.metrics.conformal import (
    GROUPS,
    LabelScores,
    patient_folds,
    patients_needed,
)

DRAWS = 3000


def by_definition(truth, scores, patients, value, wanted):
    """The p-value of one class: loops over patients, without sorting."""
    owners = {p for p, t in zip(patients, truth, strict=True) if t == wanted}
    total = 1.0
    for owner in owners:
        own = [
            s for p, t, s in zip(patients, truth, scores, strict=True) if p == owner and t == wanted
        ]
        total += sum(s <= value if wanted else s >= value for s in own) / len(own)
    return total / (len(owners) + 1)


def test_p_values_are_those_of_the_definition():
    random = np.random.default_rng(0)
    truth = random.integers(-1, 2, 60)
    scores = random.integers(0, 8, 60) / 8  # many ties
    patients = random.integers(0, 15, 60)
    values = np.arange(-1, 10) / 8
    folds = patient_folds(patients)
    found = LabelScores.of(
        [tuple(a[folds == k] for a in (truth, scores, patients)) for k in range(5)]
    )
    positive, negative = found.p_values([values] * 5)
    for n, value in enumerate(values):
        assert positive[n] == pytest.approx(by_definition(truth, scores, patients, value, 1))
        assert negative[n] == pytest.approx(by_definition(truth, scores, patients, value, 0))


def test_folds_keep_patients_together():
    patients = np.array([7, 7, 3, 9, 3, 1, 2, 7])
    assert patient_folds(patients, 3).tolist() == [0, 0, 1, 2, 1, 0, 1, 0]


def within_limits(errors, rate, draws=DRAWS):
    """Whether a count lies within four standard deviations of a binomial one."""
    return abs(errors - rate * draws) <= 4 * np.sqrt(draws * rate * (1 - rate))


@pytest.mark.parametrize(
    ("rate", "patients", "expected"),
    # The rate of n + 1 ranks that is kept exactly: floor(rate (n + 1)) / (n + 1).
    [(0.1, 19, 0.1), (0.1, 12, 1 / 13), (0.25, 3, 0.25), (0.05, 19, 0.05)],
)
def test_each_label_keeps_its_error_rate(rate, patients, expected):
    random = np.random.default_rng(1)
    for shift in (0.3, 2.0):  # a label that is hard to tell, and one that is easy
        lost, alarms = 0, 0
        for _ in range(DRAWS):
            truth = np.repeat([1, 0], patients)
            scores = random.normal(size=2 * patients) + shift * truth
            found = LabelScores.of([(truth, scores, np.arange(2 * patients))])
            values = random.normal((shift, 0))
            positive, negative = found.p_values([values])
            lost += positive[0] <= rate + 1e-9
            alarms += negative[1] <= rate + 1e-9
            low, high = found.groups([values], rate)
            assert low != "low" or positive[0] <= rate + 1e-9
            assert high != "high" or negative[1] <= rate + 1e-9
        assert within_limits(lost, expected) and within_limits(alarms, expected)


def test_many_slices_of_few_patients_do_not_feign_certainty():
    """Slices of a patient resemble each other: counted as independent they would err too often."""
    random = np.random.default_rng(2)
    rate, lost = 0.1, 0
    for _ in range(DRAWS):
        counts = random.integers(1, 40, 10)
        patients = np.repeat(np.arange(10), counts)
        scores = random.normal(size=10)[patients] + 0.1 * random.normal(size=len(patients))
        found = LabelScores.of([(np.ones(len(scores), int), scores, patients)])
        value = random.normal() + 0.1 * random.normal()
        lost += found.p_values([np.array([value])])[0][0] <= rate + 1e-9
    # 1 / 11 is the most that ten patients can keep below 0.1.
    assert lost <= DRAWS / 11 + 4 * np.sqrt(DRAWS / 11)


def test_cross_fitted_scores_keep_the_rate():
    """Each fold is scored in a way that was chosen on the others, as the rule of series is."""
    random = np.random.default_rng(3)
    rate, patients, lost = 0.1, 39, 0
    for _ in range(DRAWS):
        views = random.normal(size=(patients, 3))  # three ways to score a patient
        new = random.normal(size=3)
        folds = patient_folds(np.arange(patients))
        parts, values = [], []
        for fold in range(5):
            best = int(views[folds != fold].mean(axis=0).argmax())
            own = np.flatnonzero(folds == fold)
            parts.append((np.ones(len(own), int), views[own, best], own))
            values.append(new[[best]])
        lost += LabelScores.of(parts).p_values(values)[0][0] <= rate + 1e-9
    assert lost <= rate * DRAWS + 4 * np.sqrt(DRAWS * rate)


def test_too_few_patients_for_the_rate():
    assert [patients_needed(rate) for rate in (0.5, 0.1, 0.01, 1 / 3)] == [1, 9, 99, 2]
    truth, patients = np.array([1] * 9 + [0] * 30 + [-1] * 5), np.arange(44)
    found = LabelScores.of([(truth, np.linspace(0, 1, 44), patients)])
    assert (found.positive_patients, found.negative_patients) == (9, 30)
    assert found.too_few(0.1) == ""
    assert found.too_few(0.05) == "9 patients with it and 30 without, 19 of each needed"


def test_what_is_like_neither_class_is_unsure():
    # Far apart, and a value in the gap: lower than every positive, higher than every negative.
    truth = np.repeat([1, 0], 9)
    found = LabelScores.of([(truth, np.where(truth == 1, 0.9, 0.1), np.arange(18))])
    values = np.array([0.05, 0.1, 0.5, 0.9, 0.95])
    assert found.groups([values], 0.1).tolist() == ["low", "low", "unsure", "high", "high"]
    assert GROUPS == ("low", "unsure", "high")
