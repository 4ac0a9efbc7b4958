"""From Hounsfield units and draws to network input, on the CPU.

Hounsfield units are moved, and the windows, contrast, brightness and normalisation of each sample
then become one table from HU to input. The thesis moved the windows. Both orders differ where a
window cuts values off: beside bone, interpolated HU may lie above the window's upper end where
interpolated windows do not. `change_windows` has the thesis's order.

Worker processes import this module: it must not import keras.
"""

import functools
import math
from dataclasses import replace

import cv2
import numpy as np

from ich_keras.ct.window import Window
from ich_keras.data.draws import Draws
from ich_keras.data.inputs import slice_windows
from ich_keras.data.intensity import HeadZScore, Intensity
from ich_keras.data.memory import recycled


def drawn_inputs(
    hu: np.ndarray, draws: Draws, intensity: Intensity, is_volume: bool, size: int | None = None
) -> np.ndarray:
    """Turn HU into network input, changed at random.

    Args:
        hu: int16 (n, slices, rows, columns), HU; rows equal columns.
        draws: of n samples.
        intensity: from HU to input.
        is_volume: whether a sample is a volume; otherwise it has one slice.
        size: rows and columns of the input; None keeps those of `hu`.

    Returns:
        float32 (n, rows, columns, channels) or (n, slices, rows, columns, channels).
    """
    side = size or hu.shape[-1]
    inputs = recycled((*hu.shape[:2], side, side, intensity.channels), np.float32)
    room = _Room(hu.shape[-1])
    is_by_table = side == hu.shape[-1] and not isinstance(intensity.normalisation, HeadZScore)
    for number, sample in enumerate(hu):
        stack = sample[::-1] if draws.is_reversed[number] else sample
        own = jittered(intensity, draws, number)
        if is_by_table:
            amounts = draws.contrast[number], draws.brightness[number]
            table = _table(own, *amounts) if own is intensity else _Table(own, *amounts, True)
        for place, one in enumerate(stack):
            moved = move(one, draws, number, room)
            if is_by_table:
                table.look_up(moved, inputs[number, place], room)
            else:
                windows = own_windows(_whole(moved), side, own, intensity)
                inputs[number, place] = adjust(windows, draws, number)
    if not is_volume:
        inputs = inputs[:, 0]
    return inputs if is_by_table else intensity.normalise(inputs, is_volume)


def jittered(intensity: Intensity, draws: Draws, number: int) -> Intensity:
    """Return an intensity with the windows of one sample; the same one where they do not change."""
    level, width = float(draws.level[number]), float(draws.width[number])
    if level == 0 and width == 1:
        return intensity
    windows = [Window(one.level + level, one.width * width) for one in intensity.windows]
    return replace(intensity, windows=tuple(windows))


def own_windows(hu: np.ndarray, size: int | None, own: Intensity, usual: Intensity) -> np.ndarray:
    """Return the windows of HU as `slice_windows` does, without a table of windows used once."""
    return slice_windows(hu if own is usual else hu.astype(np.float32), size, own.windows)


class _Room:
    """Memory for one slice after the other: new memory costs more than what is done in it.

    Args:
        side: rows and columns of a slice.
    """

    def __init__(self, side: int) -> None:
        self.still, self.moved, self.shifted = np.empty((3, side, side), np.float32)
        self.rows = np.empty((side, side), np.intp)
        self.four = np.empty((side, side), np.complex128)


def move(image: np.ndarray, draws: Draws, number: int, room: _Room | None = None) -> np.ndarray:
    """Flip, shift, scale and rotate a slice; what lies beyond its border is its reflection.

    Args:
        image: int16 or float32 (rows, columns) or (rows, columns, channels).
        draws: of several samples.
        number: which of them.
        room: for an image of one channel; the next one overwrites what is returned.

    Returns:
        The type of `image`, or float32 where it was interpolated; the same shape.
    """
    left_right, upside_down = draws.flips[number].tolist()
    if upside_down:
        image = image[::-1]
    if left_right:
        image = image[:, ::-1]
    if not draws.is_moved[number]:
        return image
    # OpenCV 5 moves one float32 channel five times as fast as one of int16.
    still = np.empty(image.shape, np.float32) if room is None else room.still
    still[...] = image
    moved = cv2.warpAffine(
        still,
        draws.matrices[number],
        image.shape[1::-1],
        dst=None if room is None else room.moved,
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    return moved.reshape(image.shape)  # OpenCV drops the axis of a single channel


def adjust(windows: np.ndarray, draws: Draws, number: int) -> np.ndarray:
    """Change contrast and brightness of windows; float32 of the same shape, in 0..1."""
    contrast, brightness = (
        np.float32(values[number]) for values in (draws.contrast, draws.brightness)
    )
    if contrast == 1 and brightness == 0:
        return windows
    return np.clip(windows * contrast + brightness, 0, 1, dtype=np.float32)


def change_windows(windows: np.ndarray, draws: Draws, number: int) -> np.ndarray:
    """Change windows in the thesis's order: what "thesis" does to one slice, from the same draws.

    Args:
        windows: float32 (rows, columns, channels), 0..1.
        draws: of several samples.
        number: which of them.

    Returns:
        float32 of the same shape, 0..1.
    """
    return adjust(np.clip(move(windows, draws, number), 0, 1), draws, number)


def _whole(hu: np.ndarray) -> np.ndarray:
    """Round interpolated HU, as tables and caches hold whole ones."""
    return hu if hu.dtype == np.int16 else np.rint(hu).astype(np.int16)


class _Table:
    """The input of every HU between the ends of the windows, for one contrast and brightness.

    Args:
        intensity, contrast, brightness: of a sample.
        is_single: whether no other sample has these windows.
    """

    def __init__(
        self, intensity: Intensity, contrast: float, brightness: float, is_single: bool = False
    ) -> None:
        windows, self._lowest = (_windows_by_hu if is_single else _known_windows)(intensity)
        if contrast != 1 or brightness != 0:
            windows = windows * np.float32(contrast)
            windows += np.float32(brightness)
            np.maximum(windows, 0, out=windows)
            np.minimum(windows, 1, out=windows)
        self._values = intensity.normalise(windows[np.newaxis], False)[0]
        self._by_four = None
        if intensity.channels in (3, 4):
            # NumPy takes items of 16 bytes four times as fast as rows of 12.
            padded = np.zeros((len(windows), 4), np.float32)
            padded[:, : intensity.channels] = self._values
            self._by_four = padded.view(np.complex128)[:, 0]

    def look_up(self, hu: np.ndarray, out: np.ndarray, room: _Room) -> None:
        """Turn HU into input.

        Args:
            hu: int16 or float32 (rows, columns), HU.
            out: float32 (rows, columns, channels), receives the input.
            room: for its work.
        """
        if hu.dtype == np.int16:
            np.subtract(hu, self._lowest, out=room.rows, dtype=np.intp)
        else:
            # Cuts towards 0, and so rounds; what is negative means the first row in any case.
            np.add(hu, np.float32(0.5 - self._lowest), out=room.shifted)
            room.rows[...] = room.shifted
        if self._by_four is None:
            np.take(self._values, room.rows, axis=0, out=out, mode="clip")
            return
        four = np.take(self._by_four, room.rows, out=room.four, mode="clip")
        if out.shape[-1] == 4:
            out[...] = four.view(np.float32).reshape(out.shape)
            return
        cv2.cvtColor(four.view(np.float32).reshape(*hu.shape, 4), cv2.COLOR_BGRA2BGR, dst=out)


def _windows_by_hu(intensity: Intensity) -> tuple[np.ndarray, int]:
    """Return the windows of every HU between their ends, (HU, channels), and the first HU."""
    lowest = math.floor(min(window.low for window in intensity.windows))
    highest = math.ceil(max(window.low + window.width for window in intensity.windows))
    lowest, highest = (min(max(hu, -(2**15)), 2**15 - 1) for hu in (lowest, highest))
    hu = np.arange(lowest, highest + 1, dtype=np.int16)
    return np.stack([window(hu) for window in intensity.windows], axis=-1), lowest


_known_windows = functools.lru_cache(maxsize=8)(_windows_by_hu)


@functools.lru_cache(maxsize=8)
def _plain_table(intensity: Intensity) -> _Table:
    return _Table(intensity, 1.0, 0.0)


def _table(intensity: Intensity, contrast: float, brightness: float) -> _Table:
    if contrast == 1 and brightness == 0:
        return _plain_table(intensity)
    return _Table(intensity, contrast, brightness)
