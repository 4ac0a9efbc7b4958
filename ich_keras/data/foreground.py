"""nnU-Net's normalisation of CT, measured on the heads of a training split.

Source:
    Isensee et al., nnU-Net (Nature Methods 2021), supplementary note on intensity normalisation:
    HU are cut off at the 0.5 and 99.5 percentiles of the foreground of the training cases, and
    shifted and scaled by its mean and standard deviation. There the foreground is what is
    annotated; here, without masks, it is all that is denser than `HEAD_ABOVE_HU`.
"""

import numpy as np

from ich_keras.ct.window import Window
from ich_keras.data.cache.shards import CachedSlices
from ich_keras.data.intensity import HEAD_ABOVE_HU, NNUNET, Intensity, Normalisation
from ich_keras.errors import DataError
from ich_keras.progress import Progress

PERCENTILES = (0.5, 99.5)
MOST_SLICES = 20_000  # of a split, evenly spaced
_LOWEST = -(2**15)
_AT_A_TIME = 64


def foreground_counts(
    pixels: CachedSlices, rows: np.ndarray, progress: Progress | None = None
) -> np.ndarray:
    """Count the HU of the foreground of slices.

    Args:
        pixels: of a cache.
        rows: int (n,), its slices; of more than `MOST_SLICES` as many, evenly spaced, are read.
        progress: called as progress("measuring HU", slices done, all slices).

    Returns:
        int64 (65536,), the number of pixels of each HU, from -32768 on; 0 up to `HEAD_ABOVE_HU`.
    """
    rows = np.sort(rows)
    count = min(len(rows), MOST_SLICES)
    rows = rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]
    counts = np.zeros(2**16, np.int64)
    for start in range(0, count, _AT_A_TIME):
        hu = pixels.slices_hu(rows[start : start + _AT_A_TIME])
        counts += np.bincount(hu.ravel().astype(np.int64) - _LOWEST, minlength=2**16)
        if progress is not None:
            progress("measuring HU", min(start + _AT_A_TIME, count), count)
    counts[: HEAD_ABOVE_HU - _LOWEST + 1] = 0
    return counts


def nnunet_intensity(counts: np.ndarray) -> Intensity:
    """Return the intensity of a foreground, one channel.

    Args:
        counts: as `foreground_counts` returns them.

    Raises:
        DataError: there is no foreground, or its HU do not differ.

    >>> counts = np.zeros(2**16, np.int64)
    >>> counts[[32768, 32768 + 100]] = 5  # 0 and 100 HU
    >>> found = nnunet_intensity(counts)
    >>> found.windows[0].low, found.windows[0].high, found.normalisation.mean
    (0.0, 100.0, (0.5,))
    """
    total = int(counts.sum())
    hu = np.arange(len(counts)) + _LOWEST
    if not total:
        raise DataError(
            f"the training split holds no pixel above {HEAD_ABOVE_HU} HU: nothing to measure.",
            "Look at the cache (`ich show`), or choose another --intensity.",
        )
    low, high = (_percentile(counts, share / 100) for share in PERCENTILES)
    mean = float(hu @ counts) / total
    std = float(np.sqrt(((hu - mean) ** 2) @ counts / total))
    if not high > low:
        raise DataError(
            f"{total:,} pixels of the training split above {HEAD_ABOVE_HU} HU are nearly all"
            f" {low:g} HU: there is no contrast to scale by.",
            "Look at the cache (`ich show`), or choose another --intensity.",
        )
    width = high - low
    normalisation = Normalisation("measured", ((mean - low) / width,), (std / width,))
    return Intensity(NNUNET, (Window((low + high) / 2, width),), normalisation)


def _percentile(counts: np.ndarray, share: float) -> float:
    """Return what `np.percentile` gives for the values that are counted, linearly interpolated."""
    place = share * (int(counts.sum()) - 1)
    below = int(np.floor(place))
    ends = counts.cumsum()
    one, other = (
        int(np.searchsorted(ends, at, side="right")) + _LOWEST for at in (below, below + 1)
    )
    return one + (place - below) * (min(other, 2**15 - 1) - one)
