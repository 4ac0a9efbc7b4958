"""The worst misses and false alarms of a run, as small pictures in the brain window."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import pandas as pd

from ich_keras.ct.window import BRAIN
from ich_keras.data.cache.cache import CTCache
from ich_keras.errors import StaleError
from ich_keras.labels import UNLABELLED
from ich_keras.metrics.binary import THRESHOLD
from ich_keras.pages.content import Part, Picture, Pictures, Text
from ich_keras.pages.pictures import grey, picture_uri
from ich_keras.run_pages.numbers import form_of, shown_labels
from ich_keras.run_pages.scores import LevelScores
from ich_keras.run_pages.tables import POINT

SIDE = 160  # pixels
MOST_SHOWN, MOST_OTHERS = 8, 4  # pictures of a kind: of the label that stands for all, of others
_LEAST_HEAT = 0.15
_STRONGEST = 0.55

# Answers, for rows of a cache's slice table (n,) and a label, where the network looked:
# float32 (n, rows, columns), 0 to 1, of the same part of each slice; None where it cannot say.
HeatMaps = Callable[[np.ndarray, str], np.ndarray | None]

PRIVATE = (
    "At most one slice of each series. The pictures are slices of the data themselves: whoever gets"
    " this page gets them, too. They carry no name; a row is a line of the test predictions."
)
HEAT = (
    "Colours show what speaks for the label in the network's answer, each picture on a scale of its"
    " own; where there is none, nothing does. They show neither that the answer is right, nor where"
    " blood ends."
)


@dataclass(frozen=True, eq=False)
class _Mistake:
    """One picture: a row of the scores, and the slice that stands for it."""

    row: int
    slice_row: int


def mistake_parts(
    metrics: dict,
    scores: LevelScores,
    level: str,
    cache: CTCache,
    heat_maps: HeatMaps | None = None,
) -> list[Part]:
    """Show the worst mistakes of each label: at most one of each series.

    A miss is a positive below the threshold of decisions (or .5 without one), a false alarm a
    negative at or above it.

    Args:
        metrics, scores: of the level.
        level: "slice" or "series"; for a series, a slice that has the label stands for it, or the
            middle one.
        cache: that of the training.
        heat_maps: draws where the network looked, if given.

    Raises:
        StaleError: the cache lacks slices or series of the predictions.
    """
    rows_of = pd.Series(np.arange(len(cache)), index=cache.slices["sop_instance_uid"])
    _require_rows(scores, level, cache)
    parts: list[Part] = [Text(PRIVATE if heat_maps is None else f"{PRIVATE} {HEAT}")]
    names = shown_labels(scores.labels, metrics["n"]["positive"])
    # As in the table of decisions.
    form = form_of([_limit(metrics, label) for label in scores.labels.names])
    for label in sorted(names, key=lambda name: name != scores.labels.shown):
        limit = _limit(metrics, label)
        for is_miss in (True, False):
            most = MOST_SHOWN if label == scores.labels.shown else MOST_OTHERS
            chosen = worst(scores, label, limit, is_miss)
            found = _located(scores, level, chosen, label, cache, rows_of, most)
            if not found:
                continue
            pictures = _pictures(found, scores, label, level, cache, heat_maps)
            what = "worst misses" if is_miss else "worst false alarms"
            title = f"{label}: {what} ({len(chosen):,} at the threshold {limit:{form}})"
            parts.append(Pictures(title, pictures))
    if len(parts) == 1:
        return [Text("There is no miss and no false alarm at the thresholds.")]
    return parts


def _require_rows(scores: LevelScores, level: str, cache: CTCache) -> None:
    table, name = (
        (cache.slices, "sop_instance_uid") if level == "slice" else (cache.series, "series_uid")
    )
    absent = pd.Index(scores.names).difference(pd.Index(table[name]))
    if len(absent):
        raise StaleError(
            f"{len(absent):,} of {len(scores.names):,} predictions per {level} are not of the cache"
            f" {cache.path}; the first is {absent[0]}.",
            "Give the cache that the run was trained on.",
        )


def _limit(metrics: dict, label: str) -> float:
    points = (metrics.get("operating") or {}).get("at_specificity") or {}
    found = points.get(POINT, {}).get(label, {}).get("threshold")
    return THRESHOLD if found is None else found


def worst(scores: LevelScores, label: str, limit: float, is_miss: bool) -> np.ndarray:
    """Return the rows of misses or false alarms, the worst first.

    Args:
        scores: of slices or series.
        label: which one.
        limit: the threshold.
        is_miss: positives below it; otherwise negatives at or above it.
    """
    column = scores.labels.index(label)
    truth, values = scores.truth[:, column], scores.values[:, column]
    if is_miss:
        rows = np.flatnonzero((truth == 1) & (values < limit))
        return rows[np.argsort(values[rows], kind="stable")]
    rows = np.flatnonzero((truth == 0) & (values >= limit))
    return rows[np.argsort(-values[rows], kind="stable")]


def _located(
    scores: LevelScores,
    level: str,
    chosen: np.ndarray,
    label: str,
    cache: CTCache,
    rows_of: pd.Series,
    most: int,
) -> list[_Mistake]:
    """Find the slices of the first mistakes, one of each series."""
    found: list[_Mistake] = []
    seen: set[str] = set()
    for row in chosen.tolist():
        if len(found) == most:
            break
        series = str(scores.series[row])
        if series in seen:
            continue
        seen.add(series)
        if level == "slice":
            found.append(_Mistake(row, int(rows_of[scores.names[row]])))
        else:
            found.append(_Mistake(row, _standing_for(cache, series, label)))
    return found


def _standing_for(cache: CTCache, series: str, label: str) -> int:
    """Return the slice of a series that stands for it: the middle one of those with the label."""
    rows = np.array(cache.series_rows(series))
    is_of_slices = cache.labelling is not None and cache.labelling.level == "slice"
    if is_of_slices and label in cache.slices:
        positive = rows[cache.slices[label].to_numpy()[rows] == 1]
        rows = positive if len(positive) else rows
    return int(rows[len(rows) // 2])


def _pictures(
    found: list[_Mistake],
    scores: LevelScores,
    label: str,
    level: str,
    cache: CTCache,
    heat_maps: HeatMaps | None,
) -> list[Picture]:
    rows = np.array([mistake.slice_row for mistake in found])
    greys = [grey(BRAIN(hu), SIDE) for hu in cache.slices_hu(rows)]
    heats = None if heat_maps is None else heat_maps(rows, label)
    column = scores.labels.index(label)
    of = "" if level == "slice" else " of the series"
    pictures = []
    for number, mistake in enumerate(found):
        place = cache.slices.iloc[mistake.slice_row]
        length = len(cache.series_rows(place["series_uid"]))
        value = scores.values[mistake.row, column]
        where = f"slice {place['slice_index'] + 1} of {length}"
        true = _true_labels(scores, mistake.row)
        # The header is line 1.
        text = f"{value:.3f} · {where} · row {mistake.row + 2}"
        image = greys[number] if heats is None else heated(greys[number], heats[number])
        alt = f"Brain window, {where}{of}; answered {label} {value:.3f}; truly {true}."
        pictures.append(Picture(picture_uri(image), alt, f"{text} · truly {true}"))
    return pictures


def _true_labels(scores: LevelScores, row: int) -> str:
    labels, truth = scores.labels, scores.truth[row]
    names = [
        name
        for name, value in zip(labels.names, truth.tolist(), strict=True)
        if value == 1 and name != labels.any_label
    ]
    if names:
        return ", ".join(names)
    if labels.any_label is not None and truth[labels.index(labels.any_label)] == 1:
        return labels.any_label
    return "unknown" if (truth == UNLABELLED).all() else "none"


def heated(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lay a heat map over a picture.

    Args:
        picture: uint8 (rows, columns).
        heat: float32 (any rows, any columns), 0 to 1, of the same part of the slice.

    Returns:
        uint8 (rows, columns, 3); where the heat is low the picture stays grey.
    """
    rows, columns = picture.shape
    heat = np.clip(cv2.resize(np.asarray(heat, np.float32), (columns, rows)), 0, 1)
    coloured = cv2.applyColorMap(np.rint(heat * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    share = np.clip((heat - _LEAST_HEAT) / (1 - _LEAST_HEAT), 0, 1)[..., np.newaxis] * _STRONGEST
    mixed = picture[..., np.newaxis] * (1 - share) + coloured[..., ::-1] * share
    return np.rint(mixed).astype(np.uint8)
