"""From a folder of DICOM files and a label file to a cache that training reads."""

import dataclasses
from pathlib import Path

from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.data.cache.cache import CTCache, build_cache
from ich_keras.data.labels import join_labels, read_rsna_labels
from ich_keras.errors import UsageError
from ich_keras.progress import Progress, Tell


def prepare_index(
    dicom: Path | str,
    labels: Path | str | None = None,
    limit_series: int | None = None,
    workers: int = 0,
    journal: Path | str | None = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> SeriesIndex:
    """Index a folder and join its labels.

    Args:
        dicom: the folder.
        labels: RSNA's csv; None leaves the index without labels.
        limit_series: keep the first so many series only.
        workers: processes that read headers; 0 reads them in this one.
        journal: a file that lets an interrupted indexing go on where it stopped.
        progress: called as progress(step, done, total).
        tell: called with one line of text about what was found.

    Raises:
        UsageError: a path does not exist.
        DataError: no CT slice in the folder, a faulty label file, or labels that match no image.
    """
    # The labels come first: a fault in them shows before the long walk through the folder.
    table = None if labels is None else read_rsna_labels(labels)
    index = index_folder(dicom, workers=workers, journal=journal, progress=progress)
    if tell is not None:
        tell(repr(index))
    if table is not None:
        index, join = join_labels(index, table)
        if tell is not None:
            tell(repr(table))
            tell(str(join))
    # Scouts and other planes are not what a limit is about.
    return index if limit_series is None else first_series(index.usable(), limit_series)


def first_series(index: SeriesIndex, count: int | None) -> SeriesIndex:
    """Keep the first `count` series of an index (None: all)."""
    if count is None:
        return index
    if count < 1:
        raise UsageError(f"--limit-series is {count}; expected at least 1.")
    series = index.series.iloc[:count]
    slices = index.slices[index.slices["series_uid"].isin(series["series_uid"])]
    return dataclasses.replace(
        index, series=series.reset_index(drop=True), slices=slices.reset_index(drop=True)
    )


def open_cache(path: Path | str, labels: Path | str | None = None) -> CTCache:
    """Open a cache with the labels of a csv, or with those it was built with.

    Raises:
        StaleError: not a whole cache.
        DataError: a faulty label file, or labels that match no image.
    """
    table = None if labels is None else read_rsna_labels(labels)
    return CTCache.open(path, labels=table)


def make_cache(
    index: SeriesIndex,
    out: Path | str,
    size: int,
    workers: int = 0,
    progress: Progress | None = None,
) -> CTCache:
    """Cache the usable series of an index; localizers and other planes become rejects."""
    return build_cache(index.usable(), out, size, workers=workers, progress=progress)
