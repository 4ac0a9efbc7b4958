"""The index: the slices in a folder, the series they form, and the files that are refused."""

import dataclasses
import math
import shutil
from collections import Counter
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ich_keras.ct.duplicates import split_by_uid
from ich_keras.ct.elements import show
from ich_keras.ct.geometry import TILT_DEGREES, neighbour_distances_mm
from ich_keras.ct.index_tables import make_tables
from ich_keras.ct.journal import Journal
from ich_keras.ct.kind import is_elsewhere
from ich_keras.ct.leftovers import remove_rejects, require_absent_or_rejects
from ich_keras.ct.rejects import (
    Reject,
    counts,
    explained,
    joined,
    lost_slices,
    nothing_usable,
    reject_table,
)
from ich_keras.ct.tables import (
    SERIES_COLUMNS,
    SLICE_COLUMNS,
    completed,
    read_table,
    shown_path,
    write_table,
)
from ich_keras.ct.turning import require_turned
from ich_keras.ct.verdict import LOCALIZER, NOT_AXIAL, NOT_HEAD, has_word, shown
from ich_keras.ct.walk import read_all, walk, walk_file
from ich_keras.errors import StaleError, UsageError
from ich_keras.files import fingerprint, read_json, replace, write_json
from ich_keras.labels import LABELS, Labelling
from ich_keras.leftovers import partial_of, remove_leftovers
from ich_keras.progress import Progress

SCHEMA = 1
MANIFEST = "index.json"
LOCK = ".lock"  # behind the name of a journal: whoever writes it holds that
_TABLES = ("slices", "series", "rejects")


@dataclass(frozen=True, eq=False, repr=False)
class SeriesIndex:
    """The slices, series and rejects of a folder.

    Args:
        slices: one row per slice (SLICE_COLUMNS), sorted by patient, study, series and slice index,
            which counts from the most inferior slice. `series_uid` is the key of a volume: the
            SeriesInstanceUID, followed by "#2", "#3" where one UID holds several orientations,
            matrices, pixel spacings or patients, or scans or reconstructions that overlap
            (`volumes`). `container` is the absolute path of the file, or of the archive that holds
            it as `member` ("" for plain files); the columns `member_...` say where, and
            `file_mtime_ns` is the archive's. Rows, columns, spacings and positions are those of the
            turned slice; `turn` says how it was turned (`turning`).
        series: one row per series (SERIES_COLUMNS), in the same order. `slice_spacing_mm` is the
            median distance between neighbours. `verdict.verdict` explains `verdict`, and
            `geometry.in_plane_shear` explains `shear_row` and `shear_column`. `num_rejected` counts
            the files of the same SeriesInstanceUID that were refused; `kernel` and `body_part` are
            as the headers have them; `body_width_mm` is that of the middle slice (`body`), NaN
            where it was not measured. `scanner`, `age_group`, `sex` and `contrast` are those of
            `traits.series_traits`, "" where they are unknown; `slice_thickness_mm` is the nominal
            one of most slices, NaN where none says it.
        rejects: one row per unusable file (REJECT_COLUMNS), sorted by path.
        labelling: the label columns of slices and series; None where there are none.
    """

    slices: pd.DataFrame
    series: pd.DataFrame
    rejects: pd.DataFrame
    labelling: Labelling | None = None

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

    def equals(self, other: "SeriesIndex") -> bool:
        """Return whether another index has the same tables."""
        return all(getattr(self, name).equals(getattr(other, name)) for name in _TABLES)

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
            f"{'kernel ' + row['kernel'] + '; ' if row['kernel'] else ''}"
            f"{shown(row['verdict'])}{_reasons(row)}"
        )

    def usable(self) -> "SeriesIndex":
        """Return the index without localizers, non-axial series, and what is not a head.

        Their slices become rejects LOCALIZER, NOT_AXIAL and NOT_HEAD.
        """
        codes = {}
        for row in self.series.itertuples():
            if has_word(row.verdict, LOCALIZER):
                codes[row.series_uid] = ("LOCALIZER", f"series {row.series_uid} is a localizer")
            elif has_word(row.verdict, NOT_AXIAL):
                detail = f"series {row.series_uid} is {row.tilt_degrees:.0f} degrees from axial"
                codes[row.series_uid] = ("NOT_AXIAL", detail)
            elif has_word(row.verdict, NOT_HEAD):
                codes[row.series_uid] = ("NOT_HEAD", f"series {row.series_uid}: {_body(row)}")
        if not codes:
            return self
        left_out = self.slices["series_uid"].isin(codes)
        found = [
            Reject(
                shown_path(row.container, row.member, row.frame),
                *codes[row.series_uid],
                series_instance_uid=row.series_instance_uid,
            )
            for row in self.slices[left_out].itertuples()
        ]
        return dataclasses.replace(
            self,
            slices=self.slices[~left_out].reset_index(drop=True),
            series=self.series[~self.series["series_uid"].isin(codes)].reset_index(drop=True),
            rejects=joined(self.rejects, found),
        )

    def save(self, folder: Path | str, is_alone: bool = False) -> None:
        """Write slices.csv, series.csv, rejects.csv and index.json into a new folder.

        They are written beside it; the folder gets its name when all is there.

        Args:
            folder: to be made; an empty one is fine.
            is_alone: whether the caller holds a lock that keeps others from saving here.

        Raises:
            UsageError: the folder is not empty.
            EnvironmentProblem: the disk is full.
        """
        folder = require_new(folder).resolve()
        remove_leftovers(folder.parent, folder.name, is_alone)
        partial = partial_of(folder)
        try:
            tables = {
                name: write_table(partial / f"{name}.csv", getattr(self, name)) for name in _TABLES
            }
            content: dict[str, Any] = {"schema": SCHEMA, "tables": tables}
            if self.labelling is not None:
                content["labelling"] = self.labelling.to_dict()
            write_json(partial / MANIFEST, {**content, "checksum": fingerprint(content)})
            if folder.is_dir():
                remove_rejects(folder)
                folder.rmdir()  # empty; Windows renames onto nothing
            replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path | str) -> "SeriesIndex":
        """Read a saved index.

        Raises:
            StaleError: the folder is not an index, or the index has another schema, was changed or
                is damaged.
        """
        folder = Path(folder)
        manifest = read_json(folder / MANIFEST)
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
        series = completed(tables["series"], SERIES_COLUMNS)
        require_turned(series, folder)
        slices = completed(tables["slices"], SLICE_COLUMNS)
        labelling = None
        # Older indexes with labels have RSNA's, without saying so.
        if "labelling" in manifest or set(LABELS) <= set(slices):
            labelling = Labelling.from_dict(manifest.get("labelling"))
        return cls(slices, series, explained(tables["rejects"]), labelling)


def require_new(folder: Path | str) -> Path:
    """Return the path if an index can be saved there.

    Nothing exists there, or only the rejects.csv of an indexing that was refused.

    Raises:
        UsageError: something else exists there.
    """
    return require_absent_or_rejects(folder)


def index_folder(
    folder: Path | str,
    workers: int = 0,
    journal: Path | str | None = None,
    progress: Progress | None = None,
    any_body_part: bool = False,
    leave_out: Path | str | None = None,
    any_image_type: bool = False,
    executor: Executor | None = None,
) -> SeriesIndex:
    """Find the CT slices in a folder or a file, group them into series and put them in order.

    Headers are read, and the pixels of one slice per series: to see whether it shows a head. Links
    to folders are followed; a folder is read once. Archives (zip, uncompressed tar) are read as
    they are, in stored order; nothing is unpacked to disk. A NIfTI volume is read whole, and is a
    series. A file that is not CT becomes a reject, and so does what has a name that begins with a
    dot. Of copies with the same SOPInstanceUID, the first by path is kept; of files that differ,
    none.

    Args:
        folder: of DICOM files, NIfTI volumes and archives of them; or one such file.
        workers: processes that read headers; 0 reads them in this one.
        journal: a file from which an interrupted indexing resumes: files listed there are read
            again only if their size or time has changed. It is kept; remove it when done.
        progress: called as progress("indexing", files done, files).
        any_body_part: do not ask whether a series shows a head; otherwise another part of the body
            gets the verdict "not a head".
        any_image_type: also use what Image Type says is not an acquired slice, such as reformatted
            images; otherwise it becomes a reject (NOT_ORIGINAL).
        leave_out: a folder that is not searched, though it may lie in the other: that of results.
        executor: does what `workers` would do, such as that of `ich_keras.executors.dask_executor`;
            its machines must see the files under the same paths. The result is the same.

    Raises:
        UsageError: the folder does not exist, or the journal file is not a journal.
        NothingUsable: no CT slice was found; its `rejects` say why.
    """
    folder = Path(folder).absolute()
    if not folder.exists():
        raise UsageError(
            f"{folder} does not exist.",
            "Give a folder, an archive (zip, tar), a DICOM file or a NIfTI volume.",
        )
    if workers < 0:
        raise UsageError(f"workers is {workers}; expected 0 or more.")
    journal = None if journal is None else Path(journal).absolute()
    known = Journal(journal, any_image_type)
    own = () if journal is None else (str(journal), f"{journal}{LOCK}")
    found, unread, num_files = [], [], 0
    for entry in walk(folder, leave_out) if folder.is_dir() else walk_file(folder):
        if entry.path in own:
            continue
        before = [entry] if entry.code else known.find(entry)
        found += before
        num_files += bool(before)
        if not before:
            unread.append(entry)
    readers = workers if executor is None else executor
    found += read_all(unread, num_files, readers, known, progress, any_image_type)
    found.sort(key=lambda entry: entry.path)
    slices, rejects = split_by_uid(entry for entry in found if not entry.code)
    rejects += [
        Reject(entry.path, entry.code, entry.detail, entry.hint, entry.series_instance_uid)
        for entry in found
        if entry.code
    ]
    table = reject_table(rejects)
    if not slices:
        raise nothing_usable(
            f"no CT slice in {folder}: {_count(len(found), 'file')} seen",
            table,
            "Is this the folder that holds the DICOM files?",
        )
    return SeriesIndex(*make_tables(slices, lost_slices(table), readers, any_body_part), table)


def _reasons(row: pd.Series) -> str:
    """Explain the words of a verdict that do not speak for themselves, in brackets."""
    reasons = []
    if has_word(row["verdict"], NOT_HEAD):
        reasons.append(_body(row))
    if row["num_rejected"]:
        reasons.append(f"{_count(row['num_rejected'], 'file')} of the series refused")
    return f" ({', '.join(reasons)})" if reasons else ""


def _body(row: Any) -> str:
    """Say why a series is not taken for a head."""
    if is_elsewhere(row.body_part):
        return f"(0018,0015) BodyPartExamined is {show(row.body_part)}"
    return f"the body is {row.body_width_mm:.0f} mm wide"


def _distances(distances_mm: np.ndarray) -> str:
    found = Counter(distances_mm.round(2).tolist())
    return ", ".join(f"{mm:g} mm ({count}x)" for mm, count in sorted(found.items()))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
