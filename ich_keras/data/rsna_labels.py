"""RSNA's label file: one row per image and label."""

from array import array
from pathlib import Path

import numpy as np
import pandas as pd

from ich_keras.counting import number_of
from ich_keras.data.csv_rows import (
    FAULTS_SHOWN,
    CsvRows,
    RowFaults,
    excerpt,
    first_few,
    is_identifier,
    open_csv,
    read_header,
)
from ich_keras.data.labels import LabelTable
from ich_keras.errors import DataError
from ich_keras.labels import LABELS, NUM_LABELS, SIX, UNLABELLED

HEADER = ["ID", "Label"]
# pandas writes 0.0 and 1.0 when a column of 0 and 1 once had a missing value.
VALUES = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}

_COLUMNS = {name: column for column, name in enumerate(LABELS)}
_ANY_COLUMN = SIX.index("any")
_FORMAT_HINT = (
    "Expected RSNA's stage_2_train.csv: the header ID,Label, then rows like ID_000012eaf_any,0."
)


def read_rsna_labels(path: Path | str, allow_inconsistent_any: bool = False) -> LabelTable:
    """Read RSNA's label file: one row per image and label, `<SOPInstanceUID>_<label>,<0 or 1>`.

    The order of rows does not matter. Identical rows are merged and counted (RSNA's file has 24).
    Anything else unusual is refused with line numbers: a header other than `ID,Label`, other
    columns, an unknown label, a value other than 0, 1, 0.0 or 1.0, two rows that contradict each
    other, an image that lacks one of its six rows, `any` that is not the OR of the five subtypes.

    Args:
        path: the CSV file, UTF-8, any line ends.
        allow_inconsistent_any: keep images whose `any` is not the OR of the subtypes as they are,
            and count them, instead of refusing the file.

    Raises:
        UsageError: the file cannot be opened.
        DataError: its content is refused; the message names the first lines.

    >>> import tempfile
    >>> rows = [f"ID_1_{name},{int(name in ('subdural', 'any'))}" for name in LABELS]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "labels.csv"
    ...     _ = path.write_text("\\n".join(["ID,Label", *rows]))
    ...     labels = read_rsna_labels(path)
    >>> len(labels), labels.num_positive["subdural"], labels.num_positive["epidural"]
    (1, 1, 0)
    """
    with open_csv(path) as reader:
        header = read_header(reader, path, _FORMAT_HINT)
        if header != HEADER:
            shown = excerpt(",".join(header))
            raise DataError(f"{path}: the header is {shown}; expected 'ID,Label'.", _FORMAT_HINT)
        uids, found, lines, num_rows, num_duplicates = _read_rows(reader, path)
    if num_rows == 0:
        raise DataError(f"{path} has a header but no rows.", _FORMAT_HINT)
    _refuse_missing(path, uids, found, lines)
    wrong_any = found[:, _ANY_COLUMN] != found[:, :_ANY_COLUMN].max(axis=1)
    if wrong_any.any() and not allow_inconsistent_any:
        _refuse_wrong_any(path, uids, found, lines, np.flatnonzero(wrong_any))
    index = pd.Index(uids, dtype="str", name="sop_instance_uid")
    table = pd.DataFrame(found, index=index, columns=list(LABELS))
    return LabelTable(table, str(path), num_rows, num_duplicates, int(wrong_any.sum()))


def _read_rows(
    reader: CsvRows, path: Path | str
) -> tuple[list[str], np.ndarray, np.ndarray, int, int]:
    """Return UIDs, int8 values (images, 6) with -1 where no row was seen, the rows' line numbers
    (images, 6), and the numbers of rows and duplicates.

    One pass with a dict: pandas needs three times the time and five times the memory.
    """
    positions: dict[str, int] = {}
    found = array("b")
    lines = array("q")
    no_values, no_lines = array("b", [UNLABELLED] * NUM_LABELS), array("q", [0] * NUM_LABELS)
    faults = RowFaults(path)
    num_rows = num_duplicates = 0
    for row in reader:
        if not row:
            continue
        num_rows += 1
        if len(row) != 2:
            faults.add(reader.line_num, f"{number_of(len(row), 'field')}, expected 2")
            continue
        name, text = row
        uid, _, label = name.rpartition("_")
        column = _COLUMNS.get(label)
        value = VALUES.get(text)
        if column is None:
            faults.add(reader.line_num, f"{excerpt(name)} does not end in one of the six labels")
            continue
        if value is None:
            faults.add(
                reader.line_num, f"label {excerpt(text)} of {excerpt(name)}, expected 0 or 1"
            )
            continue
        position = positions.get(uid)
        if position is None:
            if not is_identifier(uid):
                faults.add(reader.line_num, f"{excerpt(name)} names no image")
                continue
            position = positions[uid] = len(positions)
            found.extend(no_values)
            lines.extend(no_lines)
        cell = position * NUM_LABELS + column
        if found[cell] == UNLABELLED:
            found[cell] = value
            lines[cell] = reader.line_num
        elif found[cell] == value:
            num_duplicates += 1
        else:
            earlier = f"but {found[cell]} on line {lines[cell]}"
            faults.add(reader.line_num, f"{excerpt(name)} is {value} here, {earlier}")
    faults.refuse(f"Correct or remove these rows. {_FORMAT_HINT}")
    shape = (len(positions), NUM_LABELS)
    values = np.frombuffer(found, dtype=np.int8) if found else np.empty(0, np.int8)
    numbers = np.frombuffer(lines, dtype=np.int64) if lines else np.empty(0, np.int64)
    return list(positions), values.reshape(shape), numbers.reshape(shape), num_rows, num_duplicates


def _refuse_missing(
    path: Path | str, uids: list[str], found: np.ndarray, lines: np.ndarray
) -> None:
    holes = np.flatnonzero((found == UNLABELLED).any(axis=1))
    if not len(holes):
        return
    shown = []
    for image in holes[:FAULTS_SHOWN]:
        missing = ", ".join(np.array(LABELS)[found[image] == UNLABELLED])
        line = lines[image][lines[image] > 0].min()
        shown.append(f"{uids[image]} (line {line}) has no row for {missing}")
    raise DataError(
        f"{path}: every image needs six rows: {first_few(shown, len(holes))}.",
        "Add the missing rows or remove the image's others.",
    )


def _refuse_wrong_any(
    path: Path | str,
    uids: list[str],
    found: np.ndarray,
    lines: np.ndarray,
    images: np.ndarray,
) -> None:
    shown = []
    for image in images[:FAULTS_SHOWN]:
        positive = [name for name in LABELS[:_ANY_COLUMN] if found[image, _COLUMNS[name]]]
        subtypes = f"{', '.join(positive)} is 1" if positive else "no subtype is 1"
        line = lines[image, _ANY_COLUMN]
        shown.append(f"line {line}: any of {uids[image]} is {found[image, -1]}, but {subtypes}")
    raise DataError(
        f"{path}: any must be the OR of the five subtypes: {first_few(shown, len(images))}.",
        "Correct the file, or keep the labels as they are with allow_inconsistent_any=True.",
    )
