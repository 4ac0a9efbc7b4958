"""Windows that are trained with the network: the same as fixed ones until they move, in float32."""

import json
import math

import keras
import numpy as np
import pytest

from ich_keras import get_windows
from ich_keras.config import DataConfig, RunConfig
from ich_keras.ct.window import WINDOWS, Window
from ich_keras.data.drawn_inputs import drawn_inputs
from ich_keras.data.draws import draw, no_draws
from ich_keras.data.inputs import slice_input, volume_input
from ich_keras.data.intensity import THESIS_NORMALISATION, intensity_of
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.explanation import explain
from ich_keras.models.classifier import build_classifier, classifier, compile_classifier, freeze
from ich_keras.models.cost import cost
from ich_keras.models.loss import BinaryCrossEntropy
from ich_keras.models.presets import PRESETS, preset
from ich_keras.models.spec import ModelSpec
from ich_keras.models.steps import built_precision, choose_step
from ich_keras.models.weights import load_weights, save_weights
from ich_keras.models.window_layers import apply_windows
from ich_keras.models.windows import WINDOW_LAYERS, LearnedWindows, in_hu
from ich_keras.recipe import Recipe
from weights_convert.state import spec_of_file

TORCH = keras.backend.backend() == "torch"
on_torch = pytest.mark.skipif(not TORCH, reason="the fast steps are torch's")
SHAPES = {2: (32, 32), 3: (3, 32, 32)}
STRIDES = {
    "stem_stride": (1, 2, 2),
    "pool_kernel": (1, 3, 3),
    "pool_stride": (1, 2, 2),
    "strides": (1, (1, 2, 2), (1, 2, 2), (1, 2, 2)),
}


def spec_of(rank, windows=None, **changes):
    shape = (*SHAPES[rank], 3 if windows is None else 1)
    settings = {"depth": 10, "width": 8, "dropout": 0.0, **(STRIDES if rank == 3 else {})}
    return ModelSpec(shape, windows=windows, **(settings | changes))


def hu_of(rank, count=3, seed=0):
    """Tissue, with air, bone, metal and what lies beyond the range."""
    random = np.random.default_rng(seed)
    hu = random.normal(40, 60, (count, *SHAPES[rank]))
    far = random.random(hu.shape) < 0.2
    hu[far] = random.uniform(-2000, 4000, far.sum())
    return hu.astype(np.int16)


def inputs_of(hu, rank, intensity):
    return (slice_input if rank == 2 else volume_input)(hu, None, intensity)


def with_weights_of(model, other):
    for layer in other.layers:
        if layer.weights:
            model.get_layer(layer.name).set_weights(layer.get_weights())
    return model


def with_moved_windows(model, seed=1):
    """Put the windows where a training might."""
    layer = model.get_layer("windows")
    random = np.random.default_rng(seed)
    layer.set_weights([w + random.uniform(-0.1, 0.1, w.shape) for w in layer.get_weights()])
    return model


def test_they_begin_as_the_fixed_ones():
    made = LearnedWindows("linear")
    assert made.start == tuple((window.level, window.width) for window in WINDOWS)
    assert (made.mean, made.std) == (THESIS_NORMALISATION.mean, THESIS_NORMALISATION.std)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_input_is_hu_to_the_last_bit(device):
    hu = np.arange(-(2**15), 2**15, dtype=np.int16).reshape(1, 1, 256, 256)
    if device is None:
        found = drawn_inputs(hu, no_draws(1), intensity_of("hu"), is_volume=False)
        assert np.array_equal(found, slice_input(hu[:, 0], None, "hu"))
    else:
        from ich_keras.data.device_inputs import DeviceInputs, RawBatch

        maker = DeviceInputs(device, intensity_of("hu"), False, 256)
        batch = RawBatch(hu, no_draws(1), np.zeros((1, 6), np.float32))
        found = maker.make(maker.send(batch))[0].numpy()
    assert found.dtype == np.float32
    assert np.array_equal(found[0, ..., 0], np.clip(hu[0, 0], -1024, 3072))


@pytest.mark.parametrize("step", ["fast", "stock"])
@pytest.mark.parametrize("rank", [2, 3])
def test_untrained_linear_ones_answer_as_the_fixed_ones(rank, step):
    hu = hu_of(rank)
    fixed = choose_step(classifier(spec_of(rank), "logits"), step)
    learned = choose_step(
        with_weights_of(classifier(spec_of(rank, "linear"), "logits"), fixed), step
    )
    expected = fixed.predict(inputs_of(hu, rank, "windows"), verbose=0)
    found = learned.predict(inputs_of(hu, rank, "hu"), verbose=0)
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())
    assert np.ptp(expected, axis=0).min() > 1e-3  # answers that depend on the input


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("kind", ["linear", "sigmoid"])
def test_the_windows_are_what_is_said(kind, rank):
    """Against NumPy in float64, from level and width alone."""
    hu = hu_of(rank)
    image = keras.Input((*SHAPES[rank], 1))
    model = with_moved_windows(keras.Model(image, apply_windows(image, LearnedWindows(kind))))
    found = model.predict(inputs_of(hu, rank, "hu"), verbose=0)
    clipped = np.clip(hu, -1024, 3072).astype(np.float64)
    for number, window in enumerate(get_windows(model)):
        if kind == "linear":
            grey = np.clip((clipped - window.low) / window.width, 0, 1)
        else:  # Lee et al.: w = 2/width log(U/e - 1), b = -2 level/width log(U/e - 1)
            power = 2 / window.width * math.log(255 / 1 - 1)
            grey = 1 / (1 + np.exp(-(power * clipped - power * window.level)))
        expected = (grey - THESIS_NORMALISATION.mean[number]) / THESIS_NORMALISATION.std[number]
        np.testing.assert_allclose(found[..., number], expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["linear", "sigmoid"])
def test_they_move_to_where_the_answer_is(kind):
    """Images of one HU each, and the grey value that another window would give them."""
    start = LearnedWindows(kind, start=((40.0, 80.0),), mean=(0.0,), std=(1.0,))
    truth = LearnedWindows(kind, start=((60.0, 100.0),), mean=(0.0,), std=(1.0,))
    hu = np.linspace(-50, 200, 64, dtype=np.float32).reshape(-1, 1, 1, 1) * np.ones((1, 8, 8, 1))
    models = []
    for windows in (start, truth):
        image = keras.Input((8, 8, 1))
        pooled = keras.layers.GlobalAveragePooling2D(data_format="channels_last")
        models.append(choose_step(keras.Model(image, pooled(apply_windows(image, windows)))))
    model, target = models[0], models[1].predict(hu, verbose=0)
    model.compile(keras.optimizers.Adam(5e-3), "mse")
    ways = [get_windows(model)[0]]
    for epochs in (4, 150):
        model.fit(hu, target, batch_size=32, epochs=epochs, verbose=0)
        ways.append(get_windows(model)[0])
    assert ways[0] == Window(40.0, 80.0)
    assert 40 < ways[1].level < 60 and 80 < ways[1].width < 100
    assert ways[2].level == pytest.approx(60, abs=2) and ways[2].width == pytest.approx(100, abs=4)


def test_a_step_is_as_long_as_promised():
    """The docstring's figures: HU per step of 0.001 in bias or kernel."""
    made = LearnedWindows("linear")
    for change, of in ((1e-3, "bias"), (1e-3, "kernel")):
        kernel, bias = np.array(made.kernel), np.array(made.bias)
        found = in_hu(kernel + change * (of == "kernel"), bias + change * (of == "bias"), 40, 128)
        for (level, width), (was, width_was) in zip(found, made.start, strict=True):
            if of == "bias":
                assert was - level == pytest.approx(1e-3 * width_was, rel=1e-3)
            else:
                assert width_was - width == pytest.approx(1e-3 * width_was**2 / 128, rel=0.01)
                assert abs(was - level) < 1e-3 * max(1.0, abs(was - 40) * width_was / 128)


@on_torch
@pytest.mark.parametrize("kind", ["linear", "sigmoid"])
@pytest.mark.parametrize("rank", [2, 3])
def test_the_fast_steps_train_them_as_keras_does(rank, kind):
    """Before a network without corners: in a ResNet, rounding decides which units are on."""
    hu = inputs_of(hu_of(rank, 4), rank, "hu")
    labels = np.random.default_rng(0).integers(0, 2, (4, 6)).astype(np.float32)
    found = {}
    for step in ("fast", "stock"):
        keras.utils.set_random_seed(0)
        image = keras.Input(hu.shape[1:])
        conv = getattr(keras.layers, f"Conv{rank}D")(8, 3, use_bias=False)
        pool = getattr(keras.layers, f"GlobalAveragePooling{rank}D")()
        x = keras.layers.Dense(6)(pool(conv(apply_windows(image, LearnedWindows(kind)))))
        model = choose_step(with_moved_windows(keras.Model(image, x)), step)
        model.compile(keras.optimizers.SGD(0.5), BinaryCrossEntropy())
        for _ in range(5):
            model.train_on_batch(hu, labels)
        found[step] = [keras.ops.convert_to_numpy(v) for v in model.get_layer("windows").weights]
    for fast, stock, start in zip(
        found["fast"],
        found["stock"],
        (LearnedWindows(kind).kernel, LearnedWindows(kind).bias),
        strict=True,
    ):
        np.testing.assert_allclose(fast, stock, atol=2e-6)
        assert np.abs(fast - start).max() > 1e-3


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_they_stay_in_float32(precision):
    model = classifier(spec_of(2, "linear"), "logits", precision=precision)
    found = {layer.name: layer.compute_dtype for layer in model.layers}
    assert {found[name] for name in WINDOW_LAYERS if name in found} == {"float32"}
    assert found["conv1"] == precision
    assert built_precision(model) == precision
    assert built_precision(classifier(spec_of(2, "linear"))) == "float32"


@on_torch
@pytest.mark.parametrize("asked", [None, "bfloat16"])
def test_the_fast_steps_keep_them_in_float32(asked):
    """Whatever was built, and whatever is asked for later."""
    from ich_keras.models.torch.function import FlatFunction

    hu = inputs_of(hu_of(2), 2, "hu")
    model = classifier(spec_of(2, "linear"), "logits", "bfloat16" if asked is None else None)
    cut = keras.Model(model.input, [model.get_layer(WINDOW_LAYERS[-1]).output, model.output])
    function = FlatFunction(cut, training=False, precision=asked)
    windows, logits = function(keras.ops.convert_to_tensor(hu), function.tensors())
    expected = inputs_of(hu_of(2), 2, "windows")
    np.testing.assert_allclose(windows.detach().numpy(), expected, atol=1e-6)
    assert logits.dtype.itemsize == 4
    # The backbone does round.
    full = FlatFunction(cut, training=False, precision="float32")
    apart = full(keras.ops.convert_to_tensor(hu), full.tensors())[1] - logits
    assert np.abs(apart.detach().numpy()).max() > 1e-4


@pytest.mark.parametrize("kind", ["linear", "sigmoid"])
def test_a_saved_network_is_keras_own(kind, tmp_path):
    model = with_moved_windows(classifier(spec_of(2, kind)))
    model.save(tmp_path / "model.keras")
    config = json.dumps(model.get_config())
    assert "ich_keras" not in config
    loaded = keras.models.load_model(tmp_path / "model.keras")
    hu = inputs_of(hu_of(2), 2, "hu")
    np.testing.assert_allclose(
        loaded.predict(hu, verbose=0), model.predict(hu, verbose=0), atol=1e-6
    )
    assert get_windows(loaded) == get_windows(model) != get_windows(classifier(spec_of(2, kind)))


def test_weights_of_fixed_windows_fit_and_learned_ones_only_their_kind(tmp_path):
    specs = {None: spec_of(2), "linear": spec_of(2, "linear"), "sigmoid": spec_of(2, "sigmoid")}
    for kind, spec in specs.items():
        model = classifier(spec)
        moved = model if kind is None else with_moved_windows(model)
        save_weights(moved, tmp_path / f"{kind}.weights.h5", {"network": spec.to_dict()})
    fresh = classifier(specs["sigmoid"])
    found = load_weights(fresh, tmp_path / "None.weights.h5", specs["sigmoid"])
    assert found.fresh == ("windows",) and "conv1" in found.loaded
    assert get_windows(fresh)[0] == Window(40.0, 80.0)
    same = classifier(specs["linear"])
    assert load_weights(same, tmp_path / "linear.weights.h5", specs["linear"]).fresh == ()
    assert get_windows(same)[0] != Window(40.0, 80.0)
    for other in ("linear", None):
        model = classifier(specs[other])
        with pytest.raises(DataError, match=rf"windows sigmoid \(file\), {other} ") as caught:
            load_weights(model, tmp_path / "sigmoid.weights.h5", specs[other])
        assert "--windows" in caught.value.hint
    with pytest.raises(DataError, match="missing in the file: windows"):
        load_weights(fresh, tmp_path / "None.weights.h5", specs["sigmoid"], needs_head=True)
    one = ModelSpec((32, 32, 1), depth=10, width=8)
    save_weights(classifier(one), tmp_path / "one.weights.h5", {"network": one.to_dict()})
    wide = spec_of(2, "linear")
    with pytest.raises(DataError, match=r"channels 1 \(file\), 3 \(network\)") as caught:
        load_weights(classifier(wide), tmp_path / "one.weights.h5", wide)
    assert "--channels 3" in caught.value.hint
    from ich_keras.models.weights_file import read_weights

    with pytest.raises(DataError, match=r"learnable windows \(linear\): nothing converts"):
        spec_of_file(read_weights(tmp_path / "linear.weights.h5"))


@pytest.mark.parametrize("name", ["resnet18_2d", "resnet18_3d_slab", "resnet10_3d", "r3d_18"])
def test_every_preset_takes_them(name):
    spec = preset(name, windows="linear")
    assert spec.input_shape == (*PRESETS[name].spec.input_shape[:-1], 1)
    assert spec.stem_channels == 3
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    recipe = Recipe.of(RunConfig(preset=name, windows="sigmoid", device="cpu"))
    assert recipe.inputs.intensity == intensity_of("hu")
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.of(recipe.as_config()) == recipe


def test_a_specification_of_before_has_none():
    content = spec_of(2).to_dict()
    del content["windows"]
    assert ModelSpec.from_dict(content) == spec_of(2)


def test_the_optimiser_lets_them_go_at_the_full_rate_and_without_decay():
    labels = np.zeros((4, 6), np.float32)
    hu = inputs_of(hu_of(2, 4), 2, "hu")

    def kernels(**settings):
        keras.utils.set_random_seed(0)
        model = compile_classifier(classifier(spec_of(2, "linear"), "logits"), 1e-2, **settings)
        model.train_on_batch(hu, labels)
        return (
            keras.ops.convert_to_numpy(model.get_layer(name).kernel).ravel()
            for name in ("windows", "conv1", "fc")
        )

    start = np.array(LearnedWindows("linear").kernel)
    plain, decayed, slow = kernels(), kernels(weight_decay=1.0), kernels(backbone_factor=0.01)
    windows, conv, _ = plain
    windows_decayed, conv_decayed, _ = decayed
    windows_slow, conv_slow, _ = slow
    np.testing.assert_allclose(np.abs(windows - start), 1e-2, rtol=0.01)  # Adam's first step
    np.testing.assert_array_equal(windows_decayed, windows)
    assert np.abs(conv_decayed - conv).max() > 1e-4
    np.testing.assert_array_equal(windows_slow, windows)
    assert np.abs(conv_slow - conv).max() > 5e-3


def test_freezing_leaves_them_free():
    model = classifier(spec_of(2, "linear"))
    freeze(model, "layer4")
    assert [v.path.split("/")[0] for v in model.trainable_variables] == [
        "windows",
        "windows",
        "fc",
        "fc",
    ]
    compile_classifier(model, 1e-2, backbone_factor=0.5)
    hu = inputs_of(hu_of(2, 4), 2, "hu")
    model.train_on_batch(hu, np.ones((4, 6), np.float32))
    assert get_windows(model)[0] != Window(40.0, 80.0)
    model.get_layer("windows").trainable = False
    compile_classifier(model, 1e-2, backbone_factor=0.5)
    before = get_windows(model)
    model.train_on_batch(hu, np.ones((4, 6), np.float32))
    assert get_windows(model) == before


def test_what_it_costs():
    fixed, learned = cost(classifier(spec_of(2))), cost(classifier(spec_of(2, "linear")))
    assert learned.parameters - fixed.parameters == 6
    assert learned.multiply_adds - fixed.multiply_adds == 32 * 32 * 3


def test_augmentation_moves_hu_and_leaves_them_what_they_are():
    seeds = list(range(40))
    drawn, plain = draw(seeds, 32), draw(seeds, 32, changes_grey=False)
    assert (drawn.contrast != 1).any() and (plain.contrast == 1).all()
    assert (plain.brightness == 0).all()
    for name in ("flips", "is_moved", "matrices"):
        assert np.array_equal(getattr(drawn, name), getattr(plain, name))


@pytest.mark.parametrize("augment", ["fast", "thesis"])
def test_batches_of_hu(phantom_cache, augment):
    from ich_keras.data.batches import slice_batches

    found = {
        intensity: next(
            iter(
                slice_batches(
                    phantom_cache, batch_size=24, seed=3, augment=augment, intensity=intensity
                )
            )
        )[0]
        for intensity in ("hu", "wide")
    }
    hu = np.asarray(found["hu"])
    assert hu.shape == (24, 48, 48, 1)
    assert -1024 <= hu.min() < -900 and hu.max() > 500
    # The same movements as for other intensities; half of those also changed the grey values.
    wide = np.clip((hu + 1000) / 1400, 0, 1) - 0.25
    same = np.abs(np.asarray(found["wide"]) - wide).max(axis=(1, 2, 3)) < 0.02
    assert 4 <= same.sum() <= 20


@on_torch
@pytest.mark.parametrize("kind", ["linear", "sigmoid"])
def test_heat_maps_add_up_behind_them(kind):
    """Completeness: integrated gradients add up to the difference of two logits."""
    from ich_keras.relevance import MapOptions

    model = with_moved_windows(classifier(spec_of(2, kind), "logits"))
    hu = inputs_of(hu_of(2, 2), 2, "hu")
    air = np.full((1, 32, 32, 1), -1024, np.float32)
    options = MapOptions("integrated-gradients", steps=200, signed=True)
    found = explain(model, hu, None, options, baseline=air[0])
    sums = np.stack([values.sum(axis=(1, 2)) for values in found.values()], axis=1)
    expected = model.predict(hu, verbose=0) - model.predict(air, verbose=0)
    np.testing.assert_allclose(sums, expected, atol=0.02 * np.abs(expected).max())
    assert explain(model, hu, "any")["any"].shape == (2, 32, 32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: spec_of(2, "cubic"), "windows is 'cubic'; expected .*linear.*sigmoid"),
        (lambda: ModelSpec((32, 32, 3), windows="linear"), "expected 1 as its last length"),
        (lambda: LearnedWindows("linear", start=((40, 0),) * 3), "width above 0"),
        (lambda: LearnedWindows("linear", mean=(0.1,)), "as many means"),
        (lambda: LearnedWindows("sigmoid", edge=0.7), "an edge between"),
        (lambda: LearnedWindows.of({"kind": "linear", "tilt": 3}), "expected a kind and any of"),
        (lambda: RunConfig(windows="cubic"), "windows is 'cubic'; expected"),
        (
            lambda: RunConfig(windows="linear", data=DataConfig(intensity="wide")),
            "data.intensity is 'wide' with windows 'linear'",
        ),
        (lambda: build_classifier("resnet10_2d", windows="cubic"), "windows is 'cubic'"),
        (lambda: get_windows(classifier(spec_of(2))), "has no learnable windows"),
    ],
)
def test_what_cannot_be_is_named(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize(
    ("kernel", "bias", "message"),
    [
        (-0.1, 0.5, "window 2 of 3 .* width -1280 HU"),
        (0.0, 0.5, "window 2 of 3 .* width inf HU"),
        (math.nan, 0.5, "window 2 of 3 .* width nan"),
        (0.64, math.inf, "window 2 of 3 .* level -inf"),
    ],
)
def test_a_window_that_is_none_is_named(kernel, bias, message):
    model = classifier(spec_of(2, "linear"))
    layer = model.get_layer("windows")
    kernels, biases = layer.get_weights()
    kernels[..., 1], biases[1] = kernel, bias
    layer.set_weights([kernels, biases])
    with pytest.raises(DataError, match=message):
        get_windows(model)


def test_a_recipe_of_windows_needs_hu():
    content = Recipe.of(RunConfig(windows="linear", device="cpu")).to_dict()
    content["inputs"]["intensity"] = intensity_of("wide").to_dict()
    with pytest.raises(StaleError, match="learns windows and takes HU; its input is 'wide'"):
        Recipe.from_dict(json.loads(json.dumps(content)))
