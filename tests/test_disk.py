"""A full disk: seen before the work where it can be, and told with file, free space and need."""

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from full_disk import largest_file
from interrupted import interrupted_training
from narrow import preset_of

from ich_keras import checkpoints, disk, files, fitting, run_space
from ich_keras.cli import main
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.ct.series import index_folder
from ich_keras.data.cache.cache import CTCache
from ich_keras.errors import EnvironmentProblem
from ich_keras.evaluation import evaluate
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights import save_weights, weights_bytes
from ich_keras.recipe import Recipe
from ich_keras.run_folder import RunFolder
from ich_keras.run_space import training_space
from ich_keras.training import resume, train
from ich_keras.workflow import prepare_training

ROOT = Path(__file__).resolve().parents[1]
SIZE = 48
Usage = namedtuple("Usage", "total used free")
has_limits = pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")


@pytest.fixture(scope="module", autouse=True)
def narrow_preset():
    with preset_of("full", ModelSpec((SIZE, SIZE, 3), depth=10, width=8)):
        yield


def config_of(**fit) -> RunConfig:
    return RunConfig(
        preset="full",
        precision="float32",
        data=DataConfig(size=SIZE, balance=True),
        fit=FitConfig(batch_size=16, learning_rate=1e-3, **{"epochs": 2, **fit}),
    )


@pytest.fixture(scope="module")
def begun(phantom_cache, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("begun") / "run"
    return interrupted_training(phantom_cache, run, config_of(), epoch=1)


@pytest.fixture
def free(monkeypatch):
    """Let the disk have so many bytes free."""

    def leave(num_bytes):
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(2**40, 0, num_bytes))

    return leave


def ich(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


# --- Before the work ------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"accumulate": 4}, {"freeze": "layer2"}])
def test_the_sizes_of_states_and_weights_are_foreseen(tmp_path, changes):
    recipe = Recipe.of(config_of(), SIZE)
    recipe = replace(recipe, training=replace(recipe.training, **changes))
    model, _ = fitting.compiled_network(recipe, total_steps=8)
    model.optimizer.build(model.trainable_variables)
    space = training_space(recipe, 100)
    assert space == training_space(recipe, 100, model)
    checkpoints.save_state(tmp_path / "state", model, 1, {})
    folder = tmp_path / "state" / "epoch-0001"
    state = sum(path.stat().st_size for path in folder.iterdir())
    save_weights(model, tmp_path / "a.weights.h5")
    weights = (tmp_path / "a.weights.h5").stat().st_size
    # Never too little; the headers of so small a network are much of the rest.
    assert weights <= space.weights <= weights + 2**18
    assert state <= space.state + 2**12 <= state + 2**19


def test_a_run_needs_no_more_than_what_is_foreseen(phantom_cache, tmp_path, monkeypatch):
    most, space = [0], training_space(Recipe.of(config_of(), SIZE), len(phantom_cache))
    move = files.replace

    def measured(source, target):
        found = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        most[0] = max(most[0], sum(path.stat().st_size for path in found))
        move(source, target)

    monkeypatch.setattr(files, "replace", measured)
    monkeypatch.setattr(checkpoints, "replace", measured)
    train(config_of(epochs=3), phantom_cache, tmp_path / "run")
    assert space.num_bytes / 3 < most[0] < space.num_bytes


def test_a_training_without_space_is_refused_before_it_begins(phantom_cache, tmp_path, free):
    space = training_space(Recipe.of(config_of(), SIZE), len(phantom_cache))
    free(space.num_bytes - 1)
    with pytest.raises(EnvironmentProblem) as caught:
        train(config_of(), phantom_cache, tmp_path / "run")
    in_all = disk.in_units(space.num_bytes)
    assert caught.value.message == (
        f"{tmp_path} has {in_all} free; {in_all} are needed: the training writes up to 3 states of"
        f" {disk.in_units(space.state)}, 4 files of weights of {disk.in_units(space.weights)} and"
        f" tables of {disk.in_units(space.tables)}."
    )
    assert not (tmp_path / "run").exists()


def test_resuming_counts_what_is_already_there(begun, phantom_cache, tmp_path, free, monkeypatch):
    run = RunFolder(shutil.copytree(begun, tmp_path / "run"))
    space = training_space(Recipe.of(config_of(), SIZE), len(phantom_cache))
    there = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    free(space.num_bytes - there - 1)
    with pytest.raises(EnvironmentProblem, match="are needed: the training writes up to 3 states"):
        resume(run, phantom_cache)
    assert run.is_interrupted
    free(space.num_bytes - there)
    monkeypatch.setattr("ich_keras.training.finish", lambda *_: None)
    resume(run, phantom_cache)
    assert checkpoints.states_of(run.state_folder)[0][0] == 2


def test_cache_and_training_are_checked_together_before_the_cache_is_built(
    phantom_folder, tmp_path, free, monkeypatch
):
    preparation = prepare_training(
        config_of(),
        tmp_path / "run",
        phantom_folder / "images",
        phantom_folder / "stage_2_train.csv",
    )
    space = training_space(preparation.recipe, len(preparation.index.usable().slices))
    needed = 2 * preparation.cache_bytes + space.num_bytes  # one shard may be written twice
    free(needed - 1)
    with pytest.raises(EnvironmentProblem, match="are needed: the cache .* MiB; the training wr"):
        preparation.train()
    assert list(tmp_path.iterdir()) == []
    free(needed)
    monkeypatch.setattr("ich_keras.workflow.train", lambda *_, **__: tmp_path / "run")
    preparation.train()
    assert len(CTCache.open(tmp_path / "run-cache")) == 329


def test_needs_are_added_up_per_disk(tmp_path, monkeypatch):
    needs = [disk.Need(tmp_path / "a", 60, "one"), disk.Need(tmp_path / "b", 60, "other")]
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(200, 0, 100))
    with pytest.raises(EnvironmentProblem, match="are needed: one; other"):
        disk.require_free_for_all(needs)
    (tmp_path / "a").mkdir()
    real = os.stat
    Status = namedtuple("Status", "st_dev st_mode")

    def elsewhere(path, **settings):
        found = real(path, **settings)
        return Status(0, found.st_mode) if str(path).endswith("/a") else found

    monkeypatch.setattr(os, "stat", elsewhere)
    disk.require_free_for_all(needs)


# --- While it is written --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "reason", "way_out"),
    [
        (errno.ENOSPC, "the disk is full", "Free some space there"),
        (errno.EDQUOT, "the quota on this disk is used up", "Free some space there"),
        (errno.EFBIG, "it would exceed the limit on the size of files", "Raise the limit"),
    ],
)
def test_file_free_space_and_need_are_told(tmp_path, free, monkeypatch, number, reason, way_out):
    path = tmp_path / "a.json"
    files.atomic_write(path, "old")
    free(5 * 2**20)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(EnvironmentProblem) as caught:
        files.atomic_write(path, "x" * 3000)
    assert caught.value.message.startswith(f"{path} could not be written: {reason}")
    assert f"{tmp_path} has 5 MiB free. 3 KiB are needed for it." in caught.value.message
    assert caught.value.hint.startswith(way_out)
    assert [(item.name, item.read_text()) for item in tmp_path.iterdir()] == [("a.json", "old")]


def test_what_a_full_disk_causes_is_told_and_other_errors_pass(tmp_path):
    def consequence(first, second):
        try:
            raise first
        except OSError:
            raise second  # noqa: B904 (as zipfile does)

    full = OSError(errno.ENOSPC, "No space left on device")
    for error in (
        RuntimeError("Can't close (file write failed: errno = 28, error message = 'No space')"),
        full,
    ):
        with pytest.raises(EnvironmentProblem), disk.full_disk_told(tmp_path / "a"):
            raise error
    with pytest.raises(EnvironmentProblem), disk.full_disk_told(tmp_path / "a"):
        consequence(full, ValueError("Can't close the ZIP file while there is an open handle"))
    for error in (
        PermissionError(errno.EACCES, "denied"),
        RuntimeError("errno = 5"),
        ValueError("errno = 28"),
    ):
        with pytest.raises(type(error)), disk.full_disk_told(tmp_path / "a"):
            raise error


LIMITED = """
import resource, sys
import ich_keras
from ich_keras.cli import main
from ich_keras.models.presets import PRESETS, Preset
from ich_keras.models.spec import ModelSpec

PRESETS["full"] = Preset(ModelSpec((48, 48, 3), depth=10, width=8), "full")
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
main()
"""


def limited(limit, *words):
    """Run a command that cannot write files beyond a size."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, str(limit), *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def assert_told(done, name):
    """Return the last lines: the error names the file, and nothing is a traceback."""
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("Error: ") and f"{name} could not be written: it would exc" in error
    assert "free." in error and error.endswith("needed for it.")
    assert hint.startswith("Hint: Raise the limit")
    return done.stderr


@has_limits
def test_indexing(phantom_folder, tmp_path):
    words = ("index", "--dicom", phantom_folder / "images", "--workers", 0, "--out")
    assert_told(limited(500, *words, tmp_path / "index"), tmp_path / "index.journal")
    assert not (tmp_path / "index").exists()


@has_limits
def test_saving_an_index(phantom_folder, tmp_path):
    index = index_folder(phantom_folder / "images")
    with largest_file(20_000), pytest.raises(EnvironmentProblem) as caught:
        index.save(tmp_path / "index")
    assert f"{tmp_path / 'index' / 'slices.csv'} could not be written" in caught.value.message
    assert list(tmp_path.iterdir()) == []


@has_limits
@pytest.mark.parametrize(
    ("limit", "name"), [(5_000, "stage_2_train.csv"), (1_000, "images/ID_"), (200, "images/ID_")]
)
def test_drawing_phantoms(tmp_path, limit, name):
    words = ("phantom", "--series", 2, "--matrix", 32, "--workers", 0, "--out", tmp_path / "data")
    done = limited(limit, *words)
    assert done.returncode == 4 and "Traceback" not in done.stderr, done.stderr
    assert f"Error: {tmp_path / 'data' / name}" in done.stderr
    assert "could not be written: it would exceed" in done.stderr
    assert list(tmp_path.iterdir()) == []


@has_limits
def test_caching(phantom_folder, tmp_path):
    index = tmp_path / "index"
    ich("index", "--dicom", phantom_folder / "images", "--out", index, "--workers", 0)
    words = ("cache", "--index", index, "--size", 48, "--workers", 0, "--out", tmp_path / "cache")
    errors = assert_told(limited(100_000, *words), "shard-0000.h5")
    assert "Finished shards are kept: build again to resume." in errors
    assert not (tmp_path / "cache").exists() and not list(tmp_path.glob("cache.partial"))


@pytest.mark.slow
@has_limits
def test_resuming_and_evaluating(begun, phantom_cache, phantom_cache_folder, tmp_path):
    run = Path(shutil.copytree(begun, tmp_path / "run"))
    before = {path: path.read_bytes() for path in run.rglob("*.h5")}
    again = ("train", "--cache", phantom_cache_folder, "--resume", run)
    # Enough for the weights, of which more is reserved, but not for the slots of the optimiser.
    errors = assert_told(limited(640_000, *again), run / "state" / "epoch-0002" / "variables.npz")
    assert f"To resume: ich-train --resume {run}" in errors
    state = run / "state" / "epoch-0001" / "model.weights.h5"
    assert state.read_bytes() == before[state]
    assert [path.name for path in run.rglob(".partial*")] == []
    resume(run, phantom_cache)
    kept = (run / "predictions-valid.csv").read_bytes()
    with (
        largest_file(4096),
        pytest.raises(EnvironmentProblem, match=r"predictions-valid\.csv could not be written"),
    ):
        evaluate(run, phantom_cache, "valid")
    assert (run / "predictions-valid.csv").read_bytes() == kept


@has_limits
def test_the_best_weights_of_the_first_epoch(phantom_cache, tmp_path):
    message = r"run/best\.weights\.h5 could not be written"
    with largest_file(200_000), pytest.raises(EnvironmentProblem, match=message):
        train(config_of(), phantom_cache, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_found_no_space_is_written_when_resumed(
    begun, phantom_cache, tmp_path, monkeypatch
):
    run = RunFolder(shutil.copytree(begun, tmp_path / "run"))
    write_bytes = Path.write_bytes

    def fail(path, content):
        if path.name.endswith("report.md"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(EnvironmentProblem, match=r"report\.md could not be written: the disk is"):
        resume(run, phantom_cache)
    assert run.is_interrupted and run.best_weights.is_file()
    monkeypatch.undo()
    resume(run, phantom_cache)
    assert run.is_finished


def test_the_space_of_weights_is_reserved_before_hdf5_begins(tmp_path, monkeypatch):
    recipe = Recipe.of(config_of(), SIZE)
    model = run_space._network(recipe)
    asked = []

    def full(handle, offset, length):
        asked.append(length)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(EnvironmentProblem, match=r"a\.weights\.h5 could not be written"):
        save_weights(model, tmp_path / "a.weights.h5")
    assert asked == [weights_bytes(model)]
    assert list(tmp_path.iterdir()) == []

    def unable(handle, offset, length):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unable, raising=False)
    save_weights(model, tmp_path / "a.weights.h5")
