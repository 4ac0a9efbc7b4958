"""Writing one shard of a cache: space first, pixels in place, then the final file."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from ich_keras.data.cache.shards import CRC32, CRC_DTYPE, HU, HU_DTYPE, layout, require_blosc2
from ich_keras.disk import full_disk_told
from ich_keras.errors import EnvironmentProblem

# Datasets start on pages of their own: a slice of 256x256 is then exactly 32 pages of the map.
PAGE = 4096
COPIED_SLICES = 64


def raw_shard_bytes(num_slices: int, size: int) -> int:
    """Return the bytes an uncompressed shard needs at most, its HDF5 header included."""
    checksums = -(-num_slices * CRC_DTYPE.itemsize // PAGE) * PAGE
    return 2 * PAGE + checksums + num_slices * size * size * HU_DTYPE.itemsize


def create_raw_shard(path: Path, num_slices: int, size: int) -> tuple[int, int]:
    """Create an uncompressed shard and reserve its space; the slices are written later.

    HDF5 writes only the header. Any number of processes then write the pixels at the offsets
    returned, with plain file writes: a full disk is then an OSError at the write, where HDF5 would
    fail at close and a memory map would kill the process with SIGBUS.

    Args:
        path: the new file.
        num_slices: number of slices.
        size: rows and columns of a slice.

    Returns:
        The byte offsets of `crc32` and `hu` in the file.

    Raises:
        EnvironmentProblem: there is no space for it, or HDF5 could not write it.
    """
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)  # the same slices must give the same bytes
    offsets = []
    try:
        with (
            full_disk_told(path, raw_shard_bytes(num_slices, size)),
            h5py.File(path, "w", alignment_threshold=PAGE, alignment_interval=PAGE) as file,
        ):
            for name, shape, dtype in layout(num_slices, size):
                dataset = h5py.h5d.create(
                    file.id,
                    name.encode(),
                    h5py.h5t.py_create(dtype),
                    h5py.h5s.create_simple(shape),
                    dcpl=properties,
                )
                offsets.append(dataset.get_offset())
    except (OSError, RuntimeError) as error:  # h5py reports a failed close as RuntimeError
        raise _cannot_write(path, error) from error
    with full_disk_told(path, raw_shard_bytes(num_slices, size)):
        _reserve(path)
    return offsets[0], offsets[1]


def write_at(path: Path, offset: int, array: np.ndarray) -> None:
    """Write an array's bytes into an existing file at an offset.

    Raises:
        EnvironmentProblem: the disk is full.
    """
    with full_disk_told(path), open(path, "r+b", buffering=0) as stream:
        stream.seek(offset)
        view = np.ascontiguousarray(array).data.cast("B")
        while view:  # one write may take only a part (2 GiB limit, signals, a nearly full disk)
            view = view[stream.write(view) :]


def copy_shard(
    source: Path, source_offset: int, target: Path, kept: np.ndarray, crc32: np.ndarray, size: int
) -> int:
    """Copy the kept slices of an unfinished raw shard into a new, final shard.

    Args:
        source: the raw shard.
        source_offset: byte at which its `hu` starts.
        target: the new file.
        kept: bool (slices of the source,), the slices to copy, in order.
        crc32: uint32 (kept slices,), their checksums.
        size: rows and columns of a slice.

    Returns:
        The byte at which `hu` starts in the new file.
    """
    rows = np.flatnonzero(kept)
    shape = (len(kept), size, size)
    pixels = np.memmap(source, HU_DTYPE, "r", source_offset, shape).view(np.ndarray)
    crc_offset, offset = create_raw_shard(target, len(rows), size)
    slice_bytes = size * size * HU_DTYPE.itemsize
    for start in range(0, len(rows), COPIED_SLICES):
        block = pixels[rows[start : start + COPIED_SLICES]]
        write_at(target, offset + start * slice_bytes, block)
    write_at(target, crc_offset, crc32)
    return offset


@dataclass(frozen=True)
class Chunk:
    """A compressed slice.

    Args:
        num_bytes: its length.
        skipped: the filters that were not applied, as they did not make it shorter; HDF5's mask.
    """

    num_bytes: int
    skipped: int


def compressed(pixels: np.ndarray, compression: str) -> Iterator[tuple[Chunk, bytes]]:
    """Compress slices as HDF5 would, without a file; none gets longer than it was.

    Args:
        pixels: int16 (slices, size, size), HU.
        compression: "gzip" or "blosc2".
    """
    num_bytes = pixels[0].nbytes
    with h5py.File("memory", "w", driver="core", backing_store=False) as file:
        dataset = _create_compressed(file, len(pixels), pixels.shape[1], compression)
        every = (1 << dataset.id.get_create_plist().get_nfilters()) - 1
        for row, hu in enumerate(pixels):
            dataset[row] = hu
            skipped, content = dataset.id.read_direct_chunk((row, 0, 0))
            if len(content) > num_bytes:
                skipped, content = every, hu.tobytes()
            yield Chunk(len(content), skipped), content


def write_compressed(
    source: Path,
    source_offset: int,
    target: Path,
    chunks: Sequence[tuple[int, Chunk]],
    crc32: np.ndarray,
    size: int,
    compression: str,
) -> None:
    """Write a final shard of the compressed slices that lie in an unfinished one.

    Args:
        source: the raw shard.
        source_offset: byte at which the place of its first slice begins.
        target: the new file.
        chunks: the slices to keep, in order: each one's row in the source, and what is there.
        crc32: uint32 (kept slices,), their checksums.
        size: rows and columns of a slice.
        compression: "gzip" or "blosc2".
    """
    slice_bytes = size * size * HU_DTYPE.itemsize
    try:
        with (
            full_disk_told(target),
            open(source, "rb") as stream,
            h5py.File(target, "w") as file,
        ):
            file.create_dataset(CRC32, data=crc32.astype(CRC_DTYPE))
            dataset = _create_compressed(file, len(chunks), size, compression)
            for position, (row, chunk) in enumerate(chunks):
                stream.seek(source_offset + row * slice_bytes)
                content = stream.read(chunk.num_bytes)
                dataset.id.write_direct_chunk((position, 0, 0), content, chunk.skipped)
    except (OSError, RuntimeError) as error:
        raise _cannot_write(target, error) from error


def _create_compressed(
    file: h5py.File, num_slices: int, size: int, compression: str
) -> h5py.Dataset:
    return file.create_dataset(
        HU,
        (num_slices, size, size),
        HU_DTYPE,
        chunks=(1, size, size),
        **_filters(compression),
    )


def _cannot_write(path: Path, error: Exception) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"{path} could not be written ({error}).", "Is the disk full or a file size limit set?"
    )


def _reserve(path: Path) -> None:
    if not hasattr(os, "posix_fallocate"):
        return
    with open(path, "r+b") as stream:
        os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)


def _filters(compression: str) -> dict:
    if compression == "gzip":
        return {"compression": "gzip", "compression_opts": 1, "shuffle": True}
    require_blosc2()
    import hdf5plugin

    # Measured on 256 x 256 slices of a real head, per core: 2.6 times smaller, as with gzip;
    # written at 245 MB/s (gzip 96), read at 626 (gzip 269). lz4 is read at 1100, and gives 2.2
    # times. The next levels of zstd give 2.7, and are written at 107 or less. Bitshuffle gives
    # less.
    # Caches of older versions hold lz4, and are read all the same.
    return dict(hdf5plugin.Blosc2(cname="zstd", clevel=1, filters=hdf5plugin.Blosc2.SHUFFLE))
