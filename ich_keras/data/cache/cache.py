"""CTCache: the HU of a data set at one size, in files that are read as fast as the page cache.

A cache is a folder:

    manifest.json     schema, size, resampling, fingerprint of the inputs, tables, shards
    slices.csv        one row per slice, in the order of the pixels; `series.csv`, `rejects.csv`
    labels.csv        the labels known when it was built, if any
    shard-0000.h5     whole series, in order, int16 HU (slices, size, size) and a CRC-32 per slice

Windows and labels are applied at load: changing them needs no new cache. A folder without manifest
is not a cache: the manifest is written last, and the folder gets its name after that.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import pandas as pd

from ich_keras import files
from ich_keras.ct.rejects import RejectedFile
from ich_keras.ct.tables import read_table
from ich_keras.data.cache.build import (
    LABEL_TABLE,
    MANIFEST,
    SCHEMA,
    TABLES,
    Settings,
    build_folder,
    inputs_fingerprint,
)
from ich_keras.data.cache.fill import pixel_versions
from ich_keras.data.cache.shards import (
    REBUILD,
    SHARD_BYTES,
    CachedSlices,
    Shard,
    ShardEntry,
    require_compression,
)
from ich_keras.data.cache.tables import UID, CacheTables, with_labels
from ich_keras.data.inputs import RESAMPLING
from ich_keras.data.labels import LabelTable, attach_labels, join_labels
from ich_keras.data.reading import IndexedSlice, indexed_slices, read_indexed
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.labels import LABELS
from ich_keras.progress import Progress

if TYPE_CHECKING:
    from ich_keras.ct.series import SeriesIndex

MIN_SIZE = 8
MAX_SIZE = 4096
REREAD_SLICES = 16


def build_cache(
    index: "SeriesIndex",
    out: Path | str,
    size: int,
    workers: int = 0,
    progress: Progress | None = None,
    compression: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    labels: LabelTable | None = None,
) -> "CTCache":
    """Read every slice of an index, resize it and write the cache.

    Localizers and series that are not axial are left out (`SeriesIndex.usable`). A slice that
    cannot be read becomes a row of the cache's rejects, and the other slices of its series are
    renumbered. Calling this again resumes an interrupted build, shard by shard.

    Args:
        index: what to read, with or without labels.
        out: the new cache's folder; it must not exist. The build works in `<out>.partial`.
        size: rows and columns of the cached slices, pixels.
        workers: processes that read; 0 reads in this one.
        progress: called as progress("caching", slices done, slices to do).
        compression: None (fastest), "gzip" or "blosc2" (2 to 4 times smaller, lossless);
            "blosc2" needs `pip install 'ich_keras[compression]'`, and so do its readers.
        shard_bytes: pixels per file at most, in bytes; a larger series gets a file of its own.
        labels: stored with the cache; None takes those of the index, if it has any.

    Raises:
        UsageError: `out` exists, or an argument cannot be used.
        DataError: no slice could be read, or the labels belong to other images.
        EnvironmentProblem: the disk is full, a worker died, or hdf5plugin is not installed.
        StaleError: another process is building this cache.
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise UsageError(f"size {size} pixels; expected {MIN_SIZE} to {MAX_SIZE}.")
    if workers < 0 or shard_bytes < 1:
        raise UsageError(f"{workers} workers, {shard_bytes} bytes a shard; expected 0 or more, 1.")
    require_compression(compression)
    out = files.require_absent(Path(out).absolute())
    index = index.usable()
    if len(index.slices) == 0:
        raise DataError(
            f"the index has no axial CT slice ({len(index.rejects)} rejects); nothing to cache.",
            "Look at the index's rejects for the reasons.",
        )
    if labels is not None:
        index, _ = join_labels(index, labels)
    lock = out.with_name(f"{out.name}.lock")
    with files.lock(lock):
        # Another build may have finished between the first look and the lock.
        files.require_absent(out)
        build_folder(index, out, Settings(size, compression, shard_bytes), workers, progress)
        with contextlib.suppress(PermissionError):  # Windows keeps a file that is open
            lock.unlink()
    return CTCache.open(out)


class CTCache:
    """The cached HU of a data set, with the tables that say what each slice is.

    Row i of `slices` is slice i of the cache; the slices of a series lie together, inferior to
    superior. Open one with `CTCache.open`. Handles are opened at the first read in each process and
    are not pickled.

    Attributes:
        path: the folder.
        manifest: what manifest.json says.
        pixels: the slices without the tables: the part that a loader's workers need.
        slices, series, rejects: the tables of SeriesIndex; `slices` has also `repaired` (bool).
    """

    def __init__(
        self, path: Path, manifest: dict, pixels: CachedSlices, tables: CacheTables
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.pixels = pixels
        self.slices = tables.slices
        self.series = tables.series
        self.rejects = tables.rejects
        stops = self.series["num_slices"].cumsum().tolist()
        starts = [0, *stops[:-1]]
        self._rows = {
            uid: range(*bounds)
            for uid, *bounds in zip(self.series["series_uid"], starts, stops, strict=True)
        }

    @classmethod
    def open(cls, path: Path | str, labels: LabelTable | None = None) -> Self:
        """Open a cache; no pixel is read yet.

        Args:
            path: its folder.
            labels: used instead of those stored with the cache; images without one get -1.

        Raises:
            EnvironmentProblem: it is compressed with blosc2, and hdf5plugin is not installed.
            StaleError: not a finished cache, of another schema, or damaged.
            DataError: the labels match no image.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        size, compression = manifest["size"], manifest["compression"]
        entries = [ShardEntry(**entry) for entry in manifest["shards"]]
        shards = [Shard(path / entry.name, entry, size, compression) for entry in entries]
        for shard in shards:
            shard.check()
        tables = CacheTables(**{name: _read_table(path, name, manifest) for name in TABLES})
        if not len(tables.slices) == tables.series["num_slices"].sum() == _count(entries):
            raise StaleError(
                f"{path}: tables and shards hold different numbers of slices.", REBUILD
            )
        if labels is not None:
            tables = with_labels(tables, attach_labels(tables.slices, labels)[0])
        elif LABEL_TABLE in manifest["tables"]:
            stored = _read_table(path, LABEL_TABLE, manifest)
            tables = with_labels(tables, tables.slices.assign(**stored[list(LABELS)]))
        return cls(path, manifest, CachedSlices(shards, size), tables)

    def __len__(self) -> int:
        return len(self.slices)

    def __repr__(self) -> str:
        num_bytes = sum(shard.entry.num_bytes for shard in self.pixels.shards)
        rejects = f", {len(self.rejects):,} rejects" if len(self.rejects) else ""
        return (
            f"CTCache({len(self):,} slices of {self.size}x{self.size}, "
            f"{len(self.series):,} series{rejects}; {num_bytes / 2**20:,.1f} MiB in "
            f"{len(self.pixels.shards)} shards, {self.manifest['compression'] or 'uncompressed'}; "
            f"{self.path})"
        )

    @property
    def size(self) -> int:
        """Rows and columns of a slice, pixels."""
        return self.pixels.size

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits for all that the pixels depend on, to record with a result."""
        keys = ("schema", "size", "resampling", "inputs")
        facts = {key: self.manifest[key] for key in keys}
        return files.fingerprint({**facts, "slices": self.slices[UID].tolist()})

    @property
    def series_uids(self) -> list[str]:
        """The series, in the order of the table."""
        return list(self._rows)

    def series_rows(self, series_uid: str) -> range:
        """Return the numbers of a series' slices, inferior to superior.

        Raises:
            UsageError: the cache holds no such series.
        """
        try:
            return self._rows[series_uid]
        except KeyError:
            raise UsageError(
                f"{self.path} holds no series {series_uid!r}.", "See `series_uids`."
            ) from None

    def series_hu(self, series_uid: str) -> np.ndarray:
        """Return a series as int16 (slices, size, size), HU, inferior to superior."""
        return self.slices_hu(np.array(self.series_rows(series_uid)))

    def slice_hu(self, number: int) -> np.ndarray:
        """Return one slice as int16 (size, size), HU."""
        return self.slices_hu([number])[0]

    def slices_hu(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return slices by number, in any order, as int16 (n, size, size), HU, a copy.

        Raises:
            StaleError: a slice does not match its checksum (checked at its first read in each
                process); names the shard and the slice.
        """
        return self.pixels.slices_hu(indices)

    def verify(self, progress: Progress | None = None) -> None:
        """Check the checksum of every slice.

        Args:
            progress: called as progress("verifying", slices done, all slices).

        Raises:
            StaleError: a slice or a shard is damaged.
        """
        self.pixels.verify(progress)

    def require(self, size: int | None = None, index: "SeriesIndex | None" = None) -> None:
        """Check that the cache is what a run would build now.

        If the libraries that make pixels had other versions then, 16 slices are read again and
        must be equal. Of the slices that could not be read, 16 are tried again and must still
        fail: a decoder may have been installed since.

        Args:
            size: the size wanted; None takes the cache's.
            index: the data wanted; None takes the cache's.

        Raises:
            StaleError: names each differing field, the cached value and the wanted one.
        """
        wanted = {"resampling": RESAMPLING, "size": self.size if size is None else size}
        if index is not None:
            index = index.usable()
            wanted["inputs"] = inputs_fingerprint(index)
        differing = [
            f"{field} is {self.manifest[field]} in the cache, {value} wanted"
            for field, value in wanted.items()
            if self.manifest[field] != value
        ]
        if index is not None and not differing:
            differing = (
                self._differing_patients(index)
                or self._differences_of_versions(index)
                or self._readable_now(index)
            )
        if differing:
            raise StaleError(f"{self.path} is stale: {'; '.join(differing)}.", REBUILD)

    def _differing_patients(self, index: "SeriesIndex") -> list[str]:
        """Compare the patient of each slice: splits follow the cache's patients."""
        wanted = index.slices.set_index(UID)["patient_id"].reindex(self.slices[UID])
        count = int((wanted.to_numpy() != self.slices["patient_id"].to_numpy()).sum())
        return [f"{count} slices have another PatientID in the cache"] if count else []

    def _differences_of_versions(self, index: "SeriesIndex") -> list[str]:
        """Read some slices again if the libraries changed; return what changed if they differ."""
        cached, now = self.manifest["versions"], pixel_versions()
        changed = [
            f"{name} is {cached.get(name)} in the cache, {version} now"
            for name, version in now.items()
            if cached.get(name) != version
        ]
        if not changed:
            return []
        rows = _some(len(self))
        sources = {source.sop_instance_uid: source for source in indexed_slices(index)}
        chosen = [sources[uid] for uid in self.slices[UID].iloc[rows]]
        equal = [self._equals_again(row, source) for row, source in zip(rows, chosen, strict=True)]
        if all(equal):
            return []
        return [*changed, f"{equal.count(False)} of {len(rows)} slices read again differ"]

    def _readable_now(self, index: "SeriesIndex") -> list[str]:
        """Try again some slices that the cache lists as rejects."""
        known = set(self.slices[UID])
        lost = [one for one in indexed_slices(index) if one.sop_instance_uid not in known]
        found = [self._read_again(lost[number]) for number in _some(len(lost))]
        count = sum(hu is not None for hu in found)
        if not count:
            return []
        return [
            f"{count} of {len(found)} slices tried again, of {len(lost)} that could not be read,"
            " can be read now"
        ]

    def _equals_again(self, number: int, source: IndexedSlice) -> bool:
        hu = self._read_again(source)
        return hu is not None and np.array_equal(hu, self.slice_hu(number))

    def _read_again(self, source: IndexedSlice) -> np.ndarray | None:
        try:
            return read_indexed(source, self.size).hu
        except RejectedFile:
            return None


def _some(count: int) -> np.ndarray:
    """Choose up to REREAD_SLICES numbers below `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, REREAD_SLICES)).astype(int))


def _count(entries: list[ShardEntry]) -> int:
    return sum(entry.num_slices for entry in entries)


def _read_table(path: Path, name: str, manifest: dict) -> pd.DataFrame:
    try:
        return read_table(path / f"{name}.csv", manifest["tables"][name])
    except StaleError as error:
        raise StaleError(error.message, REBUILD) from error


def _read_manifest(path: Path) -> dict:
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise StaleError(
            f"{path} is not a finished cache: it has no {MANIFEST}.",
            "Is it the right folder? If so, build the cache.",
        )
    manifest = files.read_json(manifest_path)
    found = manifest.get("schema") if isinstance(manifest, dict) else None
    if found != SCHEMA:
        raise StaleError(
            f"{manifest_path}: schema is {found} in the cache, {SCHEMA} wanted.", REBUILD
        )
    checksum = manifest.pop("checksum", None)
    if checksum != files.fingerprint(manifest):
        raise StaleError(f"{manifest_path} does not match its checksum.", REBUILD)
    if not MIN_SIZE <= manifest["size"] <= MAX_SIZE:
        raise StaleError(
            f"{manifest_path}: size {manifest['size']}; expected {MIN_SIZE} to {MAX_SIZE}.", REBUILD
        )
    return manifest
