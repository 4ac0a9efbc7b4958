"""The road from a cache to an evaluated run, small: files, numbers, overfitting, faults, state."""

import copy
import dataclasses
import json
import os
import re
import shutil
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pydicom
import pytest
from narrow import preset_of

from ich_keras import checkpoints, files, fitting, training, training_data
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.ct.rejects import NothingUsable, TooManyRejects
from ich_keras.ct.series import index_folder
from ich_keras.data.reading import IndexedSlice
from ich_keras.errors import (
    DataError,
    DivergedError,
    EnvironmentProblem,
    LostState,
    StaleError,
    UsageError,
)
from ich_keras.evaluation import evaluate
from ich_keras.files import write_json
from ich_keras.inference import load_run, probabilities
from ich_keras.labels import LABELS, RSNA_LABELLING, SIX
from ich_keras.metrics.aggregation import aggregate, choose_rule
from ich_keras.metrics.binary import TRUTH_COLUMNS, binary_metrics
from ich_keras.metrics.calibration import fit_temperature, with_temperature
from ich_keras.metrics.operating import choose_thresholds
from ich_keras.metrics.smoothing import choose_kernel, smooth
from ich_keras.models.classifier import classifier, compile_classifier
from ich_keras.models.presets import PRESETS
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights import save_weights
from ich_keras.models.weights_file import read_record
from ich_keras.planning import plan_training, split_indices
from ich_keras.prediction import predict_folder, predict_index
from ich_keras.recipe import Recipe
from ich_keras.run_checksums import update_checksums
from ich_keras.run_folder import RunFolder
from ich_keras.training import train
from ich_keras.validation_scores import read_validation_scores

NARROW = "narrow"


@pytest.fixture(scope="module", autouse=True)
def narrow_preset():
    """A network an eighth as wide: the road is the same, the steps are short."""
    with preset_of(NARROW, ModelSpec(input_shape=(48, 48, 3), width=8)):
        yield


def config_of(**changes) -> RunConfig:
    fit = {"batch_size": 16, "epochs": 2, "learning_rate": 1e-3, **changes.pop("fit", {})}
    data = {"size": 48, "balance": True, **changes.pop("data", {})}
    changes.setdefault("precision", "float32")  # the same on every machine
    return RunConfig(preset=NARROW, data=DataConfig(**data), fit=FitConfig(**fit), **changes)


@pytest.fixture(scope="module")
def run(phantom_cache, tmp_path_factory, narrow_preset):
    told = []
    out = train(
        config_of(), phantom_cache, tmp_path_factory.mktemp("run") / "run", tell=told.append
    )
    assert len(told) == 3
    assert told[0] == "Training from scratch, learning rate 0.001 (constant), float32."
    return out


def test_the_run_folder_holds_what_made_the_numbers(run, phantom_cache):
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.json",
        "recipe.json",
        "environment.json",
        "data.json",
        "seen.npz",
        "domain.npz",
        "split.json",
        "history.csv",
        "best.weights.h5",
        "choices.json",
        "model.keras",
        "checksums.json",
        "state",
        "report.md",
        "report.html",
        *(
            f"{what}-{part}.{end}"
            for what, end in (("predictions", "csv"), ("metrics", "json"))
            for part in ("valid", "test")
        ),
    }
    # What was asked for, and what was made of it.
    assert RunFolder(run).config() == config_of()
    decided = config_of(
        backend=keras.config.backend(),
        device="cpu",
        data={"intensity": "windows", "view": "slice", "slices": 1},
        fit={"accumulate": 1},
    )
    recipe = RunFolder(run).recipe()
    assert recipe.as_config() == decided
    assert recipe == Recipe.of(decided, phantom_cache.size)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["backend"] == keras.config.backend()
    assert environment["device"] == "cpu"
    assert environment["versions"]["keras"] == keras.__version__
    assert re.fullmatch(r"\d{4}(-\d\d){2}T\d\d(:\d\d){2}\+00:00", environment["started"])
    assert environment["device_name"] == environment["processor"] != ""
    data = json.loads((run / "data.json").read_text())
    assert data["synthetic"] is True
    assert data["cache"] == phantom_cache.fingerprint
    assert recipe.inputs.cache_size == phantom_cache.size


def test_metrics_can_be_made_again_from_the_predictions(run):
    predictions = pd.read_csv(run / "predictions-test.csv")
    metrics = json.loads((run / "metrics-test.json").read_text())["slice"]
    again = binary_metrics(
        predictions[list(TRUTH_COLUMNS)].to_numpy(), predictions[list(LABELS)].to_numpy()
    )
    assert metrics["log_loss"] == pytest.approx(again["log_loss"], rel=1e-5)
    assert metrics["auroc"]["any"] == pytest.approx(again["auroc"]["any"], abs=1e-12)
    assert metrics["baseline"]["prevalence"]["source"] == "training set"


def test_choices_are_made_on_validation_and_kept_for_test(run, phantom_cache):
    choices = json.loads((run / "choices.json").read_text())
    valid, test = (
        json.loads((run / f"metrics-{name}.json").read_text()) for name in ("valid", "test")
    )
    predictions = pd.read_csv(run / "predictions-valid.csv")
    truth, values = (predictions[list(names)].to_numpy() for names in (TRUTH_COLUMNS, LABELS))
    uids, positions = predictions["series_instance_uid"], predictions["position_mm"]
    smoothing = choices["smoothing"]
    raw = predictions[[f"unsmoothed_{name}" for name in LABELS]].to_numpy()
    kernel, losses = choose_kernel(truth, raw, uids, positions)
    assert smoothing["kernel"] == kernel != "none"
    assert smoothing["log_loss"] == pytest.approx(losses, rel=1e-4)
    np.testing.assert_allclose(values, smooth(raw, uids, positions, kernel), rtol=1e-4)
    rule, losses = choose_rule(truth, values, uids)
    assert choices["aggregation"]["rule"] == rule
    assert choices["aggregation"]["log_loss"] == pytest.approx(losses, rel=1e-4)
    assert choices["slice"]["temperature"] == pytest.approx(
        fit_temperature(truth, values), rel=1e-3
    )
    for metrics in (valid, test):
        assert metrics["series"]["aggregation"] == choices["aggregation"]
        assert metrics["slice"]["smoothing"] == smoothing
        for level in ("slice", "series"):
            found = metrics[level]
            before = found["unsmoothed"]
            gain = found["log_loss"] - before["log_loss"]
            assert before["gain"]["log_loss"]["value"] == pytest.approx(gain)
            assert found["calibration"]["temperature"] == choices[level]["temperature"]
            for wanted, rates in found["operating"]["at_specificity"].items():
                for label, rate in rates.items():
                    assert rate["threshold"] == choices[level]["thresholds"][wanted][label]
            interval = found["intervals"]["metrics"]["log_loss"]
            assert interval["low"] <= found["log_loss"] <= interval["high"]
            assert interval["value"] == pytest.approx(found["log_loss"])
    # Not on slices of another size, which would become other images.
    larger = types.SimpleNamespace(size=64, slices=phantom_cache.slices, path="larger", labels=SIX)
    with pytest.raises(UsageError, match="have 64x64 pixels; the run was trained from 48x48"):
        evaluate(run, larger, "valid")
    # Evaluating again changes no choice; the series' probabilities follow the kept rule.
    before = (run / "choices.json").read_text()
    other = choices["slice"] | {"temperature": 3.0}
    write_json(run / "choices.json", choices | {"slice": other})
    update_checksums(RunFolder(run), ["choices.json"])
    assert evaluate(run, phantom_cache, "valid")["slice"]["calibration"]["temperature"] == 3.0
    assert json.loads((run / "choices.json").read_text())["slice"] == other
    (run / "choices.json").write_text(before)
    update_checksums(RunFolder(run), ["choices.json"])
    evaluate(run, phantom_cache, "valid")
    again = evaluate(run, phantom_cache, "test")
    assert (run / "choices.json").read_text() == before
    predictions = pd.read_csv(run / "predictions-test.csv")
    uids = predictions["series_instance_uid"]
    series = aggregate(predictions[list(LABELS)].to_numpy(), uids, rule)
    labels = predictions.groupby(uids, sort=False)[list(TRUTH_COLUMNS)].max()
    expected = binary_metrics(labels.to_numpy(), series.to_numpy())["log_loss"]
    assert again["series"]["log_loss"] == pytest.approx(expected, rel=1e-4)
    patients = phantom_cache.slices.set_index("sop_instance_uid")["patient_id"]
    count = patients[predictions["sop_instance_uid"]].nunique()
    assert again["slice"]["intervals"]["patients"] == count


def test_thresholds_come_out_again_of_the_predictions_to_the_last_digit(run, phantom_cache):
    choices = json.loads((run / "choices.json").read_text())
    found = read_validation_scores(RunFolder(run), SIX)
    for level in ("slice", "series"):
        scores = found.level(level, choices["aggregation"]["rule"])
        assert choose_thresholds(scores.truth, scores.values) == choices[level]["thresholds"]


def test_rows_of_one_patient_have_one_number(run, phantom_cache, tmp_path):
    copy = RunFolder(shutil.copytree(run, tmp_path / "run"))
    evaluate(copy, phantom_cache, "train")  # where some have several series
    table = pd.read_csv(copy.predictions_file("train"))
    owners = phantom_cache.slices.set_index("sop_instance_uid")["patient_id"]
    owners = owners[table["sop_instance_uid"]]
    numbers = table["patient_number"]
    assert len(set(zip(owners, numbers, strict=True))) == owners.nunique() == numbers.nunique()
    assert owners.nunique() < table["series_instance_uid"].nunique()


def test_the_best_epoch_is_kept_and_scored(run):
    history = pd.read_csv(run / "history.csv")
    assert list(history["epoch"]) == [1, 2]
    valid = json.loads((run / "metrics-valid.json").read_text())["slice"]
    found = valid["unsmoothed"]["log_loss"]
    assert found == pytest.approx(history["valid_log_loss"].min(), rel=1e-5)


def test_splits_share_no_patient(run, phantom_cache):
    slices = phantom_cache.slices.set_index("sop_instance_uid")["patient_id"]
    valid, test = (
        set(slices[pd.read_csv(run / f"predictions-{part}.csv")["sop_instance_uid"]])
        for part in ("valid", "test")
    )
    members = json.loads((run / "split.json").read_text())["members"]["train"]
    train_patients = set(
        phantom_cache.slices.loc[phantom_cache.slices["series_uid"].isin(members), "patient_id"]
    )
    assert train_patients
    assert not valid & test
    assert not train_patients & (valid | test)


def test_the_report_marks_phantoms_and_shows_baselines(run):
    report = (run / "report.md").read_text()
    assert "**Synthetic data.**" in report
    assert "not for clinical use" in report
    assert "prevalence of the training set" in report
    assert "all negative" in report


def test_the_keras_file_gives_the_same_probabilities(run, phantom_cache):
    _, model = load_run(run)
    saved = keras.saving.load_model(run / "model.keras")
    from ich_keras.data.batches import slice_batches

    batches = list(slice_batches(phantom_cache, np.arange(10), batch_size=4))
    # The loaded one takes Keras' own steps, which do not fold normalisation: equal up to rounding.
    np.testing.assert_allclose(
        probabilities(model, batches, 10), probabilities(saved, batches, 10), rtol=1e-4, atol=1e-6
    )


def test_the_same_seed_gives_the_same_run(run, phantom_cache, tmp_path):
    again = train(config_of(data={"loader_workers": 1}), phantom_cache, tmp_path / "run")
    pd.testing.assert_frame_equal(
        pd.read_csv(run / "predictions-test.csv"), pd.read_csv(again / "predictions-test.csv")
    )


def test_a_prediction_fails_when_too_many_files_are_refused(run, phantom_folder, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted((phantom_folder / "images").iterdir())[:10]:
        shutil.copy(path, images)
    paths = sorted(images.iterdir())
    paths[0].write_bytes(paths[0].read_bytes()[:200])
    for path in paths[1:3]:  # seen only when the pixels are read
        path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(TooManyRejects, match=r"3 of 10 files.*--max-rejects 0\.3"):
        predict_folder(run, images, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rejects.csv"]
    rejects = pd.read_csv(tmp_path / "out" / "rejects.csv")
    assert rejects["path"].tolist() == [path.name for path in paths[:3]]
    result = predict_folder(run, images, tmp_path / "out", max_rejects=0.3)
    assert (len(result.slices), len(result.rejects)) == (7, 3)
    with pytest.raises(UsageError, match="max_rejects is nan; expected a share"):
        predict_folder(run, images, tmp_path / "third", max_rejects=float("nan"))
    assert not (tmp_path / "third").exists()


# pydicom's warning about RSNA's own kind of identifier, when the test reads a file by itself.
@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_a_folder_is_predicted_as_the_cache_was(run, phantom_folder, tmp_path):
    result = predict_folder(run, phantom_folder / "images", tmp_path / "out")
    written = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert list(written.columns) == [
        "sop_instance_uid",
        "series_instance_uid",
        "slice_index",
        "position_mm",
        "path",
        "instance_number",
        "image_position_z_mm",
        "averaged_slice",
        *(f"{kind}{label}" for kind in ("", "raw_", "decision_", "group_") for label in LABELS),
        "trained_on",
    ]
    assert set(written["trained_on"]) == {"drawn phantoms only"}
    for row in written.iloc[[0, -1]].itertuples():
        image = pydicom.dcmread(phantom_folder / "images" / row.path)
        assert image.SOPInstanceUID == row.sop_instance_uid
        assert float(image.ImagePositionPatient[2]) == row.image_position_z_mm
    assert (tmp_path / "out" / "notice.txt").read_text() == f"{result.notice}\n"
    assert "drawn phantoms only: its answers say nothing about patients" in result.notice
    assert "not for clinical use" in result.notice
    held_out = pd.read_csv(run / "predictions-test.csv").set_index("sop_instance_uid")
    both = written.set_index("sop_instance_uid").loc[held_out.index]
    raw = [f"raw_{label}" for label in LABELS]
    np.testing.assert_allclose(both[raw], held_out[list(LABELS)], atol=1e-5)
    temperature = json.loads((run / "choices.json").read_text())["slice"]["temperature"]
    expected = with_temperature(held_out[list(LABELS)].to_numpy(), temperature)
    np.testing.assert_allclose(both[list(LABELS)], expected, atol=1e-4)
    series = pd.read_csv(tmp_path / "out" / "series.csv").set_index("series_instance_uid")
    rule = json.loads((run / "choices.json").read_text())["aggregation"]["rule"]
    uids = written["series_instance_uid"]
    joined = aggregate(written[raw].to_numpy(), uids, rule)
    np.testing.assert_allclose(series.loc[joined.index, raw], joined, atol=1e-6)
    assert series["num_slices"].sum() == len(written) == len(result.slices)
    assert (tmp_path / "out" / "rejects.csv").is_file()
    with pytest.raises(UsageError, match="already exists"):
        predict_folder(run, phantom_folder / "images", tmp_path / "out")
    steps = []
    with pytest.raises(EnvironmentProblem, match="cannot be created"):
        below = tmp_path / "out" / "rejects.csv" / "out"
        predict_folder(run, phantom_folder / "images", below, progress=lambda *a: steps.append(a))
    assert steps == []
    with pytest.raises(NothingUsable, match="no CT slice"):
        predict_folder(run, tmp_path / "out", tmp_path / "none")
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["rejects.csv"]
    assert set(pd.read_csv(tmp_path / "none" / "rejects.csv")["code"]) == {"NOT_DICOM"}


def test_workers_predict_the_same(run, phantom_folder, tmp_path):
    index = index_folder(shutil.copytree(phantom_folder / "images", tmp_path / "images"))
    torn = Path(index.slices["container"].iloc[3])
    torn.write_bytes(torn.read_bytes()[:-1000])
    recipe, model = load_run(run)
    alone, together = (predict_index(model, index, recipe, workers=workers) for workers in (0, 2))
    for name in ("slices", "series", "rejects"):
        pd.testing.assert_frame_equal(getattr(together, name), getattr(alone, name))
    assert str(torn) in set(together.rejects["path"])
    left_out = set(index.slices["sop_instance_uid"]) - set(together.slices["sop_instance_uid"])
    assert left_out == {index.slices["sop_instance_uid"].iloc[3]}


@pytest.mark.parametrize(
    ("bytes_ahead", "workers", "begun"),
    [(1000 * 40 * 40 * 2, 4, [4]), (5 * 40 * 40 * 2, 4, []), (100 * 40 * 40 * 2, 8, [3])],
)
def test_series_are_read_ahead_within_a_budget(monkeypatch, bytes_ahead, workers, begun):
    from ich_keras import prediction_reading

    pools = []

    def pool(number, *_):
        pools.append(number)
        return ThreadPoolExecutor(number)

    monkeypatch.setattr(prediction_reading, "AHEAD_BYTES", bytes_ahead)
    monkeypatch.setattr(prediction_reading, "process_pool", pool)
    with prediction_reading.series_reading(40, 20, 30, workers) as read:
        absent = IndexedSlice("absent", *[None] * (len(IndexedSlice._fields) - 1))
        found = list(read([[absent]] * 3))
    assert pools == begun
    assert [bad[0][0] for _, _, bad, _ in found] == ["absent"] * 3


def die(size, paths):
    """Stand in for `read_series` in a worker process that is killed."""
    os._exit(9)


def test_a_worker_that_dies_while_predicting_is_an_error(run, phantom_folder, monkeypatch):
    from ich_keras import prediction_reading

    monkeypatch.setattr(prediction_reading, "read_series", die)
    index = index_folder(phantom_folder / "images")
    recipe, model = load_run(run)
    with pytest.raises(EnvironmentProblem, match="reading slices has died"):
        predict_index(model, index, recipe, workers=1)


def test_evaluate_repeats_the_numbers(run, phantom_cache):
    before = (run / "metrics-test.json").read_text()
    metrics = evaluate(run, phantom_cache, "test")
    assert json.loads(before)["slice"]["log_loss"] == pytest.approx(
        metrics["slice"]["log_loss"], rel=1e-6
    )
    with pytest.raises(UsageError, match="split 'tset'"):
        evaluate(run, phantom_cache, "tset")


def test_a_run_that_is_none_is_refused(tmp_path, phantom_cache):
    with pytest.raises(StaleError, match="is not a run folder"):
        evaluate(tmp_path, phantom_cache)


@pytest.mark.slow
def test_it_can_overfit_so_labels_meet_pixels(phantom_cache, tmp_path):
    few = config_of(
        data={"split": "none", "augment": "none", "balance": False, "limit_series": 2},
        fit={"epochs": 40, "learning_rate": 3e-3},
    )
    out = train(few, phantom_cache, tmp_path / "run")
    metrics = (
        json.loads((out / "metrics-train.json").read_text())
        if (out / "metrics-train.json").is_file()
        else evaluate(out, phantom_cache, "train")
    )
    assert metrics["slice"]["log_loss"] < 0.05
    assert "deliberate overfitting" in (out / "report.md").read_text()


def test_an_augmentation_of_your_own_is_recorded_and_asked_for_again(
    phantom_cache, tmp_path, crash_after
):
    """The seeds that the function receives make each sample's change; nothing else does."""
    seeds = []

    def noted(images, seed):
        seeds.append(seed)
        return images

    few = config_of(data={"limit_series": 12})
    out = tmp_path / "run"
    crash_after(1)
    with pytest.raises(Crash):
        train(few, phantom_cache, out, augment=noted)
    plan = json.loads((out / "data.json").read_text())["plan"]
    assert len(set(seeds)) == plan["samples_per_epoch"]  # one batch is drawn twice, to build
    asked = RunFolder(out).config()
    assert asked.data.augment == "own"
    assert RunFolder(out).recipe().training.own_augment.endswith("noted")
    with pytest.raises(UsageError, match="data.augment is 'own'"):
        train(asked, phantom_cache, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    with pytest.raises(UsageError, match="began with the augmentation .*noted; now none is given"):
        training.resume(out, phantom_cache)


def test_divergence_stops_and_keeps_only_finite_weights(phantom_cache, tmp_path, monkeypatch):
    save_state = checkpoints.save_state

    def then_fast(folder, model, epoch, state):
        save_state(folder, model, epoch, state)
        model.optimizer.learning_rate = 1e30

    monkeypatch.setattr(fitting, "save_state", then_fast)
    with pytest.raises(DivergedError) as caught:
        train(config_of(fit={"epochs": 3}), phantom_cache, tmp_path / "run")
    assert caught.value.exit_code == 5
    files = list((tmp_path / "run").rglob("*.weights.h5"))
    assert {file.name for file in files} == {"best.weights.h5", checkpoints.WEIGHTS}
    for file in files:
        model = classifier(PRESETS[NARROW].spec)
        model.load_weights(file)
        assert all(np.isfinite(np.asarray(w)).all() for w in model.get_weights())


def test_the_plan_tells_counts_and_writes_nothing(phantom_cache):
    plan = plan_training(phantom_cache, config_of())
    assert sum(plan.num_slices.values()) == len(phantom_cache.slices)
    assert plan.total_steps == 2 * plan.steps_per_epoch
    assert plan.samples_per_epoch <= 2 * plan.num_positive["any"]
    assert plan.learning_rate == 1e-3


def tables_of(cache, slices):
    return types.SimpleNamespace(slices=slices, series=cache.series, labelling=RSNA_LABELLING)


def test_data_that_cannot_train_are_refused(phantom_cache, tmp_path):
    slices = phantom_cache.slices
    with pytest.raises(DataError, match="no labels"):
        plan_training(tables_of(phantom_cache, slices.drop(columns="any")), config_of())
    with pytest.raises(DataError, match="PatientID"):
        plan_training(tables_of(phantom_cache, slices.assign(patient_id="")), config_of())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").touch()
    with pytest.raises(UsageError, match="already exists"):
        train(config_of(), phantom_cache, tmp_path / "run")


def narrow_model(seed):
    keras.utils.set_random_seed(seed)
    model = compile_classifier(
        classifier(PRESETS[NARROW].spec, output="logits"), 1e-3, schedule="cosine", total_steps=8
    )
    random = np.random.default_rng(0)
    images = random.normal(size=(4, 8, 48, 48, 3)).astype("float32")
    truth = random.integers(0, 2, (4, 8, 6)).astype("float32")
    return model, list(zip(images, truth, strict=True))


def test_state_brings_a_training_back_exactly(tmp_path):
    def one_epoch(model, batches):
        keras.utils.set_random_seed(7)  # as training does when an epoch begins
        for batch in batches:
            model.train_on_batch(*batch)

    model, batches = narrow_model(0)
    one_epoch(model, batches[:2])
    checkpoints.save_state(tmp_path, model, 1, {"best_loss": 0.5})
    one_epoch(model, batches[2:])

    resumed, _ = narrow_model(1)
    assert checkpoints.load_state(tmp_path, resumed) == {"best_loss": 0.5, "epoch": 1}
    one_epoch(resumed, batches[2:])
    for one, other in zip(model.weights, resumed.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=one.path)


class Crash(Exception):
    pass


@pytest.fixture
def crash_after(monkeypatch):
    """Let the next training die once an epoch is saved, or in the evaluation of a split."""
    save_state, evaluate_split = checkpoints.save_state, training.evaluate_network

    def arrange(moment):
        def saved(folder, model, epoch, state):
            save_state(folder, model, epoch, state)
            if epoch == moment:
                raise Crash

        def evaluated(run, recipe, model, cache, split, progress):
            if split == moment:
                raise Crash
            return evaluate_split(run, recipe, model, cache, split, progress)

        monkeypatch.setattr(fitting, "save_state", saved)
        monkeypatch.setattr(training, "evaluate_network", evaluated)

    return arrange


def arrays_of(folder):
    model = classifier(PRESETS[NARROW].spec)
    model.load_weights(folder / "best.weights.h5")
    with np.load(folder / "state" / "epoch-0004" / "variables.npz") as slots:
        return [np.asarray(w) for w in model.get_weights()] + [slots[k] for k in sorted(slots)]


@pytest.mark.slow
def test_an_interrupted_training_goes_on_as_if_nothing_had_been(
    phantom_cache, tmp_path, crash_after
):
    # An odd number of batches, two of which make one step: half a step is carried over.
    config = config_of(fit={"epochs": 4, "accumulate": 2, "schedule": "cosine"})
    backend = keras.backend.backend()
    assert plan_training(phantom_cache, config).steps_per_epoch % 2
    whole = train(config, phantom_cache, tmp_path / "whole")
    run, told = tmp_path / "run", []
    crash_after(1)
    with pytest.raises(Crash):
        train(config, phantom_cache, run)
    as_begun = (run / "config.json").read_text()
    for moment in (3, "test"):
        crash_after(moment)
        with pytest.raises(Crash):
            training.resume(run, phantom_cache, tell=told.append)
        assert RunFolder(run).is_interrupted
    crash_after(None)
    assert training.resume(run, phantom_cache, tell=told.append) == run
    assert [line for line in told if line.startswith("Resuming")] == [
        f"Resuming after epoch {epoch} of 4, {backend}, cpu, float32." for epoch in (1, 3, 4)
    ]
    for one, other in zip(arrays_of(run), arrays_of(whole), strict=True):
        np.testing.assert_array_equal(one, other)
    histories = [pd.read_csv(folder / "history.csv") for folder in (run, whole)]
    pd.testing.assert_frame_equal(*(table.drop(columns="seconds") for table in histories))
    assert (histories[0]["seconds"] > 0).all()
    for name in ("metrics-valid.json", "metrics-test.json", "predictions-test.csv", "choices.json"):
        assert (run / name).read_text() == (whole / name).read_text()
    assert (run / "config.json").read_text() == as_begun
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}
    with pytest.raises(UsageError, match="the training in .* is finished"):
        training.resume(run, phantom_cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"fit": {"freeze": "layer2"}}, {"fit": {"backbone_factor": 0.1}}, {"norm": "frozen"}],
)
def test_it_goes_on_without_the_weights_it_began_from(
    run, phantom_cache, tmp_path, crash_after, settings
):
    first = Path(shutil.copy(run / "best.weights.h5", tmp_path / "first.weights.h5"))
    config = config_of(weights=str(first), **copy.deepcopy(settings))
    whole = train(config, phantom_cache, tmp_path / "whole")
    crash_after(1)
    with pytest.raises(Crash):
        train(config, phantom_cache, tmp_path / "run")
    first.unlink()
    crash_after(None)
    out = training.resume(tmp_path / "run", phantom_cache)
    histories = [pd.read_csv(folder / "history.csv") for folder in (out, whole)]
    pd.testing.assert_frame_equal(*(table.drop(columns="seconds") for table in histories))


def test_what_was_chosen_before_the_end_is_chosen_again(phantom_cache, tmp_path, crash_after):
    whole = train(config_of(), phantom_cache, tmp_path / "whole")
    crash_after(1)
    with pytest.raises(Crash):
        train(config_of(), phantom_cache, tmp_path / "run")
    crash_after(None)
    interrupted = RunFolder(tmp_path / "run")
    with pytest.raises(StaleError, match="is not finished") as caught:
        evaluate(interrupted, phantom_cache, "valid")
    assert caught.value.hint.endswith(f"finish it: ich-train --resume {interrupted}")
    # As an evaluation that was interrupted leaves it.
    early = "{}"
    interrupted.choices_file.write_text(early)
    out = training.resume(tmp_path / "run", phantom_cache)
    assert (out / "choices.json").read_text() == (whole / "choices.json").read_text() != early


def test_best_weights_of_a_lost_epoch_are_put_right(phantom_cache, tmp_path, crash_after):
    """As a crash leaves them between writing the best weights and the state."""
    out, told = tmp_path / "run", []
    crash_after(1)
    with pytest.raises(Crash):
        train(config_of(fit={"epochs": 3}), phantom_cache, out)
    best = out / "best.weights.h5"
    as_written = best.read_bytes()
    other = classifier(PRESETS[NARROW].spec)
    record = read_record(best)
    assert record["epoch"] == 1
    save_weights(other, best, record | {"epoch": 2})
    crash_after(2)  # the next epoch dies again, after its state
    with pytest.raises(Crash):
        training.resume(out, phantom_cache, tell=told.append)
    state = files.read_json(out / "state" / "epoch-0002" / "state.json")
    history = pd.DataFrame(state["history"])
    assert state["best_epoch"] == history["valid_log_loss"].idxmin() + 1
    kept = read_record(best)["epoch"]
    assert kept == state["best_epoch"]
    if kept == 1:
        assert best.read_bytes() == as_written
    # The best of an epoch before the last is gone for good: the next ones take over.
    save_weights(other, best, record | {"epoch": 3})
    del state["files"], state["checksum"]
    changed = state | {"best_epoch": 1, "best_loss": 0.0}
    checkpoints.write_state(out / "state" / "epoch-0002", changed)
    crash_after(None)
    training.resume(out, phantom_cache, tell=told.append)
    assert "The best weights so far (epoch 1) are lost; the next epoch counts as the best." in told
    assert read_record(best)["epoch"] == 3


def changed_copy(cache, **changes):
    """Return a cache in which attributes are others."""
    other = copy.copy(cache)
    other.__dict__.update(changes)
    return other


def test_what_cannot_go_on_is_refused(phantom_cache, tmp_path, crash_after):
    out = tmp_path / "run"
    (out / "state" / ".partial-epoch-0001").mkdir(parents=True)
    with pytest.raises(StaleError, match="is not an interrupted training: it has no state"):
        training.resume(out, phantom_cache)
    shutil.rmtree(out)
    crash_after(1)
    with pytest.raises(Crash):
        train(config_of(), phantom_cache, out)
    with (
        files.lock(out / "training.lock"),
        pytest.raises(StaleError, match="training.lock is locked by another process"),
    ):
        training.resume(out, phantom_cache)
    with pytest.raises(StaleError, match=r"is not the cache .* began with: fingerprint "):
        training.resume(out, changed_copy(phantom_cache, slices=phantom_cache.slices[:-1]))
    slices = phantom_cache.slices.assign(epidural=1 - phantom_cache.slices["epidural"])
    with pytest.raises(StaleError, match="the labels are not those that the training in .* began"):
        training.resume(out, changed_copy(phantom_cache, slices=slices))
    shutil.rmtree(out / "state" / "epoch-0001")
    (out / "state" / "epoch-0001").mkdir()
    with pytest.raises(LostState, match="state.json"):
        training.resume(out, phantom_cache)


def test_another_environment_is_told(phantom_cache, tmp_path, crash_after, monkeypatch):
    out, told = tmp_path / "run", []
    crash_after(1)
    with pytest.raises(Crash):
        train(config_of(), phantom_cache, out)
    before = files.read_json(out / "environment.json")
    assert training_data.changed_environment(out, "cpu") == []
    recipe = files.read_json(out / "recipe.json")
    write_json(out / "recipe.json", recipe | {"precision": "bfloat16"})
    with monkeypatch.context() as patch:
        patch.setattr("ich_keras.recipe.choose_precision", lambda name, device: "float32")
        assert training_data.changed_environment(out, "cpu") == ["precision float32, was bfloat16"]
    write_json(out / "recipe.json", recipe)
    older = {name: value for name, value in before.items() if name != "device_name"}
    write_json(out / "environment.json", older | {"processor": "another"})
    (line,) = training_data.changed_environment(out, "cpu")
    assert line == f"device_name {before['device_name']}, was None"
    before["versions"]["torch"] = "1.0"
    write_json(out / "environment.json", before)
    crash_after(None)
    training.resume(out, phantom_cache, tell=told.append)
    assert told[0].startswith("Different from the original environment: torch ") and told[
        0
    ].endswith("was 1.0.")
    [noted] = files.read_json(out / "environment.json")["resumed"]
    assert noted == {"epoch": 1, "changed": [told[0].removesuffix(".").split(": ")[1]]}


def test_of_two_trainings_in_one_folder_the_second_leaves_the_first_alone(
    phantom_cache, tmp_path, monkeypatch
):
    out = tmp_path / "run"

    def absent(path):  # as it was a moment before the other one began
        return path

    monkeypatch.setattr(training, "require_absent", absent)
    with (
        files.lock(out / "training.lock"),
        pytest.raises(StaleError, match="training.lock is locked by another process"),
    ):
        write_json(out / "config.json", {})
        train(config_of(), phantom_cache, out)
    assert (out / "config.json").is_file()
    monkeypatch.undo()
    monkeypatch.setattr(training, "require_absent", lambda path: monkeypatch.undo() or path)
    with pytest.raises(UsageError, match="already exists"):
        train(config_of(), phantom_cache, out)
    assert (out / "config.json").is_file()


@pytest.mark.parametrize("name", ["model.weights.h5", "variables.npz", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "flipped"])
def test_a_damaged_state_is_passed_over(tmp_path, name, damage):
    model, batches = narrow_model(0)
    for epoch in (1, 2):
        model.train_on_batch(*batches[epoch])
        checkpoints.save_state(tmp_path, model, epoch, {})
        if epoch == 1:
            before = [np.array(v) for v in (*model.weights, *model.optimizer.variables)]
    path = tmp_path / "epoch-0002" / name
    raw = path.read_bytes()
    flipped = raw.replace(b"PK\x01\x02", b"PK\x01\x03", 1).replace(b"{", b"[", 1)
    flipped = flipped[:8] + bytes(8) + flipped[16:] if name == "model.weights.h5" else flipped
    changed = {"cut": raw[: len(raw) // 2], "empty": b"", "gone": b"", "flipped": flipped}
    path.write_bytes(changed[damage])
    if damage == "gone":
        path.unlink()
    again, told = narrow_model(1)[0], []
    assert checkpoints.load_state(tmp_path, again, told.append)["epoch"] == 1
    after = (*again.weights, *again.optimizer.variables)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, np.asarray(other))
    assert (
        len(told) == 1
        and told[0].startswith("Skipping a damaged state: ")
        and "epoch-0002" in told[0]
    )
    shutil.rmtree(tmp_path / "epoch-0001")
    with pytest.raises(LostState, match="epoch-0002"):
        checkpoints.load_state(tmp_path, again)
    shutil.rmtree(tmp_path / "epoch-0002")
    (tmp_path / "epoch-old").mkdir()
    with pytest.raises(LostState, match="holds no state of a training"):
        checkpoints.load_state(tmp_path, again)


def test_a_lost_pointer_takes_the_newest_state(tmp_path):
    model, batches = narrow_model(0)
    model.train_on_batch(*batches[0])
    for epoch in (9, 10):
        checkpoints.save_state(tmp_path, model, epoch, {})
    for content in ("", "{}", '{"state": 3}', '{"state": "epoch"}', None):
        pointer = tmp_path / checkpoints.POINTER
        pointer.write_text(content) if content is not None else pointer.unlink()
        assert checkpoints.load_state(tmp_path, model)["epoch"] == 10


def test_a_crash_between_a_state_and_its_pointer_keeps_the_state_before(tmp_path, monkeypatch):
    model, batches = narrow_model(0)
    model.train_on_batch(*batches[0])
    checkpoints.save_state(tmp_path, model, 1, {})

    def crash_at_the_pointer(path, content):
        if path.name == checkpoints.POINTER:
            raise KeyboardInterrupt
        write_json(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_json", crash_at_the_pointer)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save_state(tmp_path, model, 2, {})
    assert sorted(p.name for p in tmp_path.glob("epoch-*")) == ["epoch-0001", "epoch-0002"]
    assert checkpoints.load_state(tmp_path, narrow_model(1)[0])["epoch"] == 1
    checkpoints.save_state(tmp_path, model, 2, {})
    assert checkpoints.load_state(tmp_path, narrow_model(1)[0])["epoch"] == 2


def test_a_crash_before_the_pointer_moves_keeps_the_state_before(tmp_path, monkeypatch):
    model, batches = narrow_model(0)
    model.train_on_batch(*batches[0])
    checkpoints.save_state(tmp_path, model, 1, {})

    def crash(*_):
        raise KeyboardInterrupt

    for name in ("replace", "write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, name, crash)
            with pytest.raises(KeyboardInterrupt):
                checkpoints.save_state(tmp_path, model, 2, {})
        assert checkpoints.load_state(tmp_path, narrow_model(1)[0])["epoch"] == 1
    for epoch in (2, 3, 4):
        checkpoints.save_state(tmp_path, model, epoch, {})
    assert checkpoints.load_state(tmp_path, narrow_model(1)[0])["epoch"] == 4
    assert sorted(p.name for p in tmp_path.glob("epoch-*")) == ["epoch-0003", "epoch-0004"]
    for epoch in (9_998, 9_999, 10_000):
        checkpoints.save_state(tmp_path, model, epoch, {})
    assert checkpoints.load_state(tmp_path, narrow_model(1)[0])["epoch"] == 10_000


def test_a_state_of_another_network_is_refused(tmp_path):
    model, batches = narrow_model(0)
    model.train_on_batch(*batches[0])
    checkpoints.save_state(tmp_path, model, 1, {})
    arrays = dict(np.load(tmp_path / "epoch-0001" / "variables.npz"))
    del arrays[min(arrays)]
    with open(tmp_path / "epoch-0001" / "variables.npz", "wb") as stream:
        np.savez(stream, **arrays)
    checkpoints.write_state(tmp_path / "epoch-0001", {"epoch": 1})
    with pytest.raises(LostState, match="1 variables differ; the first is generator/0"):
        checkpoints.load_state(tmp_path, narrow_model(1)[0])


def test_training_starts_from_given_weights(run, phantom_cache, tmp_path):
    config = config_of(
        weights=str(run / "best.weights.h5"), fit={"epochs": 1, "learning_rate": 1e-9}
    )
    out = train(dataclasses.replace(config), phantom_cache, tmp_path / "run")
    first = pd.read_csv(out / "history.csv")["valid_log_loss"][0]
    best = pd.read_csv(run / "history.csv")["valid_log_loss"].min()
    assert first == pytest.approx(best, rel=0.2)


def test_slices_without_labels_are_not_trained_on(phantom_cache):
    slices = phantom_cache.slices.copy()
    slices.loc[:9, list(LABELS)] = -1
    _, indices = split_indices(slices, Recipe.of(config_of()))
    rows = np.concatenate(list(indices.values()))
    assert len(rows) == len(slices) - 10
    assert rows.min() >= 10 or not set(range(10)) & set(rows)


def test_predictions_do_not_run_in_a_spreadsheet(tmp_path):
    from ich_keras.ct.tables import csv_text

    table = pd.DataFrame({"sop_instance_uid": ["=1+1|cmd", "1.2.3"], "any": [0.5, -0.25]})
    assert csv_text(table) == "sop_instance_uid,any\n'=1+1|cmd,0.5\n1.2.3,-0.25\n"


def test_a_training_that_fails_in_its_first_epoch_leaves_nothing(phantom_cache, tmp_path):
    with pytest.raises(DivergedError):
        train(config_of(fit={"learning_rate": 1e30, "epochs": 1}), phantom_cache, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def converted(tmp_path, monkeypatch):
    """A converted backbone of the narrow network, found by name."""
    from ich_keras.models.resnet import resnet
    from ich_keras.models.weights import save_weights
    from ich_keras.models.weights_lookup import FOLDER_VARIABLE

    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "weights"))
    model = resnet(PRESETS[NARROW].spec)
    path = tmp_path / "weights" / "own.weights.h5"
    record = {
        "source": "own checkpoint",
        "network": PRESETS[NARROW].spec.to_dict(),
        "intensity": "windows",
    }
    save_weights(model, path, record)
    return path, model


def test_fine_tuning_tells_what_was_loaded_and_keeps_it_frozen(converted, phantom_cache, tmp_path):
    path, backbone = converted
    told = []
    config = config_of(weights="own", fit={"epochs": 1, "freeze": "layer4"})
    out = train(config, phantom_cache, tmp_path / "run", tell=told.append)
    assert told[0].startswith(f"Weights: 40 layers from {path}; source own checkpoint (no licence")
    assert told[0].endswith("new: fc.")
    assert told[1].endswith("(constant), frozen up to layer4, float32.")
    assert f"Started from {path} (source own checkpoint (no" in (out / "report.md").read_text()
    account = json.loads((out / "weights.json").read_text())
    assert account["fresh"] == ["fc"]
    assert account["record"]["source"] == "own checkpoint"
    _, trained = load_run(out)
    for layer in backbone.layers:
        for one, other in zip(
            layer.get_weights(), trained.get_layer(layer.name).get_weights(), strict=True
        ):
            np.testing.assert_array_equal(one, other, err_msg=layer.name)


def test_the_backbone_factor_reaches_the_optimiser(converted, phantom_cache, tmp_path):
    _, backbone = converted
    told = []
    config = config_of(
        weights="own", fit={"epochs": 1, "learning_rate": 1e-3, "backbone_factor": 1e-9}
    )
    out = train(config, phantom_cache, tmp_path / "run", tell=told.append)
    assert told[1].endswith("backbone at 1e-09 times that rate, float32.")
    _, trained = load_run(out)
    np.testing.assert_allclose(
        trained.get_layer("conv1").get_weights()[0],
        backbone.get_layer("conv1").get_weights()[0],
        atol=1e-7,
    )


def test_one_channel_networks_train_and_predict(phantom_cache, phantom_folder, tmp_path):
    with preset_of("grey", ModelSpec((48, 48, 1), width=8)):
        config = dataclasses.replace(config_of(fit={"epochs": 1}), preset="grey")
        out = train(config, phantom_cache, tmp_path / "run")
        assert RunFolder(out).recipe().inputs.intensity.name == "wide"
        assert load_run(out)[1].input_shape == (None, 48, 48, 1)
        result = predict_folder(out, phantom_folder / "images")
        held_out = pd.read_csv(out / "predictions-test.csv").set_index("sop_instance_uid")
        both = result.slices.set_index("sop_instance_uid").loc[held_out.index]
        raw = both[[f"raw_{label}" for label in LABELS]]
        np.testing.assert_allclose(raw, held_out[list(LABELS)], atol=1e-5)


def test_weights_decide_the_intensity_unless_it_is_given(converted, phantom_cache, monkeypatch):
    from ich_keras.models.weights import save_weights

    path, model = converted
    one_channel = dataclasses.replace(PRESETS[NARROW].spec, input_shape=(None, None, 1)).to_dict()
    record = {"network": one_channel, "intensity": "head-z-score"}
    save_weights(model, path, record)
    assert Recipe.of(config_of(weights="own")).inputs.intensity.name == "head-z-score"
    given = config_of(weights="own", data={"intensity": "windows"})
    assert Recipe.of(given).inputs.intensity.name == "windows"
    assert Recipe.of(config_of()).inputs.intensity.name == "windows"
    # Made for three windows, and then given one channel by `weights-convert`.
    save_weights(model, path, record | {"intensity": "windows"})
    assert Recipe.of(config_of(weights="own")).inputs.intensity.name == "wide"


def test_what_cannot_be_trained_is_refused_before_anything_long(phantom_cache):
    with pytest.raises(UsageError, match="view 'slice' with preset resnet18_3d, which takes vol"):
        three = dataclasses.replace(config_of(data={"view": "slice"}), preset="resnet18_3d")
        plan_training(phantom_cache, three)
    with pytest.raises(UsageError, match="view 'slab' with preset narrow, which takes slices"):
        plan_training(phantom_cache, config_of(data={"view": "slab"}))
    with pytest.raises(UsageError, match="this run has none"):
        plan_training(phantom_cache, config_of(data={"reverse": True}))
    with pytest.raises(UsageError, match="no imagenet weights for narrow"):
        plan_training(phantom_cache, config_of(weights="imagenet"))
    with pytest.raises(UsageError, match="backbone_factor without weights"):
        config_of(fit={"backbone_factor": 0.1})
    with pytest.raises(UsageError, match="one value per channel"):
        plan_training(phantom_cache, config_of(data={"size": 32}, fit={"batch_size": 1}))
    with pytest.raises(UsageError, match="freeze without weights"):
        config_of(fit={"freeze": "layer4"})
    with pytest.raises(UsageError, match="norm 'frozen' without weights"):
        config_of(norm="frozen")
    with pytest.raises(UsageError, match="fit.freeze is 'layer7'; expected one of stem"):
        config_of(weights="a.weights.h5", fit={"freeze": "layer7"})


@pytest.mark.parametrize(
    ("precision", "fit"),
    [
        ("bfloat16", {"accumulate": 2, "recompute": "stage"}),
        ("float16", {}),
        ("float32", {"step": "stock"}),
        ("float32", {"compiled": False, "recompute": "block"}),
    ],
)
def test_every_way_to_take_a_step_makes_a_run(precision, fit, phantom_cache, tmp_path):
    told = []
    config = config_of(precision=precision, fit={"epochs": 1, **fit})
    out = train(config, phantom_cache, tmp_path / "run", tell=told.append)
    assert told[0].endswith(f"{precision}.")
    assert ("2 batches per step" in told[0]) == ("accumulate" in fit)
    recorded = RunFolder(out).recipe()
    assert recorded.precision == precision
    assert {name: getattr(recorded.training, name) for name in fit} == fit
    _, model = load_run(out, precision="float32")
    saved = keras.saving.load_model(out / "model.keras")
    assert all(layer.dtype_policy.name == "float32" for layer in saved.layers)
    image = np.random.default_rng(0).standard_normal((2, 48, 48, 3)).astype("float32")
    np.testing.assert_allclose(
        saved.predict_on_batch(image), model.predict_on_batch(image), rtol=1e-3, atol=1e-5
    )


def test_weights_whose_channels_were_changed_can_be_trained_from(
    converted, phantom_cache, tmp_path
):
    from weights_convert import change_channels

    path, _ = converted
    grey = change_channels(path, tmp_path / "grey.weights.h5", 1)
    config = config_of(weights=str(grey), fit={"epochs": 1})
    out = train(config, phantom_cache, tmp_path / "run")
    assert RunFolder(out).recipe().inputs.intensity.name == "wide"
    assert load_run(out)[1].input_shape == (None, 48, 48, 1)


def test_a_training_without_a_single_step_is_refused(phantom_cache):
    steps = plan_training(phantom_cache, config_of(fit={"epochs": 1})).steps_per_epoch
    plan_training(phantom_cache, config_of(fit={"epochs": 1, "accumulate": steps}))
    with pytest.raises(UsageError, match=f"{steps} batches in all.*no weight would change"):
        plan_training(phantom_cache, config_of(fit={"epochs": 1, "accumulate": steps + 1}))


def test_an_input_larger_than_the_cache_is_refused(run, phantom_cache):
    small = types.SimpleNamespace(size=32, path="small", labels=SIX)
    with pytest.raises(UsageError, match="small have 32x32 pixels; the run was trained from 48x48"):
        evaluate(run, small)
    with pytest.raises(UsageError, match="data.size is 48, but the cache holds 32x32"):
        train(config_of(), small, run / "none")


def test_parts_of_series_are_not_scored_as_series(phantom_cache, phantom_folder, tmp_path):
    config = config_of(data={"split": "thesis-slices"}, fit={"epochs": 1})
    out = train(config, phantom_cache, tmp_path / "run")
    for part in ("valid", "test"):
        assert set(json.loads((out / f"metrics-{part}.json").read_text())) == {"slice"}
    assert "Per series" not in (out / "report.md").read_text()
    assert len(predict_folder(out, phantom_folder / "images").series)


def test_what_prediction_could_not_read_is_said(run, phantom_folder, monkeypatch):
    """A slice lost inside a series is a gap; a folder of which nothing can be read tells why."""
    from ich_keras import prediction_reading
    from ich_keras.ct.rejects import RejectedFile

    images = phantom_folder / "images"
    table = index_folder(images).slices
    sizes = table.groupby("series_uid", sort=False).size()
    torn, shorter = sizes.index[:2]
    inside = table.loc[table["series_uid"] == torn, "container"].iloc[sizes[torn] // 2]
    last = table.loc[table["series_uid"] == shorter, "container"].iloc[-1]
    lost, read_indexed = {inside, last}, prediction_reading.read_indexed

    def read(indexed, size, **asked):
        if indexed.container in lost:
            raise RejectedFile("NO_DECODER", "a kind of JPEG")
        return read_indexed(indexed, size, **asked)

    monkeypatch.setattr(prediction_reading, "read_indexed", read)
    found = predict_folder(run, images)
    before = index_folder(images).series.set_index("series_uid")["verdict"]
    after = found.series.set_index("series_instance_uid")["verdict"]
    assert "gap" not in before[torn] and "gap" in after[torn].split(",")
    assert "incomplete" in after[shorter].split(",")
    others = after.drop([torn, shorter])
    pd.testing.assert_series_equal(others, before[others.index], check_names=False)
    assert found.rejects["path"].isin([str(Path(p).relative_to(images)) for p in lost]).sum() == 2
    lost |= set(table["container"])
    with pytest.raises(DataError, match=f"no slice of {len(table)} files could be") as caught:
        predict_folder(run, images)
    assert f"(NO_DECODER {len(table)})" in caught.value.message
    assert caught.value.message.endswith(": a kind of JPEG.")
    assert caught.value.hint == "pip install 'ich_keras[codecs]'"
