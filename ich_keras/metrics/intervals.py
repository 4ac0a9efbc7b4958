"""95 % intervals by resampling patients, and paired differences between models.

Slices of one patient are alike: resampling slices would claim far more certainty than the data
give. So whole patients are drawn with replacement, and both models of a difference get the same
draws.

Source:
    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6, 8 (clusters) and 13
    (percentile interval).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ich_keras.errors import DataError
from ich_keras.labels import SIX, UNLABELLED, LabelSet
from ich_keras.metrics.binary import CLIP, predictions

RESAMPLES = 1000
LEVEL = 0.95
_CHUNK = 50  # resamples at a time: memory is this times the rows


def bootstrap(
    truth: np.ndarray,
    values: np.ndarray,
    patients: Sequence[str] | np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
    label_set: LabelSet = SIX,
) -> dict[str, dict]:
    """Compute metrics with their 95 % percentile intervals.

    Args:
        truth: int (n, labels), 0 or 1; -1 is missing, and left out as in `binary_metrics`.
        values: float (n, labels), probabilities.
        patients: str (n,), the patient of each row.
        resamples: number of resamples; each draws as many patients as there are.
        seed: of the draws.
        label_set: what the columns mean.

    Returns:
        JSON-able: metric -> {"value", "low", "high", "resamples"}; metrics are log_loss,
        rsna_log_loss (with a label that stands for the others), brier, exact_match, and
        auroc/<label>, ap/<label>, log_loss/<label>.
        `resamples` is the number of resamples in which the metric was defined; low and high are
        None where that is fewer than nine in ten.

    Raises:
        DataError: shapes differ, or there are fewer than two patients.

    >>> truth = np.repeat([[1], [0], [0], [0]], 6, axis=1)
    >>> values = np.repeat([[0.9], [0.1], [0.1], [0.1]], 6, axis=1)  # all are right by the same 0.1
    >>> found = bootstrap(truth, values, ["p1", "p2", "p3", "p4"], resamples=20)
    >>> {name: round(number, 6) for name, number in found["brier"].items()}
    {'value': 0.01, 'low': 0.01, 'high': 0.01, 'resamples': 20}
    """
    return mean_bootstrap([(truth, values, patients)], resamples, seed, label_set)


def mean_bootstrap(
    models: Sequence[tuple[np.ndarray, np.ndarray, Sequence[str] | np.ndarray]],
    resamples: int = RESAMPLES,
    seed: int = 0,
    label_set: LabelSet = SIX,
) -> dict[str, dict]:
    """Compute the means of several models' metrics, such as those of one training's seeds.

    Each model is scored on its own rows: ranking the rows of several models together would compare
    probabilities that were never meant to be compared. All models share the same draws: a patient
    who appears in several models' rows weighs the same in each.

    Args:
        models: for each, truth int (n, labels), probabilities float (n, labels), patients str
            (n,); n may differ.
        resamples, seed, label_set: as in `bootstrap`.

    Returns:
        As `bootstrap`; a mean is defined where the metric is for every model.

    Raises:
        DataError: as `bootstrap`.
    """
    whole, drawn = _resampled(models, resamples, seed, label_set)
    return {name: _interval(_mean(whole, name), _mean(drawn, name)) for name in whole[0]}


def paired_bootstrap(
    truth: np.ndarray,
    values: np.ndarray,
    others: np.ndarray,
    patients: Sequence[str] | np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
    label_set: LabelSet = SIX,
) -> dict[str, dict]:
    """Compute how much one model's metrics exceed another's on the same rows.

    Args:
        truth: int (n, labels), 0 or 1; -1 is missing.
        values, others: float (n, labels), probabilities of the two models.
        patients, resamples, seed, label_set: as in `bootstrap`.

    Returns:
        As `bootstrap`, for metric(values) - metric(others), with "share_above_0": the share of
        resamples in which the difference is positive.

    Raises:
        DataError: as `bootstrap`.

    >>> truth = np.zeros((2, 6), int)
    >>> found = paired_bootstrap(truth, truth + 0.3, truth + 0.1, ["p1", "p2"], resamples=20)
    >>> round(found["brier"]["value"], 6), found["brier"]["share_above_0"]  # 0.3^2 - 0.1^2
    (0.08, 1.0)
    """
    return mean_paired_bootstrap([(truth, values, others, patients)], resamples, seed, label_set)


def mean_paired_bootstrap(
    pairs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, Sequence[str] | np.ndarray]],
    resamples: int = RESAMPLES,
    seed: int = 0,
    label_set: LabelSet = SIX,
) -> dict[str, dict]:
    """Compute the mean of `paired_bootstrap`'s differences over several pairs of models.

    Args:
        pairs: for each, truth int (n, labels), probabilities of the two models float (n, labels),
            patients str (n,); n may differ between pairs. All pairs share the same draws.
        resamples, seed, label_set: as in `bootstrap`.

    Returns:
        As `paired_bootstrap`; a mean is defined where the metric is for every model.

    Raises:
        DataError: as `bootstrap`.
    """
    ones = [(truth, values, patients) for truth, values, _, patients in pairs]
    others = [(truth, values, patients) for truth, _, values, patients in pairs]
    whole, drawn = _resampled([*ones, *others], resamples, seed, label_set)
    found = {}
    for name in whole[0]:
        value, differences = (
            _mean(part[: len(pairs)], name) - _mean(part[len(pairs) :], name)
            for part in (whole, drawn)
        )
        defined = differences[~np.isnan(differences)]
        found[name] = _interval(value, differences) | {
            "share_above_0": float((defined > 0).mean()) if len(defined) else None
        }
    return found


def mean_interval(
    values: np.ndarray,
    patients: Sequence[str] | np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict:
    """Compute the mean of one number per row with its 95 % percentile interval.

    Args:
        values: float (n,).
        patients: (n,), the patient of each row; as many are drawn as there are.
        resamples: number of resamples.
        seed: of the draws: the same patients in the same order get the same draws.

    Returns:
        {"value", "low", "high", "resamples"}; low and high are None for a single patient.

    Raises:
        DataError: shapes differ, or there are no rows.

    >>> mean_interval(np.array([1.0, 1.0, 0.25]), ["a", "a", "b"], resamples=100)["value"]
    0.75
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or len(patients) != len(values):
        raise DataError(f"values {values.shape} of {len(patients)} patients; expected one each.")
    numbers, names = pd.factorize(np.asarray(patients, object))
    if len(names) < 2:
        return {"value": float(values.mean()), "low": None, "high": None, "resamples": 0}
    sums = np.bincount(numbers, values, len(names))
    rows = np.bincount(numbers, minlength=len(names))
    drawn = [
        counts @ sums / (counts @ rows) for counts in patient_draws(len(names), resamples, seed)
    ]
    return _interval(float(values.mean()), np.concatenate(drawn))


def _mean(scored: Sequence[dict], name: str) -> Any:
    """Average a metric over models: float, or float (resamples,); NaN if any model's is NaN."""
    return np.mean([metrics[name] for metrics in scored], axis=0)


def _interval(value: float, drawn: np.ndarray) -> dict:
    defined = drawn[~np.isnan(drawn)]
    low = high = None
    if len(defined) >= 0.9 * len(drawn):
        low, high = (float(q) for q in np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    rounded = None if np.isnan(value) else float(value)
    return {"value": rounded, "low": low, "high": high, "resamples": len(defined)}


def _resampled(
    sets: Sequence[tuple], resamples: int, seed: int, label_set: LabelSet
) -> tuple[list, list]:
    """Score sets of rows (truth, probabilities, patients), whole and with patients resampled."""
    columns, owners = [], []
    for truth, values, patients in sets:
        truth, values = np.asarray(truth), np.asarray(values, np.float64)
        if values.shape != truth.shape or len(patients) != len(truth):
            raise DataError(
                f"truth {truth.shape}, probabilities {values.shape}, patients ({len(patients)},);"
                " expected the same rows and labels."
            )
        columns.append(_Columns(truth, values, label_set))
        owners.append(np.asarray(patients, object))
    numbers, names = pd.factorize(np.concatenate(owners))
    if len(names) < 2:
        raise DataError(f"{len(names)} patient(s); resampling needs at least two.")
    parts = np.split(numbers, np.cumsum([len(owner) for owner in owners])[:-1])
    whole = [
        {name: found[0] for name, found in column.metrics(np.ones((1, len(part)))).items()}
        for column, part in zip(columns, parts, strict=True)
    ]
    drawn: list[list] = [[] for _ in sets]
    for counts in patient_draws(len(names), resamples, seed):
        for scored, column, part in zip(drawn, columns, parts, strict=True):
            scored.append(column.metrics(counts[:, part].astype(np.float64)))
    joined = [
        {name: np.concatenate([part[name] for part in scored]) for name in scored[0]}
        for scored in drawn
    ]
    return whole, joined


def patient_draws(num_patients: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each patient occurs in each resample: int (some resamples, patients).

    Args:
        num_patients: of the data.
        resamples: how many in all.
        seed: the same seed gives the same draws.
    """
    random = np.random.default_rng(seed)
    shares = np.full(num_patients, 1 / num_patients)
    for start in range(0, resamples, _CHUNK):
        yield random.multinomial(num_patients, shares, min(_CHUNK, resamples - start))


class _Columns:
    """Labels and their probabilities, sorted once, scored under many weights."""

    def __init__(self, truth: np.ndarray, values: np.ndarray, label_set: LabelSet):
        present, truth = truth != UNLABELLED, truth == 1
        whole = present.all(axis=1)
        clipped = np.clip(values, CLIP, 1 - CLIP)
        self._labels = label_set
        # None where nothing is missing: sums are then over all rows, and faster.
        self._present = None if whole.all() else present.astype(np.float64)
        self._whole = whole
        self._entropy = np.where(present, -np.log(np.where(truth, clipped, 1 - clipped)), 0.0)
        self._true_entropy = -np.log(np.where(truth, clipped, 1.0)).sum(axis=1)
        squares = (values - truth) ** 2
        counts = np.maximum(present.sum(axis=1), 1)
        self._squares = np.where(present, squares, 0).sum(axis=1) / counts
        if self._present is None:
            self._squares = squares.mean(axis=1)
        self._is_exact = (predictions(values, label_set) == truth).all(axis=1) & whole
        self._rankings = [
            _ranking(truth[:, column], values[:, column], np.flatnonzero(present[:, column]))
            for column in range(len(label_set))
        ]

    def metrics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Score under weights (resamples, rows): metric -> float64 (resamples,), NaN undefined."""
        total = weights.sum(axis=1)
        # With several models of few patients each, a resample may hold none of one model's.
        total[total == 0] = np.nan
        summed = weights @ self._entropy
        if self._present is None:
            entropy = summed / total[:, np.newaxis]
            log_loss, whole = entropy.mean(axis=1), total
        else:
            counts = weights @ self._present
            with np.errstate(invalid="ignore"):
                entropy = summed / counts
                log_loss = summed.sum(axis=1) / counts.sum(axis=1)
            whole = weights @ self._whole
            whole[whole == 0] = np.nan
        if self._labels.exclusive:
            log_loss = weights @ (self._true_entropy * self._whole) / whole
        found = {"log_loss": log_loss}
        if self._labels.competition_weights is not None:
            shares = np.array(self._labels.competition_weights)
            defined = ~np.isnan(entropy)
            with np.errstate(invalid="ignore"):
                found["rsna_log_loss"] = np.where(defined, entropy, 0) @ shares / (defined @ shares)
        found |= {
            "brier": weights @ self._squares / total,
            "exact_match": weights @ self._is_exact / whole,
        }
        # Rows first: the gathers below then read contiguous memory. Sums are whole numbers, which
        # float32 holds exactly up to 2**24.
        by_row = np.ascontiguousarray(
            weights.T, np.float32 if np.nansum(total) < 2**24 else np.float64
        )
        scored = [ranking.score(by_row) for ranking in self._rankings]
        for number, metric in enumerate(("auroc", "ap")):
            for name, score in zip(self._labels.names, scored, strict=True):
                found[f"{metric}/{name}"] = score[number]
        for column, name in enumerate(self._labels.names):
            found[f"log_loss/{name}"] = entropy[:, column]
        return found


@dataclass(frozen=True, eq=False)
class _Ranking:
    """The rows of one label, sorted by falling probability.

    Rows of equal probability share a threshold. For AUROC each counts as if in the middle of the
    tie, for precision as if at its end.

    Args:
        order: int (n,), the rows that have the label.
        positive: int (p,), positions of the positive rows in `order`.
        tie: int (2, p), positions where each positive's tie begins and ends.
        ahead: int (2, p), number of positive rows before those positions.
    """

    order: np.ndarray
    positive: np.ndarray
    tie: np.ndarray
    ahead: np.ndarray

    def score(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return AUROC and average precision under weights (rows, resamples)."""
        resamples = weights.shape[1]
        rows = np.zeros((len(self.order) + 1, resamples), weights.dtype)
        np.cumsum(weights[self.order], axis=0, out=rows[1:])
        own = weights[self.order[self.positive]].astype(np.float64)
        hits = np.zeros((len(own) + 1, resamples))
        np.cumsum(own, axis=0, out=hits[1:])
        hits_before, hits_upto = hits[self.ahead[0]], hits[self.ahead[1]]
        rows_before, rows_upto = (rows[places].astype(np.float64) for places in self.tie)
        num_positive = hits[-1]
        num_negative = rows[-1] - num_positive
        with np.errstate(invalid="ignore", divide="ignore"):
            # A positive ranks above the negatives after its tie, and above half of those within it.
            above = num_negative - (rows_upto - hits_upto + rows_before - hits_before) / 2
            auroc = (own * above).sum(axis=0) / (num_positive * num_negative)
            precision = np.where(rows_upto > 0, hits_upto / rows_upto, 0.0)
            ap = (own * precision).sum(axis=0) / num_positive
        return auroc, ap


def _ranking(truth: np.ndarray, values: np.ndarray, rows: np.ndarray) -> _Ranking:
    """Sort some rows of a label: those that have it."""
    truth, values = truth[rows], values[rows]
    order = np.argsort(-values, kind="stable")
    positive = np.flatnonzero(truth[order])
    starts = np.flatnonzero(np.diff(values[order], prepend=np.inf))
    group = np.searchsorted(starts, positive, side="right") - 1
    tie = np.stack([starts[group], np.append(starts[1:], len(order))[group]])
    return _Ranking(rows[order], positive, tie, np.searchsorted(positive, tie))
