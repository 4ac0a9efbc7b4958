"""Weights files loaded into models by layer name, and written with their history."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ich_keras.errors import DataError
from ich_keras.files import atomic_path
from ich_keras.labels import LABELS, SIX, LabelSet
from ich_keras.models.spec import WITHOUT_WEIGHTS, ModelSpec
from ich_keras.models.weights_file import (
    MAX_RECORD_BYTES,
    SUFFIX,
    WeightsFile,
    origin,
    read_weights,
    require_record,
    write_record,
)
from ich_keras.models.windows import WINDOWS

HEAD = "fc"
LABELS_OF_MODEL = "ich_labels"  # attribute of a model: its LabelSet
BYTES_PER_VALUE = 4  # float32
_BYTES_PER_DATASET = 4096  # its header, groups and name in HDF5
_SHOWN_NAMES = 12
_SHOWN_DIFFERENCES = 4


@dataclass(frozen=True)
class LoadedWeights:
    """What was loaded into a model.

    Args:
        path: the file.
        loaded: layers that were filled from it.
        fresh: layers of the model that kept their random weights.
        ignored: layers of the file that the model does not have.
        record, digest: see `WeightsFile`.
    """

    path: Path
    loaded: tuple[str, ...]
    fresh: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)
    digest: str | None = None

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} layers from {self.path}", origin(self.record)]
        if self.digest is None:
            parts.append("without checksums, so that damage would not be noticed")
        parts.append(f"new: {', '.join(self.fresh) if self.fresh else 'none'}")
        if self.ignored:
            parts.append(f"not used: {', '.join(self.ignored)}")
        return "; ".join(parts)


def own_variables(layer: Any) -> list[Any]:
    """Return a layer's variables in the order in which Keras saves them."""
    store: dict[str, Any] = {}
    layer.save_own_variables(store)
    return [store[str(n)] for n in range(len(store))]


def load_weights(
    model: Any,
    path: str | Path,
    spec: ModelSpec | None = None,
    needs_head: bool = False,
    labels: LabelSet = SIX,
) -> LoadedWeights:
    """Load a `.weights.h5` file into a model of the same network.

    The head may be missing from the file (then it stays random), or from the model (then the
    file's is not used), and learnable windows from the file (then they stay as they are); every
    other layer must be in both. A head for labels of other names is not
    used; one with the same labels in another order is refused.

    Args:
        model: a `keras.Model` from `resnet` or `classifier`.
        path: as written by a run (`best.weights.h5`), by `weights-convert`, or by
            `model.save_weights`.
        spec: of the model; weights made for other strides or dilations are then refused, although
            their shapes fit.
        needs_head: the file must hold the head, too, for the same labels, and the windows.
        labels: of the model's head.

    Returns:
        What was loaded, what stayed new, what was not used.

    Raises:
        UsageError: no such file, or not a file name of that kind.
        DataError: the file is damaged, of another network, has another label order, or holds
            values that are not finite.
    """
    file = read_weights(path)
    _require_same_network(file, spec)
    other_head: tuple[str, ...] = ()
    targets = {layer.name: own_variables(layer) for layer in model.layers}
    targets = {name: variables for name, variables in targets.items() if variables}
    if HEAD in targets and HEAD in file.layers and not needs_head:
        there = _labels_of(file, labels)
        is_theirs = len(there) == file.layers[HEAD][0].shape[-1]
        if is_theirs and set(map(str, there)) != set(labels.names):
            file = replace(file, layers={n: a for n, a in file.layers.items() if n != HEAD})
            other_head = (f"{HEAD} (of other labels)",)
    missing = [name for name in targets if name not in file.layers]
    surplus = [name for name in file.layers if name not in targets]
    _require_same_shapes(file, targets)
    may_lack = set() if needs_head else {HEAD, WINDOWS}
    if set(missing) - may_lack or set(surplus) - {HEAD}:
        raise DataError(
            f"{file.path} does not fit the network {model.name}: missing in the file:"
            f" {listed(missing)}; not in the network: {listed(surplus)}.",
            "Weights and preset must belong together.",
        )
    if HEAD in targets and HEAD in file.layers:
        _require_same_labels(file, labels)
    loaded = [name for name in targets if name in file.layers]
    for name in loaded:
        for variable, array in zip(targets[name], file.layers[name], strict=True):
            variable.assign(array)
    unused = (*surplus, *other_head)
    return LoadedWeights(file.path, tuple(loaded), tuple(missing), unused, file.record, file.digest)


def listed(names: Iterable[str]) -> str:
    """Join names for an error message; long lists are cut and counted.

    >>> listed(["conv1", "bn1"]), listed([])
    ('conv1, bn1', 'nothing')
    >>> listed(f"layer{n}" for n in range(14)).endswith("layer11 and 2 more")
    True
    """
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
    shown = list(differences.items())[:_SHOWN_DIFFERENCES]
    said = "; ".join(f"{k} {there} (file), {here} (network)" for k, (there, here) in shown)
    if len(differences) > len(shown):
        said += f"; and {len(differences) - len(shown)} more settings"
    hints = {
        "channels": f"weights-convert channels --weights {file.path} --channels"
        f" {spec.stem_channels} --out FILE{SUFFIX} changes the input channels on purpose.",
        "windows": "Its windows were trained with it: take the same kind (--windows).",
        "norm": "Group normalisation fits no weights of batch normalisation: take norm 'frozen', or"
        " train it from scratch.",
    }
    usual = "Weights and preset must belong together, even where the shapes fit."
    if set(differences) <= set(WITHOUT_WEIGHTS):
        usual += (
            f" weights-convert restride --weights {file.path} --to PRESET --out FILE{SUFFIX}"
            " makes them weights of another network on purpose."
        )
    raise DataError(
        f"{file.path} was made for another network: {said}.",
        hints.get("".join(differences), usual),
    )


def _require_same_shapes(file: WeightsFile, targets: dict[str, list[Any]]) -> None:
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


def _labels_of(file: WeightsFile, labels: LabelSet) -> list[str]:
    """Return the labels of a file's head.

    A file that Keras wrote names none: a head as wide as the network's is taken for the same, and
    one of six outputs otherwise for RSNA's.
    """
    if "labels" in file.record:
        return list(map(str, file.record["labels"]))
    outputs = file.layers[HEAD][0].shape[-1]
    return list(labels.names if outputs == len(labels) else LABELS[:outputs])


def _require_same_labels(file: WeightsFile, labels: LabelSet) -> None:
    there = _labels_of(file, labels)
    if list(there) != list(labels.names):
        raise DataError(
            f"{file.path}: its head gives {', '.join(map(str, there))}; expected the order"
            f" {labels}.",
            "Its probabilities would be read under wrong names.",
        )


def save_weights(model: Any, path: str | Path, record: dict[str, Any] | None = None) -> str:
    """Write a model's weights atomically (Keras' own saving is not), without its optimiser.

    Args:
        model: a `keras.Model`, compiled or not.
        path: ends in `.weights.h5`.
        record: JSON-able; checksums are added, and where it has none the model's labels.

    Returns:
        The digest of the weights; see `WeightsFile`.

    Raises:
        EnvironmentProblem: the disk is full.
    """
    import keras

    # Keras writes the slots of a compiled model's optimiser into its weights file: three times
    # the size. The twin shares all variables and has no optimiser.
    twin = keras.Model(model.input, model.output)
    # As JSON gives it back: lists for tuples, which the checksum of the record must not tell apart.
    names = list(getattr(model, LABELS_OF_MODEL, SIX).names)
    record = json.loads(json.dumps({"labels": names, **(record or {})}, allow_nan=False))
    with atomic_path(path, verify=require_record, needed=weights_bytes(model)) as temporary:
        twin.save_weights(temporary, overwrite=True)
        return write_record(temporary, record)


def weights_bytes(model: Any) -> int:
    """Return the size of a model's weights file, bytes; it is a little smaller.

    Args:
        model: a `keras.Model`.
    """
    values = sum(math.prod(variable.shape) for variable in model.weights)
    return values * BYTES_PER_VALUE + len(model.weights) * _BYTES_PER_DATASET + MAX_RECORD_BYTES


def require_finite(model: Any, source: str) -> None:
    """Refuse weights that are not finite; Keras loads and saves them silently.

    Args:
        model: a `keras.Model`.
        source: where the weights come from, for the message.

    Raises:
        DataError: naming the first variable at fault.
    """
    import keras

    for variable in model.weights:
        if not np.isfinite(keras.ops.convert_to_numpy(variable)).all():
            raise DataError(f"{source}: {variable.path} holds values that are not finite.")
