import dataclasses
import os
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from highdicom.spatial import get_volume_positions
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_dicom import AXIAL, tiny_dataset, tiny_file, tiny_values, to_bytes

from ich_keras.ct import duplicates, walk
from ich_keras.ct.geometry import slice_normal, tilt_degrees
from ich_keras.ct.journal import Entry, Journal
from ich_keras.ct.rejects import REJECT_CODES, NothingUsable, RejectedFile, rejects_kept
from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.ct.tables import REJECT_COLUMNS, SERIES_COLUMNS, SLICE_COLUMNS, make_table
from ich_keras.ct.verdict import verdict
from ich_keras.ct.walk import read_all
from ich_keras.errors import DataError, EnvironmentProblem, StaleError, UsageError
from ich_keras.workflow import prepare_index

CORONAL = (1, 0, 0, 0, 0, -1)
TABLES = ("slices", "series", "rejects")
EXPLICIT = b"1.2.840.10008.1.2.1\0"


def tilted(degrees):
    """Direction cosines of slices tilted about the x axis."""
    angle = np.radians(degrees)
    return (1, 0, 0, 0, round(np.cos(angle), 7), round(-np.sin(angle), 7))


def write(folder, name, **tags):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tiny_file(**tags))
    return path


def write_series(folder, zs, series="1.2.3.4", prefix="", position=None, **tags):
    """One slice per z, in files 000.dcm, 001.dcm, ..."""
    for number, z in enumerate(zs):
        write(
            folder,
            f"{prefix}{number:03d}.dcm",
            SOPInstanceUID=f"{series}.{number + 1}",
            SeriesInstanceUID=series,
            ImagePositionPatient=[-125, -125, z] if position is None else position(z),
            **tags,
        )


def assert_equal(one, two):
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(one, name), getattr(two, name), check_exact=True)


# --- Order ----------------------------------------------------------------------------------


def test_order_and_columns(tmp_path):
    write_series(tmp_path, [30, 10, 20, 0])
    index = index_folder(tmp_path)
    slices = index.slices
    assert list(slices.columns) == list(SLICE_COLUMNS)
    assert list(index.series.columns) == list(SERIES_COLUMNS)
    assert list(index.rejects.columns) == list(REJECT_COLUMNS)
    assert slices["sop_instance_uid"].tolist() == [f"1.2.3.4.{n}" for n in (4, 2, 3, 1)]
    assert slices["slice_index"].tolist() == [0, 1, 2, 3]
    assert slices["position_mm"].tolist() == [0, 10, 20, 30]
    assert slices["container"].tolist() == [str(tmp_path / f"{n:03d}.dcm") for n in (3, 1, 2, 0)]
    assert set(slices["member"]) == {""}
    status = (tmp_path / "003.dcm").stat()
    assert slices["file_size"][0] == status.st_size
    assert slices["file_mtime_ns"][0] == status.st_mtime_ns
    row = index.series.iloc[0]
    assert row["series_uid"] == row["series_instance_uid"] == "1.2.3.4"
    assert (row["num_slices"], row["rows"], row["columns"]) == (4, 16, 16)
    assert (row["row_spacing_mm"], row["slice_spacing_mm"]) == (0.5, 10)
    assert (row["row_x"], row["column_y"], row["column_z"]) == (1, 1, 0)
    assert (row["tilt_degrees"], row["shear_degrees"], row["verdict"]) == (0, 0, "ok")
    assert repr(index) == "SeriesIndex: 4 slices, 1 series, 1 patient, 0 rejects"


def test_names_and_instance_numbers_do_not_matter(tmp_path):
    zs = [float(z) for z in range(0, 50, 5)]
    for seed in range(2):
        names = random.Random(seed).sample(range(100), len(zs))
        for number, (name, z) in enumerate(zip(names, zs, strict=True)):
            write(
                tmp_path / str(seed),
                f"{name}.dcm",
                SOPInstanceUID=f"1.2.{number}",
                ImagePositionPatient=[0, 0, z],
                InstanceNumber=name,
            )
    one, two = (index_folder(tmp_path / str(seed)) for seed in range(2))
    for index, seed in ((one, 0), (two, 1)):
        expected = random.Random(seed).sample(range(100), len(zs))
        assert index.slices["instance_number"].tolist() == [str(name) for name in expected]
        assert index.slices["image_position_z_mm"].tolist() == zs
    places = ["container", "file_mtime_ns", "file_size", "instance_number"]
    pd.testing.assert_frame_equal(one.slices.drop(columns=places), two.slices.drop(columns=places))
    pd.testing.assert_frame_equal(one.series, two.series)


@pytest.mark.parametrize(
    ("orientation", "normal"),
    [
        (AXIAL, (0, 0, 1)),
        ((-1, 0, 0, 0, 1, 0), (0, 0, 1)),  # the patient lies on the face: still to the head
        (CORONAL, (0, 1, 0)),
        ((1, 0, 0, 0, 0, 1), (0, 1, 0)),
        ((0, 1, 0, 0, 0, -1), (1, 0, 0)),
        ((1, 0, 0, 0, 0.6, -0.8), (0, 0.8, 0.6)),
        ((1, 0, 0, 0, 0.6, 0.8), (0, -0.8, 0.6)),
    ],
)
def test_the_normal_points_to_the_head(orientation, normal):
    np.testing.assert_allclose(slice_normal(orientation), normal, atol=1e-12)


def test_one_slice(tmp_path):
    write_series(tmp_path, [7])
    row = index_folder(tmp_path).series.iloc[0]
    assert (row["num_slices"], row["verdict"]) == (1, "too few")
    assert np.isnan(row["slice_spacing_mm"])


# --- Verdicts -------------------------------------------------------------------------------


def stack(zs, orientation=AXIAL, direction=None):
    """Positions at distances `zs` along `direction` (default: the normal)."""
    direction = slice_normal(orientation) if direction is None else np.array(direction)
    return np.array([-125.0, -125.0, 40.0]) + np.outer(zs, direction)


@pytest.mark.parametrize(
    ("zs", "expected"),
    [
        ([0, 5, 10, 15], "ok"),
        ([0, 5, 10.04, 15], "ok"),  # 0.8 %
        ([0, 5, 10.2, 15.2], "irregular"),
        ([0, 5, 10, 20, 25], "gap"),
        ([0, 5, 10, 25, 30, 35], "gap"),
        ([0, 5, 10, 12.5], "irregular"),
        ([0, 5, 10, 15, 25, 28], "gap,irregular"),
        # The base of the skull in thinner slices: a second spacing, not slices that are missing.
        ([0, 2.5, 5, 7.5, 10, 12.5, 17.5, 22.5, 27.5], "irregular"),
        ([0, 5, 10, 15, 17.5, 20, 22.5, 25, 27.5, 30, 32.5], "irregular"),
        ([0, 2.5, 5, 7.5, 10, 12.5, 15, 20, 25, 30, 40, 45, 50, 55], "gap,irregular"),
        ([0, 5, 10, 20, 30, 35, 40], "gap"),  # every second of three is missing
        ([0, 5, 5, 10, 15], "duplicate"),
        ([0, 5, 5.005, 10, 20, 25], "duplicate,gap"),
        ([0, 0, 0], "duplicate"),
        ([0, 5], "too few"),
        ([0], "too few"),
        ([0, 0], "too few,duplicate"),
    ],
)
def test_spacing_verdicts(zs, expected):
    assert verdict(AXIAL, stack(zs)) == expected


@pytest.mark.parametrize(
    ("orientation", "direction", "tilt", "expected"),
    [
        (AXIAL, (0, 0, 1), 0, "ok"),
        (tilted(0.9), None, 0.9, "ok"),
        (tilted(1.1), None, 1.1, "tilted"),
        (tilted(15), None, 15, "tilted"),  # tilted head: a straight stack all the same
        (tilted(15), (0, 0, 1), 15, "tilted"),  # tilted gantry: sheared
        (tilted(-22), (0, 0, 1), 22, "tilted"),
        # Axial by the header, but the stack is not perpendicular: tan 10 degrees = 0.1763.
        (AXIAL, (0, 0.17632698, 1), 10, "tilted"),
        (CORONAL, None, 90, "not axial"),
        ((0, 1, 0, 0, 0, -1), None, 90, "not axial"),
        (tilted(50), None, 50, "not axial"),
    ],
)
def test_tilt_verdicts(orientation, direction, tilt, expected):
    positions = stack([0, 5, 10, 15], orientation, direction)
    assert tilt_degrees(orientation, positions) == pytest.approx(tilt, abs=1e-4)
    assert verdict(orientation, positions) == expected


def test_a_slice_beside_the_stack_is_irregular():
    positions = stack([0, 5, 10, 15, 20])
    positions[2, 0] += 3
    assert verdict(AXIAL, positions) == "irregular"


@settings(max_examples=150)
@given(
    steps=st.lists(st.sampled_from([5, 5, 5, 5, 5.03, 5.2, 10, 2.5, 0]), min_size=2, max_size=8),
    degrees=st.sampled_from([0, 10, -20]),
    straight=st.booleans(),
)
def test_highdicom_agrees_what_a_regular_volume_is(steps, degrees, straight):
    orientation = tilted(degrees)
    along = np.concatenate([[0], np.cumsum(steps)])
    positions = stack(along, orientation, None if straight else (0, 0, 1))
    spacing, _ = get_volume_positions(positions, orientation)
    words = set(verdict(orientation, positions).split(","))
    sheared = degrees != 0 and not straight
    regular = not words & {"irregular", "gap", "duplicate"} and not sheared
    if sum(steps) > 0:  # all at one position is a volume of one slice for highdicom
        assert regular == (spacing is not None)
    assert ("tilted" in words) == (degrees != 0)


def test_the_real_ge_head(real_ge_series):
    index = index_folder(real_ge_series)
    assert repr(index) == "SeriesIndex: 28 slices, 1 series, 1 patient, 2 rejects (NOT_DICOM 2)"
    row = index.series.iloc[0]
    assert row["verdict"] == "irregular,tilted"
    assert row["tilt_degrees"] == pytest.approx(18.5, abs=1e-4)
    assert index.slices["slice_index"].tolist() == list(range(28))
    assert (np.diff(index.slices["position_mm"]) > 0).all()
    text = index.describe(row["series_uid"])
    assert "1.14 mm (1x), 4.22 mm (13x), 7.38 mm (13x) along the table" in text
    assert "tilt 18.5 degrees; kernel STD+; irregular, tilted" in text


def test_the_real_rsna_slices(real_rsna_slices):
    index = index_folder(real_rsna_slices)
    assert (len(index.slices), len(index.series), len(index.rejects)) == (3, 3, 2)
    assert index.series["tilt_degrees"].round(1).tolist() == [0, 17.5, 22]
    assert index.series["verdict"].tolist() == ["too few", "too few,tilted", "too few,tilted"]


# --- Grouping -------------------------------------------------------------------------------


def test_one_uid_with_several_volumes(tmp_path):
    series = {"series": "1.2.9"}
    write_series(tmp_path, [0, 5, 10], prefix="a", **series)
    for number, tags in enumerate(
        (
            {"ImageOrientationPatient": list(tilted(15))},
            {"PixelSpacing": [0.6, 0.6]},
            {"stored": np.arange(64).reshape(8, 8)},
            {"PatientID": "patient-2"},
            {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
        )
    ):
        write(
            tmp_path,
            f"b{number}.dcm",
            SOPInstanceUID=f"1.2.10.{number}",
            SeriesInstanceUID="1.2.9",
            **tags,
        )
    index = index_folder(tmp_path)
    sizes = index.series.set_index("series_uid")["num_slices"]
    assert sizes["1.2.9"] == 3
    assert sorted(sizes.index) == ["1.2.9", *(f"1.2.9#{n}" for n in range(2, 7))]
    assert set(index.series["series_instance_uid"]) == {"1.2.9"}
    assert index.slices["series_uid"].is_unique is False
    assert index.series["verdict"].tolist().count("localizer,too few") == 1


def volumes_of(folder, *acquisitions):
    """Write acquisitions, (number, positions), of one SeriesInstanceUID; return the places of each
    volume's slices, as "number:z", ordered by position."""
    entries = [(number, z) for number, zs in acquisitions for z in zs]
    order = np.random.default_rng(0).permutation(len(entries))
    names = {}
    for place, (number, z) in zip(order, entries, strict=True):
        uid = f"1.2.3.{place}"
        names[uid] = f"{number}:{z:g}"
        dataset = tiny_dataset(
            SOPInstanceUID=uid, SeriesInstanceUID="1.2.3", ImagePositionPatient=[-125, -125, z]
        )
        # Not as IS, of which pydicom refuses what other programs may have written.
        dataset.add_new("AcquisitionNumber", "UT", number)
        (folder / f"{place:03d}.dcm").write_bytes(to_bytes(dataset))
    index = index_folder(folder)
    uids = index.slices.groupby("series_uid")["sop_instance_uid"].apply(list)
    assert list(uids.index) == ["1.2.3", *(f"1.2.3#{n}" for n in range(2, len(uids) + 1))]
    return [[names[uid] for uid in volume] for volume in uids], index.series["verdict"].tolist()


def places(number, zs):
    return [f"{number}:{z:g}" for z in zs]


def test_a_head_scanned_twice_makes_two_volumes(tmp_path):
    one, two = np.arange(0, 20, 5), np.arange(0, 15, 5) + 0.001
    volumes, verdicts = volumes_of(tmp_path, ("1", one), ("2", two))
    assert volumes == [places(1, one), places(2, two)]
    assert verdicts == ["ok", "ok"]


def test_halves_belong_to_their_own_scan(tmp_path):
    """The second scan's halves are of other sizes than the first one's."""
    halves = [np.arange(0, 41, 5), np.arange(45, 71, 5), np.arange(0, 46, 5), np.arange(50, 81, 5)]
    volumes, verdicts = volumes_of(tmp_path, *((str(n), h) for n, h in enumerate(halves, 8)))
    assert volumes == [
        places(10, halves[2]) + places(11, halves[3]),
        places(8, halves[0]) + places(9, halves[1]),
    ]
    assert verdicts == ["ok", "ok"]


def test_rotations_belong_to_their_own_scan(tmp_path):
    """The second scan reaches further than the first; its numbers have another digit."""
    rotations = [[0, 5], [10, 15], [0, 5], [10, 15], [20, 25]]
    volumes, verdicts = volumes_of(tmp_path, *((str(n), r) for n, r in enumerate(rotations, 9)))
    assert volumes == [
        ["11:0", "11:5", "12:10", "12:15", "13:20", "13:25"],
        ["9:0", "9:5", "10:10", "10:15"],
    ]
    assert verdicts == ["ok", "ok"]


def test_rotations_that_share_a_slice_stay_together(tmp_path):
    rotations = [(str(n), [5 * n, 5 * n + 5]) for n in range(5)]
    volumes, verdicts = volumes_of(tmp_path, *rotations)
    assert len(volumes) == 1
    assert verdicts == ["duplicate"]


def test_a_slice_that_was_watched_before_the_scan(tmp_path):
    scan = np.arange(0, 40, 5)
    volumes, verdicts = volumes_of(tmp_path, ("1", [20]), ("2", scan))
    assert volumes == [places(2, scan), places(1, [20])]
    assert verdicts == ["ok", "too few"]


def test_one_number_a_slice_says_nothing(tmp_path):
    slices = [(str(n), [z]) for n, z in enumerate([10, 0, 5, 10, 15, 0, 5, 10, 15])]
    volumes, verdicts = volumes_of(tmp_path, *slices)
    assert len(volumes) == 1
    assert verdicts == ["duplicate"]


@pytest.mark.parametrize("number", ["", "9" * 5000, "x"])
def test_slices_without_a_number_are_a_scan_of_their_own(tmp_path, number):
    volumes, verdicts = volumes_of(tmp_path, (number, [0, 5, 10]), ("1", [0, 5, 10, 15]))
    assert [volume[0] for volume in volumes] == ["1:0", f"{number}:0"]
    assert verdicts == ["ok", "ok"]


@pytest.mark.parametrize("number", ["", "1"])
def test_two_slices_at_one_place_of_one_acquisition_stay(tmp_path, number):
    for place in range(6):
        write(
            tmp_path,
            f"{place}.dcm",
            SOPInstanceUID=f"1.2.9.{place}",
            SeriesInstanceUID="1.2.9",
            ImagePositionPatient=[-125, -125, 5 * (place // 2)],
            AcquisitionNumber=number,
        )
    assert index_folder(tmp_path).series["verdict"].tolist() == ["duplicate"]


def test_rounded_cosines_stay_together(tmp_path):
    for number in range(4):
        write(
            tmp_path,
            f"{number}.dcm",
            SOPInstanceUID=f"1.2.3.{number}",
            ImagePositionPatient=[0, 0, 5 * number],
            ImageOrientationPatient=[1, 0, 0, 0, 0.9273 + 2e-4 * (number % 2), -0.3744],
        )
    assert len(index_folder(tmp_path).series) == 1


@pytest.mark.parametrize(("x", "expected"), [(-117.5, "ok"), (125, "irregular,tilted")])
def test_a_mirrored_slice_is_turned_and_takes_its_place(tmp_path, x, expected):
    """Its first pixel is the last one of the others, 15 x 0.5 mm further; or it lies elsewhere."""
    write_series(tmp_path, [5, 10, 15, 20])
    write(
        tmp_path,
        "x.dcm",
        SOPInstanceUID="1.2.3.4.99",
        ImagePositionPatient=[x, -125, 0],
        ImageOrientationPatient=[-1, 0, 0, 0, 1, 0],
    )
    index = index_folder(tmp_path)
    assert index.series["num_slices"].tolist() == [5]
    assert index.slices["sop_instance_uid"][0] == "1.2.3.4.99"
    assert index.series["verdict"].tolist() == [expected]


def test_usable_leaves_localizers_and_other_planes_out(tmp_path):
    write_series(tmp_path, [0, 5, 10], series="1.2.1", prefix="axial")
    write_series(
        tmp_path,
        [0, 5, 10],
        series="1.2.2",
        prefix="coronal",
        ImageOrientationPatient=list(CORONAL),
        position=lambda z: [0, z, 0],
    )
    localizer = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    write_series(tmp_path, [0], series="1.2.3", prefix="scout", ImageType=localizer)
    index = index_folder(tmp_path)
    assert index.series["verdict"].tolist() == ["ok", "not axial", "localizer,too few"]
    usable = index.usable()
    assert usable.series["series_uid"].tolist() == ["1.2.1"]
    assert usable.slices["series_uid"].unique().tolist() == ["1.2.1"]
    assert usable.slices.index.tolist() == [0, 1, 2]
    assert usable.rejects["code"].tolist() == ["NOT_AXIAL"] * 3 + ["LOCALIZER"]
    assert usable.rejects["path"][3] == str(tmp_path / "scout000.dcm")
    assert usable.rejects["detail"][0] == "series 1.2.2 is 90 degrees from axial"
    assert_equal(usable.usable(), usable)
    assert len(index.slices) == 7


def test_a_long_series(tmp_path):
    count = 2000
    content = tiny_file(SOPInstanceUID="1.2.9999", ImagePositionPatient=[0, 0, 1234.5])
    for number in range(count):
        changed = content.replace(b"1.2.9999", b"1.2.%04d" % number)
        changed = changed.replace(b"1234.5", b"%06.1f" % (number * 0.5))
        (tmp_path / f"{number * 7 % count}.dcm").write_bytes(changed)
    index = index_folder(tmp_path)
    assert index.series["verdict"].tolist() == ["ok"]
    np.testing.assert_array_equal(index.slices["position_mm"], np.arange(count) * 0.5)


# --- Rejects --------------------------------------------------------------------------------


def test_what_is_no_slice_is_a_reject(tmp_path):
    write_series(tmp_path, [0, 5, 10])
    (tmp_path / "labels.csv").write_text("ID,Label\n")
    (tmp_path / "LICENSE").write_text("text\n")
    (tmp_path / ".hidden").write_text("not read\n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.dcm").write_text("not read\n")
    write(tmp_path / "sub", "mr.dcm", SOPInstanceUID="1.2.8", Modality="MR")
    write(tmp_path / "sub", "no_position.dcm", SOPInstanceUID="1.2.7", ImagePositionPatient=None)
    (tmp_path / "zz.dcm").write_bytes((tmp_path / "000.dcm").read_bytes())
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken_link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder_link").symlink_to(tmp_path / "sub")
    (tmp_path / "file_link").symlink_to(tmp_path / "LICENSE")
    index = index_folder(tmp_path)
    assert len(index.slices) == 3
    rejects = {
        os.path.relpath(row.path, tmp_path): (row.code, row.detail)
        for row in index.rejects.itertuples()
    }
    assert {path: code for path, (code, _) in rejects.items()} == {
        "labels.csv": "NOT_DICOM",
        "LICENSE": "NOT_DICOM",
        "file_link": "NOT_DICOM",
        "sub/mr.dcm": "NOT_CT",
        "sub/no_position.dcm": "MISSING_TAG",
        "zz.dcm": "DUPLICATE_UID",
        "pipe": "UNREADABLE",
        "broken_link": "UNREADABLE",
        ".hidden": "HIDDEN",
        ".git": "HIDDEN",
    }
    assert "(0020,0032) ImagePositionPatient" in rejects["sub/no_position.dcm"][1]
    assert str(tmp_path / "000.dcm") in rejects["zz.dcm"][1]
    assert index.rejects["path"].tolist() == sorted(index.rejects["path"])
    assert "10 rejects (NOT_DICOM 3, HIDDEN 2, UNREADABLE 2, DUPLICATE_UID 1" in repr(index)
    # The file without a position is of the same series; nothing else would have been a slice.
    assert index.series[["verdict", "num_rejected"]].values.tolist() == [["incomplete", 1]]
    table = index.rejects.set_index("path")
    lacking = table.loc[str(tmp_path / "sub" / "no_position.dcm")]
    assert lacking["explanation"] == REJECT_CODES["MISSING_TAG"].meaning
    assert lacking["hint"].startswith("Export the series again")
    index.save(tmp_path / "saved")
    written = pd.read_csv(tmp_path / "saved" / "rejects.csv")
    assert list(written.columns) == [
        *("path", "code", "detail", "explanation", "hint", "series_instance_uid")
    ]
    assert_equal(SeriesIndex.load(tmp_path / "saved"), index)


def test_an_index_of_an_older_version_is_read_with_its_rejects_explained(tmp_path):
    write_series(tmp_path / "dicom", [0, 5, 10])
    (tmp_path / "dicom" / "a.txt").write_text("text")
    index = index_folder(tmp_path / "dicom")
    older = dataclasses.replace(
        index,
        slices=index.slices.drop(columns=["instance_number", "image_position_z_mm"]),
        series=index.series.drop(columns=["num_rejected", "kernel", "body_part", "body_width_mm"]),
        rejects=index.rejects[["path", "code", "detail"]],
    )
    older.save(tmp_path / "index")
    loaded = SeriesIndex.load(tmp_path / "index")
    pd.testing.assert_frame_equal(loaded.rejects, index.rejects)
    assert loaded.slices["instance_number"].tolist() == [""] * 3
    assert loaded.slices["image_position_z_mm"].isna().all()
    assert list(loaded.series.columns) == list(SERIES_COLUMNS)
    assert loaded.series["num_rejected"].tolist() == [0]
    dataclasses.replace(older, rejects=index.rejects.drop(columns="series_instance_uid")).save(
        tmp_path / "less old"
    )
    pd.testing.assert_frame_equal(SeriesIndex.load(tmp_path / "less old").rejects, index.rejects)


def test_the_hint_of_a_missing_decoder_reaches_the_table(tmp_path, monkeypatch):
    def refused(path, **settings):
        raise RejectedFile("NO_DECODER", "a kind of JPEG", "pip install 'ich_keras[codecs]'")

    monkeypatch.setattr(walk, "read_headers", refused)
    write(tmp_path, "a.dcm")
    with pytest.raises(NothingUsable, match=r"NO_DECODER 1.*a.dcm: a kind of JPEG") as caught:
        index_folder(tmp_path)
    assert caught.value.hint == "pip install 'ich_keras[codecs]'"
    assert caught.value.rejects["hint"].tolist() == ["pip install 'ich_keras[codecs]'"]
    with pytest.raises(NothingUsable) as kept, rejects_kept(tmp_path / "out"):
        index_folder(tmp_path)
    assert str(tmp_path / "out" / "rejects.csv") in kept.value.hint
    assert pd.read_csv(tmp_path / "out" / "rejects.csv")["code"].tolist() == ["NO_DECODER"]


def test_every_reject_code_says_what_to_do():
    for code, explanation in REJECT_CODES.items():
        assert explanation.meaning and explanation.hint, code
        assert RejectedFile(code, "detail").hint == explanation.hint


def test_the_first_path_keeps_its_uid(tmp_path):
    for name in ("b/a.dcm", "a/b.dcm", "c.dcm"):
        write(tmp_path, name)
    index = index_folder(tmp_path)
    assert index.slices["container"].tolist() == [str(tmp_path / "a" / "b.dcm")]
    assert [Path(path).name for path in index.rejects["path"]] == ["a.dcm", "c.dcm"]


def test_a_copy_written_by_another_program_is_a_copy(tmp_path):
    """Other bytes, another InstanceNumber and encoding, the same header and pixels."""
    write(tmp_path, "a.dcm", InstanceNumber=1)
    dataset = tiny_dataset(InstanceNumber=7, Manufacturer="another")
    (tmp_path / "b.dcm").write_bytes(to_bytes(dataset, "1.2.840.10008.1.2"))
    index = index_folder(tmp_path)
    assert [Path(path).name for path in index.slices["container"]] == ["a.dcm"]
    assert index.rejects["code"].tolist() == ["DUPLICATE_UID"]
    assert index.series[["verdict", "num_rejected"]].values.tolist() == [["too few", 0]]


@pytest.mark.parametrize(
    ("tags", "difference"),
    [
        ({"stored": tiny_values(seed=1)}, "pixels"),
        ({"PatientID": "patient-2"}, "PatientID"),
        ({"SeriesInstanceUID": "1.2.3.5"}, "SeriesInstanceUID"),
        ({"StudyInstanceUID": "1.2.4"}, "StudyInstanceUID"),
        ({"ImagePositionPatient": [-125, -125, 15]}, "ImagePositionPatient"),
        ({"RescaleIntercept": -1000}, "pixels"),
        ({"ConvolutionKernel": "H60s"}, "kernel or scan settings"),
    ],
)
def test_one_uid_in_two_different_files_is_used_from_neither(tmp_path, tags, difference):
    write_series(tmp_path, [0, 5, 20], prefix="good", series="1.2.3.4")
    for name, own in (("a.dcm", {}), ("copy.dcm", {}), ("b/other.dcm", tags)):
        write(tmp_path, name, SOPInstanceUID="1.2.3.9", **own)
    index = index_folder(tmp_path)
    assert "1.2.3.9" not in index.slices["sop_instance_uid"].tolist()
    assert index.rejects["code"].tolist() == ["UID_CONFLICT"] * 3
    first, other = str(tmp_path / "a.dcm"), str(tmp_path / "b" / "other.dcm")
    details = index.rejects.set_index("path")["detail"]
    uid = "(0008,0018) SOPInstanceUID 1.2.3.9 is also that of"
    assert details[first] == f"{uid} {other}, and the two differ in their {difference}"
    assert details[other] == f"{uid} {first}, and the two differ in their {difference}"
    copy = details[str(tmp_path / "copy.dcm")]
    assert copy == f"{uid} {first} and of {other}, which differ in their {difference}"
    assert "patient-2" not in details[first]
    verdict, num_rejected = index.series[["verdict", "num_rejected"]].iloc[0]
    assert "incomplete" in verdict.split(",")
    assert num_rejected == (2 if difference == "SeriesInstanceUID" else 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_conflict_is_found_with_workers_and_beside_a_journal(tmp_path, workers):
    folder, journal = tmp_path / "dicom", tmp_path / "journal"
    write_series(folder, [0, 5, 10, 20], prefix="good")
    one = write(folder, "a.dcm", SOPInstanceUID="1.2.3.9", ImagePositionPatient=[-125, -125, 15])

    def codes():
        index = index_folder(folder, workers=workers, journal=journal)
        assert_equal(index, index_folder(folder))
        uses = "1.2.3.9" in index.slices["sop_instance_uid"].tolist()
        return uses, index.rejects["code"].tolist()

    assert codes() == (True, [])
    other = write(folder, "b/a.dcm", SOPInstanceUID="1.2.3.9", stored=tiny_values(seed=1))
    assert codes() == (False, ["UID_CONFLICT"] * 2)
    # The other becomes a copy of the first; then a damaged one; then it goes.
    other.write_bytes(one.read_bytes())
    assert codes() == (True, ["DUPLICATE_UID"])
    third = write(folder, "c.dcm", SOPInstanceUID="1.2.3.9", stored=tiny_values(seed=2))
    third.write_bytes(third.read_bytes()[:-100])
    assert codes() == (True, ["DUPLICATE_UID", "TRUNCATED"])
    other.unlink()
    third.unlink()
    assert codes() == (True, [])


def test_a_damaged_copy_is_no_conflict(tmp_path):
    """The first file has zeros in place of pixels; its copies are whole."""
    values = np.full((16, 16), 1064)
    write(tmp_path, "b.dcm", stored=values)
    write(tmp_path, "c.dcm", stored=values)
    whole = (tmp_path / "b.dcm").read_bytes()
    (tmp_path / "a.dcm").write_bytes(whole[:-300] + bytes(300))
    index = index_folder(tmp_path)
    assert [Path(path).name for path in index.slices["container"]] == ["b.dcm"]
    assert index.rejects["code"].tolist() == ["ZERO_TAIL", "DUPLICATE_UID"]


def test_a_copy_that_has_gone_meanwhile_is_listed(tmp_path, monkeypatch):
    for name in "ab":
        write(tmp_path, f"{name}.dcm")
    real = duplicates.filecmp.cmp

    def gone(one, other, shallow):
        Path(other).unlink()
        return real(one, other, shallow)

    monkeypatch.setattr(duplicates.filecmp, "cmp", gone)
    index = index_folder(tmp_path)
    assert [Path(path).name for path in index.slices["container"]] == ["a.dcm"]
    assert index.rejects["code"].tolist() == ["UNREADABLE"]


def test_files_are_compared_only_where_a_uid_comes_twice(tmp_path, monkeypatch):
    write_series(tmp_path, range(5))
    monkeypatch.setattr(duplicates, "read_slice", lambda path, **_: pytest.fail(f"{path} was read"))
    assert len(index_folder(tmp_path).slices) == 5


# --- What is lost -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-300],  # the pixels
        lambda content: content[: content.index(b"\x28\x00\x10\x00")],  # from Rows on
        lambda content: content.replace(b"-1024", b"nan  "),  # RescaleIntercept
        lambda content: content.replace(b"MONOCHROME2 ", b"MONOCHROME1 "),
        lambda content: content.replace(EXPLICIT, b"1.2.840.10008.1.2.9\0"),  # no decoder
    ],
)
def test_half_a_series_is_told(tmp_path, damage):
    write_series(tmp_path, range(0, 40, 5))
    for number in range(1, 8, 2):
        path = tmp_path / f"{number:03d}.dcm"
        content = path.read_bytes()
        assert damage(content) != content
        path.write_bytes(damage(content))
    index = index_folder(tmp_path)
    assert index.rejects["series_instance_uid"].tolist() == ["1.2.3.4"] * 4
    row = index.series.iloc[0]
    assert (row["num_slices"], row["slice_spacing_mm"]) == (4, 10)
    assert (row["verdict"], row["num_rejected"]) == ("incomplete", 4)
    assert index.describe("1.2.3.4").endswith("; incomplete (4 files of the series refused)")


def test_what_would_have_been_no_slice_makes_no_series_incomplete(tmp_path):
    write_series(tmp_path, [0, 5, 10])
    (tmp_path / "copy.dcm").write_bytes((tmp_path / "000.dcm").read_bytes())
    for name, tags in {
        "mpr": {"ImageType": ["DERIVED", "SECONDARY", "MPR"]},
        "report": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.67", "Modality": "SR"},
    }.items():
        write(tmp_path, f"{name}.dcm", SOPInstanceUID=f"1.2.{len(name)}", **tags)
    index = index_folder(tmp_path)
    assert sorted(index.rejects["code"]) == ["DUPLICATE_UID", "NOT_CT", "NOT_ORIGINAL"]
    assert index.series[["verdict", "num_rejected"]].values.tolist() == [["ok", 0]]


def test_a_scout_of_the_same_series_is_complete(tmp_path):
    write_series(tmp_path, [0, 5, 10])
    write(tmp_path, "scout.dcm", SOPInstanceUID="1.9", ImageType=["ORIGINAL", "PRIMARY", "SCOUT"])
    write(tmp_path, "bad.dcm", SOPInstanceUID="1.8", Rows=0)
    verdicts = index_folder(tmp_path).series.set_index("series_uid")["verdict"]
    assert verdicts.to_dict() == {"1.2.3.4": "incomplete", "1.2.3.4#2": "localizer,too few"}


# --- The walk ---------------------------------------------------------------------------------


def paths_of(index, folder):
    return sorted(os.path.relpath(path, folder) for path in index.slices["container"])


def test_linked_folders_are_followed(tmp_path):
    """A data set of links to patients' folders, one of them through another link."""
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    write_series(folder / "p1", [0], series="1.2.1")
    write_series(elsewhere / "p2" / "deep", [0], series="1.2.2")
    write_series(elsewhere / "p3", [0], series="1.2.3")
    (folder / "p2").symlink_to(elsewhere / "p2")
    (elsewhere / "to_p3").symlink_to(elsewhere / "p3")
    (folder / "p3").symlink_to(elsewhere / "to_p3")
    write(elsewhere, "one.dcm", SOPInstanceUID="1.2.77")
    (folder / "one.dcm").symlink_to(elsewhere / "one.dcm")
    index = index_folder(folder)
    expected = ["one.dcm", "p1/000.dcm", "p2/deep/000.dcm", "p3/000.dcm"]
    assert paths_of(index, folder) == expected
    assert index.rejects.empty
    assert_equal(index_folder(folder, workers=2), index)


def test_links_in_a_circle_end(tmp_path):
    write_series(tmp_path / "a" / "b", [0, 5, 10])
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    index = index_folder(tmp_path)
    assert paths_of(index, tmp_path) == ["a/b/000.dcm", "a/b/001.dcm", "a/b/002.dcm"]
    assert index.rejects[["code"]].values.tolist() == [["UNREADABLE"]]  # a link to itself


def test_a_folder_that_two_paths_reach_is_read_once_by_its_own(tmp_path):
    write_series(tmp_path / "data" / "z", [0, 5, 10])
    (tmp_path / "data" / "a").symlink_to(tmp_path / "data" / "z")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "data" / "z")
    index = index_folder(tmp_path / "data")
    assert paths_of(index, tmp_path / "data") == ["z/000.dcm", "z/001.dcm", "z/002.dcm"]
    assert index.rejects.empty
    # The folder itself may be a link.
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert len(index_folder(tmp_path / "link").slices) == 3


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="Windows has no devices in folders")
def test_a_device_is_listed_and_not_opened(tmp_path):
    write_series(tmp_path, [0, 5, 10])
    (tmp_path / "device").symlink_to("/dev/null")
    index = index_folder(tmp_path)
    assert index.rejects[["code", "detail"]].values.tolist() == [
        ["UNREADABLE", "a device or pipe; expected a file"]
    ]


def test_what_is_hidden_is_listed(tmp_path):
    write_series(tmp_path, [0, 5, 10])
    write_series(tmp_path / "sub" / ".snapshot", [0, 5], series="1.2.9")
    (tmp_path / "._000.dcm").write_bytes(b"\0" * 100)
    (tmp_path / "sub" / ".link").symlink_to(tmp_path)
    index = index_folder(tmp_path)
    assert len(index.slices) == 3
    table = index.rejects
    found = {os.path.relpath(row.path, tmp_path): row.detail for row in table.itertuples()}
    assert found == {
        "._000.dcm": "a hidden file, not read",
        "sub/.link": "a hidden folder, not read",
        "sub/.snapshot": "a hidden folder, not read",
    }
    assert set(table["code"]) == {"HIDDEN"}
    assert "rename it" in table["hint"][0]
    # Who asks for a hidden folder gets it.
    assert len(index_folder(tmp_path / "sub" / ".snapshot").slices) == 2


def test_a_folder_that_may_not_be_read_is_listed(tmp_path, monkeypatch):
    write_series(tmp_path / "open", [0, 5, 10])
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def scandir(place):
        if str(place).endswith("closed"):
            raise PermissionError(13, "Permission denied", place)
        return real(place)

    monkeypatch.setattr(os, "scandir", scandir)
    index = index_folder(tmp_path)
    assert index.rejects[["path", "code", "detail"]].values.tolist() == [
        [str(tmp_path / "closed"), "UNREADABLE", "folder: Permission denied"]
    ]
    assert len(index.slices) == 3


def test_names_that_are_no_text(tmp_path):
    write_series(tmp_path, [0])
    try:
        (tmp_path / os.fsdecode(b"b\xff.dcm")).write_bytes(b"")
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system wants Unicode")
    write(tmp_path, 'new\nline, "quoted" \r.dcm', SOPInstanceUID="1.2.3.4.7")
    index = index_folder(tmp_path)
    assert index.rejects[["code", "detail"]].to_numpy().tolist() == [
        ["UNREADABLE", "its name is not UTF-8; rename it"]
    ]
    index.save(tmp_path / "index")
    assert_equal(SeriesIndex.load(tmp_path / "index"), index)


def test_no_slice_at_all(tmp_path):
    with pytest.raises(UsageError, match="absent does not exist"):
        index_folder(tmp_path / "absent")
    with pytest.raises(DataError, match=r"no CT slice in .*: 0 files seen\."):
        index_folder(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    write(tmp_path, "mr.dcm", Modality="MR")
    with pytest.raises(
        NothingUsable, match=r"2 files seen \(NOT_CT 1, NOT_DICOM 1\); .*mr.dcm: .*Modality is 'MR'"
    ) as caught:
        index_folder(tmp_path)
    assert caught.value.exit_code == 3
    assert caught.value.rejects["code"].tolist() == ["NOT_DICOM", "NOT_CT"]
    with pytest.raises(NothingUsable, match=r"1 file seen \(NOT_DICOM 1\); .*a.csv: no 'DICM'"):
        index_folder(tmp_path / "a.csv")
    with pytest.raises(UsageError, match="workers is -1"):
        index_folder(tmp_path, workers=-1)


def test_the_patient_stays_out_of_all_tables(tmp_path):
    write_series(tmp_path, [0, 5], PatientName="CANARY^A", PatientBirthDate="19010101")
    write(tmp_path, "bad.dcm", PatientName="CANARY^B", PatientID="CANARY-3", Rows=0)
    journal = tmp_path / "journal"
    index = index_folder(tmp_path, journal=journal)
    index.save(tmp_path / "index")
    written = [*(tmp_path / "index").iterdir(), journal]
    assert len(written) == 5
    for path in written:
        content = path.read_text()
        assert "CANARY" not in content
        assert "19010101" not in content


# --- Workers, progress, journal -------------------------------------------------------------


def test_workers_find_the_same(tmp_path):
    for series in range(3):
        write_series(tmp_path, range(0, 50, 5), series=f"1.2.{series}", prefix=f"{series}-")
    (tmp_path / "text.txt").write_text("x")
    assert_equal(index_folder(tmp_path, workers=2), index_folder(tmp_path))


def _die(any_image_type, entries):
    os._exit(1)


def test_a_dead_worker_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(walk, "_read_headers", _die)
    entries = [Entry(str(tmp_path / str(n)), 0, 0) for n in range(4)]
    with pytest.raises(EnvironmentProblem, match="reading headers has died"):
        read_all(entries, 0, 1, Journal(None), None)


def test_progress(tmp_path):
    write_series(tmp_path, range(0, 250))
    calls = []
    index_folder(tmp_path, progress=lambda *call: calls.append(call))
    assert calls[-1] == ("indexing", 250, 250)
    assert len(calls) <= 200
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)


@pytest.fixture
def reads(monkeypatch):
    """The names of the files whose headers are read."""
    names = []
    real = walk.read_headers

    def counted(path, **settings):
        names.append(Path(path).name)
        return real(path, **settings)

    monkeypatch.setattr(walk, "read_headers", counted)
    return names


def test_the_journal_spares_reading_again(tmp_path, reads):
    folder, journal = tmp_path / "dicom", tmp_path / "journal"
    write_series(folder, [0, 5, 10])
    (folder / "text.txt").write_text("x")
    first = index_folder(folder, journal=journal)
    assert len(reads) == 4
    reads.clear()
    assert_equal(index_folder(folder, journal=journal), first)
    assert reads == []
    os.utime(folder / "001.dcm", ns=(1, 1))
    write(folder, "new.dcm", SOPInstanceUID="1.2.77", ImagePositionPatient=[0, 0, 15])
    (folder / "000.dcm").unlink()
    again = index_folder(folder, journal=journal)
    assert sorted(reads) == ["001.dcm", "new.dcm"]
    assert_equal(again, index_folder(folder))


def test_an_interrupted_indexing_goes_on(tmp_path, reads, monkeypatch):
    folder, journal = tmp_path / "dicom", tmp_path / "journal"
    write_series(folder, range(10))

    def interrupt(step, done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_folder(folder, journal=journal, progress=interrupt)
    assert len(reads) == 4
    index = index_folder(folder, journal=journal)
    assert len(reads) == 10
    assert_equal(index, index_folder(folder))


@pytest.mark.parametrize("cut", [1, 20, 150])
def test_a_torn_line_is_ignored(tmp_path, reads, cut):
    folder, journal = tmp_path / "dicom", tmp_path / "journal"
    write_series(folder, range(5))
    index = index_folder(folder, journal=journal)
    journal.write_bytes(journal.read_bytes()[:-cut])
    reads.clear()
    assert_equal(index_folder(folder, journal=journal), index)
    assert reads == (["004.dcm"] if cut > 1 else [])
    reads.clear()
    assert_equal(index_folder(folder, journal=journal), index)
    assert reads == []


def test_a_flipped_bit_in_the_journal_is_read_again(tmp_path, reads):
    folder, journal = tmp_path / "dicom", tmp_path / "journal"
    write_series(folder, range(5))
    index = index_folder(folder, journal=journal)
    content = journal.read_bytes()
    journal.write_bytes(content.replace(b"[-125.0,-125.0,2.0]", b"[-125.0,-125.0,3.0]"))
    reads.clear()
    assert_equal(index_folder(folder, journal=journal), index)
    assert reads == ["002.dcm"]


def test_a_missing_decoder_is_not_kept(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.add([Entry("/a", 1, 2, "NO_DECODER", "x"), Entry("/b", 1, 2, "NOT_DICOM", "x")])
    again = Journal(tmp_path / "journal")
    assert again.find(Entry("/a", 1, 2)) == []
    assert again.find(Entry("/b", 1, 2))[0][:5] == ("/b", 1, 2, "NOT_DICOM", "x")
    assert again.find(Entry("/b", 1, 3)) == []


def test_a_journal_of_another_version_is_begun_anew(tmp_path):
    path = tmp_path / "journal"
    path.write_bytes(b"ich-index-journal 0\nabc\n")
    Journal(path).add([Entry("/a", 1, 2, "NOT_CT", "x")])
    assert Journal(path).find(Entry("/a", 1, 2))[0].code == "NOT_CT"


def test_another_file_is_never_taken_for_a_journal(tmp_path):
    write_series(tmp_path / "dicom", range(3))
    labels = tmp_path / "labels.csv"
    labels.write_text("ID,Label\n")
    with pytest.raises(UsageError, match="not a journal"):
        index_folder(tmp_path / "dicom", journal=labels)
    assert labels.read_text() == "ID,Label\n"


def test_a_journal_inside_the_folder_is_not_indexed(tmp_path):
    write_series(tmp_path, range(3))
    for _ in range(2):
        assert len(index_folder(tmp_path, journal=tmp_path / "journal").rejects) == 0


# --- Saving ---------------------------------------------------------------------------------

NASTY = [
    "=cmd|'/C calc'!A0",
    "+1",
    "-1",
    "@x",
    "'quoted",
    "NA",
    "nan",
    "",
    "007",
    "1e5",
    "a,b",
    'a"b',
    "a\nb",
    "a\r\nb",
    "\tx",
    "Größe مريض",
    "True",
]


def index_of(texts, floats):
    sizes = (2, 2, 0.1, 0.1, 9, 9)
    rows = [
        (
            text,
            f"u{n}",
            "s",
            "t",
            text,
            f"/d/{n}",
            "",
            n,
            floats[n % len(floats)],
            *sizes,
            "1",
            0.0,
            "",
            *(0, 0, 0, 0),
        )
        for n, text in enumerate(texts)
    ]
    rejects = [(text, "NOT_CT", text, text, text, text) for text in texts]
    slices = make_table(rows, SLICE_COLUMNS)
    return SeriesIndex(slices, make_table([], SERIES_COLUMNS), make_table(rejects, REJECT_COLUMNS))


def test_saved_texts_come_back(tmp_path):
    index = index_of(NASTY, [0.1, 1 / 3, float("nan"), -1e-17, 123456.789012345])
    index.save(tmp_path / "index")
    assert_equal(SeriesIndex.load(tmp_path / "index"), index)
    content = (tmp_path / "index" / "rejects.csv").read_text()
    assert not any(f'"{sign}' in content for sign in "=+-@")


@settings(max_examples=40)
@given(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=5),
    st.lists(st.floats(allow_infinity=False), min_size=1, max_size=5),
)
def test_any_text_and_number_comes_back(tmp_path_factory, texts, floats):
    index = index_of(texts, floats)
    folder = tmp_path_factory.mktemp("index")
    index.save(folder)
    assert_equal(SeriesIndex.load(folder), index)


def test_labels_and_flags_come_back(tmp_path):
    write_series(tmp_path / "dicom", range(3))
    index = index_folder(tmp_path / "dicom")
    index = dataclasses.replace(
        index,
        slices=index.slices.assign(
            any=pd.Series([0, 1, -1], dtype="int8"), repaired=[True, False, True], split="train"
        ),
    )
    index.save(tmp_path / "index")
    loaded = SeriesIndex.load(tmp_path / "index")
    assert_equal(loaded, index)
    assert loaded.slices["any"].dtype == np.int8


def test_damage_is_noticed(tmp_path):
    write_series(tmp_path / "dicom", range(3))
    index = index_folder(tmp_path / "dicom")
    folder = tmp_path / "index"
    index.save(folder)
    with pytest.raises(UsageError, match="already exists"):
        index.save(folder)
    path = folder / "slices.csv"
    content = path.read_text()
    path.write_text(content.replace("1.2.3.4.2", "1.2.3.4.5"))
    with pytest.raises(StaleError, match=r"slices\.csv was changed or damaged"):
        SeriesIndex.load(folder)
    path.unlink()
    with pytest.raises(StaleError, match="cannot be read"):
        SeriesIndex.load(folder)
    manifest = folder / "index.json"
    manifest.write_text(manifest.read_text().replace('"schema": 1', '"schema": 0'))
    with pytest.raises(StaleError, match="schema 0; expected 1"):
        SeriesIndex.load(folder)
    with pytest.raises(StaleError, match="does not exist"):
        SeriesIndex.load(tmp_path)


def test_describe_an_unknown_series(tmp_path):
    write_series(tmp_path, range(3))
    index = index_folder(tmp_path)
    assert index.describe("1.2.3.4") == (
        "1.2.3.4: 3 slices of 16 x 16; slice spacing 1 mm (2x); tilt 0.0 degrees; ok"
    )
    with pytest.raises(UsageError, match=r"no series 9\.9"):
        index.describe("9.9")


@pytest.mark.parametrize(
    "content", ["[]", '{"schema": 1}', '{"schema": 1, "tables": {"slices": 1}}']
)
def test_an_edited_index_is_refused(tmp_path, content):
    write_series(tmp_path / "dicom", range(3))
    index_folder(tmp_path / "dicom").save(tmp_path / "index")
    (tmp_path / "index" / "index.json").write_text(content)
    with pytest.raises(StaleError, match="damaged|schema None"):
        SeriesIndex.load(tmp_path / "index")


def test_a_limit_counts_series_that_can_be_used(tmp_path):
    scout = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    write_series(tmp_path, [0], series="1.2.1", prefix="scout", ImageType=scout)
    write_series(tmp_path, [0, 5, 10], series="1.2.2", prefix="first")
    write_series(tmp_path, [0, 5, 10], series="1.2.3", prefix="second")
    index = prepare_index(tmp_path, limit_series=1)
    assert index.series["series_uid"].tolist() == ["1.2.2"]
    assert index.slices["series_uid"].tolist() == ["1.2.2"] * 3
    assert index.rejects["code"].tolist() == ["LOCALIZER"]
    with pytest.raises(UsageError, match="--limit-series is 0; expected at least 1"):
        prepare_index(tmp_path, limit_series=0)
