"""Seeds: one for each sample in each epoch, and one for each step of its augmentation.

Every draw is a pure function of (seed, epoch, index): batches do not depend on the number of
worker processes, and a resumed training sees what an uninterrupted one would have seen.
"""

from collections.abc import Sequence

import numpy as np

_WORD = 2**32
_HALF = np.uint32(16)
_POOL = 4
_TARGETS = [[target for target in range(_POOL) if target != source] for source in range(_POOL)]


def _constants() -> list[np.ndarray]:
    """Return the constants of SeedSequence's hashes: of the first four, then of three by source.

    Each hash takes a constant and its successor, and the next hash begins with that successor.
    """
    constants = [0x43B0D7E5]
    for _ in range(_POOL * _POOL):
        constants.append(constants[-1] * 0x931E8875 % _WORD)
    ends = [(0, _POOL)] + [(_POOL + 3 * k, _POOL + 3 * (k + 1)) for k in range(_POOL)]
    column = np.array(constants, np.uint32)[:, np.newaxis]
    return [column[begin : end + 1] for begin, end in ends]


_CONSTANTS = _constants()


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Return the random seed of one sample in one epoch, 32 bits.

    >>> sample_seed(0, 0, 0) == sample_seed(0, 0, 0) != sample_seed(0, 1, 0)
    True
    """
    return int(np.random.SeedSequence([seed, epoch, index]).generate_state(1)[0])


def sample_seeds(seed: int, epoch: int, indices: np.ndarray) -> list[int]:
    """Return `sample_seed` of several samples.

    >>> sample_seeds(3, 1, np.array([0, 7])) == [sample_seed(3, 1, 0), sample_seed(3, 1, 7)]
    True
    """
    if max(seed, epoch, *indices.tolist()) >= _WORD:
        return [sample_seed(seed, epoch, index) for index in indices.tolist()]
    return _first_states([np.full(len(indices), seed), np.full(len(indices), epoch), indices])


def step_seed(seed: int, step: int) -> int:
    """Return the seed of one step of an augmentation, from that of a sample."""
    return sample_seed(seed, 0, step) if step else seed


def step_seeds(seeds: list[int], steps: Sequence[int]) -> list[list[int]]:
    """Return `step_seed` of several samples, whose seeds have 32 bits, for each of several steps.

    >>> step_seeds([5, 6], (2, 3)) == [[step_seed(n, step) for n in (5, 6)] for step in (2, 3)]
    True
    """
    count = len(seeds)
    # All at once: on short arrays, NumPy's calls take longer than its arithmetic.
    words = [np.tile(seeds, len(steps)), np.zeros(count * len(steps)), np.repeat(steps, count)]
    states = _first_states(words)
    return [states[row * count : (row + 1) * count] for row in range(len(steps))]


def _first_states(entropy: list[np.ndarray]) -> list[int]:
    """Return what `SeedSequence(words).generate_state(1)` gives, for arrays of words.

    A SeedSequence takes microseconds for each sample. Its arithmetic is fixed: NumPy promises the
    same states in all versions.

    Args:
        entropy: three arrays of whole numbers below 2**32.

    Source:
        M. O'Neill, "Developing a seed_seq Alternative" (2015); numpy.random.SeedSequence.
    """
    pool = np.zeros((_POOL, len(entropy[0])), np.uint32)
    pool[: len(entropy)] = entropy
    pool = _hashed(pool, _CONSTANTS[0])
    for source, targets in enumerate(_TARGETS):
        # They do not depend on each other: one pass for three, since NumPy's calls take longer
        # than their arithmetic.
        mixed = pool[targets] * np.uint32(0xCA01F9DD)
        mixed -= _hashed(pool[source], _CONSTANTS[1 + source]) * np.uint32(0x4973F715)
        pool[targets] = mixed ^ mixed >> _HALF
    value = pool[0] ^ np.uint32(0x8B51F9DD)
    value = value * np.uint32(0x8B51F9DD * 0x58F38DED % _WORD)
    return (value ^ value >> _HALF).tolist()


def _hashed(values: np.ndarray, constants: np.ndarray) -> np.ndarray:
    """Hash words: uint32 (n) or (k, n), with `constants` (k + 1, 1), into (k, n)."""
    hashed = (values ^ constants[:-1]) * constants[1:]
    return hashed ^ hashed >> _HALF
