"""The thesis's own convention for metrics: only for tables that compare with its numbers.

It averages over batches what should be computed over all samples. The numbers depend on the batch
size and on the order, and a batch without a positive counts as much as a batch full of them.
"""

import numpy as np
from sklearn.metrics import precision_recall_fscore_support, recall_score

from ich_keras.metrics.binary import CLIP, THRESHOLD


def thesis_metrics(
    truth: np.ndarray, values: np.ndarray, batch_size: int, zero_division: float = 0.0
) -> dict[str, float]:
    """Compute the metrics of tables 2 to 4 as means over batches.

    Args:
        truth: int (n, 6), 0 or 1, in the order in which samples were evaluated.
        values: float (n, 6), probabilities.
        batch_size: samples per batch: 32 slices, 16 slabs or 1 series. The last batch may be
            smaller and counts as much.
        zero_division: the value of a rate that is undefined in a batch. The thesis's code uses
            different values in different runs, so its rates cannot be reproduced exactly.

    Returns:
        loss, accuracy, hamming_loss, hamming_score (1 where both sets are empty), and the macro
        means precision, f1, recall, specificity (recall of the inverted labels).
    """
    batches = [
        _batch_metrics(
            truth[start : start + batch_size] == 1,
            values[start : start + batch_size],
            zero_division,
        )
        for start in range(0, len(truth), batch_size)
    ]
    return {name: float(np.mean([batch[name] for batch in batches])) for name in batches[0]}


def _batch_metrics(truth: np.ndarray, values: np.ndarray, zero_division: float) -> dict[str, float]:
    predicted = values >= THRESHOLD
    clipped = np.clip(values, CLIP, 1 - CLIP)
    either = (truth | predicted).sum(axis=1)
    both = (truth & predicted).sum(axis=1)
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth, predicted, average="macro", zero_division=zero_division
    )
    return {
        "loss": -np.log(np.where(truth, clipped, 1 - clipped)).mean(),
        "accuracy": (truth == predicted).all(axis=1).mean(),
        "hamming_loss": (truth != predicted).mean(),
        "hamming_score": np.where(either == 0, 1.0, both / np.maximum(either, 1)).mean(),
        "precision": precision,
        "f1": f1,
        "recall": recall,
        "specificity": recall_score(
            ~truth, ~predicted, average="macro", zero_division=zero_division
        ),
    }
