"""Where a slice lies: in a file of its own, in a member of an archive, or as a frame of either."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from os import PathLike
from typing import Any, BinaryIO, NamedTuple, Protocol

from ich_keras.ct.members import MAX_MEMBER_BYTES, Member, opened_member
from ich_keras.ct.rejects import RejectedFile

File = str | PathLike | Member


class Frame(NamedTuple):
    """One slice of a file that holds several.

    Args:
        file: path, or place in an archive.
        number: of the frame, or of the slice along a NIfTI volume's third axis; from 1.
    """

    file: File
    number: int


Source = File | Frame | BinaryIO


class _Place(Protocol):
    """What a table says of where a slice lies."""

    @property
    def container(self) -> str: ...
    @property
    def member(self) -> str: ...
    @property
    def member_offset(self) -> int: ...
    @property
    def member_bytes(self) -> int: ...
    @property
    def file_size(self) -> int: ...
    @property
    def member_crc32(self) -> int: ...
    @property
    def frame(self) -> int: ...


def file_of(place: _Place) -> str | Member:
    """Return the file that a slice lies in: a path, or the place of a member."""
    if not place.member:
        return place.container
    return Member(
        place.container,
        place.member,
        place.member_offset,
        place.member_bytes,
        place.file_size,
        place.member_crc32,
    )


def source_of(place: _Place) -> str | Member | Frame:
    """Return what `ich_keras.ct.dicom` reads."""
    file = file_of(place)
    return Frame(file, place.frame) if place.frame else file


def name_of(file: File) -> str:
    """Return the name of a file without its folder."""
    path = file.name if isinstance(file, Member) else os.fspath(file)
    return path.replace("\\", "/").rpartition("/")[2]


@contextlib.contextmanager
def opened(
    file: File | BinaryIO, is_whole: bool = True, most_bytes: int = MAX_MEMBER_BYTES
) -> Iterator[BinaryIO]:
    """Open a file, or a member of an archive; what is open stays so.

    Args:
        file: what to open.
        is_whole, most_bytes: as for `ich_keras.ct.members.opened_member`.

    Raises:
        RejectedFile: UNREADABLE, or as `ich_keras.ct.members.opened_member` raises it.
    """
    try:
        if isinstance(file, Member):
            with opened_member(file, is_whole, most_bytes) as stream:
                yield stream
        elif isinstance(file, str | PathLike):
            with open(file, "rb") as stream:
                yield stream
        else:
            yield file
    except OSError as error:
        raise unreadable(error) from error


def unreadable(error: OSError) -> RejectedFile:
    """Make the error for a file that the system does not give."""
    reason = error.strerror or type(error).__name__
    hint = "Check that it exists and that you may read it."
    return RejectedFile("UNREADABLE", f"{reason}; expected a readable file", hint)


class Recent:
    """What was last read of files that hold many slices: their slices are asked for one by one.

    A file that was changed since, by its size or its time, is read again.

    Args:
        most_bytes: of what is kept, beyond the last file read.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: dict[tuple, tuple[Any, int]] = {}  # the last one read comes last
        self._lock = threading.Lock()

    def get(self, file: File, read: Callable[[File], tuple[Any, int]]) -> Any:
        """Return what `read` makes of a file, and says how many bytes it holds.

        Raises:
            RejectedFile: UNREADABLE, or what `read` raises.
        """
        key = _stamp(file)
        with self._lock:
            found = self._kept.pop(key, None)
            if found is None:
                self._forget(keep=0)  # a large one is not in memory beside the next one
        found = read(file) if found is None else found
        with self._lock:
            self._kept[key] = found
            self._forget(keep=1)
        return found[0]

    def _forget(self, keep: int) -> None:
        while (
            len(self._kept) > keep
            and sum(size for _, size in self._kept.values()) > self._most_bytes
        ):
            del self._kept[next(iter(self._kept))]


def _stamp(file: File) -> tuple:
    """Identify a file and its state."""
    path = file.container if isinstance(file, Member) else file
    try:
        status = os.stat(path)  # noqa: PTH116 (a Path costs 5 us)
    except OSError as error:
        raise unreadable(error) from error
    return (file, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
