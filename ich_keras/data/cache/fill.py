"""Reading slices in parallel, each straight into its place in an unfinished shard.

Pixels never travel between processes: a worker reads, resizes, compresses and writes a block of
slices, and hands back checksums and rejects only. Later, workers verify the finished shards.
"""

import contextlib
import itertools
import socket
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pydicom

from ich_keras.ct.journal import NEVER_KEPT
from ich_keras.ct.plausibility import Content, content_of_reject
from ich_keras.ct.rejects import RejectedFile
from ich_keras.data.cache.shards import CRC_DTYPE, HU_DTYPE, Shard
from ich_keras.data.cache.writer import Chunk, compressed, write_at
from ich_keras.data.reading import IndexedSlice, read_indexed
from ich_keras.errors import EnvironmentProblem
from ich_keras.executors import Workers, broken_told, map_on
from ich_keras.processes import process_pool
from ich_keras.progress import Progress

# Names the way from a file's bytes to HU (`ich_keras.ct.pixels`): change it when that changes.
READING = "declared-padding-is-air/3, rows-to-the-left/1, zero-tails/2, wrapped/2"

BLOCK_BYTES = 8 * 2**20
BLOCK_SLICES = 64
REREAD_SLICES = 16


@dataclass(frozen=True)
class Block:
    """Slices that one task reads and writes into their places in a raw shard.

    Args:
        shard: the raw shard.
        offset: byte at which the slice of `first_row` begins.
        first_row: a row of the index.
        sources: what the index says of the slices.
        size: rows and columns of a cached slice.
        places: (slices,), each one's row of the index less `first_row`; () stands for 0, 1, 2, ...
        compression: None, "gzip" or "blosc2": of what is written.
    """

    shard: Path
    offset: int
    first_row: int
    sources: tuple[IndexedSlice, ...]
    size: int
    places: tuple[int, ...] = ()
    compression: str | None = None

    @property
    def rows(self) -> tuple[int, ...]:
        """The row of the index of each slice."""
        places = self.places or range(len(self.sources))
        return tuple(self.first_row + place for place in places)


@dataclass(frozen=True)
class Filled:
    """The outcome of a block; rows count from the first slice of the index.

    Args:
        rows: (slices,), in the order of what follows.
        crc32: uint32 (slices,).
        hashes: (slices,), each one's `pixel_hash`; "" for a reject.
        rejected: row -> reject code, detail and hint.
        repaired: rows to which the 12-bit repair was applied.
        contents: (slices,), for `ich_keras.ct.plausibility.implausible_rows`.
        chunks: (slices,), what was written of each into the beginning of its place; () when not
            compressed.
    """

    rows: tuple[int, ...]
    crc32: np.ndarray
    hashes: tuple[str, ...]
    rejected: dict[int, tuple[str, str, str]]
    repaired: tuple[int, ...]
    contents: tuple[Content | None, ...]
    chunks: tuple[Chunk, ...] = ()


def pixel_versions() -> dict[str, str]:
    """Return the versions that cached pixels depend on: of libraries, and of our own reading."""
    versions = {"numpy": np.__version__, "opencv": cv2.__version__, "pydicom": pydicom.__version__}
    return versions | {"reading": READING}


def blocks(
    shard: Path,
    offset: int,
    first_row: int,
    sources: Sequence[IndexedSlice],
    size: int,
    compression: str | None = None,
) -> list[Block]:
    """Divide the slices of a shard into tasks for `fill_block`.

    Slices in archives are read in the order in which these store them: one sweep for each shard.

    Args:
        shard: the raw shard.
        offset: byte at which its `hu` starts.
        first_row: row of its first slice in the index.
        sources: one for each of its slices.
        size: rows and columns of a cached slice.
        compression: None, "gzip" or "blosc2".
    """
    slice_bytes = size * size * HU_DTYPE.itemsize
    step = max(1, min(BLOCK_SLICES, BLOCK_BYTES // slice_bytes))
    if any(source.member for source in sources):
        stored = sorted(
            range(len(sources)),
            key=lambda row: (sources[row].container, sources[row].member_offset),
        )
        parts = [tuple(stored[start : start + step]) for start in range(0, len(stored), step)]
        return [
            Block(
                shard=shard,
                offset=offset,
                first_row=first_row,
                sources=tuple(sources[row] for row in part),
                size=size,
                places=part,
                compression=compression,
            )
            for part in parts
        ]
    return [
        Block(
            shard=shard,
            offset=offset + start * slice_bytes,
            first_row=first_row + start,
            sources=tuple(sources[start : start + step]),
            size=size,
            compression=compression,
        )
        for start in range(0, len(sources), step)
    ]


@contextlib.contextmanager
def mapper(workers: Workers) -> Iterator[Callable]:
    """Yield `map`, or its parallel counterpart, which starts at once and keeps the order.

    Args:
        workers: processes (0 works in this one), or an executor.

    Raises:
        EnvironmentProblem: a worker process died, or a worker has other versions of libraries.
    """
    with broken_told(
        "a worker process died while reading slices (killed, often for lack of memory).",
        "Use fewer workers. A script that uses workers needs an `if __name__ == '__main__':`"
        " guard.",
    ):
        if isinstance(workers, Executor):
            executor, versions = workers, pixel_versions()
            yield lambda function, items: map_on(
                executor, partial(_elsewhere, function, versions), items, _is_doubtful
            )
            return
        if workers == 0:
            yield map
            return
        pool = process_pool(workers, cv2.setNumThreads, 1)
        try:
            yield pool.map
        finally:
            pool.shutdown(cancel_futures=True)


def _elsewhere(function: Callable, versions: dict[str, str], item: object) -> object:
    """Do a task on a machine that may have other libraries, which would give other pixels."""
    own = pixel_versions()
    differing = [name for name in versions if own.get(name) != versions[name]]
    if differing:
        told = ", ".join(f"{name} {own.get(name)}, not {versions[name]}" for name in differing)
        raise EnvironmentProblem(
            f"a worker on {socket.gethostname()} has {told}.",
            "Install the same versions on all machines: the pixels depend on them.",
        )
    return function(item)


def _is_doubtful(result: "Filled | list[str]") -> bool:
    """Return whether another machine may have lacked something that this one has."""
    if isinstance(result, Filled):
        return any(code in NEVER_KEPT for code, *_ in result.rejected.values())
    return "" in result


def fill_block(block: Block) -> Filled:
    """Read slices, resize them and write them into their place in the raw shard."""
    pixels = np.zeros((len(block.sources), block.size, block.size), HU_DTYPE)
    hashes = [""] * len(pixels)
    rejected = {}
    repaired = []
    contents: list[Content | None] = []
    rows = block.rows
    for number, source in enumerate(block.sources):
        try:
            read = read_indexed(source, block.size)
        except RejectedFile as reject:
            rejected[rows[number]] = (reject.code, reject.detail, reject.hint)
            contents.append(content_of_reject(reject))
        else:
            pixels[number] = read.hu
            contents.append(read.content)
            hashes[number] = read.pixel_hash
            if read.repaired:
                repaired.append(rows[number])
    offsets = [block.offset + (row - block.first_row) * pixels[0].nbytes for row in rows]
    chunks = []
    if block.compression is None:
        for start, stop in _runs(rows):
            write_at(block.shard, offsets[start], pixels[start:stop])
    else:
        for offset, (chunk, content) in zip(
            offsets, compressed(pixels, block.compression), strict=True
        ):
            write_at(block.shard, offset, np.frombuffer(content, np.uint8))
            chunks.append(chunk)
    crc32 = np.array([zlib.crc32(hu.data) for hu in pixels], CRC_DTYPE)
    return Filled(
        rows, crc32, tuple(hashes), rejected, tuple(repaired), tuple(contents), tuple(chunks)
    )


def verify_rows(shard: Shard, rows: tuple[int, int]) -> list[str]:
    """Check the checksums of the slices from `rows[0]` to before `rows[1]`; return nothing.

    Raises:
        StaleError: the shard is damaged; names the slice.
    """
    shard.verify_rows(range(*rows))
    return []


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Return where the runs of successive numbers start and stop.

    >>> _runs([5, 6, 2, 9, 10])
    [(0, 2), (2, 3), (3, 5)]
    """
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    bounds = [0, *breaks.tolist(), len(rows)]
    return list(itertools.pairwise(bounds))


def a_few(count: int) -> list[int]:
    """Choose up to REREAD_SLICES numbers below `count`, evenly spaced, to be read again."""
    return np.unique(np.linspace(0, count - 1, min(count, REREAD_SLICES)).astype(int)).tolist()


def hashes_now(
    sources: Sequence[IndexedSlice],
    size: int,
    workers: Workers = 0,
    progress: Progress | None = None,
) -> list[str]:
    """Read slices again, to see whether they still have the pixels that were cached.

    Args:
        sources: what the index says of them.
        size: rows and columns of a cached slice.
        workers: processes that read (0 reads in this one), or an executor.
        progress: called as progress("comparing", slices done, all slices).

    Returns:
        (slices,), each one's `pixel_hash`; "" where it cannot be read.
    """
    parts = [
        sources[start : start + BLOCK_SLICES] for start in range(0, len(sources), BLOCK_SLICES)
    ]
    found: list[str] = []
    with mapper(workers if len(parts) > 1 else 0) as run:
        for hashes in run(partial(_hash_block, size), parts):
            found += hashes
            if progress is not None:
                progress("comparing", len(found), len(sources))
    return found


def _hash_block(size: int, sources: Sequence[IndexedSlice]) -> list[str]:
    hashes = []
    for source in sources:
        try:
            hashes.append(read_indexed(source, size).pixel_hash)
        except RejectedFile:
            hashes.append("")
    return hashes
