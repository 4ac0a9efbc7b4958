"""Sequence heads against the same sums in NumPy, on whatever backend the tests run."""

import keras
import numpy as np
import pytest

from ich_keras.errors import UsageError
from ich_keras.labels import SIX, LabelSet
from ich_keras.models.sequence import (
    KINDS,
    SequenceSpec,
    SlicesLoss,
    adapt_features,
    sequence_head,
    sequence_losses,
)

LABELS = LabelSet(("subdural", "other", "any"), "any")
CLASSES = LabelSet(("none", "old", "new"), exclusive=True)
LENGTHS = (7, 1, 4)
FEATURES = 10


def spec(kind, **settings):
    return SequenceSpec(kind, **({"features": FEATURES, "width": 8, "heads": 2} | settings))


def batch(lengths=LENGTHS, width=None, seed=0, labels=LABELS):
    """Return the inputs of series, filled up with nonsense."""
    rng = np.random.default_rng(seed)
    count, width = len(lengths), width or max(lengths)
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.float32)
    return {
        "features": rng.normal(3, 5, (count, width, FEATURES)).astype(np.float32),
        "logits": rng.normal(-1, 2, (count, width, len(labels))).astype(np.float32),
        "places_mm": np.cumsum(rng.uniform(0.5, 90, (count, width)), 1).astype(np.float32),
        "mask": mask,
    }


def head(kind, output="logits", labels=LABELS, seed=1, **settings):
    """Return a head none of whose weights is at its beginning."""
    model = sequence_head(spec(kind, **settings), labels, output)
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Normalization):
            continue
        layer.set_weights([rng.normal(0, 0.4, w.shape) for w in layer.get_weights()])
    adapt_features(model, batch(seed=seed)["features"].reshape(-1, FEATURES))
    return model


def answers(model, inputs):
    return {name: np.asarray(value) for name, value in model.predict_on_batch(inputs).items()}


class Reference:
    """A head in NumPy, a series at a time, without filling up."""

    def __init__(self, model, kind, heads=2, exclusive=False):
        self.model, self.kind, self.heads, self.exclusive = model, kind, heads, exclusive

    def weights(self, name):
        return [w.astype(np.float64) for w in self.model.get_layer(name).get_weights()]

    def dense(self, x, name):
        kernel, bias = self.weights(name)
        return x @ kernel + bias

    def norm(self, x, name):
        gamma, beta = self.weights(name)
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta

    def __call__(self, features, logits, places):
        mean, variance, _ = self.weights("normalised")
        p = self.dense((features - mean) / np.sqrt(variance), "projected")
        before, after = np.zeros_like(p), np.zeros_like(p)
        before[1:], after[:-1] = p[1:] - p[:-1], p[:-1] - p[1:]
        steps = np.zeros((len(p), 3))
        gaps = np.minimum(np.diff(places) / 10, 5)
        steps[1:, 0], steps[:-1, 1] = gaps, gaps
        steps[:, 2] = (places - places.mean()) / 100
        x = np.concatenate([p, before, after, logits / 4, steps], 1)
        x = gelu(self.dense(x, "joined"))
        x = self.norm(getattr(self, self.kind)(x), "encoded")
        slices = logits + self.dense(x, "slice_change")
        gate = sigmoid(self.dense(x, "gate"))
        score = self.dense(np.tanh(self.dense(x, "look")) * gate, "score")
        pooled = (softmax(score, 0) * x).sum(0)
        whole = slices.mean(0) if self.exclusive else slices.max(0)
        return slices, whole + self.dense(pooled, "series_change")

    def both(self, x, step):
        for number in (1, 2):
            weights = self.weights(f"{self.kind}{number}")
            half = len(weights) // 2
            forward = self.run(x, weights[:half], step)
            backward = self.run(x[::-1], weights[half:], step)[::-1]
            y = np.concatenate([forward, backward], 1)
            x = x + y if number > 1 else y
        return x

    @staticmethod
    def run(x, weights, step):
        state, found = None, []
        for one in x:
            state = step(one, state, *weights)
            found.append(state[0])
        return np.array(found)

    def gru(self, x):
        def step(one, state, kernel, recurrent, bias):
            h = np.zeros(recurrent.shape[0]) if state is None else state[0]
            a, b = one @ kernel + bias[0], h @ recurrent + bias[1]
            (az, ar, ah), (bz, br, bh) = np.split(a, 3), np.split(b, 3)
            z, r = sigmoid(az + bz), sigmoid(ar + br)
            return (z * h + (1 - z) * np.tanh(ah + r * bh),)

        return self.both(x, step)

    def lstm(self, x):
        def step(one, state, kernel, recurrent, bias):
            zero = np.zeros(recurrent.shape[0])
            h, c = (zero, zero) if state is None else state
            i, f, new, o = np.split(one @ kernel + h @ recurrent + bias, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(new)
            return sigmoid(o) * np.tanh(c), c

        return self.both(x, step)

    def conv(self, x):
        for number, dilation in ((1, 1), (2, 2)):
            y = self.norm(x, f"norm{number}")
            kernel, bias = self.weights(f"conv{number}")
            padded = np.pad(y, ((dilation, dilation), (0, 0)))
            taps = [padded[k * dilation : k * dilation + len(y)] @ kernel[k] for k in range(3)]
            x = x + self.dense(gelu(sum(taps) + bias), f"mixed{number}")
        return x

    def transformer(self, x):
        for number in (1, 2):
            y = self.norm(x, f"norm{number}a")
            wq, bq, wk, bk, wv, bv, wo, bo = self.weights(f"attention{number}")
            q, k, v = (
                np.einsum("td,dhe->hte", y, w) + b[:, None]
                for w, b in ((wq, bq), (wk, bk), (wv, bv))
            )
            seen = softmax(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]), -1) @ v
            x = x + np.einsum("hte,hed->td", seen, wo) + bo
            y = gelu(self.dense(self.norm(x, f"norm{number}b"), f"wide{number}"))
            x = x + self.dense(y, f"narrow{number}")
        return x

    def attention(self, x):
        return gelu(self.dense(gelu(self.dense(x, "dense1")), "dense2"))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    erf = np.vectorize(__import__("math").erf)
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", [LABELS, CLASSES], ids=["labels", "classes"])
def test_answers_are_those_of_numpy(kind, labels):
    model, inputs = head(kind, labels=labels), batch()
    found = answers(model, inputs)
    reference = Reference(model, kind, exclusive=labels.exclusive)
    for number, length in enumerate(LENGTHS):
        own = (inputs[name][number, :length] for name in ("features", "logits", "places_mm"))
        slices, series = reference(*(one.astype(np.float64) for one in own))
        np.testing.assert_allclose(found["slices"][number, :length], slices, rtol=0, atol=2e-4)
        np.testing.assert_allclose(found["series"][number], series, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_fills_up_changes_nothing(kind):
    model, inputs = head(kind), batch()
    whole = answers(model, inputs)
    wider = {name: np.repeat(value, 2, axis=1) for name, value in batch(seed=5).items()}
    for name, value in inputs.items():
        wider[name][:, : value.shape[1]] = value
    wider["mask"][:, max(LENGTHS) :] = 0
    for name, found in answers(model, wider).items():
        expected = whole[name]
        if name == "slices":
            there = inputs["mask"] > 0
            found, expected = found[:, : max(LENGTHS)][there], expected[there]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_it_gives_the_slice_networks_answers(kind):
    inputs = batch()
    found = answers(sequence_head(spec(kind), LABELS), inputs)
    for number, length in enumerate(LENGTHS):
        own = sigmoid(inputs["logits"][number, :length].astype(np.float64))
        np.testing.assert_allclose(found["slices"][number, :length], own, atol=1e-6)
        np.testing.assert_allclose(found["series"][number], own.max(0), atol=1e-6)


def test_one_slice_and_six_hundred(kind="gru"):
    model = head(kind)
    long = batch((600,))
    assert answers(model, long)["slices"].shape == (1, 600, 3)
    one = {name: value[:, :1] for name, value in long.items()}
    assert np.isfinite(answers(model, one)["series"]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_and_loaded_with_keras_alone(kind, tmp_path):
    model, inputs = head(kind, "probabilities"), batch()
    model.save(tmp_path / "head.keras")
    loaded = keras.models.load_model(tmp_path / "head.keras")
    model.save_weights(tmp_path / "head.weights.h5")
    again = sequence_head(spec(kind), LABELS)
    again.load_weights(tmp_path / "head.weights.h5")
    for other in (loaded, again):
        for name, value in answers(model, inputs).items():
            np.testing.assert_array_equal(answers(other, inputs)[name], value)


@pytest.mark.parametrize("known", ["slices", "series", "both"])
def test_it_learns_from_slices_from_series_or_from_both(known):
    keras.utils.set_random_seed(3)
    inputs = batch((6,) * 16, seed=2)
    inputs["logits"][:] = 0
    # The slice after one with a large first feature bleeds: no slice network can see that.
    truth = np.zeros((16, 6, 3), np.float32)
    truth[:, 1:] = (inputs["features"][:, :-1, :1] > 3).astype(np.float32)
    labels = {"slices": truth, "series": truth.max(1)}
    for name in labels:
        if known not in (name, "both"):
            labels[name] = np.full_like(labels[name], np.nan)
    model = sequence_head(spec("conv", width=16, dropout=0.0), LABELS, "logits")
    adapt_features(model, inputs["features"].reshape(-1, FEATURES))
    model.compile(keras.optimizers.Adam(0.02), **sequence_losses(LABELS))
    history = model.fit(inputs, labels, batch_size=16, epochs=60, verbose=0).history["loss"]
    assert history[-1] < 0.35 * history[0]
    found = answers(model, inputs)
    if known != "series":
        assert ((found["slices"] > 0) == (truth > 0.5)).mean() > 0.97
    if known != "slices":
        assert ((found["series"] > 0) == (truth.max(1) > 0.5)).mean() > 0.97


def test_the_loss_is_the_mean_over_labelled_slices_of_each_series():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 2)).astype(np.float32)
    labels = np.array([[[1, 0], [0, np.nan], [np.nan] * 2], [[np.nan] * 2] * 3], np.float32)
    each = np.where(labels == 1, np.log1p(np.exp(-logits)), np.log1p(np.exp(logits)))
    expected = (each[0, 0].mean() + each[0, 1, 0]) / 2 / 2  # the second series has no label
    assert float(SlicesLoss()(labels, logits)) == pytest.approx(expected, rel=1e-5)
    classes = np.array([[[0, 1], [np.nan] * 2, [1, 0]], [[np.nan] * 2] * 3], np.float32)
    log_p = logits[0] - np.log(np.exp(logits[0]).sum(-1, keepdims=True))
    expected = -(log_p[0, 1] + log_p[2, 0]) / 2 / 2
    assert float(SlicesLoss(exclusive=True)(classes, logits)) == pytest.approx(expected, rel=1e-5)


def test_features_that_never_vary_do_no_harm():
    model = sequence_head(spec("attention"), LABELS)
    features = batch()["features"].reshape(-1, FEATURES)
    features[:, 4] = 7
    adapt_features(model, features)
    inputs = batch()
    inputs["features"][..., 4] = 7
    assert np.isfinite(answers(model, inputs)["series"]).all()


BAD = {
    "kind": ({"kind": "rnn"}, "no sequence head is called 'rnn'; expected one of gru, lstm, conv"),
    "width": ({"width": 7}, "width is 7; expected an even number"),
    "heads": ({"kind": "transformer", "width": 10, "heads": 4}, "expected a multiple of 4 heads"),
    "depth": ({"depth": 0}, "depth is 0; expected a whole number 1 to 16"),
    "features": ({"features": 2.0}, "features is 2.0; expected a whole number"),
    "dropout": ({"dropout": 1}, "dropout is 1; expected 0 or more, and less than 1"),
    "NaN": ({"dropout": float("nan")}, "dropout is nan"),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_bad_shapes_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        SequenceSpec(**settings)


def test_bad_features_are_refused():
    model = sequence_head(spec("conv"), SIX)
    for features, message in (
        (np.zeros((0, FEATURES)), r"features of shape \(0, 10\); expected \(n, 10\)"),
        (np.zeros((4, 3)), r"shape \(4, 3\)"),
        (np.full((4, FEATURES), np.nan), "not finite"),
    ):
        with pytest.raises(UsageError, match=message):
            adapt_features(model, features)
    with pytest.raises(UsageError, match="series_weight is -1"):
        sequence_losses(SIX, -1)
    with pytest.raises(UsageError, match="output"):
        sequence_head(spec("conv"), SIX, "scores")
