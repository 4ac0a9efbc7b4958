"""Temporary files of ended processes go at the next start; those of live ones never do."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from interrupted import begun_training

from ich_keras import files, leftovers, training
from ich_keras.evaluation import evaluate
from ich_keras.leftovers import partial_of, remove_leftovers, target_of
from ich_keras.phantom.dicom import write_phantoms
from ich_keras.training import resume

ROOT = Path(__file__).resolve().parents[1]
DAY = 24 * 3600
pytestmark = pytest.mark.skipif(os.name == "nt", reason="processes are asked in the POSIX way")


def run_python(code: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def ended() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def running():
    """The number of a process that runs."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process.pid
    process.kill()
    process.wait()


def left_by(process: int, path: Path, days: float = 0.0, place: str | None = None) -> Path:
    """Write what a process has left half written."""
    mark = f"{process}-{leftovers._place() if place is None else place}"
    made = path.with_name(f".partial-{mark}-{path.name}")
    made.write_text("half of a f")
    os.utime(made, (time.time() - days * DAY,) * 2)
    return made


def test_names_lead_from_the_temporary_file_to_its_target(tmp_path):
    path = tmp_path / "best.weights.h5"
    temporary = partial_of(path)
    assert re.fullmatch(rf"\.partial-{os.getpid()}-[0-9a-f]{{8}}-best\.weights\.h5", temporary.name)
    assert target_of(temporary) == path
    inside = partial_of(tmp_path / "epoch-0001") / partial_of(Path("a.npz")).name
    assert target_of(inside) == tmp_path / "epoch-0001" / "a.npz"
    assert target_of(tmp_path / ".partial-raw-shard-0001.h5").name == "raw-shard-0001.h5"


def test_what_an_ended_process_has_left_goes_and_what_a_live_one_writes_stays(
    tmp_path, ended, running
):
    path = tmp_path / "a.csv"
    path.write_text("whole")
    dead, live = left_by(ended, path), left_by(running, path, days=2)
    remove_leftovers(tmp_path, is_alone=True)
    assert (dead.exists(), live.exists(), path.read_text()) == (False, True, "whole")


@pytest.mark.parametrize("owner", ["another machine", "our own number", "an older version"])
def test_where_nobody_can_tell_only_a_lock_or_a_day_removes_it(tmp_path, owner, ended):
    def leave(days):
        path = tmp_path / "a.csv"
        if owner == "another machine":
            return left_by(ended, path, days, place="01234567")
        if owner == "our own number":  # a container gives its main process the same each time
            return left_by(os.getpid(), path, days)
        made = left_by(ended, path, days)
        return made.rename(tmp_path / f".partial-{ended}-a.csv")

    young = leave(0.9)
    remove_leftovers(tmp_path)
    assert young.exists()
    remove_leftovers(tmp_path, is_alone=True)
    assert not young.exists()
    old = leave(1.1)
    remove_leftovers(tmp_path)
    assert not old.exists()
    ahead = leave(-400)  # a clock that was wrong
    remove_leftovers(tmp_path)
    assert ahead.exists()


def test_folders_go_whole_and_are_as_old_as_the_newest_file_in_them(tmp_path):
    folder = tmp_path / ".partial-77-01234567-index"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.dcm").write_text("a")
    for path in (folder, folder / "images"):
        os.utime(path, (0, 0))
    remove_leftovers(tmp_path)
    assert folder.exists()
    os.utime(folder / "images" / "a.dcm", (0, 0))
    remove_leftovers(tmp_path)
    assert not folder.exists()


def test_only_what_was_to_get_a_name_goes(tmp_path, ended):
    other = left_by(ended, tmp_path / "my-index")
    own = left_by(ended, tmp_path / "index")
    remove_leftovers(tmp_path, "index")
    assert (own.exists(), other.exists()) == (False, True)
    remove_leftovers(tmp_path / "nowhere")


def test_links_are_removed_and_not_followed(tmp_path, ended):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").write_text("mine")
    link = left_by(ended, tmp_path / "index")
    link.unlink()
    link.symlink_to(tmp_path / "mine")
    remove_leftovers(tmp_path)
    assert not link.is_symlink()
    assert (tmp_path / "mine" / "a").read_text() == "mine"


def test_a_killed_writer_leaves_a_file_that_the_next_one_removes(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from ich_keras.files import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "a.csv"
    assert run_python(code, path).returncode == -signal.SIGKILL
    assert [item.name[:9] for item in tmp_path.iterdir()] == [".partial-"]
    files.atomic_write(path, "whole")
    assert [item.name for item in tmp_path.iterdir()] == ["a.csv"]


@pytest.fixture(scope="module")
def begun(phantom_cache, tmp_path_factory):
    run = tmp_path_factory.mktemp("begun") / "run"
    with begun_training(phantom_cache, run, "left") as begun:
        yield begun


def test_resuming_and_evaluating_remove_what_a_killed_one_has_left(
    begun, phantom_cache, tmp_path, ended, running, monkeypatch
):
    run = Path(shutil.copytree(begun, tmp_path / "run"))
    gone = [
        left_by(ended, run / "best.weights.h5", place="01234567"),
        left_by(ended, run / "state" / "latest.json"),
        run / "state" / ".partial-epoch-0002",
        run / "state" / f".partial-{ended}-01234567-epoch-0002",
    ]
    for folder in gone[2:]:
        folder.mkdir()
        (folder / "model.weights.h5").write_text("half")
    live = left_by(running, run / "history.csv")
    monkeypatch.setattr(training, "evaluate_network", lambda *_: None)
    monkeypatch.setattr(training, "report_text", lambda _: "report")
    resume(run, phantom_cache)
    assert [path for path in gone if path.exists()] == []
    assert live.exists()
    monkeypatch.undo()
    left = left_by(ended, run / "predictions-valid.csv")
    other = left_by(ended, run / "metrics-test.json")
    evaluate(run, phantom_cache, "valid")
    assert (left.exists(), other.exists(), live.exists()) == (False, False, True)


def test_drawing_phantoms_removes_what_a_killed_one_has_left(tmp_path, ended):
    left = tmp_path / f".partial-{ended}-{leftovers._place()}-data"
    (left / "images").mkdir(parents=True)
    write_phantoms(tmp_path / "data", 1, seed=0, matrix=32)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
