"""State dicts, with torch's names and axes, of Keras models and of `.weights.h5` files."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ich_keras.errors import DataError
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights import HEAD, listed, own_variables
from ich_keras.models.weights_file import WeightsFile
from weights_convert.mapping import (
    require_bijection,
    split_off,
    to_keras,
    to_torch,
    torch_modules,
    torch_name,
)

if TYPE_CHECKING:
    import keras
    import torch

# Number of a layer's variables -> their order in a weights file.
_TORCH_SUFFIXES = {
    1: ("weight",),
    2: ("weight", "bias"),
    4: ("weight", "bias", "running_mean", "running_var"),
}


def variables_by_name(model: "keras.Model") -> dict[str, Any]:
    """Return torch's name -> Keras variable, for every weight of a model."""
    modules = torch_modules(layer.name for layer in model.layers)
    return {
        torch_name(modules[layer.name], variable.name): variable
        for layer in model.layers
        for variable in own_variables(layer)
    }


def shapes_by_name(model: "keras.Model") -> dict[str, tuple[int, ...]]:
    """Return torch's name -> torch's shape, for every weight of a model."""
    return {
        name: to_torch(np.empty(variable.shape, np.bool_)).shape
        for name, variable in variables_by_name(model).items()
    }


def load_state(
    model: "keras.Model",
    state: Mapping[str, "np.ndarray | torch.Tensor"],
    place: str = "the state dict",
) -> None:
    """Load a torch state dict into a Keras model, or refuse it if it does not match one to one.

    Args:
        model: from `backbone` or `classifier`.
        state: arrays or tensors with torch's names and axes; batch counters are ignored.
        place: the origin of the state dict, for the error.

    Raises:
        DataError: a tensor is missing, surplus, of another shape or not finite. Then the model is
            unchanged.
    """
    tensors, _ = split_off({name: np.asarray(value) for name, value in state.items()}, ())
    variables = variables_by_name(model)
    require_bijection(shapes_by_name(model), tensors, place)
    odd = [name for name, array in tensors.items() if not np.isfinite(array).all()]
    if odd:
        raise DataError(f"{place}: {listed(odd)} hold values that are not finite.")
    for name, variable in variables.items():
        variable.assign(to_keras(tensors[name]))


def state_of(model: "keras.Model") -> OrderedDict[str, np.ndarray]:
    """Return a Keras model's weights as a torch state dict, bit for bit.

    Returns:
        torch's name -> array with torch's axes, in the order of the network, without torch's batch
        counters (`num_batches_tracked`).
    """
    import keras

    return OrderedDict(
        (name, np.ascontiguousarray(to_torch(keras.ops.convert_to_numpy(variable))))
        for name, variable in variables_by_name(model).items()
    )


def build(spec: ModelSpec, outputs: int | None) -> "keras.Model":
    """Build a network for inputs of any size, with so many logits, or without a head (None)."""
    from ich_keras.labels import label_set
    from ich_keras.models.backbone import backbone
    from ich_keras.models.classifier import classifier

    spec = replace(spec.with_any_size(), dropout=0.0)
    if outputs is None:
        return backbone(spec)
    return classifier(spec, output="logits", labels=label_set(outputs))


def outputs_of(file: WeightsFile) -> int | None:
    """Return the number of outputs of a file's head; None without one."""
    return int(file.layers[HEAD][0].shape[-1]) if HEAD in file.layers else None


def state_of_file(file: WeightsFile) -> dict[str, np.ndarray]:
    """Return a weights file as a torch state dict."""
    state: dict[str, np.ndarray] = {}
    modules = torch_modules(file.layers)
    for layer, arrays in file.layers.items():
        if len(arrays) not in _TORCH_SUFFIXES:
            raise DataError(f"{file.path}: {layer} has {len(arrays)} variables; refused.")
        for suffix, array in zip(_TORCH_SUFFIXES[len(arrays)], arrays, strict=True):
            state[f"{modules[layer]}.{suffix}"] = to_torch(array)
    return state


def spec_of_file(file: WeightsFile) -> ModelSpec:
    """Return the network that a weights file records.

    Raises:
        DataError: the file records none, or one with learnable windows.
    """
    if file.spec is None:
        raise DataError(
            f"{file.path} does not record which network it belongs to.",
            "Expected a file written by weights-convert or by a training run.",
        )
    if file.spec.windows is not None:
        raise DataError(
            f"{file.path} has learnable windows ({file.spec.windows.kind}): nothing converts"
            " those.",
            "Give weights of a network that takes windowed images.",
        )
    return file.spec
