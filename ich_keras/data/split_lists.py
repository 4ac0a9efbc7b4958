"""A split from the user's own lists: a CSV file that says which identifiers belong where."""

import dataclasses
from pathlib import Path

import pandas as pd

from ich_keras.counting import number_of
from ich_keras.data.csv_rows import (
    FAULTS_SHOWN,
    RowFaults,
    excerpt,
    first_few,
    open_csv,
    read_header,
)
from ich_keras.data.labels import is_labelled
from ich_keras.data.split_record import (
    SPLITS,
    Split,
    members_of,
    require_members,
    require_two_classes,
    series_split,
)
from ich_keras.errors import DataError
from ich_keras.labels import SIX, LabelSet

FILE_KEYS = (
    "patient_id",
    "study_instance_uid",
    "series_instance_uid",
    "series_uid",
    "sop_instance_uid",
)


def split_from_file(path: Path | str, slices: pd.DataFrame, labels: LabelSet = SIX) -> Split:
    """Read the user's own lists: a CSV with a column `split` and one column of identifiers.

    `split` holds train, valid or test. The identifiers are patient_id, study_instance_uid,
    series_instance_uid, series_uid or sop_instance_uid; other columns are ignored. `note` counts
    the identifiers that are not in the index, with their lines, the repeated rows, and the slices
    and patients that no row names.

    Raises:
        UsageError: the file cannot be opened.
        DataError: its content is refused: header, a value of `split`, one identifier in two
            splits, nothing that is in the index, or an empty split.
    """
    key, part_of, line_of, num_duplicates = _read_lists(path)
    labelled = slices[is_labelled(slices, labels)]
    require_two_classes(labelled, labels)
    parts = labelled[key].map(part_of)
    listed = labelled[parts.notna()]
    if listed.empty:
        # Without the identifiers: they may be PatientIDs, and messages end up in logs.
        raise DataError(
            f"{path}: none of its {len(part_of):,} values of {key} belongs to a labelled slice.",
            f"Give the list that belongs to these DICOM files, with {key} as they have it.",
        )
    file = Path(path).name
    found = set(listed[key])
    unknown = [line for uid, line in line_of.items() if uid not in found]
    shown = first_few([f"line {line}" for line in unknown[:FAULTS_SHOWN]], len(unknown))
    num_patients = labelled["patient_id"].nunique() - listed["patient_id"].nunique()
    num_left = len(labelled) - len(listed)
    notes = [
        f"{len(found):,} of {len(part_of):,} values of {key} in {file} belong to labelled slices,"
        f" the others do not ({shown})"
        if unknown
        else "",
        f"{number_of(num_duplicates, 'repeated row')} in {file}" if num_duplicates else "",
        f"{number_of(num_left, 'labelled slice')} that the split list does not name, left out"
        if num_left
        else "",
        f"{number_of(num_patients, 'patient')} of whom it names no slice" if num_patients else "",
    ]
    note = "; ".join(part for part in notes if part)
    name = f"file:{Path(path).name}"
    if key == "sop_instance_uid":
        members = members_of(listed[key], parts[parts.notna()])
        require_members(members, name)
        return Split(name, None, key, members, note=note)
    series = listed.assign(part=parts[parts.notna()])[["series_uid", "part"]].drop_duplicates()
    split = series_split(name, None, series["series_uid"], series["part"])
    return dataclasses.replace(split, note=note)


def _read_lists(path: Path | str) -> tuple[str, dict[str, str], dict[str, int], int]:
    """Return the key column, split and line of each identifier, the number of repeated rows."""
    expected = f"`split` and one of {', '.join(FILE_KEYS)}"
    hint = "The first line names the columns."
    whole_hint = f"Expected the columns {expected}."
    with open_csv(path) as reader:
        header = read_header(reader, path, whole_hint)
        keys = [name for name in header if name in FILE_KEYS]
        if len(keys) != 1 or header.count("split") != 1:
            shown = excerpt(",".join(header))
            raise DataError(f"{path}: the header is {shown}; expected {expected}.", hint)
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
                faults.add(line, f"{number_of(len(row), 'field')}, expected {len(header)}")
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
        raise DataError(f"{path} has a header but no rows.", "Add a row per identifier.")
    return keys[0], part_of, line_of, num_duplicates
