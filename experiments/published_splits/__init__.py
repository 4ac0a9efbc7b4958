"""A split that everybody can make again: it depends on the PatientIDs alone.

Each patient's part follows from the SHA-256 of the PatientID, so it stays the same whatever files,
labels, library versions or other patients there are. 70 % train, 15 % validate, 15 % test.
README.md beside this file says how to make and check RSNA's.
"""

import csv
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

from ich_keras.data.csv_rows import excerpt, open_csv
from ich_keras.errors import DataError
from ich_keras.files import atomic_write, require_absent

NAME = "ich_keras split 1"
PARTS = (("train", 0.70), ("valid", 0.85), ("test", 1.0))  # shares up to and with each
PATIENT_COLUMNS = ("patient_id", "PatientID", "PatientId")


def part_of(patient_id: str) -> str:
    """Return the part that a patient belongs to.

    >>> [part_of(f"patient {number}") for number in range(4)]
    ['test', 'train', 'train', 'train']
    """
    digest = hashlib.sha256(f"{NAME}:{patient_id}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return next(part for part, up_to in PARTS if place < up_to)


def split_text(patient_ids: Iterable[str]) -> str:
    """Return the list as CSV: patient_id and split, sorted; what `--split` reads."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("patient_id", "split"))
    writer.writerows((one, part_of(one)) for one in sorted(set(patient_ids)))
    return text.getvalue()


def read_patients(path: Path | str) -> list[str]:
    """Read the PatientIDs of a table, such as slices.csv of an index.

    Raises:
        UsageError: the file cannot be opened.
        DataError: it has no column of PatientIDs, or one is empty.
    """
    with open_csv(path) as reader:
        header = next(reader, [])
        places = [header.index(name) for name in PATIENT_COLUMNS if name in header]
        if not places:
            raise DataError(
                f"{path}: the header is {excerpt(','.join(header))}; expected one of"
                f" {', '.join(PATIENT_COLUMNS)}.",
                "Give slices.csv of an index, or another table of patients.",
            )
        found = []
        for row in reader:
            if not row:
                continue
            if len(row) != len(header) or not row[places[0]]:
                raise DataError(f"{path}, line {reader.line_num}: no PatientID.")
            # Tables of ours guard what a spreadsheet would take for a formula.
            found.append(row[places[0]].removeprefix("'"))
    if not found:
        raise DataError(f"{path} has no rows.")
    return found


def write_split(table: Path | str, out: Path | str) -> str:
    """Write the list of a table's patients.

    Args:
        table: see `read_patients`.
        out: a new CSV file.

    Returns:
        The SHA-256 of the file, 64 digits: equal for everybody with these patients.

    Raises:
        UsageError: `out` exists, or the table cannot be opened.
        DataError: the table has no patients.
    """
    out = require_absent(out)
    text = split_text(read_patients(table))
    atomic_write(out, text)
    return hashlib.sha256(text.encode()).hexdigest()
