"""What a run is made by: decided once, complete, by value, and carried with its weights."""

import dataclasses
import json
import shutil
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from narrow import preset_of

from ich_keras import input_changes, model_file, recipe_json
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.ct import window
from ich_keras.data.inputs import slice_input, volume_input
from ich_keras.data.intensity import INTENSITIES, Intensity
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.evaluation import evaluate
from ich_keras.files import read_json, write_json
from ich_keras.inference import load_run, probabilities
from ich_keras.input_recipe import InputRecipe
from ich_keras.model_file import read_recipe
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights_file import RECORD, read_record
from ich_keras.recipe import Recipe, TrainingRecipe
from ich_keras.run_folder import RunFolder
from ich_keras.training import train
from ich_keras.verification import verify

CPU = {"device": "cpu", "precision": "float32"}


def recipe_of(**changes) -> Recipe:
    return Recipe.of(RunConfig(**(CPU | changes)))


@pytest.fixture(scope="module")
def run(phantom_cache, tmp_path_factory):
    with preset_of("narrow", ModelSpec((40, 40, 3), depth=10, width=8)):
        config = RunConfig(
            preset="narrow", data=DataConfig(size=40), fit=FitConfig(epochs=1), **CPU
        )
        out = tmp_path_factory.mktemp("run") / "run"
        yield RunFolder(train(config, phantom_cache, out))


# Settings of a training, and of its inputs, that recipes of older versions lack.
ABSENT_FROM_OLDER = {
    field.name
    for cls in (TrainingRecipe, InputRecipe)
    for field in dataclasses.fields(cls)
    if recipe_json.WHERE_ABSENT in field.metadata
}


@pytest.mark.parametrize("preset", ["resnet18_2d", "resnet18_3d_slab", "resnet18_3d", "r3d_18"])
@pytest.mark.parametrize("rate", [None, 0.5])
def test_it_comes_back_from_json_and_asks_for_itself(preset, rate):
    recipe = recipe_of(preset=preset, seed=3, fit=FitConfig(learning_rate=rate))
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert Recipe.of(recipe.as_config()) == recipe
    nothing_open = [
        value
        for part in (recipe.as_config(), recipe.as_config().data, recipe.as_config().fit)
        for name, value in vars(part).items()
        if name not in ("weights", "windows", "limit_series", "freeze", "recompute", "compiled")
        and name not in {*ABSENT_FROM_OLDER, *(field.name for field in input_changes.names())}
    ]
    assert None not in nothing_open


def test_defaults_depend_on_the_view():
    found = {
        preset: (
            recipe.inputs.view.kind,
            recipe.inputs.shape,
            recipe.training.batch_size,
            recipe.training.accumulate,
            recipe.inputs.intensity.name,
            recipe.training.learning_rate,
        )
        for preset in ("resnet18_2d", "resnet18_3d_slab", "resnet18_3d")
        for recipe in [recipe_of(preset=preset)]
    }
    assert found == {
        "resnet18_2d": ("slice", (256, 256, 3), 32, 1, "windows", 3e-4),
        "resnet18_3d_slab": ("slab", (5, 256, 256, 1), 16, 1, "wide", 3e-4),
        "resnet18_3d": ("series", (60, 256, 256, 1), 1, 8, "wide", 3e-4),
    }


def test_what_it_lacks_or_does_not_know_is_refused():
    whole = recipe_of().to_dict()

    def places(content, place=()):
        for name, value in content.items():
            yield (*place, name)
            if isinstance(value, dict):
                yield from places(value, (*place, name))

    # A network's entries have defaults of their own: all of them belong to the layer names.
    for place in places(whole):
        if place[0] == "network" and len(place) > 1:
            continue
        if place in (("inputs", "view", "duplicate"), ("labels",)) or place[1:] in {
            (name,) for name in ABSENT_FROM_OLDER
        }:
            continue  # see the tests of older recipes below
        damaged = json.loads(json.dumps(whole))
        inner = damaged
        for name in place[:-1]:
            inner = inner[name]
        del inner[place[-1]]
        with pytest.raises(StaleError):
            Recipe.from_dict(damaged)
    with pytest.raises(StaleError, match="inputs lacks cache_size"):
        damaged = json.loads(json.dumps(whole))
        del damaged["inputs"]["cache_size"]
        Recipe.from_dict(damaged)
    with pytest.raises(StaleError, match="it holds unknown epoch"):
        Recipe.from_dict(whole | {"epoch": 3})
    with pytest.raises(StaleError, match="precision is 16; expected str."):
        Recipe.from_dict(whole | {"precision": 16})
    other = whole | {"training": whole["training"] | {"limit_series": "all"}}
    with pytest.raises(StaleError, match="training.limit_series is 'all'; expected int or null."):
        Recipe.from_dict(other)
    with pytest.raises(StaleError, match="schema 7; expected 1"):
        Recipe.from_dict(whole | {"schema": 7})
    other = whole | {"inputs": whole["inputs"] | {"resampling": "nearest"}}
    with pytest.raises(StaleError, match="were resized by 'nearest'"):
        Recipe.from_dict(other)
    with pytest.raises(StaleError, match=r"takes \(256, 256, 3\), its input is \(96, 96, 3\)"):
        Recipe.from_dict(whole | {"inputs": whole["inputs"] | {"size": 96}})


@pytest.mark.parametrize("recipe", [{"inputs": []}, {"inputs": {"intensity": []}}, {}])
def test_a_damaged_recipe_in_the_record_of_weights_is_refused_with_the_file(tmp_path, recipe):
    path = tmp_path / "foreign.weights.h5"
    with h5py.File(path, "w") as file:
        file.attrs[RECORD] = json.dumps({"recipe": recipe})
    with pytest.raises(DataError, match="foreign.weights.h5: the recipe in its record is damaged"):
        recipe_of(weights=str(path))
    wide = DataConfig(intensity="wide")
    assert recipe_of(weights=str(path), data=wide).inputs.intensity == INTENSITIES["wide"]


def test_a_recipe_from_before_several_processes_could_train_is_read():
    whole = recipe_of().to_dict()
    older = json.loads(json.dumps(whole))
    assert older["training"].pop("batch_norm") == "per-process"
    assert Recipe.from_dict(older) == Recipe.from_dict(whole)


def test_a_recipe_from_before_duplicates_were_skipped_keeps_them():
    for preset, view in (("resnet18_2d", "skip"), ("resnet18_3d", "keep")):
        content = recipe_of(preset=preset).to_dict()
        assert content["inputs"]["view"].pop("duplicate") == "skip"
        assert Recipe.from_dict(content).inputs.view.duplicate == view


def test_a_run_predicts_the_same_when_the_brain_window_changes(run, phantom_cache, monkeypatch):
    from ich_keras.data.batches import slice_batches

    hu = phantom_cache.pixels.slices_hu(np.arange(4))
    recipe, model = load_run(run)
    before = model.predict_on_batch(recipe.inputs.prepare(hu))
    other = dataclasses.replace(
        INTENSITIES["windows"], windows=(window.Window(400, 800), *window.WINDOWS[1:])
    )
    monkeypatch.setitem(INTENSITIES, "windows", other)
    recipe, model = load_run(run)
    np.testing.assert_array_equal(model.predict_on_batch(recipe.inputs.prepare(hu)), before)
    batches = slice_batches(
        phantom_cache, np.arange(4), 4, size=40, intensity=recipe.inputs.intensity
    )
    np.testing.assert_allclose(probabilities(model, batches, 4), before, atol=1e-6)
    # A new run takes the new window.
    assert recipe_of().inputs.intensity == other


def test_model_keras_alone_says_what_its_input_is(run, phantom_cache):
    recipe = read_recipe(run.model_file)
    assert recipe == run.recipe()
    model = keras.saving.load_model(run.model_file)
    hu = phantom_cache.pixels.slices_hu(np.arange(3))
    expected = load_run(run)[1].predict_on_batch(slice_input(hu, 40))
    alone = model.predict_on_batch(recipe.inputs.prepare(hu))
    np.testing.assert_allclose(np.asarray(alone), np.asarray(expected), rtol=1e-4, atol=1e-6)
    assert Recipe.from_dict(read_record(run.best_weights)["recipe"]) == recipe


def test_a_keras_file_without_a_recipe_is_refused(tmp_path):
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(tmp_path / "plain.keras")
    with pytest.raises(StaleError, match="carries no recipe"):
        read_recipe(tmp_path / "plain.keras")
    (tmp_path / "torn.keras").write_bytes(b"PK")
    with pytest.raises(StaleError, match="is not a .keras file"):
        read_recipe(tmp_path / "torn.keras")
    with zipfile.ZipFile(tmp_path / "list.keras", "w") as archive:
        archive.writestr("metadata.json", "[]")
    with pytest.raises(StaleError, match="carries no recipe"):
        read_recipe(tmp_path / "list.keras")
    with pytest.raises(UsageError, match="does not exist"):
        read_recipe(tmp_path / "none.keras")


MARKER: list[str] = []


class Armed(torch.nn.Linear):
    """A layer of torch that notices when it is unpickled."""

    def __setstate__(self, state):
        MARKER.append("unpickled")
        super().__setstate__(state)


def armed_model(kind):
    """A model that runs code of its own: when it is called, or when it is loaded."""
    layer = (  # a lambda travels as code, a function by its name alone
        keras.layers.Lambda(
            lambda x: (__import__("test_recipe").MARKER.append("called"), x)[1], output_shape=(2,)
        )
        if kind == "Lambda"
        else keras.layers.TorchModuleWrapper(Armed(2, 2), output_shape=(2,))
    )
    return keras.Sequential([keras.Input((2,)), layer])


@pytest.mark.skipif(keras.config.backend() != "torch", reason="wraps a module of torch")
@pytest.mark.parametrize("kind", ["Lambda", "TorchModuleWrapper"])
def test_no_code_inside_of_a_keras_file_is_run(run, phantom_cache, tmp_path, kind):
    """At no door: read_recipe, ich verify, weights to begin from, weights-convert, a run folder."""
    from weights_convert.cli import main as convert

    armed = tmp_path / "armed.keras"
    model_file.save_model(armed_model(kind), armed, run.recipe())
    own = Path(shutil.copytree(run.path, tmp_path / "run"))
    shutil.copy(armed, own / "model.keras")
    MARKER.clear()
    assert read_recipe(armed) == run.recipe()  # the record alone is read
    assert verify(armed)
    with pytest.raises(StaleError, match=r"model\.keras changed or lost"):
        verify(own)
    evaluate(own, phantom_cache)  # by its weights file
    config = RunConfig(weights=str(armed), data=DataConfig(size=40), **CPU)
    with pytest.raises((UsageError, DataError), match=r"armed\.keras"):
        train(config, phantom_cache, tmp_path / "new")
    done = CliRunner().invoke(convert, ["inspect", "--checkpoint", str(armed)])
    assert done.exit_code == 3 and "armed.keras" in done.output.replace("\n", ""), done.output
    assert MARKER == []
    # The test can see what it looks for.
    keras.saving.load_model(armed, safe_mode=False)(np.zeros((1, 2), np.float32))
    assert MARKER


def test_prepare_refuses_what_does_not_fit():
    slices = recipe_of(data=DataConfig(size=32)).inputs
    volume = np.full((1, 5, 64, 64), 40, np.int16)
    with pytest.raises(UsageError, match=r"shape \(1, 5, 64, 64\); expected int16 .*\(n, rows"):
        slices.prepare(volume)
    slabs = recipe_of(preset="resnet18_3d_slab", data=DataConfig(size=32)).inputs
    np.testing.assert_array_equal(
        slabs.prepare(volume), volume_input(np.full((1, 5, 32, 32), 40, np.int16))
    )
    with pytest.raises(UsageError, match="expected int16 of shape .n, 5, rows, columns."):
        slabs.prepare(volume[:, :3])
    with pytest.raises(UsageError, match="hu is float64"):
        slabs.prepare(volume.astype(float))
    with pytest.raises(UsageError, match="hu is a list; expected a NumPy array"):
        slabs.prepare([volume])
    assert slabs.prepare(volume[:0]).shape == (0, 5, 32, 32, 1)


def test_a_run_without_its_own_recipe_is_refused(run, tmp_path, monkeypatch):
    whole = read_json(run.recipe_file)

    def refused(message, hint):
        with pytest.raises(StaleError, match=message) as caught:
            load_run(run)
        assert hint in caught.value.hint

    try:
        again = f"Train again: ich-train --config {run.config_file} --cache CACHE --out NEW"
        run.recipe_file.unlink()
        refused("has no recipe.json: nothing says how its input was made", again)
        lacking = {name: value for name, value in whole.items() if name != "inputs"}
        write_json(run.recipe_file, lacking)
        refused("recipe.json: it lacks inputs", again)
        exchanged = json.loads(json.dumps(whole))
        exchanged["inputs"]["intensity"]["windows"][0]["level"] = 41
        write_json(run.recipe_file, exchanged)
        refused("is not the recipe that best.weights.h5 was trained with", "replaced")
        other = json.loads(json.dumps(whole))
        other["training"]["seed"] += 1
        write_json(run.recipe_file, other)
        refused("is not the recipe that best.weights.h5 was trained with", "replaced")
    finally:
        write_json(run.recipe_file, whole)
    load_run(run)


def test_weights_of_another_training_are_refused(run, phantom_cache, tmp_path):
    config = dataclasses.replace(run.config(), seed=1)
    other = RunFolder(train(config, phantom_cache, tmp_path / "other"))
    mixed = RunFolder(shutil.copytree(other.path, tmp_path / "mixed"))
    shutil.copy(run.best_weights, mixed.best_weights)
    with pytest.raises(StaleError, match="is not the recipe that best.weights.h5 was trained"):
        evaluate(mixed, phantom_cache)
    # The same settings on another cache.
    data = run.data()
    moved = RunFolder(shutil.copytree(run.path, tmp_path / "moved"))
    write_json(moved.data_file, data | {"cache": "0" * 64})
    with pytest.raises(StaleError, match="was trained on another cache than data.json names"):
        load_run(moved)


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "3", '{"aggregation": {"rule": "median"}}', '{"aggregation": 3}', '{"slice": NaN}'),
        *("x", '{"smoothing": {"kernel": "box"}}', '{"smoothing": {"kernel": [1]}}'),
        '{"smoothing": {}}',
    ],
)
def test_damaged_choices_are_refused_by_name(run, tmp_path, content):
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    copy.choices_file.write_text(content)
    with pytest.raises(StaleError, match=r"choices.json is (damaged|not valid JSON)"):
        copy.rule()


def test_hints_can_be_pasted_whatever_the_folder_is_called(run, tmp_path):
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "a b [c]"))
    copy.report_file.unlink()
    with pytest.raises(StaleError, match="is not finished") as caught:
        load_run(copy)
    assert caught.value.hint.endswith(f"finish it: ich-train --resume '{copy}'")


def test_a_path_is_not_a_cache(tmp_path):
    with pytest.raises(UsageError, match="cache is the path 'cache'; expected a CTCache"):
        train(RunConfig(**CPU), "cache", tmp_path / "run")


def test_bfloat16_runs_in_float32_where_the_hardware_lacks_it(monkeypatch):
    asked, half = recipe_of(precision="bfloat16"), recipe_of(precision="float16")
    for here, expected in (("float32", "float32"), ("bfloat16", "bfloat16")):
        monkeypatch.setattr("ich_keras.recipe.choose_precision", lambda name, device, r=here: r)
        assert asked.on("torch", "cpu").precision == expected
    assert half.on("torch", "cpu").precision == "float16"


@pytest.mark.parametrize("intensity", INTENSITIES.values(), ids=list(INTENSITIES))
def test_an_intensity_comes_back_by_value(intensity):
    again = Intensity.from_dict(json.loads(json.dumps(intensity.to_dict())))
    assert again == intensity
    hu = np.random.default_rng(0).integers(-1024, 1500, (2, 16, 16)).astype(np.int16)
    np.testing.assert_array_equal(
        slice_input(hu, intensity=again), slice_input(hu, intensity=intensity.name)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"windows": []},
        {"windows": [{"level": 40}]},
        {"windows": [{"level": 40, "width": 0}]},
        {"normalisation": {"name": "x", "mean": [0.0], "std": [1.0]}},
        {"normalisation": {"head_above_hu": -500}},
        {"normalisation": None},
    ],
)
def test_an_intensity_that_cannot_be_is_refused(change):
    with pytest.raises(UsageError, match="intensity"):
        Intensity.from_dict(INTENSITIES["windows"].to_dict() | change)
