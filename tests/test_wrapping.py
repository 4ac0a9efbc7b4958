"""Where in a checkpoint a network lies: prefixes, keys, numbered children, several networks."""

import re
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner

from ich_keras.errors import DataError, IchError, UsageError
from ich_keras.models.presets import PRESETS, Preset, preset
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights_file import read_weights
from weights_convert.checkpoint import read_checkpoint
from weights_convert.cli import main
from weights_convert.conversion import convert, inspect, verify
from weights_convert.reference import reference
from weights_convert.selfcheck import randomise
from weights_convert.wrapping import MAX_ENTRIES, MAX_NETWORKS, shown_place


def network(name="resnet18_2d", outputs=14, seed=0):
    """The state dict of a preset an eighth as wide, with random weights."""
    spec = PRESETS[name].spec.with_any_size()
    module = reference(replace(spec, width=8), outputs)
    randomise(module, seed)
    return module.state_dict()


@pytest.fixture(scope="module", autouse=True)
def narrow():
    before = dict(PRESETS)
    for name in ("resnet18_2d", "resnet50_2d", "resnet18_3d_medicalnet", "r2plus1d_18", "r3d_18"):
        PRESETS[name] = Preset(replace(before[name].spec, width=8), "narrow")
    yield
    PRESETS.update(before)


def named(prefix, state):
    return OrderedDict((f"{prefix}{name}", tensor) for name, tensor in state.items())


def numbered(state, video=False):
    """The names of `nn.Sequential(*network.children())`, without the head."""
    image = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    parts = ("stem", *image[4:]) if video else image
    numbers = {part: str(number) for number, part in enumerate(parts)}
    return OrderedDict(
        (f"{numbers[part]}.{rest}", tensor)
        for name, tensor in state.items()
        for part, _, rest in [name.partition(".")]
        if part in numbers
    )


PREFIXES = (
    "module.",
    "model.",
    "_orig_mod.",
    "encoder.",
    "backbone.",
    "net.",
    "features.",
    "module._orig_mod.model.encoder.",
    "backbone.body.",
    "online_network.0.",
    "model-1 (copy).",
    "layer1.",  # a name of torch's own
)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_network_is_found_under_any_prefix(prefix, kind, tmp_path):
    state, path = network(), tmp_path / "a.pth"
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file(dict(named(prefix, state)), path)
    else:
        torch.save(named(prefix, state), path, _use_new_zipfile_serialization=kind == "zip")
    read = read_checkpoint(path)
    floats = {name: t for name, t in state.items() if t.dtype == torch.float32}
    assert read.tensors.keys() == floats.keys()
    for name, tensor in floats.items():
        np.testing.assert_array_equal(read.tensors[name], tensor.numpy())
    assert read.prefix == shown_place(prefix)
    assert inspect(path).presets == ("resnet18_2d",)


CONTENTS = {
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {0: {}}}},
    "any key": lambda s: {"my weights": s, "acc": 91.0, "names": ["a", "b"]},
    "ema": lambda s: {"model_ema": s},
    "lightning": lambda s: {
        "pytorch-lightning_version": "2.1",
        "state_dict": named("model.backbone.", s) | {"loss.weight": torch.ones(6)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
        "hyper_parameters": {"lr": 1e-3},
    },
    "two keys": lambda s: {"checkpoint": {"model": named("module.", s)}, "epoch": torch.tensor(3)},
    "another head": lambda s: named("backbone.", s) | {"head.0.weight": torch.ones(4, 8)},
    "a decoder": lambda s: named("encoder.", s) | {"decoder.conv1.weight": torch.ones(4, 8, 3, 3)},
    "ddp in compile": lambda s: {"net": named("_orig_mod.module.", s)},
    "the optimiser's own model key": lambda s: {"model": s, "optimizer": {"model": {"a": 1}}},
    "numbers beside the weights": lambda s: s | {"epoch": 3, "name": "mine", "best": None},
    "the same twice": lambda s: {"state_dict": s, "model": s},
    "one module under two names": lambda s: named("model.", s) | named("encoder.", s),
    "half a network beside it": lambda s: (
        named("student.", s)
        | {f"teacher.{n}": t for n, t in s.items() if not n.startswith("layer4")}
    ),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_a_network_is_found_under_keys_and_beside_other_things(content, tmp_path):
    state, path = network(), tmp_path / "a.pth"
    torch.save(CONTENTS[content](state), path)
    read = read_checkpoint(path)
    for name, tensor in state.items():
        if tensor.dtype == torch.float32:
            np.testing.assert_array_equal(read.tensors[name], tensor.numpy())
    assert inspect(path).missing == ()
    assert all(text.isprintable() for text in read.ignored)


def test_what_lies_beside_the_network_is_named(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(CONTENTS["lightning"](network()), path)
    ignored = [n for n in read_checkpoint(path).ignored if "num_batches" not in n]
    assert ignored == [
        "pytorch-lightning_version",
        "optimizer_states",
        "state_dict.loss.weight",
        "hyper_parameters",
    ]
    torch.save(CONTENTS["another head"](network()), path)
    read = read_checkpoint(path)
    assert (read.prefix, read.ignored[0]) == ("backbone", "head")


@pytest.mark.parametrize("prefix", ["", "backbone.", "model.features."])
@pytest.mark.parametrize("name", ["resnet18_2d", "resnet50_2d", "resnet18_3d_medicalnet", "r3d_18"])
def test_a_network_whose_children_are_numbered(name, prefix, tmp_path):
    state, path = network(name), tmp_path / "a.pth"
    torch.save(named(prefix, numbered(state, video=name == "r3d_18")), path)
    read = read_checkpoint(path)
    expected = {n: t for n, t in state.items() if t.dtype == torch.float32 and n[:3] != "fc."}
    assert read.tensors.keys() == expected.keys()
    for tensor_name, tensor in expected.items():
        np.testing.assert_array_equal(read.tensors[tensor_name], tensor.numpy())
    assert name in inspect(path).presets


def test_torchvision_numbers_its_children_so():
    module = torchvision.models.resnet18()
    taken_apart = torch.nn.Sequential(*list(module.children())[:-1])
    assert list(numbered(module.state_dict())) == list(taken_apart.state_dict())


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.features."])
def test_a_densenet_under_its_old_names_too(prefix, tmp_path, monkeypatch):
    spec = ModelSpec((32, 32, 3), 21, width=8, architecture="densenet")
    monkeypatch.setitem(PRESETS, "densenet121_2d", Preset(spec, "short"))
    state = network("densenet121_2d")
    old = {re.sub(r"(layer\d\.(?:norm|conv))([12])", r"\1.\2", n): t for n, t in state.items()}
    assert len(old.keys() - state.keys()) == 8 * 12
    for number, written in enumerate((state, old)):
        torch.save(named(prefix, written), tmp_path / "a.pth")
        read = read_checkpoint(tmp_path / "a.pth")
        assert read.prefix == prefix.removesuffix(".") and set(read.tensors) >= {
            name for name in state if "num_batches" not in name
        }
        out = tmp_path / f"{number}.weights.h5"
        convert(tmp_path / "a.pth", preset_name="densenet121_2d", out=out)
    both = state | {n: t for n, t in old.items() if n.endswith("denselayer1.norm.1.bias")}
    torch.save(both, tmp_path / "a.pth")
    with pytest.raises(DataError, match="two entries for one tensor"):
        read_checkpoint(tmp_path / "a.pth")
    torch.save(without(state, "features.conv0"), tmp_path / "a.pth")
    with pytest.raises(DataError, match="holds no") as caught:
        inspect(tmp_path / "a.pth")
    assert "features.conv0" in f"{caught.value}{caught.value.hint}"
    less = without(state, "features.denseblock4.denselayer2")
    torch.save(less, tmp_path / "a.pth")
    with pytest.raises(DataError, match=r"\(2, 2, 2, 1\) layers per stage; known depths: 21"):
        inspect(tmp_path / "a.pth")


def test_views_of_one_storage_are_converted(tmp_path):
    state, flat, views, at = network(), [], OrderedDict(), 0
    flat = torch.cat([tensor.reshape(-1).float() for tensor in state.values()])
    for name, tensor in state.items():
        views[name] = flat[at : at + tensor.numel()].view(tensor.shape)
        at += tensor.numel()
    for name, content in (("plain", state), ("views", views)):
        torch.save(content, tmp_path / f"{name}.pth")
        convert(
            tmp_path / f"{name}.pth",
            preset_name="resnet18_2d",
            out=tmp_path / f"{name}.weights.h5",
        )
    plain, seen = (read_weights(tmp_path / f"{n}.weights.h5").layers for n in ("plain", "views"))
    for layer, arrays in plain.items():
        for one, other in zip(arrays, seen[layer], strict=True):
            np.testing.assert_array_equal(one, other)


def two(path):
    student, teacher = network(seed=1), network(seed=2)
    content = {"state_dict": named("student.", student) | named("teacher.", teacher)}
    torch.save(content, path)
    return student, teacher


@pytest.mark.parametrize(
    ("content", "candidates"),
    [
        (lambda a, b: named("student.", a) | named("teacher.", b), "student, teacher"),
        (lambda a, b: {"model": a, "model_ema": named("module.", b)}, "model, model_ema.module"),
        (lambda a, b: a | named("encoder_k.", b), "'', encoder_k"),
        (lambda a, b: {"state_dict": named("m.", a), "ema": named("m.", b)}, "state_dict.m, ema.m"),
    ],
)
def test_several_networks_are_refused_with_their_names(content, candidates, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(content(network(seed=1), network(seed=2)), path)
    with pytest.raises(DataError) as caught:
        read_checkpoint(path)
    assert f"holds 2 networks: {candidates}." in caught.value.message
    assert caught.value.hint == "Choose one with --prefix NAME (in Python: prefix=NAME)."


def test_the_prefix_chooses_one_of_several(tmp_path):
    path = tmp_path / "a.pth"
    student, teacher = two(path)
    for prefix, state in (
        ("state_dict.student", student),
        ("state_dict.teacher.", teacher),
        ("teacher", teacher),  # the end is enough
    ):
        read = read_checkpoint(path, prefix)
        np.testing.assert_array_equal(read.tensors["conv1.weight"], state["conv1.weight"].numpy())
        other = {"student", "teacher"} - {prefix.rstrip(".").rpartition(".")[2]}
        assert f"state_dict.{other.pop()}.conv1.weight" in read.ignored
    made = convert(path, preset_name="resnet18_2d", out=tmp_path / "a.weights.h5", prefix="teacher")
    assert made.record["prefix"] == "state_dict.teacher"
    kernel = read_weights(made.path).layers["conv1"][0]
    np.testing.assert_array_equal(np.moveaxis(kernel, (3, 2), (0, 1)), teacher["conv1.weight"])
    assert verify(path, preset_name="resnet18_2d", prefix="student").worst < 1e-5
    for wrong in ("model", "stud", "", "state_dict"):
        with pytest.raises(
            UsageError, match="holds no networks there; its networks: state_dict.st"
        ):
            read_checkpoint(path, wrong)


def test_the_prefix_is_an_option_of_every_command_that_reads_a_checkpoint(tmp_path):
    path = tmp_path / "a.pth"
    two(path)
    fixed = ("--checkpoint", str(path))
    network_of = ("--preset", "resnet18_2d")
    for words in (
        ("inspect", *fixed),
        ("verify", *fixed, *network_of),
        ("convert", *fixed, *network_of, "--out", str(tmp_path / "a.weights.h5")),
    ):
        refused = CliRunner().invoke(main, words)
        assert refused.exit_code == 3
        assert "holds 2 networks: state_dict.student, state_dict.teacher." in refused.output
        assert "--prefix NAME" in refused.output
        done = CliRunner().invoke(main, [*words, "--prefix", "student"])
        assert done.exit_code == 0, done.output
    told = CliRunner().invoke(main, ["inspect", *fixed, "--prefix", "student"]).output
    assert "the network lies under state_dict.student\n" in told


def without(state, *beginnings):
    return {name: t for name, t in state.items() if not name.startswith(beginnings)}


NO_RESNETS = {
    "a plain network": lambda: {"conv1.weight": torch.zeros(4, 3, 3, 3)},
    "another one under a key": lambda: {"net": {"conv1.weight": torch.zeros(4, 3, 3, 3)}},
    "a transformer": lambda: {"model": {"blocks.0.attn.qkv.weight": torch.zeros(6, 2)}},
    "a vgg": lambda: {"features.0.weight": torch.zeros(4, 3, 3, 3)},
    "an optimiser": lambda: {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []},
    "numbers": lambda: {"epoch": 3, "loss": 0.5},
    "no stem": lambda: without(network(), "conv1"),
}


@pytest.mark.parametrize("name", NO_RESNETS)
def test_a_file_without_a_resnet_is_told_so(name, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(NO_RESNETS[name](), path)
    for call in (
        lambda: inspect(path),
        lambda: convert(path, preset_name="resnet18_2d", out=tmp_path / "a.weights.h5"),
    ):
        with pytest.raises(DataError, match="holds no ResNet") as caught:
            call()
        assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda s: without(s, "layer4"), r"\(2, 2, 2, 0\) basic blocks per stage"),
        (lambda s: without(s, "layer1.0.conv2.weight"), "layer1.0.conv2.weight is absent"),
        (lambda s: s | {"layer1.0.conv2.weight": torch.ones(3)}, "conv2.weight is not a kernel"),
        (lambda s: s | {"fc.weight": torch.tensor(1.0)}, None),
        (lambda s: s | {"layer1.0.conv1.weight": torch.ones(3)}, "conv1.weight is not a kernel"),
        (lambda s: without(s, "layer2.0.bn1.running"), "missing layer2.0.bn1.running_mean"),
        (lambda s: s | {"projector.weight": torch.ones(3)}, "surplus projector.weight"),
        (lambda s: s | {"layer1.0.\x1b[2J": torch.ones(3)}, r"'layer1\.0\.\\x1b\[2J' is not the"),
        (lambda s: named("m.", s | {"0.weight": torch.ones(3)}), "surplus 0.weight"),
    ],
)
def test_what_is_incomplete_or_surplus_is_named_with_a_way_out(content, message, tmp_path):
    path, out = tmp_path / "a.pth", tmp_path / "a.weights.h5"
    torch.save(content(network()), path)
    if message is None:
        convert(path, preset_name="resnet18_2d", out=out)
        return
    with pytest.raises(IchError, match=message) as caught:
        convert(path, preset_name="resnet18_2d", out=out)
    assert caught.value.hint
    assert str(caught.value).isprintable()
    assert not out.exists()


def test_the_numbered_factorised_network_too(tmp_path):
    state, path = network("r2plus1d_18"), tmp_path / "a.pth"
    torch.save(named("backbone.", numbered(state, video=True)), path)
    assert inspect(path).presets == ("r2plus1d_18",)
    for absent in ("stem.3.weight", "layer1.0.conv1.0.3.weight", "layer1.0.conv2.0.3.weight"):
        torch.save(without(state, absent), path)
        with pytest.raises(DataError, match=f"the tensor {absent} is absent") as caught:
            inspect(path)
        assert caught.value.hint


def test_limits(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"state_dict": {f"a{n}": 0 for n in range(MAX_ENTRIES + 1)}}, path)
    with pytest.raises(DataError, match="holds more than 10,000 entries"):
        read_checkpoint(path)
    kernel = torch.ones(1, 1, 1, 1)
    many = {
        f"n{n}.{name}": kernel
        for n in range(MAX_NETWORKS + 1)
        for name in ("conv1.weight", "layer1.0.conv1.weight")
    }
    torch.save(many, path)
    with pytest.raises(DataError, match="holds 33 networks; expected at most 32"):
        read_checkpoint(path)
    endless = {"conv1.weight": kernel}
    endless["self"] = endless
    torch.save(endless, path)
    with pytest.raises(DataError, match="no ResNet"):
        inspect(path)
    torch.save({"a.b": {"c": kernel}, "a": {"b.c": kernel}}, path)
    with pytest.raises(DataError, match="holds two entries called a.b.c"):
        read_checkpoint(path)
    torch.save(numbered(network()) | {"conv1.weight": kernel}, path)
    with pytest.raises(DataError, match="two entries for one tensor"):
        read_checkpoint(path)


def test_a_bomb_beside_a_network_stays_where_it_is(tmp_path):
    """What is not read is not unpacked; what is read may not claim more than the file holds."""
    state, path = network(), tmp_path / "a.pth"
    bomb = torch.ones(1).expand(10**9)
    torch.save({"model": state, "ema": {"a": bomb}}, path)
    assert "ema" in read_checkpoint(path).ignored
    for name in ("layer1.0.conv1.weight", "extra.weight"):
        torch.save({"model": state | {name: torch.ones(1).expand(10**5, 10, 10, 10)}}, path)
        with pytest.raises(DataError, match="claims 400,000,000 bytes and its storage holds 4"):
            read_checkpoint(path)


def test_the_published_names_stay_as_they_are(tmp_path):
    state = network("resnet18_3d_medicalnet", None)
    content = {"state_dict": named("module.", state | {"conv_seg.0.bias": torch.zeros(3)})}
    torch.save(content, tmp_path / "a.pth")
    made = convert(
        tmp_path / "a.pth", preset_name="resnet18_3d_medicalnet", out=tmp_path / "a.weights.h5"
    )
    assert "conv_seg.0.bias" in made.dropped
    assert preset("resnet18_3d_medicalnet").width == 8
