"""Equal pixels: the same image under two names, and the digests by which a split is known again."""

import hashlib
from itertools import combinations

import numpy as np

from ich_keras import files
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.cache.fill import READING
from ich_keras.data.cache.tables import PIXEL_HASH, UID
from ich_keras.data.csv_rows import FAULTS_SHOWN, first_few
from ich_keras.data.intensity import HEAD_ABOVE_HU
from ich_keras.data.split_record import LEAKING, SPLITS, Split
from ich_keras.errors import DataError
from ich_keras.progress import Progress

NO_HASHES = (
    "The cache was built by an older version and has no hashes of its pixels: equal pixels in two"
    " splits were not looked for (`ich audit` does), and changed ones will not be noticed."
)
OTHER_READING = (
    "The cache was built by a version that reads some files differently. Build it again to train on"
    " the pixels that `ich predict` reads."
)
_AT_ONCE = 256  # slices in memory
_HEAD_PIXELS = 0.02  # of a slice: with fewer it shows no head


def notices_of(cache: CTCache) -> list[str]:
    """Return sentences on what a cache of another version lacks."""
    found = [] if cache.pixels_digest else [NO_HASHES]
    return found if cache.reading == READING else [*found, OTHER_READING]


def equal_slices(cache: CTCache, progress: Progress | None = None) -> list[list[int]]:
    """Find slices that show a head and are equal pixel by pixel.

    Where the cache has hashes, only one slice of each group is read.

    Returns:
        Groups of two or more rows of the slice table, in order.
    """
    if PIXEL_HASH in cache.slices:
        groups = _with_head(cache, _groups(cache, np.arange(len(cache))))
        if progress is not None:
            progress("comparing", len(cache), len(cache))
        return groups
    found: dict[bytes, list[int]] = {}
    if progress is not None:
        progress("comparing", 0, len(cache))
    for start in range(0, len(cache), _AT_ONCE):
        rows = np.arange(start, min(start + _AT_ONCE, len(cache)))
        hu = cache.slices_hu(rows)
        has_head = shows_head(hu)
        for row, image in zip(rows[has_head].tolist(), hu[has_head], strict=True):
            digest = hashlib.sha256(image.tobytes()).digest()
            found.setdefault(digest, []).append(row)
        if progress is not None:
            progress("comparing", int(rows[-1]) + 1, len(cache))
    return [rows for rows in found.values() if len(rows) > 1]


def require_distinct(cache: CTCache, split: Split, indices: dict[str, np.ndarray]) -> None:
    """Refuse a split in which two parts hold the same image, even under another UID or patient.

    Args:
        cache: without hashes of its pixels, nothing is checked.
        split: those known to leak by their name are let through.
        indices: rows of the slice table for each part.

    Raises:
        DataError: names images of both parts.
    """
    if split.name in LEAKING or PIXEL_HASH not in cache.slices:
        return
    part_of = {row: part for part, rows in indices.items() for row in rows.tolist()}
    groups = [
        group
        for group in _groups(cache, np.array(sorted(part_of), np.int64))
        if len({part_of[row] for row in group}) > 1
    ]
    groups = _with_head(cache, groups)
    uids = cache.slices[UID]
    for one, other in combinations(SPLITS, 2):
        pairs = []
        for group in groups:
            first = {part_of[row]: row for row in reversed(group)}
            if one in first and other in first:
                pairs.append(
                    f"{uids.iloc[first[one]]} ({one}) and {uids.iloc[first[other]]} ({other})"
                )
        if pairs:
            raise DataError(
                f"split {split.name!r}: {one} and {other} share {len(pairs):,} images of equal"
                f" pixels: {first_few(pairs[:FAULTS_SHOWN], len(pairs))}.",
                "Leave one of each pair out, or put both into one split (--split FILE);"
                " otherwise the metrics would be too good. `ich audit` counts them all.",
            )


def part_digests(cache: CTCache, split: Split) -> dict[str, str] | None:
    """Return a digest of the pixels of each part of a split, with or without labels.

    Whole series enter, because slabs look beyond the slices of a part.

    Returns:
        Part -> 64 hexadecimal digits; None for a cache without hashes of its pixels.
    """
    slices = cache.slices
    if PIXEL_HASH not in slices:
        return None
    found = {}
    for part in SPLITS:
        own = slices["series_uid"][slices[split.key].isin(split.members[part])]
        rows = slices[slices["series_uid"].isin(own)]
        pairs = zip(rows[UID].tolist(), rows[PIXEL_HASH].tolist(), strict=True)
        found[part] = files.fingerprint(sorted(pairs))
    return found


def _groups(cache: CTCache, rows: np.ndarray) -> list[list[int]]:
    """Return those of the rows that have one hash, in groups of two or more, in order."""
    hashes = cache.slices[PIXEL_HASH].iloc[rows].reset_index(drop=True)
    repeated = hashes[hashes.duplicated(keep=False)]
    places = repeated.groupby(repeated, sort=False).indices
    by_place = repeated.index.to_numpy()
    return [rows[by_place[found]].tolist() for found in places.values()]


def _with_head(cache: CTCache, groups: list[list[int]]) -> list[list[int]]:
    return [group for group in groups if shows_head(cache.slices_hu(group[:1]))[0]]


def shows_head(hu: np.ndarray) -> np.ndarray:
    """Tell which slices show enough of a head that two equal ones are no coincidence.

    Args:
        hu: int16 (n, rows, columns), HU.

    Returns:
        bool (n,).
    """
    return (hu > HEAD_ABOVE_HU).mean(axis=(1, 2)) > _HEAD_PIXELS
