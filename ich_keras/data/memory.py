"""Memory for batches, used again once nobody holds it.

The system clears new memory page by page, which takes longer than filling it with a batch.
"""

import ctypes
import math
import weakref
from collections import deque
from typing import Any

import numpy as np

MOST_FREE = 3  # blocks that wait to be used again
_free: deque[np.ndarray] = deque()


def recycled(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Return an array whose memory may have been that of an earlier one; its values are arbitrary.

    The memory is free again when the array, its views and the tensors made of it are gone.

    Args:
        shape, dtype: of the array.

    >>> recycled((2, 3), np.float32).shape
    (2, 3)
    """
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    block = _take(num_bytes)
    # Views hold the array they come from, which holds this object; with a NumPy array in its place
    # they would hold the block itself.
    lease: Any = (ctypes.c_char * num_bytes).from_buffer(block.data)
    weakref.finalize(lease, _give_back, block).atexit = False
    return np.frombuffer(lease, dtype).reshape(shape)


def _take(num_bytes: int) -> np.ndarray:
    # Without a lock: a block may be given back at any moment, in the middle of this function too.
    for _ in range(len(_free)):
        try:
            block = _free.popleft()
        except IndexError:
            break
        if num_bytes <= len(block) <= 2 * num_bytes:
            return block
        _free.append(block)
    return np.empty(num_bytes, np.uint8)


def _give_back(block: np.ndarray) -> None:
    _free.append(block)
    if len(_free) > MOST_FREE:
        try:
            _free.popleft()
        except IndexError:
            return
