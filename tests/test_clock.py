"""Clocks and file times before 1980, after 2107, or that jump: the same results, no traceback."""

import os
import shutil
import time
import types
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from interrupted import begun_training
from tiny_dicom import tiny_file

from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.ct.walk import _in_int64
from ich_keras.data.cache.cache import build_cache
from ich_keras.model_file import read_recipe
from ich_keras.models.weights_file import read_weights
from ich_keras.phantom.dicom import write_phantoms
from ich_keras.training import resume
from ich_keras.verification import verify

SIZE = 48
YEARS = {"1904": -2.08e9, "1970": 0.0, "2500": 1.67e10}  # seconds since 1970


@pytest.fixture(scope="module")
def begun(phantom_cache, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("begun") / "run"
    with begun_training(phantom_cache, run, "clock") as begun:
        yield begun


def set_clock(monkeypatch, seconds):
    monkeypatch.setattr(time, "time", lambda: seconds)


@pytest.mark.parametrize("year", YEARS)
def test_a_training_ends_alike_whatever_the_clock(
    begun, phantom_cache, tmp_path, monkeypatch, year
):
    digests = []
    for number, clock in enumerate((None, YEARS[year])):
        run = Path(shutil.copytree(begun, tmp_path / str(number)))
        if clock is not None:
            set_clock(monkeypatch, clock)
        resume(run, phantom_cache)
        digests.append(read_weights(run / "best.weights.h5").digest)
    assert digests[0] == digests[1]
    assert "model.keras: the model's parts match their checksums" in verify(run)
    read_recipe(run / "model.keras")
    dates = {info.date_time[0] for info in zipfile.ZipFile(run / "model.keras").infolist()}
    assert dates == {1980}


def test_the_packed_model_is_the_one_that_was_saved(begun, phantom_cache, tmp_path):
    run = Path(shutil.copytree(begun, tmp_path / "run"))
    resume(run, phantom_cache)
    names = zipfile.ZipFile(run / "model.keras").namelist()
    assert sorted(names) == ["config.json", "metadata.json", "model.weights.h5"]
    model = keras.saving.load_model(run / "model.keras")
    kept = read_weights(run / "best.weights.h5").layers
    for name, arrays in kept.items():
        for stored, variable in zip(arrays, model.get_layer(name).weights, strict=True):
            np.testing.assert_array_equal(stored, keras.ops.convert_to_numpy(variable))
    assert [path.name for path in run.glob(".*")] == []


@pytest.mark.parametrize("year", YEARS)
def test_phantoms_are_alike_whatever_the_clock(tmp_path, monkeypatch, year):
    write_phantoms(tmp_path / "now", 1, seed=0, matrix=32)
    set_clock(monkeypatch, YEARS[year])
    write_phantoms(tmp_path / "then", 1, seed=0, matrix=32)
    for path in (tmp_path / "now").rglob("*"):
        if path.is_file():
            other = tmp_path / "then" / path.relative_to(tmp_path / "now")
            assert other.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("mtime_ns", [0, -1, -(10**18), 4_102_444_800 * 10**9])
def test_file_times_of_any_year_are_indexed_and_cached(tmp_path, mtime_ns):
    folder = tmp_path / "dicom"
    folder.mkdir()
    for number in range(5):
        path = folder / f"{number}.dcm"
        uid, place = f"1.2.3.4.{number}", [0, 0, 5 * number]
        path.write_bytes(tiny_file(SOPInstanceUID=uid, ImagePositionPatient=place))
        os.utime(path, ns=(mtime_ns, mtime_ns))
    journal = tmp_path / "journal"
    index = index_folder(folder, journal=journal)
    assert set(index.slices["file_mtime_ns"]) == {path.stat().st_mtime_ns}
    assert index.equals(index_folder(folder, journal=journal))
    index.save(tmp_path / "index")
    index = SeriesIndex.load(tmp_path / "index")
    cache = build_cache(index, tmp_path / "cache", 16)
    cache.require(index=index.usable())
    assert len(cache) == 5


def test_times_that_no_table_holds_stay_different():
    year_2500 = int(YEARS["2500"]) * 10**9
    folded = [_in_int64(year_2500), _in_int64(year_2500 + 1)]
    assert folded[1] - folded[0] == 1
    assert all(-(2**63) <= mtime < 2**63 for mtime in folded)
    for mtime in (0, -1, 2**63 - 1, -(2**63)):
        assert _in_int64(mtime) == mtime


def test_a_file_of_the_year_2600_is_indexed(tmp_path, monkeypatch):
    path, real = tmp_path / "a.dcm", os.stat
    path.write_bytes(tiny_file())
    year_2600 = 19_880_000_000 * 10**9

    def later(place, **settings):
        found = real(place, **settings)
        if not str(place).endswith("a.dcm"):
            return found
        return types.SimpleNamespace(
            st_mode=found.st_mode, st_size=found.st_size, st_mtime_ns=year_2600
        )

    monkeypatch.setattr(os, "stat", later)  # few file systems hold such a time
    assert index_folder(tmp_path).slices["file_mtime_ns"].tolist() == [_in_int64(year_2600)]
