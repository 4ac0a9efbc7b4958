"""The file of slice features: what a 2D network made of every slice of a cache.

One HDF5 file holds, for each slice of the cache in its order, the pooled features (float32 or
float16) and the logits (float32), with a CRC-32 for each block of slices. Its record says which
network and which cache they are of. Sequence heads are trained on them
(`ich_keras.models.sequence`), and refuse those of others.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import h5py
import numpy as np

from ich_keras import files
from ich_keras.counting import number_of
from ich_keras.data.cache.cache import CTCache
from ich_keras.disk import full_disk_told, require_free
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.labels import LabelSet

SCHEMA = 1
BLOCK = 256  # slices
FEATURES, LOGITS, CRC, DONE = "features", "logits", "crc32", "done"
_RECORD = "record"
_PAGE = 4096
_AGAIN = "Compute the features again: ich features --run RUN --cache CACHE --out FILE."


@dataclass(frozen=True)
class FeatureRecord:
    """What features are of.

    Args:
        network: digest of the weights that made them, 64 digits.
        source: the run folder, or the name of a foreign network.
        cache: fingerprint of the cache.
        pixels: digest of its pixels; None in caches of an old version.
        labels: of the logits.
        count: slices.
        width: features of a slice.
        dtype: of the features, "float32" or "float16".
        is_foreign: whether a network of others made them, without logits (which are 0).
    """

    network: str
    source: str
    cache: str
    pixels: str | None
    labels: LabelSet
    count: int
    width: int
    dtype: str
    is_foreign: bool = False

    def to_json(self) -> str:
        """Return it as text."""
        labels = {
            "names": list(self.labels.names),
            "any_label": self.labels.any_label,
            "exclusive": self.labels.exclusive,
        }
        return json.dumps({"schema": SCHEMA, "block": BLOCK, **vars(self), "labels": labels})

    @classmethod
    def from_json(cls, text: str, path: Path) -> Self:
        """Read it.

        Raises:
            StaleError: another version wrote it, or it is damaged.
        """
        try:
            content = json.loads(text)
            schema, block = content.pop("schema"), content.pop("block")
            labels = content.pop("labels")
            labels = LabelSet(tuple(labels["names"]), labels["any_label"], labels["exclusive"])
            found = cls(labels=labels, **content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StaleError(f"{path} has no record of slice features ({error}).", _AGAIN) from (
                error
            )
        if (schema, block) != (SCHEMA, BLOCK):
            raise StaleError(
                f"{path} has version {schema} of slice features; this one reads {SCHEMA}.", _AGAIN
            )
        return found


@dataclass(frozen=True, eq=False)
class SliceFeatures:
    """The features of a cache's slices, in memory.

    Args:
        path: the file.
        record: what they are of.
        features: (slices, features), float32 or float16.
        logits: float32 (slices, labels).
    """

    path: Path
    record: FeatureRecord
    features: np.ndarray
    logits: np.ndarray

    def __len__(self) -> int:
        return self.record.count

    def __str__(self) -> str:
        record = self.record
        return (
            f"{number_of(record.count, 'slice')} with {record.width} features each"
            f" ({record.dtype}), of {record.source}"
        )

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Read a file and compare it with its checksums.

        Raises:
            UsageError: there is none.
            StaleError: it is unfinished, damaged, or of another version.
            DataError: it holds values that are not finite.
        """
        path = Path(path)
        record, offsets = read_record(path)
        features = read_at(path, offsets[FEATURES], record.dtype, (record.count, record.width))
        shape = (record.count, len(record.labels))
        logits = read_at(path, offsets[LOGITS], "float32", shape)
        crc = read_at(path, offsets[CRC], "<u4", (num_blocks(record.count),))
        wrong = [n for n, rows in blocks(record.count) if crc_of(features, logits, rows) != crc[n]]
        if wrong:
            raise StaleError(
                f"{path} is damaged: {number_of(len(wrong), 'block')} of {len(crc)} have other"
                f" checksums, the first from slice {wrong[0] * BLOCK} on.",
                "Copy the file again, or compute it again.",
            )
        require_finite_rows(features, logits, str(path))
        return cls(path, record, features, logits)

    def require_cache(self, cache: CTCache) -> None:
        """Refuse a cache that the features are not of.

        Raises:
            StaleError: it holds other slices, or other pixels of them.
        """
        record = self.record
        if record.cache != cache.fingerprint:
            raise StaleError(
                f"{self.path} holds features of another cache than {cache.path}: fingerprint"
                f" {record.cache[:12]}, here {cache.fingerprint[:12]}.",
                _AGAIN,
            )
        if record.pixels not in (None, cache.pixels_digest):
            raise StaleError(
                f"{self.path} holds features of other pixels than those of {cache.path}.", _AGAIN
            )


def create(partial: Path, record: FeatureRecord) -> None:
    """Create the file with room for everything: blocks are then plain writes into their place.

    Raises:
        EnvironmentProblem: the disk is full.
    """
    blocks = num_blocks(record.count)
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        DONE: ((blocks,), "u1"),
        CRC: ((blocks,), "<u4"),
        LOGITS: ((record.count, len(record.labels)), "<f4"),
        FEATURES: ((record.count, record.width), record.dtype),
    }
    needed = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
    partial.parent.mkdir(parents=True, exist_ok=True)
    require_free(partial.parent, needed)
    with (
        files.atomic_path(partial) as temporary,
        full_disk_told(temporary, needed),
        h5py.File(temporary, "w", alignment_threshold=1, alignment_interval=_PAGE) as file,
    ):
        file.attrs[_RECORD] = record.to_json()
        for name, (shape, dtype) in shapes.items():
            file.create_dataset(name, shape, dtype, track_times=False)[...] = 0


def read_record(path: Path) -> tuple[FeatureRecord, dict[str, int]]:
    """Return the record and the place of each dataset in the file.

    Raises:
        UsageError: there is no file.
        StaleError: it is another file, of another version, or damaged.
    """
    if not path.is_file():
        partial = path.with_name(f"{path.name}.partial")
        hint = f"{partial} is unfinished: run the same command again." if partial.exists() else ""
        raise UsageError(f"there is no file {path}.", hint or _AGAIN)
    try:
        with h5py.File(path, "r") as file:
            record = FeatureRecord.from_json(str(file.attrs[_RECORD]), path)
            shapes = {
                DONE: (num_blocks(record.count),),
                CRC: (num_blocks(record.count),),
                LOGITS: (record.count, len(record.labels)),
                FEATURES: (record.count, record.width),
            }
            found = {name: file[name] for name in shapes}
            if any(found[name].shape != shape for name, shape in shapes.items()):
                raise StaleError(f"{path} holds datasets of other shapes than its record.", _AGAIN)
            offsets = {name: dataset.id.get_offset() for name, dataset in found.items()}
    except (OSError, KeyError) as error:
        raise StaleError(f"{path} is no file of slice features ({error}).", _AGAIN) from error
    return record, offsets


def read_at(path: Path, offset: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Read a dataset by its place in the file.

    Raises:
        StaleError: the file ends before.
    """
    count = int(np.prod(shape))
    found = np.fromfile(path, np.dtype(dtype), count, offset=offset)
    if len(found) != count:
        raise StaleError(f"{path} was cut short.", "Copy the file again, or compute it again.")
    return found.reshape(shape)


def num_blocks(count: int) -> int:
    """Return how many blocks so many slices make."""
    return -(-count // BLOCK)


def blocks(count: int) -> Iterator[tuple[int, range]]:
    """Yield each block's number and its slices."""
    for number in range(num_blocks(count)):
        yield number, range(number * BLOCK, min(count, (number + 1) * BLOCK))


def crc_of(features: np.ndarray, logits: np.ndarray, rows: range) -> int:
    """Return the CRC-32 of a block: of its features, then of its logits."""
    part = slice(rows.start, rows.stop)
    return zlib.crc32(logits[part].tobytes(), zlib.crc32(features[part].tobytes()))


def require_finite_rows(features: np.ndarray, logits: np.ndarray, where: str) -> None:
    """Refuse values that are not finite.

    Args:
        features, logits: (n, features) and (n, labels).
        where: for the message.

    Raises:
        DataError: says how many rows hold some.
    """
    is_bad = ~(np.isfinite(features).all(axis=1) & np.isfinite(logits).all(axis=1))
    if is_bad.any():
        raise DataError(
            f"{where}: {number_of(int(is_bad.sum()), 'row')} of features or logits are not finite.",
            "The weights or the slices are damaged.",
        )
