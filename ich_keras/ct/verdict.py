"""Verdicts on a series: their words, how they are written, and when each applies."""

from collections.abc import Iterable, Sequence

import numpy as np

from ich_keras.ct.geometry import (
    IN_PLANE_TOLERANCE_MM,
    SAME_POSITION_MM,
    TILT_DEGREES,
    fit_line,
    is_axial,
    neighbour_distances_mm,
    slice_normal,
    tilt_degrees,
)

# highdicom's tolerance (`highdicom.spatial`): a series that is "ok" here is a volume there.
SPACING_TOLERANCE = 0.01
# Spacing means nothing with fewer slices: two are always "regular".
MIN_SLICES = 3

OK = "ok"
LOCALIZER = "localizer"
NOT_AXIAL = "not axial"
TOO_FEW = "too few"
DUPLICATE = "duplicate"
GAP = "gap"
IRREGULAR = "irregular"
TILTED = "tilted"
VERDICTS = (LOCALIZER, NOT_AXIAL, TOO_FEW, DUPLICATE, GAP, IRREGULAR, TILTED)


def words_of(verdict: str) -> tuple[str, ...]:
    """Return the words of a verdict as tables hold it; none for "ok".

    >>> words_of("too few,tilted"), words_of("ok")
    (('too few', 'tilted'), ())
    """
    return tuple(word for word in verdict.split(",") if word != OK)


def join_words(words: Iterable[str]) -> str:
    """Write words as tables hold them, in the order of `VERDICTS`; "ok" when there are none.

    >>> join_words({"tilted", "gap"}), join_words([])
    ('gap,tilted', 'ok')
    """
    chosen = set(words)
    return ",".join(word for word in VERDICTS if word in chosen) or OK


def has_word(verdict: str, word: str) -> bool:
    """Return whether a verdict contains a word.

    >>> has_word("too few,tilted", "tilted"), has_word("not axial", "axial")
    (True, False)
    """
    return word in words_of(verdict)


def shown(verdict: str) -> str:
    """Write a verdict for people.

    >>> shown("too few,tilted")
    'too few, tilted'
    """
    return ", ".join(words_of(verdict)) or OK


def verdict(
    orientation: Sequence[float], positions: np.ndarray, has_localizer: bool = False
) -> str:
    """List what speaks against treating a series as one regular volume.

    Args:
        orientation: direction cosines along a row, then along a column; (6,).
        positions: float64 (slices, 3), first pixels, mm, in the order of the series.
        has_localizer: whether the headers mark these as scout views.

    Returns:
        "ok", or the words that apply, in the order of VERDICTS, joined by commas:
        - localizer: scout views;
        - not axial: coronal, sagittal or oblique, over AXIAL_DEGREES from the transverse plane;
        - too few: under MIN_SLICES slices;
        - duplicate: two slices at one position;
        - gap: a distance is a multiple of the usual one, within 1 %: slices are missing;
        - irregular: a distance is neither the usual one nor a multiple of it, or a slice is off
          the line through the stack;
        - tilted: `tilt_degrees` over TILT_DEGREES (axial series only).

    Source:
        Regular spacing is defined as in highdicom's `get_volume_positions`: all distances within
        1 % of their mean.

    >>> heights = np.array([0.0, 5.0, 10.0, 20.0, 25.0])  # mm; the slice at 15 mm is missing
    >>> verdict((1, 0, 0, 0, 1, 0), heights[:, np.newaxis] * (0, 0, 1))
    'gap'
    """
    normal = slice_normal(orientation)
    positions_mm = positions @ normal
    axial = is_axial(orientation)
    found: set[str] = set()
    if has_localizer:
        found.add(LOCALIZER)
    if not axial:
        found.add(NOT_AXIAL)
    if len(positions) < MIN_SLICES:
        found.add(TOO_FEW)
    if (np.diff(positions_mm) <= SAME_POSITION_MM).any():
        found.add(DUPLICATE)
    found |= _spacing_faults(neighbour_distances_mm(positions_mm))
    residual, _ = fit_line(positions, normal)
    if residual > IN_PLANE_TOLERANCE_MM:
        found.add(IRREGULAR)
    if axial and tilt_degrees(orientation, positions) > TILT_DEGREES:
        found.add(TILTED)
    return join_words(found)


def _spacing_faults(distances: np.ndarray) -> set[str]:
    if distances.size == 0:
        return set()
    if (abs(distances - distances.mean()) <= SPACING_TOLERANCE * distances.mean()).all():
        return set()
    usual = np.median(distances)
    multiples = np.rint(distances / usual)
    fits = abs(distances - multiples * usual) <= SPACING_TOLERANCE * usual * multiples
    faults: set[str] = set()
    if (fits & (multiples >= 2)).any():
        faults.add(GAP)
    if not fits.all() or not faults:
        faults.add(IRREGULAR)
    return faults
