"""What a build of a cache is going to write: its settings, its slices, its shards."""

import itertools
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ich_keras import files
from ich_keras.data.cache.fill import pixel_versions
from ich_keras.data.cache.shards import HU_DTYPE
from ich_keras.data.cache.tables import UID
from ich_keras.data.inputs import RESAMPLING

if TYPE_CHECKING:
    from ich_keras.ct.series import SeriesIndex

# 2: with a hash of every slice's pixels and a digest of every shard's checksums.
SCHEMA = 2


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


def plan_build(index: "SeriesIndex", settings: Settings) -> tuple[list[PlannedShard], dict]:
    """Plan a build.

    Returns:
        (the shards; all that their content depends on, ready for JSON).
    """
    slice_bytes = settings.size * settings.size * HU_DTYPE.itemsize
    uids = index.slices["series_uid"].tolist()
    shards = plan_shards(uids, slice_bytes, settings.shard_bytes)
    return shards, {
        "schema": SCHEMA,
        "size": settings.size,
        "resampling": RESAMPLING,
        "compression": settings.compression,
        "inputs": inputs_fingerprint(index),
        # Of the rows: `inputs` is of a set, and stays where corrected PatientIDs move them.
        "order": files.fingerprint(index.slices[UID].tolist()),
        "versions": pixel_versions(),
        "shards": [asdict(shard) for shard in shards],
    }
