"""Verdicts on a series: their words, how they are written, and when each applies."""

from collections.abc import Iterable, Sequence

import numpy as np

from ich_keras.ct.geometry import (
    IN_PLANE_TOLERANCE_MM,
    ROTATED_DEGREES,
    SAME_POSITION_MM,
    TILT_DEGREES,
    fit_line,
    is_axial,
    neighbour_distances_mm,
    rotation_degrees,
    slice_normal,
    tilt_degrees,
)

# highdicom's tolerance (`highdicom.spatial`): a series that is "ok" here is a volume there.
SPACING_TOLERANCE = 0.01
# Spacing means nothing with fewer slices: two are always "regular".
MIN_SLICES = 3
# So many equal distances in a row are a second spacing, not slices that are missing.
SECOND_SPACING = 3

OK = "ok"
LOCALIZER = "localizer"
NOT_AXIAL = "not axial"
NOT_HEAD = "not a head"
TOO_FEW = "too few"
INCOMPLETE = "incomplete"
DUPLICATE = "duplicate"
GAP = "gap"
IRREGULAR = "irregular"
TILTED = "tilted"
ROTATED = "rotated"
VERDICTS = (
    *(LOCALIZER, NOT_AXIAL, NOT_HEAD, TOO_FEW, INCOMPLETE),
    *(DUPLICATE, GAP, IRREGULAR, TILTED, ROTATED),
)
# Each word, for people.
MEANINGS = {
    LOCALIZER: "It is a localizer (scout view), which shows where slices were planned.",
    NOT_AXIAL: "Its slices are not axial.",
    NOT_HEAD: "It does not show a head: BodyPartExamined says so, or the body is too large.",
    TOO_FEW: f"It has fewer than {MIN_SLICES} slices.",
    INCOMPLETE: "Files of the series were refused: slices are missing.",
    DUPLICATE: "Two slices lie at one place.",
    GAP: "Slices are missing: a distance is a multiple of the usual one.",
    IRREGULAR: "The distances between its slices differ by more than 1 %.",
    TILTED: f"The slices are tilted by more than {TILT_DEGREES:g} degree (gantry tilt).",
    ROTATED: f"The head is turned by more than {ROTATED_DEGREES:g} degrees within the slices.",
}


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


def with_words(verdict: str, *words: str) -> str:
    """Add words to a verdict.

    >>> with_words("ok", "gap"), with_words("tilted", "gap")
    ('gap', 'gap,tilted')
    """
    return join_words({*words_of(verdict), *words})


def verdict(orientation: Sequence[float], positions: np.ndarray, also: Iterable[str] = ()) -> str:
    """List what speaks against treating a series as one regular volume.

    Args:
        orientation: direction cosines along a row, then along a column; (6,).
        positions: float64 (slices, 3), first pixels, mm, in the order of the series.
        also: words that are known otherwise: localizer, not a head, incomplete.

    Returns:
        "ok", or the words that apply, in the order of VERDICTS, joined by commas:
        - localizer: scout views, by the headers;
        - not axial: coronal, sagittal or oblique, over AXIAL_DEGREES from the transverse plane;
        - not a head: another part of the body, by its name or its size (`kind`, `body`);
        - too few: under MIN_SLICES slices;
        - incomplete: files of the series were refused;
        - duplicate: two slices at one position;
        - gap: a distance is a multiple of the usual one, within 1 %: slices are missing;
        - irregular: a distance is neither the usual one nor a multiple of it, SECOND_SPACING equal
          multiples follow each other, or a slice is off the line through the stack;
        - tilted: `tilt_degrees` over TILT_DEGREES (axial series only);
        - rotated: `rotation_degrees` over ROTATED_DEGREES (axial series only).

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
    found = set(also)
    if not axial:
        found.add(NOT_AXIAL)
    if len(positions) < MIN_SLICES:
        found.add(TOO_FEW)
    if (np.diff(positions_mm) <= SAME_POSITION_MM).any():
        found.add(DUPLICATE)
    found |= spacing_faults(neighbour_distances_mm(positions_mm))
    residual, _ = fit_line(positions, normal)
    if residual > IN_PLANE_TOLERANCE_MM:
        found.add(IRREGULAR)
    if axial and tilt_degrees(orientation, positions) > TILT_DEGREES:
        found.add(TILTED)
    if axial and rotation_degrees(orientation) > ROTATED_DEGREES:
        found.add(ROTATED)
    return join_words(found)


def spacing_faults(distances: np.ndarray) -> set[str]:
    """Return what is wrong with the distances between neighbours: gap, irregular, or nothing.

    Args:
        distances: float64 (n,), mm, in the order of the series.

    >>> spacing_faults(np.array([2.5] * 12 + [5.0] * 10))  # the base of the skull, then the rest
    {'irregular'}
    >>> spacing_faults(np.array([2.5] * 12 + [5.0] + [2.5] * 12))
    {'gap'}
    """
    if distances.size == 0:
        return set()
    if (abs(distances - distances.mean()) <= SPACING_TOLERANCE * distances.mean()).all():
        return set()
    usual = np.median(distances)
    multiples = np.rint(distances / usual)
    fits = abs(distances - multiples * usual) <= SPACING_TOLERANCE * usual * multiples
    is_larger = fits & (multiples >= 2)
    # Where a slice is missing, the usual distance follows sooner or later.
    begins = np.flatnonzero(np.diff(multiples, prepend=-1) != 0)
    lengths = np.diff(begins, append=len(multiples))
    is_second = np.repeat(lengths >= SECOND_SPACING, lengths) & is_larger
    faults: set[str] = set()
    if (is_larger & ~is_second).any():
        faults.add(GAP)
    if is_second.any() or not fits.all() or not faults:
        faults.add(IRREGULAR)
    return faults
