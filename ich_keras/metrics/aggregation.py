"""Turning slice probabilities into one per series: the rules, and how one is chosen.

The best rule depends on the errors a network makes. It is chosen on the validation split and
reported with the result: a rule chosen on the test split would be a parameter fitted to it.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from ich_keras.errors import UsageError
from ich_keras.labels import LABELS
from ich_keras.metrics.binary import CLIP, binary_metrics

DEFAULT_RULE = "max"
TOP = 3  # slices: a bleed is rarely on fewer


def _highest(values: np.ndarray) -> np.ndarray:
    return values.max(axis=0)


def _mean_of_highest(values: np.ndarray) -> np.ndarray:
    return np.sort(values, axis=0)[-TOP:].mean(axis=0)


def _noisy_or(values: np.ndarray) -> np.ndarray:
    # In logarithms, so that the product of many small numbers keeps its digits.
    return -np.expm1(np.log1p(-np.minimum(values, 1 - CLIP)).sum(axis=0))


# Name -> function of float64 (slices, 6) that gives (6,).
RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "max": _highest,
    f"mean of the top {TOP}": _mean_of_highest,
    "noisy-or": _noisy_or,
}


def aggregate(
    values: np.ndarray, series_uids: Sequence[str], rule: str = DEFAULT_RULE
) -> pd.DataFrame:
    """Turn the probabilities of slices into those of their series.

    Args:
        values: float (slices, 6).
        series_uids: str (slices,).
        rule: a key of `RULES`: the highest; the mean of the three highest (of all, if a series has
            fewer); or noisy-or, 1 - product of (1 - p), the chance that at least one slice is
            positive if slices were independent, which they are not.

    Returns:
        float64, indexed by series_uid in the order of first appearance; six columns.

    Raises:
        UsageError: the rule is unknown.

    >>> values = np.repeat([[0.5], [0.2], [0.1]], 6, axis=1)
    >>> aggregate(values, ["a", "a", "b"])["any"].to_dict()
    {'a': 0.5, 'b': 0.1}
    >>> noisy = aggregate(values, ["a", "a", "b"], "noisy-or")["any"]
    >>> noisy.round(6).to_dict()  # 1 - 0.5 * 0.8
    {'a': 0.6, 'b': 0.1}
    """
    if rule not in RULES:
        raise UsageError(f"aggregation {rule!r}; expected one of {', '.join(RULES)}.")
    values = np.asarray(values, np.float64)
    numbers, uids = pd.factorize(np.asarray(series_uids, object))
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    parts = np.split(values[order], starts[1:]) if len(uids) else []
    table = np.array([RULES[rule](part) for part in parts]).reshape(-1, len(LABELS))
    return pd.DataFrame(table, index=pd.Index(uids, name="series_uid"), columns=list(LABELS))


def choose_rule(
    truth: np.ndarray, values: np.ndarray, series_uids: Sequence[str]
) -> tuple[str, dict[str, float]]:
    """Choose the rule with the lowest log loss over series.

    Args:
        truth: int (slices, 6), of the validation split.
        values: float (slices, 6), probabilities.
        series_uids: str (slices,).

    Returns:
        (rule, log loss per rule). Of rules with equal loss, the first in `RULES`.

    >>> truth = np.zeros((4, 6), int)
    >>> values = np.repeat([[0.5], [0.1], [0.1], [0.1]], 6, axis=1)  # one slice is wrongly 0.5
    >>> rule, losses = choose_rule(truth, values, ["a"] * 4)
    >>> rule, round(losses["max"], 4)  # -ln(1 - 0.5)
    ('mean of the top 3', 0.6931)
    """
    labels = aggregate(truth, series_uids).to_numpy().astype(np.int64)
    losses = {
        rule: binary_metrics(labels, aggregate(values, series_uids, rule).to_numpy())["log_loss"]
        for rule in RULES
    }
    return min(losses, key=losses.__getitem__), losses
