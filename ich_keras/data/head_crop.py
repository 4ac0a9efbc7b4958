"""Where the head of a series lies: the square that is cut out of all its slices.

Worker processes import this module: it must not import keras.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ich_keras.ct.head import HEAD_ABOVE_HU, head_mask
from ich_keras.errors import UsageError

CROPS = ("head",)
NO_BOX = (0, 0, 0)
_AT_A_TIME = 64


@dataclass(frozen=True)
class HeadCrop:
    """How the head is cut out, by value.

    Args:
        above_hu: what is denser is tissue; the largest piece of it in a slice, once what is thinner
            than a head holder is gone, is head (`ich_keras.ct.head`).
        margin: of the square, on each side, as a share of the head's larger extent.

    Raises:
        UsageError: a value that this version does not cut by, or out of range.
    """

    above_hu: float = HEAD_ABOVE_HU
    margin: float = 0.05

    def __post_init__(self) -> None:
        if self.above_hu != HEAD_ABOVE_HU:
            raise UsageError(
                f"a crop of the head above {self.above_hu} HU; this version knows"
                f" {HEAD_ABOVE_HU} HU."
            )
        if not 0 <= self.margin <= 1:
            raise UsageError(f"a crop of the head with margin {self.margin}; expected 0 to 1.")

    def box(self, hu: np.ndarray, pixel_mm: tuple[float, float]) -> tuple[int, int, int]:
        """Find the square around the head in all slices of a series.

        Args:
            hu: int16 (slices, size, size), HU.
            pixel_mm: distance between rows, and between columns.

        Returns:
            Top, left and side, pixels; it may reach beyond the slice. `NO_BOX`, which cuts nothing,
            where there is no head, or where the square is as large as the slice.
        """
        rows, columns = np.zeros((2, hu.shape[-1]), bool)
        for start in range(0, len(hu), _AT_A_TIME):
            head = head_mask(hu[start : start + _AT_A_TIME], *pixel_mm)
            rows |= head.any(axis=(0, 2))
            columns |= head.any(axis=(0, 1))
        if not rows.any():
            return NO_BOX
        ends = [(np.flatnonzero(line)[0], np.flatnonzero(line)[-1] + 1) for line in (rows, columns)]
        extent = max(int(last - first) for first, last in ends)
        side = int(np.ceil(extent * (1 + 2 * self.margin)))
        if side >= hu.shape[-1]:
            return NO_BOX
        top, left = (int(np.floor((first + last - side) / 2)) for first, last in ends)
        return top, left, side


def pixels_mm(series: pd.DataFrame, size: int) -> list[tuple[float, float]]:
    """Return the distance between rows, and between columns, of resized slices, for each series.

    Args:
        series: with rows, columns, row_spacing_mm and column_spacing_mm.
        size: of a resized slice, pixels.
    """
    # A slice that is not square is padded to one before it is resized.
    side = series[["rows", "columns"]].max(axis=1).to_numpy(float)
    return [
        (row_mm * n / size, column_mm * n / size)
        for n, row_mm, column_mm in zip(
            side, series["row_spacing_mm"], series["column_spacing_mm"], strict=True
        )
    ]
