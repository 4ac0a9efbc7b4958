"""Heat maps on cells: where the cells lie, and the numbers, against torch's own hooks."""

import keras
import numpy as np
import pytest
import torch
from keras import layers

from ich_keras import explain, relevance
from ich_keras.errors import DataError, UsageError
from ich_keras.labels import label_set
from ich_keras.models.classifier import classifier
from ich_keras.models.cut import cut_model
from ich_keras.models.graph import UnknownStep, read_graph
from ich_keras.models.receptive import CellAxis, cell_axes
from ich_keras.models.spec import ModelSpec
from ich_keras.relevance import MapOptions, Relevance

PLAIN = ModelSpec((67, 64, 3), depth=10, width=4)
BOTTLENECK = ModelSpec((40, 33, 1), depth=50, width=2)
DILATED = ModelSpec(
    (7, 41, 36, 1), depth=10, shortcut="A", strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), width=2
)
SLAB = ModelSpec(
    (5, 33, 40, 1),
    depth=10,
    stem_stride=(1, 2, 2),
    pool_kernel=(1, 3, 3),
    pool_stride=(1, 2, 2),
    strides=(1, (1, 2, 2), (1, 2, 2), (1, 2, 2)),
    width=2,
)
FACTORISED = ModelSpec(
    (6, 24, 21, 1),
    depth=10,
    naming="video",
    factorised=True,
    stem_kernel=(3, 7, 7),
    stem_stride=(1, 2, 2),
    pool_kernel=None,
    width=2,
)
SERESNEXT = ModelSpec((67, 64, 3), depth=14, width=4, architecture="seresnext")
NETWORKS = {
    "plain": PLAIN,
    "bottleneck": BOTTLENECK,
    "dilated": DILATED,
    "slab": SLAB,
    "factorised": FACTORISED,
    "dense": ModelSpec((70, 45, 1), depth=21, width=4, architecture="densenet"),
}


def network(spec, seed=0, **settings):
    """A classifier with weights and statistics as after a training."""
    keras.utils.set_random_seed(seed)
    model = classifier(spec, **settings)
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            shape = layer.gamma.shape
            gamma, variance = rng.uniform(0.5, 1.5, (2, *shape))
            beta, mean = rng.normal(0, 0.2, (2, *shape))
            layer.set_weights([gamma, beta, mean, variance])
    return model


def inputs_for(spec, count=2, seed=0):
    return np.random.default_rng(seed).normal(size=(count, *spec.input_shape)).astype(np.float32)


def fields_by_nan(model, axis, length):
    """What each cell sees along an axis: sample r has NaN in place r of it, which spreads."""
    shape = tuple(model.inputs[0].shape[1:])
    batch = np.ones((length, *shape), np.float32)
    for place in range(length):
        index = [slice(None)] * len(shape)
        index[axis] = place
        batch[(place, *index)] = np.nan
    with torch.no_grad():
        found = model(batch, training=False).numpy()
    others = tuple(a for a in range(1, found.ndim) if a != axis + 1)
    return np.isnan(found).any(axis=others)  # (places, cells)


@pytest.mark.parametrize("layer", ["stem", "layer1", "layer3", "layer4"])
@pytest.mark.parametrize("name", NETWORKS)
def test_cells_see_what_they_are_said_to_see(name, layer):
    model = network(NETWORKS[name])
    cut = cut_model(model, layer)
    axes = cell_axes(graph := read_graph(cut), graph.outputs[0], NETWORKS[name].rank)
    features = keras.Model(model.input, cut.outputs[0])
    for number, axis in enumerate(axes):
        length = NETWORKS[name].input_shape[number]
        seen = fields_by_nan(features, number, length)
        for cell, places in enumerate(seen.T):
            found = np.flatnonzero(places)
            low, high = axis.low + axis.step * cell, axis.high + axis.step * cell
            assert (found[0], found[-1]) == (max(low, 0), min(high, length - 1))


def test_a_gate_on_the_whole_image_moves_no_cell():
    """Blocks of the same kernels and strides, without and with squeeze-and-excitation."""
    axes = []
    for settings in ({}, {"architecture": "seresnext"}):
        model = classifier(ModelSpec((64, 64, 3), depth=50, width=2, **settings))
        cut = cut_model(model, "layer4")
        axes.append(cell_axes(graph := read_graph(cut), graph.outputs[0], 2))
    assert axes[0] == axes[1]
    assert axes[0][0].step == 32 and axes[0][0].width == 427


def test_uneven_padding_moves_the_middle():
    image = keras.Input((20, 20, 1))
    x = layers.ZeroPadding2D(((0, 3), (2, 1)))(image)
    x = layers.Conv2D(1, (4, 3), strides=(3, 2), dilation_rate=1, name="conv")(x)
    model = keras.Model(image, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))
    cut = cut_model(model, "conv")
    graph = read_graph(cut)
    rows, columns = cell_axes(graph, graph.outputs[0], 2)
    assert rows == CellAxis(3, 0, 3) and columns == CellAxis(2, -2, 0)
    assert (rows.centre, columns.centre) == (1.5, -1.0)


def test_what_has_no_place_is_refused():
    image = keras.Input((9, 9, 1))
    one = layers.Conv2D(2, 1, strides=3)(image)
    other = layers.Conv2D(2, 3, strides=2)(image)[:, :3, :3]
    both = layers.Add(name="both")([one, other])
    model = keras.Model(image, layers.Dense(2)(layers.GlobalAveragePooling2D()(both)))
    with pytest.raises(UsageError, match="this network cannot be explained: operation"):
        Relevance(model, MapOptions(layer="both"))
    other = layers.Conv2D(2, 1, strides=4)(image)
    both = layers.Add(name="sum")([layers.Conv2D(2, 7, strides=4)(image)[:, ::1], other[:, :1, :1]])
    graph = read_graph(network(PLAIN))
    with pytest.raises(UnknownStep, match="has no rows and columns"):
        cell_axes(graph, graph.outputs[0], 2)


class TorchToy(torch.nn.Module):
    """The same small network in torch's own layers."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.second = torch.nn.Conv2d(4, 5, 3, dilation=2, padding=2)
        self.third = torch.nn.Conv2d(5, 5, 3)
        self.head = torch.nn.Linear(5, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x))
        x = torch.relu(self.third(x))
        return self.head(x.mean(dim=(2, 3)))


def toy_pair():
    torch.manual_seed(3)
    toy = TorchToy()
    image = keras.Input((19, 22, 2))
    x = layers.Conv2D(4, 3, strides=2, name="first")(layers.ZeroPadding2D(1)(image))
    x = layers.Conv2D(5, 3, dilation_rate=2, name="second")(
        layers.ZeroPadding2D(2)(layers.ReLU()(x))
    )
    x = layers.Conv2D(5, 3, name="third")(layers.ReLU(name="tapped")(x))
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(x))
    model = keras.Model(image, layers.Dense(3, name="head")(x))
    for name in ("first", "second", "third"):
        part = getattr(toy, name)
        kernel = part.weight.detach().permute(2, 3, 1, 0).numpy()
        model.get_layer(name).set_weights([kernel, part.bias.detach().numpy()])
    model.get_layer("head").set_weights(
        [toy.head.weight.detach().numpy().T, toy.head.bias.detach().numpy()]
    )
    return toy, model


@pytest.mark.parametrize("method", ["gradcam", "hirescam"])
def test_the_numbers_are_those_of_torch_hooks(method):
    toy, model = toy_pair()
    x = np.random.default_rng(1).normal(size=(2, 19, 22, 2)).astype(np.float32)
    kept = {}

    def keep(module, args):
        kept["features"] = args[0]
        args[0].register_hook(lambda gradient: kept.__setitem__("gradient", gradient))

    toy.third.register_forward_pre_hook(keep)
    found = Relevance(model, MapOptions(method, "tapped")).maps(x, [2, 0], x[0])
    for number, label in enumerate([2, 0]):
        toy(torch.from_numpy(x).permute(0, 3, 1, 2))[:, label].sum().backward()
        features, gradient = kept["features"].detach(), kept["gradient"]
        if method == "gradcam":
            gradient = gradient.mean(dim=(2, 3), keepdim=True)
        expected = (features * gradient).sum(dim=1).numpy()
        np.testing.assert_allclose(found[number], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer", ["maxpool", "layer2", "layer3"])
@pytest.mark.parametrize("name", ["plain", "dilated", "slab", "bottleneck", "dense", "seresnext"])
def test_the_numbers_are_those_of_the_keras_layers(name, layer):
    spec = SERESNEXT if name == "seresnext" else NETWORKS[name]
    model, x = network(spec), inputs_for(spec)
    features, logits = cut_model(model, layer)(x, training=False)
    (gradient,) = torch.autograd.grad(logits[:, 3].sum(), features)
    features, gradient = features.detach().numpy(), gradient.numpy()
    found = Relevance(model, MapOptions("hirescam", layer)).maps(x, [3], x[0])
    expected = (features * gradient).sum(axis=-1)
    np.testing.assert_allclose(found[0], expected, rtol=2e-3, atol=1e-5 * np.abs(expected).max())
    found = Relevance(model, MapOptions("gradcam", layer)).maps(x, [3], x[0])
    spatial = tuple(range(1, features.ndim - 1))
    expected = (features * gradient.mean(axis=spatial, keepdims=True)).sum(axis=-1)
    np.testing.assert_allclose(found[0], expected, rtol=2e-3, atol=1e-5 * np.abs(expected).max())


def test_the_last_features_add_up_to_the_logit():
    model = network(PLAIN, output="logits")
    x = inputs_for(PLAIN, 3)
    logits = np.asarray(model.predict_on_batch(x))
    model.get_layer("fc").bias.assign(np.arange(6, dtype=np.float32))
    hirescam = Relevance(model, MapOptions("hirescam", "layer4")).maps(x, list(range(6)), x[0])
    np.testing.assert_allclose(hirescam.sum(axis=(2, 3)).T, logits, rtol=1e-4, atol=1e-5)
    gradcam = Relevance(model, MapOptions("gradcam", "layer4")).maps(x, list(range(6)), x[0])
    np.testing.assert_allclose(gradcam, hirescam, rtol=1e-4, atol=1e-6)
    earlier = [
        Relevance(model, MapOptions(method, "layer3")).maps(x, [0], x[0])
        for method in ("gradcam", "hirescam")
    ]
    assert np.abs(earlier[0] - earlier[1]).max() > 0.05 * np.abs(earlier[1]).max()


def test_integrated_gradients_add_up_to_the_difference():
    spec = ModelSpec((33, 32, 3), depth=10, width=4)
    model, x = network(spec, output="logits"), inputs_for(spec, 2)
    baseline = np.full(spec.input_shape, -0.5, np.float32)
    logits = np.asarray(model.predict_on_batch(np.stack([*x, baseline])))
    differences = logits[:2] - logits[2]
    gaps = []
    for steps in (20, 300):
        options = MapOptions("integrated-gradients", steps=steps, signed=True, batch_size=50)
        found = explain(model, x, method=options, baseline=baseline)
        sums = np.stack([map_.sum(axis=(1, 2)) for map_ in found.values()], axis=1)
        gaps.append(np.abs(sums - differences).max() / np.abs(differences).max())
    assert gaps[1] < 0.02 and gaps[1] < gaps[0] / 3


def linear_network(weights, bias=0.7):
    image = keras.Input((4, 5, 1))
    kernel = layers.Conv2D(1, (4, 5), use_bias=False, name="all")
    model = keras.Model(
        image, layers.Dense(1, name="fc")(layers.GlobalAveragePooling2D()(kernel(image)))
    )
    kernel.set_weights([weights.reshape(4, 5, 1, 1)])
    model.get_layer("fc").set_weights([np.array([[2.0]]), np.array([bias])])
    return model


@pytest.mark.parametrize("steps", [2, 9])
def test_a_linear_network_is_explained_by_hand(steps):
    rng = np.random.default_rng(0)
    weights, x = rng.normal(size=(4, 5)), rng.normal(size=(3, 4, 5, 1))
    options = MapOptions("integrated-gradients", steps=steps, signed=True)
    found = explain(linear_network(weights), x, method=options, baseline=1.5)
    ((_, map_),) = found.items()
    np.testing.assert_allclose(map_, 2 * weights * (x[..., 0] - 1.5), rtol=1e-5, atol=1e-6)
    unsigned = explain(linear_network(weights), x, method="integrated-gradients", baseline=1.5)
    ((_, positive),) = unsigned.items()
    np.testing.assert_allclose(positive, np.maximum(map_, 0), rtol=1e-4, atol=1e-5)


def test_a_softmax_is_explained_by_its_logits():
    three = label_set(("a", "b", "c"), exclusive=True)
    softmax = network(PLAIN, labels=three)
    logits = network(PLAIN, labels=three, output="logits")
    logits.set_weights(softmax.get_weights())
    x = inputs_for(PLAIN)
    for method in (MapOptions("hirescam", "layer3"), MapOptions("integrated-gradients", steps=3)):
        one, other = (explain(model, x, "b", method)["b"] for model in (softmax, logits))
        assert one.max() > 0
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_maps_are_float32_whatever_the_network_computes_in(precision):
    full, half = network(PLAIN), network(PLAIN, precision=precision)
    half.set_weights(full.get_weights())
    x = inputs_for(PLAIN)
    for method in ("hirescam", MapOptions("integrated-gradients", steps=3)):
        one, other = (explain(model, x, "any", method)["any"] for model in (full, half))
        assert one.dtype == other.dtype == np.float32
        np.testing.assert_array_equal(one, other)


def test_a_single_cell_shows_where_its_field_has_its_middle():
    """The kernel looks at one pixel of its field: only the cell around an impulse answers."""
    image = keras.Input((31, 28, 1))
    x = layers.Conv2D(1, 5, strides=3, use_bias=False, name="conv")(layers.ZeroPadding2D(1)(image))
    model = keras.Model(image, layers.Dense(1)(layers.GlobalAveragePooling2D()(x)))
    kernel = np.zeros((5, 5, 1, 1))
    kernel[2, 2] = 1
    model.get_layer("conv").set_weights([kernel])
    model.layers[-1].set_weights([np.ones((1, 1)), np.zeros(1)])
    for row, column in ((4, 4), (13, 7), (22, 19)):  # 1 + 3 i
        x = np.zeros((1, 31, 28, 1), np.float32)
        x[0, row, column] = 1
        (map_,) = explain(model, x, method=MapOptions("hirescam", "conv")).values()
        assert np.unravel_index(map_[0].argmax(), (31, 28)) == (row, column)
        assert map_[0, row - 1, column] == pytest.approx(map_[0, row, column] * 2 / 3)


@pytest.mark.parametrize(
    ("shape", "layer"),
    [
        ((256, 256, 1), "layer3"),
        ((320, 320, 1), "layer4"),
        ((320, 256, 1), "layer3"),
        ((145, 145, 1), "layer3"),
        ((144, 144, 1), "layer2"),
        ((32, 32, 1), "layer2"),
        ((None, None, 1), "layer3"),
    ],
)
def test_the_layer_is_the_last_one_with_enough_cells(shape, layer):
    model = classifier(ModelSpec(shape, depth=10, width=2))
    assert Relevance(model, MapOptions()).options == MapOptions(layer=layer)
    assert Relevance(model, MapOptions(layer="layer1")).options.layer == "layer1"
    path = MapOptions("integrated-gradients")
    assert Relevance(model, path).options == path


def test_batches_and_runs_do_not_matter():
    model, x = network(PLAIN), inputs_for(PLAIN, 5)
    one, other = (
        explain(model, x, "any", MapOptions("gradcam", "layer2", batch_size=size))["any"]
        for size in (1, 4)
    )
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)
    weights = model.get_weights()
    explain(model, x, "any")
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": "bleed"}, "label 'bleed' is none of the network's: epidural, .*, any."),
        ({"labels": []}, "no labels are asked for"),
        ({"method": "cam"}, "method 'cam'; expected one of gradcam, hirescam, integrated-"),
        (
            {"method": MapOptions(layer="layer5")},
            "no features called 'layer5'; expected one of stem",
        ),
        ({"method": MapOptions(layer="fc")}, "'fc' of .* no rows and columns are left"),
        ({"inputs": np.zeros((1, 67, 64))}, r"float64 of shape \(1, 67, 64\); expected .*\(n, 67,"),
        ({"inputs": np.zeros((1, 64, 64, 3))}, r"expected numbers, \(n, 67, 64, 3\)"),
        ({"inputs": [[1.0]]}, "the inputs are list"),
        ({"baseline": np.zeros(2), "method": "integrated-gradients"}, r"baseline has the shape"),
        ({"network": 3}, "int cannot be explained; expected a run's folder"),
    ],
)
def test_what_cannot_be_explained_is_said(arguments, message):
    given = {"network": network(PLAIN), "inputs": inputs_for(PLAIN), **arguments}
    with pytest.raises(UsageError, match=message):
        explain(**given)


def test_values_that_are_not_finite_are_refused():
    model, x = network(PLAIN), inputs_for(PLAIN)
    x[0, 3, 4, 1] = np.inf
    with pytest.raises(DataError, match="the inputs hold values that are not finite"):
        explain(model, x)
    model.get_layer("fc").kernel.assign(np.full((32, 6), np.nan))
    with pytest.raises(DataError, match="heat maps are not finite"):
        explain(model, inputs_for(PLAIN))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1}, "steps 1; expected a whole number from 2 to 1000"),
        ({"steps": 2.5}, "steps 2.5"),
        ({"batch_size": 0}, "batch_size 0; expected a whole number of at least 1"),
        ({"layer": 4}, "layer 4; expected a name"),
    ],
)
def test_options_are_checked(settings, message):
    with pytest.raises(UsageError, match=message):
        MapOptions(**settings)


@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
def test_other_backends_are_told_apart(monkeypatch, backend):
    monkeypatch.setattr(relevance, "choose_backend", lambda: backend)
    with pytest.raises(UsageError, match=f"need the backend torch; Keras runs on {backend}"):
        explain(network(PLAIN), inputs_for(PLAIN))


def test_a_network_of_other_layers_is_told():
    image = keras.Input((8, 8, 1))
    x = layers.GlobalAveragePooling2D()(layers.DepthwiseConv2D(3)(image))
    model = keras.Model(image, layers.Dense(2)(x))
    with pytest.raises(UsageError, match="cannot be explained: layer .* is a DepthwiseConv2D"):
        explain(model, np.zeros((1, 8, 8, 1)), method="integrated-gradients")
    features = keras.Model(image, layers.GlobalAveragePooling2D()(layers.Conv2D(2, 3)(image)))
    with pytest.raises(UsageError, match="no features called 'layer2'. Give the name of a layer"):
        explain(features, np.zeros((1, 8, 8, 1)))
    with pytest.raises(UsageError, match="not in a dense layer"):
        explain(features, np.zeros((1, 8, 8, 1)), method="integrated-gradients")
