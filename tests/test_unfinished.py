"""Runs whose training was interrupted or still runs: refused, unless asked for, and then said."""

import json
import re
import shutil
from pathlib import Path

import keras
import pandas as pd
import pytest
from click.testing import CliRunner
from interrupted import begun_training

from ich_keras import fitting, training
from ich_keras.cli import main
from ich_keras.errors import StaleError
from ich_keras.evaluation import evaluate
from ich_keras.files import lock
from ich_keras.inference import load_run
from ich_keras.prediction import predict_folder
from ich_keras.report import report_text
from ich_keras.run_folder import RunFolder
from ich_keras.training import train

INTERRUPTED = (
    "Unfinished: the training was interrupted, 1 of 2 epochs done. These are the best weights so"
    " far, not its result."
)
RUNNING = INTERRUPTED.replace("was interrupted", "is still running")


@pytest.fixture(scope="module")
def begun(phantom_cache, tmp_path_factory):
    """A training that was interrupted after the first of two epochs."""
    run = tmp_path_factory.mktemp("begun") / "run"
    with begun_training(phantom_cache, run, "narrow") as begun:
        yield begun


def ich(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def takers(run, cache, images, out):
    """Return everything that takes a run, in Python and as a command."""
    return {
        "load_run": lambda **asked: load_run(run, **asked),
        "evaluate": lambda **asked: evaluate(run, cache, **asked),
        "predict_folder": lambda **asked: predict_folder(run, images, out, **asked),
    }


@pytest.mark.parametrize("name", ["load_run", "evaluate", "predict_folder"])
def test_an_interrupted_training_is_refused(name, begun, phantom_cache, phantom_folder, tmp_path):
    before = sorted(begun.rglob("*"))
    take = takers(begun, phantom_cache, phantom_folder / "images", tmp_path / "out")[name]
    with pytest.raises(StaleError, match="is not finished.*--unfinished.*ich-train --resume"):
        take()
    with lock(begun / "training.lock"), pytest.raises(StaleError) as caught:
        take()
    assert "is still running. Wait until it finishes, or use" in str(caught.value)
    assert sorted(begun.rglob("*")) == before
    assert not (tmp_path / "out").exists()


def test_commands_refuse_it_with_the_exit_code_of_stale_things(
    begun, phantom_cache_folder, phantom_folder, tmp_path
):
    commands = (
        ("evaluate", "--run", begun, "--cache", phantom_cache_folder),
        (
            "predict",
            "--run",
            begun,
            "--dicom",
            phantom_folder / "images",
            "--out",
            tmp_path / "out",
        ),
    )
    for words in commands:
        refused = ich(*words)
        assert refused.exit_code == 6 and "is not finished" in refused.output
        with lock(begun / "training.lock"):
            refused = ich(*words)
        assert refused.exit_code == 6 and "is still running" in refused.output


@pytest.mark.parametrize("split", ["valid", "test", "train"])
def test_an_evaluation_that_was_asked_for_says_so_everywhere(
    split, begun, phantom_cache, phantom_cache_folder
):
    done = ich(
        "evaluate",
        "--run",
        begun,
        "--cache",
        phantom_cache_folder,
        "--split",
        split,
        "--unfinished",
    )
    assert done.exit_code == 0, done.output
    assert INTERRUPTED in re.sub(r"\s+", " ", done.output)
    names = (f"metrics-{split}.unfinished.json", f"predictions-{split}.unfinished.csv")
    assert f"Written to {begun}: {', '.join(names)}" in done.output
    metrics = json.loads((begun / names[0]).read_text())
    assert {part["unfinished"] for part in metrics.values()} == {INTERRUPTED}
    table = pd.read_csv(begun / names[1])
    assert set(table["unfinished"]) == {INTERRUPTED}
    # Nothing that a finished run would be taken for.
    assert not (begun / "choices.json").exists()
    assert not (begun / f"metrics-{split}.json").exists()
    assert RunFolder(begun).metrics(split) is None
    with lock(begun / "training.lock"):
        found = evaluate(begun, phantom_cache, split, unfinished=True)
    assert {part["unfinished"] for part in found.values()} == {RUNNING}


def test_a_prediction_that_was_asked_for_says_so_everywhere(begun, phantom_folder, tmp_path):
    out = tmp_path / "out"
    words = ("predict", "--run", begun, "--dicom", phantom_folder / "images", "--out", out)
    done = ich(*words, "--unfinished", "--workers", 0)
    assert done.exit_code == 0, done.output
    assert INTERRUPTED in re.sub(r"\s+", " ", done.output)
    assert (out / "notice.txt").read_text().startswith(INTERRUPTED)
    for name in ("predictions.csv", "series.csv"):
        assert set(pd.read_csv(out / name)["unfinished"]) == {INTERRUPTED}
    told = ich("submission", "--predictions", out / "predictions.csv", "--out", tmp_path / "s.csv")
    assert told.exit_code == 0 and INTERRUPTED in told.output


def test_a_report_would_declare_it_finished(begun):
    with pytest.raises(StaleError, match="has done 1 of 2 epochs: a report would declare it"):
        report_text(RunFolder(begun))
    assert not RunFolder(begun).is_finished


def test_nothing_of_it_is_left_once_the_training_is_finished(begun, phantom_cache, tmp_path):
    run = shutil.copytree(begun, tmp_path / "run")
    for split in ("valid", "train"):
        evaluate(run, phantom_cache, split, unfinished=True)
    training.resume(run, phantom_cache)
    assert not list(run.glob("*unfinished*"))
    assert not (run / "metrics-train.json").exists()
    assert RunFolder(run).notice() == ""
    # Asked for all the same: a finished run is what it is.
    metrics = evaluate(run, phantom_cache, "test", unfinished=True)
    assert all("unfinished" not in part for part in metrics.values())
    assert (run / "metrics-test.json").is_file()
    predictions = pd.read_csv(run / "predictions-test.csv")
    assert "unfinished" not in predictions


def test_a_training_in_its_first_epoch_has_no_weights(begun, tmp_path):
    run = RunFolder(tmp_path / "new")
    run.path.mkdir()
    for name in ("config.json", "recipe.json"):
        (run.path / name).write_text((Path(begun) / name).read_text())
    with lock(run.lock_file):
        for asked in (False, True):
            with pytest.raises(StaleError, match=r"is still running\. Wait until it finishes\."):
                run.require_finished(asked)
    with pytest.raises(StaleError, match="is not a run folder: best.weights.h5 absent"):
        run.require_finished(True)


@pytest.mark.filterwarnings("ignore:Limiting epochs to 1")
def test_a_training_that_keras_ends_early_is_not_finished(
    begun, phantom_cache, tmp_path, monkeypatch
):
    config = RunFolder(begun).config()
    # As a callback or a setting that is not known here might do.
    monkeypatch.setattr(fitting, "require_trainable_settings", lambda: None)
    keras.config.set_max_epochs(1)
    try:
        with pytest.raises(StaleError, match="Keras ended the training in .* after 1 of 2 epochs"):
            train(config, phantom_cache, tmp_path / "run")
    finally:
        keras.config.set_max_epochs(None)
    assert RunFolder(tmp_path / "run").is_interrupted
