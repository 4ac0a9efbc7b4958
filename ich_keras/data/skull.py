"""What the pixels of a series show of its head: no head at all, or a gap in the skull.

From the middle of the head a ray goes out in every direction. Above the base of the skull each of
them meets bone; where several neighbouring ones do not, on slices one above the other, there is a
gap: a missing bone flap, or a large hole. What lies in the plane of a slice, is narrower than
`GAP_MM`, or was closed again (a bone flap put back, a mesh of titanium) is not seen. The open
fontanelle of an infant, and bone that a tumour has eaten away, are gaps, too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from ich_keras.ct.traits import YES

GRID_MM = 1.0  # of the image that is looked at, about
STEP_MM = 1.0  # along a ray
COARSEST_MM = 2.0  # pixels that are wider show no skull
DIRECTIONS = 180  # 2.6 mm apart at the skull
BONE_HU = 200  # less than the thinnest bone of a vault, more than blood and contrast medium
GAP_MM = 15.0  # across, and from the lowest to the highest slice that shows it
VAULT_ABOVE_BASE_MM = 10.0

_HEAD_ABOVE_HU = -300
_BORDER_MM = 4.0
_ROUNDED_MM = 1.0  # by which a gap may be lower: slices lie 5 mm apart, or 4.98
_OPENING_MM = 11  # head holders, tubes and cloth are thinner
_BRAIN_HU = (0, 100)
_CORE = 0.7  # of the way from the middle to the skin: what is further out may be skull
_LEAST_BRAIN_MM2 = 1000.0  # within bone, for a head
_VAULT_BRAIN_MM2 = 2500.0  # higher up a slice grazes the skull
_DEEP = 0.6  # of the way: bone in there is of the base, or calcium
_MOST_DEEP_BONE_MM2 = 100.0
_MOST_CORE_AIR_MM2 = 100.0  # the sinuses in the base have more
_LEAST_CLOSED = 0.6  # of the directions, of a head


class SkullProfile(NamedTuple):
    """What a slice shows of the head.

    Args:
        is_open: bool (DIRECTIONS,), rays that meet no bone within the head; none where the head is
            cut off by the border of the image.
        skin_mm: float32 (DIRECTIONS,), from the middle to the skin.
        closed: share of the directions that meet bone.
        brain_mm2, air_mm2: areas of the core, the inner part of the head.
        bone_mm2: area of the bone deep inside.
    """

    is_open: np.ndarray
    skin_mm: np.ndarray
    closed: float
    brain_mm2: float
    bone_mm2: float
    air_mm2: float

    @property
    def shows_head(self) -> bool:
        """Whether there is brain within bone."""
        return self.brain_mm2 >= _LEAST_BRAIN_MM2 and self.closed >= _LEAST_CLOSED

    @property
    def is_above_base(self) -> bool:
        """Whether the core is brain, without the bones and air cells of the base."""
        return self.bone_mm2 <= _MOST_DEEP_BONE_MM2 and self.air_mm2 <= _MOST_CORE_AIR_MM2


def skull_profile(
    hu: np.ndarray, row_spacing_mm: float, column_spacing_mm: float
) -> SkullProfile | None:
    """Look at one slice.

    Args:
        hu: int16 (rows, columns), HU.
        row_spacing_mm, column_spacing_mm: distance between rows, and between columns.

    Returns:
        None where the pixels are too coarse.
    """
    if max(row_spacing_mm, column_spacing_mm) > COARSEST_MM:
        return None
    image, row_mm, column_mm = _reduced(hu, row_spacing_mm, column_spacing_mm)
    head = _head(image, row_mm, column_mm)
    if head is None:
        nothing = np.zeros(DIRECTIONS, bool)
        return SkullProfile(nothing, np.zeros(DIRECTIONS, np.float32), 0.0, 0.0, 0.0, 0.0)
    along, inside, is_cut = _rays(image, head, row_mm, column_mm)
    steps = np.arange(along.shape[1])
    skin = np.where(inside, steps, 0).max(axis=1)
    share = steps / np.maximum(skin, 1)[:, None]
    is_bone = inside & (along > BONE_HU)
    is_core = share < _CORE
    closed = (is_bone & (share >= _CORE / 2)).any(axis=1)
    # A sample of a ray stands for an area that grows outwards.
    area = steps * STEP_MM**2 * (2 * np.pi / DIRECTIONS)
    core = inside & is_core

    def mm2(part: np.ndarray) -> float:
        return float((part * area).sum())

    low, high = _BRAIN_HU
    return SkullProfile(
        ~closed & ~is_cut,
        (skin * STEP_MM).astype(np.float32),
        float(closed.mean()),
        mm2(core & (along >= low) & (along <= high) & closed[:, None]),
        mm2(is_bone & (share < _DEEP)),
        mm2(is_core & (along < _HEAD_ABOVE_HU)),
    )


class SeriesFlags(NamedTuple):
    """What the pixels of a series show: YES, or "" where they do not, or are too coarse."""

    operated: str = ""
    empty: str = ""


NO_FLAGS = SeriesFlags()


def flags_of(profiles: Sequence[SkullProfile | None], positions_mm: Sequence[float]) -> SeriesFlags:
    """Return the flags of a series.

    Args:
        profiles: of its slices, inferior to superior; None where there is none.
        positions_mm: of them, along the normal.
    """
    if is_empty(profiles):
        return SeriesFlags(empty=YES)
    return SeriesFlags(operated=YES if has_gap(profiles, positions_mm) else "")


def is_empty(profiles: Sequence[SkullProfile | None]) -> bool:
    """Return whether no slice of a series shows a head, by those that could be looked at."""
    seen = [one for one in profiles if one is not None]
    return bool(seen) and not any(one.shows_head for one in seen)


def has_gap(profiles: Sequence[SkullProfile | None], positions_mm: Sequence[float]) -> bool:
    """Return whether a series shows a gap in the skull.

    Args:
        profiles: of its slices, inferior to superior.
        positions_mm: of them, along the normal.
    """
    vault = _vault(profiles, positions_mm)
    seen: list[tuple[np.ndarray, float]] = []  # of the slices below: where open, and since where
    for place in vault:
        one = profiles[place]
        assert one is not None  # of the vault are only those that could be looked at
        wide = _wide(one.is_open, one.skin_mm)
        now: list[tuple[np.ndarray, float]] = []
        for run in wide:
            begins = positions_mm[place]
            for below, since in seen:
                if (run & below).any():
                    begins = min(begins, since)
            now.append((run, begins))
        if any(positions_mm[place] - begins >= GAP_MM - _ROUNDED_MM for _, begins in now):
            return True
        seen = now
    return False


def _vault(profiles: Sequence[SkullProfile | None], positions_mm: Sequence[float]) -> list[int]:
    """Return the slices above the base of the skull and below its top, one above the other.

    They are the longest run of slices of the kind, without those right above one of another kind.
    """
    is_vault = [
        one is not None and one.is_above_base and one.brain_mm2 >= _VAULT_BRAIN_MM2
        for one in profiles
    ]
    edges = np.flatnonzero(np.diff(np.array(is_vault, np.int8), prepend=0, append=0))
    if not edges.size:
        return []
    begin, end = max(zip(edges[::2], edges[1::2], strict=True), key=lambda run: run[1] - run[0])
    low_mm = positions_mm[begin - 1] + VAULT_ABOVE_BASE_MM if begin else -np.inf
    return [place for place in range(begin, end) if positions_mm[place] >= low_mm]


def _wide(is_open: np.ndarray, skin_mm: np.ndarray) -> list[np.ndarray]:
    """Return the runs of open directions that are GAP_MM wide, each bool (DIRECTIONS,)."""
    if is_open.all() or not is_open.any():
        return []
    start = int(np.flatnonzero(~is_open)[0])  # so that no run goes round the end
    turned = np.roll(is_open, -start)
    edges = np.flatnonzero(np.diff(turned.astype(np.int8), prepend=0, append=0))
    found = []
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        run = np.zeros(DIRECTIONS, bool)
        run[begin:end] = True
        run = np.roll(run, start)
        if skin_mm[run].sum() * 2 * np.pi / DIRECTIONS >= GAP_MM:
            found.append(run)
    return found


def _reduced(hu: np.ndarray, row_mm: float, column_mm: float) -> tuple[np.ndarray, float, float]:
    """Average pixels to a grid of about GRID_MM; return it with its distances of rows and columns.

    By whole numbers of pixels: other grids take three times as long.
    """
    factors = [max(1, round(GRID_MM / mm)) for mm in (row_mm, column_mm)]
    rows, columns = (max(1, side // by) for side, by in zip(hu.shape, factors, strict=True))
    whole = np.ascontiguousarray(hu[: rows * factors[0], : columns * factors[1]])
    image = cv2.resize(whole, (columns, rows), interpolation=cv2.INTER_AREA)
    return image, row_mm * factors[0], column_mm * factors[1]


def _head(image: np.ndarray, row_mm: float, column_mm: float) -> np.ndarray | None:
    """Return the pixels of the head with all that is inside it; None where there is nothing."""
    body = (image > _HEAD_ABOVE_HU).astype(np.uint8)
    side = [max(1, round(_OPENING_MM / mm)) for mm in (column_mm, row_mm)]
    body = cv2.morphologyEx(body, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_RECT, side))
    outlines, _ = cv2.findContours(body, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not outlines:
        return None
    head = np.zeros_like(body)
    cv2.drawContours(head, [max(outlines, key=cv2.contourArea)], -1, 1, cv2.FILLED)
    return head.astype(bool)


def _rays(
    image: np.ndarray, head: np.ndarray, row_mm: float, column_mm: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sample an image along rays from the middle of the head, every STEP_MM.

    Returns:
        (HU, whether it is of the head), both (DIRECTIONS, steps), and whether the head goes on
        beyond the border of the image, bool (DIRECTIONS,).
    """
    rows, columns = image.shape
    y, x = (np.flatnonzero(head.any(axis=axis)) for axis in (1, 0))
    farthest_mm = np.hypot((y[-1] - y[0]) * row_mm, (x[-1] - x[0]) * column_mm) / 2
    angles = np.arange(DIRECTIONS) * (2 * np.pi / DIRECTIONS)
    steps_mm = np.arange(int(farthest_mm / STEP_MM) + 2) * STEP_MM
    down = (y[0] + y[-1]) / 2 + np.sin(angles)[:, None] * (steps_mm / row_mm)
    across = (x[0] + x[-1]) / 2 + np.cos(angles)[:, None] * (steps_mm / column_mm)
    y, x = np.rint(down).astype(np.int32), np.rint(across).astype(np.int32)
    is_there = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    place = y.clip(0, rows - 1) * columns + x.clip(0, columns - 1)
    along, inside = image.ravel()[place], head.ravel()[place] & is_there
    # Scanners fill a square image or the circle within it.
    radius_mm = min(rows * row_mm, columns * column_mm) / 2 - _BORDER_MM
    down_mm, across_mm = (y - (rows - 1) / 2) * row_mm, (x - (columns - 1) / 2) * column_mm
    is_at_border = down_mm**2 + across_mm**2 > radius_mm**2
    return along, inside, (inside & is_at_border).any(axis=1)
