"""Commands killed at any moment: the next try gives what an uninterrupted one gives."""

import csv
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from command_server import NARROW, PAUSE, PAUSED, RECORD, CommandServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork"),
]

KILLED = -9
STOPPED = 137  # at a fail point
TRAINING = [
    *("--preset", NARROW, "--size", 32, "--epochs", 2, "--batch-size", 16),
    *("--precision", "float32", "--backend", "torch", "--device", "cpu", "--workers", 0),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with CommandServer(tmp_path_factory.mktemp("outputs")) as server:
        yield server


@pytest.fixture(scope="module")
def home(server, tmp_path_factory) -> Path:
    """A folder with data of eight patients, and what each command made of them undisturbed."""
    home = tmp_path_factory.mktemp("home")
    phantoms = ["--series", 8, "--matrix", 32, "--seed", 1, "--workers", 0]
    done(server, "phantom", "--out", home / "data", *phantoms)
    for name in ("index", "cache", "train", "predict"):
        done(server, *command(name, home), **{RECORD: str(home / f"{name}.points")})
    return home


def command(name: str, home: Path, out: Path | None = None) -> list:
    """Return the arguments of a command that reads from `home` and writes to `out`."""
    out = out or home / name
    inputs = {
        "index": ["--dicom", home / "data/images", "--labels", home / "data/stage_2_train.csv"],
        "cache": ["--index", home / "index", "--size", 32],
        "train": ["--cache", home / "cache", *TRAINING],
        "predict": ["--run", home / "train", "--dicom", home / "data/images"],
    }[name]
    workers = [] if name == "train" else ["--workers", 0]
    return [name, *inputs, *workers, "--out", out]


def points_of(name: str, home: Path) -> list[str]:
    """Return the fail points that a command passes, each with the number of its pass."""
    passed = (home / f"{name}.points").read_text().splitlines()
    return [f"{point}*{passed[: n + 1].count(point)}" for n, point in enumerate(passed)]


def done(server: CommandServer, *arguments: object, **environment: str) -> str:
    code, output = server.run(*arguments, **environment)
    assert code == 0, output
    return output


def result_of(name: str, folder: Path) -> dict[str, object]:
    """Return the part of a command's results that does not tell the time."""
    if name != "train":
        # A kill after all is done may leave the lock, which nobody holds.
        files = [path for path in folder.iterdir() if path.suffix != ".lock"]
        return {path.name: path.read_bytes() for path in files}
    tables = [*folder.glob("predictions-*.csv"), *folder.glob("metrics-*.json")]
    assert len(tables) == 4
    with open(folder / "history.csv", newline="") as stream:
        history = list(csv.DictReader(stream))
    return {
        "history": [{k: v for k, v in row.items() if k != "seconds"} for row in history],
        "weights": json.loads((folder / "checksums.json").read_text())["weights"],
        **{path.name: path.read_bytes() for path in tables},
    }


def try_again(server: CommandServer, name: str, home: Path, out: Path) -> str:
    """Do what a person does after a crash: the same command, or for a training --resume, or, when
    that is done but for its page, `ich report`."""
    if name == "train" and (out / "report.md").exists():
        return done(server, "report", out)
    if name == "train" and out.exists():
        code, output = server.run("train", "--resume", out)
        if "it has no state of a finished epoch" not in output:
            assert code == 0, output
            return output
        assert code == 6, output
        shutil.rmtree(out)  # as the hint says
    return done(server, *command(name, home, out))


def is_finished(name: str, out: Path) -> bool:
    last = {"index": "index.json", "cache": "manifest.json"}
    if name == "train":
        record = out / "checksums.json"
        return record.exists() and "report.html" in json.loads(record.read_text())["files"]
    if name == "predict":
        return (out / "notice.txt").exists() and not (out / "prediction.journal").exists()
    # Until its journal is gone, an index is taken up again, and found to be whole.
    return (out / last[name]).exists() and not out.with_name(f"{out.name}.journal").exists()


def require_same(name: str, home: Path, out: Path, moment: object) -> None:
    assert result_of(name, out) == result_of(name, home / name), moment
    # Nothing is left beside it, nor in it.
    beside = {path.name for path in out.parent.iterdir() if path.suffix != ".lock"}
    assert beside == {out.name}, moment
    assert not list(out.rglob(".*")), moment


# Before the first state all points are alike, as are the two sides of writing one file.
TRAINING_POINTS = ("environment.json*1", "best.weights", "history", "model.", "variables", "state.")
LATER_POINTS = ("latest", "choices", "predictions-valid", "checksums", "report")


def is_worth_it(name: str, point: str) -> bool:
    if name != "train":
        return True
    return point.startswith("after") and any(
        part in point for part in (*TRAINING_POINTS, *LATER_POINTS)
    )


@pytest.mark.parametrize("name", ["index", "cache", "train", "predict"])
def test_stopped_at_each_point_the_next_try_ends_as_if_nothing_had_been(
    name, server, home, tmp_path
):
    points = [point for point in points_of(name, home) if is_worth_it(name, point)]
    assert len(points) >= 8
    for number, point in enumerate(points):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        code, output = server.run(*command(name, home, out), ICH_FAIL_AT=point)
        assert code == STOPPED, (point, output)
        if is_finished(name, out):
            assert point == points[-1]
        else:
            try_again(server, name, home, out)
        require_same(name, home, out, point)


@pytest.mark.parametrize(
    ("name", "kills"), [("index", 2), ("cache", 2), ("train", 3), ("predict", 3)]
)
def test_killed_at_random_the_next_try_ends_as_if_nothing_had_been(
    name, kills, server, home, tmp_path
):
    began = time.monotonic()
    done(server, *command(name, home, tmp_path / "whole" / "out"))
    seconds = time.monotonic() - began
    moments = random.Random(name)
    for number in range(kills):
        moment = moments.uniform(0, seconds)
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        code, output = server.run_killed_after(moment, *command(name, home, out))
        assert code in (0, KILLED), output
        if not is_finished(name, out):
            try_again(server, name, home, out)
        require_same(name, home, out, moment)


# --- Signals --------------------------------------------------------------------------------

ENDS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def interrupted(server, arguments, moment, *numbers):
    """Send signals to a command at a fail point, or when it has printed a text.

    Returns:
        (its exit code, what it printed); none of its processes is left.
    """
    command = server.start(*arguments, **({PAUSE: moment} if "*" in moment else {}))
    command.wait_for(PAUSED if "*" in moment else moment)
    for number in numbers:
        command.send(number)
    began = time.monotonic()
    code, output = command.wait()
    assert time.monotonic() - began < 30, output
    assert command.left_over() == [], output
    assert "Traceback" not in output
    return code, output


@pytest.mark.parametrize(
    ("name", "moment", "number"),
    [
        ("index", "indexing", signal.SIGINT),
        ("index", "indexing", signal.SIGTERM),
        ("index", "before series.csv*1", signal.SIGTERM),
        ("cache", "caching", signal.SIGTERM),
        ("cache", "before shard-0000.json*1", signal.SIGINT),
        ("cache", "before manifest.json*1", signal.SIGTERM),
    ],
)
def test_a_signal_leaves_no_process_and_no_half_file(server, home, tmp_path, name, moment, number):
    out = tmp_path / "there" / "out"
    out.parent.mkdir()
    arguments = [*command(name, home, out), "--workers", 2]  # the last one counts
    code, output = interrupted(server, arguments, moment, number)
    assert code == ENDS[number], output
    assert not out.exists()
    kept = {path.name for path in out.parent.rglob("*")}
    assert not [part for part in kept if part.startswith(".partial-")], kept
    if moment == "before manifest.json*1":
        assert "shard-0000.h5" in kept  # a finished shard
    try_again(server, name, home, out)
    require_same(name, home, out, moment)


@pytest.mark.parametrize(
    ("numbers", "workers"),
    [([signal.SIGINT], 1), ([signal.SIGTERM], 0), ([signal.SIGINT] * 2, 0)],
    ids=["Ctrl-C", "SIGTERM", "Ctrl-C twice"],
)
def test_a_training_that_gets_a_signal_says_how_to_go_on_and_does(
    server, home, tmp_path, numbers, workers
):
    out = tmp_path / "there" / "out"
    out.parent.mkdir()
    arguments = [*command("train", home, out), "--loader-workers", workers]
    code, output = interrupted(server, arguments, "before history.csv*2", *numbers)
    assert code == ENDS[numbers[0]], output
    if len(numbers) == 1:
        assert f"To resume: ich-train --resume {out}\n" in output
    assert (out / "state" / "epoch-0001").is_dir()
    assert not list(out.rglob(".partial-*"))
    if workers:  # which start anew for each split, in seconds
        return
    try_again(server, "train", home, out)
    require_same("train", home, out, numbers)


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_in_the_first_epoch_leaves_no_run_folder(server, home, tmp_path, number):
    out = tmp_path / "there" / "out"
    out.parent.mkdir()
    code, output = interrupted(server, command("train", home, out), "training", number)
    assert code == ENDS[number], output
    assert "No epoch was finished: start the training again." in output
    assert list(out.parent.iterdir()) == []
