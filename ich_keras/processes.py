"""Worker processes: how they start, and how they end with the process that started them."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Forking a process that runs threads (torch, OpenCV) can hang; Windows has no forkserver.
_METHODS = multiprocessing.get_all_start_methods()
START_METHOD = "forkserver" if "forkserver" in _METHODS else "spawn"


def usable_cores() -> int:
    """Return how many cores this process may use.

    >>> usable_cores() >= 1
    True
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    return (len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()) or 1


def usable_threads() -> int:
    """Return OMP_NUM_THREADS (its first level), or if unset the number of usable cores.

    >>> usable_threads() >= 1
    True
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(asked) if asked.isdecimal() and int(asked) else usable_cores()


def process_pool(
    workers: int, begin: Callable[..., Any] | None = None, *args: Any
) -> ProcessPoolExecutor:
    """Return a pool of worker processes that end with this process, even if it is killed.

    Args:
        workers: how many.
        begin: called with `args` in each worker before any work.
    """
    context = multiprocessing.get_context(START_METHOD)
    return ProcessPoolExecutor(workers, context, _begin, (begin, *args))


def map_ahead(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Yield function(item) in order, as `pool.map` does, but with a bound on work done ahead.

    Args:
        pool: runs the function.
        function: called with one item.
        items: read only as far as needed.
        ahead: how many results may be under way or waiting, for results too large to hold
            all of them.

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> with ThreadPoolExecutor(2) as pool:
    ...     list(map_ahead(pool, abs, [-3, -2, -1], ahead=2))
    [3, 2, 1]
    """
    begun: deque[Future[Result]] = deque()
    for item in items:
        begun.append(pool.submit(function, item))
        if len(begun) >= ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def begin_worker() -> None:
    """Prepare this worker process: it leaves Ctrl-C to its parent, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _begin(begin: Callable[..., Any] | None, *args: Any) -> None:
    begin_worker()
    if begin is not None:
        begin(*args)


def _end_with_parent() -> None:
    # A killed parent does not stop its workers: they would finish their work and wait forever.
    parent = multiprocessing.parent_process()
    if parent is not None:  # there is one in every worker process
        parent.join()
        os._exit(1)
