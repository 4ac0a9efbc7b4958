"""Values that cannot be Hounsfield units are refused, and no good slice is."""

import io
import warnings
from collections import defaultdict

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from tiny_dicom import head_hu, tiny_file

from ich_keras import prediction_reading
from ich_keras.ct.dicom import read_header, read_hu, read_slice
from ich_keras.ct.plausibility import Content, judge_series, judge_slice
from ich_keras.ct.rejects import REJECT_CODES, RejectedFile
from ich_keras.ct.series import index_folder
from ich_keras.data.cache.cache import CTCache, build_cache
from ich_keras.data.reading import indexed_slices
from ich_keras.phantom.dicom import dicom_bytes, write_phantoms
from ich_keras.phantom.plan import make_phantom, plan_phantoms


def with_values(hu, change):
    """Apply a change to HU as numbers of any size; int16."""
    return np.clip(change(np.asarray(hu).astype(int)), -32768, 32767).astype(np.int16)


# What a lost or doubled slope or intercept, or wrong bits, make of HU.
SLICE_FAULTS = {
    "intercept -1024 lost": lambda hu: hu + 1024,
    "intercept -1000 lost": lambda hu: hu + 1000,
    "intercept -1024 twice": lambda hu: hu - 1024,
    "intercept -8192 lost": lambda hu: hu + 8192,
    "slope twice as large, intercept -1024": lambda hu: 2 * (hu + 1024) - 1024,
    "slope twice as large, intercept 0": lambda hu: 2 * hu,
    "slope ten times as large": lambda hu: 10 * (hu + 1024) - 1024,
    "half the slope, intercept -1024": lambda hu: (hu + 1024) // 2 - 1024,
    "half the slope, intercept 0": lambda hu: hu // 2,
    "10 bits of 12": lambda hu: (hu + 1024) % 1024 - 1024,
    "unsigned 12 bits read as signed": lambda hu: (hu + 3072) % 4096 - 3072,
    "13 bits without their sign": lambda hu: hu % 8192,
    "black and white exchanged": lambda hu: -hu,
    "bytes exchanged": lambda hu: (hu + 1024).astype(np.int16).byteswap().astype(int) - 1024,
}
# A slice alone does not show these, a series does.
SERIES_FAULTS = {
    "a tenth of the slope, intercept -1024": lambda hu: (hu + 1024) // 10 - 1024,
    "a tenth of the slope, intercept 0": lambda hu: hu // 10,
    "8 bits of 12": lambda hu: (hu + 1024) % 256 - 1024,
}


@pytest.fixture(scope="module")
def phantoms():
    """Three series of 64 and of 128 pixels, with padding and noise; lists of int16 HU."""
    specs = [spec for matrix in (64, 128) for spec in plan_phantoms(3, matrix, matrix)]
    return [make_phantom(spec).hu for spec in specs]


def judged(series):
    """Return the content of each slice, None for a refused one, and what the first refusal says."""
    contents, said = [], ""
    for hu in series:
        try:
            contents.append(judge_slice(hu))
        except RejectedFile as error:
            assert error.code == "IMPLAUSIBLE_HU"
            contents.append(None)
            said = said or error.detail
    return contents, said


def test_the_code_is_explained():
    assert "cannot be Hounsfield units" in REJECT_CODES["IMPLAUSIBLE_HU"].meaning
    assert "RescaleIntercept" in REJECT_CODES["IMPLAUSIBLE_HU"].hint


def test_no_phantom_falls(phantoms):
    for series in phantoms:
        contents, said = judged(series)
        assert said == ""
        assert judge_series(contents) == ""


def test_no_real_slice_falls(real_ge_series, real_rsna_slices):
    series = [read_slice(path).content for path in sorted(real_ge_series.glob("*.dcm"))]
    assert len(series) == 28
    assert judge_series(series) == ""
    for path in real_rsna_slices.glob("*.dcm"):
        assert read_slice(path).content.soft > 0.1


def test_no_slice_of_pydicom_falls():
    for name in ("CT_small.dcm", "693_UNCR.dcm", "693_UNCI.dcm"):
        path = get_testdata_file(name, download=False)
        assert read_hu(path).shape == pydicom.dcmread(path).pixel_array.shape, name


@pytest.mark.parametrize("fault", SLICE_FAULTS)
def test_a_wrong_scale_is_refused_in_phantoms(phantoms, fault):
    for series in phantoms:
        contents, said = judged(with_values(hu, SLICE_FAULTS[fault]) for hu in series)
        refused = contents.count(None)
        assert refused >= 0.7 * len(contents)
        assert "expected air at -1000 HU and soft tissue at 0 to 100" in said
        expected = f"{refused} of the series' {len(contents)} slices hold values that cannot be HU"
        assert judge_series(contents) == expected


@pytest.mark.parametrize("fault", SLICE_FAULTS)
def test_a_wrong_scale_is_refused_in_real_slices(real_ge_series, real_rsna_slices, fault):
    series = [read_hu(path) for path in sorted(real_ge_series.glob("*.dcm"))]
    contents, _ = judged(with_values(hu, SLICE_FAULTS[fault]) for hu in series)
    assert contents.count(None) >= 22
    assert judge_series(contents)
    for path in real_rsna_slices.glob("*.dcm"):
        contents, said = judged([with_values(read_hu(path), SLICE_FAULTS[fault])])
        assert contents == [None], path.name
        assert said


@pytest.mark.parametrize("fault", SERIES_FAULTS)
def test_a_series_shows_what_a_slice_does_not(phantoms, real_ge_series, fault):
    real = [read_hu(path) for path in sorted(real_ge_series.glob("*.dcm"))]
    for series in [*phantoms, real]:
        contents, _ = judged(with_values(hu, SERIES_FAULTS[fault]) for hu in series)
        assert "cannot be HU" in judge_series(contents) or "no slice of" in judge_series(contents)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"RescaleIntercept": 0}, r"of the slice lie around 10\d0 HU"),
        ({"RescaleIntercept": -2048}, r"of the slice lie below -1200 HU, down to -20\d\d HU"),
        ({"RescaleSlope": 2}, r"of the slice lie around 10\d0 HU"),
        ({"RescaleSlope": "0.5"}, r"of the slice lie around -\d+ HU"),
    ],
)
def test_the_reader_refuses_it_and_says_what_it_saw(tags, message):
    stored = head_hu() + 1024
    assert read_slice(io.BytesIO(tiny_file(stored))).content.soft > 0.2
    with pytest.raises(RejectedFile, match=message) as caught:
        read_hu(io.BytesIO(tiny_file(stored, **tags)))
    assert caught.value.code == "IMPLAUSIBLE_HU"
    assert "RescaleIntercept" in caught.value.hint


def disc(radius, side=128):
    rows, columns = (np.mgrid[:side, :side] + 0.5) / side - 0.5
    return np.hypot(rows, columns) < radius


def noise(sigma, seed=0, side=128):
    return np.random.default_rng(seed).normal(0, sigma, (side, side))


def unusual_slices():
    """Good slices that lack something: HU of many kinds, by name."""
    bone = 300 + 1500 * np.random.default_rng(1).random((128, 128)) ** 2
    inside = np.where(disc(0.35), bone, 40) + noise(60)
    tight = np.where(disc(0.45), head_hu(128), -2000)
    metal = head_hu(128).astype(float)
    metal[60:64, 40:90] = 20000
    metal += noise(1) * 300 * (abs(np.arange(128) - 62) < 12)[:, np.newaxis]
    vertex = np.where(disc(0.05), 60, -1000) + noise(8)
    holder = np.where(disc(0.3) & ~disc(0.28), -300, np.where(disc(0.28), -930, -1000)) + noise(10)
    return {
        "zoomed into the brain: no air, no bone": 30 + noise(6),
        "zoomed into the temporal bone: no air": inside,
        "a tight circle in padding of -2000": tight,
        "bright padding that no tag declares": np.where(disc(0.5), head_hu(128), 3071),
        "padding of two values": np.where(disc(0.5), tight, -3024),
        "metal and its streaks": np.clip(metal, -1024, 3071),
        "metal in an extended range": np.clip(metal, -10000, 30000),
        "the vertex, tiny": vertex,
        "above the head: air": -1000 + noise(8),
        "air, clipped": np.maximum(-1018 + noise(8), -1024),
        "noisy air": -1000 + noise(60),
        "foam and shell of a head holder": holder,
        "padding alone": np.full((128, 128), -3024.0),
        "contrast medium": head_hu(128) + 250 * disc(0.08),
    }


@pytest.mark.parametrize("name", unusual_slices())
def test_unusual_slices_pass(name):
    judge_slice(np.rint(unusual_slices()[name]).astype(np.int16))


@pytest.mark.parametrize("side", [1, 4, 16, 31])
def test_tiny_slices_are_not_judged(side):
    assert judge_slice(np.full((side, side), 5000, np.int16)).is_plain
    judge_slice(np.random.default_rng(0).integers(-3000, 5000, (side, side)).astype(np.int16))


def test_contents_by_hand():
    hu = np.full((200, 200), -1000, np.int16)
    hu[:, 100:] = 40
    hu[100:, 140:] = 500
    content = judge_slice(hu)
    assert content.air == pytest.approx(0.5, abs=0.01)
    # By hand: the quarter of the disc right of 40 pixels from its centre, of a radius of 96.
    bone = (np.arccos(40 / 96) - 40 / 96 * np.sin(np.arccos(40 / 96))) / np.pi / 2
    assert content.bone == pytest.approx(bone, abs=0.01)
    assert content.soft == pytest.approx(0.5 - bone, abs=0.01)
    assert not content.is_plain


def test_a_series_is_judged_by_what_its_slices_show():
    head = Content(soft=0.3, air=0.5, bone=0.05, is_plain=False)
    air = Content(soft=0.0, air=1.0, bone=0.0, is_plain=False)
    plain = Content(soft=0.0, air=0.0, bone=0.0, is_plain=True)
    assert judge_series([head, air, air, plain]) == ""
    assert judge_series([air, air]) == ""  # too few to say
    assert judge_series([plain] * 5) == ""
    assert judge_series([]) == ""
    assert judge_series([air] * 3) == (
        "no slice of the series shows soft tissue (-150 to 150 HU) or bone (above 300 HU); "
        "expected those of a head"
    )
    assert judge_series([head, head, None]) == ""
    assert judge_series([head, None, None]).startswith("2 of the series' 3 slices")
    assert judge_series([None] * 3).startswith("3 of the series' 3 slices")


# --- In a cache and a prediction ------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder_with_a_wrong_series(tmp_path_factory):
    """Two phantoms; the intercept of one is lost. The folder, and the two series' UIDs."""
    folder = tmp_path_factory.mktemp("wrong") / "data"
    write_phantoms(folder, 2, seed=5, matrix=64)
    paths = defaultdict(list)
    for path in sorted((folder / "images").iterdir()):
        paths[read_header(path).series_instance_uid].append(path)
    good, wrong = sorted(paths, key=lambda uid: len(paths[uid]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of RSNA's UIDs
        for path in paths[wrong]:
            dataset = pydicom.dcmread(path)
            dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit = 1, 16, 15
            dataset.PixelData = (read_hu(path) + 1024).astype("<i2").tobytes()
            dataset.RescaleIntercept = "0"
            path.write_bytes(dicom_bytes(dataset))
    return folder / "images", good, wrong


def test_no_slice_of_a_wrong_series_enters_a_cache(folder_with_a_wrong_series, tmp_path):
    folder, good, wrong = folder_with_a_wrong_series
    index = index_folder(folder)
    numbers = index.slices["series_uid"].value_counts()
    build_cache(index, tmp_path / "cache", size=32)
    cache = CTCache.open(tmp_path / "cache")
    cache.require(size=32, index=index)  # alone, some could be read; the cache is still no other
    assert set(cache.slices["series_uid"]) == {good}
    assert len(cache.rejects) == numbers[wrong]
    assert set(cache.rejects["code"]) == {"IMPLAUSIBLE_HU"}
    said = cache.rejects["detail"]
    alone = said.str.contains("of the slice lie around 10")
    assert 0.5 * len(said) < alone.sum() < len(said)
    by_series = f"{alone.sum()} of the series' {len(said)} slices hold values that cannot be HU"
    assert set(said[~alone]) == {by_series}
    expected = judge_series([read_slice(path).content for path in cache.slices["container"]])
    assert expected == ""


def test_no_slice_of_a_wrong_series_is_predicted(folder_with_a_wrong_series):
    folder, good, wrong = folder_with_a_wrong_series
    index = index_folder(folder)
    sources = indexed_slices(index)
    rows = index.slices.groupby("series_uid").indices
    hu, hashes, rejects, _ = prediction_reading.read_series(
        32, [sources[row] for row in rows[good]]
    )
    assert len(hu) == len(rows[good]) and all(hashes) and rejects == []
    hu, hashes, rejects, _ = prediction_reading.read_series(
        32, [sources[row] for row in rows[wrong]]
    )
    assert len(hu) == 0 and not any(hashes)
    assert sorted(reject.path for reject in rejects) == sorted(
        sources[row].container for row in rows[wrong]
    )
    assert {reject.code for reject in rejects} == {"IMPLAUSIBLE_HU"}


def test_a_zoomed_slice_of_a_wrapped_series_is_refused_if_it_cannot_be_repaired(tmp_path):
    """Air of 3096, in too small a part of the slice to be told from metal."""
    head = np.maximum(head_hu(64), -1000)
    tags = {"BitsStored": 12, "PixelRepresentation": 0, "RescaleIntercept": 0}
    for number in range(6):
        hu = head.copy()
        if number in (2, 3):  # zoomed: nothing that wraps
            hu = np.where((hu < 0) | (hu > 300), 40, hu)
        if number == 2:  # but a little air in a corner
            hu[:6, :6] = -1000
        content = tiny_file(
            hu % 4096,
            SOPInstanceUID=f"1.2.3.{number}",
            ImagePositionPatient=[-125, -125, 5 * number],
            **tags,
        )
        (tmp_path / f"{number}.dcm").write_bytes(content)
    index = index_folder(tmp_path)
    assert len(index.slices) == 6
    cache = build_cache(index, tmp_path / "cache", size=64)
    assert cache.rejects["path"].str[-5:].tolist() == ["2.dcm"]
    assert "written modulo 4096" in cache.rejects["detail"].iloc[0]
    assert cache.slices["repaired"].tolist() == [True, True, False, True, True]
    assert cache.slices_hu(range(5)).max() < 3000
    cache.require(index=index)
    sources = indexed_slices(index)
    hu, hashes, rejects, _ = prediction_reading.read_series(64, sources)
    assert [reject.path[-5:] for reject in rejects] == ["2.dcm"]
    assert [bool(pixels) for pixels in hashes] == [True, True, False, True, True, True]
    np.testing.assert_array_equal(hu, cache.slices_hu(range(5)))
    # Alone, such a slice may hold metal.
    assert read_hu(tmp_path / "2.dcm").max() == 3096
