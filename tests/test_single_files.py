"""One file where a folder is expected: a slice, a study in an archive, or the reason it is none."""

import os
import shutil
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from untrained_runs import untrained_run

from ich_keras.cli import main
from ich_keras.ct.rejects import NothingUsable
from ich_keras.ct.series import index_folder
from ich_keras.labels import LABELS
from ich_keras.models.spec import ModelSpec


def ich(*args):
    return CliRunner().invoke(main, list(map(str, args)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    spec = ModelSpec((48, 48, 3), depth=10, width=8)
    return untrained_run(tmp_path_factory.mktemp("slices") / "run", "narrow", spec)


@pytest.fixture(scope="module")
def study(phantom_folder, tmp_path_factory) -> Path:
    """A folder with one series."""
    folder = tmp_path_factory.mktemp("one") / "study"
    folder.mkdir()
    slices = index_folder(phantom_folder / "images").slices
    for path in slices.loc[slices["series_uid"] == slices["series_uid"][0], "container"]:
        shutil.copy(path, folder)
    return folder


def predict(run, dicom, out) -> pd.DataFrame:
    done = ich("predict", "--run", run, "--dicom", dicom, "--out", out, "--workers", 0)
    assert done.exit_code == 0, done.output
    return pd.read_csv(out / "predictions.csv").set_index("sop_instance_uid")


def test_one_file_is_predicted_as_in_its_folder(run, study, tmp_path):
    path = sorted(study.iterdir())[3]
    alone = predict(run, path, tmp_path / "alone")
    (tmp_path / "folder").mkdir()
    shutil.copy(path, tmp_path / "folder")
    beside = predict(run, tmp_path / "folder", tmp_path / "beside")
    assert alone.equals(beside)
    assert alone["path"].tolist() == [path.name]
    series = pd.read_csv(tmp_path / "alone" / "series.csv")
    assert series["num_slices"].tolist() == [1] and "too few" in series["verdict"].item()


def test_a_zip_of_a_study_is_predicted_as_its_folder(run, study, tmp_path):
    archive = tmp_path / "study.bin"  # its first bytes tell
    with zipfile.ZipFile(archive, "w") as stream:
        for path in study.iterdir():
            stream.write(path, path.name)
    zipped, plain = predict(run, archive, tmp_path / "zip"), predict(run, study, tmp_path / "out")
    columns = [*LABELS, "slice_index", "position_mm"]
    assert zipped[columns].equals(plain[columns]) and len(plain) > 8
    assert set(zipped["path"]) == {f"study.bin!/{name}" for name in plain["path"]}


def test_a_file_that_a_person_names_is_read_whatever_its_name(study, tmp_path):
    for name in (".hidden", "scan.txt", "no suffix", "packed.zip"):
        shutil.copy(sorted(study.iterdir())[0], tmp_path / name)
        index = index_folder(tmp_path / name)
        assert index.slices["container"].tolist() == [str(tmp_path / name)]
        assert index.rejects.empty


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"ID,Label\n", "NOT_DICOM 1"), (b"", "the file is empty"), (bytes(140), "no 'DICM'")],
)
@pytest.mark.parametrize("command", ["index", "predict"])
def test_a_file_that_is_none_is_refused_with_the_reason(run, tmp_path, command, content, told):
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    given = ["--run", run] if command == "predict" else []
    done = ich(command, *given, "--dicom", path, "--out", tmp_path / "out", "--workers", 0)
    assert done.exit_code == 3
    assert told in " ".join(done.output.split())
    rejects = pd.read_csv(tmp_path / "out" / "rejects.csv")
    assert rejects["code"].tolist() == ["NOT_DICOM"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.dcm")
    with pytest.raises(NothingUsable, match="UNREADABLE 1.*a device or pipe"):
        index_folder(tmp_path / "pipe.dcm")


def test_a_file_that_is_not_there(run, tmp_path):
    done = ich("predict", "--run", run, "--dicom", tmp_path / "no.dcm", "--out", tmp_path / "out")
    assert done.exit_code == 2
    text = " ".join(done.output.split())
    assert "does not exist" in text and "a DICOM file or a NIfTI volume" in text
