"""All ways to store an axial slice give the same pixels, at the same places."""

import dataclasses
import io
import itertools

import numpy as np
import pytest
from tiny_dicom import tiny_file

from ich_keras.ct.dicom import read_header, read_hu
from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.ct.turning import Plane, Turn
from ich_keras.data.cache.cache import CTCache, build_cache
from ich_keras.errors import StaleError

AXES = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0))
ORIENTATIONS = [
    row + column for row, column in itertools.product(AXES, AXES) if row[0] ** 2 != column[0] ** 2
]
SIDES_MM = (12.0, 20.0)  # of the picture: left-right, front-back
STEPS_MM = (0.5, 0.8)


def hu_at(points):
    """HU that differ everywhere and have no symmetry; points: float (..., 3), mm."""
    x, y, z = np.moveaxis(np.rint(points * 10).astype(int), -1, 0)
    return x * 3 + y * y // 9 - z * 7


def stored_slice(orientation, z):
    """The pixels and the tags of one slice through the same rectangle, in any orientation."""
    row, column = (np.array(part, float) for part in (orientation[:3], orientation[3:]))
    is_left = abs(row[0]) == 1
    step_of = dict(zip("xy", STEPS_MM, strict=True))
    counts = {"x": round(SIDES_MM[0] / STEPS_MM[0]), "y": round(SIDES_MM[1] / STEPS_MM[1])}
    along_row, along_column = ("x", "y") if is_left else ("y", "x")
    first = np.array([3.0, -7.0, z])
    for direction, axis in ((row, along_row), (column, along_column)):
        if direction.sum() < 0:  # it runs back from the far side
            first -= direction * step_of[axis] * (counts[axis] - 1)
    rows, columns = np.mgrid[: counts[along_column], : counts[along_row]]
    points = (
        first
        + columns[..., np.newaxis] * row * step_of[along_row]
        + rows[..., np.newaxis] * column * step_of[along_column]
    )
    return hu_at(points) + 1024, {
        "ImageOrientationPatient": list(orientation),
        "ImagePositionPatient": first.tolist(),
        "PixelSpacing": [step_of[along_column], step_of[along_row]],
    }


def test_there_are_eight_ways():
    assert len(ORIENTATIONS) == 8
    assert {Turn.of(orientation) for orientation in ORIENTATIONS} == {
        Turn(*flags) for flags in itertools.product((False, True), repeat=3)
    }


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("is_upward", [True, False])
def test_the_same_head_in_every_orientation(tmp_path, orientation, is_upward):
    """Supine and prone, on either side, mirrored, from the feet or from the head."""
    heights = [0.0, 5.0, 10.0, 15.0]
    for number, z in enumerate(heights if is_upward else heights[::-1]):
        stored, tags = stored_slice(orientation, z)
        uid = f"1.2.3.4.{number}"
        path = tmp_path / f"{number}.dcm"
        path.write_bytes(tiny_file(stored, SOPInstanceUID=uid, InstanceNumber=number, **tags))
    index = index_folder(tmp_path)
    volume = np.stack([read_hu(path) for path in index.slices["container"]])
    # By hand: column to the left, row to the back, slice to the head.
    z, y, x = np.meshgrid(heights, -7 + 0.8 * np.arange(25), 3 + 0.5 * np.arange(24), indexing="ij")
    np.testing.assert_array_equal(volume, hu_at(np.stack([x, y, z], axis=-1)))
    row = index.series.iloc[0]
    assert (row["verdict"], row["slice_spacing_mm"]) == ("ok", 5)
    assert (row["rows"], row["columns"]) == (25, 24) == volume.shape[1:]
    assert (row["row_spacing_mm"], row["column_spacing_mm"]) == (0.8, 0.5)
    cosines = row[["row_x", "row_y", "row_z", "column_x", "column_y", "column_z"]].astype(float)
    assert [f"{part:.1f}" for part in cosines] == ["1.0", "0.0", "0.0", "0.0", "1.0", "0.0"]
    assert (set(index.slices["turn"]) == {""}) == (orientation == (1, 0, 0, 0, 1, 0))
    header = read_header(index.slices["container"][0])
    np.testing.assert_allclose(header.position, (3, -7, 0), atol=1e-9)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_tilted_slices_are_turned_to_the_nearest_axes(orientation):
    """The first pixel of the description is where the header says that this pixel is."""
    angle = np.radians(18.5)
    tilt = np.array(
        [[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]]
    )
    row, column = tilt @ orientation[:3], tilt @ orientation[3:]
    plane = Plane(3, 4, 0.8, 0.5, (3.0, -7.0, 5.0), (*row, *column))
    turn = Turn.of(plane.orientation)
    assert turn == Turn.of(orientation)
    r, c = np.mgrid[:3, :4]
    points = (
        np.array(plane.position)
        + c[..., np.newaxis] * row * 0.5
        + r[..., np.newaxis] * column * 0.8
    )
    turned = turn.plane(plane)
    r, c = np.mgrid[: turned.rows, : turned.columns]
    again = (
        np.array(turned.position)
        + c[..., np.newaxis] * np.array(turned.orientation[:3]) * turned.column_spacing_mm
        + r[..., np.newaxis] * np.array(turned.orientation[3:]) * turned.row_spacing_mm
    )
    np.testing.assert_allclose(turn.pixels(points), again, atol=1e-12)
    assert turned.orientation[0] > 0.9
    assert turned.orientation[4] > 0.9


@pytest.mark.parametrize(
    "orientation", [(1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1), (0, -1, 0, 0, 0, 1)]
)
def test_other_planes_stay_as_they_are(orientation):
    assert Turn.of(orientation) == Turn()
    values = np.arange(12).reshape(3, 4)
    content = tiny_file(values, ImageOrientationPatient=list(orientation))
    np.testing.assert_array_equal(read_hu(io.BytesIO(content)), values - 1024)


def test_a_turn_is_named():
    assert str(Turn.of((0, -1, 0, 1, 0, 0))) == "transposed, rows flipped"
    assert str(Turn.of((-1, 0, 0, 0, 1, 0))) == "columns flipped"
    assert str(Turn()) == ""


def test_what_needs_no_turn_is_not_even_copied():
    values = np.zeros((3, 4))
    assert Turn().pixels(values) is values


@pytest.mark.parametrize(
    ("degrees", "expected"), [(0, "ok"), (19, "ok"), (21, "rotated"), (40, "rotated")]
)
def test_a_picture_between_two_axes_gets_a_verdict(tmp_path, degrees, expected):
    angle = np.radians(degrees)
    cosines = [np.cos(angle), np.sin(angle), 0, -np.sin(angle), np.cos(angle), 0]
    for number in range(4):
        content = tiny_file(
            SOPInstanceUID=f"1.2.3.4.{number}",
            ImagePositionPatient=[0, 0, 5 * number],
            ImageOrientationPatient=[round(part, 6) for part in cosines],
        )
        (tmp_path / f"{number}.dcm").write_bytes(content)
    assert index_folder(tmp_path).series["verdict"].tolist() == [expected]


def test_rounding_does_not_tear_a_picture_at_45_degrees(tmp_path):
    for number in range(4):
        nudge = 1e-4 * (number % 2)
        content = tiny_file(
            SOPInstanceUID=f"1.2.3.4.{number}",
            ImagePositionPatient=[0, 0, 5 * number],
            ImageOrientationPatient=[0.7071 - nudge, 0.7071 + nudge, 0, -0.7071, 0.7071, 0],
        )
        (tmp_path / f"{number}.dcm").write_bytes(content)
    assert index_folder(tmp_path).series["num_slices"].tolist() == [4]


def test_an_index_or_a_cache_of_slices_as_stored_is_stale(tmp_path, monkeypatch):
    (tmp_path / "dicom").mkdir()
    for number in range(3):
        content = tiny_file(
            SOPInstanceUID=f"1.2.3.4.{number}", ImagePositionPatient=[0, 0, 5 * number]
        )
        (tmp_path / "dicom" / f"{number}.dcm").write_bytes(content)
    index = index_folder(tmp_path / "dicom")
    assert len(build_cache(index, tmp_path / "cache", size=16)) == 3
    older = dataclasses.replace(index, series=index.series.assign(row_x=-1.0))
    older.save(tmp_path / "index")
    with pytest.raises(StaleError, match="holds series 1.2.3.4 as it was stored"):
        SeriesIndex.load(tmp_path / "index")
    # As if it had been built when slices of another orientation were left as they are.
    monkeypatch.setattr(Turn, "of", lambda orientation: Turn(flips_rows=True))
    with pytest.raises(StaleError, match="make index and cache again"):
        CTCache.open(tmp_path / "cache")
