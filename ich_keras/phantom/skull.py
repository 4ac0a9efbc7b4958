"""The surroundings of the synthetic brain: skull, muscles, scalp, skull base and face."""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from ich_keras.phantom.head import AIR, FAT, MUSCLE, SKIN
from ich_keras.phantom.head_slice import HeadSlice, coverage

COMPACT_BONE, DIPLOE = 1300.0, 800.0
_TABLE_MM = 1.6  # of compact bone on either side of the diploe
_SKIN_MM = 1.9


def blend(image: np.ndarray, value: float | np.ndarray, part: np.ndarray) -> None:
    """Fill a part of each voxel with another value, in place."""
    image += part * (value - image)


def skull_mm(place: HeadSlice) -> np.ndarray:
    """Return the thickness of the skull in each voxel's direction: float32 (rows, columns), mm.

    Temples are thin, the back of the head is thick, and each head has bumps of its own.
    """
    x, y, z = place.directions
    first, second, third, fourth = place.head.thickness
    temple = np.clip((x * x - 0.5) * 3, 0, 1) * np.clip(0.7 - 1.4 * z, 0, 1)
    occiput = np.exp(-(((y - 0.97) / 0.2) ** 2) - (x / 0.35) ** 2 - ((z + 0.1) / 0.4) ** 2)
    crest = np.exp(-(((y + 0.97) / 0.12) ** 2) - (x / 0.2) ** 2)
    own = first * y + second * x + third * x * y + fourth * (3 * z * z - 1)
    own += 0.1 * np.sin(9 * y + 5 * x + 6 * z + 40 * first) * np.sin(7 * x - 4 * y)
    thickness = place.head.skull_mm * (1.1 - 0.55 * temple + 0.8 * occiput + 0.4 * crest + own)
    return np.maximum(thickness, 2.2) + place.relief


def muscle_mm(place: HeadSlice) -> np.ndarray:
    """Return the thickness of the muscles on the skull: temporal ones, and those of the neck."""
    x, y, z = place.directions
    across = np.abs(x)
    temple = np.exp(-(((y + 0.3) / 0.4) ** 2) - ((z + 0.1) / 0.35) ** 2)
    temple = temple * np.clip((across - 0.45) * 2.5, 0, 1)
    neck = np.clip((y - 0.2) * 2, 0, 1) * np.clip((-0.15 - z) * 3, 0, 1)
    return place.head.muscle_mm * (temple + 1.5 * neck)


def scalp_mm(place: HeadSlice) -> tuple[np.ndarray, np.ndarray | float]:
    """Return the thickness of skin and fat, and of the bruise in it, mm."""
    x, y, z = place.directions
    thickness = place.head.scalp_mm * (1 + 0.3 * y + 0.15 * np.sin(7 * x + 5 * y))
    *direction, height_mm = place.head.swelling
    if not height_mm:
        return thickness, 0.0
    towards = x * direction[0] + y * direction[1] + z * direction[2]
    bruise = height_mm * np.clip((towards - 0.86) / 0.1, 0, 1)
    return thickness + bruise, bruise


def outer_head(
    place: HeadSlice, background: np.ndarray, pixel_mm: float, edge_mm: np.ndarray
) -> np.ndarray:
    """Return skull, muscles and scalp around the vault, on what lies around the head.

    Args:
        place: a slice; may be coarser than the image.
        background: float32 (rows, columns), HU, at the size of the image.
        pixel_mm: of the image.
        edge_mm: float32 (rows, columns), mm, over how much the slice blurs slanted surfaces.

    Returns:
        float32 (rows, columns), HU.
    """

    def fine(values: np.ndarray) -> np.ndarray:
        return upsample(values, background.shape)

    outer = fine(-place.vault_depth)  # distance outwards from the inner table
    bone_mm = skull_mm(place)
    muscle = muscle_mm(place)
    scalp, bruise = scalp_mm(place)
    on_bone = outer - fine(bone_mm)
    on_muscle = on_bone - fine(muscle)
    skin = on_bone - fine(muscle + scalp)

    image = background.copy()
    inside = coverage(-skin, 1.2)
    inside *= fine(np.clip((place.z + 90) / 6, 0, 1))
    fat = np.where(skin > -_SKIN_MM, np.float32(SKIN), np.float32(FAT))
    if place.head.swelling[3]:
        blend(fat, 58.0, coverage(fine(np.asarray(bruise - 1)) - on_muscle, 1.5))
    blend(fat, MUSCLE, coverage(-on_muscle, 1.0))
    blend(image, fat, inside)
    # Only the thin shell that is bone: its texture is not worth computing elsewhere.
    edge = fine(edge_mm)
    rows, columns = np.nonzero((on_bone < 1 + 0.5 * edge) & (outer > -2 - 0.5 * edge))
    shell = rows, columns
    to_table = np.minimum(outer[shell], -on_bone[shell])
    grain = _grain(rows * pixel_mm, columns * pixel_mm, float(place.z[0, 0]))
    spongy = np.clip((to_table - _TABLE_MM) / 0.8 + 0.3 * grain, 0, 1)
    bone = COMPACT_BONE + (DIPLOE + 220 * grain - COMPACT_BONE) * spongy
    bone -= 700 * _sutures(place, fine, shell)
    part = coverage(-on_bone[shell], 1.0 + 0.5 * edge[shell])
    image[shell] += part * (bone - image[shell])
    return image


def upsample(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Interpolate a smooth field to the size of the image: float32 (rows, columns)."""
    if values.shape == shape:
        return values
    return cv2.resize(values, shape[::-1], interpolation=cv2.INTER_LINEAR)


def _grain(y: np.ndarray, x: np.ndarray, z: float) -> np.ndarray:
    """Return the marrow spaces of the diploe: about -1 to 1, on the scale of a few mm."""
    field = np.sin(1.7 * x + 0.6 * y + z) * np.sin(0.5 * x - 1.9 * y - 2 * z)
    return field + 0.6 * np.sin(0.9 * x + 2.6 * y) * np.sin(2.3 * x - 0.8 * y + z)


def _sutures(place: HeadSlice, fine: Callable, shell: Any) -> np.ndarray:
    """Return the sutures between the bones of the vault: 0 to 1, in the shell."""
    x, y, z = place.directions
    zigzag = 0.012 * np.sin(60 * x + 30 * z)
    coronal = np.abs(y + 0.3 - 0.35 * z + zigzag)
    lambdoid = np.abs(y - 0.8 + 0.35 * np.abs(x) - 0.3 * z + zigzag)
    sagittal = np.abs(x + 0.012 * np.sin(60 * y)) + np.where(np.abs(y) > 0.85, 1, 0)
    gap = np.minimum(np.minimum(coronal, lambdoid), sagittal)
    gap = gap + np.clip(-0.1 - z, 0, 1)  # of the vault only
    return np.clip(1.5 - fine(gap.astype(np.float32))[shell] / 0.008, 0, 1)


def skull_base(place: HeadSlice) -> tuple[np.ndarray, np.ndarray] | None:
    """Draw what lies under the cavity: base plate, face, petrous bones, air cells, orbits.

    Returns:
        (image in HU, how much of each voxel it fills), float32 (rows, columns) both; None above.
    """
    if not place.reaches(-200, 0):
        return None
    head, x, y, z = place.head, place.x, place.y, place.z
    across = np.abs(x)
    thick = skull_mm(place)
    below = np.minimum(-place.base_height, place.vault_depth + thick)
    if below.max() <= -4:
        return None
    image = np.where(place.sulcus_distance < 1.6, np.float32(0.4 * FAT), np.float32(MUSCLE))
    uneven = 1.2 * np.sin(0.35 * x + 0.2 * y) * np.sin(0.3 * y + 0.25 * z)
    blend(image, 850 + 150 * uneven, coverage(2.2 - np.abs(below - 2 + uneven), 1.5))
    filled = coverage(below, 1.5)
    _face(image, place, below)
    if place.reaches(-48, -16):
        _petrous(image, filled, place, across, thick)
    if head.muscle_mm and place.reaches(-200, -34):
        # The spinal canal and the vertebra around it, under the foramen magnum.
        canal = 10 - np.hypot(x, y - 22)
        canal = np.minimum(canal, -36 - z)
        blend(image, 900, coverage(canal + 6, 1.5))
        blend(image, 14, coverage(canal, 1.5))
        blend(image, 32, coverage(canal - 4, 1.5))
    return image, filled


def _face(image: np.ndarray, place: HeadSlice, below: np.ndarray) -> None:
    x, y, z = place.x, place.y, place.z
    across = np.abs(x)
    front = np.minimum(-36 - y, below - 2.5)
    # Ethmoid cells between thin walls; the maxillary sinuses lie lower, to the sides.
    walls = np.minimum(np.abs(np.sin(0.42 * x)), np.abs(np.sin(0.36 * y + 0.2 * x))) < 0.14
    cells = np.minimum(13 - across, front)
    blend(image, np.where(walls, np.float32(250), np.float32(-900)), coverage(cells, 1.0))
    frontal = np.minimum(place.ellipsoid((4, -77, -12), (17, 5, 13)), place.vault_depth + 5)
    blend(image, AIR + 40, coverage(frontal, 1.0))
    sphenoid = place.ellipsoid((0, -22, -42), (13, 11, 9))
    blend(image, 800, coverage(np.minimum(sphenoid + 1.5, below - 1), 1.0))
    blend(image, -950, coverage(np.minimum(sphenoid, below - 2), 1.0))
    if not place.reaches(-60, -8):
        return
    for side in (-1, 1):
        orbit = place.ellipsoid((side * 33, -57, -30), (17, 24, 16))
        orbit = np.minimum(orbit, np.maximum(front, -62 - y))
        blend(image, 550, coverage(np.minimum(orbit + 1.3, below), 1.2))
        blend(image, FAT, coverage(orbit, 1.0))
        nerve = 2.2 - np.hypot(x - side * (33 + 0.35 * (y + 57)), (z + 30) * 0.8)
        blend(image, 40, coverage(np.minimum(nerve, orbit), 1.0))
        globe = place.ellipsoid((side * 34, -68, -30), (12.5, 12.5, 12.5))
        blend(image, 45, coverage(globe + 1.2, 1.0))
        blend(image, 10, coverage(globe, 1.0))
        lens = place.ellipsoid((side * 34, -77, -30), (4.5, 2, 4.5))
        blend(image, 85, coverage(lens, 1.0))


def _petrous(
    image: np.ndarray,
    filled: np.ndarray,
    place: HeadSlice,
    across: np.ndarray,
    thick: np.ndarray,
) -> None:
    """Draw the petrous bones and the air cells of the mastoids behind the ears."""
    x, y, z = place.x, place.y, place.z
    extent = 6 + 0.1 * across - np.hypot(y - 16 + 0.5 * (46 - across), 0.9 * (z + 32))
    extent += 1.5 * np.sin(0.4 * x + 0.3 * z)
    extent = np.minimum(extent, np.minimum(across - 14, place.vault_depth + thick))
    part = coverage(extent, 1.5)
    blend(image, 1150, part)
    cells = np.minimum(extent - 1.5, across - 40)
    honeycomb = np.sin(1.1 * x + 0.4 * y) * np.sin(1.3 * y + z) + 0.6 * np.sin(0.8 * x - 0.9 * y)
    blend(image, -500, coverage(np.minimum(cells, honeycomb * 4), 1.0))
    canal = np.minimum(2.2 - np.hypot(y - 10, z + 33), across - 34)  # of the ear
    blend(image, -900, coverage(canal, 1.0))
    np.maximum(filled, part, out=filled)
