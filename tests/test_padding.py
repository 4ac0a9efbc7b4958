"""Declared padding becomes air, and nothing else does."""

import io

import numpy as np
import pydicom
import pytest
from pydicom.dataelem import DataElement
from pydicom.uid import RLELossless
from tiny_dicom import head_hu, tiny_dataset, tiny_values, to_bytes

from ich_keras.ct.dicom import read_header, read_hu, read_slice
from ich_keras.ct.padding import Padding
from ich_keras.ct.rejects import RejectedFile

SIDE = 64


def file_with(stored, value, limit=None, vr="US", compress=None, **tags):
    """The bytes of a slice that declares padding; the values are 16 bits, whatever the VR."""
    dataset = tiny_dataset(stored, **tags)
    for tag, number in ((0x00280120, value), (0x00280121, limit)):
        if number is not None:
            bits = number & 0xFFFF
            number = bits - 0x10000 if vr == "SS" and bits >= 0x8000 else bits
            dataset.add(DataElement(tag, vr, number))
    return to_bytes(dataset, compress=compress)


def outside(side=SIDE):
    """The corners outside the circle of reconstruction; bool (side, side)."""
    rows, columns = (np.mgrid[:side, :side] + 0.5) / side - 0.5
    return np.hypot(rows, columns) > 0.5


UNSIGNED_12 = {"PixelRepresentation": 0, "BitsStored": 12}


@pytest.mark.parametrize("compress", [None, RLELossless])
@pytest.mark.parametrize("vr", ["US", "SS"])
@pytest.mark.parametrize(
    ("value", "tags"),
    [
        (4095, UNSIGNED_12),  # 3071 HU
        (0, UNSIGNED_12),
        (63536, {"PixelRepresentation": 0}),  # 62512 HU, which does not fit into int16
        (-2000, {}),
        (-32768, {}),
        (-2000, {"BitsStored": 12}),
        (1600, {"RescaleSlope": 2, "PixelRepresentation": 0}),
    ],
)
def test_padding_is_air_and_the_rest_as_it_was(value, tags, vr, compress):
    hu = head_hu(SIDE)
    slope, intercept = tags.get("RescaleSlope", 1), tags.get("RescaleIntercept", -1024)
    stored = np.maximum(hu - intercept, 0) // slope
    expected = np.where(outside(), -1024, stored * slope + intercept)
    stored[outside()] = value
    got = read_hu(io.BytesIO(file_with(stored, value, vr=vr, compress=compress, **tags)))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("ends", [(4000, 4095), (4095, 4000)])
def test_a_range_in_either_order(ends):
    stored = head_hu(SIDE) + 1024
    stored[outside()] = np.random.default_rng(0).integers(4000, 4096, outside().sum())
    stored[30, 30], stored[31, 31] = 3999, 4000  # just outside, and just inside
    got = read_hu(io.BytesIO(file_with(stored, *ends, **UNSIGNED_12)))
    expected = np.where(outside(), -1024, stored - 1024)
    expected[31, 31] = -1024
    np.testing.assert_array_equal(got, expected)


def test_padding_in_all_sixteen_bits_of_twelve():
    # -2000 is written as 0xF830; its lower 12 bits alone would be 2096, bone of 1072 HU.
    stored = head_hu(SIDE) + 1024
    stored[10, 10] = 2096
    bone = stored[10, 10] - 1024
    stored[outside()] = 0xF830
    got = read_hu(io.BytesIO(file_with(stored, -2000, vr="SS", **UNSIGNED_12)))
    assert (got[outside()] == -1024).all()
    assert got[10, 10] == bone == 1072


def test_padding_that_names_twelve_bits_without_their_sign():
    stored = (head_hu(SIDE)) & 0xFFFF
    stored[outside()] = 0x0830  # -2000 in 12 bits
    content = file_with(stored, 0x0830, BitsStored=12, RescaleIntercept=0)
    got = read_hu(io.BytesIO(content))
    np.testing.assert_array_equal(got, np.where(outside(), -1024, head_hu(SIDE)))


@pytest.mark.parametrize("water", [0, 7, 35])
def test_padding_of_a_tissue_value_makes_no_holes(water):
    # Intercept 0: a stored 0 is water. It fills the corners, and lies scattered in the brain.
    hu = head_hu(SIDE)
    assert (hu[~outside()] == water).any()
    stored = np.where(outside(), water, hu)
    content = file_with(stored, water, vr="SS", RescaleIntercept=0)
    got = read_hu(io.BytesIO(content))
    np.testing.assert_array_equal(got, np.where(outside(), -1024, hu))


def test_an_area_that_was_cut_out_is_air_even_inside():
    stored = head_hu(SIDE) + 1024
    stored[25:40, 25:40] = 1064  # 5 % of the slice
    got = read_hu(io.BytesIO(file_with(stored, 1064)))
    assert (got[25:40, 25:40] == -1024).all()
    assert 15 * 15 <= (got == -1024).sum() < 15 * 15 + 5  # a neighbour may have the value
    assert (got == 40).any()


def test_a_zoomed_brain_keeps_its_single_values_at_the_border():
    hu = np.random.default_rng(0).normal(20, 8, (512, 512)).round().astype(int)
    got = read_hu(io.BytesIO(file_with(hu, 0, vr="SS", RescaleIntercept=0)))
    assert (hu[0] == 0).any()
    np.testing.assert_array_equal(got, hu)


def test_a_range_that_holds_tissue_is_refused():
    content = file_with(head_hu(SIDE) + 1024, 0, 1100)
    with pytest.raises(
        RejectedFile, match=r"\(0028,0121\).* is 1100, which makes -1024 to 76"
    ) as e:
        read_header(io.BytesIO(content))
    assert e.value.code == "BAD_VALUE"


def test_padding_that_is_no_integer_is_refused_and_an_empty_one_is_none():
    dataset = tiny_dataset()
    dataset.add(DataElement(0x00280120, "DS", "-2000"))
    with pytest.raises(RejectedFile, match=r"\(0028,0120\) PixelPaddingValue is 6 bytes long"):
        read_header(io.BytesIO(to_bytes(dataset)))
    dataset.add(DataElement(0x00280120, "US", None))
    assert read_header(io.BytesIO(to_bytes(dataset))).padding is None
    dataset = tiny_dataset()
    dataset.add(DataElement(0x00280121, "US", 5))  # a limit alone limits nothing
    assert read_header(io.BytesIO(to_bytes(dataset))).padding is None
    assert read_header(io.BytesIO(file_with(tiny_values(), -2000))).padding == Padding(-2000, -2000)


def test_a_slice_of_nothing_but_padding_is_air():
    got = read_hu(io.BytesIO(file_with(np.full((SIDE, SIDE), -2000), -2000)))
    assert (got == -1024).all()


def test_padding_does_not_hide_wrapped_air_nor_is_taken_for_it():
    hu = np.clip(head_hu(SIDE), -1000, 3000)
    tags = {**UNSIGNED_12, "RescaleIntercept": 0}
    stored = np.where(outside(), 3500, hu % 4096)  # 3500 would be unwrapped to -596
    result = read_slice(io.BytesIO(file_with(stored, 3500, **tags)))
    assert result.repaired
    np.testing.assert_array_equal(result.hu, np.where(outside(), -1024, hu))
    # No air but the padding: nothing is wrapped.
    brain = np.where(outside(), 3500, np.clip(hu, 0, 60))
    result = read_slice(io.BytesIO(file_with(brain, 3500, **tags)))
    assert not result.repaired
    np.testing.assert_array_equal(result.hu, np.where(outside(), -1024, brain))


@pytest.mark.parametrize("intercept", [-1024, 0])
def test_a_zero_tail_is_found_though_zero_is_padding(intercept):
    stored = head_hu(SIDE) - intercept
    stored[SIDE // 2 :] = 0
    content = file_with(stored, 0, RescaleIntercept=intercept)
    with pytest.raises(RejectedFile) as caught:
        read_hu(io.BytesIO(content))
    assert caught.value.code == "ZERO_TAIL"
    # The same as padding below a head that ends above the middle.
    rows, columns = np.mgrid[:SIDE, :SIDE]
    disc = np.hypot(rows - SIDE / 4, columns - SIDE / 2) < SIDE / 5
    stored = np.where(disc, 40 - intercept, 0)
    got = read_hu(io.BytesIO(file_with(stored, 0, RescaleIntercept=intercept)))
    np.testing.assert_array_equal(got, np.where(disc, 40, -1024))


def test_the_real_series_declares_its_padding(real_ge_series):
    for path in sorted(real_ge_series.glob("*.dcm"))[::9]:
        stored = pydicom.dcmread(path).pixel_array
        is_padding = stored == -1500
        assert 0.2 < is_padding.mean() < 0.3
        np.testing.assert_array_equal(read_hu(path), np.where(is_padding, -1024, stored))
