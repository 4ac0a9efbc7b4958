"""The fast steps against Keras' own: outputs, gradients, training, files, and what users do."""

import gc
import itertools
import resource
import warnings
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from test_networks import NARROW, TINY, random_batch

from ich_keras.errors import UsageError
from ich_keras.keras_private import keep_float64, tensor_of
from ich_keras.labels import RSNA_WEIGHTS
from ich_keras.models.backbone import backbone
from ich_keras.models.classifier import classifier, compile_classifier, freeze
from ich_keras.models.graph import UnknownStep, read_graph
from ich_keras.models.loss import BinaryCrossEntropy
from ich_keras.models.optimizer import Adam
from ich_keras.models.presets import PRESETS, preset
from ich_keras.models.spec import ModelSpec
from ich_keras.models.steps import choose_step
from ich_keras.models.torch import adam as torch_adam
from ich_keras.models.torch.adam import fused_update
from ich_keras.models.torch.function import FlatFunction
from ich_keras.models.torch.memory import activation_bytes
from ich_keras.models.torch.step import ATTRIBUTE, StockStep, accelerated

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="the fast steps are the torch backend's"
)

NETWORKS = TINY | {
    # Deep enough that a dilation of 4 looks past every neighbour, and a kernel of 3 does not.
    "series": replace(TINY["medicalnet"], input_shape=(17, 24, 24, 1)),
    "mixed": replace(PRESETS["mc3_18"].spec, input_shape=(5, 24, 24, 3), width=8, dropout=0.0),
    "thin": replace(PRESETS["resnet10_3d_thin"].spec, input_shape=(5, 24, 24, 1), width=8),
    "atrous": replace(PRESETS["resnet10_3d_thin_atrous"].spec, input_shape=(5, 24, 24, 1), width=8),
    "strided": replace(PRESETS["resnet18_3d"].spec, input_shape=(33, 32, 32, 3), width=4),
}


@pytest.fixture(autouse=True)
def float64():
    """Rounding turns ReLUs on and off: only float64 tells a wrong gradient from a rounded one."""
    with keep_float64():
        yield


def build(spec, seed=0):
    """A network in float64 with uneven statistics, ending in six logits."""
    keras.utils.set_random_seed(seed)
    body = backbone(replace(spec, dropout=0.0), dtype="float64")
    outputs = keras.layers.Dense(6, dtype="float64", name="fc")(body.output)
    model = keras.Model(body.input, outputs)
    random = np.random.default_rng(seed)
    for variable in model.variables:
        if variable.name in ("moving_variance", "gamma"):
            variable.assign(random.uniform(0.5, 1.5, variable.shape))
        elif variable.name in ("moving_mean", "beta"):
            variable.assign(random.normal(0, 0.1, variable.shape))
    return model


def batch(model, size=4, seed=0):
    """Inputs and labels as torch tensors; float32 is what the graph's input takes."""
    return tuple(map(torch.from_numpy, random_batch(model, size, seed)))


def gradients(model) -> dict[str, np.ndarray]:
    found = {v.path: v.value.grad.numpy().copy() for v in model.trainable_variables}
    for variable in model.trainable_variables:
        variable.value.grad = None
    return found


def states(model) -> dict[str, np.ndarray]:
    return {v.path: v.numpy().copy() for v in model.variables if "seed" not in v.path}


def assert_close(one: dict, other: dict, rtol: float):
    assert list(one) == list(other)
    for name in one:
        scale = max(np.abs(one[name]).max(), 1e-8)
        np.testing.assert_allclose(other[name], one[name], atol=rtol * scale, err_msg=name)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_equal_the_layers(name):
    model = build(NETWORKS[name])
    images, _ = batch(model)
    before = states(model)
    direction = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6)

    expected = model(images, training=True)
    (expected * direction).sum().backward()
    stock, stock_states = gradients(model), states(model)
    for variable in model.variables:
        variable.assign(before[variable.path])

    function = FlatFunction(model, training=True)
    found = function(images, function.tensors())[0]
    (found * direction).sum().backward()
    np.testing.assert_allclose(found.detach(), expected.detach(), rtol=1e-9)
    assert_close(stock, gradients(model), 1e-8)

    # Keras' moving variance divides by n, torch's by n - 1: the same update, times n / (n - 1).
    for layer in model.layers:
        if not isinstance(layer, keras.layers.BatchNormalization) or not layer.trainable:
            continue
        n = np.prod([4, *layer.output.shape[1:-1]])
        for variable, factor in ((layer.moving_mean, 1.0), (layer.moving_variance, n / (n - 1))):
            update = stock_states[variable.path] - 0.9 * before[variable.path]
            expected = 0.9 * before[variable.path] + update * (factor if n > 1 else 1.0)
            np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_folded_prediction_equals_the_layers(name):
    model = build(NETWORKS[name])
    images, _ = batch(model)
    with torch.no_grad():
        expected = model(images, training=False).numpy()
    choose_step(model)
    assert accelerated(model) is not None
    np.testing.assert_allclose(model.predict_on_batch(images), expected, rtol=1e-8)
    np.testing.assert_allclose(
        model.predict(images.numpy(), batch_size=3, verbose=0), expected, rtol=1e-8
    )


def test_a_network_of_other_shape_equals_its_layers():
    """A convolution with a bias before its normalisation, padded pooling of negative values, and a
    value that a ReLU must not overwrite because others read it."""
    keras.utils.set_random_seed(0)
    image = keras.Input((12, 12, 3))
    x = keras.layers.Conv2D(8, 3, bias_initializer="random_normal", dtype="float64")(image)
    x = keras.layers.BatchNormalization(beta_initializer="random_normal", dtype="float64")(x)
    low = keras.initializers.Constant(-9.0)
    x = keras.layers.Conv2D(8, 1, bias_initializer=low, dtype="float64")(x)
    y = keras.layers.ReLU(dtype="float64")(x)
    x = keras.layers.Add(dtype="float64")([x, y])
    x = keras.layers.ZeroPadding2D(1, dtype="float64")(x)
    x = keras.layers.MaxPooling2D(3, strides=2, dtype="float64")(x)
    x = keras.layers.GlobalAveragePooling2D(dtype="float64")(x)
    model = keras.Model(image, x)
    images, _ = batch(model)
    for training in (True, False):
        before = [weight.copy() for weight in model.get_weights()]
        expected = model(images, training=training).detach().numpy()
        model.set_weights(before)
        function = FlatFunction(model, training=training)
        found = function(images, function.tensors())[0].detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        model.set_weights(before)
    # The zeros of the padding win at the border: a pooling that pads with -inf would show.
    assert (expected > -9).all() and (expected < 0).all()


@pytest.mark.parametrize("slices", [None, 1, 4])
def test_gates_joins_averages_and_groups_equal_the_layers(slices):
    """Groups of one and of several channels, a gate on the whole image, values joined and averaged,
    and a value that a ReLU must not overwrite because a gradient needs it."""
    keras.utils.set_random_seed(0)
    layers, f64 = keras.layers, {"dtype": "float64"}
    rank = 2 if slices is None else 3
    conv, pool, mean = (
        getattr(layers, f"{kind}{rank}D")
        for kind in ("Conv", "AveragePooling", "GlobalAveragePooling")
    )
    image = keras.Input((*(() if slices is None else (slices,)), 13, 12, 4))
    bias = {"bias_initializer": "random_normal"}
    groups = {"groups": 2} if slices is None else {}
    x = conv(8, 1, **groups, use_bias=False, **f64)(image)
    x = layers.BatchNormalization(**f64)(x)
    if slices is None:
        x = layers.ZeroPadding2D(1, **f64)(x)
        x = conv(16, 3, strides=2, groups=8, **f64)(x)
    gate = conv(3, 1, **bias, **f64)(mean(keepdims=True, **f64)(x))
    gate = conv(x.shape[-1], 1, **bias, **f64)(layers.ReLU(**f64)(gate))
    gate = layers.Activation("sigmoid", **f64)(gate)
    scaled = layers.ReLU(**f64)(layers.Multiply(**f64)([gate, x]))
    joined = layers.Concatenate(**f64)([scaled, x, scaled])
    pooled = pool((1, 2, 3)[-rank:], strides=(1, 3, 2)[-rank:], **f64)(joined)
    x = mean(**f64)(layers.ReLU(**f64)(pooled))
    x = layers.Concatenate(1, **f64)([x, x])
    model = keras.Model(image, [pooled, x])
    images, _ = batch(model)
    for training in (True, False):
        results = []
        before = [weight.copy() for weight in model.get_weights()]
        function = FlatFunction(model, training=training)
        for run in (
            lambda: model(images, training=training),  # noqa: B023
            lambda: function(images, function.tensors()),  # noqa: B023
        ):
            model.set_weights(before)
            found = run()
            if training:
                sum((output**2).sum() for output in found).backward()
            results.append((found, gradients(model) if training else {}))
        (expected, theirs), (found, ours) = results
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_allclose(other.detach(), one.detach(), rtol=1e-9, atol=1e-12)
        assert_close(theirs, ours, 1e-8)
        model.set_weights(before)


def test_groups_in_3d_are_not_covered():
    image = keras.Input((4, 8, 8, 2))
    model = keras.Model(image, keras.layers.Conv3D(4, 3, groups=2)(image))
    with pytest.raises(UnknownStep, match="has groups in 3D"):
        read_graph(model)


class HalfSquare(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return 0.5 * keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)


class EveryOther(keras.callbacks.Callback):
    """Sets the rate between batches, as a user's own schedule would."""

    def on_train_batch_begin(self, number, logs=None):
        self.model.optimizer.learning_rate = 1e-3 if number % 2 else 3e-3


def _schedule():
    return keras.optimizers.schedules.CosineDecay(1e-3, 10, alpha=0.1)


def _loss(**settings):
    return BinaryCrossEntropy(True, dtype="float64", **settings)


def _regularised(model):
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            layer.kernel.regularizer = keras.regularizers.L2(0.01)


def _constrained(model):
    model.get_layer("fc").kernel.constraint = keras.constraints.UnitNorm()


# name -> (optimiser settings, compile settings, fit settings, change of the model before)
USES = {
    "plain": ({}, {}, {}, None),
    "rsna": ({}, {"loss": _loss(label_weights=RSNA_WEIGHTS)}, {}, None),
    "schedule": ({"learning_rate": _schedule}, {}, {}, None),
    "schedule callback": (
        {},
        {},
        {"callbacks": lambda: [keras.callbacks.LearningRateScheduler(lambda n: 1e-3 / (n + 1))]},
        None,
    ),
    "batch callback": ({}, {}, {"callbacks": lambda: [EveryOther()]}, None),
    "clipnorm": ({"clipnorm": 0.01}, {}, {}, None),
    "global clipnorm": ({"global_clipnorm": 0.01}, {}, {}, None),
    "clipvalue": ({"clipvalue": 0.001}, {}, {}, None),
    "ema": ({"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2}, {}, {}, None),
    "accumulation": ({"gradient_accumulation_steps": 2}, {}, {}, None),
    "weight decay": ({"weight_decay": 0.1}, {}, {}, None),
    "amsgrad": ({"amsgrad": True}, {}, {}, None),
    "two rates": ({"backbone_factor": 0.1, "head_layers": ("fc",)}, {}, {}, None),
    "fixed loss scale": ({"loss_scale_factor": 128.0}, {}, {}, None),
    "loss scaling": ({"scaled": True}, {}, {}, None),
    "custom loss": ({}, {"loss": HalfSquare(dtype="float64")}, {}, None),
    "loss function": ({}, {"loss": lambda y, p: keras.ops.mean(p * p) - 0.0 * y}, {}, None),
    "loss weights": ({}, {"loss_weights": [0.5]}, {}, None),
    "sample weights": ({}, {}, {"sample_weight": lambda: np.linspace(0, 2, 12)}, None),
    "class weights": ({}, {}, {"class_weight": lambda: {n: 1.0 + n for n in range(6)}}, None),
    "regulariser": ({}, {}, {}, _regularised),
    "constraint": ({}, {}, {}, _constrained),
    "freezing": ({}, {}, {}, lambda model: freeze(model, "layer2")),
    "metrics": (
        {},
        {
            "metrics": lambda: [
                "mae",
                keras.metrics.AUC(from_logits=True, multi_label=True, name="auc"),
            ]
        },
        {},
        None,
    ),
    "another optimiser": ({"optimizer": keras.optimizers.SGD}, {}, {}, None),
    "stock Adam": ({"optimizer": keras.optimizers.Adam}, {}, {}, None),
}


def trained(use: str, step: str, epochs: int = 3):
    """Train for a few steps; return history, weights and what evaluation says."""
    settings, compiling, fitting, change = USES[use]
    model = build(NARROW)
    if change is not None:
        change(model)
    settings = {"learning_rate": 1e-3} | dict(settings)
    if callable(settings["learning_rate"]):
        settings["learning_rate"] = settings["learning_rate"]()
    is_scaled = settings.pop("scaled", False)
    kind = settings.pop("optimizer", None)
    if kind is None:
        kind, settings = Adam, settings | {"fused": step == "fast"}
    optimizer = kind(**settings)
    if is_scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    choose_step(model, step)
    compiling = {"loss": _loss()} | compiling
    model.compile(
        optimizer=optimizer,
        **{name: value() if name == "metrics" else value for name, value in compiling.items()},
    )
    images, truth = random_batch(model, 12)
    history = model.fit(
        images,
        truth,
        batch_size=6,
        epochs=epochs,
        verbose=0,
        shuffle=False,
        **{name: value() for name, value in fitting.items()},
    ).history
    # Before the running variances, which differ by convention, come in.
    weights = {v.path: v.numpy().copy() for v in model.trainable_variables}
    frozen = {v.path: v.numpy().copy() for v in model.non_trainable_variables}
    return model, history, weights, frozen


@pytest.mark.parametrize("use", USES)
def test_six_steps_equal_those_of_keras(use):
    model, history, weights, others = trained(use, "fast")
    assert getattr(model.train_function, "__self__", None) is getattr(model, ATTRIBUTE)
    _, stock_history, stock_weights, stock_others = trained(use, "stock")
    assert_close(stock_weights, weights, 1e-6)
    assert list(history) == list(stock_history)
    for name in history:
        np.testing.assert_allclose(history[name], stock_history[name], rtol=1e-5, err_msg=name)
    if use == "freezing":
        start = states(build(NARROW))
        for path, value in others.items():
            if path.startswith(("conv1", "bn1", "layer1", "layer2")):
                np.testing.assert_array_equal(value, start[path], err_msg=path)
    # The running variances differ by convention, which is tested above; all else is equal.
    kept = {p: v for p, v in others.items() if "moving_variance" not in p and "seed" not in p}
    assert any("moving_mean" in path for path in kept)
    assert_close({path: stock_others[path] for path in kept}, kept, 1e-6)


def test_evaluate_equals_keras():
    model, *_ = trained("metrics", "fast")
    images, truth = random_batch(model, 10, seed=5)
    weights = np.linspace(0.5, 1.5, 10)
    found = model.evaluate(images, truth, batch_size=4, sample_weight=weights, verbose=0)
    choose_step(model, "stock")
    expected = model.evaluate(images, truth, batch_size=4, sample_weight=weights, verbose=0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_thawing_between_two_fits_is_seen_without_compiling():
    model, *_ = trained("freezing", "fast", epochs=1)
    images, truth = random_batch(model, 6)
    kernel = model.get_layer("conv1").kernel
    before, mean = kernel.numpy().copy(), model.get_layer("bn1").moving_mean.numpy().copy()
    for layer in model.layers:
        layer.trainable = True
    model.compile(Adam(1e-3), _loss())
    model.fit(images, truth, epochs=1, verbose=0)
    assert np.abs(kernel.numpy() - before).max() > 0
    model.get_layer("bn1").trainable = False
    mean = model.get_layer("bn1").moving_mean.numpy().copy()
    model.train_on_batch(images, truth)
    np.testing.assert_array_equal(model.get_layer("bn1").moving_mean.numpy(), mean)


def test_weights_files_pass_between_the_paths(tmp_path):
    model, *_ = trained("plain", "fast")
    images, _ = random_batch(model, 5)
    expected = model.predict(images, verbose=0)
    model.save_weights(tmp_path / "fast.weights.h5")
    other = build(NARROW, seed=1)
    other.load_weights(tmp_path / "fast.weights.h5")
    for one, two in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())
    with torch.no_grad():
        stock = other(torch.from_numpy(images), training=False).numpy()
    np.testing.assert_allclose(stock, expected, rtol=1e-9)
    # And back into a network that already predicts by the fast steps.
    other.save_weights(tmp_path / "stock.weights.h5")
    third = choose_step(build(NARROW, seed=2))
    third.predict(images, verbose=0)
    third.load_weights(tmp_path / "stock.weights.h5")
    np.testing.assert_array_equal(third.predict(images, verbose=0), expected)


def test_a_saved_training_goes_on_equally(tmp_path):
    model, *_ = trained("ema", "fast")
    images, truth = random_batch(model, 6, seed=3)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is Adam and type(loaded.loss) is BinaryCrossEntropy
    assert int(loaded.optimizer.iterations.numpy()) == 6
    for which in (model, loaded):  # the second on Keras' own steps
        which.fit(images, truth, epochs=2, verbose=0, shuffle=False)
    assert_close(
        {v.path: v.numpy() for v in model.trainable_variables},
        {v.path: v.numpy() for v in loaded.trainable_variables},
        1e-6,
    )


def test_prediction_follows_every_change_of_the_weights():
    model, *_ = trained("plain", "fast")
    images, truth = random_batch(model, 4)

    def expected():
        with torch.no_grad():
            return model(torch.from_numpy(images), training=False).numpy()

    def check():
        np.testing.assert_allclose(model.predict_on_batch(images), expected(), rtol=1e-9)

    check()
    model.train_on_batch(images, truth)
    check()
    model.get_layer("bn1").moving_variance.assign(
        model.get_layer("bn1").moving_variance.numpy() * 2
    )
    check()
    model(torch.from_numpy(images), training=True)  # moves the statistics behind our back
    check()
    model.set_weights([weight * 0.9 for weight in model.get_weights()])
    check()


@pytest.mark.parametrize("recompute", ["stage", "block"])
@pytest.mark.parametrize("name", ["2d", "series", "r2plus1d", "detached", "seresnext", "dense"])
def test_recomputation_changes_memory_and_nothing_else(name, recompute):
    results = []
    for how in (None, recompute):
        model = build(NETWORKS[name])
        images, _ = batch(model)
        function = FlatFunction(model, training=True, recompute=how)
        (function(images, function.tensors())[0] ** 2).sum().backward()
        results.append((gradients(model), states(model), function, model))
    for before, after in zip(results[0][:2], results[1][:2], strict=True):
        for path in before:
            np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    shape = results[0][3].input_shape[1:]
    most, least = (activation_bytes(result[2], shape) for result in results)
    assert least < 0.85 * most


# Strided and slab become shallow on the way: what is padded before the convolution is kept, too.
# Not in float64: its 3D convolutions on a CPU answer in another memory order, which is copied.
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["2d", "slab", "strided", "series", "detached", "seresnext", "dense"]
)
def test_saved_bytes_are_those_that_autograd_saves(name, precision):
    model = classifier(replace(NETWORKS[name], dropout=0.0), output="logits")
    images, _ = batch(model, 3)
    function = FlatFunction(model, training=True, precision=precision)
    ignored = {t.untyped_storage()._cdata for t in (*function.tensors(), images)}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in ignored:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = function(images, function.tensors())
    assert outputs[0].requires_grad
    total = sum(storage.nbytes() for storage in saved.values())
    counted = activation_bytes(function, model.input_shape[1:], 3)
    # torch's fake normalisation keeps mean and deviation in two bytes, its real one in four.
    channels = sum(int(np.prod(v.shape)) for v in model.variables if v.name == "gamma")
    assert total - counted == (4 * channels if precision == "bfloat16" else 0)


def test_a_whole_series_trains_on_a_six_gigabyte_card():
    # Weights, gradients and Adam's two moments in float32; what a step keeps; and twice the
    # largest activation for what a convolution's gradient needs beside it.
    for name in ("resnet18_3d_medicalnet", "resnet18_3d"):
        model = classifier(preset(name, (60, 256, 256, 1)), output="logits")
        weights = 16 * sum(int(np.prod(v.shape)) for v in model.trainable_variables)
        largest = 2 * 30 * 128 * 128 * 64 * 4
        for precision in ("float32", "bfloat16"):
            function = FlatFunction(model, training=True, precision=precision)
            kept = activation_bytes(function, (60, 256, 256, 1))
            assert 100 * 2**20 < kept < weights + kept + largest < 6 * 2**30


def test_the_graph_has_no_breaks():
    for name in ("2d", "series", "slab", "r2plus1d", "group", "detached", "seresnext", "dense"):
        model = build(NETWORKS[name])
        images, _ = batch(model)
        function = FlatFunction(model, training=True)
        torch._dynamo.reset()
        explained = torch._dynamo.explain(function)(images, function.tensors())
        assert explained.graph_break_count == 0 and explained.graph_count == 1, name


@pytest.mark.slow
def test_the_compiled_step_trains_equally():
    compiled, plain = build(NARROW), build(NARROW)
    choose_step(compiled, compiled=True)
    choose_step(plain, compiled=False)
    images, truth = random_batch(plain, 6)
    for model in (compiled, plain):
        model.compile(Adam(1e-3), _loss())
        model.fit(images, truth, batch_size=3, epochs=2, verbose=0, shuffle=False)
    assert_close(states(plain), states(compiled), 1e-6)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_with_a_full_head(precision):
    keras.utils.set_random_seed(0)
    spec = replace(NARROW, input_shape=(64, 64, 3))
    full = classifier(spec, output="logits")
    images, truth = random_batch(full, 16)
    keras.utils.set_random_seed(0)
    half = compile_classifier(classifier(spec, output="logits"), 1e-3, precision=precision)
    assert half.get_layer("conv1").dtype_policy.name == "float32"
    function = getattr(half, ATTRIBUTE)
    expected, found = full.predict_on_batch(images), half.predict_on_batch(images)
    assert found.dtype == np.float32
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    assert 1e-6 < difference < 0.05
    losses = half.fit(images, truth, epochs=8, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    assert all(v.dtype == "float32" for v in half.variables if "seed" not in v.path)
    is_scaled = isinstance(half.optimizer, keras.optimizers.LossScaleOptimizer)
    assert is_scaled == (precision == "float16")
    assert function.options.precision == precision


def test_precision_is_refused_where_it_is_built_in():
    model = classifier(NARROW, output="logits")
    with pytest.raises(UsageError, match="precision bfloat16: the model was built in float32"):
        compile_classifier(model, step="stock", precision="bfloat16")
    with pytest.raises(UsageError, match="recompute needs the fast steps"):
        compile_classifier(model, step="stock", recompute="stage")
    with pytest.raises(UsageError, match="exclude each other"):
        choose_step(model, recompute="stage", compiled=True)
    for name, value in (("step", "slow"), ("precision", "float8"), ("recompute", "layer")):
        with pytest.raises(UsageError, match=f"{name} is '{value}'; expected one of"):
            choose_step(model, **{name: value})
    built = classifier(NARROW, output="logits", precision="bfloat16")
    compile_classifier(built, step="stock", precision="bfloat16")


@pytest.mark.parametrize("name", ["2d", "seresnext", "dense"])
def test_mixed_policies_and_precision_agree(name):
    keras.utils.set_random_seed(0)
    by_policy = classifier(NETWORKS[name], output="logits", precision="bfloat16")
    by_step = choose_step(classifier(NETWORKS[name], output="logits"), precision="bfloat16")
    by_step.set_weights(by_policy.get_weights())
    images, _ = random_batch(by_step, 4)
    np.testing.assert_array_equal(
        by_policy.predict_on_batch(images), by_step.predict_on_batch(images)
    )


def run_out_of_memory(steps, most: int, message=None):
    """Let the inference function take at most so many samples."""
    infer, sizes = steps.functions.infer, []

    def limited(x, tensors):
        sizes.append(len(x))
        if len(x) > most:
            raise RuntimeError(message) if message else torch.OutOfMemoryError("CUDA out of memory")
        return infer(x, tensors)

    limited.tensors = infer.tensors
    steps.functions = replace(steps.functions, infer=limited)
    return sizes


def test_prediction_halves_the_batch_when_memory_runs_out():
    model = choose_step(build(NARROW))
    images, _ = random_batch(model, 11)
    expected = model.predict(images, batch_size=11, verbose=0)
    sizes = run_out_of_memory(getattr(model, ATTRIBUTE), 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = model.predict(images, batch_size=11, verbose=0)
    told = [str(w.message) for w in caught if "at a time" in str(w.message)]
    assert told == [
        "11 samples do not fit into memory at once; predicting 5 at a time.",
        "5 samples do not fit into memory at once; predicting 2 at a time.",
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert sizes == [11, 5, 2, 2, 2, 2, 2, 1]
    sizes.clear()
    model.predict(images, batch_size=11, verbose=0)
    assert sizes == [2, 2, 2, 2, 2, 1]  # it has learned

    model = choose_step(build(NARROW))
    run_out_of_memory(getattr(model, ATTRIBUTE), 0, "DefaultCPUAllocator: can't allocate memory")
    with (
        pytest.warns(UserWarning),
        pytest.raises(RuntimeError, match="can't allocate memory"),
    ):
        model.predict(images[:2], verbose=0)
    model = choose_step(build(NARROW))
    run_out_of_memory(getattr(model, ATTRIBUTE), 0, "something else")
    with pytest.raises(RuntimeError, match="something else"):
        model.predict(images, verbose=0)


def resident_bytes() -> int:
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc"
)
@pytest.mark.slow
def test_two_hundred_predictions_do_not_grow():
    model = choose_step(build(replace(NARROW, input_shape=(64, 64, 3))))
    images, _ = random_batch(model, 64)  # 3 MiB a batch
    for _ in range(20):
        model.predict(images, batch_size=64, verbose=0)
    gc.collect()
    before = resident_bytes()
    for _ in range(200):
        model.predict(images, batch_size=64, verbose=0)
    gc.collect()
    # One kept input a call would be 600 MiB.
    assert resident_bytes() - before < 50 * 2**20


# What is not covered, and what the warning says.
def _with(last):
    image = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3)(image)
    return keras.Model(image, keras.layers.Dense(6)(keras.layers.Flatten()(last(x))))


UNKNOWN = {
    "flatten is a Flatten": lambda: _with(lambda x: x),
    "is a LayerNormalization": lambda: _with(keras.layers.LayerNormalization()),
    "has an activation": lambda: _with(keras.layers.Conv2D(4, 3, activation="relu")),
    "joins no channels": lambda: _with(lambda x: keras.layers.Concatenate(1)([x, x])),
    "values of different ranks": lambda: _with(
        lambda x: keras.layers.Multiply()([x, keras.layers.GlobalAveragePooling2D()(x)])
    ),
    "average_pooling2d .* pads 'same'": lambda: _with(
        keras.layers.AveragePooling2D(2, padding="same", name="average_pooling2d")
    ),
    "pads 'same'": lambda: _with(keras.layers.Conv2D(4, 3, padding="same")),
    "is not a plain ReLU": lambda: _with(keras.layers.ReLU(negative_slope=0.1)),
    "regularises outputs": lambda: _with(keras.layers.ReLU(activity_regularizer="l2")),
    "is not the usual kind": lambda: _with(keras.layers.BatchNormalization(scale=False)),
    "has a seed or shape": lambda: _with(keras.layers.Dropout(0.5, seed=1)),
    "works on more than one axis": lambda: _with(keras.layers.Dense(2)),
    "is no sigmoid or softmax": lambda: _with(keras.layers.Activation("tanh")),
    "not a functional one with a single input": lambda: keras.Sequential([keras.layers.Dense(2)]),
}


def test_a_sum_does_not_overwrite_what_a_gradient_needs():
    image = keras.Input((8, 8, 3), dtype="float64")

    def relu(x):
        return keras.layers.ReLU(dtype="float64")(x)

    def conv(x):
        return keras.layers.Conv2D(3, 1, dtype="float64")(x)

    x = keras.layers.Add(dtype="float64")([relu(conv(image)), conv(image)])
    # A view of x, which another layer reads as well.
    other = keras.layers.Add(dtype="float64")([x[:, ::1, ::1, :], conv(x)])
    pooled = keras.layers.GlobalAveragePooling2D(dtype="float64")(relu(other))
    model = keras.Model(image, keras.layers.Dense(6, dtype="float64", name="fc")(pooled))
    images = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 8, 8, 3)))
    expected = model(images, training=True)
    expected.square().sum().backward()
    stock = gradients(model)
    function = FlatFunction(model, training=True)
    found = function(images, function.tensors())[0]
    found.square().sum().backward()
    np.testing.assert_allclose(found.detach(), expected.detach(), rtol=1e-9)
    assert_close(stock, gradients(model), 1e-8)


def num_stock(caught) -> int:
    return sum(warning.category is StockStep for warning in caught)


@pytest.mark.parametrize("reason", UNKNOWN)
def test_an_unknown_model_runs_on_keras_steps_with_one_warning(reason):
    model = UNKNOWN[reason]()
    with pytest.raises(UnknownStep, match=reason):
        read_graph(model)
    with pytest.warns(
        StockStep, match=rf"{reason}.*\. Keras' own steps are used\. They are slower"
    ) as caught:
        choose_step(model)
    assert num_stock(caught) == 1 and accelerated(model) is None
    if isinstance(model, keras.Sequential):
        return
    model.compile(Adam(1e-3), BinaryCrossEntropy(True))
    model.fit(np.zeros((4, 8, 8, 3), "float32"), np.zeros((4, 6), "float32"), verbose=0)


class Mine(keras.Model):
    def train_step(self, data):
        return super().train_step(data)


def test_a_subclass_of_the_user_runs_its_own_steps():
    plain = build(NARROW)
    model = choose_step(Mine(plain.input, plain.output))
    model.compile(Adam(1e-3), _loss())
    images, truth = random_batch(model, 4)
    with pytest.warns(StockStep, match="Mine is not Keras' own"):
        model.fit(images, truth, verbose=0)


@pytest.mark.parametrize("reason", ["run_eagerly=True", "train_step is not Keras' own"])
def test_what_cannot_be_honoured_runs_on_keras_steps_with_one_warning(reason):
    model = choose_step(build(NARROW))
    seen = []
    if reason == "run_eagerly=True":
        model.compile(Adam(1e-3), _loss(), run_eagerly=True)
    else:
        model.compile(Adam(1e-3), _loss())
        original = model.train_step
        model.train_step = lambda data: seen.append(1) or original(data)
    images, truth = random_batch(model, 4)
    with pytest.warns(StockStep, match=reason) as caught:
        model.fit(images, truth, batch_size=2, epochs=2, verbose=0)
    assert num_stock(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", StockStep)
        model.fit(images, truth, epochs=1, verbose=0)
    assert len(seen) == (5 if seen else 0)


def test_shapes_keras_refuses_are_refused_alike():
    model = choose_step(build(NARROW))
    model.compile(Adam(1e-3), _loss())
    wrong = np.zeros((2, 16, 16, 3), "float32")
    truth = np.zeros((2, 6), "float32")
    for call in (
        lambda: model.predict(wrong, verbose=0),
        lambda: model.train_on_batch(wrong, truth),
        lambda: model.evaluate(wrong, truth, verbose=0),
    ):
        with pytest.raises(ValueError, match="expected shape"):
            call()
    model.compile(Adam(1e-3), _loss(), steps_per_execution=2)
    with pytest.raises(ValueError, match="`steps_per_execution` must be 1"):
        model.fit(np.zeros((4, 32, 32, 3), "float32"), np.zeros((4, 6)), batch_size=2, verbose=0)


def test_one_value_per_channel_is_normalised_as_keras_does():
    spec = NARROW  # 32 pixels: one position in the last stage
    images, truth = random_batch(build(spec), 1)
    found = []
    for step in ("fast", "stock"):
        model = choose_step(build(spec), step)
        model.compile(Adam(1e-3, fused=step == "fast"), _loss())
        model.fit(images, truth, epochs=2, verbose=0)
        found.append({k: v for k, v in states(model).items() if "layer4_0_bn1" in k})
    assert_close(found[1], found[0], 1e-6)


def test_what_the_fused_adam_takes_is_looked_up_once(monkeypatch):
    """Head and backbone apart, too; and again where a weight lies in another order."""
    made = []
    plan = torch_adam._plan

    def counted(optimizer, variables):
        made.append(len(variables))
        return plan(optimizer, variables)

    monkeypatch.setattr(torch_adam, "_plan", counted)
    model = build(ModelSpec((16, 16, 3), depth=10, width=8))
    optimizer = Adam(1e-3, backbone_factor=0.1, head_layers=("fc",))
    optimizer.build(model.trainable_variables)

    def step():
        with torch.no_grad():
            grads = [torch.ones_like(tensor_of(v)) for v in model.trainable_variables]
            optimizer.apply(grads, model.trainable_variables)

    for _ in range(4):
        step()
    assert len(made) == 2 and sum(made) == len(model.trainable_variables)
    weight = tensor_of(model.get_layer("fc").kernel)
    weight.data = weight.data.t().contiguous().t()
    step()
    assert len(made) == 3


@pytest.mark.parametrize("as_on_a_gpu", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_fused_adam_in_any_memory_order_equals_torch(amsgrad, as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(torch_adam, "_takes_any", lambda weight: as_on_a_gpu)
    model = build(NARROW)
    choose_step(model)
    variables = model.trainable_variables
    twins = [torch.nn.Parameter(v.value.detach().clone().contiguous()) for v in variables]
    reference = torch.optim.Adam(twins, 1e-3, amsgrad=amsgrad)
    optimizer = Adam(1e-3, amsgrad=amsgrad)
    optimizer.build(variables)
    kernel = model.get_layer("conv1").kernel.value
    assert not kernel.is_contiguous() and kernel.permute(3, 0, 1, 2).is_contiguous()
    # From the beginning: laid out later, both orders would be in memory.
    assert optimizer._momentums[0].value.stride() == kernel.stride()
    torch.manual_seed(0)
    for _ in range(4):
        grads = [torch.randn(v.shape, dtype=torch.float64) for v in variables]  # C order
        for twin, grad in zip(twins, grads, strict=True):
            twin.grad = grad.clone()
        reference.step()
        optimizer.apply(grads, variables)
    for variable, twin in zip(variables, twins, strict=True):
        np.testing.assert_allclose(variable.numpy(), twin.detach().numpy(), rtol=1e-7, atol=1e-9)
    slot = optimizer._momentums[0].value
    assert slot.stride() == kernel.stride()
    # A slot that somebody replaced by another memory order is found.
    slot.data = slot.data.contiguous()
    before = variables[0].numpy().copy()
    for twin, grad in zip(twins, grads, strict=True):
        twin.grad = grad.clone()
    reference.step()
    fused_update(optimizer, grads, variables, 1e-3)
    assert np.abs(variables[0].numpy() - before).max() > 0
    np.testing.assert_allclose(variables[0].numpy(), twins[0].detach().numpy(), atol=1e-9)
    # So is a weight.
    kernel.data = kernel.data.contiguous()
    optimizer.iterations.assign_add(1)
    reference.step()
    fused_update(optimizer, grads, variables, 1e-3)
    for variable, twin in zip(variables, twins, strict=True):
        np.testing.assert_allclose(variable.numpy(), twin.detach().numpy(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slices", [2, 3, 4, 5, 6, 7, 8])
def test_shallow_volumes_have_right_gradients(slices, dtype):
    """torch's own convolution answers with 1e36, or dies, on several of these on a CPU."""
    for kernel, stride in ((7, 2), (7, (1, 2, 2)), (5, 2), (3, 1), (3, 2)):
        image = keras.Input((slices, 16, 16, 2))
        x = keras.layers.ZeroPadding3D(kernel // 2)(image)
        x = keras.layers.Conv3D(16, kernel, strides=stride, use_bias=False, dtype="float64")(x)
        model = keras.Model(image, x)
        volumes = torch.from_numpy(np.random.default_rng(0).normal(size=(2, slices, 16, 16, 2)))
        found = []
        for precision in ("float64", str(dtype).removeprefix("torch.")):
            function = FlatFunction(model, training=True, precision=precision)
            outputs = function(volumes, function.tensors())[0]
            weights = torch.linspace(-1, 1, outputs.numel(), dtype=torch.float64)
            (outputs * weights.reshape(outputs.shape)).sum().backward()
            found.append(
                (outputs.detach().double(), *map(torch.from_numpy, gradients(model).values()))
            )
        for expected, value in zip(*found, strict=True):
            difference = (value - expected).abs().max() / expected.abs().max()
            assert difference < (1e-4 if dtype is torch.float32 else 0.03), (kernel, stride)


@pytest.mark.parametrize("depth", range(1, 9))
def test_shallow_volumes_equal_the_layers(depth):
    """Every way a volume of few slices is taken: kernels deeper and shallower, odd and even,
    padded or not, strided, dilated; normalised, pooled and added to behind it."""
    count = 0
    for kernel, stride, padding, dilation in itertools.product(
        (1, 2, 3, 5, 7), (1, 2, 3), (0, 1, 2, 3), (1, 2)
    ):
        reach = dilation * (kernel - 1) + 1
        if depth + 2 * padding < reach or (dilation > 1 and stride > 1):
            continue
        count += 1
        keras.utils.set_random_seed(count)
        layers, f64 = keras.layers, {"dtype": "float64"}
        uneven = keras.initializers.RandomUniform(0.5, 1.5)
        random = {"beta_initializer": "random_normal", "gamma_initializer": uneven}
        image = keras.Input((depth, 6, 6, 3))
        x = layers.ZeroPadding3D((padding, 1, 1), **f64)(image)
        strides = {"strides": (stride, 1, 1), "dilation_rate": (dilation, 1, 1)}
        bias = {"use_bias": bool(padding % 2), "bias_initializer": "random_normal"}
        x = layers.Conv3D(4, (kernel, 3, 3), **strides, **bias, **f64)(x)
        x = layers.ReLU(**f64)(layers.BatchNormalization(**random, **f64)(x))
        x = layers.ZeroPadding3D(1, **f64)(x)
        size, step = ((3, 2), (1, 1))[count % 2]
        pooled = layers.MaxPooling3D((size, 3, 3), strides=(step, 1, 1), **f64)(x)
        x = layers.Conv3D(4, 3, padding="valid", **f64)(layers.ZeroPadding3D(1, **f64)(pooled))
        x = layers.BatchNormalization(**random, **f64)(x)
        x = layers.ReLU(**f64)(layers.Add(**f64)([x, pooled]))
        mean = layers.GlobalAveragePooling3D(**f64)(x)
        model = keras.Model(image, [x, mean])
        images = torch.randn(2, depth, 6, 6, 3)
        function = FlatFunction(model, training=True)
        results = []
        for outputs in (model(images, training=True), function(images, function.tensors())):
            weights = [torch.linspace(0.5, 2, o.numel(), dtype=o.dtype) for o in outputs]
            total = sum(
                (o * w.reshape(o.shape)).sum() for o, w in zip(outputs, weights, strict=True)
            )
            total.backward()
            results.append((outputs, gradients(model)))
        (expected, expected_gradients), (found, found_gradients) = results
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_allclose(other.detach(), one.detach(), rtol=1e-9, atol=1e-12)
        # Some are nothing but rounding: a bias before normalisation has no gradient.
        scale = max(np.abs(gradient).max() for gradient in expected_gradients.values())
        for name, one in expected_gradients.items():
            np.testing.assert_allclose(found_gradients[name], one, atol=1e-9 * scale, err_msg=name)
    assert count > 40


def test_kernels_keep_shape_and_values_when_laid_out():
    model = build(NARROW)
    before = states(model)
    choose_step(model)
    after = states(model)
    for path, value in before.items():
        assert after[path].shape == value.shape
        np.testing.assert_array_equal(after[path], value)
    kernel = model.get_layer("conv1").kernel.value
    assert not kernel.is_contiguous()
    choose_step(model, "stock")
    assert kernel.is_contiguous()
    np.testing.assert_array_equal(kernel.detach().numpy(), before["conv1/kernel"])


def test_nothing_is_copied_between_memory_layouts():
    model = build(NARROW)
    choose_step(model)
    images, _ = batch(model)
    function = getattr(model, ATTRIBUTE).functions.train
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Watch():
        function(images, function.tensors())
    copies = [name for name in seen if name in ("clone", "contiguous", "constant_pad_nd")]
    assert copies == [] and seen.count("convolution") == 20


def test_our_loss_is_refused_with_the_other_kind_of_outputs():
    for output, from_logits, message in (
        ("probabilities", True, "gives probabilities, and its loss takes logits"),
        ("logits", False, "gives logits, and its loss takes probabilities"),
    ):
        model = classifier(replace(TINY["2d"], dropout=0.0), output=output)
        choose_step(model)
        images, truth = batch(model)
        model.compile(Adam(1e-3), BinaryCrossEntropy(from_logits=from_logits))
        with pytest.raises(UsageError, match=message):
            model.fit(images, truth, verbose=0)
        model.predict(images, verbose=0)  # which needs no loss
        model.compile(Adam(1e-3), BinaryCrossEntropy(from_logits=not from_logits))
        model.fit(images, truth, verbose=0)


@pytest.mark.parametrize("step", ["fast", "stock"])
def test_weights_of_another_number_than_the_outputs_are_refused(step):
    model = build(NARROW)
    choose_step(model, step)
    images, truth = batch(model)
    model.compile(Adam(1e-3), BinaryCrossEntropy(label_weights=(1.0,) * 5))
    with pytest.raises(UsageError, match="5 label weights for 6 outputs"):
        model.fit(images, truth, verbose=0)


def test_head_layers_that_are_none_are_refused():
    model = build(NARROW)
    for head_layers, named in ((("nope", "fc"), "'nope'"), ((), r"\[\]")):
        optimizer = Adam(1e-3, backbone_factor=0.1, head_layers=head_layers)
        with pytest.raises(UsageError, match=f"head_layers.*{named}.*which own none"):
            optimizer.build(model.trainable_variables)
    Adam(1e-3, backbone_factor=0.1, head_layers=("fc",)).build(model.trainable_variables)


def test_a_model_counts_as_called_after_the_fast_steps():
    """Keras' export to ONNX asks for it."""
    model = build(NARROW)
    model._called = False
    choose_step(model)
    model.predict(batch(model)[0], verbose=0)
    assert model._called


def test_only_models_can_choose_steps():
    with pytest.raises(UsageError, match="choose_step takes a Keras model; received NoneType"):
        choose_step(None)


@pytest.fixture
def distribution():
    """Two devices of a kind that every machine has; Keras' torch backend takes any names."""
    found = keras.distribution.DataParallel(devices=["cpu:0", "cpu:1"])
    yield found
    keras.distribution.set_distribution(None)


def test_a_distribution_in_force_is_refused(distribution):
    """Neither Keras' steps nor ours would carry it out: every process would train alone."""
    message = r"a keras.distribution is in force \(DataParallel\)"
    model = choose_step(build(NARROW))
    model.compile(Adam(1e-3), _loss())
    images, truth = random_batch(model, 2)
    keras.distribution.set_distribution(distribution)
    before = states(model)
    for call in (
        lambda: model.fit(images, truth, verbose=0),
        lambda: model.train_on_batch(images, truth),
        lambda: model.evaluate(images, truth, verbose=0),
        lambda: model.predict(images, verbose=0),
        lambda: choose_step(model),
        lambda: choose_step(model, "stock"),
    ):
        with pytest.raises(UsageError, match=message):
            call()
    for path, value in states(model).items():
        np.testing.assert_array_equal(value, before[path])
    keras.distribution.set_distribution(None)
    model.fit(images, truth, verbose=0)


def test_the_reason_for_keras_steps_is_only_an_answer():
    """It writes nothing, on a model that is covered and on one that is not, and does not warn."""
    model = choose_step(build(NARROW))
    model.compile(Adam(1e-3), _loss())
    steps = getattr(model, ATTRIBUTE)
    for change, expected in (
        (lambda: None, None),
        (lambda: setattr(model.get_layer("conv1"), "trainable", False), None),
        (lambda: setattr(model.get_layer("conv1"), "activation", keras.ops.tanh), "activation"),
        (lambda: setattr(model, "run_eagerly", True), "run_eagerly=True"),
    ):
        change()
        before, hung = dict(vars(steps)), set(vars(model))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reason = steps.reason_for_stock("train")
        assert reason == expected if expected is None else expected in reason
        assert vars(steps) == before and set(vars(model)) == hung


def test_every_attribute_of_the_steps_is_there_from_the_beginning():
    model = choose_step(build(NARROW))
    steps = getattr(model, ATTRIBUTE)
    names = set(vars(type(steps)(model, steps.options)))
    compile_and_use(model)
    assert set(vars(steps)) == names


def compile_and_use(model):
    model.compile(Adam(1e-3), _loss(label_weights=RSNA_WEIGHTS))
    images, truth = random_batch(model, 2)
    model.fit(images, truth, verbose=0)
    model.evaluate(images, truth, verbose=0)
    model.predict(images, verbose=0)
