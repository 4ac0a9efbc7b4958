"""Logits of probabilities and back, and the mean of several answers, taken over their logits."""

from collections.abc import Sequence

import numpy as np

from ich_keras.errors import DataError
from ich_keras.labels import SIX, LabelSet
from ich_keras.metrics.binary import CLIP


def logits_of(values: np.ndarray, label_set: LabelSet = SIX) -> np.ndarray:
    """Return the logits of probabilities; of exclusive labels, the log-probabilities.

    Args:
        values: float (..., labels), probabilities; those nearer than 1e-7 to 0 or 1 count as that
            far from it.
        label_set: what the columns mean.

    Returns:
        float64, same shape.
    """
    if label_set.exclusive:
        return np.log(np.clip(np.asarray(values, np.float64), CLIP, 1.0))
    clipped = np.clip(np.asarray(values, np.float64), CLIP, 1 - CLIP)
    return np.log(clipped) - np.log1p(-clipped)


def probabilities_of(logits: np.ndarray, label_set: LabelSet = SIX) -> np.ndarray:
    """Return the probabilities of logits; of exclusive labels, each row sums to 1.

    Args:
        logits: float (..., labels), as from `logits_of`.
        label_set: what the columns mean.

    Returns:
        float64, same shape.
    """
    if label_set.exclusive:
        return np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
    return 0.5 * (1.0 + np.tanh(0.5 * logits))  # tanh cannot overflow


def mean_answer(answers: Sequence[np.ndarray], label_set: LabelSet = SIX) -> np.ndarray:
    """Average several answers to the same samples over their logits.

    Args:
        answers: at least one; each float (n, labels), probabilities, all of one dtype.
        label_set: what the columns mean; of exclusive labels, log-probabilities are averaged and
            the rows sum to 1 again.

    Returns:
        Probabilities (n, labels) of the answers' dtype. Where all answers are equal, theirs to the
        last bit.

    Raises:
        DataError: there is no answer, or their shapes differ.

    >>> answers = [np.full((1, 6), 0.9), np.full((1, 6), 0.5)]  # odds of 9 and 1: 3 in the mean
    >>> mean_answer(answers)[0].round(6).tolist()
    [0.75, 0.75, 0.75, 0.75, 0.75, 0.75]
    """
    if len({np.shape(one) for one in answers}) != 1:
        shapes = ", ".join(str(np.shape(one)) for one in answers) or "none"
        raise DataError(f"answers of the shapes {shapes}; expected equal ones.")
    stacked = np.stack(answers)
    mean = probabilities_of(logits_of(stacked, label_set).mean(axis=0), label_set)
    is_same = (stacked == stacked[0]).all(axis=0)
    if label_set.exclusive:
        is_same = is_same.all(axis=1, keepdims=True)
    return np.where(is_same, stacked[0], mean).astype(stacked.dtype)
