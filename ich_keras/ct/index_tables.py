"""From entries to the tables of an index: volumes in order, with what is to be said of each."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ich_keras.ct.body import BodySize, SlicePlace, volume_body_size
from ich_keras.ct.geometry import (
    in_plane_shear,
    is_axial,
    shear_degrees,
    slice_normal,
    slice_spacing_mm,
    tilt_degrees,
)
from ich_keras.ct.journal import Entry
from ich_keras.ct.kind import is_elsewhere
from ich_keras.ct.tables import SERIES_COLUMNS, SLICE_COLUMNS, make_table
from ich_keras.ct.traits import series_traits, usual_thickness_mm
from ich_keras.ct.verdict import INCOMPLETE, LOCALIZER, NOT_HEAD, verdict
from ich_keras.ct.volumes import KERNEL, THICKNESS, Volume, volumes_of
from ich_keras.ct.walk import mapping
from ich_keras.executors import Workers

# How many volumes a worker process measures at a time.
CHUNK_VOLUMES = 64


def make_tables(
    slices: list[Entry], lost: Mapping[str, int], workers: Workers = 0, any_body_part: bool = False
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Group slices into volumes, order them, and say what is wrong with each volume.

    Args:
        slices: each SOPInstanceUID once.
        lost: SeriesInstanceUID -> number of its files that were refused.
        workers: processes that measure bodies (0 does so in this one), or an executor.
        any_body_part: do not ask whether a volume shows a head.

    Returns:
        The tables of slices and of series, as `SeriesIndex` has them.
    """
    by_uid: dict[str, Volume] = defaultdict(list)
    for entry in slices:
        by_uid[entry.series_instance_uid].append(entry)
    volumes = [
        _placed(uid if number == 1 else f"{uid}#{number}", volume)
        for uid, entries in by_uid.items()
        for number, volume in enumerate(volumes_of(entries), 1)
    ]
    volumes.sort(
        key=lambda one: (one.reference.patient_id, one.reference.study_instance_uid, one.series_uid)
    )
    sizes = [None] * len(volumes) if any_body_part else _body_sizes(volumes, workers)
    slice_rows, series_rows = [], []
    for volume, size in zip(volumes, sizes, strict=True):
        words = _words(volume.reference, size, any_body_part)
        # A scout that lacks its fellow is complete.
        is_scout = LOCALIZER in words
        num_lost = 0 if is_scout else lost.get(volume.reference.series_instance_uid, 0)
        slice_rows += _slice_rows(volume)
        series_rows.append(_series_row(volume, words, size, num_lost))
    return make_table(slice_rows, SLICE_COLUMNS), make_table(series_rows, SERIES_COLUMNS)


@dataclass(frozen=True, eq=False)
class _Placed:
    """A volume in order.

    Args:
        series_uid: its key.
        reference: the slice whose plane stands for all: the first by UID.
        slices: inferior to superior.
        positions: float64 (slices, 3), of the first pixels, mm.
        along: float64 (slices,), the same along the normal.
    """

    series_uid: str
    reference: Entry
    slices: Volume
    positions: np.ndarray
    along: np.ndarray

    @property
    def identity(self) -> tuple[str, str, str]:
        """The first columns of both tables."""
        reference = self.reference
        return self.series_uid, reference.series_instance_uid, reference.study_instance_uid


def _placed(series_uid: str, volume: Volume) -> _Placed:
    positions = np.array([entry.position for entry in volume])
    along = positions @ slice_normal(volume[0].orientation)
    # Slices at one position keep their order: by acquisition, then by UID.
    order = np.argsort(along, kind="stable")
    slices = [volume[place] for place in order]
    return _Placed(series_uid, volume[0], slices, positions[order], along[order])


def _words(reference: Entry, size: BodySize | None, any_body_part: bool) -> list[str]:
    words = [LOCALIZER] if reference.is_localizer else []
    is_other = is_elsewhere(reference.body_part) or (size is not None and size.exceeds_head)
    if is_other and not any_body_part:
        words.append(NOT_HEAD)
    return words


def _body_sizes(volumes: list[_Placed], workers: Workers) -> list[BodySize | None]:
    """Measure the body in volumes whose header does not say what they are."""
    sizes: list[BodySize | None] = [None] * len(volumes)
    asked = [
        number
        for number, volume in enumerate(volumes)
        if is_axial(volume.reference.orientation) and not _words(volume.reference, None, False)
    ]
    tasks = [
        [
            SlicePlace(e.source, e.row_spacing_mm, e.column_spacing_mm)
            for e in volumes[number].slices
        ]
        for number in asked
    ]
    starts = range(0, len(tasks), CHUNK_VOLUMES)
    chunks = [tasks[start : start + CHUNK_VOLUMES] for start in starts]
    with mapping(workers, len(chunks), "measuring the body", _is_doubtful) as apply:
        found = [size for part in apply(_measure, chunks) for size in part]
    for number, size in zip(asked, found, strict=True):
        sizes[number] = size
    return sizes


def _is_doubtful(sizes: list[BodySize | None]) -> bool:
    return None in sizes  # pixels that could not be read


def _measure(volumes: list[list[SlicePlace]]) -> list[BodySize | None]:
    return [volume_body_size(volume) for volume in volumes]


def _slice_rows(volume: _Placed) -> list[tuple]:
    return [
        (
            entry.sop_instance_uid,
            *volume.identity,
            entry.patient_id,
            entry.container,
            entry.member,
            slice_index,
            float(along),
            entry.rows,
            entry.columns,
            entry.row_spacing_mm,
            entry.column_spacing_mm,
            entry.file_size,
            entry.file_mtime_ns,
            entry.instance_number,
            float(entry.position[2]),
            entry.turn,
            entry.member_offset,
            entry.member_bytes,
            entry.member_crc32,
            entry.frame,
        )
        for slice_index, (entry, along) in enumerate(zip(volume.slices, volume.along, strict=True))
    ]


def _series_row(volume: _Placed, words: list[str], size: BodySize | None, num_lost: int) -> tuple:
    reference, positions = volume.reference, volume.positions
    also = [*words, INCOMPLETE] if num_lost else words
    traits = series_traits(entry.traits for entry in volume.slices)
    return (
        *volume.identity,
        reference.patient_id,
        len(volume.slices),
        reference.rows,
        reference.columns,
        reference.row_spacing_mm,
        reference.column_spacing_mm,
        slice_spacing_mm(volume.along),
        tilt_degrees(reference.orientation, positions),
        shear_degrees(reference.orientation, positions),
        *in_plane_shear(reference.orientation, positions),
        *reference.orientation,
        verdict(reference.orientation, positions, also),
        num_lost,
        reference.facts[KERNEL] if reference.facts else "",
        reference.body_part,
        math.nan if size is None else size.width_mm,
        traits.scanner,
        usual_thickness_mm(entry.facts[THICKNESS] for entry in volume.slices if entry.facts),
        traits.age_group,
        traits.sex,
        traits.contrast,
    )
