"""Predicting a folder of DICOM files with a run: six probabilities per slice and per series."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from ich_keras.ct.plausibility import Content, content_of_reject, implausible_rows
from ich_keras.ct.rejects import (
    MAX_REJECTS,
    REJECTS_FILE,
    Reject,
    RejectedFile,
    joined,
    nothing_usable,
    rejects_kept,
    require_few_rejects,
    require_share,
)
from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.ct.tables import csv_text
from ich_keras.data.cache.tables import verdicts_after_reading
from ich_keras.data.inputs import slice_input, stack_slices, volume_input
from ich_keras.data.reading import IndexedSlice, indexed_slices, read_indexed
from ich_keras.data.views import Samples, make_samples
from ich_keras.errors import EnvironmentProblem
from ich_keras.files import atomic_write, new_folder
from ich_keras.inference import SLICE_COLUMNS, load_run, probabilities, probability_table
from ich_keras.labels import LABELS
from ich_keras.metrics.aggregation import DEFAULT_RULE, aggregate
from ich_keras.notices import NOT_CLINICAL, TRAINED_ON_PHANTOMS, UNFINISHED
from ich_keras.processes import map_ahead, process_pool
from ich_keras.progress import Progress
from ich_keras.recipe import InputRecipe, Recipe
from ich_keras.run_folder import SYNTHETIC, RunFolder

AHEAD_BYTES = 2**30  # most memory for series read ahead of the network
# Columns to find it in a viewer: file, InstanceNumber, z of ImagePositionPatient.
PLACE_COLUMNS = ("path", "instance_number", "image_position_z_mm")
TRAINED_ON = "trained_on"  # a column of predictions.csv and series.csv
NOTICE_FILE = "notice.txt"
# Why a view skips a series, by the word of its verdict: the reject code, and what is told.
SKIPPED = {
    "tilted": ("TILTED", "is tilted"),
    "duplicate": ("DUPLICATE", "has two slices at one place"),
}


@dataclass(frozen=True)
class FolderPrediction:
    """The result of `predict_folder`.

    Args:
        slices: one row per slice: `SLICE_COLUMNS`, `PLACE_COLUMNS` and six probabilities; None for
            a run on whole series, which does not predict single slices.
        series: one row per series: its UID, number of slices, verdict, number of refused files and
            six probabilities, aggregated from its slices by the run's rule, or from a run on whole
            series.
        rejects: one row per file that could not be used.
        notice: for every reader of the probabilities: they are not for clinical use, and, if so,
            the network was trained only on phantoms.
    """

    slices: pd.DataFrame | None
    series: pd.DataFrame
    rejects: pd.DataFrame
    notice: str = NOT_CLINICAL

    def __repr__(self) -> str:
        slices = "" if self.slices is None else f"{len(self.slices)} slices, "
        return f"FolderPrediction({slices}{len(self.series)} series, {len(self.rejects)} rejects)"


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

    One resized series is in memory at a time. Workers read further ones ahead: two per worker, at
    most `AHEAD_BYTES` in all.

    Args:
        model: from `load_run`.
        index: localizers and non-axial series are removed first.
        recipe: from `load_run`.
        rule: for aggregating slices, a key of `ich_keras.metrics.aggregation.RULES`.
        batch_size: samples per step; None takes the recipe's.
        workers: processes that read; 0 reads in this one. The result does not depend on it.
        progress: called as progress("predicting", done, total).

    Raises:
        NothingUsable: nothing could be predicted; its `rejects` say why.
        EnvironmentProblem: a worker process died.
    """
    inputs, view = recipe.inputs, recipe.inputs.view
    batch_size = batch_size or recipe.training.batch_size
    index = index.usable()
    kept: list[np.ndarray] = []
    rejects: list[Reject] = []
    rows = index.slices.groupby("series_uid", sort=False).indices
    sources = indexed_slices(index)

    def parts(read: Callable) -> Iterator[np.ndarray]:
        files = ([sources[n] for n in rows[uid]] for uid in index.series["series_uid"])
        for series, content in zip(index.series.itertuples(), read(files), strict=True):
            hu, is_read, bad = content
            uid = series.series_instance_uid
            rejects.extend(reject._replace(series_instance_uid=uid) for reject in bad)
            table = index.slices.iloc[rows[series.series_uid]]
            found = table.index.to_numpy()[is_read]
            if not len(found):
                continue
            alone = pd.DataFrame([series]).assign(num_slices=len(found))
            samples = make_samples(table.loc[found], alone, view)
            usable = np.flatnonzero(samples.usable)
            if not len(usable):
                code, what = SKIPPED[view.why_skipped(series.verdict)]
                told = (code, f"series {series.series_uid} {what}", "", series.series_instance_uid)
                # The remaining files are rejects already.
                rejects.extend(Reject(p, *told) for p in table.loc[found, "container"])
                continue
            kept.append(found)
            for start in range(0, len(usable), batch_size):
                yield _inputs(hu, samples, usable[start : start + batch_size], inputs)

    total = len(index.series) if view.kind == "series" else len(index.slices)
    longest = max((len(part) for part in rows.values()), default=0)
    with _reading(inputs.cache_size, len(rows), longest, workers) as read:
        batches = _full_batches(parts(read), batch_size)
        values = probabilities(model, batches, total, progress)
    rejected = joined(index.rejects, rejects)
    if not kept:
        raise nothing_usable(
            f"no slice of {len(rejected):,} files could be predicted",
            rejected,
            "There is no usable slice.",
        )
    slices = index.slices.loc[np.concatenate(kept)]
    if view.kind == "series":
        table = None
        series = _series_predictions(slices, values)
    else:
        table = _with_places(probability_table(slices, values), slices)
        series = _aggregated(table, rule)
    kept_rows = index.slices.index.isin(slices.index)
    return FolderPrediction(
        table,
        _with_verdicts(series, index, kept_rows),
        rejected,
    )


@contextlib.contextmanager
def _reading(
    size: int, num_series: int, longest: int, workers: int
) -> Iterator[Callable[[Iterable[list[IndexedSlice]]], Iterator]]:
    """Yield a function that reads series, each given as a list of slices; see `_read_series`."""
    one = partial(_read_series, size)
    ahead = min(2 * workers, num_series, AHEAD_BYTES // max(1, longest * size * size * 2))
    if ahead <= 1:
        yield partial(map, one)
        return
    # One OpenCV thread per process: the processes already use the cores.
    pool = process_pool(min(workers, ahead), cv2.setNumThreads, 1)
    try:
        yield lambda series: map_ahead(pool, one, series, ahead)
    except BrokenProcessPool as error:
        raise EnvironmentProblem(
            "a process that was reading slices has died (killed, or out of memory).",
            "Run again with fewer workers. A script that uses workers needs an"
            " `if __name__ == '__main__':` guard.",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _read_series(
    size: int, slices: list[IndexedSlice]
) -> tuple[np.ndarray, np.ndarray, list[Reject]]:
    """Read the readable files of one series; none of them if its values cannot be HU.

    Returns:
        (HU, int16 (n, size, size); which slices these are, bool (len(slices),); the rejects).
    """
    hu, rejects = [], []
    contents: list[Content | None] = []
    is_read = np.zeros(len(slices), bool)
    for number, indexed in enumerate(slices):
        try:
            read = read_indexed(indexed, size)
        except RejectedFile as reject:
            rejects.append(Reject.of(indexed.container, reject))
            contents.append(content_of_reject(reject))
        else:
            hu.append(read.hu)
            contents.append(read.content)
            is_read[number] = True
    implausible = implausible_rows([""] * len(slices), contents)
    if implausible:
        hu = []
        found = np.flatnonzero(is_read).tolist()
        rejects += [Reject(slices[row].container, *implausible[row]) for row in found]
        is_read[:] = False
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
    """Join parts of at most `batch_size` samples into full batches; the last may be smaller."""
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


def _with_places(table: pd.DataFrame, slices: pd.DataFrame) -> pd.DataFrame:
    """Add the columns a person needs to find a slice in a viewer."""
    for place, name in enumerate(PLACE_COLUMNS, len(SLICE_COLUMNS)):
        column = slices["container" if name == "path" else name].to_numpy()
        table.insert(place, name, column)
    return table


def _with_verdicts(series: pd.DataFrame, index: SeriesIndex, kept: np.ndarray) -> pd.DataFrame:
    verdicts = index.series.set_index("series_uid")["verdict"]
    verdicts[:] = verdicts_after_reading(verdicts, index.slices, kept)
    series.insert(1, "verdict", verdicts.reindex(series.index))
    lost = index.slices.loc[~kept, "series_uid"].value_counts()
    rejected = index.series.set_index("series_uid")["num_rejected"].add(lost, fill_value=0)
    series.insert(2, "num_rejected", rejected.reindex(series.index).astype(int))
    return series.reset_index()


def predict_folder(
    run_dir: RunFolder | Path | str,
    dicom_dir: Path | str,
    out: Path | str | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
    any_body_part: bool = False,
    unfinished: bool = False,
    max_rejects: float = MAX_REJECTS,
) -> FolderPrediction:
    """Predict every head CT slice below a folder with a trained run.

    Args:
        run_dir: a finished run.
        dicom_dir: any folder; files that are not usable slices are listed in `rejects`.
        out: a new folder for predictions.csv (not for a run on whole series), series.csv,
            rejects.csv and notice.txt, which says what the network was trained on; None writes
            nothing. If no slice is usable, only rejects.csv is written.
        batch_size: samples per step; None takes that of the run.
        workers: processes that read headers and slices; 0 reads them in this one.
        device: "auto", "cpu" or "cuda".
        progress: called as progress(step, done, total).
        any_body_part: as for `index_folder`.
        unfinished: take the best weights so far of a training that was interrupted or still runs;
            the notice and the column "unfinished" of both tables say so.
        max_rejects: the largest share of refused files; see `require_few_rejects`. Above it only
            rejects.csv is written.

    Raises:
        UsageError: `out` exists, `max_rejects` is no share, or `dicom_dir` does not.
        StaleError: `run_dir` is not a finished run.
        NothingUsable: no slice is usable; its `rejects` say why.
        TooManyRejects: too many files are refused.
        EnvironmentProblem: a worker process died.
    """
    require_share(max_rejects)
    run = RunFolder.at(run_dir).require_finished(unfinished)
    unfinished_notice = run.notice()
    is_synthetic = bool(run.data().get(SYNTHETIC))
    with contextlib.nullcontext() if out is None else new_folder(out) as folder:
        with rejects_kept(folder):
            index = index_folder(dicom_dir, workers, None, progress, any_body_part)
            require_few_rejects(index.usable().slices, index.rejects, max_rejects)
            recipe, model = load_run(run, device, unfinished=unfinished)
            result = predict_index(model, index, recipe, run.rule(), batch_size, workers, progress)
            require_few_rejects(index.usable().slices, result.rejects, max_rejects)
        notice = f"{TRAINED_ON_PHANTOMS} {NOT_CLINICAL}" if is_synthetic else NOT_CLINICAL
        marks = {TRAINED_ON: "drawn phantoms only" if is_synthetic else "head CT"}
        if unfinished_notice:
            notice = f"{unfinished_notice} {notice}"
            marks[UNFINISHED] = unfinished_notice
        slices = result.slices
        if slices is not None:
            root = Path(dicom_dir).absolute()
            slices = slices.assign(path=[_inside(path, root) for path in slices["path"]], **marks)
        result = FolderPrediction(slices, result.series.assign(**marks), result.rejects, notice)
        if folder is not None:
            if slices is not None:
                atomic_write(folder / "predictions.csv", csv_text(slices))
            atomic_write(folder / "series.csv", csv_text(result.series))
            atomic_write(folder / REJECTS_FILE, csv_text(result.rejects))
            atomic_write(folder / NOTICE_FILE, f"{notice}\n")
    return result


def _inside(path: str, root: Path) -> str:
    """Return a path relative to the predicted folder."""
    place = Path(path)
    return str(place.relative_to(root)) if place.is_relative_to(root) else path
