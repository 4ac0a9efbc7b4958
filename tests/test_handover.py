"""Arrays go from one process to another in memory that both see, which is used again."""

import gc
import multiprocessing
import os
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ich_keras.data import memory
from ich_keras.data.handover import LEAST_BYTES, Borrower, Lender

LARGE = LEAST_BYTES // 4  # float64 elements


@pytest.fixture
def pair():
    """A lender and a borrower in one process; afterwards memory is its own again."""
    yield Lender(), Borrower()
    memory.allocate_by(memory._own_memory)


def numbers(count, dtype=np.float64):
    return np.random.default_rng(count).normal(0, 99, count).astype(dtype)


@dataclass
class Content:
    name: str
    parts: tuple


def send(pair, content):
    """Send content from the lender to the borrower of a pair in this process."""
    lender, borrower = pair
    # torch takes its own memory back within a process, in place of mapping it a second time.
    return borrower.content(lender.message(content))


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64, np.uint8, bool, ">i4"])
@pytest.mark.parametrize("count", [0, 1, LARGE, 9 * LARGE + 3])
def test_content_arrives_unchanged(pair, dtype, count):
    array = numbers(count).astype(dtype)
    got = send(pair, Content("a", (array, {"few": array[:2]}, torch.ones(2))))
    assert got.name == "a"
    assert got.parts[0].dtype == array.dtype
    np.testing.assert_array_equal(got.parts[0], array)
    np.testing.assert_array_equal(got.parts[1]["few"], array[:2])
    assert got.parts[2].tolist() == [1, 1]


@pytest.mark.parametrize("change", [lambda x: x.T, lambda x: x[:, ::2], lambda x: x[::-1], np.flip])
def test_arrays_in_any_order_arrive_unchanged(pair, change):
    array = numbers(8 * LARGE).reshape(8, LARGE)
    np.testing.assert_array_equal(send(pair, change(array)), change(array))


def test_what_is_made_in_a_block_is_not_copied(pair):
    array = memory.recycled((2, LARGE), np.float64)
    array[...] = 1
    got = send(pair, array[1:])
    array[1, 5] = 7  # the same memory
    assert got[0, 5] == 7
    other = np.ones((2, LARGE))
    got = send(pair, other)
    other[0, 5] = 7  # made elsewhere: copied
    assert got[0, 5] == 1


def test_a_block_is_used_again_once_nobody_holds_the_array(pair):
    lender, borrower = pair
    got = send(pair, numbers(LARGE))
    part = torch.from_numpy(got)[3:4]  # a tensor and a view hold it, too
    expected = part.item()
    del got
    gc.collect()
    assert borrower.returned() == []
    for _ in range(3):
        lender.take_back(borrower.returned())
        send(pair, np.zeros(LARGE))
    assert part.item() == expected
    assert len(lender._blocks) == 2
    del part
    gc.collect()
    # Three loans of zeros, of which the last one and that of `part` have not been returned before.
    keys = borrower.returned()
    assert len(keys) == 2
    lender.take_back(keys)
    assert lender._loans == {}
    assert borrower.returned() == []


def test_blocks_that_are_given_up_are_given_up_on_both_sides(pair):
    lender, borrower = pair
    held = [send(pair, numbers(LARGE)) for _ in range(memory.MOST_FREE + 4)]
    assert len(lender._blocks) == len(borrower._blocks) == memory.MOST_FREE + 4
    held.clear()
    gc.collect()
    lender.take_back(borrower.returned())
    assert len(lender._blocks) == memory.MOST_FREE
    send(pair, "which are gone")
    assert set(lender._blocks) == set(borrower._blocks)


def test_content_that_cannot_be_pickled_takes_no_memory(pair):
    lender, _ = pair
    for _ in range(5):
        with pytest.raises((pickle.PickleError, AttributeError, TypeError)):
            lender.message((numbers(LARGE), lambda: 1))
        assert lender._loans == {}
    assert len(lender._blocks) == 1
    # The next message still tells of the block that was made for the failed one.
    np.testing.assert_array_equal(send(pair, numbers(LARGE)), numbers(LARGE))


def _lend(connection):
    lender = Lender()
    for seed in range(20):
        lender.take_back(connection.recv())
        connection.send_bytes(lender.message((numbers(LARGE - seed), os.getpid())))
    lender.take_back(connection.recv())
    connection.send_bytes(lender.message(len(lender._blocks)))
    connection.recv()


def test_two_processes_share_few_blocks():
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_lend, args=(there,), daemon=True)
    process.start()
    there.close()
    borrower = Borrower()
    for seed in range(20):
        here.send(borrower.returned())
        array, pid = borrower.content(here.recv_bytes())
        assert pid == process.pid
        np.testing.assert_array_equal(array, numbers(LARGE - seed))
        array[:] = 0  # writable
    del array
    here.send(borrower.returned())
    assert borrower.content(here.recv_bytes()) <= 2
    here.close()
    process.join(30)
    assert process.exitcode is not None
