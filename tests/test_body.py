"""The size of the body tells a trunk from a head, where no tag does."""

import numpy as np
import pytest
from pydicom.data import get_testdata_file
from tiny_dicom import tiny_file

from ich_keras.ct.body import body_size
from ich_keras.ct.dicom import read_header, read_slice
from ich_keras.ct.series import index_folder


def ellipse(width_mm, height_mm, fov_mm=500.0, side=64, extra=None):
    """HU of an ellipse of soft tissue in air, (side, side), and the spacing of its pixels, mm."""
    spacing = fov_mm / side
    y, x = (np.mgrid[:side, :side] - (side - 1) / 2) * spacing
    hu = np.where((2 * x / width_mm) ** 2 + (2 * y / height_mm) ** 2 < 1, 40, -1000)
    if extra is not None:
        hu[extra(x, y)] = 40
    return hu.astype(np.int16), spacing


@pytest.mark.parametrize(("width", "height"), [(150, 190), (300, 200), (400, 280)])
def test_the_size_of_an_ellipse_is_measured(width, height):
    hu, spacing = ellipse(width, height, side=512)
    size = body_size(hu, spacing, spacing)
    assert size.width_mm == pytest.approx(width, abs=10)
    assert size.area_mm2 == pytest.approx(np.pi / 4 * width * height, rel=0.05)
    assert size.exceeds_head == (width >= 300)


def test_the_air_in_a_chest_counts():
    hu, spacing = ellipse(340, 240, side=512)
    lungs, _ = ellipse(280, 160, side=512)
    hu[lungs == 40] = -850
    assert body_size(hu, spacing, spacing).exceeds_head


@pytest.mark.parametrize(
    "extra",
    [
        lambda x, y: (abs(y - 110) < 2) & (abs(x) < 220),  # the skin of a table
        lambda x, y: (abs(np.hypot(x, y) - 120) < 3) & (y > 0),  # a head holder
        lambda x, y: np.hypot(x - 140, y) < 35,  # a hand beside the head
        lambda x, y: np.hypot(x - 108, y) < 35,  # the same, held against it
    ],
)
def test_what_lies_beside_a_head_makes_no_trunk_of_it(extra):
    hu, spacing = ellipse(160, 200, side=512, extra=extra)
    assert not body_size(hu, spacing, spacing).exceeds_head


@pytest.mark.parametrize("hu", [np.full((64, 64), -1000), np.full((2, 2), 40), np.full((1, 64), 0)])
def test_pictures_without_a_body(hu):
    size = body_size(hu.astype(np.int16), 1.0, 1.0)
    assert not size.exceeds_head


def test_pixels_may_be_oblong():
    hu, spacing = ellipse(340, 240, side=512)
    size = body_size(hu[::3], 3 * spacing, spacing)
    assert size.width_mm == pytest.approx(340, abs=10)
    assert size.exceeds_head


def write_series(folder, sizes, series="1.2.3.4", **tags):
    for number, (width, height) in enumerate(sizes):
        hu, spacing = ellipse(width, height)
        content = tiny_file(
            hu.astype(int) + 1024,
            SOPInstanceUID=f"{series}.{number}",
            SeriesInstanceUID=series,
            ImagePositionPatient=[0, 0, 5 * number],
            PixelSpacing=[spacing, spacing],
            **tags,
        )
        (folder / f"{series}-{number}.dcm").write_bytes(content)


def test_a_trunk_is_told_and_left_out_and_a_head_is_not(tmp_path):
    write_series(tmp_path, [(340, 240)] * 5)
    write_series(tmp_path, [(160, 200)] * 5, series="1.2.3.5")
    index = index_folder(tmp_path)
    assert index.series["verdict"].tolist() == ["not a head", "ok"]
    assert index.series["body_width_mm"].round(-1).tolist() == [340, 160]
    assert "not a head (the body is 3" in index.describe("1.2.3.4")
    rejects = index.usable().rejects
    assert rejects["code"].tolist() == ["NOT_HEAD"] * 5
    assert "mm wide" in rejects["detail"][0]
    assert index_folder(tmp_path, any_body_part=True).series["verdict"].tolist() == ["ok", "ok"]


def test_shoulders_below_a_head_do_not_count(tmp_path):
    """The middle slice is one of the shoulders; a quarter from the top there is a head."""
    write_series(tmp_path, [(420, 260)] * 5 + [(160, 200)] * 4)
    assert index_folder(tmp_path).series["verdict"].tolist() == ["ok"]


def test_a_prone_trunk_and_one_of_which_the_middle_cannot_be_read(tmp_path):
    write_series(tmp_path, [(340, 240)] * 5, ImageOrientationPatient=[-1, 0, 0, 0, -1, 0])
    path = tmp_path / "1.2.3.4-2.dcm"
    # Zeros in place of pixels: the header is fine, so only reading the pixels shows it.
    content = path.read_bytes()
    path.write_bytes(content[: -64 * 64] + bytes(64 * 64))
    assert index_folder(tmp_path).series["verdict"].tolist() == ["not a head"]


def test_other_planes_and_scouts_are_not_measured(tmp_path):
    write_series(tmp_path, [(340, 240)] * 3, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    index = index_folder(tmp_path)
    assert index.series["verdict"].tolist() == ["localizer"]
    assert index.series["body_width_mm"].isna().all()


def test_the_real_heads_are_heads(real_ge_series, real_rsna_slices):
    paths = [*sorted(real_ge_series.glob("*.dcm")), *sorted(real_rsna_slices.glob("*.dcm"))]
    assert len(paths) == 31
    widths = []
    for path in paths:
        header = read_header(path)
        size = body_size(read_slice(path).hu, header.row_spacing_mm, header.column_spacing_mm)
        widths.append(size.width_mm)
    assert max(widths) < 200  # the limit is 260


def test_a_real_trunk_is_none():
    path = get_testdata_file("explicit_VR-UN.dcm", download=False)
    header = read_header(path)
    assert header.body_part == "PANCREAS"
    size = body_size(read_slice(path).hu, header.row_spacing_mm, header.column_spacing_mm)
    assert size.exceeds_head
    assert size.width_mm == pytest.approx(306, abs=5)


def test_phantoms_are_heads(phantom_folder):
    index = index_folder(phantom_folder / "images")
    assert not index.series["verdict"].str.contains("not a head").any()
    assert index.series["body_width_mm"].max() < 200
