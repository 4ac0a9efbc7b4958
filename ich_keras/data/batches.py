"""Slice batches for `model.fit`: a torch DataLoader, which Keras accepts on every backend.

Worker processes import this module: it must not import keras.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ich_keras.data.augment import make_augmentation, sample_seed
from ich_keras.data.cache import CTCache
from ich_keras.data.inputs import intensity_of, slice_windows
from ich_keras.errors import DataError
from ich_keras.labels import ANY, LABELS
from ich_keras.processes import START_METHOD

WORKER_TIMEOUT_SECONDS = 600


class SliceDataset(Dataset):
    """Whole batches of slices: asked for (epoch, indices), gives (inputs, labels).

    Args:
        cache: where the HU come from.
        size: rows and columns of the inputs.
        augmentation: a name that `make_augmentation` knows; None changes nothing.
        seed: of the augmentation.
        intensity: from HU to input, a key of `ich_keras.data.inputs.INTENSITIES`.
    """

    def __init__(
        self,
        cache: CTCache,
        size: int,
        augmentation: str | None,
        seed: int | None,
        intensity: str = "windows",
    ):
        intensity_of(intensity)
        self._intensity = intensity
        missing = [label for label in LABELS if label not in cache.slices]
        self._labels = (
            None if missing else cache.slices[list(LABELS)].to_numpy(np.float32, na_value=np.nan)
        )
        # Without the tables: this object travels to every worker process.
        self._pixels = cache.pixels
        self._num_slices = len(cache.slices)
        self._size = size
        self._augmentation = augmentation
        self._seed = seed
        self._augment = None

    def __len__(self) -> int:
        return self._num_slices

    def __getstate__(self) -> dict:
        # Each process builds its own pipeline: random state must not be shared by copying.
        return {**self.__dict__, "_augment": None}

    def __getitem__(self, key: tuple[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return one batch.

        Args:
            key: (epoch, int (n,) rows of the cache's slice table).

        Returns:
            float32 (n, size, size, channels) inputs, and float32 (n, 6) labels (NaN where the
            cache has none).
        """
        epoch, indices = key
        intensity = intensity_of(self._intensity)
        windows = slice_windows(self._pixels.slices_hu(indices), self._size, intensity.windows)
        if self._augmentation is not None:
            if self._augment is None:
                self._augment = make_augmentation(self._augmentation)
            for row, index in enumerate(indices):
                windows[row] = self._augment(
                    windows[row], sample_seed(self._seed, epoch, int(index))
                )
        if self._labels is None:
            labels = np.full((len(indices), len(LABELS)), np.nan, np.float32)
        else:
            labels = self._labels[indices]
        return intensity.normalise(windows), labels


@dataclass(frozen=True)
class EpochPlan:
    """Which slices an epoch holds, and in what order: a pure function of (seed, epoch).

    Args:
        indices: int (n,), rows of the cache's slice table.
        positive: bool (n,), whether `any` holds; used to balance.
        batch_size: slices a batch.
        seed: of shuffling and balancing; None keeps the order of `indices`.
        balance: as many negatives as positives, drawn anew each epoch; every slice of the
            smaller class is in every epoch.
        drop_last: leave out a last batch that is not full (when there is a full one): batch
            statistics of a few slices are noise.
    """

    indices: np.ndarray
    positive: np.ndarray
    batch_size: int
    seed: int | None = None
    balance: bool = False
    drop_last: bool = False

    @property
    def num_slices(self) -> int:
        """Slices in an epoch, before a partial batch is dropped."""
        if not self.balance:
            return len(self.indices)
        return 2 * min(int(self.positive.sum()), int((~self.positive).sum()))

    @property
    def num_batches(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(self.num_slices, self.batch_size)
        return full if rest == 0 or (self.drop_last and full) else full + 1

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the epoch's batches: int arrays, rows of the cache's slice table."""
        order = self.indices
        if self.seed is not None:
            # A stream of its own: sample_seed draws from (seed, epoch, index >= 0).
            random = np.random.default_rng([self.seed, epoch, 2**63])
            if self.balance:
                half = self.num_slices // 2
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


class SliceLoader(DataLoader):
    """A DataLoader that knows its epoch.

    `fit` calls `iter` more often than there are epochs (to build the model, and once ahead), so an
    epoch counted there is wrong. Here nothing happens before the first batch is asked for, and the
    epoch moves on when the last batch is handed out. A training that is resumed sets `epoch`
    itself, at the beginning of each epoch.
    """

    def __init__(self, dataset: SliceDataset, plan: EpochPlan, workers: int = 0):
        super().__init__(
            dataset,
            sampler=_EpochSampler(plan),
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context=START_METHOD if workers > 0 else None,
            timeout=WORKER_TIMEOUT_SECONDS if workers > 0 else 0,
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
    slices: pd.DataFrame,
    indices: np.ndarray | None = None,
    batch_size: int = 32,
    seed: int | None = None,
    balance: bool = False,
) -> EpochPlan:
    """Plan the epochs of a slice table; see `slice_batches` for the arguments.

    Raises:
        DataError: no slices, or balancing without both positives and negatives.
    """
    indices = np.arange(len(slices)) if indices is None else np.asarray(indices)
    if len(indices) == 0:
        raise DataError("no slices to make batches of.")
    if ANY in slices:
        positive = slices[ANY].to_numpy()[indices] == 1
    else:
        positive = np.zeros(len(indices), bool)
    if balance and (positive.all() or not positive.any()):
        raise DataError(
            f"{positive.sum()} of {len(positive)} slices are positive; balancing needs both kinds.",
            "Train without --balance, or on more data.",
        )
    if balance and seed is None:
        raise ValueError("balancing draws at random: give a seed.")
    return EpochPlan(indices, positive, batch_size, seed, balance, drop_last=seed is not None)


def slice_batches(
    cache: CTCache,
    indices: np.ndarray | None = None,
    batch_size: int = 32,
    size: int | None = None,
    seed: int | None = None,
    balance: bool = False,
    augment: str | None = None,
    workers: int = 0,
    intensity: str = "windows",
) -> SliceLoader:
    """Make batches of single slices for a 2D network.

    Args:
        cache: with labels joined.
        indices: int (n,), rows of `cache.slices`; None takes all.
        batch_size: slices a batch.
        size: rows and columns of the inputs; None takes the cache's.
        seed: shuffles, balances and augments; None keeps the order (validation, prediction).
        balance: one negative slice for each positive one, drawn anew each epoch.
        augment: "thesis" or "flip" changes the slices at random (see `make_augmentation`) and
            needs a seed; None leaves them as they are.
        workers: processes that make batches; 0 makes them in this one. The batches are the same.
        intensity: from HU to input: "windows" (three channels), "wide" or "head-z-score" (one).

    Returns:
        A torch DataLoader of (float32 (n, size, size, channels), float32 (n, 6)) for `fit`,
        `evaluate` and `predict` on every backend.

    Raises:
        DataError: no slices, or balancing without both positives and negatives.
    """
    if augment is not None and seed is None:
        raise ValueError("augmentation draws at random: give a seed.")
    plan = epoch_plan(cache.slices, indices, batch_size, seed, balance)
    dataset = SliceDataset(cache, size or cache.size, augment, seed, intensity)
    return SliceLoader(dataset, plan, workers)
