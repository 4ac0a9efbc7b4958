"""Weights files: read without trusting them, loaded by layer name, written with their history.

A file is Keras' own `.weights.h5`: `model.load_weights` takes it, too. Keras finds variables by
their place; here they are found by the layer names that the file holds beside them, so that an
error can name what is missing, surplus or of another shape. The attribute `ich_keras` carries a
JSON record: where the weights come from, for which network, with which label order.
"""

import contextlib
import difflib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from ich_keras.errors import DataError, UsageError
from ich_keras.files import atomic_path
from ich_keras.labels import LABELS
from ich_keras.models.presets import PRESETS, ModelSpec, require_preset

SUFFIX = ".weights.h5"
RECORD = "ich_keras"
HEAD = "fc"
FOLDER_VARIABLE = "ICH_KERAS_WEIGHTS"
# What people call the sources of a preset -> how the names of those sources begin.
FAMILIES = {
    "imagenet": "torchvision_resnet",
    "kinetics": "torchvision_",
    "medicalnet": "medicalnet_",
}
_MAX_RECORD_BYTES = 2**16  # HDF5's own limit of an attribute
_MAX_NESTING = 8
_SHOWN_NAMES = 12
# What h5py raises on damaged files.
_READ_ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError, MemoryError)
# Not weights: the optimiser of a compiled model, and the state of random generators.
_SKIPPED_GROUPS = ("optimizer", "seed_generator")


@dataclass(frozen=True)
class WeightsFile:
    """What a `.weights.h5` file holds.

    Args:
        path: the file.
        layers: layer name -> its variables in Keras' order, finite floats.
        record: the JSON record; empty when the file has none (Keras wrote it).
    """

    path: Path
    layers: dict[str, list[np.ndarray]]
    record: dict

    @property
    def spec(self) -> ModelSpec | None:
        """The network the weights belong to, when the record tells."""
        network = self.record.get("network")
        try:
            return None if network is None else ModelSpec.from_dict(network)
        except UsageError as error:
            raise DataError(f"{self.path}: its record is damaged: {error.message}") from error


@dataclass(frozen=True)
class LoadedWeights:
    """An account of what was loaded into a model.

    Args:
        path: the file.
        loaded: layers that were filled from it.
        fresh: layers of the model that kept their random weights.
        ignored: layers of the file that the model does not have.
        record: see `WeightsFile`.
    """

    path: Path
    loaded: tuple[str, ...]
    fresh: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    record: dict = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} layers from {self.path}", origin(self.record)]
        parts.append(f"new: {', '.join(self.fresh) if self.fresh else 'none'}")
        if self.ignored:
            parts.append(f"not used: {', '.join(self.ignored)}")
        return "; ".join(parts)


def origin(record: dict) -> str:
    """Say in one line where weights come from, as far as their record tells."""
    if "network" not in record:
        return "its network is not recorded: source unknown, strides and dilations not checked"
    said = (
        f"source {record.get('source', 'a run')} ({record.get('licence', 'no licence recorded')})"
    )
    changes = record.get("changes")
    return f"{said}, changed: {', '.join(map(str, changes))}" if changes else said


def weights_folder() -> Path:
    """Return where converted weights lie: $ICH_KERAS_WEIGHTS, or the user's cache folder."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "ich_keras" / "weights"


def source_of(name: str, preset_name: str) -> str:
    """Return the source that a family name ("imagenet", "kinetics", "medicalnet") means for a
    preset; any other name is one already.

    Raises:
        UsageError: the preset has no weights of that family.
    """
    require_preset(preset_name)
    if name not in FAMILIES:
        return name
    fitting = [s for s in PRESETS[preset_name].sources if s.startswith(FAMILIES[name])]
    # "torchvision_" begins the image networks' names as well.
    if name == "kinetics":
        fitting = [s for s in fitting if not s.startswith(FAMILIES["imagenet"])]
    if not fitting:
        raise UsageError(
            f"there are no {name} weights for {preset_name};"
            f" known: {', '.join(PRESETS[preset_name].sources) or 'none'}."
        )
    # Of several releases the one that is there.
    return next((source for source in fitting if _place(source).is_file()), fitting[0])


def find_weights(name: str | Path, preset_name: str) -> Path:
    """Find a weights file by path, by source or by family.

    Args:
        name: a path ending in `.weights.h5`; or the name of a source once it was converted
            ("torchvision_resnet18"); or "imagenet", "kinetics", "medicalnet" for the source that
            belongs to the preset.
        preset_name: a key of `PRESETS`.

    Returns:
        The file, not opened yet.

    Raises:
        UsageError: no such file; the hint says what to run.
    """
    if str(name).endswith(SUFFIX) or os.sep in str(name):
        return require_weights_file(name)
    _require_known_name(str(name))
    source, via = source_of(str(name), preset_name), ""
    if source in PRESETS[preset_name].sources:
        via = PRESETS[preset_name].via
    path = _place(source)
    if path.is_file() and not via:
        return path
    to_convert = (
        f"weights-convert convert --source {source} --checkpoint FILE.pth puts it there"
        " (`weights-convert list` says where the checkpoint comes from)"
    )
    if via:
        raise UsageError(
            f"{preset_name} takes {source} with its shape changed on purpose.",
            ("" if path.is_file() else f"{to_convert}, then ")
            + f"weights-convert {via} --weights {path} --preset {preset_name} --out FILE{SUFFIX},"
            f" then --weights FILE{SUFFIX}.",
        )
    raise UsageError(
        f"weights {str(name)!r}: {path} does not exist.",
        f"{to_convert}; with a network, add --download.",
    )


def _place(source: str) -> Path:
    return weights_folder() / f"{source}{SUFFIX}"


def _require_known_name(name: str) -> None:
    known = {*FAMILIES, *(s for chosen in PRESETS.values() for s in chosen.sources)}
    if name in known or (name and _place(name).is_file()):
        return
    if (Path(name) / f"best{SUFFIX}").is_file() and name:
        hint = f"For the weights of that run give {Path(name) / f'best{SUFFIX}'}."
    else:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f"Did you mean {near[0]!r}?" if near else "`weights-convert list` tells the sources."
    raise UsageError(
        f"weights {name!r}; expected a file ending in {SUFFIX}, or the name of a source that was"
        " converted.",
        hint,
    )


def require_weights_file(path: str | Path) -> Path:
    """Return the path when it can be a weights file, before anything long begins.

    Raises:
        UsageError: no such file, or not a file name of that kind.
    """
    path = Path(path)
    if not str(path).endswith(SUFFIX):
        raise UsageError(
            f"weights {str(path)!r}; expected a file ending in {SUFFIX}.",
            "Give the best.weights.h5 of a run, or convert a checkpoint with weights-convert.",
        )
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
        record = _read_record(path, file)
    if not layers:
        raise DataError(f"{path} holds no weights.", "Expected a .weights.h5 file of Keras 3.")
    return WeightsFile(path, layers, record)


def read_record(path: str | Path) -> dict:
    """Read the record of a weights file alone; empty when it has none.

    Raises:
        UsageError, DataError: as `read_weights`.
    """
    path = require_weights_file(path)
    with _opened(path) as file:
        return _read_record(path, file)


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


def _require_first(path: Path, thing: h5py.Group | h5py.Dataset, seen: set) -> None:
    """A few bytes of hard links would stand for any number of groups and arrays."""
    if thing.id in seen:
        raise DataError(f"{path}: {thing.name} is a second name of what was read before; refused.")
    seen.add(thing.id)


def _walk(path: Path, group: h5py.Group, layers: dict, seen: set, nesting: int) -> None:
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


def _read_array(path: Path, group: h5py.Group, name: str, seen: set) -> np.ndarray:
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


def _read_record(path: Path, file: h5py.File) -> dict:
    if RECORD not in file.attrs:
        return {}
    text = _text(file, RECORD)
    if text is None:
        raise DataError(f"{path}: its record is no text; expected JSON.", "It is damaged.")
    try:
        record = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: its record is not JSON ({error}).", "It is damaged.") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}: its record is {type(record).__name__}; expected an object.")
    for name in ("labels", "changes"):
        if not isinstance(record.get(name, []), list):
            raise DataError(f"{path}: {name} of its record is no list.", "It is damaged.")
    return record


def own_variables(layer) -> list:
    """Return a layer's variables in the order in which Keras saves them."""
    store: dict = {}
    layer.save_own_variables(store)
    return [store[str(n)] for n in range(len(store))]


def load_weights(
    model, path: str | Path, spec: ModelSpec | None = None, needs_head: bool = False
) -> LoadedWeights:
    """Load a `.weights.h5` file into a model of the same network.

    The head may be missing from the file (then it stays random), or from the model (then the
    file's is not used); every other layer must be in both.

    Args:
        model: a `keras.Model` from `resnet` or `classifier`.
        path: as written by a run (`best.weights.h5`), by `weights-convert`, or by
            `model.save_weights`.
        spec: of the model; weights made for other strides or dilations are then refused, although
            their shapes fit.
        needs_head: the file must hold the head, too.

    Returns:
        What was loaded, what stayed new, what was not used.

    Raises:
        UsageError: no such file, or not a file name of that kind.
        DataError: the file is damaged, of another network, has another label order, or holds
            values that are not finite.
    """
    file = read_weights(path)
    _require_same_network(file, spec)
    targets = {layer.name: own_variables(layer) for layer in model.layers}
    targets = {name: variables for name, variables in targets.items() if variables}
    missing = [name for name in targets if name not in file.layers]
    surplus = [name for name in file.layers if name not in targets]
    _require_same_shapes(file, targets)
    may_lack = set() if needs_head else {HEAD}
    if set(missing) - may_lack or set(surplus) - {HEAD}:
        raise DataError(
            f"{file.path} does not fit the network {model.name}: missing in the file:"
            f" {listed(missing)}; not in the network: {listed(surplus)}.",
            "Weights and preset must belong together.",
        )
    if HEAD in targets and HEAD in file.layers:
        _require_same_labels(file)
    loaded = [name for name in targets if name in file.layers]
    for name in loaded:
        for variable, array in zip(targets[name], file.layers[name], strict=True):
            variable.assign(array)
    return LoadedWeights(file.path, tuple(loaded), tuple(missing), tuple(surplus), file.record)


def listed(names) -> str:
    """Join names for an error message; long lists are cut and counted."""
    names = list(names)
    if not names:
        return "nothing"
    shown = ", ".join(names[:_SHOWN_NAMES])
    more = len(names) - _SHOWN_NAMES
    return f"{shown} and {more} more" if more > 0 else shown


def _require_same_network(file: WeightsFile, spec: ModelSpec | None) -> None:
    made_for = file.spec
    if spec is None or made_for is None:
        return
    differences = made_for.differences(spec)
    if not differences:
        return
    said = "; ".join(
        f"{k} {there} (file), {here} (network)" for k, (there, here) in differences.items()
    )
    hints = {
        "channels": f"weights-convert channels --weights {file.path} --channels {spec.channels}"
        f" --out FILE{SUFFIX} changes the input channels on purpose.",
        "norm": "Group normalisation fits no weights of batch normalisation: take norm 'frozen', or"
        " train it from scratch.",
    }
    raise DataError(
        f"{file.path} was made for another network: {said}.",
        hints.get(
            "".join(differences),
            "Weights and preset must belong together, even where the shapes fit.",
        ),
    )


def _require_same_shapes(file: WeightsFile, targets: dict) -> None:
    for name, variables in targets.items():
        if name not in file.layers:
            continue
        there = [array.shape for array in file.layers[name]]
        here = [tuple(variable.shape) for variable in variables]
        if there != here:
            raise DataError(
                f"{file.path} does not fit the network: {name} has {there} in the file, {here} in"
                " the network.",
                "Weights and preset must belong together, and so must the input channels.",
            )


def _require_same_labels(file: WeightsFile) -> None:
    labels = file.record.get("labels", list(LABELS))
    if list(labels) != list(LABELS):
        raise DataError(
            f"{file.path}: its head gives {', '.join(map(str, labels))}; expected the order"
            f" {', '.join(LABELS)}.",
            "Its probabilities would be read under wrong names.",
        )


def save_weights(model, path: str | Path, record: dict | None = None) -> None:
    """Write a model's weights atomically (Keras' own saving is not), without its optimiser.

    Args:
        model: a `keras.Model`, compiled or not.
        path: ends in `.weights.h5`.
        record: JSON-able; the label order is added.
    """
    import keras

    # Keras writes the slots of a compiled model's optimiser into its weights file: three times
    # the size. The twin shares all variables and has no optimiser.
    twin = keras.Model(model.input, model.output)
    text = json.dumps({"labels": list(LABELS), **(record or {})}, allow_nan=False)
    if len(text) >= _MAX_RECORD_BYTES:
        raise ValueError(f"the record has {len(text)} bytes; HDF5 takes {_MAX_RECORD_BYTES}.")
    with atomic_path(path, verify=_require_record) as temporary:
        twin.save_weights(temporary, overwrite=True)
        with h5py.File(temporary, "r+") as file:
            file.attrs[RECORD] = text


def _require_record(path: Path) -> None:
    with h5py.File(path, "r") as file:
        _read_record(path, file)


def require_finite(model, source: str) -> None:
    """Refuse weights that are not finite; Keras loads and saves them without a word.

    Raises:
        DataError: naming the first variable at fault.
    """
    import keras

    for variable in model.weights:
        if not np.isfinite(keras.ops.convert_to_numpy(variable)).all():
            raise DataError(f"{source}: {variable.path} holds values that are not finite.")
