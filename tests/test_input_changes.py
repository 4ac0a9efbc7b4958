"""Random changes of training samples that are asked for one by one."""

import dataclasses
import json
import math
from dataclasses import replace

import keras
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from interrupted import interrupted_training
from narrow import preset_of

from ich_keras.cli.train import train_main
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.ct.pixels import AIR_HU
from ich_keras.ct.window import Window
from ich_keras.data.batches import CTDataset, view_batches
from ich_keras.data.changes import add_noise, kept_places, with_jitter
from ich_keras.data.drawn_inputs import drawn_inputs
from ich_keras.data.draws import draw, no_draws
from ich_keras.data.inputs import slice_input
from ich_keras.data.intensity import INTENSITIES
from ich_keras.data.mixing import Mix, draw_mix, mixed_inputs, mixed_labels
from ich_keras.data.seeds import sample_seeds
from ich_keras.data.views import AIR, View
from ich_keras.errors import UsageError
from ich_keras.inference import load_run
from ich_keras.input_changes import NO_CHANGES, InputChanges
from ich_keras.labels import SIX, LabelSet
from ich_keras.model_card import model_card
from ich_keras.models.loss import make_loss
from ich_keras.models.options import LossSettings
from ich_keras.models.spec import ModelSpec
from ich_keras.recipe import Recipe
from ich_keras.run_folder import RunFolder
from ich_keras.training import resume, train

ALL = {"hu_noise": 20.0, "window_jitter": 10.0, "drop_slices": 0.5, "mixup": 0.4, "cutmix": 1.0}


def everything(loader):
    batches = [(np.array(x), np.array(y)) for x, y in loader]
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def changes(**asked):
    return InputChanges(**asked)


# --- Off ------------------------------------------------------------------------------------


def test_all_are_off_by_default_and_recorded_by_value():
    config = RunConfig()
    assert config.data.changes == NO_CHANGES and not NO_CHANGES and str(NO_CHANGES) == ""
    recipe = Recipe.of(config)
    assert recipe.training.changes == NO_CHANGES
    old = recipe.to_dict()
    del old["training"]["changes"]  # as older versions wrote it
    assert Recipe.from_dict(json.loads(json.dumps(old))) == recipe

    asked = RunConfig(preset="resnet18_2d_stack", data=DataConfig(**ALL))
    found = Recipe.of(asked)
    assert found.training.changes == InputChanges(**ALL, width_jitter=0.1)
    assert Recipe.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert Recipe.of(found.as_config()) == found
    assert found.input_options == [
        "Changed in training, beside augmentation: HU noise of 20 HU, window levels moved by up to"
        " 10 HU, window widths changed by up to 10%, slices dropped with a chance of 0.5, mixup"
        " (alpha 0.4), CutMix (alpha 1)."
    ]


@pytest.mark.parametrize("augment", [None, "fast", "thesis"])
def test_without_them_batches_are_as_before(phantom_cache, augment):
    view, rows = View("stack", 3), np.arange(9)
    settings = {"batch_size": 4, "seed": 2, "augment": augment}
    plain = everything(view_batches(phantom_cache, view, rows, **settings))
    off = everything(view_batches(phantom_cache, view, rows, changes=NO_CHANGES, **settings))
    for one, other in zip(plain, off, strict=True):
        np.testing.assert_array_equal(one, other)


# --- Draws ----------------------------------------------------------------------------------


# torch warns of more workers than cores; the batches must be the same even then.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("augment", ["fast", "thesis"])
def test_draws_do_not_depend_on_workers(phantom_cache, augment):
    view, rows = View("stack", 3, edge="repeat"), np.arange(10)
    settings = {"batch_size": 4, "seed": 5, "augment": augment, "changes": changes(**ALL)}
    expected = everything(view_batches(phantom_cache, view, rows, **settings))
    for workers in (1, 2):
        loader = view_batches(phantom_cache, view, rows, workers=workers, **settings)
        for one, other in zip(everything(loader), expected, strict=True):
            np.testing.assert_array_equal(one, other)
        second = everything(loader)  # another epoch, other draws
        assert not np.array_equal(np.sort(second[0].ravel()), np.sort(expected[0].ravel()))


@pytest.mark.parametrize("name", ALL)
def test_each_has_draws_of_its_own(phantom_cache, name):
    """What one draws does not depend on the others, nor on the augmentation."""
    view, rows = View("stack", 3), np.arange(8)
    settings = {"batch_size": 8, "seed": 5, "augment": "flip"}
    alone = changes(**{name: ALL[name]})
    plain, truth = everything(view_batches(phantom_cache, view, rows, **settings))
    found, labels = everything(view_batches(phantom_cache, view, rows, changes=alone, **settings))
    assert found.shape == plain.shape and not np.array_equal(found, plain)
    assert np.array_equal(labels, truth) == (name not in ("mixup", "cutmix"))


@pytest.mark.parametrize("name", [*ALL, "all"])
@pytest.mark.parametrize("size", [48, 32])
def test_a_device_does_the_same(phantom_cache, name, size):
    asked = changes(**(ALL if name == "all" else {name: ALL[name]}))
    view, rows = View("stack", 3), np.arange(8)
    settings = {"batch_size": 8, "seed": 5, "augment": "flip", "changes": asked, "size": size}
    plain, truth = everything(view_batches(phantom_cache, view, rows, **settings))
    found, labels = everything(view_batches(phantom_cache, view, rows, device="cpu", **settings))
    np.testing.assert_allclose(labels, truth, atol=1e-6)
    np.testing.assert_allclose(found, plain, atol=5e-4)


# --- Noise ----------------------------------------------------------------------------------


def test_noise_is_normal_and_leaves_air():
    hu = np.zeros((2, 3, 64, 64), np.int16)
    hu[0, 1] = 32760  # near the end of int16
    rows = np.array([[0, 1, AIR], [4, 5, 6]])
    before = hu.copy()
    add_noise(hu, rows, [7, 8], 15.0)
    assert (hu[0, 2] == before[0, 2]).all()
    for sample, place in ((0, 0), (1, 0), (1, 2)):
        assert abs(hu[sample, place].mean()) < 1
        assert 14.5 < hu[sample, place].std() < 15.5
    assert hu[0, 1].max() == 32767 and hu[0, 1].min() > 32600
    assert abs(np.corrcoef(hu[1, 0].ravel(), hu[1, 1].ravel())[0, 1]) < 0.05  # each its own
    # By hand: the stream of a sample, rounded.
    oracle = np.rint(np.random.default_rng([8, 2]).standard_normal((3, 64, 64), np.float32) * 15)
    np.testing.assert_array_equal(hu[1], oracle)


# --- Windows --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 24])
def test_jittered_windows_are_those_of_another_level_and_width(size):
    hu = np.random.default_rng(0).integers(-200, 300, (4, 1, 32, 32)).astype(np.int16)
    intensity = INTENSITIES["windows"]
    seeds = [3, 4, 5, 6]
    draws = with_jitter(no_draws(4), seeds, changes(window_jitter=20.0, width_jitter=0.3))
    assert draws.has_jitter and (abs(draws.level) <= 20).all()
    assert ((draws.width >= 0.7) & (draws.width <= 1.3)).all()
    found = drawn_inputs(hu, draws, intensity, False, size)
    for number in range(4):
        windows = tuple(
            Window(one.level + draws.level[number], one.width * draws.width[number])
            for one in intensity.windows
        )
        expected = slice_input(hu[number, 0], size, replace(intensity, windows=windows))
        np.testing.assert_allclose(found[number], expected, atol=1e-5)
    # Contrast and brightness come after, as without.
    both = with_jitter(draw(seeds, 32), seeds, changes(width_jitter=0.3))
    assert (both.level == 0).all() and (both.width != 1).all()
    np.testing.assert_array_equal(both.contrast, draw(seeds, 32).contrast)


# --- Dropped slices -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stack", "slab"])
def test_the_middle_is_never_dropped(kind):
    rows = np.tile(np.arange(7), (200, 1))
    seeds = sample_seeds(0, 0, np.arange(200))
    places = kept_places(View(kind, 7), rows, seeds, 0.5)
    assert (places[:, 3] == 3).all()
    is_air = places == AIR
    assert np.array_equal(places[~is_air], rows[~is_air])
    assert 0.45 < np.delete(is_air, 3, axis=1).mean() < 0.55
    # Repeated: of the slices that are left, the one next to it on the side of the middle.
    repeated = kept_places(View(kind, 7, edge="repeat"), rows, seeds, 0.5)
    for number in range(200):
        for place in range(7):
            inner = place
            while is_air[number, inner]:
                inner += 1 if inner < 3 else -1
            assert repeated[number, place] == inner


def test_a_series_keeps_a_slice():
    view, rows = View("series", 4), np.array([[AIR, 3, 4, AIR]] * 300)
    places = kept_places(view, rows, sample_seeds(0, 0, np.arange(300)), 0.5)
    left = np.where(places == AIR, AIR, rows) != AIR
    assert left.any(axis=1).all()
    assert (~left[:, 1:3]).any(axis=1).mean() > 0.4


def test_dropped_slices_are_air(phantom_cache):
    view, rows = View("slab", 3), np.arange(30)
    samples = phantom_cache.samples(view)
    dataset = CTDataset(
        phantom_cache.pixels, samples, 48, None, 3, "wide", changes=changes(drop_slices=0.5)
    )
    found = dataset[1, rows][0]
    kept = samples.rows[rows]
    places = kept_places(view, kept, sample_seeds(3, 1, rows), 0.5)
    air = slice_input(np.full((48, 48), AIR_HU, np.int16), intensity="wide")
    dropped = 0
    for number, place in np.ndindex(places.shape):
        row = kept[number, place]
        if places[number, place] == AIR or row == AIR:
            np.testing.assert_array_equal(found[number, place], air)
            dropped += row != AIR
        else:
            hu = phantom_cache.slices_hu([row])[0]
            np.testing.assert_array_equal(found[number, place], slice_input(hu, intensity="wide"))
    assert dropped > 10


# --- Mixed ----------------------------------------------------------------------------------


def test_mixup_by_hand():
    random = np.random.default_rng(0)
    inputs = random.normal(size=(3, 4, 4, 2)).astype(np.float32)
    labels = np.array([[0, 1], [1, np.nan], [1, 1]], np.float32)
    mix = Mix(np.array([1, 2, 2]), np.array([0.25, 1.0, 0.5], np.float32), np.zeros((0, 4), int))
    found = mixed_inputs(inputs, mix)
    np.testing.assert_allclose(found[0], 0.25 * inputs[0] + 0.75 * inputs[1], rtol=1e-6)
    np.testing.assert_allclose(found[1:], inputs[1:], rtol=1e-6)
    # Missing in either is missing, whatever the share.
    expected = np.array([[0.75, np.nan], [1, np.nan], [1, 1]], np.float32)
    np.testing.assert_array_equal(mixed_labels(labels, mix), expected)


@pytest.mark.parametrize("seed", range(6))
def test_cutmix_by_hand(seed):
    side, rows = 16, np.arange(5) + 10
    mix = draw_mix(changes(cutmix=1.0), seed, 0, rows, side)
    assert sorted(mix.partners) == list(range(5))
    inputs = np.repeat(np.arange(5, dtype=np.float32), side**2).reshape(5, side, side, 1)
    found = mixed_inputs(inputs, mix)
    for number in range(5):
        partner = mix.partners[number]
        is_own = found[number, ..., 0] == number
        if partner != number:
            assert mix.shares[number] == pytest.approx(is_own.mean(), abs=1e-6)
        top, left, bottom, right = mix.boxes[number]
        assert 0 <= top <= bottom <= side and 0 <= left <= right <= side
        assert (found[number, top:bottom, left:right, 0] == partner).all()
    np.testing.assert_array_equal(inputs[:, 0, 0, 0], np.arange(5))  # not changed in place


def test_shares_are_beta_and_batches_differ():
    shares = [draw_mix(changes(mixup=0.3), 1, 0, np.arange(8) + 8 * n, 8).shares for n in range(99)]
    drawn = np.concatenate(shares)
    assert drawn.mean() == pytest.approx(0.5, abs=0.04)
    assert drawn.var() == pytest.approx(1 / (4 * (2 * 0.3 + 1)), rel=0.1)
    again = draw_mix(changes(mixup=0.3), 1, 0, np.arange(8), 8)
    np.testing.assert_array_equal(again.shares, shares[0])
    assert not np.array_equal(draw_mix(changes(mixup=0.3), 1, 1, np.arange(8), 8).shares, shares[0])
    both = [draw_mix(changes(mixup=0.3, cutmix=1.0), 1, 0, np.array([n, 99]), 8) for n in range(60)]
    assert 15 < sum(len(mix.boxes) > 0 for mix in both) < 45


SETTINGS = [
    LossSettings(),
    LossSettings("rsna"),
    LossSettings(positive_weight={"any": 3.0}, label_weight={"subdural": 2.0}),
    LossSettings("focal", focal_alpha=0.3),
    LossSettings("asymmetric"),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.loss)
def test_every_loss_takes_mixed_labels(settings):
    """Mixing labels is mixing losses, so none of them has to be refused."""
    random = np.random.default_rng(0)
    loss = make_loss(settings, True, SIX)
    logits = random.normal(size=(1, 6)).astype(np.float32)
    one, other = random.integers(0, 2, (2, 1, 6)).astype(np.float32)

    def value(labels):
        return float(keras.ops.convert_to_numpy(loss(labels, logits)))

    mixed = value(0.3 * one + 0.7 * other)
    assert mixed == pytest.approx(0.3 * value(one) + 0.7 * value(other), rel=1e-5)


def test_the_loss_of_exclusive_labels_takes_mixed_ones():
    classes = LabelSet(("a", "b", "c"), exclusive=True)
    loss = make_loss(LossSettings(label_weight={"b": 2.0}), True, classes)
    logits = np.array([[0.3, -1.0, 2.0]], np.float32)

    def value(labels):
        return float(keras.ops.convert_to_numpy(loss(np.array([labels], np.float32), logits)))

    mixed = value([0.3, 0.7, 0])
    assert mixed == pytest.approx(0.3 * value([1, 0, 0]) + 0.7 * value([0, 1, 0]), rel=1e-5)
    assert value([math.nan, 0.7, 0.3]) == 0


# --- Refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hu_noise", 0.0, "data.hu_noise is 0.0; expected above 0, at most 500"),
        ("hu_noise", math.nan, "data.hu_noise is nan; expected"),
        ("window_jitter", -1.0, "data.window_jitter is -1.0; expected"),
        ("width_jitter", 1.0, "data.width_jitter is 1.0; expected above 0, at most 0.9"),
        ("drop_slices", 1.0, "data.drop_slices is 1.0; expected"),
        ("mixup", math.inf, "data.mixup is inf; expected"),
        ("cutmix", 0.0, "data.cutmix is 0.0; expected"),
    ],
)
def test_numbers_out_of_range_are_refused(name, value, message):
    with pytest.raises(UsageError, match=message):
        RunConfig(data=DataConfig(**{name: value}))


@pytest.mark.parametrize(
    ("preset", "data", "message"),
    [
        ("resnet18_2d", {"drop_slices": 0.1}, "drops neighbours; a single slice has none"),
        ("resnet18_3d_slab", {"mixup": 0.2}, "mixup mixes images of 2D networks; this run is on s"),
        ("resnet18_3d", {"cutmix": 0.2}, "cutmix mixes images .*this run is on whole series"),
        (
            "resnet18_3d",
            {"window_jitter": 5.0, "intensity": "head-z-score"},
            "which this intensity takes away again",
        ),
        ("resnet18_3d", {"width_jitter": 0.1, "intensity": "hu"}, "which this intensity takes"),
    ],
)
def test_what_has_no_meaning_is_refused(preset, data, message):
    with pytest.raises(UsageError, match=message):
        Recipe.of(RunConfig(preset=preset, data=DataConfig(**data)))


def test_batches_need_a_seed(phantom_cache):
    with pytest.raises(UsageError, match="HU noise of 5 HU: drawn at random; give a seed"):
        view_batches(phantom_cache, View(), changes=changes(hu_noise=5.0))


def test_the_command_line_names_them(tmp_path):
    told = CliRunner().invoke(train_main, ["--help"], terminal_width=200).output
    for option in dataclasses.fields(InputChanges):
        assert f"--{option.name.replace('_', '-')} " in told
    result = CliRunner().invoke(
        train_main, ["--cache", str(tmp_path), "--mixup", "-1", "--out", str(tmp_path / "run")]
    )
    assert result.exit_code == 2
    assert "data.mixup is -1.0" in result.output + (result.stderr if result.stderr_bytes else "")


# --- In a training --------------------------------------------------------------------------


def test_a_resumed_training_draws_as_an_uninterrupted_one(phantom_cache, tmp_path):
    spec = ModelSpec((24, 24, 9), depth=10, width=4)
    with preset_of("narrow_2d_stack", spec):
        config = RunConfig(
            preset="narrow_2d_stack",
            precision="float32",
            data=DataConfig(size=24, limit_series=14, **ALL),
            fit=FitConfig(epochs=2, learning_rate=1e-3),
        )
        told = []
        whole = RunFolder(train(config, phantom_cache, tmp_path / "whole", tell=told.append))
        assert any(line.startswith("Changed in training") for line in told)
        assert "mixup (alpha 0.4)" in whole.report_file.read_text()
        assert any("mixup" in text for _, text in model_card(whole).facts)

        run = interrupted_training(phantom_cache, tmp_path / "broken", config, 1)
        resume(run, phantom_cache)
        again = RunFolder(run)
        one, other = (pd.read_csv(run.history_file) for run in (whole, again))
        pd.testing.assert_frame_equal(one.drop(columns="seconds"), other.drop(columns="seconds"))
        one, other = (load_run(run)[1].get_weights() for run in (whole, again))
        for array, same in zip(one, other, strict=True):
            np.testing.assert_array_equal(array, same)
