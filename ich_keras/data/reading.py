"""Reading the slices of an index: each file must still be the one that was indexed.

Between `ich index` and what follows, a folder may be exported, sorted or renamed again. The header
that is read with the pixels is therefore compared with what the index says of the file. The time
of a file is not: copied and moved data sets stay what they are.
"""

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ich_keras.ct.dicom import CTSlice, read_slice
from ich_keras.ct.elements import name, show
from ich_keras.ct.geometry import SAME_POSITION_MM, slice_normal
from ich_keras.ct.header import SliceHeader
from ich_keras.ct.members import Member, require_member
from ich_keras.ct.plausibility import Content
from ich_keras.ct.rejects import RejectedFile
from ich_keras.ct.series import SeriesIndex
from ich_keras.ct.sources import Source, file_of, source_of, unreadable
from ich_keras.ct.tables import COSINES, shown_path
from ich_keras.ct.volumes import SAME_VOLUME_TOLERANCE
from ich_keras.data.inputs import resize_hu
from ich_keras.data.skull import SkullProfile, skull_profile

if TYPE_CHECKING:
    import pandas as pd

HASH_DIGITS = 32
# Two slices of a volume may each differ that much from a third.
_ORIENTATION_TOLERANCE = 2 * SAME_VOLUME_TOLERANCE + 1e-9


class IndexedSlice(NamedTuple):
    """What an index says of one slice; see `ich_keras.ct.series.SeriesIndex` for the meaning.

    Args:
        container: path of the file, or of the archive that it lies in.
        file_size: bytes; of a member of an archive, when unpacked.
        turn: how its pixels are turned when they are read (`ich_keras.ct.turning`).
        member, member_offset, member_bytes, member_crc32: its place in an archive
            (`ich_keras.ct.members.Member`); "" and 0 for a plain file.
        frame: its number in a file that holds several slices, from 1; 0 for others.
        normal: (3,), unit normal of the series; `position_mm` is the position along it.
        orientation: (6,), direction cosines of the series.
    """

    container: str
    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str
    patient_id: str
    rows: int
    columns: int
    row_spacing_mm: float
    column_spacing_mm: float
    position_mm: float
    file_size: int
    turn: str
    member: str
    member_offset: int
    member_bytes: int
    member_crc32: int
    frame: int
    normal: tuple[float, ...]
    orientation: tuple[float, ...]

    @property
    def path(self) -> str:
        """What people read: see `ich_keras.ct.tables.shown_path`."""
        return shown_path(self.container, self.member, self.frame)

    @property
    def source(self) -> Source:
        """What `ich_keras.ct.dicom` reads."""
        return source_of(self)


@dataclass(frozen=True, eq=False)
class ReadSlice:
    """One slice as it goes into a cache or a network's input.

    Args:
        hu: int16 (size, size), HU.
        repaired: whether the 12-bit repair was applied.
        content: what the slice shows, for judging its series (`ich_keras.ct.plausibility`).
        skull: what it shows of the skull, if that was asked for and its pixels are fine enough.
    """

    hu: np.ndarray
    repaired: bool
    content: Content
    skull: SkullProfile | None = None

    @property
    def pixel_hash(self) -> str:
        """The hash of `hu`; see `pixel_hash`."""
        return pixel_hash(self.hu)


def pixel_hash(hu: np.ndarray) -> str:
    """Return the first half of the SHA-256 of a slice's pixels, 32 hexadecimal digits.

    On processors with instructions for it, SHA-256 takes a third of the time of BLAKE2.

    Args:
        hu: int16 (rows, columns), HU.

    >>> pixel_hash(np.zeros((2, 2), np.int16))
    'af5570f5a1810b7af78caf4bc70a660f'
    """
    content = np.ascontiguousarray(hu, "<i2").data
    return hashlib.sha256(content).hexdigest()[:HASH_DIGITS]


def indexed_slices(index: SeriesIndex) -> list[IndexedSlice]:
    """Return what an index says of each of its slices, in the order of its table."""
    planes = {}
    for uid, *cosines in _rows(index.series, ["series_uid", *COSINES]):
        planes[uid] = (tuple(slice_normal(cosines).tolist()), tuple(cosines))
    return [
        IndexedSlice._make((*facts, *planes[uid]))
        for *facts, uid in _rows(index.slices, [*IndexedSlice._fields[:-2], "series_uid"])
    ]


def _rows(table: "pd.DataFrame", columns: list[str]) -> list[tuple]:
    return list(zip(*(table[column].tolist() for column in columns), strict=True))


def read_indexed(indexed: IndexedSlice, size: int, with_skull: bool = False) -> ReadSlice:
    """Read one slice of an index and resize it.

    Args:
        indexed: what the index says of it.
        size: rows and columns of the result, pixels.
        with_skull: also look at the skull, before resizing.

    Raises:
        RejectedFile: as `read_whole`.
    """
    record, skull = read_whole(indexed), None
    if with_skull:
        skull = skull_profile(record.hu, indexed.row_spacing_mm, indexed.column_spacing_mm)
    return ReadSlice(resize_hu(record.hu, size), record.repaired, record.content, skull)


def read_whole(indexed: IndexedSlice) -> CTSlice:
    """Read one slice of an index at its own matrix.

    Raises:
        RejectedFile: it cannot be read, or it is not the file that was indexed (CHANGED).
    """
    # Whether its Image Type will do was decided when it was indexed.
    record = read_slice(indexed.source, any_image_type=True)
    found = differences(record.header, indexed)
    if not found and not indexed.member:  # a member of another size was refused as it was opened
        try:
            file_size = os.stat(indexed.container).st_size  # noqa: PTH116 (a Path costs 5 us)
        except OSError as error:  # removed while it was read
            raise unreadable(error) from error
        if file_size != indexed.file_size:
            found = [_differs("the file's size", file_size, indexed.file_size)]
    if found:
        raise RejectedFile("CHANGED", "; ".join(found))
    return record


def is_in_place(indexed: IndexedSlice) -> bool:
    """Return whether a file is where the index says, with its size; its content is not read."""
    try:
        file = file_of(indexed)
        if isinstance(file, Member):
            require_member(file)
            return True
        return os.stat(indexed.container).st_size == indexed.file_size  # noqa: PTH116
    except (OSError, RejectedFile):
        return False


def differences(header: SliceHeader, indexed: IndexedSlice) -> list[str]:
    """Say what a header tells otherwise than the index did; a PatientID is not shown."""
    found = []
    for keyword, now, before in (
        ("SOPInstanceUID", header.sop_instance_uid, indexed.sop_instance_uid),
        ("SeriesInstanceUID", header.series_instance_uid, indexed.series_instance_uid),
        ("StudyInstanceUID", header.study_instance_uid, indexed.study_instance_uid),
    ):
        if now != before:
            found.append(_differs(name(keyword), show(now), show(before)))
    if header.patient_id != indexed.patient_id:
        found.append(f"{name('PatientID')} has changed since it was indexed")
    matrix = header.rows, header.columns
    spacing = header.row_spacing_mm, header.column_spacing_mm
    for place, pair, before_pair in (
        ("Rows x Columns", matrix, (indexed.rows, indexed.columns)),
        (name("PixelSpacing"), spacing, (indexed.row_spacing_mm, indexed.column_spacing_mm)),
    ):
        if pair != before_pair:
            found.append(_differs(place, *("{} x {}".format(*two) for two in (pair, before_pair))))
    if str(header.turn) != indexed.turn:
        now, before = (
            f"turning the pixels ({turn})" if turn else "not turning the pixels"
            for turn in (str(header.turn), indexed.turn)
        )
        found.append(
            f"{name('ImageOrientationPatient')} now means {now}; when it was indexed it meant"
            f" {before}"
        )
    cosines = zip(header.orientation, indexed.orientation, strict=True)
    if max(abs(one - other) for one, other in cosines) > _ORIENTATION_TOLERANCE:
        found.append(
            _differs(name("ImageOrientationPatient"), header.orientation, indexed.orientation)
        )
    along = zip(header.position, indexed.normal, strict=True)
    position_mm = sum(part * normal for part, normal in along)
    if abs(position_mm - indexed.position_mm) > SAME_POSITION_MM:
        found.append(
            _differs("the position", f"{position_mm:.2f} mm", f"{indexed.position_mm:.2f} mm")
        )
    return found


def _differs(place: str, now: object, before: object) -> str:
    return f"{place} is {now}; {before} when it was indexed"
