"""Fitting with Keras: the compiled network, and the callbacks that validate and save states."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ich_keras.averaging import add_averages, average_epoch, ema_settings, judged_weights
from ich_keras.checkpoints import RUN, load_state, save_state
from ich_keras.config import loss_settings_of
from ich_keras.course import Course, auroc_of, write_history
from ich_keras.data.seeds import sample_seed
from ich_keras.distribution import begin_together, come_together
from ich_keras.errors import DataError, DivergedError, LostState, StaleError, UsageError
from ich_keras.inference import probabilities
from ich_keras.keras_settings import require_trainable_settings
from ich_keras.learned_windows import window_rows
from ich_keras.metrics.binary import binary_metrics, format_metric
from ich_keras.models.options import SYNCHRONISED
from ich_keras.own_callbacks import callbacks_name
from ich_keras.progress import Progress, Tell
from ich_keras.ranks import Rank
from ich_keras.recipe import RECIPE, Recipe
from ich_keras.run_folder import CACHE, EPOCH, PIXELS, RunFolder

if TYPE_CHECKING:
    from ich_keras.models.torch.distributed import Group

SECONDS_BETWEEN_LOSSES = 1.0


@dataclass(frozen=True)
class Fit:
    """What one training needs to fit its network.

    Args:
        recipe: of the training.
        run: where its files go.
        model: compiled.
        loader, validation: batches of the two splits.
        valid_labels: int (samples, labels).
        marks: what each state says of its run (`marks_of`), read once: an edit of the files while
            the training runs is then noticed when it is resumed.
        group: the processes that train together; None for one alone. Only the first writes, and
            needs `marks`. `loader` and `validation` give this process's part; None is an empty one.
        callbacks: the user's (`own_callbacks`).
    """

    recipe: Recipe
    run: RunFolder
    model: Any
    loader: Any
    validation: Any
    valid_labels: np.ndarray
    marks: dict[str, Any]
    group: "Group | None" = None
    callbacks: tuple[Any, ...] = ()

    @property
    def rank(self) -> Rank:
        """Which of the processes this is."""
        return Rank() if self.group is None else self.group.rank


def compiled_network(
    recipe: Recipe, total_steps: int, loads_weights: bool = True
) -> tuple[Any, Any]:
    """Build the network of a recipe and compile it for `fit`.

    Args:
        recipe: of the training.
        total_steps: batches in all, for the schedule.
        loads_weights: whether to load the pretrained weights that the recipe names.

    Returns:
        (keras.Model, `LoadedWeights`; None from scratch).

    Raises:
        UsageError: Keras' global settings would make the training another one.
    """
    import keras

    from ich_keras.models.classifier import classifier, compile_classifier, freeze
    from ich_keras.models.weights import load_weights
    from ich_keras.models.weights_lookup import find_weights

    require_trainable_settings()
    training = recipe.training
    keras.utils.set_random_seed(training.seed)
    labels = recipe.labels
    model = classifier(recipe.network, output="logits", precision=recipe.precision, labels=labels)
    loaded = None
    if loads_weights and training.weights is not None:
        path = find_weights(training.weights, recipe.preset)
        loaded = load_weights(model, path, recipe.network, labels=labels)
    if training.freeze is not None:
        freeze(model, training.freeze)
    compile_classifier(
        model,
        learning_rate=training.learning_rate,
        loss=loss_settings_of(training),
        schedule=training.schedule,
        total_steps=total_steps,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        backbone_factor=training.backbone_factor,
        accumulate=training.accumulate,
        step=training.step,
        recompute=training.recompute,
        compiled=training.compiled,
        **ema_settings(training),
    )
    add_averages(model, training)
    return model, loaded


def fit(
    training: Fit,
    course: Course,
    progress: Progress | None = None,
    tell: Tell = lambda line: None,
) -> None:
    """Train for the remaining epochs, saving weights and state after each.

    Raises:
        DivergedError: a loss or weight is not finite; the last good state is kept.
        StaleError: Keras ended the training early; its state is kept.
        EnvironmentProblem: a worker process failed (`CTLoader`), or another process of the
            training; the last good state is kept.
    """
    from ich_keras.data.loader import own_errors

    course.windows = course.windows or window_rows(training.model, 0)
    if training.group is not None:
        synchronised = training.recipe.training.batch_norm == SYNCHRONISED
        begin_together(training.model, training.group, synchronised)
    with own_errors(training.loader):
        training.model.fit(
            training.loader,
            epochs=training.recipe.training.epochs,
            initial_epoch=course.done,
            shuffle=False,  # the loader shuffles
            verbose=0,
            callbacks=[
                _epochs(training.loader, training.recipe, progress, course.done),
                _validation(training, course, progress),
                *training.callbacks,  # between: they see what validation gave, and may stop it
                _saving(training, course, tell),
            ],
        )
    if not course.is_over(training.recipe.training.epochs):
        raise StaleError(
            f"Keras ended the training in {training.run} after {course.done} of"
            f" {training.recipe.training.epochs} epochs.",
            "Something stopped it (model.stop_training, or a setting of Keras): resume it.",
        )
    if training.group is not None:
        training.group.leave()


def _validation_values(training: Fit, progress: Progress | None) -> np.ndarray:
    """Return the probabilities of the whole validation split, each process's part by itself."""
    count = len(training.valid_labels[training.rank.part(len(training.valid_labels))])
    batches = [] if training.validation is None else training.validation
    own = probabilities(training.model, batches, count, progress, step="validating")
    return own if training.group is None else np.concatenate(training.group.gather(own))


def restored(training: Fit, tell: Tell) -> Course:
    """Restore the last complete state into the network, and check the best weights.

    Raises:
        LostState: all states are damaged, or the best weights are lost after the last epoch.
    """
    run = training.run
    labels = training.recipe.labels
    state = load_state(run.state_folder, training.model, tell, training.marks[RUN], labels)
    course = Course.of_state(state)
    write_history(run, course)  # as the state knows it, whatever became of the file
    if not _has_best(run, course):
        # The best weights are from an epoch whose state was lost. That epoch is trained again, and
        # may give other weights on another machine: the stored ones would match no record.
        if course.best_epoch == course.done:
            with judged_weights(training.model, training.recipe.training, course.done):
                _keep_best(training, course)
        elif course.is_over(training.recipe.training.epochs):
            raise LostState(
                f"{run.best_weights} is lost, or not that of the best epoch ({course.best_epoch}),"
                " and no epoch is left to train.",
                "Copy the file back, or start a new training.",
            )
        else:
            tell(
                f"The best weights so far (epoch {course.best_epoch}) are lost; the next epoch"
                " counts as the best."
            )
            course.best_loss = np.inf
    return course


def _has_best(run: RunFolder, course: Course) -> bool:
    """Return whether the best weights are whole, and those of the best epoch."""
    from ich_keras.models.weights_file import read_weights

    try:
        kept = read_weights(run.best_weights)
    except (DataError, UsageError):
        return False
    return kept.record.get(
        EPOCH, course.best_epoch
    ) == course.best_epoch and course.best_weights in (None, kept.digest)


def _keep_best(training: Fit, course: Course) -> None:
    from ich_keras.models.weights import save_weights

    recipe, data = training.recipe, training.run.data()
    record = {
        "network": recipe.network.to_dict(),
        "labels": list(recipe.labels.names),
        "preset": recipe.preset,
        "intensity": recipe.inputs.intensity.name,
        RECIPE: recipe.to_dict(),
        CACHE: data[CACHE],
        PIXELS: data.get(PIXELS),
        EPOCH: course.best_epoch,
    }
    course.best_weights = save_weights(training.model, training.run.best_weights, record)


def _epochs(loader: Any, recipe: Recipe, progress: Progress | None, done: int) -> Any:
    """Return the callback that prepares loader and seed for each epoch and reports progress.

    Args:
        loader: the batches of an epoch.
        recipe: of the training.
        progress: called as progress("training", steps, all steps, "epoch 1/6, loss 0.4123").
        done: epochs finished before this training began or resumed.
    """
    import keras

    epochs, batches = recipe.training.epochs, len(loader)

    class Epochs(keras.callbacks.Callback):
        # Without this flag, Keras reads the logs from the device after every step.
        async_safe = True

        def __init__(self) -> None:
            super().__init__()
            self.epoch, self.loss, self.read = done, "", time.monotonic()

        def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
            loader.epoch = epoch
            # On torch Keras' dropout draws from torch's global generator. Seeding it by epoch makes
            # a resumed training equal to an uninterrupted one, with no generator state to save.
            keras.utils.set_random_seed(sample_seed(recipe.training.seed, epoch, 0))
            self.epoch = epoch
            if epoch == done:
                self.show(epoch * batches)

        def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
            # Reading the loss waits for the device, so not at every step.
            now = time.monotonic()
            if progress is not None and logs and now - self.read >= SECONDS_BETWEEN_LOSSES:
                self.read, self.loss = now, f", loss {float(logs['loss']):.4f}"
            # Never the total yet: training only ends after the last epoch's validation.
            self.show(min(self.epoch * batches + batch + 1, epochs * batches - 1))

        def on_train_end(self, logs: dict | None = None) -> None:
            self.show(epochs * batches)

        def show(self, steps: int) -> None:
            if progress is not None:
                detail = f"epoch {self.epoch + 1}/{epochs}{self.loss}"
                progress("training", steps, epochs * batches, detail)

    return Epochs()


def _validation(training: Fit, course: Course, progress: Progress | None) -> Any:
    """Return the callback that validates and keeps the best weights.

    It adds `val_loss` (the log loss) and `val_auroc_any` (or that of the first label; NaN where it
    is not defined) to the logs of the callbacks after it.
    """
    import keras

    from ich_keras.models.weights import require_finite

    model, labels = training.model, training.valid_labels
    shown = training.recipe.labels.shown

    class Validation(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.began = time.perf_counter()

        def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
            self.began = time.perf_counter()

        def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
            # The rate of the next step: after the last step a cosine schedule is at 0.
            rate = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
            train_loss = float(logs["loss"]) if logs else np.nan
            if not np.isfinite(train_loss):
                raise DivergedError(
                    f"the training loss of epoch {epoch + 1} is {train_loss}.",
                    "Lower --learning-rate.",
                )
            try:
                require_finite(model, f"after epoch {epoch + 1}")
                if training.group is not None:
                    come_together(model, training.group, f"after epoch {epoch + 1}")
                average_epoch(model, training.recipe.training, epoch + 1)
                with judged_weights(model, training.recipe.training, epoch + 1):
                    course.windows += window_rows(model, epoch + 1)
                    values = _validation_values(training, progress)
            except DataError as error:
                raise DivergedError(error.message, "Lower --learning-rate.") from error
            if not training.rank.is_first:
                course.rows.append({})  # the first process judges and writes
                return
            metrics = binary_metrics(labels, values, label_set=training.recipe.labels)
            loss = metrics["log_loss"]
            if loss < course.best_loss:
                course.best_loss, course.best_epoch = loss, epoch + 1
                with judged_weights(model, training.recipe.training, epoch + 1):
                    _keep_best(training, course)
            course.rows.append(
                {
                    "epoch": epoch + 1,
                    "learning_rate": rate,
                    "train_loss": train_loss,
                    "valid_log_loss": loss,
                    auroc_of("valid", shown): metrics["auroc"][shown],
                    # Of this epoch alone, including its validation.
                    "seconds": round(time.perf_counter() - self.began, 1),
                }
            )
            if logs is not None:
                auroc = metrics["auroc"][shown]
                # Callbacks take numbers: NaN where validation has one class only.
                auroc = np.nan if auroc is None else auroc
                logs |= {"val_loss": loss, auroc_of("val", shown): auroc}

    return Validation()


def _saving(training: Fit, course: Course, tell: Tell) -> Any:
    """Return the callback that saves the state after an epoch, and stops a training in time.

    It comes last: whatever the user's callbacks changed belongs to the state.
    """
    import keras

    settings = training.recipe.training
    shown = training.recipe.labels.shown

    class Saving(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
            if training.group is not None and settings.patience is not None:
                course.best_epoch = training.group.from_first(course.best_epoch)
            if course.done < settings.epochs:
                course.stopped = self.reason_to_stop()
                self.model.stop_training |= course.stopped is not None
            if not training.rank.is_first:
                return
            write_history(training.run, course)
            state = {**course.to_state(), **training.marks}
            save_state(training.run.state_folder, training.model, epoch + 1, state)
            row = course.rows[-1]
            tell(
                f"epoch {epoch + 1}/{settings.epochs}: training loss {row['train_loss']:.4f},"
                f" validation log loss {row['valid_log_loss']:.4f}, AUROC({shown})"
                f" {format_metric(row[auroc_of('valid', shown)])}"
                + (" (best so far)" if course.best_epoch == epoch + 1 else "")
            )
            if course.stopped is not None:
                tell(f"Stopped after epoch {epoch + 1} of {settings.epochs}: {course.stopped}.")

        def reason_to_stop(self) -> str | None:
            if course.has_no_patience_left(settings.patience):
                return (
                    f"no better validation log loss for {settings.patience} epoch"
                    f"{'' if settings.patience == 1 else 's'} (--patience)"
                )
            is_asked = self.model.stop_training and callbacks_name(training.callbacks) is not None
            return f"by a callback ({callbacks_name(training.callbacks)})" if is_asked else None

    return Saving()
