"""Exported runs: what files of others answer, beside the run itself."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from click.testing import CliRunner
from untrained_runs import untrained_run, validated

if keras.backend.backend() != "torch":
    pytest.skip("export needs the torch backend", allow_module_level=True)

import ich_keras
from ich_keras.cli import main
from ich_keras.errors import DataError, UsageError
from ich_keras.export import checking
from ich_keras.export.runs import export_run
from ich_keras.export.writing import NOTICE, read_torch
from ich_keras.inference import load_run
from ich_keras.labels import SIX
from ich_keras.metrics.calibration import with_temperature
from ich_keras.models.spec import ModelSpec
from ich_keras.run_folder import RunFolder

RUNS = {
    "slices": ("narrow_slices", ModelSpec((48, 48, 3), depth=10, width=4), {}),
    "stacks": (
        "narrow_stacks",
        ModelSpec((48, 48, 9), depth=10, width=4),
        {"view": "stack", "slices": 3},
    ),
    "slabs": (
        "narrow_slabs",
        ModelSpec((5, 48, 48, 1), depth=10, width=4, strides=(1, (1, 2, 2), (1, 2, 2), (1, 2, 2))),
        {},
    ),
    "series": (
        "narrow_series",
        ModelSpec((12, 48, 48, 1), depth=10, width=4),
        {"view": "series", "slices": 12, "intensity": "head-z-score"},
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for name, (preset, spec, data) in RUNS.items():
        made[name] = untrained_run(folder / name, preset, spec, **data)
        count = 60
        random = np.random.default_rng(1)
        truth = (random.random((count, 6)) < 0.4).astype(np.int8)
        truth[:, SIX.any_column] = truth[:, :5].max(axis=1)
        values = random.random((count, 6)).astype(np.float32)
        uids = [f"1.2.{n}" for n in range(count)]
        validated(made[name], truth, values, uids, np.arange(count), is_series=name == "series")
    return made


def wanted(run, hu):
    """The run's own answers, calibrated: float (n, labels)."""
    recipe, model = load_run(run, device="cpu", precision="float32")
    level = "series" if recipe.inputs.view.kind == "series" else "slice"
    temperature = json.loads((run / "choices.json").read_text())[level]["temperature"]
    raw = np.asarray(model.predict_on_batch(recipe.inputs.prepare(hu)))
    return with_temperature(raw, temperature, recipe.labels), raw


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("slices", 96),
        ("stacks", 48),
        ("slabs", 111),
        ("series", 48),
        *(
            pytest.param(name, side, marks=pytest.mark.slow)
            for name, side in (("slices", 111), ("slabs", 96), ("series", 192))
        ),
    ],
)
def test_a_torch_file_answers_as_the_run(runs, tmp_path, name, side):
    import torch

    made = export_run(runs[name], tmp_path / "x.pt2", "torch", side=side)
    assert [one.inputs for one in made.differences] == ["a phantom", "random values"]
    program, metadata = read_torch(made.path)
    assert metadata["labels"] == list(SIX.names) and metadata["notice"] == NOTICE
    for count in (1, 3):
        hu = np.random.default_rng(count).integers(-1100, 1500, (count, *made.shape), np.int16)
        calibrated, raw = (one.numpy() for one in program(torch.from_numpy(hu)))
        expected = wanted(runs[name], hu)
        assert np.abs(calibrated - expected[0]).max() < 1e-4
        assert np.abs(raw - expected[1]).max() < 1e-4
        assert calibrated.shape == (count, 6) and np.ptp(calibrated) > 1e-3


@pytest.mark.parametrize(
    "name",
    ["slices", *(pytest.param(name, marks=pytest.mark.slow) for name in ("slabs", "series"))],
)
def test_an_onnx_file_answers_as_the_run_and_says_what_it_is(runs, tmp_path, name):
    import onnxruntime

    path = tmp_path / "x.onnx"
    result = CliRunner().invoke(
        main, ["export", "--run", str(runs[name]), "--out", str(path), "--side", "64"]
    )
    assert result.exit_code == 0, result.output
    assert re.search(
        r"Largest difference from the run on \d+ samples of a phantom: \d", result.output
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    assert taken.name == "hu" and taken.type == "tensor(int16)"
    found = session.get_modelmeta().custom_metadata_map
    assert json.loads(found["labels"]) == list(SIX.names)
    assert json.loads(found["trained_on_phantoms"]) is True
    assert "Not for clinical use" in found["notice"]
    shape = tuple(taken.shape[1:])
    hu = np.random.default_rng(5).integers(-1100, 1500, (3, *shape), np.int16)
    calibrated, raw = session.run(["probabilities", "raw_probabilities"], {"hu": hu})
    expected = wanted(runs[name], hu)
    assert np.abs(calibrated - expected[0]).max() < 1e-4
    assert np.abs(raw - expected[1]).max() < 1e-4


def test_a_keras_file_takes_prepared_input(runs, tmp_path):
    made = export_run(runs["slices"], tmp_path / "x.keras", "keras", "prepared")
    assert made.shape == (48, 48, 3) and max(d.largest for d in made.differences) < 1e-6


def test_prepared_input_is_that_of_the_recipe(runs, tmp_path):
    made = export_run(runs["slabs"], tmp_path / "x.pt2", "torch", "prepared")
    assert made.shape == (5, 48, 48, 1)
    _, metadata = read_torch(made.path)
    assert metadata["takes"] == "prepared" and metadata["dtype"] == "float32"


def test_a_cache_gives_the_slices_to_compare(runs, tmp_path, phantom_cache):
    made = export_run(runs["slices"], tmp_path / "x.pt2", "torch", cache=phantom_cache)
    assert made.differences[0].inputs == "slices of the cache"
    assert made.shape == (phantom_cache.size, phantom_cache.size)


def test_a_file_that_answers_otherwise_is_not_kept(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "MOST_DIFFERENCE", -1.0)
    with pytest.raises(DataError, match=r"differs from the run by .* on a phantom"):
        export_run(runs["slices"], tmp_path / "x.pt2", "torch", side=48)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "tflite"}, "format 'tflite'; expected one of onnx, torch, keras"),
        ({"takes": "pixels"}, "input 'pixels'; expected one of hu, prepared"),
        ({"kind": "keras"}, "takes prepared input"),
        ({"kind": "torch", "side": 32}, "32x32 pixels are smaller than"),
        ({"kind": "onnx"}, "does not end in .onnx"),
    ],
)
def test_what_cannot_be_exported_is_refused(runs, tmp_path, options, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        export_run(runs["slices"], tmp_path / "x.pt2", **options)


def test_nothing_is_overwritten(runs, tmp_path):
    (tmp_path / "x.pt2").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        export_run(runs["slices"], tmp_path / "x.pt2", "torch")
    assert (tmp_path / "x.pt2").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *((kind, "onnx") for kind in ("gru", "lstm", "conv", "transformer", "attention")),
        *((kind, "torch") for kind in ("gru", "transformer")),
    ],
)
def test_a_sequence_head_answers_whole_series(runs, tmp_path, kind, form):
    from ich_keras.context import Context, write_context
    from ich_keras.inference import network_digest, tapped
    from ich_keras.models.sequence import SequenceSpec, adapt_features, sequence_head

    run = tmp_path / "run"
    shutil.copytree(runs["slices"], run)
    recipe, model = load_run(run, device="cpu", precision="float32")
    features = model.get_layer("avgpool").output.shape[-1]
    spec = SequenceSpec(kind, features=features, width=8, depth=2, heads=2)
    head = sequence_head(spec, recipe.labels, "logits")
    random = np.random.default_rng(0)
    adapt_features(head, random.normal(0.5, 2.0, (50, features)))
    for layer in head.layers:  # untrained heads change nothing
        if layer.name != "normalised" and layer.weights:
            layer.set_weights(
                [
                    random.normal(0, 0.3, w.shape) if "float" in w.dtype else np.asarray(w)
                    for w in layer.weights
                ]
            )
    blend = np.array([0, 0.25, 0.5, 0.75, 1, 1])
    write_context(run, head, spec, recipe.labels, blend, network_digest(model), {})
    suffix = {"torch": ".pt2", "onnx": ".onnx"}[form]
    made = export_run(run, tmp_path / f"x{suffix}", form, side=48)
    assert max(one.largest for one in made.differences) < 1e-4
    context = Context.load(RunFolder.at(run), recipe.labels, model)
    temperature = json.loads((run / "choices.json").read_text())["slice"]["temperature"]
    answer = checking.answers_of(made.path, form, temperature, recipe)
    for count in (1, 2, 37):
        hu = random.integers(-1100, 1500, (count, 48, 48), np.int16)
        places = np.cumsum(random.uniform(0.5, 30, count)).astype(np.float32)
        own, pooled = tapped(model).answer(recipe.inputs.prepare(hu))
        raw = context.answer(own, pooled, ["a"] * count, places)
        expected = with_temperature(raw, temperature, recipe.labels)
        assert np.abs(answer(hu, places) - expected).max() < 1e-4
        if count > 1 or kind != "attention":
            assert np.abs(raw - own).max() > 1e-3, "the head must matter"
    with pytest.raises(UsageError, match="a Keras file would hold one alone"):
        export_run(run, tmp_path / "x.keras", "keras", "prepared")


def test_the_example_of_the_readme_predicts(runs, tmp_path, phantom_folder, monkeypatch):
    from ich_keras.ct.dicom import read_hu

    readme = (Path(ich_keras.__file__).parent / "README.md").read_text()
    (code,) = re.findall(r"```python\n(import json\n.*?onnxruntime.*?)```", readme, re.DOTALL)
    path = sorted((phantom_folder / "images").rglob("*.dcm"))[0]
    hu = read_hu(path)
    export_run(runs["slices"], tmp_path / "run.onnx", side=len(hu))
    shutil.copy(path, tmp_path / "slice.dcm")
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    rows = dict(line.split() for line in printed.getvalue().splitlines())
    expected, _ = wanted(runs["slices"], hu[np.newaxis])
    assert list(rows) == list(SIX.names)
    assert [float(value) for value in rows.values()] == pytest.approx(expected[0], abs=2e-3)
