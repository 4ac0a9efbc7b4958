"""Building a cache: plan the shards, fill them in parallel, finish them one after the other.

Everything happens in `<out>.partial` beside the final folder. A shard is written under a temporary
name, verified, renamed, and then recorded in a small JSON file. Calling the build again resumes
one that died: it keeps the recorded shards. The manifest is written last, then the folder is
renamed. See `ich_keras.data.cache.cache` for what the result looks like.
"""

import itertools
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ich_keras import files
from ich_keras.ct.tables import write_table
from ich_keras.data.cache.fill import Filled, blocks, fill_block, mapper, pixel_versions
from ich_keras.data.cache.shards import HU_DTYPE, Shard, ShardEntry
from ich_keras.data.cache.tables import UID, CacheTables, tables_after_reading
from ich_keras.data.cache.writer import copy_shard, create_raw_shard, raw_shard_bytes, write_at
from ich_keras.data.inputs import RESAMPLING
from ich_keras.data.reading import indexed_slices
from ich_keras.errors import DataError, EnvironmentProblem, UsageError
from ich_keras.labels import LABELS
from ich_keras.progress import Progress

if TYPE_CHECKING:
    from ich_keras.ct.series import SeriesIndex

SCHEMA = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"
TABLES = ("slices", "series", "rejects")
LABEL_TABLE = "labels"
PROGRESS_CALLS = 200
TEMPORARY = f"{files.PARTIAL}-"


@dataclass(frozen=True)
class Settings:
    """What a cache is built with.

    Args:
        size: rows and columns of a cached slice.
        compression: None, "gzip" or "blosc2".
        shard_bytes: pixels per shard at most, in bytes; a series that is larger gets a shard of
            its own.
    """

    size: int
    compression: str | None
    shard_bytes: int


@dataclass(frozen=True)
class PlannedShard:
    """Rows start..stop of the index's slices, whole series, that one shard will hold."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class _StartedShard:
    """A raw shard that is being filled: the offsets of its datasets, the blocks as they arrive."""

    plan: PlannedShard
    path: Path
    crc_offset: int
    offset: int
    filled: Iterator[Filled]


def inputs_fingerprint(index: "SeriesIndex") -> str:
    """Return a fingerprint of the slices of an index and of their order in space.

    Paths and times do not enter: a data set that was moved is still the same. Positions are
    computed from the files, and their last digits differ between processors: they enter in whole
    micrometres.

    Args:
        index: a SeriesIndex, as it goes into the cache.
    """
    slices = index.slices
    columns = (UID, "series_uid", "slice_index", "file_size", "position_mm")
    rows = zip(*(slices[name].tolist() for name in columns), strict=True)
    return files.fingerprint(
        sorted([*identity, round(position * 1000)] for *identity, position in rows)
    )


def plan_shards(series_uids: list[str], slice_bytes: int, shard_bytes: int) -> list[PlannedShard]:
    """Distribute whole series over shards, in order.

    Args:
        series_uids: (slices,), each slice's series; a series' slices lie together.
        slice_bytes: bytes of a slice.
        shard_bytes: bytes of a shard at most, unless one series alone is larger.

    >>> plan_shards(["a", "a", "b", "c"], slice_bytes=10, shard_bytes=30)
    [PlannedShard(name='shard-0000.h5', start=0, stop=3),
     PlannedShard(name='shard-0001.h5', start=3, stop=4)]
    """
    bounds = []
    start = stop = 0
    for _, group in itertools.groupby(series_uids):
        end = stop + sum(1 for _ in group)
        if stop > start and (end - start) * slice_bytes > shard_bytes:
            bounds.append((start, stop))
            start = stop
        stop = end
    bounds.append((start, stop))
    return [PlannedShard(f"shard-{n:04d}.h5", *rows) for n, rows in enumerate(bounds)]


def build_folder(
    index: "SeriesIndex",
    out: Path,
    settings: Settings,
    workers: int,
    progress: Progress | None,
) -> None:
    """Build a cache's folder, resuming an earlier build of the same plan.

    The arguments are those of `ich_keras.data.cache.cache.build_cache`. The caller holds the lock.
    """
    partial = out.with_name(out.name + files.PARTIAL)
    uids = index.slices["series_uid"].tolist()
    slice_bytes = settings.size * settings.size * HU_DTYPE.itemsize
    shards = plan_shards(uids, slice_bytes, settings.shard_bytes)
    inputs = inputs_fingerprint(index)
    plan = {
        "schema": SCHEMA,
        "size": settings.size,
        "resampling": RESAMPLING,
        "compression": settings.compression,
        "inputs": inputs,
        # Of the rows: `inputs` is of a set, and stays where corrected PatientIDs move them.
        "order": files.fingerprint(index.slices[UID].tolist()),
        "versions": pixel_versions(),
        "shards": [asdict(shard) for shard in shards],
    }
    _resume_or_clear(partial, plan)
    earlier = {shard.name: _finished(partial, shard) for shard in shards}
    records = {name: record for name, record in earlier.items() if record is not None}
    to_do = [shard for shard in shards if shard.name not in records]
    raw = [raw_shard_bytes(shard.stop - shard.start, settings.size) for shard in to_do]
    # One shard more: a shard that lost slices, or is compressed, is written a second time.
    files.require_free(out.parent, sum(raw) + max(raw, default=0))
    files.write_json(partial / PLAN, plan)
    try:
        records |= _build_shards(index, partial, to_do, settings, workers, progress)
        entries, tables = _collect(index, shards, records)
        _write_manifest(partial, settings, inputs, entries, tables, _labels(index, tables))
    except (BrokenProcessPool, OSError) as error:
        raise _cannot_build(partial, error) from error
    finally:
        _clean(partial)
    if out.is_dir():
        out.rmdir()  # empty, as `require_absent` made sure; Windows renames onto nothing
    files.replace(partial, out)
    # Only now: a crash between these lines leaves a few small files, never a shard to redo.
    for record in [out / PLAN, *out.glob("shard-*.json")]:
        record.unlink()


def _resume_or_clear(partial: Path, plan: dict) -> None:
    """Make the working folder ready: keep the shards of the same plan, remove those of another."""
    if not partial.exists():
        return
    _remove_temporary(partial)
    if not any(partial.iterdir()):
        return
    if not (partial / PLAN).is_file():
        raise UsageError(
            f"{partial} exists and is not an unfinished cache; nothing is overwritten.",
            "The cache is built there first: move that folder away or choose another name.",
        )
    if files.read_json(partial / PLAN) != plan:
        shutil.rmtree(partial)


def _finished(partial: Path, shard: PlannedShard) -> dict | None:
    """Return the record of a shard that an earlier build finished."""
    path = partial / shard.name
    record_path = path.with_suffix(".json")
    if not record_path.is_file():
        return None
    record = files.read_json(record_path)
    if record["num_slices"] and (not path.is_file() or path.stat().st_size != record["num_bytes"]):
        return None
    return record


def _clean(partial: Path) -> None:
    """Remove unfinished shards; the whole folder when no shard was finished."""
    _remove_temporary(partial)
    if not any(partial.glob("shard-*.h5")):
        shutil.rmtree(partial)


def _remove_temporary(partial: Path) -> None:
    for leftover in partial.glob(f"{TEMPORARY}*"):
        leftover.unlink()


def _cannot_build(partial: Path, error: Exception) -> EnvironmentProblem:
    hint = "Finished shards are kept: build again to resume."
    if isinstance(error, BrokenProcessPool):
        return EnvironmentProblem(
            "a worker process died while reading slices (killed, often for lack of memory).",
            f"Use fewer workers. {hint}",
        )
    return EnvironmentProblem(f"{partial} could not be written ({error}).", hint)


def _build_shards(
    index: "SeriesIndex",
    partial: Path,
    shards: list[PlannedShard],
    settings: Settings,
    workers: int,
    progress: Progress | None,
) -> dict[str, dict]:
    sources = indexed_slices(index)
    count = _Counter(progress, sum(shard.stop - shard.start for shard in shards))
    records = {}
    with mapper(workers) as run:
        # The workers read for the next shard while this process checks and syncs the last one.
        started: deque[_StartedShard] = deque()
        for shard in shards:
            path = partial / f"{TEMPORARY}raw-{shard.name}"
            crc_offset, offset = create_raw_shard(path, shard.stop - shard.start, settings.size)
            own = sources[shard.start : shard.stop]
            filled = run(fill_block, blocks(path, offset, shard.start, own, settings.size))
            started.append(_StartedShard(shard, path, crc_offset, offset, filled))
            if len(started) == 2:
                first = started.popleft()
                records[first.plan.name] = _finish(partial, settings, first, count)
        for last in started:
            records[last.plan.name] = _finish(partial, settings, last, count)
    return records


class _Counter:
    """Reports progress at most `PROGRESS_CALLS` times."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress = progress
        self.total = total
        self.done = 0
        if progress is not None:
            progress("caching", 0, total)

    def add(self, slices: int) -> None:
        before, self.done = self.done, self.done + slices
        steps = [done * PROGRESS_CALLS // self.total for done in (before, self.done)]
        if self.progress is not None and steps[0] != steps[1]:
            self.progress("caching", self.done, self.total)


def _finish(partial: Path, settings: Settings, started: _StartedShard, count: _Counter) -> dict:
    """Wait for a shard's blocks, then verify, sync, rename and record it."""
    plan, raw = started.plan, started.path
    crc_blocks: list[np.ndarray] = []
    rejected: dict[int, tuple[str, str, str]] = {}
    repaired: list[int] = []
    for block in started.filled:
        crc_blocks.append(block.crc32)
        rejected |= block.rejected
        repaired += block.repaired
        count.add(len(block.crc32))
    kept = np.ones(plan.stop - plan.start, bool)
    kept[[row - plan.start for row in rejected]] = False
    crc32 = np.concatenate(crc_blocks)[kept]
    entry = ShardEntry(plan.name, 0, 0, len(crc32), started.offset)
    if kept.any():
        entry = _write_final(partial, settings, started, kept, crc32)
    raw.unlink(missing_ok=True)
    record = {
        "num_bytes": entry.num_bytes,
        "num_slices": entry.num_slices,
        "dataset_offset": entry.dataset_offset,
        "rejected": [[row, *reject] for row, reject in sorted(rejected.items())],
        "repaired": repaired,
    }
    files.write_json((partial / plan.name).with_suffix(".json"), record)
    return record


def _write_final(
    partial: Path,
    settings: Settings,
    started: _StartedShard,
    kept: np.ndarray,
    crc32: np.ndarray,
) -> ShardEntry:
    """Make the raw shard final, or copy it when it has holes or is to be compressed."""
    name, path = started.plan.name, started.path
    offset: int | None = started.offset
    if settings.compression is None and kept.all():
        write_at(path, started.crc_offset, crc32)
    else:
        path = partial / f"{TEMPORARY}{name}"
        offset = copy_shard(
            started.path, started.offset, path, kept, crc32, settings.size, settings.compression
        )
    with open(path, "rb+") as stream:
        os.fsync(stream.fileno())
    entry = ShardEntry(name, path.stat().st_size, 0, len(crc32), offset)
    Shard(path, entry, settings.size, settings.compression).verify(crc32)
    files.replace(path, partial / name)
    return entry


def _collect(
    index: "SeriesIndex", shards: list[PlannedShard], records: dict[str, dict]
) -> tuple[list[ShardEntry], CacheTables]:
    """Turn the shards' records into the manifest's entries and the cache's tables."""
    entries = []
    rejected: dict[int, tuple[str, str, str]] = {}
    repaired: set[int] = set()
    first_slice = 0
    for shard in shards:
        record = records[shard.name]
        # Records of older versions have no hint.
        rejected |= {row: (*told, "")[:3] for row, *told in record["rejected"]}
        repaired |= set(record["repaired"])
        if record["num_slices"]:
            num_bytes, count = record["num_bytes"], record["num_slices"]
            entries.append(
                ShardEntry(shard.name, num_bytes, first_slice, count, record["dataset_offset"])
            )
            first_slice += count
    if not entries:
        row, (code, detail, _) = next(iter(rejected.items()))
        raise DataError(
            f"none of the {len(index.slices)} slices could be read. The first, "
            f"{index.slices['container'].iloc[row]}: {code}: {detail}",
            "Were the files moved or changed after indexing? Index the folder again.",
        )
    return entries, tables_after_reading(index, rejected, repaired)


def _labels(index: "SeriesIndex", tables: CacheTables) -> pd.DataFrame | None:
    """Return sop_instance_uid and the six label columns of the cached slices, if there are any."""
    if not set(LABELS) <= set(index.slices.columns):
        return None
    return tables.slices[[UID]].merge(index.slices[[UID, *LABELS]], on=UID, how="left")


def _write_manifest(
    partial: Path,
    settings: Settings,
    inputs: str,
    entries: list[ShardEntry],
    tables: CacheTables,
    labels: pd.DataFrame | None,
) -> None:
    written = {name: write_table(partial / f"{name}.csv", getattr(tables, name)) for name in TABLES}
    if labels is not None:
        written[LABEL_TABLE] = write_table(partial / f"{LABEL_TABLE}.csv", labels)
    manifest = {
        "schema": SCHEMA,
        "size": settings.size,
        "resampling": RESAMPLING,
        "compression": settings.compression,
        "inputs": inputs,
        "versions": pixel_versions(),
        "num_slices": len(tables.slices),
        "num_series": len(tables.series),
        "tables": written,
        "shards": [asdict(entry) for entry in entries],
    }
    files.write_json(partial / MANIFEST, {**manifest, "checksum": files.fingerprint(manifest)})
