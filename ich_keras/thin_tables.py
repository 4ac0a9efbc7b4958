"""What the tables of answers say of averaged slices (`ich_keras.data.thin_series`).

Tables list every slice. What is computed from slices must take each averaged one once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ich_keras.data.thin_series import Blocks, ThinRule

AVERAGED_SLICE = "averaged_slice"  # a column of predictions.csv
NUM_AVERAGED, AVERAGED_MM = "num_averaged", "averaged_mm"  # columns of series.csv


@dataclass(frozen=True, eq=False)
class SeenSlices:
    """What the network saw of some series, and which slices it stands for.

    Args:
        uids: str (seen,), the series of each.
        positions_mm: float64 (seen,), along the normal.
        owner: int64 (slices,), the one that each slice has its answer from.
        numbers: Int64 (slices,), the number of the averaged slice within its series, from 0;
            missing where nothing was averaged.
    """

    uids: np.ndarray
    positions_mm: np.ndarray
    owner: np.ndarray
    numbers: pd.arrays.IntegerArray


def seen_slices(
    uids: np.ndarray,
    positions_mm: np.ndarray,
    lengths: Sequence[int],
    blocks: Sequence[Blocks | None],
) -> SeenSlices:
    """Find what the network saw.

    Args:
        uids, positions_mm: (slices,), series after series.
        lengths: slices of each series.
        blocks: how each series was averaged; None where it was not.
    """
    of, places, owners, numbers = [], [], [], []
    start = count = 0
    for length, block in zip(lengths, blocks, strict=True):
        rows = slice(start, start + length)
        owner = np.arange(length) if block is None else block.owner
        seen = positions_mm[rows] if block is None else block.centres_mm
        of.append(np.repeat(uids[start], len(seen)))
        places.append(seen)
        owners.append(count + owner)
        numbers.append(np.full(length, -1) if block is None else owner)
        start, count = start + length, count + len(seen)
    return SeenSlices(
        np.concatenate(of),
        np.concatenate(places),
        np.concatenate(owners),
        numbers_or_missing(np.concatenate(numbers)),
    )


def numbers_or_missing(numbers: np.ndarray) -> pd.arrays.IntegerArray:
    """Return whole numbers as Int64, those below 0 as missing."""
    return pd.arrays.IntegerArray(numbers.astype(np.int64), numbers < 0)


def averaged_columns(blocks: Sequence[Blocks | None], thin: ThinRule) -> dict[str, Any]:
    """Return the columns that series.csv gets: how many averaged slices, and how far apart, mm."""
    target = np.nan if thin.target_mm is None else thin.target_mm
    return {
        NUM_AVERAGED: pd.array([0 if one is None else len(one) for one in blocks], dtype="Int64"),
        AVERAGED_MM: np.array([np.nan if one is None else target for one in blocks]),
    }


def rows_seen(slices: pd.DataFrame, uid_column: str = "series_instance_uid") -> np.ndarray:
    """Return the rows that stand for what the network saw, int64, ascending.

    Of slices that share the answer of an averaged one, it is the one in the middle.

    Args:
        slices: as `FolderPrediction.slices`.
        uid_column: names the series.

    >>> numbers = pd.array([0, 0, 0, 1, pd.NA, pd.NA], dtype="Int64")
    >>> table = pd.DataFrame({"series_instance_uid": list("aaaabb"), "averaged_slice": numbers})
    >>> rows_seen(table).tolist()
    [1, 3, 4, 5]
    """
    if AVERAGED_SLICE not in slices:
        return np.arange(len(slices))
    is_averaged = slices[AVERAGED_SLICE].notna().to_numpy()
    if not is_averaged.any():
        return np.arange(len(slices))
    groups = slices.reset_index(drop=True)[is_averaged].groupby([uid_column, AVERAGED_SLICE])
    is_middle = groups.cumcount() == (groups[uid_column].transform("size") - 1) // 2
    found = ~is_averaged
    found[is_middle.index[is_middle]] = True
    return np.flatnonzero(found)


def joint_columns(tables: Sequence[pd.DataFrame]) -> dict[str, Any]:
    """Return the columns of `averaged_columns` for an ensemble: missing where its runs differ.

    Args:
        tables: of the same series in the same order, one for each run.
    """
    counts = np.stack([table[NUM_AVERAGED].to_numpy(np.int64) for table in tables])
    places = np.stack([table[AVERAGED_MM].to_numpy(np.float64) for table in tables])
    is_same = (counts == counts[0]).all(axis=0)
    is_same &= ((places == places[0]) | np.isnan(places) & np.isnan(places[0])).all(axis=0)
    return {
        NUM_AVERAGED: pd.Series(counts[0], dtype="Int64").where(is_same).array,
        AVERAGED_MM: np.where(is_same, places[0], np.nan),
    }
