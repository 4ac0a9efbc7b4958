"""Keras' global settings, from keras.json and from code: the same networks, or a clear refusal."""

import contextlib
import functools
import json
import os
import subprocess
import sys
from dataclasses import replace

import keras
import numpy as np
import pytest
from keras import ops
from narrow import preset_of

from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.environment import environment_record
from ich_keras.errors import UsageError
from ich_keras.inference import load_run
from ich_keras.keras_settings import (
    keras_settings,
    require_settings_file,
    require_trainable_settings,
    settings_file,
)
from ich_keras.models.classifier import classifier, compile_classifier
from ich_keras.models.loss import BinaryCrossEntropy
from ich_keras.models.optimizer import Adam
from ich_keras.models.presets import PRESETS
from ich_keras.models.resnet import feature_model, resnet
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights_file import read_weights
from ich_keras.run_folder import RunFolder
from ich_keras.training import resume, train

FLAT = ModelSpec((32, 32, 3), depth=10, width=8, dropout=0.0)
NETWORKS = {
    "2d": FLAT,
    "bottleneck": replace(FLAT, depth=50),
    "shortcut A": ModelSpec((9, 24, 24, 1), depth=10, shortcut="A", width=8, dropout=0.0),
    "video": replace(PRESETS["r2plus1d_18"].spec, input_shape=(5, 16, 16, 3), width=8),
    "seresnext": replace(FLAT, depth=14, architecture="seresnext"),
    "dense": replace(FLAT, depth=21, architecture="densenet"),
    "group": replace(FLAT, norm="group"),
    "frozen": replace(FLAT, norm="frozen"),
}
# What another project may have set, as keras.json and as a notebook does.
SETTINGS = {
    "channels_first": lambda: keras.config.set_image_data_format("channels_first"),
    "epsilon": lambda: keras.config.set_epsilon(0.1),
    "mixed_bfloat16": lambda: keras.config.set_dtype_policy("mixed_bfloat16"),
    "mixed_float16": lambda: keras.mixed_precision.set_dtype_policy("mixed_float16"),
    "float64": lambda: keras.config.set_dtype_policy("float64"),
    "int8": lambda: keras.config.set_dtype_policy("int8_from_float32"),
    "a map of policies": lambda: keras.config.set_dtype_policy(
        keras.dtype_policies.DTypePolicyMap(
            default_policy=keras.dtype_policies.DTypePolicy("bfloat16")
        )
    ),
}
# The other backends compile each network anew, which takes seconds: there, one of a kind.
IS_TORCH = keras.config.backend() == "torch"
FLOATS = {
    name: functools.partial(keras.config.set_floatx, name)
    for name in ("float16", "bfloat16", "float64")
}


def everything():
    """Set all that a training takes to something unusual."""
    for name in ("channels_first", "epsilon", "a map of policies"):
        SETTINGS[name]()


@contextlib.contextmanager
def usual():
    """Set everything back that a test sets."""
    before = (
        keras.config.image_data_format(),
        keras.config.floatx(),
        keras.config.epsilon(),
        keras.config.dtype_policy(),
    )
    try:
        yield
    finally:
        keras.config.set_image_data_format(before[0])
        keras.config.set_floatx(before[1])
        keras.config.set_epsilon(before[2])
        keras.config.set_dtype_policy(before[3])
        keras.config.set_max_epochs(None)
        keras.config.set_max_steps_per_epoch(None)


@pytest.fixture(autouse=True)
def set_back():
    with usual():
        yield


def batch(spec, size=4):
    random = np.random.default_rng(0)
    images = random.standard_normal((size, *spec.input_shape)).astype("float32")
    return images, random.integers(0, 2, (size, 6)).astype("float32")


def built(name):
    keras.utils.set_random_seed(0)
    return classifier(NETWORKS[name], output="logits")


def outputs_of(model, spec):
    return np.asarray(model.predict_on_batch(batch(spec)[0]))


def trained(name, between=lambda: None):
    """Build, set, compile and train; return outputs and weights."""
    spec = NETWORKS[name]
    model = built(name)
    between()
    compile_classifier(model, 1e-3, weight_decay=0.1, accumulate=2, schedule="constant")
    losses = model.fit(*batch(spec, 8), batch_size=4, epochs=2, verbose=0, shuffle=False).history
    weights = [keras.ops.convert_to_numpy(variable) for variable in model.weights]
    return losses["loss"], outputs_of(model, spec), weights


@functools.cache
def plain(name):
    return outputs_of(built(name), NETWORKS[name])


@functools.cache
def plainly_trained(name):
    return trained(name)


def require_equal(one, other):
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])
    for ours, expected in zip(one[2], other[2], strict=True):
        assert ours.dtype == expected.dtype == np.float32
        np.testing.assert_array_equal(ours, expected)


def require_plain(name, compares=True):
    """Build a network and compare it with the one that was built under the usual settings."""
    model = built(name)
    assert model.output.dtype == "float32" and model.dtype_policy.name == "float32"
    assert {layer.dtype_policy.name for layer in model.layers} == {"float32"}
    assert {v.dtype for v in model.variables if "seed" not in v.path} == {"float32"}
    formats = {getattr(layer, "data_format", "channels_last") for layer in model.layers}
    assert formats == {"channels_last"}
    assert model.output_shape == (None, 6)
    if compares:
        np.testing.assert_array_equal(outputs_of(model, NETWORKS[name]), plain(name))


@pytest.mark.parametrize("setting", [*SETTINGS, *FLOATS])
def test_every_layer_names_what_keras_would_take_from_its_settings(setting):
    plain("2d")
    (SETTINGS | FLOATS)[setting]()
    require_plain("2d", compares=IS_TORCH)


@pytest.mark.parametrize("name", NETWORKS if IS_TORCH else ["2d"])
def test_every_kind_of_network_names_it(name):
    plain(name)
    everything()
    FLOATS["float16"]()
    require_plain(name)


def test_a_global_map_of_policies_stays_as_it_is():
    SETTINGS["a map of policies"]()
    built("2d")
    assert len(keras.config.dtype_policy()) == 0


def test_the_precision_alone_says_what_computes_in_which_type():
    def types(precision):
        model = classifier(FLAT, precision=precision)
        assert model.get_layer("fc").dtype_policy.name == "float32"
        return {layer.dtype_policy.name for layer in model.layers if layer.weights}

    keras.config.set_dtype_policy("mixed_float16")
    assert types(None) == types("float32") == {"float32"}
    assert types("bfloat16") == {"mixed_bfloat16", "float32"}


@pytest.mark.parametrize("name", ["2d", "shortcut A"] if IS_TORCH else ["2d"])
def test_training_gives_the_same_weights_set_before_or_after_building(name):
    expected = plainly_trained(name)
    require_equal(trained(name, between=everything), expected)
    if name == "2d" and IS_TORCH:
        SETTINGS["mixed_float16"]()  # under which Keras would scale the loss
        require_equal(trained(name), expected)


def test_features_and_backbones_do_not_depend_on_the_settings():
    def features():
        keras.utils.set_random_seed(0)
        model = feature_model(resnet(FLAT), ("stem", "maxpool", "layer4", "avgpool"))
        return model.predict_on_batch(batch(FLAT)[0])

    expected = features()
    everything()
    for name, value in features().items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(expected[name]))


def test_a_saved_network_is_the_same_under_any_setting(tmp_path):
    model = built("2d")
    expected = outputs_of(model, FLAT)
    model.save(tmp_path / "plain.keras")
    settings = (everything, SETTINGS["mixed_float16"], FLOATS["float16"])
    for number, setting in enumerate(settings if IS_TORCH else settings[:1]):
        with usual():
            setting()
            found = keras.saving.load_model(tmp_path / "plain.keras")
            assert outputs_of(found, FLAT).dtype == np.float32
            np.testing.assert_allclose(outputs_of(found, FLAT), expected, rtol=1e-4, atol=1e-5)
            built("2d").save(tmp_path / f"{number}.keras")
        again = keras.saving.load_model(tmp_path / f"{number}.keras")
        np.testing.assert_allclose(outputs_of(again, FLAT), expected, rtol=1e-4, atol=1e-5)


def test_the_loss_from_probabilities_has_an_epsilon_of_its_own():
    truth = np.array([[1, 0, 1, 0, 1, 0]], "float32")
    p = np.array([[0.01, 0.01, 0.5, 0.5, 0.0, 1.0]], "float32")
    by_hand = np.mean(
        [-np.log(0.01), -np.log(0.99), np.log(2), np.log(2), -np.log(1e-7), -np.log(2.0**-23)]
    )
    for epsilon in (1e-7, 0.1):
        keras.config.set_epsilon(epsilon)
        loss = BinaryCrossEntropy(from_logits=False)
        assert float(loss(truth, ops.convert_to_tensor(p))) == pytest.approx(by_hand, rel=1e-2)
        middle = loss(truth[:, :4], ops.convert_to_tensor(p[:, :4]))
        expected = np.mean([-np.log(0.01), -np.log(0.99), np.log(2), np.log(2)])
        assert float(middle) == pytest.approx(expected, rel=1e-5)


def test_the_loss_names_its_type():
    keras.config.set_floatx("float16")
    logits = np.array([[20.0001, -3, 0, 1, 2, 3]], "float32")
    loss = BinaryCrossEntropy(from_logits=True)
    assert loss.dtype == "float32"
    value = loss(np.zeros((1, 6), "float32"), ops.convert_to_tensor(logits))
    exact = np.log1p(np.exp(logits.astype(float))).mean()
    assert float(value) == pytest.approx(exact, rel=1e-6)
    assert BinaryCrossEntropy(True, dtype="float64").dtype == "float64"


@pytest.mark.parametrize("floatx", FLOATS if IS_TORCH else ["float16"])
def test_a_floatx_in_which_keras_would_round_is_refused_by_name(floatx):
    model = compile_classifier(built("2d"), 1e-3)
    images, truth = batch(FLAT)
    expected = np.asarray(model.predict_on_batch(images))
    keras.config.set_floatx(floatx)
    refusal = (
        f"Keras' global floatx is '{floatx}', in which .* would compute; expected 'float32'"
        r".*keras\.config\.set_floatx\('float32'\), or set it in keras\.json"
    )
    for call in (
        lambda: model.fit(images, truth, verbose=0),
        lambda: model.train_on_batch(images, truth),
        lambda: compile_classifier(built("2d")),
        lambda: model.compile("sgd", "mse"),
        lambda: Adam(1e-3),
        require_trainable_settings,
    ):
        with pytest.raises(UsageError, match=refusal):
            call()
    np.testing.assert_array_equal(np.asarray(model.predict_on_batch(images)), expected)
    for call in (
        lambda: model.predict(images, verbose=0),
        lambda: model.evaluate(images, truth, verbose=0),
    ):
        if floatx == "float64":
            call()
            continue
        with pytest.raises(UsageError, match=refusal):
            call()
    if floatx == "float64":
        np.testing.assert_array_equal(np.asarray(model.predict(images, verbose=0)), expected)
    keras.config.set_floatx("float32")
    model.fit(images, truth, verbose=0)


@pytest.mark.parametrize("name", ["max_epochs", "max_steps_per_epoch"])
def test_settings_that_end_a_training_early_are_refused_by_name(name):
    getattr(keras.config, f"set_{name}")(1)
    message = f"Keras' global {name} is 1: .*Unset KERAS_{name.upper()}, or call"
    with pytest.raises(UsageError, match=message):
        require_trainable_settings()


@pytest.fixture(scope="module")
def narrow():
    with preset_of("narrow", replace(FLAT, input_shape=(48, 48, 3))):
        config = RunConfig(
            preset="narrow",
            precision="float32",
            data=DataConfig(size=48, balance=True, limit_series=12),
            fit=FitConfig(batch_size=8, epochs=1, learning_rate=1e-3),
        )
        yield config


def test_a_run_is_the_same_under_any_setting_and_records_them(narrow, phantom_cache, tmp_path):
    first = train(narrow, phantom_cache, tmp_path / "first")
    everything()
    SETTINGS["mixed_float16"]()
    second = train(narrow, phantom_cache, tmp_path / "second")
    weights = [read_weights(run / "best.weights.h5").layers for run in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    for layer, arrays in weights[0].items():
        for one, other in zip(arrays, weights[1][layer], strict=True):
            np.testing.assert_array_equal(one, other, err_msg=layer)
    for name in ("predictions-test.csv", "metrics-test.json", "choices.json"):
        assert (first / name).read_text() == (second / name).read_text()
    images = np.random.default_rng(0).standard_normal((2, 48, 48, 3)).astype("float32")
    keras.config.set_floatx("float16")
    outputs = [np.asarray(load_run(run)[1].predict_on_batch(images)) for run in (first, second)]
    np.testing.assert_array_equal(*outputs)
    stored = keras.saving.load_model(second / "model.keras")
    np.testing.assert_allclose(np.asarray(stored.predict_on_batch(images)), outputs[0], rtol=1e-4)
    found = [RunFolder(run).environment() for run in (first, second)]
    expected = ("channels_last", "float32", 1e-7, "float32")
    changed = ("channels_first", "float32", 0.1, "mixed_float16")
    for record, values in zip(found, (expected, changed), strict=True):
        names = ("image_data_format", "floatx", "epsilon", "dtype_policy")
        assert tuple(record[name] for name in names) == values


def test_what_makes_another_training_is_refused_before_anything_is_written(
    narrow, phantom_cache, tmp_path
):
    keras.config.set_floatx("float16")
    with pytest.raises(UsageError, match="floatx is 'float16', in which training would compute"):
        train(narrow, phantom_cache, tmp_path / "run")
    keras.config.set_floatx("float32")
    keras.config.set_max_epochs(1)
    with pytest.raises(UsageError, match="max_epochs is 1"):
        train(narrow, phantom_cache, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    keras.config.set_max_epochs(None)
    keras.config.set_max_steps_per_epoch(3)
    with pytest.raises(UsageError, match="max_steps_per_epoch is 3"):
        train(narrow, phantom_cache, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not IS_TORCH, reason="the same on all backends: torch runs it")
def test_resuming_looks_at_the_settings_too(narrow, phantom_cache, tmp_path, monkeypatch):
    from ich_keras import fitting

    save_state = fitting.save_state

    def interrupted(*state):
        save_state(*state)
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "save_state", interrupted)
    longer = replace(narrow, fit=replace(narrow.fit, epochs=2))
    with pytest.raises(KeyboardInterrupt):
        train(longer, phantom_cache, tmp_path / "run")
    monkeypatch.setattr(fitting, "save_state", save_state)
    keras.config.set_floatx("bfloat16")
    with pytest.raises(UsageError, match="floatx is 'bfloat16'"):
        resume(tmp_path / "run", phantom_cache)
    keras.config.set_floatx("float32")
    SETTINGS["channels_first"]()
    told = []
    resume(tmp_path / "run", phantom_cache, tell=told.append)
    assert "image_data_format channels_first, was channels_last" in told[0]


# Run where keras.json is read: when Keras is imported.
PROGRAM = """
import json, sys
import numpy as np
import ich_keras
from ich_keras import ModelSpec, classifier
import keras
keras.utils.set_random_seed(0)
model = classifier(ModelSpec((32, 32, 3), depth=10, width=8, dropout=0.0), output="logits")
images = np.linspace(-1, 1, 2 * 32 * 32 * 3, dtype="float32").reshape(2, 32, 32, 3)
outputs = [np.asarray(m.predict_on_batch(images)).tolist() for m in (
    model, keras.saving.load_model(sys.argv[1]))]
try:
    ich_keras.compile_classifier(model)
except ich_keras.IchError as error:
    print("REFUSED", error.message)
keras.config.set_floatx("float32")
ich_keras.compile_classifier(model).fit(images, np.ones((2, 6), "float32"), verbose=0)
outputs.append(np.asarray(model.predict_on_batch(images)).tolist())
print("RESULT", json.dumps([keras.config.image_data_format(), outputs]))
"""


def test_a_keras_json_of_another_project_changes_nothing(tmp_path):
    backend = keras.config.backend()
    content = {"image_data_format": "channels_first", "floatx": "float16", "epsilon": 0.1}
    (tmp_path / "keras.json").write_text(json.dumps({"backend": backend, **content}))
    model = built("2d")
    model.save(tmp_path / "model.keras")
    images = np.linspace(-1, 1, 2 * 32 * 32 * 3, dtype="float32").reshape(2, 32, 32, 3)
    before = np.asarray(model.predict_on_batch(images))
    compile_classifier(model).fit(images, np.ones((2, 6), "float32"), verbose=0)
    expected = (before, before, np.asarray(model.predict_on_batch(images)))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "model.keras")],
        env={**os.environ, "KERAS_HOME": str(tmp_path), "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert "RESULT" in lines, done.stderr
    assert lines["REFUSED"].startswith("Keras' global floatx is 'float16', in which")
    data_format, outputs = json.loads(lines["RESULT"])
    assert data_format == "channels_first"  # the file was read
    for found, wanted in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"floatx": "bfloat16"}', "floatx is 'bfloat16'; Keras expects 'float16', 'float32' or"),
        ('{"floatx": 16}', "floatx is 16; Keras expects 'float16', 'float32' or 'float64'"),
        ('{"floatx": "float"}', "floatx is 'float'; Keras expects"),
        ('{"image_data_format": ["channels_last"]}', "Keras expects 'channels_last' or"),
        ('{"floatx": null}', "floatx is None; Keras expects"),
        ('{"epsilon": 1}', "epsilon is 1; Keras expects a number with a decimal point"),
        ('{"image_data_format": "nhwc"}', "image_data_format is 'nhwc'; Keras expects 'channels_"),
        ("[]", "holds no settings of Keras"),
        ("{not JSON", None),  # Keras passes over it
        ('{"floatx": "float16", "epsilon": 1e-3, "more": 1}', None),
        (None, None),
    ],
)
def test_a_keras_json_that_keras_cannot_read_is_one_line(content, message, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert settings_file() == tmp_path / "keras.json"
    if content is not None:
        (tmp_path / "keras.json").write_text(content)
    if message is None:
        require_settings_file()
        return
    with pytest.raises(UsageError, match=f"{tmp_path}/keras.json.*{message}") as caught:
        require_settings_file()
    assert caught.value.hint


def test_a_command_tells_a_faulty_keras_json_in_one_line(tmp_path):
    (tmp_path / "keras.json").write_text('{"floatx": "bfloat16"}')
    program = "from ich_keras.cli import main; main(['presets'])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "KERAS_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"Error: {tmp_path}/keras.json: floatx is 'bfloat16'; Keras")
    assert "Traceback" not in done.stderr


def test_the_record_tells_the_settings():
    assert keras_settings() == {
        "image_data_format": "channels_last",
        "floatx": "float32",
        "epsilon": 1e-7,
        "dtype_policy": "float32",
    }
    assert environment_record("cpu").items() >= keras_settings().items()
