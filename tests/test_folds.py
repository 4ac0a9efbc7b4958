"""Cross-validation: folds of patients, and their runs joined."""

import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from sklearn.metrics import roc_auc_score

from ich_keras.cli import main
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.data.split import make_split, split_by_fold
from ich_keras.errors import DataError, UsageError
from ich_keras.files import read_json, write_json
from ich_keras.folds import join_folds
from ich_keras.labels import LABELS, LabelSet
from ich_keras.run_folder import RunFolder
from ich_keras.training import train


def patients_of(split, slices, part):
    rows = slices.iloc[split.indices(slices, part)]
    return set(rows["patient_id"])


@pytest.mark.parametrize("of", [3, 5])
def test_every_patient_is_tested_once(phantom_cache, of):
    slices = phantom_cache.slices
    splits = [make_split(f"fold-{fold}/{of}", slices, 4) for fold in range(1, of + 1)]
    tested = [patients_of(split, slices, "test") for split in splits]
    assert set.union(*tested) == set(slices["patient_id"])
    assert sum(map(len, tested)) == slices["patient_id"].nunique()
    for number, split in enumerate(splits):
        parts = {part: patients_of(split, slices, part) for part in ("train", "valid", "test")}
        assert parts["valid"] == tested[(number + 1) % of]
        assert not parts["train"] & (parts["valid"] | parts["test"])
        assert set.union(*parts.values()) == set(slices["patient_id"])
    # Alike in the labels that several patients have.
    positive = slices.groupby("patient_id")["any"].max()
    shares = [positive[sorted(part)].mean() for part in tested]
    assert max(shares) - min(shares) < 0.35
    assert split_by_fold(slices, 4, 1, of) == splits[0] != split_by_fold(slices, 5, 1, of)


def test_folds_of_other_labels_are_stratified_by_them():
    random = np.random.default_rng(0)
    slices = pd.DataFrame({"mass": random.integers(0, 2, 60)}).assign(
        sop_instance_uid=[f"i{n}" for n in range(60)]
    )
    for key in ("series_uid", "study_instance_uid", "patient_id"):
        slices[key] = [f"{key}-{n // 2}" for n in range(60)]
    labels = LabelSet(("mass",))
    split = make_split("fold-2/3", slices, 0, labels)
    positive = slices.groupby("patient_id")["mass"].max()
    counts = []
    for part in ("train", "valid", "test"):
        rows = slices.iloc[split.indices(slices, part, labels)]
        counts.append(int(positive[rows["patient_id"].unique()].sum()))
    assert sum(counts) == int(positive.sum())
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("name", ["fold-0/5", "fold-6/5", "fold-1/2"])
def test_folds_that_do_not_exist_are_refused(phantom_cache, name):
    with pytest.raises(UsageError, match="expected three folds or more, and one of them"):
        make_split(name, phantom_cache.slices, 0)


def test_more_folds_than_patients_are_refused(phantom_cache):
    told = r"\d+ patient\(s\) with labels; 500 folds need as many"
    with pytest.raises(DataError, match=told) as caught:
        make_split("fold-1/500", phantom_cache.slices, 0)
    assert "take fewer folds" in caught.value.hint


def config_of(fold, **settings):
    return RunConfig(
        preset="resnet10_2d",
        device="cpu",
        precision="float32",
        data=DataConfig(size=16, split=f"fold-{fold}/3"),
        fit=FitConfig(epochs=1, batch_size=64, learning_rate=1e-3, **settings),
    )


@pytest.fixture(scope="module")
def runs(phantom_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folds")
    return [train(config_of(n), phantom_cache, folder / f"fold-{n}") for n in (1, 2, 3)]


def test_runs_are_joined_out_of_fold(runs, phantom_cache, tmp_path):
    found = join_folds(runs, phantom_cache, tmp_path / "joined")
    table = pd.read_csv(tmp_path / "joined" / "out-of-fold-slice.csv")
    assert len(table) == len(phantom_cache) and not table["sop_instance_uid"].duplicated().any()
    truth = phantom_cache.slices.set_index("sop_instance_uid").loc[table["sop_instance_uid"]]
    assert table["true_any"].tolist() == truth["any"].tolist()
    metrics = found.metrics["slice"]
    assert metrics["auroc"]["any"] == pytest.approx(roc_auc_score(truth["any"], table["any"]))
    for fold, run in enumerate(runs, 1):
        own = RunFolder(run).metrics("test")
        assert metrics["auroc_of_folds"]["any"][fold] == pytest.approx(own["slice"]["auroc"]["any"])
        series = found.metrics["series"]["auroc_of_folds"]["any"][fold]
        assert series == pytest.approx(own["series"]["auroc"]["any"])
    assert metrics["intervals"]["patients"] == phantom_cache.slices["patient_id"].nunique()
    assert found.metrics["series"]["n"]["samples"] == len(phantom_cache.series)
    # Each patient's numbers are those of the run that did not see him.
    one = RunFolder(runs[1]).split().members["test"][0]
    rows = table[table["series_instance_uid"] == one]
    assert set(rows["fold"]) == {2}
    own = pd.read_csv(RunFolder(runs[1]).predictions_file("test"))
    own = own[own["series_instance_uid"] == one]
    np.testing.assert_array_equal(rows[list(LABELS)], own[list(LABELS)])


def test_runs_that_do_not_belong_together_are_refused(runs, phantom_cache, tmp_path):
    with pytest.raises(DataError, match="are both fold 1"):
        join_folds([runs[0], runs[0], runs[1]], phantom_cache)
    with pytest.raises(DataError, match=r"fold\(s\) 3 of 3 are missing"):
        join_folds(runs[:2], phantom_cache)
    with pytest.raises(UsageError, match="1 run"):
        join_folds(runs[:1], phantom_cache)
    other = train(config_of(3, loss="rsna"), phantom_cache, tmp_path / "other")
    with pytest.raises(DataError, match="was trained in another way than .*: loss"):
        join_folds([*runs[:2], other], phantom_cache)
    damaged = tmp_path / "damaged"
    shutil.copytree(runs[2], damaged)
    (damaged / "predictions-test.csv").write_text("a,b\n1,2\n")
    with pytest.raises(Exception, match="predictions-test"):
        join_folds([*runs[:2], damaged], phantom_cache, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


@pytest.mark.parametrize("entry", ["cache", "pixels", "labels"])
def test_folds_of_other_data_are_refused(runs, phantom_cache, tmp_path, entry):
    other = shutil.copytree(runs[2], tmp_path / "other")
    data = read_json(other / "data.json")
    write_json(other / "data.json", data | {entry: "0" * 64})
    with pytest.raises(DataError, match=f"other was trained on other data than .*: the {entry}"):
        join_folds([*runs[:2], other], phantom_cache, tmp_path / "joined")
    write_json(other / "data.json", data | {entry: None})  # of an older version
    if entry != "cache":
        join_folds([*runs[:2], other], phantom_cache)
    assert not (tmp_path / "joined").exists()


def test_folds_that_do_not_test_each_image_once_are_refused(runs, phantom_cache, tmp_path):
    """Folds drawn from another table: some patients are tested twice, others never."""
    other = shutil.copytree(runs[2], tmp_path / "other")
    split = read_json(other / "split.json")
    members = split["members"]
    lost = members["test"].pop()
    members["train"].append(lost)
    write_json(other / "split.json", split)
    message = f"1 of .* labelled series of .* in the test part of no fold, for instance {lost}"
    with pytest.raises(DataError, match=message):
        join_folds([*runs[:2], other], phantom_cache)

    twice = shutil.copytree(runs[2], tmp_path / "twice")
    table, more = (RunFolder(run).predictions_file("test") for run in (twice, runs[0]))
    row = more.read_text().splitlines()[1]
    table.write_text(f"{table.read_text()}{row}\n")
    with pytest.raises(DataError, match=r"1 sop_instance_uid are .* in the folds 1, 3\."):
        join_folds([*runs[:2], twice], phantom_cache)


def test_the_command_joins_finished_folds_and_passes_options_on(
    runs, phantom_cache_folder, tmp_path, monkeypatch
):
    for number, run in enumerate(runs, 1):
        shutil.copytree(run, tmp_path / "cv" / f"fold-{number}")
    command = ["folds", "--cache", str(phantom_cache_folder), "--out", str(tmp_path / "cv")]
    done = CliRunner().invoke(main, [*command, "--folds", "3"])
    assert done.exit_code == 0, done.output
    assert "out of fold, per slice" in done.output
    assert (tmp_path / "cv" / "joined" / "out-of-fold-series.csv").is_file()
    assert not (tmp_path / "cv" / "folds.json").exists()  # nothing was to be trained
    started = started_words(monkeypatch, 3)
    shutil.rmtree(tmp_path / "cv" / "fold-2")
    done = CliRunner().invoke(main, [*command, "--folds", "3", "--epochs", "2", "--seed=7"])
    assert done.exit_code == 3
    (words,) = started
    assert words[2:] == [
        "ich_keras.cli.train",
        *("--fold", "2/3", "--out", str(tmp_path / "cv" / "fold-2"), "--epochs", "2", "--seed=7"),
        *("--cache", str(phantom_cache_folder)),
    ]


def started_words(monkeypatch, code) -> list[list[str]]:
    """Let folds end at once with a code; return the words they are started with."""
    started = []

    class Ended:
        def wait(self):
            return code

    start_by(monkeypatch, lambda words: started.append(words) or Ended())
    return started


def start_by(monkeypatch, begin) -> None:
    stands_in = types.SimpleNamespace(Popen=begin)
    monkeypatch.setattr(sys.modules["ich_keras.cli.folds"], "subprocess", stands_in)


@pytest.fixture
def begun(runs, phantom_cache_folder, tmp_path, monkeypatch):
    """A cross-validation with one fold done and one begun, and its command."""
    cv = tmp_path / "cv"
    command = ["folds", "--cache", phantom_cache_folder, "--out", cv, "--folds", "3"]
    command = [*map(str, command), "--epochs", "1", "--device=cpu", "--gpus", "1"]

    def begin(words):
        shutil.copytree(runs[0], cv / "fold-1")
        shutil.copytree(runs[1], cv / "fold-2")
        (cv / "fold-2" / "report.md").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        start_by(patch, begin)
        assert CliRunner().invoke(main, command).exit_code == 130
    return command


def test_a_begun_fold_is_resumed_on_the_same_device(begun, phantom_cache_folder, monkeypatch):
    started = started_words(monkeypatch, 6)
    turned = [*begun[:7], "--gpus=1", "--device", "cpu", "--epochs", "1"]
    done = CliRunner().invoke(main, turned)
    assert done.exit_code == 6, done.output
    (words,) = started
    assert words[3:] == [
        *("--resume", str(Path(begun[4]) / "fold-2"), "--gpus", "1", "--device", "cpu"),
        *("--cache", str(phantom_cache_folder)),
    ]


def test_other_options_than_the_folds_began_with_are_refused(
    begun, phantom_cache_folder, tmp_path, monkeypatch
):
    started = started_words(monkeypatch, 0)
    first, options = begun[:7], begun[7:]
    four = [*first[:-1], "4"]
    for command, message in (
        ([*first, *options, "--seed", "3"], "begun with other options: none; now --seed 3."),
        ([*first, *options[2:]], "begun with other options: --epochs 1; now none."),
        ([*first, "--epochs=2", *options[2:]], "options: --epochs 1; now --epochs 2."),
        ([*four, *options], "begun with other --folds: 3; now 4."),
    ):
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output
    plan = Path(begun[4]) / "folds.json"
    write_json(plan, read_json(plan) | {"cache": "f" * 64})
    done = CliRunner().invoke(main, begun)
    assert done.exit_code == 2 and "other data in the cache" in done.output
    assert started == []


def test_a_refused_first_fold_leaves_nothing(phantom_cache_folder, tmp_path, monkeypatch):
    started_words(monkeypatch, 2)
    command = ["folds", "--cache", str(phantom_cache_folder), "--out", str(tmp_path / "cv")]
    assert CliRunner().invoke(main, [*command, "--epochs", "-1"]).exit_code == 2
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "cv").mkdir()
    assert CliRunner().invoke(main, [*command, "--epochs", "-1"]).exit_code == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["cv"]  # as it was


def test_a_fold_that_a_signal_killed_is_a_problem_of_the_machine(
    phantom_cache_folder, tmp_path, monkeypatch
):
    started_words(monkeypatch, -signal.SIGKILL)
    command = ["folds", "--cache", str(phantom_cache_folder), "--out", str(tmp_path / "cv")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 4
    assert "Error: the training of fold 1 was killed by SIGKILL." in done.output


FOLD = """
import pathlib, signal, sys, time
def end(number, frame):
    time.sleep(1)  # a second signal would come in here
    pathlib.Path(sys.argv[1], "ended").write_text(str(int(number)))
    sys.exit(0)
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1], "began").touch()
time.sleep(60)
"""
COMMAND = """
import signal, subprocess, sys
from ich_keras.cli import main
# A job in the background of a shell ignores it from the beginning.
signal.signal(signal.SIGINT, signal.default_int_handler)
begin = subprocess.Popen
def other(words, **settings):
    is_fold = "ich_keras.cli.train" in words
    return begin([sys.executable, "-c", *sys.argv[1:3]] if is_fold else words, **settings)
subprocess.Popen = other
main(sys.argv[3:])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_fold_gets_time_to_end(phantom_cache_folder, tmp_path, number, code):
    command = ["folds", "--cache", str(phantom_cache_folder), "--out", str(tmp_path / "cv")]
    words = [sys.executable, "-c", COMMAND, FOLD, str(tmp_path), *command]
    # Of its own session: no terminal sends the signal to the fold, too.
    process = subprocess.Popen(words, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "began").exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(120) == code
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "ended").read_text() == str(int(number))


BAD = {
    "two folds": (["--folds", "2"], "--folds is 2; expected at least 3"),
    "its own split": (["--split", "patient"], "--split is decided by `ich folds`"),
    "its own out": (["--resume=x"], "--resume=x is decided by `ich folds`"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_options_that_folds_decide_are_refused(phantom_cache_folder, tmp_path, options, message):
    command = ["folds", "--cache", str(phantom_cache_folder), "--out", str(tmp_path / "cv")]
    done = CliRunner().invoke(main, [*command, *options])
    assert done.exit_code == 2 and message in done.output.replace("\n", " "), done.output
    assert not (tmp_path / "cv").exists()


BAD_FOLDS = {
    "text": ["--fold", "first"],
    "both": ["--fold", "1/3", "--split", "patient"],
}


@pytest.mark.parametrize("options", BAD_FOLDS.values(), ids=BAD_FOLDS)
def test_a_fold_is_named_by_number(phantom_cache_folder, tmp_path, options):
    command = ["train", "--cache", str(phantom_cache_folder), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(main, [*command, *options])
    assert done.exit_code == 2
    assert "--fold" in done.output and not (tmp_path / "run").exists()
