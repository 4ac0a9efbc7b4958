"""One convention for axial slices: rows of pixels run to the patient's left, columns to the back.

Scanners write that for a patient who lies on the back with the head first. Patients also lie on the
face or on a side, and some writers store pictures mirrored or turned; the direction cosines say so.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from ich_keras.ct.geometry import is_axial
from ich_keras.ct.tables import COSINES
from ich_keras.errors import StaleError

# A picture turned by half a right angle could go either way; rounding must not decide it.
_TIE = 1e-2


@dataclass(frozen=True)
class Turn:
    """How the pixels of a slice are brought to the convention: first transposed, then flipped.

    Args:
        transposes: rows become columns.
        flips_rows: the last row becomes the first.
        flips_columns: the last column becomes the first.
    """

    transposes: bool = False
    flips_rows: bool = False
    flips_columns: bool = False

    @classmethod
    def of(cls, orientation: tuple[float, ...]) -> "Turn":
        """Return the turn to the nearest axes; none for slices that are not axial.

        Args:
            orientation: direction cosines along a row (x, y, z), then along a column (x, y, z).

        >>> Turn.of((-1, 0, 0, 0, -1, 0))  # lying on the face
        Turn(transposes=False, flips_rows=True, flips_columns=True)
        """
        if not is_axial(orientation):
            return cls()
        row, column = orientation[:3], orientation[3:]
        transposes = abs(row[0]) < abs(row[1]) - _TIE
        if transposes:
            row, column = column, row
        return cls(bool(transposes), bool(column[1] < 0), bool(row[0] < 0))

    def __bool__(self) -> bool:
        """Whether there is anything to turn."""
        return self.transposes or self.flips_rows or self.flips_columns

    def __str__(self) -> str:
        """Return it as tables hold it; "" where there is nothing to turn."""
        done = {
            "transposed": self.transposes,
            "rows flipped": self.flips_rows,
            "columns flipped": self.flips_columns,
        }
        return ", ".join(name for name, is_done in done.items() if is_done)

    def pixels(self, stored: Any) -> Any:
        """Turn an array (rows, columns) of a slice; the same one where there is nothing to turn."""
        if not self:
            return stored
        turned = stored.swapaxes(0, 1) if self.transposes else stored
        turned = turned[::-1] if self.flips_rows else turned
        turned = turned[:, ::-1] if self.flips_columns else turned
        return turned.copy()

    def plane(self, plane: "Plane") -> "Plane":
        """Describe the turned slice."""
        if not self:
            return plane
        row, column = plane.orientation[:3], plane.orientation[3:]
        rows, columns = plane.rows, plane.columns
        row_spacing, column_spacing = plane.row_spacing_mm, plane.column_spacing_mm
        if self.transposes:
            row, column, rows, columns = column, row, columns, rows
            row_spacing, column_spacing = column_spacing, row_spacing
        position = plane.position
        if self.flips_rows:
            position = _moved(position, column, row_spacing * (rows - 1))
            column = _reversed(column)
        if self.flips_columns:
            position = _moved(position, row, column_spacing * (columns - 1))
            row = _reversed(row)
        return Plane(rows, columns, row_spacing, column_spacing, position, row + column)


class Plane(NamedTuple):
    """Where the pixels of a slice lie.

    Args:
        rows, columns: of the matrix.
        row_spacing_mm, column_spacing_mm: distance between rows, and between columns.
        position: centre of the first pixel, mm, in the patient system (x to the left, y to the
            back, z to the head).
        orientation: direction cosines along a row (x, y, z), then along a column (x, y, z).

    Source:
        DICOM PS3.3 C.7.6.2.1.1.
    """

    rows: int
    columns: int
    row_spacing_mm: float
    column_spacing_mm: float
    position: tuple[float, ...]
    orientation: tuple[float, ...]


def require_turned(series: pd.DataFrame, place: Path) -> None:
    """Refuse tables of a version that left slices as they were stored.

    Args:
        series: of an index or a cache.
        place: its folder, for the message.

    Raises:
        StaleError: a series in it would be turned now.
    """
    if not set(COSINES) <= set(series):
        return
    for uid, *cosines in series[["series_uid", *COSINES]].itertuples(index=False):
        if Turn.of(tuple(cosines)):
            raise StaleError(
                f"{place} holds series {uid} as it was stored, not with rows to the patient's left"
                " and columns to the back.",
                "It was made by an older version: make index and cache again.",
            )


def _moved(
    position: tuple[float, ...], direction: tuple[float, ...], millimetres: float
) -> tuple[float, ...]:
    return tuple(p + d * millimetres for p, d in zip(position, direction, strict=True))


def _reversed(direction: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(0.0 - part for part in direction)  # never -0.0
