"""Operating points: the rates at a threshold, and the threshold for a given rate."""

import numpy as np

from ich_keras.labels import SIX, UNLABELLED, LabelSet
from ich_keras.metrics.binary import RATES, binary_metrics

SPECIFICITIES = (0.90, 0.95, 0.99)
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


def threshold_at_specificity(truth: np.ndarray, values: np.ndarray, wanted: float) -> float | None:
    """Return the lowest threshold at which one label reaches a specificity.

    A sample is positive if its probability is at least the threshold.

    Args:
        truth: bool (n,).
        values: float (n,), probabilities.
        wanted: specificity, 0..1.

    Returns:
        The threshold: 0, or the next float64 above a negative. None without negatives.

    >>> truth = np.array([False, False, True, True])
    >>> limit = threshold_at_specificity(truth, np.array([0.1, 0.4, 0.3, 0.8]), 0.5)
    >>> round(limit, 6), limit > 0.1  # one of two negatives is below
    (0.1, True)
    """
    negatives = np.sort(np.asarray(values, np.float64)[~np.asarray(truth, bool)])
    if not len(negatives):
        return None
    # This many negatives must stay below the threshold; 1e-9 absorbs the rounding of `wanted`.
    needed = int(np.ceil(wanted * len(negatives) - 1e-9))
    if needed == 0:
        return 0.0
    return float(np.nextafter(negatives[needed - 1], np.inf))


def threshold_at_sensitivity(truth: np.ndarray, values: np.ndarray, wanted: float) -> float | None:
    """Return the highest threshold at which one label reaches a sensitivity.

    A sample is positive if its probability is at least the threshold.

    Args:
        truth: bool (n,).
        values: float (n,), probabilities.
        wanted: sensitivity, above 0, at most 1.

    Returns:
        The threshold, which is the probability of a positive. None without positives.

    >>> truth = np.array([False, False, True, True, True])
    >>> values = np.array([0.1, 0.4, 0.3, 0.6, 0.8])
    >>> threshold_at_sensitivity(truth, values, 0.6)  # two of three positives reach it
    0.6
    """
    positives = np.sort(np.asarray(values, np.float64)[np.asarray(truth, bool)])[::-1]
    if not len(positives):
        return None
    # This many positives must reach the threshold; 1e-9 absorbs the rounding of `wanted`.
    needed = int(np.ceil(wanted * len(positives) - 1e-9))
    return float(positives[max(needed, 1) - 1])


def choose_thresholds(
    truth: np.ndarray, values: np.ndarray, label_set: LabelSet = SIX
) -> dict[str, dict[str, float | None]]:
    """Choose one threshold per label and specificity. Use the validation split, never test.

    Args:
        truth: int (n, labels), 0 or 1; -1 is missing.
        values: float (n, labels), probabilities.
        label_set: what the columns mean.

    Returns:
        {"0.90": {label: threshold or None}, ...} for `SPECIFICITIES`.

    >>> values = np.repeat(np.arange(100)[:, np.newaxis] / 100, 6, axis=1)
    >>> chosen = choose_thresholds(np.zeros((100, 6), int), values)
    >>> {wanted: round(limits["any"], 6) for wanted, limits in chosen.items()}
    {'0.90': 0.89, '0.95': 0.94, '0.99': 0.98}
    """
    truth, values = np.asarray(truth), np.asarray(values)
    columns = [(truth[:, n], values[:, n]) for n in range(len(label_set))]
    present = [(t[t != UNLABELLED] == 1, v[t != UNLABELLED]) for t, v in columns]
    return {
        f"{wanted:.2f}": {
            name: threshold_at_specificity(*column, wanted)
            for name, column in zip(label_set.names, present, strict=True)
        }
        for wanted in SPECIFICITIES
    }


def rates_at(
    truth: np.ndarray,
    values: np.ndarray,
    thresholds: dict[str, float | None],
    label_set: LabelSet = SIX,
) -> dict[str, dict[str, float | None]]:
    """Score one threshold per label.

    Args:
        truth: int (n, labels), 0 or 1; -1 is missing.
        values: float (n, labels), probabilities.
        thresholds: label -> threshold; None leaves the label out.
        label_set: what the columns mean.

    Returns:
        label -> {"threshold", "recall" (sensitivity), "specificity", "precision", "f1"}; undefined
        rates are None.

    >>> truth = np.repeat([[1], [1], [0], [0]], 6, axis=1)
    >>> values = np.repeat([[0.9], [0.2], [0.6], [0.1]], 6, axis=1)
    >>> rates = rates_at(truth, values, dict.fromkeys(SIX.names, 0.15))["any"]
    >>> {name: round(float(rate), 4) for name, rate in rates.items()}
    {'threshold': 0.15, 'precision': 0.6667, 'recall': 1.0, 'f1': 0.8, 'specificity': 0.5}
    """
    names = label_set.names
    limits = np.array([np.inf if thresholds[name] is None else thresholds[name] for name in names])
    predicted = (np.asarray(values, np.float64) >= limits).astype(np.float64)
    # Each label on its own, whether or not they are exclusive.
    per_label = binary_metrics(truth, predicted, label_set=LabelSet(names))["per_label"]
    return {
        name: {"threshold": thresholds[name]}
        | {rate: None if thresholds[name] is None else per_label[name][rate] for rate in RATES}
        for name in names
    }


def threshold_table(truth: np.ndarray, values: np.ndarray, label_set: LabelSet = SIX) -> list[dict]:
    """Score each threshold of `THRESHOLDS`, the same for all labels, with `rates_at`."""
    return [
        {
            "threshold": limit,
            "labels": rates_at(truth, values, dict.fromkeys(label_set.names, limit), label_set),
        }
        for limit in THRESHOLDS
    ]
