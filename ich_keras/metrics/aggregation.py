"""Turning slice probabilities into one per series: the rules, and how one is chosen.

A run with a sequence head has one rule more: its head answers the series itself.

The best rule depends on the errors a network makes. It is chosen on the validation split and
reported with the result: a rule chosen on the test split would be a parameter fitted to it.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from ich_keras.errors import UsageError
from ich_keras.labels import SIX, LabelSet
from ich_keras.metrics.binary import CLIP, binary_metrics

DEFAULT_RULE = "max"
TOP = 3  # slices: a bleed is rarely on fewer


def _highest(values: np.ndarray) -> np.ndarray:
    return values.max(axis=0)


def _mean_of_highest(values: np.ndarray) -> np.ndarray:
    return np.sort(values, axis=0)[-TOP:].mean(axis=0)


def _mean(values: np.ndarray) -> np.ndarray:
    return values.mean(axis=0)


def _first(values: np.ndarray) -> np.ndarray:
    return values[0]


def _noisy_or(values: np.ndarray) -> np.ndarray:
    # In logarithms, so that the product of many small numbers keeps its digits.
    return -np.expm1(np.log1p(-np.minimum(values, 1 - CLIP)).sum(axis=0))


# Name -> function of float64 (slices, labels) that gives (labels,).
RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "max": _highest,
    f"mean of the top {TOP}": _mean_of_highest,
    "noisy-or": _noisy_or,
}
# The rules above take a positive slice for a positive series. Of exclusive labels none is negative.
EXCLUSIVE_RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"mean": _mean}
# The answer that a sequence head gives to the series as a whole: nothing is made of slices.
HEAD = "head"
ALL_RULES = (*RULES, *EXCLUSIVE_RULES, HEAD)


def rules_of(label_set: LabelSet) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Return the rules that suit some labels; the first is the usual one."""
    return EXCLUSIVE_RULES if label_set.exclusive else RULES


def head_columns(label_set: LabelSet) -> list[str]:
    """Return the columns of a table that hold a sequence head's answers to series.

    >>> head_columns(SIX)[-1]
    'head_any'
    """
    return [f"{HEAD}_{name}" for name in label_set.names]


def head_of(table: pd.DataFrame, label_set: LabelSet) -> np.ndarray | None:
    """Return a sequence head's answers, float64 (rows, labels); None where a table has none."""
    columns = head_columns(label_set)
    return table[columns].to_numpy(np.float64) if columns[0] in table else None


def rule_in_words(rule: str) -> str:
    """Say what a rule makes the probability of a series.

    >>> rule_in_words("max"), rule_in_words("head")
    ("the max of its slices'", "the sequence head's own answer")
    """
    return "the sequence head's own answer" if rule == HEAD else f"the {rule} of its slices'"


def aggregate(
    values: np.ndarray,
    series_uids: Sequence[str],
    rule: str = DEFAULT_RULE,
    label_set: LabelSet = SIX,
    head: np.ndarray | None = None,
) -> pd.DataFrame:
    """Turn the probabilities of slices into those of their series.

    Args:
        values: float (slices, labels).
        series_uids: str (slices,).
        rule: a key of `RULES`: the highest; the mean of the three highest (of all, if a series has
            fewer); or noisy-or, 1 - product of (1 - p), the chance that at least one slice is
            positive if slices were independent, which they are not. Or "mean", for exclusive
            labels. Or `HEAD`.
        label_set: what the columns mean.
        head: float (slices, labels), for `HEAD`: the sequence head's answer to the series of each
            slice.

    Returns:
        float64, indexed by series_uid in the order of first appearance; a column for each label.

    Raises:
        UsageError: the rule is unknown, or `HEAD` without a head's answers.

    >>> values = np.repeat([[0.5], [0.2], [0.1]], 6, axis=1)
    >>> aggregate(values, ["a", "a", "b"])["any"].to_dict()
    {'a': 0.5, 'b': 0.1}
    >>> noisy = aggregate(values, ["a", "a", "b"], "noisy-or")["any"]
    >>> noisy.round(6).to_dict()  # 1 - 0.5 * 0.8
    {'a': 0.6, 'b': 0.1}
    """
    if rule not in ALL_RULES:
        raise UsageError(f"aggregation {rule!r}; expected one of {', '.join(ALL_RULES)}.")
    if rule == HEAD:
        if head is None:
            raise UsageError(
                f"aggregation {HEAD!r} without the answers of a sequence head to the series.",
                f"Give them, or take one of {', '.join(rules_of(label_set))}.",
            )
        values = head
    take = (RULES | EXCLUSIVE_RULES | {HEAD: _first})[rule]
    values = np.asarray(values, np.float64)
    numbers, uids = pd.factorize(np.asarray(series_uids, object))
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    parts = np.split(values[order], starts[1:]) if len(uids) else []
    table = np.array([take(part) for part in parts]).reshape(-1, len(label_set))
    index = pd.Index(uids, name="series_uid")
    return pd.DataFrame(table, index=index, columns=list(label_set.names))


def choose_rule(
    truth: np.ndarray,
    values: np.ndarray,
    series_uids: Sequence[str],
    label_set: LabelSet = SIX,
    head: np.ndarray | None = None,
) -> tuple[str, dict[str, float]]:
    """Choose the rule with the lowest log loss over series.

    Args:
        truth: int (slices, labels), of the validation split; -1 is missing.
        values: float (slices, labels), probabilities.
        series_uids: str (slices,).
        label_set: what the columns mean.
        head: as in `aggregate`; with it `HEAD` is one of the rules, the last.

    Returns:
        (rule, log loss per rule). Of rules with equal loss, the first in `rules_of`.

    >>> truth = np.zeros((4, 6), int)
    >>> values = np.repeat([[0.5], [0.1], [0.1], [0.1]], 6, axis=1)  # one slice is wrongly 0.5
    >>> rule, losses = choose_rule(truth, values, ["a"] * 4)
    >>> rule, round(losses["max"], 4)  # -ln(1 - 0.5)
    ('mean of the top 3', 0.6931)
    """
    # A series is positive where any slice is; one of exclusive labels is the same in all of them.
    labels = aggregate(truth, series_uids, "max", label_set).to_numpy().astype(np.int64)
    losses = {}
    for rule in [*rules_of(label_set), *([] if head is None else [HEAD])]:
        found = aggregate(values, series_uids, rule, label_set, head).to_numpy()
        losses[rule] = binary_metrics(labels, found, label_set=label_set)["log_loss"]
    return min(losses, key=losses.__getitem__), losses
