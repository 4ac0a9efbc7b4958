"""Whole series at a given distance between slices: linear in HU, at positions in mm.

Worker processes import this module: it must not import keras.
"""

from typing import NamedTuple

import numpy as np

from ich_keras.ct.geometry import SAME_POSITION_MM, neighbour_distances_mm
from ich_keras.data.thin_series import HOLE
from ich_keras.data.views import AIR
from ich_keras.errors import DataError


class Grid(NamedTuple):
    """The slices of a series at another distance.

    Args:
        rows: int64 (n,), the slice below each position, `AIR` in a gap.
        others: int64 (n,), the slice above.
        shares: float32 (n,), its share; the rest is that of the slice below.
    """

    rows: np.ndarray
    others: np.ndarray
    shares: np.ndarray


def grid_of(positions_mm: np.ndarray, depth_mm: float, uid: str = "the series") -> Grid:
    """Place slices at a given distance over a series.

    They lie in the middle of the series and reach its ends; what lies up to half a distance beyond
    is the last slice. Between two slices HU are interpolated linearly. Across a gap, a distance of
    more than `HOLE` times the usual one, nothing is: what is nearer than half the usual distance to
    its border is the slice there, the rest is air.

    Args:
        positions_mm: float64 (slices,), ascending, along the normal.
        depth_mm: the distance.
        uid: of the series, for messages.

    Raises:
        DataError: a position is not finite.

    >>> grid = grid_of(np.array([0.0, 4.0, 8.0]), 3.0)  # at -0.5, 2.5, 5.5 and 8.5 mm
    >>> (grid.rows + grid.shares).tolist()
    [0.0, 0.625, 1.375, 2.0]
    """
    positions = np.asarray(positions_mm, np.float64)
    if not np.isfinite(positions).all():
        raise DataError(
            f"series {uid} has slices without a position: it has no distance between slices.",
            "Leave --depth-mm out, or leave the series out.",
        )
    length = len(positions)
    extent = positions[-1] - positions[0]
    # Rounded, so that 40 mm are not 8.000001 distances of 5 mm.
    count = int(np.ceil(round(extent / depth_mm, 6))) + 1
    wanted = positions[0] + (extent - (count - 1) * depth_mm) / 2 + np.arange(count) * depth_mm
    wanted = wanted.clip(positions[0], positions[-1])
    rows = np.clip(np.searchsorted(positions, wanted, side="right") - 1, 0, max(length - 2, 0))
    others = np.minimum(rows + 1, length - 1)
    distance = positions[others] - positions[rows]
    usable = distance > SAME_POSITION_MM
    shares = np.where(usable, (wanted - positions[rows]) / np.where(usable, distance, 1), 0.0)
    steps = neighbour_distances_mm(positions)
    if len(steps):
        usual = float(np.median(steps))
        in_gap = distance > HOLE * usual
        near = np.minimum(wanted - positions[rows], positions[others] - wanted) <= usual / 2
        shares = np.where(in_gap, np.rint(shares), shares)
        rows = np.where(in_gap & ~near, AIR, rows)
    return Grid(rows, others, shares.astype(np.float32))
