"""The index: the slices in a folder, the series they form, and the files that are refused."""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ich_keras.ct.geometry import (
    SAME_POSITION_MM,
    TILT_DEGREES,
    in_plane_shear,
    neighbour_distances_mm,
    shear_degrees,
    slice_normal,
    slice_spacing_mm,
    tilt_degrees,
)
from ich_keras.ct.journal import Entry, Journal
from ich_keras.ct.rejects import Reject, counts, explained, joined, nothing_usable, reject_table
from ich_keras.ct.tables import (
    SERIES_COLUMNS,
    SLICE_COLUMNS,
    TEXT,
    make_table,
    read_table,
    write_table,
)
from ich_keras.ct.verdict import LOCALIZER, NOT_AXIAL, has_word, shown, verdict
from ich_keras.ct.walk import read_all, walk
from ich_keras.errors import StaleError, UsageError
from ich_keras.files import fingerprint, read_json, require_absent, write_json
from ich_keras.progress import Progress

SCHEMA = 1
_TABLES = ("slices", "series", "rejects")
# How far direction cosines (0.06 degrees) and pixel spacings (mm) of one volume may differ.
SAME_VOLUME_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False, repr=False)
class SeriesIndex:
    """The slices, series and rejects of a folder.

    Args:
        slices: one row per slice (SLICE_COLUMNS), sorted by patient, study, series and slice index,
            which counts from the most inferior slice. `series_uid` is the key of a volume: the
            SeriesInstanceUID, followed by "#2", "#3" where one UID holds several orientations,
            matrices, pixel spacings or patients, or several acquisitions at the same positions.
            `container` is the file's absolute path.
        series: one row per series (SERIES_COLUMNS), in the same order. `slice_spacing_mm` is the
            median distance between neighbours. `verdict.verdict` explains `verdict`, and
            `geometry.in_plane_shear` explains `shear_row` and `shear_column`.
        rejects: one row per unusable file (REJECT_COLUMNS), sorted by path.
    """

    slices: pd.DataFrame
    series: pd.DataFrame
    rejects: pd.DataFrame

    def __repr__(self) -> str:
        return f"SeriesIndex: {self}"

    def __str__(self) -> str:
        patients = self.slices["patient_id"]
        num_patients = patients[patients != ""].nunique()
        rejects = _count(len(self.rejects), "reject")
        if len(self.rejects):
            rejects += f" ({counts(self.rejects)})"
        return (
            f"{_count(len(self.slices), 'slice')}, {len(self.series):,} series,"
            f" {_count(num_patients, 'patient')}, {rejects}"
        )

    def describe(self, series_uid: str) -> str:
        """Describe a series in one line: its slices, their spacing, its tilt and its verdict.

        Raises:
            UsageError: there is no such series.
        """
        rows = self.series[self.series["series_uid"] == series_uid]
        if rows.empty:
            raise UsageError(f"the index holds no series {series_uid}.", "See its series table.")
        row = rows.iloc[0]
        positions = self.slices.loc[self.slices["series_uid"] == series_uid, "position_mm"]
        distances = neighbour_distances_mm(positions.to_numpy())
        spacing = _distances(distances)
        if row["shear_degrees"] > TILT_DEGREES:
            steps = _distances(distances / math.cos(math.radians(row["shear_degrees"])))
            spacing = f"{spacing} along the normal, {steps} along the table"
        return (
            f"{series_uid}: {_count(row['num_slices'], 'slice')} of {row['rows']} x"
            f" {row['columns']}; "
            f"slice spacing {spacing or 'n/a'}; tilt {row['tilt_degrees']:.1f} degrees; "
            f"{shown(row['verdict'])}"
        )

    def usable(self) -> "SeriesIndex":
        """Return the index without localizers and non-axial series.

        Their slices become rejects LOCALIZER and NOT_AXIAL.
        """
        codes = {}
        for row in self.series.itertuples():
            if has_word(row.verdict, LOCALIZER):
                codes[row.series_uid] = ("LOCALIZER", f"series {row.series_uid} is a localizer")
            elif has_word(row.verdict, NOT_AXIAL):
                detail = f"series {row.series_uid} is {row.tilt_degrees:.0f} degrees from axial"
                codes[row.series_uid] = ("NOT_AXIAL", detail)
        if not codes:
            return self
        left_out = self.slices["series_uid"].isin(codes)
        found = [
            Reject(
                row.container if row.member == "" else f"{row.container}/{row.member}",
                *codes[row.series_uid],
            )
            for row in self.slices[left_out].itertuples()
        ]
        return SeriesIndex(
            slices=self.slices[~left_out].reset_index(drop=True),
            series=self.series[~self.series["series_uid"].isin(codes)].reset_index(drop=True),
            rejects=joined(self.rejects, found),
        )

    def save(self, folder: Path | str) -> None:
        """Write slices.csv, series.csv, rejects.csv and, last, index.json into a new folder.

        Raises:
            UsageError: the folder is not empty.
        """
        folder = require_absent(folder)
        tables = {
            name: write_table(folder / f"{name}.csv", getattr(self, name)) for name in _TABLES
        }
        content = {"schema": SCHEMA, "tables": tables}
        write_json(folder / "index.json", {**content, "checksum": fingerprint(content)})

    @classmethod
    def load(cls, folder: Path | str) -> "SeriesIndex":
        """Read a saved index.

        Raises:
            StaleError: the folder is not an index, or the index has another schema, was changed or
                is damaged.
        """
        folder = Path(folder)
        manifest = read_json(folder / "index.json")
        found = manifest.get("schema") if isinstance(manifest, dict) else None
        if found != SCHEMA:
            raise StaleError(
                f"{folder} is an index of schema {found}; expected {SCHEMA}.",
                "Make the index again.",
            )
        # Older indexes have no checksum.
        checksum = manifest.pop("checksum", None)
        if checksum not in (None, fingerprint(manifest)):
            raise StaleError(f"{folder / 'index.json'} is damaged.", "Make the index again.")
        records = manifest.get("tables")
        fields = {"columns": dict, "sha256": str}
        if not isinstance(records, dict) or not all(
            isinstance(records.get(name), dict)
            and all(isinstance(records[name].get(key), kind) for key, kind in fields.items())
            for name in _TABLES
        ):
            raise StaleError(f"{folder / 'index.json'} is damaged.", "Make the index again.")
        tables = {name: read_table(folder / f"{name}.csv", records[name]) for name in _TABLES}
        # Older indexes lack some columns.
        absent = {
            name: "" if dtype == TEXT else math.nan
            for name, dtype in SLICE_COLUMNS.items()
            if name not in tables["slices"]
        }
        slices = tables["slices"].assign(**absent)
        return cls(slices, tables["series"], explained(tables["rejects"]))


def index_folder(
    folder: Path | str,
    workers: int = 0,
    journal: Path | str | None = None,
    progress: Progress | None = None,
) -> SeriesIndex:
    """Find the CT slices in a folder, group them into series and put them in order.

    Only headers are read. Sub-folders are searched in the order of their names. Links to folders
    are not followed, and names that begin with a dot are skipped. A file that is not a CT slice
    becomes a reject. Of two files with the same SOPInstanceUID, the first by path is kept.

    Args:
        folder: of DICOM files.
        workers: processes that read headers; 0 reads them in this one.
        journal: a file from which an interrupted indexing resumes: files listed there are read
            again only if their size or time has changed. It is kept; remove it when done.
        progress: called as progress("indexing", files done, files).

    Raises:
        UsageError: the folder does not exist, or the journal file is not a journal.
        NothingUsable: no CT slice was found; its `rejects` say why.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is not a folder.", "Give the folder that holds the DICOM files."
        )
    if workers < 0:
        raise UsageError(f"workers is {workers}; expected 0 or more.")
    journal = None if journal is None else Path(journal).absolute()
    known = Journal(journal)
    found, unread = [], []
    for entry in walk(folder):
        if journal is not None and entry.path == str(journal):
            continue
        before = None if entry.code else known.find(*entry[:3])
        if entry.code or before is not None:
            found.append(before or entry)
        else:
            unread.append(entry)
    found += read_all(unread, len(found), workers, known, progress)
    found.sort(key=lambda entry: entry.path)
    slices, rejects = _reject_duplicates(found)
    if not slices:
        raise nothing_usable(
            f"no CT slice in {folder}: {_count(len(found), 'file')} seen",
            reject_table(rejects),
            "Is this the folder that holds the DICOM files?",
        )
    return _build(slices, rejects)


def _reject_duplicates(entries: list[Entry]) -> tuple[list[Entry], list[Reject]]:
    """Split entries into slices, each SOPInstanceUID once, and rejects."""
    slices: dict[str, Entry] = {}
    rejects: list[Reject] = []
    for entry in entries:
        if entry.code:
            rejects.append(Reject(entry.path, entry.code, entry.detail, entry.hint))
            continue
        first = slices.setdefault(entry.sop_instance_uid, entry)
        if first is not entry:
            detail = (
                f"(0008,0018) SOPInstanceUID {entry.sop_instance_uid} is also that of {first.path}"
            )
            rejects.append(Reject(entry.path, "DUPLICATE_UID", detail))
    return list(slices.values()), rejects


def _build(slices: list[Entry], rejects: list[Reject]) -> SeriesIndex:
    by_uid = defaultdict(list)
    for entry in slices:
        by_uid[entry.series_instance_uid].append(entry)
    volumes = []
    for uid, entries in by_uid.items():
        for number, volume in enumerate(_volumes(entries), 1):
            series_uid = uid if number == 1 else f"{uid}#{number}"
            first = volume[0]
            volumes.append((first.patient_id, first.study_instance_uid, series_uid, volume))
    volumes.sort(key=lambda volume: volume[:3])
    slice_rows, series_rows = [], []
    for _, _, series_uid, volume in volumes:
        new_slices, new_series = _rows_of(series_uid, volume)
        slice_rows += new_slices
        series_rows.append(new_series)
    return SeriesIndex(
        slices=make_table(slice_rows, SLICE_COLUMNS),
        series=make_table(series_rows, SERIES_COLUMNS),
        rejects=reject_table(rejects),
    )


def _volumes(entries: list[Entry]) -> list[list[Entry]]:
    """Split the slices of one SeriesInstanceUID into volumes, the largest first.

    Slices are ordered by UID, not by path: renamed files give the same volumes.
    """
    groups: dict[tuple, list[tuple[np.ndarray, list[Entry]]]] = defaultdict(list)
    for entry in sorted(entries, key=lambda entry: entry.sop_instance_uid):
        exact = (
            entry.patient_id,
            entry.study_instance_uid,
            entry.rows,
            entry.columns,
            entry.is_localizer,
        )
        near = np.array([*entry.orientation, entry.row_spacing_mm, entry.column_spacing_mm])
        for reference, volume in groups[exact]:
            if abs(near - reference).max() <= SAME_VOLUME_TOLERANCE:
                volume.append(entry)
                break
        else:
            groups[exact].append((near, [entry]))
    volumes = [part for group in groups.values() for _, volume in group for part in _scans(volume)]
    return sorted(volumes, key=lambda volume: (-len(volume), volume[0].sop_instance_uid))


def _scans(volume: list[Entry]) -> list[list[Entry]]:
    """Separate acquisitions at the same positions: a head scanned twice, or a perfusion.

    Every slice then has neighbours from its own scan. Adjacent acquisitions, such as the rotations
    or halves of one scan, stay together even if they share some slices. A single slice at an
    occupied position (scanned again, or watched for the contrast medium) is a scan of its own.
    Not separated: a second scan at other positions (the series is then irregular), and scans that
    AcquisitionNumber does not distinguish: none, or a different one for every slice (duplicate).
    """
    parts = defaultdict(list)
    for entry in volume:
        parts[entry.acquisition].append(entry)
    if max(map(len, parts.values())) == 1:
        return [volume]
    normal = slice_normal(volume[0].orientation)
    scans: list[list[Entry]] = []
    for part in sorted(parts.values(), key=_rank):
        # The latest first: a rotation starts where the previous one ended.
        for scan in reversed(scans):
            if 2 * _num_shared(part, scan, normal) <= min(len(part), len(scan)):
                scan += part
                break
        else:
            scans.append(part)
    return scans


def _rank(acquisition: list[Entry]) -> tuple:
    """Order acquisitions by their numbers, which follow time; those without one come last."""
    first = acquisition[0]
    # An IS has at most 12 characters (PS3.5 6.2); anything longer is not a number.
    is_number = first.acquisition.isdecimal() and len(first.acquisition) <= 12
    return int(first.acquisition) if is_number else math.inf, first.sop_instance_uid


def _num_shared(ones: list[Entry], others: list[Entry], normal: np.ndarray) -> int:
    """Count the slices of the first that share a position with a slice of the second."""
    one, other = (
        np.array([entry.position for entry in entries]) @ normal for entries in (ones, others)
    )
    return int((abs(one[:, None] - other).min(axis=1) <= SAME_POSITION_MM).sum())


def _rows_of(series_uid: str, volume: list[Entry]) -> tuple[list[tuple], tuple]:
    """Order a volume from inferior to superior; return its rows for both tables."""
    reference = volume[0]
    normal = slice_normal(reference.orientation)
    positions = np.array([entry.position for entry in volume])
    along = positions @ normal
    # Slices at one position keep their order: by acquisition, then by UID.
    order = np.argsort(along, kind="stable")
    identity = (series_uid, reference.series_instance_uid, reference.study_instance_uid)
    slice_rows = []
    for slice_index, place in enumerate(order):
        entry = volume[place]
        slice_rows.append(
            (
                entry.sop_instance_uid,
                *identity,
                entry.patient_id,
                entry.path,
                "",
                slice_index,
                float(along[place]),
                entry.rows,
                entry.columns,
                entry.row_spacing_mm,
                entry.column_spacing_mm,
                entry.file_size,
                entry.file_mtime_ns,
                entry.instance_number,
                float(entry.position[2]),
            )
        )
    series_row = (
        *identity,
        reference.patient_id,
        len(volume),
        reference.rows,
        reference.columns,
        reference.row_spacing_mm,
        reference.column_spacing_mm,
        slice_spacing_mm(along[order]),
        tilt_degrees(reference.orientation, positions),
        shear_degrees(reference.orientation, positions),
        *in_plane_shear(reference.orientation, positions),
        *reference.orientation,
        verdict(reference.orientation, positions[order], reference.is_localizer),
    )
    return slice_rows, series_row


def _distances(distances_mm: np.ndarray) -> str:
    found = Counter(distances_mm.round(2).tolist())
    return ", ".join(f"{mm:g} mm ({count}x)" for mm, count in sorted(found.items()))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
