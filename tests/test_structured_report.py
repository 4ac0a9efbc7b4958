"""Structured reports: what they say, whom they refer to, and studies that get none."""

import shutil
import sys
import warnings

import numpy as np
import pandas as pd
import pydicom
import pytest
from click.testing import CliRunner
from highdicom import sr
from nifti_files import head_volume, image_of, write_nifti
from pydicom.uid import generate_uid
from untrained_runs import copy_series, untrained_run, validated

import ich_keras
from ich_keras.cli import main
from ich_keras.ct.series import index_folder
from ich_keras.errors import EnvironmentProblem, UsageError
from ich_keras.labels import SIX, LabelSet
from ich_keras.models.spec import ModelSpec
from ich_keras.prediction import predict_folder
from ich_keras.structured_report import label_code, write_structured_reports

TWO = LabelSet(("bleed", "any"), "any")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on slices with two labels, and a validation that lets it decide."""
    folder = tmp_path_factory.mktemp("sr") / "run"
    untrained_run(folder, "tiny", ModelSpec((16, 16, 3), depth=10, width=8), size=16, labels=TWO)
    random, patients = np.random.default_rng(0), np.repeat(np.arange(40), 3)
    truth = np.repeat((patients % 2)[:, np.newaxis], 2, axis=1)
    values = np.clip(0.5 + 0.1 * random.normal(size=truth.shape) + 0.1 * truth, 0.01, 0.99)
    validated(folder, truth, values, [f"1.2.{patient}" for patient in patients], patients)
    return folder


@pytest.fixture(scope="module")
def as_rsna(phantom_folder, tmp_path_factory):
    return copy_series(phantom_folder / "images", 2, tmp_path_factory.mktemp("sr") / "images")


@pytest.fixture(scope="module")
def images(as_rsna, tmp_path_factory):
    """Two series with UIDs as a scanner gives them; RSNA's are none."""
    folder = tmp_path_factory.mktemp("sr")
    for path in as_rsna.iterdir():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what RSNA has is no UID
            data_set = pydicom.dcmread(path)
            for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
                uid = generate_uid(entropy_srcs=[str(data_set[keyword].value)])
                setattr(data_set, keyword, uid)
        data_set.file_meta.MediaStorageSOPInstanceUID = data_set.SOPInstanceUID
        data_set.save_as(folder / path.name)
    return folder


@pytest.fixture(scope="module")
def prediction(run, images):
    return predict_folder(run, images)


def groups_of(path):
    return sr.srread(path).content.get_image_measurement_groups()


def test_a_report_says_what_the_tables_say(prediction, images, tmp_path):
    made = write_structured_reports(tmp_path, prediction, index_folder(images).usable(), "run 1")
    assert [path.relative_to(tmp_path).as_posix() for path in made.paths] == [
        "sr/1.dcm",
        "sr/2.dcm",
    ]
    assert made.left_out == ()
    headers = {}
    for path in images.iterdir():
        data_set = pydicom.dcmread(path, stop_before_pixels=True)
        headers[data_set.SOPInstanceUID] = data_set
    words = {"yes": "Present", "no": "Absent"}
    for number, path in enumerate(made.paths):
        row = prediction.series.iloc[number]
        study = prediction.studies.iloc[number]
        report = pydicom.dcmread(path)
        own = [one for one in headers.values() if one.SeriesInstanceUID == row.series_instance_uid]
        assert report.Modality == "SR"
        assert report.StudyInstanceUID == study.study_instance_uid == own[0].StudyInstanceUID
        assert report.PatientID == own[0].PatientID
        assert report.VerificationFlag == "UNVERIFIED"
        (evidence,) = report.CurrentRequestedProcedureEvidenceSequence
        (series,) = evidence.ReferencedSeriesSequence
        assert {one.ReferencedSOPInstanceUID for one in series.ReferencedSOPSequence} == {
            one.SOPInstanceUID for one in own
        }
        groups = groups_of(path)
        assert [group.finding_type.meaning for group in groups] == ["Bleed", "Any"]
        for name, group in zip(TWO.names, groups, strict=True):
            (measured,) = group.get_measurements()
            assert measured.name.meaning == "Probability"
            assert measured.value == row[name]
            said = {
                one.name.meaning: one.value.meaning for one in group.get_qualitative_evaluations()
            }
            assert said["Decision at the operating point"] == words[row[f"decision_{name}"]]
            assert said["Conformal group"] == f"{row[f'group_{name}']}: conformal group"
            first = prediction.look_first
            first = first[
                (first["series_instance_uid"] == row.series_instance_uid) & (first["label"] == name)
            ]
            referred = [
                one.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for one in group.source_images
            ]
            expected = first.sort_values("rank")["sop_instance_uid"].tolist()
            assert referred == (expected or sorted(referred, key=referred.index))
            assert set(referred) <= {one.SOPInstanceUID for one in own}


def test_codes_are_those_of_dicom_where_it_has_them():
    code = label_code("any", SIX)
    assert (code.value, code.scheme_designator) == ("1386000", "SCT")
    own = [label_code(name, SIX) for name in SIX.names if name != "any"]
    assert {code.scheme_designator for code in own} == {"99ICHKERAS"}
    assert len({code.value for code in own}) == 5
    assert own[0].meaning == "Epidural hemorrhage"
    assert label_code("any", TWO).scheme_designator == "99ICHKERAS", "their any may be anything"
    # PS3.5: SH and LO.
    for code in [*own, label_code("x" * 64, LabelSet(("x" * 64,)))]:
        assert len(code.value) <= 16
        assert len(code.meaning) <= 64


def test_headers_without_a_patient_make_a_report(run, images, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in images.iterdir():
        data_set = pydicom.dcmread(path)
        for keyword in ("PatientID", "PatientName", "StudyDate", "StudyID", "AccessionNumber"):
            if keyword in data_set:
                delattr(data_set, keyword)
        data_set.save_as(bare / path.name)
    prediction = predict_folder(run, bare)
    made = write_structured_reports(tmp_path, prediction, index_folder(bare).usable(), "run 1")
    assert len(made.paths) == 2
    assert pydicom.dcmread(made.paths[0]).PatientID in ("", None)


def test_a_study_that_cannot_be_reported_is_told_and_the_others_are_written(
    prediction, images, tmp_path
):
    copied = tmp_path / "images"
    shutil.copytree(images, copied)
    index = index_folder(copied).usable()
    gone = index.slices["container"].iloc[0]
    with open(gone, "wb") as stream:
        stream.write(b"nothing")
    made = write_structured_reports(tmp_path, prediction, index, "run 1")
    assert [path.name for path in made.paths] == ["2.dcm"]
    ((number, why),) = made.left_out
    assert number == 1
    # Not in the words of pydicom, which may quote a value of the header.
    assert why.endswith(".dcm cannot be read again (InvalidDicomError).")
    assert made.sentences()[0] == "Structured reports: 1."


def test_identifiers_that_are_no_uids_are_told(run, as_rsna, tmp_path):
    prediction = predict_folder(run, as_rsna)
    index = index_folder(as_rsna).usable()
    made = write_structured_reports(tmp_path, prediction, index, "run 1")
    assert made.paths == ()
    assert [number for number, _ in made.left_out] == [1, 2]
    assert made.sentences() == [
        "No structured report of study 1, and 1 more: its StudyInstanceUID is no DICOM UID to refer"
        " to, as in RSNA's files."
    ]


def test_volumes_that_are_not_dicom_have_no_report(run, tmp_path):
    folder = tmp_path / "volumes"
    write_nifti(folder / "head.nii.gz", image_of(head_volume()))
    prediction = predict_folder(run, folder)
    made = write_structured_reports(tmp_path, prediction, index_folder(folder).usable(), "run 1")
    assert made.paths == ()
    assert made.sentences() == [
        "No structured report of study 1: a NIfTI volume has no DICOM images to refer to."
    ]


def test_without_highdicom_it_is_told_before_the_work(monkeypatch):
    from ich_keras.structured_report import require_highdicom

    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'ich_keras\[dicom-out\]'"):
        require_highdicom()


def test_the_command_writes_them_beside_the_tables(run, images, tmp_path):
    words = ["predict", "--run", run, "--dicom", images, "--out", tmp_path / "out", "--sr"]
    done = CliRunner().invoke(main, [*map(str, words), "--workers", "0", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "Structured reports: 2." in done.output
    assert "Structured reports: 2." in (tmp_path / "out/notice.txt").read_text()
    table = pd.read_csv(tmp_path / "out/studies.csv")
    found = [pydicom.dcmread(tmp_path / f"out/sr/{number}.dcm") for number in (1, 2)]
    assert [one.StudyInstanceUID for one in found] == table["study_instance_uid"].tolist()


def test_without_a_folder_there_is_nothing_to_write_to(run, images):
    with pytest.raises(UsageError, match="sr needs a folder to write to"):
        predict_folder(run, images, structured_reports=True)
    with pytest.raises(UsageError, match="heat_maps is about report and sr, of which none"):
        predict_folder(run, images, heat_maps="hirescam")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_images_in_archives_are_referred_to_like_others(run, images, tmp_path, kind):
    packed = shutil.make_archive(str(tmp_path / "all"), kind, images)
    prediction = predict_folder(run, packed)
    made = write_structured_reports(tmp_path, prediction, index_folder(packed).usable(), "run 1")
    assert made.left_out == ()
    assert len(made.paths) == 2
    read = (pydicom.dcmread(path, stop_before_pixels=True) for path in images.iterdir())
    uids = {data_set.SOPInstanceUID for data_set in read}
    referred = {
        one.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
        for path in made.paths
        for group in groups_of(path)
        for one in group.source_images
    }
    assert referred and referred <= uids


def test_heat_maps_are_secondary_captures_of_the_slices_to_look_at_first(run, images, tmp_path):
    words = ["predict", "--run", run, "--dicom", images, "--out", tmp_path / "out", "--sr"]
    words += ["--heat-maps", "--workers", "0", "--device", "cpu"]
    done = CliRunner().invoke(main, list(map(str, words)))
    assert done.exit_code == 0, done.output
    folder = tmp_path / "out"
    first = pd.read_csv(folder / "look_first.csv")
    first = first[first["rank"] <= 3]
    assert f"Structured reports: 2, with {len(first)} heat maps of slices." in done.output
    found = [pydicom.dcmread(path) for path in sorted((folder / "sr").glob("*-heat-*.dcm"))]
    assert len(found) == len(first)
    headers = {one.SOPInstanceUID: one for one in map(pydicom.dcmread, images.iterdir())}
    colours = []
    for image in found:
        (of,) = image.SourceImageSequence
        source = headers[of.ReferencedSOPInstanceUID]
        assert image.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7"
        assert (image.PatientID, image.StudyInstanceUID) == (
            source.PatientID,
            source.StudyInstanceUID,
        )
        assert list(image.PatientOrientation) == ["L", "P"]
        pixels = image.pixel_array.astype(int)
        grey = pixels.max(axis=-1) == pixels.min(axis=-1)
        # Where nothing lies over it, it is the slice in the brain window.
        hu = ich_keras.read_hu(next(p for p in images.iterdir() if same(p, source)))
        expected = np.floor(255 * np.clip(hu / 80, 0, 1) + 0.5)
        assert (pixels[grey, 0] == expected[grey]).all()
        colours.append((~grey).mean())
    assert max(colours) > 0.05, "a heat map is seen"


def same(path, source):
    data_set = pydicom.dcmread(path, stop_before_pixels=True)
    return data_set.SOPInstanceUID == source.SOPInstanceUID
