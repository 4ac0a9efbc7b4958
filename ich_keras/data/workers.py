"""The loader's worker processes: starting them, giving them tasks, and telling how one failed.

Worker processes import this module: it must not import keras.
"""

import contextlib
import os
import pickle
import random
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, default_convert

from ich_keras.data.handover import Borrower, Lender
from ich_keras.errors import EnvironmentProblem
from ich_keras.processes import begin_worker

_SECONDS_TO_END = 2  # for a worker that is no longer needed, or that is just dying
_SAMPLES_TO_NAME = 8

# What an object raises that cannot be pickled, or made again.
_NO_PICKLE = (pickle.PickleError, AttributeError, TypeError, ValueError)
# What a worker answers.
_BATCH, _ERROR, _NOT_SENT = "batch", "error", "not sent"

_FEWER = "Use fewer workers (data.loader_workers) or smaller batches."
_HINTS = {
    "SIGKILL": f"Often the machine ran out of memory. {_FEWER}",
    "SIGBUS": "Shared memory (/dev/shm) is too small, or a file of the cache was cut short while it"
    f" was read. In a container, give it more with --shm-size. {_FEWER}",
}
_NOT_STARTED = "A script that uses workers needs an `if __name__ == '__main__':` guard."
_OTHERWISE = "Without workers (data.loader_workers 0), the same batch shows the cause."


@dataclass(eq=False)
class Task:
    """A batch to be made.

    Args:
        epoch, indices: what to ask the dataset.
        name: of the batch, for messages.
        worker: who makes it.
        answer: (kind, content), once there is one.
    """

    epoch: int
    indices: np.ndarray
    name: str
    worker: "_Worker | None" = None
    answer: tuple[str, Any] | None = None

    def __str__(self) -> str:
        named = ", ".join(str(index) for index in self.indices[:_SAMPLES_TO_NAME])
        more = len(self.indices) - _SAMPLES_TO_NAME
        return f"{self.name} (samples {named}{f' and {more} more' if more > 0 else ''})"


@dataclass(eq=False)
class _Worker:
    """A worker process.

    Args:
        process, connection: it, and the way to it.
        borrower: reads its answers.
        tasks: what it was given and has not answered, in order.
        has_started: whether it is ready for tasks.
    """

    process: BaseProcess
    connection: Connection
    borrower: Borrower = field(default_factory=Borrower)
    tasks: deque[Task] = field(default_factory=deque)
    has_started: bool = False

    def receive(self) -> tuple[Task, bytes] | None:
        """Receive an answer and the task that it answers; None for the first message."""
        message = self.connection.recv_bytes()
        if self.has_started:
            return self.tasks.popleft(), message
        self.has_started = True
        return None


class WorkerPool:
    """Worker processes, each with a connection of its own: no lock is shared that one that dies
    could hold, and it is known what each is at work on.

    Args:
        dataset: travels to each worker.
        count: of workers.
        context: starts processes.
    """

    def __init__(self, dataset: Dataset, count: int, context: Any) -> None:
        self.has_ended = False
        self._workers: list[_Worker] = []
        self._turn = 0
        self._lock = threading.RLock()  # tensorflow's threads
        self._owner = os.getpid()
        with self._ends_with_an_error():
            for number in range(count):
                here, there = context.Pipe()
                process = context.Process(target=_work, args=(there, dataset, number), daemon=True)
                try:
                    process.start()
                except (OSError, EOFError) as error:
                    raise EnvironmentProblem(
                        f"worker process {number + 1} of {count} of the loader could not be"
                        f" started ({type(error).__name__}: {error}).",
                        f"{_NOT_STARTED} {_FEWER}",
                    ) from error
                there.close()  # so that the connection ends when the worker does
                self._workers.append(_Worker(process, here))

    def begin(self, task: Task) -> None:
        """Give a task to the worker whose turn it is."""
        with self._ends_with_an_error():
            task.worker = worker = self._workers[self._turn % len(self._workers)]
            self._turn += 1
            try:
                worker.connection.send((worker.borrower.returned(), task.epoch, task.indices))
            except OSError as error:
                raise _death(worker, task) from error
            worker.tasks.append(task)

    def batch_of(self, task: Task, timeout: float) -> Any:
        """Wait for the batch of a task."""
        with self._ends_with_an_error():
            while task.answer is None:
                self._receive(task, timeout)
        kind, content = task.answer
        if kind == _BATCH:
            return content
        if kind == _NOT_SENT:
            raise _not_sent(task, content)
        raise _unpacked(content, task)

    def end(self) -> None:
        """End the workers."""
        self.has_ended = True
        if os.getpid() != self._owner:
            return  # a fork of the process that started them
        for worker in self._workers:
            worker.connection.close()  # which ends one that is not at work
        deadline = time.monotonic() + _SECONDS_TO_END
        for worker in self._workers:
            worker.process.join(max(0, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join(_SECONDS_TO_END)
        self._workers.clear()

    @contextlib.contextmanager
    def _ends_with_an_error(self) -> Iterator[None]:
        # Ctrl-C as well: half a message may have been read.
        with self._lock:
            if self.has_ended:
                raise EnvironmentProblem(
                    "the loader's worker processes have ended after an earlier error.",
                    "Begin a new pass over the loader.",
                )
            with contextlib.ExitStack() as stack:
                stack.callback(self.end)
                yield
                stack.pop_all()

    def _receive(self, awaited: Task, timeout: float) -> None:
        """Receive one answer from the worker of a task; it may be that of an earlier task."""
        worker = awaited.worker
        assert worker is not None  # it was begun
        sentinels = {other.process.sentinel: other for other in self._workers}
        ready = wait([worker.connection, *sentinels], timeout)
        for sentinel, other in sentinels.items():
            if sentinel in ready:
                raise _death(other, awaited)
        if not ready:
            raise _hang(worker, awaited, timeout)
        # A worker that is stopped may hang us in the middle of an answer.
        watch = threading.Timer(timeout, worker.process.kill)
        watch.daemon = True
        watch.start()
        began = time.monotonic()
        try:
            received = worker.receive()
            if received is not None:
                task, message = received
                # This may fetch memory from the worker.
                kind, content = worker.borrower.content(message)
                task.answer = kind, default_convert(content) if kind == _BATCH else content
        except (EOFError, OSError, RuntimeError) as error:
            if time.monotonic() - began >= timeout:
                raise _hang(worker, awaited, timeout) from error
            worker.process.join(_SECONDS_TO_END)
            if isinstance(error, EOFError | ConnectionError) or not worker.process.is_alive():
                raise _death(worker, awaited) from error
            raise _not_sent(awaited, f"{type(error).__name__}: {error}") from error
        finally:
            watch.cancel()


def _death(worker: _Worker, awaited: Task) -> EnvironmentProblem:
    """Return the error for a worker that has died."""
    worker.process.join(_SECONDS_TO_END)
    # What it has finished cannot be the cause.
    with contextlib.suppress(EOFError, OSError):
        while worker.connection.poll():
            worker.receive()
    how, hint = _ending(worker)
    if not worker.has_started:
        when = f"while it was starting; {awaited} was awaited"
    elif worker.tasks:
        when = f"at work on {worker.tasks[0]}"
    else:
        when = f"between batches; {awaited} was awaited"
    return EnvironmentProblem(f"a worker process of the loader {how}, {when}.", hint)


def _ending(worker: _Worker) -> tuple[str, str]:
    """Return how a worker process ended, and what to do about it."""
    code = worker.process.exitcode
    if code is None:
        return "closed its connection", _OTHERWISE
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"was killed by {name}", _HINTS.get(name, _OTHERWISE)
    return f"ended with exit code {code}", _OTHERWISE if worker.has_started else _NOT_STARTED


def _hang(worker: _Worker, awaited: Task, timeout: float) -> EnvironmentProblem:
    task = worker.tasks[0] if worker.tasks else awaited
    return EnvironmentProblem(
        f"a worker process of the loader gave no batch for {timeout:g} s, at work on {task}.",
        "A drive that does not answer, or an augmentation of your own that hangs?",
    )


def _not_sent(task: Task, reason: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"a worker process of the loader could not hand over {task}: {reason}.",
        "Shared memory (/dev/shm) is too small, or too many files are open (`ulimit -n`)."
        f" {_FEWER}",
    )


def _work(connection: Connection, dataset: Dataset, number: int) -> None:
    """Answer tasks, until there are no more: what a worker process runs."""
    begin_worker()
    # The processes are the parallelism: OpenCV would start a thread for each core in each of them.
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    # For an augmentation that, against the rules, draws from a global generator.
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    torch.manual_seed(number)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent needs no more
        connection.send_bytes(b"ready")
        lender = Lender()
        while True:
            returned, *key = connection.recv()
            lender.take_back(returned)
            connection.send_bytes(_answer(lender, dataset, tuple(key)))


def _answer(lender: Lender, dataset: Dataset, key: tuple[int, np.ndarray]) -> bytes:
    answer: tuple[str, Any]
    try:
        answer = _BATCH, dataset[key]
    except Exception as error:  # noqa: BLE001 (whatever it is, it rises in the parent)
        answer = _ERROR, _packed(error)
    try:
        return lender.message(answer)
    except (OSError, RuntimeError, *_NO_PICKLE) as error:  # no shared memory, or no pickle
        return lender.message((_NOT_SENT, f"{type(error).__name__}: {error}"))


def _packed(error: Exception) -> tuple[bytes | None, str, str]:
    """Return an error in a form that can be sent: pickled if possible, its text, its traceback."""
    text = f"{type(error).__name__}: {error}"
    try:
        pickled = pickle.dumps(error)
    except _NO_PICKLE:
        pickled = None
    return pickled, text, traceback.format_exc()


def _unpacked(packed: tuple[bytes | None, str, str], task: Task) -> Exception:
    pickled, text, trace = packed
    error = None
    if pickled is not None:
        # The usual case: an __init__ with other arguments than those it passes on.
        with contextlib.suppress(ImportError, *_NO_PICKLE):
            error = pickle.loads(pickled)
    if not isinstance(error, Exception):
        error = RuntimeError(text)
    error.add_note(f"This was {task}, in a worker process:\n{trace}")
    return error
