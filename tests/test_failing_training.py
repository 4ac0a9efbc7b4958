"""Trainings that go wrong: values that are not finite, no memory, a fold that lacks a label."""

import json
import shutil
from pathlib import Path

import h5py
import keras
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from interrupted import interrupted_training
from narrow import preset_of

from ich_keras import fitting
from ich_keras.cli import main
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.data.cache.cache import CTCache
from ich_keras.errors import DataError, DivergedError
from ich_keras.evaluation import evaluate
from ich_keras.inference import load_run, probabilities
from ich_keras.labels import LABELS
from ich_keras.models.spec import ModelSpec
from ich_keras.planning import split_indices
from ich_keras.prediction import predict_folder
from ich_keras.recipe import Recipe
from ich_keras.run_folder import RunFolder
from ich_keras.training import resume, train
from ich_keras.verification import verify

NARROW = "narrow-failing"
SIZE = 32


@pytest.fixture(scope="module", autouse=True)
def narrow_preset():
    with preset_of(NARROW, ModelSpec((SIZE, SIZE, 3), depth=10, width=8)):
        yield


def config_of(epochs: int = 2, precision: str = "float32", rate: float = 1e-3, **data) -> RunConfig:
    data = DataConfig(size=SIZE, balance=True, augment="none", **data)
    fit = FitConfig(batch_size=32, epochs=epochs, learning_rate=rate)
    return RunConfig(preset=NARROW, data=data, fit=fit, precision=precision, device="cpu")


@pytest.fixture(scope="module")
def ended(phantom_cache, tmp_path_factory, narrow_preset) -> Path:
    return train(config_of(1), phantom_cache, tmp_path_factory.mktemp("ended") / "run")


def require_finite_files(run: Path) -> int:
    """Look at every array of every weights file and state below a run; return how many."""
    arrays = []
    for path in run.rglob("*.h5"):
        with h5py.File(path) as file:
            file.visititems(
                lambda _, item: arrays.append(item[()]) if isinstance(item, h5py.Dataset) else None
            )
    for path in run.rglob("*.npz"):
        arrays += list(np.load(path).values())
    assert all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f")
    return len(arrays)


# --- Values that are not finite -------------------------------------------------------------


def with_nan(array) -> np.ndarray | list:
    if isinstance(array, list):  # probabilities, and features beside them
        return [with_nan(array[0]), *array[1:]]
    changed = np.array(array, np.float32)
    changed.flat[-1] = np.nan
    return changed


def spoil(monkeypatch, kind: str, epoch: int) -> None:
    """Let a weight or a prediction of an epoch be NaN; its training loss stays finite."""
    validation, predict = fitting._validation, keras.Model.predict_on_batch

    def spoiling(training, *others):
        callback = validation(training, *others)
        on_epoch_end = callback.on_epoch_end

        def end(number, logs=None):
            if number + 1 == epoch and kind == "weight":
                layer = training.model.get_layer("fc")
                layer.set_weights([with_nan(layer.get_weights()[0]), layer.get_weights()[1]])
            elif number + 1 == epoch:
                monkeypatch.setattr(
                    keras.Model, "predict_on_batch", lambda self, x: with_nan(predict(self, x))
                )
            on_epoch_end(number, logs)

        callback.on_epoch_end = end
        return callback

    monkeypatch.setattr(fitting, "_validation", spoiling)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("weight", "after epoch 2"),
        ("prediction", "[0-9]+ of [0-9]+ predictions are not finite"),
    ],
)
def test_nan_beside_a_finite_loss_ends_a_training_and_is_saved_nowhere(
    phantom_cache, tmp_path, monkeypatch, kind, message
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil(patch, kind, epoch=2)
        with pytest.raises(DivergedError, match=message) as caught:
            train(config_of(2), phantom_cache, run)
    assert caught.value.exit_code == 5
    assert [path.name for path in sorted((run / "state").glob("epoch-*"))] == ["epoch-0001"]
    assert len(pd.read_csv(run / "history.csv")) == 1
    assert require_finite_files(run) > 50
    # The state before it is good: the training can go on.
    resume(run, phantom_cache)
    assert RunFolder(run).is_finished
    assert require_finite_files(run) > 50


def test_nan_in_the_first_epoch_leaves_nothing(phantom_cache, tmp_path, monkeypatch):
    spoil(monkeypatch, "weight", epoch=1)
    with pytest.raises(DivergedError, match="after epoch 1"):
        train(config_of(1), phantom_cache, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_beside_finite_weights_ends_a_training(
    phantom_cache, tmp_path, monkeypatch, loss
):
    """As in float16, where steps that overflow are left out."""
    validation = fitting._validation

    def spoiling(training, *others):
        callback = validation(training, *others)
        on_epoch_end = callback.on_epoch_end
        callback.on_epoch_end = lambda epoch, logs: on_epoch_end(epoch, {**logs, "loss": loss})
        return callback

    monkeypatch.setattr(fitting, "_validation", spoiling)
    message = rf"the training loss of epoch 1 is {loss}\."
    with pytest.raises(DivergedError, match=message) as caught:
        train(config_of(1), phantom_cache, tmp_path / "run")
    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


def test_overflow_in_float16_saves_nothing_that_is_not_finite(phantom_cache, tmp_path):
    config = config_of(2, precision="float16", rate=1e4)
    with pytest.raises(DivergedError) as caught:
        train(config, phantom_cache, tmp_path / "run")
    assert caught.value.exit_code == 5
    assert "--learning-rate" in caught.value.hint
    require_finite_files(tmp_path)


def test_predictions_that_are_not_finite_are_an_error(ended, phantom_folder, tmp_path, monkeypatch):
    _, model = load_run(ended)
    images = np.zeros((5, SIZE, SIZE, 3), np.float32)
    assert probabilities(model, [images], 5).shape == (5, 6)
    images[[1, 3], 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="2 of 5 predictions are not finite"):
        probabilities(model, [torch.from_numpy(images)], 5)
    predict = keras.Model.predict_on_batch
    monkeypatch.setattr(keras.Model, "predict_on_batch", lambda self, x: with_nan(predict(self, x)))
    with pytest.raises(DataError, match="predictions are not finite"):
        predict_folder(ended, phantom_folder / "images", tmp_path / "out")
    assert not (tmp_path / "out" / "predictions.csv").exists()


# --- No memory, no device -------------------------------------------------------------------


def run_command(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.mark.parametrize("epoch", [1, 2])
def test_no_memory_within_a_training(phantom_cache, tmp_path, monkeypatch, epoch):
    epochs, run = fitting._epochs, tmp_path / "run"

    def without_memory(*arguments):
        callback = epochs(*arguments)

        def begin(batch, logs=None):
            if callback.epoch + 1 == epoch:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

        callback.on_train_batch_begin = begin
        return callback

    options = ["--preset", NARROW, "--size", SIZE, "--epochs", 2, "--batch-size", 32]
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "_epochs", without_memory)
        code, said = run_command("train", "--cache", phantom_cache.path, "--out", run, *options)
    assert code == 4, said
    assert "Error: out of memory.\nHint: Use a smaller --batch-size or --size" in said
    if epoch == 1:
        assert list(tmp_path.iterdir()) == []
        return
    assert verify(run)
    code, said = run_command("train", "--resume", run)
    assert code == 0, said
    assert "Resuming after epoch 1 of 2" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(ended, phantom_cache, phantom_folder, tmp_path):
    cuda = ["--device", "cuda"]
    interrupted = shutil.copytree(ended, tmp_path / "run")
    RunFolder(interrupted).report_file.unlink()
    RunFolder(interrupted).lock_file.touch()  # as an interrupted training has one
    before = sorted(tmp_path.rglob("*"))
    out = ["--out", tmp_path / "out", "--workers", 0]
    for command in (
        ["train", "--cache", phantom_cache.path, "--out", tmp_path / "new", *cuda],
        ["train", "--resume", interrupted, *cuda],
        ["evaluate", "--run", ended, "--cache", phantom_cache.path, *cuda],
        ["predict", "--run", ended, "--dicom", phantom_folder / "images", *cuda, *out],
    ):
        code, said = run_command(*command)
        assert code == 4, said
        assert "cuda" in said.lower() and "Hint: " in said
        assert sorted(tmp_path.rglob("*")) == before, command


# --- A fold that lacks a label --------------------------------------------------------------


def strict(path: Path) -> dict:
    """Read JSON as others do, to whom NaN is none."""

    def refuse(constant):
        raise AssertionError(f"{path} holds {constant}")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize(
    ("lost", "value"),
    [(["epidural"], 0), (list(LABELS), 0), (["any"], 1)],
    ids=["no epidural", "no bleed", "nothing but bleeds"],
)
def test_a_fold_without_a_label_is_scored_as_far_as_it_goes(
    phantom_cache, phantom_folder, tmp_path, lost, value
):
    recipe = Recipe.of(config_of(), phantom_cache.size)
    _, indices = split_indices(phantom_cache.slices, recipe)
    slices = phantom_cache.slices.copy()
    for part, rows in indices.items():
        slices.loc[rows, "split"] = part
    table = slices.dropna(subset=["split"])[["patient_id", "split"]].drop_duplicates()
    table.to_csv(tmp_path / "split.csv", index=False)
    cache = CTCache.open(phantom_cache.path)
    for part in ("valid", "test"):
        slices.loc[indices[part], lost] = value
    cache.slices = slices.drop(columns="split")
    config = config_of(2, split=str(tmp_path / "split.csv"))
    run = interrupted_training(cache, tmp_path / "run", config, epoch=1)
    resume(run, cache)
    history = pd.read_csv(run / "history.csv")
    assert np.isfinite(history["valid_log_loss"]).all()
    assert history["valid_auroc_any"].isna().all() == ("any" in lost)
    choices = strict(run / "choices.json")["slice"]
    assert choices["temperature"] > 0
    for part in ("valid", "test"):
        metrics = strict(run / f"metrics-{part}.json")["slice"]
        truth = cache.slices.loc[indices[part], list(LABELS)]
        undefined = {label for label in LABELS if truth[label].nunique() < 2}
        assert undefined >= set(lost)
        assert {label for label, auroc in metrics["auroc"].items() if auroc is None} == undefined
        assert metrics["log_loss"] > 0
    for rates in choices["thresholds"].values():
        # A specificity needs slices without the label, and no slice with it.
        no_negatives = lost if value else []
        assert {label for label in LABELS if rates[label] is None} == set(no_negatives)
    assert "n/a" in (run / "report.md").read_text()
    assert evaluate(run, cache, "valid")["slice"]["auroc"][lost[0]] is None
    assert verify(run)
    found = predict_folder(run, phantom_folder / "images")
    assert np.isfinite(found.slices[list(LABELS)].to_numpy()).all()
