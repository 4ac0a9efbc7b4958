"""The shards of a cache: HDF5 files of int16 HU with a checksum for every slice.

A shard holds two datasets: `hu`, int16 (slices, size, size), HU; `crc32`, uint32 (slices,), the
CRC-32 of each slice's little-endian bytes. `hu` is contiguous and read by memory map, or, in the
compressed variant, chunked by slice and read through h5py. A finished shard is never changed.
"""

import contextlib
import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from ich_keras.errors import EnvironmentProblem, StaleError, UsageError
from ich_keras.progress import Progress

SHARD_BYTES = 2**30  # at most, unless one series alone is larger; `build.plan_shards` applies it
HU = "hu"
CRC32 = "crc32"
HU_DTYPE = np.dtype("<i2")
CRC_DTYPE = np.dtype("<u4")
COMPRESSIONS = (None, "gzip", "blosc2")
VERIFY_SLICES = 64
REBUILD = "Build the cache again."
Look = Callable[[int, np.ndarray], None]


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard.

    Args:
        name: file name inside the cache's folder.
        num_bytes: length of the file.
        first_slice: the cache's number of its first slice.
        num_slices: how many slices it holds.
        dataset_offset: byte at which `hu` starts in the file; None when compressed.
        checksums: `digest_of` its checksums, by which a shard of other slices is known; None in
            caches of schema 1.
    """

    name: str
    num_bytes: int
    first_slice: int
    num_slices: int
    dataset_offset: int | None
    checksums: str | None = None


def layout(num_slices: int, size: int) -> tuple[tuple[str, tuple[int, ...], np.dtype], ...]:
    """Return name, shape and dtype of a shard's datasets."""
    return ((CRC32, (num_slices,), CRC_DTYPE), (HU, (num_slices, size, size), HU_DTYPE))


def digest_of(crc32: np.ndarray) -> str:
    """Return a digest of the checksums of a shard's slices, 32 hexadecimal digits.

    Args:
        crc32: uint32 (slices,).
    """
    return hashlib.sha256(crc32.astype(CRC_DTYPE).tobytes()).hexdigest()[:32]


def require_compression(compression: str | None) -> None:
    """Check that a compression is known and its HDF5 plugin is installed.

    Raises:
        UsageError: an unknown name.
        EnvironmentProblem: hdf5plugin is not installed.
    """
    if compression not in COMPRESSIONS:
        known = ", ".join(str(name) for name in COMPRESSIONS)
        raise UsageError(f"compression {compression!r} is unknown.", f"Known: {known}.")
    if compression == "blosc2":
        require_blosc2()


def require_blosc2() -> None:
    """Register HDF5's blosc2 filter.

    Raises:
        EnvironmentProblem: hdf5plugin is not installed.
    """
    try:
        import hdf5plugin  # noqa: F401 (its import registers the filters with HDF5)
    except ImportError as error:
        raise EnvironmentProblem(
            "a cache compressed with blosc2 needs hdf5plugin, which is not installed.",
            "pip install 'ich_keras[compression]'",
        ) from error


class Shard:
    """One shard, opened at its first use in each process.

    Args:
        path: the file.
        entry: what the manifest says of it.
        size: rows and columns of a slice.
        compression: None, "gzip" or "blosc2".
    """

    def __init__(self, path: Path, entry: ShardEntry, size: int, compression: str | None) -> None:
        self.path = path
        self.entry = entry
        self.size = size
        self.compression = compression
        self._opened: _Opened | None = None

    def __getstate__(self) -> dict:
        # A map or an HDF5 handle means nothing in another process.
        return {**self.__dict__, "_opened": None}

    def check(self) -> None:
        """Compare the file's length and datasets with the manifest, without reading a slice.

        Raises:
            StaleError: they differ, or the file is absent or damaged.
        """
        self._inspect(close=True)

    def read_into(
        self, out: np.ndarray, where: Iterable[int], rows: Iterable[int], verify: bool = False
    ) -> None:
        """Copy slices into an array, checking each one's checksum at its first read.

        Args:
            out: int16 (n, size, size), receives HU.
            where: positions in `out`.
            rows: slices of this shard, one for each position.
            verify: check every checksum, also of slices that were read before.

        Raises:
            StaleError: a slice does not match its checksum.
        """
        opened = self._open()
        pixels, crc32, seen = opened.pixels, opened.crc32, opened.seen
        for position, row in zip(where, rows, strict=True):
            try:
                out[position] = pixels[row]
            except (OSError, RuntimeError) as error:  # HDF5 on a damaged chunk
                raise self._damaged(row, f"cannot be decompressed ({error})") from error
            if verify or not seen[row]:
                if zlib.crc32(out[position]) != crc32[row]:
                    raise self._damaged(row, "does not match its checksum")
                seen[row] = True

    def verify(self, look: Look | None = None) -> None:
        """Read every slice and check its checksum.

        Args:
            look: called with the cache's number of each slice and its HU.

        Raises:
            StaleError: the shard is damaged; names the slice.
        """
        self.check()
        self.verify_rows(range(self.entry.num_slices), look)

    def verify_rows(self, rows: range, look: Look | None = None) -> None:
        """Read slices and check their checksums.

        Args:
            rows: successive slices of this shard.
            look: called with the cache's number of each slice and its HU.

        Raises:
            StaleError: the shard is damaged; names the slice.
        """
        block = np.empty((min(len(rows), VERIFY_SLICES), self.size, self.size), HU_DTYPE)
        for start in range(0, len(rows), VERIFY_SLICES):
            some = rows[start : start + VERIFY_SLICES]
            self.read_into(block, range(len(some)), some, verify=True)
            if look is not None:
                for row, hu in zip(some, block, strict=False):
                    look(self.entry.first_slice + row, hu)

    def require_checksums(self, crc32: np.ndarray) -> None:
        """Check that the checksums stored in the file are those that were computed.

        Args:
            crc32: uint32 (slices,).

        Raises:
            StaleError: one differs; names the slice.
        """
        self.check()
        stored = self._open().crc32
        if not np.array_equal(crc32, stored):
            row = int(np.flatnonzero(crc32 != stored)[0])
            raise self._damaged(row, "has another checksum than was written")

    def _open(self) -> "_Opened":
        opened = self._opened
        # A forked child must not share its parent's HDF5 handle.
        if opened is None or opened.process != os.getpid():
            opened = self._opened = self._inspect(close=False)
            assert opened is not None  # only `close` returns nothing
        return opened

    def _inspect(self, close: bool) -> "_Opened | None":
        if self.compression == "blosc2":
            require_blosc2()
        try:
            num_bytes = self.path.stat().st_size
            if num_bytes != self.entry.num_bytes:
                raise self._refused(f"has {num_bytes} bytes, {self.entry.num_bytes} expected")
            with contextlib.ExitStack() as stack:
                # A finished shard never changes, and locks fail on some read-only file systems.
                file = stack.enter_context(h5py.File(self.path, "r", locking=False))
                opened = self._inspect_datasets(file, close)
                if not close and self.compression is not None:
                    stack.pop_all()  # the dataset in `opened` reads through this file
                return opened
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            raise self._refused(f"cannot be read as HDF5 ({error})") from error

    def _inspect_datasets(self, file: h5py.File, close: bool) -> "_Opened | None":
        for name, shape, dtype in layout(self.entry.num_slices, self.size):
            # Links, virtual and external datasets would read other files.
            if not isinstance(file.get(name, getlink=True), h5py.HardLink):
                raise self._refused(f"holds no dataset {name} of its own")
            dataset = file[name]
            if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
                raise self._refused(f"holds no plain dataset {name}")
            if dataset.shape != shape or dataset.dtype != dtype:
                found = f"{dataset.dtype} {dataset.shape}"
                raise self._refused(f"holds {name} as {found}; expected {dtype} {shape}")
        chunks = None if self.compression is None else (1, self.size, self.size)
        offset = self.entry.dataset_offset
        if file[HU].chunks != chunks or file[HU].id.get_offset() != offset:
            raise self._refused(f"holds {HU} in another layout or place than the manifest says")
        crc32 = file[CRC32][:]
        if self.entry.checksums not in (None, digest_of(crc32)):
            raise self._refused("holds other slices than were written: its checksums differ")
        if close:
            return None
        if self.compression is None:
            shape, start = file[HU].shape, file[HU].id.get_offset()
            pixels = np.memmap(self.path, HU_DTYPE, "r", start, shape).view(np.ndarray)
        else:
            pixels = file[HU]
        seen = np.zeros(self.entry.num_slices, bool)
        return _Opened(os.getpid(), pixels, crc32.tolist(), seen)

    def _refused(self, reason: str) -> StaleError:
        return StaleError(f"{self.path}: the shard {reason}.", REBUILD)

    def _damaged(self, row: int, reason: str) -> StaleError:
        number = self.entry.first_slice + row
        return StaleError(
            f"{self.path}: slice {row} of the shard (slice {number} of the cache) {reason}.",
            f"The file is damaged. {REBUILD}",
        )


@dataclass
class _Opened:
    process: int
    pixels: np.ndarray | h5py.Dataset
    crc32: list[int]
    seen: np.ndarray


class CachedSlices:
    """All slices of a cache as one sequence: pixels without tables.

    Pickles in a few bytes per shard, so loaders hand this to their worker processes.

    Args:
        shards: in order, each one's `first_slice` the end of the one before.
        size: rows and columns of a slice.
    """

    def __init__(self, shards: Sequence[Shard], size: int) -> None:
        self.shards = tuple(shards)
        self.size = size
        self._first = np.array([shard.entry.first_slice for shard in self.shards], np.int64)
        self._count = sum(shard.entry.num_slices for shard in self.shards)

    def __len__(self) -> int:
        return self._count

    def slices_hu(
        self, indices: Sequence[int] | np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Read slices.

        Args:
            indices: (n,) numbers of slices, 0 to len - 1, in any order.
            out: int16 (n, size, size), receives them; None takes new memory.

        Returns:
            int16 (n, size, size), HU, a copy; `out` where it was given.

        Raises:
            StaleError: a slice does not match its checksum (checked at its first read).
        """
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"slice numbers go from 0 to {len(self) - 1}; got {indices.tolist()}")
        if out is None:
            out = np.empty((len(indices), self.size, self.size), HU_DTYPE)
        numbers = np.searchsorted(self._first, indices, side="right") - 1
        for number in np.unique(numbers):
            where = np.flatnonzero(numbers == number)
            where = where[np.argsort(indices[where], kind="stable")]  # as the file lies on the disk
            rows = indices[where] - self._first[number]
            self.shards[number].read_into(out, where.tolist(), rows.tolist())
        return out

    def verify(self, progress: Progress | None = None, look: Look | None = None) -> None:
        """Check the checksum of every slice.

        Args:
            progress: called as progress("verifying", slices done, all slices) after each shard.
            look: called with the number of each slice and its HU.

        Raises:
            StaleError: a slice or a shard is damaged.
        """
        if progress is not None:
            progress("verifying", 0, len(self))
        for shard in self.shards:
            shard.verify(look=look)
            if progress is not None:
                done = shard.entry.first_slice + shard.entry.num_slices
                progress("verifying", done, len(self))
