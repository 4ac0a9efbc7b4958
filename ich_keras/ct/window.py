"""Windows: the band of Hounsfield units that is mapped to the grey scale 0 to 1."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Window:
    """A linear window, as DICOM's Window Center (0028,1050) and Window Width (0028,1051).

    Calling it maps HU to grey values: `level - width / 2` and below become 0,
    `level + width / 2` and above become 1.

    Args:
        level: centre of the band, HU.
        width: width of the band, HU; above 0.

    Raises:
        ValueError: level or width is not finite, or width is not above 0.

    Source:
        DICOM PS3.3 C.11.2.1.3.2 (LINEAR_EXACT), scaled to 0..1. The default function LINEAR is
        designed for 8-bit screens and shifts the band by half a unit; networks need the exact one.
    """

    level: float
    width: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.level) and math.isfinite(self.width)):
            raise ValueError(
                f"window level {self.level}, width {self.width}: expected finite numbers in HU"
            )
        if self.width <= 0:
            raise ValueError(f"window width {self.width} HU: expected more than 0")

    @property
    def low(self) -> float:
        """The highest HU that is mapped to 0."""
        return self.level - self.width / 2

    @property
    def high(self) -> float:
        """The lowest HU that is mapped to 1."""
        return self.level + self.width / 2

    def __call__(self, hu: Any) -> Any:
        """Map HU to grey values.

        It uses only operators and one `clip` method, so it works on NumPy arrays, JAX arrays and
        torch tensors, on any device. TensorFlow tensors have no `clip` method: window them as
        NumPy arrays, or use `keras.ops.clip`.

        Args:
            hu: any shape; int16 or float32 (wider types come back as float64 from NumPy), HU.

        Returns:
            float32 of the same shape and kind, 0 to 1.

        >>> Window(level=40, width=80)(np.array([-1000, 20, 3000], np.int16)).tolist()
        [0.0, 0.25, 1.0]
        """
        # float32 scalars: with Python floats NumPy would compute in float64, at half the speed.
        return ((hu - np.float32(self.low)) * np.float32(1 / self.width)).clip(0, 1)


# Level and width in HU, in the order of the stacked channels.
# Source: "2D vs 3D Convolutional Neural Networks in Hemorrhage Detection", University of
# Bucharest, 2021: three windows stacked like RGB; customary for reading head CT.
BRAIN = Window(level=40, width=80)
SUBDURAL = Window(level=80, width=200)
SOFT_TISSUE = Window(level=40, width=380)
WINDOWS = (BRAIN, SUBDURAL, SOFT_TISSUE)
# For bone beside blood: customary for reading the skull.
BONE = Window(level=600, width=2800)
# The input of the thesis's 3D networks: -1000 to 400 HU, from air to bone.
WIDE = Window(level=-300, width=1400)
# All that 12 bits hold, from air to metal.
CT_RANGE = Window(level=1024, width=4096)
