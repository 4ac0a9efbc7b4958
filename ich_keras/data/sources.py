"""From which slices the pixels of samples come: read, moved, interpolated along z, cropped.

Worker processes import this module: it must not import keras.
"""

from dataclasses import dataclass, replace

import numpy as np

from ich_keras.ct.pixels import AIR_HU
from ich_keras.data.inputs import resize_hu, stack_slices
from ich_keras.data.views import AIR, Samples


@dataclass(frozen=True, eq=False)
class Sources:
    """Where the pixels of n samples come from.

    Args:
        rows: int64 (n, slices), numbers of slices, `AIR` for air.
        shifts: float64 (n, slices, 2), as in `Samples`; None where nothing moves.
        others: int64 (n, slices), a second slice in each place; None where there is none.
        shares: float32 (n, slices), its share of the HU.
        boxes: int64 (n, 3), top, left and side of the square that is cut out, pixels; a side of 0
            leaves a sample whole. None where none is cut.
    """

    rows: np.ndarray
    shifts: np.ndarray | None = None
    others: np.ndarray | None = None
    shares: np.ndarray | None = None
    boxes: np.ndarray | None = None

    @classmethod
    def of(cls, samples: Samples, indices: np.ndarray) -> "Sources":
        """Return those of some samples, by their numbers."""
        parts = (samples.rows, samples.shifts, samples.others, samples.shares, samples.boxes)
        return cls(*(None if part is None else part[indices] for part in parts))  # type: ignore[arg-type]

    @property
    def is_plain(self) -> bool:
        """Whether every place is a slice as it is."""
        is_whole = self.boxes is None or not self.boxes[:, 2].any()
        return self.shifts is None and self.others is None and is_whole and self.is_full

    @property
    def is_full(self) -> bool:
        """Whether no place is air."""
        return bool((self.rows != AIR).all())

    def placed(self, places: np.ndarray) -> "Sources":
        """Return samples whose places hold what other places of theirs held, or air.

        Args:
            places: int (n, slices), `AIR` for air.
        """
        rows = np.where(places == AIR, AIR, np.take_along_axis(self.rows, places, 1))
        others, shares, shifts = self.others, self.shares, self.shifts
        if others is not None and shares is not None:
            others, shares = (np.take_along_axis(part, places, 1) for part in (others, shares))
        if shifts is not None:
            shifts = np.take_along_axis(shifts, places[..., np.newaxis], 1)
        return replace(self, rows=rows, others=others, shares=shares, shifts=shifts)

    def wanted(self) -> np.ndarray:
        """Return the slices that are needed, each once, ascending."""
        parts = [self.rows] if self.others is None else [self.rows, self.others]
        found = np.unique(np.concatenate([part.ravel() for part in parts]))
        return found[found != AIR]

    def stacked(self, hu: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Put the samples together.

        Args:
            hu: int16 (m, rows, columns), HU of the slices that `wanted` names, or of more.
            numbers: int (m,), ascending, their numbers.

        Returns:
            int16 (n, slices, rows, columns), HU; a copy.
        """
        stacks = np.stack(
            [
                stack_slices(hu, _places(numbers, row), self._shift(sample))
                for sample, row in enumerate(self.rows)
            ]
        )
        if self.others is not None and self.shares is not None:
            is_between = (self.rows != AIR) & (self.shares > 0)
            for sample, place in np.argwhere(is_between):
                other = hu[np.searchsorted(numbers, self.others[sample, place])]
                share = self.shares[sample, place]
                mean = stacks[sample, place] * (1 - share) + other * share
                stacks[sample, place] = np.rint(mean)
        if self.boxes is not None:
            for stack, box in zip(stacks, self.boxes, strict=True):
                for one in stack:
                    one[...] = cropped(one, box)
        return stacks

    def _shift(self, sample: int) -> np.ndarray | None:
        return None if self.shifts is None else self.shifts[sample]


def _places(numbers: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.where(rows == AIR, AIR, np.searchsorted(numbers, rows))


def cropped(hu: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Cut a square out of a slice and enlarge it to the slice's size; beyond the border lies air.

    Args:
        hu: int16 (size, size), HU.
        box: top, left and side of the square, pixels; a side of 0 leaves the slice as it is.

    Returns:
        int16 (size, size), HU.

    >>> hu = np.arange(16, dtype=np.int16).reshape(4, 4)
    >>> cropped(hu, np.array([1, 1, 2]))[0].tolist()  # of 5 and 6, enlarged linearly
    [5, 5, 6, 6]
    """
    top, left, side = (int(number) for number in box)
    if side == 0:
        return hu
    size = len(hu)
    square = np.full((side, side), AIR_HU, hu.dtype)
    rows, columns = (slice(max(at, 0), min(at + side, size)) for at in (top, left))
    inside = hu[rows, columns]
    above, before = rows.start - top, columns.start - left
    square[above : above + inside.shape[0], before : before + inside.shape[1]] = inside
    return resize_hu(square, size)
