"""The geometry of one slice through a head: the extent of each structure.

In the head frame of `head`, mm. An *extent* is a float32 array (rows, columns) in mm: about the
distance to the surface of a structure, positive inside it.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from ich_keras.phantom.head import Head, shape_terms

# Half of the ventricles (the other is its mirror image): ends of round tubes, mm, and radii.
VENTRICLE_TUBES = (
    ((6, -32, 10), (8, -8, 22), 4.5, 4.5),  # frontal horn to body
    ((8, -8, 22), (21, 29, 12), 4.5, 6.0),  # body to atrium
    ((21, 29, 12), (23, 52, 7), 5.5, 2.5),  # occipital horn
    ((22, 30, 10), (32, -2, -12), 4.0, 2.0),  # temporal horn
)
DEEP_GREY = (  # caudate head, lentiform nucleus, thalamus: centre and semi-axes, mm, one side
    ((13, -16, 13), (4.5, 9, 9)),
    ((25, -4, 5), (7, 16, 10)),
    ((11, 11, 8), (8, 13, 9)),
)


def coverage(extent: np.ndarray, edge_mm: float | np.ndarray) -> np.ndarray:
    """Return how much of each voxel a structure fills: float32 (rows, columns) in 0..1.

    Args:
        extent: float32 (rows, columns), mm, positive inside.
        edge_mm: over how many mm the transition spreads (partial volume).
    """
    return np.clip(extent / edge_mm + 0.5, 0, 1)


class HeadSlice:
    """The geometry of one slice through a head, in head coordinates; each extent is made once.

    Args:
        head: the anatomy.
        x, y, z: float32 (rows, columns), head coordinates of the voxel centres, mm; affine in row
            and column.
    """

    def __init__(self, head: Head, x: np.ndarray, y: np.ndarray, z: np.ndarray):
        self.head, self.x, self.y, self.z = head, x, y, z
        a, b, c = head.semi_axes
        # Below the middle the head continues into face and neck instead of closing.
        half_height = np.where(z > 0, np.float32(c), np.float32(1.5 * c))
        u = x / (a * (1 + head.egg / b * y))
        v = y / b
        w = z / half_height
        radius = np.sqrt(u * u + v * v + w * w) + 1e-3
        gradient = np.sqrt((u / a) ** 2 + (v / b) ** 2 + (w / half_height) ** 2) + 1e-6
        self.directions = (u / radius, v / radius, w / radius)
        on_surface = 1 + shape_terms(head.shape, *self.directions)
        nx, ny, nz = self.directions
        # The crests inside the frontal and the occipital bone, and unevenness all over.
        crest = 4 * np.clip(1 - np.abs(nx) / 0.09, 0, 1) * np.clip((np.abs(ny) - 0.9) / 0.08, 0, 1)
        uneven = 0.7 * np.sin(13 * nx + 8 * nz) * np.sin(11 * ny - 6 * nz)
        self.relief = crest - uneven  # of the inner table; the outer one does not show it
        self.vault_depth = (on_surface - radius) * radius / gradient - self.relief
        self.slope = np.abs(w / half_height) / gradient
        # Rows and columns per mm along x and y.
        self._per_mm = np.linalg.inv(
            [[y[1, 0] - y[0, 0], y[0, 1] - y[0, 0]], [x[1, 0] - x[0, 0], x[0, 1] - x[0, 0]]]
        )

    def reaches(self, low_mm: float, high_mm: float) -> bool:
        """Return whether any voxel is between two heights."""
        corners = self.z[[0, 0, -1, -1], [0, -1, 0, -1]]
        return bool(corners.min() < high_mm and corners.max() > low_mm)

    def box(
        self, across_mm: float, along_mm: float, centre: tuple[float, float] = (0, 0)
    ) -> tuple[slice, slice]:
        """Return rows and columns that hold |x - x0| < across_mm and |y - y0| < along_mm."""
        offset = (centre[1] - self.y[0, 0], centre[0] - self.x[0, 0])
        middle = self._per_mm @ offset
        half = np.abs(self._per_mm) @ (along_mm, across_mm)
        low = np.clip(np.floor(middle - half), 0, self.x.shape).astype(int)
        high = np.clip(np.ceil(middle + half) + 1, low, self.x.shape).astype(int)
        return np.s_[low[0] : high[0], low[1] : high[1]]

    def ellipsoid(
        self,
        centre: Sequence[float],
        semi_axes: Sequence[float],
        box: tuple[slice, slice] = np.s_[:, :],
    ) -> np.ndarray:
        """Return the extent of an ellipsoid, within a box."""
        q = ((self.x[box] - centre[0]) / semi_axes[0]) ** 2
        q += ((self.y[box] - centre[1]) / semi_axes[1]) ** 2
        q += ((self.z[box] - centre[2]) / semi_axes[2]) ** 2
        return (1 - np.sqrt(q)) * min(semi_axes)

    @cached_property
    def shifted_x(self) -> np.ndarray:
        """x as it was before mass effect moved the midline: most in its middle."""
        if not self.head.midline_shift_mm:
            return self.x
        bulge = np.exp(-((self.y / 55) ** 2) - ((self.z - 8) / 40) ** 2)
        return self.x - self.head.midline_shift_mm * bulge

    @cached_property
    def deep_grey(self) -> np.ndarray:
        """Extent of the basal ganglia and the thalami."""
        extent = np.full_like(self.x, -10)
        if self.reaches(-12, 26):
            box = self.box(44, 32)
            across, y, z = np.abs(self.shifted_x[box]), self.y[box], self.z[box]
            for (x0, y0, z0), (a, b, c) in DEEP_GREY:
                q = ((across - x0) / a) ** 2 + ((y - y0) / b) ** 2 + ((z - z0) / c) ** 2
                extent[box] = np.maximum(extent[box], (1 - np.sqrt(q)) * a)
        return extent

    @cached_property
    def base_height(self) -> np.ndarray:
        """Height above the skull base, mm: three fossae as steps, with the orbits' roofs, the
        wings of the sphenoid and the petrous ridges between them."""
        x, y = self.x, self.y
        across = np.abs(x)
        wing = y + 16 + 0.42 * across
        ridge = y - 2 - 0.42 * across
        middle = np.clip(wing / 9, 0, 1)
        posterior = np.clip(ridge / 9, 0, 1)
        roofs = 9 * np.exp(-(((across - 30) / 17) ** 2) - ((y + 48) / 22) ** 2) * (1 - middle)
        sella = 7 * np.exp(-((across / 9) ** 2) - ((y + 12) / 8) ** 2)
        crests = 5 * np.exp(-((wing / 4) ** 2)) + 7 * np.exp(-((ridge / 5) ** 2))
        crests = crests * np.clip((across - 10) / 12, 0, 1)
        bowl = 0.004 * (across - 30) ** 2 * middle
        uneven = 1.3 * np.sin(0.21 * x + 0.1 * y) * np.sin(0.17 * y - 0.08 * x)
        floor = 15 + 19 * middle + 24 * posterior - roofs - sella - crests - bowl
        return self.z + floor + uneven

    @cached_property
    def depth(self) -> np.ndarray:
        """Extent of the skull cavity."""
        return np.minimum(self.vault_depth, self.base_height)

    @cached_property
    def sulcus_distance(self) -> np.ndarray:
        """Distance from the middle of the nearest sulcus, mm, as if they ran through all brain."""
        waves = self.head.waves
        xyz = np.stack([self.x, self.y, self.z])
        # Coordinates are affine in row and column: cos(down + across) is a sum of two products.
        down = waves[:, :3] @ xyz[:, :, 0] + waves[:, 3:]
        across = waves[:, :3] @ (xyz[:, 0, :] - xyz[:, 0, :1])
        field = np.cos(down).T @ np.cos(across) - np.sin(down).T @ np.sin(across)
        steepness = float(np.sqrt((waves[:, :3] ** 2).sum() / 2))
        return np.abs(field) / steepness

    @cached_property
    def sulci(self) -> np.ndarray:
        """Extent of the sulci: narrow clefts down from the surface of the cerebrum.

        They are of uneven depth, and mass effect closes those of the side it comes from.
        """
        half_width = np.float32(0.3 + 1.1 * self.head.atrophy)
        shift = self.head.midline_shift_mm
        if shift:
            pressed = np.clip(0.5 - self.x * np.sign(shift) / 20, 0, 1)
            half_width = half_width * (1 - min(0.9, abs(shift) / 7) * pressed)
        uneven = np.sin(0.11 * self.x + 0.07 * self.z) * np.sin(0.09 * self.y - 0.05 * self.z)
        inner = np.minimum(15 + 8 * uneven - self.depth, self.base_height - 4)
        # Clefts taper to their ground.
        return np.minimum(half_width * np.clip(inner / 6, 0.3, 1) - self.sulcus_distance, inner)

    @cached_property
    def cisterns(self) -> np.ndarray:
        """Extent of the suprasellar and ambient cisterns and of the Sylvian fissures."""
        extent = np.full_like(self.x, -10)
        if not self.reaches(-32, 22):
            return extent
        box = self.box(70, 40)
        x, y, z = self.x[box], self.y[box], self.z[box]
        wide = 1.2 + 1.6 * self.head.atrophy
        across = np.abs(x)
        # A star above the sella; a smile behind the midbrain; clefts to the sides.
        star = 13 - np.hypot(x, y + 9) + 3 * np.cos(5 * np.arctan2(x, y + 9))
        star = np.minimum(star, 7 - np.abs(z + 16))
        ring = wide - np.abs(np.hypot(x, (y - 8) * 1.15) - 16 + np.sin(0.4 * x))
        ring = np.minimum(np.minimum(ring, y - 6 + 0.2 * across), 9 - np.abs(z + 12))
        wobble = 2 * np.sin(0.23 * x + 0.1 * z) + 1.2 * np.sin(0.41 * x - 0.2 * z)
        bend = y + 16 - 0.55 * (across - 26) + 0.01 * (across - 44) ** 2 - 0.6 * (z + 4) + wobble
        taper = np.clip((66 - across) / 26, 0.25, 1) * np.clip((across - 20) / 8, 0.2, 1)
        sylvian = 1.1 * wide * taper - np.abs(bend) / 1.3
        sylvian = np.minimum(sylvian, np.minimum(across - 22, 15 - np.abs(z + 2)))
        extent[box] = np.minimum(np.maximum(np.maximum(star, ring), sylvian), self.depth[box] - 0.5)
        return extent

    @cached_property
    def ventricles(self) -> np.ndarray:
        """Extent of the lateral, third and fourth ventricles."""
        whole = np.full_like(self.x, -10)
        if not self.reaches(-46, 46):
            return whole
        head, scale = self.head, self.head.ventricle_scale
        box = self.box(56, 72)
        x, y, z = self.shifted_x[box], self.y[box], self.z[box]
        side_scale = scale * (1 + head.ventricle_asymmetry * np.sign(x))
        across = np.abs(x)
        extent = np.full_like(x, -10)
        for start, end, first_mm, last_mm in VENTRICLE_TUBES:
            low, high = min(start[2], end[2]), max(start[2], end[2])
            if not self.reaches(low - 14, high + 14):
                continue
            along = np.subtract(end, start).astype(np.float32)
            dx, dy, dz = across - start[0], y - start[1], z - start[2]
            t = (dx * along[0] + dy * along[1] + dz * along[2]) / float(along @ along)
            t = np.clip(t, 0, 1)
            gap = (dx - t * along[0]) ** 2 + (dy - t * along[1]) ** 2 + (dz - t * along[2]) ** 2
            tube = (first_mm + (last_mm - first_mm) * t) * side_scale - np.sqrt(gap)
            extent = np.maximum(extent, tube)
        extent = np.minimum(extent, across - 0.8)  # septum pellucidum
        third = (1 - np.sqrt((x / 2.2 / scale) ** 2 + (y / 15) ** 2 + (z / 12) ** 2)) * 2.2 * scale
        whole[box] = np.maximum(extent, third)
        if self.reaches(-42, -14):
            centre, semi_axes = (0, 37, -28), (8 * scale, 6 * scale, 11)
            box = self.box(22, 18, centre[:2])
            whole[box] = np.maximum(whole[box], self.ellipsoid(centre, semi_axes, box))
        return whole

    @cached_property
    def falx(self) -> np.ndarray:
        """Extent of the falx as a sheet without thickness: callers add its half-thickness."""
        inner_edge = np.sqrt((self.y / 50) ** 2 + ((self.z - 6) / 34) ** 2) * 34 - 34
        lower_edge = self.z + 8
        return np.minimum(np.minimum(inner_edge, lower_edge), 0) - np.abs(self.x)

    @cached_property
    def tentorium(self) -> np.ndarray:
        """Extent of the tentorium as a sheet without thickness: a tent over the cerebellum."""
        roof = 12 - 0.62 * np.abs(self.x) - 0.12 * (self.y - 30)
        notch = np.hypot(self.x / 17, (self.y - 14) / 24) * 17 - 17
        behind = np.minimum(self.y - 6, notch)
        return np.minimum(behind, 0) - np.abs(self.z - roof) * 0.85

    @cached_property
    def sinuses(self) -> np.ndarray:
        """Extent of the superior sagittal and the transverse sinuses, with blood that flows."""
        head = self.head
        across = np.abs(self.x)
        triangle = head.sinus_mm - across - 0.8 * self.depth
        extent = np.minimum(triangle, np.maximum(self.z - 20, self.y - 40))
        if self.reaches(-30, 14):
            right, left = head.transverse_mm
            thick = np.where(self.x > 0, np.float32(left), np.float32(right))
            groove = np.minimum(thick - self.depth, 7 - np.abs(self.z + 12 + 0.1 * across))
            extent = np.maximum(extent, np.minimum(groove, self.y - 22))
        return np.minimum(extent, self.depth)
