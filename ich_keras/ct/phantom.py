"""Synthetic head CT with known bleeds of all five subtypes: images, masks and labels.

Phantoms exercise the whole road from DICOM to a trained model without any patient's data. They
are synthetic: nothing measured on them says anything about real heads. What makes them more than
a game of counting bright voxels: every head has its own offset, noise, dura, sinuses, dense
vessels, calcifications, streaks and bright ring under the skull, whether it bleeds or not.

`phantom_head` is the anatomy, `phantom_bleeds` the blood, this module the scan of both, and
`phantom_dicom` writes the files.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from ich_keras.ct.phantom_bleeds import OEDEMA_HU, Bleed, bleed_extent, draw_bleed
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
    draw_head,
)
from ich_keras.errors import UsageError
from ich_keras.labels import SUBTYPES

# A subtype is labelled on a slice when its mask covers at least this much of it.
MIN_AREA_MM2 = 80.0
# Bit k of a mask stands for MASK_BITS[k]; the last two are anatomy, kept to check the blood by.
MASK_BITS = (*SUBTYPES, "ventricles", "cavity")


@dataclass(frozen=True)
class Encoding:
    """How HU are stored in a file.

    Args:
        bits_stored: 12 or 16 (DICOM 0028,0101).
        is_signed: pixel representation (0028,0103).
        intercept: rescale intercept (0028,1052); the slope is 1.
        padding_hu: value outside the scanner's field of view.
        low_hu, high_hu: what can be stored without loss.
    """

    bits_stored: int
    is_signed: bool
    intercept: int
    padding_hu: int
    low_hu: int
    high_hu: int


# Source of the first four: 78,545 headers of the RSNA 2019 data set. The last one is the known
# fault of that set: values below zero have wrapped around at 4096.
ENCODINGS = {
    "signed-16": Encoding(16, True, -1024, -3024, -3024, 31743),
    "unsigned-12": Encoding(12, False, -1024, -1024, -1024, 3071),
    "signed-12": Encoding(12, True, 0, -2000, -2048, 2047),
    "unsigned-12-at-1000": Encoding(12, False, -1000, -1000, -1000, 3095),
    "wrapped-12": Encoding(12, False, 0, -1000, -1000, 3095),
}
_METAL_SHARE = 0.5  # of the series, in health as in bleeding
_ENCODING_PERIOD = 100  # of as many series in a row four have a rare encoding: 96 % do not


@dataclass(frozen=True)
class PhantomSpec:
    """What one series shall show; all the rest follows from the seed.

    Args:
        seed: of the data set.
        patient: number of the patient: same head and same bleeds for all series.
        series: number of the series within the data set: own pose, noise and spacing.
        subtypes: the patient's bleeds, one each; empty for none.
        encoding: key of `ENCODINGS`.
        matrix: rows and columns of a slice.
        slice_spacing_mm: lowest and highest distance of slices along the table.
    """

    seed: int
    patient: int
    series: int
    subtypes: tuple[str, ...] = ()
    encoding: str = "signed-16"
    matrix: int = 512
    slice_spacing_mm: tuple[float, float] = (5.0, 8.0)

    def __post_init__(self):
        unknown = [name for name in self.subtypes if name not in SUBTYPES]
        if unknown:
            raise UsageError(f"unknown subtype {unknown[0]!r}.", f"Known: {', '.join(SUBTYPES)}.")
        if self.encoding not in ENCODINGS:
            raise UsageError(
                f"unknown encoding {self.encoding!r}.", f"Known: {', '.join(ENCODINGS)}."
            )
        if self.matrix < 32:
            raise UsageError(f"matrix is {self.matrix}; expected at least 32.")
        low, high = self.slice_spacing_mm
        if not 0.5 <= low <= high:
            raise UsageError(
                f"slice spacing is {low} to {high} mm; expected 0.5 <= lowest <= highest."
            )


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


@dataclass(frozen=True)
class Phantom:
    """One synthetic series.

    Args:
        spec: what was asked for.
        hu: int16 (slices, rows, columns), HU, inferior to superior, as the encoding can hold it.
        masks: uint8 (slices, rows, columns), bit k for `MASK_BITS[k]`.
        scan: geometry and image quality.
        bleeds: what was drawn, in the head frame.
    """

    spec: PhantomSpec
    hu: np.ndarray
    masks: np.ndarray
    scan: Scan
    bleeds: tuple[Bleed, ...]

    def mask(self, name: str) -> np.ndarray:
        """Return the mask of a subtype, "ventricles" or "cavity": bool (slices, rows, columns)."""
        return (self.masks >> MASK_BITS.index(name)) & 1 == 1

    def labels(self) -> np.ndarray:
        """Return the labels: int8 (slices, 6) in the order of `labels.LABELS`."""
        pixels = np.stack([self.mask(name).sum(axis=(1, 2)) for name in SUBTYPES], axis=1)
        subtypes = pixels * self.scan.pixel_mm**2 >= MIN_AREA_MM2
        return np.hstack([subtypes, subtypes.any(axis=1, keepdims=True)]).astype(np.int8)

    def volume_ml(self, name: str) -> float:
        """Return the volume of a mask in this series."""
        voxel_mm3 = self.scan.pixel_mm**2 * self.scan.slice_spacing_mm
        return float(self.mask(name).sum() * voxel_mm3 / 1000)


def plan_phantoms(
    num_series: int,
    seed: int,
    matrix: int = 512,
    prevalence: float = 0.5,
    slice_spacing_mm: tuple[float, float] = (5.0, 8.0),
) -> list[PhantomSpec]:
    """Plan a data set: which patient has which series and which bleeds.

    Bleeds are spread evenly: in a row of patients each fifth bleeder has the same main subtype, and
    each of the other four with a chance of 1/4, so two subtypes on average.

    Args:
        num_series: how many series; about one patient in four has two or three.
        seed: of the data set.
        matrix: rows and columns of a slice.
        prevalence: part of the patients that bleed.
        slice_spacing_mm: lowest and highest distance of slices.
    """
    if num_series < 1:
        raise UsageError(f"{num_series} series asked for; expected at least 1.")
    if not 0 <= prevalence <= 1:
        raise UsageError(f"prevalence is {prevalence}; expected 0 to 1.")
    if seed < 0:
        raise UsageError(f"seed is {seed}; expected 0 or more.")
    rng = np.random.default_rng(np.random.SeedSequence([seed, num_series]))
    main_subtypes = rng.permutation(SUBTYPES)
    specs: list[PhantomSpec] = []
    patient = bleeders = 0
    while len(specs) < num_series:
        subtypes: tuple[str, ...] = ()
        if math.floor((patient + 1) * prevalence) > math.floor(patient * prevalence):
            chosen = {main_subtypes[bleeders % len(SUBTYPES)]}
            chosen |= {name for name in SUBTYPES if rng.random() < 0.25}
            subtypes = tuple(name for name in SUBTYPES if name in chosen)
            bleeders += 1
        for _ in range(int(rng.choice((1, 2, 3), p=(0.75, 0.2, 0.05)))):
            rare = len(specs) % _ENCODING_PERIOD
            encoding = list(ENCODINGS)[rare if rare < len(ENCODINGS) else 0]
            specs.append(
                PhantomSpec(seed, patient, len(specs), subtypes, encoding, matrix, slice_spacing_mm)
            )
        patient += 1
    return specs[:num_series]


def make_phantom(spec: PhantomSpec) -> Phantom:
    """Draw one series; the same spec gives the same numbers.

    Args:
        spec: patient, series, bleeds, encoding and size.
    """
    of_patient = np.random.default_rng(np.random.SeedSequence([spec.seed, spec.patient]))
    of_series = np.random.default_rng(
        np.random.SeedSequence([spec.seed, spec.patient, spec.series])
    )
    head, bleeds = draw_patient(spec.subtypes, of_patient)
    scan = _draw_scan(head, spec, of_series)
    num_slices = len(scan.origin)
    hu = np.empty((num_slices, spec.matrix, spec.matrix), np.int16)
    masks = np.zeros(hu.shape, np.uint8)
    for index in range(num_slices):
        image = _scan_slice(head, bleeds, scan, index, masks[index], of_series)
        hu[index] = _digitise(image, ENCODINGS[spec.encoding])
    return Phantom(spec, hu, masks, scan, bleeds)


def draw_patient(
    subtypes: tuple[str, ...], rng: np.random.Generator
) -> tuple[Head, tuple[Bleed, ...]]:
    """Draw a patient's head and bleeds; bleeds with mass effect shift the midline."""
    pushes = {"epidural", "subdural", "intraparenchymal"} & set(subtypes)
    shift_mm = float(rng.uniform(-7, 7)) if pushes else 0.0
    head = draw_head(rng, "intraventricular" in subtypes, shift_mm)
    return head, tuple(draw_bleed(name, head, rng) for name in subtypes)


def _draw_scan(head: Head, spec: PhantomSpec, rng: np.random.Generator) -> Scan:
    field_of_view_mm = rng.uniform(225, 255)
    pixel_mm = round(field_of_view_mm / spec.matrix, 6)
    spacing_mm = round(rng.uniform(*spec.slice_spacing_mm), 3)
    tilt = math.radians(rng.uniform(8, 24)) if rng.random() < 0.6 else 0.0
    orientation = np.array([[1, 0, 0], [0, math.cos(tilt), -math.sin(tilt)]]).round(6)

    # The gantry is tilted to follow the skull base: head and gantry lean the same way, nearly.
    roll, yaw, pitch = np.radians(rng.normal((0, 0, 0), (5, 3, 4)))
    rotation = _rotation(roll, yaw, -tilt + pitch)
    centre = rng.normal(0, (6, 8, 60))

    top_mm = head.semi_axes[2] + head.skull_mm + head.scalp_mm
    low_mm = rng.uniform(-38, -22)
    high_mm = top_mm + (rng.uniform(2, 12) if rng.random() < 0.3 else -rng.uniform(8, 24))
    along_mm = np.arange(low_mm, high_mm, spacing_mm)
    # The table moves along z whatever the tilt: a tilted stack is sheared, as real ones are. Where
    # it starts is chosen so that the middle slice shows the head in the middle.
    table_mm = along_mm[:, None] * (0, 0, 1) / np.cross(*orientation)[2]
    shear = (rotation[2] * along_mm.mean() - table_mm.mean(axis=0)) * (1, 1, 0)
    corner = -(spec.matrix - 1) / 2 * pixel_mm * orientation.sum(axis=0)
    origin = (centre + shear + table_mm + corner).round(6)
    return Scan(
        pixel_mm=pixel_mm,
        slice_spacing_mm=spacing_mm,
        origin=origin,
        orientation=orientation,
        centre=centre,
        rotation=rotation,
        noise=rng.uniform(3, 9),
        noise_blur=rng.uniform(0.6, 1.0) * 512**-0.5 * spec.matrix**0.5,
        blur_mm=rng.uniform(0.35, 0.6),
        ring=float(rng.triangular(0, 5, 24)),
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


def _scan_slice(
    head: Head,
    bleeds: tuple[Bleed, ...],
    scan: Scan,
    index: int,
    mask: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return the image of one slice, float32 (rows, columns), NaN for padding; fill in its mask."""
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
            _bleed(brain, bleed, place, mask)
    _dura(brain, place)
    for bleed in bleeds:  # between brain and skull
        if bleed.subtype in ("epidural", "subdural"):
            _bleed(brain, bleed, place, mask)
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


def _bleed(brain: np.ndarray, bleed: Bleed, place: HeadSlice, mask: np.ndarray) -> None:
    extent = bleed_extent(bleed, place)
    if extent.max() < -8:
        return
    if bleed.rim_mm:
        rim = coverage(extent + bleed.rim_mm, 2.0) * (place.ventricles < 0)
        brain += OEDEMA_HU * rim
    _blend(brain, bleed.hu, coverage(extent, 1.2))
    drawn = (extent > 0) & (place.depth > 0)
    mask |= drawn.astype(np.uint8) << MASK_BITS.index(bleed.subtype)


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
    for _ in range(rng.integers(2, 6)):
        angle = towards_middle + rng.uniform(-0.7, 0.7)
        across = (place.x - x) * math.sin(angle) - (place.y - y) * math.cos(angle)
        profile = np.clip(2 - 2 * np.abs(across) / rng.uniform(2.0, 5.0), 0, 1)
        rays = np.maximum(rays, profile * (strength * rng.uniform(0.7, 1)))
    return rays


def _digitise(image: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Round to whole HU that the encoding can hold: float32 with NaN for padding -> int16."""
    filled = np.where(np.isnan(image), np.float32(encoding.padding_hu), np.maximum(image, -1024))
    return np.clip(np.rint(filled), encoding.low_hu, encoding.high_hu).astype(np.int16)
