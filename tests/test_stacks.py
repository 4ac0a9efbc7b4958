"""Stacks: neighbouring slices as channels of a 2D network."""

from dataclasses import replace

import keras
import numpy as np
import pytest
from narrow import preset_of

from ich_keras.config import DataConfig, RunConfig
from ich_keras.ct.pixels import AIR_HU
from ich_keras.data.batches import view_batches
from ich_keras.data.inputs import slice_input, stack_channels, stack_slices_of
from ich_keras.data.views import View
from ich_keras.errors import DataError, UsageError
from ich_keras.models.classifier import build_classifier, classifier
from ich_keras.models.presets import PRESETS, view_kind
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights import load_weights, save_weights
from ich_keras.models.weights_file import read_record
from ich_keras.models.weights_lookup import find_weights
from ich_keras.prediction_variants import tta_names, turns_of
from ich_keras.recipe import Recipe
from weights_convert.reshaping import change_channels

SIZE = 24


def everything(loader):
    batches = [(x.numpy(), y.numpy()) for x, y in loader]
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


@pytest.mark.parametrize("edge", ["air", "repeat"])
@pytest.mark.parametrize(("intensity", "channels"), [("windows", 3), ("wide", 1)])
def test_channels_are_the_slices_from_inferior_to_superior(
    phantom_cache, edge, intensity, channels
):
    view = View("stack", 3, edge=edge)
    inputs, labels = everything(
        view_batches(phantom_cache, view, batch_size=7, intensity=intensity)
    )
    single, truth = everything(view_batches(phantom_cache, View(), intensity=intensity))
    np.testing.assert_array_equal(labels, truth)
    assert inputs.shape == (*single.shape[:-1], 3 * channels)
    air = slice_input(np.full((1, 48, 48), AIR_HU, np.int16), intensity=intensity)[0]
    uids = phantom_cache.slices["series_uid"].to_numpy()
    for number, sample in enumerate(inputs):
        for place, neighbour in enumerate((number - 1, number, number + 1)):
            is_there = 0 <= neighbour < len(uids) and uids[neighbour] == uids[number]
            beyond = single[number] if edge == "repeat" else air
            expected = single[neighbour] if is_there else beyond
            found = sample[..., place * channels : (place + 1) * channels]
            np.testing.assert_array_equal(found, expected)


def test_stacks_are_the_slabs_of_the_same_draws(phantom_cache):
    """All slices of a sample get the draw that those of a slab get."""
    settings = {"batch_size": 5, "seed": 3, "reverse": True, "intensity": "windows"}
    for augment in ("fast", "thesis", "flip"):
        slabs, _ = everything(
            view_batches(phantom_cache, View("slab", 3), np.arange(20), augment=augment, **settings)
        )
        stacks, _ = everything(
            view_batches(
                phantom_cache, View("stack", 3), np.arange(20), augment=augment, **settings
            )
        )
        np.testing.assert_array_equal(stacks, stack_channels(slabs))
        np.testing.assert_array_equal(stack_slices_of(stacks, 3), slabs)


@pytest.mark.parametrize("size", [48, 32])
def test_a_device_makes_the_same_stacks(phantom_cache, size):
    view, settings = View("stack", 3), {"batch_size": 4, "seed": 3, "augment": "flip"}
    plain, _ = everything(view_batches(phantom_cache, view, np.arange(8), size=size, **settings))
    there, _ = everything(
        view_batches(phantom_cache, view, np.arange(8), size=size, device="cpu", **settings)
    )
    np.testing.assert_allclose(there, plain, atol=3e-5)


def test_the_preset_means_stacks_and_its_channels_follow():
    assert {view_kind(f"resnet{depth}_2d_stack", None) for depth in (10, 18, 34, 50)} == {"stack"}

    def shape(**data):
        recipe = Recipe.of(RunConfig(preset="resnet18_2d_stack", data=DataConfig(size=64, **data)))
        return recipe.network.input_shape, recipe.inputs.intensity.name

    assert shape() == ((64, 64, 9), "windows")
    assert shape(slices=5) == ((64, 64, 15), "windows")
    assert shape(intensity="wide") == ((64, 64, 3), "wide")
    assert shape(view="slice") == ((64, 64, 3), "windows")
    config = RunConfig(preset="resnet18_2d", data=DataConfig(size=64, view="stack"))
    recipe = Recipe.of(config)
    assert recipe.network.input_shape == (64, 64, 9)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.of(recipe.as_config()) == recipe
    with pytest.raises(UsageError, match="view 'stack' with preset resnet18_3d, which takes vol"):
        Recipe.of(RunConfig(preset="resnet18_3d", data=DataConfig(view="stack")))


def test_learnable_windows_are_refused_by_name():
    with pytest.raises(UsageError, match="windows 'linear' on stacks: learnable windows are of"):
        Recipe.of(RunConfig(preset="resnet18_2d_stack", windows="linear"))


def test_a_recipe_prepares_stacks():
    recipe = Recipe.of(RunConfig(preset="resnet18_2d_stack", data=DataConfig(size=16)))
    hu = np.random.default_rng(0).integers(-1000, 1000, (2, 3, 16, 16)).astype(np.int16)
    expected = np.concatenate([slice_input(hu[:, place]) for place in range(3)], axis=-1)
    np.testing.assert_array_equal(recipe.inputs.prepare(hu), expected)
    with pytest.raises(UsageError, match=r"expected int16 of shape \(n, 3, rows, columns\)"):
        recipe.inputs.prepare(hu[:, 0])
    assert recipe.inputs.prepare(hu[:0]).shape == (0, 16, 16, 9)


@pytest.mark.parametrize("slices", [3, 5])
def test_equal_slices_give_the_answer_of_the_2d_network(tmp_path, slices):
    """The channel rule: a pretrained first convolution is repeated and divided."""
    random = np.random.default_rng(1)
    flat_spec = ModelSpec((None, None, 3), depth=10, width=4)
    keras.utils.set_random_seed(1)
    flat = classifier(flat_spec, precision="float32")
    path = tmp_path / "flat.weights.h5"
    save_weights(flat, path, {"network": flat_spec.to_dict(), "intensity": "windows"})
    spread = change_channels(path, tmp_path / "stack.weights.h5", 3 * slices)
    assert read_record(spread)["changes"] == [f"input channels 3 -> {3 * slices}"]

    image = random.normal(size=(4, SIZE, SIZE, 3)).astype(np.float32)
    stacked = stack_channels(np.repeat(image[:, np.newaxis], slices, axis=1))
    deep = classifier(replace(flat_spec, input_shape=(None, None, 3 * slices)), precision="float32")
    load_weights(deep, spread)
    expected = flat.predict_on_batch(image)
    assert expected.std(axis=0).max() > 1e-5
    np.testing.assert_allclose(deep.predict_on_batch(stacked), expected, rtol=1e-5, atol=1e-6)

    with preset_of("narrow_2d_stack", ModelSpec((32, 32, 9), depth=10, width=4)):
        config = RunConfig(
            preset="narrow_2d_stack",
            weights=str(spread),
            data=DataConfig(size=32, slices=slices),
        )
        recipe = Recipe.of(config)
        assert recipe.inputs.intensity.name == "windows"
        assert recipe.network.channels == 3 * slices
        single = Recipe.of(replace(config, weights=str(path)))
        assert single.inputs.intensity.name == "windows"
        with pytest.raises(DataError, match=r"channels 3 \(file\), \d+ \(network\)") as refusal:
            load_weights(classifier(single.network), path, single.network)
        assert f"--channels {3 * slices}" in refusal.value.hint


def test_named_weights_say_how_they_are_spread(tmp_path, monkeypatch):
    monkeypatch.setenv("ICH_KERAS_WEIGHTS", str(tmp_path))
    with pytest.raises(UsageError, match="takes torchvision_resnet18 with its shape") as refusal:
        find_weights("imagenet", "resnet18_2d_stack")
    assert "weights-convert channels --channels 9 --weights" in refusal.value.hint
    assert "--preset" not in refusal.value.hint


def test_turned_stacks_by_hand():
    view = View("stack", 3)
    volume = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 2)).astype(np.float32)
    batch = stack_channels(volume)
    assert tta_names(["reverse"], view) == ("reverse",)
    flip, reverse, both = turns_of(["flip", "reverse"], view)
    np.testing.assert_array_equal(flip(batch), batch[:, :, ::-1])
    np.testing.assert_array_equal(reverse(batch), stack_channels(volume[:, ::-1]))
    np.testing.assert_array_equal(both(batch), stack_channels(volume[:, ::-1, :, ::-1]))
    assert all(turn(batch).flags.c_contiguous for turn in (flip, reverse, both))


def test_every_depth_has_a_preset_for_stacks():
    for depth in (10, 18, 34, 50):
        chosen = PRESETS[f"resnet{depth}_2d_stack"]
        assert chosen.spec.input_shape == (256, 256, 9)
    model = build_classifier("resnet10_2d_stack", input_shape=(32, 32, 9))
    assert model.get_layer("conv1").kernel.shape == (7, 7, 9, 64)
