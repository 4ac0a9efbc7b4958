"""Weights files, read without trusting them.

A file is Keras' own `.weights.h5`: `model.load_weights` takes it, too. Keras finds variables by
their position; here they are found by the layer names that the file holds beside them, so that an
error can name what is missing, surplus or of another shape. The attribute `ich_keras` carries a
JSON record: where the weights come from, for which network, with which label order, and the
checksum of every layer. HDF5 itself returns what a damaged disk gives it.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ich_keras.errors import DataError, UsageError
from ich_keras.files import fingerprint
from ich_keras.models.spec import ModelSpec

SUFFIX = ".weights.h5"
RECORD = "ich_keras"
CHECKSUMS = "checksums"  # entry of the record, which readers do not see
MAX_RECORD_BYTES = 2**16  # HDF5's own limit of an attribute
_MAX_NESTING = 8
_SHOWN_CHARACTERS = 60
# What h5py raises on damaged files.
_READ_ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError, MemoryError)
# Not weights: the optimiser of a compiled model, and the state of random generators.
_SKIPPED_GROUPS = ("optimizer", "seed_generator")
# Entries of the record that are used or shown, and what JSON calls their kind.
_KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("labels", "changes"), (list, "a list of texts")),
    **dict.fromkeys(("network", "recipe"), (dict, "an object")),
    **dict.fromkeys(("source", "licence", "intensity"), (str, "a text")),
}


@dataclass(frozen=True)
class WeightsFile:
    """What a `.weights.h5` file holds.

    Args:
        path: the file.
        layers: layer name -> its variables in Keras' order, finite floats.
        record: the JSON record; empty when the file has none (Keras wrote it).
        digest: of the values of all layers; None when the file has no checksums, so that nothing
            tells whether it is damaged (Keras or an older version wrote it).
    """

    path: Path
    layers: dict[str, list[np.ndarray]]
    record: dict[str, Any]
    digest: str | None = None

    @property
    def spec(self) -> ModelSpec | None:
        """The network the weights belong to, where the record says so."""
        network = self.record.get("network")  # sound: `read_weights` has checked it
        return None if network is None else ModelSpec.from_dict(network)


def layer_checksums(layers: dict[str, list[np.ndarray]]) -> dict[str, str]:
    """Return the checksum of each layer's shapes and values, 32 hexadecimal digits.

    Args:
        layers: layer name -> its variables, float32.
    """
    found = {}
    for name, arrays in layers.items():
        content = hashlib.sha256(str([array.shape for array in arrays]).encode())
        for array in arrays:
            content.update(np.ascontiguousarray(array, "<f4").data)
        found[name] = content.hexdigest()[:32]
    return found


def origin(record: dict[str, Any]) -> str:
    """Say in one line where weights come from, as far as their record says so.

    >>> origin({"network": {}, "source": "torchvision_resnet18", "licence": "BSD-3-Clause"})
    'source torchvision_resnet18 (BSD-3-Clause)'
    """
    if "network" not in record:
        return "its network is not recorded: source unknown, strides and dilations not checked"
    licence = record.get("licence", "no licence recorded")
    source = f"source {record.get('source', 'a run')} ({licence})"
    changes = record.get("changes")
    return f"{source}, changed: {', '.join(map(str, changes))}" if changes else source


def require_weights_file(path: str | Path) -> Path:
    """Check early, before anything slow begins, that a path can be a weights file.

    Raises:
        UsageError: no such file, or not a file name of that kind.
    """
    path = Path(path)
    if not str(path).endswith(SUFFIX):
        raise UsageError(
            f"weights {str(path)!r}; expected a file ending in {SUFFIX}.",
            "Give the best.weights.h5 of a run, or convert a checkpoint with weights-convert.",
        )
    if path.is_dir():
        raise UsageError(f"{path} is a folder; expected a weights file.", "Give the file in it.")
    if not path.is_file():
        raise UsageError(f"the weights file {path} does not exist.")
    return path


def read_weights(path: str | Path) -> WeightsFile:
    """Read a `.weights.h5` file that may come from anywhere.

    Links, external and virtual data sets (which would read other files), data sets that declare
    more than they hold, and values that are not finite are refused.

    Raises:
        UsageError: no such file, or not a file name of that kind.
        DataError: the file is damaged, or holds what a weights file must not.
    """
    path = require_weights_file(path)
    layers: dict[str, list[np.ndarray]] = {}
    with _opened(path) as file:
        _walk(path, file, layers, set(), 0)
        record, checksums = _read_record(path, file)
    if not layers:
        raise DataError(f"{path} holds no weights.", "Expected a .weights.h5 file of Keras 3.")
    if checksums is None:
        return WeightsFile(path, layers, record)
    found = layer_checksums(layers)
    damaged = [n for n in found | checksums if found.get(n) != checksums.get(n)]
    if damaged:
        raise DataError(
            f"{path}: {len(damaged)} of {len(checksums)} layers are not as they were saved (their"
            f" checksums differ); the first is {damaged[0]}.",
            "The file is damaged: make or fetch it again.",
        )
    return WeightsFile(path, layers, record, fingerprint(found))


def read_record(path: str | Path) -> dict[str, Any]:
    """Read the record of a weights file alone; empty when it has none.

    Raises:
        UsageError, DataError: as `read_weights`.
    """
    path = require_weights_file(path)
    with _opened(path) as file:
        return _read_record(path, file)[0]


def write_record(path: Path, record: dict[str, Any]) -> str:
    """Add the record, with the checksums of all layers, to a file that Keras has just written.

    Args:
        path: its temporary name, which may end in anything.
        record: ready for JSON.

    Returns:
        The digest of the values; see `WeightsFile`.

    Raises:
        ValueError: the record is too long for HDF5.
        DataError: the file does not hold plain, finite weights.
    """
    layers: dict[str, list[np.ndarray]] = {}
    with h5py.File(path, "r+") as file:
        _walk(path, file, layers, set(), 0)
        found = layer_checksums(layers)
        checksums = {"record": fingerprint(record), "layers": found}
        text = json.dumps({**record, CHECKSUMS: checksums}, allow_nan=False)
        if len(text) >= MAX_RECORD_BYTES:
            raise ValueError(f"the record has {len(text)} bytes; HDF5 takes {MAX_RECORD_BYTES}.")
        file.attrs[RECORD] = text
    return fingerprint(found)


def require_record(path: Path) -> None:
    """Read the record of a file just written, whose temporary name may end in anything.

    Raises:
        DataError: it cannot be read.
    """
    with h5py.File(path, "r") as file:
        _read_record(path, file)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    if not h5py.is_hdf5(path):
        raise DataError(f"{path} is not an HDF5 file.", "It is damaged or was named wrongly.")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except _READ_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path} is damaged: {reason}", "Make or fetch it again.") from error


def _require_first(path: Path, thing: h5py.Group | h5py.Dataset, seen: set[Any]) -> None:
    """Refuse a second name for what was read before.

    Otherwise a few bytes of hard links would stand for any number of groups and arrays.
    """
    if thing.id in seen:
        raise DataError(f"{path}: {thing.name} is a second name of what was read before; refused.")
    seen.add(thing.id)


def _walk(
    path: Path,
    group: h5py.Group,
    layers: dict[str, list[np.ndarray]],
    seen: set[Any],
    nesting: int,
) -> None:
    if nesting > _MAX_NESTING:
        raise DataError(f"{path}: groups nest deeper than {_MAX_NESTING}; refused.")
    for name in group:
        if name in _SKIPPED_GROUPS:
            continue
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise DataError(
                f"{path}: {group.name}/{name} is a {type(link).__name__}; refused, because it"
                " reads from elsewhere."
            )
        child = group[name]
        if isinstance(child, h5py.Dataset):
            raise DataError(f"{path}: the data set {child.name} lies outside a layer's `vars`.")
        _require_first(path, child, seen)
        if name != "vars":
            _walk(path, child, layers, seen, nesting + 1)
        elif len(child):
            layer = _text(child, "name")
            if layer is None or layer in layers:
                raise DataError(
                    f"{path}: {child.name} names no layer of its own ({layer!r}).",
                    "Expected a file that Keras 3.15 or newer wrote.",
                )
            layers[layer] = [_read_array(path, child, str(n), seen) for n in range(len(child))]


def _read_array(path: Path, group: h5py.Group, name: str, seen: set[Any]) -> np.ndarray:
    place = f"{path}: {group.name}/{name}"
    link = group.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise DataError(f"{place} is absent or a link ({type(link).__name__}); refused.")
    dataset = group[name]
    if not isinstance(dataset, h5py.Dataset):
        raise DataError(f"{place} is not a data set.")
    _require_first(path, dataset, seen)
    if dataset.is_virtual or dataset.external:
        raise DataError(f"{place} is a virtual or external data set, which reads other files.")
    if dataset.dtype.kind != "f":
        raise DataError(f"{place} is {dataset.dtype}; expected floats.")
    # Keras stores them plain: less on disk than in memory is a bomb, and so is a packed chunk,
    # which may be larger than its data set.
    if dataset.id.get_create_plist().get_nfilters():
        raise DataError(f"{place} is compressed; refused.")
    declared, stored = dataset.nbytes, dataset.id.get_storage_size()
    if stored < declared:
        raise DataError(f"{place} declares {declared:,} bytes and holds {stored:,}; refused.")
    array = dataset[()]
    if not np.isfinite(array).all():
        raise DataError(f"{place} ({group.attrs.get('name')}) holds values that are not finite.")
    with np.errstate(over="ignore"):
        single = array.astype(np.float32, copy=False)
    if not np.array_equal(single, array):
        raise DataError(f"{place} is {array.dtype} and would be rounded.")
    return single


def _text(thing: h5py.Group, name: str) -> str | None:
    """Return an attribute that is one text; other kinds are not read, HDF5 may crash on them."""
    if name not in thing.attrs:
        return None
    attribute = thing.attrs.get_id(name)
    if attribute.shape != () or not isinstance(attribute.get_type(), h5py.h5t.TypeStringID):
        return None
    text = thing.attrs[name]
    return text if isinstance(text, str) else text.decode("utf-8")


def _read_record(path: Path, file: h5py.File) -> tuple[dict[str, Any], dict[str, str] | None]:
    """Return the record, and the checksum of each layer (None when it has none)."""
    if RECORD not in file.attrs:
        return {}, None
    text = _text(file, RECORD)
    if text is None:
        raise DataError(f"{path}: its record is not text; expected JSON.", "It is damaged.")
    try:
        record = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: its record is not JSON ({error}).", "It is damaged.") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}: its record is {type(record).__name__}; expected an object.")
    _require_sound(path, record)
    if CHECKSUMS not in record:
        return record, None
    checksums = record.pop(CHECKSUMS)
    layers = checksums.get("layers") if isinstance(checksums, dict) else None
    if not isinstance(layers, dict) or checksums.get("record") != fingerprint(record):
        raise DataError(f"{path}: its record does not match its checksum.", "It is damaged.")
    return record, layers


def _require_sound(path: Path, record: dict[str, Any]) -> None:
    """Refuse entries of another kind than those that are used, and what no JSON file can hold."""
    try:
        # NaN and 1e999, which Python reads as numbers, would stop a run that notes its weights.
        json.dumps(record, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: its record is not JSON ({error}).", "It is damaged.") from error
    for name, (kind, words) in _KINDS.items():
        value = record.get(name)
        texts = value if isinstance(value, list) else [value]
        is_sound = isinstance(value, kind) and (kind is dict or _is_plain(texts))
        if name in record and not is_sound:
            shown = json.dumps(value)
            if len(shown) > _SHOWN_CHARACTERS:
                shown = f"{shown[:_SHOWN_CHARACTERS]}..."
            raise DataError(
                f"{path}: {name} of its record is {shown}; expected {words}.", "It is damaged."
            )
    if "network" in record:
        try:
            ModelSpec.from_dict(record["network"])
        except UsageError as error:
            raise DataError(f"{path}: its record is damaged: {error.message}") from error


def _is_plain(texts: list[Any]) -> bool:
    """Tell whether all are texts that a terminal can show: no control characters."""
    return all(isinstance(text, str) and text.isprintable() for text in texts)
