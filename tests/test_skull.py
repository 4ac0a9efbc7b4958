"""Gaps in the skull, and series without a head: shapes, phantoms, real heads."""

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from pydicom.data import get_testdata_file
from untrained_runs import untrained_run, validated

from ich_keras.cli import main
from ich_keras.ct.dicom import read_slice
from ich_keras.ct.series import index_folder
from ich_keras.data.reading import indexed_slices, read_indexed
from ich_keras.data.skull import (
    COARSEST_MM,
    DIRECTIONS,
    GAP_MM,
    SeriesFlags,
    flags_of,
    skull_profile,
)
from ich_keras.labels import LabelSet
from ich_keras.models.spec import ModelSpec
from ich_keras.phantom.dicom import dicom_bytes, phantom_dataset, sop_instance_uids
from ich_keras.phantom.plan import PhantomSpec, make_phantom
from ich_keras.prediction import predict_folder
from ich_keras.prediction_journal import SeriesResult

OPERATED, NOTHING, EMPTY = SeriesFlags("yes", ""), SeriesFlags("", ""), SeriesFlags("", "yes")
SIDE, SPACING_MM = 240, 5.0


def head(num_slices=24, skull_mm=6.0, radius_mm=70.0):
    """A ball of brain in a shell of bone in skin, 1 mm pixels; int16 (slices, rows, columns)."""
    z = np.arange(num_slices) * SPACING_MM - 20
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    from_middle = np.sqrt(x**2 + y**2 + z[:, None, None] ** 2)
    hu = np.full(from_middle.shape, -1000, np.int16)
    hu[from_middle < radius_mm + 6] = 40
    hu[from_middle < radius_mm] = 1000
    hu[from_middle < radius_mm - skull_mm] = 35
    return hu


def holed(hu, width_mm, height_mm, middle_mm=20.0, degrees=0.0):
    """Take the bone out of a box on one side, `width_mm` across and `height_mm` high."""
    hu = hu.copy()
    z = np.arange(len(hu)) * SPACING_MM - 20
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    turn = np.radians(degrees)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    is_out = (along > 0) & (abs(across) < width_mm / 2)
    is_out = is_out & (abs(z - middle_mm) < height_mm / 2)[:, None, None]
    hu[is_out & (hu > 200)] = 40
    return hu


def flags(hu, spacing_mm=SPACING_MM, pixel_mm=1.0):
    profiles = [skull_profile(one, pixel_mm, pixel_mm) for one in hu]
    return flags_of(profiles, [spacing_mm * n for n in range(len(hu))])


def test_a_whole_skull_and_one_with_a_hole():
    assert flags(head()) == NOTHING
    for degrees in (0, 45, 90, 178, 180, 270, 359):
        assert flags(holed(head(), 40, 40, degrees=degrees)) == OPERATED


def test_a_gap_is_as_wide_and_as_high_as_said():
    assert flags(holed(head(), GAP_MM + 10, 40)) == OPERATED
    assert flags(holed(head(), GAP_MM - 6, 40)) == NOTHING
    assert flags(holed(head(), 40, 8)) == NOTHING  # one slice
    assert flags(holed(head(), 40, 26)) == OPERATED


def test_gaps_that_do_not_lie_above_each_other_are_none():
    hu = head()
    for number in range(0, len(hu)):
        # On one slice here, on the next at the other side.
        hu[number] = holed(hu, 40, 500, degrees=180 * (number % 2))[number]
    assert flags(hu) == NOTHING


def test_the_profile_of_a_ring():
    found = skull_profile(head()[4], 1.0, 1.0)
    assert found.is_open.sum() == 0 and found.closed == 1
    np.testing.assert_allclose(found.skin_mm, 75.5, atol=1.5)
    core_mm = 0.7 * 75.5
    assert found.brain_mm2 == pytest.approx(np.pi * core_mm**2, rel=0.03)
    assert found.bone_mm2 == found.air_mm2 == 0
    open_ = skull_profile(holed(head(), 40, 40)[8], 1.0, 1.0).is_open
    assert open_[0] and not open_[DIRECTIONS // 2]
    # 40 mm on a ring of 67 mm: from -17 to 17 degrees.
    expected = 2 * np.arcsin(20 / 67) / (2 * np.pi) * DIRECTIONS
    assert open_.sum() == pytest.approx(expected, abs=2)


@pytest.mark.parametrize("pixel_mm", [0.45, 0.8, 1.3, COARSEST_MM])
def test_any_fine_pixels_show_the_same(pixel_mm):
    def at(hu):
        side = round(SIDE / pixel_mm)
        places = (np.arange(side) * pixel_mm).astype(int).clip(0, SIDE - 1)
        return hu[:, places][:, :, places]

    assert flags(at(head()), pixel_mm=pixel_mm) == NOTHING
    assert flags(at(holed(head(), 40, 40)), pixel_mm=pixel_mm) == OPERATED


def test_coarse_pixels_say_nothing():
    assert skull_profile(head()[4, ::3, ::3], 3.0, 3.0) is None
    assert flags(holed(head(), 40, 40)[:, ::3, ::3], pixel_mm=3.0) == NOTHING
    assert flags_of([], []) == NOTHING
    assert flags_of([None, None], [0.0, 5.0]) == NOTHING


def test_a_head_that_is_cut_off_is_not_open_there():
    cut = head()[:, :, 60:]  # 60 mm of one side lie outside of the image
    assert flags(cut) == NOTHING
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    zoomed = head()
    zoomed[:, np.hypot(x, y) > 66] = -1024  # the circle of a zoomed scan
    assert flags(zoomed[:, 53:-53, 53:-53]) == NOTHING


def test_what_holds_no_head_is_empty():
    air = np.full((10, SIDE, SIDE), -1000, np.int16)
    noise = np.random.default_rng(0).normal(-1000, 10, air.shape).astype(np.int16)
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    water = np.where(np.hypot(x, y) < 100, 0, -1000).astype(np.int16)
    holder = air.copy()
    holder[:, 200:203] = 300
    for hu in (air, noise, np.stack([water] * 10), holder):
        assert flags(hu) == EMPTY
    # A few slices above the head make no difference, and neither does a single slice of it.
    assert flags(np.concatenate([head(), air])) == NOTHING
    assert flags(head()[6:7]) == NOTHING


SPECS = [
    PhantomSpec(11, patient, patient, subtypes, encoding, 192, spacing)
    for patient, (subtypes, encoding, spacing) in enumerate(
        [
            ((), "signed-16", (5.0, 5.0)),
            (("epidural", "subdural"), "unsigned-12", (5.0, 5.0)),
            (("subarachnoid",), "signed-12", (8.0, 8.0)),
            (("intraparenchymal",), "signed-16", (3.0, 3.0)),
        ]
    )
]


@pytest.fixture(scope="module")
def phantoms():
    return [make_phantom(spec) for spec in SPECS]


def of_phantom(phantom, hu):
    pixel_mm = phantom.scan.pixel_mm
    profiles = [skull_profile(one, pixel_mm, pixel_mm) for one in hu]
    normal = np.cross(*phantom.scan.orientation)
    return flags_of(profiles, (phantom.scan.origin @ normal).tolist())


def without_flap(phantom, radius_mm=32.0, direction=(0.75, -0.2, 0.6)):
    """A phantom whose skull lacks a piece: a flap of the vault, left in front."""
    scan, hu = phantom.scan, phantom.hu.copy()
    rows, columns = np.mgrid[: hu.shape[1], : hu.shape[2]]
    towards = np.array(direction) / np.linalg.norm(direction)
    for number, image in enumerate(hu):
        place = scan.origin[number][:, None, None] + scan.pixel_mm * (
            scan.orientation[0][:, None, None] * columns + scan.orientation[1][:, None, None] * rows
        )
        place = np.einsum("ij,jrc->irc", scan.rotation, place - scan.centre[:, None, None])
        along = np.einsum("i,irc->rc", towards, place)
        across = np.linalg.norm(place - towards[:, None, None] * along, axis=0)
        image[(along > 0) & (across < radius_mm) & (image > 120)] = 45
    return hu


def test_phantoms_are_whole_and_show_where_a_flap_is_missing(phantoms):
    for phantom in phantoms:
        assert of_phantom(phantom, phantom.hu) == NOTHING
        assert of_phantom(phantom, without_flap(phantom)) == OPERATED


@pytest.mark.parametrize("direction", [(-0.8, 0.3, 0.5), (0.1, -0.8, 0.6), (0.4, 0.75, 0.5)])
def test_flaps_of_other_places_are_missed_by_none(phantoms, direction):
    for phantom in phantoms[:2]:
        assert of_phantom(phantom, without_flap(phantom, direction=direction)) == OPERATED


@pytest.mark.slow
def test_no_phantom_is_flagged():
    for patient in range(40):
        spacing = ((5.0, 8.0), (2.5, 4.0))[patient % 4 == 0]
        phantom = make_phantom(PhantomSpec(77, patient, patient, (), "signed-16", 256, spacing))
        assert of_phantom(phantom, phantom.hu) == NOTHING, patient
        assert of_phantom(phantom, without_flap(phantom)) == OPERATED, patient


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_real_heads_are_whole(real_ge_series, real_rsna_slices):
    index = index_folder(real_ge_series)
    reads = [read_indexed(one, 64, with_skull=True) for one in indexed_slices(index)]
    positions = index.slices["position_mm"].tolist()
    assert flags_of([read.skull for read in reads], positions) == NOTHING
    assert all(read_indexed(one, 64).skull is None for one in indexed_slices(index)[:1])
    for path in sorted(real_rsna_slices.rglob("*.dcm")):
        record = read_slice(str(path))
        header = record.header
        one = skull_profile(record.hu, header.row_spacing_mm, header.column_spacing_mm)
        assert one.shows_head and flags_of([one], [0.0]) == NOTHING


def test_a_prediction_flags_series(tmp_path, phantoms):
    """Through files, the journal and the tables; contrast medium by its tag."""
    data = tmp_path / "data"
    data.mkdir()
    for number, phantom in enumerate(phantoms[:2]):
        hu = without_flap(phantom) if number else phantom.hu
        changed = type(phantom)(phantom.spec, hu, phantom.masks, phantom.scan, phantom.bleeds)
        for place, uid in enumerate(sop_instance_uids(phantom.spec, len(hu))):
            dataset = phantom_dataset(changed, place, uid)
            if number:
                dataset.ContrastBolusAgent = "iodine"
            (data / f"{uid}.dcm").write_bytes(dicom_bytes(dataset))
    labels = LabelSet(("bleed", "any"), "any")
    run = untrained_run(
        tmp_path / "run", "tiny", ModelSpec((16, 16, 3), depth=10, width=8), 16, labels
    )
    truth = np.repeat([[0, 0], [1, 1]], 10, axis=0)
    values = np.random.default_rng(0).random((20, 2))
    validated(run, truth, values, [f"1.{n}" for n in range(20)], range(20))
    found = predict_folder(run, data, tmp_path / "out", device="cpu")
    names = ["contrast", "operated", "empty"]
    assert sorted(found.series[names].values.tolist()) == [["", "", ""], ["yes", "yes", ""]]
    for name in ("series", "studies"):
        table = pd.read_csv(tmp_path / "out" / f"{name}.csv", keep_default_na=False)
        assert sorted(table[names].values.tolist()) == [["", "", ""], ["yes", "yes", ""]]
    done = CliRunner().invoke(
        main,
        f"predict --run {run} --dicom {data} --out {tmp_path / 'again'} --workers 0"
        " --device cpu".split(),
    )
    assert done.exit_code == 0, done.output
    assert "of 2 series: contrast medium 1, gap in the skull 1." in " ".join(done.output.split())


def test_flags_survive_an_interruption():
    result = SeriesResult("a", (1,), ("ab",), (), np.zeros((1, 2), np.float32), 0.5, OPERATED)
    again = SeriesResult.from_json(result.to_json())
    assert again.flags == OPERATED and again.distance == 0.5
    assert isinstance(again.flags, SeriesFlags)


def test_a_real_slice_shows_a_head():
    path = get_testdata_file("693_J2KR.dcm", download=False)
    assert path is not None, "pydicom-data comes with the test extra"
    record = read_slice(path)
    header = record.header
    found = skull_profile(record.hu, header.row_spacing_mm, header.column_spacing_mm)
    assert found.shows_head
    assert flags_of([found], [0.0]) == NOTHING
