"""A journal of the files whose headers were read: an interrupted indexing resumes from it."""

from pathlib import Path
from typing import NamedTuple

from ich_keras.ct.sources import Source, source_of
from ich_keras.ct.tables import FRAME_MARK, SEPARATOR
from ich_keras.disk import full_disk_told
from ich_keras.errors import UsageError
from ich_keras.files import checked_line, read_checked_line

# Raise the number whenever `dicom.read_headers` judges files differently: they are read again.
_FIRST_LINE = b"ich-index-journal 8\n"
_FIRST_LINE_ANY = b"ich-index-journal 8, any image type\n"
_FAMILY = b"ich-index-journal "
# These depend on the machine, not on the file.
NEVER_KEPT = frozenset({"NO_DECODER", "UNREADABLE"})


class Entry(NamedTuple):
    """One slice that was read, or a reject when `code` is not empty.

    `path` is what `shown_path` makes of file, member and frame. Of a member of an archive,
    `file_mtime_ns` is the archive's. What begins with `member` is its place
    (`ich_keras.ct.members.Member`). `frame` is 0 for a file as a whole. `traits` are the fields of
    `ich_keras.ct.traits.Traits`.
    """

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
    member: str = ""
    member_offset: int = 0
    member_bytes: int = 0
    member_crc32: int = 0
    frame: int = 0
    traits: tuple[str, ...] = ()

    @property
    def container(self) -> str:
        """The path of the file, or of the archive that it lies in."""
        path = self.path.removesuffix(f"{FRAME_MARK}{self.frame}") if self.frame else self.path
        return path[: -len(SEPARATOR + self.member)] if self.member else path

    @property
    def source(self) -> Source:
        """What `ich_keras.ct.dicom` reads."""
        return source_of(self)


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
        self._known: dict[tuple[str, str], list[Entry]] = {}
        if path is None:
            return
        content = path.read_bytes() if path.exists() else b""
        if content.startswith(first_line):
            for line in content[len(first_line) :].splitlines():
                self._known |= _by_file(_parse(line))
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

    def find(self, found: Entry) -> list[Entry]:
        """Return what is known of a file; nothing when the file has changed since.

        Args:
            found: as `ich_keras.ct.walk.walk` yields it.
        """
        entries = self._known.get((found.container, found.member), [])
        if any(e.code in NEVER_KEPT or _identity(e) != _identity(found) for e in entries):
            return []
        return entries

    def add(self, entries: list[Entry]) -> None:
        """Write entries, all those of a file at once.

        Once this returns, a crash of this process cannot lose them.
        """
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


def _identity(entry: Entry) -> tuple:
    place = entry.member_offset, entry.member_bytes, entry.member_crc32
    return (entry.file_size, entry.file_mtime_ns, *place)


def _by_file(entries: list[Entry]) -> dict[tuple[str, str], list[Entry]]:
    files: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        files.setdefault((entry.container, entry.member), []).append(entry)
    return files


def _parse(line: bytes) -> list[Entry]:
    return [
        Entry._make(tuple(field) if isinstance(field, list) else field for field in fields)
        for fields in read_checked_line(line) or []
    ]
