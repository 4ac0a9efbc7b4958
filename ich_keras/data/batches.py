"""Batches of slices, slabs and series for `model.fit`, on every backend of Keras.

Worker processes import this module: it must not import keras.
"""

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ich_keras.data.augment import (
    BY_DRAWS,
    REVERSE_PROBABILITY,
    Augment,
    Change,
    change_of,
    comes_after_normalisation,
    require_augmentation,
)
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.cache.shards import CachedSlices
from ich_keras.data.device_inputs import DeviceInputs, RawBatch, require_device
from ich_keras.data.drawn_inputs import drawn_inputs
from ich_keras.data.draws import Draws, draw, no_draws
from ich_keras.data.epochs import epoch_plan
from ich_keras.data.inputs import slice_windows, stack_slices
from ich_keras.data.intensity import Intensity, intensity_of
from ich_keras.data.loader import CTLoader
from ich_keras.data.memory import recycled
from ich_keras.data.seeds import sample_seeds
from ich_keras.data.views import AIR, Samples, View
from ich_keras.errors import UsageError


class CTDataset(Dataset):
    """Whole batches of samples: `dataset[epoch, indices]` gives (inputs, labels).

    Args:
        pixels: where the HU come from.
        samples: which slices make a sample.
        size: rows and columns of the inputs.
        augmentation: a name that `make_augmentation` knows, or a function of your own; None
            changes nothing.
        seed: of the augmentation, which needs one.
        intensity: from HU to input, an `Intensity` or its name in `INTENSITIES`.
        reverse: turn every second volume, drawn at random, upside down (with an augmentation).
        is_raw: give `RawBatch`es, from which `DeviceInputs` makes the inputs.
        groups: int (samples,), 0 and up: samples of one group are changed alike; None changes each
            in its own way.

    Raises:
        UsageError: `is_raw` with an augmentation that changes images itself.
    """

    def __init__(
        self,
        pixels: CachedSlices,
        samples: Samples,
        size: int,
        augmentation: Augment | None = None,
        seed: int | None = None,
        intensity: str | Intensity = "windows",
        reverse: bool = False,
        is_raw: bool = False,
        groups: np.ndarray | None = None,
    ) -> None:
        if is_raw and not is_drawn(augmentation):
            raise UsageError(
                f"augmentation {augmentation!r} changes images on the CPU.",
                f"A device takes one of {', '.join(BY_DRAWS)}, or none.",
            )
        self._intensity = intensity_of(intensity)
        # Without the tables: this object travels to every worker process.
        self._pixels = pixels
        self._samples = samples
        self._size = size
        self._augmentation = augmentation
        self._seed = seed
        self._reverse = reverse
        self._is_raw = is_raw
        self._groups = groups
        self._change: Change | None = None

    def __len__(self) -> int:
        return len(self._samples)

    def __getstate__(self) -> dict:
        # Each process builds its own pipeline: random state must not be shared by copying.
        return {**self.__dict__, "_change": None}

    def __getitem__(self, key: tuple[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray] | RawBatch:
        """Return one batch.

        Args:
            key: (epoch, int (n,) numbers of samples).

        Returns:
            float32 (n, size, size, channels) inputs of slices, (n, slices, size, size, channels)
            of slabs and series; and float32 (n, labels) labels (NaN where there are none). With
            `is_raw`, a `RawBatch`.
        """
        epoch, indices = key
        hu = self._hu(np.asarray(indices))
        if self._samples.labels is None:
            shape = len(indices), len(self._samples.label_set)
            labels = np.full(shape, np.nan, np.float32)
        else:
            labels = self._samples.labels[indices].astype(np.float32)
            labels[labels < 0] = np.nan
        is_volume = self._samples.view.is_volume
        if not is_drawn(self._augmentation):
            return self._changed_inputs(hu, epoch, indices), labels
        draws = self._draw(epoch, indices, hu.shape[-1])
        if self._is_raw:
            return RawBatch(hu, draws, labels)
        return drawn_inputs(hu, draws, self._intensity, is_volume, self._size), labels

    def _draw(self, epoch: int, indices: np.ndarray, side: int) -> Draws:
        if self._augmentation is None:
            return no_draws(len(indices))
        seeds = self._seeds(epoch, indices)
        grey = not self._intensity.keeps_hu
        return draw(seeds, side, self._augmentation == "flip", self._reverse, grey)

    def _seeds(self, epoch: int, indices: np.ndarray) -> list[int]:
        if self._seed is None:
            raise UsageError("augmentation draws at random: give a seed.")
        drawn_for = np.asarray(indices)
        if self._groups is not None:
            drawn_for = self._groups[drawn_for]
        return sample_seeds(self._seed, epoch, drawn_for)

    def _changed_inputs(self, hu: np.ndarray, epoch: int, indices: np.ndarray) -> np.ndarray:
        """Return inputs that an augmentation of the images changed."""
        intensity, is_volume = self._intensity, self._samples.view.is_volume
        inputs = slice_windows(hu if is_volume else hu[:, 0], self._size, intensity.windows)
        is_after = comes_after_normalisation(self._augmentation)
        if not is_after:
            self._augment(inputs, epoch, indices)
        inputs = intensity.normalise(inputs, is_volume)
        if is_after:
            self._augment(inputs, epoch, indices)
        return inputs

    def mask(self, indices: np.ndarray) -> np.ndarray:
        """Tell the slices of samples from the air that fills them up: bool (n, slices)."""
        return self._samples.rows[indices] != AIR

    def _hu(self, indices: np.ndarray) -> np.ndarray:
        """Return HU, int16 (n, slices, rows, columns)."""
        rows, shifts = self._samples.rows[indices], self._samples.shifts
        if shifts is None and (rows != AIR).all():
            room = recycled((rows.size, self._pixels.size, self._pixels.size), np.int16)
            hu = self._pixels.slices_hu(rows.ravel(), room)
            return hu.reshape(*rows.shape, *hu.shape[1:])
        # Each slice is read once, however many slabs of the batch it is in.
        wanted = np.unique(rows[rows != AIR])
        hu = self._pixels.slices_hu(wanted)
        places = np.where(rows == AIR, AIR, np.searchsorted(wanted, rows))
        return np.stack(
            [
                stack_slices(hu, place, None if shifts is None else shifts[index])
                for place, index in zip(places, indices, strict=True)
            ]
        )

    def _augment(self, images: np.ndarray, epoch: int, indices: np.ndarray) -> None:
        """Change each sample of a batch, in place."""
        assert self._augmentation is not None  # `is_drawn` covers None
        if self._change is None:
            self._change = change_of(self._augmentation, not self._intensity.keeps_hu)
        for row, seed in enumerate(self._seeds(epoch, indices)):
            changed = self._change(images[row], seed)
            # A stream of its own, so that the other changes do not depend on this one.
            if self._reverse and np.random.default_rng([seed, 1]).random() < REVERSE_PROBABILITY:
                changed = changed[::-1]
            images[row] = changed


def is_drawn(augment: Augment | None) -> bool:
    """Tell whether an augmentation is drawn as numbers first, which the CPU or a device applies."""
    return augment is None or (isinstance(augment, str) and augment in BY_DRAWS)


def view_batches(
    cache: CTCache,
    view: View,
    indices: np.ndarray | None = None,
    batch_size: int = 32,
    size: int | None = None,
    seed: int | None = None,
    balance: bool = False,
    augment: Augment | None = None,
    workers: int = 0,
    intensity: str | Intensity | None = None,
    reverse: bool = False,
    samples: Samples | None = None,
    device: str | None = None,
) -> CTLoader:
    """Make batches of the samples of a view.

    Write an augmentation of your own as a function of the windows of one sample and a seed:

    >>> def brighten(windows, seed):
    ...     shift = np.random.default_rng(seed).uniform(-0.1, 0.1)
    ...     return np.clip(windows + shift, 0, 1, dtype=np.float32)
    >>> changed = brighten(np.full((2, 2, 3), 0.5, np.float32), seed=3)
    >>> changed.shape, round(float(changed.mean()), 3)
    ((2, 2, 3), 0.417)

    and pass it: `slice_batches(cache, seed=0, augment=brighten)`. One that belongs after
    normalisation is passed as `augment=Augmentation(function, after_normalisation=True)`; see
    `ich_keras.data.augment.Augmentation`.

    Args:
        cache: with labels joined.
        view: what a sample is.
        indices: int (n,), numbers of samples: rows of `cache.slices` for slices and slabs, of
            `cache.series` for series; None takes all that the view uses, with a seed (training)
            those of them that have labels.
        batch_size: samples per batch.
        size: rows and columns of the inputs; None takes the cache's.
        seed: shuffles, balances and augments; None keeps the order (validation, prediction).
        balance: one negative sample for each positive one, drawn again in each epoch.
        augment: changes the samples at random, all slices of one alike: "fast" (the thesis's
            changes, of Hounsfield units), "thesis" (the same draws and changes by albumentations,
            of windows; where `size` is not the cache's, its shifts are cut to other whole pixels),
            "flip" (left-right only); a function of your own or an `Augmentation`
            does so in its own way. Each needs a seed. None leaves the samples as they are.
        workers: processes that make batches; 0 makes them in this one. The batches are the same.
            A function of your own must then stand at the top level of a module.
        intensity: from HU to input: "windows" (three channels), "wide", "head-z-score" or "hu"
            (one), or an `Intensity` of your own; of "hu", no augmentation changes contrast and
            brightness. None takes "windows" for slices and "wide" for slabs and
            series, as the thesis.
        reverse: turn volumes upside down with a chance of one half; needs `augment`.
        samples: of this view, when they are made already.
        device: "cuda" or "cuda:N" sends int16 HU to that GPU, one batch ahead, and makes the inputs
            there, for the torch backend; "cpu" does the same in this process. "thesis" and
            functions of your own change images on the CPU: their inputs are of the CPU all the
            same. None makes arrays of the CPU, for every backend.

    Returns:
        A torch DataLoader of (float32 inputs, float32 (n, labels), NaN where one is missing) for
        `fit`, `evaluate` and `predict` on every backend; the inputs are (n, size, size, channels)
        or (n, slices, size, size, channels).

    Raises:
        UsageError: an argument cannot be used. Asking for a batch raises it too, when a function
            of your own returns anything but what it should.
        DataError: see `epoch_plan`.
        StaleError: the cache lacks what the view needs.
        EnvironmentProblem: when a batch is asked for: a worker process failed (`CTLoader`).
    """
    require_augmentation(augment, workers)
    require_device(device)
    if augment is not None and seed is None:
        raise UsageError("augmentation draws at random: give a seed.")
    if size is not None and not 8 <= size <= 4096:
        raise UsageError(f"size is {size}; expected 8 to 4096 pixels.")
    if reverse and (augment is None or not view.is_volume):
        raise UsageError(
            "reverse turns augmented slabs or series upside down; here there are none.",
            "Leave it out, or give `augment` and a view of slabs or series.",
        )
    samples = samples or cache.samples(view)
    intensity = intensity or ("wide" if view.is_volume else "windows")
    plan = epoch_plan(samples, indices, batch_size, seed, balance)
    size, intensity = size or cache.size, intensity_of(intensity)
    is_raw = device is not None and is_drawn(augment)
    dataset = CTDataset(cache.pixels, samples, size, augment, seed, intensity, reverse, is_raw)
    inputs = DeviceInputs(device, intensity, view.is_volume, size) if device and is_raw else None
    return CTLoader(dataset, plan, workers, inputs)


def slice_batches(
    cache: CTCache, indices: np.ndarray | None = None, batch_size: int = 32, **settings: Any
) -> CTLoader:
    """Make batches of single slices for a 2D network; see `view_batches` for the settings."""
    return view_batches(cache, View(), indices, batch_size, **settings)


def slab_batches(
    cache: CTCache,
    indices: np.ndarray | None = None,
    batch_size: int = 16,
    num_slices: int = 5,
    edge: str = "air",
    tilted: str = "keep",
    duplicate: str = "skip",
    **settings: Any,
) -> CTLoader:
    """Make batches of neighbouring slices with the label of the middle one.

    Args:
        cache, indices, batch_size: as in `view_batches`, which also takes the settings.
        num_slices, edge, tilted, duplicate: see `View`.
    """
    view = View("slab", num_slices, edge=edge, tilted=tilted, duplicate=duplicate)
    return view_batches(cache, view, indices, batch_size, **settings)


def series_batches(
    cache: CTCache,
    indices: np.ndarray | None = None,
    batch_size: int = 1,
    num_slices: int = 60,
    long_series: str = "spread",
    tilted: str = "keep",
    duplicate: str = "skip",
    **settings: Any,
) -> CTLoader:
    """Make batches of whole series, labelled positive where any slice is.

    Args:
        cache, indices, batch_size: as in `view_batches`, which also takes the settings.
        num_slices, long_series, tilted, duplicate: see `View`.
    """
    view = View("series", num_slices, long_series=long_series, tilted=tilted, duplicate=duplicate)
    return view_batches(cache, view, indices, batch_size, **settings)
