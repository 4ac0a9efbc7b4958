"""Labels of a data set: what they are of, and how they join the tables of images.

An image that is in the index but not in the label table gets `UNLABELLED` (-1) in all label
columns. It stays in place as a neighbour of other slices, but no split holds it. A label may also
be missing alone: it then counts in no loss and no metric.
"""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ich_keras.counting import number_of
from ich_keras.ct.tables import SERIES_COLUMNS, SLICE_COLUMNS, shown_paths
from ich_keras.data.csv_rows import FAULTS_SHOWN, excerpt, first_few
from ich_keras.data.label_matching import PATH, PLACE, match, prefix_hint
from ich_keras.errors import DataError
from ich_keras.labels import LEVELS, RSNA_LABELLING, SIX, UNLABELLED, Labelling, LabelSet

if TYPE_CHECKING:
    from ich_keras.ct.series import SeriesIndex

_OF_RESULTS = (
    *("fold", "study", "repaired", "pixel_hash", "split", "bleed_ml"),
    *("domain", "domain_distance", "operated", "empty", "disagreement"),
)
_NOUNS = {
    "slice": ("image", "images"),
    "series": ("series", "series"),
    "study": ("study", "studies"),
    "patient": ("patient", "patients"),
}
TAGS = {
    "sop_instance_uid": "SOPInstanceUIDs",
    "series_instance_uid": "SeriesInstanceUIDs",
    "study_instance_uid": "StudyInstanceUIDs",
    PATH: "Paths",
}


@dataclasses.dataclass(frozen=True, repr=False)
class LabelTable:
    """The labels of a data set.

    Attributes:
        table: indexed by what identifies a slice, series, study or patient (str, unique, in the
            file's order); an int8 column for each label, 0, 1 or -1 where it is missing.
        source: the file.
        num_rows: rows of the file, without its header and empty lines.
        num_duplicates: rows that repeated an earlier one and were merged with it.
        num_inconsistent: rows whose `any` is not the OR of the subtypes; 0 unless allowed.
        labelling: which labels, and of what.
        kind: the format that was recognised.
        num_readers: int8, by the same index: how many people read each; None if it is not known.
        key: what identifies a row: a column of the slice table; "path" of a file or folder;
            "place", patient and slice number ("7/12"); "" takes that of the level.
        is_loose: compare identifiers without case, signs and leading zeros.
        owners: by the same index, the SeriesInstanceUID or StudyInstanceUID that the file gives
            beside the identifier ("" where it gives none), and the line; None if it has no such
            column.
        unused: columns of the file that were not used.
    """

    table: pd.DataFrame
    source: str
    num_rows: int
    num_duplicates: int = 0
    num_inconsistent: int = 0
    labelling: Labelling = RSNA_LABELLING
    kind: str = "RSNA's table of slices"
    num_readers: pd.Series | None = None
    key: str = ""
    is_loose: bool = False
    owners: pd.DataFrame | None = None
    unused: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"LabelTable({self})"

    def __str__(self) -> str:
        positives = ", ".join(f"{name} {count:,}" for name, count in self.num_positive.items())
        rows = number_of(self.num_rows, "row")
        notes = f"{rows}, {number_of(self.num_duplicates, 'duplicate')} merged"
        missing = int((self.table.to_numpy() == UNLABELLED).sum())
        if missing:
            notes += f", {number_of(missing, 'label')} missing"
        if self.num_readers is not None:
            low, high = int(self.num_readers.min()), int(self.num_readers.max())
            many = f"{low} to {high} readers" if low != high else number_of(low, "reader")
            notes += f", {many} each"
        if self.num_inconsistent:
            rows = number_of(self.num_inconsistent, "row")
            notes += f", {rows} whose any is not the OR of the subtypes"
        if self.unused:
            shown = [excerpt(name) for name in self.unused[:FAULTS_SHOWN]]
            notes += f", columns not used: {first_few(shown, len(self.unused))}"
        what = number_of(len(self), *_NOUNS[self.labelling.level])
        return f"{what}; positive: {positives}; {notes}; {self.kind}; {self.source}"

    @property
    def labels(self) -> LabelSet:
        """The label columns."""
        return self.labelling.labels

    @property
    def num_positive(self) -> dict[str, int]:
        """Number of positive rows per label."""
        return {name: int((self.table[name] == 1).sum()) for name in self.labels.names}


@dataclasses.dataclass(frozen=True)
class LabelJoin:
    """How a label table and an index match.

    Attributes:
        num_labelled: slices with labels, of their own or of their series, study or patient.
        num_unlabelled: slices without labels; they stay in the table, and out of every split.
        num_labels_unused: rows of the label table without an image.
        labelling: which labels, and of what: rows for files may turn out to be of whole series.
    """

    num_labelled: int
    num_unlabelled: int
    num_labels_unused: int
    labelling: Labelling = RSNA_LABELLING

    def __str__(self) -> str:
        level = self.labelling.level
        whose = "" if level == "slice" else f" (each those of its {level})"
        return (
            f"{number_of(self.num_labelled, 'slice')} with labels{whose};"
            f" {self.num_unlabelled:,} without (not used for training);"
            f" {number_of(self.num_labels_unused, 'label')} without an image"
        )


def has_labels(table: pd.DataFrame, labels: LabelSet = SIX) -> bool:
    """Tell whether a table of slices or series has the columns of some labels."""
    return set(labels.names) <= set(table.columns)


def is_labelled(slices: pd.DataFrame, labels: LabelSet = SIX) -> np.ndarray:
    """Tell for each row whether it has a label.

    Returns:
        bool (rows,).

    Raises:
        DataError: no labels were joined to this table.

    >>> table = pd.DataFrame({name: [0, UNLABELLED] for name in SIX.names})
    >>> is_labelled(table).tolist()
    [True, False]
    """
    absent = [name for name in labels.names if name not in slices.columns]
    if absent:
        raise DataError(
            f"the slices have no labels (columns {', '.join(absent)} are absent).",
            "Join a label file first.",
        )
    return (slices[list(labels.names)].to_numpy() != UNLABELLED).any(axis=1)


def is_positive(values: np.ndarray, labels: LabelSet = SIX) -> np.ndarray:
    """Tell which rows are positive: by the label that stands for the others, or by any of them.

    Args:
        values: int (n, labels); of exclusive labels, none is positive.
        labels: what the columns mean.

    Returns:
        bool (n,).
    """
    if labels.exclusive:
        return np.zeros(len(values), bool)
    is_any = (values == 1).any(axis=1)
    if labels.any_column is None:
        return is_any
    own = values[:, labels.any_column]
    return np.where(own == UNLABELLED, is_any, own == 1)


def contradicts_any(values: np.ndarray, labels: LabelSet) -> np.ndarray:
    """Tell which rows have a label for the others that the others contradict.

    One of them is 1, and it is 0; or all five subtypes are 0, and it is 1 (without a column for
    each subtype, a bleed of another kind may be there).

    Args:
        values: int (n, labels); -1 is missing and contradicts nothing.
        labels: with an `any_label`, and others.

    Returns:
        bool (n,).
    """
    assert labels.any_column is not None
    parts = np.delete(values, labels.any_column, axis=1)
    own = values[:, labels.any_column]
    wrong = (parts == 1).any(axis=1) & (own == 0)
    if set(labels.parts) == set(SIX.parts):
        wrong |= (parts == 0).all(axis=1) & (own == 1)
    return wrong


def series_labels(slices: pd.DataFrame, labels: LabelSet = SIX) -> pd.DataFrame:
    """Return the labels of whole series: positive when any of its labelled slices is.

    Args:
        slices: with the columns series_uid and the labels (int8; -1 = no label).
        labels: the columns.

    Returns:
        Indexed by series_uid in the order of first appearance; int8 columns; -1 where no slice of
        the series has the label, and where exclusive labels differ between its slices.

    Raises:
        DataError: no labels were joined to this table.

    >>> slices = pd.DataFrame({name: [0, 1, UNLABELLED] for name in SIX.names})
    >>> series_labels(slices.assign(series_uid=["a", "a", "b"]))["any"].to_dict()
    {'a': 1, 'b': -1}
    """
    is_labelled(slices, labels)
    found = slices.groupby("series_uid", sort=False)[list(labels.names)].max()
    found.loc[torn_series(slices, labels)] = UNLABELLED
    return found


def torn_series(slices: pd.DataFrame, labels: LabelSet) -> list[str]:
    """Return the series whose slices have different exclusive labels; none of other labels.

    Such a series as a whole is of no class.

    Args:
        slices: with the columns series_uid and the labels (int8; -1 = no label).
        labels: the columns.
    """
    if not labels.exclusive:
        return []
    names = list(labels.names)
    known = slices[(slices[names] != UNLABELLED).all(axis=1)]
    differing = known.groupby("series_uid", sort=False)[names].nunique().max(axis=1) > 1
    return differing.index[differing].tolist()


def attach_labels(slices: pd.DataFrame, labels: LabelTable) -> tuple[pd.DataFrame, LabelJoin]:
    """Add the label columns to a table of slices; rows, order and positions stay as they are.

    Args:
        slices: with the column that identifies what the labels are of (`LEVELS`).

    Returns:
        A new table, with int8 columns (-1 where there is no label), and the counts.

    Raises:
        DataError: no label belongs to any of the images, a label is called as another column, or
            a patient and slice number fit several images.

    >>> table = pd.DataFrame({name: [1] for name in SIX.names}, index=["ID_1"], dtype="int8")
    >>> labels = LabelTable(table, "labels.csv", num_rows=6)
    >>> slices, join = attach_labels(pd.DataFrame({"sop_instance_uid": ["ID_2", "ID_1"]}), labels)
    >>> slices["any"].tolist(), join.num_unlabelled
    ([-1, 1], 1)
    """
    names = labels.labels.names
    taken = {*slices.columns, *SLICE_COLUMNS, *SERIES_COLUMNS, *_OF_RESULTS}
    clashing = [name for name in names if name in taken]
    if clashing:
        raise DataError(
            f"{labels.source}: a label is called {clashing[0]!r}, as a column of tables of images"
            " or results is.",
            "Give it another name.",
        )
    level = labels.labelling.level
    key = labels.key or LEVELS[level]
    keys = labels.table.index.tolist()
    positions, is_shared = match(slices, keys, key, labels.is_loose, labels.source)
    if key == PATH and is_shared:
        level = "series"
    matched = positions >= 0
    if not matched.any():
        raise _nothing_matched(slices, labels, key)
    if key == PLACE and is_shared:
        raise _several_fit(slices, labels, positions)
    _require_owners(slices, labels, positions)
    values = labels.table.to_numpy()[positions]
    values[~matched] = UNLABELLED
    used = np.zeros(len(labels), dtype=bool)
    used[positions[matched]] = True
    join = LabelJoin(
        num_labelled=int((values != UNLABELLED).any(axis=1).sum()),
        num_unlabelled=int((values == UNLABELLED).all(axis=1).sum()),
        num_labels_unused=int((~used).sum()),
        labelling=Labelling(labels.labels, level),
    )
    return slices.assign(**dict(zip(names, values.T, strict=True))), join


def _require_owners(slices: pd.DataFrame, labels: LabelTable, positions: np.ndarray) -> None:
    """Refuse rows that say that an image is of another series or study than its file says."""
    if labels.owners is None:
        return
    matched = positions >= 0
    theirs = labels.owners.iloc[positions[matched]]
    for level in theirs.columns.drop("line"):
        said, own = theirs[level].to_numpy(), slices.loc[matched, level].to_numpy()
        wrong = (said != own) & (said != "") & (own != "")
        if not wrong.any():
            continue
        lines = theirs["line"].to_numpy()[wrong]
        _, firsts = np.unique(lines, return_index=True)
        shown = [
            f"line {lines[n]}: {excerpt(said[wrong][n])}, in the files {excerpt(own[wrong][n])}"
            for n in firsts[:FAULTS_SHOWN]
        ]
        raise DataError(
            f"{labels.source}: the {TAGS[level][:-1]} of a row is not that of the image:"
            f" {first_few(shown, len(firsts))}.",
            "Correct the file, or remove the column that does not count.",
        )


def _nothing_matched(slices: pd.DataFrame, labels: LabelTable, key: str) -> DataError:
    hint = "Give the label file that belongs to these DICOM files."
    start = f"{labels.source}: the labels match no image."
    if key == PLACE:
        return DataError(
            f"{start} They are for a patient and slice number; {_unlike(slices)}.", hint
        )
    if key == "patient_id":  # must not reach a log
        return DataError(f"{start} They are for patients; no PatientID is the same.", hint)
    theirs = first_few([excerpt(uid) for uid in labels.table.index[:2]], len(labels))
    ours = (shown_paths(slices) if key == PATH else slices[key]).drop_duplicates()
    shown = first_few([excerpt(uid) for uid in ours[:2]], len(ours)) or "none"
    hint = prefix_hint(slices, labels.table.index.tolist(), key) or hint
    what = _NOUNS[labels.labelling.level][1]
    return DataError(f"{start} Labels are for {theirs}. {TAGS[key]} of the {what}: {shown}.", hint)


def _unlike(slices: pd.DataFrame) -> str:
    if not slices["instance_number"].str.strip().any():
        return "the images have no InstanceNumber"
    return "no image has the PatientID and the InstanceNumber of a row"


def _several_fit(slices: pd.DataFrame, labels: LabelTable, positions: np.ndarray) -> DataError:
    """Describe rows of patient and slice number that fit several images, without the PatientID."""
    found = slices[["series_uid"]].assign(row=positions)[positions >= 0]
    images = found.groupby("row")["series_uid"]
    several = images.size() > 1
    in_series = several & (images.nunique() > 1)
    what, count = ("series", in_series) if in_series.any() else ("images of a series", several)
    return DataError(
        f"{labels.source}: patient and slice number fit several {what}"
        f" ({number_of(int(count.sum()), 'row')} of {len(labels):,}).",
        "Index only the series that the labels are of, or give the SOPInstanceUID of each image.",
    )


def join_labels(index: "SeriesIndex", labels: LabelTable) -> tuple["SeriesIndex", LabelJoin]:
    """Give an index its labels, per slice and per series.

    Args:
        index: as `index_folder` returns it, or with other labels.
        labels: as `read_labels` returns them.

    Returns:
        A new index whose tables have the int8 columns (-1 = no label), and the counts.

    Raises:
        DataError: no label belongs to any of the images.
    """
    index = without_labels(index)
    slices, join = attach_labels(index.slices, labels)
    per_series = series_labels(slices, labels.labels)
    per_series = per_series.reindex(index.series["series_uid"], fill_value=UNLABELLED)
    columns = {name: per_series[name].to_numpy(np.int8) for name in labels.labels.names}
    series = index.series.assign(**columns)
    found = dataclasses.replace(index, slices=slices, series=series, labelling=join.labelling)
    return found, join


def without_labels(index: "SeriesIndex") -> "SeriesIndex":
    """Return an index without its label columns, if it has any."""
    if index.labelling is None:
        return index
    slices, series = (
        table.drop(columns=list(index.labelling.labels.names), errors="ignore")
        for table in (index.slices, index.series)
    )
    return dataclasses.replace(index, slices=slices, series=series, labelling=None)
