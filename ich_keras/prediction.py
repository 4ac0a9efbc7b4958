"""From a run and a folder of DICOM files to six probabilities per slice and per series."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ich_keras.config import RunConfig
from ich_keras.ct.dicom import read_hu
from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.ct.tables import csv_text
from ich_keras.data.inputs import intensity_of, resize_hu, slice_input
from ich_keras.environment import choose_backend, choose_device, choose_precision
from ich_keras.errors import DataError, RejectedFile, StaleError, UsageError
from ich_keras.files import atomic_write, read_json, require_absent
from ich_keras.labels import LABELS, NUM_LABELS
from ich_keras.models.presets import PRESETS, ModelSpec, preset

Progress = Callable[[str, int, int], None]

CONFIG = "config.json"
BEST_WEIGHTS = "best.weights.h5"
# What says which slice a row of predictions is about.
SLICE_COLUMNS = ("sop_instance_uid", "series_instance_uid", "slice_index", "position_mm")


@dataclass(frozen=True)
class FolderPrediction:
    """What `predict_folder` found.

    Args:
        slices: one row per slice: `SLICE_COLUMNS` and six probabilities.
        series: one row per series: its UID, number of slices, verdict, the six highest
            probabilities of its slices.
        rejects: path, code, detail of every file that could not be used.
    """

    slices: pd.DataFrame
    series: pd.DataFrame
    rejects: pd.DataFrame

    def __repr__(self) -> str:
        return (
            f"FolderPrediction({len(self.slices)} slices, {len(self.series)} series,"
            f" {len(self.rejects)} rejects)"
        )


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
    """Return the network of a run, for inputs of its size and intensity.

    Raises:
        UsageError: the preset takes volumes, which runs do not make yet.
    """
    if PRESETS[config.preset].spec.rank != 2:
        raise UsageError(
            f"preset {config.preset} takes volumes; runs are made of single slices.",
            "Take a 2D preset (`ich presets`), or build and fit it in Python:"
            f" build_classifier({config.preset!r}).",
        )
    size, channels = config.data.size, intensity_of(run_intensity(config)).channels
    return preset(config.preset, (size, size, channels), config.norm)


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
    for batch in batches:
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
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
) -> FolderPrediction:
    """Predict every slice of an index, reading the DICOM files as it goes.

    Args:
        model: from `load_run`.
        size: rows and columns of its input.
        index: localizers and other planes are taken out first.
        batch_size: slices a step.
        progress: called as progress("predicting", done, total).
        intensity: of the run.
    """
    index = index.usable()
    kept, rejects = [], []

    def batches():
        waiting = []
        for row in index.slices.itertuples():
            try:
                hu = read_hu(row.container)
            except RejectedFile as reject:
                rejects.append((row.container, reject.code, reject.detail))
                continue
            waiting.append(resize_hu(hu, size))
            kept.append(row.Index)
            if len(waiting) == batch_size:
                yield slice_input(np.stack(waiting), intensity=intensity)
                waiting.clear()
        if waiting:
            yield slice_input(np.stack(waiting), intensity=intensity)

    values = probabilities(model, batches(), len(index.slices), progress)
    rejected = pd.DataFrame(rejects, columns=list(index.rejects.columns))
    rejected = pd.concat([index.rejects, rejected]) if rejects else index.rejects
    if not kept:
        raise DataError(
            f"no slice of {len(rejected)} files could be predicted.", "rejects.csv would list all."
        )
    table = probability_table(index.slices.loc[kept], values)
    return FolderPrediction(
        table, _series_table(table, index), rejected.sort_values("path").reset_index(drop=True)
    )


def _series_table(table: pd.DataFrame, index: SeriesIndex) -> pd.DataFrame:
    grouped = table.groupby("series_instance_uid", sort=False)
    series = grouped[list(LABELS)].max()
    series.insert(0, "num_slices", grouped.size())
    verdicts = index.series.set_index("series_uid")["verdict"]
    series.insert(1, "verdict", verdicts.reindex(series.index))
    return series.reset_index()


def predict_folder(
    run_dir: Path | str,
    dicom_dir: Path | str,
    out: Path | str | None = None,
    batch_size: int = 32,
    workers: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> FolderPrediction:
    """Predict every head CT slice below a folder with a trained run.

    Args:
        run_dir: a run folder.
        dicom_dir: any folder; what is not a usable slice is listed in `rejects`.
        out: a new folder for predictions.csv, series.csv and rejects.csv; None writes nothing.
        batch_size: slices a step.
        workers: processes that read headers; 0 reads them in this one.
        device: "auto", "cpu" or "cuda".
        progress: called as progress(step, done, total).

    Raises:
        UsageError: `out` exists, or `dicom_dir` does not.
        StaleError: `run_dir` is not a finished run.
        DataError: not one usable slice.
    """
    if out is not None:
        out = require_absent(out)
    run_dir = require_run(run_dir)
    index = index_folder(dicom_dir, workers=workers, progress=progress)
    config, model = load_run(run_dir, device)
    result = predict_index(
        model, config.data.size, index, batch_size, progress, run_intensity(config)
    )
    if out is not None:
        atomic_write(out / "predictions.csv", csv_text(result.slices))
        atomic_write(out / "series.csv", csv_text(result.series))
        atomic_write(out / "rejects.csv", csv_text(result.rejects))
    return result
