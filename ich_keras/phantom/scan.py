"""The scan of a synthetic head: pose, spacing, image quality, and the pixels of its slices."""

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from ich_keras.phantom.bleeds import Bleed
from ich_keras.phantom.brain import draw_inside
from ich_keras.phantom.head import AIR, Head
from ich_keras.phantom.head_slice import HeadSlice, coverage
from ich_keras.phantom.skull import blend, outer_head, skull_base, upsample

# Soft tissue is drawn on a grid of about this size and interpolated. Scanners resolve no finer
# detail in it, and it takes a quarter of the time.
_COARSE_MM = 0.95
_AIR_NOISE = 0.45  # noise beside the head, relative to that in its middle
_METAL_SHARE = 0.12  # share of series with metal, the same with and without bleeds


@dataclass(frozen=True)
class Holder:
    """The shell on the table that the head rests in, along the whole table.

    Args:
        centre: x, y, mm, LPS.
        semi_axes: of its inner side, mm.
        rim: how far up it reaches: the sine of the angle, 0 is the height of its centre.
        wall_mm, hu: of the shell.
        is_padded: foam between shell and head.
    """

    centre: tuple[float, float]
    semi_axes: tuple[float, float]
    rim: float
    wall_mm: float
    hu: float
    is_padded: bool


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
        noise, noise_blur: HU in the middle of the head; correlation of the noise, pixels.
        sharpness: 0 (soft kernel) to 0.8: how much of the noise's slow part the kernel takes out.
        blur_mm: resolution.
        ring: HU added at the inner table, fading inwards (beam hardening, thick slices).
        streak: HU of the bands between the petrous bones.
        metal: head coordinates of a clip or electrode on the skull that throws rays, mm, or None.
        ray: HU of the brightest rays.
        holder: of the head; None without one.
    """

    pixel_mm: float
    slice_spacing_mm: float
    origin: np.ndarray
    orientation: np.ndarray
    centre: np.ndarray
    rotation: np.ndarray
    noise: float
    noise_blur: float
    sharpness: float
    blur_mm: float
    ring: float
    streak: float
    metal: tuple[float, float, float] | None
    ray: float
    holder: "Holder | None"

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
        rng: the only source of randomness.
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
    low_mm = rng.uniform(-40, -14)
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
        noise=rng.uniform(2.2, 6.5),
        noise_blur=rng.uniform(0.6, 1.1) * 512**-0.5 * matrix**0.5,
        sharpness=rng.uniform(0, 0.8),
        blur_mm=rng.uniform(0.35, 0.6),
        ring=float(rng.triangular(0, 6, 20)),
        streak=float(rng.uniform(4, 28)),
        metal=_draw_metal(head, rng) if rng.random() < _METAL_SHARE else None,
        ray=rng.uniform(18, 36),
        holder=_draw_holder(head, centre, rng),
    )


def _draw_holder(head: Head, centre: np.ndarray, rng: np.random.Generator) -> Holder | None:
    if rng.random() < 0.1:
        return None
    a, b, _ = head.semi_axes
    around = head.skull_mm + head.scalp_mm
    is_cradle = rng.random() < 0.6
    wide = a + around + rng.uniform(10, 26)
    deep = b + around + (rng.uniform(4, 12) if is_cradle else rng.uniform(12, 24))
    return Holder(
        centre=(float(centre[0] + rng.normal(0, 4)), float(centre[1] + rng.uniform(0, 6))),
        semi_axes=(wide, deep),
        rim=rng.uniform(-0.1, 0.35) if is_cradle else rng.uniform(0.4, 0.7),
        wall_mm=rng.uniform(2.0, 3.6),
        hu=rng.uniform(60, 450),
        is_padded=bool(rng.random() < 0.5),
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
    image = _table(scan, index, matrix)
    quantum = np.full_like(image, _AIR_NOISE)
    steps = scan.rotation @ scan.orientation.T * scan.pixel_mm  # per column and per row
    start = scan.rotation @ (scan.origin[index] - scan.centre)
    factor = max(1, round(_COARSE_MM / scan.pixel_mm))
    box = _head_box(head, start, steps, matrix, factor)
    place = None
    if box is not None:
        place = _coarse_slice(head, start, steps, box, factor)
        image[box] = _draw_head(place, bleeds, scan, image[box], mask[box])
        # Most photons are lost on the longest way, through the middle of the head.
        inside = np.clip((place.vault_depth + 25) / 45, 0, 1)
        inside = _AIR_NOISE + (1 - _AIR_NOISE) * inside
        quantum[box] = upsample(inside, image[box].shape)
    blur = scan.blur_mm / scan.pixel_mm
    image = cv2.GaussianBlur(image, (0, 0), max(blur, 0.3))
    noise = _noise(scan, matrix, rng)
    if place is not None:
        faults = np.zeros_like(place.x)
        if place.reaches(-44, -18):
            faults += _streaks(place, scan, rng)
        if scan.metal is not None:
            faults += _rays(place, scan, rng)
        if faults.any():
            image[box] += upsample(faults, image[box].shape)
    image += noise * quantum
    middle = np.arange(matrix, dtype=np.float32) - (matrix - 1) / 2
    image[middle[:, None] ** 2 + middle**2 > (matrix / 2) ** 2] = np.nan
    return image


def _coarse_slice(
    head: Head, start: Any, steps: Any, box: tuple[slice, slice], factor: int
) -> HeadSlice:
    """Return the geometry of a box of pixels, one point for factor x factor of them."""
    middle = (factor - 1) / 2
    rows, columns = (
        np.arange(side.start + middle, side.stop, factor, dtype=np.float32) for side in box
    )
    xyz = (
        (start[k] + steps[k, 1] * rows)[:, None] + (steps[k, 0] * columns)[None, :]
        for k in range(3)
    )
    return HeadSlice(head, *(coordinate.astype(np.float32) for coordinate in xyz))


def _noise(scan: Scan, matrix: int, rng: np.random.Generator) -> np.ndarray:
    """Return noise with the texture of the kernel: float32 (rows, columns), HU."""
    white = rng.standard_normal((matrix, matrix), np.float32)
    noise = cv2.GaussianBlur(white, (0, 0), scan.noise_blur)
    if scan.sharpness > 0.1:
        noise -= scan.sharpness * cv2.GaussianBlur(noise, (0, 0), 2.2 * scan.noise_blur)
    return noise * (scan.noise / float(noise.std()))


def _table(scan: Scan, index: int, matrix: int) -> np.ndarray:
    """Return the empty scanner with its head holder: float32 (rows, columns), HU."""
    image = np.full((matrix, matrix), AIR, np.float32)
    holder = scan.holder
    if holder is None:
        return image
    x = scan.origin[index][0] + scan.orientation[0, 0] * scan.pixel_mm * np.arange(matrix)
    y = scan.origin[index][1] + scan.orientation[1, 1] * scan.pixel_mm * np.arange(matrix)
    u = ((x - holder.centre[0]) / holder.semi_axes[0]).astype(np.float32)
    v = ((y - holder.centre[1]) / holder.semi_axes[1]).astype(np.float32)
    first = int(np.searchsorted(v, holder.rim))
    if first == matrix:
        return image
    below = image[first:]
    radius = np.hypot(u[None, :], v[first:, None])
    outwards = (radius - 1) * min(holder.semi_axes)
    if holder.is_padded:
        blend(below, -960.0, coverage(np.minimum(-outwards, 14 + outwards), 2.0))
    wall = np.minimum(outwards, holder.wall_mm - outwards)
    blend(below, holder.hu, coverage(wall, 1.0))
    return image


def _head_box(
    head: Head, start: Any, steps: Any, matrix: int, factor: int
) -> tuple[slice, slice] | None:
    """Return the rows and columns that can show the head, None above its top.

    Their numbers are multiples of a factor.
    """
    a, b, c = head.semi_axes
    margin = 1.6 * head.skull_mm + 1.4 * head.scalp_mm + head.swelling[3] + 2
    # Where the head's axis meets the slice; the slice's height at the four corners.
    corners = start[:, None] + steps @ ((matrix - 1) * np.array([[0, 1, 0, 1], [0, 0, 1, 1]]))
    if corners[2].min() > c + margin:
        return None
    column, row = np.linalg.solve(steps[:2], -start[:2])
    half_columns = (a * (1.06 + head.egg) + margin + head.muscle_mm) / np.abs(steps[0, 0])
    half_rows = (1.06 * b + margin + 1.5 * head.muscle_mm) / np.abs(steps[1, 1])
    edges = np.clip([row - half_rows, row + half_rows, column - half_columns,
                     column + half_columns], 0, matrix // factor * factor).astype(int)  # fmt: skip
    edges -= edges % factor
    if edges[0] >= edges[1] or edges[2] >= edges[3]:
        return None
    return np.s_[edges[0] : edges[1], edges[2] : edges[3]]


def _draw_head(
    place: HeadSlice,
    bleeds: tuple[Bleed, ...],
    scan: Scan,
    background: np.ndarray,
    mask: np.ndarray,
) -> np.ndarray:
    """Return the noiseless image of the head in a box and fill in its mask."""

    def fine(values: np.ndarray) -> np.ndarray:
        return upsample(values, mask.shape)

    brain = draw_inside(place, bleeds, scan.ring, scan.pixel_mm, fine, mask)
    # A thick slice that grazes the vault shows a broad ring of half bone.
    slanted = 0.8 * scan.slice_spacing_mm * place.slope
    image = outer_head(place, background, scan.pixel_mm, slanted)
    edge = np.hypot(1.2 * scan.pixel_mm, fine(slanted))
    blend(image, fine(brain), coverage(fine(place.depth), np.maximum(edge, 1.0)))
    base = skull_base(place)
    if base is not None:
        blend(image, *(fine(part) for part in base))
    return image


def _streaks(place: HeadSlice, scan: Scan, rng: np.random.Generator) -> np.ndarray:
    """Return bright and dark bands between the petrous bones: float32 (rows, columns), HU."""
    level = np.exp(-(((place.z + 31) / 7) ** 2) - (place.x / 42) ** 2)
    phase = rng.uniform(0, 2 * np.pi)
    slant = rng.normal(0, 0.15)
    bands = np.cos((place.y + slant * place.x) * rng.uniform(0.3, 0.7) + phase)
    return scan.streak * bands * level * np.exp(-(((place.y - 8) / 24) ** 2))


def _rays(place: HeadSlice, scan: Scan, rng: np.random.Generator) -> np.ndarray:
    """Return bright straight rays from a piece of metal: float32 (rows, columns), HU."""
    assert scan.metal is not None  # drawn only where there is a piece
    x, y, z = scan.metal
    strength = scan.ray * math.exp(-(((float(place.z.mean()) - z) / 55) ** 2))
    towards_middle = math.atan2(-y, -x)
    rays = np.zeros_like(place.x)
    for _ in range(rng.integers(5, 12)):
        angle = towards_middle + rng.uniform(-0.9, 0.9)
        across = (place.x - x) * math.sin(angle) - (place.y - y) * math.cos(angle)
        across = across / rng.uniform(1.2, 3.0)
        # Bright with dark seams: what a ray loses its neighbours get.
        profile = np.exp(-(across**2)) - 0.5 * np.exp(-((np.abs(across) - 2) ** 2))
        rays += profile * (strength * rng.uniform(0.5, 1))
    return rays
