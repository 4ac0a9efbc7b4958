"""Random changes of training slices: albumentations behind one small function.

Every draw is a pure function of (seed, epoch, index): batches do not depend on the number of
worker processes, and a resumed training sees what an uninterrupted one would have seen.
(albumentations by itself gives every worker the same random stream.)
"""

import os

import numpy as np

from ich_keras.errors import UsageError

AUGMENTATIONS = ("thesis", "flip")
# Ranges of the thesis (albumentations' defaults of 2021).
FLIP_PROBABILITY = 0.5
AFFINE_PROBABILITY = 0.5
MAX_SHIFT = 0.0625  # of the side
MAX_SCALE = 0.1
MAX_ROTATION_DEGREES = 45
BRIGHTNESS_PROBABILITY = 0.5
MAX_BRIGHTNESS = 0.2
MAX_CONTRAST = 0.2
REVERSE_PROBABILITY = 0.5  # not the thesis's: upside down along the slices


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Return the random seed of one sample in one epoch, 32 bits."""
    return int(np.random.SeedSequence([seed, epoch, index]).generate_state(1)[0])


def seed_pipeline(pipeline, seed: int) -> None:
    """Give each step of an albumentations pipeline a random stream of its own.

    The pipeline's `set_random_seed` gives the same seed to all of them: they would be applied
    together or not at all, and by amounts that hang together.
    """
    for number, step in enumerate(pipeline.transforms):
        step.set_random_seed(sample_seed(seed, 0, number) if number else seed)


def require_augmentation(name: str | None) -> None:
    """Refuse a name that is no augmentation's; None is none at all.

    Raises:
        UsageError: unknown name.
    """
    if name is not None and name not in AUGMENTATIONS:
        raise UsageError(f"augmentation {name!r}; expected one of {', '.join(AUGMENTATIONS)}.")


def make_augmentation(name: str = "thesis"):
    """Build an augmentation by name.

    Args:
        name: "thesis": flips left-right and up-down, shift-scale-rotate, brightness and contrast;
            "flip": left-right flips only, for trainings of a few hundred steps.

    Returns:
        A function `augment(windows, seed) -> windows` on float32 (rows, columns, channels), or
        (slices, rows, columns, channels), whose slices are all changed alike; values in 0..1. The
        result has the same shape and range. It refuses other values, because albumentations
        silently clips HU to [0, 1].

    Source:
        The thesis's section on augmentation; `Affine` with the ranges of its
        `ShiftScaleRotate(0.0625, 0.1, 45)`, borders reflected.

    Raises:
        UsageError: unknown name.
    """
    require_augmentation(name)
    # Otherwise albumentations asks a server for news on import.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations
    import cv2

    steps = [albumentations.HorizontalFlip(p=FLIP_PROBABILITY)]
    if name == "thesis":
        steps += [
            albumentations.VerticalFlip(p=FLIP_PROBABILITY),
            albumentations.Affine(
                translate_percent=(-MAX_SHIFT, MAX_SHIFT),
                scale=(1 - MAX_SCALE, 1 + MAX_SCALE),
                keep_ratio=True,
                rotate=(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES),
                interpolation=cv2.INTER_LINEAR,
                border_mode=cv2.BORDER_REFLECT_101,
                p=AFFINE_PROBABILITY,
            ),
            albumentations.RandomBrightnessContrast(
                brightness_limit=MAX_BRIGHTNESS,
                contrast_limit=MAX_CONTRAST,
                p=BRIGHTNESS_PROBABILITY,
            ),
        ]
    pipeline = albumentations.Compose(steps)

    def change(image: np.ndarray, seed: int) -> np.ndarray:
        seed_pipeline(pipeline, seed)
        return np.clip(pipeline(image=image)["image"], 0.0, 1.0, dtype=np.float32)

    def augment(windows: np.ndarray, seed: int) -> np.ndarray:
        if windows.dtype != np.float32 or windows.min() < 0 or windows.max() > 1:
            raise ValueError(
                f"augmentation received {windows.dtype} values from {windows.min()} to"
                f" {windows.max()}; expected windows, float32 in 0..1."
            )
        if windows.ndim == 3:
            return change(windows, seed)
        # Slice by slice with the same draws. As channels of one image they are slower, and too
        # many: OpenCV 5 takes 128 at most, 60 slices of three windows are 180.
        return np.stack([change(image, seed) for image in windows])

    return augment
