"""From a run and a folder of DICOM files to six probabilities per slice and per series."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from ich_keras.config import RunConfig
from ich_keras.ct.dicom import read_hu
from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.ct.tables import csv_text
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.cache.tables import verdicts_after_reading
from ich_keras.data.inputs import intensity_of, resize_hu, slice_input, stack_slices, volume_input
from ich_keras.data.views import View, make_samples
from ich_keras.environment import (
    choose_backend,
    choose_device,
    choose_precision,
    loaded_backend,
)
from ich_keras.errors import (
    DataError,
    EnvironmentProblem,
    RejectedFile,
    StaleError,
    UsageError,
)
from ich_keras.files import atomic_write, new_folder, read_json
from ich_keras.labels import LABELS, NUM_LABELS
from ich_keras.metrics.aggregation import DEFAULT_RULE, aggregate
from ich_keras.models.presets import PRESETS, SERIES_SHAPE, SLAB_SHAPE, ModelSpec, preset
from ich_keras.processes import map_ahead, process_pool
from ich_keras.progress import Progress

# Slices of a sample: the thesis's two 3D networks.
DEFAULT_SLICES = {"slab": SLAB_SHAPE[0], "series": SERIES_SHAPE[0]}
DEFAULT_BATCH = {"slice": 32, "slab": 16, "series": 1}
AHEAD_BYTES = 2**30  # of series that workers have read and the network has not seen

CONFIG = "config.json"
DATA = "data.json"
CACHE_SIZE = "cache_size"  # of data.json
BEST_WEIGHTS = "best.weights.h5"
CHOICES = "choices.json"  # made on the validation split: see `ich_keras.evaluation`
# What says which slice a row of predictions is about.
SLICE_COLUMNS = ("sop_instance_uid", "series_instance_uid", "slice_index", "position_mm")


@dataclass(frozen=True)
class FolderPrediction:
    """What `predict_folder` found.

    Args:
        slices: one row per slice: `SLICE_COLUMNS` and six probabilities; None of a run on whole
            series, which says nothing about single slices.
        series: one row per series: its UID, number of slices, verdict, and its six probabilities:
            those of its slices by the run's rule, or those of a run on whole series.
        rejects: path, code, detail of every file that could not be used.
    """

    slices: pd.DataFrame | None
    series: pd.DataFrame
    rejects: pd.DataFrame

    def __repr__(self) -> str:
        slices = "" if self.slices is None else f"{len(self.slices)} slices, "
        return f"FolderPrediction({slices}{len(self.series)} series, {len(self.rejects)} rejects)"


def load_run(run_dir: Path | str, device: str | None = None, precision: str | None = None):
    """Load the network of a run with its best weights.

    Args:
        run_dir: a run folder.
        device: None takes "auto"; a run need not be used where it was trained.
        precision: None takes the run's, but bfloat16 only where the hardware computes in it.

    Returns:
        (RunConfig, keras.Model that gives probabilities).

    Raises:
        StaleError: the folder is not a finished run.
    """
    run_dir = require_run(run_dir)
    config = RunConfig.from_dict(read_json(run_dir / CONFIG))
    choose_backend()
    device = choose_device(device or "auto")
    if precision is None:
        precision = run_precision(config, device)
    from ich_keras.models.classifier import classifier
    from ich_keras.models.weights import load_weights

    spec = network(config)
    model = classifier(spec, precision=precision)
    load_weights(model, run_dir / BEST_WEIGHTS, spec, needs_head=True)
    return config, model


def network(config: RunConfig) -> ModelSpec:
    """Return the network of a run, for inputs of its view, size and intensity.

    Raises:
        UsageError: preset and view do not fit, or the network needs more slices.
    """
    view, size = run_view(config), config.data.size
    channels = intensity_of(run_intensity(config)).channels
    slices = (view.num_slices,) if view.is_volume else ()
    return preset(config.preset, (*slices, size, size, channels), config.norm)


def run_view(config: RunConfig) -> View:
    """Return what one sample of a run is: as configured, or what the preset is for.

    Raises:
        UsageError: a 2D preset with volumes, a 3D one with slices, or an impossible view.
    """
    data, spec = config.data, PRESETS[config.preset].spec
    kind = data.view
    if kind is None:
        usual = "slab" if spec.input_shape[0] == DEFAULT_SLICES["slab"] else "series"
        kind = "slice" if spec.rank == 2 else usual
    count = DEFAULT_SLICES.get(kind, 1) if data.slices is None else data.slices
    view = View(kind, count, data.edge, data.long_series, data.tilted)
    if view.is_volume != (spec.rank == 3):
        takes, other = ("volumes", "slab or series") if spec.rank == 3 else ("slices", "slice")
        raise UsageError(
            f"view {kind!r} with preset {config.preset}, which takes {takes}.",
            f"Take view {other}, or another preset (`ich presets`).",
        )
    return view


def require_size(config: RunConfig, cache: CTCache) -> None:
    """Refuse an input larger than the cached slices.

    Raises:
        UsageError: enlarging would only blur.
    """
    if config.data.size > cache.size:
        raise UsageError(
            f"data.size is {config.data.size}, but the cache holds {cache.size}x{cache.size}"
            " pixels.",
            f"Train at {cache.size} or less; a finished run needs the cache it was trained from, or"
            " one of its size.",
        )


def run_rule(run_dir: Path | str) -> str:
    """Return the rule from slices to series that a run chose on its validation split."""
    path = Path(run_dir) / CHOICES
    choices = read_json(path) if path.is_file() else {}
    return choices.get("aggregation", {"rule": DEFAULT_RULE})["rule"]


def run_intensity(config: RunConfig) -> str:
    """Return the intensity of a run; runs older than the choice have the three windows."""
    return config.data.intensity or "windows"


def run_precision(config: RunConfig, device: str) -> str:
    """Return the precision a run predicts in on this machine: its own, or float32 where that has
    no instructions of its own. Runs older than the choice are float32."""
    if config.precision == "bfloat16" and choose_precision("auto", device) != "bfloat16":
        return "float32"
    return "float32" if config.precision == "auto" else config.precision


def require_run(run_dir: Path | str) -> Path:
    """Return the path when it is a run folder, before anything long begins.

    Raises:
        StaleError: it is none.
    """
    run_dir = Path(run_dir)
    if not (run_dir / CONFIG).is_file() or not (run_dir / BEST_WEIGHTS).is_file():
        raise StaleError(
            f"{run_dir} is not a run folder: {CONFIG} or {BEST_WEIGHTS} is absent.",
            "Give the folder that ich-train printed.",
        )
    return run_dir


def probabilities(
    model, batches: Iterable, total: int, progress: Progress | None = None, step: str = "predicting"
) -> np.ndarray:
    """Run a network over batches.

    Args:
        model: gives logits or probabilities, float32 (n, 6).
        batches: of inputs (n, size, size, channels), or of (inputs, labels).
        total: number of samples, for the progress.
        progress: called as progress(step, done, total).

    Returns:
        float32 (total, 6), probabilities in the order of `LABELS`.

    Raises:
        DataError: the network gave values that are not finite.
    """
    from ich_keras.models.classifier import ends_in_logits

    parts, done = [], 0
    if progress is not None:
        progress(step, 0, total)
    # Of Keras' backends only torch takes the loaders' tensors in `predict_on_batch`.
    takes_tensors = loaded_backend() == "torch"
    for batch in batches:
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        inputs = inputs if takes_tensors else np.asarray(inputs)
        parts.append(np.asarray(model.predict_on_batch(inputs), np.float32))
        done += len(parts[-1])
        if progress is not None:
            progress(step, done, total)
    outputs = np.concatenate(parts) if parts else np.zeros((0, NUM_LABELS), np.float32)
    if not np.isfinite(outputs).all():
        raise DataError(
            f"{int((~np.isfinite(outputs)).any(axis=1).sum())} of {len(outputs)} predictions are"
            " not finite.",
            "The weights or the inputs are damaged.",
        )
    if ends_in_logits(model):
        # Written with tanh, which cannot overflow.
        outputs = (0.5 * (1.0 + np.tanh(0.5 * outputs))).astype(np.float32)
    return outputs


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
    model,
    size: int,
    index: SeriesIndex,
    batch_size: int = 32,
    progress: Progress | None = None,
    intensity: str = "windows",
    view: View | None = None,
    rule: str = DEFAULT_RULE,
    cache_size: int | None = None,
    workers: int = 0,
) -> FolderPrediction:
    """Predict every slice or series of an index, reading the DICOM files as it goes.

    One series is in memory at a time, resized; with workers, more that are read ahead: two for each
    worker, at most `AHEAD_BYTES`.

    Args:
        model: from `load_run`.
        size: rows and columns of its input.
        index: localizers and other planes are taken out first.
        batch_size: samples a step.
        progress: called as progress("predicting", done, total).
        intensity: of the run.
        view: of the run; None takes single slices.
        rule: from slices to series, a key of `ich_keras.metrics.aggregation.RULES`.
        cache_size: rows and columns of the cache the network was trained from, at which HU become
            windows (`ich_keras.data.inputs`); None takes `size`.
        workers: processes that read; 0 reads in this one. The result does not depend on it.

    Raises:
        DataError: nothing could be predicted.
        EnvironmentProblem: a worker process died.
    """
    view = view or View()
    index = index.usable()
    kept: list[np.ndarray] = []
    rejects: list[tuple[str, str, str]] = []
    rows = index.slices.groupby("series_uid", sort=False).indices
    paths = index.slices["container"].to_numpy()

    def inputs(read: Callable):
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
                yield _inputs(hu, samples, usable[start : start + batch_size], size, intensity)

    total = len(index.series) if view.kind == "series" else len(index.slices)
    longest = max((len(part) for part in rows.values()), default=0)
    with _reading(cache_size or size, len(rows), longest, workers) as read:
        batches = _full_batches(inputs(read), batch_size)
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


def _inputs(hu: np.ndarray, samples, chosen: np.ndarray, size: int, intensity: str) -> np.ndarray:
    if not samples.view.is_volume:
        return slice_input(hu[chosen], size, intensity)
    stacks = [
        stack_slices(hu, samples.rows[i], None if samples.shifts is None else samples.shifts[i])
        for i in chosen
    ]
    return volume_input(np.stack(stacks), size, intensity)


def _full_batches(parts: Iterable[np.ndarray], batch_size: int):
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
    run_dir: Path | str,
    dicom_dir: Path | str,
    out: Path | str | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> FolderPrediction:
    """Predict every head CT slice below a folder with a trained run.

    Args:
        run_dir: a run folder.
        dicom_dir: any folder; what is not a usable slice is listed in `rejects`.
        out: a new folder for predictions.csv (not of whole series), series.csv and rejects.csv;
            None writes nothing.
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
    run_dir = require_run(run_dir)
    with contextlib.nullcontext() if out is None else new_folder(out) as folder:
        index = index_folder(dicom_dir, workers=workers, progress=progress)
        config, model = load_run(run_dir, device)
        view = run_view(config)
        result = predict_index(
            model,
            config.data.size,
            index,
            batch_size or config.fit.batch_size or DEFAULT_BATCH[view.kind],
            progress,
            run_intensity(config),
            view,
            run_rule(run_dir),
            # Runs older than the entry: as if their cache had the size of the input.
            read_json(run_dir / DATA).get(CACHE_SIZE),
            workers,
        )
        if folder is not None:
            if result.slices is not None:
                atomic_write(folder / "predictions.csv", csv_text(result.slices))
            atomic_write(folder / "series.csv", csv_text(result.series))
            atomic_write(folder / "rejects.csv", csv_text(result.rejects))
    return result
