"""ROC and precision-recall curves, with 95 % bands from resampled patients.

The bands use the draws of `ich_keras.metrics.intervals`: the same resamples that give a table's
interval of an AUROC give the band of its curve. A band is pointwise: at each false positive rate
(or recall) it holds the middle 95 % of the resampled curves, not 95 % of whole curves.

Source:
    Fawcett, An introduction to ROC analysis (2006), "vertical averaging".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ich_keras.errors import DataError
from ich_keras.metrics.intervals import LEVEL, RESAMPLES, patient_draws

POINTS = 100  # of a curve; more cannot be seen, and make a page larger
_GRID = np.linspace(0, 1, 51)


@dataclass(frozen=True, eq=False)
class Curve:
    """A curve in the unit square, and its band.

    Args:
        across, up: float64 (n,), its points, `across` rising: false positive rate and sensitivity,
            or recall and precision.
        grid: float64 (g,), where the band is given; empty without one.
        low, high: float64 (g,), the band; NaN where it is not defined.
    """

    across: np.ndarray
    up: np.ndarray
    grid: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True, eq=False)
class Curves:
    """Both curves of one label; None where one is not defined."""

    roc: Curve | None
    pr: Curve | None


def curves(
    truth: np.ndarray,
    values: np.ndarray,
    patients: Sequence | np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Curves:
    """Compute the ROC and the precision-recall curve of one label.

    Args:
        truth: bool (n,); samples without the label are left out before.
        values: float (n,), probabilities.
        patients: (n,), the patient of each sample; None, or a single patient, gives no bands.
        resamples, seed: as in `ich_keras.metrics.intervals.bootstrap`.

    Returns:
        At most about `POINTS` points of each curve, each of them at a threshold: the points that
        are kept are spread evenly along the ROC curve. A ROC curve needs both classes, a
        precision-recall curve needs a positive sample.

    Raises:
        DataError: the arrays differ in length.

    >>> found = curves(np.array([True, False, True, False]), np.array([0.9, 0.8, 0.3, 0.1]))
    >>> found.roc.across.tolist(), found.roc.up.tolist()
    ([0.0, 0.0, 0.5, 0.5, 1.0], [0.0, 0.5, 0.5, 1.0, 1.0])
    >>> found.pr.across.tolist(), found.pr.up.round(3).tolist()
    ([0.0, 0.5, 0.5, 1.0, 1.0], [1.0, 1.0, 0.5, 0.667, 0.5])
    """
    truth, values = np.asarray(truth, bool), np.asarray(values, np.float64)
    if truth.shape != values.shape or (patients is not None and len(patients) != len(truth)):
        count = "no" if patients is None else f"{len(patients)}"
        raise DataError(
            f"truth {truth.shape}, probabilities {values.shape}, {count} patients; expected the"
            " same number of each."
        )
    if not truth.any():
        return Curves(None, None)
    limits, hits, alarms = _thinned(*_counts(truth, values))
    bands = [(np.empty(0),) * 3] * 2
    if patients is not None:
        numbers, names = pd.factorize(np.asarray(patients))
        if len(names) > 1:
            bands = _bands(truth, values, numbers, len(names), limits, resamples, seed)
    recall, precision = hits / hits[-1], hits / (hits + alarms)
    pr = Curve(np.append(0, recall), np.append(precision[0], precision), *bands[1])
    if truth.all():
        return Curves(None, pr)
    rate = alarms / alarms[-1]
    return Curves(Curve(np.append(0, rate), np.append(0, recall), *bands[0]), pr)


def _counts(truth: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each threshold, falling, and the true and false positives at it."""
    order = np.argsort(-values, kind="stable")
    values, truth = values[order], truth[order]
    last = np.flatnonzero(np.append(np.diff(values) != 0, True))  # of each tie
    hits = np.cumsum(truth)[last]
    return values[last], hits.astype(np.float64), (last + 1 - hits).astype(np.float64)


def _thinned(
    limits: np.ndarray, hits: np.ndarray, alarms: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if len(limits) <= POINTS:
        return limits, hits, alarms
    way = hits / hits[-1] + alarms / max(alarms[-1], 1)  # along the ROC curve; it only rises
    places = np.searchsorted(way, np.linspace(way[0], way[-1], POINTS) - 1e-12)
    places = np.unique(places.clip(0, len(way) - 1))
    return limits[places], hits[places], alarms[places]


def _bands(
    truth: np.ndarray,
    values: np.ndarray,
    numbers: np.ndarray,
    num_patients: int,
    limits: np.ndarray,
    resamples: int,
    seed: int,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return (grid, low, high) of the ROC curve and of the precision-recall curve."""
    # The first threshold that a sample reaches.
    places = np.searchsorted(-limits, -values)
    of_patients = np.zeros((2, num_patients, len(limits)))
    np.add.at(of_patients, (truth.astype(int), numbers, places), 1)
    drawn: list[list[np.ndarray]] = [[], []]
    for counts in patient_draws(num_patients, resamples, seed):
        alarms, hits = (np.cumsum(counts @ part, axis=1) for part in of_patients)
        for true, false in zip(hits, alarms, strict=True):
            if true[-1] == 0:
                continue
            recall = true / true[-1]
            if false[-1] > 0:
                rate = np.append(0, false / false[-1])
                drawn[0].append(np.interp(_GRID, rate, np.append(0, recall)))
            with np.errstate(invalid="ignore"):
                precision = true / (true + false)
            # The precision that is paid for at least this recall.
            first = np.searchsorted(recall, np.maximum(_GRID, recall[recall > 0][0]) - 1e-12)
            drawn[1].append(precision[first])
    return [_quantiles(part, resamples) for part in drawn]


def _quantiles(
    drawn: list[np.ndarray], resamples: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if len(drawn) < 0.9 * resamples:  # as in `bootstrap`
        return (np.empty(0),) * 3
    low, high = np.quantile(np.stack(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return _GRID, low, high
