"""Metrics over a whole split, next to the constant predictors that a model has to beat.

An undefined metric (no positives, nothing predicted) is None, null in JSON and "n/a" in text. It
never counts as 0 or 1. This module needs only NumPy and scikit-learn.

Definitions, for n samples and their labels (the six of RSNA, or those of a `LabelSet`), y in
{0, 1}, p a probability; a label of -1 is missing, and counts nowhere:

- log loss: mean binary cross-entropy over samples and labels, p clipped to [1e-7, 1 - 1e-7]
  (float32 sigmoids saturate at exactly 1; with RSNA's own clip of 1e-15 one such mistake would
  cost 34.5 instead of 16.1);
- RSNA log loss: the same with `any` counted twice, divided by seven (RSNA 2019 competition);
- of exclusive labels, the log loss is the mean of -ln p of the true one, and that with the highest
  p is predicted;
- a label is predicted when p >= 0.5;
- exact match: share of samples with all labels right (subset accuracy); samples with a missing
  label are left out of it, and of the Hamming loss and score;
- Hamming loss: share of labels that are wrong; Hamming score: mean of |y and p| / |y or p|, 1
  where both are empty (Godbole & Sarawagi, PAKDD 2004);
- specificity: recall of the inverted labels; macro: mean over the labels where it is defined.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ich_keras.errors import DataError
from ich_keras.labels import SIX, UNLABELLED, LabelSet

CLIP = 1e-7
THRESHOLD = 0.5


def truth_columns(labels: LabelSet) -> list[str]:
    """Return the columns of the true labels in a table that also has those of probabilities."""
    return [f"true_{name}" for name in labels.names]


TRUTH_COLUMNS = tuple(truth_columns(SIX))


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
    "rsna_log_loss": Metric("RSNA-weighted log loss", "mean over the labels, any twice", False),
    "exact_match": Metric("exact match", "share of samples with all labels right", True),
    "hamming_loss": Metric("Hamming loss", "(fp + fn) / (labels n)", False),
    "hamming_score": Metric("Hamming score", "mean of |y and p| / |y or p|", True),
    "precision": Metric("precision (macro)", "tp / (tp + fp)", True),
    "recall": Metric("recall (macro)", "tp / (tp + fn)", True),
    "f1": Metric("F1 (macro)", "2 tp / (2 tp + fp + fn)", True),
    "specificity": Metric("specificity (macro)", "tn / (tn + fp)", True),
}
# The metrics a report shows for each label; `RATES` are also averaged over the labels (macro).
PER_LABEL = ("auroc", "ap", "log_loss", *RATES)


def binary_metrics(
    labels: np.ndarray,
    probabilities: np.ndarray,
    prevalence: Sequence[float] | None = None,
    label_set: LabelSet = SIX,
) -> dict:
    """Compute every metric of some labels, and the baselines.

    Args:
        labels: int (n, labels), 0 or 1, in the order of `label_set`; -1 is missing.
        probabilities: float (n, labels), in [0, 1].
        prevalence: of the training set, float (labels,). Without it the baseline is the
            prevalence of `labels`, the hardest constant to beat.
        label_set: what the columns mean.

    Returns:
        JSON-able: log_loss, rsna_log_loss (None without a label that stands for the others),
        exact_match, hamming_loss, hamming_score; the macro means precision, recall, f1,
        specificity, and in `defined_labels` the number of labels that each is averaged over; auroc
        and ap per label; `per_label` with all metrics of each label; `n` (samples, positive, and
        present where labels are missing); `baseline` (prevalence, all_negative); `skill`, which is
        1 - loss / loss of the baseline: 1 is perfect, 0 no better than the constant, None where
        the constant is already perfect (log losses are compared with the prevalence, the others
        with all-negative; of exclusive labels, with always the most frequent one).

    Raises:
        DataError: no samples, a wrong shape, a label that is not 0, 1 or -1, a sample without any
            label, or a probability that is NaN or outside [0, 1]; the message names the row.

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
    labels = _checked_labels(labels, label_set)
    probabilities = _checked_probabilities(probabilities, labels.shape, label_set)
    predicted = predictions(probabilities, label_set)
    truth, present = labels == 1, labels != UNLABELLED
    entropy = _cross_entropy(truth, probabilities)
    per_label = {
        name: _label_metrics(*(part[present[:, column], column] for part in columns))
        for columns in [(truth, predicted, probabilities, entropy)]
        for column, name in enumerate(label_set.names)
    }
    losses = {
        **_log_losses(truth, probabilities, present, label_set),
        **_set_metrics(truth, predicted, present),
    }
    baseline = _baselines(truth, present, prevalence, label_set)
    number: dict[str, object] = {
        "samples": len(labels),
        "positive": {name: row["positive"] for name, row in per_label.items()},
    }
    if not present.all():
        number["present"] = dict(zip(label_set.names, present.sum(axis=0).tolist(), strict=True))
    return {
        **losses,
        **{metric: _macro([row[metric] for row in per_label.values()]) for metric in RATES},
        "defined_labels": {
            metric: sum(row[metric] is not None for row in per_label.values()) for metric in RATES
        },
        "auroc": {name: row["auroc"] for name, row in per_label.items()},
        "ap": {name: row["ap"] for name, row in per_label.items()},
        "per_label": per_label,
        "n": number,
        "baseline": baseline,
        "skill": _skill(losses, baseline),
    }


def predictions(probabilities: np.ndarray, label_set: LabelSet) -> np.ndarray:
    """Return which labels are predicted: bool (n, labels), at `THRESHOLD` or the highest."""
    if not label_set.exclusive:
        return probabilities >= THRESHOLD
    return np.arange(len(label_set)) == probabilities.argmax(axis=1)[:, np.newaxis]


def _label_metrics(
    truth: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray, entropy: np.ndarray
) -> dict:
    return {
        "positive": int(truth.sum()),
        "log_loss": float(entropy.mean()) if len(entropy) else None,
        **_rates(truth, predicted),
        **_rankings(truth, probabilities),
    }


def _checked_labels(labels: np.ndarray, label_set: LabelSet) -> np.ndarray:
    labels = np.ascontiguousarray(labels)
    if labels.ndim != 2 or labels.shape[1] != len(label_set) or len(labels) == 0:
        raise DataError(
            f"labels have the shape {labels.shape}; expected (samples > 0, {len(label_set)})."
        )
    wrong = ~np.isin(labels, (0, 1, UNLABELLED))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise DataError(
            f"row {row}, {label_set.names[column]}: label {labels[row, column]}; expected 0 or 1, "
            f"or -1 where it is missing ({int(wrong.any(axis=1).sum()):,} such rows)."
        )
    empty = (labels == UNLABELLED).all(axis=1)
    if empty.any():
        raise DataError(
            f"row {int(np.argmax(empty))} has no label ({int(empty.sum()):,} such rows).",
            "Leave out samples without labels.",
        )
    return labels


def _checked_probabilities(
    probabilities: np.ndarray, shape: tuple[int, int], label_set: LabelSet
) -> np.ndarray:
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
            f"row {row}, {label_set.names[column]}: probability {probabilities[row, column]}; "
            f"expected 0 to 1 ({int(wrong.any(axis=1).sum()):,} such rows).",
            "Are these logits, or has the training diverged?",
        )
    return probabilities


def _cross_entropy(truth: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    clipped = np.clip(probabilities, CLIP, 1 - CLIP)
    return -np.log(np.where(truth, clipped, 1 - clipped))


def _log_losses(
    truth: np.ndarray, probabilities: np.ndarray, present: np.ndarray, label_set: LabelSet
) -> dict[str, float | None]:
    if label_set.exclusive:
        rows = present.all(axis=1)
        if not rows.any():
            return {"log_loss": None, "rsna_log_loss": None}
        true = np.clip(probabilities[rows], CLIP, 1 - CLIP)[truth[rows]]
        return {"log_loss": float(-np.log(true).mean()), "rsna_log_loss": None}
    entropy = _cross_entropy(truth, probabilities)
    weights = label_set.competition_weights
    if present.all():
        means = entropy.mean(axis=0)
        whole = float(entropy.mean())
    else:
        counts = present.sum(axis=0)
        means = np.where(present, entropy, 0).sum(axis=0) / np.maximum(counts, 1)
        whole = float(entropy[present].mean())
        if weights is not None:
            weights = tuple(np.where(counts > 0, weights, 0).tolist())
    rsna = None if weights is None else float(means @ np.array(weights) / sum(weights))
    return {"log_loss": whole, "rsna_log_loss": rsna}


def _set_metrics(
    truth: np.ndarray, predicted: np.ndarray, present: np.ndarray
) -> dict[str, float | None]:
    whole = present.all(axis=1)
    if not whole.any():
        return dict.fromkeys(("exact_match", "hamming_loss", "hamming_score"))
    truth, predicted = truth[whole], predicted[whole]
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


def _baselines(
    truth: np.ndarray,
    present: np.ndarray,
    prevalence: Sequence[float] | None,
    label_set: LabelSet,
) -> dict:
    """Score the two constant predictors: the prevalence, and never any haemorrhage.

    The log losses of all-negative are None: a hard 0 for a positive costs infinity, and a clipped
    number would only reflect the clip. Of exclusive labels one is always positive: there the second
    predictor is always the most frequent one.
    """
    source = "evaluated set" if prevalence is None else "training set"
    if prevalence is not None:
        constant = np.asarray(prevalence, dtype=float)
    elif present.all():
        constant = truth.mean(axis=0)
    else:
        constant = truth.sum(axis=0) / np.maximum(present.sum(axis=0), 1)
    shape = (1, len(label_set))
    constant = _checked_probabilities(constant[np.newaxis], shape, label_set)
    repeated = np.broadcast_to(constant, truth.shape)
    usual = predictions(repeated, label_set)
    return {
        "prevalence": {
            "source": source,
            "probabilities": dict(zip(label_set.names, constant[0].tolist(), strict=True)),
            **_log_losses(truth, repeated, present, label_set),
            **_set_metrics(truth, usual, present),
        },
        "all_negative": {
            "log_loss": None,
            "rsna_log_loss": None,
            **_set_metrics(truth, usual if label_set.exclusive else np.zeros_like(truth), present),
        },
    }


def _skill(losses: dict, baseline: dict) -> dict[str, float | None]:
    constant, negative = baseline["prevalence"], baseline["all_negative"]

    def against(loss: float | None, reference: float | None) -> float | None:
        # A constant that is right everywhere still pays the clip; nothing is left to improve on.
        if loss is None or reference is None or reference < 10 * CLIP:
            return None
        return 1 - loss / reference

    def wrong(metrics: dict) -> float | None:
        return None if metrics["exact_match"] is None else 1 - metrics["exact_match"]

    return {
        "log_loss": against(losses["log_loss"], constant["log_loss"]),
        "rsna_log_loss": against(losses["rsna_log_loss"], constant["rsna_log_loss"]),
        "hamming_loss": against(losses["hamming_loss"], negative["hamming_loss"]),
        "exact_match": against(wrong(losses), wrong(negative)),
    }


def format_metric(value: float | None, digits: int = 4) -> str:
    """Return a metric as text; None becomes "n/a".

    >>> format_metric(0.98765, 3), format_metric(None)
    ('0.988', 'n/a')
    """
    return "n/a" if value is None else f"{value:.{digits}f}"
