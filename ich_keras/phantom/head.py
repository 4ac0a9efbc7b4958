"""The synthetic head: one patient's anatomy, and its geometry in one slice.

Everything is analytic, so that any oblique plane can be drawn without resampling. Head frame, mm:
x to the patient's left, y to posterior, z to superior (DICOM's LPS, PS3.3 C.7.6.2.1.1), origin in
the middle of the skull cavity at the level of the third ventricle. An *extent* is a float32 array
(rows, columns) in mm: about the distance to the surface of a structure, positive inside it.

Sizes and HU are round numbers of adult anatomy, chosen by eye; nothing here is a clinical model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

AIR, FAT, SKIN, MUSCLE, CSF = -1000, -90, 30, 52, 8

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
        shape: five small numbers, see `shape_terms`: no skull is an ellipsoid, or symmetric.
        skull_mm, scalp_mm: mean thickness.
        thickness: four small numbers: where this skull is thicker, relative.
        muscle_mm: thickness of the temporal muscles; the neck's are half as thick again.
        swelling: direction of a bruise of the scalp (unit vector) and its height, mm; 0 for none.
        grey, white: HU of the brain, with this patient's offset.
        atrophy: 0 (young) to 1: width of sulci and ventricles.
        leukoaraiosis: HU by which white matter around the ventricles is darker.
        ventricle_scale: factor on the radii of the ventricles.
        ventricle_asymmetry: relative difference of the two sides.
        midline_shift_mm: mass effect on midline structures, towards positive x.
        waves: float32 (n, 4): wave vector (rad/mm) and phase of the plane waves whose common zero
            surfaces are the sulci.
        falx_mm, falx_hu, tentorium_mm, tentorium_hu: the dura between the hemispheres and above
            the cerebellum.
        sinus_mm, sinus_hu: half-width of the superior sagittal sinus; HU of all venous sinuses.
        transverse_mm: depth of the transverse sinus on the right and on the left.
        deep_hu: of calcified basal ganglia and thalami, 0 where they are not.
        lesions: old and fresh infarcts, lacunes: darker than the brain around them.
        vessels: dense middle cerebral and basilar arteries.
        calcifications: pineal, choroid plexus, basal ganglia, falx; small calcified meningiomas.
    """

    semi_axes: tuple[float, float, float]
    egg: float
    shape: tuple[float, ...]
    skull_mm: float
    scalp_mm: float
    thickness: tuple[float, ...]
    muscle_mm: float
    swelling: tuple[float, float, float, float]
    grey: float
    white: float
    atrophy: float
    leukoaraiosis: float
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
    lesions: tuple[Blob, ...] = ()
    vessels: tuple[Blob, ...] = ()
    calcifications: tuple[Blob, ...] = ()

    def surface_point(self, direction: np.ndarray) -> np.ndarray:
        """Return the point of the inner table in a direction: float (3,) unit -> float (3,), mm."""
        a, b, c = self.semi_axes
        on_sphere = np.asarray(direction, float)
        on_sphere = on_sphere * (1 + float(shape_terms(self.shape, *on_sphere)))
        point = on_sphere * (a, b, c)
        point[0] *= 1 + self.egg * on_sphere[1]
        return point


def shape_terms(shape: tuple[float, ...], x: Any, y: Any, z: Any) -> Any:
    """Return by how much the inner table lies outside the ellipsoid, relative, in a direction.

    Args:
        shape: how square the outline is, how skew, and three further unevennesses.
        x, y, z: float arrays or numbers, a unit vector.
    """
    square, skew, side, crown, lobes = shape
    xy = x * y
    return (
        square * (4 * xy * xy - 0.4)
        + skew * xy
        + side * x * z
        + crown * y * z
        + lobes * x * (x * x - 3 * y * y)
    )


def draw_head(rng: np.random.Generator, hydrocephalus: bool = False) -> Head:
    """Draw one patient's head.

    Args:
        rng: the only source of chance.
        hydrocephalus: wide ventricles, as with intraventricular blood.
    """
    size = rng.normal(1.0, 0.035)
    semi_axes = tuple(size * rng.normal((66, 81, 71), (2.0, 3.0, 2.0)))
    # Wider than in life (about 33-40): a bright brain must not look like blood to a counter.
    grey = float(np.clip(rng.normal(38.5, 6.0), 27, 50))
    atrophy = float(rng.beta(1.4, 1.9))
    wide = rng.uniform(1.1, 1.4) if hydrocephalus else 1.0
    head = Head(
        semi_axes=semi_axes,
        egg=rng.uniform(0.02, 0.11),
        shape=(rng.uniform(0.01, 0.06), *rng.normal(0, (0.025, 0.015, 0.02, 0.012))),
        skull_mm=rng.uniform(4.5, 8.0),
        scalp_mm=rng.uniform(3.5, 7.0),
        thickness=tuple(rng.normal(0, 0.14, 4)),
        muscle_mm=rng.uniform(3, 9),
        swelling=_draw_swelling(rng),
        grey=grey,
        white=grey - rng.uniform(6.0, 9.0),
        atrophy=atrophy,
        leukoaraiosis=max(0.0, float(rng.normal(8 * atrophy - 3, 2))),
        ventricle_scale=(0.6 + 0.75 * atrophy) * wide * size,
        ventricle_asymmetry=float(np.clip(rng.normal(0, 0.1), -0.25, 0.25)),
        midline_shift_mm=0.0,
        waves=_draw_waves(rng),
        **_draw_dura(rng),
    )
    return replace(
        head,
        vessels=_draw_vessels(head, rng),
        lesions=_draw_lesions(head, rng),
        calcifications=_draw_calcifications(head, rng),
    )


def _draw_swelling(rng: np.random.Generator) -> tuple[float, float, float, float]:
    direction = rng.normal(0, (1, 1, 0.4))
    direction[2] = abs(direction[2])
    height_mm = rng.uniform(4, 13) if rng.random() < 0.2 else 0.0
    return (*(direction / np.linalg.norm(direction)), height_mm)


def _draw_dura(rng: np.random.Generator) -> dict:
    """Draw the bright normal structures; with contrast medium, as much of them as a bleed."""
    is_enhanced = rng.random() < 0.6
    thickest, dimmest, brightest, sinus_mm = (
        (4.2, 62.0, 84.0, 11.0) if is_enhanced else (2.2, 48.0, 66.0, 6.5)
    )
    return {
        "falx_mm": rng.uniform(0.4, 1) * thickest,
        "falx_hu": rng.uniform(dimmest, brightest),
        "tentorium_mm": rng.uniform(0.4, 1) * thickest,
        "tentorium_hu": rng.uniform(dimmest, brightest),
        "sinus_mm": rng.uniform(0.4, 1) * sinus_mm,
        "sinus_hu": rng.uniform(dimmest, brightest),
        "transverse_mm": tuple(rng.uniform(0.3, 0.8, 2) * sinus_mm),
        "deep_hu": rng.uniform(60, 90) if rng.random() < 0.08 else 0.0,
    }


def _draw_waves(rng: np.random.Generator) -> np.ndarray:
    directions = rng.standard_normal((8, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    wave_numbers = 2 * np.pi / rng.uniform(18, 34, (8, 1))
    phases = rng.uniform(0, 2 * np.pi, (8, 1))
    return np.hstack([directions * wave_numbers, phases]).astype(np.float32)


def _draw_vessels(head: Head, rng: np.random.Generator) -> tuple[Blob, ...]:
    hu = max(rng.uniform(42, 60), head.sinus_hu)
    basilar = Blob((rng.uniform(-2, 2), -7, -20), (2.2, 2.2, 9), hu)
    middle_cerebral = tuple(
        Blob((side * 19, -14, -13), (11, rng.uniform(1.3, 2.4), 2.0), hu) for side in (-1, 1)
    )
    return (basilar, *middle_cerebral)


def _draw_lesions(head: Head, rng: np.random.Generator) -> tuple[Blob, ...]:
    """Draw infarcts and lacunes; more of them in an old brain."""
    lesions = []
    if rng.random() < 0.06 + 0.16 * head.atrophy:
        is_old = rng.random() < 0.6  # and as dark as fluid
        direction = rng.normal((rng.choice((-0.8, 0.8)), 0.2, 0.25), (0.15, 0.5, 0.25))
        centre = head.surface_point(direction / np.linalg.norm(direction))
        centre *= rng.uniform(0.75, 0.95)
        hu = rng.uniform(12, 20) if is_old else head.white - rng.uniform(3, 8)
        lesions.append(Blob(tuple(centre), tuple(rng.uniform(10, 26, 3)), hu))
    for _ in range(rng.poisson(0.2 + 1.2 * head.atrophy)):
        centre = rng.normal((rng.choice((-20, 20)), -2, 8), (5, 11, 6))
        lesions.append(Blob(tuple(centre), tuple(rng.uniform(1.5, 4.5, 3)), rng.uniform(10, 22)))
    return tuple(lesions)


def _draw_calcifications(head: Head, rng: np.random.Generator) -> tuple[Blob, ...]:
    blobs = []
    if rng.random() < 0.6:  # pineal gland
        size = rng.uniform(1.5, 4.0)
        blobs.append(Blob((rng.uniform(-1, 1), 22, 4), (size, size, size), rng.uniform(80, 300)))
    if rng.random() < 0.6:  # choroid plexus in the atria, mostly on both sides
        size = rng.uniform(2.0, 5.0)
        hu = rng.uniform(70, 250)
        sides = (-1, 1) if rng.random() < 0.8 else (rng.choice((-1, 1)),)
        blobs += [
            Blob((side * 21, 30 + rng.normal(0, 1.5), 12), (0.7 * size, size, size), hu)
            for side in sides
        ]
    if rng.random() < 0.25:  # globus pallidus, both sides
        size = rng.uniform(2.0, 6.0)
        hu = rng.uniform(60, 130)
        blobs += [Blob((side * 19, 0, 5), (0.7 * size, size, size), hu) for side in (-1, 1)]
    if rng.random() < 0.35:  # plates in the falx
        for _ in range(rng.integers(1, 4)):
            angle = rng.uniform(-0.4, 2.2)
            y, z = -68 * np.cos(angle), 8 + 52 * np.sin(angle)
            axes = (rng.uniform(1, 2.2), rng.uniform(4, 12), rng.uniform(4, 10))
            blobs.append(Blob((0.0, y, z), axes, rng.uniform(90, 300)))
    if rng.random() < 0.2:  # a small calcified meningioma on the convexity
        direction = rng.normal((rng.choice((-0.8, 0.8)), 0, 0.4), (0.1, 0.5, 0.2))
        centre = 0.95 * head.surface_point(direction / np.linalg.norm(direction))
        blobs.append(Blob(tuple(centre), tuple(rng.uniform(4, 9, 3)), rng.uniform(85, 260)))
    return tuple(blobs)


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
        # Below the middle the head goes on into face and neck instead of closing.
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
        """Tell whether any voxel lies between two heights."""
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
