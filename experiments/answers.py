"""What the answers of `ich predict` are worth on stored predictions.

A run chooses temperature, thresholds and groups on its validation patients. Results keep test
predictions only, so the choices are made here on some of the test patients and judged on the
others: patients are dealt into `FOLDS`, those of all folds but one choose for the one that is left,
and every patient is answered once by choices that have not seen them. This is repeated with
`REPEATS` deals, because one deal of some fifty patients is luck; results are means over the deals.

What a run chose on validation stays as it was: its best epoch, and the rule from slices to series.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.results import Result
from experiments.scores import Scored, scored
from ich_keras.labels import ANY, LABELS
from ich_keras.metrics.binary import CLIP
from ich_keras.metrics.calibration import BINS, calibration, fit_temperature, with_temperature
from ich_keras.metrics.conformal import HIGH, LOW, UNSURE, LabelScores
from ich_keras.metrics.intervals import LEVEL, RESAMPLES
from ich_keras.metrics.operating import SPECIFICITIES, threshold_at_specificity

FOLDS, REPEATS = 5, 20
ERROR_RATES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
_COLUMN = LABELS.index(ANY)


@dataclass(frozen=True, eq=False)
class Answered:
    """The answers of one run to its test samples, by choices that have not seen their patients.

    Args:
        part: the samples.
        temperatures: float64 (deals, folds).
        scaled: float64 (deals, n, labels), calibrated probabilities.
        groups: error rate -> str (deals, n), of `any`; without rates that need more patients.
        decisions: specificity -> bool (deals, n), of `any`.
    """

    part: Scored
    temperatures: np.ndarray
    scaled: np.ndarray
    groups: dict[float, np.ndarray]
    decisions: dict[float, np.ndarray]

    @property
    def is_positive(self) -> np.ndarray:
        """Whether each sample has the label `any`, bool (n,)."""
        return self.part.truth[:, _COLUMN] == 1


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        value: the mean.
        low, high: 95 % interval over patients; None where resamples lack what is counted.
        seeds: the value of each.
    """

    value: float
    low: float | None
    high: float | None
    seeds: tuple[float, ...]


def answered(part: Scored, repeats: int = REPEATS) -> Answered | None:
    """Answer samples by choices made on other patients.

    Returns:
        None where there are too few patients with `any`, or without: fewer than `FOLDS`.
    """
    is_positive = part.truth[:, _COLUMN] == 1
    with_any = np.unique(part.patients[is_positive])
    without = np.setdiff1d(part.patients, with_any)
    if min(len(with_any), len(without)) < FOLDS:
        return None
    shape = repeats, len(part.truth)
    temperatures = np.empty((repeats, FOLDS))
    scaled = np.empty((*shape, len(LABELS)))
    groups = {rate: np.full(shape, UNSURE, object) for rate in ERROR_RATES}
    decisions = {wanted: np.zeros(shape, bool) for wanted in SPECIFICITIES}
    for deal in range(repeats):
        fold = _dealt(part.patients, with_any, without, deal)
        for number in range(FOLDS):
            held, others = fold == number, fold != number
            truth, values = part.truth[others], part.values[others]
            found = fit_temperature(truth, values)
            temperatures[deal, number] = found
            scaled[deal, held] = with_temperature(part.values[held], found)
            known, new = values[:, _COLUMN], part.values[held, _COLUMN]
            scores = LabelScores.of([(truth[:, _COLUMN], known, part.patients[others])])
            groups = {rate: kept for rate, kept in groups.items() if not scores.too_few(rate)}
            for rate, kept in groups.items():
                kept[deal, held] = scores.groups([new], rate)
            for wanted, yes in decisions.items():
                limit = threshold_at_specificity(truth[:, _COLUMN] == 1, known, wanted)
                assert limit is not None  # there are patients without
                yes[deal, held] = new >= limit
    return Answered(part, temperatures, scaled, groups, decisions)


def _dealt(
    patients: np.ndarray, with_any: np.ndarray, without: np.ndarray, deal: int
) -> np.ndarray:
    """Return the fold of each sample; each has as many patients with `any` as can be."""
    random = np.random.default_rng(deal)
    order = np.concatenate([random.permutation(with_any), random.permutation(without)])
    fold_of = dict(zip(order.tolist(), (np.arange(len(order)) % FOLDS).tolist(), strict=True))
    return np.array([fold_of[patient] for patient in patients.tolist()])


def answers_of(results: Sequence[Result], level: str) -> list[Answered]:
    """Return the answers of each seed at a level; empty where a seed has none there."""
    parts = [scored(result, level) for result in results]
    found = [None if part is None else answered(part) for part in parts]
    return [one for one in found if one is not None] if all(found) else []


def estimate(
    counts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], resamples: int = RESAMPLES
) -> Estimate:
    """Return the mean over seeds of a share, with its interval over patients.

    Args:
        counts: for each seed, of each sample: what is counted float (n,), of what float (n,), and
            the patient (n,). Patients are drawn once for all seeds.
        resamples: of patients.

    >>> counts = [(np.array([1.0, 0, 0, 0]), np.ones(4), np.arange(4))] * 2
    >>> estimate(counts, resamples=20).value
    0.25
    """
    names, owners = np.unique(np.concatenate([of for *_, of in counts]), return_inverse=True)
    sizes = np.cumsum([len(of) for *_, of in counts])[:-1]
    seeds, drawn = [], []
    draws = np.random.default_rng(0).multinomial(
        len(names), np.full(len(names), 1 / len(names)), resamples
    )
    for (part, whole, _), own in zip(counts, np.split(owners, sizes), strict=True):
        parts, wholes = (np.bincount(own, of, len(names)) for of in (part, whole))
        seeds.append(float(parts.sum() / wholes.sum()))
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn.append((draws @ parts) / (draws @ wholes))
    means = np.mean(drawn, axis=0)
    means = means[np.isfinite(means)]
    low = high = None
    if len(means) >= 0.9 * resamples:
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return Estimate(float(np.mean(seeds)), low, high, tuple(seeds))


def group_errors(answers: Sequence[Answered], rate: float) -> dict[str, Estimate] | None:
    """Return the shares of wrong and undecided groups; None where a seed has no groups.

    Each patient counts once, as in the rate that is stated: spread over the samples of a class.

    Returns:
        "low": of positives; "high": of negatives; "unsure": of either, each class by itself, as
        "unsure positive" and "unsure negative".
    """
    if not answers or any(rate not in one.groups for one in answers):
        return None
    return {
        name: estimate([_of_class(one, rate, word, is_of) for one in answers])
        for name, word, is_of in (
            ("low", LOW, True),
            ("high", HIGH, False),
            ("unsure positive", UNSURE, True),
            ("unsure negative", UNSURE, False),
        )
    }


def _of_class(
    one: Answered, rate: float, word: str, of_positive: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weights = np.zeros(len(one.is_positive))
    rows = np.flatnonzero(one.is_positive == of_positive)
    _, numbers, counts = np.unique(one.part.patients[rows], return_inverse=True, return_counts=True)
    weights[rows] = 1 / counts[numbers]
    return (one.groups[rate] == word).mean(axis=0) * weights, weights, one.part.patients


def positives(
    answers: Sequence[Answered], specificity: float, rate: float
) -> dict[str, Estimate] | None:
    """Return how many are called positive, with and without those that are unsure.

    Args:
        answers: of each seed.
        specificity: that the threshold was chosen for.
        rate: of the groups; a `yes` counts after abstention where its group is "high".

    Returns:
        "false" and "true": shares of all negatives and positives with `yes`; "false kept" and
        "true kept": the same after abstention. None where a seed has no groups.
    """
    if not answers or any(rate not in one.groups for one in answers):
        return None
    found = {}
    for name, of_positive in (("false", False), ("true", True)):
        before, after = [], []
        for one in answers:
            yes = one.decisions[specificity]
            whole = (one.is_positive == of_positive).astype(np.float64)
            sure = yes & (one.groups[rate] == HIGH)
            before.append((yes.mean(axis=0) * whole, whole, one.part.patients))
            after.append((sure.mean(axis=0) * whole, whole, one.part.patients))
        found[name], found[f"{name} kept"] = estimate(before), estimate(after)
    return found


def calibration_errors(answers: Sequence[Answered]) -> dict[str, list[float]]:
    """Return the expected calibration error of `any` of each seed, "before" and "after"."""
    found: dict[str, list[float]] = {"before": [], "after": []}
    for one in answers:
        truth = one.part.truth
        found["before"].append(calibration(truth, one.part.values)[ANY]["ece"])
        found["after"].append(
            float(np.mean([calibration(truth, values)[ANY]["ece"] for values in one.scaled]))
        )
    return found


def log_losses(answers: Sequence[Answered]) -> dict[str, Estimate]:
    """Return the mean log loss of all labels, "before" and "after", and the "difference"."""
    before = [(_entropy(one, one.part.values[np.newaxis]), one) for one in answers]
    after = [(_entropy(one, one.scaled), one) for one in answers]
    rows = {
        "before": before,
        "after": after,
        "difference": [(b - a, one) for (a, one), (b, _) in zip(before, after, strict=True)],
    }
    return {
        name: estimate([(loss, np.ones(len(loss)), one.part.patients) for loss, one in found])
        for name, found in rows.items()
    }


def _entropy(one: Answered, values: np.ndarray) -> np.ndarray:
    """Return the log loss of each sample, the mean over labels and deals, float64 (n,)."""
    clipped = np.clip(values, CLIP, 1 - CLIP)
    true = np.where(one.part.truth == 1, clipped, 1 - clipped)
    return -np.log(true).mean(axis=(0, 2))


def reliability(
    answers: Sequence[Answered], is_scaled: bool, bins: int = BINS
) -> tuple[list[float], list[float]]:
    """Return mean probabilities and frequencies of `any` in bins, over all seeds."""
    truth, values = [], []
    for one in answers:
        of = one.scaled if is_scaled else one.part.values[np.newaxis]
        values.append(of.reshape(-1, len(LABELS)))
        truth.append(np.tile(one.part.truth, (len(of), 1)))
    rows = calibration(np.concatenate(truth), np.concatenate(values), bins)[ANY]["bins"]
    return [row["mean_probability"] for row in rows], [row["frequency"] for row in rows]
