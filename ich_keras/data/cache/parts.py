"""Building a cache in parts: jobs that know nothing of each other, and one that joins them.

For the batch schedulers of clusters. A cache is planned as for one build; part i of N is every N-th
of its shards. Each part has a working folder of its own, `<out>.part-i-of-N`, with its own lock, so
that jobs on several machines cannot hurt one another, not even on a file system without locks.
Joining moves the finished shards into `<out>.partial`, and finishes there as any build does.
"""

import contextlib
import os
import re
import shutil
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ich_keras import files
from ich_keras.counting import number_of
from ich_keras.data.cache.build import fill_shards, finish_folder
from ich_keras.data.cache.cache import CTCache, ready_to_build
from ich_keras.data.cache.plan import PlannedShard, plan_build
from ich_keras.data.cache.shards import SHARD_BYTES
from ich_keras.data.cache.unfinished import (
    PLAN,
    finished_records,
    make_ready,
    require_plan,
    require_same_pixels,
    working_folder,
)
from ich_keras.errors import StaleError, UsageError
from ich_keras.progress import Progress

if TYPE_CHECKING:
    from ich_keras.ct.series import SeriesIndex

_PART = re.compile(r"([1-9]\d{0,5})/([1-9]\d{0,5})", re.ASCII)
_FOLDER = re.compile(r"\.part-(\d+)-of-(\d+)", re.ASCII)


@dataclass(frozen=True)
class Part:
    """Part `number` of `count`, the first being 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read a part as people write it.

        Raises:
            UsageError: it is not one.

        >>> Part.parse("2/8")
        Part(number=2, count=8)
        """
        match = _PART.fullmatch(text)
        if match is None or int(match[1]) > int(match[2]):
            raise UsageError(
                f"{text!r} is not a part; expected i/N with i from 1 to N.", "For example: 2/8."
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def shards(self, planned: list[PlannedShard]) -> list[PlannedShard]:
        """Return the shards of a plan that belong to this part."""
        return planned[self.number - 1 :: self.count]

    def folder(self, out: Path) -> Path:
        """Return the working folder of this part of a cache."""
        return out.with_name(f"{out.name}.part-{self.number}-of-{self.count}")


@dataclass(frozen=True)
class BuiltPart:
    """A part that was built.

    Args:
        part: which.
        folder: its working folder.
        num_shards: shards in it.
        num_slices: slices in these, without those that were refused.
    """

    part: Part
    folder: Path
    num_shards: int
    num_slices: int

    def __str__(self) -> str:
        slices = number_of(self.num_slices, "slice")
        return f"Part {self.part}: {slices} in {number_of(self.num_shards, 'shard')}"


def build_part(
    index: "SeriesIndex",
    out: Path | str,
    size: int,
    part: Part,
    workers: int = 0,
    progress: Progress | None = None,
    compression: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    restart: bool = False,
    executor: Executor | None = None,
) -> BuiltPart:
    """Build one part of a cache; `join_parts` makes the cache when all parts are there.

    Calling this again resumes an interrupted part, or finds that it is finished. The other
    arguments are those of `build_cache`, and must be the same for all parts.

    Args:
        index: the same for all parts.
        out: the folder that the cache will have.
        part: which; those that have no shard are built at once.

    Raises:
        StaleError: another process builds this part; see also `build_cache`.
    """
    index, out, settings = ready_to_build(index, out, size, workers, compression, shard_bytes)
    planned, plan = plan_build(index, settings)
    shards, folder = part.shards(planned), part.folder(out)
    if not shards:
        return BuiltPart(part, folder, 0, 0)
    with files.lock(_lock_of(folder), is_kept=False) as is_alone:
        readers = workers if executor is None else executor
        records = fill_shards(
            index, folder, plan, shards, settings, readers, progress, restart, is_alone
        )
    num_slices = sum(record["num_slices"] for record in records.values())
    return BuiltPart(part, folder, len(shards), num_slices)


def join_parts(
    index: "SeriesIndex",
    out: Path | str,
    size: int,
    workers: int = 0,
    progress: Progress | None = None,
    compression: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    max_rejects: float = 1.0,
) -> CTCache:
    """Make a cache of its parts; it has the same bytes as one built at once.

    Shards are moved, not copied. Calling this again goes on after an interruption. The arguments
    are those of `build_part` and `build_cache`.

    Raises:
        UsageError: there are no parts, or `out` exists.
        StaleError: parts are not finished (names them), are being built, or are of other slices or
            settings.
    """
    index, out, settings = ready_to_build(index, out, size, workers, compression, shard_bytes)
    partial = working_folder(out)
    planned, plan = plan_build(index, settings)
    parts = _parts_of(out)
    if not parts and not (partial / PLAN).is_file():
        raise _no_parts(out)
    with contextlib.ExitStack() as locks:
        lock = out.with_name(f"{out.name}.partial.lock")
        is_alone = locks.enter_context(files.lock(lock, is_kept=False))
        for part in parts:  # a job that still runs would write on into what is moved
            locks.enter_context(files.lock(_lock_of(part.folder(out)), is_kept=False))
        files.require_absent(out)
        make_ready(partial, plan, restart=False, is_alone=is_alone)
        for part in parts:
            if (part.folder(out) / PLAN).is_file():
                require_plan(part.folder(out), plan)
        _require_all(planned, parts, out)
        _move(planned, parts, out, plan)
        records = finished_records(partial, plan, planned, settings, is_final=True)
        lost = [shard for shard in planned if shard.name not in records]
        if lost:
            raise _unfinished(lost, planned, parts, out)
        require_same_pixels(index, planned, records, settings, workers, progress)
        finish_folder(index, out, plan, planned, records, max_rejects)
        for part in parts:
            shutil.rmtree(part.folder(out), ignore_errors=True)
    return CTCache.open(out)


def settings_of_parts(out: Path | str) -> dict:
    """Return size and compression of the parts of a cache, from the first that says so.

    Raises:
        UsageError: there are no parts.
    """
    out = Path(out).resolve()
    folders = [part.folder(out) for part in _parts_of(out)] + [working_folder(out)]
    for folder in folders:
        if (folder / PLAN).is_file():
            plan = files.read_json(folder / PLAN)
            return {name: plan.get(name) for name in ("size", "compression")}
    raise _no_parts(out)


def _no_parts(out: Path) -> UsageError:
    return UsageError(
        f"there are no parts of {out} beside it.",
        "Build them first: ich cache --shard 1/N, 2/N, ... N/N.",
    )


def _parts_of(out: Path) -> list[Part]:
    """Return the parts of a cache whose folders are there, in order."""
    found = []
    for folder in out.parent.glob(f"{out.name}.part-*-of-*"):
        match = _FOLDER.fullmatch(folder.name[len(out.name) :])
        if match is not None and folder.is_dir():
            found.append(Part(int(match[1]), int(match[2])))
    return sorted(found, key=lambda part: (part.count, part.number))


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _require_all(planned: list[PlannedShard], parts: list[Part], out: Path) -> None:
    """Check that every shard has a record, in the working folder or in that of a part."""
    folders = [working_folder(out), *(part.folder(out) for part in parts)]
    missing = [
        shard
        for shard in planned
        if not any((folder / _record_of(shard.name)).is_file() for folder in folders)
    ]
    if missing:
        raise _unfinished(missing, planned, parts, out)


def _record_of(name: str) -> str:
    return Path(name).with_suffix(".json").name


def _unfinished(
    missing: list[PlannedShard], planned: list[PlannedShard], parts: list[Part], out: Path
) -> StaleError:
    count = max((part.count for part in parts), default=1)
    numbers = sorted({planned.index(shard) % count + 1 for shard in missing})
    names = ", ".join(str(Part(number, count)) for number in numbers)
    commands = "; ".join(
        f"ich cache --index INDEX --out {out} --shard {Part(number, count)}" for number in numbers
    )
    return StaleError(
        f"{len(missing)} of {number_of(len(planned), 'shard')} of {out}"
        f" {'is' if len(missing) == 1 else 'are'} not finished: of part {names}.",
        f"Run: {commands}. Then join again.",
    )


def _move(planned: list[PlannedShard], parts: list[Part], out: Path, plan: dict) -> None:
    """Move the shards of parts into the working folder, each one's record after it."""
    partial = working_folder(out)
    partial.mkdir(exist_ok=True)
    if not (partial / PLAN).is_file():
        files.write_json(partial / PLAN, plan)
    for part in parts:
        for shard in planned:
            for name in (shard.name, _record_of(shard.name)):
                source = part.folder(out) / name
                if source.is_file() and not (partial / name).is_file():
                    os.replace(source, partial / name)
                    files.fail_point(f"moved {name}")
    files.sync_folder(partial)
