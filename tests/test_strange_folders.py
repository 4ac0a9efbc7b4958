"""Folders that are unusual and yet good, or bad in one place, from the files to the predictions."""

import csv
import io
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from click.testing import CliRunner
from narrow import preset_of
from pydicom.valuerep import DSfloat
from tiny_dicom import tiny_file, tiny_head

from ich_keras.cli import main
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.data.cache.cache import build_cache
from ich_keras.inference import load_run
from ich_keras.labels import LABELS
from ich_keras.models.spec import ModelSpec
from ich_keras.prediction import predict_folder, predict_index
from ich_keras.training import train

# RSNA's identifiers, which its labels need, are none by pydicom.
pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR UI")

NARROW = "narrow-strange"
SIZE = 32
ONE = ("--workers", 0)


@pytest.fixture(scope="module")
def run(phantom_cache, tmp_path_factory):
    with preset_of(NARROW, ModelSpec((SIZE, SIZE, 3), depth=10, width=8)):
        config = RunConfig(
            preset=NARROW,
            precision="float32",
            data=DataConfig(size=SIZE, balance=True),
            fit=FitConfig(batch_size=32, epochs=1, learning_rate=1e-3),
        )
        yield train(config, phantom_cache, tmp_path_factory.mktemp("run") / "run")


def ich(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, " ".join(done.output.split())


def write_series(folder: Path, count: int = 4, **tags) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        content = tiny_file(
            tiny_head(number),
            SOPInstanceUID=f"ID_{number:09x}",
            ImagePositionPatient=[-125, -125, 5 * number],
            **tags,
        )
        (folder / f"{number}.dcm").write_bytes(content)
    return folder


def write_labels(path: Path, count: int = 4) -> Path:
    rows = [f"ID_{n:09x}_{label},{n % 2}" for n in range(count) for label in LABELS]
    path.write_text("\n".join(["ID,Label", *rows]) + "\n")
    return path


@pytest.mark.parametrize("form", ["zip", "tar"])
def test_an_archive_is_predicted_as_its_folder_is(run, tmp_path, form):
    folder = write_series(tmp_path / "images")
    (folder / "b.txt").write_text("no DICOM")
    (folder / "torn.dcm").write_bytes((folder / "0.dcm").read_bytes()[:-100])
    archive = shutil.make_archive(str(tmp_path / "all"), form, folder)
    expected = predict_folder(run, folder)
    found = predict_folder(run, archive, tmp_path / "out")
    pd.testing.assert_frame_equal(found.series, expected.series)
    inside = f"all.{form}!/"
    for one, other in ((found.slices, expected.slices), (found.rejects, expected.rejects)):
        assert one["path"].tolist() == [inside + path for path in other["path"]]
        pd.testing.assert_frame_equal(one.drop(columns="path"), other.drop(columns="path"))
    assert len(found.rejects) == 2
    assert inside in (tmp_path / "out" / "predictions.csv").read_text()


# --- Who and what ---------------------------------------------------------------------------


@pytest.mark.parametrize("patient", [None, "", " "])
def test_a_series_of_nobody_is_predicted_and_not_trained_on(run, tmp_path, patient):
    folder = write_series(tmp_path / "images", PatientID=patient)
    labels = write_labels(tmp_path / "labels.csv")
    out = tmp_path / "out"
    code, said = ich("predict", "--run", run, "--dicom", folder, "--out", out, *ONE)
    assert code == 0, said
    assert len(pd.read_csv(out / "predictions.csv")) == 4
    series = pd.read_csv(out / "series.csv")
    assert series[["verdict", "num_rejected"]].values.tolist() == [["ok", 0]]
    assert len(pd.read_csv(out / "rejects.csv")) == 0
    new = ["--out", tmp_path / "new", "--cache", tmp_path / "cache", *ONE]
    code, said = ich("train", "--dicom", folder, "--labels", labels, *new)
    assert code == 3, said
    assert "PatientID" in said
    assert not (tmp_path / "new").exists()


def test_any_part_of_the_body_by_the_commands(run, tmp_path):
    folder = write_series(tmp_path / "images", BodyPartExamined="ABDOMEN")
    labels = write_labels(tmp_path / "labels.csv")
    index = ["index", "--dicom", folder, *ONE, "--out"]
    for path, more, verdict in (("a", [], "not a head"), ("b", ["--any-body-part"], "ok")):
        code, said = ich(*index, tmp_path / path, *more)
        assert code == 0, said
        assert f"1 series: {verdict}" in said
        assert SeriesIndex.load(tmp_path / path).series["verdict"].tolist() == [verdict]
    plan = ["--labels", labels, "--plan", "--split", "none", "--preset", NARROW, "--size", SIZE]
    for command in (["predict", "--run", run], ["train", *plan]):
        arguments = [*command, "--dicom", folder, *ONE, "--out", tmp_path / command[0]]
        code, said = ich(*arguments)
        assert code == 3, said
        if command[0] == "predict":
            assert "BodyPartExamined is 'ABDOMEN'" in said and "--any-body-part" in said
        shutil.rmtree(tmp_path / command[0], ignore_errors=True)
        code, said = ich(*arguments, "--any-body-part")
        assert code == 0, said
    assert len(pd.read_csv(tmp_path / "predict" / "predictions.csv")) == 4


def test_a_neck_that_does_not_say_so_passes_for_a_head(tmp_path):
    """By its size it is like one: only BodyPartExamined tells them apart."""
    folder = write_series(tmp_path / "neck", PixelSpacing=[2.5, 2.5])  # 128 mm wide
    assert index_folder(folder).series["verdict"].tolist() == ["ok"]
    folder = write_series(tmp_path / "named", PixelSpacing=[2.5, 2.5], BodyPartExamined="NECK")
    assert index_folder(folder).series["verdict"].tolist() == ["not a head"]


def test_the_share_of_rejects_by_the_command(run, tmp_path):
    folder = write_series(tmp_path / "images")
    path = folder / "3.dcm"
    path.write_bytes(path.read_bytes()[:-100])
    predict = ["predict", "--run", run, "--dicom", folder, *ONE]
    code, said = ich(*predict, "--out", tmp_path / "one")
    assert code == 3 and "1 of 4 files" in said, said
    assert not (tmp_path / "one" / "predictions.csv").exists()
    code, said = ich(*predict, "--out", tmp_path / "two", "--max-rejects", 0.25)
    assert code == 0, said
    assert len(pd.read_csv(tmp_path / "two" / "predictions.csv")) == 3


# --- Names ----------------------------------------------------------------------------------


def test_identifiers_that_are_paths_lead_nowhere(run, tmp_path):
    """StudyInstanceUID and SeriesInstanceUID ../../xyz, through index, cache and predict."""
    home = tmp_path / "a" / "b" / "home"
    home.mkdir(parents=True)
    folder = write_series(home / "images")
    for path in folder.iterdir():
        content = path.read_bytes().replace(b"1.2.3\0", b"../../")
        path.write_bytes(content.replace(b"1.2.3.4\0", b"../../x\0"))
    header = pydicom.dcmread(folder / "0.dcm")
    assert (header.StudyInstanceUID, header.SeriesInstanceUID) == ("../../", "../../x")
    for arguments in (
        ["index", "--dicom", folder, "--out", home / "index", *ONE],
        ["cache", "--index", home / "index", "--out", home / "cache", "--size", 32, *ONE],
        ["predict", "--run", run, "--dicom", folder, "--out", home / "out", *ONE],
    ):
        code, said = ich(*arguments)
        assert code == 0, said
    assert pd.read_csv(home / "out" / "series.csv")["series_instance_uid"].tolist() == ["../../x"]
    places = ("images", "index", "cache", "out")
    inside = {place for name in places for place in [home / name, *(home / name).rglob("*")]}
    assert set(tmp_path.rglob("*")) == {home.parent.parent, home.parent, home} | inside


def test_file_names_that_a_spreadsheet_would_run(run, tmp_path):
    folder = write_series(tmp_path / "images")
    (folder / "0.dcm").rename(folder / "=cmd|x!A0.dcm")
    (folder / "1.dcm").rename(folder / "@SUM(1).dcm")
    torn = folder / "2.dcm"
    torn.write_bytes(torn.read_bytes()[:-100])
    torn.rename(folder / "+2.dcm")
    predict_folder(run, folder, tmp_path / "out", max_rejects=0.5)
    with open(tmp_path / "out" / "predictions.csv", newline="") as stream:
        paths = {row["path"] for row in csv.DictReader(stream)}
    assert paths == {"'=cmd|x!A0.dcm", "'@SUM(1).dcm", "3.dcm"}
    for path in (tmp_path / "out").glob("*.csv"):
        with open(path, newline="") as stream:
            cells = [cell for row in csv.reader(stream) for cell in row]
        assert not [cell for cell in cells if cell[:1] in ("=", "@", "\t")], path


# --- Short and long -------------------------------------------------------------------------


def test_a_single_slice_is_predicted_with_its_verdict(run, tmp_path):
    result = predict_folder(run, write_series(tmp_path / "images", count=1))
    assert len(result.slices) == 1
    assert result.series[["num_slices", "verdict"]].values.tolist() == [[1, "too few"]]


def test_a_series_of_2000_slices_takes_little_memory(run, tmp_path):
    """The float32 input of all slices would be 25 MB."""
    count, folder = 2000, tmp_path / "images"
    folder.mkdir()
    tags = {"SOPInstanceUID": "1.2.9999", "ImagePositionPatient": [0, 0, 1234.5]}
    content = tiny_file(tiny_head(side=16), **tags)
    for number in range(count):
        changed = content.replace(b"1.2.9999", b"1.2.%04d" % number)
        changed = changed.replace(b"1234.5", b"%06.1f" % (number * 0.5))
        (folder / f"{number}.dcm").write_bytes(changed)
    index = index_folder(folder)
    recipe, model = load_run(run)
    tracemalloc.start()
    result = predict_index(model, index, recipe)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(result.slices) == count
    assert result.series["num_slices"].tolist() == [count]
    series = count * recipe.inputs.cache_size**2 * 2  # bytes, int16
    assert peak < 2 * series + 10_000_000
    values = result.slices[list(LABELS)].to_numpy()
    np.testing.assert_allclose(values, np.broadcast_to(values[:1], values.shape), atol=1e-6)


# --- Turned ---------------------------------------------------------------------------------


def turned(path: Path, way: int) -> bytes:
    """The same slice stored another way: prone, mirrored, or with rows for columns."""
    dataset = pydicom.dcmread(path)
    stored = dataset.pixel_array
    row, column = np.split(np.array(dataset.ImageOrientationPatient, float), 2)
    position = np.array(dataset.ImagePositionPatient, float)
    down, right = map(float, dataset.PixelSpacing)
    if way in (0, 1):  # columns run the other way
        position = position + row * right * (stored.shape[1] - 1)
        row, stored = -row, stored[:, ::-1]
    if way in (0, 2):  # rows, too
        position = position + column * down * (stored.shape[0] - 1)
        column, stored = -column, stored[::-1]
    if way in (2, 3):
        row, column, down, right, stored = column, row, right, down, stored.T
    dataset.ImageOrientationPatient = [DSfloat(v, auto_format=True) for v in (*row, *column)]
    dataset.ImagePositionPatient = [DSfloat(v, auto_format=True) for v in position]
    dataset.PixelSpacing = [down, right]
    dataset.Rows, dataset.Columns = stored.shape
    dataset.PixelData = np.ascontiguousarray(stored).tobytes()
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def test_a_turned_copy_of_a_data_set_is_predicted_equally(run, phantom_folder, tmp_path):
    index = index_folder(phantom_folder / "images")
    ways = {uid: number % 4 for number, uid in enumerate(index.series["series_uid"])}
    for uid, container in index.slices[["series_uid", "container"]].to_numpy():
        path = Path(container)
        (tmp_path / path.name).write_bytes(turned(path, ways[uid]))
    result = predict_folder(run, tmp_path)
    expected = predict_folder(run, phantom_folder / "images")
    assert len(result.slices) == len(expected.slices) == len(index.slices)
    for name, key in (("slices", "sop_instance_uid"), ("series", "series_instance_uid")):
        one, other = (getattr(part, name).set_index(key) for part in (result, expected))
        other = other.loc[one.index]
        pd.testing.assert_frame_equal(one[list(LABELS)], other[list(LABELS)], atol=1e-6)
    pd.testing.assert_series_equal(one["verdict"], other["verdict"])
    turns = index_folder(tmp_path).slices["turn"]
    assert turns.nunique() == 4 and "" not in set(turns)


def test_images_of_any_type_are_used_on_request(run, tmp_path):
    """A clinic has reformatted slices only: named as the way out, and taken the same road."""
    folder = tmp_path / "dicom"
    folder.mkdir()
    reformatted = ["DERIVED", "SECONDARY", "AXIAL", "CSA MPR"]
    for number in range(4):
        content = tiny_file(
            tiny_head(number),
            SOPInstanceUID=f"1.2.{number}",
            ImageType=reformatted if number != 1 else ["ORIGINAL", "PRIMARY", "AXIAL"],
            ImagePositionPatient=[-125, -125, 5 * number],
        )
        (folder / f"{number}.dcm").write_bytes(content)
    journal = tmp_path / "journal"
    strict = index_folder(folder, journal=journal)
    assert strict.rejects["code"].tolist() == ["NOT_ORIGINAL"] * 3
    assert strict.rejects["hint"].str.contains("--any-image-type").all()
    index = index_folder(folder, journal=journal, any_image_type=True)
    assert (len(index.slices), len(index.rejects)) == (4, 0)
    assert len(index_folder(folder, journal=journal).slices) == 1
    assert len(build_cache(index, tmp_path / "cache", size=32)) == 4
    out = tmp_path / "out"
    command = ["predict", "--run", run, "--dicom", folder, "--out", out, "--workers", 0]
    code, said = ich(*command, "--any-image-type")
    assert code == 0, said
    assert len(pd.read_csv(out / "predictions.csv")) == 4
