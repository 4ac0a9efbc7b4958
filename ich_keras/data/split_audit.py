"""Leaks between the parts of a split: what each part holds, and what two of them share."""

from itertools import combinations

import numpy as np
import pandas as pd

from ich_keras.data.csv_rows import FAULTS_SHOWN, first_few
from ich_keras.data.labels import is_labelled
from ich_keras.data.split_record import (
    LEAKING,
    SPLITS,
    Split,
    require_members,
    require_patient_ids,
)
from ich_keras.errors import DataError
from ich_keras.labels import SIX, LabelSet

_GROUPS = {
    "patients": "patient_id",
    "studies": "study_instance_uid",
    "series": "series_uid",
    "slices": "sop_instance_uid",
}


def audit(split: Split, slices: pd.DataFrame, labels: LabelSet = SIX) -> dict:
    """Count what is in each part and check that no two parts share patients, studies or slices.

    Returns:
        What `count_split` returns.

    Raises:
        DataError: two parts share something, a PatientID is missing so that nobody can tell, or
            a part is empty; not for splits chosen by a name in `LEAKING`, which carry a warning.
    """
    counts = count_split(split, slices, labels)
    if split.name not in LEAKING:
        tables = _tables(split, slices, labels)
        for one, other in combinations(SPLITS, 2):
            _refuse_shared(split, one, other, _common(tables[one], tables[other]), tables)
        require_patient_ids(pd.concat(tables.values()))
    return counts


def count_split(split: Split, slices: pd.DataFrame, labels: LabelSet = SIX) -> dict:
    """Count what is in each part and what two parts share.

    Returns:
        Ready for JSON: {"parts": {"train": {"patients": n, "studies": n, "series": n, "slices": n,
        "positive": {"epidural": n, ...}}, ...}, "shared": {"train/valid": {"patients": n, ...},
        ...}, "left_out": labelled slices in no part, "unlabelled": slices without labels}.

    Raises:
        DataError: a part is empty.
    """
    tables = _tables(split, slices, labels)
    require_members(tables, split.name)
    used = pd.concat(tables.values())["sop_instance_uid"].nunique()
    num_labelled = int(np.count_nonzero(is_labelled(slices, labels)))
    return {
        "parts": {part: _count(table, labels) for part, table in tables.items()},
        # "" is not a patient or a study: slices without an identifier share it.
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


def _tables(split: Split, slices: pd.DataFrame, labels: LabelSet) -> dict[str, pd.DataFrame]:
    return {part: slices.iloc[split.indices(slices, part, labels)] for part in SPLITS}


def _common(one: pd.DataFrame, other: pd.DataFrame) -> dict[str, set]:
    return {
        group: set(one[column].unique()) & set(other[column].unique())
        for group, column in _GROUPS.items()
    }


def _count(table: pd.DataFrame, labels: LabelSet) -> dict:
    counts = {group: int(table[column].nunique()) for group, column in _GROUPS.items()}
    return {**counts, "positive": {name: int((table[name] == 1).sum()) for name in labels.names}}


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
