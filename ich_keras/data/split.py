"""Which slices train, which choose (valid), which report (test); and who leaks.

A split names series (or single slices) by UID, never patients: the file lies in the run folder,
and a PatientID has no business there. Slices without labels belong to no split.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence, Sized
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from ich_keras import files
from ich_keras.data.csv_rows import FAULTS_SHOWN, RowFaults, excerpt, first_few, open_csv
from ich_keras.data.labels import is_labelled
from ich_keras.data.stratify import stratify
from ich_keras.errors import DataError, UsageError
from ich_keras.labels import ANY, LABELS

SPLITS = ("train", "valid", "test")
FRACTIONS = (0.70, 0.15, 0.15)
FILE_KEYS = (
    "patient_id",
    "study_instance_uid",
    "series_instance_uid",
    "series_uid",
    "sop_instance_uid",
)
_GROUPS = {
    "patients": "patient_id",
    "studies": "study_instance_uid",
    "series": "series_uid",
    "slices": "sop_instance_uid",
}
_SCHEMA = 1

# Chosen by these names, a split may leak; whoever sees its numbers sees the warning too.
LEAKING = {
    "none": (
        "split 'none': training, validation and test use the same slices (deliberate overfitting); "
        "the metrics say nothing about other patients."
    ),
    "thesis-slices": (
        "split 'thesis-slices': slices are split one by one as in the thesis, so that nearly every "
        "held-out series has neighbouring slices in training, and the test slices also choose the "
        "model; the metrics are too good."
    ),
    "thesis-series": (
        "split 'thesis-series': series are split as in the thesis, so that training and test can "
        "share patients, and the test series also choose the model; the metrics are too good."
    ),
}
NAMES = ("patient", *LEAKING)


@dataclasses.dataclass(frozen=True, repr=False)
class Split:
    """Which series or slices belong to train, valid and test.

    Attributes:
        name: one of `NAMES`, or "file:<file name>".
        seed: what the draw depended on; None where nothing was drawn.
        key: the column of the slice table that `members` name: series_uid or sop_instance_uid.
        members: per split a sorted tuple of UIDs.
        warning: what is wrong with the metrics of such a split; "" for a clean one.
        note: what was left out, counted; "" when nothing was.
    """

    name: str
    seed: int | None
    key: str
    members: dict[str, tuple[str, ...]]
    warning: str = ""
    note: str = ""

    def __repr__(self) -> str:
        counts = ", ".join(f"{part} {len(self.members[part]):,}" for part in SPLITS)
        return f"Split({self.name!r}, seed={self.seed}, {self.key}: {counts})"

    def indices(self, slices: pd.DataFrame, part: str) -> np.ndarray:
        """Return the positions of a split's labelled slices, ascending.

        Args:
            slices: the table the split was made for, or one of the same UIDs in any order.
            part: "train", "valid" or "test".

        Returns:
            int64 (slices of this part,), positions of rows.
        """
        if part not in SPLITS:
            raise UsageError(f"unknown split {part!r}.", f"Known: {', '.join(SPLITS)}.")
        member = slices[self.key].isin(self.members[part]).to_numpy(bool)
        return np.flatnonzero(member & is_labelled(slices))

    def save(self, path: Path | str) -> None:
        """Write the split as JSON, in one step."""
        files.write_json(path, {"schema": _SCHEMA, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: Path | str) -> "Split":
        """Read a split that `save` wrote.

        Raises:
            StaleError: the file is absent or is not JSON.
            DataError: it is something else than a split of this version.
        """
        content = files.read_json(path)
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(content, dict) or content.get("schema") != _SCHEMA:
            raise DataError(f"{path} is not a split file of schema {_SCHEMA}.", "Make it anew.")
        if set(content) != names | {"schema"} or not (
            isinstance(content["members"], dict) and set(content["members"]) == set(SPLITS)
        ):
            raise DataError(f"{path} lacks fields of a split, or has others.", "Make it anew.")
        del content["schema"]
        _check_content(content, path)
        content["members"] = {part: tuple(content["members"][part]) for part in SPLITS}
        return cls(**content)


def _check_content(content: dict, path: Path | str) -> None:
    texts = ("name", "warning", "note")
    is_ours = (
        content["key"] in ("series_uid", "sop_instance_uid")
        and all(isinstance(content[field], str) for field in texts)
        and (content["seed"] is None or type(content["seed"]) is int)
        and all(
            isinstance(uids, list) and all(isinstance(uid, str) for uid in uids)
            for uids in content["members"].values()
        )
    )
    if not is_ours:
        raise DataError(f"{path} holds values of the wrong kind for a split.", "Make it anew.")


def make_split(name_or_path: str | Path, slices: pd.DataFrame, seed: int) -> Split:
    """Make a split by name, or read one from a file, and refuse it when it leaks.

    Args:
        name_or_path: "patient", "none", "thesis-slices", "thesis-series", a CSV file (see
            `split_from_file`), or a JSON file that `Split.save` wrote.
        slices: the slice table, with labels.
        seed: of the draw; used by "patient" only.

    Raises:
        UsageError: neither a name nor a file.
        DataError: the split cannot be made, or leaks (see `audit`).
    """
    split = find_split(name_or_path, slices, seed)
    audit(split, slices)
    return split


def find_split(name_or_path: str | Path, slices: pd.DataFrame, seed: int) -> Split:
    """Make or read a split as `make_split` does, without looking whether it leaks."""
    name = str(name_or_path)
    if name == "patient":
        split = split_by_patient(slices, seed)
    elif name == "none":
        split = split_none(slices)
    elif name == "thesis-slices":
        split = thesis_slice_split(slices)
    elif name == "thesis-series":
        split = thesis_series_split(slices)
    elif Path(name).is_file():
        is_ours = Path(name).suffix == ".json"
        split = Split.load(name) if is_ours else split_from_file(name, slices)
    else:
        near = difflib.get_close_matches(name, NAMES, n=1)
        guess = f"Did you mean {near[0]!r}? " if near else ""
        raise UsageError(
            f"split {name!r} is neither a known name nor a file.",
            f"{guess}Known: {', '.join(NAMES)}, or the path of a CSV file.",
        )
    return split


def split_by_patient(
    slices: pd.DataFrame, seed: int, fractions: Sequence[float] = FRACTIONS
) -> Split:
    """Split into train, valid and test by patient, alike in all six labels and in size.

    A patient is positive for a label when any of its slices is; see `stratify`. The result depends
    on the seed and the data, not on the order of rows.

    Args:
        slices: the slice table, with labels.
        seed: of the draw.
        fractions: of patients in train, valid and test; positive, summing to 1.

    Raises:
        UsageError: the fractions are unusable.
        DataError: a PatientID is missing, there are fewer than three patients, or the slices are
            all positive or all negative.
    """
    is_usable = len(fractions) == len(SPLITS) and min(fractions) > 0
    if not (is_usable and abs(sum(fractions) - 1) < 1e-9):
        raise UsageError(
            f"split fractions {tuple(fractions)} are unusable.",
            "Give three positive numbers that sum to 1.",
        )
    labelled = slices[is_labelled(slices)]
    _require_patient_ids(labelled)
    _require_two_classes(labelled)
    by_patient = labelled.groupby("patient_id", sort=True)
    positive = by_patient[list(LABELS)].max().to_numpy(np.int64)
    num_slices = by_patient.size().to_numpy()
    if len(num_slices) < len(SPLITS):
        raise DataError(
            f"{len(num_slices)} patient(s) with labels; three splits need at least three.",
            "Add patients, or overfit deliberately with --split none.",
        )
    parts = stratify(positive, num_slices, np.array(fractions), np.random.default_rng(seed))
    part_of = pd.Series(np.array(SPLITS)[parts], index=by_patient.size().index)
    series = labelled[["series_uid", "patient_id"]].drop_duplicates()
    return _series_split("patient", seed, series["series_uid"], series["patient_id"].map(part_of))


def split_none(slices: pd.DataFrame) -> Split:
    """Put every labelled slice into train, valid and test alike, to overfit deliberately."""
    series = slices.loc[is_labelled(slices), "series_uid"].unique()
    everything = tuple(sorted(series))
    _require_members({"train": everything}, "none")
    return Split("none", None, "series_uid", dict.fromkeys(SPLITS, everything), LEAKING["none"])


def thesis_slice_split(slices: pd.DataFrame) -> Split:
    """Split slices two ways as the thesis did for its 2D network.

    Imitated: single slices, not patients, are split; sorted by image ID (SOPInstanceUID); the
    first 80 % train, rounded down (602,242 of RSNA's 752,803); the others (150,561) both choose
    the model and give the reported numbers. Not imitated: that its unreadable files became zeros.
    """
    return _two_way_split("thesis-slices", slices, "sop_instance_uid")


def thesis_series_split(slices: pd.DataFrame) -> Split:
    """Split series two ways as the thesis did for its 3D network.

    Imitated: whole series, not patients, are split, in their order (here: sorted by series UID);
    the first 80 % train, rounded down (5,400 of its 6,750); the others (1,350) both choose the
    model and give the reported numbers. Not imitated: which 6,750 series it had.
    """
    return _two_way_split("thesis-series", slices, "series_uid")


def _two_way_split(name: str, slices: pd.DataFrame, key: str) -> Split:
    labelled = slices[is_labelled(slices)]
    _require_two_classes(labelled)
    uids = sorted(labelled[key].unique())
    num_train = len(uids) * 4 // 5
    held_out = tuple(uids[num_train:])
    members = {"train": tuple(uids[:num_train]), "valid": held_out, "test": held_out}
    _require_members(members, name)
    return Split(name, None, key, members, LEAKING[name])


def split_from_file(path: Path | str, slices: pd.DataFrame) -> Split:
    """Read the user's own lists: a CSV with a column `split` and one column of identifiers.

    `split` holds train, valid or test. The identifiers are patient_id, study_instance_uid,
    series_instance_uid, series_uid or sop_instance_uid; other columns are ignored. Identifiers
    that are not in the index, repeated rows and slices that no row names are counted in `note`.

    Raises:
        UsageError: the file cannot be opened.
        DataError: its content is refused: header, a value of `split`, one identifier in two
            splits, nothing that is in the index, or an empty split.
    """
    key, part_of, num_duplicates = _read_lists(path)
    labelled = slices[is_labelled(slices)]
    _require_two_classes(labelled)
    parts = labelled[key].map(part_of)
    listed = labelled[parts.notna()]
    num_unknown = len(part_of) - listed[key].nunique()
    if listed.empty:
        raise DataError(
            f"{path}: none of its {len(part_of):,} values of {key} belongs to a labelled slice, "
            f"e.g. {excerpt(next(iter(part_of)))}.",
            "Give the list that belongs to these DICOM files.",
        )
    notes = [
        (num_unknown, f"identifiers in {Path(path).name} that belong to no labelled slice"),
        (num_duplicates, f"repeated rows in {Path(path).name}"),
        (len(labelled) - len(listed), "labelled slices that it does not name, left out"),
    ]
    note = "; ".join(f"{count:,} {what}" for count, what in notes if count)
    name = f"file:{Path(path).name}"
    if key == "sop_instance_uid":
        members = _members(listed[key], parts[parts.notna()])
        _require_members(members, name)
        return Split(name, None, key, members, note=note)
    series = listed.assign(part=parts[parts.notna()])[["series_uid", "part"]].drop_duplicates()
    split = _series_split(name, None, series["series_uid"], series["part"])
    return dataclasses.replace(split, note=note)


def _read_lists(path: Path | str) -> tuple[str, dict[str, str], int]:
    """Return the key column, the split of each identifier and the number of repeated rows."""
    hint = f"Expected a header with the column split and one of {', '.join(FILE_KEYS)}."
    with open_csv(path) as reader:
        header = next(reader, None)
        if header is None:
            raise DataError(f"{path} is empty.", hint)
        keys = [name for name in header if name in FILE_KEYS]
        if len(keys) != 1 or header.count("split") != 1:
            shown = excerpt(",".join(header))
            raise DataError(f"{path}: the first line is {shown}; it does not fit.", hint)
        key_column, part_column = header.index(keys[0]), header.index("split")
        faults = RowFaults(path)
        part_of: dict[str, str] = {}
        line_of: dict[str, int] = {}
        num_duplicates = 0
        for row in reader:
            if not row:
                continue
            line = reader.line_num
            if len(row) != len(header):
                faults.add(line, f"{len(row)} fields, expected {len(header)}")
                continue
            uid, part = row[key_column], row[part_column]
            if not uid:
                faults.add(line, f"{keys[0]} is empty")
            elif part not in SPLITS:
                faults.add(line, f"split {excerpt(part)}, expected {', '.join(SPLITS)}")
            elif part_of.setdefault(uid, part) != part:
                # Without the identifier: it may be a PatientID, and messages end up in logs.
                earlier = f"the same {keys[0]} is in {part_of[uid]} on line {line_of[uid]}"
                faults.add(line, f"{part} here, but {earlier}")
            elif uid in line_of:
                num_duplicates += 1
            else:
                line_of[uid] = line
    faults.refuse("Correct or remove these rows.")
    if not part_of:
        raise DataError(f"{path} has a header but no rows.", hint)
    return keys[0], part_of, num_duplicates


def audit(split: Split, slices: pd.DataFrame) -> dict:
    """Count what is in each part and check that no two parts share patients, studies or slices.

    Returns:
        What `count_split` returns.

    Raises:
        DataError: two parts share something, a PatientID is missing so that nobody can tell, or
            a part is empty; not for splits chosen by a name in `LEAKING`, which carry a warning.
    """
    counts = count_split(split, slices)
    if split.name not in LEAKING:
        tables = _tables(split, slices)
        for one, other in combinations(SPLITS, 2):
            _refuse_shared(split, one, other, _common(tables[one], tables[other]), tables)
        _require_patient_ids(pd.concat(tables.values()))
    return counts


def count_split(split: Split, slices: pd.DataFrame) -> dict:
    """Count what is in each part and what two parts share.

    Returns:
        JSON-able: {"parts": {"train": {"patients": n, "studies": n, "series": n, "slices": n,
        "positive": {"epidural": n, ...}}, ...}, "shared": {"train/valid": {"patients": n, ...},
        ...}, "left_out": labelled slices in no part, "unlabelled": slices without labels}.

    Raises:
        DataError: a part is empty.
    """
    tables = _tables(split, slices)
    _require_members(tables, split.name)
    used = pd.concat(tables.values())["sop_instance_uid"].nunique()
    num_labelled = int(np.count_nonzero(is_labelled(slices)))
    return {
        "parts": {part: _count(table) for part, table in tables.items()},
        # "" is no patient and no study: it is shared by those of whom nothing is known.
        "shared": {
            f"{one}/{other}": {
                group: len(uids - {""})
                for group, uids in _common(tables[one], tables[other]).items()
            }
            for one, other in combinations(SPLITS, 2)
        },
        "left_out": num_labelled - used,
        "unlabelled": len(slices) - num_labelled,
    }


def _tables(split: Split, slices: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {part: slices.iloc[split.indices(slices, part)] for part in SPLITS}


def _common(one: pd.DataFrame, other: pd.DataFrame) -> dict[str, set]:
    return {
        group: set(one[column].unique()) & set(other[column].unique())
        for group, column in _GROUPS.items()
    }


def _count(table: pd.DataFrame) -> dict:
    counts = {group: int(table[column].nunique()) for group, column in _GROUPS.items()}
    return {**counts, "positive": {name: int(table[name].sum()) for name in LABELS}}


def _refuse_shared(split: Split, one: str, other: str, common: dict, tables: dict) -> None:
    for group in ("slices", "series", "studies", "patients"):
        uids = sorted(common[group] - {""})
        if not uids:
            continue
        column = _GROUPS[group]
        # A PatientID must not reach a log: one series of each part stands for the patient.
        pairs = [
            " and ".join(
                f"{table.loc[table[column] == uid, 'series_uid'].iloc[0]} ({part})"
                for part, table in ((one, tables[one]), (other, tables[other]))
            )
            for uid in uids[:FAULTS_SHOWN]
        ]
        raise DataError(
            f"split {split.name!r}: {one} and {other} share {len(uids):,} {group}: series "
            f"{first_few(pairs, len(uids))}.",
            "Put all of a patient into one split; otherwise the metrics would be too good.",
        )


def _series_split(name: str, seed: int | None, series: pd.Series, parts: pd.Series) -> Split:
    members = _members(series, parts)
    _require_members(members, name)
    return Split(name, seed, "series_uid", members)


def _members(uids: pd.Series, parts: pd.Series) -> dict[str, tuple[str, ...]]:
    return {part: tuple(sorted(uids[(parts == part).to_numpy()])) for part in SPLITS}


def _require_members(members: Mapping[str, Sized], name: str) -> None:
    empty = [part for part, uids in members.items() if not len(uids)]
    if empty:
        raise DataError(
            f"split {name!r}: {' and '.join(empty)} would hold no labelled slice.",
            "Every part needs some: add data or change the split.",
        )


def _require_patient_ids(slices: pd.DataFrame) -> None:
    missing = slices.loc[slices["patient_id"] == "", "sop_instance_uid"]
    if len(missing):
        examples = first_few(list(missing[:FAULTS_SHOWN]), len(missing))
        raise DataError(
            f"{len(missing):,} of {len(slices):,} slices have no PatientID (0010,0020), so that "
            f"nobody can tell whose they are: {examples}.",
            "Restore the tag, remove these files, or overfit deliberately with --split none.",
        )


def _require_two_classes(labelled: pd.DataFrame) -> None:
    num_positive = int((labelled[ANY] == 1).sum())
    if num_positive in (0, len(labelled)):
        only = "negative" if num_positive == 0 else "positive"
        raise DataError(
            f"all {len(labelled):,} labelled slices are {only} (label any); there is nothing to "
            "tell apart.",
            "Add the other class, or overfit deliberately with --split none.",
        )
