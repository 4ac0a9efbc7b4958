"""Which row of a label table belongs to which image."""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ich_keras.ct.tables import FRAME_MARK
from ich_keras.data.csv_rows import FAULTS_SHOWN, excerpt, first_few
from ich_keras.errors import DataError

PATH, PLACE = "path", "place"
_RSNA_PREFIX = "ID_"


def loose(identifier: str) -> str:
    """Return an identifier without case, signs and leading zeros; "/" parts its fields.

    >>> loose("CQ500-CT-007"), loose("049/7")
    ('cq500ct7', '49/7')
    """
    fields = identifier.lower().split("/")
    return "/".join(
        re.sub(r"(?<!\d)0+(?=\d)", "", re.sub(r"[^a-z0-9]", "", field)) for field in fields
    )


def match(
    slices: pd.DataFrame, keys: Sequence[str], key: str, is_loose: bool, source: str
) -> tuple[np.ndarray, bool]:
    """Find the row of a label table for each slice.

    Args:
        slices: the slice table.
        keys: identifiers of the label table's rows.
        key: what they identify: a column of the slice table, "path" or "place".
        is_loose: compare by `loose`.
        source: the file, for messages.

    Returns:
        int64 (slices,), rows of the label table, -1 where none belongs to the slice; and whether a
        row belongs to more than one slice.

    Raises:
        DataError: two rows belong to one slice, or one to files in several places or, compared
            loosely, to several identifiers.
    """
    if key == PATH:
        members = slices["member"].map(lambda name: f"/{name}" if name else "")
        files = (slices["container"] + members).tolist()
        frames = slices["frame"].tolist() if "frame" in slices else [0] * len(slices)
        found = _by_path(files, frames, keys, source)
    else:
        own = _identifiers(slices, key)
        if is_loose:
            written = own
            keys, own = [loose(name) for name in keys], own.map(loose)
            _require_different(keys, source)
            if key != PLACE:  # of which the caller counts what fits several images
                _require_different_images(written[own.isin(keys)], key, source)
        found = pd.Index(keys).get_indexer(pd.Index(own))
    counts = np.bincount(found[found >= 0], minlength=1)
    return found, bool(counts.max() > 1)


def prefix_hint(slices: pd.DataFrame, keys: Sequence[str], key: str) -> str:
    """Say so where identifiers differ by RSNA's prefix alone; "" otherwise."""
    if key not in slices.columns or key == "patient_id":
        return ""
    own, theirs = set(slices[key]), set(keys)
    if own & {f"{_RSNA_PREFIX}{name}" for name in theirs}:
        return f"The images have {_RSNA_PREFIX!r} before the identifiers: add it to the labels."
    if own & {name.removeprefix(_RSNA_PREFIX) for name in theirs}:
        return f"The labels have {_RSNA_PREFIX!r} before the identifiers: remove it."
    return ""


def _identifiers(slices: pd.DataFrame, key: str) -> pd.Series:
    if key != PLACE:
        return slices[key]
    return slices["patient_id"] + "/" + slices["instance_number"].str.strip()


def _require_different(keys: Sequence[str], source: str) -> None:
    seen = pd.Index(keys)
    if not seen.is_unique:
        count = int(seen.duplicated().sum())
        raise DataError(
            f"{source}: {count:,} identifiers differ only by signs or leading zeros.",
            "Remove the rows that do not belong to these images.",
        )


def _require_different_images(written: pd.Series, key: str, source: str) -> None:
    identifiers = written.drop_duplicates()
    count = int(identifiers.map(loose).duplicated().sum())
    if count:  # without them: they may be PatientIDs, and messages end up in logs
        raise DataError(
            f"{source}: a row fits several values of {key}: {count:,} of the images' differ from"
            " another only by signs or leading zeros.",
            "Index only the images that the labels are of.",
        )


def _by_path(
    paths: Sequence[str], frames: Sequence[int], keys: Sequence[str], source: str
) -> np.ndarray:
    """Match the end of a file's path, or of the path of a folder around it.

    A file of many slices is named as a whole, or each of its slices: "scan.nii.gz#12".
    """
    rows: dict[tuple[str, ...], int] = {}
    for row, key in enumerate(keys):
        parts = _parts(key)
        if parts in rows or not parts:
            raise DataError(f"{source}: {excerpt(key)} is named twice, or is no path.")
        rows[parts] = row
    lengths = sorted({len(parts) for parts in rows})
    places: dict[int, set[tuple[str, ...]]] = {}
    of_folder: dict[tuple[str, ...], int] = {}
    found = np.full(len(paths), -1, np.int64)
    for number, (path, frame) in enumerate(zip(paths, frames, strict=True)):
        parts = _parts(path)
        row, place = _ends(parts, rows, lengths, source), parts
        if frame:
            of_frame = (*parts[:-1], f"{parts[-1]}{FRAME_MARK}{frame}")
            hit = _ends(of_frame, rows, lengths, source)
            if hit >= 0 and row >= 0:
                raise _two_rows(of_frame, source)
            if hit >= 0:
                row, place = hit, of_frame
        if row < 0:
            folder = parts[:-1]
            if folder not in of_folder:
                around = [folder[:stop] for stop in range(len(folder), 0, -1)]
                hits = [(_ends(one, rows, lengths, source), one) for one in around]
                hit, place = next((h for h in hits if h[0] >= 0), (-1, ()))
                of_folder[folder] = hit
                if hit >= 0:
                    places.setdefault(hit, set()).add(place)
            row = of_folder[folder]
        else:
            places.setdefault(row, set()).add(place)
        found[number] = row
    unclear = [row for row, there in places.items() if len(there) > 1]
    if unclear:
        shown = [excerpt(keys[row]) for row in unclear[:FAULTS_SHOWN]]
        raise DataError(
            f"{source}: a path fits files in several folders: {first_few(shown, len(unclear))}.",
            "Give more of each path.",
        )
    return found


def _ends(
    parts: tuple[str, ...], rows: dict[tuple[str, ...], int], lengths: list[int], source: str
) -> int:
    """Return the row whose path is the end of this one; -1 if none is."""
    fits = [rows[parts[-n:]] for n in lengths if n <= len(parts) and parts[-n:] in rows]
    if len(fits) > 1:
        raise _two_rows(parts, source)
    return fits[0] if fits else -1


def _two_rows(parts: tuple[str, ...], source: str) -> DataError:
    return DataError(
        f"{source}: two rows fit the file {excerpt('/'.join(parts[-3:]))}.",
        "Name every file once, as a whole or each of its slices.",
    )


def _parts(path: str) -> tuple[str, ...]:
    parts = path.replace("\\", "/").replace("!/", "/").split("/")
    return tuple(part for part in parts if part not in ("", "."))
