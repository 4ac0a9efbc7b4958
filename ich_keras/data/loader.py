"""The loader: makes batches in this process or in worker processes, and notices when one fails.

It is a torch DataLoader only because Keras accepts one on every backend. The worker processes are
its own: those of torch are watched through signals, which do not reach us from processes that a
fork server started, so a dead one was noticed only when the time-out had passed.

Worker processes import this module: it must not import keras.
"""

import contextlib
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler, default_convert

from ich_keras.data.device_inputs import DeviceInputs
from ich_keras.data.epochs import EpochPlan
from ich_keras.data.workers import Task, WorkerPool
from ich_keras.processes import START_METHOD
from ich_keras.ranks import Rank

WORKER_TIMEOUT_SECONDS = 600
BATCHES_AHEAD = 2  # per worker


class CTLoader(DataLoader):
    """A DataLoader that knows its epoch.

    `fit` calls `iter` more often than there are epochs (to build the model, and once ahead), so an
    epoch counted there is wrong. Here nothing happens before the first batch is asked for, and the
    epoch moves on when the last batch is handed out. A training that is resumed sets `epoch`
    itself, at the beginning of each epoch.

    An error while a batch is made has a note that names the batch. The worker processes start with
    the first batch and stay for further passes; if one fails, the next pass starts new ones.

    Args:
        dataset: `dataset[epoch, indices]` gives a batch.
        plan: which samples are in a batch.
        workers: processes that make batches; 0 makes them in this one.
        inputs: makes the inputs on a device, from what the dataset gives; None takes that as it is.

    Where several processes train, `rank` says which part of each batch this one gives; it may have
    no samples when the batch has fewer than there are processes.

    Raises (when a batch is asked for):
        EnvironmentProblem: a worker process died, could not be started, could not hand over a
            batch, or gave none for `timeout` seconds.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: EpochPlan,
        workers: int = 0,
        inputs: DeviceInputs | None = None,
    ) -> None:
        super().__init__(
            dataset,
            sampler=_EpochSampler(plan),
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context=START_METHOD if workers > 0 else None,
            timeout=WORKER_TIMEOUT_SECONDS if workers > 0 else 0,
        )
        self.plan = plan
        self.rank = Rank()
        self.failure: Exception | None = None
        self._pool: WorkerPool | None = None
        self._inputs = inputs

    @property
    def epoch(self) -> int:
        """The epoch that the next pass delivers."""
        return self.sampler.epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self.sampler.epoch = value

    def __iter__(self) -> Iterator[Any]:  # as the base class has it: any iterator will do
        return self._one_pass()

    def _one_pass(self) -> Iterator[Any]:
        last = len(self)
        batches = self._by_workers() if self.num_workers else self._in_this_process()
        if self._inputs is not None:
            batches = _on_device(batches, self._inputs)
        try:
            for number, batch in enumerate(batches, 1):
                if number == last:
                    self.sampler.epoch += 1
                yield batch if self._has_samples(number) else [part[:0] for part in batch]
        except Exception as error:
            self.failure = error
            raise

    def _tasks(self) -> Iterator[Task]:
        for number, (epoch, indices) in enumerate(self.sampler, 1):
            own = indices[self.rank.part(len(indices))]
            # No dataset makes a batch of nothing: what is made instead is emptied afterwards.
            own = own if self._has_samples(number) else indices[:1]
            yield Task(epoch, own, f"batch {number} of {len(self)} in epoch {epoch + 1}")

    def _has_samples(self, number: int) -> bool:
        """Tell whether this process has a part of a batch, counted from 1."""
        before = (number - 1) * self.plan.batch_size
        part = self.rank.part(min(self.plan.batch_size, self.plan.num_samples - before))
        return part.start < part.stop

    def _in_this_process(self) -> Iterator[Any]:
        for task in self._tasks():
            try:
                batch = default_convert(self.dataset[task.epoch, task.indices])
            except Exception as error:
                error.add_note(f"This was {task}.")
                raise
            yield batch

    def _by_workers(self) -> Iterator[Any]:
        if self._pool is None or self._pool.has_ended:
            self._pool = WorkerPool(self.dataset, self.num_workers, self.multiprocessing_context)
            weakref.finalize(self, self._pool.end)
        pool, begun = self._pool, deque[Task]()
        for task in self._tasks():
            pool.begin(task)
            begun.append(task)
            if len(begun) >= BATCHES_AHEAD * self.num_workers:
                yield pool.batch_of(begun.popleft(), self.timeout)
        while begun:
            yield pool.batch_of(begun.popleft(), self.timeout)


def _on_device(batches: Iterator[Any], inputs: DeviceInputs) -> Iterator[Any]:
    """Make and send the next batch before one is handed out: a GPU then has work while it comes.

    An error in the next batch therefore comes in place of the one before it.
    """
    waiting = None
    for batch in batches:
        sent = inputs.send(batch)
        if waiting is not None:
            yield inputs.make(waiting)
        waiting = sent
    if waiting is not None:
        yield inputs.make(waiting)


@contextlib.contextmanager
def own_errors(loader: CTLoader) -> Iterator[None]:
    """Raise a loader's error as it was, where the code of the block raises another in its place.

    tensorflow iterates in a thread of its own, and turns every error into one of its own kinds.
    """
    loader.failure = None
    try:
        yield
    except Exception as error:
        if loader.failure is not None and error is not loader.failure:
            raise loader.failure from error
        raise


class _EpochSampler(Sampler):
    """Yields (epoch, indices) for the epoch it was told."""

    def __init__(self, plan: EpochPlan) -> None:
        self.plan = plan
        self.epoch = 0

    def __len__(self) -> int:
        return self.plan.num_batches

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        epoch = self.epoch
        for indices in self.plan.batches(epoch):
            yield epoch, indices
