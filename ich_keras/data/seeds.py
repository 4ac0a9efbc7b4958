"""Seeds: one for each sample in each epoch, and one for each step of its augmentation.

Every draw is a pure function of (seed, epoch, index): batches do not depend on the number of
worker processes, and a resumed training sees what an uninterrupted one would have seen.
"""

from typing import Any

import numpy as np

_WORD = 2**32


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


def step_seeds(seeds: list[int], step: int) -> list[int]:
    """Return `step_seed` of several samples, whose seeds have 32 bits.

    >>> step_seeds([5, 6], 2) == [step_seed(5, 2), step_seed(6, 2)]
    True
    """
    if not step:
        return seeds
    return _first_states([np.array(seeds), np.zeros(len(seeds)), np.full(len(seeds), step)])


def _first_states(entropy: list[np.ndarray]) -> list[int]:
    """Return what `SeedSequence(words).generate_state(1)` gives, for arrays of words.

    A SeedSequence takes microseconds for each sample. Its arithmetic is fixed: NumPy promises the
    same states in all versions.

    Args:
        entropy: three arrays of whole numbers below 2**32.

    Source:
        M. O'Neill, "Developing a seed_seq Alternative" (2015); numpy.random.SeedSequence.
    """
    words = [values.astype(np.uint32) for values in entropy]
    constant = 0x43B0D7E5

    def hashed(value: Any) -> Any:
        nonlocal constant
        value = value ^ np.uint32(constant)
        constant = constant * 0x931E8875 % _WORD
        value = value * np.uint32(constant)
        return value ^ value >> np.uint32(16)

    pool: list[Any] = [hashed(word) for word in (*words, np.zeros_like(words[0]))]
    for source in range(4):
        for target in range(4):
            if source != target:
                mixed = pool[target] * np.uint32(0xCA01F9DD)
                mixed = mixed - hashed(pool[source]) * np.uint32(0x4973F715)
                pool[target] = mixed ^ mixed >> np.uint32(16)
    value = pool[0] ^ np.uint32(0x8B51F9DD)
    value = value * np.uint32(0x8B51F9DD * 0x58F38DED % _WORD)
    return (value ^ value >> np.uint32(16)).tolist()
