"""Every network on the running backend: golden outputs, costs, features, norms, files, freezing."""

import math
from dataclasses import replace

import golden_networks
import keras
import numpy as np
import pytest
import torchvision

from ich_keras.errors import UsageError
from ich_keras.keras_private import keep_float64
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
from ich_keras.models.presets import PRESETS, preset
from ich_keras.models.resnet import feature_model, resnet
from ich_keras.models.spec import ModelSpec
from weights_convert.selfcheck import keras_network
from weights_convert.state import load_state, shapes_by_name

NARROW = ModelSpec((32, 32, 3), width=8, dropout=0.0)
SLAB = replace(PRESETS["resnet18_3d_slab"].spec, input_shape=(5, 32, 32, 1), width=8, dropout=0.0)
DENSE = {"architecture": "densenet", "depth": 21}
TINY = {
    "2d": NARROW,
    "bottleneck": replace(NARROW, depth=50),
    "medicalnet": ModelSpec(
        (9, 24, 24, 1), shortcut="A", strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), width=4
    ),
    "detached": ModelSpec((17, 24, 24, 1), shortcut="A", detach_shortcut=True, width=4),
    "slab": SLAB,
    "r2plus1d": replace(
        PRESETS["r2plus1d_18"].spec, input_shape=(5, 24, 24, 3), width=8, dropout=0.0
    ),
    "seresnext": replace(NARROW, architecture="seresnext", depth=14),
    "dense": replace(NARROW, **DENSE),
    "group": replace(NARROW, norm="group"),
    "frozen": replace(NARROW, norm="frozen"),
}


def num_trainable(model) -> int:
    return sum(math.prod(variable.shape) for variable in model.trainable_variables)


def random_batch(model, size=4, seed=0):
    random = np.random.default_rng(seed)
    images = random.standard_normal((size, *model.input_shape[1:])).astype("float32")
    return images, random.integers(0, 2, (size, 6)).astype("float32")


def require_golden(name, model, rtol):
    shapes = shapes_by_name(model)
    load_state(model, {key: golden_networks.tensor(key, shape) for key, shape in shapes.items()})
    golden = np.load(golden_networks.FOLDER / f"{name}.npz", allow_pickle=False)
    names = [*map(str, golden["stage_names"]), "avgpool", "fc"]
    images = golden_networks.images(name, model.input_shape[-1])
    found = feature_model(model, tuple(names)).predict_on_batch(images)
    for key in ("avgpool", "fc"):
        expected = golden[key]
        off = np.abs(np.asarray(found[key], np.float64) - expected).max()
        assert off / np.abs(expected).max() < rtol, key
    means = [np.abs(np.asarray(found[key], np.float64)).mean() for key in names[:-2]]
    np.testing.assert_allclose(means, golden["stage_means"], rtol=rtol)


@pytest.mark.parametrize("name", sorted(golden_networks.NETWORKS.keys() - {"seresnext50_2d"}))
def test_golden_outputs(name):
    spec = replace(golden_networks.spec_of(name), dropout=0.0)
    require_golden(name, classifier(spec, output="logits"), 1e-5)


@pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="jax computes in float32, unless it is told otherwise"
)
def test_seresnext50_gives_timms_own_numbers():
    """In float64: sixteen gates multiply each other's rounding, and float32 is off by 1e-4."""
    with keep_float64():
        model = keras_network(golden_networks.spec_of("seresnext50_2d"), "float64")
        require_golden("seresnext50_2d", model, 1e-12)


@pytest.mark.parametrize(
    ("name", "channels", "backbone", "with_head"),
    [
        # Counted by hand for the project; the first and the last are torchvision's less its head.
        ("resnet18_2d", 3, 11_689_512 - 513_000, 11_179_590),
        ("resnet18_3d_medicalnet", 1, 32_986_176, 32_989_254),
        ("resnet18_3d_medicalnet", 3, 33_030_080, 33_033_158),
        ("resnet18_3d", 1, 33_160_000, 33_163_078),
        ("r3d_18", 3, 33_371_472 - 400 * 513, 33_169_350),
        ("mc3_18", 3, 11_695_440 - 400 * 513, None),
        ("r2plus1d_18", 3, 31_505_325 - 400 * 513, None),
        ("resnet34_2d", 3, 21_797_672 - 513_000, None),
        ("resnet50_2d", 3, 25_557_032 - 2_049_000, None),
        ("densenet121_2d", 3, 7_978_856 - 1_025_000, None),  # torchvision's own count
        ("seresnext50_2d", 3, 27_559_896 - 2_049_000, None),  # timm's
    ],
)
def test_parameter_counts(name, channels, backbone, with_head):
    spec = preset(name)
    shape = (*(None,) * spec.rank, channels)
    assert num_trainable(build_backbone(name, input_shape=shape)) == backbone
    if with_head:
        assert num_trainable(build_classifier(name, input_shape=shape)) == with_head


@pytest.mark.parametrize(
    # Millions, from the table in MedicalNet's README.
    ("depth", "millions"),
    [(10, 14.36), (18, 32.99), (34, 63.31), (50, 46.21)],
)
def test_parameters_of_medicalnet_as_published(depth, millions):
    count = num_trainable(build_backbone(f"resnet{depth}_3d_medicalnet"))
    assert round(count / 1e6, 2) == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(
    ("name", "shape", "weights"),
    [
        ("resnet18_2d", (224, 224, 3), torchvision.models.ResNet18_Weights.IMAGENET1K_V1),
        ("resnet50_2d", (224, 224, 3), torchvision.models.ResNet50_Weights.IMAGENET1K_V1),
        ("densenet121_2d", (224, 224, 3), torchvision.models.DenseNet121_Weights.IMAGENET1K_V1),
        ("r3d_18", (16, 112, 112, 3), torchvision.models.video.R3D_18_Weights.KINETICS400_V1),
        ("mc3_18", (16, 112, 112, 3), torchvision.models.video.MC3_18_Weights.KINETICS400_V1),
        (
            "r2plus1d_18",
            (16, 112, 112, 3),
            torchvision.models.video.R2Plus1D_18_Weights.KINETICS400_V1,
        ),
    ],
)
def test_operations_as_torchvision_publishes_them(name, shape, weights):
    counted = cost(build_classifier(name, input_shape=shape)).multiply_adds / 1e9
    assert counted == pytest.approx(weights.meta["_ops"], rel=1e-3)


def test_activation_memory_by_hand():
    # 8x8x1, width 4: stem 4x4x4 and its ReLU, pooling 2x2x4; every tensor that a convolution,
    # normalisation or pooling reads, once.
    model = classifier(ModelSpec((8, 8, 1), depth=10, width=4, dropout=0.0))
    stem, pool = 2 * 4 * 4 * 4, 2 * 2 * 4
    layer1 = 4 * (2 * 2 * 4)  # conv1, relu1, conv2, block output
    layer2 = 5 * 8  # 1x1 with 8 channels: the same four and the shortcut's convolution
    layer3, layer4 = 5 * 16, 5 * 32
    head = 32
    values = stem + pool + layer1 + layer2 + layer3 + layer4 + head
    assert cost(model).activation_bytes == 4 * values


def test_features_have_the_sizes_that_the_specification_tells():
    for spec in TINY.values():
        model = backbone(spec)
        # Keras asks the backend for these shapes; computing numbers would show no others.
        outputs = feature_model(
            model, ("stem", "layer1", "layer2", "layer3", "layer4", "avgpool")
        ).output
        shapes = spec.spatial_shapes()
        for name in ("stem", "layer1", "layer2", "layer3", "layer4"):
            assert outputs[name].shape[1:-1] == shapes[name]
        assert outputs["avgpool"].shape == (None, spec.num_features)
    with pytest.raises(UsageError, match="no feature called 'layer5'; it has stem, maxpool"):
        feature_model(resnet(NARROW), ("layer5",))
    assert list(feature_model(resnet(NARROW), "layer2").output) == ["layer2"]


@pytest.mark.parametrize("name", TINY)
def test_fit_save_load(name, tmp_path):
    keras.utils.set_random_seed(0)
    model = compile_classifier(classifier(TINY[name], output="logits"), 1e-2)
    images, truth = random_batch(model, 8)
    losses = model.fit(images, truth, epochs=6, batch_size=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    expected = np.asarray(model.predict_on_batch(images))
    twin = keras.Model(model.input, model.output)
    twin.save(tmp_path / "model.keras")
    twin.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    # Loaded without our steps, and so without folded normalisation: equal up to rounding.
    reloaded = np.asarray(loaded.predict_on_batch(images))
    # A group of two nearly equal values divides by nearly nothing: in float64, too, an input moved
    # by 1e-7 moves these answers by 1e-4.
    close = 3e-3 if TINY[name].norm == "group" else 1e-5
    np.testing.assert_allclose(reloaded, expected, rtol=1e-4, atol=close * np.abs(expected).max())
    other = classifier(TINY[name], output="logits")
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(np.asarray(other.predict_on_batch(images)), expected)


def test_frozen_statistics_stay_and_take_batches_of_one():
    model = compile_classifier(classifier(replace(NARROW, norm="frozen"), output="logits"), 1e-2)
    bn = model.get_layer("layer1_0_bn1")
    before = [np.array(w) for w in bn.get_weights()]
    kernel = np.array(model.get_layer("conv1").kernel)
    images, truth = random_batch(model, 1)
    # In inference mode already: a batch of one sample is normalised as any other.
    trained, used = (
        keras.ops.convert_to_numpy(model(images, training=is_training))
        for is_training in (True, False)
    )
    np.testing.assert_allclose(trained, used, rtol=1e-5)
    model.fit(images, truth, epochs=2, batch_size=1, verbose=0)
    for one, other in zip(before, bn.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.abs(kernel - np.array(model.get_layer("conv1").kernel)).max() > 0


def test_group_normalisation_does_not_look_at_the_batch():
    # Large enough for several positions in the last stage: a group of two values is all rounding.
    wide = replace(NARROW, input_shape=(64, 64, 3))
    model = classifier(replace(wide, norm="group"), output="logits")
    images, _ = random_batch(model, 2)
    together = keras.ops.convert_to_numpy(model(images, training=True))
    alone = np.concatenate(
        [keras.ops.convert_to_numpy(model(image[None], training=True)) for image in images]
    )
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-4)
    batch = classifier(wide, output="logits")
    with_mates = keras.ops.convert_to_numpy(batch(images, training=True))[0]
    one = keras.ops.convert_to_numpy(batch(images[:1], training=True))[0]
    assert np.abs(with_mates - one).max() > 1e-3


def test_freezing_keeps_the_first_part_and_trains_the_rest():
    model = classifier(NARROW, output="logits")
    # Stem: conv1, bn1; a stage: two blocks of four; layer2 has a downsampling pair beside them.
    assert freeze(model, "layer2") == 2 + 8 + 8 + 2
    compile_classifier(model, 1e-2)
    before = {layer.name: [np.array(w) for w in layer.get_weights()] for layer in model.layers}
    model.fit(*random_batch(model, 8), epochs=2, verbose=0)
    changed = {
        layer.name
        for layer in model.layers
        if any(
            np.abs(one - other).max() > 0
            for one, other in zip(before[layer.name], layer.get_weights(), strict=True)
        )
    }
    assert not {n for n in changed if n.startswith(("conv1", "bn1", "layer1", "layer2"))}
    assert {"layer3_0_conv1", "layer4_1_bn2", "fc"} <= changed
    with pytest.raises(UsageError, match="freeze is 'layer9'; expected one of stem, layer1"):
        freeze(model, "layer9")


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_backbone_learns_at_its_own_rate(weight_decay):
    model = compile_classifier(
        classifier(NARROW, output="logits"),
        1e-3,
        backbone_factor=0.1,
        weight_decay=weight_decay,
    )
    kernels = {name: np.array(model.get_layer(name).kernel) for name in ("conv1", "fc")}
    model.fit(*random_batch(model, 8), epochs=1, batch_size=8, verbose=0)
    # Adam's first step is the learning rate, whatever the gradient; decay comes before it.
    for name, rate in (("conv1", 1e-4), ("fc", 1e-3)):
        step = np.array(model.get_layer(name).kernel) - kernels[name] * (1 - rate * weight_decay)
        assert np.abs(step).max() == pytest.approx(rate, rel=1e-2)
        assert np.median(np.abs(step)) == pytest.approx(rate, rel=1e-2)


def test_too_few_slices_are_refused_with_the_way_out():
    with pytest.raises(
        UsageError, match="5 slice.s. are too few.*5 -> 3 .stem. -> 2 .maxpool. -> 2"
    ):
        preset("resnet18_3d", (5, 64, 64, 1))
    with pytest.raises(UsageError, match="1 slice.s. are too few.*stem still strides.*at least 5"):
        preset("resnet18_3d_medicalnet", (1, 64, 64, 1))
    preset("resnet18_3d", (9, 64, 64, 1))  # one slice is left for the last stage only
    for name in (n for n, p in PRESETS.items() if p.spec.rank == 3):
        least, channels = PRESETS[name].spec._least_slices(), PRESETS[name].spec.channels
        preset(name, (least, 64, 64, channels))
        if least > 1:
            with pytest.raises(UsageError, match=f"it takes at least {least}"):
                preset(name, (least - 1, 64, 64, channels))
    shapes = preset("resnet18_3d_medicalnet", (5, 64, 64, 1)).spatial_shapes()
    assert [shape[0] for shape in shapes.values()] == [3, 2, 2, 1, 1, 1]  # the thesis's slabs
    slab = preset("resnet18_3d_slab").spatial_shapes()
    assert {shape[0] for shape in slab.values()} == {5}
    assert preset("resnet18_3d", (None, 64, 64, 1)).spatial_shapes()["layer4"] == (None, 2, 2)


def test_split_kernels_may_stride_within_slices_and_dilate_across():
    video = {"naming": "video", "pool_kernel": None}
    settings = {"strides": (1, (1, 2, 2), 1, 1), "dilations": (1, (2, 1, 1), 1, 1)}
    spec = ModelSpec((5, 16, 16, 1), depth=10, width=8, factorised=True, **video, **settings)
    assert resnet(spec).output.shape == (None, 64)
    with pytest.raises(UsageError, match="stage 2 has stride .1, 2, 2. and dilation .2, 1, 1."):
        replace(spec, factorised=False)
    with pytest.raises(UsageError, match="stage 2 has stride .2, 1, 1. and dilation .2, 1, 1."):
        replace(spec, strides=(1, (2, 1, 1), 1, 1))


def test_batch_normalisation_of_single_values_is_refused():
    spec = ModelSpec((32, 32, 3))
    require_trainable(spec, 2)
    require_trainable(replace(spec, norm="group"), 1)
    with pytest.raises(UsageError, match="one value per channel and no variance"):
        require_trainable(spec, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_shape": (0, 32, 3)}, "lengths of at least 1"),
        ({"norm": "layer"}, "norm 'layer'; expected 'batch' or 'frozen' or 'group'"),
        ({"naming": "audio"}, "naming 'audio'; expected 'image' or 'video'"),
        ({"stem_kernel": 4}, "stem_kernel 4; expected odd numbers"),
        ({"kernels": (3, 3, 3, 2)}, "kernels 2; expected odd numbers"),
        ({"strides": (1, 2, 0, 2)}, "strides 0; expected at least 1"),
        ({"strides": (1, (1, 2, 2), 2, 2)}, "has 3 axes; the network has 2"),
        (
            {"dilations": (1, 2, 1, 1)},
            r"stage 2 has stride \(2, 2\) and dilation \(2, 2\); expected",
        ),
        ({"detach_shortcut": True}, "detach_shortcut is about shortcut 'A'"),
        ({"factorised": True}, "factorised kernels need slices"),
        ({"width": 0}, "width 0; expected a whole number of at least 1"),
        ({"width": 2.5}, "width 2.5; expected a whole number"),
        ({"input_shape": (64.5, 64, 3)}, "expected whole numbers or None"),
        ({"input_shape": (True, 64, 3)}, "expected whole numbers or None"),
        ({"input_shape": (64, 64, 10**8)}, "channels, must be known, from 1 to 1024"),
        (
            {"architecture": "vgg"},
            "architecture 'vgg'; expected 'resnet' or 'seresnext' or 'den",
        ),
        ({"architecture": "densenet"}, "depth 18; expected one of .21, 121, 169, 201."),
        (
            {"architecture": "seresnext", "depth": 34},
            "depth 34; expected one of .14, 50, 101",
        ),
        (DENSE | {"input_shape": (28, 64, 3)}, "nothing is left of 28 pixels.*takes at least 29"),
        (DENSE | {"input_shape": (5, 64, 64, 3)}, "DenseNet is 2D; expected .rows, columns, chan"),
        (DENSE | {"shortcut": "A"}, "shortcut 'A': DenseNet is built with 'B' only"),
        (DENSE | {"strides": (1, 2, 2, 1)}, "strides .1, 2, 2, 1.: DenseNet is built with .1, 2"),
        (DENSE | {"width": 9}, "width 9: DenseNet halves it; expected an even number"),
        ({"input_shape": None}, "input_shape None; expected .rows, columns, channels."),
        ({"input_shape": 64}, "input_shape 64; expected .rows, columns, channels."),
    ],
)
def test_specifications_that_cannot_be(changes, message):
    with pytest.raises(UsageError, match=message):
        replace(NARROW, **changes)


def test_specifications_survive_json():
    import json

    for chosen in PRESETS.values():
        text = json.dumps(chosen.spec.to_dict())
        assert ModelSpec.from_dict(json.loads(text)) == chosen.spec
    with pytest.raises(UsageError, match="expected an object with"):
        ModelSpec.from_dict({"input_shape": [32, 32, 3], "depht": 18})


def test_differences_count_what_changes_the_numbers():
    spec = preset("resnet50_3d")
    assert spec.differences(replace(spec, dropout=0.1, norm="frozen")) == {}
    assert spec.differences(preset("resnet50_3d", (16, 64, 64, 1))) == {}
    dilated = spec.differences(preset("resnet50_3d_medicalnet"))
    assert set(dilated) == {"strides", "dilations"}
    assert set(spec.differences(replace(spec, norm="group"))) == {"norm"}
    assert spec.differences(replace(spec, stem_stride=(2, 2, 2))) == {}
