"""Weights for other strides and dilations: what stays equal, what is recorded, what is refused."""

import gc
from dataclasses import replace

import keras
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ich_keras.errors import DataError, UsageError
from ich_keras.models.architectures import STAGE_BLOCKS
from ich_keras.models.classifier import build_backbone, build_classifier
from ich_keras.models.presets import PRESETS, preset, view_kind
from ich_keras.models.resnet import feature_model, resnet
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights import save_weights
from ich_keras.models.weights_file import read_record, read_weights
from ich_keras.models.weights_lookup import FOLDER_VARIABLE, converted_file, find_weights
from weights_convert import conversion
from weights_convert.cli import main
from weights_convert.conversion import verify_weights
from weights_convert.parity import difference
from weights_convert.reference import reference
from weights_convert.restriding import changes_between, restride
from weights_convert.selfcheck import randomise
from weights_convert.state import build, load_state

MEDICALNET = "resnet10_3d_medicalnet"  # shortcut B
ORIGIN = {
    "source": "medicalnet_resnet10",
    "licence": "MIT (MedicalNet)",
    "citation": "Chen et al.",
    "intensity": "head-z-score",
    "sha256": "0" * 64,
    "parity": {"stem": 0.5},
    "changes": [],
}
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")


@pytest.fixture(autouse=True)
def weights_folder(tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    yield folder
    keras.backend.clear_session()
    gc.collect()


@pytest.fixture
def narrow(monkeypatch):
    """Every 3D preset of depth 10 and 18, an eighth as wide, and compared at small sizes."""
    monkeypatch.setattr(conversion, "sizes_of", lambda _: ((6, 24, 23), (1, 17, 16)))
    for name, chosen in PRESETS.items():
        if chosen.spec.rank == 3 and chosen.spec.depth <= 18:
            monkeypatch.setitem(PRESETS, name, replace(chosen, spec=replace(chosen.spec, width=8)))


def random_state(spec: ModelSpec, outputs: int | None = None, seed: int = 0):
    module = reference(spec.with_any_size(), outputs)
    randomise(module, seed)
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def written(path, preset_name: str, outputs: int | None = None, **record):
    """Write a weights file with random numbers, as if a source had been converted."""
    spec = preset(preset_name).with_any_size()
    model = build(spec, outputs)
    load_state(model, random_state(spec, outputs))
    facts = {"preset": preset_name, "network": spec.to_dict(), **ORIGIN, **record}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(model, path, facts)
    return path


def features(spec: ModelSpec, state, volume: np.ndarray, names=STAGES) -> dict[str, np.ndarray]:
    model = resnet(spec.with_any_size())
    load_state(model, state)
    found = feature_model(model, names).predict_on_batch(volume)
    return {name: np.asarray(found[name]) for name in names}


def volumes(slices: int, channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, slices, 24, 25, channels), np.float32)


def is_equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        len(one[n]) == len(other[n]) and all(map(np.array_equal, one[n], other[n])) for n in one
    )


# --- Presets --------------------------------------------------------------------------------

VIDEO = ("r3d_18_slab", "mc3_18_slab", "r2plus1d_18_slab")
THIN = [f"resnet{depth}_3d_{n}" for depth in (10, 18, 34, 50) for n in ("thin", "thin_atrous")]


@pytest.mark.parametrize("name", [*VIDEO, *THIN])
def test_no_slice_is_thrown_away(name):
    spec = preset(name)
    assert view_kind(name, None) == "slab"
    assert {shape[0] for shape in spec.spatial_shapes().values()} == {5}
    assert spec.channels == (3 if name in VIDEO else 1)
    assert PRESETS[name].licence == ("BSD-3-Clause" if name in VIDEO else "MIT")
    assert preset(name, (1, 64, 64, spec.channels))  # a single slice will do


def test_thin_networks_are_medicalnets_within_slices():
    for depth in (10, 18, 34, 50):
        original = preset(f"resnet{depth}_3d_medicalnet")
        for name in ("thin", "thin_atrous"):
            thin = preset(f"resnet{depth}_3d_{name}")
            changed = set(original.differences(thin))
            wanted = {"stem_stride", "pool_stride", "strides"}
            assert changed == (wanted | {"dilations"} if name == "thin" else wanted)
            for field in ("strides", "dilations"):
                for a, b in zip(getattr(original, field), getattr(thin, field), strict=True):
                    assert original.per_axis(a)[1:] == thin.per_axis(b)[1:]
            in_plane = [shape[1:] for shape in thin.spatial_shapes().values()]
            assert in_plane == [shape[1:] for shape in original.spatial_shapes().values()]


def test_what_depth_dilations_leave_of_five_slices():
    """The numbers in the docstring of the thin presets."""

    def taps_on_slices(dilation: int) -> int:
        places = [i + side * dilation for i in range(5) for side in (-1, 1)]
        return sum(0 <= place < 5 for place in places)

    assert [taps_on_slices(dilation) for dilation in (1, 2, 4)] == [8, 6, 2]


def test_mc3_never_had_another_depth_stride():
    assert preset("mc3_18").differences(preset("mc3_18_slab")) == {}
    assert PRESETS["mc3_18_slab"].via == ""


# --- What is computed -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "equal", "other"),
    [
        ("r3d_18", {"strides": (1, (1, 2, 2), (1, 2, 2), (1, 2, 2))}, ("stem", "layer1"), "layer2"),
        pytest.param(
            "r2plus1d_18",
            {"strides": (1, 2, 2, (1, 2, 2))},
            ("stem", "layer2", "layer3"),
            "layer4",
            marks=pytest.mark.slow,
        ),
        (MEDICALNET, {"dilations": (1, 1, 2, (1, 4, 4))}, ("stem", "layer2", "layer3"), "layer4"),
        (MEDICALNET, {"pool_stride": (1, 2, 2)}, ("stem",), "layer1"),
    ],
)
def test_where_strides_agree_features_are_the_originals_bit_for_bit(
    narrow, name, settings, equal, other, tmp_path
):
    made = restride(
        written(tmp_path / "a.weights.h5", name), out=tmp_path / "b.weights.h5", **settings
    )
    spec, there = preset(name).with_any_size(), read_weights(made.path).spec
    assert there is not None
    volume = volumes(16, spec.channels)
    models = [resnet(spec), resnet(there)]
    for model, path in zip(models, (tmp_path / "a.weights.h5", made.path), strict=True):
        model.load_weights(path)
    expected, found = (
        {
            n: np.asarray(v)
            for n, v in feature_model(m, (*equal, other)).predict_on_batch(volume).items()
        }
        for m in models
    )
    for feature in equal:
        np.testing.assert_array_equal(found[feature], expected[feature])
    assert found[other].shape != expected[other].shape or not np.allclose(
        found[other], expected[other]
    )


@pytest.mark.parametrize("slices", [5, 8])
@pytest.mark.parametrize("name", ["thin", "thin_atrous"])
def test_the_strided_stem_is_every_second_slice_of_the_thin_one(narrow, name, slices):
    original, thin = preset(MEDICALNET), preset(f"resnet10_3d_{name}")
    state, volume = random_state(original), volumes(slices, 1)
    expected = features(original, state, volume, ("stem",))["stem"]
    found = features(thin, state, volume, ("stem",))["stem"]
    assert found.shape[1] == slices
    # At the ends, too: both pad three slices.
    assert difference(found[:, ::2], expected)[1] < 1e-6


@pytest.mark.parametrize("slices", [8, 9])
@pytest.mark.parametrize("name", ["r3d_18", "r2plus1d_18"])
def test_kernels_of_one_slice_answer_alike_at_any_stride(narrow, name, slices):
    """Where no kernel looks at other slices, a stride only leaves some out."""
    original, slab = preset(name), preset(f"{name}_slab")
    state = random_state(original)
    for tensor in state.values():
        if tensor.ndim == 5 and tensor.shape[2] == 3:
            tensor[:, :, [0, 2]] = 0
    volume = volumes(slices, 3)
    expected, found = (features(spec, state, volume) for spec in (original, slab))
    for stage, step in zip(STAGES, (1, 1, 2, 4, 8), strict=True):
        assert found[stage].shape[1] == slices
        assert difference(found[stage][:, ::step], expected[stage])[1] < 1e-5, stage


def _reach(spec: ModelSpec) -> int:
    """Slices to each side that a feature of the last stage depends on."""
    reach, step = spec.per_axis(spec.stem_kernel)[0] // 2, spec.per_axis(spec.stem_stride)[0]
    assert spec.pool_kernel is not None
    reach += step * (spec.per_axis(spec.pool_kernel)[0] // 2)
    step *= spec.per_axis(spec.pool_stride)[0]
    for stage, blocks in enumerate(STAGE_BLOCKS[spec.depth]):
        for number in range(2 * blocks):
            reach += step * spec.per_axis(spec.dilations[stage])[0]
            step *= spec.per_axis(spec.strides[stage])[0] if number == 0 else 1
    return reach


def test_a_volume_alike_in_all_slices_is_answered_alike_away_from_its_ends(narrow):
    """There neither strides nor dilations along the slices matter, in any stage."""
    specs = [preset(n) for n in (MEDICALNET, "resnet10_3d_thin", "resnet10_3d_thin_atrous")]
    assert [_reach(spec) for spec in specs] == [121, 12, 20]
    slices = 256  # a middle slice lies farther from both ends than any kernel reaches
    state = random_state(specs[0])
    volume = np.repeat(volumes(1, 1)[:, :, :16, :16], slices, axis=1)
    expected, *others = (features(spec, state, volume) for spec in specs)
    for found in others:
        for stage in STAGES:
            middle, there = (f[stage][:, f[stage].shape[1] // 2] for f in (found, expected))
            assert difference(middle, there)[1] < 1e-5, stage
    # Five slices are all ends.
    expected, *others = (features(spec, state, volume[:, :5]) for spec in specs)
    for found in others:
        assert difference(found["layer4"][:, 2], expected["layer4"][:, 0])[1] > 1e-2


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("r3d_18", {"strides": (1, 1, 2, 1), "dilations": (2, (2, 1, 1), 1, (1, 2, 4))}),
        # Split kernels stride within slices and dilate across them.
        (
            "r2plus1d_18",
            {"strides": (1, (1, 2, 2), 1, (2, 1, 1)), "dilations": (1, (2, 1, 1), 3, (1, 2, 2))},
        ),
        ("resnet18_3d", {"strides": (1, 1, 1, 2), "pool_stride": 1, "dilations": (1, 2, 4, 1)}),
    ],
)
def test_any_strides_and_dilations_equal_plain_torch(narrow, name, settings, tmp_path):
    made = restride(
        written(tmp_path / "a.weights.h5", name, outputs=6),
        out=tmp_path / "b.weights.h5",
        **settings,
    )
    assert made.parity.worst < 1e-5
    assert "fc" in made.parity.rows
    assert made.record["parity"] == made.parity.to_dict()
    assert verify_weights(made.path).worst < 1e-5


def test_a_network_that_computes_otherwise_is_not_written(narrow, tmp_path, monkeypatch):
    path = written(tmp_path / "a.weights.h5", MEDICALNET)
    true = preset(MEDICALNET).with_any_size()
    monkeypatch.setattr(conversion, "reference", lambda spec, outputs: reference(true, outputs))
    with pytest.raises(DataError, match="the networks disagree from layer4 on"):
        restride(path, out=tmp_path / "b.weights.h5", dilations=(1, 1, 2, 1))
    assert not (tmp_path / "b.weights.h5").exists()


# --- What is written ------------------------------------------------------------------------


def test_not_a_number_changes_and_the_record_says_what_did(narrow, tmp_path):
    path = written(tmp_path / "a.weights.h5", MEDICALNET, outputs=6)
    made = restride(path, "resnet10_3d_thin", tmp_path / "b.weights.h5")
    before, after = read_weights(path), read_weights(made.path)
    assert is_equal(before.layers, after.layers)
    assert before.digest == after.digest
    record = after.record
    assert record["changes"] == [
        "restrided stem stride 2x2x2 -> 1x2x2",
        "restrided pooling stride 2x2x2 -> 1x2x2",
        "restrided layer2 stride 2x2x2 -> 1x2x2",
        "restrided layer3 dilation 2x2x2 -> 1x2x2",
        "restrided layer4 dilation 4x4x4 -> 1x4x4",
    ]
    assert record["preset"] == "resnet10_3d_thin"
    assert after.spec is not None
    assert after.spec.differences(preset("resnet10_3d_thin")) == {}
    assert ModelSpec.from_dict(record["restrided_from"]) == before.spec
    for name in ("source", "licence", "citation", "intensity", "sha256", "labels"):
        assert record[name] == before.record[name]
    assert max(record["parity"].values()) < 1e-5  # not the original's, of another network
    model = build_classifier("resnet10_3d_thin", weights=made.path, input_shape=(5, 32, 32, 1))
    assert model.output_shape == (None, 6)
    with pytest.raises(DataError, match="was made for another network: .*strides") as caught:
        build_backbone("resnet10_3d_thin", weights=path)
    assert f"weights-convert restride --weights {path} --to PRESET" in caught.value.hint
    with pytest.raises(DataError, match="was made for another network: .*strides"):
        build_backbone(MEDICALNET, weights=made.path)


def test_there_and_back_is_the_original(narrow, tmp_path):
    path = written(tmp_path / "a.weights.h5", MEDICALNET)
    there = restride(path, "resnet10_3d_thin", tmp_path / "b.weights.h5")
    further = restride(there.path, "resnet10_3d_thin_atrous", tmp_path / "c.weights.h5")
    first = preset(MEDICALNET).with_any_size()
    assert ModelSpec.from_dict(further.record["restrided_from"]) == first
    assert len(further.record["changes"]) == 7
    back = restride(further.path, MEDICALNET, tmp_path / "d.weights.h5")
    assert "restrided_from" not in read_record(back.path)
    assert len(back.record["changes"]) == 10
    assert is_equal(read_weights(path).layers, read_weights(back.path).layers)
    volume = volumes(8, 1)
    outputs = [
        np.asarray(
            build_backbone(MEDICALNET, weights=file, input_shape=(8, 24, 25, 1)).predict_on_batch(
                volume
            )
        )
        for file in (path, back.path)
    ]
    np.testing.assert_array_equal(*outputs)


def test_channels_width_head_and_norm_are_the_files(narrow, tmp_path):
    path = tmp_path / "a.weights.h5"
    spec = replace(preset(MEDICALNET).with_any_size(), input_shape=(None, None, None, 3), width=16)
    spec = replace(spec, norm="frozen", dropout=0.1)
    model = build(spec, 6)
    save_weights(model, path, {"network": spec.to_dict(), "labels": list("abcdef")})
    made = restride(path, "resnet10_3d_thin_atrous", tmp_path / "b.weights.h5")
    after = read_weights(made.path).spec
    assert after is not None
    assert (after.channels, after.width, after.norm, after.dropout) == (3, 16, "frozen", 0.1)
    assert made.record["labels"] == list("abcdef")


def test_changes_are_named_by_layer():
    slab = preset("resnet18_3d_slab")
    assert changes_between(slab, replace(slab, input_shape=(9, 64, 64, 1))) == []
    assert changes_between(preset("resnet18_3d"), slab) == [
        "stem stride 2x2x2 -> 1x2x2",
        "pooling kernel 3x3x3 -> 1x3x3",
        "pooling stride 2x2x2 -> 1x2x2",
        *(f"layer{n} stride 2x2x2 -> 1x2x2" for n in (2, 3, 4)),
    ]


# --- What is refused ------------------------------------------------------------------------

MISFITS = {
    "depth": ("resnet18_3d", "resnet34_3d_slab", "depth 18 .file., 34 .preset.", "file's depth"),
    "shortcut": (
        "resnet18_3d_medicalnet",
        "resnet18_3d_slab",
        "shortcut A .file., B",
        "A has none",
    ),
    "kernels": ("r3d_18", "mc3_18", r"kernels \(\(3, 3, 3\), .* \(1, 3, 3\)\) .preset.", "r3d_18"),
    "factorised": ("r3d_18", "r2plus1d_18_slab", "factorised False .file., True", "R.2.1.D splits"),
    "naming": ("r3d_18", "resnet18_3d_slab", "naming video .file., image .preset.", "r3d_18_slab"),
    "rank": ("r3d_18", "resnet18_2d", "rank 3 .file., 2 .preset.", "weights-convert inflate"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_tensors_that_do_not_fit_are_refused_with_the_way_out(narrow, what, tmp_path):
    name, target, message, hint = MISFITS[what]
    path = written(tmp_path / "a.weights.h5", name)
    with pytest.raises(DataError, match=f"does not fit {target}: .*{message}") as caught:
        restride(path, target, tmp_path / "b.weights.h5")
    assert caught.match(hint)
    assert "`ich presets` lists" in caught.value.hint
    assert not (tmp_path / "b.weights.h5").exists()


BAD_CALLS = {
    "nothing": ({}, UsageError, "neither a preset nor strides or dilations; expected one"),
    "both": (
        {"preset_name": "resnet10_3d_thin", "pool_stride": 1},
        UsageError,
        "both a preset and",
    ),
    "same preset": ({"preset_name": MEDICALNET}, UsageError, "already: nothing to change"),
    "same strides": ({"strides": [1, [2, 2, 2], 1, 1]}, UsageError, "already: nothing to change"),
    "unknown": (
        {"preset_name": "resnet10_3d_thick"},
        UsageError,
        "no preset is called 'resnet10_3d",
    ),
    "three stages": ({"strides": (1, 2, 1)}, UsageError, "expected one entry for each of the 4"),
    "two axes": ({"stem_stride": (1, 2)}, UsageError, r"\(1, 2\) has 2 axes; the network has 3"),
    "zero": ({"dilations": (1, 1, 0, 1)}, UsageError, "dilations 0; expected at least 1"),
    "a half": ({"pool_stride": 0.5}, UsageError, "pool_stride: 0.5; expected a whole number"),
    "text": ({"strides": "1111"}, UsageError, "strides: '1111'; expected a whole number"),
    "no tuple": ({"strides": 1}, UsageError, "strides: 1; expected one entry for each stage"),
    "stride and dilation": (
        {"dilations": (1, (2, 1, 1), 2, 4)},
        UsageError,
        r"stage 2 has stride \(2, 2, 2\) and dilation \(2, 1, 1\); expected one of them to be 1",
    ),
    "a shortcut": (
        {"strides": (2, 2, 1, 1)},
        DataError,
        "layer1 stride 2x2x2 the first block needs weights of a shortcut",
    ),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_settings_are_named(narrow, what, tmp_path):
    settings, kind, message = BAD_CALLS[what]
    path = written(tmp_path / "a.weights.h5", MEDICALNET)
    with pytest.raises(kind, match=message):
        restride(path, out=tmp_path / "b.weights.h5", **settings)
    assert not (tmp_path / "b.weights.h5").exists()


def test_bad_files_are_named(narrow, tmp_path):
    out = tmp_path / "b.weights.h5"
    path = written(tmp_path / "a.weights.h5", MEDICALNET)
    with pytest.raises(UsageError, match="out is missing"):
        restride(path, pool_stride=1)
    with pytest.raises(UsageError, match="expected a file name ending in .weights.h5"):
        restride(path, "resnet10_3d_thin", tmp_path / "b.h5")
    with pytest.raises(UsageError, match="already exists"):
        restride(path, "resnet10_3d_thin", path)
    with pytest.raises(UsageError, match="does not exist"):
        restride(tmp_path / "none.weights.h5", "resnet10_3d_thin", out)
    damaged = written(tmp_path / "c.weights.h5", MEDICALNET, restrided_from=[1])
    with pytest.raises(DataError, match="restrided_from of its record is damaged"):
        restride(damaged, "resnet10_3d_thin", out)
    bare = tmp_path / "d.weights.h5"
    resnet(preset(MEDICALNET).with_any_size()).save_weights(bare)
    with pytest.raises(DataError, match="does not record which network"):
        restride(bare, "resnet10_3d_thin", out)
    grouped = replace(preset(MEDICALNET).with_any_size(), norm="group")
    save_weights(resnet(grouped), tmp_path / "e.weights.h5", {"network": grouped.to_dict()})
    with pytest.raises(DataError, match="norm 'group' has no counterpart in plain torch"):
        restride(tmp_path / "e.weights.h5", "resnet10_3d_thin", out)
    video = written(tmp_path / "f.weights.h5", "r3d_18")
    with pytest.raises(UsageError, match="pool_stride 1: the network of .* has no max pooling"):
        restride(video, out=out, pool_stride=1)
    assert not out.exists()


# --- Finding, and the command line ------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_restrided_weights_are_found_by_the_name_of_their_source(narrow, weights_folder):
    source = converted_file("medicalnet_resnet10")
    with pytest.raises(UsageError, match="with its strides changed on purpose") as caught:
        find_weights("medicalnet_resnet10", "resnet10_3d_thin")
    assert caught.value.hint.startswith("weights-convert convert --source medicalnet_resnet10")
    written(source, MEDICALNET)
    command = f"weights-convert restride --weights {source} --to resnet10_3d_thin"
    for name in ("medicalnet", "medicalnet_resnet10"):
        with pytest.raises(UsageError, match="with its strides changed") as caught:
            find_weights(name, "resnet10_3d_thin")
        assert caught.value.hint == f"{command}, then the same again."
    done = run(*command.split()[1:])
    assert done.exit_code == 0, done.output
    for name in ("medicalnet", "medicalnet_resnet10"):
        found = find_weights(name, "resnet10_3d_thin")
        assert found == weights_folder / "medicalnet_resnet10-resnet10_3d_thin.weights.h5"
        assert build_backbone("resnet10_3d_thin", weights=name, input_shape=(5, 32, 32, 1))
    with pytest.raises(UsageError, match="strides changed on purpose"):
        find_weights("medicalnet", "resnet10_3d_thin_atrous")
    with pytest.raises(UsageError, match=r"torchvision_mc3_18\.weights\.h5 does not exist"):
        find_weights("kinetics", "mc3_18_slab")  # as it is


def test_the_command_line(narrow, tmp_path):
    path = written(tmp_path / "a.weights.h5", MEDICALNET)
    done = run("restride", path, "--to", "resnet10_3d_thin")
    assert done.exit_code == 0, done.output
    beside = tmp_path / "a-resnet10_3d_thin.weights.h5"
    assert "changed: restrided stem stride 2x2x2 -> 1x2x2\n" in done.output
    assert "computes something else than the one of the file" in done.output
    assert f"Weights: {beside}" in done.output
    by_hand = tmp_path / "b.weights.h5"
    done = run(
        *("restride", "--weights", path, "--out", by_hand, "--stem-stride", "1x2x2"),
        *("--pool-stride", "1x2x2", "--strides", "1, 1x2x2,1,1", "--dilations", "1,1,1x2x2,1x4x4"),
    )
    assert done.exit_code == 0, done.output
    one, other = read_weights(beside), read_weights(by_hand)
    assert one.spec is not None and other.spec is not None
    assert one.spec.differences(other.spec) == {}
    assert one.digest == other.digest
    assert "preset" not in other.record
    done = run("verify", "--weights", beside)
    assert done.exit_code == 0, done.output
    assert "The networks agree" in done.output
    assert "Note: restrided." in done.output
    assert "Note: restrided." not in run("verify", "--weights", path).output
    done = run("export", "--weights", beside, "--out", tmp_path / "a.pth")
    assert done.exit_code == 0, done.output
    assert torch.load(tmp_path / "a.pth", weights_only=True)["conv1.weight"].shape[0] == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("a-resnet10_3d_thin.weights.h5", "a.pth", "a.weights.h5", "b.weights.h5"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("restride", "--to", "resnet10_3d_thin"), "0 weights files; expected one"),
        (("restride", "a.weights.h5", "--weights", "a.weights.h5"), "2 weights files"),
        (("restride", "a.weights.h5", "--to", "resnet10_3d_thin"), "does not exist"),
        (("restride", "a.weights.h5"), "neither a preset nor strides"),
        (("restride", "a.weights.h5", "--strides", "1,b,1,1"), "'b'; expected a number like 2"),
        (("restride", "a.weights.h5", "--stem-stride", "1x-2"), "'1x-2'; expected a number"),
        (("restride", "a.weights.h5", "--stem-stride", "9" * 40), "expected a number like 2"),
        (("restride", "a.weights.h5", "--dilations", ""), "''; expected a number like 2"),
        (("verify",), "the file is missing; expected --checkpoint or --weights"),
        (("verify", "--weights", "a.weights.h5", "--checkpoint", "a.pth"), "both --checkpoint and"),
        (("verify", "--weights", "a.weights.h5", "--preset", "r3d_18"), "Give --weights alone"),
        (("verify", "--weights", "a.weights.h5"), "does not exist"),
    ],
)
def test_bad_calls_are_one_line_and_an_exit_code(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert "Traceback" not in done.output
