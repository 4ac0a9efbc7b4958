"""Label files of any known format: recognised by their header, and said.

- RSNA 2019: `ID,Label`, a row per image and label (`rsna_labels`).
- A table with a row per image, series, study, patient or file, and a column per label.
- CQ500's `reads.csv`: three readers per patient; the majority counts.
- PhysioNet CT-ICH's table of diagnoses: a row per patient and slice number.

An empty cell is a missing label. Rows that repeat or complete each other are merged, rows that
contradict each other are refused. Sources of the formats: Chilamkurthy et al., Lancet
2018;392:2388 (CQ500); Hssayeni et al., PhysioNet 2020, doi:10.13026/4nae-zg36 (CT-ICH).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ich_keras.counting import number_of
from ich_keras.data.csv_rows import (
    CsvRows,
    RowFaults,
    excerpt,
    is_identifier,
    open_csv,
    read_header,
)
from ich_keras.data.label_columns import (
    ALIASES,
    Columns,
    check_label_map,
    find_columns,
    parse_label_map,
    plain,
    require_exclusive,
)
from ich_keras.data.label_rows import LabelRows, finished
from ich_keras.data.labels import LabelTable
from ich_keras.data.rsna_labels import HEADER, VALUES, read_rsna_labels
from ich_keras.errors import DataError, UsageError
from ich_keras.labels import ANY, LABELS, SIX, UNLABELLED, LabelSource

# What a person gives as labels: what was read, or the file to read (`label_table`).
Labels = LabelTable | LabelSource | Path | str
MISSING = ("", "na", "nan", "n/a", "null", "none")
MAX_KEY_CHARACTERS = 1024  # of a path
_FORMATS = (
    "Expected the column SOPInstanceUID, SeriesInstanceUID, StudyInstanceUID, PatientID or path and"
    " one for each label; or RSNA's stage_2_train.csv, whose header is ID,Label."
)
_READERS = ("R1", "R2", "R3")


def read_labels(
    path: Path | str,
    label_map: Mapping[str, str] | str | Path | None = None,
    exclusive: bool = False,
    allow_inconsistent_any: bool = False,
) -> LabelTable:
    """Read a label file; its header tells which format it has.

    Args:
        path: a CSV file in UTF-8.
        label_map: column -> label, as a mapping, as "COLUMN=LABEL,COLUMN=LABEL", or a JSON file
            that holds an object; "!label" where the column says the opposite. Columns that it does
            not name are not used. For tables with a column per label.
        exclusive: exactly one label is 1 in every row.
        allow_inconsistent_any: keep rows whose `any` is not the OR of the subtypes.

    Raises:
        UsageError: a file cannot be opened, or the map cannot be used for this format.
        DataError: the content is refused; the message names the first lines.
    """
    label_map = _label_map(label_map)
    with open_csv(path) as reader:
        header = read_header(reader, path, _FORMATS)
        if len(header) < 2:
            raise DataError(f"{path}: the header is {excerpt(','.join(header))}.", _FORMATS)
        kind = _kind(header)
        if kind == "rsna" and exclusive:
            require_exclusive(LABELS, path)
        if kind in ("rsna", "cq500") and (label_map or exclusive):
            option = "--label-map" if label_map else "--exclusive"
            raise UsageError(f"{path} has a format of its own; {option} does not apply to it.")
        if kind == "cq500":
            # Majorities need not agree: two readers may see a bleed, and differ on its kind.
            return finished(_cq500(reader, header, path), path, allow_inconsistent_any=True)
        if kind == "physionet":
            found = _table(reader, header, path, label_map, exclusive, "PhysioNet's diagnoses")
            return finished(found, path, allow_inconsistent_any)
        if kind == "table":
            found = _table(reader, header, path, label_map, exclusive, "a table of labels")
            return finished(found, path, allow_inconsistent_any)
    return read_rsna_labels(path, allow_inconsistent_any)


def label_table(given: Labels) -> LabelTable:
    """Read labels that a person gave in any way.

    Raises:
        UsageError, DataError: as `read_labels`.
    """
    if isinstance(given, LabelTable):
        return given
    if isinstance(given, LabelSource):
        return read_labels(given.path, given.label_map, given.exclusive)
    return read_labels(given)


def _label_map(given: Mapping[str, str] | str | Path | None) -> dict[str, str] | None:
    if given is None:
        return None
    if isinstance(given, Mapping):
        return check_label_map(given.items(), excerpt(str(dict(given))))
    text = str(given)
    if isinstance(given, str) and ("=" in text or not text.strip()):
        return parse_label_map(text)
    try:
        content = json.loads(Path(text).read_text(encoding="utf-8"), object_pairs_hook=_Pairs)
    except OSError as error:
        raise UsageError(
            f"--label-map {text} is neither COLUMN=LABEL,... nor a file that can be read"
            f" ({error.strerror}).",
            "For instance: --label-map 'ICH=any,IPH=intraparenchymal'.",
        ) from error
    except ValueError as error:
        raise UsageError(f"--label-map {text} is not JSON ({error}).") from error
    if not isinstance(content, _Pairs) or not all(isinstance(label, str) for _, label in content):
        raise UsageError(f'--label-map {text}: expected an object such as {{"ICH": "any"}}.')
    return check_label_map(content, text)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it is written: a dict would hide a column that stands there twice."""


def _kind(header: list[str]) -> str:
    """Return the format: "rsna", "cq500", "physionet" or "table"."""
    names = [plain(name) for name in header]
    if names[:1] == ["name"] and "r1ich" in names:
        return "cq500"
    if header == HEADER or names == ["id", "label"]:
        return "rsna"  # whose reader says what is wrong with it
    return "physionet" if {"patientnumber", "slicenumber"} <= set(names) else "table"


def _rows(reader: CsvRows, width: int, found: LabelRows) -> Iterator[tuple[int, list[str]]]:
    """Yield line and fields of the rows that have as many fields as the header."""
    for row in reader:
        if not row:
            continue
        found.num_rows += 1
        if len(row) != width:
            found.faults.add(reader.line_num, f"{number_of(len(row), 'field')}, expected {width}")
            continue
        yield reader.line_num, [field.strip() for field in row]


def _table(
    reader: CsvRows,
    header: list[str],
    path: Path | str,
    label_map: Mapping[str, str] | None,
    exclusive: bool,
    kind: str,
) -> LabelRows:
    columns = find_columns(header, label_map, exclusive, str(path))
    slice_number = None
    if kind.startswith("PhysioNet"):
        slice_number = [plain(name) for name in header].index("slicenumber")
    key = columns.key if slice_number is None else "place"
    place = None if slice_number is None else header[slice_number].strip()
    unused = [name for name in columns.ignored if name != place]
    found = LabelRows(path, columns.labels, key, kind, tuple(columns.owners), unused)
    found.is_loose = slice_number is not None
    found.is_any_derived = True
    for line, row in _rows(reader, len(header), found):
        identifier = row[columns.key_column]
        if slice_number is not None:
            if not row[slice_number].isdecimal():
                found.faults.add(
                    line, f"slice number {excerpt(row[slice_number])}, expected 1, 2, ..."
                )
                continue
            identifier = f"{identifier}/{int(row[slice_number])}"
        is_name = len(identifier) <= MAX_KEY_CHARACTERS and identifier.isprintable()
        if not identifier or not (
            is_name if key in ("path", "place") else is_identifier(identifier)
        ):
            # A PatientID must not reach a log.
            is_secret = key in ("patient_id", "place") and identifier
            what = "no usable identifier" if is_secret else excerpt(identifier)
            found.faults.add(line, f"{excerpt(header[columns.key_column])} is {what}")
            continue
        values = _values(row, header, columns, line, found.faults)
        if values is None:
            continue
        if exclusive and sorted(values) != [0] * (len(values) - 1) + [1] and max(values) >= 0:
            found.faults.add(line, "exclusive labels: expected exactly one 1")
            continue
        owners = [row[place] for place in columns.owners.values()]
        found.add(line, identifier, values, owners=owners)
    return found


def _values(
    row: list[str], header: list[str], columns: Columns, line: int, faults: RowFaults
) -> list[int] | None:
    """Return the labels of a row, -1 where one is missing; None if a cell is refused."""
    values = []
    for name in columns.labels.names:
        if name not in columns.columns:
            values.append(UNLABELLED)  # `any`, which `_derive_any` fills
            continue
        text = row[columns.columns[name]]
        if text.lower() in MISSING:
            values.append(UNLABELLED)
            continue
        value = VALUES.get(text)
        if value is None:
            column = header[columns.columns[name]]
            faults.add(line, f"{excerpt(column)} is {excerpt(text)}, expected 0, 1 or nothing")
            return None
        values.append(1 - value if name in columns.negated else value)
    for name, other in columns.opposites.items():
        text, place = row[other], columns.labels.index(name)
        if text.lower() in MISSING:
            continue
        value = VALUES.get(text)
        if value is None or values[place] == value:
            problem = "expected 0, 1 or nothing" if value is None else f"and so is that of {name}"
            faults.add(line, f"{excerpt(header[other])} is {excerpt(text)}, {problem}")
            return None
        values[place] = 1 - value
    return values


def _cq500(reader: CsvRows, header: list[str], path: Path | str) -> LabelRows:
    """Read CQ500's reads: what most readers of a scan saw. A tie counts as missing."""
    names = [name.strip() for name in header]
    places: dict[str, list[int]] = {}
    for label in SIX.names:
        short = [alias for alias, name in ALIASES.items() if name == label]
        found = [
            names.index(name)
            for name in names
            for prefix, _, rest in [name.partition(":")]
            if prefix in _READERS and plain(rest) in short
        ]
        if not found:
            raise DataError(
                f"{path}: no reader has a column for {label}.",
                "Expected CQ500's reads.csv, with R1:ICH, R1:IPH, ... to R3:SAH.",
            )
        places[label] = found
    table = LabelRows(path, SIX, "patient_id", "CQ500's reads (majority of the readers)")
    table.is_loose = True
    for line, row in _rows(reader, len(names), table):
        if not is_identifier(row[0]):
            table.faults.add(line, "name is no usable identifier")
            continue
        values, most = [], 0
        for label, columns in places.items():
            cells = [row[column] for column in columns if row[column].lower() not in MISSING]
            bad = [cell for cell in cells if cell not in VALUES]
            if bad:
                table.faults.add(line, f"{label} is {excerpt(bad[0])}, expected 0, 1 or nothing")
                break
            votes = [VALUES[cell] for cell in cells]
            most = max(most, len(votes))
            twice = 2 * sum(votes)
            tied = not votes or twice == len(votes)
            values.append(UNLABELLED if tied else int(twice > len(votes)))
        else:
            table.add(line, row[0], _with_any(values), most)
    return table


def _with_any(values: list[int]) -> list[int]:
    """Let `any` be 1 where a majority saw a subtype: majorities of each need not agree."""
    place = SIX.index(ANY)
    parts = values[:place] + values[place + 1 :]
    return [*values[:place], 1, *values[place + 1 :]] if 1 in parts else values
