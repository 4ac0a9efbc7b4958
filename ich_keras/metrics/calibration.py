"""Calibration, or how far probabilities match frequencies: ECE, Brier score, temperature."""

import numpy as np

from ich_keras.errors import DataError
from ich_keras.labels import SIX, UNLABELLED, LabelSet
from ich_keras.metrics.logits import logits_of, probabilities_of

BINS = 10
TEMPERATURES = (0.05, 20.0)


def calibration(
    truth: np.ndarray, values: np.ndarray, bins: int = BINS, label_set: LabelSet = SIX
) -> dict:
    """Compare probabilities with frequencies, label by label.

    Args:
        truth: int (n, labels), 0 or 1; -1 is missing.
        values: float (n, labels), probabilities.
        bins: of equal width over 0..1.
        label_set: what the columns mean.

    Returns:
        JSON-able: label -> {"brier": mean squared error, "ece": expected calibration error (the
        mean over samples of |frequency - mean probability| in their bin), "bins": a list with
        {"low", "high", "count", "mean_probability", "frequency"} for each bin that is not empty}.
        Brier score and ECE are None where no sample has the label.

        brier = mean (p - y)^2; ece = sum over bins of count / n * |frequency - mean probability|.

    Source:
        Brier 1950; Guo et al., On Calibration of Modern Neural Networks (2017).

    >>> truth = np.repeat([[1], [0], [0], [0]], 6, axis=1)  # 25 % are positive
    >>> label = calibration(truth, np.full((4, 6), 0.75))["any"]
    >>> label["ece"], label["brier"]  # |0.25 - 0.75| and (0.0625 + 3 * 0.5625) / 4
    (0.5, 0.4375)
    """
    truth, values = _checked(truth, values)
    found = {}
    for column, name in enumerate(label_set.names):
        is_present = truth[:, column] != UNLABELLED
        labels, chances = truth[is_present, column], values[is_present, column]
        # A value on an edge belongs to the bin below, as in scikit-learn's `calibration_curve`.
        places = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], chances)
        counts = np.bincount(places, minlength=bins)
        filled = counts > 0
        with np.errstate(invalid="ignore"):
            mean = np.bincount(places, chances, bins) / counts
            frequency = np.bincount(places, labels, bins) / counts
        gaps = np.abs(frequency - mean)[filled]
        is_known = len(labels) > 0
        found[name] = {
            "brier": float(((chances - labels) ** 2).mean()) if is_known else None,
            "ece": float((gaps * counts[filled]).sum() / len(chances)) if is_known else None,
            "bins": [
                {
                    "low": place / bins,
                    "high": (place + 1) / bins,
                    "count": int(counts[place]),
                    "mean_probability": float(mean[place]),
                    "frequency": float(frequency[place]),
                }
                for place in np.flatnonzero(filled).tolist()
            ],
        }
    return found


def fit_temperature(truth: np.ndarray, values: np.ndarray, label_set: LabelSet = SIX) -> float:
    """Find the temperature with the lowest log loss. Use the validation split, never test.

    Args:
        truth: int (n, labels), 0 or 1; -1 is missing.
        values: float (n, labels), probabilities.
        label_set: what the columns mean.

    Returns:
        T > 0, which minimises the log loss of `with_temperature(values, T)`. Above 1 the
        probabilities were overconfident, below 1 underconfident. One number serves all labels; it
        changes no ranking within a label.

    >>> truth = np.repeat([[1], [1], [1], [0]], 6, axis=1)  # 75 % are positive: odds of 3
    >>> values = np.full((4, 6), 0.9)  # odds of 9 = 3 ** 2
    >>> round(fit_temperature(truth, values), 3)
    2.0
    """
    from scipy.optimize import minimize_scalar

    truth, values = _checked(truth, values)
    if label_set.exclusive:
        rows = (truth != UNLABELLED).all(axis=1)
        logits, is_true = logits_of(values[rows], label_set), truth[rows] == 1
    else:
        is_present = truth != UNLABELLED
        whole = is_present.all()  # flattening would change the order of summation
        logits = logits_of(values if whole else values[is_present], label_set)
        truth = truth if whole else truth[is_present]

    def loss(log_temperature: float) -> float:
        scaled = logits * np.exp(-log_temperature)
        if label_set.exclusive:
            return float((np.logaddexp.reduce(scaled, axis=1) - scaled[is_true]).mean())
        # log(1 + exp(z)) - y z, which neither overflows nor underflows.
        return float((np.logaddexp(0.0, scaled) - truth * scaled).mean())

    low, high = np.log(TEMPERATURES)
    return float(np.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x))


def with_temperature(
    values: np.ndarray, temperature: float, label_set: LabelSet = SIX
) -> np.ndarray:
    """Divide the logits of probabilities by a temperature.

    Args:
        values: float (n, labels), probabilities.
        temperature: above 0.
        label_set: of exclusive labels, the rows sum to 1 again.

    Returns:
        float64 (n, labels).

    >>> with_temperature(np.array([[0.9, 0.5]]), 2.0).round(6).tolist()  # odds 9 -> 3
    [[0.75, 0.5]]
    """
    return probabilities_of(logits_of(values, label_set) / temperature, label_set)


def _checked(truth: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    truth, values = np.asarray(truth), np.asarray(values, np.float64)
    if truth.shape != values.shape or truth.ndim != 2 or not len(truth):
        raise DataError(
            f"truth {truth.shape}, probabilities {values.shape}; expected equal (n > 0, labels)."
        )
    return truth, values
