"""A journal of the files whose headers were read: an interrupted indexing resumes from it."""

from pathlib import Path
from typing import NamedTuple

from ich_keras.disk import full_disk_told
from ich_keras.errors import UsageError
from ich_keras.files import checked_line, read_checked_line

# Raise the number whenever `dicom.read_header` judges files differently: files are then read again.
_FIRST_LINE = b"ich-index-journal 5\n"
_FIRST_LINE_ANY = b"ich-index-journal 5, any image type\n"
_FAMILY = b"ich-index-journal "
# These depend on the machine, not on the file.
NEVER_KEPT = frozenset({"NO_DECODER", "UNREADABLE"})


class Entry(NamedTuple):
    """One file that was read: a slice, or a reject when `code` is not empty."""

    path: str
    file_size: int
    file_mtime_ns: int
    code: str = ""
    detail: str = ""
    sop_instance_uid: str = ""
    series_instance_uid: str = ""
    study_instance_uid: str = ""
    patient_id: str = ""
    rows: int = 0
    columns: int = 0
    row_spacing_mm: float = 0.0
    column_spacing_mm: float = 0.0
    position: tuple[float, ...] = ()
    orientation: tuple[float, ...] = ()
    is_localizer: bool = False
    acquisition: str = ""
    instance_number: str = ""
    hint: str = ""
    body_part: str = ""
    facts: tuple[str, ...] = ()
    times: tuple[str, ...] = ()
    turn: str = ""


class Journal:
    """An append-only file: one line per batch of entries, each starting with a checksum.

    A torn or damaged line is ignored, and its files are read again.

    Args:
        path: of the file, which need not exist; None keeps no journal.
        any_image_type: whether files were read whatever their Image Type; a journal of the other
            kind is begun again.

    Raises:
        UsageError: the file is not a journal.
        EnvironmentProblem: the disk is full; `add` raises it, too.
    """

    def __init__(self, path: Path | None, any_image_type: bool = False):
        first_line = _FIRST_LINE_ANY if any_image_type else _FIRST_LINE
        self._path = path
        self._known: dict[str, Entry] = {}
        if path is None:
            return
        content = path.read_bytes() if path.exists() else b""
        if content.startswith(first_line):
            for line in content[len(first_line) :].splitlines():
                self._known.update((entry.path, entry) for entry in _parse(line))
            if not content.endswith(b"\n"):
                self._append(b"\n")
        elif content.startswith(_FAMILY) or first_line.startswith(content):
            path.parent.mkdir(parents=True, exist_ok=True)
            with full_disk_told(path, len(first_line)):
                path.write_bytes(first_line)
        else:
            raise UsageError(
                f"{path} is not a journal of `ich index`; it was not changed.",
                "Give the name of a new file, or of the journal of the interrupted run.",
            )

    def find(self, path: str, file_size: int, file_mtime_ns: int) -> Entry | None:
        """Return a file's entry; None when it has none or the file has changed since."""
        entry = self._known.get(path)
        if entry is None or entry[1:3] != (file_size, file_mtime_ns) or entry.code in NEVER_KEPT:
            return None
        return entry

    def add(self, entries: list[Entry]) -> None:
        """Write entries; once this returns, a crash of this process cannot lose them."""
        if self._path is not None and entries:
            self._append(checked_line(entries))

    def _append(self, line: bytes) -> None:
        assert self._path is not None  # callers check
        # One write in append mode: lines of two processes do not mix. Only a nearly full disk takes
        # less than the line; the next write then fails.
        with full_disk_told(self._path), open(self._path, "ab", buffering=0) as stream:
            written = stream.write(line)
            while written < len(line):
                written += stream.write(line[written:])


def _parse(line: bytes) -> list[Entry]:
    return [
        Entry._make(tuple(field) if isinstance(field, list) else field for field in fields)
        for fields in read_checked_line(line) or []
    ]
