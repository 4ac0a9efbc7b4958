"""Disk space: checked before a long write, and told with file and need where it runs out."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ich_keras.errors import EnvironmentProblem
from ich_keras.leftovers import target_of

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota on this disk is used up",
    errno.EFBIG: "it would exceed the limit on the size of files (ulimit -f)",
}
# HDF5 reports a failed close as RuntimeError, with the number in its text.
_NUMBER_IN_TEXT = re.compile(r"errno = (\d+)")


class Need(NamedTuple):
    """How many bytes are going to be written where.

    Args:
        folder: need not exist yet.
        num_bytes: how many.
        what: of what, for the message; "" says nothing.
    """

    folder: Path
    num_bytes: int
    what: str = ""


def in_units(num_bytes: float) -> str:
    """Return a number of bytes for people.

    >>> in_units(123), in_units(400 * 2**20), in_units(1.5 * 2**30)
    ('1 KiB', '400 MiB', '1.5 GiB')
    """
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:,.1f} GiB"
    if num_bytes >= 2**20:
        return f"{num_bytes / 2**20:.0f} MiB"
    return f"{-(-num_bytes // 2**10):.0f} KiB"


def free_bytes(folder: Path | str) -> int:
    """Return how many bytes can be written in a folder, which need not exist yet."""
    return shutil.disk_usage(_existing(Path(folder))).free


def require_free(folder: Path | str, needed: int, what: str = "") -> None:
    """Check the free disk space before a long write.

    Args:
        folder: where the files will go; it need not exist yet.
        needed: bytes.
        what: what needs them, for the message.

    Raises:
        EnvironmentProblem: fewer bytes are free.
    """
    free = free_bytes(folder)
    if free < needed:
        reason = f": {what}" if what else ""
        raise EnvironmentProblem(
            f"{_existing(Path(folder))} has {in_units(free)} free; {in_units(needed)} are"
            f" needed{reason}.",
            "Free some space, choose another folder or a smaller size.",
        )


def require_free_for_all(needs: Sequence[Need]) -> None:
    """Check the free space for several things, together where they lie on one disk.

    Raises:
        EnvironmentProblem: a disk has too few free bytes.
    """
    by_disk: dict[int, list[Need]] = {}
    for need in needs:
        by_disk.setdefault(_existing(need.folder).stat().st_dev, []).append(need)
    for group in by_disk.values():
        what = "; ".join(need.what for need in group if need.what)
        require_free(group[-1].folder, sum(need.num_bytes for need in group), what)


@contextlib.contextmanager
def full_disk_told(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn a full disk, a used-up quota or a limit on file sizes into an error with a way out.

    Args:
        path: what the block writes; a temporary name is told as the final one.
        needed: bytes; None says how many were written.

    Raises:
        EnvironmentProblem: names the file, the free space and the need. Any other error of the
            block passes unchanged.
    """
    try:
        yield
    # What h5py and zipfile raise when they cannot close a file, besides the OSError.
    except (OSError, RuntimeError, ValueError) as error:
        number = _full(error)
        if number is None:
            raise
        raise EnvironmentProblem(*_told(path, number, needed)) from error


def reserve(path: Path, needed: int) -> None:
    """Make sure that a new file of this size can be written; leaves an empty or longer file.

    HDF5 keeps a file that it could not write, and complains about it again and again.

    Raises:
        OSError: there is no space for it.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    with open(path, "wb") as stream:
        try:
            os.posix_fallocate(stream.fileno(), 0, max(1, needed))
        except OSError as error:
            if error.errno in _REASONS:  # else a file system that cannot reserve
                raise


def _full(error: BaseException) -> int | None:
    """Return the number of the cause if it is a full disk; it may have caused other errors."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _REASONS:
            return seen.errno
        found = _NUMBER_IN_TEXT.search(str(seen)) if isinstance(seen, RuntimeError) else None
        if found is not None and int(found[1]) in _REASONS:
            return int(found[1])
        seen = seen.__cause__ or seen.__context__
    return None


def _told(path: Path, number: int, needed: int | None) -> tuple[str, str]:
    place, need = _existing(path.parent), ""
    if needed is not None:
        need = f" {in_units(needed)} are needed for it."
    elif path.is_file():
        need = f" More than {in_units(path.stat().st_size)} are needed for it."
    message = (
        f"{target_of(path)} could not be written: {_REASONS[number]}. {target_of(place)} has"
        f" {in_units(free_bytes(place))} free.{need}"
    )
    way_out = "Raise the limit" if number == errno.EFBIG else "Free some space there"
    return message, f"{way_out}, then start the command again. Files finished before are whole."


def _existing(folder: Path) -> Path:
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder
