"""Smoothing along z: a slice's logits are averaged with those of its neighbours in the series.

A bleed is seldom on one slice alone, so neighbours say something about a slice. How much depends
on the network: one that sees single slices gains more than one that sees slabs. So the kernel is
chosen on the validation split, as the rule from slices to series is.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ich_keras.errors import DataError, UsageError
from ich_keras.labels import SIX, LabelSet
from ich_keras.metrics.binary import binary_metrics
from ich_keras.metrics.logits import logits_of, probabilities_of

NO_SMOOTHING = "none"
# Name -> weights of a slice and its neighbours, the slice itself in the middle.
KERNELS: dict[str, tuple[float, ...]] = {
    NO_SMOOTHING: (1.0,),
    "0.1 0.8 0.1": (0.1, 0.8, 0.1),
    "0.2 0.6 0.2": (0.2, 0.6, 0.2),
    "0.3 0.4 0.3": (0.3, 0.4, 0.3),
    "0.1 0.2 0.4 0.2 0.1": (0.1, 0.2, 0.4, 0.2, 0.1),
}
# Times the usual distance: slices further apart are no neighbours. One missing slice makes exactly
# twice the distance; positions are rounded, hence 1 %.
_FURTHEST = 2.0 * 1.01


def smooth(
    values: np.ndarray,
    series_uids: Sequence[str] | np.ndarray,
    positions_mm: Sequence[float] | np.ndarray,
    kernel: str,
    label_set: LabelSet = SIX,
) -> np.ndarray:
    """Average each slice's logits with its neighbours' in the same series.

    Neighbours follow each other in the rows of their series. Beyond its ends, and beyond a gap
    wider than twice the usual distance of its slices (the median), there are none: the remaining
    weights are divided by their sum.

    Args:
        values: float (slices, labels), probabilities; each series from inferior to superior.
        series_uids: str (slices,).
        positions_mm: float (slices,), along the normal; where one is NaN, no gap is seen.
        kernel: a key of `KERNELS`.
        label_set: what the columns mean; of exclusive labels, log-probabilities are averaged and
            the rows sum to 1 again.

    Returns:
        Probabilities (slices, labels), of the dtype of `values`; with "none", the values as they
        are.

    Raises:
        UsageError: the kernel is unknown.
        DataError: the three have different numbers of slices.

    >>> values = np.repeat([[0.9], [0.5], [0.5]], 6, axis=1)  # logits ln 9, 0, 0
    >>> smooth(values, ["a", "a", "b"], [0, 5, 10], "0.3 0.4 0.3")[:, 0].round(4).tolist()
    [0.7783, 0.7194, 0.5]
    """
    if kernel not in KERNELS:
        raise UsageError(f"smoothing {kernel!r}; expected one of {', '.join(KERNELS)}.")
    values = np.asarray(values)
    positions = np.asarray(positions_mm, np.float64)
    if not len(values) == len(series_uids) == len(positions):
        raise DataError(
            f"probabilities {values.shape}, {len(series_uids)} series UIDs and {len(positions)}"
            " positions; expected one of each per slice."
        )
    if kernel == NO_SMOOTHING or not len(values):
        return values
    numbers = pd.factorize(np.asarray(series_uids, object))[0]
    order = np.argsort(numbers, kind="stable")
    runs = _runs(numbers[order], positions[order])
    logits = logits_of(values[order], label_set)
    weights = KERNELS[kernel]
    reach = len(weights) // 2
    summed, total = logits * weights[reach], np.full(len(logits), weights[reach])
    for step in range(1, reach + 1):
        is_near = runs[step:] == runs[:-step]
        before, after = (np.where(is_near, weights[reach + by], 0.0) for by in (-step, step))
        summed[step:] += before[:, np.newaxis] * logits[:-step]
        summed[:-step] += after[:, np.newaxis] * logits[step:]
        total[step:] += before
        total[:-step] += after
    found = np.empty_like(values)
    found[order] = probabilities_of(summed / total[:, np.newaxis], label_set)
    return found


def _runs(numbers: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Number the stretches of neighbouring slices, int (slices,).

    Args:
        numbers: int (slices,), of their series, ascending.
        positions: float (slices,), mm.
    """
    is_new = np.diff(numbers, prepend=-1) != 0
    distances = np.abs(np.diff(positions, prepend=np.nan))
    # Slices at one place say nothing about the usual distance.
    known = pd.Series(np.where(is_new | ~(distances > 0), np.nan, distances))
    usual = known.groupby(numbers).transform("median").to_numpy()
    return np.cumsum(is_new | (distances > _FURTHEST * usual))


def choose_kernel(
    truth: np.ndarray,
    values: np.ndarray,
    series_uids: Sequence[str] | np.ndarray,
    positions_mm: Sequence[float] | np.ndarray,
    label_set: LabelSet = SIX,
) -> tuple[str, dict[str, float]]:
    """Choose the kernel with the lowest log loss over slices.

    Args:
        truth: int (slices, labels), of the validation split; -1 is missing.
        values, series_uids, positions_mm, label_set: as for `smooth`.

    Returns:
        (kernel, log loss per kernel). Of kernels with equal loss, the first in `KERNELS`.
    """
    losses = {}
    for kernel in KERNELS:
        smoothed = smooth(values, series_uids, positions_mm, kernel, label_set)
        losses[kernel] = binary_metrics(truth, smoothed, label_set=label_set)["log_loss"]
    return min(losses, key=losses.__getitem__), losses
