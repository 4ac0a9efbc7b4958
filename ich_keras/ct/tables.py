"""The three tables of an index, and how to write them to csv and read them back without loss."""

import csv
import io
import math
from pathlib import Path

import pandas as pd

from ich_keras.errors import StaleError
from ich_keras.files import atomic_write, fingerprint

TEXT = "str"
# Direction cosines of a series, along a row and along a column.
COSINES = ("row_x", "row_y", "row_z", "column_x", "column_y", "column_z")
SLICE_COLUMNS = {
    "sop_instance_uid": TEXT,
    "series_uid": TEXT,
    "series_instance_uid": TEXT,
    "study_instance_uid": TEXT,
    "patient_id": TEXT,
    "container": TEXT,
    "member": TEXT,
    "slice_index": "int64",
    "position_mm": "float64",
    "rows": "int64",
    "columns": "int64",
    "row_spacing_mm": "float64",
    "column_spacing_mm": "float64",
    "file_size": "int64",
    "file_mtime_ns": "int64",
    "instance_number": TEXT,
    "image_position_z_mm": "float64",
    "turn": TEXT,
    # Where a member lies in its archive (`ich_keras.ct.members.Member`); 0 for plain files.
    "member_offset": "int64",
    "member_bytes": "int64",
    "member_crc32": "int64",
    # Of a file that holds several slices, from 1 (`ich_keras.ct.sources.Frame`); 0 for others.
    "frame": "int64",
}
SERIES_COLUMNS = {
    "series_uid": TEXT,
    "series_instance_uid": TEXT,
    "study_instance_uid": TEXT,
    "patient_id": TEXT,
    "num_slices": "int64",
    "rows": "int64",
    "columns": "int64",
    "row_spacing_mm": "float64",
    "column_spacing_mm": "float64",
    "slice_spacing_mm": "float64",
    "tilt_degrees": "float64",
    "shear_degrees": "float64",
    "shear_row": "float64",
    "shear_column": "float64",
    **dict.fromkeys(COSINES, "float64"),
    "verdict": TEXT,
    "num_rejected": "int64",
    "kernel": TEXT,
    "body_part": TEXT,
    "body_width_mm": "float64",
    # What results are broken down by (`ich_keras.ct.traits`); "" is unknown.
    "scanner": TEXT,
    "slice_thickness_mm": "float64",
    "age_group": TEXT,
    "sex": TEXT,
    "contrast": TEXT,
}
REJECT_COLUMNS = dict.fromkeys(
    ("path", "code", "detail", "explanation", "hint", "series_instance_uid"), TEXT
)
# What a column gets that an older table lacks.
_ABSENT = {TEXT: "", "float64": math.nan, "int64": 0}

# Between the path of an archive and the name of its member, wherever a person reads both.
SEPARATOR = "!/"
# Between a file that holds several slices and the number of one of them.
FRAME_MARK = "#"

# Spreadsheets take a cell that begins with one of these for a formula. The last is our own mark.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")


def patient_or_series(slices: pd.DataFrame) -> pd.Series:
    """Return the owner of each slice: its patient, or its series where it has no PatientID.

    Args:
        slices: with the columns patient_id and series_uid.

    >>> rows = {"patient_id": ["p1", ""], "series_uid": ["1.2", "1.3"]}
    >>> patient_or_series(pd.DataFrame(rows)).tolist()
    ['p1', '1.3']
    """
    return slices["patient_id"].where(slices["patient_id"] != "", slices["series_uid"])


def shown_path(container: str, member: str, frame: int = 0) -> str:
    """Name a slice for people: its file's path, or that of its archive with the member's name.

    Where the file holds several slices, the number of the slice follows.

    >>> shown_path("/data/a.dcm", ""), shown_path("/data/all.zip", "one/a.dcm")
    ('/data/a.dcm', '/data/all.zip!/one/a.dcm')
    >>> shown_path("/data/scan.nii.gz", "", 12)
    '/data/scan.nii.gz#12'
    """
    file = f"{container}{SEPARATOR}{member}" if member else container
    return f"{file}{FRAME_MARK}{frame}" if frame else file


def shown_paths(slices: pd.DataFrame) -> pd.Series:
    """Return `shown_path` of each row of a table of slices."""
    paths = slices["container"]
    if "member" in slices:
        paths = paths.where(slices["member"] == "", paths + SEPARATOR + slices["member"])
    if "frame" in slices and slices["frame"].any():
        numbered = paths + FRAME_MARK + slices["frame"].astype(TEXT)
        paths = paths.where(slices["frame"] == 0, numbered)
    return paths


def make_table(rows: list[tuple], columns: dict[str, str]) -> pd.DataFrame:
    """Make a table with the given columns and dtypes, even from no rows."""
    return pd.DataFrame(rows, columns=list(columns)).astype(columns)


def completed(table: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """Add columns that a table of an older version lacks, at their places: "", 0 or NaN."""
    absent = {name: _ABSENT[dtype] for name, dtype in columns.items() if name not in table}
    if not absent:
        return table
    others = [name for name in table if name not in columns]
    added = {name: pd.Series(value, table.index, columns[name]) for name, value in absent.items()}
    return table.assign(**added)[[*columns, *others]]


def write_table(path: Path, table: pd.DataFrame) -> dict:
    """Write a table as csv; numbers and texts come back exactly.

    A text that a spreadsheet would take for a formula gets an apostrophe in front of it, which
    `read_table` takes away.

    Returns:
        The record that `read_table` needs: the columns' dtypes, and a checksum of the text.
    """
    dtypes = {column: _plain(dtype) for column, dtype in table.dtypes.items()}
    columns = [
        [_guarded(value) for value in table[column]] if dtype == TEXT else _numbers(table[column])
        for column, dtype in dtypes.items()
    ]
    text = io.StringIO(newline="")
    # Quote all texts: some versions of Python leave a lone carriage return unquoted.
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(dtypes)
    writer.writerows(zip(*columns, strict=True))
    atomic_write(path, text.getvalue())
    return {"columns": dtypes, "sha256": fingerprint(text.getvalue())}


def read_table(path: Path, record: dict) -> pd.DataFrame:
    """Read a table that `write_table` wrote.

    Args:
        path: the csv file.
        record: what `write_table` returned.

    Raises:
        StaleError: the file is absent, or was changed or damaged.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StaleError(f"{path} cannot be read ({error}).", "Make the index again.") from error
    if fingerprint(text) != record["sha256"]:
        raise StaleError(f"{path} was changed or damaged.", "Make the index again.")
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    dtypes = record["columns"]
    if header != list(dtypes):
        raise StaleError(f"{path} has other columns than its record says.", "Make the index again.")
    columns = list(zip(*rows, strict=True)) or [()] * len(dtypes)
    return pd.DataFrame(
        {
            name: pd.Series([_parsed(value, dtype) for value in column], dtype=dtype)
            for (name, dtype), column in zip(dtypes.items(), columns, strict=True)
        }
    )


def csv_text(table: pd.DataFrame) -> str:
    """Return a table as CSV for people: texts that a spreadsheet would run get an apostrophe."""
    texts = [column for column, dtype in table.dtypes.items() if _plain(dtype) == TEXT]
    return table.assign(**{name: table[name].map(_guarded) for name in texts}).to_csv(index=False)


def _plain(dtype: object) -> str:
    """Name a dtype so that every version of pandas knows it."""
    if pd.api.types.is_numeric_dtype(dtype) or pd.api.types.is_bool_dtype(dtype):
        return str(dtype)
    return TEXT


def _numbers(column: pd.Series) -> list:
    # Python's repr of a float is the shortest text that gives it back.
    return ["" if value != value else value for value in column.tolist()]


def _guarded(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text


def _parsed(text: str, dtype: str) -> object:
    if dtype == TEXT:
        return text.removeprefix("'")
    if dtype == "bool":
        return text == "True"
    if dtype.startswith("float"):
        return float(text) if text else math.nan
    return int(text)
