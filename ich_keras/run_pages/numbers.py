"""Numbers and settings as texts in the pages of runs."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ich_keras.labels import LabelSet
from ich_keras.metrics.binary import format_metric

_MOST_DECIMALS = 8
TOO_FEW = (
    "too few patients have the label, or lack it, and more than a tenth of the resamples cannot be"
    " scored"
)
MOST_LABELS = 12  # with charts of their own; tables hold all labels


def with_interval(metrics: dict, name: str, label: str) -> str:
    """Return a label's metric with its 95 % interval, where it has one.

    >>> with_interval({"per_label": {"any": {"auroc": 0.91}}, "intervals": None}, "auroc", "any")
    '0.910'
    """
    text = format_metric(metrics["per_label"].get(label, {}).get(name), 3)
    bounds = interval_of(metrics, f"{name}/{label}")
    return text if bounds is None else f"{text} ({bounds[0]:.3f} to {bounds[1]:.3f})"


def interval_of(metrics: dict, name: str) -> tuple[float, float] | None:
    """Return the 95 % interval of a metric; None where it has none."""
    found = ((metrics.get("intervals") or {}).get("metrics") or {}).get(name)
    if found is None or found["low"] is None:
        return None
    return found["low"], found["high"]


def without_interval(metrics: dict[str, dict], labels: LabelSet) -> str:
    """Say which AUROC and AP have no interval, though others have one; "" where there are none.

    Args:
        metrics: level -> its metrics.
        labels: of the run.
    """
    found = [
        f"{title} of {label} per {level}"
        for level, part in metrics.items()
        if (part.get("intervals") or {}).get("metrics")
        for label in labels.names
        for name, title in (("auroc", "AUROC"), ("ap", "AP"))
        if part["per_label"][label][name] is not None
        and interval_of(part, f"{name}/{label}") is None
    ]
    return f"No interval: {TOO_FEW}. This concerns {names_of(found)}." if found else ""


def form_of(values: Iterable[float | None], fewest: int = 3) -> str:
    """Return a format that shows all numbers of a column alike, each with some significant digits.

    Args:
        values: of the column; None and what is not finite do not count.
        fewest: decimals, unless all are whole, and significant digits of the smallest.

    >>> form_of([0.119, 0.06998, None]), form_of([3.0, 12]), form_of([2e-9, 0.5])
    ('.4f', '.0f', '.2e')
    """
    found = [abs(value) for value in values if value is not None and math.isfinite(value)]
    if all(value == round(value) for value in found):
        return ".0f"
    smallest = min(value for value in found if value)
    needed = max(fewest - 1 - math.floor(math.log10(smallest)), fewest)
    return f".{needed}f" if needed <= _MOST_DECIMALS else f".{fewest - 1}e"


def column(values: Sequence[float | None], fewest: int = 3) -> list[str]:
    """Return the numbers of a column as texts of one form; arguments as of `form_of`.

    >>> column([0.119, 0.06998, None])
    ['0.1190', '0.0700', 'n/a']
    """
    form = form_of(values, fewest)
    return ["n/a" if value is None or math.isnan(value) else f"{value:{form}}" for value in values]


def signed(value: float | None, digits: int = 4) -> str:
    """Return a difference with its sign.

    >>> signed(0.01), signed(None)
    ('+0.0100', 'n/a')
    """
    return "n/a" if value is None else f"{value:+.{digits}f}"


def flat(content: Any, name: str = "") -> dict[str, str]:
    """Return what nested settings say, under dotted names.

    >>> flat({"a": {"b": 1, "c": [2, {"d": None}]}})
    {'a.b': '1', 'a.c': '2, {d: none}'}
    """
    if isinstance(content, dict) and content:
        found: dict[str, str] = {}
        for key, value in content.items():
            found |= flat(value, f"{name}.{key}" if name else str(key))
        return found
    return {name: _said(content)}


def _said(value: Any) -> str:
    if value is None or value in ({}, []):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_said(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value))
    return str(value)


def shown_labels(labels: LabelSet, positive: dict[str, int]) -> list[str]:
    """Return the labels that get charts: all, or those with the most positive samples.

    Args:
        labels: of the run.
        positive: how many samples have each label.
    """
    if len(labels) <= MOST_LABELS:
        return list(labels.names)
    others = [name for name in labels.names if name != labels.shown]
    most = sorted(others, key=lambda name: -positive.get(name, 0))[: MOST_LABELS - 1]
    return [name for name in labels.names if name == labels.shown or name in most]


def counted(counts: dict[str, int]) -> str:
    """Return counts as a list.

    >>> counted({"ok": 1200, "gap": 3})
    'ok: 1,200; gap: 3'
    """
    return "; ".join(f"{name}: {count:,}" for name, count in counts.items()) or "none"


def names_of(items: Sequence[str], most: int = 20) -> str:
    """Return names as a list; of many, the first ones and how many more there are."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def duration(seconds: float) -> str:
    """Return a time.

    >>> duration(0.42), duration(75.2), duration(7260)
    ('0.4 s', '1 min 15 s', '2 h 1 min')
    """
    if not math.isfinite(seconds):
        return "n/a"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
