"""The ResNet against torchvision's own, parameter counts by hand, outputs, losses, schedules."""

import math

import keras
import numpy as np
import pytest
import torch
import torchvision

from ich_keras.errors import DataError, UsageError
from ich_keras.labels import LABELS, RSNA_WEIGHTS
from ich_keras.models.classifier import (
    build_backbone,
    build_classifier,
    classifier,
    compile_classifier,
    ends_in_logits,
    with_probabilities,
)
from ich_keras.models.loss import BinaryCrossEntropy
from ich_keras.models.optimizer import Adam
from ich_keras.models.presets import preset
from ich_keras.models.resnet import resnet
from ich_keras.models.spec import ModelSpec
from ich_keras.models.steps import built_precision, choose_step
from ich_keras.models.weights import load_weights

NARROW = ModelSpec(input_shape=(32, 32, 3), width=8)

TORCH_NAMES = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def num_trainable(model) -> int:
    return sum(math.prod(variable.shape) for variable in model.trainable_variables)


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Random kernels and statistics: with fresh ones a swapped mean and variance goes unseen."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif name.endswith("running_mean") or name.endswith("bias"):
                tensor.normal_(0, 0.1)
            elif tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)


def carry_over(module: torch.nn.Module, model) -> int:
    """Assign a torchvision network's tensors by name; return how many were used."""
    state = {name.replace(".", "_"): t.numpy() for name, t in module.state_dict().items()}
    used = 0
    for layer in model.layers:
        for variable in layer.weights:
            tensor = state[f"{layer.name}_{TORCH_NAMES[variable.name]}"]
            if tensor.ndim > 1:
                tensor = np.moveaxis(tensor, (0, 1), (-1, -2))
            assert tensor.shape == tuple(variable.shape)
            variable.assign(tensor)
            used += 1
    return used


@pytest.mark.parametrize(
    ("depth", "num_tensors", "shape"),
    [(18, 100, (64, 64)), (18, 100, (65, 63)), (18, 100, (96, 71)), (50, 265, (64, 47))],
)
def test_resnet_equals_torchvision(depth, num_tensors, shape):
    module = getattr(torchvision.models, f"resnet{depth}")().eval()
    randomise(module, seed=depth)
    model = resnet(ModelSpec(input_shape=(None, None, 3), depth=depth))
    assert carry_over(module, model) == num_tensors
    image = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype("float32")

    stages = {}
    for name in ("relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool"):
        getattr(module, name).register_forward_hook(
            lambda _, __, output, name=name: stages.__setitem__(name, output.numpy(force=True))
        )
    with torch.no_grad():
        module(torch.from_numpy(image).permute(0, 3, 1, 2))
    last = {"layer1": 1, "layer2": 1, "layer3": 1, "layer4": 1}
    if depth == 50:
        last = {"layer1": 2, "layer2": 3, "layer3": 5, "layer4": 2}
    relu = "relu2" if depth < 50 else "relu3"
    names = ["relu", "maxpool", *(f"{s}_{n}_{relu}" for s, n in last.items()), "avgpool"]
    probe = keras.Model(model.input, [model.get_layer(name).output for name in names])
    outputs = probe.predict_on_batch(image)
    for (name, expected), output in zip(stages.items(), outputs, strict=True):
        expected = expected.reshape(2, -1) if name == "avgpool" else np.moveaxis(expected, 1, -1)
        scale = np.abs(expected).max()
        assert np.abs(output - expected).max() / scale < 1e-5, name


def test_parameter_counts():
    # torchvision's ResNet-18 has 11,689,512 of which fc(1000) holds 513,000.
    assert num_trainable(build_backbone("resnet18_2d")) == 11_689_512 - 513_000
    assert num_trainable(build_classifier("resnet18_2d")) == 11_176_512 + 512 * 6 + 6


@pytest.mark.parametrize(
    ("shortcut", "expected"),
    # MedicalNet's ResNet-18 with one channel: its own shortcut A, and shortcut B.
    [("A", 32_986_176), ("B", 33_160_000)],
)
def test_parameter_counts_3d(shortcut, expected):
    spec = ModelSpec((None, None, None, 1), shortcut=shortcut)
    assert num_trainable(resnet(spec)) == expected


def test_shortcut_a_subsamples_and_appends_zeros():
    model = resnet(ModelSpec((8, 8, 1), width=4, shortcut="A", stem_stride=1))
    before = model.get_layer("layer1_1_relu2").output
    shortcut = next(
        tensor
        for tensor in model.get_layer("layer2_0_add").input
        if tensor.shape[-1] == 8 and "pad" in tensor._keras_history.operation.name
    )
    probe = keras.Model(model.input, [before, shortcut])
    image = np.random.default_rng(1).normal(size=(2, 8, 8, 1)).astype("float32")
    value, carried = (np.asarray(o) for o in probe.predict_on_batch(image))
    np.testing.assert_array_equal(carried[..., :4], value[:, ::2, ::2])
    assert not carried[..., 4:].any()


@pytest.mark.parametrize("output", ["probabilities", "logits"])
def test_head_is_six_float32(output):
    model = classifier(NARROW, output=output, precision="bfloat16")
    values = model.predict_on_batch(np.zeros((2, 32, 32, 3), "float32"))
    assert model.output_shape == (None, len(LABELS))
    assert np.asarray(values).dtype == np.float32
    assert ends_in_logits(model) is (output == "logits")


def test_probabilities_are_the_sigmoid_of_the_same_weights():
    logits = classifier(NARROW, output="logits")
    image = np.random.default_rng(2).normal(size=(3, 32, 32, 3)).astype("float32")
    expected = 1 / (1 + np.exp(-np.asarray(logits.predict_on_batch(image), np.float64)))
    values = with_probabilities(logits).predict_on_batch(image)
    np.testing.assert_allclose(np.asarray(values), expected, rtol=1e-6)


def test_weights_of_logits_load_into_probabilities(tmp_path):
    logits = classifier(NARROW, output="logits")
    logits.save_weights(tmp_path / "a.weights.h5")
    model = classifier(NARROW)
    load_weights(model, tmp_path / "a.weights.h5")
    image = np.random.default_rng(3).normal(size=(2, 32, 32, 3)).astype("float32")
    np.testing.assert_array_equal(
        np.asarray(model.predict_on_batch(image)),
        np.asarray(with_probabilities(logits).predict_on_batch(image)),
    )


def test_saved_model_loads_without_this_package(tmp_path):
    import subprocess
    import sys

    model = classifier(ModelSpec((32, 32, 3), width=8, shortcut="A"))
    image = np.random.default_rng(4).normal(size=(2, 32, 32, 3)).astype("float32")
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "image.npy", image)
    program = (
        "import sys, numpy as np, keras;"
        "m = keras.saving.load_model(sys.argv[1] + '/model.keras');"
        "image = np.load(sys.argv[1] + '/image.npy');"
        "np.save(sys.argv[1] + '/out.npy', m.predict_on_batch(image));"
        "assert 'ich_keras' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=tmp_path)
    # Here on the fast steps, there on Keras' own, which add in another order. A logit of -50 that
    # differs in its seventh digit moves its probability by 1e-5.
    np.testing.assert_allclose(
        np.load(tmp_path / "out.npy"), np.asarray(model.predict_on_batch(image)), rtol=1e-4
    )


def test_losses_against_hand_computed_numbers():
    truth = np.array([[1, 0, 0, 0, 0, 1]], "float32")
    logits = np.array([[0, 0, 0, 0, 0, math.log(3)]], "float32")  # p = .5 x5, .75
    half, quarter = math.log(2), -math.log(0.75)
    plain = BinaryCrossEntropy(True).call(truth, keras.ops.convert_to_tensor(logits))
    rsna = BinaryCrossEntropy(True, RSNA_WEIGHTS).call(truth, keras.ops.convert_to_tensor(logits))
    assert float(plain[0]) == pytest.approx((5 * half + quarter) / 6, rel=1e-6)
    assert float(rsna[0]) == pytest.approx((5 * half + 2 * quarter) / 7, rel=1e-6)
    probabilities = keras.ops.sigmoid(keras.ops.convert_to_tensor(logits))
    from_probabilities = BinaryCrossEntropy(False).call(truth, probabilities)
    assert float(from_probabilities[0]) == pytest.approx(float(plain[0]), rel=1e-5)


def test_schedules_hit_their_marks():
    def rate(step, **settings):
        model = compile_classifier(classifier(NARROW), 1e-3, **settings)
        schedule = model.optimizer._learning_rate
        return float(schedule(step)) if callable(schedule) else float(schedule)

    assert rate(7) == pytest.approx(1e-3)
    cosine = {"schedule": "cosine", "total_steps": 110, "warmup_steps": 10}
    assert rate(5, **cosine) == pytest.approx(0.5e-3)
    assert rate(60, **cosine) == pytest.approx(0.5e-3)  # half way down
    assert rate(110, **cosine) == pytest.approx(0.0, abs=1e-9)
    assert rate(500, warmup_steps=10) == pytest.approx(1e-3)
    assert rate(0, schedule="cosine", total_steps=10) == pytest.approx(1e-3)


def test_loss_goes_down_in_fit():
    keras.utils.set_random_seed(0)
    model = compile_classifier(
        classifier(ModelSpec((32, 32, 3), width=8, dropout=0.0), output="logits"), 3e-3
    )
    random = np.random.default_rng(0)
    image = random.normal(size=(8, 32, 32, 3)).astype("float32")
    truth = random.integers(0, 2, (8, 6)).astype("float32")
    history = model.fit(image, truth, epochs=12, batch_size=8, verbose=0).history["loss"]
    assert history[-1] < 0.3 * history[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preset("resnet19"), "no preset is called 'resnet19'; known: resnet10_2d"),
        (lambda: preset("resnet18_2D"), "Did you mean 'resnet18_2d'"),
        (lambda: preset("resnet18_2d", "abc"), "input_shape 'abc'; expected lengths like"),
        (lambda: preset("resnet18_2d", (8, 64, 64, 1)), "takes 3 axes"),
        (lambda: preset("densenet121_2d", (8, 64, 64, 1)), "takes 3 axes"),
        (lambda: preset("seresnext50_2d", (5, 64, 64, 3)), "takes 3 axes"),
        (lambda: ModelSpec((32, 32)), "expected"),
        (lambda: ModelSpec((32, 32, 3), depth=20), "depth 20; expected one of"),
        (lambda: ModelSpec((32, 32, 3), shortcut="C"), "'C'; expected 'A' or 'B'"),
        (lambda: ModelSpec((32, 32, 3), strides=(1, 2)), "one entry for each of the 4 stages"),
        (lambda: ModelSpec((32, 32, None)), "channels, must be known"),
        (lambda: ModelSpec((32, 32, 3), dropout=1.0), "below 1"),
        (lambda: classifier(NARROW, output="votes"), "output is 'votes'"),
        (lambda: classifier(NARROW, precision="float8"), "precision is 'float8'"),
        (lambda: compile_classifier(classifier(NARROW), -1.0), "learning_rate is -1.0"),
        (lambda: compile_classifier(classifier(NARROW), loss="mse"), "loss is 'mse'"),
        (lambda: compile_classifier(classifier(NARROW), schedule="step"), "schedule is 'step'"),
        (lambda: compile_classifier(classifier(NARROW), schedule="cosine"), "total_steps"),
        (lambda: compile_classifier(classifier(NARROW), weight_decay=-1.0), "weight_decay is -1.0"),
        (lambda: load_weights(None, "imagenet"), "expected a file ending in .weights.h5"),
        (lambda: load_weights(None, "none.weights.h5"), "does not exist"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_wrong_weights_are_refused(tmp_path):
    model = classifier(NARROW)
    (tmp_path / "page.weights.h5").write_text("<html>")
    with pytest.raises(DataError, match="not an HDF5 file"):
        load_weights(model, tmp_path / "page.weights.h5")
    classifier(ModelSpec((32, 32, 3), width=4)).save_weights(tmp_path / "other.weights.h5")
    with pytest.raises(DataError, match="does not fit the network"):
        load_weights(model, tmp_path / "other.weights.h5")
    model.get_layer("bn1").gamma.assign(np.full(8, np.nan, "float32"))
    model.save_weights(tmp_path / "nan.weights.h5")
    with pytest.raises(DataError, match=r"\(bn1\) holds values that are not finite"):
        load_weights(classifier(NARROW), tmp_path / "nan.weights.h5")


@pytest.mark.parametrize("settings", [{}, {"amsgrad": True}, {"weight_decay": 0.1}])
def test_adam_steps_as_torch_does_on_every_backend(settings):
    # An epsilon large enough to see where it is added.
    random = np.random.default_rng(0)
    start = random.normal(size=(3, 2)).astype("float32")
    grads = [random.normal(size=(3, 2)).astype("float32") * 1e-3 for _ in range(4)]
    twin = torch.nn.Parameter(torch.from_numpy(start.copy()))
    reference = torch.optim.AdamW if "weight_decay" in settings else torch.optim.Adam
    reference = reference([twin], 1e-2, eps=1e-3, **settings)
    for grad in grads:
        twin.grad = torch.from_numpy(grad)
        reference.step()
    for fused in (True, False):
        variable = keras.Variable(start)
        optimizer = Adam(1e-2, epsilon=1e-3, fused=fused, **settings)
        for grad in grads:
            optimizer.apply([keras.ops.convert_to_tensor(grad)], [variable])
        found = keras.ops.convert_to_numpy(variable.value)
        np.testing.assert_allclose(found, twin.detach().numpy(), rtol=1e-5)
    assert Adam(1e-2, fused=True).fused == (keras.backend.backend() == "torch")


def test_adam_and_the_loss_come_back_from_their_configuration():
    adam = Adam(1e-3, backbone_factor=0.1, head_layers=("fc",), fused=False, clipnorm=1.0)
    loss = BinaryCrossEntropy(False, RSNA_WEIGHTS, name="rsna")
    for thing in (adam, loss):
        config = keras.saving.serialize_keras_object(thing)
        assert config["registered_name"].startswith("ich_keras>")
        again = keras.saving.deserialize_keras_object(config)
        assert type(again) is type(thing) and again.get_config() == thing.get_config()


def test_only_the_fast_steps_change_what_is_built_in():
    is_torch = keras.backend.backend() == "torch"
    for step in ("fast", "stock"):
        can_change = is_torch and step == "fast"
        model = classifier(NARROW, output="logits")
        assert choose_step(model, step) is model
        for option, message in (
            ({"precision": "bfloat16"}, "precision bfloat16: the model was built in float32"),
            ({"recompute": "stage"}, "recompute needs the fast steps"),
        ):
            if can_change:
                compile_classifier(model, step=step, **option)
                continue
            with pytest.raises(UsageError, match=message):
                compile_classifier(model, step=step, **option)
        compile_classifier(model, step=step, precision="float32")
        built = classifier(NARROW, output="logits", precision="bfloat16")
        assert built_precision(built) == "bfloat16"
        compile_classifier(built, step=step, precision="bfloat16", accumulate=2)
        random = np.random.default_rng(0)
        images = random.standard_normal((8, 32, 32, 3)).astype("float32")
        truth = random.integers(0, 2, (8, 6)).astype("float32")
        loss = built.fit(images, truth, batch_size=4, verbose=0).history["loss"][0]
        assert math.isfinite(loss)
        assert int(keras.ops.convert_to_numpy(built.optimizer.iterations)) == 1  # of two batches
