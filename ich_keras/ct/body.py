"""How large the body in an axial slice is: a trunk is not a head, whatever the header says."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ich_keras.ct.dicom import read_slice
from ich_keras.ct.rejects import RejectedFile
from ich_keras.ct.sources import Source

# Below are air, lung, cushions and the foam of tables; above are skin, fat and all other tissue.
_BODY_ABOVE_HU = -300
_GRID_MM = 2.0
# What is thinner belongs to the table or to the head holder, or is a tube or a fold of cloth.
_THINNEST_MM = 10.0
# Heads are up to 200 mm wide with their ears, and 35,000 mm2 large in a slice. Trunks of adults
# have 280 mm and 45,000 mm2, or more. Both must be exceeded: a hand beside a head is not a trunk.
# What is as small as a head, such as a neck, a limb or a small child, cannot be told by its size.
MAX_HEAD_WIDTH_MM = 260.0
MAX_HEAD_AREA_MM2 = 40_000.0


class BodySize(NamedTuple):
    """The widest piece of the body in a slice: from left to right in mm, and its area in mm2."""

    width_mm: float
    area_mm2: float

    @property
    def exceeds_head(self) -> bool:
        """Whether no head is that large."""
        return self.width_mm > MAX_HEAD_WIDTH_MM and self.area_mm2 > MAX_HEAD_AREA_MM2


def body_size(hu: np.ndarray, row_spacing_mm: float, column_spacing_mm: float) -> BodySize:
    """Measure the body in an axial slice, without the table. Air inside it counts.

    Args:
        hu: int16 (rows, columns), HU; rows run to the patient's left.
        row_spacing_mm, column_spacing_mm: distance between rows, and between columns.

    >>> y, x = np.mgrid[-200:200, -200:200]  # mm
    >>> trunk = np.where((x / 170) ** 2 + (y / 120) ** 2 < 1, 40, -1000)
    >>> size = body_size(trunk.astype(np.int16), 1.0, 1.0)
    >>> 330 < size.width_mm < 340, size.exceeds_head
    (True, True)
    """
    steps = [max(1, round(_GRID_MM / spacing)) for spacing in (row_spacing_mm, column_spacing_mm)]
    row_mm, column_mm = steps[0] * row_spacing_mm, steps[1] * column_spacing_mm
    mask = hu[:: steps[0], :: steps[1]] > _BODY_ABOVE_HU
    sides = [max(1, round(_THINNEST_MM / mm)) for mm in (row_mm, column_mm)]
    if mask.shape[0] < sides[0] or mask.shape[1] < sides[1]:
        return BodySize(0.0, 0.0)
    solid = _windows_full_of(mask, *sides)
    begins, ends = _longest_run(np.asarray(solid.any(axis=0)))
    piece = solid[:, begins:ends]
    if not piece.size:
        return BodySize(0.0, 0.0)
    # From the first to the last row of each column; what thinning took is given back.
    first, last = piece.argmax(axis=0), len(piece) - piece[::-1].argmax(axis=0)
    width = ends - begins + sides[1] - 1
    area = (last - first + sides[0] - 1).sum() * width / (ends - begins)
    return BodySize(float(width * column_mm), float(area * row_mm * column_mm))


def _windows_full_of(mask: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return for each window of so many rows and columns whether the mask holds all over it."""
    total = np.pad(mask.astype(np.int32).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    inside = total[rows:] - total[:-rows]
    return (inside[:, columns:] - inside[:, :-columns]) == rows * columns


def _longest_run(flags: np.ndarray) -> tuple[int, int]:
    """Return where the longest run of true values begins and ends."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    if not edges.size:
        return 0, 0
    begins, ends = edges[::2], edges[1::2]
    longest = int((ends - begins).argmax())
    return int(begins[longest]), int(ends[longest])


class SlicePlace(NamedTuple):
    """Where a slice lies, and the distance between its rows and columns once it is turned."""

    source: Source
    row_spacing_mm: float
    column_spacing_mm: float


def volume_body_size(slices: Sequence[SlicePlace]) -> BodySize | None:
    """Measure the body in the middle slice of a volume.

    Where it exceeds a head, the slices a quarter from both ends must, too: shoulders may lie below
    a head. Otherwise the size of the one that does not is returned.

    Args:
        slices: inferior to superior.

    Returns:
        None where the pixels cannot be read: other steps refuse them, and say why.
    """
    last = len(slices) - 1
    size = None
    for place in dict.fromkeys((last // 2, last // 4, last - last // 4)):
        source, row_spacing_mm, column_spacing_mm = slices[place]
        try:
            hu = read_slice(source, any_image_type=True).hu
        except RejectedFile:
            continue
        size = body_size(hu, row_spacing_mm, column_spacing_mm)
        if not size.exceeds_head:
            break
    return size
