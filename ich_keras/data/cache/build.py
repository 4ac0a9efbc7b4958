"""Building a cache: plan the shards, fill them in parallel, finish them one after the other.

Everything happens in `<out>.partial` beside the final folder. A shard is written under a temporary
name, verified, renamed, and then recorded in a small JSON file. Calling the build again resumes
one that died: it keeps the recorded shards. The manifest is written last, then the folder is
renamed. See `ich_keras.data.cache.cache` for what the result looks like.
"""

import contextlib
import functools
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ich_keras import files
from ich_keras.ct.plausibility import Content, implausible_rows
from ich_keras.ct.rejects import rejects_kept, require_few_rejects
from ich_keras.ct.tables import shown_paths, write_table
from ich_keras.data.cache.fill import Filled, blocks, fill_block, mapper, verify_rows
from ich_keras.data.cache.plan import PlannedShard, Settings, plan_build
from ich_keras.data.cache.shards import CRC_DTYPE, Shard, ShardEntry, digest_of
from ich_keras.data.cache.tables import PIXEL_HASH, UID, CacheTables, tables_after_reading
from ich_keras.data.cache.unfinished import (
    PLAN,
    TEMPORARY,
    clean,
    entry_of,
    finished_records,
    make_ready,
    require_same_pixels,
    working_folder,
    write_record,
)
from ich_keras.data.cache.writer import (
    Chunk,
    copy_shard,
    create_raw_shard,
    raw_shard_bytes,
    write_at,
    write_compressed,
)
from ich_keras.data.reading import indexed_slices
from ich_keras.disk import full_disk_told, require_free
from ich_keras.errors import DataError, EnvironmentProblem
from ich_keras.executors import Workers
from ich_keras.labels import Labelling
from ich_keras.progress import Progress

if TYPE_CHECKING:
    from ich_keras.ct.series import SeriesIndex

MANIFEST = "manifest.json"
TABLES = ("slices", "series", "rejects")
LABEL_TABLE, LABELLING = "labels", "labelling"
PROGRESS_CALLS = 200
VERIFIED_SLICES = 256  # by one task
_KEPT = "Finished shards are kept: build again to resume."
OF_THE_PLAN = ("schema", "size", "resampling", "compression", "inputs", "versions")


@dataclass(frozen=True)
class _StartedShard:
    """A raw shard that is being filled: the offsets of its datasets, the blocks as they arrive.

    `series` has the series of each slice.
    """

    plan: PlannedShard
    series: list[str]
    path: Path
    crc_offset: int
    offset: int
    filled: Iterator[Filled]


def build_folder(
    index: "SeriesIndex",
    out: Path,
    settings: Settings,
    workers: Workers,
    progress: Progress | None,
    restart: bool = False,
    max_rejects: float = 1.0,
    is_alone: bool = False,
) -> None:
    """Build a cache's folder, resuming an earlier build of the same plan.

    The arguments are those of `ich_keras.data.cache.cache.build_cache`, and whether the caller
    holds the lock, which it does wherever there are locks.
    """
    partial = working_folder(out)
    shards, plan = plan_build(index, settings)
    records = fill_shards(
        index, partial, plan, shards, settings, workers, progress, restart, is_alone
    )
    finish_folder(index, out, plan, shards, records, max_rejects)


def fill_shards(
    index: "SeriesIndex",
    partial: Path,
    plan: dict,
    shards: list[PlannedShard],
    settings: Settings,
    workers: Workers,
    progress: Progress | None,
    restart: bool,
    is_alone: bool,
) -> dict[str, dict]:
    """Build shards of a plan in a working folder, resuming an earlier build of the same plan.

    Returns:
        The record of each of the shards, by its name.
    """
    make_ready(partial, plan, restart, is_alone)
    records = finished_records(partial, plan, shards, settings)
    require_same_pixels(index, shards, records, settings, workers, progress)
    to_do = [shard for shard in shards if shard.name not in records]
    raw = [raw_shard_bytes(shard.stop - shard.start, settings.size) for shard in to_do]
    # One shard more: a shard that lost slices, or is compressed, is written a second time.
    require_free(partial.parent, sum(raw) + max(raw, default=0), f"{len(raw)} shards of the cache")
    files.write_json(partial / PLAN, plan)
    # A record is worth keeping also where all slices of its shard were refused.
    with _working_in(partial, "shard-*.*"):
        return records | _build_shards(index, partial, plan, to_do, settings, workers, progress)


def finish_folder(
    index: "SeriesIndex",
    out: Path,
    plan: dict,
    shards: list[PlannedShard],
    records: dict[str, dict],
    max_rejects: float,
) -> None:
    """Write tables and manifest of a working folder that has all shards, and give it its name."""
    partial = working_folder(out)
    with _working_in(partial, "shard-*.h5"):
        entries, tables = _collect(index, shards, records)
        with rejects_kept(partial):
            require_few_rejects(tables.slices, tables.rejects, max_rejects)
        _write_manifest(partial, plan, entries, tables, _labels(index, tables), index.labelling)
    if out.is_dir():
        out.rmdir()  # empty, as `require_absent` made sure; Windows renames onto nothing
    files.replace(partial, out)
    # Only now: a crash between these lines leaves a few small files, never a shard to redo.
    for record in [out / PLAN, *out.glob("shard-*.json")]:
        record.unlink()


@contextlib.contextmanager
def _working_in(partial: Path, kept: str) -> Iterator[None]:
    """Clean up after a block (`clean`), and say in its errors that finished shards are kept."""
    try:
        yield
    except EnvironmentProblem as error:
        raise EnvironmentProblem(error.message, f"{error.hint} {_KEPT}".strip()) from error
    except OSError as error:
        raise EnvironmentProblem(f"{partial} could not be written ({error}).", _KEPT) from error
    finally:
        clean(partial, kept)


def _build_shards(
    index: "SeriesIndex",
    partial: Path,
    plan: dict,
    shards: list[PlannedShard],
    settings: Settings,
    workers: Workers,
    progress: Progress | None,
) -> dict[str, dict]:
    sources = indexed_slices(index)
    times = index.slices["file_mtime_ns"].tolist()
    series = index.slices["series_uid"].tolist()

    def finish(shard: _StartedShard) -> None:
        record = _finish(partial, settings, shard, run, count)
        record["times"] = times[shard.plan.start : shard.plan.stop]
        records[shard.plan.name] = write_record(partial, plan, shard.plan.name, record)

    count = _Counter(progress, sum(shard.stop - shard.start for shard in shards))
    records: dict[str, dict] = {}
    with mapper(workers) as run:
        # The workers read for the next shard while this process checks and syncs the last one.
        started: deque[_StartedShard] = deque()
        for shard in shards:
            path = partial / f"{TEMPORARY}raw-{shard.name}"
            crc_offset, offset = create_raw_shard(path, shard.stop - shard.start, settings.size)
            own = sources[shard.start : shard.stop]
            tasks = blocks(path, offset, shard.start, own, settings.size, settings.compression)
            filled = run(fill_block, tasks)
            own_series = series[shard.start : shard.stop]
            started.append(_StartedShard(shard, own_series, path, crc_offset, offset, filled))
            if len(started) == 2:
                finish(started.popleft())
        for last in started:
            finish(last)
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


def _finish(
    partial: Path, settings: Settings, started: _StartedShard, run: Callable, count: _Counter
) -> dict:
    """Wait for a shard's blocks, then verify, sync and rename it; return its record."""
    plan, raw = started.plan, started.path
    num_slices = plan.stop - plan.start
    all_crc32 = np.zeros(num_slices, CRC_DTYPE)
    hashes = [""] * num_slices
    contents: list[Content | None] = [None] * num_slices
    chunks: list[Chunk | None] = [None] * num_slices
    rejected: dict[int, tuple[str, str, str]] = {}
    repaired: list[int] = []
    for block in started.filled:
        for number, row in enumerate(block.rows):
            all_crc32[row - plan.start] = block.crc32[number]
            hashes[row - plan.start] = block.hashes[number]
            contents[row - plan.start] = block.contents[number]
            if block.chunks:
                chunks[row - plan.start] = block.chunks[number]
        rejected |= block.rejected
        repaired += block.repaired
        count.add(len(block.rows))
    for row, reject in implausible_rows(started.series, contents).items():
        rejected.setdefault(plan.start + row, reject)
    kept = np.ones(num_slices, bool)
    kept[[row - plan.start for row in rejected]] = False
    crc32 = all_crc32[kept]
    entry = ShardEntry(plan.name, 0, 0, len(crc32), started.offset)
    if kept.any():
        entry = _write_final(partial, settings, started, run, kept, chunks, crc32)
    raw.unlink(missing_ok=True)
    return {
        "num_bytes": entry.num_bytes,
        "num_slices": entry.num_slices,
        "dataset_offset": entry.dataset_offset,
        "checksums": entry.checksums,
        "rejected": [[row, *reject] for row, reject in sorted(rejected.items())],
        "repaired": sorted(repaired),
        "hashes": hashes,
    }


def _write_final(
    partial: Path,
    settings: Settings,
    started: _StartedShard,
    run: Callable,
    kept: np.ndarray,
    chunks: list[Chunk | None],
    crc32: np.ndarray,
) -> ShardEntry:
    """Make the raw shard final, or copy it when it has holes or is compressed."""
    name, path = started.plan.name, started.path
    offset: int | None = started.offset
    if settings.compression is None and kept.all():
        write_at(path, started.crc_offset, crc32)
    else:
        path = partial / f"{TEMPORARY}{name}"
        if settings.compression is None:
            offset = copy_shard(started.path, started.offset, path, kept, crc32, settings.size)
        else:
            there = [(row, chunk) for row, chunk in enumerate(chunks) if kept[row] and chunk]
            write_compressed(
                started.path,
                started.offset,
                path,
                there,
                crc32,
                settings.size,
                settings.compression,
            )
            offset = None
    with full_disk_told(path), open(path, "rb+") as stream:
        os.fsync(stream.fileno())
    entry = ShardEntry(name, path.stat().st_size, 0, len(crc32), offset, digest_of(crc32))
    shard = Shard(path, entry, settings.size, settings.compression)
    shard.require_checksums(crc32)
    starts = range(0, len(crc32), VERIFIED_SLICES)
    parts = [(start, min(start + VERIFIED_SLICES, len(crc32))) for start in starts]
    for _ in run(functools.partial(verify_rows, shard), parts):
        pass
    files.replace(path, partial / name)
    return entry


def _collect(
    index: "SeriesIndex", shards: list[PlannedShard], records: dict[str, dict]
) -> tuple[list[ShardEntry], CacheTables]:
    """Turn the shards' records into the manifest's entries and the cache's tables."""
    entries = []
    rejected: dict[int, tuple[str, str, str]] = {}
    repaired: set[int] = set()
    hashes: list[str] = []
    first_slice = 0
    for shard in shards:
        record = records[shard.name]
        rejected |= {row: tuple(told) for row, *told in record["rejected"]}
        repaired |= set(record["repaired"])
        hashes += record["hashes"]
        if record["num_slices"]:
            entries.append(entry_of(shard.name, record, first_slice))
            first_slice += record["num_slices"]
    if not entries:
        row, (code, detail, _) = next(iter(rejected.items()))
        raise DataError(
            f"none of the {len(index.slices)} slices could be read. The first, "
            f"{shown_paths(index.slices).iloc[row]}: {code}: {detail}",
            "Were the files moved or changed after indexing? Index the folder again.",
        )
    return entries, tables_after_reading(index, rejected, repaired, hashes)


def _labels(index: "SeriesIndex", tables: CacheTables) -> pd.DataFrame | None:
    """Return sop_instance_uid and the label columns of the cached slices, if there are any."""
    if index.labelling is None:
        return None
    columns = [UID, *index.labelling.labels.names]
    return tables.slices[[UID]].merge(index.slices[columns], on=UID, how="left")


def _write_manifest(
    partial: Path,
    plan: dict,
    entries: list[ShardEntry],
    tables: CacheTables,
    labels: pd.DataFrame | None,
    labelling: Labelling | None,
) -> None:
    written = {name: write_table(partial / f"{name}.csv", getattr(tables, name)) for name in TABLES}
    if labels is not None:
        written[LABEL_TABLE] = write_table(partial / f"{LABEL_TABLE}.csv", labels)
    manifest = {
        **{name: plan[name] for name in OF_THE_PLAN},
        "pixels": files.fingerprint(tables.slices[PIXEL_HASH].tolist()),
        "num_slices": len(tables.slices),
        "num_series": len(tables.series),
        "tables": written,
        "shards": [asdict(entry) for entry in entries],
    }
    if labelling is not None:
        manifest[LABELLING] = labelling.to_dict()
    files.write_json(partial / MANIFEST, {**manifest, "checksum": files.fingerprint(manifest)})
