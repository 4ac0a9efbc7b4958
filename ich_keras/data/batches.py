"""Batches of slices, slabs and series for `model.fit`: a torch DataLoader, which Keras accepts on
every backend.

Worker processes import this module: it must not import keras.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ich_keras.data.augment import (
    REVERSE_PROBABILITY,
    make_augmentation,
    require_augmentation,
    sample_seed,
)
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.cache.shards import CachedSlices
from ich_keras.data.inputs import Intensity, intensity_of, slice_windows, stack_slices
from ich_keras.data.views import AIR, Samples, View, make_samples
from ich_keras.errors import DataError, UsageError
from ich_keras.labels import ANY, LABELS
from ich_keras.processes import START_METHOD

WORKER_TIMEOUT_SECONDS = 600


class CTDataset(Dataset):
    """Whole batches of samples: asked for (epoch, indices), gives (inputs, labels).

    Args:
        pixels: where the HU come from.
        samples: which slices make a sample.
        size: rows and columns of the inputs.
        augmentation: a name that `make_augmentation` knows; None changes nothing.
        seed: of the augmentation.
        intensity: from HU to input, a key of `ich_keras.data.inputs.INTENSITIES` or an `Intensity`.
        reverse: turn every second volume, drawn at random, upside down (with an augmentation).
    """

    def __init__(
        self,
        pixels: CachedSlices,
        samples: Samples,
        size: int,
        augmentation: str | None = None,
        seed: int | None = None,
        intensity: str | Intensity = "windows",
        reverse: bool = False,
    ):
        self._intensity = intensity_of(intensity)
        # Without the tables: this object travels to every worker process.
        self._pixels = pixels
        self._samples = samples
        self._size = size
        self._augmentation = augmentation
        self._seed = seed
        self._reverse = reverse
        self._augment = None

    def __len__(self) -> int:
        return len(self._samples)

    def __getstate__(self) -> dict:
        # Each process builds its own pipeline: random state must not be shared by copying.
        return {**self.__dict__, "_augment": None}

    def __getitem__(self, key: tuple[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return one batch.

        Args:
            key: (epoch, int (n,) numbers of samples).

        Returns:
            float32 (n, size, size, channels) inputs of slices, (n, slices, size, size, channels)
            of slabs and series; and float32 (n, 6) labels (NaN where there are none).
        """
        epoch, indices = key
        intensity = self._intensity
        is_volume = self._samples.view.is_volume
        hu = self._hu(np.asarray(indices))
        windows = slice_windows(hu if is_volume else hu[:, 0], self._size, intensity.windows)
        if self._augmentation is not None:
            for row, index in enumerate(indices):
                windows[row] = self._changed(windows[row], epoch, int(index))
        if self._samples.labels is None:
            labels = np.full((len(indices), len(LABELS)), np.nan, np.float32)
        else:
            labels = self._samples.labels[indices].astype(np.float32)
            labels[labels < 0] = np.nan
        return intensity.normalise(windows, is_volume), labels

    def mask(self, indices: np.ndarray) -> np.ndarray:
        """Tell the slices of samples from the air that fills them up: bool (n, slices)."""
        return self._samples.rows[indices] != AIR

    def _hu(self, indices: np.ndarray) -> np.ndarray:
        """Return HU, int16 (n, slices, rows, columns)."""
        rows, shifts = self._samples.rows[indices], self._samples.shifts
        if shifts is None and (rows != AIR).all():
            hu = self._pixels.slices_hu(rows.ravel())
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

    def _changed(self, windows: np.ndarray, epoch: int, index: int) -> np.ndarray:
        if self._augment is None:
            self._augment = make_augmentation(self._augmentation)
        seed = sample_seed(self._seed, epoch, index)
        windows = self._augment(windows, seed)
        # A stream of its own, so that the other changes do not depend on this one.
        if self._reverse and np.random.default_rng([seed, 1]).random() < REVERSE_PROBABILITY:
            windows = windows[::-1]
        return windows


@dataclass(frozen=True)
class EpochPlan:
    """Which samples an epoch holds, and in what order: a pure function of (seed, epoch).

    Args:
        indices: int (n,), numbers of samples.
        positive: bool (n,), whether `any` holds; used to balance.
        batch_size: samples a batch.
        seed: of shuffling and balancing; None keeps the order of `indices`.
        balance: as many negatives as positives, drawn anew each epoch; every sample of
            the smaller class is in every epoch.
        drop_last: leave out a last batch that is not full (when there is a full one): batch
            statistics of a few samples are noise.
    """

    indices: np.ndarray
    positive: np.ndarray
    batch_size: int
    seed: int | None = None
    balance: bool = False
    drop_last: bool = False

    @property
    def num_samples(self) -> int:
        """Samples in an epoch, before a partial batch is dropped."""
        if not self.balance:
            return len(self.indices)
        return 2 * min(int(self.positive.sum()), int((~self.positive).sum()))

    @property
    def num_batches(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(self.num_samples, self.batch_size)
        return full if rest == 0 or (self.drop_last and full) else full + 1

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the epoch's batches: int arrays, numbers of samples."""
        order = self.indices
        if self.seed is not None:
            # A stream of its own: sample_seed draws from (seed, epoch, index >= 0).
            random = np.random.default_rng([self.seed, epoch, 2**63])
            if self.balance:
                half = self.num_samples // 2
                order = np.concatenate(
                    [
                        random.choice(self.indices[chosen], half, replace=False)
                        for chosen in (self.positive, ~self.positive)
                    ]
                )
            order = random.permutation(order)
        starts = range(0, self.num_batches * self.batch_size, self.batch_size)
        return [order[start : start + self.batch_size] for start in starts]


class _EpochSampler(Sampler):
    """Yields (epoch, indices) for the epoch it was told."""

    def __init__(self, plan: EpochPlan):
        self.plan = plan
        self.epoch = 0

    def __len__(self) -> int:
        return self.plan.num_batches

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        for indices in self.plan.batches(self.epoch):
            yield self.epoch, indices


def _one_thread(worker: int) -> None:
    # The processes are the parallelism: OpenCV would start a thread for each core in each of them.
    cv2.setNumThreads(1)


class CTLoader(DataLoader):
    """A DataLoader that knows its epoch.

    `fit` calls `iter` more often than there are epochs (to build the model, and once ahead), so an
    epoch counted there is wrong. Here nothing happens before the first batch is asked for, and the
    epoch moves on when the last batch is handed out. A training that is resumed sets `epoch`
    itself, at the beginning of each epoch.
    """

    def __init__(self, dataset: CTDataset, plan: EpochPlan, workers: int = 0):
        super().__init__(
            dataset,
            sampler=_EpochSampler(plan),
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context=START_METHOD if workers > 0 else None,
            timeout=WORKER_TIMEOUT_SECONDS if workers > 0 else 0,
            worker_init_fn=_one_thread if workers > 0 else None,
            # Of its own: torch would draw a number from the global generator on every pass, and
            # the network's dropout would depend on how often somebody looked.
            generator=torch.Generator(),
        )
        self.plan = plan

    @property
    def epoch(self) -> int:
        """The epoch that the next pass delivers."""
        return self.sampler.epoch

    @epoch.setter
    def epoch(self, value: int):
        self.sampler.epoch = value

    def __iter__(self):
        return self._one_pass()

    def _one_pass(self):
        last = len(self)
        for number, batch in enumerate(super().__iter__(), 1):
            if number == last:
                self.sampler.epoch += 1
            yield batch


def epoch_plan(
    samples: Samples,
    indices: np.ndarray | None = None,
    batch_size: int = 32,
    seed: int | None = None,
    balance: bool = False,
) -> EpochPlan:
    """Plan the epochs of some samples; see `batches` for the arguments.

    Raises:
        DataError: no samples, samples without labels that are asked for in training, or balancing
            without both positives and negatives.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise UsageError(f"batch_size is {batch_size!r}; expected a whole number of at least 1.")
    if seed is not None and seed < 0:
        raise UsageError(f"seed is {seed}; expected 0 or more.")
    # A seed means training: there every sample needs its label.
    must_be_labelled = seed is not None and samples.labels is not None
    if indices is None:
        is_labelled = samples.labels[:, 0] >= 0 if must_be_labelled else True
        indices = np.flatnonzero(samples.usable & is_labelled)
    indices = np.asarray(indices)
    kind = {"slice": "slices", "slab": "slabs", "series": "series"}[samples.view.kind]
    if len(indices) == 0:
        nothing = "no sample of the view has a label" if must_be_labelled else "there is no sample"
        raise DataError(f"no {kind} to make batches of: {nothing}, or indices are empty.")
    if indices.dtype.kind not in "iu" or not 0 <= indices.min() <= indices.max() < len(samples):
        raise UsageError(
            f"indices of {kind} are {indices.dtype} from {indices.min()} to {indices.max()};"
            f" expected whole numbers from 0 to {len(samples) - 1}."
        )
    if must_be_labelled and (samples.labels[indices] < 0).any():
        without = int((samples.labels[indices] < 0).any(axis=1).sum())
        raise DataError(
            f"{without} of {len(indices)} {kind} to train on have no label.",
            "Leave them out of indices, or give the cache their labels.",
        )
    positive = np.zeros(len(indices), bool)
    if samples.labels is not None:
        positive = samples.labels[indices, LABELS.index(ANY)] == 1
    if balance and (positive.all() or not positive.any()):
        raise DataError(
            f"{positive.sum()} of {len(positive)} {kind} are positive; balancing needs both kinds.",
            "Train without --balance, or on more data.",
        )
    if balance and seed is None:
        raise UsageError("balancing draws at random: give a seed.")
    return EpochPlan(indices, positive, batch_size, seed, balance, drop_last=seed is not None)


def view_batches(
    cache: CTCache,
    view: View,
    indices: np.ndarray | None = None,
    batch_size: int = 32,
    size: int | None = None,
    seed: int | None = None,
    balance: bool = False,
    augment: str | None = None,
    workers: int = 0,
    intensity: str | Intensity | None = None,
    reverse: bool = False,
    samples: Samples | None = None,
) -> CTLoader:
    """Make batches of the samples of a view.

    Args:
        cache: with labels joined.
        view: what a sample is.
        indices: int (n,), numbers of samples: rows of `cache.slices` for slices and slabs, of
            `cache.series` for series; None takes all that the view uses, with a seed (training)
            those of them that have labels.
        batch_size: samples a batch.
        size: rows and columns of the inputs; None takes the cache's.
        seed: shuffles, balances and augments; None keeps the order (validation, prediction).
        balance: one negative sample for each positive one, drawn anew each epoch.
        augment: "thesis" or "flip" changes the samples at random (see `make_augmentation`), all
            slices of one alike, and needs a seed; None leaves them as they are.
        workers: processes that make batches; 0 makes them in this one. The batches are the same.
        intensity: from HU to input: "windows" (three channels), "wide" or "head-z-score" (one),
            or an `Intensity` of your own; None takes "windows" for slices and "wide" for slabs and
            series, as the thesis.
        reverse: turn volumes upside down with a chance of one half; needs `augment`.
        samples: of this view, when they are made already.

    Returns:
        A torch DataLoader of (float32 inputs, float32 (n, 6)) for `fit`, `evaluate` and `predict`
        on every backend; the inputs are (n, size, size, channels) or
        (n, slices, size, size, channels).

    Raises:
        DataError: see `epoch_plan`.
        StaleError: the cache lacks what the view needs.
    """
    require_augmentation(augment)
    if augment is not None and seed is None:
        raise UsageError("augmentation draws at random: give a seed.")
    if size is not None and not 8 <= size <= 4096:
        raise UsageError(f"size is {size}; expected 8 to 4096 pixels.")
    if reverse and (augment is None or not view.is_volume):
        raise UsageError("reverse turns augmented slabs or series: it needs both.")
    samples = samples or make_samples(cache.slices, cache.series, view)
    intensity = intensity or ("wide" if view.is_volume else "windows")
    plan = epoch_plan(samples, indices, batch_size, seed, balance)
    dataset = CTDataset(
        cache.pixels, samples, size or cache.size, augment, seed, intensity, reverse
    )
    return CTLoader(dataset, plan, workers)


def slice_batches(
    cache: CTCache, indices: np.ndarray | None = None, batch_size: int = 32, **settings
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
    **settings,
) -> CTLoader:
    """Make batches of neighbouring slices with the label of the middle one.

    Args:
        cache, indices, batch_size: as in `view_batches`, which also takes the settings.
        num_slices, edge, tilted: see `View`.
    """
    view = View("slab", num_slices, edge=edge, tilted=tilted)
    return view_batches(cache, view, indices, batch_size, **settings)


def series_batches(
    cache: CTCache,
    indices: np.ndarray | None = None,
    batch_size: int = 1,
    num_slices: int = 60,
    long_series: str = "spread",
    tilted: str = "keep",
    **settings,
) -> CTLoader:
    """Make batches of whole series, labelled positive where any slice is.

    Args:
        cache, indices, batch_size: as in `view_batches`, which also takes the settings.
        num_slices, long_series, tilted: see `View`.
    """
    view = View("series", num_slices, long_series=long_series, tilted=tilted)
    return view_batches(cache, view, indices, batch_size, **settings)
