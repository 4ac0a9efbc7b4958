"""Scoring a run on data that it was not trained on."""

import json
import shutil

import numpy as np
import pandas as pd
import pydicom
import pytest
from click.testing import CliRunner
from sklearn.metrics import log_loss, roc_auc_score

from ich_keras.cli import main
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.label_files import read_labels
from ich_keras.data.seen import Seen
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.external import NOT_COMPARED, evaluate_external
from ich_keras.labels import LABELS
from ich_keras.phantom.dicom import write_phantoms
from ich_keras.run_folder import RunFolder
from ich_keras.training import train
from ich_keras.workflow import make_cache, prepare_index


@pytest.fixture(scope="module")
def run(phantom_cache, tmp_path_factory):
    """A run on slices of the shared phantoms, hardly trained."""
    config = RunConfig(
        preset="resnet10_2d",
        device="cpu",
        precision="float32",
        data=DataConfig(size=32),
        fit=FitConfig(epochs=1, batch_size=32, learning_rate=1e-3),
    )
    return train(config, phantom_cache, tmp_path_factory.mktemp("external") / "run")


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Other phantoms, of another seed: (DICOM, labels of slices, cache)."""
    folder = tmp_path_factory.mktemp("others")
    write_phantoms(folder / "data", 14, seed=77, matrix=64)
    index = prepare_index(folder / "data" / "images", folder / "data" / "stage_2_train.csv")
    make_cache(index, folder / "cache", size=48)
    return folder / "data" / "images", folder / "data" / "stage_2_train.csv", folder / "cache"


def test_all_of_the_data_is_scored_beside_the_run_s_own_test(run, others, tmp_path):
    cache = CTCache.open(others[2])
    result = evaluate_external(run, cache, tmp_path / "out")
    metrics = result.metrics
    assert metrics["slice"]["n"]["samples"] == len(cache)
    assert metrics["series"]["n"]["samples"] == len(cache.series)
    slices = pd.read_csv(tmp_path / "out" / "predictions.csv")
    truth, values = slices["true_any"], slices["any"]
    assert metrics["slice"]["auroc"]["any"] == pytest.approx(roc_auc_score(truth, values), abs=1e-6)
    assert metrics["own"]["slice"]["auroc"] == RunFolder(run).metrics("test")["slice"]["auroc"]
    series = pd.read_csv(tmp_path / "out" / "series.csv")
    per_series = slices.groupby("series_uid", sort=False)["true_any"].max()
    assert series["true_any"].tolist() == per_series.tolist()
    assert metrics["data"]["series"] == len(series) == 14
    assert metrics["data"]["series_positive"]["any"] == int(series["true_any"].sum())
    assert metrics["unseen"] == {"series": True, "studies": True, "pixels": True, "note": ""}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["data"] == metrics["data"]
    by = metrics["by"]["series"]["slice_spacing"]
    assert sum(group["samples"] for group in by.values()) == 14
    assert "Synthetic" in metrics["notice"] or "phantom" in metrics["notice"]


def test_a_training_records_how_far_apart_its_slices_were(run, phantom_cache):
    trained = RunFolder(run).split().members["train"]
    series = phantom_cache.series.set_index("series_uid")["slice_spacing_mm"]
    own = series[series.index.isin(trained)]
    assert 3 < len(own) < len(series)
    found = json.loads(RunFolder(run).data_file.read_text())["slice_spacing_mm"]
    assert found["median"] == pytest.approx(own.median(), abs=1e-4)
    assert found["lower_quartile"] == pytest.approx(own.quantile(0.25), abs=1e-4)
    assert RunFolder(run).slice_distances().record() == found


def labels_file(path, rows, column="series_uid"):
    pd.DataFrame(rows).rename(columns={"key": column}).to_csv(path, index=False)
    return read_labels(path)


def test_labels_of_series_and_missing_ones_score_what_they_say(run, others, tmp_path):
    series = CTCache.open(others[2]).series
    rows = [
        {"key": uid, "any": value, "subdural": "" if number % 2 else value_sdh}
        for number, (uid, value, value_sdh) in enumerate(
            zip(series["series_uid"], series["any"], series["subdural"], strict=True)
        )
    ]
    cache = CTCache.open(others[2], labels_file(tmp_path / "labels.csv", rows))
    metrics = evaluate_external(run, cache, tmp_path / "out").metrics
    assert "slice" not in metrics
    part = metrics["series"]
    table = pd.read_csv(tmp_path / "out" / "series.csv")
    assert part["auroc"]["any"] == pytest.approx(
        roc_auc_score(table["true_any"], table["any"]), abs=1e-6
    )
    known = table[table["true_subdural"] >= 0]
    assert len(known) == 7
    assert part["per_label"]["subdural"]["log_loss"] == pytest.approx(
        log_loss(known["true_subdural"], known["subdural"], labels=[0, 1]), abs=1e-6
    )
    assert part["per_label"]["epidural"]["log_loss"] is None
    assert part["exact_match"] is None
    assert metrics["data"]["missing_labels"] == [
        name for name in LABELS if name not in ("any", "subdural")
    ]
    assert metrics["data"]["label_level"] == "series"
    # The predictions do not depend on what the labels are of.
    whole = evaluate_external(run, CTCache.open(others[2])).series
    np.testing.assert_allclose(table["any"], whole["any"], atol=1e-6)


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")  # RSNA's identifiers
@pytest.mark.parametrize(("kept", "message"), [("study", "UID of a study"), ("pixels", "pixels")])
def test_what_the_training_has_seen_is_refused(run, phantom_cache, tmp_path, kept, message):
    with pytest.raises(DataError, match=r"have the UID of a series that the training of .* used"):
        evaluate_external(run, phantom_cache, tmp_path / "out")
    # The same heads under other names.
    split = RunFolder(run).split()
    uid = split.members["train"][0]
    paths = phantom_cache.slices.loc[phantom_cache.slices["series_uid"] == uid, "container"]
    (tmp_path / "copy").mkdir()
    for number, path in enumerate(paths):
        dataset = pydicom.dcmread(path)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}"
        dataset.SeriesInstanceUID, dataset.PatientID = "1.2.4", "somebody else"
        if kept == "pixels":
            dataset.StudyInstanceUID = "1.2.5"
        dataset.save_as(tmp_path / "copy" / f"{number}.dcm")
    index = prepare_index(tmp_path / "copy")
    cache = make_cache(index, tmp_path / "cache", size=48)
    labels = labels_file(tmp_path / "labels.csv", [{"key": "somebody else", "any": 1}], "PatientID")
    labelled = CTCache.open(cache.path, labels)
    with pytest.raises(DataError, match=f"have the {message}"):
        evaluate_external(run, labelled, tmp_path / "out")
    studies, pixels = Seen.load(RunFolder(run).seen_file).rows_in(cache)
    assert len(studies) == (len(paths) if kept == "study" else 0)
    assert 0 < len(pixels) <= len(paths)
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_record_says_that_pixels_were_not_compared(run, others, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(run, older)
    (older / "seen.npz").unlink()
    metrics = evaluate_external(older, CTCache.open(others[2])).metrics
    assert metrics["unseen"]["note"] == NOT_COMPARED and not metrics["unseen"]["pixels"]
    (older / "seen.npz").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(StaleError, match=r"seen\.npz cannot be read"):
        evaluate_external(older, CTCache.open(others[2]))


def test_recalibration_fits_some_patients_and_scores_the_others(run, others, monkeypatch):
    monkeypatch.setattr("ich_keras.external.MIN_PATIENTS", 4)
    cache = CTCache.open(others[2])
    found = evaluate_external(run, cache, recalibrate=0.5, seed=3).metrics["recalibrated"]["series"]
    count = cache.series["patient_id"].nunique()
    assert found["patients"] == {"fitted": round(count / 2), "scored": count - round(count / 2)}
    before, after = found["before"], found["after"]
    assert before["log_loss"] == after["log_loss"]  # of the raw probabilities
    assert before["calibration"]["temperature"] == found["temperature"]["run"]
    assert (
        after["calibration"]["temperature"]
        == found["temperature"]["local"]
        != (found["temperature"]["run"])
    )
    # Before anything is predicted.
    monkeypatch.setattr("ich_keras.external._predict", None)
    with pytest.raises(DataError, match="expected 4 of each"):
        evaluate_external(run, cache, recalibrate=0.01)


def test_labels_that_the_run_does_not_answer(run, others, tmp_path):
    uid = CTCache.open(others[2]).series["series_uid"].iloc[0]
    (tmp_path / "a.csv").write_text(f"series_uid,x\n{uid},1\n")
    cache = CTCache.open(others[2], read_labels(tmp_path / "a.csv", "x=fracture"))
    with pytest.raises(DataError, match="the data have the labels fracture; the run answers epid"):
        evaluate_external(run, cache)
    (tmp_path / "b.csv").write_text(f"series_uid,x,y\n{uid},1,0\n")
    cache = CTCache.open(others[2], read_labels(tmp_path / "b.csv", "x=any,y=other", True))
    with pytest.raises(DataError, match="Exclusive labels must be the same"):
        evaluate_external(run, cache)


def test_the_command_scores_dicom_files_and_prints_both(run, others, tmp_path):
    series = CTCache.open(others[2]).series
    labels = tmp_path / "exams.csv"
    series[["series_uid", "any"]].rename(columns={"any": "Blutung"}).to_csv(labels, index=False)
    command = ["evaluate", "--run", str(run), "--external", "--dicom", str(others[0])]
    command += ["--labels", str(labels), "--label-map", "Blutung=any", "--out"]
    done = CliRunner().invoke(main, [*command, str(tmp_path / "out"), "--workers", "0"])
    assert done.exit_code == 0, done.output
    assert "AUROC per series" in done.output and "run's test" in done.output
    assert "labels of each series. Positive series: any" in done.output
    assert (tmp_path / "out" / "metrics.json").is_file()
    assert (tmp_path / "out-cache").is_dir()
    again = CliRunner().invoke(main, [*command, str(tmp_path / "out"), "--workers", "0"])
    assert again.exit_code == 2 and "already exists" in again.output


BAD = {
    "no out": (["--external"], "--out is missing"),
    "both": (["--external", "--dicom", "x", "--out", "o"], "--cache and --dicom are both given"),
    "split": (["--external", "--split", "test", "--out", "o"], "--split does not go with"),
    "unfinished": (["--external", "--unfinished", "--out", "o"], "--unfinished does not go with"),
    "share": (["--external", "--recalibrate", "1.5", "--out", "o"], "recalibrate is 1.5; expected"),
    "not external": (["--recalibrate", "0.5"], "--recalibrate is for --external"),
    "map alone": (["--label-map", "a=any"], "--label-map is about --labels, which is missing"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_options_are_one_clear_line(run, others, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", "--run", str(run), "--cache", str(others[2])]
    done = CliRunner().invoke(main, [*command, *options])
    assert done.exit_code == 2, done.output
    assert message in done.output.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_a_share_is_between_0_and_1(run, others):
    with pytest.raises(UsageError, match="recalibrate is 0; expected a share between 0 and 1"):
        evaluate_external(run, CTCache.open(others[2]), recalibrate=0)
