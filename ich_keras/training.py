"""Training: from a cache with labels to a run folder."""

import hashlib
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ich_keras.checkpoints import has_state, load_state
from ich_keras.config import RunConfig
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.views import Samples, make_samples
from ich_keras.environment import choose_backend, choose_device, environment_record
from ich_keras.errors import DataError, DivergedError, StaleError, UsageError
from ich_keras.evaluation import SPLIT, evaluate
from ich_keras.files import atomic_write, lock, read_json, require_absent, write_json
from ich_keras.labels import LABELS
from ich_keras.phantom.dicom import is_synthetic
from ich_keras.planning import TrainingPlan, plan_of, resolved, split_indices
from ich_keras.prediction import (
    BEST_WEIGHTS,
    CACHE_SIZE,
    CHOICES,
    CONFIG,
    DATA,
    load_run,
    network,
    probabilities,
    require_size,
    run_precision,
    run_view,
)
from ich_keras.progress import Progress, Tell
from ich_keras.report import REPORT, write_report

HISTORY = "history.csv"
ENVIRONMENT = "environment.json"
WEIGHTS = "weights.json"
STATE = "state"
MODEL = "model.keras"
LOCK = "training.lock"
CACHE_PATH = "cache_path"  # of data.json
EPOCH = "epoch"  # of the record of the best weights
SECONDS_BETWEEN_LOSSES = 1.0


@dataclass
class _Course:
    """How a training has gone so far: what the validation after each epoch has to remember."""

    rows: list[dict] = field(default_factory=list)
    best_loss: float = np.inf
    best_epoch: int = 0

    @property
    def done(self) -> int:
        """Epochs finished."""
        return len(self.rows)


def seconds_per_step(config: RunConfig, repeats: int = 2) -> float:
    """Measure one training step of the configured network on random input, after one to warm up.

    Returns:
        Seconds; the least of the repeats. Preparing batches and validation come on top.
    """
    config = resolved(config)
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


def _compiled_model(config: RunConfig, total_steps: int, loads: bool = True):
    """Return the network, ready for `fit`, and the account of the weights it started from."""
    import keras

    from ich_keras.models.classifier import classifier, compile_classifier, freeze
    from ich_keras.models.weights import find_weights, load_weights

    keras.utils.set_random_seed(config.seed)
    spec = network(config)
    model = classifier(spec, output="logits", precision=config.precision)
    loaded = None
    if loads and config.weights is not None:
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
    tell: Tell | None = None,
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
    config = resolved(config)
    split, indices = split_indices(cache.slices, config)
    samples = make_samples(cache.slices, cache.series, run_view(config))
    plan = plan_of(cache.slices, config, split, indices, samples)
    model, loaded = _compiled_model(config, plan.total_steps)
    with lock(out / LOCK):
        if any(path.name != LOCK for path in out.iterdir()):
            require_absent(out)  # another training was faster
        try:
            write_json(out / CONFIG, config.to_dict())
            environment = environment_record(config.device)
            started = datetime.now(UTC).isoformat(timespec="seconds")
            write_json(out / ENVIRONMENT, {**environment, "seed": config.seed, "started": started})
            write_json(
                out / DATA,
                {
                    "cache": cache.fingerprint,
                    CACHE_PATH: str(cache.path.absolute()),
                    "labels": _labels_fingerprint(cache.slices),
                    "slices": len(cache.slices),
                    CACHE_SIZE: cache.size,
                    "plan": plan.to_dict(),
                    "synthetic": is_synthetic(cache.slices),
                },
            )
            split.save(out / SPLIT)
            if loaded is not None:
                write_json(out / WEIGHTS, {**asdict(loaded), "path": str(loaded.path)})
                tell(f"Weights: {loaded}.")
            tell(_beginning(config, plan))
            training = _make_training(config, cache, samples, indices, model, out)
            _fit(training, _Course(), progress, tell)
            _finish(training, progress)
        finally:
            # Without one finished epoch the folder holds nothing worth its name.
            if not has_state(out / STATE):
                shutil.rmtree(out, ignore_errors=True)
    (out / LOCK).unlink(missing_ok=True)
    return out


def resume(
    run_dir: Path | str,
    cache: CTCache,
    device: str | None = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> Path:
    """Go on with a training that was interrupted, after its last finished epoch.

    On a CPU of the same kind, with the same versions and as many threads, weights and history are
    bit-equal to those of a training that was not interrupted. What is another now is told, and
    noted in environment.json.

    Args:
        run_dir: the run folder that `train` left; its configuration and split hold.
        cache: the one the training began with, with the same labels.
        device: None takes the run's.
        progress, tell: as of `train`.

    Returns:
        The run folder, as `train` leaves it.

    Raises:
        UsageError: the run is finished, or the backend cannot be changed any more.
        LostState: all states are damaged.
        StaleError: no interrupted training, another cache or other labels than it began with, or
            it is still running.
        EnvironmentProblem: the run's device is not there.
        DivergedError: as `train`.
    """
    tell = tell or (lambda line: None)
    run_dir = require_interrupted(run_dir)
    with lock(run_dir / LOCK):
        require_interrupted(run_dir)
        _require_same_data(run_dir, cache)
        config = RunConfig.from_dict(read_json(run_dir / CONFIG))
        backend, device = choose_backend(config.backend), choose_device(device or config.device)
        config = replace(
            config, backend=backend, device=device, precision=run_precision(config, device)
        )
        changes = changed_environment(run_dir, device)
        for line in changes:
            tell(f"Other than when it began: {line}.")

        # The split as it was made: a file that was named may have changed or gone.
        by_file = replace(config, data=replace(config.data, split=str(run_dir / SPLIT)))
        _, indices = split_indices(cache.slices, by_file)
        samples = make_samples(cache.slices, cache.series, run_view(config))
        total_steps = read_json(run_dir / DATA)["plan"]["total_steps"]
        model, _ = _compiled_model(config, total_steps, loads=False)
        training = _make_training(config, cache, samples, indices, model, run_dir)
        course = _restored(training, tell)
        if changes:
            record = read_json(run_dir / ENVIRONMENT)
            resumed = [*record.get("resumed", []), {"epoch": course.done, "changed": changes}]
            write_json(run_dir / ENVIRONMENT, record | {"resumed": resumed})
        tell(
            f"Resuming after epoch {course.done} of {config.fit.epochs}, {backend}, {device},"
            f" {config.precision}."
        )
        if course.done < config.fit.epochs:
            _fit(training, course, progress, tell)
        _finish(training, progress)
    (run_dir / LOCK).unlink(missing_ok=True)
    return run_dir


def is_interrupted(run_dir: Path | str) -> bool:
    """Whether a training has finished an epoch there, but not all of its work."""
    return has_state(Path(run_dir) / STATE) and not (Path(run_dir) / REPORT).is_file()


def require_interrupted(run_dir: Path | str) -> Path:
    """Return the path when it holds a training that can go on.

    Raises:
        UsageError: the run is finished.
        StaleError: it holds none.
    """
    run_dir = Path(run_dir)
    if (run_dir / REPORT).is_file():
        raise UsageError(f"the training in {run_dir} is finished.", f"Look at its {REPORT}.")
    if not run_dir.is_dir():
        raise StaleError(f"the folder {run_dir} does not exist.", "Is this the right folder?")
    if not is_interrupted(run_dir):
        raise StaleError(
            f"{run_dir} is not an interrupted training: it has no state of a finished epoch.",
            "Give a folder that ich-train has begun; if that is one, remove it and start anew.",
        )
    return run_dir


def cache_of(run_dir: Path | str) -> Path | None:
    """Return where the cache was that a training began with; None of older runs."""
    path = read_json(Path(run_dir) / DATA).get(CACHE_PATH)
    return None if path is None else Path(path)


def changed_environment(run_dir: Path | str, device: str) -> list[str]:
    """Say what is another now than when a training began: packages, backend, device, machine, and
    the precision, where this hardware lacks the run's. What an older version did not write down
    counts as another."""
    before, now = read_json(Path(run_dir) / ENVIRONMENT), environment_record(device)
    config = RunConfig.from_dict(read_json(Path(run_dir) / CONFIG))
    # The processor is the device, or beside a GPU does not matter.
    names = [name for name in now if name not in ("versions", "processor")]
    pairs = {name: (now[name], before.get(name)) for name in names}
    for name, version in now["versions"].items():
        pairs[name] = version, before.get("versions", {}).get(name)
    pairs["precision"] = run_precision(config, device), config.precision
    return [f"{name} {one}, was {other}" for name, (one, other) in pairs.items() if one != other]


def _labels_fingerprint(slices: pd.DataFrame) -> str:
    return hashlib.sha256(slices[list(LABELS)].to_numpy(np.int8).tobytes()).hexdigest()


def _require_same_data(run_dir: Path, cache: CTCache) -> None:
    before = read_json(run_dir / DATA)
    if before["cache"] != cache.fingerprint:
        raise StaleError(
            f"{cache.path} is not the cache that the training in {run_dir} began with: fingerprint"
            f" {cache.fingerprint[:12]}, not {before['cache'][:12]}.",
            "Give that cache.",
        )
    if not set(LABELS) <= set(cache.slices) or (
        before.get("labels") not in (None, _labels_fingerprint(cache.slices))
    ):
        raise StaleError(
            f"the labels are not those that the training in {run_dir} began with.",
            "Give the --labels it began with.",
        )


@dataclass(frozen=True)
class _Training:
    """What fits and finishes a run.

    Args:
        config: settled.
        cache: with labels.
        model: compiled.
        loader, validation: batches of the two splits.
        valid_labels: int (samples, 6).
        out: the run folder.
    """

    config: RunConfig
    cache: CTCache
    model: object
    loader: object
    validation: object
    valid_labels: np.ndarray
    out: Path


def _make_training(
    config: RunConfig, cache: CTCache, samples: Samples, indices: dict, model, out: Path
) -> _Training:
    from ich_keras.data.batches import view_batches

    chosen = {name: samples.of_rows(cache.slices, rows, name) for name, rows in indices.items()}
    view = run_view(config)
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
    return _Training(config, cache, model, loader, validation, valid_labels, out)


def _restored(training: _Training, tell: Tell) -> _Course:
    """Put the last state back into the network, and the best weights beside it right."""
    from ich_keras.models.weights import read_record

    state = load_state(training.out / STATE, training.model, tell)
    rows = state["history"]
    # In older versions "seconds" counted from the beginning of the training. A run interrupted by
    # one of them and resumed here keeps those rows; only the later ones are per epoch.
    course = _Course(rows, state["best_loss"], state["best_epoch"])
    try:
        kept = read_record(training.out / BEST_WEIGHTS).get(EPOCH, course.best_epoch)
    except (DataError, UsageError):
        kept = None
    if kept != course.best_epoch:
        # Written for an epoch whose state was lost. That epoch comes again; on another machine it
        # may turn out otherwise, and then nothing would say what these weights are.
        if course.best_epoch == course.done:
            _keep_best(training, course)
        else:
            tell(f"The best weights, of epoch {course.best_epoch}, are lost: the next take over.")
            course.best_loss = np.inf
    return course


def _keep_best(training: _Training, course: _Course) -> None:
    from ich_keras.models.weights import save_weights

    record = {
        "network": network(training.config).to_dict(),
        "preset": training.config.preset,
        "intensity": training.config.data.intensity,
        EPOCH: course.best_epoch,
    }
    save_weights(training.model, training.out / BEST_WEIGHTS, record)


def _fit(
    training: _Training,
    course: _Course,
    progress: Progress | None,
    tell: Tell,
) -> None:
    """Train on, keeping weights and state after each epoch."""
    training.model.fit(
        training.loader,
        epochs=training.config.fit.epochs,
        initial_epoch=course.done,
        shuffle=False,  # the loader does it
        verbose=0,
        callbacks=[
            _epochs(training.loader, training.config, progress, course.done),
            _validation(training, course, tell, progress),
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


def _epochs(loader: Any, config: RunConfig, progress: Progress | None, done: int) -> Any:
    """Return the callback that begins an epoch, for loader and network, and shows the progress.

    Args:
        loader: the batches of an epoch, `len(loader)` of them.
        config: settled.
        progress: called as progress("training", steps, all steps, "epoch 1/6, loss 0.4123").
        done: epochs finished before this training began or resumed.
    """
    import keras

    from ich_keras.data.augment import sample_seed

    epochs = config.fit.epochs

    class Epochs(keras.callbacks.Callback):
        # Without this mark Keras reads the logs back from the device after every step.
        async_safe = True

        def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
            loader.epoch = epoch
            # On torch Keras' dropout draws from torch's global generator. Seeding it by epoch makes
            # a resumed training equal to an uninterrupted one, with no generator state to save.
            keras.utils.set_random_seed(sample_seed(config.seed, epoch, 0))
            self.epoch, self.loss, self.read = epoch, "", time.monotonic()
            if epoch == done:
                self.show(epoch * len(loader))

        def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
            # Reading the loss waits for the device, so not at every step.
            now = time.monotonic()
            if progress is not None and logs and now - self.read >= SECONDS_BETWEEN_LOSSES:
                self.read, self.loss = now, f", loss {float(logs['loss']):.4f}"
            # The training ends with the validation of its last epoch.
            self.show(min(self.epoch * len(loader) + batch + 1, epochs * len(loader) - 1))

        def on_train_end(self, logs: dict | None = None) -> None:
            self.show(epochs * len(loader))

        def show(self, steps: int) -> None:
            if progress is not None:
                detail = f"epoch {self.epoch + 1}/{epochs}{self.loss}"
                progress("training", steps, epochs * len(loader), detail)

    return Epochs()


def _validation(training: _Training, course: _Course, tell: Tell, progress: Progress | None) -> Any:
    """Return the callback that validates, keeps the best weights and saves the state."""
    import keras

    from ich_keras.checkpoints import save_state
    from ich_keras.metrics.binary import binary_metrics, format_metric
    from ich_keras.models.weights import require_finite

    model, labels, epochs = training.model, training.valid_labels, training.config.fit.epochs

    class Validation(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
            self.began = time.perf_counter()

        def on_epoch_end(self, epoch: int, logs: dict) -> None:
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
                    model, training.validation, len(labels), progress, step="validating"
                )
            except DataError as error:
                raise DivergedError(error.message, "Lower --learning-rate.") from error
            metrics = binary_metrics(labels, values)
            loss = metrics["log_loss"]
            is_best = loss < course.best_loss
            if is_best:
                course.best_loss, course.best_epoch = loss, epoch + 1
                _keep_best(training, course)
            course.rows.append(
                {
                    "epoch": epoch + 1,
                    "learning_rate": rate,
                    "train_loss": train_loss,
                    "valid_log_loss": loss,
                    "valid_auroc_any": metrics["auroc"]["any"],
                    # Of this epoch alone, its validation included.
                    "seconds": round(time.perf_counter() - self.began, 1),
                }
            )
            atomic_write(training.out / HISTORY, pd.DataFrame(course.rows).to_csv(index=False))
            save_state(
                training.out / STATE,
                model,
                epoch + 1,
                {
                    "history": course.rows,
                    "best_loss": course.best_loss,
                    "best_epoch": course.best_epoch,
                },
            )
            tell(
                f"epoch {epoch + 1}/{epochs}: training loss {train_loss:.4f}, validation log loss"
                f" {loss:.4f}, AUROC(any) {format_metric(metrics['auroc']['any'])}"
                + (" (best so far)" if is_best else "")
            )

    return Validation()


def _finish(training: _Training, progress: Progress | None) -> None:
    """Evaluate the best weights and write the report and the `.keras` file."""
    from ich_keras.checkpoints import save_model

    out, device = training.out, training.config.device
    _, model = load_run(out, device)
    # In float32 for whoever loads it: other machines may have no faster type.
    save_model(load_run(out, device, precision="float32")[1], out / MODEL)
    # Left where somebody evaluated the unfinished run, or its evaluation was interrupted.
    (out / CHOICES).unlink(missing_ok=True)
    for name in ("valid", "test"):
        evaluate(out, training.cache, name, model=model, progress=progress)
    write_report(out)
