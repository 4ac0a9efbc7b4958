"""The journal of a prediction: what is finished, so that an interrupted prediction goes on.

It lies in the output folder and only grows: a line that says what is predicted and how, then one
line per finished group of series. Every line begins with its checksum and is on disk before the
next group is predicted. A torn end is cut off. It holds no name and no number of a patient.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ich_keras.ct.journal import NEVER_KEPT
from ich_keras.ct.leftovers import require_absent_or_rejects
from ich_keras.ct.rejects import RejectedFile
from ich_keras.ct.series import SeriesIndex
from ich_keras.data.reading import IndexedSlice, read_indexed
from ich_keras.data.skull import NO_FLAGS, SeriesFlags
from ich_keras.disk import full_disk_told
from ich_keras.errors import EnvironmentProblem, StaleError, UsageError
from ich_keras.files import (
    atomic_write,
    checked_line,
    fail_point,
    lock,
    new_folder,
    read_checked_line,
)
from ich_keras.leftovers import remove_leftovers

JOURNAL_FILE = "prediction.journal"
LOCK_FILE = "prediction.lock"
PREDICTIONS_FILE = "predictions.csv"
SERIES_FILE = "series.csv"
STUDIES_FILE = "studies.csv"
NOTICE_FILE = "notice.txt"
LOOK_FIRST_FILE = "look_first.csv"
DECISIONS_FILE = "decisions.json"
# Raise the number whenever reading or predicting gives other results, or a line another content.
_FIRST_LINE = b"ich-prediction-journal 5\n"
_FAMILY = b"ich-prediction-journal "


@dataclass(frozen=True, eq=False)
class SeriesResult:
    """What became of one series of an index.

    Args:
        series_uid: its key in the index.
        times: of each of its files, in order, `file_mtime_ns` of the index.
        hashes: of each file's pixels as they were read (`ich_keras.data.reading.pixel_hash`); ""
            for those that could not be used.
        rejects: (row within the series, code, detail, hint) of each file that was not used.
        values: float32 (samples, 6), the probabilities of its slices (of a thin series: of its
            averaged ones; `ich_keras.data.thin_series`) or its own; no row where nothing was
            predicted.
        distance: from the training series, float32; None where it was not computed.
        flags: what its pixels show of the head.
        head: float32 (labels,), a sequence head's answer to the whole series; None without one.
    """

    series_uid: str
    times: tuple[int, ...]
    hashes: tuple[str, ...]
    rejects: tuple[tuple[int, str, str, str], ...]
    values: np.ndarray
    distance: float | None = None
    flags: SeriesFlags = NO_FLAGS
    head: np.ndarray | None = None

    @property
    def rows(self) -> list[int]:
        """The rows within the series that were predicted."""
        left_out = {row for row, *_ in self.rejects}
        return [row for row in range(len(self.hashes)) if row not in left_out]

    @property
    def depends_on_machine(self) -> bool:
        """Whether a file was refused for what the machine lacks, which may have changed since."""
        return any(code in NEVER_KEPT for _, code, *_ in self.rejects)

    def has_same_pixels(self, other: "SeriesResult") -> bool:
        """Return whether another reading of the series found the same."""
        mine, others = ((r.series_uid, r.hashes, r.rejects) for r in (self, other))
        return mine == others

    def to_json(self) -> list:
        """Return it as JSON holds it; float32 comes back exactly."""
        values = self.values.tolist()
        facts = [self.series_uid, self.times, self.hashes, self.rejects]
        head = None if self.head is None else self.head.tolist()
        return [*facts, values, self.distance, self.flags, head]

    @classmethod
    def from_json(cls, content: list) -> "SeriesResult":
        """Make it from what `to_json` returned."""
        uid, times, hashes, rejects, values, distance, flags, head = content
        found = np.array(values, np.float32) if values else np.zeros((0, 0), np.float32)
        facts = tuple(times), tuple(hashes), tuple(map(tuple, rejects))
        head = None if head is None else np.array(head, np.float32)
        return cls(uid, *facts, found, distance, SeriesFlags(*flags), head)


class PredictionJournal:
    """The finished series of one prediction, on disk.

    Args:
        path: of the file; it is created when absent.
        settings: what the probabilities depend on besides the files, by name; JSON-able.
        content: from `content_of`.

    Raises:
        StaleError: the file is the journal of another prediction; the message names what differs.
        UsageError: the file is not a journal of a prediction.
        EnvironmentProblem: it cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping, content: Mapping[str, str]) -> None:
        self._path = path
        self._results: dict[str, SeriesResult] = {}
        raw = path.read_bytes() if path.exists() else b""
        lines = raw.removeprefix(_FIRST_LINE).splitlines(keepends=True)
        is_whole = raw.startswith(_FIRST_LINE) and lines and _is_whole(lines[0])
        if is_whole:
            self._require_same(read_checked_line(lines[0]), settings, content)
            self._read(lines, len(_FIRST_LINE))
        elif raw.startswith(_FIRST_LINE) or _FIRST_LINE.startswith(raw) or not raw.strip(b"\0"):
            # A power cut may leave a new file short, or full of zeros: nothing was finished.
            with written(path):
                first = {"settings": dict(settings), "content": dict(content)}
                atomic_write(path, _FIRST_LINE + checked_line(first))
        elif raw.startswith(_FAMILY):
            raise StaleError(
                f"{path} was written by another version of ich_keras.", self._start_over()
            )
        else:
            raise UsageError(
                f"{path} is not the journal of a prediction; it was not changed.",
                "Choose another output folder.",
            )

    def finished(self) -> dict[str, SeriesResult]:
        """Return the results by series_uid, without those that the machine may have spoilt."""
        return {uid: r for uid, r in self._results.items() if not r.depends_on_machine}

    @property
    def has_predictions(self) -> bool:
        """Whether anything was predicted, so that something would be lost with the journal."""
        return any(len(result.values) for result in self._results.values())

    def add(self, results: list[SeriesResult]) -> None:
        """Write the results of a group; once this returns, not even a power cut loses them.

        Raises:
            EnvironmentProblem: they could not be written.
        """
        fail_point("before a prediction's record")
        line = memoryview(checked_line([result.to_json() for result in results]))
        with written(self._path), open(self._path, "ab", buffering=0) as stream:
            while line:  # a disk that gets full takes a part
                line = line[stream.write(line) :]
            os.fsync(stream.fileno())
        fail_point("after a prediction's record")
        self._results.update((result.series_uid, result) for result in results)

    def remove(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)

    def require_same_pixels(self, result: SeriesResult) -> None:
        """Refuse to go on if a series that was read again is not what it was.

        Raises:
            StaleError: its files hold other pixels.
        """
        if not result.has_same_pixels(self._results[result.series_uid]):
            raise self._replaced(result.series_uid)

    def require_same_slice(
        self, series_uid: str, source: IndexedSlice, pixels: str, size: int
    ) -> None:
        """Read one slice of a finished series again, and refuse to go on if it is another one.

        Raises:
            StaleError: its file holds other pixels.
        """
        try:
            is_same = read_indexed(source, size).pixel_hash == pixels
        except RejectedFile:
            is_same = False
        if not is_same:
            raise self._replaced(series_uid)

    def _replaced(self, series_uid: str) -> StaleError:
        return StaleError(
            f"the files of series {series_uid} were replaced since the prediction that"
            f" {self._path} belongs to.",
            self._start_over(),
        )

    def _start_over(self) -> str:
        return f"Give another output folder; or remove {self._path} to start over."

    def _read(self, lines: list[bytes], end: int) -> None:
        for number, line in enumerate(lines):
            if not _is_whole(line):
                with written(self._path), open(self._path, "rb+") as stream:
                    stream.truncate(end)
                    os.fsync(stream.fileno())
                return
            end += len(line)
            if number:
                found = map(SeriesResult.from_json, read_checked_line(line))
                self._results.update((result.series_uid, result) for result in found)

    def _require_same(self, first: dict, settings: Mapping, content: Mapping[str, str]) -> None:
        for name, value in settings.items():
            before = first["settings"].get(name)
            if before != value:
                raise StaleError(
                    f"{self._path} belongs to a prediction {_setting(name, before)}; now it runs"
                    f" {_setting(name, value)}.",
                    f"Resume it {_setting(name, before)}. {self._start_over()}",
                )
        before = first["content"]
        if before == content:
            return
        uids = sorted(set(before) ^ set(content), key=lambda uid: (uid in before, uid))
        if uids:
            what = f"series {uids[0]} is {'gone' if uids[0] in before else 'new'}"
        else:
            changed = min(uid for uid in before if before[uid] != content[uid])
            what = f"series {changed} changed"
        raise StaleError(
            f"the DICOM files are not those of the prediction that {self._path} belongs to:"
            f" {what}.",
            f"Resume it with the files that it began with. {self._start_over()}",
        )


def _is_whole(line: bytes) -> bool:
    return line.endswith(b"\n") and read_checked_line(line) is not None


def _setting(name: str, value: object) -> str:
    """Name a setting as on the command line: "without --any-body-part", "with batch size 4"."""
    if value is None:
        return f"without {name.replace('_', ' ')}"
    if isinstance(value, bool):
        return f"{'with' if value else 'without'} --{name.replace('_', '-')}"
    return f"with {name.replace('_', ' ')} {_short(value)}"


def _short(value: object) -> object:
    """Shorten a digest."""
    return value[:12] if isinstance(value, str) and len(value) > 30 else value


def content_of(index: SeriesIndex, root: Path) -> dict[str, str]:
    """Return digests of what an index says, the same after the folder was copied or moved.

    The times of files are left out: where they differ, the pixels are read and compared.

    Args:
        index: what is predicted.
        root: the absolute path of the indexed folder.

    Returns:
        A digest by series_uid, of the series and its slices. A refused file counts where it changes
        a series; a file that belongs to none may come and go.
    """
    # Where its bytes lie in an archive does not matter either.
    places = ["file_mtime_ns", "member_offset", "member_bytes"]
    slices = index.slices.drop(columns=places)
    slices = slices.assign(container=[inside(path, root) for path in slices["container"]])
    by_slice = pd.util.hash_pandas_object(slices, index=False).to_numpy()
    by_series = pd.util.hash_pandas_object(index.series, index=False).to_numpy()
    rows = slices.groupby("series_uid", sort=False).indices
    return {
        uid: _digest(np.append(by_slice[rows[uid]], of_series))
        for uid, of_series in zip(index.series["series_uid"], by_series, strict=True)
    }


def _digest(numbers: np.ndarray) -> str:
    return hashlib.sha256(numbers.astype("<u8").tobytes()).hexdigest()[:16]


def inside(path: str, root: Path) -> str:
    """Return a path relative to the predicted folder."""
    place = Path(path)
    return str(place.relative_to(root)) if place.is_relative_to(root) else path


@contextlib.contextmanager
def journal_in(
    folder: Path | None, name: str, settings: dict, index: SeriesIndex, root: Path
) -> "Iterator[PredictionJournal | None]":
    """Open the journal in the output folder; one without any prediction does not stay.

    Args:
        folder: of the prediction; None keeps nothing.
        name: of the journal.
        settings: what the answers depend on.
        index: what is predicted.
        root: the predicted folder.
    """
    if folder is None:
        yield None
        return
    journal = PredictionJournal(folder / name, settings, content_of(index, root))
    try:
        yield journal
    finally:
        if not journal.has_predictions:
            journal.remove()


@contextlib.contextmanager
def prediction_folder(out: Path | str, dicom: Path | str) -> Iterator[Path]:
    """Hold the output folder of a prediction for the length of a block: new, or interrupted.

    Raises:
        UsageError: something else lies there, such as a finished prediction; or it lies in `dicom`.
        StaleError: another process predicts into it.
        EnvironmentProblem: it cannot be created.
    """
    _require_outside(out, dicom)
    is_begun = (Path(out) / LOCK_FILE).is_file()
    with (
        new_folder(out, Path if is_begun else _require_own) as folder,
        lock(folder / LOCK_FILE, is_kept=False) as is_alone,
    ):
        _require_own(folder)  # another may have finished between the first look and the lock
        remove_leftovers(folder, is_alone=is_alone)
        yield folder


def _require_outside(out: Path | str, dicom: Path | str) -> None:
    """Refuse results among the images, except those of a prediction that was begun there."""
    source = Path(dicom).resolve()
    if not source.is_dir() or (Path(out) / JOURNAL_FILE).is_file():
        return
    if Path(out).resolve().is_relative_to(source):
        raise UsageError(
            f"the results would go to {out}, inside the folder of the images, {dicom}.",
            "Choose a folder outside of it: later runs would read the results as input.",
        )


def _require_own(out: Path | str) -> Path:
    """Return the path if a prediction may begin or go on there."""
    folder = Path(out)
    if (folder / JOURNAL_FILE).is_file():
        return folder
    # Those of an ensemble's further runs stay behind where someone removed the first to start over.
    others = [path.name for path in folder.glob(f"member-*-{JOURNAL_FILE}")]
    return require_absent_or_rejects(folder, own=(LOCK_FILE, JOURNAL_FILE, *others))


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Name the file that cannot be written, and say that nothing is lost.

    Raises:
        EnvironmentProblem: the block raised an OSError, or met a full disk.
    """
    kept = "Finished series are kept: the same command resumes."
    try:
        with full_disk_told(path):
            yield
    except EnvironmentProblem as error:
        raise EnvironmentProblem(error.message, f"{error.hint} {kept}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise EnvironmentProblem(f"{path} could not be written: {reason}.", kept) from error
