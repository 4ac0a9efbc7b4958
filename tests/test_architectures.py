"""DenseNet and SE-ResNeXt: what the rest of the library does with them."""

import re
from dataclasses import replace

import keras
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ich_keras.cli import main
from ich_keras.config import DataConfig, RunConfig
from ich_keras.errors import DataError, UsageError
from ich_keras.explanation import explain_series
from ich_keras.export.program import Network
from ich_keras.inference import load_run
from ich_keras.models.backbone import backbone
from ich_keras.models.batch_statistics import require_trainable
from ich_keras.models.classifier import (
    build_backbone,
    build_classifier,
    classifier,
    compile_classifier,
    freeze,
)
from ich_keras.models.cost import cost
from ich_keras.models.cut import last_stage
from ich_keras.models.densenet import densenet
from ich_keras.models.options import FREEZABLE
from ich_keras.models.presets import PRESETS, Preset, preset
from ich_keras.models.resnet import resnet, squeezed
from ich_keras.models.spec import ModelSpec
from ich_keras.models.steps import choose_step
from ich_keras.models.weights import load_weights, save_weights
from ich_keras.recipe import Recipe
from ich_keras.relevance import MapOptions, Relevance
from weights_convert.parity import torch_features
from weights_convert.reference import reference

DENSE = ModelSpec((48, 48, 3), 21, width=8, architecture="densenet")
SERESNEXT = ModelSpec((48, 48, 3), 14, width=8, architecture="seresnext")
SHORT = {"densenet121_2d": DENSE, "seresnext50_2d": SERESNEXT}


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("size", [(29, 30), (33, 63), (45, 64), (71, 96)])
def test_sizes_are_those_of_plain_torch(name, size):
    spec = replace(SHORT[name], input_shape=(*size, 3))
    found = torch_features(reference(spec), np.zeros((1, *size, 3), np.float32))
    for stage, shape in spec.spatial_shapes().items():
        assert found[stage].shape[1:-1] == shape, stage
    assert found["avgpool"].shape == (1, spec.num_features)


def test_num_features_of_the_presets():
    # Huang et al. (2017), table 1, and torchvision's heads of 121, 169 and 201.
    for depth, features in ((121, 1024), (169, 1664), (201, 1920)):
        assert replace(PRESETS["densenet121_2d"].spec, depth=depth).num_features == features
    assert PRESETS["seresnext50_2d"].spec.num_features == 2048
    assert build_backbone("densenet121_2d").output_shape == (None, 1024)
    # Channels of timm's seresnext50_32x4d, its first stage at widths below, and 20 of 16 to 24.
    for channels, expected in ((256, 16), (512, 32), (1024, 64), (2048, 128), (32, 8), (320, 24)):
        assert squeezed(channels) == expected


def test_a_specification_without_architecture_is_a_resnet():
    spec = ModelSpec((64, 64, 3), 34)
    content = spec.to_dict()
    del content["architecture"]
    assert ModelSpec.from_dict(content) == spec
    assert set(DENSE.differences(replace(SERESNEXT, width=8))) == {"architecture", "depth"}


def test_weights_of_another_architecture_are_refused(tmp_path):
    resnet50 = ModelSpec((48, 48, 3), 50, width=2)
    save_weights(classifier(resnet50), tmp_path / "a.weights.h5", {"network": resnet50.to_dict()})
    spec = replace(resnet50, architecture="seresnext")
    with pytest.raises(DataError, match=r"architecture resnet \(file\), seresnext \(network\)"):
        load_weights(classifier(spec), tmp_path / "a.weights.h5", spec)


def test_builders_refuse_each_others_networks():
    with pytest.raises(UsageError, match="DenseNet is no ResNet"):
        resnet(DENSE)
    with pytest.raises(UsageError, match="SE-ResNeXt is no DenseNet"):
        densenet(SERESNEXT)
    assert backbone(DENSE).name == "densenet21_2d"


# Layers with weights up to each stage, counted by hand. DenseNet: stem conv and norm; a stage of
# two dense layers of four; a transition of two before each later one; the last normalisation.
# SE-ResNeXt: stem; a block of three convolutions and norms, two of the gate, two of the shortcut.
FROZEN = {
    "densenet121_2d": (2, 10, 20, 30, 41),
    "seresnext50_2d": (2, 12, 22, 32, 42),
}


@pytest.mark.parametrize("name", SHORT)
def test_freezing_keeps_the_first_part_and_trains_the_rest(name):
    for stage, number in zip(FREEZABLE, FROZEN[name], strict=True):
        model = classifier(SHORT[name])
        assert freeze(model, stage) == number, stage
    assert [v.path for v in model.trainable_variables] == ["fc/kernel", "fc/bias"]
    model = classifier(SHORT[name], output="logits")
    freeze(model, "layer3")
    first = {re.match(r"layer\d|fc", v.path)[0] for v in model.trainable_variables}
    assert first == {"layer4", "fc"}


@pytest.mark.parametrize("name", SHORT)
def test_the_backbone_learns_at_its_own_rate(name):
    keras.utils.set_random_seed(0)
    model = compile_classifier(
        classifier(replace(SHORT[name], dropout=0.0), output="logits"), 1e-3, backbone_factor=0.1
    )
    before = {v.path: np.array(v) for v in model.trainable_variables}
    random = np.random.default_rng(0)
    images = random.standard_normal((8, 48, 48, 3)).astype("float32")
    model.fit(images, random.integers(0, 2, (8, 6)), batch_size=8, verbose=0)
    for variable in model.trainable_variables:
        step = np.abs(np.array(variable) - before[variable.path]).max()
        rate = 1e-3 if variable.path.startswith("fc") else 1e-4
        assert step == pytest.approx(rate, rel=0.05), variable.path


@pytest.mark.parametrize("norm", ["frozen", "group"])
@pytest.mark.parametrize("name", SHORT)
def test_norms_that_do_not_look_at_the_batch(name, norm):
    model = classifier(replace(SHORT[name], norm=norm, dropout=0.0), output="logits")
    images = np.random.default_rng(0).standard_normal((3, 48, 48, 3)).astype("float32")
    together = keras.ops.convert_to_numpy(model(images, training=True))
    alone = [keras.ops.convert_to_numpy(model(image[None], training=True)) for image in images]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-3, atol=1e-4)


def test_a_last_stage_of_one_value_is_refused():
    for spec in (DENSE, SERESNEXT):
        one = replace(spec, input_shape=(32, 32, 3))
        require_trainable(one, 2)
        with pytest.raises(UsageError, match="one value per channel and no variance"):
            require_trainable(one, 1)


def test_costs_by_hand():
    # 32x32x3, width 4, growth 2: stem 16x16, pooled 8x8; then 8, 4, 2 and 1 pixels a side.
    dense = cost(backbone(replace(DENSE, input_shape=(32, 32, 3), width=4)))
    channels, macs = 4, 16 * 16 * 7 * 7 * 3 * 4
    for side in (8, 4, 2, 1):
        if side < 8:  # the transition computes before it averages
            macs += (2 * side) ** 2 * channels * (channels // 2)
            channels //= 2
        for _ in range(2):
            macs += side**2 * (channels * 8 + 9 * 8 * 2)
            channels += 2
    assert dense.multiply_adds == macs
    # Width 4: two groups, 8 channels inside, 16 behind, 8 in the gate.
    gated = cost(backbone(replace(SERESNEXT, input_shape=(32, 32, 3), width=4)))
    before, macs = 4, 16 * 16 * 7 * 7 * 3 * 4
    for stage, side in enumerate((8, 4, 2, 1)):
        inside, behind, entering = 8 * 2**stage, 16 * 2**stage, side if stage == 0 else 2 * side
        gate = max(8, behind // 16)
        macs += entering**2 * before * inside + side**2 * (9 * inside * inside // 2)
        macs += side**2 * behind * (inside + before) + 2 * behind * gate
        before = behind
    assert gated.multiply_adds == macs


def test_what_they_are_not_for_is_refused_by_name():
    for name in SHORT:
        config = RunConfig(preset=name, data=DataConfig(size=48, view="slab"))
        with pytest.raises(UsageError, match=f"'slab' with preset {name}, which takes slices"):
            Recipe.of(config, 48)
        with pytest.raises(UsageError, match="takes 3 axes like .256, 256, 3.*; received"):
            preset(name, (5, 64, 64, 3))
    with pytest.raises(UsageError, match="SE-ResNeXt is 2D; expected .rows, columns, channels"):
        replace(SERESNEXT, input_shape=(5, 64, 64, 3))
    with pytest.raises(UsageError, match=r"\(28, 256, 3\): nothing is left of 28 pixels"):
        build_classifier("densenet121_2d", input_shape=(28, 256, 3))


@pytest.mark.parametrize("name", SHORT)
def test_maps_of_the_last_stage_add_up_to_the_logit(name):
    """Behind it lie an average and a linear head alone (Draelos and Carin 2020, HiResCAM)."""
    keras.utils.set_random_seed(0)
    model = classifier(replace(SHORT[name], input_shape=(96, 96, 3)), output="logits")
    bias = np.linspace(-1, 1, 6, dtype=np.float32)
    model.get_layer("fc").bias.assign(bias)
    assert last_stage(model, 6) == "layer3"
    images = np.random.default_rng(0).standard_normal((2, 96, 96, 3)).astype("float32")
    maps = Relevance(model, MapOptions(layer="layer4")).maps(images, range(6), images[:1])
    assert maps.shape == (6, 2, 3, 3)
    logits = keras.ops.convert_to_numpy(model(images, training=False))
    np.testing.assert_allclose(maps.sum(axis=(2, 3)).T, logits - bias, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "sigmoid"])
@pytest.mark.parametrize("name", SHORT)
def test_learnable_windows_come_before_the_stem(name, kind):
    keras.utils.set_random_seed(0)
    spec = replace(SHORT[name], input_shape=(48, 48, 1), windows=kind)
    model = classifier(spec)
    hu = np.random.default_rng(0).uniform(-100, 200, (2, 48, 48, 1)).astype("float32")
    found = model.predict_on_batch(hu)
    choose_step(model, "stock")
    np.testing.assert_allclose(found, model.predict_on_batch(hu), rtol=1e-4, atol=1e-6)
    assert np.abs(found - model.predict_on_batch(hu + 50)).max() > 1e-3


@pytest.mark.parametrize("name", SHORT)
def test_their_flat_function_can_be_exported(name):
    function = Network(classifier(SHORT[name]))
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 48, 48, 3))).float()
    any_number = {"x": {0: torch.export.Dim("n", min=1, max=64)}}
    program = torch.export.export(function, (images,), dynamic_shapes=any_number)
    (found,) = program.module()(images[:1])
    np.testing.assert_allclose(found.detach(), function(images)[0][:1].detach(), rtol=1e-5)


@pytest.mark.parametrize("name", SHORT)
def test_one_epoch_by_the_command(name, phantom_cache_folder, phantom_cache, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, name, Preset(SHORT[name], "short"))
    run = tmp_path / "run"
    words = f"--preset {name} --size 48 --epochs 1 --batch-size 16 --precision float32"
    done = CliRunner().invoke(
        main, ["train", "--cache", str(phantom_cache_folder), "--out", str(run), *words.split()]
    )
    assert done.exit_code == 0, done.output
    recipe, model = load_run(run)
    assert recipe.network == SHORT[name]
    loaded = keras.saving.load_model(run / "model.keras", compile=False)
    images = np.random.default_rng(0).standard_normal((2, 48, 48, 3)).astype("float32")
    np.testing.assert_allclose(
        loaded.predict_on_batch(images), model.predict_on_batch(images), rtol=1e-3, atol=1e-5
    )
    hu = phantom_cache.series_hu(phantom_cache.series_uids[0])
    maps = explain_series((recipe, model), hu, (5.0, 1.0, 1.0), "any").values["any"]
    assert maps.shape == hu.shape and np.isfinite(maps).all()
