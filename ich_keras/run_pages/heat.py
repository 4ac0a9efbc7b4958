"""Heat maps for the pictures of report.html: where the network looked."""

import cv2
import numpy as np

from ich_keras.data.batches import CTDataset
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.views import Samples
from ich_keras.explanation import explain
from ich_keras.inference import load_run
from ich_keras.relevance import require_torch
from ich_keras.run_folder import RunFolder
from ich_keras.run_pages.thumbnails import HeatMaps

METHOD = "hirescam"
_AT_A_TIME = 8
_HEAD_HU = -500  # what is denser is head, or its holder; a map beside it means nothing


def heat_maps_of(run: RunFolder, cache: CTCache, device: str | None = None) -> HeatMaps:
    """Return what draws where a run's network looked, for the slices of a cache.

    Args:
        run: finished, or with weights.
        cache: that of the training.
        device: as in `load_run`.

    Raises:
        UsageError: the backend is not torch.
        StaleError, DataError: as `load_run`.
    """
    require_torch()
    recipe, model = load_run(run, device, precision="float32", unfinished=True)
    inputs, view = recipe.inputs, recipe.inputs.view
    samples = recipe.inputs.samples(cache)
    step = 1 if view.kind == "series" else _AT_A_TIME
    dataset = CTDataset(cache.pixels, samples, inputs.size, intensity=inputs.intensity)

    def maps(rows: np.ndarray, label: str) -> np.ndarray:
        found = np.zeros((len(rows), inputs.size, inputs.size), np.float32)
        numbers = _samples_of(cache, view.kind, rows)
        for start in range(0, len(rows), step):
            part = numbers[start : start + step]
            batch = np.array(dataset[0, part][0])  # a copy: its memory is used again
            for place, one in enumerate(explain((recipe, model), batch, label, METHOD)[label]):
                row = int(rows[start + place])
                is_flat = one.ndim == 2
                one = one if is_flat else _slice_of(samples, int(part[place]), row, one)
                found[start + place] = one
        boxes = None if samples.boxes is None else samples.boxes[numbers]
        return _within_heads(found, cache.slices_hu(rows), boxes)

    return maps


def _samples_of(cache: CTCache, kind: str, rows: np.ndarray) -> np.ndarray:
    """Return the sample that shows each slice."""
    if kind != "series":
        return np.asarray(rows)
    ends = cache.series["num_slices"].cumsum().to_numpy()
    return np.searchsorted(ends, rows, side="right")


def _slice_of(samples: Samples, number: int, row: int, maps: np.ndarray) -> np.ndarray:
    """Return the map of one slice of a volume; of a long series, of the nearest that was seen."""
    there = samples.rows[number]
    if samples.view.kind == "slab":
        return maps[len(maps) // 2]
    distance = np.where(there >= 0, np.abs(there - row), np.iinfo(np.int64).max)
    return maps[int(distance.argmin())]


def _within_heads(maps: np.ndarray, hu: np.ndarray, boxes: np.ndarray | None) -> np.ndarray:
    """Scale each map to 0..1, its highest value, and take away what lies in air."""
    side = hu.shape[-1]
    found = np.stack([cv2.resize(one, (side, side)) for one in maps])
    if boxes is not None:
        found = np.stack([_put_back(one, box) for one, box in zip(found, boxes, strict=True)])
    found = np.where(hu > _HEAD_HU, np.maximum(found, 0), 0)
    highest = found.max(axis=(1, 2), keepdims=True)
    return (found / np.where(highest > 0, highest, 1)).astype(np.float32)


def _put_back(one: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Put the map of a square that was cut out (`Samples.boxes`) back into the whole slice."""
    top, left, side = box.tolist()
    if side == 0:
        return one
    size = len(one)
    small = cv2.resize(one, (side, side), interpolation=cv2.INTER_AREA)
    whole = np.zeros_like(one)
    rows, columns = (slice(max(at, 0), min(at + side, size)) for at in (top, left))
    inside = small[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    whole[rows, columns] = inside
    return whole
