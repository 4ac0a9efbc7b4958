"""How worker processes are started, the same way everywhere."""

import multiprocessing

# Forking a process that runs threads (torch, OpenCV) can hang; Windows has no forkserver.
_METHODS = multiprocessing.get_all_start_methods()
START_METHOD = "forkserver" if "forkserver" in _METHODS else "spawn"


def process_context():
    """Return the multiprocessing context for pools of workers."""
    return multiprocessing.get_context(START_METHOD)
