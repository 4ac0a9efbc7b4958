"""The way back: from cells of a network to the pixels of the slice that it saw.

`resize_hu` pads a slice to a square and resizes it; `slice_windows` may resize it once more. Both
take a pixel for a small square: the middle of pixel i lies at i + 0.5 of its side's length. So
where a pixel of the slice lies in the network's input is a straight line, whatever was in between.
"""

import numpy as np


def input_places(
    length: int,
    side: int,
    size: int,
    shift: float = 0.0,
    start: float = 0.0,
    extent: float = 1.0,
) -> np.ndarray:
    """Say where the pixels of a slice lie in the network's input, along one axis.

    Args:
        length: pixels of the slice along this axis.
        side: pixels of the square that it was padded to: the larger of rows and columns.
        size: pixels of the network's input along this axis.
        shift: how far the slice was moved before, in units of its side (`Samples.shifts`).
        start, extent: of the square that was cut out, in units of the side (`Samples.boxes`).

    Returns:
        float64 (length,), in pixels of the input; 0 is the middle of its first pixel.

    >>> input_places(4, 4, 2).tolist()  # two pixels become one
    [-0.25, 0.25, 0.75, 1.25]
    >>> input_places(2, 4, 4).tolist()  # padded by one on either side
    [1.0, 2.0]
    >>> input_places(4, 4, 4, start=0.25, extent=0.5).tolist()  # two pixels become four
    [-1.5, 0.5, 2.5, 4.5]
    """
    before = (side - length) // 2
    if start == 0 and extent == 1:
        return (np.arange(length) + before + 0.5) * (size / side) - 0.5 + shift * size
    whole = (np.arange(length) + before + 0.5) / side + shift
    return (whole - start) / extent * size - 0.5


def interpolation(
    places: np.ndarray, cells: int, step: float, centre: float, size: int
) -> np.ndarray:
    """Make the matrix that interpolates cells linearly at places of the input, along one axis.

    Beyond the outermost cells their values go on, up to the edge of the input. What lies outside
    the input was not seen, and gets 0.

    Args:
        places: float (n,), in pixels of the input; 0 is the middle of its first pixel.
        cells: how many there are.
        step: between the middles of neighbouring cells, pixels.
        centre: the middle of the first cell, pixels.
        size: of the input along this axis, pixels.

    Returns:
        float32 (n, cells); each row adds up to 1, or to 0 outside the input.

    >>> interpolation(np.array([0.0, 1.0, 5.0]), 2, step=4, centre=0, size=6).tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.0, 1.0]]
    """
    along = np.clip((places - centre) / step, 0, cells - 1)
    left = np.minimum(np.floor(along).astype(int), max(cells - 2, 0))
    share = along - left
    matrix = np.zeros((len(places), cells), np.float64)
    rows = np.arange(len(places))
    matrix[rows, left] = 1 - share
    if cells > 1:
        matrix[rows, left + 1] += share
    is_seen = (places >= -0.5) & (places <= size - 0.5)
    return (matrix * is_seen[:, np.newaxis]).astype(np.float32)


def series_interpolation(positions: np.ndarray, length: int) -> np.ndarray:
    """Make the matrix from the slices of a sample to those of its series.

    A slice between two that the network saw gets what lies between theirs. A slice beyond the
    outermost ones was not seen, and gets 0. Air falls away.

    Args:
        positions: int or float (slices,), the slice of the series at each place of the sample, or
            where between two; below 0 is air.
        length: slices of the series.

    Returns:
        float32 (length, slices).

    >>> series_interpolation(np.array([-1, 0, 2]), 4).tolist()
    [[0.0, 1.0, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    matrix = np.zeros((length, len(positions)), np.float32)
    filled = np.flatnonzero(positions >= 0)
    if not len(filled):
        return matrix
    seen = positions[filled]
    # Where several places show one slice, the first counts.
    seen, first = np.unique(seen, return_index=True)
    for place, one in enumerate(filled[first]):
        weights = np.zeros(len(seen))
        weights[place] = 1.0
        matrix[:, one] = np.interp(np.arange(length), seen, weights, left=0.0, right=0.0)
    return matrix
