"""Slice features: what a 2D network makes of every slice of a cache, computed once.

One HDF5 file holds, for each slice of the cache in its order, the pooled features (float32 or
float16) and the logits (float32), with a CRC-32 for each block of slices. Its record says which
network and which cache they are of. Sequence heads are trained on them
(`ich_keras.models.sequence`), and refuse those of others.

A computation that was interrupted resumes: `<file>.partial` holds the finished blocks.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np

from ich_keras import files
from ich_keras.counting import number_of
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.cache.writer import write_at
from ich_keras.data.inputs import slice_input
from ich_keras.data.intensity import Intensity, intensity_of
from ich_keras.disk import full_disk_told, require_free
from ich_keras.environment import loaded_backend
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.evaluation import require_size
from ich_keras.inference import batches_of, load_run, network_digest
from ich_keras.labels import SIX, LabelSet, label_set
from ich_keras.progress import Progress
from ich_keras.run_folder import RunFolder

SCHEMA = 1
BLOCK = 256  # slices
SUFFIX = ".h5"
_FEATURES, _LOGITS, _CRC, _DONE, _RECORD = "features", "logits", "crc32", "done", "record"
_PAGE = 4096
_AGAIN = "Compute the features again: ich features --run RUN --cache CACHE --out FILE."
# Gives the features (n, features) and the logits (n, labels) of slices, by their numbers.
_Answer = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


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
        record, offsets = _read_record(path)
        features = _read(path, offsets[_FEATURES], record.dtype, (record.count, record.width))
        shape = (record.count, len(record.labels))
        logits = _read(path, offsets[_LOGITS], "float32", shape)
        crc = _read(path, offsets[_CRC], "<u4", (_num_blocks(record.count),))
        wrong = [n for n, rows in _blocks(record.count) if _crc(features, logits, rows) != crc[n]]
        if wrong:
            raise StaleError(
                f"{path} is damaged: {number_of(len(wrong), 'block')} of {len(crc)} have other"
                f" checksums, the first from slice {wrong[0] * BLOCK} on.",
                "Copy the file again, or compute it again.",
            )
        _require_finite(features, logits, str(path))
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


@dataclass(frozen=True, eq=False)
class ForeignNetwork:
    """A torch network of others that makes features of slices, such as a foundation model.

    Args:
        module: takes float32 (n, channels, size, size) and gives (n, features), or more axes, over
            which the mean is taken after the second.
        name: what it is called.
        size: rows and columns of its input.
        intensity: from HU to its input: "windows", "wide", "head-z-score", or an `Intensity`.
        batch_size: slices per pass.
    """

    module: Any
    name: str
    size: int
    intensity: str | Intensity = "windows"
    batch_size: int = 32

    def digest(self) -> str:
        """Return the SHA-256 of its weights and its input, 64 digits."""
        content = hashlib.sha256(repr((self.size, intensity_of(self.intensity))).encode())
        for name, value in self.module.state_dict().items():
            values = np.ascontiguousarray(value.detach().cpu().float().numpy())
            content.update(f"{name}{values.shape}".encode())
            content.update(values.tobytes())
        return content.hexdigest()

    def features(self, hu: np.ndarray) -> np.ndarray:
        """Return the features of slices.

        Args:
            hu: int16 (n, rows, columns), HU.

        Returns:
            float32 (n, features).
        """
        import torch

        inputs = slice_input(hu, self.size, intensity_of(self.intensity))
        parameter = next(iter(self.module.parameters()), None)
        device = "cpu" if parameter is None else parameter.device
        was_training = self.module.training
        self.module.eval()
        with torch.inference_mode():
            found = self.module(torch.from_numpy(inputs).permute(0, 3, 1, 2).to(device))
        self.module.train(was_training)
        if not isinstance(found, torch.Tensor) or found.ndim < 2 or len(found) != len(hu):
            shown = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise UsageError(
                f"{self.name} gave {shown} for {number_of(len(hu), 'slice')}; expected a tensor"
                f" ({len(hu)}, features).",
                "Wrap it in a module that returns its pooled features.",
            )
        pooled = found.flatten(2).mean(2) if found.ndim > 2 else found
        return pooled.float().cpu().numpy()


def extract_features(
    run: RunFolder | Path | str,
    cache: CTCache,
    out: Path | str,
    half: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> SliceFeatures:
    """Compute features and logits of every slice of a cache with the network of a run.

    Args:
        run: a finished run on slices, stacks or slabs; a slab's features are those of its middle
            slice.
        cache: of the run's size; any patients.
        out: the new file.
        half: keep features in float16, half the space.
        device: None takes "auto".
        progress: called as progress("computing features", slices done, all slices).

    Returns:
        The features, read back.

    Raises:
        UsageError: `out` exists, the run is one on whole series, or the cache has another size.
        StaleError: the run is not finished, or `<out>.partial` is of another network or cache.
        DataError: the network gave values that are not finite.
    """
    run = RunFolder.at(run)
    recipe, model = load_run(run, device)
    view = recipe.inputs.view
    if view.kind == "series":
        raise UsageError(
            f"{run} answers whole series; features are of slices.",
            "Give a run on slices or slabs.",
        )
    require_size(recipe, cache)
    samples = cache.samples(view)
    tap = _tapped(model)

    def answer(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = [
            tap.predict_on_batch(_inputs(batch))
            for batch in batches_of(recipe, cache, samples, rows)
        ]
        logits, features = (np.concatenate([np.asarray(p[n]) for p in parts]) for n in (0, 1))
        return features, logits

    record = _record_of(cache, network_digest(model), str(run), recipe.labels, half)
    return _computed(answer, record, Path(out), progress)


def extract_foreign_features(
    network: ForeignNetwork,
    cache: CTCache,
    out: Path | str,
    labels: LabelSet | None = None,
    half: bool = False,
    progress: Progress | None = None,
) -> SliceFeatures:
    """Compute features of every slice of a cache with a torch network of others.

    Args:
        network: an adapter around it.
        cache: any.
        out, half, progress: as for `extract_features`.
        labels: that a head will answer; None takes those of the cache, or RSNA's six. The logits
            are 0: the head learns from the features alone.

    Raises:
        UsageError: `out` exists, or the network gives no features.
        StaleError: `<out>.partial` is of another network or cache.
        DataError: the network gave values that are not finite.
    """
    if labels is None:
        labels = SIX if cache.labelling is None else cache.labels
    labels = label_set(labels)

    def answer(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = [
            network.features(cache.slices_hu(rows[start : start + network.batch_size]))
            for start in range(0, len(rows), network.batch_size)
        ]
        features = np.concatenate(parts)
        return features, np.zeros((len(rows), len(labels)), np.float32)

    record = _record_of(cache, network.digest(), network.name, labels, half, is_foreign=True)
    return _computed(answer, record, Path(out), progress)


def _tapped(model: Any) -> Any:
    """Return a network that gives logits and pooled features in one pass."""
    from ich_keras.models.resnet import functional
    from ich_keras.models.steps import choose_step
    from ich_keras.models.weights import HEAD

    outputs = [model.get_layer(HEAD).output, model.get_layer("avgpool").output]
    return choose_step(functional(model.input, outputs, model.name))


def _inputs(batch: Any) -> Any:
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    # Only with the torch backend does `predict_on_batch` accept the loaders' tensors.
    return inputs if loaded_backend() == "torch" else np.asarray(inputs)


def _record_of(
    cache: CTCache,
    network: str,
    source: str,
    labels: LabelSet,
    half: bool,
    is_foreign: bool = False,
) -> FeatureRecord:
    return FeatureRecord(
        network=network,
        source=source,
        cache=cache.fingerprint,
        pixels=cache.pixels_digest,
        labels=labels,
        count=len(cache),
        width=0,  # known with the first block
        dtype="float16" if half else "float32",
        is_foreign=is_foreign,
    )


def _computed(
    answer: _Answer, record: FeatureRecord, out: Path, progress: Progress | None
) -> SliceFeatures:
    """Compute what lacks, block by block, and give the finished file its name."""
    files.require_absent(out)
    partial = out.with_name(f"{out.name}.partial")
    with files.lock(out.with_name(f"{out.name}.lock"), is_kept=False):
        if not partial.exists():
            first = answer(np.arange(min(BLOCK, record.count)))[0]
            _create(partial, replace(record, width=int(first.shape[1])))
        there, offsets = _read_record(partial)
        # A run folder may have been moved.
        own = replace(record, width=there.width, source=there.source)
        if there != own:
            raise StaleError(
                f"{partial} was begun with another network, cache or option.",
                "Remove it, or give another --out.",
            )
        _fill(partial, there, offsets, answer, progress)
        files.replace(partial, out)
    return SliceFeatures.open(out)


def _fill(
    partial: Path,
    record: FeatureRecord,
    offsets: dict[str, int],
    answer: _Answer,
    progress: Progress | None,
) -> None:
    done = _read(partial, offsets[_DONE], "u1", (_num_blocks(record.count),))
    crc = _read(partial, offsets[_CRC], "<u4", (_num_blocks(record.count),))
    features = _read(partial, offsets[_FEATURES], record.dtype, (record.count, record.width))
    logits = _read(partial, offsets[_LOGITS], "float32", (record.count, len(record.labels)))
    for number, rows in _blocks(record.count):
        if progress is not None:
            progress("computing features", rows.start, record.count)
        # After a crash of the machine a mark may be older than what it stands for.
        if done[number] and _crc(features, logits, rows) == crc[number]:
            continue
        found, own = answer(np.arange(rows.start, rows.stop))
        where = f"slices {rows.start} to {rows.stop - 1}"
        _require_finite(found, own, where)
        with np.errstate(over="ignore"):
            found = found.astype(record.dtype)
        if not np.isfinite(found).all():
            raise DataError(
                f"the features of {where} are too large for float16.", "Leave --half out."
            )
        own = own.astype(np.float32)
        row_bytes = record.width * found.dtype.itemsize
        write_at(partial, offsets[_FEATURES] + rows.start * row_bytes, found)
        write_at(partial, offsets[_LOGITS] + rows.start * own.shape[1] * 4, own)
        value = zlib.crc32(own.tobytes(), zlib.crc32(found.tobytes()))
        write_at(partial, offsets[_CRC] + 4 * number, np.array([value], "<u4"))
        write_at(partial, offsets[_DONE] + number, np.ones(1, np.uint8))
        files.fail_point(f"features {number}")
    if progress is not None:
        progress("computing features", record.count, record.count)


def _create(partial: Path, record: FeatureRecord) -> None:
    """Create the file with room for everything: blocks are then plain writes into their place."""
    blocks = _num_blocks(record.count)
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        _DONE: ((blocks,), "u1"),
        _CRC: ((blocks,), "<u4"),
        _LOGITS: ((record.count, len(record.labels)), "<f4"),
        _FEATURES: ((record.count, record.width), record.dtype),
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


def _read_record(path: Path) -> tuple[FeatureRecord, dict[str, int]]:
    """Return the record and the place of each dataset in the file."""
    if not path.is_file():
        partial = path.with_name(f"{path.name}.partial")
        hint = f"{partial} is unfinished: run the same command again." if partial.exists() else ""
        raise UsageError(f"there is no file {path}.", hint or _AGAIN)
    try:
        with h5py.File(path, "r") as file:
            record = FeatureRecord.from_json(str(file.attrs[_RECORD]), path)
            shapes = {
                _DONE: (_num_blocks(record.count),),
                _CRC: (_num_blocks(record.count),),
                _LOGITS: (record.count, len(record.labels)),
                _FEATURES: (record.count, record.width),
            }
            found = {name: file[name] for name in shapes}
            if any(found[name].shape != shape for name, shape in shapes.items()):
                raise StaleError(f"{path} holds datasets of other shapes than its record.", _AGAIN)
            offsets = {name: dataset.id.get_offset() for name, dataset in found.items()}
    except (OSError, KeyError) as error:
        raise StaleError(f"{path} is no file of slice features ({error}).", _AGAIN) from error
    return record, offsets


def _read(path: Path, offset: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    found = np.fromfile(path, np.dtype(dtype), count, offset=offset)
    if len(found) != count:
        raise StaleError(f"{path} was cut short.", "Copy the file again, or compute it again.")
    return found.reshape(shape)


def _num_blocks(count: int) -> int:
    return -(-count // BLOCK)


def _blocks(count: int) -> Iterator[tuple[int, range]]:
    for number in range(_num_blocks(count)):
        yield number, range(number * BLOCK, min(count, (number + 1) * BLOCK))


def _crc(features: np.ndarray, logits: np.ndarray, rows: range) -> int:
    part = slice(rows.start, rows.stop)
    return zlib.crc32(logits[part].tobytes(), zlib.crc32(features[part].tobytes()))


def _require_finite(features: np.ndarray, logits: np.ndarray, where: str) -> None:
    count = int(
        (~np.isfinite(features)).any(axis=1).sum() + (~np.isfinite(logits)).any(axis=1).sum()
    )
    if count:
        raise DataError(
            f"{where}: {number_of(count, 'row')} of features or logits are not finite.",
            "The weights or the slices are damaged.",
        )
