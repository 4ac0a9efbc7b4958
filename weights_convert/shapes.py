"""Explicit changes of the shape of weights: input channels, 2D -> 3D, 3D -> 2D.

Pure functions on state dicts with torch's names and axes; float32 arrays in, new arrays out.
"""

from collections.abc import Mapping

import numpy as np

from ich_keras.errors import DataError, UsageError
from ich_keras.models.spec import MAX_CHANNELS

METHODS = ("mean", "centre")
FIRST_CONVOLUTIONS = ("conv1.weight", "stem.0.weight", "features.conv0.weight")


def first_convolution(state: Mapping[str, np.ndarray]) -> str:
    """Return the name of the convolution that reads the input.

    Raises:
        DataError: there is none.

    >>> first_convolution({"bn1.weight": np.ones(8), "conv1.weight": np.ones((8, 3, 7, 7))})
    'conv1.weight'
    """
    for name in FIRST_CONVOLUTIONS:
        if name in state:
            return name
    raise DataError(f"none of {', '.join(FIRST_CONVOLUTIONS)} is among the tensors.")


def with_channels(state: Mapping[str, np.ndarray], channels: int) -> dict[str, np.ndarray]:
    """Change the number of input channels.

    Many to one: sum over the input channels. Then one image gives the same answer as before when
    repeated in all channels. One to many: repeat the kernel and divide. n to m: repeat it
    cyclically and scale by n / m, which keeps the answer to a repeated image if m is a multiple of
    n or n a multiple of m.

    Args:
        state: a network's tensors.
        channels: new number of input channels.

    Returns:
        New tensors; only the first convolution differs.

    Raises:
        UsageError: `channels` is not a whole number from 1 to 1024.

    >>> kernel = np.array([1.0, 2.0, 3.0], np.float32).reshape(1, 3, 1, 1)
    >>> with_channels({"conv1.weight": kernel}, 1)["conv1.weight"].ravel().tolist()
    [6.0]
    >>> single = {"conv1.weight": np.full((1, 1, 1, 1), 6.0, np.float32)}
    >>> with_channels(single, 3)["conv1.weight"].ravel().tolist()
    [2.0, 2.0, 2.0]
    """
    if not isinstance(channels, int) or not 1 <= channels <= MAX_CHANNELS:
        raise UsageError(f"channels {channels!r}; expected a whole number, 1 to {MAX_CHANNELS}.")
    name = first_convolution(state)
    kernel = state[name]
    before = kernel.shape[1]
    if channels == before:
        return dict(state)
    if channels == 1:
        changed = kernel.sum(axis=1, keepdims=True, dtype=np.float64)
    else:
        picked = np.arange(channels) % before
        changed = kernel[:, picked].astype(np.float64) * (before / channels)
    return {**state, name: changed.astype(np.float32)}


def to_3d(
    state: Mapping[str, np.ndarray], depths: Mapping[str, int], method: str = "mean"
) -> dict[str, np.ndarray]:
    """Inflate a 2D network's kernels along the slices.

    Args:
        state: tensors of a 2D network.
        depths: name of each convolution -> number of slices of its 3D kernel.
        method: "mean" puts 1/D of the kernel into each of D slices, "centre" the whole kernel
            into the middle slice. For a volume that is constant along the slices, both give the
            2D network's answer; "mean" only away from the padding.

    Returns:
        Tensors of the 3D network.

    Raises:
        UsageError: unknown method.
        DataError: a kernel is not 2D.

    Source:
        Carreira and Zisserman, Quo Vadis, Action Recognition? (2017), section 2.4, for "mean".

    >>> flat = {"conv1.weight": np.full((1, 1, 1, 1), 6.0, np.float32)}
    >>> to_3d(flat, {"conv1.weight": 3})["conv1.weight"].ravel().tolist()
    [2.0, 2.0, 2.0]
    >>> to_3d(flat, {"conv1.weight": 3}, "centre")["conv1.weight"].ravel().tolist()
    [0.0, 6.0, 0.0]
    """
    if method not in METHODS:
        raise UsageError(f"method {method!r}; expected one of {', '.join(METHODS)}.")
    inflated = {}
    for name, array in state.items():
        if name not in depths:
            inflated[name] = array
            continue
        if array.ndim != 4:
            raise DataError(f"{name} has shape {array.shape}; expected a 2D kernel (4 axes).")
        depth = depths[name]
        volume = np.zeros((*array.shape[:2], depth, *array.shape[2:]), np.float32)
        if method == "mean":
            volume[:] = (array.astype(np.float64) / depth)[:, :, None]
        else:
            volume[:, :, depth // 2] = array
        inflated[name] = volume
    return inflated


def to_2d(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Collapse a 3D network's kernels: sum over the slices.

    The 2D network then answers an image as the 3D network answers that image repeated along the
    slices (away from the padding).

    Args:
        state: tensors of a 3D network.

    Returns:
        Tensors of the 2D network.

    Raises:
        DataError: there is no 3D kernel.

    >>> deep = {"conv1.weight": np.array([1, 2, 3], np.float32).reshape(1, 1, 3, 1, 1)}
    >>> to_2d(deep)["conv1.weight"].ravel().tolist()
    [6.0]
    """
    if not any(array.ndim == 5 for array in state.values()):
        raise DataError("no tensor is a 3D kernel (5 axes): there is nothing to collapse.")
    return {
        name: array.sum(axis=2, dtype=np.float64).astype(np.float32) if array.ndim == 5 else array
        for name, array in state.items()
    }
