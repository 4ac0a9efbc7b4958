"""From a run and a folder of DICOM files to six probabilities per slice and per series."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from ich_keras.ct.dicom import read_hu
from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.ct.tables import csv_text
from ich_keras.data.cache.tables import verdicts_after_reading
from ich_keras.data.inputs import resize_hu, slice_input, stack_slices, volume_input
from ich_keras.data.views import Samples, make_samples
from ich_keras.errors import DataError, EnvironmentProblem, RejectedFile
from ich_keras.files import atomic_write, new_folder
from ich_keras.inference import load_run, probabilities
from ich_keras.labels import LABELS
from ich_keras.metrics.aggregation import DEFAULT_RULE, aggregate
from ich_keras.notices import NOT_CLINICAL, TRAINED_ON_PHANTOMS
from ich_keras.processes import map_ahead, process_pool
from ich_keras.progress import Progress
from ich_keras.recipe import InputRecipe, Recipe
from ich_keras.run_folder import SYNTHETIC, RunFolder

AHEAD_BYTES = 2**30  # of series that workers have read and the network has not seen
# What says which slice a row of predictions is about.
SLICE_COLUMNS = ("sop_instance_uid", "series_instance_uid", "slice_index", "position_mm")


@dataclass(frozen=True)
class FolderPrediction:
    """What `predict_folder` found.

    Args:
        slices: one row per slice: `SLICE_COLUMNS` and six probabilities; None for a run on whole
            series, which says nothing about single slices.
        series: one row per series: its UID, number of slices, verdict, and its six probabilities:
            those of its slices by the run's rule, or those of a run on whole series.
        rejects: one row per file that could not be used.
        notice: what a reader of the probabilities must know: that they are not for clinical use,
            and what the network was trained on where that was no patient.
    """

    slices: pd.DataFrame | None
    series: pd.DataFrame
    rejects: pd.DataFrame
    notice: str = NOT_CLINICAL

    def __repr__(self) -> str:
        slices = "" if self.slices is None else f"{len(self.slices)} slices, "
        return f"FolderPrediction({slices}{len(self.series)} series, {len(self.rejects)} rejects)"


def probability_table(slices: pd.DataFrame, values: np.ndarray) -> pd.DataFrame:
    """Put probabilities beside the slices they belong to.

    Args:
        slices: rows of a SeriesIndex' or cache's slice table.
        values: float32 (len(slices), 6).

    Returns:
        `SLICE_COLUMNS`, then one column per label. `series_instance_uid` carries "#2", "#3"
        where one UID holds several volumes, so that it tells them apart.
    """
    table = slices[[*SLICE_COLUMNS]].reset_index(drop=True)
    table["series_instance_uid"] = slices["series_uid"].to_numpy()
    return pd.concat([table, pd.DataFrame(values, columns=list(LABELS))], axis=1)


def predict_index(
    model: Any,
    index: SeriesIndex,
    recipe: Recipe,
    rule: str = DEFAULT_RULE,
    batch_size: int | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> FolderPrediction:
    """Predict every slice or series of an index, reading the DICOM files as it goes.

    One series is in memory at a time, resized; with workers, more that are read ahead: two for each
    worker, at most `AHEAD_BYTES`.

    Args:
        model: from `load_run`.
        index: localizers and other planes are taken out first.
        recipe: from `load_run`.
        rule: from slices to series, a key of `ich_keras.metrics.aggregation.RULES`.
        batch_size: samples a step; None takes the recipe's.
        workers: processes that read; 0 reads in this one. The result does not depend on it.
        progress: called as progress("predicting", done, total).

    Raises:
        DataError: nothing could be predicted.
        EnvironmentProblem: a worker process died.
    """
    inputs, view = recipe.inputs, recipe.inputs.view
    batch_size = batch_size or recipe.training.batch_size
    index = index.usable()
    kept: list[np.ndarray] = []
    rejects: list[tuple[str, str, str]] = []
    rows = index.slices.groupby("series_uid", sort=False).indices
    paths = index.slices["container"].to_numpy()

    def parts(read: Callable) -> Iterator[np.ndarray]:
        files = (paths[rows[uid]].tolist() for uid in index.series["series_uid"])
        for series, content in zip(index.series.itertuples(), read(files), strict=True):
            hu, is_read, bad = content
            rejects.extend(bad)
            table = index.slices.iloc[rows[series.series_uid]]
            found = table.index.to_numpy()[is_read]
            if not len(found):
                continue
            alone = pd.DataFrame([series]).assign(num_slices=len(found))
            samples = make_samples(table.loc[found], alone, view)
            usable = np.flatnonzero(samples.usable)
            if not len(usable):
                detail = f"series {series.series_uid} is tilted"
                # The others are rejects already.
                rejects.extend((p, "TILTED", detail) for p in table.loc[found, "container"])
                continue
            kept.append(found)
            for start in range(0, len(usable), batch_size):
                yield _inputs(hu, samples, usable[start : start + batch_size], inputs)

    total = len(index.series) if view.kind == "series" else len(index.slices)
    longest = max((len(part) for part in rows.values()), default=0)
    with _reading(inputs.cache_size, len(rows), longest, workers) as read:
        batches = _full_batches(parts(read), batch_size)
        values = probabilities(model, batches, total, progress)
    rejected = pd.DataFrame(rejects, columns=list(index.rejects.columns))
    rejected = pd.concat([index.rejects, rejected]) if rejects else index.rejects
    if not kept:
        counts = ", ".join(f"{n} {code}" for code, n in rejected["code"].value_counts().items())
        raise DataError(
            f"no slice of {len(rejected)} files could be predicted.",
            f"Rejected: {counts}; the first: {rejected['path'].iloc[0]}:"
            f" {rejected['detail'].iloc[0]}"
            if counts
            else "There is no usable slice.",
        )
    slices = index.slices.loc[np.concatenate(kept)]
    if view.kind == "series":
        table = None
        series = _series_predictions(slices, values)
    else:
        table = probability_table(slices, values)
        series = _aggregated(table, rule)
    kept_rows = index.slices.index.isin(slices.index)
    return FolderPrediction(
        table,
        _with_verdicts(series, index, kept_rows),
        rejected.sort_values("path").reset_index(drop=True),
    )


@contextlib.contextmanager
def _reading(
    size: int, num_series: int, longest: int, workers: int
) -> Iterator[Callable[[Iterable[list[str]]], Iterator]]:
    """Yield what reads series after series, each a list of files: see `_read_series`."""
    one = partial(_read_series, size)
    ahead = min(2 * workers, num_series, AHEAD_BYTES // max(1, longest * size * size * 2))
    if ahead <= 1:
        yield partial(map, one)
        return
    # Processes take the place of OpenCV's threads.
    pool = process_pool(min(workers, ahead), cv2.setNumThreads, 1)
    try:
        yield lambda series: map_ahead(pool, one, series, ahead)
    except BrokenProcessPool as error:
        raise EnvironmentProblem(
            "a process that read slices has died (killed, or out of memory).",
            "Run again with fewer workers. A script that uses workers needs an"
            " `if __name__ == '__main__':` guard.",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _read_series(
    size: int, paths: list[str]
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str, str]]]:
    """Read what can be read of one series.

    Returns:
        (HU, int16 (n, size, size); which of the files they are, bool (len(paths),); path, code and
        detail of the others).
    """
    hu, rejects = [], []
    is_read = np.zeros(len(paths), bool)
    for number, path in enumerate(paths):
        try:
            hu.append(resize_hu(read_hu(path), size))
        except RejectedFile as reject:
            rejects.append((path, reject.code, reject.detail))
        else:
            is_read[number] = True
    return np.stack(hu) if hu else np.zeros((0, size, size), np.int16), is_read, rejects


def _inputs(
    hu: np.ndarray, samples: Samples, chosen: np.ndarray, inputs: InputRecipe
) -> np.ndarray:
    if not samples.view.is_volume:
        return slice_input(hu[chosen], inputs.size, inputs.intensity)
    stacks = [
        stack_slices(hu, samples.rows[i], None if samples.shifts is None else samples.shifts[i])
        for i in chosen
    ]
    return volume_input(np.stack(stacks), inputs.size, inputs.intensity)


def _full_batches(parts: Iterable[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """Join parts of at most `batch_size` samples to batches of that many; the last may be less."""
    waiting: list[np.ndarray] = []
    for part in parts:
        waiting.append(part)
        if sum(map(len, waiting)) >= batch_size:
            joined = np.concatenate(waiting)
            yield joined[:batch_size]
            waiting = [joined[batch_size:]] if len(joined) > batch_size else []
    if waiting:
        yield np.concatenate(waiting)


def _aggregated(table: pd.DataFrame, rule: str) -> pd.DataFrame:
    uids = table["series_instance_uid"]
    series = aggregate(table[list(LABELS)].to_numpy(), uids, rule)
    series.insert(0, "num_slices", uids.value_counts().reindex(series.index))
    return series.rename_axis("series_instance_uid")


def _series_predictions(slices: pd.DataFrame, values: np.ndarray) -> pd.DataFrame:
    counts = slices.groupby("series_uid", sort=False).size()
    series = pd.DataFrame(values, index=counts.index, columns=list(LABELS))
    series.insert(0, "num_slices", counts)
    return series.rename_axis("series_instance_uid")


def _with_verdicts(series: pd.DataFrame, index: SeriesIndex, kept: np.ndarray) -> pd.DataFrame:
    verdicts = index.series.set_index("series_uid")["verdict"]
    verdicts[:] = verdicts_after_reading(verdicts, index.slices, kept)
    series.insert(1, "verdict", verdicts.reindex(series.index))
    return series.reset_index()


def predict_folder(
    run_dir: RunFolder | Path | str,
    dicom_dir: Path | str,
    out: Path | str | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> FolderPrediction:
    """Predict every head CT slice below a folder with a trained run.

    Args:
        run_dir: a finished run.
        dicom_dir: any folder; what is not a usable slice is listed in `rejects`.
        out: a new folder for predictions.csv (not for a run on whole series), series.csv,
            rejects.csv and README.txt, which says what the network was trained on; None writes
            nothing.
        batch_size: samples a step; None takes that of the run.
        workers: processes that read headers and slices; 0 reads them in this one.
        device: "auto", "cpu" or "cuda".
        progress: called as progress(step, done, total).

    Raises:
        UsageError: `out` exists, or `dicom_dir` does not.
        StaleError: `run_dir` is not a finished run.
        DataError: not one usable slice.
        EnvironmentProblem: a worker process died.
    """
    run = RunFolder.at(run_dir).require_finished()
    with contextlib.nullcontext() if out is None else new_folder(out) as folder:
        index = index_folder(dicom_dir, workers=workers, progress=progress)
        recipe, model = load_run(run, device)
        result = predict_index(model, index, recipe, run.rule(), batch_size, workers, progress)
        if run.data().get(SYNTHETIC):
            result = replace(result, notice=f"{TRAINED_ON_PHANTOMS} {NOT_CLINICAL}")
        if folder is not None:
            if result.slices is not None:
                atomic_write(folder / "predictions.csv", csv_text(result.slices))
            atomic_write(folder / "series.csv", csv_text(result.series))
            atomic_write(folder / "rejects.csv", csv_text(result.rejects))
    return result
