"""Reading slices in parallel, each straight into its place in an unfinished shard.

Pixels never travel between processes: a worker reads, resizes and writes a block of slices, and
hands back checksums and rejects only. Handing arrays back through the pool is four times slower.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pydicom

from ich_keras.ct.dicom import read_slice
from ich_keras.ct.rejects import RejectedFile
from ich_keras.data.cache.shards import CRC_DTYPE, HU_DTYPE
from ich_keras.data.cache.writer import write_at
from ich_keras.data.inputs import resize_hu
from ich_keras.processes import process_pool

# Names the way from a file's bytes to HU (`ich_keras.ct.pixels`): change it when that changes.
READING = "declared-padding-is-air/3"

BLOCK_BYTES = 8 * 2**20
BLOCK_SLICES = 64

Source = tuple[str, int, int]  # container, rows, columns: what the index says of a slice


@dataclass(frozen=True)
class Block:
    """Slices that one task reads and writes into their place in a raw shard."""

    shard: Path
    offset: int
    first_row: int
    sources: tuple[Source, ...]
    size: int


@dataclass(frozen=True)
class Filled:
    """The outcome of a block; rows count from the first slice of the index."""

    first_row: int
    crc32: np.ndarray
    rejected: dict[int, tuple[str, str, str]]
    repaired: tuple[int, ...]


def pixel_versions() -> dict[str, str]:
    """Return the versions that cached pixels depend on: of libraries, and of our own reading."""
    versions = {"numpy": np.__version__, "opencv": cv2.__version__, "pydicom": pydicom.__version__}
    return versions | {"reading": READING}


def blocks(
    shard: Path, offset: int, first_row: int, sources: Sequence[Source], size: int
) -> list[Block]:
    """Divide the slices of a shard into tasks for `fill_block`.

    Args:
        shard: the raw shard.
        offset: byte at which its `hu` starts.
        first_row: row of its first slice in the index.
        sources: one for each of its slices.
        size: rows and columns of a cached slice.
    """
    slice_bytes = size * size * HU_DTYPE.itemsize
    step = max(1, min(BLOCK_SLICES, BLOCK_BYTES // slice_bytes))
    return [
        Block(
            shard=shard,
            offset=offset + start * slice_bytes,
            first_row=first_row + start,
            sources=tuple(sources[start : start + step]),
            size=size,
        )
        for start in range(0, len(sources), step)
    ]


@contextlib.contextmanager
def mapper(workers: int) -> Iterator[Callable]:
    """Yield `map`, or its parallel counterpart, which starts at once and keeps the order."""
    if workers == 0:
        yield map
        return
    pool = process_pool(workers, cv2.setNumThreads, 1)
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def fill_block(block: Block) -> Filled:
    """Read slices, resize them and write them into their place in the raw shard."""
    pixels = np.zeros((len(block.sources), block.size, block.size), HU_DTYPE)
    rejected = {}
    repaired = []
    for number, (container, rows, columns) in enumerate(block.sources):
        try:
            pixels[number], was_repaired = read_resized(container, rows, columns, block.size)
        except RejectedFile as reject:
            rejected[block.first_row + number] = (reject.code, reject.detail, reject.hint)
        else:
            if was_repaired:
                repaired.append(block.first_row + number)
    write_at(block.shard, block.offset, pixels)
    crc32 = np.array([zlib.crc32(hu.data) for hu in pixels], CRC_DTYPE)
    return Filled(block.first_row, crc32, rejected, tuple(repaired))


def read_resized(container: str, rows: int, columns: int, size: int) -> tuple[np.ndarray, bool]:
    """Read one slice as it goes into a cache.

    Args:
        container: path of the DICOM file.
        rows, columns: what the index says of its matrix.
        size: rows and columns of the result.

    Returns:
        int16 (size, size), HU, and whether the 12-bit repair was applied.

    Raises:
        RejectedFile: it cannot be read, or is not what was indexed.
    """
    record = read_slice(container)
    if record.hu.shape != (rows, columns):
        raise RejectedFile(
            "BAD_VALUE",
            f"Rows, Columns are {record.hu.shape}; ({rows}, {columns}) when it was indexed.",
            "Index the folder again.",
        )
    return resize_hu(record.hu, size), record.repaired
