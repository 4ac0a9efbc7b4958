"""The inside of the synthetic skull: brain, its fluid and lesions, dura and blood."""

from collections.abc import Callable

import numpy as np

from ich_keras.labels import SUBTYPES
from ich_keras.phantom.bleeds import OEDEMA_HU, Bleed, bleed_extent
from ich_keras.phantom.head import CSF, Blob
from ich_keras.phantom.head_slice import HeadSlice, coverage
from ich_keras.phantom.skull import blend

# A subtype is labelled on a slice when its mask covers at least this much of it.
MIN_AREA_MM2 = 100.0
# Bit k of a mask stands for MASK_BITS[k]. The last two are anatomy, for checking where blood is.
MASK_BITS = (*SUBTYPES, "ventricles", "cavity")
_EXTRA_AXIAL = ("epidural", "subdural")


def draw_inside(
    place: HeadSlice,
    bleeds: tuple[Bleed, ...],
    ring: float,
    pixel_mm: float,
    fine: Callable[[np.ndarray], np.ndarray],
    mask: np.ndarray,
) -> np.ndarray:
    """Draw the noiseless inside of the skull and fill in its mask.

    Args:
        place: the geometry; may be coarser than the mask.
        bleeds: the patient's.
        ring: HU added at the inner table (see `Scan`).
        pixel_mm: of the mask.
        fine: interpolates an extent to the mask's size.
        mask: uint8 (rows, columns), filled in place.

    Returns:
        float32 of the size of `place`, HU, as if the brain filled all space.
    """
    brain = _brain(place)
    for bleed in bleeds:  # within the brain and its hollows
        if bleed.subtype not in _EXTRA_AXIAL:
            _bleed(brain, bleed, place, pixel_mm, fine, mask)
    _dura(brain, place)
    for bleed in bleeds:  # between brain and skull
        if bleed.subtype in _EXTRA_AXIAL:
            _bleed(brain, bleed, place, pixel_mm, fine, mask)
    for blob in place.head.calcifications:
        _blob(brain, blob, place)
    brain += ring * np.exp(np.minimum(-place.depth, 0) / 3.5)
    depth = fine(place.depth)
    mask |= (depth > 0).astype(np.uint8) << MASK_BITS.index("cavity")
    hollow = np.minimum(fine(place.ventricles), depth)
    mask |= (hollow > 0).astype(np.uint8) << MASK_BITS.index("ventricles")
    return brain


def _brain(place: HeadSlice) -> np.ndarray:
    """Return brain with its fluid spaces, lesions and vessels."""
    head = place.head
    cortex = np.minimum(place.depth, place.sulcus_distance) - 1.2 * head.atrophy
    grey_part = coverage(4.0 - cortex, 2.5) * coverage(22 - place.depth, 6.0)
    grey_part = np.maximum(grey_part, coverage(place.deep_grey, 3.0))
    if place.reaches(-70, 20):  # the cerebellum shows no white matter at this contrast
        below = np.minimum(place.y - 8, 10 - 0.62 * np.abs(place.x) - place.z)
        grey_part = np.maximum(grey_part, coverage(below, 4.0))
    brain = head.white + (head.grey - head.white) * grey_part
    if head.leukoaraiosis:
        around = np.clip((place.ventricles + 10) / 8, 0, 1) * (1 - grey_part)
        brain -= head.leukoaraiosis * around
    for lesion in head.lesions:
        _blob(brain, lesion, place, edge_mm=4.0)
    if head.deep_hu:
        blend(brain, head.deep_hu, coverage(place.deep_grey, 2.0))
    fissure = 0.3 + 1.6 * head.atrophy
    film = 0.3 + 2.0 * head.atrophy - place.depth
    # Narrow clefts are never as dark as fluid: the slice is thicker than they are wide.
    blend(brain, CSF, coverage(place.sulci, 2.6))
    fluid = np.maximum(film, place.falx + fissure + head.falx_mm / 2)
    fluid = np.maximum(np.maximum(fluid, place.cisterns), place.ventricles)
    blend(brain, CSF, coverage(fluid, 1.6))
    if place.reaches(-32, -8):
        for vessel in head.vessels:
            _blob(brain, vessel, place)
    return brain


def _dura(brain: np.ndarray, place: HeadSlice) -> None:
    head = place.head
    blend(brain, head.falx_hu, coverage(place.falx + head.falx_mm / 2, 1.4))
    if place.reaches(-30, 22):
        blend(brain, head.tentorium_hu, coverage(place.tentorium + head.tentorium_mm / 2, 1.6))
    blend(brain, head.sinus_hu, coverage(place.sinuses, 1.6))


def _bleed(
    brain: np.ndarray,
    bleed: Bleed,
    place: HeadSlice,
    pixel_mm: float,
    fine: Callable,
    mask: np.ndarray,
) -> None:
    extent = bleed_extent(bleed, place)
    if extent.max() < -8:
        return
    if bleed.rim_mm:
        rim = coverage(extent + bleed.rim_mm, 2.5) * (place.ventricles < 0)
        brain += OEDEMA_HU * rim
    drawn = (fine(extent) > 0) & (fine(place.depth) > 0)
    mask |= drawn.astype(np.uint8) << MASK_BITS.index(bleed.subtype)
    # A slice that only grazes a bleed is half brain: its cap fades below the area of a label.
    area_mm2 = np.count_nonzero(drawn) * pixel_mm**2
    part = coverage(extent, 1.4) * (1.0 if area_mm2 >= MIN_AREA_MM2 else 0.35)
    hu = bleed.hu + bleed.mottle * np.sin(0.45 * place.x + 0.3 * place.z) * np.sin(0.5 * place.y)
    if bleed.old_hu:  # the patient lies on the back: cells sink, old blood floats above
        hu = bleed.old_hu + (hu - bleed.old_hu) * coverage(place.y - bleed.level_mm, 2.0)
    blend(brain, hu, part)


def _blob(image: np.ndarray, blob: Blob, place: HeadSlice, edge_mm: float = 1.4) -> None:
    a, b, c = blob.semi_axes
    if place.reaches(blob.centre[2] - c - 2, blob.centre[2] + c + 2):
        box = place.box(a + 2, b + 2, blob.centre[:2])
        if image[box].size:
            extent = place.ellipsoid(blob.centre, blob.semi_axes, box)
            blend(image[box], blob.hu, coverage(extent, edge_mm))
