"""The losses against formulas in NumPy: values, gradients, weights, missing labels, bad input."""

import json

import keras
import numpy as np
import pytest
from click.testing import CliRunner

from ich_keras.cli import main
from ich_keras.config import FitConfig, RunConfig
from ich_keras.errors import UsageError
from ich_keras.labels import RSNA_WEIGHTS, SIX, LabelSet
from ich_keras.models.classifier import compile_classifier
from ich_keras.models.loss import (
    AsymmetricLoss,
    BinaryCrossEntropy,
    CategoricalCrossEntropy,
    FocalLoss,
    make_loss,
)
from ich_keras.models.options import LossSettings
from ich_keras.recipe import Recipe

BACKEND = keras.backend.backend()
WEIGHTS = (1.0, 2.0, 0.5, 1.0, 3.0, 4.0)
# name -> (class, settings)
CASES = {
    "bce": (BinaryCrossEntropy, {}),
    "rsna": (BinaryCrossEntropy, {"label_weights": RSNA_WEIGHTS}),
    "positive weights": (BinaryCrossEntropy, {"positive_weights": WEIGHTS}),
    "both weights": (
        BinaryCrossEntropy,
        {"positive_weights": WEIGHTS, "label_weights": RSNA_WEIGHTS},
    ),
    "focal": (FocalLoss, {}),
    "focal 0.5": (FocalLoss, {"gamma": 0.5}),
    "focal balanced": (FocalLoss, {"gamma": 1.5, "alpha": 0.25, "label_weights": WEIGHTS}),
    "focal weighted": (FocalLoss, {"positive_weights": WEIGHTS}),
    "asymmetric": (AsymmetricLoss, {}),
    "asymmetric without a margin": (AsymmetricLoss, {"gamma_positive": 1.0, "margin": 0.0}),
    "asymmetric 0.5": (AsymmetricLoss, {"gamma_negative": 0.5, "margin": 0.2}),
    "asymmetric weighted": (
        AsymmetricLoss,
        {"gamma_positive": 1.0, "positive_weights": WEIGHTS, "label_weights": RSNA_WEIGHTS},
    ),
}


def expected(kind, settings, truth, logits) -> np.ndarray:
    """The loss of each label, (N, 6), from its definition, in float64; missing ones are nan."""
    # As wide as NumPy has it: 1 - p must not round where p is near 1.
    p = 1 / (1 + np.exp(-logits.astype(np.longdouble)))
    q = 1 / (1 + np.exp(logits.astype(np.longdouble)))
    positive, negative = -np.log(p), -np.log(q)
    if kind is FocalLoss:
        gamma, alpha = settings.get("gamma", 2.0), settings.get("alpha")
        positive, negative = q**gamma * positive, p**gamma * negative
        if alpha is not None:
            positive, negative = alpha * positive, (1 - alpha) * negative
    if kind is AsymmetricLoss:
        margin = settings.get("margin", 0.05)
        shifted = np.maximum(p - margin, 0)
        rest = np.minimum(q + margin, 1)
        positive = q ** settings.get("gamma_positive", 0.0) * positive
        negative = -(shifted ** settings.get("gamma_negative", 4.0)) * np.log(rest)
    positive = positive * np.array(settings.get("positive_weights", np.ones(6)))
    each = np.where(truth == 1, positive, negative)
    return np.where(truth < 0, np.nan, each).astype(float)


def averaged(settings, each) -> np.ndarray:
    weights = np.array(settings.get("label_weights", np.ones(6)))
    weights = np.where(np.isnan(each), 0.0, weights)
    total = weights.sum(axis=1)
    return np.nansum(each * weights, axis=1) / np.where(total > 0, total, 1)


def samples(missing: bool, spread: float = 4.0):
    random = np.random.default_rng(3)
    logits = (spread * random.standard_normal((40, 6))).astype("float32")
    truth = random.integers(0, 2, (40, 6)).astype("float32")
    if missing:
        truth[random.random((40, 6)) < 0.4] = -1
        truth[7], truth[8] = -1, [-1, -1, -1, -1, -1, 1]
    return truth, logits


def value_and_gradient(loss, truth, logits) -> tuple[float, np.ndarray]:
    """The mean loss and its gradient by the logits, on the running backend."""
    if BACKEND == "torch":
        import torch

        outputs = torch.tensor(logits, requires_grad=True)
        value = loss(torch.tensor(truth), outputs)
        value.backward()
        return float(value.detach()), outputs.grad.numpy()
    if BACKEND == "jax":
        import jax

        value, gradient = jax.value_and_grad(lambda outputs: loss(truth, outputs))(logits)
        return float(value), np.asarray(gradient)
    import tensorflow as tf

    outputs = tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        value = loss(truth, outputs)
    return float(value), tape.gradient(value, outputs).numpy()


@pytest.mark.parametrize("missing", [False, True], ids=["all labels", "some missing"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_formula(case, missing):
    kind, settings = CASES[case]
    truth, logits = samples(missing)
    want = averaged(settings, expected(kind, settings, truth, logits))
    loss = kind(**settings)
    found = keras.ops.convert_to_numpy(loss.call(truth, keras.ops.convert_to_tensor(logits)))
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=1e-7)
    value, gradient = value_and_gradient(loss, truth, logits)
    assert value == pytest.approx(want.mean(), rel=1e-5)
    # By differences, in float64.
    step, slopes = 1e-6, np.zeros((40, 6))
    for column in range(6):
        moved = [logits.astype(float) for _ in range(2)]
        for place, sign in zip(moved, (1, -1), strict=True):
            place[:, column] += sign * step
        above, below = (averaged(settings, expected(kind, settings, truth, m)) for m in moved)
        slopes[:, column] = (above - below) / (2 * step) / len(logits)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-3, atol=2e-8)
    assert (gradient[truth < 0] == 0).all()


@pytest.mark.parametrize("case", CASES)
def test_probabilities_give_the_same_loss(case):
    kind, settings = CASES[case]
    truth, logits = samples(True, spread=2.0)
    want = averaged(settings, expected(kind, settings, truth, logits))
    probabilities = 1 / (1 + np.exp(-logits))
    loss = kind(from_logits=False, **settings)
    found = loss.call(truth, keras.ops.convert_to_tensor(probabilities))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(found), want, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_huge_logits_give_finite_losses_and_gradients(case):
    kind, settings = CASES[case]
    logits = np.array([[-1e4, -200, -90, 90, 200, 1e4]] * 2, "float32")
    truth = np.array([[1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 1]], "float32")
    value, gradient = value_and_gradient(kind(**settings), truth, logits)
    with np.errstate(over="ignore", under="ignore"):
        want = averaged(settings, expected(kind, settings, truth, np.clip(logits, -9e3, 9e3)))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    if not settings.get("margin", kind is AsymmetricLoss and 0.05):
        assert value == pytest.approx(want.mean(), rel=0.12)  # 9,000 in place of 10,000
    # What is wrong and sure is pushed back; what is right is left alone.
    assert gradient[0, 0] < 0 and abs(gradient[1, 0]) < 1e-12


def test_gamma_0_is_cross_entropy():
    truth, logits = samples(True)
    plain = value_and_gradient(BinaryCrossEntropy(), truth, logits)
    for loss in (FocalLoss(0.0), AsymmetricLoss(0.0, 0.0, 0.0)):
        value, gradient = value_and_gradient(loss, truth, logits)
        assert value == pytest.approx(plain[0], rel=1e-6)
        np.testing.assert_allclose(gradient, plain[1], rtol=1e-5, atol=1e-9)


def test_losses_are_saved_with_their_settings():
    for kind, settings in CASES.values():
        loss = kind(**settings, name="own")
        again = keras.losses.deserialize(keras.losses.serialize(loss))
        assert type(again) is kind
        # JSON has lists, no tuples.
        assert json.loads(json.dumps(again.get_config())) == json.loads(
            json.dumps(loss.get_config())
        )


TRAINED = {
    "bce": LossSettings(),
    "rsna": LossSettings("rsna"),
    "weights": LossSettings(label_weight={"any": 2.0}, positive_weight={"epidural": 5.0}),
    "focal": LossSettings("focal", focal_gamma=1.0, focal_alpha=0.25),
    "asymmetric": LossSettings("asymmetric", positive_weight={"any": 2.0}),
}


@pytest.mark.parametrize("missing", [False, True], ids=["all labels", "some missing"])
@pytest.mark.parametrize("name", TRAINED)
def test_fast_and_layered_steps_take_the_same_loss(name, missing):
    """Two steps, and the loss that `fit` tells, against the formula."""
    truth, _ = samples(missing)
    truth = truth[5:13]
    images = np.random.default_rng(0).standard_normal((8, 4)).astype("float32")
    weights, losses = [], []
    for step in ("fast", "stock"):
        keras.utils.set_random_seed(0)
        # Without anything before the head, whose rounding would hide a small fault.
        image = keras.Input((4,))
        model = keras.Model(image, keras.layers.Dense(6, name="fc")(image))
        logits = np.asarray(model.predict_on_batch(images))
        compile_classifier(model, loss=TRAINED[name], step=step)
        # Adam would turn the rounding of tiny gradients into whole steps.
        model.compile(keras.optimizers.SGD(0.1), model.loss)
        losses.append([float(model.train_on_batch(images, truth)) for _ in range(2)])
        weights.append([keras.ops.convert_to_numpy(v) for v in model.trainable_variables])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    loss = model.loss
    settings = {
        name: getattr(loss, name)
        for name in ("label_weights", "positive_weights", "gamma", "alpha", "gamma_negative")
        if getattr(loss, name, None) is not None
    }
    each = expected(type(loss), settings, truth, logits)
    assert losses[0][0] == pytest.approx(averaged(settings, each).mean(), rel=1e-4)


def test_a_missing_label_changes_no_step():
    """What the network says there does not matter, and neither does which number marks it."""
    truth, logits = samples(True)
    value, gradient = value_and_gradient(BinaryCrossEntropy(), truth, logits)
    other = np.where(truth < 0, logits[::-1], logits)
    assert value_and_gradient(BinaryCrossEntropy(), truth, other)[0] == pytest.approx(value)
    none = np.full_like(truth, -1)
    value, gradient = value_and_gradient(BinaryCrossEntropy(), none, logits)
    assert value == 0 and (gradient == 0).all()


def test_weights_are_put_in_the_order_of_the_labels():
    settings = LossSettings(positive_weight={"any": 3}, label_weight={"epidural": 2.5})
    loss = make_loss(settings, True, SIX)
    assert loss.positive_weights == (1.0, 1.0, 1.0, 1.0, 1.0, 3.0)
    assert loss.label_weights == (2.5, 1.0, 1.0, 1.0, 1.0, 1.0)
    with pytest.raises(UsageError, match="5 positive weights for 6 outputs"):
        BinaryCrossEntropy(positive_weights=(1.0,) * 5).require_outputs(6)


def test_a_recipe_keeps_what_the_loss_was():
    fit = FitConfig(loss="focal", focal_gamma=1.5, positive_weight={"any": 3.0})
    recipe = Recipe.of(RunConfig(preset="resnet10_2d", device="cpu", fit=fit))
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert again.as_config().fit.loss_settings == fit.loss_settings
    # Defaults of a loss are decided with the recipe.
    plain = Recipe.of(RunConfig(preset="resnet10_2d", fit=FitConfig(loss="asymmetric"))).training
    assert (plain.gamma_positive, plain.gamma_negative, plain.margin) == (0.0, 4.0, 0.05)
    assert plain.focal_gamma is None
    content = recipe.to_dict()
    for name in ("label_weight", "positive_weight", "focal_gamma", "focal_alpha", "margin"):
        del content["training"][name]  # as an older version wrote it
    old = Recipe.from_dict(content).training
    assert old.positive_weight is None and old.focal_gamma is None


BAD = [
    (["--positive-weight", "any=0"], "fit.positive_weight of any is 0.0; expected above 0"),
    (["--positive-weight", "any=-1"], "fit.positive_weight of any is -1.0; expected above 0"),
    (["--positive-weight", "any=nan"], "fit.positive_weight of any is nan; expected above 0"),
    (["--positive-weight", "any=inf"], "fit.positive_weight of any is inf"),
    (["--positive-weight", "any=much"], "'any=much' is not LABEL=NUMBER"),
    (["--positive-weight", "3"], "'3' is not LABEL=NUMBER"),
    (["--positive-weight", "=3"], "'=3' names no label"),
    (["--positive-weight", "any=3", "--positive-weight", "any=4"], "'any' is given twice"),
    (["--positive-weight", "epidurall=3"], "names the label 'epidurall'"),
    (["--label-weight", "any=0"], "fit.label_weight of any is 0.0"),
    (["--label-weight", "bleed=2"], "names the label 'bleed'"),
    (["--label-weight", "any=2", "--loss", "rsna"], "label weights of its own"),
    (["--loss", "focl"], "fit.loss is 'focl'; expected one of bce, rsna, focal, asymmetric"),
    (["--loss", "focal", "--focal-gamma", "-1"], "fit.focal_gamma is -1.0; expected at least 0"),
    (["--loss", "focal", "--focal-gamma", "nan"], "fit.focal_gamma is nan"),
    (["--loss", "focal", "--focal-alpha", "0"], "fit.focal_alpha is 0.0; expected above 0"),
    (["--loss", "focal", "--focal-alpha", "1.5"], "fit.focal_alpha is 1.5"),
    (["--focal-gamma", "2"], "fit.focal_gamma belongs to the loss 'focal'; this one is 'bce'"),
    (["--loss", "focal", "--margin", "0.1"], "fit.margin belongs to the loss 'asymmetric'"),
    (["--loss", "asymmetric", "--margin", "0.6"], "fit.margin is 0.6; expected at least 0"),
    (["--loss", "asymmetric", "--gamma-negative", "-2"], "fit.gamma_negative is -2.0"),
    (["--loss", "asymmetric", "--gamma-positive", "x"], "'x' is not a valid float"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_losses_are_one_clear_line_and_write_nothing(
    options, message, phantom_cache_folder, tmp_path
):
    command = ["train", "--cache", str(phantom_cache_folder), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(main, [*command, "--size", "32", *options])
    assert done.exit_code == 2, done.output
    line = next(line for line in done.output.splitlines() if line.startswith("Error: "))
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_labels_are_suggested():
    with pytest.raises(UsageError) as caught:
        Recipe.of(RunConfig(fit=FitConfig(positive_weight={"epidurall": 3.0})))
    assert caught.value.hint.startswith("Did you mean 'epidural'? Known: epidural, ")
    with pytest.raises(UsageError, match="fit.positive_weight is 3; expected dict or null"):
        RunConfig.from_dict({"fit": {"positive_weight": 3}})
    with pytest.raises(UsageError, match="positive_weight of any is True; expected a number"):
        RunConfig.from_dict({"fit": {"positive_weight": {"any": True}}})


@pytest.mark.parametrize("missing", [np.nan, -1.0])
def test_missing_labels_are_the_same_however_they_are_marked(missing):
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, (8, 6)).astype("float32")
    outputs = random.normal(size=(8, 6)).astype("float32")
    holes = random.random((8, 6)) < 0.3
    holes[3] = True
    marked = np.where(holes, missing, truth).astype("float32")
    each = np.where(truth == 1, np.log1p(np.exp(-outputs)), np.log1p(np.exp(outputs)))
    counts = (~holes).sum(axis=1)
    expected = np.where(holes, 0, each).sum(axis=1) / np.maximum(counts, 1)
    found = keras.ops.convert_to_numpy(BinaryCrossEntropy()(marked, outputs))
    assert float(found) == pytest.approx(expected.mean(), rel=1e-5)


def softmax_loss(classes, outputs, weights=None):
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    own = -log_p[np.arange(len(classes)), classes]
    return own if weights is None else own * np.asarray(weights)[classes]


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 0.5)])
@pytest.mark.parametrize("from_logits", [True, False])
def test_the_loss_of_exclusive_labels_is_that_of_a_softmax(from_logits, weights):
    random = np.random.default_rng(1)
    outputs = random.normal(scale=4, size=(9, 3)).astype("float32")
    classes = random.integers(0, 3, 9)
    truth = np.eye(3, dtype="float32")[classes]
    truth[4] = np.nan
    expected = softmax_loss(classes, outputs, weights)
    expected[4] = 0
    given = outputs
    if not from_logits:
        given = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
    loss = CategoricalCrossEntropy(from_logits, weights)
    found = float(keras.ops.convert_to_numpy(loss(truth, given)))
    assert found == pytest.approx(expected.mean(), rel=1e-4)
    again = CategoricalCrossEntropy.from_config(loss.get_config())
    assert float(keras.ops.convert_to_numpy(again(truth, given))) == found


TWO, THREE = LabelSet(("left", "right")), LabelSet(("a", "b", "c"), exclusive=True)
UNFIT = {
    "rsna without any": (LossSettings("rsna"), TWO, "counts the label twice that stands for"),
    "rsna exclusive": (LossSettings("rsna"), THREE, "counts the label twice that stands for"),
    "focal exclusive": (LossSettings("focal"), THREE, "these are exclusive"),
    "positive exclusive": (
        LossSettings(positive_weight={"a": 2}),
        THREE,
        "positive_weight means nothing for exclusive labels",
    ),
    "another label": (LossSettings(label_weight={"any": 2}), TWO, "names the label 'any'"),
}


@pytest.mark.parametrize(("settings", "labels", "message"), UNFIT.values(), ids=UNFIT)
def test_losses_that_do_not_fit_the_labels_are_refused(settings, labels, message):
    with pytest.raises(UsageError, match=message):
        make_loss(settings, True, labels)


def test_each_label_set_gets_its_loss():
    assert make_loss(LossSettings("rsna"), True, SIX).label_weights == (1, 1, 1, 1, 1, 2)
    assert make_loss(LossSettings("rsna"), True, LabelSet(("a", "any"), "any")).label_weights == (
        1,
        2,
    )
    weighted = make_loss(LossSettings(label_weight={"c": 3}), False, THREE)
    assert type(weighted) is CategoricalCrossEntropy and weighted.label_weights == (1, 1, 3)
    assert not weighted.from_logits
