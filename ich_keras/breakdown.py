"""The scores of series, broken down by how, of whom and with what they were made.

Groups of ten series or more have an AUROC and a log loss; smaller ones are only counted. A group
says what happened on its series, not why: scanners, kernels and patients go together.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ich_keras.ct.traits import AGE_GROUPS, SEXES, plain_text
from ich_keras.labels import UNLABELLED, LabelSet
from ich_keras.levels import Level
from ich_keras.metrics.binary import binary_metrics, format_metric
from ich_keras.metrics.intervals import bootstrap
from ich_keras.phantom.dicom import BLEED_ML

MIN_SAMPLES = 10  # groups with fewer are counted, not scored
MOST_GROUPS = 20  # of one property; the smaller ones are one group
UNKNOWN, OTHERS = "unknown", "others"
MAX_NAME_CHARACTERS = 40
# Upper ends, mm and ml. The distance between slices and their thickness have the same bands.
MM_BANDS = {"up to 1.5 mm": 1.5, "1.5 to 3.5 mm": 3.5, "3.5 to 6 mm": 6.0, "above 6 mm": np.inf}
# 30 ml is a limit of the ICH score (Hemphill et al., Stroke 2001;32:891).
ML_BANDS = {"small, up to 5 ml": 5.0, "medium, 5 to 30 ml": 30.0, "large, above 30 ml": np.inf}
BLEED_SIZE = "bleed_size"
_AUROC = "auroc_"

Groups = dict[str, Any]  # of a property: name -> counts and scores


def broken_down(level: Level, series: pd.DataFrame) -> dict[str, Groups]:
    """Break the scores of series down.

    Args:
        level: of series.
        series: their rows of a series table, in the same order; of a table of an older version,
            what it lacks is unknown.

    Returns:
        JSON-able: property -> group -> "samples", "patients", "positive" (of the label that is
        shown), "auroc_<label>" and "log_loss" (None in groups of fewer than MIN_SAMPLES), and
        "auroc_<label>_interval": the 95 % interval, low and high (absent where there is none).
        Series without any label are left out. `BLEED_SIZE`, of phantoms only, groups the positive
        series. Its scores are of these and all negative ones ("negative"): positive ones alone have
        no AUROC.
    """
    is_known = (level.truth != UNLABELLED).any(axis=1)
    known, table = _part(level, is_known), series[is_known].reset_index(drop=True)
    scores = _Scores(known)
    found = {
        name: {group: scores.of(np.flatnonzero(values == group)) for group in _named(values)}
        for name, values in ((name, of(table)) for name, of in _PROPERTIES.items())
    }
    if BLEED_ML in table:
        found[BLEED_SIZE] = _by_bleed_size(scores, table)
    return found


class BreakdownRow(NamedTuple):
    """One group as tables show it, all as text."""

    title: str
    group: str
    samples: str
    patients: str
    positive: str
    auroc: str
    log_loss: str


def breakdown_rows(by: dict[str, Groups]) -> list[BreakdownRow]:
    """Lay out a breakdown, without what nothing is known of (`unknown_properties`)."""
    unknown = unknown_properties(by)
    return [
        row
        for name, groups in by.items()
        if _title(name) not in unknown
        for row in _rows(name, groups)
    ]


def unknown_properties(by: dict[str, Groups]) -> list[str]:
    """Return the titles of the properties that are known of no series."""
    return [_title(name) for name, groups in by.items() if set(groups) <= {UNKNOWN}]


def shown_label(by: dict[str, Groups]) -> str:
    """Return the label whose AUROC a breakdown has; "" of an empty one."""
    keys = (key for groups in by.values() for found in groups.values() for key in found)
    return next((key.removeprefix(_AUROC) for key in keys if key.startswith(_AUROC)), "")


def bleed_size_note(by: dict[str, Groups]) -> str:
    """Say what sizes of bleeds are compared with; "" where there are none."""
    groups = by.get(BLEED_SIZE)
    if not groups:
        return ""
    negative = next(iter(groups.values()))["negative"]
    return f"Sizes of bleeds are each scored against the {negative:,} series without a bleed."


def _title(name: str) -> str:
    return name.replace("_", " ")


def _rows(name: str, groups: Groups) -> Iterator[BreakdownRow]:
    for group, found in groups.items():
        key = next(key for key in found if key.startswith(_AUROC))
        auroc = format_metric(found[key], 3)
        low, high = found.get(f"{key}_interval") or (None, None)
        if low is not None and high is not None:
            auroc = f"{auroc} ({low:.3f}-{high:.3f})"
        yield BreakdownRow(
            _title(name),
            group,
            f"{found['samples']:,}",
            f"{found['patients']:,}",
            f"{found['positive']:,}",
            auroc,
            format_metric(found["log_loss"]),
        )


def _column(table: pd.DataFrame, name: str, absent: Any = "") -> pd.Series:
    return table[name] if name in table else pd.Series(absent, table.index)


def _banded(name: str, bands: dict[str, float]) -> Callable[[pd.DataFrame], np.ndarray]:
    def of(table: pd.DataFrame) -> np.ndarray:
        values = _column(table, name, np.nan).to_numpy(float)
        return _in_bands(np.abs(values), bands)

    return of


def _in_bands(values: np.ndarray, bands: dict[str, float]) -> np.ndarray:
    """Return the band of each value, which includes its upper end; UNKNOWN for 0 and NaN."""
    places = np.searchsorted(list(bands.values()), np.nan_to_num(values, nan=0.0))
    names = np.array(list(bands), object)[np.minimum(places, len(bands) - 1)]
    return np.where(values > 0, names, UNKNOWN)


def _text(name: str) -> Callable[[pd.DataFrame], np.ndarray]:
    def of(table: pd.DataFrame) -> np.ndarray:
        texts = [plain_text(str(text))[:MAX_NAME_CHARACTERS] for text in _column(table, name)]
        return np.array([text or UNKNOWN for text in texts], object)

    return of


def _kernel(table: pd.DataFrame) -> np.ndarray:
    first = [str(text).partition("\\")[0] for text in _column(table, "kernel")]
    return _text("kernel")(pd.DataFrame({"kernel": first}))


def _verdict(table: pd.DataFrame) -> np.ndarray:
    return np.array(table["verdict"], object)


_PROPERTIES: dict[str, Callable[[pd.DataFrame], np.ndarray]] = {
    "scanner": _text("scanner"),
    "kernel": _kernel,
    "slice_spacing": _banded("slice_spacing_mm", MM_BANDS),
    "slice_thickness": _banded("slice_thickness_mm", MM_BANDS),
    "age_group": _text("age_group"),
    "sex": _text("sex"),
    "contrast": _text("contrast"),
    "verdict": _verdict,
}
_ORDER = [*AGE_GROUPS, *SEXES, *MM_BANDS]


def _named(values: np.ndarray) -> list[str]:
    """Return the groups in order: bands by their limits, names by their count; unknown last.

    The smallest of too many become one group, in place.
    """
    names, counts = np.unique(values.astype(str), return_counts=True)
    order = sorted(
        (name for name in zip((-counts).tolist(), names.tolist(), strict=True)),
        key=lambda one: (_ORDER.index(one[1]) if one[1] in _ORDER else -1, *one),
    )
    found = [name for _, name in order if name != UNKNOWN]
    if len(found) > MOST_GROUPS:
        values[np.isin(values, found[MOST_GROUPS - 1 :])] = OTHERS
        found = [*found[: MOST_GROUPS - 1], OTHERS]
    return [*found, *([UNKNOWN] if UNKNOWN in names else [])]


def _part(level: Level, rows: np.ndarray) -> Level:
    return replace(
        level,
        truth=level.truth[rows],
        values=level.values[rows],
        patients=level.patients[rows],
        unsmoothed=None,
    )


class _Scores:
    """Scores parts of a level; equal parts once."""

    def __init__(self, level: Level) -> None:
        self.level = level
        self.shown = level.labels.shown
        truth = level.truth[:, level.labels.index(self.shown)]
        self.positive, self.negative = np.flatnonzero(truth == 1), np.flatnonzero(truth == 0)
        self._known: dict[bytes, dict[str, Any]] = {}

    def of(self, rows: np.ndarray) -> dict[str, Any]:
        """Return counts and scores of some rows."""
        return {**self.counts(rows), **self.scores(rows, len(rows))}

    def counts(self, rows: np.ndarray) -> dict[str, Any]:
        """Count samples, patients and positive samples."""
        return {
            "samples": len(rows),
            "patients": len(set(self.level.patients[rows])),
            "positive": int(np.isin(rows, self.positive).sum()),
        }

    def scores(self, rows: np.ndarray, count: int) -> dict[str, Any]:
        """Return AUROC and log loss of some rows; None where `count` is too small."""
        key = f"{_AUROC}{self.shown}"
        if count < MIN_SAMPLES:
            return {key: None, "log_loss": None}
        place = rows.tobytes()
        if place not in self._known:
            self._known[place] = self._scored(_part(self.level, rows), key)
        return self._known[place]

    def _scored(self, part: Level, key: str) -> dict[str, Any]:
        metrics = binary_metrics(part.truth, part.values, label_set=part.labels)
        found = {key: metrics["auroc"][self.shown], "log_loss": metrics["log_loss"]}
        if len(set(part.patients)) > 1:
            column = [part.labels.index(self.shown)]
            alone = part.truth[:, column], part.values[:, column]
            intervals = bootstrap(*alone, part.patients, label_set=LabelSet((self.shown,)))
            ends = intervals[f"auroc/{self.shown}"]
            found[f"{key}_interval"] = [ends["low"], ends["high"]]
        return found


def _by_bleed_size(scores: _Scores, table: pd.DataFrame) -> Groups:
    sizes = _in_bands(table[BLEED_ML].to_numpy(float), ML_BANDS)
    found = {}
    for group in (*ML_BANDS, UNKNOWN):
        rows = scores.positive[sizes[scores.positive] == group]
        if len(rows):
            both = np.sort(np.concatenate([rows, scores.negative]))
            found[group] = {
                **scores.counts(rows),
                "negative": len(scores.negative),
                **scores.scores(both, len(rows)),
            }
    return found
