"""The thesis's order of augmentation, on purpose: normalisation before brightness and contrast.

albumentations cuts floats to 0..1 when it changes brightness or contrast; on normalised values that
saturates blood. The library normalises last and cannot do otherwise; this stands in for its
augmentation for the length of one training.
"""

import contextlib
from collections.abc import Iterator

import numpy as np

from ich_keras.data import augment, batches
from ich_keras.data.inputs import THESIS_NORMALISATION


@contextlib.contextmanager
def thesis_order() -> Iterator[None]:
    """Normalise three windows before brightness and contrast, for the length of a block.

    For trainings in this process: `loader_workers` must be 0.
    """
    original = batches.make_augmentation
    batches.make_augmentation = lambda name: make_thesis_order()
    try:
        yield
    finally:
        batches.make_augmentation = original


def make_thesis_order():
    """Return `change(windows, seed) -> windows` on float32 (rows, columns, 3), values 0..1.

    The result is such that the library's own normalisation, which comes after, gives what the
    thesis's network was given: its values are those of the thesis, normalisation undone.
    """
    geometric = augment.make_augmentation("flip")
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
    mean = np.asarray(THESIS_NORMALISATION.mean, np.float32)
    std = np.asarray(THESIS_NORMALISATION.std, np.float32)

    def change(windows: np.ndarray, seed: int) -> np.ndarray:
        windows = geometric(windows, seed)
        # Another stream than the first flip's, which began at `seed` itself.
        augment.seed_pipeline(moves, augment.sample_seed(seed, 0, 0))
        windows = np.clip(moves(image=windows)["image"], 0.0, 1.0, dtype=np.float32)
        random = np.random.default_rng([seed, 3])
        if random.random() >= augment.BRIGHTNESS_PROBABILITY:
            return windows
        contrast = 1 + random.uniform(-augment.MAX_CONTRAST, augment.MAX_CONTRAST)
        brightness = random.uniform(-augment.MAX_BRIGHTNESS, augment.MAX_BRIGHTNESS)
        # What albumentations computes of floats, its cut to 0..1 included.
        changed = np.clip((windows - mean) / std * contrast + brightness, 0.0, 1.0)
        return (changed * std + mean).astype(np.float32)

    return change
