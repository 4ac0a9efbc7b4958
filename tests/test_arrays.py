"""Arrays in memory: the pixels, probabilities and checks of the same volumes as files."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from nifti_files import head_volume
from untrained_runs import untrained_run

import ich_keras
from ich_keras import arrays
from ich_keras.ct.series import index_folder
from ich_keras.data.cache.cache import build_cache
from ich_keras.data.reading import indexed_slices, pixel_hash, read_indexed
from ich_keras.errors import DataError, UsageError
from ich_keras.labels import LABELS
from ich_keras.models.spec import ModelSpec

SPACING = (5.0, 4.0, 4.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    spec = ModelSpec((48, 48, 3), depth=10, width=8)
    return untrained_run(tmp_path_factory.mktemp("slices") / "run", "narrow", spec)


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path_factory, monkeypatch):
    """No call leaves files of its own behind."""
    place = tmp_path_factory.mktemp("system")
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield
    assert list(place.iterdir()) == []


@pytest.fixture(scope="module")
def phantom(phantom_folder, tmp_path_factory):
    """A folder with an upright phantom series, its HU and its spacing."""
    index = index_folder(phantom_folder / "images")
    series = index.series[index.series["verdict"] == "ok"].iloc[0]
    slices = index.slices["series_uid"] == series["series_uid"]
    folder = tmp_path_factory.mktemp("phantom") / "one"
    folder.mkdir()
    for path in index.slices.loc[slices, "container"]:
        shutil.copy(path, folder)
    sources = [one for one, own in zip(indexed_slices(index), slices, strict=True) if own]
    hu = np.stack([read_indexed(one, series["rows"]).hu for one in sources])
    names = ("slice_spacing_mm", "row_spacing_mm", "column_spacing_mm")
    return folder, hu, tuple(float(series[name]) for name in names)


def test_probabilities_are_those_of_the_files(run, phantom):
    folder, hu, spacing = phantom
    expected = ich_keras.predict_folder(run, folder, batch_size=4)
    found = ich_keras.predict_arrays(run, {"scan 1": hu}, spacing, batch_size=4)
    for table in ("slices", "series"):
        np.testing.assert_array_equal(
            getattr(found, table)[list(LABELS)], getattr(expected, table)[list(LABELS)]
        )
    count = len(hu)
    assert found.slices["path"].tolist() == [f"scan 1/{n:04d}.dcm" for n in range(1, count + 1)]
    assert found.slices["position_mm"].tolist() == pytest.approx(np.arange(count) * spacing[0])
    assert found.series["verdict"].tolist() == expected.series["verdict"].tolist() == ["ok"]
    # Other kinds of numbers, and one array without a name.
    floats = ich_keras.predict_arrays(run, hu + 0.3, spacing, batch_size=4)
    np.testing.assert_array_equal(floats.slices[list(LABELS)], found.slices[list(LABELS)])
    assert floats.slices["path"][0] == "volume-1/0001.dcm"


def test_a_cache_has_the_pixels_and_labels_that_were_given(tmp_path):
    volumes = [head_volume(4), head_volume(5) + 1, head_volume(6) + 2]
    labels = [np.zeros((4, 6), int), None, np.zeros((6, 6), int)]
    labels[0][2, [1, 5]] = 1
    labels[2][0, 0] = -1
    cache = ich_keras.cache_from_arrays(
        volumes, SPACING, tmp_path / "cache", 64, labels, patients=["p", "q", "p"]
    )
    assert cache.series["patient_id"].value_counts().to_dict() == {"p": 2, "q": 1}
    for volume, found in zip(volumes, (labels[0], np.full((5, 6), -1), labels[2]), strict=True):
        rows = cache.slices["pixel_hash"].isin([pixel_hash(one) for one in volume])
        np.testing.assert_array_equal(cache.slices_hu(np.flatnonzero(rows)), volume)
        np.testing.assert_array_equal(cache.slices.loc[rows, list(LABELS)], found)
    assert cache.series[["slice_spacing_mm", "row_spacing_mm"]].to_numpy().tolist() == [[5, 4]] * 3
    assert [path.name for path in tmp_path.iterdir() if "arrays" in path.name] == []


def test_labels_of_volumes_and_names_of_ones_own(tmp_path):
    cache = ich_keras.cache_from_arrays(
        {"a": head_volume(4), "b": head_volume(5) + 1},
        [SPACING, (2.5, 4, 4)],
        tmp_path / "cache",
        32,
        labels={"b": [1, 0, -1]},
        label_names=("tumour", "stroke", "shunt"),
    )
    assert cache.labelling.level == "series"
    table = cache.series.set_index("patient_id")
    assert table.loc["b", ["tumour", "stroke", "shunt"]].tolist() == [1, 0, -1]
    assert table.loc["a", ["tumour", "stroke", "shunt"]].tolist() == [-1, -1, -1]
    assert table["slice_spacing_mm"].to_dict() == {"a": 5.0, "b": 2.5}


def test_an_interrupted_cache_resumes_from_other_files(tmp_path, monkeypatch):
    volumes = {"a": head_volume(4), "b": head_volume(5) + 1}

    def killed(index, out, size, **options):
        build_cache(index, tmp_path / "twin", size, **options)
        shutil.move(tmp_path / "twin", tmp_path / "elsewhere")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(arrays, "build_cache", killed)
        arrays.cache_from_arrays(volumes, SPACING, tmp_path / "cache", 32)
    cache = arrays.cache_from_arrays(volumes, SPACING, tmp_path / "cache", 32)
    other = ich_keras.CTCache.open(tmp_path / "elsewhere")
    assert cache.fingerprint == other.fingerprint and cache.pixels_digest == other.pixels_digest


HU = head_volume()


def zoomed(values):
    hu = head_volume().astype(float)
    hu[1] = values
    return hu


@pytest.mark.parametrize(
    ("volumes", "spacing", "error", "told"),
    [
        ([], SPACING, UsageError, "no volumes"),
        (HU[0], SPACING, UsageError, "int16 of shape \\(64,\\)"),
        (HU.astype(bool), SPACING, UsageError, "is bool of shape"),
        (HU.astype(complex), SPACING, UsageError, "is complex128"),
        (HU[:0], SPACING, UsageError, "of shape \\(0, 64, 64\\)"),
        ({"../a": HU}, SPACING, UsageError, "called '../a'"),
        ({"..": HU}, SPACING, UsageError, r"called '\.\.'"),
        ({"a": HU, "A": HU + 1}, SPACING, UsageError, "only in capitals"),
        (HU, (5, 4), UsageError, "expected three numbers"),
        (HU, 5.0, UsageError, "expected three numbers"),
        (HU, "5 4 4", UsageError, "expected three numbers"),
        (HU, (5, 0, 4), UsageError, "numbers from 0.02 to 100 mm"),
        (HU, (5, np.nan, 4), UsageError, "numbers from 0.02 to 100 mm"),
        (HU, (5, 4, 4000), UsageError, "numbers from 0.02 to 100 mm"),
        (HU, (0.005, 0.004, 0.004), UsageError, "numbers from 0.02 to 100 mm"),
        ([HU, HU + 1], [SPACING] * 3, UsageError, "for each of the 2"),
        (np.zeros((3, 5000, 4)), SPACING, UsageError, "at most 9999 slices of 4096"),
        ([HU, HU], SPACING, DataError, "volume-1 and volume-2 are equal"),
        (zoomed(np.nan), SPACING, DataError, "volume-1: IMPLAUSIBLE_HU: 4096 values are not"),
        (HU + 1030, SPACING, DataError, "raw values whose intercept"),
        (np.clip(HU, 0, 80) / 80, SPACING, DataError, "normalised"),
        (np.clip(HU + 40, 0, 255), SPACING, DataError, "256 greys"),
        ((HU > 0).astype(np.uint8), SPACING, DataError, "a mask"),
        (HU.astype(int) * 100, SPACING, DataError, "IMPLAUSIBLE_HU: its values lie between"),
    ],
)
@pytest.mark.parametrize("is_cache", [False, True])
def test_bad_arrays(run, tmp_path, volumes, spacing, error, told, is_cache):
    with pytest.raises(error, match=told):
        if is_cache:
            arrays.cache_from_arrays(volumes, spacing, tmp_path / "cache", 32)
        else:
            arrays.predict_arrays(run, volumes, spacing)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("asked", "error", "told"),
    [
        ({"labels": [np.zeros((3, 6))]}, UsageError, r"of shape \(3, 6\); expected \(4, 6\)"),
        ({"labels": [np.zeros((4, 6)), None]}, UsageError, "for 2 volumes of 1"),
        ({"labels": {"other": np.zeros(6)}}, UsageError, "'other', which is no volume"),
        ({"labels": [None]}, UsageError, "all of them are None"),
        ({"labels": [np.full((4, 6), 2)]}, DataError, "hold 2; expected 0, 1, or -1"),
        ({"labels": [np.full((4, 6), 0.5)]}, DataError, "hold 0.5"),
        ({"labels": [np.full((4, 6), np.nan)]}, DataError, "hold nan"),
        ({"labels": [[1, 0, 0, 0, 0, 0]]}, DataError, "row 0 has any 0"),
        ({"labels": [["yes"] * 6]}, UsageError, "are <U3"),
        ({"patients": ["a", "b"]}, UsageError, "2 patients for 1 volumes"),
        ({"patients": [""]}, UsageError, "no usable name"),
        ({"size": 4}, UsageError, "size 4"),
        ({"out": "."}, UsageError, "exists"),
    ],
)
def test_bad_labels_and_arguments(tmp_path, monkeypatch, asked, error, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(error, match=told):
        arrays.cache_from_arrays(HU, SPACING, **{"out": "cache", "size": 32, **asked})
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_labels_of_two_kinds(tmp_path):
    labels = [np.zeros(6), np.zeros((4, 6))]
    with pytest.raises(UsageError, match="some labels are of slices"):
        arrays.cache_from_arrays([HU, HU + 1], SPACING, tmp_path / "cache", 32, labels)


def test_slices_and_volumes_are_judged_as_all_others(run):
    # A slice of noise is a reject; few slices and a trunk are told.
    hu = head_volume(6).astype(float)
    hu[2] = 1200
    hu[2, ::2] = 900
    found = arrays.predict_arrays(run, hu, SPACING)
    assert found.rejects[["path", "code"]].to_numpy().tolist() == [
        ["volume-1/0003.dcm", "IMPLAUSIBLE_HU"]
    ]
    assert found.series["verdict"].tolist() == ["incomplete,gap"]
    few = arrays.predict_arrays(run, HU[:2], SPACING)
    assert few.series["verdict"].tolist() == ["too few"]
    with pytest.raises(DataError, match="NOT_HEAD"):
        arrays.predict_arrays(run, HU, (5, 40, 40))
    wide = arrays.predict_arrays(run, HU, (5, 40, 40), any_body_part=True)
    assert len(wide.slices) == 4
