"""Learnable windows, described by their numbers: how a network that takes HU begins.

Keras is not imported: `ich_keras.models.window_layers` makes the layers.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ich_keras.errors import DataError, UsageError
from ich_keras.models.options import require_choice

# The layer that holds the windows, and those around it.
WINDOWS = "windows"
SCALE, CLIP, GAIN, SIGMOID, NORMALISED = (
    f"{WINDOWS}_{part}" for part in ("scale", "clip", "gain", "sigmoid", "norm")
)
WINDOW_LAYERS = (SCALE, WINDOWS, CLIP, GAIN, SIGMOID, NORMALISED)
MAX_WINDOWS = 64


@dataclass(frozen=True)
class LearnedWindows:
    """Windows that are trained with the network behind them.

    Each is u = kernel * x + bias, with x = (HU - zero_hu) / unit_hu: 0 at the window's lower end, 1
    at its upper one. "linear" cuts u off at 0 and 1. "sigmoid" is 1 / (1 + exp(-gain (u - 1/2))).
    Both have the same kernel and bias, and so take the same steps: a step of 0.001 in the bias
    moves the level by a thousandth of the width (0.08 HU for the brain window), and one in the
    kernel changes the width by 0.001 width^2 / unit_hu (0.05, 0.3 and 1.1 HU for widths of 80, 200
    and 380 HU).

    Args:
        kind: "linear" or "sigmoid".
        start: level and width of each window before training, HU.
        mean, std: of each window's output, 0..1: it is shifted and scaled by them for the network
            behind.
        zero_hu: the middle of the scale. At a brain's HU a change of the kernel hardly moves the
            level.
        unit_hu: the unit of the scale; a power of two divides without rounding.
        edge: what a sigmoid window gives at its lower end; 1 minus it at the upper one.

    Raises:
        UsageError: an unknown kind, or numbers that cannot be used.

    Source:
        Lee et al., Practical Window Setting Optimization for Medical Image Deep Learning (2018),
        arXiv:1812.00572: a 1x1 convolution and a bounded ReLU or a sigmoid. `edge` is their
        smoothness over their upper bound, 1 of 255 in their code.

    >>> round(LearnedWindows("sigmoid").gain, 3)  # 2 log(255 / 1 - 1)
    11.075
    """

    kind: str
    # The windows of `ich_keras.ct.window` and the normalisation of `ich_keras.data.intensity`; a
    # test compares them. They are repeated because models knows no other room.
    start: tuple[tuple[float, float], ...] = ((40.0, 80.0), (80.0, 200.0), (40.0, 380.0))
    mean: tuple[float, ...] = (0.1738, 0.1433, 0.1970)
    std: tuple[float, ...] = (0.3161, 0.2850, 0.3111)
    zero_hu: float = 40.0
    unit_hu: float = 128.0
    edge: float = 1 / 255

    def __post_init__(self) -> None:
        require_choice("windows", self.kind)
        try:
            numbers = [*sum(self.start, ()), *self.mean, *self.std, self.zero_hu, self.unit_hu]
            is_sound = (
                1 <= len(self.start) <= MAX_WINDOWS
                and all(len(window) == 2 and window[1] > 0 for window in self.start)
                and len(self.mean) == len(self.std) == len(self.start)
                and all(math.isfinite(number) for number in numbers)
                and min(self.std) > 0
                and self.unit_hu > 0
                and 0 < self.edge < 0.5
            )
        except TypeError:
            is_sound = False
        if not is_sound:
            raise UsageError(
                f"learnable windows {self}; expected a level and a width above 0 for each window,"
                " as many means and deviations, a unit above 0, and an edge between 0 and 0.5."
            )

    @property
    def gain(self) -> float:
        """The factor of a sigmoid's argument."""
        return 2 * math.log(1 / self.edge - 1)

    @property
    def kernel(self) -> tuple[float, ...]:
        """The kernel before training, a number per window."""
        return tuple(self.unit_hu / width for _, width in self.start)

    @property
    def bias(self) -> tuple[float, ...]:
        """The bias before training, a number per window."""
        return tuple((self.zero_hu - level) / width + 0.5 for level, width in self.start)

    @classmethod
    def of(cls, given: Any) -> "LearnedWindows":
        """Return windows from their kind, or from JSON, whose lists become tuples.

        Raises:
            UsageError: neither, or unknown entries or values.

        >>> LearnedWindows.of("linear").start[0]
        (40.0, 80.0)
        """
        if isinstance(given, cls):
            return given
        if not isinstance(given, dict):
            return cls(given)
        known = {field.name for field in fields(cls)}
        if "kind" not in given or not set(given) <= known:
            raise UsageError(f"windows {given!r}; expected a kind and any of {sorted(known)}.")
        return cls(**{name: _tuples(value) for name, value in given.items()})


def in_hu(
    kernel: np.ndarray, bias: np.ndarray, zero_hu: float, unit_hu: float
) -> tuple[tuple[float, float], ...]:
    """Turn the weights of windows into (level, width) of each, HU.

    Args:
        kernel: (..., windows).
        bias: (windows,).
        zero_hu, unit_hu: see `LearnedWindows`.

    Raises:
        DataError: naming the first window that is not finite, or whose width is not above 0.

    >>> in_hu(np.array([[1.6, 0.64]]), np.array([0.5, 0.3]), 40, 128)
    ((40.0, 80.0), (80.0, 200.0))
    """
    found = []
    slopes = np.asarray(kernel, np.float64).ravel() / unit_hu
    for number, (slope, shift) in enumerate(zip(slopes, np.asarray(bias, np.float64), strict=True)):
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            width = 1 / slope
            level = zero_hu + (0.5 - shift) * width
        if not (np.isfinite(level) and np.isfinite(width) and width > 0):
            raise DataError(
                f"learnable window {number + 1} of {len(slopes)} has become unusable: level"
                f" {level:.6g}, width {width:.6g} HU; expected finite numbers and a width above 0."
            )
        # What float32 weights can tell.
        found.append((float(f"{level:.7g}"), float(f"{width:.7g}")))
    return tuple(found)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value
