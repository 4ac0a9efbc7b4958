"""State dicts: of Keras models and of `.weights.h5` files, with torch's names and axes."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ich_keras.errors import DataError
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights import listed, own_variables
from ich_keras.models.weights_file import WeightsFile
from weights_convert.mapping import require_bijection, split_off, to_keras, to_torch, torch_name

# How a layer's variables follow each other in a weights file, by their number.
_TORCH_SUFFIXES = {
    1: ("weight",),
    2: ("weight", "bias"),
    4: ("weight", "bias", "running_mean", "running_var"),
}


def variables_by_name(model) -> dict:
    """Return torch's name -> Keras variable, for every weight of a model."""
    return {
        torch_name(layer.name, variable.name): variable
        for layer in model.layers
        for variable in own_variables(layer)
    }


def shapes_by_name(model) -> dict[str, tuple[int, ...]]:
    """Return torch's name -> torch's shape, for every weight of a model."""
    return {
        name: to_torch(np.empty(variable.shape, np.bool_)).shape
        for name, variable in variables_by_name(model).items()
    }


def load_state(model, state: Mapping[str, np.ndarray], place: str = "the state dict") -> None:
    """Carry a torch state dict into a Keras model: a bijection, or an error.

    Args:
        model: from `resnet` or `classifier`.
        state: torch's names and axes, arrays or tensors; counters of batches are left out.
        place: where it comes from, for the error.

    Raises:
        DataError: naming what is missing, surplus, of another shape or not finite; nothing is
            assigned then.
    """
    tensors, _ = split_off({name: np.asarray(value) for name, value in state.items()}, ())
    variables = variables_by_name(model)
    require_bijection(shapes_by_name(model), tensors, place)
    odd = [name for name, array in tensors.items() if not np.isfinite(array).all()]
    if odd:
        raise DataError(f"{place}: {listed(odd)} hold values that are not finite.")
    for name, variable in variables.items():
        variable.assign(to_keras(tensors[name]))


def state_of(model) -> OrderedDict[str, np.ndarray]:
    """Return a Keras model's weights as a torch state dict, bit by bit.

    Returns:
        torch's name -> array with torch's axes, in the order of the network. torch's counters of
        batches (`num_batches_tracked`) are not among them.
    """
    import keras

    return OrderedDict(
        (name, np.ascontiguousarray(to_torch(keras.ops.convert_to_numpy(variable))))
        for name, variable in variables_by_name(model).items()
    )


def build(spec: ModelSpec, has_head: bool):
    """Build a network for inputs of any size, with logits or without a head."""
    from ich_keras.models.classifier import classifier
    from ich_keras.models.resnet import resnet

    spec = replace(spec.with_any_size(), dropout=0.0)
    return classifier(spec, output="logits") if has_head else resnet(spec)


def state_of_file(file: WeightsFile) -> dict[str, np.ndarray]:
    """Return a weights file as a torch state dict."""
    state = {}
    for layer, arrays in file.layers.items():
        if len(arrays) not in _TORCH_SUFFIXES:
            raise DataError(f"{file.path}: {layer} has {len(arrays)} variables; refused.")
        for suffix, array in zip(_TORCH_SUFFIXES[len(arrays)], arrays, strict=True):
            state[f"{layer.replace('_', '.')}.{suffix}"] = to_torch(array)
    return state


def spec_of_file(file: WeightsFile) -> ModelSpec:
    """Return the network that a weights file says it belongs to.

    Raises:
        DataError: it does not say.
    """
    if file.spec is None:
        raise DataError(
            f"{file.path} does not say which network it belongs to.",
            "Expected a file that weights-convert or a run wrote.",
        )
    return file.spec
