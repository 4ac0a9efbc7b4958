"""Hands arrays from a worker process to its parent without a copy, in memory that both see.

torch's own way makes a new piece of shared memory for each tensor of each batch: clearing it,
copying into it and mapping it take longer than making a batch of slices. Here blocks of shared
memory are used again, and an array that was made in one (`ich_keras.data.memory.recycled`) stays
where it is: only its place is sent.

Worker processes import this module: it must not import keras.
"""

import io
import itertools
import pickle
import weakref
from collections import deque
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import torch

from ich_keras.data import memory

LEAST_BYTES = 1 << 16  # a smaller array travels by value: its place costs as much
_NUMERIC = "biuf"


class _Place(NamedTuple):
    """Where an array lies.

    Args:
        key: of the loan, unlike all others of this lender.
        block: number of the block.
        offset: of the first byte.
        dtype, shape: of the array.
    """

    key: int
    block: int
    offset: int
    dtype: str
    shape: tuple[int, ...]


class Lender:
    """The worker's side: makes messages whose arrays stay in this process's blocks.

    From the first one on, `recycled` takes the memory of this process from shared blocks.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._keys = itertools.count()
        self._blocks: dict[int, torch.Tensor] = {}
        self._new: list[int] = []
        self._gone: deque[int] = deque()
        self._loans: dict[int, np.ndarray] = {}
        memory.allocate_by(self._allocate)

    def message(self, content: Any) -> bytes:
        """Return a message with any content that can be pickled.

        Raises:
            OSError, RuntimeError: there is no shared memory left.
            pickle.PickleError, AttributeError, TypeError, ValueError: it cannot be pickled.
        """
        lent: dict[int, np.ndarray] = {}
        body = io.BytesIO()
        _Pickler(body, self, lent).dump(content)
        new = {number: self._blocks[number] for number in self._new if number in self._blocks}
        gone = [self._gone.popleft() for _ in range(len(self._gone))]
        head = io.BytesIO()
        ForkingPickler(head, pickle.HIGHEST_PROTOCOL).dump((new, gone))
        self._new.clear()
        self._loans |= lent
        return head.getvalue() + body.getvalue()

    def take_back(self, keys: list[int]) -> None:
        """End loans: the parent has no use for these arrays any more."""
        for key in keys:
            del self._loans[key]

    def lend(self, array: np.ndarray) -> tuple[_Place, np.ndarray]:
        """Return the place of an array, and the array that holds it: a copy, if need be."""
        place = self._place(array)
        if place is None:
            room = memory.recycled(array.shape, array.dtype)
            room[...] = array
            array, place = room, self._place(room)
            assert place is not None  # all that `recycled` gives lies in a block
        return place, array

    def _place(self, array: np.ndarray) -> _Place | None:
        if not array.flags.c_contiguous:
            return None
        address = array.__array_interface__["data"][0]
        for number, block in list(self._blocks.items()):  # garbage collection may forget one
            offset = address - block.data_ptr()
            if offset >= 0 and offset + array.nbytes <= block.nbytes:
                return _Place(next(self._keys), number, offset, array.dtype.str, array.shape)
        return None

    def _allocate(self, num_bytes: int) -> np.ndarray:
        block = torch.empty(num_bytes, dtype=torch.uint8).share_memory_()
        number = next(self._numbers)
        self._blocks[number] = block
        self._new.append(number)
        array = block.numpy()
        weakref.finalize(array, self._forget, number).atexit = False
        return array

    def _forget(self, number: int) -> None:
        del self._blocks[number]
        self._gone.append(number)


class Borrower:
    """The parent's side: reads the messages of one lender."""

    def __init__(self) -> None:
        self._blocks: dict[int, np.ndarray] = {}
        self._returned: deque[int] = deque()

    def content(self, message: bytes) -> Any:
        """Return the content of a message. Its arrays may be written to.

        Raises:
            OSError, RuntimeError: the memory of a new block cannot be had.
        """
        stream = io.BytesIO(message)
        new, gone = pickle.Unpickler(stream).load()
        self._blocks |= {number: block.numpy() for number, block in new.items()}
        content = _Unpickler(stream, self).load()
        for number in gone:
            self._blocks.pop(number, None)
        return content

    def returned(self) -> list[int]:
        """Return the keys of the loans that have ended since the last call."""
        return [self._returned.popleft() for _ in range(len(self._returned))]

    def borrow(self, place: _Place) -> np.ndarray:
        """Return the array at a place; the loan ends when the array, its views and the tensors
        made of it are gone."""
        return memory.leased(
            self._blocks[place.block],
            place.shape,
            place.dtype,
            offset=place.offset,
            at_end=partial(self._returned.append, place.key),
        )


class _Pickler(ForkingPickler):
    def __init__(self, file: io.BytesIO, lender: Lender, lent: dict[int, np.ndarray]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._lender = lender
        self._lent = lent

    def persistent_id(self, item: Any) -> tuple | None:
        if type(item) is not np.ndarray or item.dtype.kind not in _NUMERIC:
            return None
        if item.nbytes < LEAST_BYTES:
            return None
        place, array = self._lender.lend(item)
        self._lent[place.key] = array
        return tuple(place)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, borrower: Borrower) -> None:
        super().__init__(file)
        self._borrower = borrower

    def persistent_load(self, place: tuple) -> np.ndarray:
        return self._borrower.borrow(_Place(*place))
