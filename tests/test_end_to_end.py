"""Head and slice network trained together: gradients by chunks, what stays, what is kept."""

import json
from dataclasses import replace

import keras
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from narrow import SLICES, preset_of, train_slices

from ich_keras import end_to_end, files
from ich_keras.cli import train_main
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.context import Context
from ich_keras.context_fitting import ContextConfig
from ich_keras.context_training import train_context
from ich_keras.end_to_end import JointConfig, SeriesChunks
from ich_keras.errors import DataError, DivergedError, StaleError, UsageError
from ich_keras.evaluation import evaluate
from ich_keras.features import extract_features, tapped_logits
from ich_keras.inference import load_run, network_digest
from ich_keras.input_changes import InputChanges
from ich_keras.labels import SIX, LabelSet
from ich_keras.models import classifier as classifier_room
from ich_keras.models import resnet as resnet_room
from ich_keras.models import sequence as sequence_room
from ich_keras.models.spec import ModelSpec
from ich_keras.prediction import predict_folder
from ich_keras.run_folder import RunFolder
from ich_keras.training import train
from ich_keras.verification import verify

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="end to end runs on torch"
)

CONFIG = ContextConfig("conv", width=8, depth=1, epochs=1, batch_size=8, learning_rate=1e-3)
JOINT = JointConfig(epochs=2, batch_size=4, learning_rate=3e-3, backbone_factor=0.5, chunk=40)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("joint")


@pytest.fixture(scope="module")
def slice_run(work, phantom_cache):
    return train_slices(phantom_cache, work / "slices")


@pytest.fixture(scope="module")
def features(work, slice_run, phantom_cache):
    return extract_features(slice_run, phantom_cache, work / "features.h5")


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def run(work, features, phantom_cache, told):
    out = work / "run"
    return train_context(features, phantom_cache, out, CONFIG, tell=told.append, joint=JOINT)


def frozen_float64(monkeypatch, dropout=0.0):
    """A slice network with features and logits, and a head, both in float64."""
    for room in (classifier_room, resnet_room, sequence_room):
        monkeypatch.setattr(room, "DTYPE", "float64")
    monkeypatch.setattr(classifier_room, "PRECISIONS", {"float32": "float64"})
    keras.utils.set_random_seed(0)
    spec = replace(SLICES, dropout=dropout)
    model = classifier_room.classifier(spec, output="logits", precision="float32")
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
            rng = np.random.default_rng(0)
            layer.moving_mean.assign(rng.normal(0, 0.1, layer.moving_mean.shape))
            layer.moving_variance.assign(rng.uniform(0.5, 1.5, layer.moving_variance.shape))
    head = sequence_room.sequence_head(
        sequence_room.SequenceSpec("gru", 4 * 8, 8, 1, dropout=0.0), SIX, "logits"
    )
    for variable in head.trainable_variables:  # its last layers begin at zero
        variable.assign(np.random.default_rng(1).normal(0, 0.3, variable.shape))
    return tapped_logits(model), head


def test_gradients_by_chunks_are_those_of_one_whole_pass(monkeypatch):
    import torch

    from ich_keras.keras_private import tensor_of
    from ich_keras.models.torch.chunked import ChunkedNetwork, chunked_gradients, padded

    tap, head = frozen_float64(monkeypatch)
    rng = np.random.default_rng(2)
    lengths = [5, 9, 3]
    inputs = rng.normal(size=(sum(lengths), 32, 32, 3))
    mask = np.zeros((3, 16))
    places = np.zeros((3, 16))
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
        places[row, :length] = 5.0 * np.arange(length)
    truth = {
        "slices": rng.integers(0, 2, (3, 16, 6)).astype(float),
        "series": rng.integers(0, 2, (3, 6)).astype(float),
    }
    truth["slices"][mask == 0] = np.nan
    truth["slices"][1, 2] = np.nan

    def loss_of(logits, features):
        found = head(
            {
                "features": padded(features, mask),
                "logits": padded(logits, mask),
                "places_mm": torch.from_numpy(places),
                "mask": torch.from_numpy(mask),
            },
            training=True,
        )
        total = 0.0
        for name, values in truth.items():
            y = torch.from_numpy(values)
            known = ~torch.isnan(y)
            each = torch.nn.functional.binary_cross_entropy_with_logits(
                found[name][known], y[known], reduction="none"
            )
            total = total + each.mean()
        return total

    network = ChunkedNetwork(tap)
    chunks = [inputs[start : start + 4] for start in range(0, len(inputs), 4)]
    loss, found = chunked_gradients(network, head.trainable_variables, lambda: chunks, loss_of)

    weights = [tensor_of(v) for v in (*tap.trainable_variables, *head.trainable_variables)]
    # One whole pass, with one graph; and one of Keras' own layers, which round now and then.
    passes = [(network(inputs, 0), 1e-9), (tap(torch.from_numpy(inputs), training=False), 1e-5)]
    for answers, most in passes:
        assert {one.dtype for one in answers} == {torch.float64}
        whole = loss_of(*answers)
        expected = torch.autograd.grad(whole, weights)
        assert float(loss) == pytest.approx(float(whole.detach()), abs=most)
        assert len(found) == len(expected) > 10
        assert all(float(one.abs().max()) > 0 for one in found[: len(network.weights)])
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=most, atol=most)


def test_dropout_draws_the_same_in_both_passes(monkeypatch):
    from ich_keras.models.torch.chunked import ChunkedNetwork, chunked_gradients

    tap, _ = frozen_float64(monkeypatch, dropout=0.5)
    inputs = np.random.default_rng(3).normal(size=(6, 32, 32, 3))
    seen = []

    class Watched(ChunkedNetwork):
        def __call__(self, inputs, seed):
            found = super().__call__(inputs, seed)
            seen.append(found[0].detach())
            return found

    chunked_gradients(
        Watched(tap), [], lambda: [inputs[:4], inputs[4:]], lambda a, b: a.sum() + b.sum(), 7
    )
    first, second, again, then = seen
    assert (first == again).all() and (second == then).all()
    chunked_gradients(
        Watched(tap), [], lambda: [inputs[:4], inputs[4:]], lambda a, b: a.sum() + b.sum(), 8
    )
    assert not (first == seen[4]).all()


def weights_by_name(run):
    _, model = load_run(run)
    return model, {v.path: np.array(keras.ops.convert_to_numpy(v)) for v in model.weights}


def test_the_slice_network_moves_and_its_normalisation_stays(slice_run, run, told):
    record = json.loads((run / "context.json").read_text())
    of_both = record["end_to_end"]
    assert of_both["best_epoch"] >= 1, of_both
    assert [row["epoch"] for row in of_both["history"]] == [1, 2]
    best = min(row["valid_log_loss"] for row in of_both["history"])
    assert best < of_both["began_with_log_loss"]
    before, old = weights_by_name(slice_run)
    after, new = weights_by_name(run)
    assert of_both["began_with"] == network_digest(before)
    assert record["network"] == network_digest(after)
    normalisation = {
        f"{layer.name}/"
        for layer in before.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    }
    assert len(normalisation) > 5
    for name, values in old.items():
        is_frozen = name.startswith(tuple(normalisation))
        assert np.array_equal(values, new[name]) == is_frozen, name
    assert sum(line.startswith("both together, epoch") for line in told) == 2
    assert verify(run)


def test_its_predictions_are_those_of_evaluation(run, phantom_cache, phantom_folder, tmp_path):
    before = json.loads((run / "metrics-test.json").read_text())
    again = evaluate(run, phantom_cache, "test")
    assert again["slice"]["log_loss"] == pytest.approx(before["slice"]["log_loss"], rel=1e-6)
    table = pd.read_csv(run / "predictions-test.csv").set_index("sop_instance_uid")
    found = predict_folder(run, phantom_folder / "images", tmp_path / "out").slices
    found = found.set_index("sop_instance_uid").loc[table.index]
    raw = [f"raw_{name}" for name in SIX.names]
    np.testing.assert_allclose(found[raw].to_numpy(), table[list(SIX.names)], atol=1e-4)
    notice = (tmp_path / "out" / "notice.txt").read_text()
    assert "Head and slice network were trained together" in notice


def test_features_of_the_old_run_are_refused_and_new_ones_taken(
    run, features, phantom_cache, tmp_path
):
    with pytest.raises(StaleError, match="features of another network than that of"):
        train_context(features, phantom_cache, tmp_path / "out", CONFIG, run=run)
    new = extract_features(run, phantom_cache, tmp_path / "features.h5")
    assert new.record.network != features.record.network
    assert not np.allclose(new.features, features.features)


def head_weights(run):
    recipe, model = load_run(run)
    return Context.load(RunFolder(run), recipe.labels, model).head.get_weights()


# In the order in which they are passed: each try resumes, and gets as far as the next one.
PLACES = (
    "context epoch 1",
    "both epoch 1",
    "both epoch 2",
    "after best.weights.h5",
    "before context.json",
    "after choices.json",
    "before metrics-test.json",
    "before report.md",
    "before report.html",
)


@pytest.mark.parametrize(
    "places", [PLACES[1:2], pytest.param(PLACES, marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_a_training_that_is_killed_resumes_bit_equal(
    run, features, phantom_cache, tmp_path, monkeypatch, places
):
    out, lines = tmp_path / "again", []
    for place in places:

        def stop(name, place=place):
            if name == place:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(files, "fail_point", stop)
            with pytest.raises(KeyboardInterrupt):
                train_context(features, phantom_cache, out, CONFIG, tell=lines.append, joint=JOINT)
        assert not out.exists()
        if place == "both epoch 1":
            with pytest.raises(StaleError, match="was begun end to end"):
                train_context(features, phantom_cache, out, CONFIG)
            with pytest.raises(StaleError, match="is of a training with other settings"):
                train_context(features, phantom_cache, out, CONFIG, joint=replace(JOINT, chunk=7))
    train_context(features, phantom_cache, out, CONFIG, joint=JOINT)
    # No epoch was trained twice.
    assert sum(line.startswith("both together, epoch") for line in lines) <= JOINT.epochs
    records = [json.loads((folder / "context.json").read_text()) for folder in (run, out)]
    for record in records:  # HDF5 writes the same weights in other bytes
        del record["weights"]
    assert records[0] == records[1]
    for one, other in zip(*(head_weights(folder) for folder in (run, out)), strict=True):
        np.testing.assert_array_equal(one, other)
    tables = [(folder / "predictions-test.csv").read_bytes() for folder in (run, out)]
    assert tables[0] == tables[1]
    assert verify(out)
    assert not list(tmp_path.glob("again.*"))
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_slabs_are_trained_end_to_end_too(phantom_cache, tmp_path):
    flat = (1, 2, 2)
    spec = ModelSpec(
        (3, 32, 32, 1),
        depth=10,
        width=4,
        stem_stride=flat,
        pool_kernel=(1, 3, 3),
        pool_stride=flat,
        strides=(1, flat, flat, flat),
    )
    with preset_of("narrow_slab", spec):
        config = RunConfig(
            preset="narrow_slab",
            data=DataConfig(size=32, view="slab", slices=3, reverse=True),
            fit=FitConfig(batch_size=32, epochs=1, learning_rate=1e-3),
            precision="float32",
            device="cpu",
        )
        slabs = train(config, phantom_cache, tmp_path / "slabs")
        features = extract_features(slabs, phantom_cache, tmp_path / "features.h5")
        out = tmp_path / "out"
        train_context(features, phantom_cache, out, CONFIG, joint=replace(JOINT, epochs=1))
        assert evaluate(out, phantom_cache, "test")["slice"]["n"]["samples"] > 0


@pytest.mark.slow
def test_whole_series_have_no_features_to_begin_with(phantom_cache, tmp_path):
    with preset_of("narrow_3d", ModelSpec((16, 32, 32, 1), depth=10, width=4)):
        config = RunConfig(
            preset="narrow_3d",
            data=DataConfig(size=32, slices=16),
            fit=FitConfig(batch_size=4, epochs=1, accumulate=1),
            precision="float32",
            device="cpu",
        )
        whole = train(config, phantom_cache, tmp_path / "whole")
        with pytest.raises(UsageError, match="answers whole series; features are of slices"):
            extract_features(whole, phantom_cache, tmp_path / "features.h5")


def test_what_does_not_belong_together_is_refused(features, phantom_cache, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for changes, message in (
        ({"cache": "f" * 64}, "features of another cache"),
        ({"pixels": "f" * 64}, "features of other pixels"),
        ({"network": "f" * 64}, "features of another network than that of"),
    ):
        other = replace(features, record=replace(features.record, **changes))
        with pytest.raises(StaleError, match=message):
            train_context(other, phantom_cache, out, CONFIG, joint=JOINT)
    foreign = replace(features, record=replace(features.record, is_foreign=True))
    with pytest.raises(UsageError, match="a network of others"):
        train_context(foreign, phantom_cache, out, CONFIG, joint=JOINT)
    two = LabelSet(("bleed", "fracture"))
    with monkeypatch.context() as patch:
        patch.setattr(type(phantom_cache), "labels", property(lambda cache: two))
        with pytest.raises(DataError, match="has the labels bleed, fracture; the run was trained"):
            train_context(features, phantom_cache, out, CONFIG, joint=JOINT)
    assert not list(tmp_path.iterdir())


def test_all_slices_of_a_series_get_one_draw(slice_run, phantom_cache):
    recipe = RunFolder(slice_run).recipe()
    assert recipe.training.augment == "fast"
    chunks = SeriesChunks(recipe, phantom_cache, 1000, seed=5)
    uids = phantom_cache.series_uids[:2]
    first, second = (np.array(phantom_cache.series_rows(uid)) for uid in uids)
    rows = np.concatenate([first[:3], second[:1]])
    for epoch in range(4):
        one = next(chunks.of(epoch, rows)).copy()
        dataset = chunks._dataset
        draws = dataset._draw(epoch, rows, 64)
        assert (draws.contrast[:3] == draws.contrast[0]).all()
        assert (draws.matrices[:3] == draws.matrices[0]).all()
        assert (draws.flips[:3] == draws.flips[0]).all()
        apart = [next(chunks.of(epoch, rows[[n]])).copy() for n in range(4)]
        np.testing.assert_array_equal(one, np.concatenate(apart))
    draws = [dataset._draw(epoch, np.array([first[0], second[0]]), 64) for epoch in range(9)]
    assert any(one.contrast[0] != one.contrast[1] for one in draws)


def test_noise_is_each_slices_own(slice_run, phantom_cache):
    recipe = RunFolder(slice_run).recipe()
    changed = replace(
        recipe, training=replace(recipe.training, changes=InputChanges(hu_noise=20.0))
    )
    dataset = SeriesChunks(changed, phantom_cache, 1000, seed=5)._dataset
    rows = np.array(phantom_cache.series_rows(phantom_cache.series_uids[0]))[:4]
    noise = dataset._changed_hu(0, rows)[:, 0].astype(float) - phantom_cache.slices_hu(rows)
    assert noise.std() == pytest.approx(20, rel=0.02)
    shared = np.corrcoef(noise.reshape(4, -1))[np.triu_indices(4, 1)]
    assert np.abs(shared).max() < 0.1


def test_an_epoch_that_is_no_better_is_not_kept(slice_run, features, phantom_cache, tmp_path):
    lines = []
    joint = replace(JOINT, epochs=1, learning_rate=0.3, backbone_factor=1.0)
    out = tmp_path / "out"
    train_context(features, phantom_cache, out, CONFIG, tell=lines.append, joint=joint)
    record = json.loads((out / "context.json").read_text())
    assert record["end_to_end"]["best_epoch"] == 0
    assert any("the slice network stays as it was" in line for line in lines)
    assert record["network"] == features.record.network
    notice = (out / "report.md").read_text()
    assert "Head and slice network were trained together" not in notice


def test_a_training_that_diverges_is_told(features, phantom_cache, tmp_path):
    joint = replace(JOINT, epochs=1, learning_rate=1e30)
    with pytest.raises(DivergedError) as error:
        train_context(features, phantom_cache, tmp_path / "out", CONFIG, joint=joint)
    assert "--joint-rate" in error.value.hint
    assert not (tmp_path / "out").exists()


def test_the_command(features, phantom_cache_folder, tmp_path):
    out = tmp_path / "run"
    options = (
        *("--preset", "sequence_attention", "--features", features.path, "--epochs", 1),
        *("--cache", phantom_cache_folder, "--out", out, "--end-to-end", "--joint-epochs", 1),
        *("--joint-rate", 1e-3, "--backbone-factor", 0.2),
    )
    done = CliRunner().invoke(train_main, [str(option) for option in options])
    assert done.exit_code == 0, done.output
    assert "both together, epoch 1/1: training loss" in done.output
    config = json.loads((out / "context.json").read_text())["end_to_end"]["config"]
    assert config == vars(JointConfig(epochs=1, learning_rate=1e-3, backbone_factor=0.2))


@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
def test_other_backends_are_refused(features, phantom_cache, tmp_path, monkeypatch, backend):
    monkeypatch.setattr(end_to_end, "loaded_backend", lambda: backend)
    with pytest.raises(UsageError, match=f"needs the backend torch; Keras runs on {backend}"):
        train_context(features, phantom_cache, tmp_path / "out", CONFIG, joint=JOINT)


def test_an_augmentation_of_the_users_is_refused(slice_run):
    recipe = RunFolder(slice_run).recipe()
    own = replace(recipe, training=replace(recipe.training, own_augment="blur"))
    with pytest.raises(UsageError, match="a function of yours, blur"):
        end_to_end.require_trainable_together(own)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs is 0; expected a whole number 1 to 100000"),
        ({"chunk": 0}, "chunk is 0"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"backbone_factor": float("nan")}, "backbone_factor"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        JointConfig(**settings)
