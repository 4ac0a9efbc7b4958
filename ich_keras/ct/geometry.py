"""The geometry of slices in space: normal, positions, spacing, tilt."""

import math
from collections.abc import Sequence

import numpy as np

# Slices closer than this share a position: positions are written to 1e-3 mm or finer, and no
# scanner spaces slices less than 0.1 mm apart.
SAME_POSITION_MM = 0.01
# A slice further than this from the line through the stack does not belong to the volume. It is
# about the size of a head CT's pixel.
IN_PLANE_TOLERANCE_MM = 0.5
# A smaller tilt moves no slice of a head by a slice spacing, and is within a gantry's accuracy.
TILT_DEGREES = 1.0
# In the plane, heads lie straighter in their holder than this.
ROTATED_DEGREES = 20.0
# Beyond this angle to the transverse plane, another plane is nearer. Gantries tilt at most 30
# degrees.
AXIAL_DEGREES = 45.0


def slice_normal(orientation: Sequence[float]) -> np.ndarray:
    """Return the unit normal of a slice, pointing to the head.

    Args:
        orientation: direction cosines along a row, then along a column; (6,).

    Returns:
        float64 (3,), z >= 0. Where z is 0, y is positive; where y is 0 too, x is.

    Source:
        DICOM PS3.3 C.7.6.2.1.1.

    >>> slice_normal((1, 0, 0, 0, 1, 0)).tolist()  # rows to the left, columns to the back
    [0.0, 0.0, 1.0]
    """
    normal = np.cross(orientation[:3], orientation[3:])
    normal = normal / np.linalg.norm(normal)
    z, y, x = (0.0 if abs(part) < 1e-6 else part for part in normal[::-1])
    return -normal if (z, y, x) < (0.0, 0.0, 0.0) else normal


def shear_degrees(orientation: Sequence[float], positions: np.ndarray) -> float:
    """Return the angle between the slices' normal and the line through the stack.

    A table that moves under a tilted gantry makes a sheared volume. 0 for one slice.

    Args:
        orientation: direction cosines along a row, then along a column; (6,).
        positions: float64 (slices, 3), first pixels, mm.
    """
    _, shear = fit_line(positions, slice_normal(orientation))
    return math.degrees(math.atan(np.linalg.norm(shear)))


def in_plane_shear(orientation: Sequence[float], positions: np.ndarray) -> tuple[float, float]:
    """Return how far the stack leans along a row and along a column, mm per mm along the normal.

    Both are 0 for an upright stack, and for one slice.

    Args:
        orientation: direction cosines along a row, then along a column; (6,).
        positions: float64 (slices, 3), first pixels, mm.
    """
    _, shear = fit_line(positions, slice_normal(orientation))
    return float(shear @ orientation[:3]), float(shear @ orientation[3:])


def tilt_degrees(orientation: Sequence[float], positions: np.ndarray) -> float:
    """Return how far a series is tilted: the larger of two angles.

    The first is the angle between its slices and the transverse plane. The second is
    `shear_degrees` (0 for a single slice): some scanners write the transverse plane however the
    gantry is tilted.

    Args:
        orientation: direction cosines along a row, then along a column; (6,).
        positions: float64 (slices, 3), first pixels, mm.

    >>> leaning = np.array([[0, 0, 0], [0, 5, 5], [0, 10, 10]], float)  # 5 mm back per 5 mm up
    >>> round(tilt_degrees((1, 0, 0, 0, 1, 0), leaning), 6)
    45.0
    """
    plane = math.degrees(math.acos(min(1.0, abs(slice_normal(orientation)[2]))))
    return max(plane, shear_degrees(orientation, positions))


def is_axial(orientation: Sequence[float]) -> bool:
    """Return whether the transverse plane is the nearest one.

    Args:
        orientation: direction cosines along a row, then along a column; (6,).
    """
    # In plain Python: it is asked of every file, and arrays of three cost twenty times as much.
    a, b, c, d, e, f = orientation
    normal = (b * f - c * e, c * d - a * f, a * e - b * d)
    return abs(normal[2]) > math.cos(math.radians(AXIAL_DEGREES)) * math.hypot(*normal)


def rotation_degrees(orientation: Sequence[float]) -> float:
    """Return how far the rows of an axial slice run from the nearest of the patient's axes.

    Args:
        orientation: direction cosines along a row, then along a column; (6,).

    >>> round(rotation_degrees((0.8660254, 0.5, 0, -0.5, 0.8660254, 0)), 6)
    30.0
    """
    along, across = sorted(map(abs, orientation[:2]))[::-1]
    return math.degrees(math.atan2(across, along))


def neighbour_distances_mm(positions_mm: np.ndarray) -> np.ndarray:
    """Return the distances between neighbouring slices, leaving out pairs at the same position.

    Args:
        positions_mm: float64 (slices,), along the normal, ascending.

    Returns:
        float64 (at most slices - 1,), mm.

    >>> neighbour_distances_mm(np.array([0.0, 5.0, 5.0, 15.0])).tolist()
    [5.0, 10.0]
    """
    distances = np.diff(positions_mm)
    return distances[distances > SAME_POSITION_MM]


def slice_spacing_mm(positions_mm: np.ndarray) -> float:
    """Return the usual distance between neighbouring slices: the median; NaN for one slice.

    Args:
        positions_mm: float64 (slices,), along the normal, ascending.

    >>> slice_spacing_mm(np.array([0.0, 5.0, 10.0, 20.0]))
    5.0
    """
    distances = neighbour_distances_mm(positions_mm)
    return float(np.median(distances)) if distances.size else math.nan


def fit_line(positions: np.ndarray, normal: np.ndarray) -> tuple[float, np.ndarray]:
    """Fit a line through a stack of slices.

    Args:
        positions: float64 (slices, 3), first pixels, mm.
        normal: float64 (3,), unit normal of the slices.

    Returns:
        (largest distance of a slice from the line, mm; the line's shear, float64 (3,), mm per mm
        along the normal).
    """
    along = positions @ normal
    across = positions - np.outer(along, normal)
    along = along - along.mean()
    across = across - across.mean(axis=0)
    spread = float(along @ along)
    if spread <= SAME_POSITION_MM**2:
        return float(np.linalg.norm(across, axis=1).max()), np.zeros(3)
    shear = along @ across / spread
    return float(np.linalg.norm(across - np.outer(along, shear), axis=1).max()), shear
