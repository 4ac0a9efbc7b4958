"""CTCache: the HU of a data set at one size, in files that are read as fast as the page cache.

A cache is a folder:

    manifest.json     schema, size, resampling, fingerprint of the inputs, digest of the pixels,
                      tables, shards
    slices.csv        one row per slice, in the order of the pixels, with a hash of its pixels;
                      `series.csv`, `rejects.csv`
    labels.csv        the labels known when it was built, if any
    shard-0000.h5     whole series, in order, int16 HU (slices, size, size) and a CRC-32 per slice

Windows and labels are applied at load: changing them needs no new cache. A folder without manifest
is not a cache: the manifest is written last, and the folder gets its name after that.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from ich_keras import files
from ich_keras.counting import number_of
from ich_keras.ct.rejects import require_few_rejects
from ich_keras.ct.turning import require_turned
from ich_keras.data.cache.build import (
    LABEL_TABLE,
    LABELLING,
    TABLES,
    build_folder,
)
from ich_keras.data.cache.manifest import MAX_SIZE, MIN_SIZE, read_cache_table, read_manifest
from ich_keras.data.cache.plan import Settings
from ich_keras.data.cache.shards import (
    REBUILD,
    SHARD_BYTES,
    CachedSlices,
    Shard,
    ShardEntry,
    require_compression,
)
from ich_keras.data.cache.staleness import differing_data, differing_settings
from ich_keras.data.cache.tables import PIXEL_HASH, UID, CacheTables, with_labels
from ich_keras.data.cache.unfinished import working_folder
from ich_keras.data.labels import LabelTable, attach_labels, join_labels
from ich_keras.data.reading import pixel_hash
from ich_keras.data.views import Samples, View, make_samples
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.labels import Labelling, LabelSet
from ich_keras.progress import Progress

if TYPE_CHECKING:
    from ich_keras.ct.series import SeriesIndex


def build_cache(
    index: "SeriesIndex",
    out: Path | str,
    size: int,
    workers: int = 0,
    progress: Progress | None = None,
    compression: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    labels: LabelTable | None = None,
    restart: bool = False,
    max_rejects: float = 1.0,
    executor: Executor | None = None,
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
        compression: None (fastest), "gzip" or "blosc2" (both 2.6 times smaller on a real head, and
            lossless). "blosc2" is read more than twice as fast as "gzip"; it needs
            `pip install 'ich_keras[compression]'`, and so do its readers.
        shard_bytes: pixels per file at most, in bytes; a larger series gets a file of its own.
        labels: stored with the cache; None takes those of the index, if it has any.
        restart: remove what an interrupted build left, instead of going on from it.
        max_rejects: the largest share of refused files, those of the index included; see
            `require_few_rejects`. Above it finished shards stay in `<out>.partial`. The commands
            and `ich_keras.workflow` take `MAX_REJECTS`.
        executor: does what `workers` would do, such as that of `ich_keras.executors.dask_executor`.
            Its machines must see the DICOM files and `out` under the same paths: they write their
            slices there. The cache has the same bytes.

    Raises:
        UsageError: `out` exists, or an argument cannot be used.
        TooManyRejects: too many files are refused.
        DataError: no slice could be read, or the labels belong to other images.
        EnvironmentProblem: the disk is full, a worker died, or hdf5plugin is not installed.
        StaleError: another process is building this cache; or an interrupted build left finished
            shards of other slices or settings, or damaged ones.
    """
    index, out, settings = ready_to_build(index, out, size, workers, compression, shard_bytes)
    require_few_rejects(index.slices, index.rejects, max_rejects)
    if labels is not None:
        index, _ = join_labels(index, labels)
    # Not OUT.lock, which may be a file of the user's: poetry.lock, for a cache called poetry.
    with files.lock(out.with_name(f"{out.name}.partial.lock"), is_kept=False) as is_alone:
        # Another build may have finished between the first look and the lock.
        files.require_absent(out)
        readers = workers if executor is None else executor
        build_folder(index, out, settings, readers, progress, restart, max_rejects, is_alone)
    return CTCache.open(out)


def ready_to_build(
    index: "SeriesIndex",
    out: Path | str,
    size: int,
    workers: int,
    compression: str | None,
    shard_bytes: int,
) -> tuple["SeriesIndex", Path, Settings]:
    """Check the arguments of `build_cache`.

    Returns:
        The usable part of the index, the absolute path of the folder, and the settings.
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise UsageError(f"size {size} pixels; expected {MIN_SIZE} to {MAX_SIZE}.")
    if workers < 0 or shard_bytes < 1:
        raise UsageError(f"{workers} workers, {shard_bytes} bytes a shard; expected 0 or more, 1.")
    require_compression(compression)
    # A link to an empty folder stays a link.
    out = files.require_absent(out).resolve()
    index = index.usable()
    if len(index.slices) == 0:
        raise DataError(
            f"the index has no axial CT slice ({len(index.rejects)} rejects); nothing to cache.",
            "Look at the index's rejects for the reasons.",
        )
    return index, out, Settings(size, compression, shard_bytes)


def missing_bytes(out: Path | str, num_bytes: int) -> int:
    """Return how many bytes a build still has to write.

    Args:
        out: the cache's folder, which does not exist yet.
        num_bytes: of all its pixels.
    """
    shards = working_folder(Path(out).absolute()).glob("shard-*.h5")
    # One shard is written twice where it loses slices.
    return max(0, num_bytes - sum(shard.stat().st_size for shard in shards)) + min(
        num_bytes, SHARD_BYTES
    )


class CTCache:
    """The cached HU of a data set, with the tables that say what each slice is.

    Row i of `slices` is slice i of the cache; the slices of a series lie together, inferior to
    superior. Open one with `CTCache.open`. Handles are opened at the first read in each process and
    are not pickled.

    Attributes:
        path: the folder.
        manifest: what manifest.json says.
        pixels: the slices without the tables: the part that a loader's workers need.
        slices, series, rejects: the tables of SeriesIndex; `slices` has also `repaired` (bool) and
            `pixel_hash` (`ich_keras.data.reading.pixel_hash`; not in caches of schema 1).
        labelling: which labels slices and series have, and of what; None without labels.
    """

    def __init__(
        self,
        path: Path,
        manifest: dict,
        pixels: CachedSlices,
        tables: CacheTables,
        labelling: Labelling | None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.pixels = pixels
        self.slices = tables.slices
        self.series = tables.series
        self.rejects = tables.rejects
        self.labelling = labelling
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
        manifest = read_manifest(path)
        size, compression = manifest["size"], manifest["compression"]
        entries = [ShardEntry(**entry) for entry in manifest["shards"]]
        shards = [Shard(path / entry.name, entry, size, compression) for entry in entries]
        for shard in shards:
            shard.check()
        tables = CacheTables(**{name: read_cache_table(path, name, manifest) for name in TABLES})
        require_turned(tables.series, path)
        if not len(tables.slices) == tables.series["num_slices"].sum() == _count(entries):
            raise StaleError(
                f"{path}: tables and shards hold different numbers of slices.", REBUILD
            )
        labelling = None
        if labels is not None:
            slices, join = attach_labels(tables.slices, labels)
            labelling = join.labelling
            tables = with_labels(tables, slices, labelling.labels)
        elif LABEL_TABLE in manifest["tables"]:
            labelling = Labelling.from_dict(manifest.get(LABELLING))
            stored = read_cache_table(path, LABEL_TABLE, manifest)
            slices = tables.slices.assign(**stored[list(labelling.labels.names)])
            tables = with_labels(tables, slices, labelling.labels)
        return cls(path, manifest, CachedSlices(shards, size), tables, labelling)

    def __len__(self) -> int:
        return len(self.slices)

    def __repr__(self) -> str:
        return f"CTCache({self}; {self.path})"

    def __str__(self) -> str:
        num_bytes = sum(shard.entry.num_bytes for shard in self.pixels.shards)
        count = len(self.rejects)
        rejects = f", {number_of(count, 'reject')}" if count else ""
        return (
            f"{number_of(len(self), 'slice')} of {self.size}x{self.size}, "
            f"{len(self.series):,} series{rejects}; {num_bytes / 2**20:,.1f} MiB in "
            f"{number_of(len(self.pixels.shards), 'shard')},"
            f" {self.manifest['compression'] or 'uncompressed'}"
            f"{'' if self.pixels_digest else ', of an older version, without pixel hashes'}"
        )

    @property
    def size(self) -> int:
        """Rows and columns of a slice, pixels."""
        return self.pixels.size

    @property
    def labels(self) -> LabelSet:
        """The label columns of slices and series.

        Raises:
            DataError: there are none.
        """
        if self.labelling is None:
            raise DataError("the data have no labels.", "Give --labels stage_2_train.csv.")
        return self.labelling.labels

    def samples(self, view: View) -> Samples:
        """Find the samples of a view; see `make_samples`."""
        return make_samples(self.slices, self.series, view, self.labelling)

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits for all that the pixels depend on, to record with a result."""
        facts = {key: self.manifest[key] for key in ("size", "resampling", "inputs")}
        # The schema is that of the first caches: results that were kept must find theirs again.
        return files.fingerprint({"schema": 1, **facts, "slices": self.slices[UID].tolist()})

    @property
    def pixels_digest(self) -> str | None:
        """64 hexadecimal digits for the cached pixels themselves; None in caches of schema 1.

        `fingerprint` tells which slices they are. The last digits of resized pixels may differ
        between processors, and then this differs, too.
        """
        return self.manifest.get("pixels")

    @property
    def reading(self) -> str | None:
        """The rule by which files became HU (`ich_keras.data.cache.fill.READING`)."""
        return self.manifest["versions"].get("reading")

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
        """Check the checksum of every slice, and its hash in the table.

        Args:
            progress: called as progress("verifying", slices done, all slices).

        Raises:
            StaleError: a slice or a shard is damaged, or is not the one that the table names.
        """
        self.pixels.verify(progress, self._require_hash if PIXEL_HASH in self.slices else None)

    def _require_hash(self, number: int, hu: np.ndarray) -> None:
        if pixel_hash(hu) != self.slices[PIXEL_HASH].iloc[number]:
            raise StaleError(
                f"{self.path}: slice {number} of the cache has other pixels than slices.csv says"
                f" of {self.slices[UID].iloc[number]}.",
                REBUILD,
            )

    def require(
        self,
        size: int | None = None,
        index: "SeriesIndex | None" = None,
        workers: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """Check that the cache is what a run would build now.

        Slices whose files have another time than when they were cached are read again and must
        have the same pixels, and so must 16 of all. Of the slices that could not be read, 16 are
        tried again and must still fail: a decoder may have been installed since.

        Args:
            size: the size wanted; None takes the cache's.
            index: the data wanted; None takes the cache's.
            workers: processes that read again; 0 reads in this one.
            progress: called as progress("comparing", slices done, slices to read again).

        Raises:
            StaleError: names each differing field, the cached value and the wanted one.
        """
        if index is not None:
            index = index.usable()
        differing = differing_settings(self.manifest, size, index)
        if index is not None and not differing:
            differing = differing_data(
                self.path, self.manifest, self.slices, self.pixels, index, workers, progress
            )
        if differing:
            raise StaleError(f"{self.path} is stale: {'; '.join(differing)}.", REBUILD)


def _count(entries: list[ShardEntry]) -> int:
    return sum(entry.num_slices for entry in entries)
