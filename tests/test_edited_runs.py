"""Files of an unfinished training that were edited, lost or added: told with both values."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from interrupted import begun_training

from ich_keras import fitting, training
from ich_keras.cli import main
from ich_keras.errors import StaleError
from ich_keras.files import read_json, write_json
from ich_keras.inference import load_run
from ich_keras.run_edits import require_unedited
from ich_keras.run_folder import RunFolder
from ich_keras.training import resume, train
from ich_keras.verification import verify

SIZE = 48


@pytest.fixture(scope="module")
def begun(phantom_cache, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("begun") / "run"
    with begun_training(phantom_cache, run, "edited") as begun:
        yield begun


@pytest.fixture
def run(begun, tmp_path) -> RunFolder:
    return RunFolder(shutil.copytree(begun, tmp_path / "run"))


def edit(path: Path, *keys, to):
    content = read_json(path)
    place = content
    for key in keys[:-1]:
        place = place[key]
    before, place[keys[-1]] = place[keys[-1]], to
    write_json(path, content)
    return before


def test_an_untouched_run_passes(run):
    require_unedited(run)
    # Formatting is no difference, nor is where the cache lies.
    for path in (run.config_file, run.recipe_file, run.split_file):
        content = read_json(path)
        path.write_text(json.dumps(content, indent=7, sort_keys=True))
    edit(run.data_file, "cache_path", to="/elsewhere")
    require_unedited(run)
    assert verify(run.path)[0].endswith("an unfinished run")


EDITS = {
    "config": (
        ("config.json", "fit", "epochs"),
        5,
        "config.json: fit.epochs is 5, was 2.",
    ),
    "recipe": (
        ("recipe.json", "training", "learning_rate"),
        0.1,
        "recipe.json: training.learning_rate is 0.1, was 0.001.",
    ),
    "precision": (
        ("recipe.json", "precision"),
        "bfloat16",
        'recipe.json: precision is "bfloat16", was "float32".',
    ),
    "plan": (
        ("data.json", "plan", "total_steps"),
        3,
        "data.json: plan.total_steps is 3, was 10.",
    ),
    "labels": (("data.json", "labels"), None, 'data.json: labels is null, was "'),
}


@pytest.mark.parametrize(("keys", "to", "message"), EDITS.values(), ids=EDITS)
def test_an_edit_is_refused_with_both_values(run, phantom_cache, keys, to, message):
    edit(run.path / keys[0], *keys[1:], to=to)
    with pytest.raises(StaleError) as caught:
        resume(run, phantom_cache)
    assert f"{run} was changed since its training began: {message}" in caught.value.message
    assert f"{run.state_folder / 'epoch-0001' / 'state.json'} holds what they said" in (
        caught.value.hint
    )
    assert read_json(run.state_folder / "epoch-0001" / "state.json")["settings"]


def test_a_slice_that_was_moved_between_splits_is_seen(run, phantom_cache):
    members = read_json(run.split_file)["members"]
    moved, *left = members["test"]
    edit(
        run.split_file, "members", to={**members, "test": left, "train": [*members["train"], moved]}
    )
    with pytest.raises(StaleError) as caught:
        resume(run, phantom_cache)
    for part, change in (("train", 1), ("test", -1)):
        count = len(members[part])
        said = f"split.json: members.{part}.number is {count + change}, was {count}"
        assert said in caught.value.message
    # As many, but others.
    swapped = {**members, "test": members["valid"], "valid": members["test"]}
    edit(run.split_file, "members", to=swapped)
    with pytest.raises(StaleError, match=r'split\.json: members\.valid.digest is "\w{12}", was "'):
        resume(run, phantom_cache)


@pytest.mark.parametrize("name", ["config.json", "recipe.json", "data.json", "split.json"])
def test_lost_and_damaged_files_are_refused_by_name(run, phantom_cache, name):
    (run.path / name).write_text("[3]")
    with pytest.raises(StaleError, match=rf"{name}: "):
        resume(run, phantom_cache)
    (run.path / name).write_text("{")
    with pytest.raises(StaleError, match=rf"{name} is not valid JSON"):
        resume(run, phantom_cache)
    (run.path / name).unlink()
    with pytest.raises(StaleError, match=rf"{name} is lost"):
        resume(run, phantom_cache)


def test_a_file_that_was_added_is_refused(run, phantom_cache):
    write_json(run.started_from_file, {"path": "other"})
    with pytest.raises(StaleError, match=r"weights\.json is new"):
        resume(run, phantom_cache)


def test_every_reader_of_an_unfinished_run_refuses_it(run, phantom_cache_folder):
    edit(run.config_file, "seed", to=7)
    for read in (lambda: load_run(run, unfinished=True), lambda: verify(run.path)):
        with pytest.raises(StaleError, match=r"config\.json: seed is 7, was 0"):
            read()
    done = CliRunner().invoke(
        main, ["train", "--resume", str(run), "--cache", str(phantom_cache_folder)]
    )
    assert done.exit_code == 6
    assert "config.json: seed is 7, was 0" in done.output


def test_an_edit_while_the_training_runs_is_noticed_when_it_is_resumed(
    phantom_cache, tmp_path, monkeypatch, begun
):
    out, save_state = tmp_path / "run", fitting.save_state
    config = RunFolder(begun).config()

    def save_and_edit(folder, model, epoch, state):
        edit(out / "config.json", "fit", "epochs", to=9)
        save_state(folder, model, epoch, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "save_state", save_and_edit)
    with pytest.raises(KeyboardInterrupt):
        train(config, phantom_cache, out)
    monkeypatch.undo()
    with pytest.raises(StaleError, match=r"config\.json: fit\.epochs is 9, was 2"):
        resume(out, phantom_cache)


def test_states_of_older_versions_have_no_record(run, phantom_cache, monkeypatch):
    from ich_keras import checkpoints

    folder = run.state_folder / "epoch-0001"
    state, _ = checkpoints.read_state(folder, 1)
    del state["settings"]
    checkpoints.write_state(folder, state)
    edit(run.config_file, "fit", "epochs", to=9)
    monkeypatch.setattr(training, "finish", lambda *_: None)
    resume(run, phantom_cache)


def test_a_finished_run_whose_configuration_was_edited_is_refused(run, phantom_cache):
    resume(run, phantom_cache)
    load_run(run)
    before = edit(run.config_file, "seed", to=7)
    with pytest.raises(StaleError, match=r"config\.json was changed after the training"):
        load_run(run)
    edit(run.config_file, "seed", to=before)
    for content in ("[]", "{}", "3"):
        run.data_file.write_text(content)
        with pytest.raises(StaleError, match=r"data\.json is damaged"):
            load_run(run)
