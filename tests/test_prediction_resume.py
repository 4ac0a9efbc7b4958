"""A prediction that is killed goes on, and one folder takes one prediction at a time."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from full_disk import largest_file
from untrained_runs import copy_series, series_paths, untrained_run

from ich_keras import prediction, prediction_journal, prediction_reading
from ich_keras.cli import main
from ich_keras.ct.rejects import NothingUsable, RejectedFile, TooManyRejects
from ich_keras.ct.series import index_folder
from ich_keras.errors import EnvironmentProblem, StaleError, UsageError
from ich_keras.files import lock, write_json
from ich_keras.inference import load_run, network_digest
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights import save_weights
from ich_keras.prediction import predict_folder, predict_index
from ich_keras.prediction_journal import JOURNAL_FILE, LOCK_FILE, PredictionJournal, SeriesResult
from ich_keras.recipe import RECIPE
from ich_keras.run_folder import RunFolder

SCRIPT = Path(__file__).with_name("killed_predictions.py")
TABLES = [
    "decisions.json",
    "look_first.csv",
    "notice.txt",
    "predictions.csv",
    "rejects.csv",
    "series.csv",
    "studies.csv",
]
NUM_SERIES = 6
BATCH = 4  # less than a series has: every series is a group


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    spec = ModelSpec((48, 48, 3), depth=10, width=8)
    return untrained_run(tmp_path_factory.mktemp("slices") / "run", "narrow", spec)


@pytest.fixture(scope="module")
def series_run(tmp_path_factory):
    spec = ModelSpec((20, 48, 48, 1), depth=10, width=8)
    folder = tmp_path_factory.mktemp("series") / "run"
    return untrained_run(folder, "narrow3d", spec, view="series", slices=20)


@pytest.fixture(scope="module")
def images(phantom_folder, tmp_path_factory):
    """Six series; of one, a slice that only its pixels show to be broken; and a text."""
    source = phantom_folder / "images"
    folder = copy_series(source, NUM_SERIES, tmp_path_factory.mktemp("six") / "images")
    blank_tail(folder / series_paths(source, 1)[0][2].name)
    (folder / "notes.txt").write_text("not a slice")
    return folder


def blank_tail(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 4096] + bytes(4096))


@pytest.fixture(scope="module")
def whole(run, images, tmp_path_factory):
    """The tables of a prediction that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    predict_folder(run, images, out, batch_size=BATCH)
    return tables(out)


def tables(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def interrupted(run, images, out, groups, **asked):
    """Predict until some groups are in the journal, and stop as Ctrl-C does; return the folder."""
    add = PredictionJournal.add
    done = []

    def add_and_stop(journal, results):
        add(journal, results)
        done.append(results)
        if len(done) == groups:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PredictionJournal, "add", add_and_stop)
        with pytest.raises(KeyboardInterrupt):
            predict_folder(run, images, out, **{"batch_size": BATCH, **asked})
    return out


@pytest.fixture(scope="module")
def half(run, images, tmp_path_factory):
    """The folder of a prediction that was stopped after three series; copy it."""
    return interrupted(run, images, tmp_path_factory.mktemp("half") / "out", 3)


@pytest.fixture
def out(half, tmp_path):
    return shutil.copytree(half, tmp_path / "out")


def count_readings(monkeypatch):
    read_indexed, read = prediction_reading.read_indexed, []

    def reading(indexed, size, **asked):
        read.append(indexed.container)
        return read_indexed(indexed, size, **asked)

    monkeypatch.setattr(prediction_reading, "read_indexed", reading)
    return read


def test_an_interrupted_prediction_resumes_and_reads_only_the_rest(
    run, images, whole, out, monkeypatch
):
    assert names(out) == [JOURNAL_FILE]
    read, told = count_readings(monkeypatch), []
    result = predict_folder(run, images, out, batch_size=BATCH, tell=told.append)
    assert told == [f"Resuming after 3 of {NUM_SERIES} series."]
    slices = index_folder(images).slices
    rest = slices["series_uid"].unique()[3:]
    assert sorted(read) == sorted(slices.loc[slices["series_uid"].isin(rest), "container"])
    assert tables(out) == whole
    assert len(result.series) == NUM_SERIES
    # The result that Python gets is that of an uninterrupted call, too.
    alone = predict_folder(run, images, batch_size=BATCH)
    for name in ("slices", "series", "rejects"):
        pd.testing.assert_frame_equal(getattr(result, name), getattr(alone, name), check_exact=True)


def test_workers_resume_to_the_same_tables(run, images, whole, out):
    predict_folder(run, images, out, batch_size=BATCH, workers=2)
    assert tables(out) == whole


@pytest.mark.parametrize("groups", [1, 2])
def test_whole_series_in_batches_resume_to_the_same_tables(series_run, images, tmp_path, groups):
    predict_folder(series_run, images, tmp_path / "whole", batch_size=2)
    out = interrupted(series_run, images, tmp_path / "out", groups, batch_size=2)
    told = []
    predict_folder(series_run, images, out, batch_size=2, tell=told.append)
    assert told == [f"Resuming after {2 * groups} of {NUM_SERIES} series."]
    assert tables(out) == tables(tmp_path / "whole")
    assert names(out) == [n for n in TABLES if n not in ("predictions.csv", "look_first.csv")]


def test_short_series_share_a_batch_and_resume_to_the_same_tables(run, images, tmp_path):
    predict_folder(run, images, tmp_path / "whole", batch_size=25)
    out = interrupted(run, images, tmp_path / "out", 1, batch_size=25)
    told = []
    predict_folder(run, images, out, batch_size=25, tell=told.append)
    assert told != [] and told != [f"Resuming after 1 of {NUM_SERIES} series."]
    assert tables(out) == tables(tmp_path / "whole")


def predictions(run, images, orders):
    done = subprocess.run(
        [sys.executable, SCRIPT, run, images, json.dumps(orders)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the predictions are forked")
def test_killed_at_any_moment_a_prediction_goes_on(run, images, tmp_path):
    points = [
        f"after {JOURNAL_FILE}",
        "before a prediction's record*2",
        "after a prediction's record*4",
        "before predictions.csv",
        "after notice.txt",
        "after the journal's removal",
        *(random.Random(1).uniform(0.2, 1) for _ in range(2)),
    ]
    outs = [tmp_path / f"out{number}" for number in range(len(points))]
    orders = [[None, str(tmp_path / "whole")]]
    for point, out in zip(points, outs, strict=True):
        orders += [[point, str(out)], [None, str(out)]]
    codes, told = predictions(run, images, orders)
    killed, resumed = codes[1::2], codes[2::2]
    assert killed[:6] == [137] * 6
    assert resumed[:6] == [0] * 5 + [2]
    assert f"{outs[5]} already exists; nothing is overwritten" in told  # it was finished
    for code, again in zip(killed[6:], resumed[6:], strict=True):
        assert (code, again) in ((-signal.SIGKILL, 0), (0, 2))  # killed, or too fast
    expected = tables(tmp_path / "whole")
    assert sorted(expected) == TABLES
    for out in outs:
        assert tables(out) == expected, out


@pytest.mark.parametrize("more", [0, 100])
def test_a_full_disk_is_named_and_loses_nothing(run, images, whole, out, more):
    path = out / JOURNAL_FILE
    message = f"{path} could not be written: it would exceed"
    with (
        largest_file(path.stat().st_size + more),
        pytest.raises(EnvironmentProblem, match=message) as caught,
    ):
        predict_folder(run, images, out, batch_size=BATCH)
    assert "the same command resumes" in caught.value.hint
    assert names(out) == [JOURNAL_FILE]
    # Full again, when the tables are written.
    with (
        largest_file(len(whole["predictions.csv"]) - 1),
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(EnvironmentProblem, match=r"predictions.csv could not be written: it would"),
    ):
        # Keep the journal, which is larger than the tables, out of it.
        patch.setattr(PredictionJournal, "add", lambda journal, results: None)
        predict_folder(run, images, out, batch_size=BATCH)
    told = []
    predict_folder(run, images, out, batch_size=BATCH, tell=told.append)
    assert told == [f"Resuming after 3 of {NUM_SERIES} series."]
    assert tables(out) == whole


def test_half_a_record_is_an_error(tmp_path):
    path = tmp_path / "journal"
    journal = PredictionJournal(path, {}, {})
    result = SeriesResult("a", (1,), ("ab",), (), np.zeros((1, 6), np.float32))
    with (
        largest_file(path.stat().st_size + 9),
        pytest.raises(EnvironmentProblem, match=f"{path} could not be written: it would exceed"),
    ):
        journal.add([result])
    assert journal.finished() == PredictionJournal(path, {}, {}).finished() == {}


def test_a_disk_that_is_full_at_the_start_leaves_nothing(run, images, tmp_path):
    message = f"{JOURNAL_FILE} could not be written: it would exceed"
    with largest_file(100), pytest.raises(EnvironmentProblem, match=message):
        predict_folder(run, images, tmp_path / "new")
    assert names(tmp_path) == []


@pytest.mark.parametrize("kept", ["none", "first line", "header", "torn", "zeros", "flipped"])
def test_a_torn_journal_is_read_up_to_its_last_whole_record(run, images, whole, out, kept):
    path = out / JOURNAL_FILE
    content = path.read_bytes()
    first, header, *records = content.splitlines(keepends=True)
    assert len(records) == 3
    to_third = len(content) - len(records[2])
    left, series = {
        "none": (b"", 0),
        "first line": (first + header[:20], 0),
        "header": (first + header, 0),
        "torn": (content[:-1], 2),
        "zeros": (content[: to_third + 9] + bytes(500), 2),
        "flipped": (content[: to_third - 20] + b"?" + content[to_third - 19 :], 1),
    }[kept]
    path.write_bytes(left)
    told = []
    predict_folder(run, images, out, batch_size=BATCH, tell=told.append)
    assert told == ([f"Resuming after {series} of {NUM_SERIES} series."] if series else [])
    assert tables(out) == whole


def test_what_follows_a_torn_record_can_be_read(tmp_path):
    path, settings = tmp_path / "journal", {"batch_size": 4}
    results = [
        SeriesResult(uid, (1,), ("ab",), (), np.full((1, 6), 0.1, np.float32)) for uid in "abc"
    ]
    journal = PredictionJournal(path, settings, {})
    for result in results[:2]:
        journal.add([result])
    path.write_bytes(path.read_bytes()[:-7])
    PredictionJournal(path, settings, {}).add([results[2]])
    found = PredictionJournal(path, settings, {}).finished()
    assert list(found) == ["a", "c"]
    assert found["c"].values.tolist() == results[2].values.tolist()


def test_a_journal_of_zeros_or_of_something_else(run, images, whole, out):
    path = out / JOURNAL_FILE
    for content, error, message in (
        (b"dear diary\n", UsageError, "is not the journal of a prediction; it was not changed"),
        (b"ich-prediction-journal 0\n{}", StaleError, "was written by another version"),
    ):
        path.write_bytes(content)
        with pytest.raises(error, match=message):
            predict_folder(run, images, out, batch_size=BATCH)
        assert path.read_bytes() == content
    path.write_bytes(bytes(3000))
    predict_folder(run, images, out, batch_size=BATCH)
    assert tables(out) == whole


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"batch_size": 8}, "a prediction with batch size 4; now it runs with batch size 8"),
        (
            {"any_body_part": True},
            "a prediction without --any-body-part; now it runs with --any-body-part",
        ),
    ],
)
def test_other_options_are_refused(run, images, out, asked, message):
    before = tables(out)
    with pytest.raises(StaleError, match=message) as caught:
        predict_folder(run, images, out, **{"batch_size": BATCH, **asked})
    assert f"remove {out / JOURNAL_FILE}" in caught.value.hint
    assert tables(out) == before


def test_another_run_is_refused(run, images, out, tmp_path):
    other = shutil.copytree(run, tmp_path / "run")
    folder = RunFolder(other)
    write_json(folder.choices_file, {"aggregation": {"rule": "noisy-or"}})
    with pytest.raises(StaleError, match="with rule max; now it runs with rule noisy-or"):
        predict_folder(other, images, out, batch_size=BATCH)
    folder.choices_file.unlink()
    model = load_run(other)[1]
    weights = model.get_weights()
    model.set_weights([*weights[:-1], weights[-1] + np.float32(1e-6)])
    facts = {"cache": "none", "pixels": None}
    save_weights(model, folder.best_weights, {RECIPE: folder.recipe().to_dict(), **facts})
    digest = network_digest(model)[:12]
    with pytest.raises(
        StaleError, match=f"with weights [0-9a-f]{{12}}; now it runs with weights {digest}"
    ):
        predict_folder(other, images, out, batch_size=BATCH)
    assert names(out) == [JOURNAL_FILE]


def slice_paths(images):
    return sorted(images.glob("*.dcm"))


@pytest.mark.parametrize("what", ["added", "removed", "shorter", "replaced", "replaced, same time"])
def test_other_files_are_refused(what, run, phantom_folder, images, out, tmp_path):
    copy = shutil.copytree(images, tmp_path / "images")
    slices = index_folder(copy).slices
    chosen = Path(slices["container"].iloc[0])
    uid = slices["series_uid"].iloc[0]
    if what == "added":
        more = index_folder(phantom_folder / "images").slices
        uid = more["series_uid"].iloc[-1]
        shutil.copy(more["container"].iloc[-1], copy)
        message = f"belongs to: series {uid} is new"
    elif what == "removed":
        for path in slices.loc[slices["series_uid"] == uid, "container"]:
            Path(path).unlink()
        message = f"belongs to: series {uid} is gone"
    elif what == "shorter":
        chosen.unlink()
        message = f"belongs to: series {uid} changed"
    else:  # the header and the size remain
        content = bytearray(chosen.read_bytes())
        content[-4400:-4000] = b"\x10\x04" * 200
        before = chosen.stat()
        chosen.write_bytes(content)
        if what == "replaced, same time":
            os.utime(chosen, ns=(before.st_atime_ns, before.st_mtime_ns))
        message = f"the files of series {uid} were replaced since"
    before = tables(out)
    with pytest.raises(StaleError, match=message):
        predict_folder(run, copy, out, batch_size=BATCH)
    assert tables(out) == before


def test_a_file_that_is_no_slice_may_appear(run, images, whole, out, tmp_path):
    copy = shutil.copytree(images, tmp_path / "images")
    (copy / ".DS_Store").write_bytes(b"a file browser looked in")
    predict_folder(run, copy, out, batch_size=BATCH)
    now = tables(out)
    assert b".DS_Store" in now.pop("rejects.csv")
    assert now == {name: content for name, content in whole.items() if name != "rejects.csv"}


def test_a_moved_or_copied_folder_goes_on(run, images, whole, half, tmp_path, monkeypatch):
    first = shutil.copytree(half, tmp_path / "out1")
    second = shutil.copytree(half, tmp_path / "out2")
    moved = shutil.copytree(images, tmp_path / "moved")  # with the times
    read = count_readings(monkeypatch)
    predict_folder(run, moved, first, batch_size=BATCH)
    slices = index_folder(moved).slices
    num_finished = slices["series_uid"].isin(slices["series_uid"].unique()[:3]).sum()
    assert len(read) == len(slices) - num_finished
    read.clear()
    copied = shutil.copytree(images, tmp_path / "copied", copy_function=shutil.copyfile)
    predict_folder(run, copied, second, batch_size=BATCH)
    assert len(read) == len(slices)  # to see that they are the same
    assert tables(first) == tables(second) == whole


def test_what_the_machine_could_not_read_is_tried_again(run, images, tmp_path, monkeypatch):
    lost = str(slice_paths(images)[0])
    read_indexed = prediction_reading.read_indexed

    def read(indexed, size, **asked):
        if indexed.container == lost:
            raise RejectedFile("NO_DECODER", "a kind of JPEG")
        return read_indexed(indexed, size, **asked)

    monkeypatch.setattr(prediction_reading, "read_indexed", read)
    out = interrupted(run, images, tmp_path / "out", NUM_SERIES)
    monkeypatch.undo()
    told = []
    result = predict_folder(run, images, out, batch_size=BATCH, tell=told.append)
    assert told == [f"Resuming after {NUM_SERIES - 1} of {NUM_SERIES} series."]
    assert "NO_DECODER" not in set(result.rejects["code"])


def test_two_at_once_the_second_is_refused(run, images, whole, out):
    words = ["predict", "--run", run, "--dicom", images, "--out", out, "--batch-size", BATCH]
    words = [str(word) for word in [*words, "--workers", 0]]
    with lock(out / LOCK_FILE):
        refused = CliRunner().invoke(main, words)
        assert refused.exit_code == 6
        assert f"{out / LOCK_FILE} is locked by another process" in refused.output
        # The first one is about to finish.
        (out / "predictions.csv").write_text("half")
        (out / JOURNAL_FILE).rename(out / "kept")
        assert CliRunner().invoke(main, words).exit_code == 6
    (out / "kept").rename(out / JOURNAL_FILE)
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert f"Resuming after 3 of {NUM_SERIES} series." in done.output
    assert tables(out) == whole
    again = CliRunner().invoke(main, words)
    assert (again.exit_code, "already exists; nothing is overwritten" in again.output) == (2, True)


@pytest.mark.parametrize("kept", [["series.csv"], ["mine.txt"], ["rejects.csv"], [LOCK_FILE, "a"]])
def test_what_is_no_prediction_is_never_touched(kept, run, images, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in kept:
        (out / name).write_text("mine")
    with pytest.raises(UsageError, match="already exists; nothing is overwr|lock is in the way"):
        predict_folder(run, images, out)
    assert names(out) == sorted(kept)
    assert {(out / name).read_text() for name in kept} == {"mine"}


def test_leftovers_of_killed_processes_are_cleared(run, images, whole, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in (LOCK_FILE, f".partial-7-{JOURNAL_FILE}", ".partial-7-rejects.csv"):
        (out / name).write_text("")
    predict_folder(run, images, out, batch_size=BATCH)
    assert tables(out) == whole


def test_a_refused_prediction_goes_on_with_a_higher_limit(run, images, tmp_path, monkeypatch):
    copy, out = shutil.copytree(images, tmp_path / "images"), tmp_path / "out"
    # Broken slices, which only their pixels show.
    for path in slice_paths(copy)[::3]:
        blank_tail(path)
    with pytest.raises(TooManyRejects) as caught:
        predict_folder(run, copy, out, batch_size=BATCH)
    assert str(out / "rejects.csv") in caught.value.hint
    assert "remove it" not in caught.value.hint
    assert names(out) == [JOURNAL_FILE, "rejects.csv"]
    rejects = pd.read_csv(out / "rejects.csv")
    assert set(rejects["path"]) <= set(names(copy))
    read = count_readings(monkeypatch)
    predict_folder(run, copy, out, batch_size=BATCH, max_rejects=0.9)
    assert read == []
    assert names(out) == TABLES
    assert (out / "rejects.csv").read_text() == rejects.to_csv(index=False)


def test_after_a_folder_without_slices_the_same_output_will_do(run, images, whole, tmp_path):
    copy, out = tmp_path / "images", tmp_path / "out"
    copy.mkdir()
    (copy / "a.dcm").write_text("no slice")
    with pytest.raises(NothingUsable):
        predict_folder(run, copy, out, batch_size=BATCH)
    assert names(out) == ["rejects.csv"]
    assert pd.read_csv(out / "rejects.csv")["path"].tolist() == ["a.dcm"]
    for path in slice_paths(images)[:3]:
        blank_tail(Path(shutil.copy(path, copy)))
    with pytest.raises(NothingUsable, match="could be predicted"):
        predict_folder(run, copy, out, batch_size=BATCH, max_rejects=1)
    assert names(out) == ["rejects.csv"]  # nothing was predicted: nothing is kept
    predict_folder(run, images, out, batch_size=BATCH)
    assert tables(out) == whole


def test_an_interrupted_prediction_inside_the_dicom_folder_goes_on(run, images, tmp_path):
    copy = shutil.copytree(images, tmp_path / "images")
    predict_folder(run, copy, tmp_path / "whole", batch_size=BATCH)
    # Of an earlier version, which began there.
    out = shutil.copytree(interrupted(run, copy, tmp_path / "out", 2), copy / "out")
    predict_folder(run, copy, out, batch_size=BATCH)
    assert tables(out) == tables(tmp_path / "whole")


@pytest.mark.parametrize("place", ["", "out", "out/deep", "../link/out", "../linked"])
def test_results_among_the_images_are_refused(run, images, tmp_path, place):
    copy = shutil.copytree(images, tmp_path / "images")
    (tmp_path / "link").symlink_to(copy)
    (tmp_path / "linked").symlink_to(copy / "out")
    before = names(copy)
    with pytest.raises(UsageError, match="inside the folder of the images") as caught:
        predict_folder(run, copy, f"{copy}/{place}", batch_size=BATCH)
    assert "later runs would read the results as input" in caught.value.hint
    with pytest.raises(UsageError, match="inside the folder of the images"):
        predict_folder(run, tmp_path / "link", copy / "out", batch_size=BATCH)
    assert names(copy) == before


def test_results_may_lie_beside_one_file(run, images, tmp_path):
    path = Path(shutil.copy(slice_paths(images)[0], tmp_path / "a.dcm"))
    predict_folder(run, path, tmp_path / "out", batch_size=BATCH)
    assert len(pd.read_csv(tmp_path / "out" / "predictions.csv")) == 1


def test_without_an_output_nothing_is_written(run, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = names(images)
    predict_folder(run, images)
    assert (names(tmp_path), names(images)) == ([], before)


def test_the_journal_names_no_patient(half, images):
    content = (half / JOURNAL_FILE).read_bytes()
    patients = index_folder(images).slices["patient_id"].unique()
    assert len(patients) and not any(patient.encode() in content for patient in patients)


def test_a_record_is_on_disk_before_the_next_group_is_predicted(run, images, tmp_path, monkeypatch):
    events, fsync = [], os.fsync

    def predicted(*arguments, **others):
        events.append("predicted")
        return probabilities(*arguments, **others)

    probabilities = prediction.probabilities
    monkeypatch.setattr(prediction, "probabilities", predicted)
    monkeypatch.setattr(
        prediction_journal.os, "fsync", lambda handle: events.append("on disk") or fsync(handle)
    )
    recipe, model = load_run(run)
    index = index_folder(images)
    journal = PredictionJournal(tmp_path / "journal", {}, {})
    events.clear()
    predict_index(model, index, recipe, batch_size=BATCH, journal=journal)
    assert events == ["predicted", "on disk"] * NUM_SERIES
