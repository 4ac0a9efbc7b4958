"""Reading CSV files from elsewhere: bounded and strict, with line numbers in refusals."""

import contextlib
import csv
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ich_keras.errors import DataError, UsageError

# A longer line is read in pieces, each of which is then refused: a file of one endless line must
# not fill the memory. UIDs have at most 64 characters (DICOM PS3.5, 6.2, VR UI).
MAX_LINE_CHARACTERS = 1 << 16
MAX_UID_CHARACTERS = 64
FRAMES = "/frames/"  # between the UID of a file of many frames and the number of one
FAULTS_SHOWN = 5


class CsvRows(Protocol):
    """What `csv.reader` returns: rows as lists of text, and the line of the last one."""

    @property
    def line_num(self) -> int: ...

    def __iter__(self) -> Iterator[list[str]]: ...

    def __next__(self) -> list[str]: ...


def is_identifier(text: str) -> bool:
    """Tell whether a text can be a UID: 1 to 64 printable characters; or a frame of it.

    >>> is_identifier("ID_000012eaf"), is_identifier(""), is_identifier("1.2 ")
    (True, False, False)
    """
    uid, _, frame = text.partition(FRAMES)
    is_short = 0 < len(uid) <= MAX_UID_CHARACTERS and len(frame) <= MAX_UID_CHARACTERS
    return is_short and text.isprintable() and text == text.strip()


def excerpt(text: str) -> str:
    """Return a text in quotes for a message, shortened, control characters escaped."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def first_few(items: list[str], count: int) -> str:
    """Join the items for a message and say how many more there are.

    Args:
        items: the first few.
        count: how many there are in all.

    >>> first_few(["line 2", "line 5"], count=7)
    'line 2; line 5; and 5 more'
    """
    more = f"; and {count - len(items):,} more" if count > len(items) else ""
    return "; ".join(items) + more


class RowFaults:
    """Collects what is wrong with the rows of a file: describes the first five, counts all."""

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self.count = 0
        self.first: list[str] = []

    def add(self, line: int, problem: str) -> None:
        """Note a problem of the row on this line (1 = the header)."""
        self.count += 1
        if len(self.first) < FAULTS_SHOWN:
            self.first.append(f"line {line}: {problem}")

    def refuse(self, hint: str) -> None:
        """Raise when anything was noted.

        Raises:
            DataError: names the first five lines and the number of the others.
        """
        if self.count:
            rows = "1 row is" if self.count == 1 else f"{self.count:,} rows are"
            listed = first_few(self.first, self.count)
            raise DataError(f"{self.path}: {rows} refused: {listed}.", hint)


@contextlib.contextmanager
def open_csv(path: Path | str) -> Iterator[CsvRows]:
    """Yield a `csv.reader` over a file in UTF-8, with or without byte order mark, any line ends.

    Rows come as lists of str, empty lines as empty lists; `reader.line_num` is the line.

    Raises:
        UsageError: the file is absent, a folder, or may not be read.
        DataError: bytes that are not UTF-8, or quotes that do not close.
    """
    path = Path(path)
    reader = None
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            lines = iter(functools.partial(stream.readline, MAX_LINE_CHARACTERS), "")
            reader = csv.reader(lines, strict=True)
            yield reader
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); expected a CSV file.",
            "Check the path.",
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {_first_undecodable_line(path)}: not UTF-8 text ({error.reason}).",
            "Is this the unpacked CSV file? Save it as UTF-8.",
        ) from error
    except csv.Error as error:
        line = 1 if reader is None else reader.line_num
        raise DataError(
            f"{path}, line {line}: not valid CSV ({error}).",
            "Look for a quote that does not close.",
        ) from error


def read_header(reader: CsvRows, path: Path | str, hint: str) -> list[str]:
    """Return the first row, which names the columns.

    Args:
        reader: as `open_csv` yields it, at the start.
        path: for messages.
        hint: what is expected, for a file that holds no table.

    Raises:
        DataError: the file is empty, no text, or separates its columns by semicolons or tabs.
    """
    header = next(reader, None)
    if header is None:
        raise DataError(f"{path} is empty; expected a CSV file.", hint)
    if any("\0" in name for name in header):
        raise DataError(f"{path} is no text (line 1 holds zero bytes); expected a CSV file.", hint)
    if len(header) == 1:
        for sign, name in ((";", "semicolons"), ("\t", "tabs")):
            if sign in header[0]:
                raise DataError(
                    f"{path}: the columns are separated by {name}; expected commas.",
                    f"Save it as CSV with commas; with pandas: read_csv(FILE, sep={sign!r},"
                    " dtype=str, keep_default_na=False).to_csv(NEW, index=False).",
                )
    return header


def _first_undecodable_line(path: Path) -> int:
    # The decoder works on blocks, so the reader's own line number lags behind the fault.
    number = 1
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return number
