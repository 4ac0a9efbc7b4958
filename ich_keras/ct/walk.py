"""Finding the files in a folder and reading their headers in several processes."""

import contextlib
import math
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

from ich_keras.ct.archives import kind_of, list_members
from ich_keras.ct.dicom import read_headers
from ich_keras.ct.header import SliceHeader
from ich_keras.ct.journal import NEVER_KEPT, Entry, Journal
from ich_keras.ct.rejects import RejectedFile
from ich_keras.ct.sources import file_of
from ich_keras.ct.tables import shown_path
from ich_keras.executors import Workers, broken_told, map_on
from ich_keras.processes import process_pool
from ich_keras.progress import Progress

MAX_CHUNK = 512
_PROGRESS_CALLS = 200


def walk(folder: Path, leave_out: Path | str | None = None) -> Iterator[Entry]:
    """Yield every file with its size and time; what is not read comes as a reject.

    Links to folders are followed, after all folders that are not links; a folder that several paths
    reach is read once, by the first of them. Names that begin with a dot are listed, not read.
    `leave_out` is neither. Archives are looked into; their members come in the order they are
    stored (`archives.list_members`).
    """
    seen = set() if leave_out is None else {os.path.realpath(leave_out)}
    places, links = deque([str(folder)]), deque[str]()
    while places or links:
        # What is a folder of its own keeps its own path.
        place = places.popleft() if places else links.popleft()
        # Not by inode: some network file systems give one number to many folders.
        real = os.path.realpath(place)
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(place) as found:
                items = sorted(found, key=lambda item: item.name)
        except OSError as error:
            yield Entry(_printable(place), 0, 0, "UNREADABLE", f"folder: {error.strerror}")
            continue
        for item in items:
            if item.name.startswith("."):
                kind = "folder" if _is_folder(item) else "file"
                yield Entry(_printable(item.path), 0, 0, "HIDDEN", f"a hidden {kind}, not read")
            elif _is_folder(item):
                (links if item.is_symlink() else places).append(item.path)
            else:
                yield from _listed(_look_at(item.path))


def walk_file(path: Path) -> Iterator[Entry]:
    """Yield a file that a person named, or if it is an archive its members, as `walk` does."""
    yield from _listed(_look_at(str(path)), is_asked_for=True)


def _listed(entry: Entry, is_asked_for: bool = False) -> Iterator[Entry]:
    """Yield a file, or if it is an archive its members."""
    kind = None if entry.code else kind_of(entry.path, is_asked_for)
    if kind is None:
        yield entry
    else:
        yield from list_members(entry, kind)


def _is_folder(item: os.DirEntry) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link in a circle
        return False


def _look_at(path: str) -> Entry:
    if _printable(path) != path:
        return Entry(_printable(path), 0, 0, "UNREADABLE", "its name is not UTF-8; rename it")
    try:
        status = os.stat(path)  # noqa: PTH116 (a Path costs 5 us each)
    except OSError as error:
        return Entry(path, 0, 0, "UNREADABLE", error.strerror or type(error).__name__)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would block forever
        return Entry(path, 0, 0, "UNREADABLE", "a device or pipe; expected a file")
    return Entry(path, status.st_size, _in_int64(status.st_mtime_ns))


def _in_int64(mtime_ns: int) -> int:
    """Fold the times that a table's int64 cannot hold (after 2262) back: they still differ."""
    return (mtime_ns + 2**63) % 2**64 - 2**63


def _printable(path: str) -> str:
    """Replace the parts of a file name that are not Unicode: a table could not hold them."""
    return os.fsencode(path).decode("utf-8", "replace")


def read_all(
    unread: list[Entry],
    done: int,
    workers: Workers,
    journal: Journal,
    progress: Progress | None,
    any_image_type: bool = False,
) -> list[Entry]:
    total = done + len(unread)
    size = max(1, min(MAX_CHUNK, math.ceil(len(unread) / _PROGRESS_CALLS)))
    chunks = [unread[start : start + size] for start in range(0, len(unread), size)]
    found: list[Entry] = []
    told = -1
    if progress is not None and unread:
        progress("indexing", done, total)
    with mapping(workers, len(chunks), "reading headers", _is_doubtful) as apply:
        results = apply(partial(_read_headers, any_image_type), chunks)
        for chunk, entries in zip(chunks, results, strict=True):
            journal.add(entries)
            found += entries
            done += len(chunk)
            share = done * _PROGRESS_CALLS // total
            if progress is not None and share > told:
                told = share
                progress("indexing", done, total)
    if progress is not None and not unread:
        progress("indexing", total, total)
    return found


@contextlib.contextmanager
def mapping(
    workers: Workers, num_tasks: int, work: str, is_doubtful: Callable | None = None
) -> Iterator[Callable[..., Iterable]]:
    """Yield a `map` that works in this process, in several, or on an executor.

    Args:
        workers: processes (0 works in this one), or an executor.
        num_tasks: how many tasks there are.
        work: what it does, for the message.
        is_doubtful: as for `ich_keras.executors.map_on`.

    Raises:
        EnvironmentProblem: a worker process died.
    """
    with broken_told(
        f"a process that was {work} has died (killed, or out of memory).",
        "Run again with the same journal, or with fewer workers. A script that uses workers "
        "needs an `if __name__ == '__main__':` guard.",
    ):
        if isinstance(workers, Executor):
            yield partial(map_on, workers, is_doubtful=is_doubtful)
            return
        if workers == 0 or num_tasks <= 1:
            yield map
            return
        pool = process_pool(min(workers, num_tasks))
        try:
            yield pool.map
        finally:
            pool.shutdown(cancel_futures=True)


def _is_doubtful(entries: list[Entry]) -> bool:
    """Return whether another machine may have lacked something that this one has."""
    return any(entry.code in NEVER_KEPT for entry in entries)


def _read_headers(any_image_type: bool, entries: list[Entry]) -> list[Entry]:
    return [found for entry in entries for found in _read_file(entry, any_image_type)]


def _read_file(entry: Entry, any_image_type: bool) -> list[Entry]:
    """Return the slices of a file, or its reject."""
    try:
        headers = read_headers(file_of(entry), any_image_type=any_image_type)
    except RejectedFile as error:
        return [_refused(entry, error)]
    return [_read_one(_frame(entry, frame), header) for frame, header in headers.items()]


def _frame(entry: Entry, frame: int) -> Entry:
    path = shown_path(entry.container, entry.member, frame)
    return entry._replace(path=path, frame=frame)


def _refused(entry: Entry, error: RejectedFile) -> Entry:
    return entry._replace(
        code=error.code,
        detail=error.detail,
        hint=error.hint,
        series_instance_uid=error.series_instance_uid,
    )


def _read_one(entry: Entry, header: SliceHeader | RejectedFile) -> Entry:
    if isinstance(header, RejectedFile):
        return _refused(entry, header)
    return entry._replace(
        sop_instance_uid=header.sop_instance_uid,
        series_instance_uid=header.series_instance_uid,
        study_instance_uid=header.study_instance_uid,
        patient_id=header.patient_id,
        rows=header.rows,
        columns=header.columns,
        row_spacing_mm=header.row_spacing_mm,
        column_spacing_mm=header.column_spacing_mm,
        position=header.position,
        orientation=header.orientation,
        is_localizer=header.is_localizer,
        acquisition=header.acquisition,
        instance_number=header.instance_number,
        body_part=header.body_part,
        facts=header.facts,
        times=header.times,
        turn=str(header.turn),
        traits=header.traits,
    )
