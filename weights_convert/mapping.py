"""Names and axes between torch and Keras: pure functions on names and arrays.

A layer is named by torch's module path with "_" for ".". No torch name used here contains "_", so
the mapping can be reversed exactly. The stages of a DenseNet are called as those of the other
networks, and so have a rule of their own.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from ich_keras.errors import DataError
from ich_keras.models.weights import listed

# Version of the rules below; stored in every weights file.
MAPPING_VERSION = 1
# Keras' variable -> torch's tensor, for convolutions, batch and group normalisation, dense layers.
VARIABLES = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "bias": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
# Parts of a DenseNet: our name -> torch's. No other network has such names, but for the head.
_DENSENET = tuple(
    (re.compile(ours), theirs)
    for ours, theirs in (
        (r"(conv0|norm0)", r"features.\1"),
        (r"layer(\d)_(denselayer\d+)_(\w+)", r"features.denseblock\1.\2.\3"),
        (r"layer\d_(transition\d)_(\w+)", r"features.\1.\2"),
        (r"layer\d_(norm5)", r"features.\1"),
        ("fc", "classifier"),
    )
)
_DENSENET_STEM = "conv0"
# torch's counter of batches; no computation of these networks reads it.
COUNTER = "num_batches_tracked"


def torch_modules(layers: Iterable[str]) -> dict[str, str]:
    """Return torch's module path of each layer of a network.

    Args:
        layers: names of all layers, or of all that have weights.

    >>> torch_modules(["conv1", "layer1_0_bn1", "fc"])
    {'conv1': 'conv1', 'layer1_0_bn1': 'layer1.0.bn1', 'fc': 'fc'}
    >>> list(torch_modules(["conv0", "layer2_denselayer1_conv2", "fc"]).values())
    ['features.conv0', 'features.denseblock2.denselayer1.conv2', 'classifier']
    """
    layers = list(layers)
    is_densenet = _DENSENET_STEM in layers
    return {
        layer: _in_densenet(layer) if is_densenet else layer.replace("_", ".") for layer in layers
    }


def _in_densenet(layer: str) -> str:
    for ours, theirs in _DENSENET:
        found = ours.fullmatch(layer)
        if found:
            return found.expand(theirs)
    return layer  # one without weights


def torch_name(module: str, variable: str) -> str:
    """Return torch's name of a Keras variable.

    Args:
        module: from `torch_modules`.
        variable: its Keras name.

    >>> torch_name("layer1.0.bn1", "gamma")
    'layer1.0.bn1.weight'
    >>> torch_name("conv1", "kernel")
    'conv1.weight'
    """
    return f"{module}.{VARIABLES[variable]}"


def to_keras(array: np.ndarray) -> np.ndarray:
    """Move a kernel's axes from torch's (out, in, ...) to Keras' (..., in, out).

    Vectors are returned as they are.

    >>> to_keras(np.zeros((64, 3, 7, 7))).shape
    (7, 7, 3, 64)
    >>> to_keras(np.zeros(64)).shape
    (64,)
    """
    return np.moveaxis(array, (0, 1), (-1, -2)) if array.ndim > 1 else array


def to_torch(array: np.ndarray) -> np.ndarray:
    """Move a kernel's axes from Keras' (..., in, out) to torch's (out, in, ...).

    Vectors are returned as they are.

    >>> to_torch(np.zeros((7, 7, 3, 64))).shape
    (64, 3, 7, 7)
    """
    return np.moveaxis(array, (-1, -2), (0, 1)) if array.ndim > 1 else array


def split_off(
    tensors: Mapping[str, np.ndarray], dropped: Iterable[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Separate the tensors that are not carried over: batch counters and given prefixes.

    Args:
        tensors: by torch's names.
        dropped: prefixes, such as "fc.".

    Returns:
        (the remaining tensors, the names taken out).

    >>> kept, left_out = split_off({"conv1.weight": np.ones(2), "fc.bias": np.ones(6)}, ("fc.",))
    >>> list(kept), left_out
    (['conv1.weight'], ['fc.bias'])
    """
    prefixes = tuple(dropped)
    out = [n for n in tensors if n.endswith(f".{COUNTER}") or n.startswith(prefixes)]
    return {name: array for name, array in tensors.items() if name not in out}, out


def require_bijection(
    wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, np.ndarray], place: str
) -> None:
    """Refuse tensors that do not match a network's variables one to one.

    Args:
        wanted: torch's name -> torch's shape, one for each variable of the network.
        tensors: by torch's names, torch's axes.
        place: where the tensors come from, for the error.

    Raises:
        DataError: naming missing tensors, surplus tensors and those of another shape.

    >>> require_bijection({"bn1.bias": (2,)}, {"bn1.bias": np.zeros(2)}, "a.pth")
    >>> require_bijection({"bn1.bias": (2,)}, {"bn1.bias": np.zeros(3)}, "a.pth")
    Traceback (most recent call last):
    ...
    ich_keras.errors.DataError: a.pth does not match ...: missing nothing; surplus nothing; ...
    """
    missing = [name for name in wanted if name not in tensors]
    surplus = [name for name in tensors if name not in wanted]
    shapes = [
        f"{name} {tensors[name].shape}, expected {tuple(wanted[name])}"
        for name in wanted
        if name in tensors and tensors[name].shape != tuple(wanted[name])
    ]
    if missing or surplus or shapes:
        raise DataError(
            f"{place} does not match the network tensor by tensor: missing {listed(missing)};"
            f" surplus {listed(surplus)}; of another shape {listed(shapes)}.",
            "Nothing was changed or written. Surplus tensors that are a head: save the state dict"
            " without them. Missing ones: the checkpoint is incomplete or of another network.",
        )
