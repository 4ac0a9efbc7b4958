"""A cache whose thin series are averaged as they are read (`ich_keras.data.thin_series`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ich_keras.data.cache.cache import CTCache
from ich_keras.data.cache.shards import HU_DTYPE, CachedSlices
from ich_keras.data.cache.tables import CacheTables
from ich_keras.data.thin_series import Blocks, ThinRule, is_thin, weighted_mean


class AveragedSlices(CachedSlices):
    """The slices of a cache, those of thin series averaged; read as `CachedSlices` is.

    Args:
        cached: what is averaged.
        rows: of each slice, those of the cache that it is made of.
        weights: of each, float64 (len(rows),), whole numbers.
    """

    def __init__(
        self, cached: CachedSlices, rows: Sequence[range], weights: Sequence[np.ndarray]
    ) -> None:
        super().__init__(cached.shards, cached.size)
        self._cached, self._rows, self._weights = cached, tuple(rows), tuple(weights)

    def __len__(self) -> int:
        return len(self._rows)

    def slices_hu(
        self, indices: Sequence[int] | np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Read slices; see `CachedSlices.slices_hu`."""
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"slice numbers go from 0 to {len(self) - 1}; got {indices.tolist()}")
        if out is None:
            out = np.empty((len(indices), self.size, self.size), HU_DTYPE)
        for place, number in enumerate(indices.tolist()):
            hu = self._cached.slices_hu(self._rows[number])
            out[place] = weighted_mean(hu, self._weights[number])
        return out


@dataclass(frozen=True, eq=False)
class AveragedCache:
    """What a network sees of a cache.

    Args:
        cache: with a slice for each that the network sees; the same series in the same order.
        owner: int64 (slices of the original,), the slice of `cache` that each has its answer from.
        blocks: how each series was averaged; None where it was not.
        is_thin: bool (series,), which are thinner than those of the training.
    """

    cache: CTCache
    owner: np.ndarray
    blocks: tuple[Blocks | None, ...]
    is_thin: np.ndarray


def averaged_cache(cache: CTCache, thin: ThinRule) -> AveragedCache:
    """Average the thin series of a cache; no pixel is read yet.

    Args:
        cache: with or without labels.
        thin: what is done with thin series. Where nothing is averaged, the cache stays as it is.
    """
    positions = cache.slices["position_mm"].to_numpy()
    facts = [
        (positions[cache.series_rows(uid)], verdict)
        for uid, verdict in zip(cache.series["series_uid"], cache.series["verdict"], strict=True)
    ]
    blocks = tuple(thin.blocks(*one) for one in facts)
    thin_ones = np.array([is_thin(*one, thin.distances) for one in facts], bool)
    if not any(block is not None for block in blocks):
        return AveragedCache(cache, np.arange(len(cache)), blocks, thin_ones)
    owners, rows, tables = [], [], []
    weights: list[np.ndarray] = []
    start = count = 0
    for (places, _), block in zip(facts, blocks, strict=True):
        table = cache.slices.iloc[start : start + len(places)]
        own = [range(n, n + 1) for n in range(len(places))] if block is None else block.rows
        rows += [range(start + one.start, start + one.stop) for one in own]
        weights += [np.ones(1)] * len(own) if block is None else block.weights
        owners.append(count + (np.arange(len(places)) if block is None else block.owner))
        tables.append(table if block is None else block.table(table))
        start, count = start + len(places), count + len(own)
    lengths = [len(table) for table in tables]
    seen = CTCache(
        cache.path,
        cache.manifest,
        AveragedSlices(cache.pixels, rows, weights),
        CacheTables(
            pd.concat(tables, ignore_index=True),
            cache.series.assign(num_slices=lengths),
            cache.rejects,
        ),
        cache.labelling,
    )
    return AveragedCache(seen, np.concatenate(owners), blocks, thin_ones)
