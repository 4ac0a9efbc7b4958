"""Crash-safe writes, locks and fingerprints. Only this module renames files."""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ich_keras.disk import full_disk_told, reserve
from ich_keras.errors import EnvironmentProblem, IchWarning, StaleError, UsageError
from ich_keras.leftovers import partial_of, remove_leftovers

# The environment variable with which tests end the process at a named place: see `fail_point`.
FAIL_AT = "ICH_FAIL_AT"
_passed: Counter[str] = Counter()


def fail_point(name: str) -> None:
    """End the process here, as a power cut would, if the tests ask for it.

    `ICH_FAIL_AT=NAME` does it at the first pass, `ICH_FAIL_AT=NAME*3` at the third.
    """
    asked = os.environ.get(FAIL_AT)
    if asked is None:
        return
    wanted, _, times = asked.partition("*")
    if name == wanted:
        _passed[name] += 1
        if _passed[name] == int(times or 1):
            os._exit(137)  # no handler, no buffer and no temporary file is cleaned


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    if os.name == "nt":  # Windows offers no handle on folders; its renames are journalled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(source: Path, target: Path) -> None:
    """Move a finished file or folder into place in one step and make the move durable."""
    os.replace(source, target)
    sync_folder(target.parent)


@contextlib.contextmanager
def atomic_path(
    path: Path | str, verify: Callable[[Path], None] | None = None, needed: int | None = None
) -> Iterator[Path]:
    """Yield a temporary path; if the block succeeds, sync, verify and move the file into place.

    For writers that need a path (h5py, Keras, pandas). An old file stays intact until the move.

    Args:
        path: where the finished file goes.
        verify: called with the temporary path after the sync; raises to refuse the file.
        needed: bytes of the file, at least; where they are not free, the block is not begun.

    Raises:
        EnvironmentProblem: the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    temporary = partial_of(path)
    try:
        with full_disk_told(temporary, needed):
            if needed is not None:
                reserve(temporary, needed)
            yield temporary
            with open(temporary, "rb+") as stream:
                os.fsync(stream.fileno())
            if verify is not None:
                verify(temporary)
            fail_point(f"before {path.name}")
            replace(temporary, path)
            fail_point(f"after {path.name}")
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path | str, content: bytes | str) -> None:
    """Write a file in one step: readers see the old content or the new, never a mixture.

    Args:
        path: the file; its folder is created when absent.
        content: bytes, or text, which is written as UTF-8.

    Raises:
        EnvironmentProblem: the disk is full.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     atomic_write(Path(folder) / "notes" / "a.txt", "new")
    ...     (Path(folder) / "notes" / "a.txt").read_text()
    'new'
    """
    raw = content.encode("utf-8") if isinstance(content, str) else content
    with atomic_path(path) as temporary, full_disk_told(temporary, len(raw)):
        temporary.write_bytes(raw)


def write_json(path: Path | str, content: object) -> None:
    """Write JSON in one step; NaN and infinity are refused, because they are not JSON.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_json(Path(folder) / "a.json", {"epochs": 6})
    ...     read_json(Path(folder) / "a.json")
    {'epochs': 6}
    """
    atomic_write(path, json_text(content))


def json_text(content: object) -> str:
    """Return what `write_json` writes.

    >>> json_text({"epochs": 6})
    '{\\n "epochs": 6\\n}\\n'
    """
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def read_json(path: Path | str) -> dict:
    """Read one of our own JSON files; see `write_json` for an example.

    Raises:
        StaleError: the file is absent or is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise StaleError(f"{path} does not exist.", "Is this the right folder?") from None
    except (ValueError, RecursionError) as error:
        raise StaleError(f"{path} is not valid JSON ({error}).", "The file is damaged.") from error


def read_object(path: Path | str, *needed: str) -> dict:
    """Read a JSON file of a run folder that holds an object with these entries.

    Raises:
        StaleError: it is absent, not JSON, or lacks one of them.
    """
    content = read_json(path)
    absent = [name for name in needed if not isinstance(content, dict) or name not in content]
    if absent or not isinstance(content, dict):
        raise StaleError(
            f"{path} is damaged: {' and '.join(absent) or 'its object'} absent.",
            "Copy the original run folder again, or train again.",
        )
    return content


def _refuse_constant(name: str) -> float:
    # Python's reader takes NaN and Infinity; JSON has neither.
    raise ValueError(f"{name} is not a number")


def sha256_of(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(content: object) -> str:
    """Return the SHA-256 of an object that JSON can hold, whatever the order of its keys.

    >>> fingerprint({"size": 256, "seed": 0}) == fingerprint({"seed": 0, "size": 256})
    True
    >>> fingerprint({"size": 256})[:12]
    '73fc7272e792'
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def checked_line(content: object) -> bytes:
    """Write an object as one line of JSON behind its checksum, for files that only grow.

    >>> checked_line(["a.dcm", 1])
    b'a48489d6 ["a.dcm",1]\\n'
    """
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def read_checked_line(line: bytes) -> Any:
    """Return the object of a `checked_line`; None if the line is torn or damaged.

    >>> read_checked_line(checked_line(["a.dcm", 1])), read_checked_line(b"a48489d6 [")
    (['a.dcm', 1], None)
    """
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    return json.loads(text) if checksum == b"%08x" % zlib.crc32(text) else None


def require_absent(path: Path | str) -> Path:
    """Return the path if nothing exists there yet (an empty folder is fine).

    Raises:
        UsageError: something exists there; nothing is overwritten silently.
    """
    path = Path(path)
    if path.is_dir() and not any(path.iterdir()):
        return path
    if path.exists() or path.is_symlink():
        raise UsageError(
            f"{path} already exists; nothing is overwritten.",
            "Choose another name or remove it yourself.",
        )
    return path


def require_creatable(path: Path | str) -> None:
    """Refuse, before long work, a file that could not be written; nothing is left behind.

    Raises:
        EnvironmentProblem: its folder, or the nearest one above that exists, takes no file.
    """
    folder = Path(path).absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            return
    except OSError as error:
        reason = error.strerror or str(error)
        raise EnvironmentProblem(
            f"{path} cannot be written: {reason}.", "Choose another folder for it."
        ) from error


@contextlib.contextmanager
def new_folder(
    path: Path | str, require: Callable[[Path | str], Path] = require_absent
) -> Iterator[Path]:
    """Create a folder before the work that fills it, so that a bad path fails at once.

    If the block fails before it writes anything, the folder is removed again, together with any
    parents created for it.

    Args:
        path: the folder.
        require: returns the path if the folder may be filled, or raises.

    Raises:
        UsageError: something exists there already.
        EnvironmentProblem: it cannot be created.
    """
    path = require(path)
    mine, is_done = [folder for folder in (path, *path.parents) if not folder.is_dir()], False
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or str(error)
            raise EnvironmentProblem(f"the folder {path} cannot be created: {reason}.") from error
        yield path
        is_done = True
    finally:
        if not is_done:
            for folder in mine:
                with contextlib.suppress(OSError):  # not empty, or not made
                    folder.rmdir()


# What `flock` answers on a file system without locks (some NFS and FUSE mounts).
_KNOWS_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_told_of_no_locks: list[Path] = []  # folders; the first is the only one that was told


@contextlib.contextmanager
def lock(path: Path | str, is_kept: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on a file for the length of a block.

    It keeps out other processes and other holders in this process, and does not wait. A crash
    releases it. On a file system without locks it does nothing but warn, once in a process, so
    work there remains possible.

    Args:
        path: the lock file; it is created when absent.
        is_kept: whether the file stays; otherwise the holder removes it at the end.

    Yields:
        Whether the lock is held: False on a file system without locks.

    Warns:
        IchWarning: the file system has no locks.

    Raises:
        StaleError: another process holds the lock.
        UsageError: something that is not a lock file has its name.
        OSError: the file cannot be opened or locked for another reason.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, lock(Path(folder) / "work.lock"):
    ...     print("nobody else works here")
    nobody else works here
    """
    import filelock  # here: importing it takes a twelfth of a second, and few commands lock

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # filelock would empty it, and whoever does not keep the lock would remove it.
    if path.is_symlink() or (path.is_file() and path.stat().st_size):
        raise UsageError(
            f"{path} is in the way: a lock file is needed there, which is an empty file.",
            "Move it, or choose another name.",
        )
    # filelock's fallback for file systems without locks is a file that stays locked after a crash.
    holder = filelock.FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        holder.acquire()
    except filelock.Timeout as error:
        _require_creatable(path)
        raise StaleError(
            f"{path} is locked by another process.", "Wait for it, or stop it."
        ) from error
    except OSError as error:
        if error.errno not in _KNOWS_NO_LOCKS:
            raise
        _warn_of_no_locks(path.parent)
    try:
        yield holder.is_locked
    finally:
        if not is_kept:
            with contextlib.suppress(PermissionError):  # Windows keeps a file that is open
                path.unlink(missing_ok=True)
        holder.release()


def _require_creatable(path: Path) -> None:
    """Refuse a folder that takes no files; filelock takes that for a lock that is held."""
    try:
        # Not under the name of the lock: somebody may take it at this moment.
        with tempfile.NamedTemporaryFile(dir=path.parent):
            return
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error


def _warn_of_no_locks(folder: Path) -> None:
    if not _told_of_no_locks:
        _told_of_no_locks.append(folder)
        warnings.warn(
            f"the file system of {folder} has no locks: make sure that nothing else writes there.",
            IchWarning,
            stacklevel=4,
        )
