"""The five kinds of bleed in the synthetic head: their position and the voxels they fill.

Shapes follow the anatomy that distinguishes the subtypes: epidural blood is a lens that strips the
dura from the skull, subdural blood a crescent that spreads over one hemisphere and stops at the
falx, subarachnoid blood takes the shape of sulci and cisterns, intraventricular blood settles in
the back of the ventricles or casts them, intraparenchymal blood is a lump with a rim of oedema.

Source: the definitions given to the readers of the RSNA 2019 data set (Flanders et al.,
Radiology: Artificial Intelligence 2020;2(3):e190211, doi 10.1148/ryai.2020190211, table 1).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ich_keras.phantom.head import Head
from ich_keras.phantom.head_slice import HeadSlice

MIN_BLEED_HU, MAX_BLEED_HU = 50.0, 80.0
OEDEMA_HU = -10.0  # difference from the brain around it
_CONTRAST_HU = 16.0  # least difference from this patient's grey matter
_LAYERED = {"subdural": 0.25, "intraparenchymal": 0.08}  # share of bleeds of mixed age


@dataclass(frozen=True)
class Bleed:
    """One bleed of one patient, in the head frame.

    Args:
        subtype: a name of `labels.SUBTYPES`.
        kind: its form within the subtype: convexity, falx, cisterns, sulci, layered, cast, ...
        hu: its value before noise, blur and artefacts, 50-80.
        side: -1 right, +1 left, 0 both.
        centre: x, y, z, mm; on the inner table for extra-axial bleeds.
        size: three lengths, mm; the extent function of the subtype says what they mean.
        rim_mm: width of the oedema, 0 for none.
        mottle: HU by which its value varies from place to place.
        old_hu: HU of the older part that floats above the level; 0 if all blood is fresh.
        level_mm: y of that level in the head frame.
    """

    subtype: str
    kind: str
    hu: float
    side: int
    centre: tuple[float, float, float]
    size: tuple[float, float, float]
    rim_mm: float = 0.0
    mottle: float = 0.0
    old_hu: float = 0.0
    level_mm: float = 0.0

    @property
    def push_mm(self) -> float:
        """How far it pushes the midline, away from its own side."""
        if self.subtype in ("epidural", "subdural") and self.kind == "convexity":
            return 0.55 * self.size[0]
        if self.subtype == "intraparenchymal" and self.kind != "cerebellar":
            return max(0.0, float(np.prod(self.size)) ** (1 / 3) - 8) * 0.5
        return 0.0


def draw_bleed(subtype: str, head: Head, rng: np.random.Generator) -> Bleed:
    """Draw a bleed of one subtype in a head."""
    lowest = max(MIN_BLEED_HU + 2, head.grey + _CONTRAST_HU)
    hu = float(rng.triangular(lowest, min(lowest + 6, MAX_BLEED_HU - 4), MAX_BLEED_HU))
    bleed = _DRAW[subtype](head, hu, int(rng.choice((-1, 1))), rng)
    bleed = replace(bleed, mottle=rng.uniform(0, 5))
    if subtype in _LAYERED and rng.random() < _LAYERED[subtype]:
        level_mm = bleed.centre[1] - rng.uniform(0, 0.5) * max(bleed.size)
        bleed = replace(bleed, old_hu=rng.uniform(30, 44), level_mm=level_mm)
    return bleed


def bleed_extent(bleed: Bleed, place: HeadSlice) -> np.ndarray:
    """Return the extent of a bleed in a slice: float32 (rows, columns), mm, positive inside."""
    return _EXTENT[bleed.subtype](bleed, place)


def _draw_epidural(head: Head, hu: float, side: int, rng: np.random.Generator) -> Bleed:
    # Mostly under the temporal and parietal bone, where the middle meningeal artery runs.
    direction = np.array([side * 0.85, rng.uniform(-0.55, 0.55), rng.uniform(-0.1, 0.55)])
    point = head.surface_point(direction / np.linalg.norm(direction))
    size = (rng.triangular(8, 12, 24), rng.uniform(22, 34), 0.0)
    return Bleed("epidural", "convexity", hu, side, tuple(point), size)


def _epidural_extent(bleed: Bleed, place: HeadSlice) -> np.ndarray:
    """size: greatest thickness and radius of the contact with the skull, mm."""
    thickness_mm, radius_mm, _ = bleed.size
    x, y, z = bleed.centre
    along = (place.x - x) ** 2 + (place.y - y) ** 2 + (place.z - z) ** 2 - place.depth**2
    lens = thickness_mm * (1 - np.maximum(along, 0) / radius_mm**2)
    return np.minimum(place.depth, lens - place.depth)


def _draw_subdural(head: Head, hu: float, side: int, rng: np.random.Generator) -> Bleed:
    if rng.random() < 0.06:
        size = (rng.uniform(5, 8), rng.uniform(30, 45), 0.0)
        centre = (0.0, rng.choice((-35.0, 40.0)), rng.uniform(25, 40))
        return Bleed("subdural", "falx", hu, side, centre, size)
    direction = np.array([side * 0.85, rng.uniform(-0.35, 0.35), rng.uniform(0.1, 0.5)])
    point = head.surface_point(direction / np.linalg.norm(direction))
    size = (rng.triangular(4, 7, 14), rng.uniform(44, 64), rng.uniform(28, 44))
    return Bleed("subdural", "convexity", hu, side, tuple(point), size)


def _subdural_extent(bleed: Bleed, place: HeadSlice) -> np.ndarray:
    """size: greatest thickness, reach along the skull front to back, reach up and down, mm."""
    thickness_mm, length_mm, height_mm = bleed.size
    _, y, z = bleed.centre
    own_side = bleed.side * place.x
    if bleed.kind == "falx":
        ellipse = np.hypot(place.y - y, place.z - z) / length_mm
        sheet = np.minimum(own_side, thickness_mm * np.minimum(2 - 2 * ellipse, 1) - own_side)
        return np.minimum(np.minimum(sheet, place.depth), place.falx + np.abs(place.x) + 0.5)
    reach = ((place.y - y) / length_mm) ** 2 + ((place.z - z) / height_mm) ** 2
    crescent = thickness_mm * np.minimum(1.6 - 1.6 * reach, 1)
    extent = np.minimum(place.depth, crescent - place.depth)
    return np.minimum(extent, own_side - 3)


def _draw_subarachnoid(head: Head, hu: float, side: int, rng: np.random.Generator) -> Bleed:
    kind = str(rng.choice(("sulci", "cisterns", "both"), p=(0.4, 0.25, 0.35)))
    direction = np.array([side * 0.8, rng.uniform(-0.8, 0.8), rng.uniform(-0.05, 0.7)])
    point = head.surface_point(direction / np.linalg.norm(direction))
    size = (rng.uniform(1.3, 2.2), rng.uniform(24, 40), rng.uniform(0.6, 1.8))
    return Bleed("subarachnoid", kind, hu, 0, tuple(point), size)


def _subarachnoid_extent(bleed: Bleed, place: HeadSlice) -> np.ndarray:
    """size: half-width of the filled sulci, radius of the region, widening of the cisterns, mm."""
    half_width_mm, radius_mm, widening_mm = bleed.size
    extent = np.full_like(place.x, -10)
    if bleed.kind != "cisterns":
        x, y, z = bleed.centre
        near = radius_mm - np.sqrt((place.x - x) ** 2 + (place.y - y) ** 2 + (place.z - z) ** 2)
        width = half_width_mm * np.clip(near / 10, -1, 1)
        extent = np.minimum(width - place.sulcus_distance, 22 - place.depth)
        # A film on the surface joins the sulci, thinner than what they hold.
        extent = np.maximum(extent, np.minimum(0.6 * width, width - place.depth))
        extent = np.minimum(extent, np.minimum(near, place.base_height - 3))
    if bleed.kind != "sulci":
        extent = np.maximum(extent, place.cisterns + widening_mm)
    return np.minimum(extent, place.depth - 0.3)


def _draw_intraventricular(head: Head, hu: float, side: int, rng: np.random.Generator) -> Bleed:
    kind = str(rng.choice(("layered", "cast", "full"), p=(0.4, 0.35, 0.25)))
    level = rng.uniform(6, 18)
    return Bleed(
        "intraventricular", kind, hu, side if kind == "cast" else 0, (0.0, level, 0.0), (0, 0, 0)
    )


def _intraventricular_extent(bleed: Bleed, place: HeadSlice) -> np.ndarray:
    """kind: layered behind the level centre[1], the cast of one side, or all ventricles full."""
    if bleed.kind == "full":
        return place.ventricles
    upper = np.minimum(place.ventricles, place.z + 18)  # without the fourth ventricle
    if bleed.kind == "layered":  # the patient lies on the back: blood sinks to posterior
        return np.minimum(upper, place.y - bleed.centre[1])
    return np.minimum(upper, bleed.side * place.x + 2.5)


def _draw_intraparenchymal(head: Head, hu: float, side: int, rng: np.random.Generator) -> Bleed:
    kind = str(rng.choice(("deep", "lobar", "cerebellar"), p=(0.45, 0.42, 0.13)))
    # From a small contusion to a haematoma of 80 ml.
    size = rng.triangular(7, 10.5, 25) * rng.uniform(0.8, 1.25, 3)
    if kind == "deep":
        centre = rng.normal((side * 23, 0, 8), (3, 6, 4))
    elif kind == "lobar":
        direction = rng.normal((side * 0.7, 0, 0.4), (0.1, 0.6, 0.2))
        centre = head.surface_point(direction / np.linalg.norm(direction)) * rng.uniform(0.5, 0.66)
    else:
        centre = rng.normal((side * 20, 46, -26), (4, 3, 3))
        size = np.minimum(size, 15)
    return Bleed(
        "intraparenchymal", kind, hu, side, tuple(centre), tuple(size), rng.uniform(2.5, 7)
    )


def _intraparenchymal_extent(bleed: Bleed, place: HeadSlice) -> np.ndarray:
    """size: semi-axes of the lump before its outline is made irregular, mm."""
    lump = place.ellipsoid(bleed.centre, bleed.size)
    # The field of the sulci is irregular on the scale of a lump: reuse it for the outline.
    lump = lump + 1.1 * np.minimum(place.sulcus_distance, 5) - 2.2
    return np.minimum(lump, place.depth - 3)


_DRAW: dict[str, Callable[[Head, float, int, np.random.Generator], Bleed]] = {
    "epidural": _draw_epidural,
    "intraparenchymal": _draw_intraparenchymal,
    "intraventricular": _draw_intraventricular,
    "subarachnoid": _draw_subarachnoid,
    "subdural": _draw_subdural,
}
_EXTENT: dict[str, Callable[[Bleed, HeadSlice], np.ndarray]] = {
    "epidural": _epidural_extent,
    "intraparenchymal": _intraparenchymal_extent,
    "intraventricular": _intraventricular_extent,
    "subarachnoid": _subarachnoid_extent,
    "subdural": _subdural_extent,
}
