"""Reading an index: a file that is not the one that was indexed is refused, whatever differs."""

import hashlib
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from tiny_dicom import tiny_file, tiny_values

from ich_keras.ct.rejects import RejectedFile
from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.data import reading
from ich_keras.data.cache.cache import build_cache
from ich_keras.data.inputs import resize_hu
from ich_keras.data.reading import indexed_slices, pixel_hash, read_indexed

SIZE = 8


def write(path: Path, patient: int, place: int, seed: int = 0, **tags) -> None:
    tags = {
        "SOPInstanceUID": f"1.2.3.{patient}.{place}",
        "PatientID": f"secret-{patient}",
        "StudyInstanceUID": f"1.2.{patient}",
        "SeriesInstanceUID": f"1.2.3.{patient}",
        "ImagePositionPatient": [-125, -125, 5 * place],
        **tags,
    }
    path.write_bytes(tiny_file(tiny_values(seed or 100 * patient + place), **tags))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two patients with three slices each, of equal size and names of equal length."""
    folder = tmp_path / "dicom"
    folder.mkdir()
    for patient in (1, 2):
        for place in range(3):
            write(folder / f"p{patient}-{place}.dcm", patient, place)
    return folder


def read_all(index: SeriesIndex) -> list:
    """What reading each slice gives: its pixels, or the reject."""
    found = []
    for one in indexed_slices(index):
        try:
            found.append(read_indexed(one, SIZE))
        except RejectedFile as reject:
            found.append(reject)
    return found


def refused(index: SeriesIndex) -> dict[str, str]:
    """File name -> why it was refused; each must be CHANGED and hide who the patient is."""
    found = {}
    for path, read in zip(index.slices["container"], read_all(index), strict=True):
        if isinstance(read, RejectedFile):
            assert (read.code, read.hint) == ("CHANGED", "Index the folder again.")
            assert "secret" not in str(read)
            found[Path(path).name] = read.detail
    return found


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_a_slice_is_what_reading_and_resizing_gives(folder):
    index = index_folder(folder)
    for indexed, read in zip(indexed_slices(index), read_all(index), strict=True):
        stored = pydicom.dcmread(indexed.container).pixel_array
        expected = resize_hu((stored.astype(np.int32) - 1024).astype(np.int16), SIZE)
        np.testing.assert_array_equal(read.hu, expected)
        assert read.repaired is False
        digest = hashlib.sha256(expected.astype("<i2").tobytes()).hexdigest()
        assert read.pixel_hash == pixel_hash(expected) == digest[:32]


def test_the_hash_knows_values_and_places_but_not_the_layout():
    hu = tiny_values(side=8).astype(np.int16)
    assert pixel_hash(hu) == pixel_hash(np.asfortranarray(hu)) == pixel_hash(hu.astype(">i2"))
    assert pixel_hash(hu) != pixel_hash(hu.T)
    changed = hu.copy()
    changed[3, 4] += 1
    assert pixel_hash(hu) != pixel_hash(changed)


def test_two_exchanged_files_are_both_refused_by_name(folder):
    index = index_folder(folder)
    exchange(folder / "p1-0.dcm", folder / "p2-1.dcm")
    found = refused(index)
    assert set(found) == {"p1-0.dcm", "p2-1.dcm"}
    assert found["p1-0.dcm"] == (
        "(0008,0018) SOPInstanceUID is '1.2.3.2.1'; '1.2.3.1.0' when it was indexed; "
        "(0020,000e) SeriesInstanceUID is '1.2.3.2'; '1.2.3.1' when it was indexed; "
        "(0020,000d) StudyInstanceUID is '1.2.2'; '1.2.1' when it was indexed; "
        "(0010,0020) PatientID has changed since it was indexed; "
        "the position is 5.00 mm; 0.00 mm when it was indexed"
    )


@pytest.mark.parametrize("saved", [False, True])
def test_a_cycle_of_renamed_files_within_a_series_is_refused(folder, tmp_path, saved):
    index = index_folder(folder)
    if saved:
        index.save(tmp_path / "index")
        index = SeriesIndex.load(tmp_path / "index")
    exchange(folder / "p1-0.dcm", folder / "p1-1.dcm")
    exchange(folder / "p1-1.dcm", folder / "p1-2.dcm")
    assert set(refused(index)) == {"p1-0.dcm", "p1-1.dcm", "p1-2.dcm"}


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"SOPInstanceUID": "1.2.3.1.9"}, "SOPInstanceUID is '1.2.3.1.9'; '1.2.3.1.1' when"),
        ({"SeriesInstanceUID": "1.2.3.9"}, "SeriesInstanceUID is '1.2.3.9'; '1.2.3.1' when"),
        ({"StudyInstanceUID": "1.2.9"}, "StudyInstanceUID is '1.2.9'; '1.2.1' when"),
        ({"PatientID": "secret-9"}, "PatientID has changed since it was indexed"),
        ({"PatientID": None}, "PatientID has changed since it was indexed"),
        ({"PixelSpacing": [0.5, 0.6]}, "PixelSpacing is 0.5 x 0.6; 0.5 x 0.5 when"),
        ({"ImagePositionPatient": [-125, -125, 6]}, "the position is 6.00 mm; 5.00 mm when"),
        (
            {"ImageOrientationPatient": [-1, 0, 0, 0, 1, 0]},
            "ImageOrientationPatient now means turning the pixels (columns flipped); when it was"
            " indexed it meant not turning the pixels",
        ),
        (
            {"ImageOrientationPatient": [1, 0, 0, 0, 0.99, 0.141]},
            "ImageOrientationPatient is (1.0, 0.0, 0.0, 0.0, 0.99, 0.141); (1.0, 0.0, 0.0,",
        ),
        ({"RescaleSlope": "1.0000"}, "the file's size is"),
    ],
)
def test_every_fact_that_differs_is_named(folder, tags, message):
    index = index_folder(folder)
    write(folder / "p1-1.dcm", 1, 1, **tags)
    found = refused(index)
    assert set(found) == {"p1-1.dcm"}
    assert message in found["p1-1.dcm"]


def test_a_file_of_another_matrix_is_refused(folder):
    index = index_folder(folder)
    stored = tiny_values(side=20)
    whole = pydicom.dcmread(folder / "p1-1.dcm")
    whole.Rows = whole.Columns = 20
    whole.PixelData = stored.astype("<u2").tobytes()
    whole.save_as(folder / "p1-1.dcm")
    assert "Rows x Columns is 20 x 20; 16 x 16 when it was indexed" in refused(index)["p1-1.dcm"]


def test_copied_moved_and_touched_files_are_read(folder, tmp_path):
    index = index_folder(folder)
    before = [read.pixel_hash for read in read_all(index)]
    for number, path in enumerate(sorted(folder.iterdir())):
        os.utime(path, (number, number))
    assert [read.pixel_hash for read in read_all(index)] == before
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    (tmp_path / "copy").rename(folder)
    assert [read.pixel_hash for read in read_all(index)] == before


def test_tilted_and_turned_series_are_what_they_were(tmp_path):
    """Rounded cosines, a tilt, and cosines that differ within a volume are no change."""
    folder = tmp_path / "dicom"
    folder.mkdir()
    cosines = [1, 0, 0, 0, 0.9659, -0.2588]
    for place in range(4):
        turned = [*cosines[:4], cosines[4] + 1e-4 * place, cosines[5]]
        position = [-125, 1.3 * place, 700 + 4.8 * place]
        write(
            folder / f"{place}.dcm",
            1,
            place,
            ImageOrientationPatient=turned,
            ImagePositionPatient=position,
        )
    index = index_folder(folder)
    assert len(index.series) == 1
    index.save(tmp_path / "index")
    for one in (index, SeriesIndex.load(tmp_path / "index")):
        assert refused(one) == {}


def test_an_index_of_a_cache_refuses_exchanged_files(folder, tmp_path):
    index = index_folder(folder)
    exchange(folder / "p1-0.dcm", folder / "p2-0.dcm")
    cache = build_cache(index, tmp_path / "cache", SIZE)
    assert cache.rejects["code"].tolist() == ["CHANGED", "CHANGED"]
    assert [Path(path).name for path in cache.rejects["path"]] == ["p1-0.dcm", "p2-0.dcm"]
    assert cache.slices["sop_instance_uid"].tolist() == [
        f"1.2.3.{patient}.{place}" for patient in (1, 2) for place in (1, 2)
    ]
    again = index_folder(folder)
    cache = build_cache(again, tmp_path / "again", SIZE)
    assert len(cache.rejects) == 0
    by_uid = dict(zip(cache.slices["sop_instance_uid"], cache.slices_hu(range(6)), strict=True))
    stored = pydicom.dcmread(io.BytesIO((folder / "p2-0.dcm").read_bytes()))
    assert stored.SOPInstanceUID == "1.2.3.1.0"
    expected = (stored.pixel_array.astype(np.int32) - 1024).astype(np.int16)
    np.testing.assert_array_equal(by_uid["1.2.3.1.0"], resize_hu(expected, SIZE))


def test_real_slices_are_what_they_were(real_ge_series, real_rsna_slices, tmp_path):
    for folder in (real_ge_series, real_rsna_slices):
        index = index_folder(folder)
        index.save(tmp_path / folder.name)
        index = SeriesIndex.load(tmp_path / folder.name).usable()
        assert len(index.slices) > 2
        assert refused(index) == {}
        assert isinstance(index.slices, pd.DataFrame)


def test_a_file_removed_while_it_is_read_is_a_reject(folder, monkeypatch):
    source = indexed_slices(index_folder(folder))[0]
    read = reading.read_slice

    def read_and_remove(container, **settings):
        record = read(container, **settings)
        Path(container).unlink()
        return record

    monkeypatch.setattr(reading, "read_slice", read_and_remove)
    with pytest.raises(RejectedFile, match="No such file") as caught:
        read_indexed(source, SIZE)
    assert caught.value.code == "UNREADABLE"
