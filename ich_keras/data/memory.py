"""Memory for batches, used again once nobody holds it.

The system clears new memory page by page, which takes longer than filling it with a batch.
"""

import ctypes
import math
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

MOST_FREE = 3  # blocks that wait to be used again
_free: deque[np.ndarray] = deque()


def _own_memory(num_bytes: int) -> np.ndarray:
    return np.empty(num_bytes, np.uint8)


@dataclass
class _Source:
    allocate: Callable[[int], np.ndarray]


_source = _Source(_own_memory)


def recycled(shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
    """Return an array whose memory may have been that of an earlier one; its values are arbitrary.

    The memory is free again when the array, its views and the tensors made of it are gone.

    Args:
        shape, dtype: of the array.

    >>> recycled((2, 3), np.float32).shape
    (2, 3)
    """
    block = _take(math.prod(shape) * np.dtype(dtype).itemsize)
    return leased(block, shape, dtype, at_end=partial(_give_back, block))


def leased(
    block: np.ndarray,
    shape: tuple[int, ...],
    dtype: npt.DTypeLike,
    offset: int = 0,
    *,
    at_end: Callable[[], object],
) -> np.ndarray:
    """Return an array in a part of a block, and call a function once nobody holds it.

    Args:
        block: uint8 (n,).
        shape, dtype: of the array.
        offset: of its first byte.
        at_end: the function; it may be called at any moment, from any thread.
    """
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    # Views hold the array they come from, which holds this object; with a NumPy array in its place
    # they would hold the block itself.
    lease: Any = (ctypes.c_char * num_bytes).from_buffer(block.data, offset)
    weakref.finalize(lease, at_end).atexit = False
    return np.frombuffer(lease, dtype).reshape(shape)


def allocate_by(allocate: Callable[[int], np.ndarray]) -> None:
    """Take new blocks of this process from a function: number of bytes -> uint8 (n,)."""
    _free.clear()
    _source.allocate = allocate


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
    return _source.allocate(num_bytes)


def _give_back(block: np.ndarray) -> None:
    _free.append(block)
    if len(_free) > MOST_FREE:
        try:
            _free.popleft()
        except IndexError:
            return
