"""An index is under its name only when it is whole, and a killed `ich index` goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from tiny_dicom import tiny_file

from ich_keras.cli import main
from ich_keras.ct import series as series_module
from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.errors import UsageError
from ich_keras.files import lock

TABLES = ("slices", "series", "rejects")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def dicom(tmp_path):
    folder = tmp_path / "dicom"
    folder.mkdir()
    for number in range(5):
        content = tiny_file(
            SOPInstanceUID=f"1.2.3.4.{number}", ImagePositionPatient=[0, 0, 5 * number]
        )
        (folder / f"{number}.dcm").write_bytes(content)
    (folder / "notes.txt").write_text("text\n")
    return folder


def ich(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_equal(one, two):
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(one, name), getattr(two, name), check_exact=True)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_nothing_stands_under_the_name_until_all_is_written(dicom, tmp_path, monkeypatch):
    index = index_folder(dicom)

    def fail(path, content):
        assert names(tmp_path)[0].startswith(".partial-")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(series_module, "write_json", fail)
    with pytest.raises(OSError, match="No space"):
        index.save(tmp_path / "index")
    assert names(tmp_path) == ["dicom"]
    monkeypatch.undo()
    index.save(tmp_path / "index")
    assert names(tmp_path / "index") == ["index.json", "rejects.csv", "series.csv", "slices.csv"]
    assert names(tmp_path) == ["dicom", "index"]


@pytest.mark.parametrize(
    "kept",
    [
        ["slices.csv", "mine.txt"],
        ["slices.csv"],
        ["slices.csv", "series.csv", "rejects.csv"],
        ["index.json"],
        ["rejects.csv"],
        ["rejects.csv", "slices.csv.bak"],
    ],
)
def test_what_lies_under_the_name_is_never_replaced(dicom, tmp_path, kept):
    out = tmp_path / "index"
    out.mkdir()
    for name in kept:
        (out / name).write_text("{}")
    with pytest.raises(UsageError, match="already exists; nothing is overwritten"):
        index_folder(dicom).save(out)
    result = ich("index", "--dicom", dicom, "--out", out, "--workers", 0)
    assert (result.exit_code, "already exists" in result.output) == (2, True)
    assert names(out) == sorted(kept)
    assert names(tmp_path) == ["dicom", "index"]


def test_a_link_to_an_empty_folder_can_be_filled(dicom, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    index_folder(dicom).save(tmp_path / "link")
    assert len(SeriesIndex.load(tmp_path / "real").slices) == 5


def test_killed_between_the_last_two_steps_the_index_is_taken_as_it_is(dicom, tmp_path):
    out, journal = tmp_path / "index", tmp_path / "index.journal"
    index_folder(dicom, journal=journal).save(out)
    before = (out / "index.json").stat().st_mtime_ns
    result = ich("index", "--dicom", dicom, "--out", out, "--workers", 0)
    assert result.exit_code == 0, result.output
    assert f"Index: {out}" in result.output
    assert (out / "index.json").stat().st_mtime_ns == before
    assert names(tmp_path) == ["dicom", "index"]
    # Another folder gives another index, which must not be lost.
    index_folder(dicom, journal=journal)
    (dicom / "4.dcm").unlink()
    result = ich("index", "--dicom", dicom, "--out", out, "--workers", 0)
    assert (result.exit_code, "already exists" in result.output) == (2, True)
    assert len(SeriesIndex.load(out).slices) == 5


def test_two_at_once_do_not_mix(dicom, tmp_path):
    with lock(tmp_path / "index.journal.lock"):
        result = ich("index", "--dicom", dicom, "--out", tmp_path / "index", "--workers", 0)
    assert (result.exit_code, "is locked by another process" in result.output) == (6, True)
    assert not (tmp_path / "index").exists()


def test_its_own_files_are_not_indexed(dicom):
    out = dicom / "index"
    result = ich("index", "--dicom", dicom, "--out", out, "--workers", 0)
    assert result.exit_code == 0, result.output
    assert SeriesIndex.load(out).rejects["path"].tolist() == [str(dicom / "notes.txt")]
    assert names(dicom) == ["0.dcm", "1.dcm", "2.dcm", "3.dcm", "4.dcm", "index", "notes.txt"]


# It imports once, and forks for every attempt: a kill costs some hundredths of a second.
KILLER = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path

import ich_keras.workflow
from ich_keras.cli import main

dicom, work = sys.argv[1:]
out = Path(work) / "index"
arguments = ["index", "--dicom", dicom, "--out", str(out), "--workers", "0"]


def killing(real, left):
    def call(*args, **settings):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **settings)

    return call


def attempt(steps=0, seconds=None):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            left = [steps]
            for name in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
                setattr(os, name, killing(getattr(os, name), left))
            main(arguments)
        except SystemExit as end:
            code = end.code or 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(**kill):
    first = attempt(**kill)
    seen = out.exists() and not (out / "index.json").exists()
    again = attempt()
    found = [first, again, seen, sorted(os.listdir(work))]
    content = {path.name: path.read_text() for path in sorted(out.iterdir())}
    shutil.rmtree(work)
    os.mkdir(work)
    return found, content


began = time.monotonic()
_, whole = outcome()
took = (time.monotonic() - began) / 2
results, step = [], 0
while True:
    step += 1
    found, content = outcome(steps=step)
    if found[0] == 0:
        break
    results.append([f"step {step}", *found, content == whole])
random.seed(0)
for _ in range(10):
    found, content = outcome(seconds=random.uniform(0, took))
    results.append(["any time", *found, content == whole])
print(json.dumps(results))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_killed_at_any_step_the_same_command_goes_on(dicom, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLER, str(dicom), str(work)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    steps = [result for result in results if result[0].startswith("step")]
    assert len(steps) >= 15
    for moment, first, again, is_half, left, is_same in results:
        assert first == -9 or (moment == "any time" and first == 0), moment
        # Where the first attempt was done, a second one finds its index. So it may be where a kill
        # came just before the end of the process.
        assert again == (2 if first == 0 else 0) or (moment == "any time" and again == 2), moment
        assert not is_half, moment
        assert is_same, moment
        assert left == ["index"], (moment, left)
