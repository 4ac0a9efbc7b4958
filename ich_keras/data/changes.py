"""Changes of Hounsfield units and windows that are drawn for training samples.

Each has a stream of its own, from the seed of its sample: one does not depend on another, nor on
the augmentation.

Worker processes import this module: it must not import keras.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ich_keras.data.draws import Draws
from ich_keras.data.views import AIR, View
from ich_keras.input_changes import InputChanges

# 1 is that of the volumes turned upside down.
_NOISE, _JITTER, _DROP = 2, 3, 4
_HU_LIMITS = (-(2**15), 2**15 - 1)


def kept_places(view: View, rows: np.ndarray, seeds: Sequence[int], share: float) -> np.ndarray:
    """Draw which slices of samples are missing, and say what stands in their place.

    Args:
        view: what a sample is.
        rows: int (n, slices), `AIR` where a sample has no slice.
        seeds: one for each sample.
        share: chance that a slice is missing.

    Returns:
        int64 (n, slices), the place in the sample whose slice stands in each place; `AIR` for air.
    """
    count = rows.shape[1]
    places = np.tile(np.arange(count), (len(rows), 1))
    for sample, seed in enumerate(seeds):
        dropped = np.asarray(np.random.default_rng([seed, _DROP]).random(count) < share)
        if view.has_middle:
            dropped[count // 2] = False
        elif dropped[rows[sample] != AIR].all():
            continue
        if view.has_middle and view.edge == "repeat":
            places[sample] = _repeated(dropped)
        else:
            places[sample, dropped] = AIR
    return places


def _repeated(dropped: np.ndarray) -> np.ndarray:
    """Return the place that stands in each one: of those that are left, the next to the middle."""
    middle = len(dropped) // 2
    places = np.arange(len(dropped))
    for step in range(1, middle + 1):
        for side in (-1, 1):
            if dropped[middle + side * step]:
                places[middle + side * step] = places[middle + side * (step - 1)]
    return places


def add_noise(hu: np.ndarray, rows: np.ndarray, seeds: Sequence[int], sigma: float) -> None:
    """Add normal noise to HU, in place; each slice of a sample gets its own.

    Args:
        hu: int16 (n, slices, rows, columns), HU; changed. Values stay within int16.
        rows: int (n, slices), `AIR` where a sample has no slice: air stays as it is.
        seeds: one for each sample.
        sigma: standard deviation, HU.
    """
    for sample, seed in enumerate(seeds):
        random = np.random.default_rng([seed, _NOISE])
        noise = random.standard_normal(hu.shape[1:], np.float32)
        noise *= np.float32(sigma)
        noise[rows[sample] == AIR] = 0
        noise += hu[sample]
        np.rint(noise, out=noise)
        hu[sample] = np.clip(noise, *_HU_LIMITS)


def with_jitter(draws: Draws, seeds: Sequence[int], changes: InputChanges) -> Draws:
    """Return draws with a level and a width of the windows for each sample."""
    amounts = np.array([np.random.default_rng([seed, _JITTER]).uniform(-1, 1, 2) for seed in seeds])
    return replace(
        draws,
        level=amounts[:, 0] * (changes.window_jitter or 0.0),
        width=1 + amounts[:, 1] * (changes.width_jitter or 0.0),
    )
