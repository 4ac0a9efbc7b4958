import csv
import dataclasses
import io
import os
import random
import re
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from tiny_dicom import encapsulated_file, tiny_dataset, tiny_file, tiny_values, to_bytes

from ich_keras.ct import encoding, pixels
from ich_keras.ct.dicom import read_header, read_hu, read_slice
from ich_keras.ct.rejects import REJECT_CODES, RejectedFile
from ich_keras.ct.window import BRAIN

IMPLICIT = "1.2.840.10008.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"


def refused(content, force=False):
    """Read what must be refused, by header and pixels; return the error."""
    source = io.BytesIO(content) if isinstance(content, bytes) else content
    with pytest.raises(RejectedFile) as caught:
        read_hu(source, force=force)
    error = caught.value
    assert error.code in REJECT_CODES
    assert error.hint
    assert "\n" not in str(error)
    return error


# --- Hounsfield units -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "tags", "expected"),
    [
        # RSNA's four encodings; by hand: slope * stored + intercept.
        ([[-2000, 0], [24, 3095]], {}, [[-3024, -1024], [-1000, 2071]]),
        (
            [[0, 24], [1064, 4095]],
            {"BitsStored": 12, "PixelRepresentation": 0},
            [[-1024, -1000], [40, 3071]],
        ),
        (
            [[-1000, -1], [0, 2047]],
            {"BitsStored": 12, "PixelRepresentation": 1, "RescaleIntercept": 0},
            [[-1000, -1], [0, 2047]],
        ),
        (
            [[0, 1000], [1040, 4095]],
            {"BitsStored": 12, "PixelRepresentation": 0, "RescaleIntercept": -1000},
            [[-1000, 0], [40, 3095]],
        ),
        # 12 bits without their sign in the four unused ones: 0xC18 is -1000.
        (
            [[0x0C18, 0x0FFF], [0x0000, 0x07FF]],
            {"BitsStored": 12, "RescaleIntercept": 0},
            [[-1000, -1], [0, 2047]],
        ),
        # Unused bits that hold something else, as overlays once did.
        (
            [[0xF028, 0x1000], [0x8FFF, 24]],
            {"BitsStored": 12, "PixelRepresentation": 0},
            [[40 - 1024, -1024], [3071, -1000]],
        ),
        # 16 bits unsigned, above 32767 too.
        (
            [[0, 32768], [33791, 24]],
            {"PixelRepresentation": 0},
            [[-1024, 31744], [32767, -1000]],
        ),
        # To the nearest integer, half to even: 0.5 -> 0, 1.5 -> 2, 100.5 -> 100; -0.75 -> -1.
        (
            [[1, 3], [-1, 201]],
            {"RescaleSlope": "0.5", "RescaleIntercept": "0"},
            [[0, 2], [0, 100]],
        ),
        (
            [[1, 3], [-1, 400]],
            {"RescaleSlope": "0.25", "RescaleIntercept": "-0.5"},
            [[0, 0], [-1, 100]],
        ),
        ([[1, 2], [3, 4]], {"RescaleIntercept": "-1024.4"}, [[-1023, -1022], [-1021, -1020]]),
    ],
)
def test_hu_by_hand(stored, tags, expected):
    result = read_slice(io.BytesIO(tiny_file(stored, **tags)))
    assert result.hu.dtype == np.int16
    assert result.hu.flags.writeable
    assert result.repaired is False
    np.testing.assert_array_equal(result.hu, expected)


@settings(max_examples=60)
@given(
    bits=st.sampled_from([8, 10, 12, 13, 16]),
    signed=st.booleans(),
    intercept=st.sampled_from([-1024, -1000, -8192, 0]),
    syntax=st.sampled_from([IMPLICIT, EXPLICIT]),
    seed=st.integers(0, 1000),
)
def test_native_values_are_those_of_pydicom(bits, signed, intercept, syntax, seed):
    raw = tiny_values(seed, 0, 65536)
    content = tiny_file(
        raw,
        syntax,
        BitsStored=bits,
        PixelRepresentation=int(signed),
        RescaleIntercept=intercept,
    )
    stored = pydicom.dcmread(io.BytesIO(content)).pixel_array.astype(int)
    expected = stored + intercept
    expected[(stored == -32768) & (expected < -32768)] = -1024
    if expected.max() > 32767 or expected.min() < -32768:
        assert refused(content).code == "BAD_RESCALE"
    elif not read_slice(io.BytesIO(content)).repaired:
        np.testing.assert_array_equal(read_hu(io.BytesIO(content)), expected)


def test_big_endian():
    values = tiny_values()
    dataset = tiny_dataset(values)
    dataset.PixelData = values.astype(">i2").tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = to_bytes(dataset, BIG_ENDIAN)
    np.testing.assert_array_equal(read_hu(io.BytesIO(content)), values - 1024)


@pytest.mark.parametrize("compression", [RLELossless, JPEGLSLossless])
def test_compressed_is_the_same(compression):
    if not get_decoder(compression).is_available:
        pytest.skip("the codecs extra is not installed")
    values = tiny_values(side=32)
    content = tiny_file(values, compress=compression)
    np.testing.assert_array_equal(read_hu(io.BytesIO(content)), values - 1024)


def test_a_real_head_in_jpeg_2000():
    if not get_decoder(JPEG2000Lossless).is_available:
        pytest.skip("the codecs extra is not installed")
    path = get_testdata_file("693_J2KR.dcm", download=False)
    dataset = pydicom.dcmread(path)
    stored = dataset.pixel_array
    expected = stored * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    is_padding = stored == dataset.PixelPaddingValue  # the corners, at -3024 HU
    assert 0.2 < is_padding.mean() < 0.22
    np.testing.assert_array_equal(read_hu(path), np.where(is_padding, -1024, expected))


def test_real_slices_have_the_hu_computed_elsewhere(real_rsna_slices):
    with open(real_rsna_slices / "facts_and_labels.csv", newline="") as stream:
        facts = list(csv.DictReader(stream))
    assert len(facts) == 3
    for fact in facts:
        result = read_slice(real_rsna_slices / f"{fact['Image']}.dcm")
        hu = result.hu
        assert not result.repaired
        assert (hu.min(), hu.max()) == (float(fact["HU_min"]), float(fact["HU_max"]))
        assert round(float(hu.mean()), 4) == float(fact["HU_mean"])
        mean = float(BRAIN(hu).astype(float).mean())
        assert abs(mean - float(fact["brainwin40_80_mean"])) < 1e-6
        header = read_header(real_rsna_slices / f"{fact['Image']}.dcm")
        assert header.patient_id == fact["PatientID"]
        assert header.position == (float(fact["x"]), float(fact["y"]), float(fact["z"]))


def test_the_invalid_uids_of_rsna_bring_no_warning():
    with pytest.warns(UserWarning, match="Invalid value for VR UI"):
        content = tiny_file(SOPInstanceUID="ID_000012eaf")
    header = read_header(io.BytesIO(content))  # a warning would be an error here
    assert header.sop_instance_uid == "ID_000012eaf"


# --- The 12-bit repair ----------------------------------------------------------------------


def wrapped_head(side=64):
    """HU of a disc of brain in air, with -1000 and 3095 in it; int (side, side)."""
    rows, columns = np.mgrid[:side, :side] - side / 2
    hu = np.where(np.hypot(rows, columns) < side / 3, 40, -990)
    hu[0, :4] = (-1000, -1, 0, 3095)
    return hu


@pytest.mark.parametrize("intercept", [0, 1, -99])
def test_wrapped_air_is_unwrapped(intercept):
    hu = wrapped_head()
    content = tiny_file(hu % 4096, BitsStored=12, PixelRepresentation=0, RescaleIntercept=intercept)
    result = read_slice(io.BytesIO(content))
    assert result.repaired is True
    np.testing.assert_array_equal(result.hu, hu)


def test_genuine_metal_is_left_alone():
    # Air was clipped to 0, and a clip of 3500 HU lies in the head: no air at 3096 to 3596.
    hu = np.maximum(wrapped_head(), 0)
    hu[30:36, 30:36] = 3500
    content = tiny_file(hu, BitsStored=12, PixelRepresentation=0, RescaleIntercept=0)
    result = read_slice(io.BytesIO(content))
    assert result.repaired is False
    np.testing.assert_array_equal(result.hu, hu)


@pytest.mark.parametrize(
    "tags",
    [
        {"BitsStored": 12, "PixelRepresentation": 0, "RescaleIntercept": -100},
        {"BitsStored": 16, "PixelRepresentation": 0, "RescaleIntercept": 0},
        {"BitsStored": 13, "PixelRepresentation": 1, "RescaleIntercept": 0},
    ],
)
def test_other_encodings_are_never_unwrapped(tags):
    # Air at over 2900 HU is what is left, and that is refused.
    error = refused(tiny_file(wrapped_head() % 4096, **tags))
    air = 4096 - 990 + tags["RescaleIntercept"]
    assert error.code == "IMPLAUSIBLE_HU"
    assert re.search(r"\d+% of the slice lie around (\d+) HU", error.detail)
    assert abs(int(re.search(r"around (\d+) HU", error.detail)[1]) - air) <= 50


# --- No DICOM, or not all of it -------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (random.Random(0).randbytes(5000), "no 'DICM' behind a preamble"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20, "no 'DICM'"),
        (b"ID,Label\nID_1_any,0\n", "no 'DICM'"),
        (b"\x89PNG\r\n\x1a\n" + bytes(500), "no 'DICM'"),
        (bytes(5000), "no 'DICM'"),
    ],
)
def test_not_dicom(content, message):
    error = refused(content)
    assert error.code == "NOT_DICOM"
    assert message in error.detail


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
def test_without_preamble_only_by_force(syntax):
    content = tiny_file(syntax=syntax)
    without = content[132:]
    assert refused(without).code == "NOT_DICOM"
    expected = read_hu(io.BytesIO(content))
    np.testing.assert_array_equal(read_hu(io.BytesIO(without), force=True), expected)
    start = without.index(b"\x08\x00\x16\x00")  # the data set, without file meta information
    bare = without[start:]
    np.testing.assert_array_equal(read_hu(io.BytesIO(bare), force=True), expected)


def test_no_transfer_syntax():
    content = tiny_file().replace(b"\x02\x00\x10\x00UI", b"\x02\x00\x11\x00UI")
    assert "(0002,0010) TransferSyntaxUID is absent" in refused(content).detail
    assert read_hu(io.BytesIO(content), force=True).shape == (16, 16)


@pytest.mark.parametrize("compression", [None, RLELossless])
def test_every_cut_is_refused(compression):
    content = tiny_file(compress=compression, StudyDescription="stepped over, not read")
    codes = {length: refused(content[:length]).code for length in range(len(content))}
    assert codes[0] == "NOT_DICOM"
    for length in (100, 131, 200, len(content) // 2, len(content) - 2, len(content) - 1):
        assert codes[length] == "TRUNCATED", length
    # Between two elements the rest looks as if it never was.
    others = {length for length, code in codes.items() if code != "TRUNCATED"} - {0}
    assert {codes[length] for length in others} <= {"MISSING_TAG", "BAD_RESCALE"}
    assert len(others) < len(pydicom.dcmread(io.BytesIO(content)))


def test_a_header_cut_off_is_noticed_without_the_pixels():
    content = tiny_file()
    with pytest.raises(RejectedFile, match=r"\(7fe0,0010\) PixelData has 510 bytes; expected 512"):
        read_header(io.BytesIO(content[:-2]))


def test_trailing_junk_is_read():
    content = tiny_file()
    expected = read_hu(io.BytesIO(content))
    junk = content + random.Random(1).randbytes(1000)
    np.testing.assert_array_equal(read_hu(io.BytesIO(junk)), expected)


def test_pixel_data_shorter_or_much_longer_than_the_matrix():
    assert refused(tiny_file(PixelData=bytes(510))).code == "TRUNCATED"
    assert refused(tiny_file(PixelData=bytes(1024))).code == "BAD_VALUE"
    padded = tiny_values().astype("<i2").tobytes() + b"\x01\x02"
    assert read_hu(io.BytesIO(tiny_file(PixelData=padded))).shape == (16, 16)


def test_unreadable_paths(tmp_path):
    error = refused(tmp_path / "absent.dcm")
    assert (error.code, "No such file" in error.detail) == ("UNREADABLE", True)
    assert refused(tmp_path).code == "UNREADABLE"


def test_paths_and_files_read_alike(tmp_path):
    path = tmp_path / "slice.dcm"
    path.write_bytes(tiny_file())
    expected = read_hu(str(path))
    np.testing.assert_array_equal(read_hu(path), expected)
    with open(path, "rb") as stream:
        stream.seek(77)
        np.testing.assert_array_equal(read_hu(stream), expected)


# --- Zeros where pixels should be -----------------------------------------------------------


def head_above_clipped_air(side=64):
    """Stored values (0 is -1024 HU) of a disc whose lower half-plane is air; (side, side)."""
    rows, columns = np.mgrid[:side, :side]
    disc = np.hypot(rows - side / 4, columns - side / 2) < side / 5
    return np.where(disc, 1064, 0)


@pytest.mark.parametrize(
    ("stored", "tags", "accepted"),
    [
        # 0 is water or tissue: never half an image.
        ("noise", {"RescaleIntercept": 0}, False),
        ("blank", {"RescaleIntercept": 0}, False),
        # 0 is air, but the scanner's background is not exactly 0.
        ("noise", {}, False),
        ("noisy air", {}, False),
        # 0 is air and the background: a head that ends before the middle, and air alone.
        ("head", {}, True),
        ("blank", {}, True),
        ("head", {"BitsStored": 12, "PixelRepresentation": 0}, True),
        # The same background, but the head is cut in a straight line.
        ("cut head", {}, False),
        ("cut head", {"BitsStored": 12, "PixelRepresentation": 0}, False),
    ],
)
def test_zero_tail(stored, tags, accepted):
    side = 64
    image = {
        "noise": tiny_values(low=1, side=side),
        "noisy air": np.maximum(head_above_clipped_air(side), tiny_values(1, 1, 60, side)),
        "blank": np.zeros((side, side), int),
        "head": head_above_clipped_air(side),
        "cut head": np.roll(head_above_clipped_air(side), side // 4, axis=0),
    }[stored]
    image[side // 2 :] = 0
    content = tiny_file(image, **tags)
    if accepted:
        assert read_hu(io.BytesIO(content)).shape == (side, side)
        return
    error = refused(content)
    assert error.code == "ZERO_TAIL"
    assert re.search(r"the last \d+ of 4096 values are 0", error.detail)


@pytest.mark.parametrize("intercept", [-1024, 0])
@pytest.mark.parametrize("share", [0.08, 0.2, 0.45])
def test_zeros_from_anywhere_in_a_head_are_noticed(share, intercept):
    side = 64
    rows, columns = np.mgrid[:side, :side] - side / 2
    head = np.where(np.hypot(rows, columns) < 0.45 * side, 1064, 0)
    if intercept == 0:
        head = head + np.where(head == 0, -1000, -1024)  # as signed HU
    tags = {"RescaleIntercept": intercept, "PixelRepresentation": 1}
    band = side - round(share * side)
    whole, banded, cut = head.copy(), head.copy(), head.copy()
    banded[band:] = 0
    cut.reshape(-1)[band * side + side // 2 :] = 0
    assert read_hu(io.BytesIO(tiny_file(whole, **tags))).shape == (side, side)
    assert refused(tiny_file(cut, **tags)).code == "ZERO_TAIL"
    # A band at the border, as of an image that was made square.
    assert read_hu(io.BytesIO(tiny_file(banded, **tags))).shape == (side, side)


# --- Tags -----------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize(
    "keyword",
    [
        "Rows",
        "Columns",
        "BitsAllocated",
        "BitsStored",
        "PixelRepresentation",
        "SamplesPerPixel",
        "PhotometricInterpretation",
        "SOPInstanceUID",
        "SeriesInstanceUID",
        "StudyInstanceUID",
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "PixelData",
    ],
)
def test_missing_tag(keyword, empty):
    dataset = tiny_dataset()
    if empty and keyword != "PixelData":
        dataset[keyword].value = None
    else:
        del dataset[keyword]
    error = refused(to_bytes(dataset))
    assert error.code == "MISSING_TAG"
    tag = pydicom.datadict.tag_for_keyword(keyword)
    assert f"({tag >> 16:04x},{tag & 0xFFFF:04x}) {keyword} is absent" in error.detail


@pytest.mark.parametrize("keyword", ["PatientID", "SOPClassUID", "ImageType", "HighBit"])
def test_tags_that_may_be_absent(keyword):
    header = read_header(io.BytesIO(tiny_file(**{keyword: None})))
    assert header.patient_id == ("" if keyword == "PatientID" else "patient-1")


def test_without_modality_the_class_decides():
    assert read_header(io.BytesIO(tiny_file(Modality=None))).sop_instance_uid == "1.2.3.1"
    dataset = tiny_dataset(Modality=None, SOPClassUID=None)
    content = to_bytes(dataset).replace(b"1.2.840.10008.5.1.4.1.1.2\0", b" " * 26)
    assert "(0008,0060) Modality is absent" in refused(content).detail


@pytest.mark.parametrize(
    ("slope", "intercept", "message"),
    [
        (None, "-1024", r"(0028,1053) RescaleSlope is absent"),
        ("", "-1024", r"RescaleSlope is absent or empty"),
        ("0", "-1024", "RescaleSlope is '0'; expected one number from 0.01 to 100"),
        ("-1", "-1024", "RescaleSlope is '-1'"),
        ("nan", "-1024", "RescaleSlope is 'nan'"),
        ("inf", "-1024", "RescaleSlope is 'inf'"),
        ("abc", "-1024", "RescaleSlope is 'abc'"),
        ("1,0", "-1024", "RescaleSlope is '1,0'"),
        ("1\\2", "-1024", "RescaleSlope is '1\\\\2'"),
        ("1e30", "-1024", "RescaleSlope is '1e30'"),
        ("1e-30", "-1024", "RescaleSlope is '1e-30'"),
        ("1e400", "-1024", "RescaleSlope is '1e400'"),
        ("1", None, "(0028,1052) RescaleIntercept is absent"),
        ("1", "nan", "RescaleIntercept is 'nan'"),
        ("1", "-1e9", "RescaleIntercept is '-1e9'; expected one number from -32768 to 32767"),
        ("100", "0", "give 0 to 299900 HU; expected -32768 to 32767"),
    ],
)
def test_bad_rescale(slope, intercept, message):
    values = tiny_values()
    values[0, :2] = (0, 2999)
    dataset = tiny_dataset(values, RescaleSlope=None, RescaleIntercept=None)
    for keyword, text in (("RescaleSlope", slope), ("RescaleIntercept", intercept)):
        if text is not None:  # past pydicom's own checks
            dataset.add(raw_text(keyword, text))
    error = refused(to_bytes(dataset))
    assert error.code == "BAD_RESCALE"
    assert message in error.detail


def test_the_filling_around_the_field_of_view_is_air():
    values = tiny_values().astype(np.int16)
    values[0, :5] = -32768
    settings = {"BitsStored": 16, "PixelRepresentation": 1, "RescaleIntercept": -1024}
    content = tiny_file(values.view(np.uint16), EXPLICIT, **settings)
    hu = read_hu(io.BytesIO(content))
    assert (hu[0, :5] == -1024).all()
    np.testing.assert_array_equal(hu[1:], values[1:] - 1024)
    # One more is a value like any other, and does not fit.
    values[0, 0] = -32767
    content = tiny_file(values.view(np.uint16), EXPLICIT, **settings)
    assert "give -33791 to" in refused(content).detail


def raw_text(keyword, text):
    """An element with any text in it: pydicom does not check VR LT."""
    return pydicom.DataElement(pydicom.datadict.tag_for_keyword(keyword), "LT", text)


def test_another_unit_than_hu():
    assert "RescaleType is 'MGML'" in refused(tiny_file(RescaleType="MGML")).detail
    assert read_hu(io.BytesIO(tiny_file(RescaleType="HU"))).shape == (16, 16)


@pytest.mark.parametrize(
    ("tags", "code", "message"),
    [
        ({"PhotometricInterpretation": "MONOCHROME1"}, "UNSUPPORTED_PIXELS", "is 'MONOCHROME1'"),
        ({"SamplesPerPixel": 3}, "UNSUPPORTED_PIXELS", "SamplesPerPixel is 3; expected 1"),
        ({"BitsAllocated": 8, "BitsStored": 8}, "UNSUPPORTED_PIXELS", "BitsAllocated is 8"),
        ({"BitsAllocated": 32}, "UNSUPPORTED_PIXELS", "BitsAllocated is 32; expected 16"),
        ({"HighBit": 11}, "UNSUPPORTED_PIXELS", "HighBit is 11; expected 15"),
        ({"PixelRepresentation": 2}, "BAD_VALUE", "PixelRepresentation is 2"),
        ({"BitsStored": 17}, "BAD_VALUE", "BitsStored is 17"),
        ({"Rows": 0}, "BAD_VALUE", "(0028,0010) Rows is 0"),
        ({"Rows": 65535, "Columns": 65535}, "TOO_LARGE", "Rows is 65535; expected at most 4096"),
        ({"Columns": 4097}, "TOO_LARGE", "(0028,0011) Columns is 4097"),
        ({"Rows": 4096, "Columns": 4096}, "TRUNCATED", "has 512 bytes; expected 33554432"),
        ({"PixelSpacing": [0.5, 0]}, "BAD_VALUE", "two numbers, 0.02 or more, in mm"),
        ({"PixelSpacing": [0.0005, 0.0005]}, "BAD_VALUE", "two numbers, 0.02 or more, in mm"),
        ({"PixelSpacing": [0.5]}, "BAD_VALUE", "PixelSpacing is '0.5'; expected 2 numbers"),
        ({"PixelSpacing": [0.5, 1e9]}, "BAD_VALUE", "none beyond 100"),
        ({"ImagePositionPatient": [0, 0]}, "BAD_VALUE", "expected 3 numbers"),
        ({"ImagePositionPatient": [0, 0, 1e30]}, "BAD_VALUE", "none beyond 100000"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "BAD_VALUE", "perpendicular unit"),
        ({"ImageOrientationPatient": [0] * 6}, "BAD_VALUE", "perpendicular unit"),
        ({"ImageOrientationPatient": [0.9, 0, 0, 0, 1, 0]}, "BAD_VALUE", "perpendicular unit"),
        ({"NumberOfFrames": 2}, "MULTIFRAME", "NumberOfFrames is '2'; expected 1"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2.1"}, "MULTIFRAME", "enhanced CT"),
        ({"Modality": "MR"}, "NOT_CT", "(0008,0060) Modality is 'MR'; expected CT"),
        # MR, secondary capture, radiation dose report, DICOMDIR.
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}, "NOT_CT", "(0008,0016) SOPClassUID is"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "NOT_CT", "expected"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.67"}, "NOT_CT", "expected"),
        ({"SOPClassUID": "1.2.840.10008.1.3.10"}, "NOT_CT", "expected"),
        ({"ImageType": ["DERIVED", "SECONDARY", "MPR"]}, "NOT_ORIGINAL", "(0008,0008) ImageType"),
        ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL", "REFORMATTED"]}, "NOT_ORIGINAL", "DERIVED"),
        ({"SeriesInstanceUID": "ID#2"}, "BAD_VALUE", "SeriesInstanceUID is 'ID#2'"),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_refused_by_a_tag(tags, code, message):
    error = refused(tiny_file(**tags))
    assert error.code == code
    assert message in error.detail


def test_a_dose_report_is_not_missed_for_its_rows():
    report = Dataset()
    report.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.67"
    report.SOPInstanceUID = "1.2.3"
    report.Modality = "SR"
    assert refused(to_bytes(report)).code == "NOT_CT"


@pytest.mark.parametrize(
    "image_type",
    [["ORIGINAL", "PRIMARY", "AXIAL"], ["DERIVED", "PRIMARY", "AXIAL"], ["ORIGINAL", "PRIMARY"]],
)
def test_acquired_images_pass(image_type):
    assert not read_header(io.BytesIO(tiny_file(ImageType=image_type))).is_localizer


def test_localizer_is_said():
    content = tiny_file(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    assert read_header(io.BytesIO(content)).is_localizer


@pytest.mark.parametrize(("keyword", "num_bytes"), [("Float", 4), ("DoubleFloat", 8)])
def test_float_pixels(keyword, num_bytes):
    dataset = tiny_dataset(PixelData=None)
    setattr(dataset, f"{keyword}PixelData", bytes(16 * 16 * num_bytes))
    error = refused(to_bytes(dataset))
    assert (error.code, "floating-point" in error.detail) == ("UNSUPPORTED_PIXELS", True)


def test_uids_with_odd_characters():
    content = tiny_file(StudyInstanceUID="1.2.3.4.5")
    assert read_header(
        io.BytesIO(content.replace(b"1.2.3.4.5", b"../../xyz"))
    ).study_instance_uid == ("../../xyz")
    error = refused(content.replace(b"1.2.3.4.5", b"1.2\x003.4.5"))
    assert (error.code, r"'1.2\x003.4.5'" in error.detail) == ("BAD_VALUE", True)


@pytest.mark.parametrize("text", ["Müller^17", "مريض"])
def test_patient_ids_of_other_alphabets(text):
    content = tiny_file(SpecificCharacterSet="ISO_IR 192", PatientID=text)
    assert read_header(io.BytesIO(content)).patient_id == text


@pytest.mark.filterwarnings("ignore:.*exceeds the maximum")
def test_a_name_of_a_megabyte():
    long = "CANARY " * 150_000
    dataset = tiny_dataset(PatientName=long, PatientComments=long)
    header = read_header(io.BytesIO(to_bytes(dataset, IMPLICIT)))  # explicit lengths have 16 bits
    assert "CANARY" not in repr(header)
    error = refused(to_bytes(tiny_dataset(PatientID=long), IMPLICIT))
    assert error.code == "BAD_VALUE"
    assert len(str(error)) < 500 and "CANARY" not in str(error)


def test_no_message_holds_the_patient():
    canary = "CANARY^NAME"
    content = tiny_file(PatientName=canary, PatientID="CANARY-ID\n", Rows=0)
    error = refused(content)
    assert "CANARY" not in str(error)
    fields = dataclasses.asdict(
        read_header(io.BytesIO(tiny_file(PatientName=canary, PatientID="1")))
    )
    assert "CANARY" not in repr(fields)


def test_sequences_in_front_of_the_pixels():
    item = tiny_dataset()  # with tags and pixels of its own
    item.Rows = 3
    dataset = tiny_dataset()
    dataset.ReferencedImageSequence = [item, item]
    for undefined in (False, True):
        dataset["ReferencedImageSequence"].is_undefined_length = undefined
        for syntax in (EXPLICIT, IMPLICIT):
            assert read_hu(io.BytesIO(to_bytes(dataset, syntax))).shape == (16, 16)


def test_endless_sequences_are_refused():
    content = tiny_file()
    start = content.index(b"\x28\x00\x02\x00")
    nested = b"\x20\x00\x99\x99SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 3000
    assert refused(content[:start] + nested + content[start:]).code in ("BAD_VALUE", "TRUNCATED")


# --- Compression ----------------------------------------------------------------------------


def test_deflated_is_refused_before_it_is_inflated():
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = bomb.compress(bytes(100 << 20)) + bomb.flush()
    content = tiny_file()
    start = content.index(b"\x08\x00\x16\x00")
    meta = content[:start].replace(EXPLICIT.encode() + b"\0", DEFLATED.encode())
    meta = meta.replace(
        b"\x02\x00\x10\x00UI\x14\x00", b"\x02\x00\x10\x00UI\x16\x00"
    )  # two bytes longer
    tracemalloc.start()
    error = refused(meta + packed)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert error.code == "NO_DECODER"
    assert DEFLATED in error.detail and "dcmconv" in error.hint
    assert peak < 10 << 20


def test_jpeg_lossless_without_codecs_names_the_extra(monkeypatch):
    without = SimpleNamespace(is_available=False, UID=JPEGLosslessSV1)
    monkeypatch.setattr(encoding, "get_decoder", lambda uid: without)
    error = refused(encapsulated_file(b"\xff\xd8\xff\xd9", JPEGLosslessSV1))
    assert error.code == "NO_DECODER"
    assert "pip install 'ich_keras[codecs]'" in error.hint


def test_unknown_transfer_syntax():
    error = refused(encapsulated_file(b"1234", "1.2.840.10008.1.2.4.100"))  # MPEG2 video
    assert error.code == "NO_DECODER"


@pytest.mark.parametrize(
    "codestream",
    [
        b"not a JPEG",
        b"\0\0",
        b"\xff\xd8\xff\xe0\xff\xff",
        b"\xff\x4f\xff\x51" + bytes(9),
    ],
    ids=["text", "zeros", "JPEG", "JPEG 2000"],
)
def test_garbage_codestream(codestream):
    if not get_decoder(JPEGLSLossless).is_available:
        pytest.skip("the codecs extra is not installed")
    assert refused(encapsulated_file(codestream, JPEGLSLossless)).code == "DECODE_ERROR"
    assert refused(encapsulated_file(codestream, RLELossless)).code == "DECODE_ERROR"


def jpeg_ls(rows, columns, components=1):
    frame = struct.pack(">HBHHB", 11, 16, rows, columns, components) + b"\x01\x11\x00"
    return b"\xff\xd8\xff\xf7" + frame + bytes(40)


def jpeg_2000(rows, columns, components=1):
    size = struct.pack(">HH8IH", 41, 0, columns, rows, 0, 0, columns, rows, 0, 0, components)
    return b"\xff\x4f\xff\x51" + size + b"\x0f\x01\x01" + bytes(40)


@pytest.mark.parametrize(
    ("codestream", "syntax"),
    [
        (jpeg_ls(60000, 60000), JPEGLSLossless),
        (jpeg_ls(16, 16, 3), JPEGLSLossless),
        (jpeg_2000(60000, 60000), JPEG2000Lossless),
        (jpeg_2000(16, 16, 16384), JPEG2000Lossless),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + jpeg_2000(16, 60000), JPEG2000Lossless),
    ],
    ids=["JPEG-LS", "JPEG-LS in colour", "JPEG 2000", "JPEG 2000 in colour", "JPEG 2000 in a box"],
)
def test_a_bomb_inside_the_codestream_is_not_decoded(codestream, syntax, monkeypatch):
    if not get_decoder(syntax).is_available:
        pytest.skip("the codecs extra is not installed")
    monkeypatch.setattr(pixels, "decode", lambda *_: pytest.fail("was decoded"))
    error = refused(encapsulated_file(codestream, syntax))
    assert error.code == "DECODE_ERROR"
    assert "expected 16 x 16 x 1" in error.detail


def test_rle_bomb_by_the_header():
    content = encapsulated_file(bytes(100), RLELossless, Rows=8000, Columns=8000)
    assert refused(content).code == "TOO_LARGE"


@pytest.mark.parametrize("rows", [17, 4096])
def test_an_rle_stream_that_unpacks_to_more_than_its_matrix(rows):
    stored = np.zeros((rows, 16), int)
    stored[::2] = 1064
    dataset = tiny_dataset(stored)
    to_bytes(dataset, compress=RLELossless)
    stream = next(generate_frames(dataset.PixelData, number_of_frames=1))
    error = refused(encapsulated_file(stream, RLELossless))
    assert error.code == "DECODE_ERROR"
    assert f"padding - {rows * 16} vs. 256 bytes expected" in error.detail


def test_a_huge_matrix_is_refused_by_its_header_alone(tmp_path):
    path = tmp_path / "a.dcm"
    path.write_bytes(tiny_file(Rows=65535, Columns=65535, PixelData=bytes(8192)))
    began = time.perf_counter()
    tracemalloc.start()
    assert refused(path).code == "TOO_LARGE"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert time.perf_counter() - began < 2  # a millisecond on an idle core


def test_more_compressed_bytes_than_pixels():
    content = encapsulated_file(bytes(2 << 20), RLELossless)
    assert refused(content).code == "TOO_LARGE"


def test_native_pixels_under_a_compressed_syntax():
    content = tiny_file()
    meta_end = content.index(b"\x08\x00\x16\x00")
    rle = content[:meta_end].replace(EXPLICIT.encode() + b"\0", RLELossless.encode() + b"\0")
    assert refused(rle + content[meta_end:]).code == "DECODE_ERROR"


# --- Whatever comes -------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, RLELossless, JPEGLSLossless])
def test_broken_bytes_are_read_or_refused(compression):
    if compression and not get_decoder(compression).is_available:
        pytest.skip("the codecs extra is not installed")
    content = tiny_file(compress=compression)
    rng = random.Random(2)
    for _ in range(400):
        broken = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(128, len(broken))] = rng.choice((0, 255, rng.randrange(256)))
        if rng.random() < 0.2:
            del broken[rng.randrange(132, len(broken)) :]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                hu = read_hu(io.BytesIO(bytes(broken)))
            except RejectedFile as error:
                assert error.code in REJECT_CODES
            else:
                assert hu.dtype == np.int16 and hu.ndim == 2


def test_importing_needs_no_keras():
    code = (
        "import sys, ich_keras.ct.dicom, ich_keras.ct.series, ich_keras.ct.window;"
        "sys.exit(bool({'keras', 'torch', 'albumentations'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )
