"""Enhanced multi-frame CT: the slices of its frames, whatever their order, or a clear reject."""

import shutil
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from enhanced_ct import (
    encapsulated,
    enhanced,
    frame_item,
    item,
    rescale,
    sequence,
    shared_item,
    undefined_lengths,
    written,
)
from highdicom import legacy
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_files import head_volume
from pydicom.pixels.encoders import RLELosslessEncoder
from pydicom.uid import (
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)
from untrained_runs import untrained_run

from ich_keras.ct import walk
from ich_keras.ct.dicom import read_header, read_headers, read_hu
from ich_keras.ct.rejects import NothingUsable, RejectedFile
from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.ct.sources import Frame
from ich_keras.data.cache.cache import CTCache, build_cache
from ich_keras.data.reading import indexed_slices, read_indexed
from ich_keras.labels import LABELS
from ich_keras.models.spec import ModelSpec
from ich_keras.prediction import predict_folder

HU = head_volume(6)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def pixels(index: SeriesIndex) -> np.ndarray:
    return np.stack([read_indexed(one, 64).hu for one in indexed_slices(index)])


def single_frames(folder: Path, hu=HU) -> Path:
    """The same head as files of one slice."""
    folder.mkdir(parents=True)
    for number, one in enumerate(hu):
        dataset = enhanced(hu)
        for keyword in (
            "SharedFunctionalGroupsSequence",
            "PerFrameFunctionalGroupsSequence",
            "NumberOfFrames",
        ):
            delattr(dataset, keyword)
        dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        dataset.SOPInstanceUID = f"1.2.3.8.{number}"
        dataset.ImagePositionPatient = [-126, -126, 5 * number]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.PixelSpacing = [4, 4]
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
        dataset.PixelData = (one + 1024).astype("<i2").tobytes()
        write(folder / f"{number}.dcm", written(dataset))
    return folder


# --- One volume of its frames ---------------------------------------------------------------


@pytest.mark.parametrize("syntax", ["explicit", "implicit", "big", "undefined"])
def test_frames_become_a_series(tmp_path, syntax):
    dataset = enhanced()
    if syntax == "undefined":
        undefined_lengths(dataset)
    if syntax == "big":
        dataset.PixelData = (HU + 1024).astype(">i2").tobytes()
    uid = {"implicit": ImplicitVRLittleEndian, "big": ExplicitVRBigEndian}.get(syntax)
    path = write(tmp_path / "a.dcm", written(dataset, *([uid] if uid else [])))
    index = index_folder(path)
    row = index.series.iloc[0]
    assert (row["verdict"], row["num_slices"], row["slice_spacing_mm"]) == ("ok", 6, 5.0)
    assert (row["row_spacing_mm"], row["kernel"], row["patient_id"]) == (4.0, "H30s", "patient-1")
    names = [f"1.2.3.9/frames/{number}" for number in range(1, 7)]
    assert index.slices["sop_instance_uid"].tolist() == names
    assert index.slices["frame"].tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(pixels(index), HU)
    stored = pydicom.dcmread(path).pixel_array  # the oracle
    np.testing.assert_array_equal(pixels(index), stored.astype(int) - 1024)
    index.save(tmp_path / "index")
    assert SeriesIndex.load(tmp_path / "index").equals(index)


def test_frames_in_any_order_with_a_rescale_each(tmp_path):
    order = [3, 0, 5, 1, 4, 2]
    frames = [
        frame_item(
            n + 1, (-126, -126, 5 * n), PixelValueTransformationSequence=rescale(0.5, -1000 - n)
        )
        for n in order
    ]
    stored = np.stack([(HU[n] + 1000 + n) * 2 for n in order])
    # The shared group says otherwise: a frame's own goes before it.
    content = written(enhanced(frames=frames, stored=stored))
    index = index_folder(write(tmp_path / "a.dcm", content))
    assert (index.slices["frame"] - 1).tolist() == np.argsort(order).tolist()
    np.testing.assert_array_equal(pixels(index), HU)


def test_it_is_what_highdicom_makes_of_single_frames(tmp_path):
    folder = single_frames(tmp_path / "singles")
    files = [pydicom.dcmread(path) for path in sorted(folder.iterdir())]
    for one in files:
        for keyword in ("PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime"):
            setattr(one, keyword, "")
        for keyword in ("StudyID", "AccessionNumber", "ReferringPhysicianName", "Manufacturer"):
            setattr(one, keyword, "")
        one.SeriesNumber, one.AcquisitionNumber, one.FrameOfReferenceUID = 1, 1, "1.2.9"
        one.PositionReferenceIndicator, one.SliceThickness = "", 5
        one.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    converted = legacy.LegacyConvertedEnhancedCTImage(files, "1.2.3.5", 1, "1.2.3.6", 1)
    converted.save_as(tmp_path / "legacy.dcm")
    index = index_folder(tmp_path / "legacy.dcm")
    assert index.series["verdict"].tolist() == ["ok"]
    np.testing.assert_array_equal(pixels(index), HU)
    names = {f"1.2.3.6/frames/{number}" for number in range(1, 7)}
    assert set(index.slices["sop_instance_uid"]) == names


# An extended table is for frames of one fragment.
@pytest.mark.parametrize(
    ("table", "fragments"), [("basic", 1), ("basic", 2), ("extended", 1), ("none", 1), ("none", 2)]
)
def test_compressed_frames(tmp_path, table, fragments):
    runner = RLELosslessEncoder
    options = {
        "rows": 64,
        "columns": 64,
        "samples_per_pixel": 1,
        "bits_allocated": 16,
        "bits_stored": 16,
        "pixel_representation": 1,
        "photometric_interpretation": "MONOCHROME2",
        "number_of_frames": 1,
    }
    coded = [runner.encode((one + 1024).astype("<i2").tobytes(), **options) for one in HU]
    content = encapsulated(enhanced(), coded, RLELossless, table, fragments)
    path = write(tmp_path / "a.dcm", content)
    if table == "none" and fragments == 2:
        with pytest.raises(NothingUsable, match="12 fragments and no offset table; expected one"):
            index_folder(path)
        return
    np.testing.assert_array_equal(pixels(index_folder(path)), HU)
    # A frame that is damaged is one reject.
    damaged = bytearray(content)
    place = content.index(coded[2][:64], len(content) // 8)
    damaged[place : place + 4] = b"\xff" * 4  # of the header of RLE
    write(path, bytes(damaged))
    cache = build_cache(index_folder(path), tmp_path / "cache", 64)
    assert cache.rejects[["path", "code"]].to_numpy().tolist() == [[f"{path}#3", "DECODE_ERROR"]]
    np.testing.assert_array_equal(cache.slices_hu(range(5)), np.delete(HU, 2, axis=0))
    assert cache.series["verdict"].tolist() == ["incomplete,gap"]


def test_jpeg_ls_frames(tmp_path):
    dataset = enhanced()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.PixelRepresentation = 0
    dataset.BitsStored, dataset.HighBit = 16, 15
    dataset.compress(JPEGLSLossless, generate_instance_uid=False)
    path = write(tmp_path / "a.dcm", written(dataset, JPEGLSLossless))
    np.testing.assert_array_equal(pixels(index_folder(path)), HU)


def test_stacks_orientations_and_localizers_in_one_file(tmp_path):
    coronal = [1, 0, 0, 0, 0, -1]
    localizer = ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]
    frames = [frame_item(n + 1, (-126, -126, 5 * n)) for n in range(6)]
    other_stack = sequence(FrameAcquisitionNumber=1, StackID="2", InStackPositionNumber=1)
    frames += [
        frame_item(n + 1, (-126, -126, 5 * n), FrameContentSequence=other_stack) for n in range(6)
    ]
    frames += [
        frame_item(
            n + 1,
            (-126, -126 + 4 * n, 126),
            PlaneOrientationSequence=sequence(ImageOrientationPatient=coronal),
        )
        for n in range(3)
    ]
    frames.append(
        frame_item(1, (-126, 0, 126), CTImageFrameTypeSequence=sequence(FrameType=localizer))
    )
    frames.append(
        frame_item(
            1,
            (-126, -126, 0),
            CTImageFrameTypeSequence=sequence(
                FrameType=["DERIVED", "PRIMARY", "VOLUME", "MAXIMUM"]
            ),
        )
    )
    hu = np.concatenate([HU, HU + 1, head_volume(5)])
    shared = shared_item(PlaneOrientationSequence=None)
    axial = sequence(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    for frame in frames:
        if "PlaneOrientationSequence" not in frame:
            frame.PlaneOrientationSequence = axial
    index = index_folder(write(tmp_path / "a.dcm", written(enhanced(hu, frames, shared))))
    table = index.series.set_index("series_uid")
    assert table["num_slices"].tolist() == [6, 6, 3, 1]
    assert table["verdict"].tolist()[:3] == ["ok", "ok", "not axial"]
    assert "localizer" in table["verdict"].iloc[3]
    assert table.index.tolist() == ["1.2.3.4", "1.2.3.4#2", "1.2.3.4#3", "1.2.3.4#4"]
    assert index.rejects[["path", "code"]].to_numpy().tolist() == [
        [f"{tmp_path / 'a.dcm'}#17", "NOT_ORIGINAL"]
    ]
    usable = index.usable()
    assert usable.slices["frame"].tolist() == list(range(1, 13))
    np.testing.assert_array_equal(pixels(usable), hu[:12])


# --- The rest of the road -------------------------------------------------------------------


def test_a_prediction_is_that_of_single_frames(tmp_path):
    spec = ModelSpec((48, 48, 3), depth=10, width=8)
    run = untrained_run(tmp_path / "run", "narrow", spec)
    expected = predict_folder(run, single_frames(tmp_path / "singles")).slices
    write(tmp_path / "a.dcm", written(enhanced()))
    found = predict_folder(run, tmp_path / "a.dcm", tmp_path / "out").slices
    np.testing.assert_array_equal(found[list(LABELS)], expected[list(LABELS)])
    assert found["path"].tolist() == [f"a.dcm#{number}" for number in range(1, 7)]


@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_frames_in_archives_and_caches(tmp_path, suffix):
    write(tmp_path / "a.dcm", written(enhanced()))
    archive = shutil.make_archive(str(tmp_path / "all"), suffix, tmp_path, "a.dcm")
    index = index_folder(archive)
    caches = [
        build_cache(one, tmp_path / f"cache-{n}", 64, workers=workers)
        for n, (one, workers) in enumerate([(index, 2), (index_folder(tmp_path / "a.dcm"), 0)])
    ]
    assert caches[0].pixels_digest == caches[1].pixels_digest
    np.testing.assert_array_equal(caches[0].slices_hu(range(6)), HU)
    CTCache.open(tmp_path / "cache-0").require(64, index)
    with pytest.raises(RejectedFile, match="BAD_MEMBER|TRUNCATED"):
        source = indexed_slices(index)[0]
        Path(archive).write_bytes(Path(archive).read_bytes()[:9000])
        read_indexed(source, 64)


def test_a_large_member_of_frames_is_read(tmp_path):
    count = 140  # 73 MB; a member that is one slice may have 64 MiB
    frames = [frame_item(n + 1, (-126, -126, n)) for n in range(count)]
    stored = np.zeros((count, 512, 512), np.int16)
    with zipfile.ZipFile(
        tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1
    ) as archive:
        archive.writestr("a.dcm", written(enhanced(stored, frames, stored=stored)))
    index = index_folder(tmp_path / "all.zip", any_body_part=True)
    assert len(index.slices) == count
    assert (read_indexed(indexed_slices(index)[-1], 64).hu == -1024).all()


def test_an_interrupted_indexing_resumes(tmp_path, monkeypatch):
    frames = [frame_item(n + 1, (-126, -126, 5 * n)) for n in range(6)]
    frames[2].PlanePositionSequence[0].ImagePositionPatient = []
    write(tmp_path / "a.dcm", written(enhanced(frames=frames)))
    journal = tmp_path.parent / f"{tmp_path.name}.journal"
    index = index_folder(tmp_path, journal=journal)
    assert index.rejects["path"].tolist() == [f"{tmp_path / 'a.dcm'}#3"]
    assert "(0020,0032) ImagePositionPatient is absent" in index.rejects["detail"][0]
    assert index.series["verdict"].tolist() == ["incomplete,gap"]
    monkeypatch.setattr(walk, "read_headers", None)
    assert index_folder(tmp_path, journal=journal).equals(index)


def test_another_file_in_its_place_is_changed(tmp_path):
    path = write(tmp_path / "a.dcm", written(enhanced()))
    source = indexed_slices(index_folder(path))[2]
    write(path, written(enhanced(SOPInstanceUID="1.2.3.7")))
    with pytest.raises(RejectedFile, match="CHANGED: .*SOPInstanceUID is '1.2.3.7/frames/3'"):
        read_indexed(source, 64)
    frames = [frame_item(n + 1, (-126, -126, 5 * n)) for n in (0, 1, 3, 2, 4, 5)]
    write(path, written(enhanced(frames=frames)))
    with pytest.raises(RejectedFile, match="CHANGED: the position is 15.00 mm; 10.00 mm when"):
        read_indexed(source, 64)
    write(path, written(enhanced(HU[:2])))
    with pytest.raises(RejectedFile, match="CHANGED: the file has no slice 3; it holds 2"):
        read_indexed(source, 64)


def test_copies_and_conflicts(tmp_path):
    write(tmp_path / "a.dcm", written(enhanced()))
    write(tmp_path / "b.dcm", written(enhanced()))
    index = index_folder(tmp_path)
    assert index.rejects["code"].tolist() == ["DUPLICATE_UID"] * 6
    hu = HU.copy()
    hu[4, 30, 30] += 1
    write(tmp_path / "b.dcm", written(enhanced(hu)))
    codes = index_folder(tmp_path).rejects[["path", "code"]].to_numpy().tolist()
    conflicts = [Path(path).name for path, code in codes if code == "UID_CONFLICT"]
    assert conflicts == ["a.dcm#5", "b.dcm#5"]


def test_one_frame_is_asked_for_by_number(tmp_path):
    path = write(tmp_path / "a.dcm", written(enhanced()))
    np.testing.assert_array_equal(read_hu(Frame(path, 4)), HU[3])
    assert read_header(Frame(path, 4)).position == (-126.0, -126.0, 15.0)
    with pytest.raises(RejectedFile, match="MULTIFRAME") as caught:
        read_hu(path)
    assert "Frame(path, number)" in caught.value.hint
    single = single_frames(tmp_path / "single", HU[:1]) / "0.dcm"
    with pytest.raises(RejectedFile, match="the file has no slice 1; it is one slice"):
        read_hu(Frame(single, 1))


# --- Bad input ------------------------------------------------------------------------------


def without(content: bytes, count: int) -> bytes:
    return content[:-count]


def macro(**groups) -> dict:
    return {"shared": shared_item(**groups)}


BAD = {
    "no spacing": (macro(PixelMeasuresSequence=None), "MISSING_TAG", "PixelSpacing is absent"),
    "no plane": (
        macro(PlaneOrientationSequence=None),
        "MISSING_TAG",
        "ImageOrientationPatient is absent",
    ),
    "no rescale": (
        macro(PixelValueTransformationSequence=None),
        "BAD_RESCALE",
        "RescaleSlope is absent",
    ),
    "rescale outside": (
        {**macro(PixelValueTransformationSequence=None), "RescaleSlope": 1, "RescaleIntercept": 0},
        "BAD_RESCALE",
        "RescaleSlope is absent",
    ),
    "another unit": (
        macro(PixelValueTransformationSequence=rescale(1, 0, "MGML")),
        "BAD_RESCALE",
        "RescaleType is 'MGML'",
    ),
    "no groups": (
        {"PerFrameFunctionalGroupsSequence": None},
        "MISSING_TAG",
        "(5200,9230) PerFrameFunctionalGroupsSequence is absent",
    ),
    "empty groups": (
        {"PerFrameFunctionalGroupsSequence": []},
        "BAD_VALUE",
        "NumberOfFrames is 6, and there are 0 groups",
    ),
    "fewer frames": ({"NumberOfFrames": 5}, "BAD_VALUE", "5, and there are more groups"),
    "more frames": ({"NumberOfFrames": 7}, "BAD_VALUE", "7, and there are 6 groups"),
    "fewer pixels": ({"PixelData": bytes(40960)}, "TRUNCATED", "40960 bytes; expected 49152"),
    "more pixels": ({"PixelData": bytes(57344)}, "BAD_VALUE", "expected 49152 bytes for 6 frames"),
    "no number": ({"NumberOfFrames": None}, "MISSING_TAG", "NumberOfFrames is absent"),
    "0 frames": ({"NumberOfFrames": 0}, "BAD_VALUE", "NumberOfFrames is '0'; expected 1 to 4096"),
    "-3 frames": ({"NumberOfFrames": -3}, "BAD_VALUE", "NumberOfFrames is '-3'"),
    "huge": ({"NumberOfFrames": 2147483647}, "TOO_LARGE", "2147483647; expected at most 4096"),
    "huge pixels": (
        {
            "frames": [frame_item(n, (0, 0, n)) for n in range(40)],
            "NumberOfFrames": 40,
            "Rows": 4096,
            "Columns": 4096,
        },
        "TOO_LARGE",
        "40 frames of 4096 x 4096 have 1342177280 bytes",
    ),
    "no pixels": ({"PixelData": None}, "MISSING_TAG", "PixelData is absent"),
    "MR": ({"Modality": "MR"}, "NOT_CT", "Modality is 'MR'"),
    "colours": ({"SamplesPerPixel": 3}, "UNSUPPORTED_PIXELS", "SamplesPerPixel is 3"),
    "no UID": ({"SOPInstanceUID": None}, "MISSING_TAG", "SOPInstanceUID is absent"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_used_is_one_reject(tmp_path, name):
    asked, code, detail = BAD[name]
    with pydicom.config.disable_value_validation():
        content = written(enhanced(**asked))
    path = write(tmp_path / "a.dcm", content)
    with pytest.raises(NothingUsable) as caught:
        index_folder(path)
    (row,) = caught.value.rejects.itertuples()
    assert (row.path, row.code) == (str(path), code)
    assert detail in row.detail
    assert row.series_instance_uid == "1.2.3.4"


@pytest.mark.parametrize("where", ["pixels", "groups"])
def test_a_file_that_was_cut(tmp_path, where):
    content = written(enhanced())
    kept = len(content) - 100 if where == "pixels" else len(content) - 6 * 64 * 64 * 2 - 500
    path = write(tmp_path / "a.dcm", content[:kept])
    with pytest.raises(NothingUsable, match="TRUNCATED 1"):
        index_folder(path)


def test_a_slice_that_shows_no_hu_is_one_reject(tmp_path):
    hu = HU.copy()
    hu[1] = np.where(np.arange(64) % 2, 1200, 900)
    index = index_folder(write(tmp_path / "a.dcm", written(enhanced(hu))))
    cache = build_cache(index, tmp_path / "cache", 64)
    assert cache.rejects[["path", "code"]].to_numpy().tolist() == [
        [f"{tmp_path / 'a.dcm'}#2", "IMPLAUSIBLE_HU"]
    ]


def test_offset_tables_must_point_to_fragments(tmp_path):
    coded = [bytes([n]) * 200 for n in range(6)]
    content = encapsulated(enhanced(), coded, RLELossless)
    start = content.index(b"\xe0\x7f\x10\x00OB") + 12 + 8
    for place, value, told in ((4, 1, "does not point"), (0, 8, "does not point")):
        damaged = bytearray(content)
        damaged[start + place] = value
        with pytest.raises(NothingUsable, match=told):
            index_folder(write(tmp_path / "a.dcm", bytes(damaged)))
    with pytest.raises(NothingUsable, match="an offset table of 20 bytes; expected 4 for each"):
        fewer = encapsulated(enhanced(), coded[:5], RLELossless)
        index_folder(write(tmp_path / "a.dcm", fewer))


def test_many_frames_and_nested_groups_are_bounded(tmp_path):
    """A long scan is read in no time; groups that are stuffed are refused in no time."""
    count = 600
    frames = [frame_item(n + 1, (-4, -4, 0.5 * n)) for n in range(count)]
    stored = np.zeros((count, 16, 16), int)
    content = undefined_lengths(enhanced(stored, frames, stored=stored))
    path = write(tmp_path / "long.dcm", written(content))
    began = time.monotonic()
    assert len(read_headers(str(path))) == count
    for number in range(1, count + 1):
        read_header(Frame(str(path), number))
    assert time.monotonic() - began < 30
    stuffed = item(FrameContentSequence=[item(StackID="1") for _ in range(30_000)])
    dataset = enhanced(HU[:1], [frame_item(1, (0, 0, 0)), stuffed], NumberOfFrames=1)
    dataset.PerFrameFunctionalGroupsSequence = [stuffed]
    path = write(tmp_path / "stuffed.dcm", written(dataset))
    tracemalloc.start()
    with pytest.raises(RejectedFile, match="functional groups holds over 2000 elements"):
        read_headers(str(path))
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


CONTENT = written(enhanced(HU[:3, ::4, ::4]))
UNDEFINED = written(undefined_lengths(enhanced(HU[:3, ::4, ::4])))


@settings(max_examples=200)
@given(
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 4500), st.binary(min_size=1, max_size=4)), max_size=3),
    st.integers(0, 2**12),
)
def test_no_bytes_are_a_surprise(tmp_path_factory, is_undefined, changes, cut):
    content = bytearray(UNDEFINED if is_undefined else CONTENT)
    for place, found in changes:
        place %= len(content) - 4
        content[place : place + len(found)] = found
    path = tmp_path_factory.getbasetemp() / "fuzz.dcm"
    path.write_bytes(content[: len(content) - cut] if cut % 2 else content)
    try:
        headers = read_headers(str(path), any_image_type=True)
    except RejectedFile:
        return
    for number, header in headers.items():
        if not isinstance(header, RejectedFile) and number:
            assert header.sop_instance_uid.endswith(f"/frames/{number}")
