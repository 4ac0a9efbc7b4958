"""Which slices show no brain: air above the head, the holder alone, the neck."""

import numpy as np
import pandas as pd

from ich_keras.data.cache.shards import CachedSlices
from ich_keras.data.head_crop import pixels_mm
from ich_keras.progress import Progress

BRAIN_HU = (0, 100)  # brain and blood; muscle and skin, too
# `ich_keras.data.skull` asks for as much within bone.
LEAST_BRAIN_MM2 = 1000.0
_AT_A_TIME = 64


def brain_mm2(
    pixels: CachedSlices,
    series: pd.DataFrame,
    rows: np.ndarray,
    progress: Progress | None = None,
) -> np.ndarray:
    """Measure how much of slices has the density of brain.

    Args:
        pixels, series: of a cache.
        rows: int (n,), its slices.
        progress: called as progress("looking for brain", slices done, all slices).

    Returns:
        float64 (n,), mm2.
    """
    areas = np.array([one * other for one, other in pixels_mm(series, pixels.size)])
    pixel_mm2 = np.repeat(areas, series["num_slices"])[rows]
    low, high = BRAIN_HU
    counts = np.zeros(len(rows), np.int64)
    for start in range(0, len(rows), _AT_A_TIME):
        hu = pixels.slices_hu(rows[start : start + _AT_A_TIME])
        counts[start : start + _AT_A_TIME] = ((hu >= low) & (hu <= high)).sum(axis=(1, 2))
        if progress is not None:
            progress("looking for brain", min(start + _AT_A_TIME, len(rows)), len(rows))
    return counts * pixel_mm2
