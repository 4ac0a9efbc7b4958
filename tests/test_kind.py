"""What an image says it is: by all values of Image Type, and by Body Part Examined."""

import io

import pytest
from tiny_dicom import tiny_file

from ich_keras.ct.dicom import read_header
from ich_keras.ct.kind import is_acquired, is_elsewhere
from ich_keras.ct.rejects import RejectedFile
from ich_keras.ct.series import index_folder

ACQUIRED = [
    "",
    "ORIGINAL",
    "ORIGINAL\\PRIMARY",
    "ORIGINAL\\PRIMARY\\AXIAL",
    "ORIGINAL\\PRIMARY\\AXIAL\\ADD",  # GE
    "ORIGINAL\\PRIMARY\\AXIAL\\NORMAL",
    "ORIGINAL\\PRIMARY\\AXIAL\\HELIX",  # Philips
    "ORIGINAL\\PRIMARY\\AXIAL\\CT_SOM5 SPI",  # Siemens
    "ORIGINAL\\PRIMARY\\AXIAL\\CT_SOM7 SPI DUAL\\STD\\SNRG\\DET_AB",
    "ORIGINAL\\PRIMARY\\AXIAL\\LOW_DOSE",
    "ORIGINAL\\PRIMARY\\AXIAL\\PERFUSION",  # watches the contrast medium
    "ORIGINAL\\PRIMARY\\VOLUME",
    "ORIGINAL\\PRIMARY\\LOCALIZER\\CT_SOM5 TOP",
    "ORIGINAL\\SECONDARY\\AXIAL",
    "DERIVED \\PRIMARY\\AXIAL",  # compressed with loss
    "DERIVED\\PRIMARY\\AXIAL\\VMI",
    "DERIVED\\SECONDARY\\AXIAL",
    "DERIVED\\SECONDARY",
    "derived\\primary\\axial",
]
COMPUTED = [
    "MPR",
    "ORIGINAL\\PRIMARY\\MPR",
    "ORIGINAL\\PRIMARY\\AXIAL\\CSA MPR",
    "DERIVED\\PRIMARY\\AXIAL\\REFORMATTED",
    "DERIVED\\SECONDARY\\REFORMATTED\\AVERAGE",
    "DERIVED\\SECONDARY\\AXIAL\\CSA RESAMPLED",
    "derived\\secondary\\mip",
    "DERIVED\\PRIMARY\\AXIAL\\MIN_IP",
    "ORIGINAL\\PRIMARY\\PROJECTION IMAGE",
    "DERIVED\\PRIMARY\\VOLUME_RENDERING",
    "DERIVED\\SECONDARY\\SCREEN SAVE",
    "ORIGINAL\\PRIMARY\\AXIAL\\SCREEN_SAVE",
    "ORIGINAL\\PRIMARY\\SCREENSHOT",
    "DERIVED\\SECONDARY\\OTHER",
    "ORIGINAL\\PRIMARY\\OTHER\\CT_SOM5 PROT",
    "ORIGINAL\\PRIMARY\\PROTOCOL",
    "DERIVED\\SECONDARY\\POSDISP",
    "ORIGINAL\\PRIMARY\\DOSE_INFO",
    "ORIGINAL\\PRIMARY\\AXIAL\\DOSE REPORT",
    "ORIGINAL\\PRIMARY\\PERFUSION",
    "DERIVED\\PRIMARY\\PERFUSION\\RCBF",
    *(f"DERIVED\\PRIMARY\\AXIAL\\{name}" for name in ("CBF", "CBV", "MTT", "TTP", "TMAX")),
    "ORIGINAL\\PRIMARY\\AXIAL\\CTP_CBV",
    "DERIVED\\PRIMARY\\AXIAL\\PERFUSION",
    "DERIVED\\PRIMARY\\AXIAL\\MAT_SPECIFIC",
    "DERIVED\\PRIMARY\\AXIAL\\SUBTRACTION",
]


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
@pytest.mark.parametrize("image_type", ACQUIRED)
def test_acquired_slices_are_read(image_type):
    assert is_acquired(image_type)
    assert read_header(io.BytesIO(tiny_file(ImageType=image_type.split("\\"))))


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
@pytest.mark.parametrize("image_type", COMPUTED)
def test_computed_images_and_pages_are_refused(image_type):
    with pytest.raises(RejectedFile, match=r"^NOT_ORIGINAL: \(0008,0008\) ImageType is") as caught:
        read_header(io.BytesIO(tiny_file(ImageType=image_type.split("\\"))))
    assert caught.value.series_instance_uid == "1.2.3.4"


@pytest.mark.parametrize("word", ["LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW"])
def test_scouts_by_any_name(word):
    content = tiny_file(ImageType=["ORIGINAL", "PRIMARY", word])
    assert read_header(io.BytesIO(content)).is_localizer


@pytest.mark.parametrize(
    "name",
    [
        *("", "HEAD", "Head", "BRAIN", "SKULL", "SKULLBASE", "HEADNECK", "HEAD & NECK", "CRANIUM"),
        *("NEURO", "FACE", "ORBITS", "PARANASAL SINUS", "TEMPORALBONE", "Kopf", "Schaedel", "TETE"),
        *("UNKNOWN", "OTHER", "WHOLEBODY", "CAROTID", "CIRCLEOFWILLIS", "1234", "***"),
    ],
)
def test_heads_and_unknown_parts_pass(name):
    assert not is_elsewhere(name)


@pytest.mark.parametrize(
    "name",
    [
        *("ABDOMEN", "abdomen", "ABDOMENPELVIS", "CHEST", "THORAX", "Thorax/Abdomen", "PELVIS"),
        *("NECK", "CSPINE", "C-SPINE", "TSPINE", "LUMBAR SPINE", "PANCREAS", "LIVER", "HEART"),
        *("KNEE", "HIP", "LEG", "ARM", "HAND", "EXTREMITY", "AORTA", "Becken", "TORAX", "ADDOME"),
    ],
)
def test_other_parts_of_the_body_are_known(name):
    assert is_elsewhere(name)


def write(folder, count=4, series="1.2.3.4", **tags):
    for number in range(count):
        content = tiny_file(
            SOPInstanceUID=f"{series}.{number}",
            SeriesInstanceUID=series,
            ImagePositionPatient=[0, 0, 5 * number],
            **tags,
        )
        (folder / f"{series}-{number}.dcm").write_bytes(content)


def test_another_part_of_the_body_is_told_and_left_out(tmp_path):
    write(tmp_path, BodyPartExamined="ABDOMEN")
    write(tmp_path, series="1.2.3.5", BodyPartExamined="HEAD")
    write(tmp_path, series="1.2.3.6")
    index = index_folder(tmp_path)
    assert index.series["verdict"].tolist() == ["not a head", "ok", "ok"]
    assert index.series["body_part"].tolist() == ["ABDOMEN", "HEAD", ""]
    assert index.describe("1.2.3.4").endswith(
        "; not a head ((0018,0015) BodyPartExamined is 'ABDOMEN')"
    )
    usable = index.usable()
    assert usable.series["series_uid"].tolist() == ["1.2.3.5", "1.2.3.6"]
    assert set(usable.rejects["code"]) == {"NOT_HEAD"}
    assert usable.rejects["detail"][0] == (
        "series 1.2.3.4: (0018,0015) BodyPartExamined is 'ABDOMEN'"
    )
    assert usable.rejects["series_instance_uid"].tolist() == ["1.2.3.4"] * 4
    assert "--any-body-part" in usable.rejects["hint"][0]


def test_whoever_asks_for_any_part_of_the_body_gets_it(tmp_path):
    write(tmp_path, BodyPartExamined="ABDOMEN")
    index = index_folder(tmp_path, any_body_part=True)
    assert index.series["verdict"].tolist() == ["ok"]
    assert len(index.usable().slices) == 4


def test_one_series_of_two_parts_of_the_body_is_parted(tmp_path):
    write(tmp_path, BodyPartExamined="HEAD")
    for number in range(4, 7):
        content = tiny_file(
            SOPInstanceUID=f"1.2.3.4.{number}",
            ImagePositionPatient=[0, 0, 5 * number],
            BodyPartExamined="NECK",
        )
        (tmp_path / f"neck-{number}.dcm").write_bytes(content)
    series = index_folder(tmp_path).series
    assert series["series_uid"].tolist() == ["1.2.3.4", "1.2.3.4#2"]
    assert series["verdict"].tolist() == ["ok", "not a head"]
