"""From checkpoints in the published formats to networks that agree, and back, bit by bit."""

import gc
import http.client
import json
import re
import ssl
import subprocess
import sys
import urllib.error
from collections import OrderedDict
from dataclasses import replace

import h5py
import keras
import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner
from safetensors.torch import save_file

from ich_keras.errors import EXIT_TERMINATED, DataError, EnvironmentProblem, UsageError
from ich_keras.files import sha256_of
from ich_keras.labels import LABELS
from ich_keras.models import densenet as densenet_module
from ich_keras.models import layers as layers_module
from ich_keras.models import resnet as resnet_module
from ich_keras.models.architectures import STAGE_BLOCKS
from ich_keras.models.classifier import build_backbone, build_classifier, classifier
from ich_keras.models.presets import PRESETS, Preset, preset
from ich_keras.models.resnet import feature_model, resnet
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights import load_weights, save_weights
from ich_keras.models.weights_file import read_record, read_weights
from ich_keras.models.weights_lookup import FOLDER_VARIABLE
from weights_convert import conversion, fetching, selfcheck
from weights_convert import state as state_module
from weights_convert.cli import main
from weights_convert.conversion import convert, export, inspect, verify
from weights_convert.mapping import to_keras, to_torch, torch_modules, torch_name
from weights_convert.parity import compare, difference, torch_features
from weights_convert.reference import reference
from weights_convert.reshaping import change_channels, collapse, inflate
from weights_convert.selfcheck import oracle_of, randomise
from weights_convert.shapes import to_2d, to_3d, with_channels
from weights_convert.sources import SOURCES, source_named
from weights_convert.state import load_state, state_of
from weights_convert.structure import structure_of

QUICK = (
    "torchvision_resnet18",
    "torchvision_resnet50",
    "torchvision_densenet121",
    "torchvision_r2plus1d_18",
    "medicalnet_resnet10_23datasets",
    "medicalnet_resnet18_23datasets",
)
LATER = tuple(name for name in SOURCES if name not in QUICK)


@pytest.fixture(autouse=True)
def weights_folder(tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    yield folder
    keras.backend.clear_session()
    gc.collect()  # networks of 180 MiB hold themselves in cycles


@pytest.fixture
def narrow(monkeypatch):
    """2D and 3D networks an eighth as wide, as presets."""
    for name in (
        "resnet18_2d",
        "resnet18_2d_stack",
        "resnet18_3d",
        "resnet18_3d_slab",
        "resnet18_3d_medicalnet",
        "resnet18_2d_medicalnet",
        "r2plus1d_18",
    ):
        spec = ModelSpec.from_dict({**PRESETS[name].spec.to_dict(), "width": 8})
        monkeypatch.setitem(PRESETS, name, Preset(spec, "narrow"))


def random_network(spec: ModelSpec, outputs: int | None = None, seed: int = 0):
    module = reference(spec.with_any_size(), outputs)
    randomise(module, seed)
    return module


def published(source_name: str, folder, seed: int = 0):
    """Write random weights in the exact format of a source; return (file, network)."""
    source = source_named(source_name)
    spec = preset(source.preset).with_any_size()
    if source_name.startswith("torchvision_"):
        name = source_name.removeprefix("torchvision_")
        is_video = hasattr(torchvision.models.video, name)
        network = getattr(torchvision.models.video if is_video else torchvision.models, name)()
        randomise(network, seed)
        path = folder / source.file_name
        if name.startswith("densenet"):
            # As in the published file, whose names are older than torch's rule for names.
            old = (
                (re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key), tensor)
                for key, tensor in network.state_dict().items()
                if not key.endswith("num_batches_tracked")
            )
            torch.save(OrderedDict(old), path, _use_new_zipfile_serialization=False)
            return path, network
        # torchvision's image networks of 2016 are in the legacy format, later files are zips.
        torch.save(network.state_dict(), path, _use_new_zipfile_serialization="50" in name)
        return path, network
    if source_name.startswith("timm_"):
        network = reference(spec, 1000)
        randomise(network, seed)
        torch.save(network.state_dict(), folder / source.file_name)
        return folder / source.file_name, network
    network = reference(spec)
    randomise(network, seed)
    state = OrderedDict((f"module.{n}", t) for n, t in network.state_dict().items())
    if source_name.endswith("_23datasets"):
        state["module.conv_seg.0.weight"] = torch.zeros(512, 32, 2, 2, 2)
        state["module.conv_seg.0.bias"] = torch.zeros(32)
    content = {"state_dict": state, "epoch": 12, "optimizer": {"state": {}, "param_groups": []}}
    path = folder / source.file_name
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path, network


def head_of(source) -> str:
    return "classifier" if "densenet" in source.name else "fc"


def declare_published(monkeypatch, source_name, path):
    """Let a source's published checksum be that of the file made here."""
    source = source_named(source_name)
    if source.published_sha256:
        digits = sha256_of(path)[:8]
        monkeypatch.setitem(SOURCES, source_name, replace(source, published_sha256=digits))


@pytest.mark.parametrize(
    "source_name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LATER)]
)
def test_a_published_checkpoint_becomes_a_network_with_its_numbers(
    source_name, tmp_path, weights_folder, monkeypatch
):
    path, network = published(source_name, tmp_path)
    declare_published(monkeypatch, source_name, path)
    made = convert(path, source_name)
    assert made.path == weights_folder / f"{source_name}.weights.h5"
    assert made.parity.worst < 1e-5
    assert set(made.parity.rows) >= {"stem", "layer1", "layer4", "avgpool"}
    source = source_named(source_name)
    model = build_backbone(source.preset, weights=source_name)
    size = (70, 47) if len(model.input_shape) == 4 else (7, 40, 33)
    images = np.random.default_rng(1).standard_normal((2, *size, source.channels), np.float32)
    with torch.inference_mode():
        inputs = torch.from_numpy(np.moveaxis(images, -1, 1))
        if source_name.startswith("torchvision_"):
            setattr(network, head_of(source), torch.nn.Identity())
            expected = network.eval()(inputs).numpy()
        else:
            expected = network(inputs)["avgpool"].numpy()
    _, relative = difference(np.asarray(model.predict_on_batch(images)), expected)
    assert relative < 1e-5
    head = {f"{head_of(source)}.{name}" for name in ("weight", "bias")}
    heads = {"torchvision": head, "timm": head, "medicalnet": set()}
    if source_name.endswith("_23datasets"):
        heads["medicalnet"] = {"conv_seg.0.weight", "conv_seg.0.bias"}
    assert set(made.dropped) == heads[source_name.partition("_")[0]]


def test_the_record_tells_where_weights_come_from(tmp_path):
    path, _ = published("medicalnet_resnet10", tmp_path)
    record = convert(path, "medicalnet_resnet10").record
    import hashlib

    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record["source"] == "medicalnet_resnet10"
    assert record["licence"] == "MIT (MedicalNet)"
    assert record["published_sha256"] == ""
    assert record["is_published_file"] is None
    assert record["intensity"] == "head-z-score"
    written = read_record(tmp_path / "weights" / "medicalnet_resnet10.weights.h5")
    assert written == {"labels": list(LABELS), **json.loads(json.dumps(record))}
    assert max(written["parity"].values()) < 1e-5


def test_a_file_that_is_not_the_published_one_gets_no_licence_and_no_name(tmp_path):
    path, _ = published("torchvision_resnet18", tmp_path)
    with pytest.raises(DataError, match="was published with f37072fd.*it is another file"):
        convert(path, "torchvision_resnet18")
    assert not (tmp_path / "weights").exists()
    record = convert(path, "torchvision_resnet18", out=tmp_path / "a.weights.h5").record
    assert record["is_published_file"] is False
    assert record["source"] == "another file in the format of torchvision_resnet18"
    assert "licence" not in record


def test_sources_are_torchvisions_own_words():
    found = {
        "torchvision_resnet18": torchvision.models.ResNet18_Weights.IMAGENET1K_V1,
        "torchvision_resnet34": torchvision.models.ResNet34_Weights.IMAGENET1K_V1,
        "torchvision_resnet50": torchvision.models.ResNet50_Weights.IMAGENET1K_V1,
        "torchvision_densenet121": torchvision.models.DenseNet121_Weights.IMAGENET1K_V1,
        "torchvision_r3d_18": torchvision.models.video.R3D_18_Weights.KINETICS400_V1,
        "torchvision_mc3_18": torchvision.models.video.MC3_18_Weights.KINETICS400_V1,
        "torchvision_r2plus1d_18": torchvision.models.video.R2Plus1D_18_Weights.KINETICS400_V1,
    }
    for name, weights in found.items():
        assert SOURCES[name].url == weights.url
        assert f"-{SOURCES[name].published_sha256}.pth" in weights.url
        for numbers in (weights.transforms().mean, weights.transforms().std):
            assert f"({', '.join(map(str, numbers))})" in SOURCES[name].original_input
    for source in SOURCES.values():
        assert PRESETS[source.preset].spec.channels == source.channels
        assert source.name in PRESETS[source.preset].sources


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", (64, 47)),
        ("resnet50", (65, 40)),
        ("densenet121", (65, 44)),
        ("r3d_18", (5, 33, 40)),
        ("mc3_18", (6, 32, 33)),
        ("r2plus1d_18", (3, 33, 32)),
    ],
)
def test_plain_torch_equals_torchvision_bit_by_bit(name, size):
    source = SOURCES[f"torchvision_{name}"]
    spec = preset(source.preset).with_any_size()
    theirs, owner = oracle_of(source, spec)
    randomise(owner, 3)
    ours = reference(spec, 6)
    ours.load_state_dict(owner.state_dict())
    images = np.random.default_rng(0).standard_normal((2, *size, 3), np.float32)
    expected, found = torch_features(theirs, images), torch_features(ours, images)
    for feature in found:
        if feature in ("avgpool", "fc"):  # another order of sums
            np.testing.assert_allclose(found[feature], expected[feature], rtol=1e-4, atol=1e-6)
        else:
            np.testing.assert_array_equal(found[feature], expected[feature], err_msg=feature)


@pytest.mark.parametrize(
    "source_name",
    ["torchvision_resnet18", pytest.param("torchvision_mc3_18", marks=pytest.mark.slow)],
)
def test_parity_on_this_backend(source_name):
    parity = selfcheck.check(
        source_name,
        sizes=((33, 48), (64, 64)) if "resnet" in source_name else ((5, 33, 32),),
    )
    rows = {name: relative for name, (_, relative) in parity.rows.items()}
    # In float32 single switched ReLUs move it by per cents; a wrong gradient is off by its length.
    assert rows.pop("gradient") < 0.05
    rows.pop("oracle")
    assert max(rows.values()) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(
    keras.config.backend() != "torch",
    reason="jax computes in float32; elsewhere a gradient is read off a float32 step",
)
@pytest.mark.parametrize("source_name", [n for n in SOURCES if not n.endswith("_23datasets")])
def test_parity_in_float64_gradients_included(source_name):
    rank = preset(SOURCES[source_name].preset).rank
    sizes = ((64, 64), (65, 63)) if rank == 2 else ((1, 33, 32), (5, 32, 33), (16, 32, 32))
    rows = selfcheck.check(source_name, "float64", sizes).rows
    for name, (_, relative) in rows.items():
        assert relative < 1e-10, name


def test_a_detached_shortcut_trains_as_medicalnet_does():
    def gradients(detach_keras, detach_torch):
        spec = ModelSpec((None, None, None, 1), shortcut="A", width=8, dropout=0.0)
        module = random_network(replace(spec, detach_shortcut=detach_torch), 6)
        model = selfcheck.keras_network(replace(spec, detach_shortcut=detach_keras))
        load_state(model, {n: t.numpy() for n, t in module.state_dict().items()})
        images = np.random.default_rng(0).standard_normal((2, 16, 32, 32, 1), np.float32)
        return selfcheck.gradient_rows(module, module, model, images)["gradient"][1]

    assert gradients(True, True) < 0.05
    assert gradients(False, False) < 0.05
    assert gradients(False, True) > 0.2
    assert gradients(True, False) > 0.2


@pytest.mark.parametrize("depth", STAGE_BLOCKS)
@pytest.mark.parametrize("shape", [(None, None, 3), (None, None, None, 1)])
def test_every_depth_in_2d_and_3d_equals_plain_torch(depth, shape):
    spec = ModelSpec(shape, depth=depth, width=4, dropout=0.0)
    module = random_network(spec, 6)
    model = selfcheck.keras_network(spec)
    load_state(model, {n: t.numpy() for n, t in module.state_dict().items()})
    sizes = ((33, 40),) if spec.rank == 2 else ((5, 33, 24),)
    assert compare(module, model, sizes, spec.channels).worst < 1e-5


@pytest.mark.parametrize("depth", [101, 152])
def test_deep_networks_have_torchvisions_tensors(depth):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=6).state_dict()
        ours = reference(ModelSpec((None, None, 3), depth=depth), 6).state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


# Each of these breaks the network in one of the ways that shapes do not show.
MUTATIONS = {
    "same padding": lambda patch: patch.setattr(resnet_module._Graph, "pad", _pad_as_keras_does),
    "mean and variance swapped": lambda patch: patch.setattr(
        state_module, "torch_name", _swapped_statistics
    ),
    "epsilon 1e-3": lambda patch: patch.setitem(layers_module.BATCH_NORM, "epsilon", 1e-3),
    "no dilation": lambda patch: patch.setitem(
        PRESETS,
        "resnet10_3d_medicalnet",
        Preset(_without("dilations", (1, 1, 1, 1)), "", ("medicalnet_resnet10",)),
    ),
    "kernel axes swapped": lambda patch: patch.setattr(state_module, "to_keras", _swapped_axes),
    "zeros in front of the channels": lambda patch: patch.setattr(
        resnet_module.ops, "pad", _prepend
    ),
}


def _pad_as_keras_does(graph, x, width, name):
    # "same" at stride 2: one pixel less in front of an even input.
    if not any(width):
        return x
    return graph.pad_layer(tuple((max(0, w - 1), w + min(1, w)) for w in width), name=name)(x)


def _swapped_statistics(layer, variable):
    swap = {"moving_mean": "moving_variance", "moving_variance": "moving_mean"}
    return torch_name(layer, swap.get(variable, variable))


def _without(field, value):
    return ModelSpec.from_dict({**PRESETS["resnet10_3d_medicalnet"].spec.to_dict(), field: value})


def _swapped_axes(array):
    moved = to_keras(array)
    return moved.swapaxes(0, 1) if array.ndim > 1 else moved


_ops_pad = keras.ops.pad


def _prepend(x, widths):
    return _ops_pad(x, [*widths[:-1], (widths[-1][1], 0)])


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_network_that_computes_otherwise_is_refused(mutation, tmp_path, monkeypatch):
    name = "medicalnet_resnet10"
    if mutation == "zeros in front of the channels":
        name = "medicalnet_resnet18"
    path, _ = published(name, tmp_path)
    # The reference is built from the true specification.
    true_spec = preset(SOURCES[name].preset).with_any_size()
    monkeypatch.setattr(
        conversion, "reference", lambda spec, outputs: reference(true_spec, outputs)
    )
    MUTATIONS[mutation](monkeypatch)
    with pytest.raises(DataError, match="the networks (disagree from|overflow at) \\w+"):
        convert(path, name)
    assert not (tmp_path / "weights").exists()


def test_what_does_not_match_one_to_one_is_named(tmp_path):
    _, network = published("torchvision_resnet18", tmp_path)
    state = network.state_dict()

    def refused(change, message):
        changed = OrderedDict(state)
        change(changed)
        torch.save(changed, tmp_path / "changed.pth")
        with pytest.raises(DataError, match=message):
            convert(tmp_path / "changed.pth", "torchvision_resnet18", out=tmp_path / "a.weights.h5")
        assert not (tmp_path / "a.weights.h5").exists()

    refused(lambda s: s.pop("bn1.running_mean"), "missing bn1.running_mean; surplus nothing")
    refused(
        lambda s: s.update({"layer1.0.extra": torch.zeros(2)}), "missing nothing; surplus layer1.0"
    )
    refused(
        lambda s: s.update({"layer2.0.conv2.weight": torch.zeros(128, 128, 1, 3)}),
        "of another shape layer2.0.conv2.weight .128, 128, 1, 3., expected .128, 128, 3, 3.",
    )
    transposed = state["layer2.0.conv1.weight"].transpose(0, 1).contiguous()
    refused(
        lambda s: s.update({"layer2.0.conv1.weight": transposed}),
        "of another shape layer2.0.conv1.weight",
    )
    refused(
        lambda s: s.update({"bn1.running_var": -torch.ones(64)}),
        "bn1.running_var is a variance and holds -1; expected 0 or more",
    )
    refused(
        lambda s: s.update({"conv1.weight": torch.full((64, 3, 7, 7), 1e38)}),
        "the networks overflow at stem",
    )
    refused(lambda s: s.pop("conv1.weight"), "holds no ResNet: conv1.weight is absent")


@pytest.mark.parametrize(
    ("file_of", "given_as", "message"),
    [
        ("torchvision_resnet34", "torchvision_resnet18", "2D ResNet-34.*depth 34, expected 18"),
        ("torchvision_resnet18", "medicalnet_resnet18", "2D ResNet-18.*rank 2, expected 3"),
        ("medicalnet_resnet18", "torchvision_resnet18", "3D ResNet-18.*rank 3, expected 2"),
        ("medicalnet_resnet10", "medicalnet_resnet18", "shortcut B, expected A"),
        ("torchvision_mc3_18", "torchvision_r3d_18", "kernels .*, expected"),
        ("torchvision_r2plus1d_18", "torchvision_r3d_18", "factorised True, expected False"),
        ("torchvision_r3d_18", "medicalnet_resnet18", "naming video, expected image"),
        (
            "torchvision_densenet121",
            "torchvision_resnet18",
            "2D DenseNet-121, 3 input channels.*architecture densenet, expected resnet",
        ),
        (
            "timm_seresnext50_32x4d",
            "torchvision_resnet50",
            "2D SE-ResNeXt-50.*architecture seresnext, expected resnet",
        ),
        ("torchvision_resnet50", "timm_seresnext50_32x4d", "architecture resnet, expected seresn"),
    ],
)
def test_a_file_of_another_network_names_both(file_of, given_as, message, tmp_path):
    path, _ = published(file_of, tmp_path)
    with pytest.raises(DataError, match=message):
        convert(path, given_as, out=tmp_path / "a.weights.h5")


def test_structure_is_read_from_tensors():
    for name, chosen in PRESETS.items():
        if name.startswith("resnet34") or name.startswith("resnet50_3d"):
            continue
        spec = ModelSpec.from_dict({**chosen.spec.to_dict(), "width": 8})
        shapes = {n: tuple(t.shape) for n, t in reference(spec, 6).state_dict().items()}
        found = structure_of(shapes)
        assert found.pop("head") == 6
        assert found["stem_kernel"] == spec.per_axis(spec.stem_kernel)
        assert found["kernels"] == tuple(spec.per_axis(k) for k in spec.kernels)
        for field in (
            "architecture", "naming", "rank", "depth", "shortcut", "channels", "width", "factorised"
        ):  # fmt: skip
            assert found[field] == getattr(spec, field), (name, field)
    with pytest.raises(DataError, match=r"\(3, 24, 36, 3\) bottleneck blocks.*known depths"):
        structure_of(
            {"conv1.weight": (64, 1, 7, 7, 7)}
            | {
                f"layer{s}.{b}.conv3.weight": (1,)
                for s, n in enumerate((3, 24, 36, 3), 1)
                for b in range(n)
            }
        )


def test_names_and_axes_there_and_back():
    (module,) = torch_modules(["layer1_0_downsample_1"]).values()
    assert torch_name(module, "moving_variance") == "layer1.0.downsample.1.running_var"
    with torch.device("meta"):
        theirs = torchvision.models.densenet121(num_classes=6).state_dict()
    model = classifier(preset("densenet121_2d"), output="logits")
    ours = torch_modules(layer.name for layer in model.layers if layer.weights).values()
    assert {name.rpartition(".")[0] for name in theirs} == set(ours)
    for shape in ((4, 3, 7, 7), (4, 3, 5, 7, 7), (6, 512), (8,)):
        array = np.random.default_rng(0).standard_normal(shape)
        np.testing.assert_array_equal(to_torch(to_keras(array)), array)
    kernel = np.zeros((4, 3, 7, 5))
    kernel[2, 1, 6, 3] = 1
    assert to_keras(kernel)[6, 3, 1, 2] == 1


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_keras_to_torch_to_keras_is_bit_equal(suffix, narrow, tmp_path):
    model = build_classifier("resnet18_2d", output="logits")
    for layer in model.layers:
        layer.set_weights(
            [np.random.default_rng(1).uniform(0.5, 1, w.shape) for w in layer.get_weights()]
        )
    spec = preset("resnet18_2d").to_dict()
    save_weights(model, tmp_path / "a.weights.h5", {"network": spec})
    export(tmp_path / "a.weights.h5", tmp_path / f"b{suffix}")
    convert(
        tmp_path / f"b{suffix}",
        preset_name="resnet18_2d",
        out=tmp_path / "c.weights.h5",
        keep_head=True,
    )
    first, second = (read_weights(tmp_path / f"{n}.weights.h5").layers for n in "ac")
    assert first.keys() == second.keys()
    for name, arrays in first.items():
        for one, other in zip(arrays, second[name], strict=True):
            np.testing.assert_array_equal(one, other)
    state = state_of(model)
    twin = build_classifier("resnet18_2d", output="logits")
    load_state(twin, state)
    for one, other in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_torchvision_itself_loads_an_exported_file(tmp_path):
    model = build_classifier("resnet18_2d", input_shape=(64, 64, 3), output="logits")
    randomised = reference(preset("resnet18_2d"), 6)
    randomise(randomised, 4)
    load_state(model, {n: t.numpy() for n, t in randomised.state_dict().items()})
    model.save_weights(tmp_path / "a.weights.h5")
    export(tmp_path / "a.weights.h5", tmp_path / "a.pth")
    theirs = torchvision.models.resnet18(num_classes=6)
    theirs.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True))
    images = np.random.default_rng(0).standard_normal((2, 64, 64, 3), np.float32)
    with torch.inference_mode():
        expected = theirs.eval()(torch.from_numpy(np.moveaxis(images, -1, 1))).numpy()
    assert difference(np.asarray(model.predict_on_batch(images)), expected)[1] < 1e-5
    with pytest.raises(UsageError, match="already exists"):
        export(tmp_path / "a.weights.h5", tmp_path / "a.pth")
    with pytest.raises(UsageError, match=r"expected a name ending in .pth"):
        export(tmp_path / "a.weights.h5", tmp_path / "a.onnx")


SHORT = {
    "densenet121_2d": ModelSpec((70, 45, 3), 21, width=8, architecture="densenet", dropout=0.0),
    "seresnext50_2d": ModelSpec((70, 45, 3), 14, width=8, architecture="seresnext", dropout=0.0),
}


@pytest.mark.parametrize("name", SHORT)
def test_other_architectures_go_to_torch_and_back_bit_by_bit(name, tmp_path, monkeypatch):
    spec, files = SHORT[name], [tmp_path / f"{n}.weights.h5" for n in "abc"]
    monkeypatch.setitem(PRESETS, name, Preset(spec, "short"))
    theirs = random_network(spec, 6)
    if name == "densenet121_2d":
        theirs = torchvision.models.DenseNet(4, (2, 2, 2, 2), num_init_features=8, num_classes=6)
        randomise(theirs, 0)
    model = classifier(spec, output="logits")
    load_state(model, {n: t.numpy() for n, t in theirs.state_dict().items()})
    for key, array in state_of(model).items():
        np.testing.assert_array_equal(array, theirs.state_dict()[key].numpy(), err_msg=key)
    save_weights(model, files[0], {"network": spec.to_dict()})
    export(files[0], tmp_path / "b.pth")
    state = torch.load(tmp_path / "b.pth", weights_only=True)
    theirs.load_state_dict(state)  # strict
    images = np.random.default_rng(0).standard_normal((2, 70, 45, 3), np.float32)
    with torch.inference_mode():
        expected = theirs.eval()(torch.from_numpy(np.moveaxis(images, -1, 1)))
    expected = expected["fc"] if isinstance(expected, dict) else expected
    assert difference(np.asarray(model.predict_on_batch(images)), expected.numpy())[1] < 1e-5
    made = convert(tmp_path / "b.pth", preset_name=name, out=files[1], keep_head=True)
    assert made.parity.worst < 1e-5 and made.dropped == ()
    first, second = (read_weights(path).layers for path in files[:2])
    assert first.keys() == second.keys()
    for layer, arrays in first.items():
        for one, other in zip(arrays, second[layer], strict=True):
            np.testing.assert_array_equal(one, other)
    # One channel: the answer to a repeated image stays.
    change_channels(files[1], files[2], 1)
    grey = classifier(replace(spec, input_shape=(70, 45, 1)), output="logits")
    load_weights(grey, files[2])
    repeated = np.repeat(images[..., :1], 3, axis=-1)
    one, three = grey.predict_on_batch(images[..., :1]), model.predict_on_batch(repeated)
    assert difference(np.asarray(one), np.asarray(three))[1] < 1e-5
    with pytest.raises(DataError, match="does not fit resnet18_3d: .*architecture"):
        inflate(files[1], "resnet18_3d", tmp_path / "d.weights.h5")


def test_a_densenet_that_computes_otherwise_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "densenet121_2d", Preset(SHORT["densenet121_2d"], "short"))
    torch.save(random_network(SHORT["densenet121_2d"]).state_dict(), tmp_path / "a.pth")
    out = tmp_path / "a.weights.h5"
    with monkeypatch.context() as patch:
        patch.setattr(densenet_module.layers, "AveragePooling2D", keras.layers.MaxPooling2D)
        with pytest.raises(DataError, match="the networks disagree from layer2 on"):
            convert(tmp_path / "a.pth", preset_name="densenet121_2d", out=out)
    convert(tmp_path / "a.pth", preset_name="densenet121_2d", out=out)


def test_an_se_resnext_that_computes_otherwise_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "seresnext50_2d", Preset(SHORT["seresnext50_2d"], "short"))
    torch.save(random_network(SHORT["seresnext50_2d"]).state_dict(), tmp_path / "a.pth")
    monkeypatch.setattr(resnet_module.layers, "Multiply", keras.layers.Add)
    with pytest.raises(DataError, match="the networks disagree from layer1 on"):
        convert(tmp_path / "a.pth", preset_name="seresnext50_2d", out=tmp_path / "a.weights.h5")


def outputs(spec, state, images):
    model = resnet(spec)
    load_state(model, state)
    return np.asarray(model.predict_on_batch(images))


def test_fewer_channels_answer_the_repeated_image_alike():
    spec = ModelSpec((None, None, 3), width=8)
    state = {n: t.numpy() for n, t in random_network(spec).state_dict().items()}
    grey = np.random.default_rng(0).standard_normal((2, 40, 40, 1), np.float32)

    def answer(channels):
        changed = ModelSpec((None, None, channels), width=8)
        return outputs(changed, with_channels(state, channels), np.repeat(grey, channels, -1))

    expected = outputs(spec, state, np.repeat(grey, 3, -1))
    for channels in (1, 2, 3, 6, 9):
        if channels == 2:
            continue  # not a multiple: only cyclic repetition is promised
        assert difference(answer(channels), expected)[1] < 1e-5, channels
    one = with_channels(state, 1)
    assert (
        difference(
            outputs(spec, with_channels(one, 3), np.repeat(grey, 3, -1)),
            outputs(ModelSpec((None, None, 1), width=8), one, grey),
        )[1]
        < 1e-5
    )
    five = with_channels(state, 5)["conv1.weight"]
    np.testing.assert_allclose(five, state["conv1.weight"][:, [0, 1, 2, 0, 1]] * 3 / 5, rtol=1e-6)
    for odd in (0, 10**8, 1.5, "3"):
        with pytest.raises(UsageError, match="expected a whole number, 1 to 1024"):
            with_channels(state, odd)


def features(spec, state, images, names):
    model = resnet(spec)
    load_state(model, state)
    found = feature_model(model, names).predict_on_batch(images)
    return {name: np.asarray(found[name]) for name in names}


def inflated(spec2d, spec3d, method, seed=0):
    state = {n: t.numpy() for n, t in random_network(spec2d, seed=seed).state_dict().items()}
    depths = {n: t.shape[2] for n, t in reference(spec3d).state_dict().items() if t.ndim == 5}
    return state, to_3d(state, depths, method)


@pytest.mark.parametrize("preset_name", ["resnet18_3d", "resnet18_3d_slab"])
def test_centre_inflation_keeps_the_2d_answer_to_a_constant_volume(narrow, preset_name):
    spec2d = ModelSpec((None, None, 1), width=8)
    spec3d = preset(preset_name).with_any_size()
    flat, deep = inflated(spec2d, spec3d, "centre")
    image = np.random.default_rng(0).standard_normal((2, 40, 33, 1), np.float32)
    names = ("stem", "layer1", "layer2", "layer3", "layer4", "avgpool")
    expected = features(spec2d, flat, image, names)
    found = features(spec3d, deep, np.repeat(image[:, None], 9, axis=1), names)
    for name in names:
        slices = [found[name]] if name == "avgpool" else np.moveaxis(found[name], 1, 0)
        for one in slices:  # every slice, the outermost ones too
            assert difference(one, expected[name])[1] < 1e-5, name


def test_with_depth_stride_1_a_centre_inflated_network_sees_slices_apart(narrow):
    spec2d, spec3d = ModelSpec((None, None, 1), width=8), preset("resnet18_3d_slab").with_any_size()
    flat, deep = inflated(spec2d, spec3d, "centre")
    volume = np.random.default_rng(0).standard_normal((1, 5, 40, 33, 1), np.float32)
    found = features(spec3d, deep, volume, ("layer4",))["layer4"][0]
    expected = features(spec2d, flat, volume[0], ("layer4",))["layer4"]
    assert difference(found, expected)[1] < 1e-5


def test_mean_inflation_keeps_it_where_no_padding_is_seen(narrow):
    spec2d, spec3d = ModelSpec((None, None, 1), width=8), preset("resnet18_3d_slab").with_any_size()
    flat, deep = inflated(spec2d, spec3d, "mean")
    image = np.random.default_rng(0).standard_normal((1, 40, 33, 1), np.float32)
    expected = features(spec2d, flat, image, ("stem", "layer1"))
    found = features(spec3d, deep, np.repeat(image[:, None], 25, axis=1), ("stem", "layer1"))
    # 3 slices of padding for the stem's kernel of 7, one more for each of layer1's four.
    for name, margin in (("stem", 3), ("layer1", 7)):
        inner = np.moveaxis(found[name], 1, 0)[margin:-margin]
        assert len(inner) == 25 - 2 * margin
        for one in inner:
            assert difference(one, expected[name])[1] < 1e-5, name
        assert difference(np.moveaxis(found[name], 1, 0)[0], expected[name])[1] > 1e-2


def test_collapsing_undoes_inflating_and_sees_a_constant_volume_alike(narrow):
    spec2d = ModelSpec((None, None, 1), width=8)
    spec3d = preset("resnet18_3d").with_any_size()
    for method in ("mean", "centre"):
        flat, deep = inflated(spec2d, spec3d, method)
        again = to_2d(deep)
        for name, array in flat.items():
            np.testing.assert_allclose(again[name], array, rtol=1e-6, atol=1e-8)
    # MedicalNet's own kernels differ from slice to slice: inside a deep volume the sums agree.
    spec3d = preset("resnet18_3d_medicalnet").with_any_size()
    deep = {n: t.numpy() for n, t in random_network(spec3d).state_dict().items()}
    flat, spec2d = to_2d(deep), preset("resnet18_2d_medicalnet").with_any_size()
    image = np.random.default_rng(0).standard_normal((1, 33, 40, 1), np.float32)
    expected = features(spec2d, flat, image, ("stem", "layer1"))
    found = features(spec3d, deep, np.repeat(image[:, None], 48, axis=1), ("stem", "layer1"))
    for name, margin in (("stem", 2), ("layer1", 6)):
        for one in np.moveaxis(found[name], 1, 0)[margin:-margin]:
            assert difference(one, expected[name])[1] < 1e-5
    with pytest.raises(DataError, match="nothing to collapse"):
        to_2d(flat)


def test_files_are_inflated_collapsed_and_rechannelled(narrow, tmp_path):
    module = random_network(preset("resnet18_2d"))
    torch.save(module.state_dict(), tmp_path / "own.pth")
    flat = convert(tmp_path / "own.pth", preset_name="resnet18_2d", out=tmp_path / "f.weights.h5")
    assert flat.record["source"] == "own checkpoint"
    deep = inflate(
        flat.path, "resnet18_3d_slab", tmp_path / "deep.weights.h5", method="centre", channels=1
    )
    record = read_record(deep)
    assert record["changes"] == ["inflated (centre)", "input channels 3 -> 1"]
    assert ModelSpec.from_dict(record["network"]) == preset("resnet18_3d_slab").with_any_size()
    model = build_classifier("resnet18_3d_slab", weights=deep, input_shape=(5, 40, 40, 1))
    assert model.get_layer("conv1").kernel.shape == (7, 7, 7, 1, 8)
    back = collapse(deep, "resnet18_2d", tmp_path / "back.weights.h5", channels=3)
    again = read_weights(back).layers["conv1"][0]
    np.testing.assert_allclose(
        again.sum(2), read_weights(flat.path).layers["conv1"][0].sum(2), rtol=1e-4, atol=1e-6
    )
    grey = change_channels(flat.path, tmp_path / "grey.weights.h5", 1)
    assert build_backbone("resnet18_2d", weights=grey, input_shape=(None, None, 1))
    with pytest.raises(DataError, match="channels 3 .file., 1 .network."):
        build_backbone("resnet18_2d", weights=flat.path, input_shape=(None, None, 1))
    with pytest.raises(DataError, match="was made for another network: .*strides"):
        build_backbone("resnet18_3d", weights=deep)
    with pytest.raises(UsageError, match="expected weights that are 2D and a preset that is 3D"):
        inflate(deep, "resnet18_3d", tmp_path / "x.weights.h5")
    with pytest.raises(
        DataError, match="does not fit resnet18_3d_medicalnet: shortcut B .file., A"
    ):
        inflate(flat.path, "resnet18_3d_medicalnet", tmp_path / "x.weights.h5")
    with pytest.raises(UsageError, match="method 'edge'"):
        inflate(flat.path, "resnet18_3d", tmp_path / "x.weights.h5", method="edge")
    with pytest.raises(UsageError, match="already exists"):
        collapse(deep, "resnet18_2d", back)
    assert not (tmp_path / "x.weights.h5").exists()


def test_a_state_dict_with_nan_is_refused_and_changes_nothing(narrow):
    spec = preset("resnet18_2d").with_any_size()
    model = resnet(spec)
    before = [np.array(w) for w in model.get_weights()]
    state = {n: t.numpy().copy() for n, t in random_network(spec).state_dict().items()}
    state["layer1.0.bn1.bias"][3] = np.nan
    with pytest.raises(DataError, match="layer1.0.bn1.bias hold values that are not finite"):
        load_state(model, state)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_head_is_kept_only_when_asked_and_of_six(narrow, tmp_path):
    torch.save(random_network(preset("resnet18_2d"), 6).state_dict(), tmp_path / "six.pth")
    without = convert(
        tmp_path / "six.pth", preset_name="resnet18_2d", out=tmp_path / "a.weights.h5"
    )
    assert without.dropped[-2:] == ("fc.weight", "fc.bias")
    kept = convert(
        tmp_path / "six.pth",
        preset_name="resnet18_2d",
        out=tmp_path / "b.weights.h5",
        keep_head=True,
    )
    assert "fc" in kept.parity.rows
    assert "fc" in read_weights(kept.path).layers
    torch.save(random_network(preset("resnet18_2d"), 400).state_dict(), tmp_path / "400.pth")
    with pytest.raises(DataError, match="has 400; expected one of 6 outputs"):
        convert(
            tmp_path / "400.pth",
            preset_name="resnet18_2d",
            out=tmp_path / "c.weights.h5",
            keep_head=True,
        )


def test_a_head_of_other_labels_is_kept_with_their_names(tmp_path):
    torch.save(random_network(preset("resnet18_2d"), 3).state_dict(), tmp_path / "three.pth")
    kept = convert(
        tmp_path / "three.pth",
        preset_name="resnet18_2d",
        out=tmp_path / "three.weights.h5",
        keep_head=True,
        labels=("normal", "bleed", "mass"),
    )
    assert kept.record["labels"] == ["normal", "bleed", "mass"]
    found = read_weights(kept.path)
    assert found.layers["fc"][0].shape == (512, 3)
    model = build_classifier(
        "resnet18_2d", str(kept.path), (32, 32, 3), labels=("normal", "bleed", "mass")
    )
    np.testing.assert_array_equal(np.array(model.get_layer("fc").kernel), found.layers["fc"][0])
    with pytest.raises(DataError, match="its head gives normal, bleed, mass; expected the order"):
        build_classifier(
            "resnet18_2d", str(kept.path), (32, 32, 3), labels=("bleed", "normal", "mass")
        )
    # For other labels, the head is new.
    fresh = build_classifier("resnet18_2d", str(kept.path), (32, 32, 3))
    assert fresh.output_shape == (None, 6)
    changed = change_channels(kept.path, tmp_path / "one.weights.h5", 1)
    assert read_weights(changed).record["labels"] == ["normal", "bleed", "mass"]
    with pytest.raises(UsageError, match="labels are those of a head that is kept"):
        convert(
            tmp_path / "three.pth",
            preset_name="resnet18_2d",
            out=tmp_path / "x.weights.h5",
            labels=("a", "b", "c"),
        )


class Response:
    """What urlopen returns, from bytes."""

    def __init__(self, content, url, length=None):
        self.content, self.url, self.position = content, url, 0
        self.headers = {"Content-Length": str(len(content) if length is None else length)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def geturl(self):
        return self.url

    def read(self, size):
        part = self.content[self.position : self.position + size]
        self.position += size
        return part


def serve(monkeypatch, content, url="https://example.org/file", length=None):
    asked = []

    def urlopen(request, timeout):
        asked.append(request.full_url)
        return Response(content, url, length)

    monkeypatch.setattr(fetching.urllib.request, "urlopen", urlopen)
    return asked


def test_what_is_downloaded_is_checked_against_what_was_published(tmp_path, monkeypatch):
    path, _ = published("torchvision_resnet18", tmp_path)
    serve(monkeypatch, path.read_bytes())
    with pytest.raises(DataError, match="was published with f37072fd"):
        fetching.fetch("torchvision_resnet18", tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_a_download_is_converted_once_and_then_found(tmp_path, monkeypatch, weights_folder):
    path, _ = published("medicalnet_resnet10_23datasets", tmp_path)
    asked, steps = serve(monkeypatch, path.read_bytes()), []
    found = fetching.ensure_weights(
        "medicalnet", "resnet10_3d_medicalnet", lambda *step: steps.append(step)
    )
    assert found == weights_folder / "medicalnet_resnet10_23datasets.weights.h5"
    assert asked == [SOURCES["medicalnet_resnet10_23datasets"].url]
    assert steps[-1] == ("downloading", path.stat().st_size, path.stat().st_size)
    assert fetching.ensure_weights("medicalnet", "resnet10_3d_medicalnet") == found
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("url", "length", "error", "message"),
    [
        ("http://example.org/file", None, DataError, "which is not https"),
        ("https://example.org/file", 10**6, EnvironmentProblem, "broke off after 5 of 1,000,000"),
    ],
)
def test_a_download_that_goes_wrong_leaves_nothing(
    url, length, error, message, tmp_path, monkeypatch
):
    serve(monkeypatch, b"12345", url, length)
    with pytest.raises(error, match=message):
        fetching.fetch("medicalnet_resnet10", tmp_path / "new")
    assert not list((tmp_path / "new").glob("*"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http.client.IncompleteRead(b"123", 9), "IncompleteRead"),
        (http.client.BadStatusLine("HELLO"), "HELLO"),
        (http.client.LineTooLong("header line"), "more than 65536 bytes"),
        (ssl.SSLError("record layer failure"), "record layer failure"),
        (TimeoutError(), "could not be downloaded: TimeoutError"),
        (ConnectionResetError(104, "reset by peer"), "reset by peer"),
    ],
)
def test_a_transfer_that_breaks_off_is_one_line(error, message, tmp_path, monkeypatch):
    class Broken(Response):
        def read(self, size):
            if self.position:
                raise error
            return super().read(size)

    monkeypatch.setattr(
        fetching.urllib.request,
        "urlopen",
        lambda request, timeout: Broken(b"12345", "https://example.org/file"),
    )
    with pytest.raises(EnvironmentProblem, match=f"{message}.*--checkpoint FILE"):
        fetching.fetch("medicalnet_resnet10", tmp_path / "new")
    assert not list((tmp_path / "new").glob("*"))


@pytest.mark.parametrize("length", ["", "-5", "many", "5, 5", "9" * 5000])
def test_a_length_that_is_no_number_is_not_used(length, tmp_path, monkeypatch):
    serve(monkeypatch, b"12345", length=length)
    steps = []
    path = fetching.fetch("medicalnet_resnet10", tmp_path, lambda *step: steps.append(step))
    assert path.read_bytes() == b"12345"
    assert steps == [("downloading", 5, 5)]


def test_sigterm_leaves_no_temporary_file(tmp_path):
    """`weights-convert` ends by an exception, so that atomic writing cleans up."""
    script = f"""
import os, signal, sys, time
from pathlib import Path
from ich_keras.files import atomic_path
from weights_convert import conversion, cli

def convert(*arguments):
    with atomic_path(Path({str(tmp_path / "a.weights.h5")!r})) as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)

conversion.convert = convert
cli.main(["convert", "--checkpoint", "a.pth", "--preset", "resnet18_2d", "--out", "b"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert done.returncode == EXIT_TERMINATED
    assert not list(tmp_path.iterdir())


def test_without_a_network_the_hint_is_the_local_file(tmp_path, monkeypatch):
    def urlopen(request, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(fetching.urllib.request, "urlopen", urlopen)
    with pytest.raises(EnvironmentProblem, match="no route to host.*--checkpoint FILE"):
        fetching.fetch("medicalnet_resnet10", tmp_path)


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_line_from_checkpoint_to_weights_and_back(narrow, tmp_path):
    torch.save(random_network(preset("resnet18_2d"), 1000).state_dict(), tmp_path / "a.pth")
    listed = run("list").output
    assert all(name in listed for name in SOURCES)
    assert "sha256    begins with f37072fd" in listed
    assert "sha256    none published" in listed
    told = run("inspect", "--checkpoint", tmp_path / "a.pth").output
    assert "zip format" in told
    assert "2D ResNet-18, shortcut B, 3 input channels, width 8, image names, head of 1000" in told
    assert "fits: resnet18_2d, resnet18_2d_stack\nmissing for that: nothing\n" in told
    assert "beside the backbone: fc.weight, fc.bias\n" in told
    assert "not weights: nothing; 20 batch counters" in told
    told = run("verify", "--preset", "resnet18_2d", "--checkpoint", tmp_path / "a.pth").output
    assert "The networks agree" in told
    made = run(
        "convert",
        "--preset",
        "resnet18_2d",
        "--checkpoint",
        tmp_path / "a.pth",
        "--channels",
        1,
        "--out",
        tmp_path / "a.weights.h5",
    )
    assert made.exit_code == 0, made.output
    assert "changed: input channels 3 -> 1" in made.output
    assert "left out: fc.weight, fc.bias\n" in made.output
    for arguments in (
        ("inflate", "--preset", "resnet18_3d", "--out", tmp_path / "b.weights.h5"),
        ("channels", "--channels", 3, "--out", tmp_path / "c.weights.h5"),
        ("export", "--out", tmp_path / "d.safetensors"),
    ):
        done = run(arguments[0], "--weights", tmp_path / "a.weights.h5", *arguments[1:])
        assert done.exit_code == 0, done.output
    done = run(
        "collapse",
        "--weights",
        tmp_path / "b.weights.h5",
        "--preset",
        "resnet18_2d",
        "--out",
        tmp_path / "e.weights.h5",
    )
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("convert", "--checkpoint", "none.pth"), 2, "expected either a source or a preset"),
        (("convert", "--checkpoint", "none.pth", "--source", "resnet"), 2, "no source is called"),
        (
            ("convert", "--checkpoint", "none.pth", "--source", "torchvision_resnet18"),
            2,
            "the checkpoint none.pth does not exist",
        ),
        (("convert", "--checkpoint", "none.pth", "--preset", "resnet18_2d"), 2, "out is missing"),
        (("inspect", "--checkpoint", "."), 2, "is a folder"),
        (("export", "--weights", "none.weights.h5", "--out", "a.pth"), 2, "does not exist"),
    ],
)
def test_bad_calls_are_one_line_and_an_exit_code(arguments, code, message):
    done = run(*arguments)
    assert done.exit_code == code
    assert message in done.output
    assert "Traceback" not in done.output


def test_verify_writes_nothing(narrow, tmp_path):
    save_file(dict(random_network(preset("r2plus1d_18")).state_dict()), tmp_path / "a.safetensors")
    parity = verify(tmp_path / "a.safetensors", preset_name="r2plus1d_18")
    assert parity.worst < 1e-5
    found = inspect(tmp_path / "a.safetensors")
    assert found.read.kind == "safetensors"
    assert found.structure["factorised"]
    assert found.presets == ("r2plus1d_18",)
    assert found.missing == found.surplus == ()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors"]


def test_a_converted_file_is_read_by_stock_keras_too(narrow, tmp_path):
    torch.save(random_network(preset("resnet18_2d")).state_dict(), tmp_path / "a.pth")
    made = convert(tmp_path / "a.pth", preset_name="resnet18_2d", out=tmp_path / "a.weights.h5")
    ours, theirs = (resnet(preset("resnet18_2d").with_any_size()) for _ in range(2))
    theirs.load_weights(made.path)
    from ich_keras.models.weights import load_weights

    load_weights(ours, made.path)
    for one, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    with h5py.File(made.path) as file:
        assert set(file.attrs) == {"ich_keras"}


def test_the_classifier_keeps_a_new_head(narrow, tmp_path):
    torch.save(random_network(preset("resnet18_2d"), 1000).state_dict(), tmp_path / "a.pth")
    made = convert(tmp_path / "a.pth", preset_name="resnet18_2d", out=tmp_path / "a.weights.h5")
    from ich_keras.models.weights import load_weights

    model = classifier(preset("resnet18_2d", (32, 32, 3)))
    head = model.get_layer("fc").get_weights()
    account = load_weights(model, made.path, preset("resnet18_2d", (32, 32, 3)))
    assert account.fresh == ("fc",)
    assert len(account.loaded) == 40
    np.testing.assert_array_equal(model.get_layer("fc").get_weights()[0], head[0])


@pytest.mark.parametrize("name", [None, *sorted(main.commands)])
def test_every_help_answers(name):
    done = run(*([name] if name else []), "--help")
    assert done.exit_code == 0
    assert "Usage:" in done.output
