"""Metrics over a whole split, next to the constant predictors that a model has to beat.

An undefined metric (no positives, nothing predicted) is None, null in JSON and "n/a" in text. It
never counts as 0 or 1. This module needs only NumPy and scikit-learn.

Definitions, for n samples and six labels, y in {0, 1}, p a probability:

- log loss: mean binary cross-entropy over samples and labels, p clipped to [1e-7, 1 - 1e-7]
  (float32 sigmoids saturate at exactly 1; with RSNA's own clip of 1e-15 one such mistake would
  cost 34.5 instead of 16.1);
- RSNA log loss: the same with `any` counted twice, divided by seven (RSNA 2019 competition);
- a label is predicted when p >= 0.5;
- exact match: share of samples with all six labels right (subset accuracy);
- Hamming loss: share of labels that are wrong; Hamming score: mean of |y and p| / |y or p|, 1
  where both are empty (Godbole & Sarawagi, PAKDD 2004);
- specificity: recall of the inverted labels; macro: mean over the labels where it is defined.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ich_keras.errors import DataError
from ich_keras.labels import LABELS, NUM_LABELS, RSNA_WEIGHTS

CLIP = 1e-7
THRESHOLD = 0.5
TRUTH_COLUMNS = tuple(f"true_{name}" for name in LABELS)


# Each rate of one label, from its counts; None where it is undefined. A new rate needs an entry
# here, and another in METRICS to be shown.
RATES: dict[str, Callable[["Counts"], float | None]] = {
    "precision": lambda n: _ratio(n.tp, n.tp + n.fp),
    "recall": lambda n: _ratio(n.tp, n.tp + n.fn),
    "f1": lambda n: _ratio(2 * n.tp, 2 * n.tp + n.fp + n.fn),
    "specificity": lambda n: _ratio(n.tn, n.tn + n.fp),
}


class Counts(NamedTuple):
    """True and false positives and negatives of one label."""

    tp: int
    tn: int
    fp: int
    fn: int


class Metric(NamedTuple):
    """How a metric is presented.

    Args:
        title: its name in a report.
        formula: in terms of tp, tn, fp, fn (counts), and of y, p and n as in the module's
            docstring.
        higher_is_better: False for losses.
    """

    title: str
    formula: str
    higher_is_better: bool


# Name in metrics.json -> how it is presented, in the order of a report.
METRICS = {
    "log_loss": Metric("log loss", "mean of -(y ln p + (1 - y) ln(1 - p))", False),
    "rsna_log_loss": Metric("RSNA-weighted log loss", "(2 any + sum of the others) / 7", False),
    "exact_match": Metric("exact match", "share of samples with six right labels", True),
    "hamming_loss": Metric("Hamming loss", "(fp + fn) / (6 n)", False),
    "hamming_score": Metric("Hamming score", "mean of |y and p| / |y or p|", True),
    "precision": Metric("precision (macro)", "tp / (tp + fp)", True),
    "recall": Metric("recall (macro)", "tp / (tp + fn)", True),
    "f1": Metric("F1 (macro)", "2 tp / (2 tp + fp + fn)", True),
    "specificity": Metric("specificity (macro)", "tn / (tn + fp)", True),
}
# The metrics a report shows for each label; `RATES` are also averaged over the labels (macro).
PER_LABEL = ("auroc", "ap", "log_loss", *RATES)


def binary_metrics(
    labels: np.ndarray, probabilities: np.ndarray, prevalence: Sequence[float] | None = None
) -> dict:
    """Compute every metric of six independent labels, and the baselines.

    Args:
        labels: int (n, 6), 0 or 1, in the order of `LABELS`.
        probabilities: float (n, 6), in [0, 1].
        prevalence: of the training set, float (6,). Without it the baseline is the prevalence of
            `labels`, the hardest constant to beat.

    Returns:
        JSON-able: log_loss, rsna_log_loss, exact_match, hamming_loss, hamming_score; the macro
        means precision, recall, f1, specificity, and in `defined_labels` the number of labels that
        each is averaged over; auroc and ap per label; `per_label` with all metrics of each label;
        `n` (samples, positive); `baseline` (prevalence, all_negative); `skill`, which is
        1 - loss / loss of the baseline: 1 is perfect, 0 no better than the constant, None where
        the constant is already perfect (log losses are compared with the prevalence, the others
        with all-negative).

    Raises:
        DataError: no samples, a wrong shape, a label that is not 0 or 1, or a probability that is
            NaN or outside [0, 1]; the message names the row.

    >>> labels = np.repeat([[1], [1], [0], [0]], 6, axis=1)
    >>> probabilities = np.repeat([[0.9], [0.1], [0.1], [0.1]], 6, axis=1)  # one bleed is missed
    >>> metrics = binary_metrics(labels, probabilities)
    >>> round(metrics["log_loss"], 4)  # (-3 ln 0.9 - ln 0.1) / 4
    0.6547
    >>> metrics["exact_match"], metrics["hamming_loss"], metrics["recall"], metrics["precision"]
    (0.75, 0.25, 0.5, 1.0)
    >>> metrics["auroc"]["any"]  # of 4 pairs, 2 in order and 2 tied
    0.75
    >>> metrics["ap"]["any"]  # 1/2 * 1 + 1/2 * 2/4
    0.75
    """
    labels = _checked_labels(labels)
    probabilities = _checked_probabilities(probabilities, labels.shape)
    predicted = probabilities >= THRESHOLD
    truth = labels == 1
    entropy = _cross_entropy(truth, probabilities)
    per_label = {
        name: {
            "positive": int(truth[:, column].sum()),
            "log_loss": float(entropy[:, column].mean()),
            **_rates(truth[:, column], predicted[:, column]),
            **_rankings(truth[:, column], probabilities[:, column]),
        }
        for column, name in enumerate(LABELS)
    }
    losses = {**_log_losses(entropy), **_set_metrics(truth, predicted)}
    baseline = _baselines(truth, prevalence)
    return {
        **losses,
        **{metric: _macro([row[metric] for row in per_label.values()]) for metric in RATES},
        "defined_labels": {
            metric: sum(row[metric] is not None for row in per_label.values()) for metric in RATES
        },
        "auroc": {name: row["auroc"] for name, row in per_label.items()},
        "ap": {name: row["ap"] for name, row in per_label.items()},
        "per_label": per_label,
        "n": {
            "samples": len(labels),
            "positive": {name: row["positive"] for name, row in per_label.items()},
        },
        "baseline": baseline,
        "skill": _skill(losses, baseline),
    }


def _checked_labels(labels: np.ndarray) -> np.ndarray:
    labels = np.ascontiguousarray(labels)
    if labels.ndim != 2 or labels.shape[1] != NUM_LABELS or len(labels) == 0:
        raise DataError(f"labels have the shape {labels.shape}; expected (samples > 0, 6).")
    wrong = ~np.isin(labels, (0, 1))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise DataError(
            f"row {row}, {LABELS[column]}: label {labels[row, column]}; expected 0 or 1 "
            f"({int(wrong.any(axis=1).sum()):,} such rows).",
            "Leave out samples without labels.",
        )
    return labels


def _checked_probabilities(probabilities: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    # Contiguous, like the labels: the layout decides the order of summation and the last digits.
    probabilities = np.ascontiguousarray(probabilities, dtype=np.float64)
    if probabilities.shape != shape:
        raise DataError(
            f"probabilities have the shape {probabilities.shape}, the labels {shape}; "
            "expected the same."
        )
    wrong = ~((probabilities >= 0) & (probabilities <= 1))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise DataError(
            f"row {row}, {LABELS[column]}: probability {probabilities[row, column]}; expected "
            f"0 to 1 ({int(wrong.any(axis=1).sum()):,} such rows).",
            "Are these logits, or has the training diverged?",
        )
    return probabilities


def _cross_entropy(truth: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    clipped = np.clip(probabilities, CLIP, 1 - CLIP)
    return -np.log(np.where(truth, clipped, 1 - clipped))


def _log_losses(entropy: np.ndarray) -> dict[str, float]:
    return {
        "log_loss": float(entropy.mean()),
        "rsna_log_loss": float(entropy.mean(axis=0) @ np.array(RSNA_WEIGHTS) / sum(RSNA_WEIGHTS)),
    }


def _set_metrics(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    either = (truth | predicted).sum(axis=1)
    both = (truth & predicted).sum(axis=1)
    return {
        "exact_match": float((truth == predicted).all(axis=1).mean()),
        "hamming_loss": float((truth != predicted).mean()),
        "hamming_score": float(np.where(either == 0, 1.0, both / np.maximum(either, 1)).mean()),
    }


def _rates(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float | None]:
    counts = Counts(
        tp=int(np.count_nonzero(truth & predicted)),
        tn=int(np.count_nonzero(~truth & ~predicted)),
        fp=int(np.count_nonzero(~truth & predicted)),
        fn=int(np.count_nonzero(truth & ~predicted)),
    )
    return {name: rate(counts) for name, rate in RATES.items()}


def _ratio(numerator: int, denominator: int) -> float | None:
    return None if denominator == 0 else numerator / denominator


def _rankings(truth: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
    from sklearn.metrics import average_precision_score, roc_auc_score

    auroc = ap = None
    if truth.any():
        ap = float(average_precision_score(truth, probabilities))
        if not truth.all():
            auroc = float(roc_auc_score(truth, probabilities))
    return {"auroc": auroc, "ap": ap}


def _macro(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def _baselines(truth: np.ndarray, prevalence: Sequence[float] | None) -> dict:
    """Score the two constant predictors: the prevalence, and never any haemorrhage.

    The log losses of all-negative are None: a hard 0 for a positive costs infinity, and a clipped
    number would only reflect the clip.
    """
    source = "evaluated set" if prevalence is None else "training set"
    constant = truth.mean(axis=0) if prevalence is None else np.asarray(prevalence, dtype=float)
    constant = _checked_probabilities(constant[np.newaxis], (1, NUM_LABELS))
    repeated = np.broadcast_to(constant, truth.shape)
    return {
        "prevalence": {
            "source": source,
            "probabilities": dict(zip(LABELS, constant[0].tolist(), strict=True)),
            **_log_losses(_cross_entropy(truth, repeated)),
            **_set_metrics(truth, repeated >= THRESHOLD),
        },
        "all_negative": {
            "log_loss": None,
            "rsna_log_loss": None,
            **_set_metrics(truth, np.zeros_like(truth)),
        },
    }


def _skill(losses: dict, baseline: dict) -> dict[str, float | None]:
    constant, negative = baseline["prevalence"], baseline["all_negative"]

    def against(loss: float, reference: float) -> float | None:
        # A constant that is right everywhere still pays the clip; nothing is left to improve on.
        return None if reference < 10 * CLIP else 1 - loss / reference

    return {
        "log_loss": against(losses["log_loss"], constant["log_loss"]),
        "rsna_log_loss": against(losses["rsna_log_loss"], constant["rsna_log_loss"]),
        "hamming_loss": against(losses["hamming_loss"], negative["hamming_loss"]),
        "exact_match": against(1 - losses["exact_match"], 1 - negative["exact_match"]),
    }


def format_metric(value: float | None, digits: int = 4) -> str:
    """Return a metric as text; None becomes "n/a".

    >>> format_metric(0.98765, 3), format_metric(None)
    ('0.988', 'n/a')
    """
    return "n/a" if value is None else f"{value:.{digits}f}"
