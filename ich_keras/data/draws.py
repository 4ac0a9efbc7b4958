"""The draws of an augmentation: what albumentations draws from the same seeds, without it.

A draw costs a few microseconds, where albumentations takes longer for its bookkeeping than for the
pixels. What is drawn is applied to Hounsfield units by `ich_keras.data.drawn_inputs`.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ich_keras.data.augment import (
    AFFINE_PROBABILITY,
    BRIGHTNESS_PROBABILITY,
    FLIP_PROBABILITY,
    MAX_BRIGHTNESS,
    MAX_CONTRAST,
    MAX_ROTATION_DEGREES,
    MAX_SCALE,
    MAX_SHIFT,
    REVERSE_PROBABILITY,
)
from ich_keras.data.seeds import step_seeds

IDENTITY = np.eye(3)[:2]


@dataclass(frozen=True)
class Draws:
    """What is drawn for n samples; all slices of a sample get the same.

    Args:
        flips: bool (n, 2), left to right and upside down, before anything else.
        is_moved: bool (n,), whether the matrix is used.
        matrices: float64 (n, 2, 3), from (x, y, 1) of a pixel to its (x, y) after shift, scale and
            rotation, in pixels.
        contrast: float64 (n,), factor of the windows, before brightness.
        brightness: float64 (n,), added to the windows.
        is_reversed: bool (n,), whether the slices of a volume change their order.
        level: float64 (n,), HU by which the level of every window is moved.
        width: float64 (n,), factor of the width of every window.
    """

    flips: np.ndarray
    is_moved: np.ndarray
    matrices: np.ndarray
    contrast: np.ndarray
    brightness: np.ndarray
    is_reversed: np.ndarray
    level: np.ndarray
    width: np.ndarray

    def __len__(self) -> int:
        return len(self.is_moved)

    @property
    def has_jitter(self) -> bool:
        """Whether the windows of any sample are changed."""
        return bool(self.level.any() or (self.width != 1).any())


def no_draws(count: int) -> Draws:
    """Return the draws that change nothing.

    >>> bool(no_draws(3).flips.any())
    False
    """
    return Draws(
        flips=np.zeros((count, 2), bool),
        is_moved=np.zeros(count, bool),
        matrices=np.tile(IDENTITY, (count, 1, 1)),
        contrast=np.ones(count),
        brightness=np.zeros(count),
        is_reversed=np.zeros(count, bool),
        level=np.zeros(count),
        width=np.ones(count),
    )


def draw(
    seeds: Sequence[int],
    side: int,
    flips_only: bool = False,
    may_reverse: bool = False,
    changes_grey: bool = True,
) -> Draws:
    """Draw the thesis's augmentation.

    Args:
        seeds: one for each sample, as `ich_keras.data.seeds.sample_seeds` gives them.
        side: rows and columns of a slice, pixels.
        flips_only: left-right flips, and nothing else.
        may_reverse: turn every second volume upside down along its slices.
        changes_grey: change contrast and brightness, too; not where the input is HU.

    Returns:
        The draws of `len(seeds)` samples, equal to those of albumentations 2 from these seeds.

    >>> draws = draw([3, 4], side=256)
    >>> draws.matrices.shape, bool((draws.contrast >= 0.8).all())
    ((2, 2, 3), True)
    """
    seeds = list(seeds)
    draws = no_draws(len(seeds))
    stream = random.Random()  # one, seeded again and again: making one takes as long
    draws.flips[:, 0] = _coins(stream, seeds, FLIP_PROBABILITY)
    if not flips_only:
        for_flips, for_moves, for_light = step_seeds(seeds, (1, 2, 3))
        draws.flips[:, 1] = _coins(stream, for_flips, FLIP_PROBABILITY)
        moved: list[int] = []
        matrices: list[float] = []
        for number, seed in enumerate(for_moves):
            stream.seed(seed)
            if stream.random() < AFFINE_PROBABILITY:
                moved.append(number)
                matrices += _draw_matrix(stream, side)
        changed: list[int] = []
        contrast: list[float] = []
        brightness: list[float] = []
        for number, seed in enumerate(for_light if changes_grey else ()):
            stream.seed(seed)
            if stream.random() < BRIGHTNESS_PROBABILITY:
                changed.append(number)
                contrast.append(1 + stream.uniform(-MAX_CONTRAST, MAX_CONTRAST))
                brightness.append(stream.uniform(-MAX_BRIGHTNESS, MAX_BRIGHTNESS))
        # Once for all samples: filling an array one number at a time takes as long as drawing it.
        draws.is_moved[moved] = True
        draws.matrices[moved] = np.array(matrices, np.float64).reshape(-1, 2, 3)
        draws.contrast[changed] = contrast
        draws.brightness[changed] = brightness
    if may_reverse:
        # A stream of its own, so that the other changes do not depend on this one.
        drawn = [np.random.default_rng([seed, 1]).random() for seed in seeds]
        draws.is_reversed[:] = np.array(drawn) < REVERSE_PROBABILITY
    return draws


def _coins(stream: random.Random, seeds: Sequence[int], probability: float) -> list[bool]:
    coins = []
    for seed in seeds:
        stream.seed(seed)
        coins.append(stream.random() < probability)
    return coins


def _draw_matrix(stream: random.Random, side: int) -> tuple[float, ...]:
    """Draw shift, scale and rotation in the order of albumentations' `Affine`: two rows."""
    shift = [int(stream.uniform(-MAX_SHIFT, MAX_SHIFT) * side) for _ in "xy"]
    for _ in "xy":
        stream.random()  # shear, whose range is empty
    scale, _ = (stream.uniform(1 - MAX_SCALE, 1 + MAX_SCALE) for _ in "xy")  # x counts for both
    angle = math.radians(stream.uniform(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES))
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    middle = side / 2 - 0.5
    x = middle + shift[0] - (cos + sin) * middle
    y = middle + shift[1] - (cos - sin) * middle
    return cos, sin, x, -sin, cos, y
