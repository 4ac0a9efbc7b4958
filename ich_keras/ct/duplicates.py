"""Files that share a SOPInstanceUID: copies of one slice, or a conflict."""

import filecmp
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from ich_keras.ct.dicom import read_slice
from ich_keras.ct.journal import Entry
from ich_keras.ct.rejects import Reject, RejectedFile

# What must be equal in copies, and how it is called. An export may renumber the images.
_SAME = {
    "patient_id": "PatientID",
    "study_instance_uid": "StudyInstanceUID",
    "series_instance_uid": "SeriesInstanceUID",
    "position": "ImagePositionPatient",
    "orientation": "ImageOrientationPatient",
    "turn": "ImageOrientationPatient",
    "rows": "Rows",
    "columns": "Columns",
    "row_spacing_mm": "PixelSpacing",
    "column_spacing_mm": "PixelSpacing",
    "is_localizer": "ImageType",
    "acquisition": "AcquisitionNumber",
    "body_part": "BodyPartExamined",
    "facts": "kernel or scan settings",
}


def split_by_uid(entries: Iterable[Entry]) -> tuple[list[Entry], list[Reject]]:
    """Keep each SOPInstanceUID once; where files with the same one differ, keep none of them.

    Only files that share a UID are compared.

    Args:
        entries: of files that were read as slices, sorted by path.

    Returns:
        (the slices; rejects DUPLICATE_UID for copies, UID_CONFLICT for files that differ, and
        those of copies whose pixels cannot be read).
    """
    by_uid: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_uid[entry.sop_instance_uid].append(entry)
    slices: list[Entry] = []
    rejects: list[Reject] = []
    for same in by_uid.values():
        if len(same) == 1:
            slices += same
            continue
        kept, refused = _compared(same)
        slices += kept
        rejects += refused
    return slices, rejects


def _compared(same: list[Entry]) -> tuple[list[Entry], list[Reject]]:
    first, *others = same
    differences = [(other, _header_difference(first, other)) for other in others]
    if not any(difference for _, difference in differences):
        differences = [(other, _pixel_difference(first, other)) for other in others]
        if not any(difference for _, difference in differences):
            return [first], [_copy_of(first, other) for other in others]
        readable, rejects = _readable(same)
        if len(readable) < len(same):
            # A damaged copy is not a conflict.
            kept, more = _compared(readable) if len(readable) > 1 else (readable, [])
            return kept, rejects + more
    other, difference = next(pair for pair in differences if pair[1])
    details = [f"is also that of {other.path}, and the two differ in their {difference}"]
    for _, own in differences:
        # A file may equal the first one and still share its UID with a third.
        pair = (
            f"{first.path}, and the two differ in their {own}"
            if own
            else f"{first.path} and of {other.path}, which differ in their {difference}"
        )
        details.append(f"is also that of {pair}")
    return [], [
        _refused(entry, "UID_CONFLICT", f"{_tag(first)} {detail}")
        for entry, detail in zip(same, details, strict=True)
    ]


def _header_difference(one: Entry, other: Entry) -> str:
    """Name the first field in which two headers differ; "" where none does."""
    different = (
        what for field, what in _SAME.items() if getattr(one, field) != getattr(other, field)
    )
    return next(different, "")


def _pixel_difference(one: Entry, other: Entry) -> str:
    try:
        if one.file_size == other.file_size and _same_bytes(one, other):
            return ""
    except OSError:  # gone since it was indexed
        return "pixels"
    # Written by another program, or compressed in another way.
    hu, other_hu = _pixels(one), _pixels(other)
    is_same = hu is not None and other_hu is not None and np.array_equal(hu, other_hu)
    return "" if is_same else "pixels"


def _same_bytes(one: Entry, other: Entry) -> bool:
    # Members of archives are compared by their pixels.
    is_plain = not one.member and not other.member
    return is_plain and filecmp.cmp(one.container, other.container, shallow=False)


def _pixels(entry: Entry) -> np.ndarray | None:
    try:
        return read_slice(entry.source, any_image_type=True).hu
    except RejectedFile:
        return None


def _readable(same: list[Entry]) -> tuple[list[Entry], list[Reject]]:
    kept, rejects = [], []
    for entry in same:
        try:
            read_slice(entry.source, any_image_type=True)
        except RejectedFile as error:
            rejects.append(
                Reject.of(entry.path, error)._replace(series_instance_uid=entry.series_instance_uid)
            )
        else:
            kept.append(entry)
    return kept, rejects


def _copy_of(first: Entry, entry: Entry) -> Reject:
    return _refused(entry, "DUPLICATE_UID", f"{_tag(first)} is also that of {first.path}")


def _tag(entry: Entry) -> str:
    return f"(0008,0018) SOPInstanceUID {entry.sop_instance_uid}"


def _refused(entry: Entry, code: str, detail: str) -> Reject:
    return Reject(entry.path, code, detail, "", entry.series_instance_uid)
