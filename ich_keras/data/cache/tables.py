"""The tables of a cache: those of an index, after its pixels have been read."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ich_keras.ct.rejects import Reject, joined
from ich_keras.ct.tables import shown_paths
from ich_keras.ct.verdict import GAP, INCOMPLETE, with_words
from ich_keras.data.labels import series_labels, without_labels
from ich_keras.labels import LabelSet

if TYPE_CHECKING:
    from ich_keras.ct.series import SeriesIndex

REPAIRED = "repaired"
PIXEL_HASH = "pixel_hash"
UID = "sop_instance_uid"


@dataclass(frozen=True)
class CacheTables:
    """The tables of a SeriesIndex, with row i of `slices` being slice i of the cache.

    Args:
        slices: one row per slice; the index's columns, `repaired` (bool: the 12-bit repair), and
            `pixel_hash` (`ich_keras.data.reading.pixel_hash` of the cached pixels).
        series: one row per series, in the order of `slices`.
        rejects: as `reject_table` makes them.
    """

    slices: pd.DataFrame
    series: pd.DataFrame
    rejects: pd.DataFrame


def tables_after_reading(
    index: "SeriesIndex",
    rejected: dict[int, tuple[str, str, str]],
    repaired: set[int],
    hashes: list[str],
) -> CacheTables:
    """Remove the slices that could not be read from the tables of an index.

    The remaining slices of a series are renumbered. A series that lost slices gets the verdict
    "incomplete", and "gap" if one lay between two others; one that lost all of them is left out.

    Args:
        index: the SeriesIndex the cache was built from.
        rejected: row of `index.slices` -> reject code, detail and hint.
        repaired: rows of `index.slices` whose HU were repaired.
        hashes: one for each row of `index.slices`.

    Returns:
        Tables without label columns.
    """
    index = without_labels(index)
    rows = np.array(sorted(rejected), np.int64)
    kept = np.ones(len(index.slices), bool)
    kept[rows] = False
    all_slices = index.slices.assign(
        **{
            REPAIRED: np.isin(np.arange(len(index.slices)), sorted(repaired)),
            PIXEL_HASH: pd.Series(hashes, index=index.slices.index, dtype="str"),
        }
    )
    slices = all_slices[kept].reset_index(drop=True)
    by_series = slices.groupby("series_uid", sort=False)
    slices = slices.assign(slice_index=by_series.cumcount().astype(slices["slice_index"].dtype))
    paths = shown_paths(all_slices).to_numpy()
    uids = all_slices["series_instance_uid"].to_numpy()
    rejects = joined(
        index.rejects, [Reject(paths[row], *rejected[row], uids[row]) for row in rows.tolist()]
    )

    lengths = by_series.size()
    series = index.series.set_index("series_uid")
    series = series.loc[lengths.index].assign(num_slices=lengths)
    series["verdict"] = verdicts_after_reading(series["verdict"], all_slices, kept)
    if "num_rejected" in series:  # not in older indexes
        lost = all_slices.loc[~kept, "series_uid"].value_counts()
        series["num_rejected"] += lost.reindex(series.index, fill_value=0)
    return CacheTables(slices, series.reset_index()[list(index.series.columns)], rejects)


def verdicts_after_reading(
    verdicts: pd.Series, all_slices: pd.DataFrame, kept: np.ndarray
) -> list[str]:
    """Add "incomplete" to the verdicts of series that lost slices, and "gap" if inside the stack.

    Args:
        verdicts: by series_uid.
        all_slices: the index's table of slices, in order.
        kept: bool (len(all_slices),), what could be read.
    """
    lost = set(all_slices.loc[~kept, "series_uid"])
    torn = _series_with_new_gaps(all_slices, kept)
    words = {uid: (INCOMPLETE, GAP) if uid in torn else (INCOMPLETE,) for uid in lost}
    return [with_words(text, *words.get(uid, ())) for uid, text in verdicts.items()]


def with_labels(tables: CacheTables, slices: pd.DataFrame, labels: LabelSet) -> CacheTables:
    """Return the tables with label columns, the series' being derived from the slices'.

    Args:
        tables: without labels.
        slices: `tables.slices` with the label columns.
        labels: which.
    """
    per_series = series_labels(slices, labels).loc[tables.series["series_uid"]]
    columns = {name: per_series[name].to_numpy(np.int8) for name in labels.names}
    return CacheTables(slices, tables.series.assign(**columns), tables.rejects)


def _series_with_new_gaps(all_slices: pd.DataFrame, kept: np.ndarray) -> set[str]:
    """Return the series that lost a slice which had kept ones on both sides."""
    rows = pd.DataFrame({"uid": all_slices["series_uid"].to_numpy(), "kept": kept})
    by_series = rows.groupby("uid", sort=False)["kept"]
    below = by_series.cumsum()  # kept slices up to this one
    inside = ~rows["kept"] & (below > 0) & (below < by_series.transform("sum"))
    return set(rows.loc[inside, "uid"])
