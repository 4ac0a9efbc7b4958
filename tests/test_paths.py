"""Paths as people write them: empty ones, home folders, in every option of every command."""

import json
import os
import pwd
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import benchmarks.__main__ as benchmarks
import experiments.__main__ as experiments
from ich_keras import cli
from ich_keras.config import DataConfig, RunConfig
from ich_keras.data.split import find_split
from ich_keras.environment import choose_backend
from ich_keras.errors import UsageError
from ich_keras.models.weights_lookup import FOLDER_VARIABLE, find_weights, weights_folder
from ich_keras.paths import path_of
from ich_keras.terminal import NameOrPathType, PathType
from weights_convert import cli as weights

GROUPS = {
    "ich": cli.main,
    "weights-convert": weights.main,
    "experiments": experiments.main,
    "benchmarks": benchmarks.main,
}


def parameters():
    """Return (group, command, parameter) for all parameters of all commands."""
    found = [
        (name, c, p) for name, g in GROUPS.items() for c in g.commands.values() for p in c.params
    ]
    return [*found, *(("ich-train", cli.train_main, p) for p in cli.train_main.params)]


TAKES_PATHS = [found for found in parameters() if isinstance(found[2].type, PathType)]
TAKES_NAMES = [found for found in parameters() if isinstance(found[2].type, NameOrPathType)]


def ids(found):
    return [f"{group} {command.name} {p.opts[0]}" for group, command, p in found]


def test_no_option_takes_a_path_of_its_own_kind():
    others = [f for f in parameters() if isinstance(f[2].type, click.Path) and f not in TAKES_PATHS]
    assert others == []
    words = ("DIR", "CSV", "FILE", "JSON", "PNG", "RUN", "INDEX", "CACHE", "OUT")
    texts = [f for f in parameters() if f[2].type is click.STRING and f[2].metavar in words]
    assert ids(texts) == []
    names = {(c.name, p.opts[0]) for _, c, p in TAKES_NAMES}
    assert names == {("audit", "--split"), ("train", "--split"), ("train", "--weights")}
    # What the programs take today; a path option that is left out of the type shows here.
    assert len(TAKES_PATHS) > 40


@pytest.mark.parametrize("value", ["", "  ", "\t", "~nobody-at-all/data", "a\0b"])
@pytest.mark.parametrize(("group", "command", "option"), TAKES_PATHS, ids=ids(TAKES_PATHS))
def test_a_path_that_means_another_place_is_a_usage_error(
    group, command, option, value, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    given = [option.opts[0], value] if isinstance(option, click.Option) else [value]
    if isinstance(option, click.Argument):  # those before it are files that exist
        before = command.params[: command.params.index(option)]
        given = [*(__file__ for p in before if isinstance(p, click.Argument)), *given]
    # Whatever else is required comes first and is fine, so that only this option is at fault.
    for other in command.params:
        if other is not option and other.required and isinstance(other, click.Option):
            given += [other.opts[0], "1" if other.type is click.INT else "x"]
    result = CliRunner().invoke(command, given)
    assert result.exit_code == 2, result.output
    name = option.opts[0] if isinstance(option, click.Option) else option.human_readable_name
    assert f"Invalid value for '{name}" in result.output.replace("[", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["", " ", "~nobody-at-all/data"])
@pytest.mark.parametrize(("group", "command", "option"), TAKES_NAMES, ids=ids(TAKES_NAMES))
def test_a_name_or_path_is_not_empty(group, command, option, value):
    others = ["--cache", "x"] if command.name == "audit" else []
    result = CliRunner().invoke(command, [option.opts[0], value, *others])
    assert result.exit_code == 2, result.output
    assert f"Invalid value for '{option.opts[0]}'" in result.output


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of("~/run", "--out") == tmp_path / "run"
    assert path_of("~", "--out") == tmp_path
    user = pwd.getpwuid(os.getuid())
    assert path_of(f"~{user.pw_name}/run", "--out") == Path(user.pw_dir) / "run"
    for plain in ("a/~/b", "./~x", "data~", ".", "-", " a"):
        assert path_of(plain, "--out") == Path(plain)
    assert PathType().convert("~/run", None, None) == tmp_path / "run"
    assert NameOrPathType().convert("~/a.csv", None, None) == str(tmp_path / "a.csv")
    assert NameOrPathType().convert("thesis-slices", None, None) == "thesis-slices"


@pytest.mark.parametrize("home", ["", "  ", "relative"])
def test_a_home_that_is_no_folder_is_not_the_root(home, monkeypatch):
    monkeypatch.setenv("HOME", home)
    for text in ("~", "~/run"):
        with pytest.raises(UsageError, match="there is no home folder for '~'"):
            path_of(text, "--out")


def test_the_message_names_place_and_way_out():
    with pytest.raises(
        UsageError, match="--out is ''; expected a path. Is a variable of the shell"
    ):
        path_of("", "--out")
    with pytest.raises(UsageError, match=r"for a file of that name here, ./~nobody-at-all\."):
        path_of("~nobody-at-all", "weights")


def test_the_tilde_reaches_the_commands(phantom_cache_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "cache").symlink_to(phantom_cache_folder)
    result = CliRunner().invoke(cli.main, ["cache", "--out=~/cache", "--verify"])
    assert result.exit_code == 0, result.output
    assert f"Verified: {tmp_path / 'cache'}" in result.output
    result = CliRunner().invoke(cli.main, ["audit", "--cache=~/cache", "--out=~/found.json"])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "found.json").read_text())


def test_weights_and_splits_of_a_config_file_too(phantom_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.weights.h5").touch()
    assert find_weights("~/a.weights.h5", "resnet18_2d") == tmp_path / "a.weights.h5"
    patients = sorted(set(phantom_cache.slices["patient_id"]))
    parts = ["train", "valid", "test"]
    rows = [f"{patient},{parts[n % 3]}" for n, patient in enumerate(patients)]
    (tmp_path / "mine.csv").write_text("\n".join(["patient_id,split", *rows]) + "\n")
    assert find_split("~/mine.csv", phantom_cache.slices, 0).name == "file:mine.csv"
    with pytest.raises(UsageError, match="data.split is ' '; expected a path"):
        RunConfig(data=DataConfig(split=" "))
    with pytest.raises(UsageError, match="weights is ''; expected a path"):
        RunConfig.from_dict({"weights": ""})


def test_the_variable_of_the_weights_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(FOLDER_VARIABLE, "~/weights")
    assert weights_folder() == tmp_path / "weights"
    monkeypatch.setenv(FOLDER_VARIABLE, " ")
    with pytest.raises(UsageError, match=rf"\${FOLDER_VARIABLE} is ' '; expected a path"):
        weights_folder()


def test_an_empty_backend_is_not_the_usual_one():
    with pytest.raises(UsageError, match="backend ''; expected one of torch"):
        choose_backend("")
