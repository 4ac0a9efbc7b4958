"""HU to network input: the preprocessing of training, prediction and benchmarks.

The order is HU -> resize -> windows -> (augmentation, training only) -> normalisation -> network.
`ich_keras.data.drawn_inputs` (and `device_inputs`, on a GPU) give the same without augmentation.
With "fast" they move HU before the windows.
Normalisation comes last: the library's augmentation clips to [0, 1], which would saturate blood in
normalised values (thesis fault 5). The thesis applied the windows first and resized afterwards. A
cache holds HU that are resized already, which moves 1-3 % of the head's pixels by more than 0.1 in
the brain window. For the thesis's order, use a cache at 512 and a smaller input size:
`slice_windows` then applies the windows at 512 and resizes linearly.
"""

import functools

import cv2
import numpy as np

from ich_keras.ct.pixels import AIR_HU
from ich_keras.ct.window import WINDOWS, Window
from ich_keras.data.intensity import Intensity, intensity_of
from ich_keras.errors import UsageError

# Names the rule of `resize_hu`; part of a cache's fingerprint: change it when the rule changes.
RESAMPLING = "pad-square-air/area-down/linear-up/1"


def resize_hu(hu: np.ndarray, size: int) -> np.ndarray:
    """Resize one slice of HU to a square.

    A matrix that is not square is first padded with air, centred, so that nothing is stretched;
    pixels that are not square stay as they are.
    Shrinking averages areas (no aliasing); enlarging interpolates linearly.

    Args:
        hu: int16 (rows, columns), HU.
        size: rows and columns of the result, pixels.

    Returns:
        int16 (size, size), HU.

    >>> resize_hu(np.array([[0, 10], [20, 30]], np.int16), 1).tolist()
    [[15]]
    >>> resize_hu(np.array([[40, 40]], np.int16), 2).tolist()  # padded with air, -1024 HU
    [[40, 40], [-1024, -1024]]
    """
    rows, columns = hu.shape
    if rows != columns:
        side = max(rows, columns)
        top, left = (side - rows) // 2, (side - columns) // 2
        square = np.full((side, side), AIR_HU, hu.dtype)
        square[top : top + rows, left : left + columns] = hu
        hu = square
    if hu.shape[0] == size:
        return np.ascontiguousarray(hu)
    method = cv2.INTER_AREA if hu.shape[0] > size else cv2.INTER_LINEAR
    return cv2.resize(hu, (size, size), interpolation=method)


def slice_windows(
    hu: np.ndarray, size: int | None = None, windows: tuple[Window, ...] = WINDOWS
) -> np.ndarray:
    """Turn HU into the stacked windows that augmentation and `normalise` expect.

    Args:
        hu: int16 (rows, columns) or (n, rows, columns), HU.
        size: rows and columns of the result; None keeps those of `hu`.
        windows: one channel each, in this order.

    Returns:
        float32, the shape of `hu` (resized) with a last axis of len(windows), values 0..1.

    Raises:
        UsageError: resizing is needed, but the slices are not square.

    >>> hu = np.array([[-1000, 40, 80]], np.int16)
    >>> slice_windows(hu).shape
    (1, 3, 3)
    >>> slice_windows(hu)[0, :, 0].tolist()  # brain window: level 40, width 80
    [0.0, 0.5, 1.0]
    """
    if hu.dtype == np.int16:
        stacked = np.take(_window_table(windows), hu.view(np.uint16), axis=0)
    else:
        stacked = np.stack([window(hu) for window in windows], axis=-1)
    if size is None or stacked.shape[-3:-1] == (size, size):
        return stacked
    if stacked.shape[-2] != stacked.shape[-3]:
        raise UsageError(
            f"slices of {stacked.shape[-3]}x{stacked.shape[-2]} pixels; expected square ones.",
            "Pass them through resize_hu first.",
        )
    method = cv2.INTER_LINEAR  # the thesis resizes windows with bilinear interpolation
    flat = stacked.reshape(-1, *stacked.shape[-3:])
    resized = np.stack([cv2.resize(image, (size, size), interpolation=method) for image in flat])
    # OpenCV drops the axis of a single channel.
    return resized.reshape(*stacked.shape[:-3], size, size, stacked.shape[-1])


@functools.lru_cache(maxsize=8)
def _window_table(windows: tuple[Window, ...]) -> np.ndarray:
    """Return the windows of every 16-bit value: float32 (65536, windows), indexed by HU read as
    unsigned. A lookup takes a third of the time of computing, or less."""
    hu = np.arange(2**16, dtype=np.uint16).view(np.int16)
    return np.stack([window(hu) for window in windows], axis=-1)


def slice_input(
    hu: np.ndarray, size: int | None = None, intensity: str | Intensity = "windows"
) -> np.ndarray:
    """Turn HU slices into the input of a 2D network, without augmentation.

    Args:
        hu: int16 (rows, columns) or (n, rows, columns), HU.
        size: rows and columns of the network's input; None keeps those of `hu`.
        intensity: a key of `INTENSITIES`, or an `Intensity`.

    Returns:
        float32 (..., rows, columns, channels): for "windows" the brain, subdural and soft-tissue
        window, normalised with the thesis's mean and standard deviation.

    >>> slice_input(np.zeros((2, 64, 64), np.int16), size=32).shape
    (2, 32, 32, 3)
    """
    chosen = intensity_of(intensity)
    return chosen.normalise(slice_windows(hu, size, chosen.windows), False)


def volume_input(
    hu: np.ndarray, size: int | None = None, intensity: str | Intensity = "wide"
) -> np.ndarray:
    """Turn stacks of HU slices into the input of a 3D network, without augmentation.

    Args:
        hu: int16 (..., slices, rows, columns), HU; `AIR_HU` throughout where a stack has no slice.
        size: rows and columns of the network's input; None keeps those of `hu`.
        intensity: a key of `INTENSITIES`, or an `Intensity`.

    Returns:
        float32 (..., slices, rows, columns, channels).

    >>> volume_input(np.zeros((5, 64, 64), np.int16), size=32).shape
    (5, 32, 32, 1)
    """
    chosen = intensity_of(intensity)
    return chosen.normalise(slice_windows(hu, size, chosen.windows), True)


def stack_slices(
    hu: np.ndarray, positions: np.ndarray, shifts: np.ndarray | None = None
) -> np.ndarray:
    """Stack the slices of a sample, with air where it has none.

    Args:
        hu: int16 (n, rows, columns), HU.
        positions: int (slices,), which of them; below 0 for air.
        shifts: float (slices, 2), how far down and to the right each moves, in units of its side.

    Returns:
        int16 (slices, rows, columns), HU; a copy.

    >>> hu = np.array([[[10]], [[20]]], np.int16)
    >>> stack_slices(hu, np.array([-1, 1, 0])).ravel().tolist()
    [-1024, 20, 10]
    """
    stack = np.full((len(positions), *hu.shape[1:]), AIR_HU, hu.dtype)
    for place, position in enumerate(positions):
        if position < 0:
            continue
        shift = (0.0, 0.0) if shifts is None else shifts[place]
        stack[place] = _moved(hu[position], *shift)
    return stack


def stack_channels(inputs: np.ndarray) -> np.ndarray:
    """Turn the slices of samples into channels, for a 2D network on stacks.

    Args:
        inputs: (..., slices, rows, columns, channels).

    Returns:
        (..., rows, columns, slices * channels), contiguous: all channels of the most inferior
        slice first, those of the most superior one last.

    >>> two_slices = np.array([[[[1, 2]]], [[[3, 4]]]])  # of one pixel, in two channels
    >>> stack_channels(two_slices).tolist()
    [[[1, 2, 3, 4]]]
    """
    *lead, slices, rows, columns, channels = inputs.shape
    folded = np.moveaxis(inputs, -4, -2)
    return np.ascontiguousarray(folded).reshape(*lead, rows, columns, slices * channels)


def stack_slices_of(inputs: np.ndarray, slices: int) -> np.ndarray:
    """Turn the channels of a stack back into slices, what `stack_channels` had.

    Args:
        inputs: (..., rows, columns, slices * channels).
        slices: how many.

    Returns:
        (..., slices, rows, columns, channels), a view.
    """
    return np.moveaxis(inputs.reshape(*inputs.shape[:-1], slices, -1), -2, -4)


def _moved(hu: np.ndarray, down: float, right: float) -> np.ndarray:
    if down == right == 0:
        return hu
    rows, columns = hu.shape
    matrix = np.array([[1.0, 0.0, right * columns], [0.0, 1.0, down * rows]])
    return cv2.warpAffine(
        hu,
        matrix,
        (columns, rows),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=AIR_HU,
    )
