"""Names and axes between torch and Keras: pure functions on names and arrays.

A layer is named by torch's module path with "_" for ".". No torch name used here contains "_", so
the mapping can be reversed exactly.
"""

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
# torch's counter of batches; no computation of these networks reads it.
COUNTER = "num_batches_tracked"


def torch_name(layer: str, variable: str) -> str:
    """Return torch's name of a Keras variable.

    >>> torch_name("layer1_0_bn1", "gamma")
    'layer1.0.bn1.weight'
    >>> torch_name("conv1", "kernel")
    'conv1.weight'
    """
    return f"{layer.replace('_', '.')}.{VARIABLES[variable]}"


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
