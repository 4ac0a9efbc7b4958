"""Several processes of this machine as the ranks of one training, and their common end."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import Any

from ich_keras.errors import EnvironmentProblem
from ich_keras.processes import begin_worker, usable_cores
from ich_keras.ranks import ADDRESS, LOCAL, NUMBER, OF, PORT

# How long the others have to clean up when one has failed; then they are killed.
SECONDS_TO_END = 10
_HOST = "127.0.0.1"
_THREADS = "OMP_NUM_THREADS"


def run_ranks(count: int, work: Callable[..., int], *args: Any) -> int:
    """Run a function in several processes, each with the environment that torchrun would give it.

    If one of them fails or dies, the others are ended too. So they are if this process is
    interrupted or killed.

    Args:
        count: how many processes.
        work: at the top level of a module; returns the exit code.
        args: of `work`; they must be picklable.

    Returns:
        0 when all returned 0, else the exit code of the first that did not.

    Raises:
        EnvironmentProblem: a signal killed one of them.
    """
    context = multiprocessing.get_context("spawn")
    os.environ.setdefault(_THREADS, str(max(1, usable_cores() // count)))
    port = _free_port()
    processes = [
        context.Process(target=_be_rank, args=(number, count, port, work, args))
        for number in range(count)
    ]
    with _ended(processes):
        for process in processes:
            process.start()
        number = _first_failure(processes)
    if number is None:
        return 0
    code = processes[number].exitcode
    assert code is not None  # it has ended
    if code < 0:
        raise EnvironmentProblem(
            f"process {number} of the {count} that train was killed by"
            f" {signal.Signals(-code).name}.",
            "It may have run out of memory: try a smaller --batch-size. What finished an epoch is"
            " resumed with --resume.",
        )
    return code


def _be_rank(number: int, count: int, port: int, work: Callable[..., int], args: tuple) -> None:
    os.environ |= {
        NUMBER: str(number),
        OF: str(count),
        LOCAL: str(number),
        ADDRESS: _HOST,
        PORT: str(port),
    }
    begin_worker()
    code = work(*args)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if code:
        # At once: taking Python, torch and Keras down lasts seconds, in which others would go on.
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((_HOST, 0))
        return listener.getsockname()[1]


def _first_failure(processes: list[SpawnProcess]) -> int | None:
    """Wait until all have ended well, or one has not; return its number."""
    running: dict[Any, int] = {process.sentinel: n for n, process in enumerate(processes)}
    while running:
        for ended in wait(list(running)):
            number = running.pop(ended)
            processes[number].join()
            if processes[number].exitcode:
                return number
    return None


@contextlib.contextmanager
def _ended(processes: list[SpawnProcess]) -> Iterator[None]:
    """End what still runs after the block, whatever ended the block."""
    try:
        yield
    finally:
        running = [process for process in processes if process.pid is not None]
        try:
            for process in running:
                process.terminate()
            until = time.monotonic() + SECONDS_TO_END
            for process in running:
                process.join(max(0, until - time.monotonic()))
        finally:
            for process in running:
                process.kill()
                process.join()
