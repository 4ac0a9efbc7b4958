"""InputRecipe: how Hounsfield units become the input of a run's network, by value."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ich_keras.data.depth import grid_of
from ich_keras.data.head_crop import HeadCrop, pixels_mm
from ich_keras.data.inputs import resize_hu, slice_input, stack_channels, volume_input
from ich_keras.data.intensity import BONE_WINDOWS, NNUNET, Intensity
from ich_keras.data.views import AIR, Samples, View
from ich_keras.errors import UsageError
from ich_keras.recipe_json import WHERE_ABSENT

if TYPE_CHECKING:
    from ich_keras.data.cache.cache import CTCache
    from ich_keras.data.cache.shards import CachedSlices

# The squares around the heads of a cache that is open: finding them reads all of it.
_BOXES: "weakref.WeakKeyDictionary[CachedSlices, dict[HeadCrop, np.ndarray]]"
_BOXES = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class InputRecipe:
    """How Hounsfield units become the network's input.

    Args:
        view: which slices make a sample.
        intensity: the windows and the normalisation, by value.
        size: rows and columns of the network's input, pixels.
        cache_size: rows and columns to which a slice is resized before it is windowed, pixels.
        resampling: the rule by which `resize_hu` resizes.
        crop: how the head of each series is cut out, before slices are resized to `size`; None cuts
            nothing, as runs of older versions do.
        depth_mm: distance between slices to which whole series are resampled; None takes them as
            they are, as runs of older versions do.

    Raises:
        UsageError: a distance that is out of range, or has no meaning for the view.
    """

    view: View
    intensity: Intensity
    size: int
    cache_size: int
    resampling: str
    crop: HeadCrop | None = field(default=None, metadata={WHERE_ABSENT: None})
    depth_mm: float | None = field(default=None, metadata={WHERE_ABSENT: None})

    def __post_init__(self) -> None:
        if self.depth_mm is None:
            return
        if not 0.1 <= self.depth_mm <= 50:
            raise UsageError(f"data.depth_mm is {self.depth_mm}; expected 0.1 to 50 mm.")
        if self.view.kind != "series":
            raise UsageError(
                f"data.depth_mm resamples whole series; this run is on {self.view.kind}s.",
                "Leave it out, or train on whole series (--preset resnet18_3d).",
            )
        if self.view.tilted == "deshear":
            raise UsageError(
                "data.depth_mm with data.tilted 'deshear': slices that move are not interpolated.",
                "Leave one of them out.",
            )

    def __str__(self) -> str:
        """Return what a reader must know beside the view, size and the usual intensities."""
        intensity, parts = self.intensity, []
        if intensity.name in (NNUNET, BONE_WINDOWS):
            ends = ", ".join(f"{one.low:g} to {one.high:g}" for one in intensity.windows)
            parts.append(f"intensity {intensity.name} ({ends} HU)")
        if self.crop is not None:
            parts.append(f"head cut out with a margin of {self.crop.margin:.0%}")
        if self.depth_mm is not None:
            parts.append(f"slices resampled to {self.depth_mm:g} mm")
        return ", ".join(parts)

    def samples(self, cache: "CTCache") -> Samples:
        """Find the samples of a cache as this input takes them."""
        return self.of_cache(cache.samples(self.view), cache)

    def of_cache(self, samples: Samples, cache: "CTCache") -> Samples:
        """Crop and resample samples of a cache; its boxes are found once per process."""
        samples = self._resampled(samples, cache.slices, cache.series)
        if self.crop is None:
            return samples
        known = _BOXES.setdefault(cache.pixels, {})
        if self.crop not in known:
            known[self.crop] = self._boxes(cache.series, cache.slices_hu)
        return _with_boxes(samples, cache.series, known[self.crop])

    def adapted(
        self, samples: Samples, slices: pd.DataFrame, series: pd.DataFrame, hu: np.ndarray
    ) -> Samples:
        """Crop and resample samples.

        Args:
            samples: of the view, from `make_samples`.
            slices, series: the tables that they were made of.
            hu: int16 (len(slices), cache_size, cache_size), HU.
        """
        samples = self._resampled(samples, slices, series)
        if self.crop is None:
            return samples
        return _with_boxes(samples, series, self._boxes(series, lambda rows: hu[rows]))

    def _boxes(self, series: pd.DataFrame, hu_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Return the square around the head of each series, int64 (series, 3)."""
        assert self.crop is not None
        ends = series["num_slices"].cumsum().to_numpy()
        starts = ends - series["num_slices"].to_numpy()
        spacings = pixels_mm(series, self.cache_size)
        found = [
            self.crop.box(hu_of(np.arange(start, end)), pixel_mm)
            for start, end, pixel_mm in zip(starts, ends, spacings, strict=True)
        ]
        return np.array(found, np.int64).reshape(-1, 3)

    def _resampled(self, samples: Samples, slices: pd.DataFrame, series: pd.DataFrame) -> Samples:
        if self.depth_mm is None:
            return samples
        rows, others = (np.full_like(samples.rows, AIR) for _ in range(2))
        shares = np.zeros(samples.rows.shape, np.float32)
        lengths = series["num_slices"].to_numpy()
        positions = slices["position_mm"].to_numpy(np.float64)
        uids = slices["series_uid"].to_numpy()
        for number, (length, end) in enumerate(zip(lengths, lengths.cumsum(), strict=True)):
            start = end - length
            grid = grid_of(positions[start:end], self.depth_mm, uids[start])
            places = self.view.positions(len(grid.rows))[0]
            is_there = (places != AIR) & (grid.rows[places] != AIR)
            chosen = places[is_there]
            rows[number, is_there] = grid.rows[chosen] + start
            others[number, is_there] = grid.others[chosen] + start
            shares[number, is_there] = grid.shares[chosen]
        return replace(samples, rows=rows, others=others, shares=shares)

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
        if self.crop is not None or self.depth_mm is not None:
            raise UsageError(
                f"this run's input is made of whole series ({self}).",
                "Predict a folder (`predict_folder`) or arrays (`predict_arrays`).",
            )
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


def _with_boxes(samples: Samples, series: pd.DataFrame, boxes: np.ndarray) -> Samples:
    is_series = samples.view.kind == "series"
    return replace(
        samples, boxes=boxes if is_series else np.repeat(boxes, series["num_slices"], axis=0)
    )
