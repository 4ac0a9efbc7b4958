"""Names and axes between torch and Keras: pure functions on names and arrays.

Layer names of the networks are torch's module paths with "_" for ".", which none of torch's own
names here contains: the way back is exact.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from ich_keras.errors import DataError
from ich_keras.models.weights import listed

# Of the rules below; written into every file.
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
    """Return torch's name of a Keras variable: ("layer1_0_bn1", "gamma") -> layer1.0.bn1.weight."""
    return f"{layer.replace('_', '.')}.{VARIABLES[variable]}"


def to_keras(array: np.ndarray) -> np.ndarray:
    """Move torch's axes (out, in, ...) of a kernel to Keras' (..., in, out); vectors stay."""
    return np.moveaxis(array, (0, 1), (-1, -2)) if array.ndim > 1 else array


def to_torch(array: np.ndarray) -> np.ndarray:
    """Move Keras' axes (..., in, out) of a kernel to torch's (out, in, ...); vectors stay."""
    return np.moveaxis(array, (-1, -2), (0, 1)) if array.ndim > 1 else array


def split_off(
    tensors: Mapping[str, np.ndarray], dropped: Iterable[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Take out what is not carried over: torch's counters, and tensors with given prefixes.

    Args:
        tensors: by torch's names.
        dropped: prefixes, such as "fc.".

    Returns:
        (the rest, the names taken out).
    """
    prefixes = tuple(dropped)
    out = [n for n in tensors if n.endswith(f".{COUNTER}") or n.startswith(prefixes)]
    return {name: array for name, array in tensors.items() if name not in out}, out


def require_bijection(
    wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, np.ndarray], place: str
) -> None:
    """Refuse a set of tensors that is not exactly the wanted one.

    Args:
        wanted: torch's name -> torch's shape, one for each variable of the network.
        tensors: by torch's names, torch's axes.
        place: where the tensors come from, for the error.

    Raises:
        DataError: naming what is missing, what is surplus and what has another shape.
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
            "Nothing was changed or written.",
        )
