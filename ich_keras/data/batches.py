"""Batches of slices, stacks, slabs and series for `model.fit`, on every backend of Keras.

Worker processes import this module: it must not import keras.
"""

from itertools import repeat
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
from ich_keras.data.changes import add_noise, kept_places, with_jitter
from ich_keras.data.device_inputs import DeviceInputs, RawBatch, require_device
from ich_keras.data.drawn_inputs import drawn_inputs, jittered, own_windows
from ich_keras.data.draws import Draws, draw, no_draws
from ich_keras.data.epochs import epoch_plan
from ich_keras.data.inputs import slice_windows, stack_channels
from ich_keras.data.intensity import Intensity, intensity_of
from ich_keras.data.loader import CTLoader
from ich_keras.data.memory import recycled
from ich_keras.data.mixing import Mix, draw_mix, mixed_inputs, mixed_labels
from ich_keras.data.seeds import sample_seeds
from ich_keras.data.sources import Sources
from ich_keras.data.views import AIR, Samples, View
from ich_keras.errors import UsageError
from ich_keras.input_changes import NO_CHANGES, InputChanges


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
        changes: further random changes, from the same seeds.
        groups: int (samples,), 0 and up: samples of one group are augmented and windowed alike,
            each with noise and missing slices of its own; None changes each in its own way.

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
        changes: InputChanges = NO_CHANGES,
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
        self._changes = changes
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
            float32 (n, size, size, channels) inputs of slices and stacks, (n, slices, size, size,
            channels) of slabs and series; and float32 (n, labels) labels (NaN where there are
            none). With `is_raw`, a `RawBatch`.
        """
        epoch, indices = key[0], np.asarray(key[1])
        hu = self._changed_hu(epoch, indices)
        if self._samples.labels is None:
            shape = len(indices), len(self._samples.label_set)
            labels = np.full(shape, np.nan, np.float32)
        else:
            labels = self._samples.labels[indices].astype(np.float32)
            labels[labels < 0] = np.nan
        view, mix = self._samples.view, self._mix(epoch, indices)
        draws = self._draw(epoch, indices, hu.shape[-1])
        if self._is_raw:
            return RawBatch(hu, draws, labels, mix)
        if is_drawn(self._augmentation):
            inputs = drawn_inputs(hu, draws, self._intensity, view.has_slices, self._size)
        else:
            inputs = self._changed_inputs(hu, draws, epoch, indices)
        inputs = stack_channels(inputs) if view.is_stack else inputs
        return (
            (inputs, labels)
            if mix is None
            else (mixed_inputs(inputs, mix), mixed_labels(labels, mix))
        )

    def _draw(self, epoch: int, indices: np.ndarray, side: int) -> Draws:
        """Return draws; of an augmentation that changes images itself, those of windows alone."""
        draws = no_draws(len(indices))
        if self._augmentation is not None and is_drawn(self._augmentation):
            seeds = self._seeds(epoch, indices)
            grey = not self._intensity.keeps_hu
            draws = draw(seeds, side, self._augmentation == "flip", self._reverse, grey)
        if self._changes.has_jitter:
            draws = with_jitter(draws, self._seeds(epoch, indices), self._changes)
        return draws

    def _mix(self, epoch: int, indices: np.ndarray) -> Mix | None:
        if not self._changes.mixes:
            return None
        assert self._seed is not None  # `view_batches` asks for one
        return draw_mix(self._changes, self._seed, epoch, indices, self._size)

    def _seeds(self, epoch: int, indices: np.ndarray) -> list[int]:
        return self._own_seeds(epoch, indices if self._groups is None else self._groups[indices])

    def _own_seeds(self, epoch: int, numbers: np.ndarray) -> list[int]:
        if self._seed is None:
            raise UsageError("augmentation draws at random: give a seed.")
        return sample_seeds(self._seed, epoch, np.asarray(numbers))

    def _changed_inputs(
        self, hu: np.ndarray, draws: Draws, epoch: int, indices: np.ndarray
    ) -> np.ndarray:
        """Return inputs that an augmentation of the images changed."""
        intensity, has_slices = self._intensity, self._samples.view.has_slices
        hu = hu if has_slices else hu[:, 0]
        if draws.has_jitter:
            own = [jittered(intensity, draws, number) for number in range(len(hu))]
            inputs = np.stack(
                [own_windows(*one, intensity) for one in zip(hu, repeat(self._size), own)]
            )
        else:
            inputs = slice_windows(hu, self._size, intensity.windows)
        is_after = comes_after_normalisation(self._augmentation)
        if not is_after:
            self._augment(inputs, epoch, indices)
        inputs = intensity.normalise(inputs, has_slices)
        if is_after:
            self._augment(inputs, epoch, indices)
        return inputs

    def mask(self, indices: np.ndarray) -> np.ndarray:
        """Tell the slices of samples from the air that fills them up: bool (n, slices)."""
        return self._samples.rows[indices] != AIR

    def _changed_hu(self, epoch: int, indices: np.ndarray) -> np.ndarray:
        """Return HU, int16 (n, slices, rows, columns), with noise and without dropped slices."""
        sources = Sources.of(self._samples, indices)
        drop, sigma = self._changes.drop_slices, self._changes.hu_noise
        # Of each sample also where groups are changed alike: noise that neighbours share is none.
        seeds = [] if drop is sigma is None else self._own_seeds(epoch, indices)
        if drop is not None:
            places = kept_places(self._samples.view, sources.rows, seeds, drop)
            sources = sources.placed(places)
        hu = self._hu(sources)
        if sigma is not None:
            add_noise(hu, sources.rows, seeds, sigma)
        return hu

    def _hu(self, sources: Sources) -> np.ndarray:
        """Return HU, int16 (n, slices, rows, columns); nobody else holds them."""
        if sources.is_plain:
            rows = sources.rows
            room = recycled((rows.size, self._pixels.size, self._pixels.size), np.int16)
            hu = self._pixels.slices_hu(rows.ravel(), room)
            return hu.reshape(*rows.shape, *hu.shape[1:])
        # Each slice is read once, however many slabs of the batch it is in.
        wanted = sources.wanted()
        return sources.stacked(self._pixels.slices_hu(wanted), wanted)

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
    changes: InputChanges = NO_CHANGES,
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
        indices: int (n,), numbers of samples: rows of `cache.series` for series, of
            `cache.slices` for all other views; None takes all that the view uses, with a seed
            (training) those of them that have labels.
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
            brightness. None takes "windows" for slices and stacks and "wide" for slabs and
            series, as the thesis.
        reverse: turn stacks and volumes upside down with a chance of one half; needs `augment`.
        samples: of this view, when they are made already.
        device: "cuda" or "cuda:N" sends int16 HU to that GPU, one batch ahead, and makes the inputs
            there, for the torch backend; "cpu" does the same in this process. "thesis" and
            functions of your own change images on the CPU: their inputs are of the CPU all the
            same. None makes arrays of the CPU, for every backend.
        changes: further random changes of the samples, beside or without an augmentation; they
            need a seed (`ich_keras.input_changes.InputChanges`).

    Returns:
        A torch DataLoader of (float32 inputs, float32 (n, labels), NaN where one is missing) for
        `fit`, `evaluate` and `predict` on every backend; the inputs are (n, size, size, channels)
        or (n, slices, size, size, channels), of stacks (n, size, size, slices * channels).

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
    if reverse and (augment is None or not view.has_slices):
        raise UsageError(
            "reverse turns augmented stacks, slabs or series upside down; here there are none.",
            "Leave it out, or give `augment` and a view of several slices.",
        )
    samples = samples or cache.samples(view)
    intensity = intensity_of(intensity or ("wide" if view.is_volume else "windows"))
    if changes and seed is None:
        raise UsageError(f"{changes}: drawn at random; give a seed.")
    changes.require_for(view.kind, intensity.is_windowed)
    plan = epoch_plan(samples, indices, batch_size, seed, balance)
    size = size or cache.size
    is_raw = device is not None and is_drawn(augment)
    dataset = CTDataset(
        cache.pixels, samples, size, augment, seed, intensity, reverse, is_raw, changes
    )
    inputs = None
    if device and is_raw:
        inputs = DeviceInputs(device, intensity, view.has_slices, size, view.is_stack)
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
