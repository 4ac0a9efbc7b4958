"""The thesis's order of augmentation, on purpose: normalisation before brightness and contrast.

albumentations cuts floats to 0..1 when it changes brightness or contrast; on normalised values
that saturates blood. The library's own augmentation comes before normalisation and avoids this;
`in_thesis_order` is an augmentation that repeats the fault.
"""

import functools
from typing import Any

import numpy as np

from ich_keras.data import augment
from ich_keras.data.intensity import THESIS_NORMALISATION
from ich_keras.data.seeds import sample_seed


def in_thesis_order(windows: np.ndarray, seed: int) -> np.ndarray:
    """Change three windows as the thesis did: an augmentation for `view_batches`.

    The library's normalisation, which comes after, turns the result into what the thesis's network
    was given: the result holds the thesis's values with normalisation undone.

    Args:
        windows: float32 (rows, columns, 3), values 0..1.
        seed: of all draws.

    Returns:
        float32 of the same shape, values 0..1.
    """
    flips, moves = _pipelines()
    windows = flips(windows, seed)
    # Another stream than that of the flips, which began at `seed` itself.
    augment.seed_pipeline(moves, sample_seed(seed, 0, 0))
    windows = np.clip(moves(image=windows)["image"], 0.0, 1.0, dtype=np.float32)
    random = np.random.default_rng([seed, 3])
    if random.random() >= augment.BRIGHTNESS_PROBABILITY:
        return windows
    mean = np.asarray(THESIS_NORMALISATION.mean, np.float32)
    std = np.asarray(THESIS_NORMALISATION.std, np.float32)
    contrast = 1 + random.uniform(-augment.MAX_CONTRAST, augment.MAX_CONTRAST)
    brightness = random.uniform(-augment.MAX_BRIGHTNESS, augment.MAX_BRIGHTNESS)
    # What albumentations computes of floats, its cut to 0..1 included.
    changed = np.clip((windows - mean) / std * contrast + brightness, 0.0, 1.0)
    return (changed * std + mean).astype(np.float32)


@functools.cache
def _pipelines() -> tuple[augment.Change, Any]:
    """Return the flips and the movements, built once in each process."""
    flips = augment.make_augmentation("flip")
    import albumentations
    import cv2

    moves = albumentations.Compose(
        [
            albumentations.VerticalFlip(p=augment.FLIP_PROBABILITY),
            albumentations.Affine(
                translate_percent=(-augment.MAX_SHIFT, augment.MAX_SHIFT),
                scale=(1 - augment.MAX_SCALE, 1 + augment.MAX_SCALE),
                keep_ratio=True,
                rotate=(-augment.MAX_ROTATION_DEGREES, augment.MAX_ROTATION_DEGREES),
                interpolation=cv2.INTER_LINEAR,
                border_mode=cv2.BORDER_REFLECT_101,
                p=augment.AFFINE_PROBABILITY,
            ),
        ]
    )
    return flips, moves
