"""Where slices lie in space: normal, positions, spacing, tilt."""

import math
from collections.abc import Sequence

import numpy as np

# Below this two slices lie at one position: positions are written to 1e-3 mm or finer, and no
# scanner spaces slices by less than 0.1 mm.
SAME_POSITION_MM = 0.01
# A slice that is this far beside the line through the stack is no part of one volume; a pixel of a
# head CT measures about as much.
IN_PLANE_TOLERANCE_MM = 0.5
# Less than this moves no slice of a head by a slice spacing, and is within a gantry's accuracy.
TILT_DEGREES = 1.0
# Further from the transverse plane another plane is nearer. Gantries tilt at most 30 degrees.
AXIAL_DEGREES = 45.0


def slice_normal(orientation: Sequence[float]) -> np.ndarray:
    """Return the unit normal of a slice, pointing to the head.

    Args:
        orientation: direction cosines along a row, then along a column; (6,).

    Returns:
        float64 (3,), z >= 0; of a plane through the z axis the first component above 0 counts.

    Source:
        DICOM PS3.3 C.7.6.2.1.1.
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

    One is that between its slices and the transverse plane (of a single slice there is no other),
    the second `shear_degrees`, as some scanners write the transverse plane whatever the gantry.

    Args:
        orientation: direction cosines along a row, then along a column; (6,).
        positions: float64 (slices, 3), first pixels, mm.
    """
    plane = math.degrees(math.acos(min(1.0, abs(slice_normal(orientation)[2]))))
    return max(plane, shear_degrees(orientation, positions))


def is_axial(orientation: Sequence[float]) -> bool:
    """Tell whether the transverse plane is the nearest one."""
    return abs(slice_normal(orientation)[2]) > math.cos(math.radians(AXIAL_DEGREES))


def neighbour_distances_mm(positions_mm: np.ndarray) -> np.ndarray:
    """Return the distances between neighbouring slices, without those at the same position.

    Args:
        positions_mm: float64 (slices,), along the normal, ascending.

    Returns:
        float64 (at most slices - 1,), mm.
    """
    distances = np.diff(positions_mm)
    return distances[distances > SAME_POSITION_MM]


def slice_spacing_mm(positions_mm: np.ndarray) -> float:
    """Return the usual distance between neighbouring slices: the median; NaN for one slice.

    Args:
        positions_mm: float64 (slices,), along the normal, ascending.
    """
    distances = neighbour_distances_mm(positions_mm)
    return float(np.median(distances)) if distances.size else math.nan


def fit_line(positions: np.ndarray, normal: np.ndarray) -> tuple[float, np.ndarray]:
    """Fit a line through a stack of slices.

    Args:
        positions: float64 (slices, 3), first pixels, mm.
        normal: float64 (3,), unit normal of the slices.

    Returns:
        (largest distance of a slice from the line, mm; float64 (3,) its shear, mm per mm along the
        normal).
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
