"""The synthetic head: the anatomy of one patient, drawn at random.

Everything is analytic: any oblique plane can be drawn without resampling. Head frame, mm:
x to the patient's left, y to posterior, z to superior (DICOM's LPS, PS3.3 C.7.6.2.1.1), origin in
the middle of the skull cavity at the level of the third ventricle. `head_slice` holds the geometry
of one slice through a head.

Sizes and HU are round numbers of adult anatomy, chosen by eye; nothing here is a clinical model.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

AIR, FAT, SKIN, MUSCLE, CSF = -1000, -90, 30, 52, 8


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
        egg: relative amount by which the back of the head is wider than the front.
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
        deep_hu: HU of calcified basal ganglia and thalami; 0 if they are not calcified.
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
        rng: the only source of randomness.
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
    """Draw the bright normal structures; with contrast medium they are as large as a bleed."""
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
