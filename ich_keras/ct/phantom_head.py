"""The synthetic head: its individual shape, and the geometry of one slice through it.

Everything is analytic, so that any oblique plane can be drawn without resampling. Head frame, mm:
x to the patient's left, y to posterior, z to superior (DICOM's LPS, PS3.3 C.7.6.2.1.1), origin in
the middle of the skull cavity at the level of the third ventricle. An *extent* is a float32 array
(rows, columns) in mm: about the distance to the surface of a structure, positive inside it.

Sizes and HU are round numbers of adult anatomy, chosen by eye; nothing here is a clinical model.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

AIR, FAT, SKIN, MUSCLE, CSF, DIPLOE, COMPACT_BONE = -1000, -90, 30, 52, 8, 620, 1350

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


@dataclass(frozen=True)
class Blob:
    """An ellipsoid that is brighter than its surroundings without being blood.

    Args:
        centre: x, y, z in the head frame, mm.
        semi_axes: along x, y and z, mm.
        hu: its value.
    """

    centre: tuple[float, float, float]
    semi_axes: tuple[float, float, float]
    hu: float


@dataclass(frozen=True)
class Head:
    """One patient's head without bleeds.

    Args:
        semi_axes: of the skull cavity along x, y and z (upwards), mm.
        egg: how much wider the back of the head is than its front, relative.
        skull_mm, scalp_mm: thickness.
        grey, white: HU of the brain, with this patient's offset.
        atrophy: 0 (young) to 1: width of sulci and ventricles.
        ventricle_scale: factor on the radii of the ventricles.
        ventricle_asymmetry: relative difference of the two sides.
        midline_shift_mm: mass effect on the ventricles, towards positive x.
        waves: float32 (n, 4): wave vector (rad/mm) and phase of the plane waves whose common zero
            surfaces are the sulci.
        falx_mm, falx_hu, tentorium_mm, tentorium_hu: the dura between the hemispheres and above
            the cerebellum.
        sinus_mm, sinus_hu: half-width of the superior sagittal sinus; HU of all venous sinuses.
        transverse_mm: depth of the transverse sinus on the right and on the left.
        deep_hu: of calcified basal ganglia and thalami, 0 where they are not.
        vessels: dense middle cerebral and basilar arteries.
        calcifications: pineal, choroid plexus, basal ganglia, falx; small calcified meningiomas.
    """

    semi_axes: tuple[float, float, float]
    egg: float
    skull_mm: float
    scalp_mm: float
    grey: float
    white: float
    atrophy: float
    ventricle_scale: float
    ventricle_asymmetry: float
    midline_shift_mm: float
    waves: np.ndarray
    falx_mm: float
    falx_hu: float
    tentorium_mm: float
    tentorium_hu: float
    sinus_mm: float
    sinus_hu: float
    transverse_mm: tuple[float, float]
    deep_hu: float
    vessels: tuple[Blob, ...]
    calcifications: tuple[Blob, ...]

    def surface_point(self, direction: np.ndarray) -> np.ndarray:
        """Return the point of the inner table in a direction: float (3,) unit -> float (3,), mm."""
        a, b, c = self.semi_axes
        on_sphere = np.asarray(direction, float)
        point = on_sphere * (a, b, c)
        point[0] *= 1 + self.egg * point[1] / b
        return point


def draw_head(
    rng: np.random.Generator, hydrocephalus: bool = False, midline_shift_mm: float = 0.0
) -> Head:
    """Draw one patient's head.

    Args:
        rng: the only source of chance.
        hydrocephalus: wide ventricles, as with intraventricular blood.
        midline_shift_mm: mass effect of the patient's bleeds, towards positive x.
    """
    size = rng.normal(1.0, 0.035)
    semi_axes = tuple(size * rng.normal((66, 80, 71), (2.0, 2.5, 2.0)))
    # Far wider than in life (about 33-40): a bright brain must not look like blood to a counter.
    grey = float(rng.uniform(27, 52))
    atrophy = float(rng.beta(1.5, 1.8))
    wide = rng.uniform(1.1, 1.4) if hydrocephalus else 1.0
    head = Head(
        semi_axes=semi_axes,
        egg=rng.uniform(0.06, 0.16),
        skull_mm=rng.uniform(5.0, 9.0),
        scalp_mm=rng.uniform(4.0, 8.0),
        grey=grey,
        white=grey - rng.uniform(6.0, 9.0),
        atrophy=atrophy,
        ventricle_scale=(0.65 + 0.75 * atrophy) * wide * size,
        ventricle_asymmetry=float(np.clip(rng.normal(0, 0.08), -0.2, 0.2)),
        midline_shift_mm=midline_shift_mm,
        waves=_draw_waves(rng),
        **_draw_dura(rng),
        vessels=_draw_vessels(rng),
        calcifications=(),
    )
    return _calcified(head, rng)


def _draw_dura(rng: np.random.Generator) -> dict:
    """Draw the bright normal structures: thin in a few heads, in most as much as a bleed."""
    is_dense = rng.random() < 0.8
    thickest, brightest, sinus_mm = (7.0, 88.0, 13.0) if is_dense else (2.5, 66.0, 6.0)
    return {
        "falx_mm": rng.uniform(0.3, 1) * thickest,
        "falx_hu": rng.uniform(brightest - 24, brightest),
        "tentorium_mm": rng.uniform(0.3, 1) * thickest,
        "tentorium_hu": rng.uniform(brightest - 24, brightest),
        "sinus_mm": rng.uniform(0.3, 1) * sinus_mm,
        "sinus_hu": rng.uniform(brightest - 24, brightest),
        "transverse_mm": tuple(rng.uniform(0.3, 0.8, 2) * sinus_mm),
        "deep_hu": rng.uniform(60, 90) if rng.random() < 0.12 else 0.0,
    }


def _draw_waves(rng: np.random.Generator) -> np.ndarray:
    directions = rng.standard_normal((6, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    wave_numbers = 2 * np.pi / rng.uniform(22, 34, (6, 1))
    phases = rng.uniform(0, 2 * np.pi, (6, 1))
    return np.hstack([directions * wave_numbers, phases]).astype(np.float32)


def _draw_vessels(rng: np.random.Generator) -> tuple[Blob, ...]:
    hu = rng.uniform(44, 66)
    basilar = Blob((rng.uniform(-2, 2), -7, -20), (2.2, 2.2, 9), hu)
    middle_cerebral = tuple(
        Blob((side * 19, -14, -13), (11, rng.uniform(1.5, 2.8), 2.5), hu) for side in (-1, 1)
    )
    return (basilar, *middle_cerebral)


def _calcified(head: Head, rng: np.random.Generator) -> Head:
    """Add the calcifications that this patient has."""
    blobs = []
    if rng.random() < 0.6:  # pineal gland
        size = rng.uniform(2.0, 5.0)
        blobs.append(Blob((rng.uniform(-1, 1), 22, 4), (size, size, size), rng.uniform(80, 300)))
    if rng.random() < 0.6:  # choroid plexus in the atria, mostly on both sides
        size = rng.uniform(2.5, 6.0)
        hu = rng.uniform(70, 250)
        sides = (-1, 1) if rng.random() < 0.8 else (rng.choice((-1, 1)),)
        blobs += [Blob((side * 21, 30, 12), (0.7 * size, size, size), hu) for side in sides]
    if rng.random() < 0.3:  # globus pallidus, both sides
        size = rng.uniform(2.5, 6.5)
        hu = rng.uniform(60, 130)
        blobs += [Blob((side * 19, 0, 5), (0.7 * size, size, size), hu) for side in (-1, 1)]
    if rng.random() < 0.35:  # plates in the falx
        for _ in range(rng.integers(1, 4)):
            angle = rng.uniform(-0.4, 2.2)
            y, z = -68 * np.cos(angle), 8 + 52 * np.sin(angle)
            axes = (rng.uniform(1, 2.2), rng.uniform(4, 12), rng.uniform(4, 10))
            blobs.append(Blob((0.0, y, z), axes, rng.uniform(90, 300)))
    if rng.random() < 0.25:  # a small calcified meningioma on the convexity
        direction = rng.normal((rng.choice((-0.8, 0.8)), 0, 0.4), (0.1, 0.5, 0.2))
        centre = 0.95 * head.surface_point(direction / np.linalg.norm(direction))
        axes = rng.uniform(4, 9, 3)
        blobs.append(Blob(tuple(centre), tuple(axes), rng.uniform(85, 260)))
    fields = {name: getattr(head, name) for name in head.__dataclass_fields__}
    return Head(**{**fields, "calcifications": tuple(blobs)})


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
        x, y, z: float32 (rows, columns), head coordinates of the voxel centres, mm.
    """

    def __init__(self, head: Head, x: np.ndarray, y: np.ndarray, z: np.ndarray):
        self.head, self.x, self.y, self.z = head, x, y, z
        a, b, c = head.semi_axes
        # Below the middle the head goes on into face and neck instead of closing.
        half_height = np.where(z > 0, np.float32(c), np.float32(1.5 * c))
        u = x / (a * (1 + head.egg / b * y))
        v = y / b
        w = z / half_height
        radius = np.sqrt(u * u + v * v + w * w) + 1e-3
        gradient = np.sqrt((u / a) ** 2 + (v / b) ** 2 + (w / half_height) ** 2) + 1e-6
        self.directions = (u / radius, v / radius, w / radius)
        self.vault_depth = (1 - radius) * radius / gradient
        self.slope = np.abs(w / half_height) / gradient

    def reaches(self, low_mm: float, high_mm: float) -> bool:
        """Tell whether any voxel lies between two heights."""
        corners = self.z[[0, 0, -1, -1], [0, -1, 0, -1]]
        return bool(corners.min() < high_mm and corners.max() > low_mm)

    def near_axis(self, across_mm: float, along_mm: float) -> tuple[slice, slice]:
        """Return the rows and columns that hold |x| < across_mm and |y| < along_mm."""
        inside = (np.abs(self.x) < across_mm) & (np.abs(self.y) < along_mm)
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        if not len(rows):
            return np.s_[:0, :0]
        return np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]

    def ellipsoid(self, centre, semi_axes) -> np.ndarray:
        """Return the extent of an ellipsoid."""
        q = ((self.x - centre[0]) / semi_axes[0]) ** 2
        q += ((self.y - centre[1]) / semi_axes[1]) ** 2
        q += ((self.z - centre[2]) / semi_axes[2]) ** 2
        return (1 - np.sqrt(q)) * min(semi_axes)

    @cached_property
    def deep_grey(self) -> np.ndarray:
        """Extent of the basal ganglia and the thalami."""
        extent = np.full_like(self.x, -10)
        if self.reaches(-12, 26):
            box = self.near_axis(36, 32)
            across, y, z = np.abs(self.x[box]), self.y[box], self.z[box]
            for (x0, y0, z0), (a, b, c) in DEEP_GREY:
                q = ((across - x0) / a) ** 2 + ((y - y0) / b) ** 2 + ((z - z0) / c) ** 2
                extent[box] = np.maximum(extent[box], (1 - np.sqrt(q)) * a)
        return extent

    @cached_property
    def base_height(self) -> np.ndarray:
        """Height above the skull base, mm: anterior, middle and posterior fossa are steps in it."""
        middle = np.clip((self.y + 34) / 22, 0, 1)
        posterior = np.clip((self.y - 2) / 20, 0, 1)
        return self.z + 12 + 22 * middle + 26 * posterior

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
        """Extent of the sulci: narrow clefts down from the surface of the cerebrum."""
        half_width = 0.35 + 1.1 * self.head.atrophy
        inner = np.minimum(20 - self.depth, self.base_height - 4)
        return np.minimum(half_width - self.sulcus_distance, inner)

    @cached_property
    def cisterns(self) -> np.ndarray:
        """Extent of the suprasellar and ambient cisterns and of the Sylvian fissures."""
        extent = np.full_like(self.x, -10)
        if not self.reaches(-32, 22):
            return extent
        box = self.near_axis(70, 40)
        x, y, z = self.x[box], self.y[box], self.z[box]
        wide = 1.2 + 1.6 * self.head.atrophy
        across = np.abs(x)
        # A star above the sella; a ring around the midbrain; clefts to the sides.
        star = 13 - np.hypot(x, y + 9) + 3 * np.cos(5 * np.arctan2(x, y + 9))
        star = np.minimum(star, 7 - np.abs(z + 16))
        ring = wide - np.abs(np.hypot(x, (y - 10) * 1.1) - 16)
        ring = np.minimum(ring, 9 - np.abs(z + 12))
        bend = y + 14 - 0.012 * (across - 26) ** 2 - 0.5 * (z + 4)
        sylvian = wide - np.abs(bend) / 1.4
        sylvian = np.minimum(sylvian, np.minimum(across - 24, 15 - np.abs(z + 2)))
        extent[box] = np.minimum(np.maximum(np.maximum(star, ring), sylvian), self.depth[box] - 0.5)
        return extent

    @cached_property
    def ventricles(self) -> np.ndarray:
        """Extent of the lateral, third and fourth ventricles."""
        whole = np.full_like(self.x, -10)
        if not self.reaches(-46, 46):
            return whole
        head, scale = self.head, self.head.ventricle_scale
        box = self.near_axis(50, 72)
        x, y, z = self.x[box], self.y[box], self.z[box]
        if head.midline_shift_mm:
            x = x - head.midline_shift_mm * np.exp(-((y / 55) ** 2) - ((z - 8) / 40) ** 2)
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
        return np.maximum(whole, self.ellipsoid((0, 37, -28), (8 * scale, 6 * scale, 11)))

    @cached_property
    def falx(self) -> np.ndarray:
        """Extent of the falx as a sheet without thickness: its half-thickness has to be added."""
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
