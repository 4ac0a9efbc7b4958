"""NIfTI volumes: the pixels and probabilities of the same head as DICOM, or a clear reject."""

import gzip
import shutil
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_files import RAS, head_volume, image_of, image_of_series, write_nifti
from untrained_runs import series_paths, untrained_run

from ich_keras.cli import main
from ich_keras.ct import nifti, walk
from ich_keras.ct.dicom import read_header, read_headers, read_hu, read_slice
from ich_keras.ct.rejects import NothingUsable, RejectedFile
from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.ct.sources import Frame
from ich_keras.data.cache.cache import CTCache, build_cache
from ich_keras.data.reading import indexed_slices, read_indexed
from ich_keras.labels import LABELS
from ich_keras.models.spec import ModelSpec
from ich_keras.prediction import predict_folder

SIZE = 32


@pytest.fixture(scope="module")
def series(phantom_folder, tmp_path_factory):
    """Three phantom series as DICOM, each in a folder of its own, and as NIfTI."""
    root = tmp_path_factory.mktemp("both")
    for number, paths in enumerate(series_paths(phantom_folder / "images", 3)):
        folder = root / "dicom" / f"s{number}"
        folder.mkdir(parents=True)
        for path in paths:
            shutil.copy(path, folder)
        image = image_of_series(paths)
        write_nifti(root / "nifti" / f"s{number}.nii{'.gz' if number else ''}", image)
    return root


def pixels(index: SeriesIndex, size: int = SIZE) -> dict[str, np.ndarray]:
    """Return the pixels of each series, by the name of its folder or file."""
    found: dict[str, list[np.ndarray]] = {}
    for one in indexed_slices(index):
        name = Path(one.container).name.partition(".")[0]
        name = Path(one.container).parent.name if one.container.endswith(".dcm") else name
        found.setdefault(name, []).append(read_indexed(one, size).hu)
    return {name: np.stack(hu) for name, hu in sorted(found.items())}


# --- The same as from DICOM -----------------------------------------------------------------


def test_pixels_geometry_and_verdicts_are_those_of_the_dicom_series(series):
    dicom, volumes = (index_folder(series / kind) for kind in ("dicom", "nifti"))
    theirs, ours = pixels(dicom), pixels(volumes)
    assert list(theirs) == list(ours) == ["s0", "s1", "s2"]
    for name, hu in theirs.items():
        np.testing.assert_array_equal(ours[name], hu)
    names = {Path(path).name.partition(".")[0] for path in volumes.slices["container"]}
    assert names == set(volumes.slices["patient_id"]) == {"s0", "s1", "s2"}
    for name in names:
        uid = volumes.series.loc[volumes.series["patient_id"] == name, "series_uid"].item()
        of_dicom = dicom.slices["container"].map(lambda path: Path(path).parent.name) == name
        other = dicom.slices.loc[of_dicom, "series_uid"].iloc[0]
        mine = volumes.series[volumes.series["series_uid"] == uid].iloc[0]
        their = dicom.series[dicom.series["series_uid"] == other].iloc[0]
        for column in ("verdict", "num_slices", "rows", "columns"):
            assert mine[column] == their[column]
        for column in ("slice_spacing_mm", "row_spacing_mm", "tilt_degrees", "shear_column"):
            assert mine[column] == pytest.approx(their[column], abs=2e-3), column


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    spec = ModelSpec((48, 48, 3), depth=10, width=8)
    return untrained_run(tmp_path_factory.mktemp("slices") / "run", "narrow", spec)


def test_predictions_are_those_of_the_dicom_series(series, run, tmp_path):
    both = tmp_path / "mixed"
    shutil.copytree(series / "dicom" / "s0", both / "s0")
    shutil.copy(series / "nifti" / "s1.nii.gz", both)
    expected, found = (
        predict_folder(run, folder, batch_size=4).slices for folder in (series / "dicom", both)
    )
    theirs, ours = probabilities(expected), probabilities(found)
    assert {name for name, _ in ours} == {"s0", "s1"}
    assert all(theirs[place] == values for place, values in ours.items())
    paths = found["path"].tolist()
    count = sum(path.startswith("s1.nii.gz#") for path in paths)
    assert {f"s1.nii.gz#{number}" for number in range(1, count + 1)} <= set(paths)
    assert any(path.startswith("s0/") for path in paths)
    # One file alone, on the command line.
    args = ["predict", "--run", run, "--dicom", both / "s1.nii.gz", "--out", tmp_path / "out"]
    args += ["--batch-size", "4", "--workers", "0"]
    done = CliRunner().invoke(main, list(map(str, args)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out" / "predictions.csv").read_text()
    assert text.count("s1.nii.gz#") == count


def probabilities(table) -> dict[tuple[str, int], list[float]]:
    """Return name of the series and number of the slice -> six probabilities."""
    places = [(path[:2], index) for path, index in table[["path", "slice_index"]].to_numpy()]
    return dict(zip(places, table[list(LABELS)].to_numpy().tolist(), strict=True))


AXES = ("RAS", "LAS", "LPS", "RPI", "LAI", "ARS", "PLI")


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("is_qform", [False, True])
def test_any_order_of_voxels_is_turned_to_one(tmp_path, axes, is_qform):
    hu = head_volume()
    hu[:, 2:9, 3:7] = 700  # nothing is symmetric
    image = image_of(hu)
    wanted = nib.orientations.axcodes2ornt(axes)
    image = image.as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), wanted)
    )
    assert "".join(nib.aff2axcodes(image.affine)) == axes
    if is_qform:
        image.set_qform(image.affine, code=1)
        image.set_sform(None, code=0)
    index = index_folder(write_nifti(tmp_path / "a.nii.gz", image))
    assert index.series["verdict"].tolist() == ["ok"]
    np.testing.assert_array_equal(pixels(index, 64)["a"], hu)
    row = index.series.iloc[0]
    assert (row["row_spacing_mm"], row["column_spacing_mm"], row["slice_spacing_mm"]) == (4, 4, 5)


@pytest.mark.parametrize("dtype", ["<i4", "<f4", "<f8", ">i2", "<i8"])
def test_types(tmp_path, dtype):
    hu = head_volume()
    plain = image_of(hu)
    image = nib.Nifti1Image(np.asarray(plain.dataobj).astype(dtype), RAS, dtype=dtype)
    if dtype[0] == ">":
        header = nib.Nifti1Header(endianness=">")
        image = nib.Nifti1Image(np.asarray(plain.dataobj), RAS, header)
    path = write_nifti(tmp_path / "a.nii", image)
    assert path.read_bytes()[:4] == struct.pack(f"{dtype[0]}i", 348)
    np.testing.assert_array_equal(pixels(index_folder(path), 64)["a"], hu)


def test_slope_and_intercept(tmp_path):
    hu = head_volume()
    stored = image_of((hu + 1024) * 2, np.uint16)
    path = tmp_path / "a.nii"
    path.write_bytes(edited({112: floats(0.5, -1024)}, stored))
    np.testing.assert_array_equal(nib.load(path).get_fdata(), image_of(hu).get_fdata())
    np.testing.assert_array_equal(pixels(index_folder(path), 64)["a"], hu)


def test_fractions_are_rounded(tmp_path):
    hu = head_volume()
    image = image_of(hu + np.where(hu % 2 == 0, 0.4, -0.4), np.float32)
    np.testing.assert_array_equal(
        pixels(index_folder(write_nifti(tmp_path / "a.nii", image)), 64)["a"], hu
    )


def test_identifiers_follow_the_content(tmp_path):
    image = image_of(head_volume())
    write_nifti(tmp_path / "sub-01_ct.nii.gz", image)
    first = index_folder(tmp_path)
    # Packed or not, as NIfTI-1 or NIfTI-2, in another folder: a copy.
    write_nifti(tmp_path / "copy" / "sub-01_ct.nii", nib.Nifti2Image.from_image(image))
    again = index_folder(tmp_path)
    assert set(first.slices["patient_id"]) == {"sub-01_ct"}
    assert again.slices["sop_instance_uid"].tolist() == first.slices["sop_instance_uid"].tolist()
    assert again.rejects["code"].tolist() == ["DUPLICATE_UID"] * 4
    for column in ("sop_instance_uid", "series_instance_uid", "study_instance_uid"):
        assert first.slices[column].str.fullmatch(r"2\.25\.[1-9]\d{0,38}").all()
    # Of two names, one is wrong: neither is used.
    write_nifti(tmp_path / "sub-02_ct.nii.gz", image)
    with pytest.raises(NothingUsable, match="UID_CONFLICT 12.*differ in their PatientID"):
        index_folder(tmp_path)


# --- Cache, resume, archives ----------------------------------------------------------------


def test_a_cache_of_volumes_is_that_of_dicom(series, tmp_path):
    caches = [
        build_cache(index_folder(series / kind), tmp_path / kind, SIZE, workers=workers)
        for kind, workers in (("dicom", 0), ("nifti", 2))
    ]
    hashes = [set(cache.slices["pixel_hash"]) for cache in caches]
    assert hashes[0] == hashes[1] and len(caches[0]) == len(caches[1])
    index = index_folder(series / "nifti")
    index.save(tmp_path / "index")
    CTCache.open(tmp_path / "nifti").require(SIZE, SeriesIndex.load(tmp_path / "index"))


@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_volumes_in_archives(series, tmp_path, suffix):
    archive = shutil.make_archive(str(tmp_path / "all"), suffix, series / "nifti")
    index, plain = index_folder(archive), index_folder(series / "nifti")
    assert index.series.equals(plain.series)
    assert set(index.slices["member"]) == {"s0.nii", "s1.nii.gz", "s2.nii.gz"}
    one, other = (
        {source.sop_instance_uid: read_indexed(source, SIZE).pixel_hash for source in sources}
        for sources in (indexed_slices(index), indexed_slices(plain))
    )
    assert one == other


def test_an_interrupted_indexing_resumes(series, tmp_path, monkeypatch):
    journal, calls = tmp_path / "journal", []
    folder = tmp_path / "volumes"
    shutil.copytree(series / "nifti", folder)
    progress = lambda step, done, total: calls.append((done, total))  # noqa: E731
    index = index_folder(folder, journal=journal, progress=progress)
    assert calls[-1] == (3, 3)
    read, seen = walk.read_headers, []

    def note(file, **asked):
        seen.append(Path(file).name)
        return read(file, **asked)

    monkeypatch.setattr(walk, "read_headers", note)
    assert index_folder(folder, journal=journal).equals(index)
    assert seen == []
    write_nifti(folder / "s1.nii.gz", image_of(head_volume()))
    again = index_folder(folder, journal=journal)
    assert seen == ["s1.nii.gz"]
    assert len(again.slices) == len(index.slices) - (index.slices["patient_id"] == "s1").sum() + 4


def test_another_volume_in_its_place_is_changed(tmp_path):
    hu = head_volume()
    path = write_nifti(tmp_path / "a.nii", image_of(hu))
    sources = indexed_slices(index_folder(path))
    hu[2, 30, 30] += 1  # in one voxel of one slice
    write_nifti(path, image_of(hu))
    with pytest.raises(RejectedFile, match="CHANGED: .*SOPInstanceUID") as caught:
        read_indexed(sources[0], SIZE)
    assert "PatientID" not in str(caught.value)
    write_nifti(path, image_of(hu[:2]))
    with pytest.raises(RejectedFile, match="CHANGED: the file has no slice 4; it holds 2"):
        read_indexed(sources[3], SIZE)


def test_a_volume_is_read_once_for_its_slices(tmp_path, monkeypatch):
    paths = [write_nifti(tmp_path / f"{n}.nii.gz", image_of(head_volume() + n)) for n in (0, 1)]
    read, seen = nifti._read, []
    monkeypatch.setattr(nifti, "_recent", nifti.Recent(most_bytes=2**20))
    monkeypatch.setattr(nifti, "_read", lambda file: seen.append(file) or read(file))
    for number in (1, 2, 3, 4):
        for path in paths:
            read_slice(Frame(str(path), number))
    assert seen == [str(path) for path in paths]
    monkeypatch.setattr(nifti, "_recent", nifti.Recent(most_bytes=2**10))
    for path in [*paths, *paths]:
        read_slice(Frame(str(path), 1))
    assert len(seen) == 6


# --- Bad input ------------------------------------------------------------------------------


def edited(places: dict[int, bytes], image=None) -> bytes:
    """Return a NIfTI-1 file with bytes of its header replaced."""
    image = image_of(head_volume()) if image is None else image
    content = bytearray(image.to_bytes())
    for place, found in places.items():
        content[place : place + len(found)] = found
    return bytes(content)


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def shorts(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}h", *values)


NO_FORMS = {252: shorts(0, 0)}
NAN = float("nan")


def with_values(change) -> bytes:
    return image_of(change(head_volume().astype(float)), np.float32).to_bytes()


def sheared(place: tuple[int, int], by: float) -> bytes:
    affine = RAS.copy()
    affine[place] = by
    return image_of(head_volume(), affine=affine).to_bytes()


def scaled(by: float) -> bytes:
    """Return a file whose affine counts in another unit, which it does not name."""
    image = image_of(head_volume(), affine=np.diag([by, by, by, 1]) @ RAS)
    return edited({123: b"\0"}, image)


def four_axes() -> bytes:
    voxels = np.zeros((8, 8, 4, 2), np.int16) - 1000
    return nib.Nifti1Image(voxels, RAS).to_bytes()


def colours() -> bytes:
    kind = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    return nib.Nifti1Image(np.zeros((8, 8, 4), kind), RAS).to_bytes()


def of_type(dtype) -> bytes:
    return nib.Nifti1Image(np.zeros((8, 8, 4), dtype), RAS).to_bytes()


BAD = {
    "empty": (lambda: b"", "TRUNCATED", "it is empty"),
    "text": (lambda: b"patient,label\n" * 40, "BAD_NIFTI", "begins like no NIfTI header"),
    "a header cut": (lambda: edited({})[:200], "TRUNCATED", "ends inside its header"),
    "voxels cut": (lambda: edited({})[:-2], "TRUNCATED", "33118 bytes; its header says 33120"),
    "a pair": (lambda: edited({344: b"ni1\0"}), "BAD_NIFTI", "its mark is 'ni1"),
    "Analyze": (lambda: edited({344: bytes(4)}), "BAD_NIFTI", "its mark is"),
    "4-D": (four_axes, "BAD_NIFTI", "it is 8 x 8 x 4 x 2 (4 axes); expected one volume"),
    "no axes": (lambda: edited({40: shorts(0)}), "BAD_NIFTI", "it is nothing (0 axes)"),
    "99 axes": (lambda: edited({40: shorts(99)}), "BAD_NIFTI", "(99 axes)"),
    "a negative axis": (lambda: edited({42: shorts(-5)}), "BAD_NIFTI", "its axes have [-5"),
    "a huge axis": (lambda: edited({42: shorts(32000)}), "TOO_LARGE", "of 64 x 32000"),
    "huge": (
        lambda: edited({42: shorts(4096, 4096, 4096)}),
        "TOO_LARGE",
        "137438953472 bytes of voxels",
    ),
    "RGB": (colours, "NOT_CT", "colours (RGB)"),
    "int8": (lambda: of_type(np.int8), "NOT_CT", "8 bits (int8)"),
    "uint8": (lambda: of_type(np.uint8), "NOT_CT", "8 bits (uint8)"),
    "complex": (lambda: of_type(np.complex64), "BAD_NIFTI", "complex64"),
    "unknown type": (lambda: edited({70: shorts(999)}), "BAD_NIFTI", "of data type 999"),
    "bits": (lambda: edited({70: shorts(1)}), "BAD_NIFTI", "its voxels are binary"),
    "an offset": (lambda: edited({108: floats(1e30)}), "BAD_NIFTI", "begin at byte 1e+30"),
    "no offset": (lambda: edited({108: floats(NAN)}), "BAD_NIFTI", "begin at byte nan"),
    "offset 0": (lambda: edited({108: floats(0)}), "BAD_NIFTI", "begin at byte 0"),
    "an infinite slope": (lambda: edited({112: floats(np.inf, 0)}), "BAD_RESCALE", "inf"),
    "a negative slope": (lambda: edited({112: floats(-1, 0)}), "BAD_RESCALE", "scl_slope is -1"),
    "a NaN intercept": (lambda: edited({112: floats(1, NAN)}), "BAD_RESCALE", "scl_inter nan"),
    "a tiny slope": (lambda: edited({112: floats(1e-6, 0)}), "BAD_RESCALE", "1e-06"),
    "metres": (lambda: edited({123: b"\1"}), "BAD_NIFTI", "distances are in metres"),
    "metres without a unit": (
        lambda: scaled(1e-3),
        "BAD_NIFTI",
        "makes voxels of 0.004 x 0.004 x 0.005 mm; expected 0.02 to 100, in mm",
    ),
    "micrometres without a unit": (
        lambda: scaled(1e3),
        "BAD_NIFTI",
        "makes voxels of 4000 x 4000 x 5000 mm; expected 0.02 to 100, in mm",
    ),
    "centimetres": (
        lambda: scaled(0.1),
        "BAD_NIFTI",
        "makes slices of 25.6 x 25.6 mm; expected 50 mm or more: are its distances in mm?",
    ),
    "no place": (lambda: edited(NO_FORMS), "BAD_NIFTI", "neither sform nor qform"),
    "zero affine": (lambda: edited({280: bytes(48)}), "BAD_NIFTI", "voxels of 0 x 0 x 0 mm"),
    "NaN affine": (lambda: edited({280: floats(NAN)}), "BAD_NIFTI", "sform holds values that are"),
    "far away": (lambda: edited({292: floats(1e9)}), "BAD_NIFTI", "begins at"),
    "a bad qform": (
        lambda: edited({252: shorts(1, 0), 256: floats(3, 3, 3), 76: floats(0.5)}),
        "BAD_NIFTI",
        "its qform cannot be used",
    ),
    "sheared in the plane": (lambda: sheared((0, 1), 2.0), "BAD_NIFTI", "63.4 degrees apart"),
    "flat": (lambda: edited({288: floats(5), 320: floats(0)}), "BAD_NIFTI", "into one plane"),
    "NaN": (
        lambda: with_values(lambda hu: np.where(hu > 800, NAN, hu)),
        "IMPLAUSIBLE_HU",
        "values are not finite",
    ),
    "infinite": (
        lambda: with_values(lambda hu: np.where(hu > 800, np.inf, hu)),
        "IMPLAUSIBLE_HU",
        "values are not finite",
    ),
    "0 to 255": (
        lambda: with_values(lambda hu: np.clip((hu + 40) * 3.2, 0, 255).round()),
        "IMPLAUSIBLE_HU",
        "between 0 and 255: a picture of 256 greys",
    ),
    "0 to 1": (
        lambda: with_values(lambda hu: np.clip((hu + 1000) / 2000, 0, 1)),
        "IMPLAUSIBLE_HU",
        "normalised values",
    ),
    "raw": (
        lambda: with_values(lambda hu: hu - hu.min()),
        "IMPLAUSIBLE_HU",
        "raw values whose intercept (often -1024) was not applied",
    ),
    "without air": (
        lambda: with_values(lambda hu: np.clip(hu, -100, None)),
        "IMPLAUSIBLE_HU",
        "without the air around it",
    ),
    "beyond int16": (
        lambda: with_values(lambda hu: hu * 100),
        "IMPLAUSIBLE_HU",
        "its values lie between",
    ),
    "a mask": (lambda: of_type(np.int16), "NOT_CT", "between 0 and 0, all whole: a mask"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("is_packed", [False, True])
def test_what_is_not_a_volume_in_hu_is_refused(tmp_path, name, is_packed):
    make, code, detail = BAD[name]
    path = tmp_path / f"a.nii{'.gz' if is_packed else ''}"
    path.write_bytes(gzip.compress(make()) if is_packed else make())
    with pytest.raises(NothingUsable) as caught:
        index_folder(path)
    row = caught.value.rejects.iloc[0]
    assert (row["path"], row["code"]) == (str(path), code)
    assert detail in row["detail"], row["detail"]
    assert row["hint"]


def test_the_message_of_a_refused_volume_says_what_to_do(tmp_path):
    make, *_ = BAD["raw"]
    (tmp_path / "a.nii").write_bytes(make())
    args = ["index", "--dicom", str(tmp_path / "a.nii"), "--out", str(tmp_path / "index")]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 3
    assert "raw values whose intercept (often -1024) was not applied" in done.output
    assert "Convert it to HU" in done.output
    assert not (tmp_path / "index" / "index.json").exists()


@pytest.mark.parametrize(
    ("affine", "verdict"),
    [
        ([[4, 0, 0, 0], [0, 0, 5, 0], [0, 4, 0, 0]], "not axial"),
        ([[4, 0, 0, 0], [0, 4, 1, 0], [0, 0, 5, 0]], "tilted"),
        ([[4, 0, 0, 0], [0, 3.8, -1.6, 0], [0, 1.25, 4.75, 0]], "tilted"),
        ([[3.2, -2.4, 0, 0], [2.4, 3.2, 0, 0], [0, 0, 5, 0]], "rotated"),
    ],
)
def test_how_it_lies_is_judged_as_for_dicom(tmp_path, affine, verdict):
    image = image_of(head_volume(), affine=np.array([*affine, [0, 0, 0, 1]], float))
    index = index_folder(write_nifti(tmp_path / "a.nii", image), any_body_part=True)
    assert index.series["verdict"].tolist() == [verdict]


def test_few_slices_and_trunks_are_told(tmp_path):
    write_nifti(tmp_path / "few.nii", image_of(head_volume(2)))
    wide = RAS * [10, 10, 1, 1]
    write_nifti(tmp_path / "wide.nii", image_of(head_volume(4), affine=wide))
    index = index_folder(tmp_path)
    assert index.series["verdict"].tolist() == ["too few", "not a head"]


@pytest.mark.parametrize("cut", [20, 1000, -9, -1])
def test_a_packed_file_that_was_cut(tmp_path, cut):
    content = gzip.compress(edited({}))
    (tmp_path / "a.nii.gz").write_bytes(content[:cut])
    with pytest.raises(RejectedFile, match="TRUNCATED"):
        read_headers(str(tmp_path / "a.nii.gz"))


def test_a_packed_file_with_a_flipped_bit(tmp_path):
    content = bytearray(gzip.compress(edited({})))
    content[-6] ^= 1  # of the checksum
    (tmp_path / "a.nii.gz").write_bytes(content)
    with pytest.raises(RejectedFile, match="BAD_NIFTI: it cannot be unpacked"):
        read_headers(str(tmp_path / "a.nii.gz"))


def test_bombs_are_not_unpacked(tmp_path):
    small, large = edited({}), edited({42: shorts(4096, 4096, 32)})
    for name, content in (("rest", small), ("claim", large)):
        with gzip.open(tmp_path / f"{name}.nii.gz", "wb", compresslevel=9) as stream:
            stream.write(content)
            for _ in range(300 if name == "rest" else 0):
                stream.write(bytes(2**20))
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "rest.nii.gz", "inner.nii.gz")
        archive.writestr("claim.nii", large + bytes(64 * 2**20))
    tracemalloc.start()
    with pytest.raises(NothingUsable) as caught:
        index_folder(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    details = dict(caught.value.rejects[["path", "detail"]].to_numpy().tolist())
    found = {Path(path.replace("!", "")).name: detail for path, detail in details.items()}
    assert "goes on behind its 33120 bytes" in found["rest.nii.gz"]
    assert "goes on behind its 33120 bytes" in found["inner.nii.gz"]
    assert "its header says" in found["claim.nii.gz"] and "its header says" in found["claim.nii"]
    assert peak < 300 * 2**20


def test_one_slice_of_a_volume_is_asked_for_by_number(tmp_path):
    hu = head_volume()
    path = write_nifti(tmp_path / "a.nii", image_of(hu))
    np.testing.assert_array_equal(read_hu(Frame(path, 3)), hu[2])
    assert read_header(Frame(path, 3)).position == (-252.0, -252.0, 10.0)
    for read in (read_hu, read_header):
        with pytest.raises(RejectedFile, match="MULTIFRAME: a NIfTI volume") as caught:
            read(path)
        assert "Frame(path, number)" in caught.value.hint
    for number in (0, 5, -1):
        with pytest.raises(RejectedFile, match=f"the file has no slice {number}; it holds 4"):
            read_hu(Frame(path, number))


def test_without_nibabel(tmp_path, monkeypatch):
    write_nifti(tmp_path / "a.nii", image_of(head_volume()))
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(NothingUsable, match="NO_DECODER 1.*nibabel, which is not") as caught:
        index_folder(tmp_path)
    assert caught.value.hint == "Install it: pip install 'ich_keras[nifti]'"


@settings(max_examples=150)
@given(st.integers(0, 347), st.binary(min_size=1, max_size=8), st.booleans())
def test_no_header_is_a_surprise(tmp_path_factory, place, found, is_packed):
    content = edited({place: found})
    path = tmp_path_factory.getbasetemp() / "fuzz.nii"
    path.write_bytes(gzip.compress(content, 1) if is_packed else content)
    try:
        headers = read_headers(str(path))
    except RejectedFile:
        return
    assert len(headers) >= 1
