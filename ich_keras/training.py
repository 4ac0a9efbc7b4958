"""Training: from a cache with labels to a run folder."""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ich_keras.config import RunConfig
from ich_keras.ct.phantom_dicom import is_synthetic
from ich_keras.ct.series import SeriesIndex
from ich_keras.data.cache import CTCache
from ich_keras.data.inputs import INTENSITIES
from ich_keras.data.split import SPLITS, Split, make_split
from ich_keras.data.views import Samples, make_samples
from ich_keras.environment import (
    choose_backend,
    choose_device,
    choose_precision,
    environment_record,
)
from ich_keras.errors import DataError, DivergedError, StaleError, UsageError
from ich_keras.evaluation import SPLIT, evaluate
from ich_keras.files import atomic_write, lock, read_json, require_absent, write_json
from ich_keras.labels import LABELS
from ich_keras.models.presets import PRESETS
from ich_keras.prediction import (
    BEST_WEIGHTS,
    CACHE_SIZE,
    CONFIG,
    DATA,
    DEFAULT_BATCH,
    Progress,
    network,
    probabilities,
    require_size,
    run_view,
)
from ich_keras.report import REPORT, write_report

# Batches whose gradients make one step: batches of one series are too few samples for one.
DEFAULT_ACCUMULATION = {"slice": 1, "slab": 1, "series": 8}

HISTORY = "history.csv"
ENVIRONMENT = "environment.json"
WEIGHTS = "weights.json"
STATE = "state"
MODEL = "model.keras"
LOCK = "training.lock"  # while it runs


@dataclass(frozen=True)
class TrainingPlan:
    """What a training will do, before it does it.

    Args:
        num_slices: slices per split.
        num_series: series per split.
        num_patients: patients per split.
        num_positive: positive training slices per label.
        samples_per_epoch: slices, slabs or series an epoch shows to the network.
        steps_per_epoch: batches an epoch.
        total_steps: batches in all, which the schedule counts; `fit.accumulate` of them make one
            step of the optimiser.
        learning_rate: the rate in force.
        warning: what is wrong with the split by name ("" for a sound one).
        note: what the split left out, counted ("" when nothing was).
        weights: the file training starts from, and its source ("" from scratch).
    """

    num_slices: dict[str, int]
    num_series: dict[str, int]
    num_patients: dict[str, int]
    num_positive: dict[str, int]
    samples_per_epoch: int
    steps_per_epoch: int
    total_steps: int
    learning_rate: float
    warning: str
    note: str
    weights: str = ""

    def to_dict(self) -> dict:
        """Return the plan ready for JSON."""
        return asdict(self)


@dataclass
class _Fitting:
    """What the validation after each epoch has to remember."""

    rows: list[dict] = field(default_factory=list)
    best_loss: float = np.inf
    best_epoch: int = 0
    began: float = field(default_factory=time.perf_counter)


def limit_series(slices: pd.DataFrame, count: int | None) -> np.ndarray:
    """Return the rows of the first `count` series of a slice table (None: of all)."""
    if count is None:
        return np.arange(len(slices))
    uids = slices["series_uid"].drop_duplicates()[:count]
    return np.flatnonzero(slices["series_uid"].isin(uids).to_numpy())


def split_indices(slices: pd.DataFrame, config: RunConfig) -> tuple[Split, dict[str, np.ndarray]]:
    """Split a slice table as configured and refuse what leaks.

    Returns:
        (the split, rows of the table for "train", "valid" and "test").

    Raises:
        DataError: no labels, missing PatientID, too few patients, or a leaking split.
    """
    if not set(LABELS) <= set(slices):
        raise DataError("the data have no labels.", "Give --labels stage_2_train.csv.")
    rows = limit_series(slices, config.data.limit_series)
    chosen = slices.iloc[rows]
    split = make_split(config.data.split, chosen, config.seed)
    return split, {name: rows[split.indices(chosen, name)] for name in SPLITS}


def plan_training(tables: SeriesIndex | CTCache, config: RunConfig) -> TrainingPlan:
    """Say what `train` would do: slices, series and patients per split, steps, learning rate.

    Args:
        tables: an index or a cache, with labels.
        config: of the training.

    Raises:
        DataError: as `train`.
    """
    config = settled(config)
    split, indices = split_indices(tables.slices, config)
    samples = make_samples(tables.slices, tables.series, run_view(config))
    return _plan(tables.slices, config, split, indices, samples)


def _plan(
    slices: pd.DataFrame, config: RunConfig, split: Split, indices: dict, samples: Samples
) -> TrainingPlan:
    from ich_keras.data.batches import epoch_plan
    from ich_keras.models.presets import require_trainable

    require_trainable(network(config), config.fit.batch_size)
    chosen = {name: samples.of_rows(slices, rows, name) for name, rows in indices.items()}
    epoch = epoch_plan(
        samples, chosen["train"], config.fit.batch_size, seed=0, balance=config.data.balance
    )
    total_steps = epoch.num_batches * config.fit.epochs
    if total_steps < config.fit.accumulate:
        raise UsageError(
            f"{total_steps} batches in all ({config.fit.epochs} epochs), of which"
            f" {config.fit.accumulate} make one step of the optimiser: no weight would change.",
            "Give fewer --accumulate, more --epochs or more data.",
        )
    tables = {name: slices.iloc[rows] for name, rows in indices.items()}
    return TrainingPlan(
        num_slices={name: len(table) for name, table in tables.items()},
        num_series={name: table["series_uid"].nunique() for name, table in tables.items()},
        num_patients={name: table["patient_id"].nunique() for name, table in tables.items()},
        num_positive={label: int(tables["train"][label].sum()) for label in LABELS},
        samples_per_epoch=sum(len(batch) for batch in epoch.batches(0)),
        steps_per_epoch=epoch.num_batches,
        total_steps=total_steps,
        learning_rate=config.learning_rate,
        warning=split.warning,
        note=split.note,
        weights=_weights_line(config),
    )


def _weights_line(config: RunConfig) -> str:
    from ich_keras.models.weights import find_weights, origin, read_record

    if config.weights is None:
        return ""
    path = find_weights(config.weights, config.preset)
    return f"{path} ({origin(read_record(path))})"


def seconds_per_step(config: RunConfig, repeats: int = 2) -> float:
    """Measure one training step of the configured network on random input, after one to warm up.

    Returns:
        Seconds; the least of the repeats. Preparing batches and validation come on top.
    """
    config = _resolved(config)
    model, _ = _compiled_model(config, total_steps=repeats + 1)
    random = np.random.default_rng(0)
    shape = (config.fit.batch_size, *network(config).input_shape)
    inputs = random.standard_normal(shape, np.float32)
    labels = random.integers(0, 2, (config.fit.batch_size, len(LABELS))).astype(np.float32)
    model.train_on_batch(inputs, labels)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        model.train_on_batch(inputs, labels)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _resolved(config: RunConfig) -> RunConfig:
    """Settle backend, device and precision, before Keras is imported, and what enters the
    network."""
    backend, device = choose_backend(config.backend), choose_device(config.device)
    precision = choose_precision(config.precision, device)
    return settled(replace(config, backend=backend, device=device, precision=precision))


def settled(config: RunConfig) -> RunConfig:
    """Fill in what was left open about the samples: view, slices, batch size, accumulation and
    intensity.

    Raises:
        UsageError: the view does not fit the preset, or the weights do not exist.
    """
    view = run_view(config)
    data = replace(config.data, view=view.kind, slices=view.num_slices)
    if data.reverse and not (view.is_volume and data.augment != "none"):
        raise UsageError(
            "data.reverse turns augmented slabs and series upside down; this run has none.",
            "Leave it out.",
        )
    fit = replace(
        config.fit,
        batch_size=config.fit.batch_size or DEFAULT_BATCH[view.kind],
        accumulate=config.fit.accumulate or DEFAULT_ACCUMULATION[view.kind],
    )
    return _with_intensity(replace(config, data=data, fit=fit))


def _with_intensity(config: RunConfig) -> RunConfig:
    """Settle the intensity: as given, as the weights were made for, or as the preset's channels
    ask. A weights file that does not exist is refused here, before anything long begins."""
    from ich_keras.models.weights import find_weights, read_record

    record = {}
    if config.weights is not None:
        record = read_record(find_weights(config.weights, config.preset))
    if config.data.intensity is not None:
        return config
    network_of_file = record.get("network") or {}
    # The channels as they are in the file: `weights-convert` may have changed them.
    channels = (network_of_file.get("input_shape") or [PRESETS[config.preset].spec.channels])[-1]
    fitting = [name for name, known in INTENSITIES.items() if known.channels == channels]
    made_for = record.get("intensity")
    intensity = made_for if made_for in fitting or not fitting else fitting[0]
    return replace(config, data=replace(config.data, intensity=intensity))


def _compiled_model(config: RunConfig, total_steps: int):
    """Return the network, ready for `fit`, and the account of the weights it started from."""
    from ich_keras.models.classifier import classifier, compile_classifier, freeze
    from ich_keras.models.weights import find_weights, load_weights

    spec = network(config)
    model = classifier(spec, output="logits", precision=config.precision)
    loaded = None
    if config.weights is not None:
        loaded = load_weights(model, find_weights(config.weights, config.preset), spec)
    if config.fit.freeze is not None:
        freeze(model, config.fit.freeze)
    compile_classifier(
        model,
        learning_rate=config.learning_rate,
        loss=config.fit.loss,
        schedule=config.fit.schedule,
        total_steps=total_steps,
        warmup_steps=config.fit.warmup_steps,
        weight_decay=config.fit.weight_decay,
        backbone_factor=config.fit.backbone_factor,
        accumulate=config.fit.accumulate,
        step=config.fit.step,
        recompute=config.fit.recompute,
        compiled=config.fit.compiled,
    )
    return model, loaded


def train(
    config: RunConfig,
    cache: CTCache,
    out: Path | str,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Train a classifier; keep the best weights by validation loss; evaluate them.

    Args:
        config: everything there is to choose.
        cache: with labels joined.
        out: a new run folder.
        progress: called as progress(step, done, total).
        tell: called with one line of text per epoch.

    Returns:
        The run folder: config.json, environment.json, data.json, split.json, history.csv,
        best.weights.h5, model.keras, state/, and for the validation and test split
        predictions-*.csv and metrics-*.json, and report.md.

    Raises:
        UsageError: `out` exists, the cache's slices are smaller than the input, or the backend
            cannot be changed any more.
        DataError: no labels, missing PatientID, too few patients, or a leaking split.
        DivergedError: a loss or weight is not finite; the last good state stays.
    """
    out = require_absent(out)
    tell = tell or (lambda line: None)
    require_size(config, cache)
    config = _resolved(config)
    ready = _ready(config, cache)
    try:
        with lock(out / LOCK):
            write_json(out / CONFIG, config.to_dict())
            environment = environment_record(config.device)
            write_json(out / ENVIRONMENT, {**environment, "seed": config.seed})
            write_json(
                out / DATA,
                {
                    "cache": cache.fingerprint,
                    "slices": len(cache.slices),
                    CACHE_SIZE: cache.size,
                    "plan": ready.plan.to_dict(),
                    "synthetic": is_synthetic(cache.slices),
                },
            )
            ready.split.save(out / SPLIT)
            if ready.loaded is not None:
                write_json(out / WEIGHTS, {**asdict(ready.loaded), "path": str(ready.loaded.path)})
                tell(f"Weights: {ready.loaded}.")
            tell(_beginning(config, ready.plan))
            _fit(ready, out, _Fitting(), progress, tell)
            _finish(config, cache, out, progress)
    finally:
        # Without one finished epoch the folder holds nothing worth its name.
        if not (out / STATE).is_dir():
            shutil.rmtree(out, ignore_errors=True)
    (out / LOCK).unlink()
    return out


def resume(
    run_dir: Path | str,
    cache: CTCache,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Go on with a training that was interrupted, after its last finished epoch.

    On a CPU, with the same versions and as many threads, weights and history are bit-equal to
    those of a training that was not interrupted.

    Args:
        run_dir: the run folder that `train` left; its configuration and split hold.
        cache: the one the training began with.
        progress, tell: as of `train`.

    Returns:
        The run folder, as `train` leaves it.

    Raises:
        UsageError: the run is finished.
        StaleError: no interrupted training, another cache or other labels than it began with, all
            states damaged, or it is still running.
        DivergedError: as `train`.
    """
    run_dir, tell = Path(run_dir), tell or (lambda line: None)
    if (run_dir / REPORT).is_file():
        raise UsageError(f"the training in {run_dir} is finished.", f"Look at its {REPORT}.")
    if not is_interrupted(run_dir):
        raise StaleError(
            f"{run_dir} is not an interrupted training: it has no state of a finished epoch.",
            "Give a folder that ich-train has begun, or start anew.",
        )
    with lock(run_dir / LOCK):
        began = RunConfig.from_dict(read_json(run_dir / CONFIG))
        config = _resolved(_of_run(began, run_dir))
        ready = _ready(config, cache)
        _require_same_data(run_dir, cache, ready.plan)

        from ich_keras.checkpoints import load_state

        state = load_state(run_dir / STATE, ready.model, tell)
        rows = state["history"]
        fitting = _Fitting(
            rows,
            state["best_loss"],
            state["best_epoch"],
            began=time.perf_counter() - rows[-1]["seconds"],
        )
        tell(f"Going on after epoch {state['epoch']} of {config.fit.epochs}.")
        if state["epoch"] < config.fit.epochs:
            _fit(ready, run_dir, fitting, progress, tell, done=state["epoch"])
        _finish(config, cache, run_dir, progress)
    (run_dir / LOCK).unlink()
    return run_dir


def is_interrupted(run_dir: Path) -> bool:
    """Whether a training has finished an epoch there, but not all of its work."""
    return any((run_dir / STATE).glob("epoch-*")) and not (run_dir / REPORT).is_file()


def _of_run(config: RunConfig, run_dir: Path) -> RunConfig:
    """Return the configuration of a run that goes on: its own split, and its own weights instead
    of those it started from, which need not be there any more."""
    fit = replace(config.fit, learning_rate=config.learning_rate)
    data = replace(config.data, split=str(run_dir / SPLIT))
    return replace(config, weights=None, data=data, fit=fit)


def _require_same_data(run_dir: Path, cache: CTCache, plan: TrainingPlan) -> None:
    before = read_json(run_dir / DATA)
    if before["cache"] != cache.fingerprint:
        raise StaleError(
            f"{cache.path} is not the cache that the training in {run_dir} began with: fingerprint"
            f" {cache.fingerprint[:12]}, not {before['cache'][:12]}.",
            "Give that cache.",
        )
    said = {"warning", "note", "weights"}
    now = plan.to_dict()
    differing = [
        f"{name} {now[name]}, not {before['plan'].get(name)}"
        for name in now
        if name not in said and now[name] != before["plan"].get(name)
    ]
    if differing:
        raise StaleError(
            f"the training in {run_dir} began with other data: {'; '.join(differing)}.",
            "Give the labels it began with.",
        )


@dataclass(frozen=True)
class _Ready:
    """What a training needs, made from its configuration and a cache."""

    config: RunConfig
    plan: TrainingPlan
    split: Split
    model: object
    loaded: object
    loader: object
    validation: object
    valid_labels: np.ndarray


def _ready(config: RunConfig, cache: CTCache) -> _Ready:
    """Make network and batches.

    Args:
        config: settled.
        cache: with labels.
    """
    split, indices = split_indices(cache.slices, config)
    view = run_view(config)
    samples = make_samples(cache.slices, cache.series, view)
    plan = _plan(cache.slices, config, split, indices, samples)
    chosen = {name: samples.of_rows(cache.slices, rows, name) for name, rows in indices.items()}

    import keras

    from ich_keras.data.batches import view_batches

    keras.utils.set_random_seed(config.seed)
    model, loaded = _compiled_model(config, plan.total_steps)
    common = {
        "batch_size": config.fit.batch_size,
        "size": config.data.size,
        "workers": config.data.loader_workers,
        "intensity": config.data.intensity,
        "samples": samples,
    }
    loader = view_batches(
        cache,
        view,
        chosen["train"],
        seed=config.seed,
        balance=config.data.balance,
        augment=None if config.data.augment == "none" else config.data.augment,
        reverse=config.data.reverse,
        **common,
    )
    validation = view_batches(cache, view, chosen["valid"], **common)
    valid_labels = samples.labels[chosen["valid"]]
    return _Ready(config, plan, split, model, loaded, loader, validation, valid_labels)


def _fit(
    ready: _Ready,
    out: Path,
    fitting: _Fitting,
    progress: Progress | None,
    tell: Callable[[str], None],
    done: int = 0,
) -> None:
    """Train from epoch `done` on, keeping weights and state in `out` after each."""
    ready.model.fit(
        ready.loader,
        epochs=ready.config.fit.epochs,
        initial_epoch=done,
        shuffle=False,  # the loader does it
        verbose=0,
        callbacks=[
            _epochs(ready.loader, ready.config, progress),
            _validation(ready, out, fitting, tell, progress),
        ],
    )


def _beginning(config: RunConfig, plan: TrainingPlan) -> str:
    start = f"from weights {config.weights}" if config.weights else "from scratch"
    kinds = {"slab": f"slabs of {config.data.slices} slices", "series": "whole series"}
    what = f"on {kinds[config.data.view]} " if config.data.view in kinds else ""
    line = f"Training {what}{start}, learning rate {plan.learning_rate:g} ({config.fit.schedule})"
    if config.fit.backbone_factor != 1:
        line += f", backbone at {config.fit.backbone_factor:g} of it"
    if config.fit.freeze is not None:
        line += f", frozen up to {config.fit.freeze}"
    if config.fit.accumulate > 1:
        line += f", {config.fit.accumulate} batches a step"
    line += f", {config.precision}"
    return line + "."


def _epochs(loader, config: RunConfig, progress: Progress | None):
    """Return the callback that begins an epoch, for loader and network, and shows the progress."""
    import keras

    from ich_keras.data.augment import sample_seed

    class Epochs(keras.callbacks.Callback):
        # Without this mark Keras reads the logs back from the device after every step.
        async_safe = True

        def on_epoch_begin(self, epoch, logs=None):
            loader.epoch = epoch
            # On torch Keras' dropout draws from torch's global generator. Seeding it by epoch makes
            # a resumed training equal to an uninterrupted one, with no generator state to save.
            keras.utils.set_random_seed(sample_seed(config.seed, epoch, 0))
            self.step = f"epoch {epoch + 1}/{config.fit.epochs}"

        def on_train_batch_end(self, batch, logs=None):
            if progress is not None:
                progress(self.step, batch + 1, len(loader))

    return Epochs()


def _validation(ready: _Ready, out, fitting, tell, progress):
    """Return the callback that validates, keeps the best weights and saves the state."""
    import keras

    from ich_keras.checkpoints import save_state
    from ich_keras.metrics.binary import binary_metrics, format_metric
    from ich_keras.models.weights import require_finite, save_weights

    config, model, labels = ready.config, ready.model, ready.valid_labels
    record = {
        "network": network(config).to_dict(),
        "preset": config.preset,
        "intensity": config.data.intensity,
    }

    class Validation(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            # The rate of the step that comes next: after the last one a cosine has reached 0.
            rate = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
            train_loss = float(logs["loss"])
            if not np.isfinite(train_loss):
                raise DivergedError(
                    f"the training loss of epoch {epoch + 1} is {train_loss}.",
                    "Lower --learning-rate.",
                )
            try:
                require_finite(model, f"after epoch {epoch + 1}")
                values = probabilities(
                    model, ready.validation, len(labels), progress, step="validating"
                )
            except DataError as error:
                raise DivergedError(error.message, "Lower --learning-rate.") from error
            metrics = binary_metrics(labels, values)
            loss = metrics["log_loss"]
            is_best = loss < fitting.best_loss
            if is_best:
                fitting.best_loss, fitting.best_epoch = loss, epoch + 1
                save_weights(model, out / BEST_WEIGHTS, record)
            fitting.rows.append(
                {
                    "epoch": epoch + 1,
                    "learning_rate": rate,
                    "train_loss": train_loss,
                    "valid_log_loss": loss,
                    "valid_auroc_any": metrics["auroc"]["any"],
                    "seconds": round(time.perf_counter() - fitting.began, 1),
                }
            )
            atomic_write(out / HISTORY, pd.DataFrame(fitting.rows).to_csv(index=False))
            save_state(
                out / STATE,
                model,
                epoch + 1,
                {
                    "history": fitting.rows,
                    "best_loss": fitting.best_loss,
                    "best_epoch": fitting.best_epoch,
                },
            )
            tell(
                f"epoch {epoch + 1}/{config.fit.epochs}: training loss {train_loss:.4f}, validation"
                f" log loss {loss:.4f}, AUROC(any) {format_metric(metrics['auroc']['any'])}"
                + (" (best so far)" if is_best else "")
            )

    return Validation()


def _finish(config: RunConfig, cache: CTCache, out: Path, progress: Progress | None) -> None:
    """Evaluate the best weights and write the report and the `.keras` file."""
    from ich_keras.checkpoints import save_model
    from ich_keras.prediction import load_run

    _, model = load_run(out, config.device)
    # In float32 for whoever loads it: other machines may have no faster type.
    save_model(load_run(out, config.device, precision="float32")[1], out / MODEL)
    for name in ("valid", "test"):
        evaluate(out, cache, name, model=model, progress=progress)
    write_report(out)
