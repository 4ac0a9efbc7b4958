"""A training's curves elsewhere: TensorBoard by torch, MLflow by its own callback."""

import importlib.util
import sys
import types
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from narrow import preset_of, without_evaluation

import ich_keras
from ich_keras import fitting
from ich_keras.cli import main
from ich_keras.errors import EnvironmentProblem, UsageError
from ich_keras.labels import LABELS
from ich_keras.models.spec import ModelSpec
from ich_keras.own_callbacks import callbacks_name
from ich_keras.run_folder import RunFolder
from ich_keras.tensorboard_log import require_tensorboard, tensorboard_callback

NARROW, SIZE = "narrow-curves", 32
OPTIONS = ["--preset", NARROW, "--size", "32", "--epochs", "2", "--batch-size", "32"]
OPTIONS += ["--augment", "none", "--limit-series", "14", "--precision", "float32"]
NAMES = {
    "train_loss": "loss/train",
    "valid_log_loss": "loss/valid",
    "valid_auroc_any": "AUROC any/valid",
    "learning_rate": "learning rate",
}


@pytest.fixture(scope="module", autouse=True)
def narrow_preset():
    with preset_of(NARROW, ModelSpec((SIZE, SIZE, 3), depth=10, width=8)):
        yield


@pytest.fixture(autouse=True)
def no_evaluation(monkeypatch):
    monkeypatch.setattr("ich_keras.summary.run_summary", lambda *_: "")
    with without_evaluation():
        yield


class Writer:
    """In place of torch's SummaryWriter, where tensorboard is not installed."""

    all: list["Writer"] = []  # noqa: RUF012

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.values: dict[str, dict[int, float]] = {}
        Writer.all.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert type(value) is float
        self.values.setdefault(name, {})[step] = value

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def find_tensorboard(monkeypatch, found) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: found if name == "tensorboard" else find(name, *more),
    )


@pytest.fixture
def installed(monkeypatch):
    """TensorBoard as far as a training sees it."""
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    find_tensorboard(monkeypatch, object())
    monkeypatch.setattr(Writer, "all", [])
    return Writer.all


def ich_train(*words) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["train", *map(str, words)])
    return done.exit_code, done.output


def test_tensorboard_gets_every_epoch_once(installed, phantom_cache_folder, tmp_path, monkeypatch):
    run, logs = tmp_path / "run", tmp_path / "logs"
    data = ("--cache", phantom_cache_folder, "--out", run, *OPTIONS)
    save = fitting.save_state

    def save_and_die(folder, model, number, state):
        save(folder, model, number, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "save_state", save_and_die)
        assert ich_train(*data, "--tensorboard", logs)[0] == 130
    code, said = ich_train("--resume", run, "--tensorboard", logs)
    assert code == 0, said
    first, second = installed
    assert (first.purge_step, second.purge_step) == (1, 2)
    assert first.folder == second.folder == str(logs) and second.closed
    history = pd.read_csv(run / "history.csv")
    for column, name in NAMES.items():
        found = first.values[name] | second.values[name]
        assert list(found) == [1, 2]
        assert list(found.values()) == pytest.approx(list(history[column]))
    # It only looks on: nothing of it is part of the run.
    assert RunFolder(run).recipe().training.own_callbacks is None
    assert "callbacks" not in (run / "report.md").read_text()


def test_an_auroc_that_is_not_defined_is_nan(
    installed, phantom_cache_folder, tmp_path, monkeypatch
):
    """Validation of one class only: binary_metrics gives None, which is no number for callbacks."""
    judge = fitting.binary_metrics
    undefined = {"auroc": dict.fromkeys(LABELS)}
    monkeypatch.setattr(fitting, "binary_metrics", lambda *a, **k: judge(*a, **k) | undefined)
    data = ("--cache", phantom_cache_folder, "--out", tmp_path / "run", *OPTIONS)
    code, said = ich_train(*data, "--tensorboard", tmp_path / "logs")
    assert code == 0, said
    assert "AUROC(any) n/a" in said
    assert np.isnan(list(installed[0].values["AUROC any/valid"].values())).tolist() == [True, True]
    assert pd.read_csv(tmp_path / "run" / "history.csv")["valid_auroc_any"].isna().all()


def test_every_label_has_its_curve(installed, tmp_path):
    callback = tensorboard_callback(tmp_path)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    callback.set_model(model)
    callback.on_epoch_begin(0)
    callback.on_epoch_end(0, {"loss": 1, "val_loss": 2, "val_auroc_mass_effect": 0.5, "mine": 3})
    names = ["loss/train", "loss/valid", "AUROC mass_effect/valid", "mine", "learning rate"]
    assert list(installed[0].values) == names


def test_the_callback_looks_on(installed, tmp_path):
    callback = ich_keras.tensorboard_callback(tmp_path / "logs")
    assert isinstance(callback, keras.callbacks.Callback)
    assert callbacks_name([callback]) is None
    callback.on_train_end()  # nothing was trained
    assert installed == [] and list(tmp_path.iterdir()) == []


def test_bad_input_to_tensorboard(installed, phantom_cache_folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    data = ("--cache", phantom_cache_folder, "--out", tmp_path / "run", *OPTIONS)
    for code, message, *options in (
        (2, "file is a file; expected a folder", *data, "--tensorboard", tmp_path / "file"),
        (2, "Invalid value for '--tensorboard'", *data, "--tensorboard", ""),
        (2, "--tensorboard given, but no data", "--tensorboard", tmp_path / "logs"),
    ):
        found, said = ich_train(*options)
        assert found == code, said
        assert message in next(line for line in said.splitlines() if line.startswith("Error: "))
    find_tensorboard(monkeypatch, None)
    found, said = ich_train(*data, "--tensorboard", tmp_path / "logs")
    assert found == 4
    assert (
        "Error: TensorBoard is not installed.\nHint: pip install 'ich_keras[tensorboard]'" in said
    )
    with pytest.raises(EnvironmentProblem):
        tensorboard_callback(tmp_path / "logs")
    with pytest.raises(UsageError, match="expected a folder"):
        require_tensorboard(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.filterwarnings("default")
def test_torch_writes_files_that_tensorboard_reads(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    for epochs, first in ((2, 0), (3, 1)):  # the second epoch is trained again
        callback = tensorboard_callback(tmp_path / "logs")
        data = keras.ops.ones((4, 2)), keras.ops.ones((4, 1))
        model.fit(*data, epochs=epochs, initial_epoch=first, verbose=0, callbacks=[callback])
    read = EventAccumulator(str(tmp_path / "logs"))
    read.Reload()
    assert [event.step for event in read.Scalars("loss/train")] == [1, 2, 3]
    assert read.Scalars("learning rate")[0].value == pytest.approx(0.01)


@pytest.mark.filterwarnings("default")
def test_mlflow_logs_by_its_own_callback(phantom_cache, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with mlflow.start_run() as logged:
        run = ich_keras.train(
            phantom_cache,
            tmp_path / "run",
            preset=NARROW,
            size=SIZE,
            epochs=2,
            batch_size=32,
            augment=None,
            limit_series=14,
            precision="float32",
            device="cpu",
            callbacks=[mlflow.keras.MlflowCallback()],
        )
    client, number = mlflow.MlflowClient(), logged.info.run_id
    settings = client.get_run(number).data.params
    assert float(settings["optimizer_learning_rate"]) == pytest.approx(3e-4)
    summary = client.download_artifacts(number, "model_summary.txt", tmp_path)
    assert "conv1" in Path(summary).read_text()
    history = pd.read_csv(run / "history.csv")
    seen = client.get_metric_history(number, "val_loss")
    assert [metric.step for metric in seen] == [0, 1]
    assert [metric.value for metric in seen] == pytest.approx(list(history["valid_log_loss"]))
