"""Features of slices: those of the network, of the right slices, whatever interrupts them."""

import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from untrained_runs import untrained_run

from ich_keras import features as room
from ich_keras import slice_features
from ich_keras.cli import main
from ich_keras.data.batches import slab_batches, slice_batches
from ich_keras.errors import DataError, EnvironmentProblem, StaleError, UsageError
from ich_keras.features import ForeignNetwork, extract_features, extract_foreign_features
from ich_keras.inference import load_run
from ich_keras.labels import SIX, LabelSet
from ich_keras.models.spec import ModelSpec
from ich_keras.slice_features import FeatureRecord, SliceFeatures

SPEC = ModelSpec((32, 32, 3), depth=10, width=4)
SLAB = ModelSpec(
    (3, 32, 32, 1),
    depth=10,
    width=4,
    stem_stride=(1, 2, 2),
    pool_kernel=(1, 3, 3),
    pool_stride=(1, 2, 2),
    strides=(1, (1, 2, 2), (1, 2, 2), (1, 2, 2)),
)


@pytest.fixture(scope="module")
def cache(phantom_cache):
    return phantom_cache


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    return untrained_run(tmp_path_factory.mktemp("run") / "run", "narrow", SPEC, cache.size)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(slice_features, "BLOCK", 16)
    monkeypatch.setattr(room, "BLOCK", 16)


@pytest.fixture(scope="module")
def whole(run, cache, tmp_path_factory):
    return extract_features(run, cache, tmp_path_factory.mktemp("whole") / "features.h5")


def direct(run, batches):
    """Features and logits by Keras itself, a batch at a time."""
    import keras

    _, model = load_run(run)
    tap = keras.Model(
        model.input, [model.get_layer("avgpool").output, model.get_layer("fc").output]
    )
    parts = [tap(batch[0], training=False) for batch in batches]
    return [np.concatenate([keras.ops.convert_to_numpy(part[n]) for part in parts]) for n in (0, 1)]


def test_they_are_those_of_the_network(run, cache, whole):
    features, logits = direct(run, slice_batches(cache, np.arange(len(cache))))
    assert whole.features.dtype == whole.logits.dtype == np.float32
    assert len(whole) == len(cache) == len(features)
    np.testing.assert_allclose(whole.features, features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole.logits, logits, rtol=1e-4, atol=1e-5)
    assert str(whole).startswith(f"{len(cache)} slices with 32 features each (float32), of ")
    whole.require_cache(cache)
    assert whole.record.labels == SIX


def test_a_slabs_features_are_those_of_its_middle_slice(cache, tmp_path):
    run = untrained_run(tmp_path / "run", "narrow3", SLAB, cache.size, view="slab", slices=3)
    found = extract_features(run, cache, tmp_path / "f.h5")
    batches = slab_batches(cache, np.arange(len(cache)), num_slices=3)
    features, logits = direct(run, batches)
    np.testing.assert_allclose(found.features, features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-5)


def test_half_is_half_as_large_and_nearly_the_same(run, cache, whole, tmp_path):
    half = extract_features(run, cache, tmp_path / "half.h5", half=True)
    assert half.features.dtype == np.float16 and half.logits.dtype == np.float32
    np.testing.assert_array_equal(half.features, whole.features.astype(np.float16))
    np.testing.assert_array_equal(half.logits, whole.logits)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("stopped", [0, 2])
def test_an_interrupted_computation_resumes_with_the_same_bytes(
    run, cache, tmp_path, monkeypatch, stopped
):
    expected = extract_features(run, cache, tmp_path / "a.h5")
    out = tmp_path / "b.h5"

    def stop(name):
        if name == f"features {stopped}":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(room.files, "fail_point", stop)
        with pytest.raises(KeyboardInterrupt):
            extract_features(run, cache, out)
    assert not out.exists()
    with pytest.raises(UsageError, match="there is no file") as error:
        SliceFeatures.open(out)
    assert "is unfinished: run the same command again" in error.value.hint
    calls = []
    extract_features(run, cache, out, progress=lambda *step: calls.append(step))
    assert out.read_bytes() == expected.path.read_bytes()
    assert calls[-1] == ("computing features", len(cache), len(cache))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "b.h5"]


@pytest.mark.usefixtures("small_blocks")
def test_a_damaged_block_is_computed_again_on_resuming(run, cache, tmp_path, monkeypatch):
    expected, out = extract_features(run, cache, tmp_path / "a.h5"), tmp_path / "b.h5"
    partial = tmp_path / "b.h5.partial"
    shutil.copy(expected.path, partial)
    with h5py.File(partial, "r+") as file:
        file["features"][20] = 7
    computed = []
    answer = room.tapped_logits

    def counting(model):
        tap = answer(model)
        inner = tap.predict_on_batch
        tap.predict_on_batch = lambda batch: (computed.append(len(batch)), inner(batch))[1]
        return tap

    monkeypatch.setattr(room, "tapped_logits", counting)
    extract_features(run, cache, out)
    assert out.read_bytes() == expected.path.read_bytes()
    assert sum(computed) == 16


def test_another_network_does_not_go_on(run, cache, whole, tmp_path):
    out = tmp_path / "f.h5"
    shutil.copy(whole.path, tmp_path / "f.h5.partial")
    other = untrained_run(tmp_path / "other", "narrow", replace(SPEC, width=8), cache.size)
    for settings in ({"run": other}, {"run": run, "half": True}):
        with pytest.raises(StaleError, match="was begun with another network, cache or option"):
            extract_features(cache=cache, out=out, **settings)
    moved = shutil.copytree(run, tmp_path / "moved")
    extract_features(moved, cache, out)
    np.testing.assert_array_equal(SliceFeatures.open(out).features, whole.features)


def edited(path, tmp_path, change):
    copy = tmp_path / "edited.h5"
    shutil.copy(path, copy)
    with h5py.File(copy, "r+") as file:
        change(file)
    return copy


def test_damaged_and_foreign_files_are_refused(whole, tmp_path):
    def flip(file):
        file["logits"][3, 2] += 1

    with pytest.raises(StaleError, match="is damaged: 1 block of .* the first from slice 0 on"):
        SliceFeatures.open(edited(whole.path, tmp_path, flip))

    def lose(file):
        del file.attrs["record"]

    with pytest.raises(StaleError, match="is no file of slice features"):
        SliceFeatures.open(edited(whole.path, tmp_path, lose))

    def age(file):
        file.attrs["record"] = file.attrs["record"].replace('"schema": 1', '"schema": 9')

    with pytest.raises(StaleError, match="has version 9 of slice features; this one reads 1"):
        SliceFeatures.open(edited(whole.path, tmp_path, age))

    def narrow(file):
        file.attrs["record"] = file.attrs["record"].replace('"width": 32', '"width": 31')

    with pytest.raises(StaleError, match="datasets of other shapes"):
        SliceFeatures.open(edited(whole.path, tmp_path, narrow))

    def spoil(file):
        file["features"][:] = np.nan
        features, logits = file["features"][:], file["logits"][:]
        file["crc32"][:] = [
            slice_features.crc_of(features, logits, rows)
            for _, rows in slice_features.blocks(len(whole))
        ]

    with pytest.raises(DataError, match="rows of features or logits are not finite"):
        SliceFeatures.open(edited(whole.path, tmp_path, spoil))
    text = tmp_path / "text.h5"
    text.write_text("features")
    with pytest.raises(StaleError, match="is no file of slice features"):
        SliceFeatures.open(text)
    cut = tmp_path / "cut.h5"
    cut.write_bytes(whole.path.read_bytes()[:-5000])
    with pytest.raises(StaleError, match="cut short|is no file of slice features"):
        SliceFeatures.open(cut)


def test_another_cache_is_refused(whole, cache):
    for change, message in (
        ({"cache": "f" * 64}, "features of another cache than .*: fingerprint ffffffffffff, here"),
        ({"pixels": "f" * 64}, "features of other pixels than those of"),
    ):
        other = replace(whole, record=replace(whole.record, **change))
        with pytest.raises(StaleError, match=message):
            other.require_cache(cache)


def test_what_cannot_be_computed_is_refused(run, cache, whole, tmp_path):
    with pytest.raises(UsageError, match="exists"):
        extract_features(run, cache, whole.path)
    series = untrained_run(
        tmp_path / "s",
        "narrow3",
        replace(SLAB, input_shape=(4, 32, 32, 1)),
        cache.size,
        view="series",
        slices=4,
    )
    with pytest.raises(UsageError, match="answers whole series; features are of slices"):
        extract_features(series, cache, tmp_path / "f.h5")
    other = untrained_run(tmp_path / "o", "narrow", SPEC, 2 * cache.size)
    with pytest.raises(UsageError, match="the run was trained from"):
        extract_features(other, cache, tmp_path / "f.h5")
    assert not list(tmp_path.glob("f.h5*"))


class Means(torch.nn.Module):
    """Two features of a slice: the means of its first two windows."""

    def __init__(self, factor=1.0, shape="pooled"):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))
        self.shape = shape

    def forward(self, images):
        assert not self.training
        maps = self.factor * images[:, :2]
        if self.shape == "maps":
            return maps
        return maps.mean((2, 3)) if self.shape == "pooled" else maps.mean()


@pytest.mark.parametrize("shape", ["pooled", "maps"])
def test_a_network_of_others(cache, tmp_path, shape):
    network = ForeignNetwork(Means(shape=shape), "means", size=32, batch_size=7)
    found = extract_foreign_features(network, cache, tmp_path / "f.h5", LabelSet(("a", "b")))
    batches = slice_batches(cache, np.arange(len(cache)), size=32)
    expected = np.concatenate([batch[0].numpy()[..., :2].mean((1, 2)) for batch in batches])
    np.testing.assert_allclose(found.features, expected, rtol=1e-4, atol=1e-5)
    assert found.logits.shape == (len(cache), 2) and not found.logits.any()
    assert found.record.is_foreign and found.record.source == "means"
    assert network.module.training


def test_networks_of_others_that_give_no_features(cache, tmp_path):
    network = ForeignNetwork(Means(shape="none"), "means", size=32)
    with pytest.raises(UsageError, match=r"means gave \(\) for .* slices; expected a tensor"):
        extract_foreign_features(network, cache, tmp_path / "f.h5")
    network = ForeignNetwork(Means(float("nan")), "means", size=32)
    with pytest.raises(DataError, match="slices 0 to .*: .* rows of features or logits"):
        extract_foreign_features(network, cache, tmp_path / "g.h5")
    network = ForeignNetwork(Means(1e6), "means", size=32)
    with pytest.raises(DataError, match="too large for float16") as error:
        extract_foreign_features(network, cache, tmp_path / "h.h5", half=True)
    assert error.value.hint == "Leave --half out."
    assert (
        ForeignNetwork(Means(1.0), "a", 32).digest() != ForeignNetwork(Means(2.0), "a", 32).digest()
    )


def test_a_full_disk_is_told(run, cache, tmp_path, monkeypatch):
    monkeypatch.setattr("ich_keras.disk.free_bytes", lambda folder: 10)
    with pytest.raises(EnvironmentProblem):
        extract_features(run, cache, tmp_path / "f.h5")


def test_the_command(run, phantom_cache_folder, whole, tmp_path):
    out = tmp_path / "f.h5"
    options = ["--run", str(run), "--cache", str(phantom_cache_folder), "--out", str(out)]
    done = CliRunner().invoke(main, ["features", *options])
    assert done.exit_code == 0, done.output
    assert f"{len(whole)} slices with 32 features each (float32)" in done.output
    assert out.read_bytes() == whole.path.read_bytes()
    done = CliRunner().invoke(main, ["features", *options])
    assert done.exit_code == 2 and "exists" in done.output


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = FeatureRecord(
        "a" * 64, "run", "b" * 64, None, LabelSet(("x", "y"), "y"), 3, 4, "float16", True
    )
    assert FeatureRecord.from_json(record.to_json(), tmp_path) == record
