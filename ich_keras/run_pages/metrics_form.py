"""Whether a file of metrics holds what the pages of runs read of it."""

from typing import Any

from ich_keras.labels import LabelSet
from ich_keras.metrics.binary import METRICS, PER_LABEL

_COUNT, _FRACTION, _TEXT = "a count", "a number from 0 to 1", "a text"
_NUMBER, _SHARE = "a number or null", "a number from 0 to 1, or null"
_MOST = 1e15  # of a number: above it, floats count no samples
_SHARES = ("auroc", "ap")
LEVELS = ("slice", "series")


def wrong_entry(metrics: Any, labels: LabelSet) -> str:
    """Return what is wrong in the content of a file of metrics.

    Args:
        metrics: what the file holds: level -> its metrics. Parts that older runs lack may be
            absent, and so may entries that no page reads.
        labels: of the run.

    Returns:
        Where it is, what stands there and what was expected; "" where all is well.

    >>> wrong_entry({"slice": 3}, LabelSet(("bleed",)))
    'slice is 3; expected an object'
    """
    form = _level_form(labels)
    if found := _wrong({f"{level}?": form for level in LEVELS}, metrics, ""):
        return found
    for level in LEVELS:
        calibration = (metrics.get(level) or {}).get("calibration") or {}
        if calibration.get("scaled") and None in (
            calibration.get("temperature"),
            calibration.get("scaled_log_loss"),
        ):
            return f"{level}.calibration has no temperature for what it calls scaled"
    return ""


def _level_form(labels: LabelSet) -> dict:
    """Return the form of one level: a name with "?" behind it may be absent or null."""
    names = labels.names
    shares = {f"{name}?": _SHARE for name in names}
    rates = {"threshold": _NUMBER, "recall": _SHARE, "specificity": _SHARE, "precision": _SHARE}
    own = {"auroc": _SHARE, "ap": _SHARE, "log_loss": _NUMBER}
    row = {"mean_probability": _FRACTION, "frequency": _FRACTION}
    bins = {"ece": _SHARE, "brier": _SHARE, "bins?": [row]}
    interval = {"low": _NUMBER, "high": _NUMBER}
    scores = {f"{name}?": _NUMBER for name in METRICS}
    return {
        **dict.fromkeys(METRICS, _NUMBER),
        "auroc": shares,
        "ap": shares,
        "per_label": {
            name: own | {f"{rate}?": _SHARE for rate in PER_LABEL if rate not in own}
            for name in names
        },
        "n": {
            "samples": _COUNT,
            "positive": dict.fromkeys(names, _COUNT),
            "present?": {f"{name}?": _COUNT for name in names},
        },
        "baseline": {
            "prevalence": scores | {"source": _TEXT, "probabilities": dict.fromkeys(names, _SHARE)},
            "all_negative": scores,
        },
        "skill": scores,
        "intervals?": {"patients?": _COUNT, "metrics?": ("each", interval)},
        "calibration?": {
            "labels?": ("each", bins),
            "scaled?": dict.fromkeys(names, bins),
            "temperature?": _NUMBER,
            "scaled_log_loss?": _NUMBER,
        },
        "operating?": {"at_specificity?": ("each", dict.fromkeys(names, rates))},
        "aggregation?": {"rule": _TEXT},
        "smoothing?": {"kernel": _TEXT},
        "trivial_auroc_any?": _SHARE,
    }


def _wrong(form: Any, value: Any, place: str) -> str:
    """Return the first entry that does not have its form; "" without one."""
    if isinstance(form, str):
        is_right = _is(form, value)
        return "" if is_right else f"{place} is {_shortened(value)}; expected {form}"
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{place} is {_shortened(value)}; expected a list"
        return _first(_wrong(form[0], one, f"{place}[{n}]") for n, one in enumerate(value))
    if not isinstance(value, dict):
        where = place or "the file"
        return f"{where} is {_shortened(value)}; expected an object"
    start = f"{place}." if place else ""
    if isinstance(form, tuple):
        return _first(
            _wrong(form[1], one, start + name) or _wrong_bounds(name, one, start + name)
            for name, one in value.items()
        )
    found = []
    for key, part in form.items():
        name = key.removesuffix("?")
        if key.endswith("?") and value.get(name) is None:
            continue
        if name not in value:
            return f"{start}{name} is absent"
        found.append((part, value[name], start + name))
    return _first(_wrong(*one) for one in found)


def _wrong_bounds(name: str, value: Any, place: str) -> str:
    """Return what is wrong with an interval: half of it is absent, or no share where one is due."""
    if not isinstance(value, dict) or not {"low", "high"} <= set(value):
        return ""
    bounds = [value["low"], value["high"]]
    if (bounds[0] is None) != (bounds[1] is None):
        return f"{place} has one bound of two"
    if name.partition("/")[0] in _SHARES and not all(_is(_SHARE, bound) for bound in bounds):
        return f"{place} is {_shortened(bounds)}; expected bounds from 0 to 1"
    return ""


def _is(form: str, value: Any) -> bool:
    if form == _TEXT:
        return isinstance(value, str)
    if value is None:
        return form in (_NUMBER, _SHARE)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if form == _COUNT:
        return isinstance(value, int) and 0 <= value <= _MOST
    # Rounding may lead a little beyond.
    low, high = (-_MOST, _MOST) if form == _NUMBER else (-1e-9, 1 + 1e-9)
    return low <= value <= high


def _first(found: Any) -> str:
    return next((text for text in found if text), "")


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
