"""The rows of a label file as they are read, and the table that they make.

Rows that repeat or complete each other are merged, rows that contradict each other are refused.
"""

from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ich_keras.data.csv_rows import RowFaults, excerpt
from ich_keras.data.labels import TAGS, LabelTable, contradicts_any
from ich_keras.errors import DataError
from ich_keras.labels import SIX, UNLABELLED, Labelling, LabelSet

HINT = "Labels are 0 or 1; leave a cell empty where a label is missing."
_LEVEL_OF = {
    "sop_instance_uid": "slice",
    "place": "slice",
    "path": "slice",  # or a series, as the files turn out to hold one or more
    "series_instance_uid": "series",
    "study_instance_uid": "study",
    "patient_id": "patient",
}


class LabelRows:
    """Rows as they are read: values and lines by identifier.

    Args:
        path: for messages.
        labels: the columns.
        key: what identifies a row; "place" is patient and slice number.
        kind: what the format is called.
        owners: what else the rows are of: columns of the slice table with a UID, coarser than
            `key`.
        unused: names of columns that are not used.

    Attributes:
        is_any_derived: whether a missing `any` follows from the subtypes.
    """

    def __init__(
        self,
        path: Path | str,
        labels: LabelSet,
        key: str,
        kind: str,
        owners: Sequence[str] = (),
        unused: Sequence[str] = (),
    ) -> None:
        self.labels, self.key, self.kind = labels, key, kind
        self.faults = RowFaults(path)
        self.places: dict[str, int] = {}
        self.values = array("b")
        self.lines = array("q")
        self.readers = array("b")
        self.num_rows = self.num_duplicates = 0
        self.is_loose = self.is_any_derived = False
        self.filled: dict[tuple[int, int], int] = {}  # cells that a later row gave -> its line
        self.owners: dict[str, list[str]] = {name: [] for name in owners}
        self.unused = tuple(unused)

    def add(
        self, line: int, key: str, values: list[int], readers: int = 0, owners: Sequence[str] = ()
    ) -> None:
        """Add a row, or compare it with an earlier one of the same identifier."""
        place = self.places.get(key)
        if place is None:
            self.places[key] = len(self.places)
            self.values.extend(values)
            self.lines.append(line)
            self.readers.append(readers)
            for known, owner in zip(self.owners.values(), owners, strict=True):
                known.append(owner)
            return
        if not self._has_same_owners(line, key, place, owners):
            return
        width = len(self.labels)
        start = place * width
        before = self.values[start : start + width].tolist()
        for column, (one, other) in enumerate(zip(before, values, strict=True)):
            # A tie of readers is no gap that another row may fill.
            if one == other or (UNLABELLED in (one, other) and not readers):
                continue
            # Of a patient, the identifier is not shown: messages end up in logs.
            whose = "the same patient" if self.key in ("patient_id", "place") else excerpt(key)
            earlier = self.filled.get((place, column), self.lines[place])
            self.faults.add(
                line, f"{whose} has another {self.labels.names[column]} on line {earlier}"
            )
            return
        for column, (one, other) in enumerate(zip(before, values, strict=True)):
            if one != other and one == UNLABELLED:
                self.values[start + column] = other
                self.filled[place, column] = line
        self.num_duplicates += 1

    def _has_same_owners(self, line: int, key: str, place: int, owners: Sequence[str]) -> bool:
        for (name, known), owner in zip(self.owners.items(), owners, strict=True):
            if owner and known[place] and owner != known[place]:
                what = f"{excerpt(key)} has another {TAGS[name][:-1]}"
                self.faults.add(line, f"{what} on line {self.lines[place]}")
                return False
            known[place] = known[place] or owner
        return True


def finished(found: LabelRows, path: Path | str, allow_inconsistent_any: bool) -> LabelTable:
    """Refuse what is wrong as a whole, and make the table."""
    if found.num_rows == 0:
        raise DataError(f"{path} has a header but no rows.", HINT)
    found.faults.refuse(f"Correct or remove these rows. {HINT}")
    values = np.frombuffer(found.values, np.int8).reshape(-1, len(found.labels)).copy()
    keys = list(found.places)
    labels = found.labels
    if found.is_any_derived:
        _derive_any(values, labels)
    num_inconsistent = 0
    if labels.any_column is not None and len(labels) > 1:
        own = values[:, labels.any_column]
        wrong = contradicts_any(values, labels)
        num_inconsistent = int(wrong.sum())
        if num_inconsistent and not allow_inconsistent_any:
            for row in np.flatnonzero(wrong).tolist():
                positive = [name for name in labels.parts if values[row, labels.index(name)] == 1]
                said = f"{', '.join(positive)} is 1" if positive else "no subtype is 1"
                found.faults.add(
                    found.lines[row], f"{labels.any_label} is {int(own[row])}, but {said}"
                )
            found.faults.refuse("Correct the file: any is the OR of the subtypes.")
    table = pd.DataFrame(
        values, index=pd.Index(keys, dtype="str", name=found.key), columns=list(labels.names)
    )
    readers = np.frombuffer(found.readers, np.int8)
    return LabelTable(
        table=table,
        source=str(path),
        num_rows=found.num_rows,
        num_duplicates=found.num_duplicates,
        num_inconsistent=num_inconsistent,
        labelling=Labelling(labels, _LEVEL_OF[found.key]),
        kind=found.kind,
        num_readers=pd.Series(readers, table.index) if readers.any() else None,
        key=found.key,
        is_loose=found.is_loose,
        owners=_owners(found, table.index),
        unused=found.unused,
    )


def _owners(found: LabelRows, index: pd.Index) -> pd.DataFrame | None:
    if not found.owners:
        return None
    lines = np.frombuffer(found.lines, np.int64)
    return pd.DataFrame({**found.owners, "line": lines}, index=index)


def _derive_any(values: np.ndarray, labels: LabelSet) -> None:
    """Fill a missing `any`, in place: 1 where a subtype is 1, 0 where all five are known and 0."""
    if labels.any_column is None or len(labels) == 1:
        return
    parts = np.delete(values, labels.any_column, axis=1)
    own = values[:, labels.any_column]  # a view
    missing = own == UNLABELLED
    own[missing & (parts == 1).any(axis=1)] = 1
    if set(labels.parts) == set(SIX.parts):
        own[missing & (parts == 0).all(axis=1)] = 0
