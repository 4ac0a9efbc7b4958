"""Temporary files: their names, and removing those that ended processes have left.

A temporary file or folder stands beside its target, as `.partial-PROCESS-PLACE-NAME`. PLACE stands
for one start of one machine, and in a container for its own numbering of processes: only there does
the number of a process say whether it still runs.
"""

import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
import time
from pathlib import Path

PARTIAL = ".partial"
SECONDS_TO_KEEP = 24 * 3600.0
_MARK = re.compile(rf"{re.escape(PARTIAL)}-(?:(\d+)-(?:([0-9a-f]{{8}})-)?)?(?=.)")
_BOOT, _NUMBERING = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")


def partial_of(path: Path) -> Path:
    """Return the temporary name of this process for a file or folder.

    A prefix, because Keras insists on its suffixes (.keras, .weights.h5).
    """
    return path.with_name(f"{PARTIAL}-{os.getpid()}-{_place()}-{path.name}")


def target_of(path: Path) -> Path:
    """Return a path as it will be when all is written, for messages.

    >>> target_of(Path("/run/state/.partial-epoch-0003/.partial-17-a.npz")).as_posix()
    '/run/state/epoch-0003/a.npz'
    """
    return Path(*(_MARK.sub("", part, count=1) for part in path.parts))


def remove_leftovers(folder: Path, name: str | None = None, is_alone: bool = False) -> None:
    """Remove what ended processes have left under temporary names in a folder.

    A file of a process that still runs is never removed. Where that cannot be told, because the
    process ran on another machine, in another container or before the machine was started, its
    files go if nobody else can be writing here, or if they have not changed for a day.

    Args:
        folder: need not exist.
        name: only what was to get this name; None takes all.
        is_alone: whether the caller holds a lock that everybody takes who writes such files here.
    """
    for path in folder.glob(f"{PARTIAL}-*"):
        mark = _MARK.match(path.name)
        if mark is None or (name is not None and path.name[mark.end() :] != name):
            continue
        runs = _runs(mark[1], mark[2])
        if runs is False or (runs is None and (is_alone or _is_old(path))):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):  # gone already, or open on Windows
                    path.unlink()


def _runs(number: str | None, place: str | None) -> bool | None:
    """Return whether the process that wrote a file still runs; None where it cannot be told."""
    # Our own number says nothing: a container gives it to its main process at every start. And on
    # Windows, signal 0 would end the process.
    if place != _place() or int(number or 0) == os.getpid() or os.name == "nt":
        return None
    try:
        os.kill(int(number or 0), 0)
    except (ProcessLookupError, OverflowError):  # no such process, or no number of one
        return False
    except PermissionError:  # another user's
        return True
    return True


def _is_old(path: Path) -> bool:
    try:
        newest = max(part.stat().st_mtime for part in (path, *path.rglob("*")))
    except OSError:  # it goes away or changes just now
        return False
    return time.time() - newest > SECONDS_TO_KEEP


@functools.cache
def _place() -> str:
    try:
        here = f"{_BOOT.read_text()} {_NUMBERING.stat().st_ino}"
    except OSError:  # not Linux
        here = platform.node()
    return hashlib.sha256(here.encode()).hexdigest()[:8]
