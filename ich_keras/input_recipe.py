"""InputRecipe: how Hounsfield units become the input of a run's network, by value."""

from dataclasses import dataclass

import numpy as np

from ich_keras.data.inputs import resize_hu, slice_input, stack_channels, volume_input
from ich_keras.data.intensity import BONE_WINDOWS, NNUNET, Intensity
from ich_keras.data.views import View
from ich_keras.errors import UsageError


@dataclass(frozen=True)
class InputRecipe:
    """How Hounsfield units become the network's input.

    Args:
        view: which slices make a sample.
        intensity: the windows and the normalisation, by value.
        size: rows and columns of the network's input, pixels.
        cache_size: rows and columns to which a slice is resized before it is windowed, pixels.
        resampling: the rule by which `resize_hu` resizes.
    """

    view: View
    intensity: Intensity
    size: int
    cache_size: int
    resampling: str

    def __str__(self) -> str:
        """Return what a reader must know beside the view, size and the usual intensities."""
        intensity, parts = self.intensity, []
        if intensity.name in (NNUNET, BONE_WINDOWS):
            ends = ", ".join(f"{one.low:g} to {one.high:g}" for one in intensity.windows)
            parts.append(f"intensity {intensity.name} ({ends} HU)")
        return ", ".join(parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """One sample of the network's input: ([slices,] rows, columns, channels)."""
        view, side, channels = self.view, self.size, self.intensity.channels
        if view.is_stack:
            return (side, side, view.num_slices * channels)
        slices = (view.num_slices,) if view.is_volume else ()
        return (*slices, side, side, channels)

    def prepare(self, hu: np.ndarray) -> np.ndarray:
        """Turn Hounsfield units into the network's input, without augmentation.

        Args:
            hu: int16 HU; (n, rows, columns) for a network on slices, (n, slices, rows, columns) for
                all others, with the run's number of slices (padded with `AIR_HU`).

        Returns:
            float32 (n, *shape).

        Raises:
            UsageError: the dtype or the number of axes or slices is wrong.
        """
        slices = (self.view.num_slices,) if self.view.has_slices else ()
        expected = ("n", *map(str, slices), "rows", "columns")
        if not isinstance(hu, np.ndarray):
            raise UsageError(
                f"hu is a {type(hu).__name__}; expected a NumPy array, int16 of shape"
                f" ({', '.join(expected)})."
            )
        fits = hu.ndim == len(expected) and hu.shape[1:-2] == slices
        if hu.dtype != np.int16 or not fits:
            raise UsageError(
                f"hu is {hu.dtype} of shape {hu.shape}; expected int16 of shape"
                f" ({', '.join(expected)})."
            )
        if len(hu) == 0:
            return np.zeros((0, *self.shape), np.float32)
        flat = hu.reshape(-1, *hu.shape[-2:])
        resized = np.stack([resize_hu(image, self.cache_size) for image in flat])
        resized = resized.reshape(*hu.shape[:-2], self.cache_size, self.cache_size)
        turn = volume_input if self.view.has_slices else slice_input
        inputs = turn(resized, self.size, self.intensity)
        return stack_channels(inputs) if self.view.is_stack else inputs
