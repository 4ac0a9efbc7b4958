"""Work for `run_ranks`: process 1 fails, and process 0 would go on for long."""

import time

from ich_keras.ranks import this_rank


def one_fails(code: int) -> int:
    """Return the code in process 1, and after ten minutes in process 0."""
    if this_rank().is_first:
        time.sleep(600)
    return code
