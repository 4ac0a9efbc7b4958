"""Groups of low, unsure and high: which class can be excluded at a stated error rate.

For each label two hypotheses are tested, "positive" and "negative", each against the validation
patients of its own class (Mondrian, or class-conditional, conformal prediction). The p-value of a
class is the share of its patients that look at most as much like it as the new sample does, with
the new patient counted among them: (1 + ...) / (n + 1). A class is excluded where its p-value is at
most the error rate. So at most that share of positive patients is called low, and at most that
share of negative ones high, whatever the network, as long as new patients are exchangeable with
those of the validation split.

- Samples of a patient are not independent: each patient counts once, spread evenly over the samples
  of the class. The rate is that of one sample drawn from a new patient.
- Scores are the network's raw probabilities. Temperature and thresholds, which were chosen on the
  same patients, do not enter. The rule from slices to series does, and was chosen there, too. So it
  is cross-fitted by patient: each fold is scored with the rule that the other folds choose, and a
  new series is ranked within each fold by that fold's rule. Cross-fitting rather than two halves,
  because bleeding patients are few: halves would double the number needed. Its rate is the stated
  one in practice, and at most about twice that in the worst case. Where all folds choose one rule,
  it is plain split conformal prediction.
- What cannot be undone: the best epoch was chosen by its loss on these patients. One choice among
  few moves the rate little.

Sources:
    Vovk, Conditional validity of inductive conformal predictors (2012); Vovk, Cross-conformal
    predictors (2015); the bound: Barber et al., Predictive inference with the jackknife+ (2021).
    Several samples of a patient: Lee, Barber and Willett, Distribution-free inference with
    hierarchical data (2023). Angelopoulos and Bates, Conformal prediction: a gentle introduction
    (2023). Intracranial haemorrhage: Angelopoulos et al., Conformal triage for medical imaging AI
    deployment (2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

LOW, UNSURE, HIGH = "low", "unsure", "high"
GROUPS = (LOW, UNSURE, HIGH)
FOLDS = 5
_ROUNDING = 1e-9


def patients_needed(error_rate: float) -> int:
    """Return the least number of patients of a class with which it can ever be excluded.

    The lowest p-value is 1 / (n + 1), which must not exceed the rate: n >= 1 / rate - 1.

    >>> patients_needed(0.1), patients_needed(0.05), patients_needed(0.3)
    (9, 19, 3)
    """
    return int(np.ceil(1 / error_rate - 1 - _ROUNDING))


def patient_folds(patients: np.ndarray, folds: int = FOLDS) -> np.ndarray:
    """Deal patients into folds by turns, in the order of their first appearance.

    Args:
        patients: (n,), the patient of each sample.
        folds: how many.

    Returns:
        int (n,), the fold of each sample; those of one patient are together.

    >>> patient_folds(np.array(["a", "b", "a", "c"]), folds=2).tolist()
    [0, 1, 0, 0]
    """
    found: dict = {}
    for patient in np.asarray(patients).tolist():
        found.setdefault(patient, len(found))
    return np.array([found[p] % folds for p in np.asarray(patients).tolist()], np.int64)


@dataclass(frozen=True, eq=False)
class ClassScores:
    """The scores of one class's patients, each patient with a weight of 1 in all.

    Args:
        scores: float64 (n,), ascending.
        weights: float64 (n + 1,), the sum of the weights of the first 0, 1, ..., n scores.
        patients: how many.
    """

    scores: np.ndarray
    weights: np.ndarray
    patients: int

    @classmethod
    def of(cls, scores: np.ndarray, patients: np.ndarray) -> Self:
        """Make it from the scores (n,) of samples and their patients (n,).

        >>> ClassScores.of(np.array([0.9, 0.2, 0.4]), np.array([1, 1, 2])).weights.tolist()
        [0.0, 0.5, 1.5, 2.0]
        """
        scores = np.asarray(scores, np.float64)
        _, numbers, counts = np.unique(patients, return_inverse=True, return_counts=True)
        order = np.argsort(scores, kind="stable")
        weights = np.append(0.0, np.cumsum(1.0 / counts[numbers[order]]))
        return cls(scores[order], weights, len(counts))

    def at_most(self, values: np.ndarray) -> np.ndarray:
        """Return how many patients score at most as high as each value, float64 (m,)."""
        return self.weights[np.searchsorted(self.scores, values, side="right")]

    def at_least(self, values: np.ndarray) -> np.ndarray:
        """Return how many patients score at least as high as each value, float64 (m,)."""
        return self.weights[-1] - self.weights[np.searchsorted(self.scores, values, side="left")]


@dataclass(frozen=True, eq=False)
class LabelScores:
    """What the groups of one label come from: the scores of both classes, fold by fold.

    Args:
        positive, negative: one for each way of scoring; a patient is in one of them.
    """

    positive: tuple[ClassScores, ...]
    negative: tuple[ClassScores, ...]

    @classmethod
    def of(cls, folds: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Self:
        """Make it from (truth, scores, patients) of each fold.

        Args:
            folds: truth is int (n,), 1, 0 or -1 (missing, which is left out); scores float (n,);
                patients (n,).
        """

        def of_class(wanted: int) -> tuple[ClassScores, ...]:
            return tuple(
                ClassScores.of(scores[truth == wanted], patients[truth == wanted])
                for truth, scores, patients in folds
            )

        return cls(of_class(1), of_class(0))

    @property
    def positive_patients(self) -> int:
        """How many patients have a sample with the label."""
        return sum(part.patients for part in self.positive)

    @property
    def negative_patients(self) -> int:
        """How many patients have a sample without the label."""
        return sum(part.patients for part in self.negative)

    def too_few(self, error_rate: float) -> str:
        """Say why there are too few patients for a rate; "" if there are enough.

        >>> few = LabelScores.of([(np.array([1, 0]), np.array([0.9, 0.2]), np.array([1, 2]))])
        >>> few.too_few(0.1)
        '1 patient with it and 1 without, 9 of each needed'
        """
        needed, have = patients_needed(error_rate), self.positive_patients
        if min(have, self.negative_patients) >= needed:
            return ""
        return (
            f"{have:,} patient{'' if have == 1 else 's'} with it and {self.negative_patients:,}"
            f" without, {needed:,} of each needed"
        )

    def p_values(self, values: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return the p-values of "positive" and of "negative".

        Args:
            values: the scores of the same samples in each way of scoring, float (m,).

        Returns:
            Two arrays, float64 (m,).

        >>> truth = np.repeat([1, 0], 4)
        >>> scores = np.array([0.5, 0.6, 0.7, 0.8, 0.1, 0.2, 0.3, 0.6])
        >>> found = LabelScores.of([(truth, scores, np.arange(8))])
        >>> positive, negative = found.p_values([np.array([0.2, 0.6, 0.9])])
        >>> positive.tolist()  # none of four positives is as low as 0.2; two are as low as 0.6
        [0.2, 0.6, 1.0]
        >>> negative.tolist()  # three of four negatives are as high as 0.2; none as high as 0.9
        [0.8, 0.4, 0.2]
        """
        low = sum(part.at_most(v) for part, v in zip(self.positive, values, strict=True))
        high = sum(part.at_least(v) for part, v in zip(self.negative, values, strict=True))
        return (
            (1 + np.asarray(low)) / (self.positive_patients + 1),
            (1 + np.asarray(high)) / (self.negative_patients + 1),
        )

    def groups(self, values: Sequence[np.ndarray], error_rate: float) -> np.ndarray:
        """Return the group of each sample: "low", "unsure" or "high".

        "low" excludes positive, "high" excludes negative. "unsure" excludes neither, or both: a
        sample that is like no patient of either class says nothing about which one it is of.

        Args:
            values: as for `p_values`.
            error_rate: above 0, at most 0.5.

        Returns:
            str (m,).

        >>> truth = np.repeat([1, 0], 4)
        >>> scores = np.array([0.5, 0.6, 0.7, 0.8, 0.1, 0.2, 0.3, 0.6])
        >>> found = LabelScores.of([(truth, scores, np.arange(8))])
        >>> found.groups([np.array([0.2, 0.6, 0.9])], error_rate=0.2).tolist()
        ['low', 'unsure', 'high']
        """
        positive, negative = self.p_values(values)
        not_positive = positive <= error_rate + _ROUNDING
        not_negative = negative <= error_rate + _ROUNDING
        found = np.full(len(positive), UNSURE, dtype=object)
        found[not_positive & ~not_negative] = LOW
        found[not_negative & ~not_positive] = HIGH
        return found
