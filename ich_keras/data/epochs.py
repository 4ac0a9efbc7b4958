"""Which samples an epoch holds, and in what order."""

from dataclasses import dataclass

import numpy as np

from ich_keras.data.labels import is_positive
from ich_keras.data.views import SAMPLE_NAMES, Samples
from ich_keras.errors import DataError, UsageError


@dataclass(frozen=True)
class EpochPlan:
    """Which samples an epoch holds, and in what order: a pure function of (seed, epoch).

    >>> plan = EpochPlan(np.arange(5), np.zeros(5, bool), batch_size=2)
    >>> [batch.tolist() for batch in plan.batches(epoch=0)]
    [[0, 1], [2, 3], [4]]

    Args:
        indices: int (n,), numbers of samples.
        positive: bool (n,), whether `any` holds; used to balance.
        batch_size: samples per batch.
        seed: of shuffling and balancing; None keeps the order of `indices`.
        balance: as many negatives as positives, redrawn each epoch; every sample of
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


def epoch_plan(
    samples: Samples,
    indices: np.ndarray | None = None,
    batch_size: int = 32,
    seed: int | None = None,
    balance: bool = False,
) -> EpochPlan:
    """Plan the epochs of some samples; see `ich_keras.data.batches.view_batches` for the arguments.

    Raises:
        DataError: no samples, samples without labels that are asked for in training, or balancing
            without both positives and negatives.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise UsageError(f"batch_size is {batch_size!r}; expected a whole number of at least 1.")
    if seed is not None and seed < 0:
        raise UsageError(f"seed is {seed}; expected 0 or more.")
    labels = samples.labels
    # A seed means training: there every sample needs its label.
    must_be_labelled = seed is not None and labels is not None
    is_given = indices is not None
    if indices is None:
        usable = samples.usable
        if must_be_labelled and labels is not None:
            usable = usable & (labels >= 0).any(axis=1)
        indices = np.flatnonzero(usable)
    indices = np.asarray(indices)
    kind = SAMPLE_NAMES[samples.view.kind]
    if len(indices) == 0:
        reason = "no sample of the view has a label" if must_be_labelled else "there is no sample"
        reason = "`indices` is empty" if is_given else reason
        raise DataError(f"there are no {kind} to make batches of: {reason}.")
    if indices.dtype.kind not in "iu" or not 0 <= indices.min() <= indices.max() < len(samples):
        raise UsageError(
            f"indices of {kind} are {indices.dtype} from {indices.min()} to {indices.max()};"
            f" expected whole numbers from 0 to {len(samples) - 1}."
        )
    lacks = np.zeros(len(indices), bool) if labels is None else (labels[indices] < 0).all(axis=1)
    if must_be_labelled and lacks.any():
        without = int(lacks.sum())
        raise DataError(
            f"{without} of {len(indices)} {kind} to train on have no label.",
            "Leave them out of indices, or give the cache their labels.",
        )
    positive = np.zeros(len(indices), bool)
    if labels is not None:
        positive = is_positive(labels[indices], samples.label_set)
    if balance and samples.label_set.exclusive:
        raise UsageError(
            "balancing is of positive and negative samples; exclusive labels have neither.",
            "Train without --balance.",
        )
    if balance and (positive.all() or not positive.any()):
        raise DataError(
            f"{positive.sum()} of {len(positive)} {kind} are positive; balancing needs both kinds.",
            "Train without --balance, or on more data.",
        )
    if balance and seed is None:
        raise UsageError("balancing draws at random: give a seed.")
    return EpochPlan(indices, positive, batch_size, seed, balance, drop_last=seed is not None)
