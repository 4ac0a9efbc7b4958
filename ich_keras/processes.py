"""How worker processes are started, and that they end with who started them."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

# Forking a process that runs threads (torch, OpenCV) can hang; Windows has no forkserver.
_METHODS = multiprocessing.get_all_start_methods()
START_METHOD = "forkserver" if "forkserver" in _METHODS else "spawn"


def process_pool(workers: int, begin: Callable | None = None, *args) -> ProcessPoolExecutor:
    """Return a pool of worker processes that end when this process ends, however it does.

    Args:
        workers: how many.
        begin: called with `args` in each of them before any work.
    """
    context = multiprocessing.get_context(START_METHOD)
    return ProcessPoolExecutor(workers, context, _begin, (begin, *args))


def _begin(begin: Callable | None, *args) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if begin is not None:
        begin(*args)


def _end_with_parent() -> None:
    # A parent that is killed stops nobody: its workers would go on, and then wait for ever.
    multiprocessing.parent_process().join()
    os._exit(1)
