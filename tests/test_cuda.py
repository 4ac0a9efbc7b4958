"""The torch backend on a GPU against the processor: `ICH_TEST_DEVICE=cuda pytest`.

All other tests run on the processor, also where there is a GPU; where this one asks for it, they
are left out.
"""

import json
import warnings
from dataclasses import replace

import keras
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import DEVICE
from test_networks import random_batch
from test_torch_step import NETWORKS, assert_close, build
from test_training import (  # noqa: F401
    NARROW,
    Crash,
    arrays_of,
    config_of,
    crash_after,
    narrow_preset,
)

from ich_keras import checkpoints, training
from ich_keras.data.batches import slab_batches
from ich_keras.keras_private import keep_float64
from ich_keras.labels import LABELS
from ich_keras.models.classifier import classifier, compile_classifier
from ich_keras.models.presets import PRESETS
from ich_keras.models.steps import choose_step
from ich_keras.models.torch.function import FlatFunction
from ich_keras.models.torch.step import ATTRIBUTE, accelerated
from ich_keras.prediction import predict_folder
from ich_keras.training import train

pytestmark = [
    pytest.mark.skipif(
        keras.backend.backend() != "torch" or DEVICE != "cuda",
        reason="needs a GPU: ICH_TEST_DEVICE=cuda pytest tests/test_cuda.py",
    ),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]


@pytest.fixture(autouse=True)
def no_tf32():
    """TensorFloat-32 keeps ten bits: products of float32 would differ in the third digit."""
    places = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    yield
    for place, value in zip(places, before, strict=True):
        place.allow_tf32 = value
    torch._dynamo.reset()


@pytest.fixture
def float64():
    with keep_float64():
        yield


def twins(spec):
    """The same network in float64 on the processor and on the GPU, and images on the processor."""
    with keras.device("cpu"):
        reference = build(spec)
    model = build(spec)
    model.set_weights(reference.get_weights())
    images = torch.from_numpy(random_batch(reference, 4)[0])
    assert {v.value.device.type for v in reference.variables} == {"cpu"}
    assert {v.value.device.type for v in model.variables} == {DEVICE}
    return reference, model, images


def gradients(model) -> dict[str, np.ndarray]:
    return {v.path: v.value.grad.cpu().numpy() for v in model.trainable_variables}


@pytest.mark.parametrize("name", NETWORKS)
def test_predictions_equal_those_of_the_processor(name, float64):
    reference, model, images = twins(NETWORKS[name])
    with keras.device("cpu"), torch.no_grad():
        expected = reference(images, training=False).numpy()
    choose_step(model)
    assert accelerated(model) is not None
    found = model.predict(images.numpy(), batch_size=3, verbose=0)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_equal_those_of_the_processor(name, float64):
    reference, model, images = twins(NETWORKS[name])
    direction = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6)
    with keras.device("cpu"):
        expected = reference(images, training=True)
        (expected * direction).sum().backward()
    function = FlatFunction(model, training=True)
    found = function(images.to(DEVICE), function.tensors())[0]
    (found * direction.to(DEVICE)).sum().backward()
    np.testing.assert_allclose(found.detach().cpu(), expected.detach(), rtol=1e-8)
    assert_close(gradients(reference), gradients(model), 1e-7)


@pytest.mark.parametrize("name", ["2d", "medicalnet", "strided"])
def test_compiled_steps_train_as_the_processor_does(name):
    spec = replace(NETWORKS[name], dropout=0.0)
    losses, weights = {}, {}
    start = None
    for device in ("cpu", DEVICE):
        with keras.device(device):
            keras.utils.set_random_seed(0)
            model = classifier(spec, output="logits", precision="float32")
            start = start or model.get_weights()
            model.set_weights(start)
            compile_classifier(model, 1e-3)
            batches = [tuple(map(torch.from_numpy, random_batch(model, 4, i))) for i in range(5)]
            losses[device] = [float(model.train_on_batch(*batch)) for batch in batches]
            weights[device] = {v.path: np.asarray(v.value.detach().cpu()) for v in model.variables}
    is_compiled = not isinstance(getattr(model, ATTRIBUTE).functions.train, FlatFunction)
    assert is_compiled
    np.testing.assert_allclose(losses[DEVICE], losses["cpu"], rtol=1e-3)
    moved = {p: v for p, v in weights["cpu"].items() if p.endswith(("moving_mean", "fc/bias"))}
    assert_close(moved, {path: weights[DEVICE][path] for path in moved}, 0.02)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["2d", "medicalnet"])
def test_half_precision_learns_a_batch_by_heart(name, precision):
    keras.utils.set_random_seed(0)
    spec = replace(NETWORKS[name], dropout=0.0)
    model = classifier(spec, output="logits", precision=precision)
    compile_classifier(model, 1e-3)
    images, truth = map(torch.from_numpy, random_batch(model, 8))
    losses = []
    for _ in range(60):
        model.reset_metrics()
        losses.append(float(model.train_on_batch(images, truth)))
    assert np.isfinite(losses).all() and losses[-1] < 0.3 * losses[0], losses
    predicted = model.predict_on_batch(images)
    assert np.isfinite(predicted).all()


@pytest.mark.parametrize("recompute", ["stage", "block"])
def test_recomputation_takes_less_memory_and_gives_the_same(recompute, float64):
    _, model, images = twins(replace(NETWORKS["series"], input_shape=(17, 128, 128, 1)))
    images = images.to(DEVICE)
    start, peaks, found = model.get_weights(), [], []
    for way in (None, recompute):
        model.set_weights(start)
        function = FlatFunction(model, training=True, recompute=way)
        tensors = function.tensors()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(images, tensors)[0].sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        found.append(gradients(model))
        for variable in model.trainable_variables:
            variable.value.grad = None
    assert_close(*found, 1e-9)
    assert peaks[1] < 0.85 * peaks[0], peaks


def test_prediction_takes_fewer_at_once_when_the_memory_is_full():
    keras.utils.set_random_seed(0)
    spec = replace(NETWORKS["2d"], input_shape=(128, 128, 3), dropout=0.0)
    model = choose_step(classifier(spec, output="logits", precision="float32"))
    images = torch.rand(512, 128, 128, 3)
    expected = np.concatenate([model.predict_on_batch(part) for part in images.split(64)])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model.predict_on_batch(images[:256])
    limit = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        limit / torch.cuda.get_device_properties(0).total_memory
    )
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = model.predict_on_batch(images)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    # Half may not fit either, where what is free lies in pieces.
    said = [str(warning.message) for warning in told if "do not fit" in str(warning.message)]
    assert said[0].startswith("512 samples do not fit into memory at once")
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_no_number_is_sent_to_the_gpu_within_a_step():
    """Each one sent makes the host wait."""
    from benchmarks.harness import dispatches

    keras.utils.set_random_seed(0)
    model = classifier(replace(NETWORKS["2d"], dropout=0.0), precision="float32", output="logits")
    compile_classifier(model, 1e-3)
    images, truth = (torch.from_numpy(x).to(DEVICE) for x in random_batch(model, 4))

    def steps(number):
        for _ in range(number):
            model.train_function([(images, truth)])

    model.train_on_batch(images, truth)
    made = dispatches(steps)
    assert made.uploads == 0
    assert made.operations > 0


def require_whole_state(state, again):
    """Resuming restores every variable that was saved, and puts it on the GPU."""
    model = classifier(PRESETS[NARROW].spec, output="logits", precision="bfloat16")
    compile_classifier(model, 1e-3, accumulate=2)
    done = checkpoints.load_state(state, model)["epoch"]
    assert {v.value.device.type for v in model.optimizer.variables} == {DEVICE}
    checkpoints.save_state(again, model, done, {})
    files = [folder / f"epoch-{done:04d}" / checkpoints.VARIABLES for folder in (state, again)]
    with np.load(files[0]) as left, np.load(files[1]) as restored:
        assert left.keys() == restored.keys()
        for name in left:
            np.testing.assert_array_equal(restored[name], left[name], err_msg=name)
        assert sum(value.any() for value in left.values()) > len(model.trainable_variables)


def test_a_run_on_the_gpu(phantom_folder, phantom_cache, tmp_path, crash_after):  # noqa: F811
    config = config_of(device=DEVICE, precision="auto", fit={"epochs": 4, "accumulate": 2})
    whole = train(config, phantom_cache, tmp_path / "whole")
    record = json.loads((whole / "environment.json").read_text())
    assert (record["device"], record["device_name"]) == (DEVICE, torch.cuda.get_device_name())
    assert json.loads((whole / "config.json").read_text())["precision"] == "bfloat16"
    run = tmp_path / "run"
    crash_after(2)
    with pytest.raises(Crash):
        train(config, phantom_cache, run)
    crash_after(None)
    require_whole_state(run / "state", tmp_path / "again")
    training.resume(run, phantom_cache)
    histories = [pd.read_csv(folder / "history.csv") for folder in (run, whole)]
    # The GPU's sums have no fixed order, so that even two uninterrupted runs differ.
    for name in ("train_loss", "valid_log_loss"):
        np.testing.assert_allclose(*(table[name] for table in histories), rtol=0.2, err_msg=name)
    assert len(arrays_of(run)) == len(arrays_of(whole))

    images = phantom_folder / "images"
    found = predict_folder(whole, images, workers=2).slices.set_index("sop_instance_uid")
    held_out = pd.read_csv(whole / "predictions-test.csv").set_index("sop_instance_uid")
    names = [f"raw_{name}" for name in LABELS]
    # Other batches may be computed by other kernels, in bfloat16.
    np.testing.assert_allclose(found.loc[held_out.index, names], held_out[list(LABELS)], atol=1e-2)
    with keras.device("cpu"):
        expected = predict_folder(whole, images).slices.set_index("sop_instance_uid")
    np.testing.assert_allclose(found[names], expected.loc[found.index, names], atol=0.05)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_made_on_the_gpu_are_those_of_the_cpu(phantom_cache, workers):
    settings = {"indices": np.arange(12), "batch_size": 4, "seed": 4, "augment": "fast"}
    settings |= {"num_slices": 5, "reverse": True}
    expected = slab_batches(phantom_cache, **settings)
    found = slab_batches(phantom_cache, device="cuda", workers=workers, **settings)
    for _ in range(2):
        for (x, y), (other_x, other_y) in zip(found, expected, strict=True):
            assert x.device.type == y.device.type == "cuda"
            np.testing.assert_array_equal(y.cpu(), other_y)
            assert (abs(x.cpu() - other_x) > 1e-3).float().mean() < 2e-3
