"""A training with learnable windows: what it writes, how it resumes, and what refuses it."""

import json
import shutil

import keras
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from interrupted import interrupted_training
from narrow import preset_of, without_evaluation

from ich_keras import get_windows, load_run, resume
from ich_keras.cli.train import train_main
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.ct.window import WINDOWS, Window
from ich_keras.errors import DivergedError, StaleError, UsageError
from ich_keras.evaluation import evaluate
from ich_keras.files import write_json
from ich_keras.learned_windows import moved_windows, read_windows
from ich_keras.model_card import model_card
from ich_keras.models.spec import ModelSpec
from ich_keras.models.windows import LearnedWindows
from ich_keras.prediction import predict_folder
from ich_keras.recipe import Recipe
from ich_keras.run_folder import RunFolder
from ich_keras.run_pages.windows import grey_of
from ich_keras.training import train

NARROW = "narrow-windows"
SIZE = 32


@pytest.fixture(scope="module", autouse=True)
def narrow_preset():
    with preset_of(NARROW, ModelSpec((SIZE, SIZE, 3), depth=10, width=8)):
        yield


def config_of(windows="linear", **fit):
    settings = {"batch_size": 32, "epochs": 2, "learning_rate": 3e-3} | fit
    return RunConfig(
        preset=NARROW,
        windows=windows,
        precision="float32",
        data=DataConfig(size=SIZE),
        fit=FitConfig(**settings),
    )


@pytest.fixture(scope="module")
def run(phantom_cache, tmp_path_factory):
    """Interrupted after its first epoch, and resumed."""
    out = tmp_path_factory.mktemp("run") / "run"
    interrupted_training(phantom_cache, out, config_of(), epoch=1)
    assert get_windows(out) == tuple(after for _, after in moved_windows(RunFolder(out)))
    return RunFolder(resume(out, phantom_cache))


def test_every_epoch_is_written_and_the_best_one_kept(run):
    table = read_windows(run)
    assert table["epoch"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert table["window"].tolist() == [1, 2, 3] * 3
    first = table[table["epoch"] == 0]
    assert [Window(*one) for one in first[["level", "width"]].to_numpy()] == list(WINDOWS)
    kept = table[table["epoch"] == run.best_epoch()]
    assert [Window(*one) for one in kept[["level", "width"]].to_numpy()] == list(get_windows(run))
    assert (np.abs(kept["width"].to_numpy() - first["width"].to_numpy()) > 0.01).all()
    assert get_windows(run) == get_windows(load_run(run)[1])
    assert get_windows(run) == get_windows(keras.models.load_model(run.model_file))


def test_resuming_gives_the_same_bits(run, phantom_cache, tmp_path):
    with without_evaluation():
        straight = RunFolder(train(config_of(), phantom_cache, tmp_path / "straight"))
    assert straight.windows_file.read_bytes() == run.windows_file.read_bytes()
    one, other = (load_run(each)[1].get_weights() for each in (straight, run))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_it_evaluates_predicts_and_tells(run, phantom_cache, phantom_folder, tmp_path):
    assert 0 < evaluate(run, phantom_cache, "test")["slice"]["log_loss"] < 5
    images = sorted((phantom_folder / "images").rglob("*.dcm"))[:6]
    for path in images:
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "in")
    predict_folder(run, tmp_path / "in", tmp_path / "out")
    found = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert len(found) == 6 and found["any"].between(0, 1).all()
    window = get_windows(run)[0]
    said = f"40.0/80.0 to {window.level:.1f}/{window.width:.1f}"
    assert f"Windows learned (linear; level/width in HU): {said}" in run.report_file.read_text()
    assert said in dict(model_card(run).facts)["Windows"]
    page = run.page_file().read_text()
    assert f"window 1: {said.replace(' to ', ' HU to ')} HU" in page
    assert page.count("Level of window") == 3


def test_an_older_recipe_has_no_windows(run):
    content = json.loads(json.dumps(Recipe.of(config_of(None)).to_dict()))
    del content["network"]["windows"]
    older = Recipe.from_dict(content)
    assert older.network.windows is None and older.as_config().windows is None
    assert RunFolder(run.path).config() == config_of()
    before = config_of().to_dict()
    del before["windows"]
    assert RunConfig.from_dict(before).windows is None


def test_damage_is_named(run, tmp_path):
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    copy.windows_file.write_text("epoch,window,level\n0,1,40\n")
    with pytest.raises(StaleError, match=r"windows\.csv is damaged"):
        read_windows(copy)
    recipe = json.loads(copy.recipe_file.read_text())
    recipe["network"]["windows"] = None
    write_json(copy.recipe_file, recipe)
    with pytest.raises(UsageError, match="has no learnable windows"):
        get_windows(copy.path)


class _Wreck(keras.callbacks.Callback):
    """Turns the second window around at the end of an epoch's last batch."""

    def on_train_batch_end(self, batch, logs=None):
        layer = self.model.get_layer("windows")
        kernel, bias = layer.get_weights()
        kernel[..., 1] = -0.5
        layer.set_weights([kernel, bias])


def test_a_window_that_turned_around_ends_the_training(phantom_cache, tmp_path):
    with pytest.raises(DivergedError, match=r"learnable window 2 of 3 .* width -256 HU") as caught:
        train(config_of(epochs=1), phantom_cache, tmp_path / "run", callbacks=[_Wreck()])
    assert "--learning-rate" in caught.value.hint
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--windows", "cubic"], "windows is 'cubic'; expected one of linear, sigmoid"),
        (["--windows", "linear", "--intensity", "wide"], "data.intensity is 'wide' with windows"),
    ],
)
def test_the_command_refuses(options, message, phantom_cache_folder, tmp_path):
    arguments = ["--cache", str(phantom_cache_folder), "--out", str(tmp_path / "run"), *options]
    result = CliRunner().invoke(train_main, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()


def test_the_command_trains(phantom_cache_folder, tmp_path):
    out = tmp_path / "run"
    arguments = ["--cache", phantom_cache_folder, "--out", out, "--preset", NARROW, "--size", SIZE]
    arguments += ["--windows", "sigmoid", "--epochs", 1, "--batch-size", 32, "--ema", 0.9]
    with without_evaluation():
        result = CliRunner().invoke(train_main, [*map(str, arguments), "--precision", "float32"])
    assert "Traceback" not in result.output
    recipe = RunFolder(out).recipe()
    assert recipe.network.windows == LearnedWindows("sigmoid")
    assert recipe.inputs.intensity.name == "hu"
    kept = read_windows(RunFolder(out)).tail(3)[["level", "width"]].to_numpy()
    # Of the averaged weights, which are those that were kept.
    assert [Window(*one) for one in kept] == list(get_windows(out)) != list(WINDOWS)


def test_the_picture_is_that_of_the_layers():
    hu = np.linspace(-200, 300, 50)
    window = Window(55.0, 120.0)
    for kind in ("linear", "sigmoid"):
        made = LearnedWindows(kind, start=((55.0, 120.0),), mean=(0.0,), std=(1.0,))
        from ich_keras.models.window_layers import apply_windows

        image = keras.Input((1, 1, 1))
        model = keras.Model(image, apply_windows(image, made))
        found = model.predict(hu.reshape(-1, 1, 1, 1), verbose=0).ravel()
        np.testing.assert_allclose(grey_of(made, window, hu), found, atol=1e-5)
