"""Numbers as text: means, ranges, intervals, seeds; and why a number is absent."""

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.results import Result
from experiments.weights import absent_weights
from ich_keras.metrics.binary import format_metric

RANKING = "auroc/any"
HEADLINE = ("log_loss", RANKING)
# Below these the report concludes nothing: percentile intervals of a few patients are too narrow,
# and one training says little about the next.
LEAST_SEEDS, LEAST_PATIENTS = 3, 30

Results = Mapping[str, Sequence[Result]]  # key of a run -> its results by seed


def mean_text(values: Sequence[float], digits: int) -> str:
    """Return the mean with thousands separators."""
    return f"{np.mean(values):,.{digits}f}"


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Return the mean and, for several values, the range.

    >>> spread([0.25, 0.75], digits=2)
    '0.50 (0.25 to 0.75)'
    """
    if not values:
        return "n/a"
    mean = format_metric(float(np.mean(values)), digits)
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def each(values: Sequence[float | None], digits: int = 4) -> str:
    """Return the mean of the defined values and, for several seeds, each value in order.

    >>> each([0.75, None, 0.25], digits=2)
    '0.50 (0.75, n/a, 0.25)'
    """
    defined = [value for value in values if value is not None]
    mean = format_metric(float(np.mean(defined)) if defined else None, digits)
    if len(values) == 1:
        return mean
    return f"{mean} ({', '.join(format_metric(value, digits) for value in values)})"


def bounds(row: dict | None, digits: int = 4) -> str:
    """Return an interval as text."""
    if row is None or row["low"] is None:
        return "n/a"
    return f"{row['low']:.{digits}f} to {row['high']:.{digits}f}"


def absent(key: str) -> str:
    """Explain why a run has no result."""
    command = absent_weights(key)
    return f"n/a: weights not fetched (`{command}`)" if command else "n/a: not run"


def seeds_text(group: Sequence[Result]) -> str:
    """Name the seeds, and mark where they are too few for a conclusion."""
    if not group:
        return "n/a"
    few = "" if len(group) >= LEAST_SEEDS else " (too few)"
    return ", ".join(str(result.seed) for result in group) + few


def fewer_text(group: Sequence[Result], others: Sequence[Result]) -> str:
    """Name the seeds of a number that is shown beside one with more seeds."""
    if others and len(group) >= len(others):
        return ""
    return f" (seed {', '.join(str(result.seed) for result in group)})"
