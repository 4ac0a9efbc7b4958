"""The scan of a synthetic head: pose, spacing, image quality, and the pixels of its slices."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from ich_keras.ct.phantom_bleeds import OEDEMA_HU, Bleed, bleed_extent
from ich_keras.ct.phantom_head import (
    AIR,
    COMPACT_BONE,
    CSF,
    DIPLOE,
    FAT,
    MUSCLE,
    SKIN,
    Blob,
    Head,
    HeadSlice,
    coverage,
)
from ich_keras.labels import SUBTYPES

# A subtype is labelled on a slice when its mask covers at least this much of it.
MIN_AREA_MM2 = 100.0
# Bit k of a mask stands for MASK_BITS[k]; the last two are anatomy, kept to check the blood by.
MASK_BITS = (*SUBTYPES, "ventricles", "cavity")
_METAL_SHARE = 0.12  # of the series, in health as in bleeding


@dataclass(frozen=True)
class Scan:
    """How one series was scanned: pose, spacing and faults of the image.

    Args:
        pixel_mm: pixel size, the same along rows and columns.
        slice_spacing_mm: between neighbouring slices, along their normal.
        origin: float (slices, 3): centre of the first pixel of each slice, LPS, mm.
        orientation: float (2, 3): directions of rows and columns (DICOM 0020,0037).
        centre: of the head, LPS, mm.
        rotation: float (3, 3): from LPS to the head frame.
        noise, noise_blur: HU; correlation of the noise, pixels.
        blur_mm: resolution.
        ring: HU added at the inner table, fading inwards (beam hardening, thick slices).
        streak: HU of the bands between the petrous bones.
        metal: head coordinates of a clip or electrode on the skull that throws rays, mm, or None.
        ray: HU of the brightest rays.
    """

    pixel_mm: float
    slice_spacing_mm: float
    origin: np.ndarray
    orientation: np.ndarray
    centre: np.ndarray
    rotation: np.ndarray
    noise: float
    noise_blur: float
    blur_mm: float
    ring: float
    streak: float
    metal: tuple[float, float, float] | None
    ray: float

    @property
    def tilt_degrees(self) -> float:
        """Angle between the slices' normal and the table."""
        return math.degrees(math.acos(min(1.0, np.cross(*self.orientation)[2])))


def draw_scan(
    head: Head, matrix: int, slice_spacing_mm: tuple[float, float], rng: np.random.Generator
) -> Scan:
    """Draw how one series is scanned.

    Args:
        head: who is scanned.
        matrix: rows and columns.
        slice_spacing_mm: lowest and highest distance of slices.
        rng: the only source of chance.
    """
    field_of_view_mm = rng.uniform(225, 255)
    pixel_mm = round(field_of_view_mm / matrix, 6)
    spacing_mm = round(rng.uniform(*slice_spacing_mm), 3)
    tilt = math.radians(rng.uniform(8, 24)) if rng.random() < 0.6 else 0.0
    orientation = np.array([[1, 0, 0], [0, math.cos(tilt), -math.sin(tilt)]]).round(6)

    # The gantry is tilted to follow the skull base: head and gantry lean the same way, nearly.
    roll, yaw, pitch = np.radians(rng.normal((0, 0, 0), (5, 3, 4)))
    rotation = _rotation(roll, yaw, -tilt + pitch)
    centre = rng.normal(0, (6, 8, 60))

    top_mm = head.semi_axes[2] + head.skull_mm + head.scalp_mm
    low_mm = rng.uniform(-32, -14)
    high_mm = top_mm + (rng.uniform(2, 10) if rng.random() < 0.12 else -rng.uniform(16, 32))
    along_mm = np.arange(low_mm, high_mm, spacing_mm)
    # The table moves along z whatever the tilt: a tilted stack is sheared, as real ones are. Where
    # it starts is chosen so that the middle slice shows the head in the middle.
    table_mm = along_mm[:, None] * (0, 0, 1) / np.cross(*orientation)[2]
    shear = (rotation[2] * along_mm.mean() - table_mm.mean(axis=0)) * (1, 1, 0)
    corner = -(matrix - 1) / 2 * pixel_mm * orientation.sum(axis=0)
    origin = (centre + shear + table_mm + corner).round(6)
    return Scan(
        pixel_mm=pixel_mm,
        slice_spacing_mm=spacing_mm,
        origin=origin,
        orientation=orientation,
        centre=centre,
        rotation=rotation,
        noise=rng.uniform(3, 9),
        noise_blur=rng.uniform(0.6, 1.0) * 512**-0.5 * matrix**0.5,
        blur_mm=rng.uniform(0.35, 0.6),
        ring=float(rng.triangular(0, 4, 16)),
        streak=float(rng.uniform(4, 28)),
        metal=_draw_metal(head, rng) if rng.random() < _METAL_SHARE else None,
        ray=rng.uniform(32, 50),
    )


def _draw_metal(head: Head, rng: np.random.Generator) -> tuple[float, float, float]:
    angle = rng.uniform(0, 2 * np.pi)
    point = head.surface_point(np.array([np.cos(angle), np.sin(angle), 0.0]))
    return (1.15 * point[0], 1.15 * point[1], rng.uniform(-10, 40))


def _rotation(roll: float, yaw: float, pitch: float) -> np.ndarray:
    """Return the rotation about z, then y, then x: float (3, 3)."""
    cz, sz, cy, sy = math.cos(roll), math.sin(roll), math.cos(yaw), math.sin(yaw)
    cx, sx = math.cos(pitch), math.sin(pitch)
    about_z = np.array([[cz, sz, 0], [-sz, cz, 0], [0, 0, 1]])
    about_y = np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cx, sx], [0, -sx, cx]])
    return about_x @ about_y @ about_z


def scan_slice(
    head: Head,
    bleeds: tuple[Bleed, ...],
    scan: Scan,
    index: int,
    mask: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Scan one slice and fill in its mask.

    Args:
        head, bleeds: the patient.
        scan: the series.
        index: of the slice, 0 is the most inferior.
        mask: uint8 (rows, columns) of zeros, filled in place.
        rng: for noise and streaks.

    Returns:
        float32 (rows, columns), HU; NaN outside the scanner's round field of view.
    """
    matrix = len(mask)
    image = np.full((matrix, matrix), AIR, np.float32)
    steps = scan.rotation @ scan.orientation.T * scan.pixel_mm  # per column and per row
    start = scan.rotation @ (scan.origin[index] - scan.centre)
    box = _head_box(head, start, steps, matrix)
    if box is not None:
        rows, columns = box
        i = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None]
        j = np.arange(columns.start, columns.stop, dtype=np.float32)
        place = HeadSlice(head, *(start[k] + steps[k, 0] * j + steps[k, 1] * i for k in range(3)))
        image[box] = _draw_tissue(place, bleeds, scan, mask[box])
        blur = scan.blur_mm / scan.pixel_mm
        image = cv2.GaussianBlur(image, (0, 0), max(blur, 0.3))
        if place.reaches(-42, -18):
            image[box] += _streaks(place, scan, rng)
        if scan.metal is not None:
            image[box] += _rays(place, scan, rng)
    noise = rng.standard_normal((matrix, matrix), np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), scan.noise_blur)
    image += noise * (scan.noise / float(noise.std()))
    middle = np.arange(matrix, dtype=np.float32) - (matrix - 1) / 2
    image[middle[:, None] ** 2 + middle**2 > (matrix / 2) ** 2] = np.nan
    return image


def _head_box(head: Head, start, steps, matrix: int) -> tuple[slice, slice] | None:
    """Return the rows and columns that can show the head, None above its top."""
    a, b, c = head.semi_axes
    margin = head.skull_mm + head.scalp_mm + 2
    # Where the head's axis meets the slice; the slice's height at the four corners.
    corners = start[:, None] + steps @ ((matrix - 1) * np.array([[0, 1, 0, 1], [0, 0, 1, 1]]))
    if corners[2].min() > c + margin:
        return None
    column, row = np.linalg.solve(steps[:2], -start[:2])
    half_columns = (a * (1 + head.egg) + margin + 12) / np.abs(steps[0, 0])
    half_rows = (b + margin + 12) / np.abs(steps[1, 1])
    edges = np.clip([row - half_rows, row + half_rows, column - half_columns,
                     column + half_columns], 0, matrix).astype(int)  # fmt: skip
    if edges[0] >= edges[1] or edges[2] >= edges[3]:
        return None
    return np.s_[edges[0] : edges[1], edges[2] : edges[3]]


def _blend(image: np.ndarray, value: float | np.ndarray, part: np.ndarray) -> None:
    image += part * (value - image)


def _draw_tissue(
    place: HeadSlice, bleeds: tuple[Bleed, ...], scan: Scan, mask: np.ndarray
) -> np.ndarray:
    """Return the noiseless image of the head in a box and fill in its mask."""
    head = place.head
    brain = _brain(place)
    for bleed in bleeds:  # within the brain and its hollows
        if bleed.subtype not in ("epidural", "subdural"):
            _bleed(brain, bleed, place, scan.pixel_mm, mask)
    _dura(brain, place)
    for bleed in bleeds:  # between brain and skull
        if bleed.subtype in ("epidural", "subdural"):
            _bleed(brain, bleed, place, scan.pixel_mm, mask)
    for blob in head.calcifications:
        _blob(brain, blob, place)
    brain += scan.ring * np.exp(np.minimum(-place.depth, 0) / 3.5)

    image = _outer_head(place)
    # A thick slice that grazes the vault shows a broad ring of half bone.
    edge = np.hypot(1.2 * scan.pixel_mm, 0.8 * scan.slice_spacing_mm * place.slope)
    inside = coverage(place.depth, np.maximum(edge, 1.0))
    _blend(image, brain, inside)
    _skull_base(image, place)
    mask |= (place.depth > 0).astype(np.uint8) << MASK_BITS.index("cavity")
    hollow = np.minimum(place.ventricles, place.depth)
    mask |= (hollow > 0).astype(np.uint8) << MASK_BITS.index("ventricles")
    return image


def _brain(place: HeadSlice) -> np.ndarray:
    """Return brain with its fluid spaces and vessels, as if it filled all space."""
    head = place.head
    cortex = np.minimum(place.depth, place.sulcus_distance) - 1.2 * head.atrophy
    grey_part = coverage(4.5 - cortex, 2.0) * coverage(place.depth * -1 + 24, 4.0)
    grey_part = np.maximum(grey_part, coverage(place.deep_grey, 2.0))
    if place.reaches(-70, 20):  # the cerebellum shows no white matter at this contrast
        below = np.minimum(place.y - 8, 10 - 0.62 * np.abs(place.x) - place.z)
        grey_part = np.maximum(grey_part, coverage(below, 4.0))
    brain = head.white + (head.grey - head.white) * grey_part
    if head.deep_hu:
        _blend(brain, head.deep_hu, coverage(place.deep_grey, 2.0))
    fissure = 0.4 + 1.6 * head.atrophy
    film = 0.5 + 2.0 * head.atrophy - place.depth
    fluid = np.maximum(np.maximum(place.sulci, film), place.falx + fissure + head.falx_mm / 2)
    fluid = np.maximum(np.maximum(fluid, place.cisterns), place.ventricles)
    _blend(brain, CSF, coverage(fluid, 1.4))
    if place.reaches(-32, -8):
        for vessel in head.vessels:
            _blob(brain, vessel, place)
    return brain


def _dura(brain: np.ndarray, place: HeadSlice) -> None:
    head = place.head
    _blend(brain, head.falx_hu, coverage(place.falx + head.falx_mm / 2, 1.2))
    if place.reaches(-30, 22):
        _blend(brain, head.tentorium_hu, coverage(place.tentorium + head.tentorium_mm / 2, 1.4))
    _blend(brain, head.sinus_hu, coverage(place.sinuses, 1.4))


def _bleed(
    brain: np.ndarray, bleed: Bleed, place: HeadSlice, pixel_mm: float, mask: np.ndarray
) -> None:
    extent = bleed_extent(bleed, place)
    if extent.max() < -8:
        return
    if bleed.rim_mm:
        rim = coverage(extent + bleed.rim_mm, 2.0) * (place.ventricles < 0)
        brain += OEDEMA_HU * rim
    drawn = (extent > 0) & (place.depth > 0)
    mask |= drawn.astype(np.uint8) << MASK_BITS.index(bleed.subtype)
    # A slice that only grazes a bleed is half brain: its cap fades below the area of a label.
    area_mm2 = np.count_nonzero(drawn) * pixel_mm**2
    _blend(brain, bleed.hu, coverage(extent, 1.2) * (1.0 if area_mm2 >= MIN_AREA_MM2 else 0.35))


def _blob(brain: np.ndarray, blob: Blob, place: HeadSlice) -> None:
    reach = blob.semi_axes[2] + 2
    if place.reaches(blob.centre[2] - reach, blob.centre[2] + reach):
        extent = place.ellipsoid(blob.centre, blob.semi_axes)
        _blend(brain, blob.hu, coverage(extent, 1.2))


def _outer_head(place: HeadSlice) -> np.ndarray:
    """Return skull and scalp around the vault, face and neck below the skull base."""
    head = place.head
    outer = -place.vault_depth  # distance outwards from the inner table
    middle = np.clip(1.6 - np.abs(outer / head.skull_mm - 0.5) * 4, 0, 1)
    bone = COMPACT_BONE + (DIPLOE - COMPACT_BONE) * middle
    image = np.where(outer > head.skull_mm + 0.55 * head.scalp_mm, np.float32(SKIN), FAT)
    _blend(image, AIR, coverage(outer - head.skull_mm - head.scalp_mm, 1.2))
    _blend(image, bone, coverage(head.skull_mm - outer, 1.0))
    return image


def _skull_base(image: np.ndarray, place: HeadSlice) -> None:
    """Draw what lies under the cavity: base plate, face, petrous bones, air cells, orbits."""
    if not place.reaches(-200, 0):
        return
    head, x, y, z = place.head, place.x, place.y, place.z
    across = np.abs(x)
    below = np.minimum(-place.base_height, place.vault_depth + head.skull_mm + 1)
    if below.max() > 0:
        soft = np.where(place.sulcus_distance < 2.2, np.float32(FAT), np.float32(MUSCLE))
        _blend(image, soft, coverage(below - 4, 2.0))
        _blend(image, 900, coverage(2.2 - np.abs(below - 2), 1.5))
        front = np.minimum(-38 - y, below - 3)
        cells = np.minimum(12 - across, front)
        _blend(image, np.where(np.sin(0.9 * x) > 0.75, 200, -850), coverage(cells, 1.0))
        sphenoid = place.ellipsoid((0, -22, -42), (13, 11, 9))
        _blend(image, 800, coverage(np.minimum(sphenoid + 1.5, below - 1), 1.0))
        _blend(image, -950, coverage(np.minimum(sphenoid, below - 2), 1.0))
        for side in (-1, 1):
            orbit = np.minimum(place.ellipsoid((side * 32, -58, -30), (16, 22, 16)), front + 2)
            _blend(image, 700, coverage(orbit + 2, 1.0))
            _blend(image, FAT, coverage(orbit, 1.0))
            globe = place.ellipsoid((side * 32, -66, -30), (12, 12, 12))
            _blend(image, 12, coverage(globe, 1.0))
    if place.reaches(-46, -18):
        petrous = 7 + 0.06 * across - np.hypot(y - 14 + 0.45 * (46 - across), z + 32)
        petrous = np.minimum(petrous, np.minimum(across - 15, place.vault_depth + 3))
        _blend(image, 1200, coverage(petrous, 1.5))
        mastoid = np.sin(1.1 * x) * np.sin(1.3 * y + z)
        cells = np.minimum(petrous - 1.5, across - 44)
        _blend(image, -600, coverage(np.minimum(cells, mastoid * 4), 1.0))


def _streaks(place: HeadSlice, scan: Scan, rng: np.random.Generator) -> np.ndarray:
    """Return bright and dark bands between the petrous bones: float32 (rows, columns), HU."""
    level = np.exp(-(((place.z + 31) / 7) ** 2) - (place.x / 42) ** 2)
    phase = rng.uniform(0, 2 * np.pi)
    slant = rng.normal(0, 0.15)
    bands = np.cos((place.y + slant * place.x) * rng.uniform(0.3, 0.7) + phase)
    return scan.streak * bands * level * np.exp(-(((place.y - 8) / 24) ** 2))


def _rays(place: HeadSlice, scan: Scan, rng: np.random.Generator) -> np.ndarray:
    """Return bright straight rays from a piece of metal: float32 (rows, columns), HU."""
    x, y, z = scan.metal
    strength = scan.ray * math.exp(-(((float(place.z.mean()) - z) / 55) ** 2))
    towards_middle = math.atan2(-y, -x)
    rays = np.zeros_like(place.x)
    for _ in range(rng.integers(4, 8)):
        angle = towards_middle + rng.uniform(-0.7, 0.7)
        across = (place.x - x) * math.sin(angle) - (place.y - y) * math.cos(angle)
        profile = np.clip(2 - 2 * np.abs(across) / rng.uniform(2.5, 5.0), 0, 1)
        rays = np.maximum(rays, profile * (strength * rng.uniform(0.7, 1)))
    return rays
