"""Trainings that end before their last epoch: by `--patience`, or by a callback of the user's."""

import csv
import dataclasses
import json
from pathlib import Path

import keras
import numpy as np
import pytest
from click.testing import CliRunner
from interrupted import interrupted_training
from narrow import history_of, preset_of, without_evaluation

from ich_keras import fitting, training
from ich_keras.cli import main
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.course import Course
from ich_keras.errors import UsageError
from ich_keras.fitting import compiled_network
from ich_keras.models.loss import FocalLoss
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights_file import read_weights
from ich_keras.own_callbacks import (
    LOOKS_ON,
    own_callbacks,
    require_callbacks_alone,
    require_settable_rate,
)
from ich_keras.ranks import Rank
from ich_keras.recipe import Recipe
from ich_keras.run_folder import RunFolder
from ich_keras.training import resume, train
from ich_keras.verification import verify

NARROW, SIZE, EPOCHS = "narrow-early", 32, 4


@pytest.fixture(scope="module", autouse=True)
def narrow_preset():
    with preset_of(NARROW, ModelSpec((SIZE, SIZE, 3), depth=10, width=8)):
        yield


@pytest.fixture(scope="module", autouse=True)
def no_evaluation():
    with without_evaluation():
        yield


def config_of(**fit) -> RunConfig:
    fit = {"batch_size": 32, "epochs": EPOCHS, "learning_rate": 0.03} | fit
    data = DataConfig(size=SIZE, balance=True, augment="none", limit_series=14)
    return RunConfig(
        preset=NARROW, precision="float32", device="cpu", data=data, fit=FitConfig(**fit)
    )


def weights_of(path: Path) -> str:
    return read_weights(path).digest


@pytest.fixture(scope="module")
def long_losses(phantom_cache, tmp_path_factory, narrow_preset, no_evaluation) -> list[dict]:
    """The history of a training without an early end."""
    return history_of(train(config_of(), phantom_cache, tmp_path_factory.mktemp("long") / "r"))


def expected_end(history: list[dict], patience: int) -> int:
    """The epoch after which patience is lost, from the losses alone."""
    losses = [float(row["valid_log_loss"]) for row in history]
    for done in range(1, len(losses) + 1):
        if done - (1 + int(np.argmin(losses[:done]))) >= patience:
            return done
    return len(losses)


def test_patience_stops_a_training_and_it_counts_as_finished(long_losses, phantom_cache, tmp_path):
    stop = expected_end(long_losses, 1)
    assert stop < EPOCHS  # else this test shows nothing: change the learning rate
    told = []
    run = train(config_of(patience=1), phantom_cache, tmp_path / "run", tell=told.append)
    assert history_of(run) == long_losses[:stop]
    assert told[-1] == (
        f"Stopped after epoch {stop} of {EPOCHS}: no better validation log loss for 1 epoch"
        " (--patience)."
    )
    folder = RunFolder(run)
    assert folder.is_finished
    assert folder.recipe().training.patience == 1
    assert folder.best_epoch() == stop - 1
    why = "no better validation log loss for 1 epoch (--patience)"
    assert folder.environment()["ended_early"] == {"epoch": stop, "why": why}
    assert f"Stopped after {stop} of {EPOCHS} epochs: {why}." in (run / "report.md").read_text()
    assert verify(run)
    with pytest.raises(UsageError, match="is finished"):
        resume(run, phantom_cache)


def test_patience_that_lasts_changes_nothing(long_losses, phantom_cache, tmp_path):
    run = train(config_of(patience=EPOCHS), phantom_cache, tmp_path / "run")
    assert history_of(run) == long_losses
    assert "ended_early" not in RunFolder(run).environment()
    assert "Stopped" not in (run / "report.md").read_text()


@pytest.mark.parametrize("when", ["before", "at"])
def test_a_stopped_training_is_resumed_bit_for_bit(long_losses, phantom_cache, tmp_path, when):
    stop = expected_end(long_losses, 1)
    config = config_of(patience=1)
    whole = train(config, phantom_cache, tmp_path / "whole")
    epoch = stop if when == "at" else stop - 1
    run = interrupted_training(phantom_cache, tmp_path / "run", config, epoch)
    resume(run, phantom_cache)
    assert history_of(run) == history_of(whole)
    for name in ("best.weights.h5", f"state/epoch-{stop:04d}/model.weights.h5"):
        assert weights_of(run / name) == weights_of(whole / name)
    early = RunFolder(run).environment()["ended_early"]
    assert early == RunFolder(whole).environment()["ended_early"]


def test_patience_is_measured_from_the_best_epoch():
    course = Course(rows=[{}] * 3, best_epoch=1)
    assert course.has_no_patience_left(2) and not course.has_no_patience_left(3)
    assert not course.has_no_patience_left(None)
    assert not course.is_over(4) and course.is_over(3)
    course.stopped = "why"
    assert course.is_over(4)
    assert Course.of_state(json.loads(json.dumps(course.to_state()))) == course
    assert "stopped" not in Course(best_loss=1.0).to_state()  # as older versions wrote it


# --- Callbacks of the user's ----------------------------------------------------------------


class Listening(keras.callbacks.Callback):
    """Notes what Keras calls, and with which logs."""

    def __init__(self):
        super().__init__()
        self.called: list[str] = []
        self.logs: list[dict] = []
        self.batches: list[float] = []

    def on_train_begin(self, logs=None):
        self.called.append("begin")

    def on_train_end(self, logs=None):
        self.called.append("end")

    def on_epoch_begin(self, epoch, logs=None):
        self.called.append(f"epoch {epoch}")

    def on_epoch_end(self, epoch, logs=None):
        self.logs.append(dict(logs))

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(logs["loss"])


def rows_of(logs: list[dict]) -> list[list[float]]:
    return [[log["loss"], log["val_loss"], log["val_auroc_any"]] for log in logs]


def test_callbacks_get_keras_logs_and_are_called_again_after_a_resume(
    long_losses, phantom_cache, tmp_path
):
    first, second = Listening(), Listening()
    config = config_of(epochs=3)
    with pytest.MonkeyPatch.context() as patch:
        # As `interrupted_training`, which takes no callbacks.
        save = fitting.save_state

        def save_and_die(folder, model, number, state):
            save(folder, model, number, state)
            if number == 2:
                raise KeyboardInterrupt

        patch.setattr(fitting, "save_state", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(config, phantom_cache, tmp_path / "run", callbacks=first)
    assert first.called == ["begin", "epoch 0", "epoch 1"]
    run = resume(tmp_path / "run", phantom_cache, callbacks=[second])
    assert second.called == ["begin", "epoch 2", "end"]
    found = rows_of(first.logs + second.logs)
    columns = ("train_loss", "valid_log_loss", "valid_auroc_any")
    assert found == [[float(row[name]) for name in columns] for row in long_losses[:3]]
    assert len(first.batches) == 2 * len(second.batches)
    assert all(isinstance(loss, float) and np.isfinite(loss) for loss in first.batches)
    assert RunFolder(run).recipe().training.own_callbacks == "Listening"
    assert "callbacks of the user's: `Listening`" in (run / "report.md").read_text()


def test_keras_own_callbacks_work(long_losses, phantom_cache, tmp_path):
    """EarlyStopping ends a training as finished; a log and a checkpoint are written."""
    stop = expected_end(long_losses, 1)
    callbacks = [
        keras.callbacks.EarlyStopping(monitor="val_loss", patience=1, restore_best_weights=True),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.ModelCheckpoint(
            tmp_path / "own.keras", monitor="val_loss", save_best_only=True
        ),
        keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: None),
    ]
    run = train(config_of(), phantom_cache, tmp_path / "run", callbacks=callbacks)
    assert history_of(run) == long_losses[:stop]
    why = "by a callback (EarlyStopping, CSVLogger, ModelCheckpoint, LambdaCallback)"
    assert RunFolder(run).environment()["ended_early"] == {"epoch": stop, "why": why}
    with open(tmp_path / "log.csv", newline="") as stream:
        logged = [float(row["val_loss"]) for row in csv.DictReader(stream)]
    assert logged == [float(row["valid_log_loss"]) for row in long_losses[:stop]]
    assert (tmp_path / "own.keras").is_file()
    # The state is that of the last epoch, the best weights those of the best.
    assert read_weights(run / "best.weights.h5").record["epoch"] == stop - 1


def test_what_a_callback_changes_is_part_of_the_state(phantom_cache, tmp_path):
    class Halving(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.optimizer.learning_rate = float(self.model.optimizer.learning_rate) / 2

    whole = train(config_of(epochs=3), phantom_cache, tmp_path / "whole", callbacks=Halving())
    assert [float(row["learning_rate"]) for row in history_of(whole)] == pytest.approx(
        [0.03, 0.015, 0.0075]
    )
    with pytest.MonkeyPatch.context() as patch:
        begin = training.train
        patch.setattr("interrupted.train", lambda *a: begin(*a, callbacks=Halving()))
        run = interrupted_training(phantom_cache, tmp_path / "run", config_of(epochs=3), 1)
    with pytest.raises(UsageError, match="the training began with Halving; now none is given"):
        resume(run, phantom_cache)
    resume(run, phantom_cache, callbacks=Halving())
    assert history_of(run) == history_of(whole)
    assert weights_of(run / "best.weights.h5") == weights_of(whole / "best.weights.h5")


def test_a_callback_that_fails_leaves_the_epoch_before(phantom_cache, tmp_path):
    def fail(epoch, logs):
        if epoch == 1:
            raise OSError("no such server")

    failing = keras.callbacks.LambdaCallback(on_epoch_end=fail)
    with pytest.raises(OSError, match="no such server"):
        train(config_of(epochs=2), phantom_cache, tmp_path / "run", callbacks=failing)
    assert len(history_of(tmp_path / "run")) == 1
    good = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: None)
    resume(tmp_path / "run", phantom_cache, callbacks=good)
    assert len(history_of(tmp_path / "run")) == 2


BAD_CALLBACKS = [
    (keras.callbacks.History, "Call the class: it is not an instance yet"),
    ([print], "expected instances of keras.callbacks.Callback"),
    ("EarlyStopping", "callbacks holds 'EarlyStopping'"),
    (3, "callbacks holds 3"),
    ([keras.callbacks.BackupAndRestore("x")], "a training keeps its own states"),
]


@pytest.mark.parametrize(("callbacks", "message"), BAD_CALLBACKS, ids=lambda v: str(v)[:30])
def test_what_is_no_callback_is_refused(phantom_cache, tmp_path, callbacks, message):
    with pytest.raises(UsageError, match=message):
        train(config_of(), phantom_cache, tmp_path / "run", callbacks=callbacks)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fit", [{"schedule": "cosine"}, {"warmup_steps": 2}], ids=str)
def test_callbacks_that_set_the_rate_need_a_constant_one(phantom_cache, tmp_path, fit):
    for callback in (
        keras.callbacks.ReduceLROnPlateau(),
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate),
    ):
        name = f"holds a {type(callback).__name__}, which sets the learning rate"
        with pytest.raises(UsageError, match=name) as caught:
            train(config_of(**fit), phantom_cache, tmp_path / "run", callbacks=callback)
        assert 'Use schedule="constant" without warm-up steps' in caught.value.hint
    assert list(tmp_path.iterdir()) == []
    require_settable_rate([callback], "constant", 0)
    require_settable_rate([keras.callbacks.EarlyStopping()], "cosine", 2)


def test_callbacks_are_for_one_process():
    callbacks = own_callbacks([keras.callbacks.EarlyStopping(), Listening()])
    require_callbacks_alone(callbacks, Rank())
    require_callbacks_alone((), Rank(1, 2, 1))
    with pytest.raises(UsageError, match=r"EarlyStopping, Listening\) with 2 processes"):
        require_callbacks_alone(callbacks, Rank(0, 2, 0))
    setattr(callbacks[1], LOOKS_ON, True)
    require_callbacks_alone(callbacks[1:], Rank(0, 2, 0))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0", "fit.patience is 0; expected at least 1"),
        ("-2", "fit.patience is -2; expected at least 1"),
        ("nan", "'nan' is not a valid int"),
        ("two", "'two' is not a valid int"),
        ("1.5", "'1.5' is not a valid int"),
    ],
)
def test_bad_patience_is_one_clear_line(phantom_cache_folder, tmp_path, value, message):
    command = ["train", "--cache", str(phantom_cache_folder), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(main, [*command, "--patience", value])
    assert done.exit_code == 2
    assert message in next(line for line in done.output.splitlines() if line.startswith("Error: "))
    assert list(tmp_path.iterdir()) == []


def test_the_network_is_compiled_with_the_loss_of_the_recipe():
    config = config_of(loss="focal", focal_gamma=1.5, positive_weight={"any": 3.0})
    model, _ = compiled_network(Recipe.of(config), 1)
    assert type(model.loss) is FocalLoss
    assert model.loss.gamma == 1.5
    assert model.loss.positive_weights == (1.0, 1.0, 1.0, 1.0, 1.0, 3.0)
    assert dataclasses.replace(config, seed=1).fit.loss_settings.focal_gamma == 1.5
