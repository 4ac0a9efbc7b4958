"""Iterative stratification: splits that are alike in several labels at once, and in size."""

import numpy as np


def stratify(
    positive: np.ndarray, num_slices: np.ndarray, fractions: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Assign patients to splits.

    Labels are taken rarest first. The patients with the label go one by one, large ones first, to
    the split that most lacks it. Patients without any label come last. Added to the source:

    - What a split lacks is relative to its fraction and rounded without favour (Sainte-Lague:
      the lowest (count + 1/2) / fraction is next). By absolute numbers, as in the source, the
      largest split would take all the large patients.
    - A split that has no patient with the label yet goes first, so that no part lacks a label that
      three patients have; and no split stays empty.
    - Ties, and patients without any label, are decided by patients and slices together.

    Args:
        positive: int (patients, labels), 0 or 1.
        num_slices: int (patients,), above 0.
        fractions: float (splits,), positive, summing to 1.
        rng: decides the order of patients of like size.

    Returns:
        int (patients,), the split of each.

    Source:
        Sechidis, Tsoumakas, Vlahavas: On the Stratification of Multi-label Data, ECML PKDD 2011,
        algorithm 1; here over patients.

    >>> positive = np.array([[1], [1], [0], [0], [0], [0]])
    >>> parts = stratify(
    ...     positive, np.full(6, 10), np.array([0.5, 0.5]), np.random.default_rng(0)
    ... )
    >>> [int(positive[parts == part].sum()) for part in (0, 1)]  # one positive patient each
    [1, 1]
    """
    num_patients, num_labels = positive.shape
    parts = np.full(num_patients, -1)
    label_counts = np.zeros((len(fractions), num_labels))
    patient_counts = np.zeros(len(fractions))
    # In shares of the whole, so that patients and slices can be added up.
    sizes = np.zeros(len(fractions))
    size_of = 1 / num_patients + num_slices / num_slices.sum()
    shuffled = rng.permutation(num_patients)
    # Coarse steps (a factor of 1.4), so that the seed decides among patients of like size.
    steps = np.floor(2 * np.log2(num_slices))
    large_first = shuffled[np.argsort(-steps[shuffled], kind="stable")]

    def assign(patient: int, candidates: np.ndarray) -> None:
        empty = np.flatnonzero(patient_counts == 0)
        if num_patients - patient_counts.sum() <= len(empty):
            candidates = empty
        fill = (sizes[candidates] + size_of[patient] / 2) / fractions[candidates]
        part = candidates[np.argmin(fill)]
        parts[patient] = part
        label_counts[part] += positive[patient]
        patient_counts[part] += 1
        sizes[part] += size_of[patient]

    while (remaining := positive[parts < 0].sum(axis=0)).any():
        label = np.argmin(np.where(remaining > 0, remaining, num_patients + 1))
        for patient in large_first[(parts[large_first] < 0) & (positive[large_first, label] > 0)]:
            without = np.flatnonzero(label_counts[:, label] == 0)
            fill = (label_counts[:, label] + 0.5) / fractions
            assign(patient, without if len(without) else np.flatnonzero(fill < fill.min() + 1e-9))
    for patient in large_first[parts[large_first] < 0]:
        assign(patient, np.arange(len(fractions)))
    return parts
