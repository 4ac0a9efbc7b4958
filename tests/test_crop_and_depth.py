"""The head cut out of each series, whole series at another distance, slices without brain."""

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from narrow import preset_of
from untrained_runs import untrained_run

from ich_keras.cli.train import train_main
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.ct.pixels import AIR_HU
from ich_keras.data.batches import CTDataset, view_batches
from ich_keras.data.depth import grid_of
from ich_keras.data.emptiness import brain_mm2
from ich_keras.data.head_crop import NO_BOX, HeadCrop, pixels_mm
from ich_keras.data.image_space import input_places
from ich_keras.data.inputs import resize_hu, volume_input
from ich_keras.data.sources import cropped
from ich_keras.data.views import AIR
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.evaluation import evaluate
from ich_keras.explanation import explain_series
from ich_keras.export.runs import export_run
from ich_keras.external import evaluate_external
from ich_keras.models.spec import ModelSpec
from ich_keras.phantom.dicom import write_phantoms
from ich_keras.phantom.plan import PhantomSpec, make_phantom
from ich_keras.planning import split_indices
from ich_keras.prediction import predict_folder
from ich_keras.recipe import Recipe
from ich_keras.run_folder import RunFolder
from ich_keras.training import train
from ich_keras.workflow import make_cache, prepare_index


def recipe_of(preset="resnet18_2d", size=48, **data):
    return Recipe.of(RunConfig(preset=preset, data=DataConfig(size=size, **data)), 48)


# --- Settings -------------------------------------------------------------------------------


def test_they_are_off_by_default_and_recorded_by_value():
    plain = recipe_of()
    assert plain.inputs.crop is None and plain.inputs.depth_mm is None
    assert plain.training.skip_empty_mm2 is None and plain.input_options == []
    old = json.loads(json.dumps(plain.to_dict()))
    for name in ("crop", "depth_mm"):
        del old["inputs"][name]
    del old["training"]["skip_empty_mm2"]
    assert Recipe.from_dict(old) == plain

    found = recipe_of(crop="head", skip_empty=True)
    assert found.inputs.crop == HeadCrop(-300, 0.05) and found.training.skip_empty_mm2 == 1000
    content = json.loads(json.dumps(found.to_dict()))
    assert Recipe.from_dict(content) == found
    assert Recipe.of(found.as_config(), 48) == found
    assert found.input_options == [
        "Input: head cut out with a margin of 5%.",
        "Negative slices with less than 1000 mm2 of brain are not trained on.",
    ]
    content["inputs"]["crop"]["above_hu"] = 0.0
    with pytest.raises(StaleError, match="a crop of the head above 0.0 HU; this version knows"):
        Recipe.from_dict(content)
    content["inputs"]["crop"] = {"margin": 0.05}
    with pytest.raises(StaleError, match="inputs.crop lacks above_hu"):
        Recipe.from_dict(content)
    deep = recipe_of("resnet18_3d", depth_mm=2.5)
    assert Recipe.from_dict(json.loads(json.dumps(deep.to_dict()))) == deep
    assert deep.input_options == ["Input: slices resampled to 2.5 mm."]


@pytest.mark.parametrize(
    ("preset", "data", "message"),
    [
        ("resnet18_2d", {"crop": "brain"}, "data.crop is 'brain'; expected one of head"),
        ("resnet18_2d", {"depth_mm": 2.0}, "resamples whole series; this run is on slices"),
        ("resnet18_3d", {"depth_mm": 0.0}, "data.depth_mm is 0.0; expected 0.1 to 50 mm"),
        ("resnet18_3d", {"depth_mm": 2.0, "tilted": "deshear"}, "slices that move are not interp"),
        ("resnet18_3d", {"skip_empty": True}, "leaves out slices; this run is on whole series"),
    ],
)
def test_what_cannot_be_is_refused(preset, data, message):
    with pytest.raises(UsageError, match=message):
        recipe_of(preset, **data)


def test_inputs_of_whole_series_are_not_prepared_from_parts():
    with pytest.raises(UsageError, match="made of whole series .head cut out"):
        recipe_of(crop="head").inputs.prepare(np.zeros((1, 48, 48), np.int16))


def test_the_command_line_has_them():
    told = CliRunner().invoke(train_main, ["--help"], terminal_width=200).output
    for option in ("--skip-empty", "--crop", "--depth-mm MM"):
        assert option in told


# --- The crop -------------------------------------------------------------------------------


def disc(size, row, column, radius):
    y, x = np.mgrid[:size, :size]
    inside = (y - row) ** 2 + (x - column) ** 2 <= radius**2
    return np.where(inside, 40, AIR_HU).astype(np.int16)


def test_the_square_around_a_head_by_hand():
    hu = np.stack([disc(100, 40, 55, 10), disc(100, 44, 55, 20), disc(100, 0, 0, -1)])
    crop = HeadCrop(margin=0.1)
    top, left, side = crop.box(hu, (2.0, 2.0))
    # From row 24 to 64 and from column 35 to 75: 41 pixels, and a tenth on either side.
    assert side == 50 and (top, left) == (19, 30)
    expected = resize_hu(hu[1, 19:69, 30:80], 100)
    np.testing.assert_array_equal(cropped(hu[1], np.array([top, left, side])), expected)
    # A thin holder is no head; nor is there one in air, and a head that fills the picture stays.
    hu[:, 95] = 200
    assert crop.box(hu, (2.0, 2.0)) == (top, left, side)
    assert crop.box(np.full((2, 100, 100), AIR_HU, np.int16), (2.0, 2.0)) == NO_BOX
    assert crop.box(np.full((2, 100, 100), 40, np.int16), (2.0, 2.0)) == NO_BOX
    whole = cropped(hu[1], np.array(NO_BOX))
    np.testing.assert_array_equal(whole, hu[1])


def test_beyond_the_border_lies_air():
    hu = np.full((20, 20), 40, np.int16)
    found = cropped(hu, np.array([-5, 12, 10]))
    assert (found[:9] == AIR_HU).all() and (found[:, 17:] == AIR_HU).all()
    assert (found[11:, :15] == 40).all()


def test_batches_are_cropped_by_series(phantom_cache):
    inputs = recipe_of("resnet18_2d_stack", crop="head").inputs
    samples = inputs.samples(phantom_cache)
    assert samples.boxes.shape == (len(phantom_cache), 3)
    chosen, spacings = np.arange(40), pixels_mm(phantom_cache.series, 48)
    loader = view_batches(phantom_cache, inputs.view, chosen, 8, samples=samples, seed=None)
    found = np.concatenate([x for x, _ in loader])
    uids = phantom_cache.slices["series_uid"].to_numpy()
    order = list(dict.fromkeys(uids))
    differs = False
    for number in chosen:
        rows = np.flatnonzero(uids == uids[number])
        hu = phantom_cache.slices_hu(rows)
        box = np.array(inputs.crop.box(hu, spacings[order.index(uids[number])]))
        np.testing.assert_array_equal(samples.boxes[number], box)
        middle = cropped(phantom_cache.slices_hu([number])[0], box)
        windows = volume_input(middle[np.newaxis], intensity=inputs.intensity)[0]
        np.testing.assert_array_equal(found[number, ..., 3:6], windows)
        differs |= box[2] > 0
    assert differs
    assert inputs.samples(phantom_cache).boxes is not samples.boxes  # same numbers, found once
    np.testing.assert_array_equal(inputs.samples(phantom_cache).boxes, samples.boxes)


def test_places_in_a_square_are_those_of_its_resizing():
    """A picture of its own pixel numbers, cut and resized, says where they lie."""
    numbers = np.tile(np.arange(64, dtype=np.int16) * 100, (64, 1))
    found = cropped(numbers, np.array([16, 16, 32]))[0] / 100  # number of each pixel of the input
    places = input_places(64, 64, 64, start=16 / 64, extent=32 / 64)
    inner = np.arange(2, 62)  # at the border, resizing repeats the outermost pixel
    np.testing.assert_allclose(np.interp(found[inner], np.arange(64), places), inner, atol=0.01)


# --- Distances ------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1.0, 2.5, 5.0, 7.0])
def test_a_straight_line_stays_straight(depth):
    positions = np.array([0.0, 4.0, 8.5, 12.0, 17.0, 21.0])
    grid = grid_of(positions, depth)
    found = positions[grid.rows] * (1 - grid.shares) + positions[grid.others] * grid.shares
    inner = found[1:-1]
    assert np.diff(inner) == pytest.approx(depth, abs=1e-4)
    assert found[0] == 0 and found[-1] == pytest.approx(21)
    assert (grid.rows != AIR).all()


def test_the_same_distance_gives_the_same_slices():
    grid = grid_of(np.arange(9) * 5.0 - 71.3, 5.0)
    np.testing.assert_array_equal(grid.rows + grid.shares, np.arange(9))
    one = grid_of(np.array([3.0]), 5.0)
    assert one.rows.tolist() == [0] and one.shares.tolist() == [0]


def test_gaps_are_not_averaged_across():
    positions = np.array([0.0, 5.0, 10.0, 40.0, 45.0])
    grid = grid_of(positions, 2.5)
    wanted = np.arange(19) * 2.5
    for place, at in enumerate(wanted):
        if 12.5 < at < 37.5:
            assert grid.rows[place] == AIR
        elif 10 < at < 40:
            nearest = 2 if at < 25 else 3
            assert grid.rows[place] + grid.shares[place] == nearest
        else:
            assert grid.rows[place] != AIR
    with pytest.raises(DataError, match="series s1 has slices without a position"):
        grid_of(np.array([0.0, np.nan]), 5.0, "s1")


def test_two_slices_at_one_place_do_not_divide_by_zero():
    grid = grid_of(np.array([0.0, 5.0, 5.0, 10.0]), 2.5)
    assert np.isfinite(grid.shares).all() and (grid.rows != AIR).all()


def test_batches_are_interpolated(phantom_cache):
    inputs = recipe_of("resnet18_3d", depth_mm=3.0, slices=80).inputs
    samples = inputs.samples(phantom_cache)
    dataset = CTDataset(phantom_cache.pixels, samples, 48, None, None, "wide")
    for number in (0, 3):
        rows = np.array(phantom_cache.series_rows(phantom_cache.series["series_uid"][number]))
        hu = phantom_cache.slices_hu(rows).astype(float)
        grid = grid_of(phantom_cache.slices["position_mm"].to_numpy()[rows], 3.0)
        shares = grid.shares[:, np.newaxis, np.newaxis]
        between = np.rint(hu[grid.rows] * (1 - shares) + hu[grid.others] * shares).astype(np.int16)
        found = dataset[0, np.array([number])][0][0]
        start = (80 - len(between)) // 2
        expected = volume_input(between)
        np.testing.assert_array_equal(found[start : start + len(between)], expected)
        assert (dataset.mask(np.array([number]))[0].sum()) == len(between)


# --- Slices without brain -------------------------------------------------------------------


def test_brain_is_measured_in_mm2(phantom_cache):
    rows = np.array([7, 2, 90])
    found = brain_mm2(phantom_cache.pixels, phantom_cache.series, rows)
    uids = phantom_cache.series["series_uid"].tolist()
    for row, area in zip(rows, found, strict=True):
        hu = phantom_cache.slices_hu([row])[0]
        series = phantom_cache.series.iloc[uids.index(phantom_cache.slices["series_uid"][row])]
        pixel = (series["row_spacing_mm"] * 64 / 48) * (series["column_spacing_mm"] * 64 / 48)
        assert area == pytest.approx(((hu >= 0) & (hu <= 100)).sum() * pixel)


# --- Runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_cache(tmp_path_factory):
    """Series that no run here has seen."""
    folder = tmp_path_factory.mktemp("other")
    write_phantoms(folder / "data", 4, seed=9, matrix=64)
    index = prepare_index(folder / "data" / "images", folder / "data" / "stage_2_train.csv")
    return make_cache(index, folder / "cache", size=48)


@pytest.fixture(scope="module")
def cropping(phantom_cache, tmp_path_factory):
    with preset_of("narrow_2d", ModelSpec((24, 24, 3), depth=10, width=4)):
        config = RunConfig(
            preset="narrow_2d",
            precision="float32",
            data=DataConfig(size=24, crop="head", skip_empty=True),
            fit=FitConfig(epochs=1, learning_rate=1e-3),
        )
        told = []
        folder = tmp_path_factory.mktemp("run") / "cropping"
        yield RunFolder(train(config, phantom_cache, folder, tell=told.append)), told


def test_a_cropping_run_trains_is_scored_and_predicts(
    cropping, phantom_cache, phantom_folder, other_cache
):
    run, told = cropping
    recipe = run.recipe()
    _, indices = split_indices(phantom_cache.slices, recipe)
    rows = indices["train"]
    empty = brain_mm2(phantom_cache.pixels, phantom_cache.series, rows) < 1000
    empty &= phantom_cache.slices["any"].to_numpy()[rows] != 1
    assert empty.any()
    line = f"Left out of training: {empty.sum():,} of {len(rows):,} slices, with less than"
    assert any(one.startswith(line) for one in told)
    assert run.data()["plan"]["num_slices"]["train"] == (~empty).sum()
    assert line in run.report_file.read_text()
    # Never out of evaluation.
    metrics = evaluate(run, phantom_cache, "test")
    assert metrics["slice"]["n"]["samples"] == len(indices["test"])
    result = predict_folder(run, phantom_folder / "images")
    predictions = pd.read_csv(run.predictions_file("test"))
    key, names = "sop_instance_uid", list(recipe.labels.names)
    raw = [f"raw_{name}" for name in names]
    both = result.slices.set_index(key).loc[predictions[key], raw]
    np.testing.assert_allclose(both, predictions[names], atol=1e-5)
    external = evaluate_external(run, other_cache)
    assert len(external.slices) == len(other_cache)


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(PhantomSpec(5, subtypes=("subdural",), matrix=64, slice_spacing_mm=(9, 10)))


def test_maps_of_a_crop_lie_where_it_was(tmp_path, phantom):
    spec = ModelSpec((48, 48, 3), depth=10, width=4)
    run = untrained_run(tmp_path / "run", "narrow_2d_crop", spec, crop="head")
    found = explain_series(run, phantom.hu, phantom.spacing_mm, "any").values["any"]
    with pytest.raises(UsageError, match="makes its input of whole series .head cut out"):
        export_run(run, tmp_path / "x.pt2", "torch")
    inputs = RunFolder(run).recipe().inputs
    resized = np.stack([resize_hu(image, 48) for image in phantom.hu])
    row_mm, column_mm = (64 / 48 * mm for mm in phantom.spacing_mm[1:])
    top, left, side = inputs.crop.box(resized, (row_mm, column_mm))
    assert side
    scale = 64 / 48
    outside = np.ones((64, 64), bool)
    outside[
        max(0, int(top * scale)) : int((top + side) * scale) + 1,
        max(0, int(left * scale)) : int((left + side) * scale) + 1,
    ] = False
    assert (found[:, outside] == 0).all()


def test_maps_of_resampled_series_come_back_to_its_slices(tmp_path, phantom):
    spec = ModelSpec((20, 48, 48, 1), depth=10, width=4)
    run = untrained_run(
        tmp_path / "run", "narrow_3d_mm", spec, view="series", slices=20, depth_mm=6.0
    )
    found = explain_series(run, phantom.hu, phantom.spacing_mm, "any")
    assert found.values["any"].shape == phantom.hu.shape and found.seen.all()


def test_a_resampling_run_predicts_and_is_scored(
    tmp_path, phantom_cache, phantom_folder, other_cache
):
    with preset_of("narrow_3d_depth", ModelSpec((20, 40, 40, 1), depth=10, width=4)):
        config = RunConfig(
            preset="narrow_3d_depth",
            precision="float32",
            data=DataConfig(size=40, slices=20, view="series", depth_mm=7.0),
            fit=FitConfig(epochs=1, learning_rate=1e-3),
        )
        run = RunFolder(train(config, phantom_cache, tmp_path / "run"))
    result = predict_folder(run, phantom_folder / "images")
    predictions = pd.read_csv(run.predictions_file("test"))
    key, names = "series_instance_uid", list(run.recipe().labels.names)
    raw = [f"raw_{name}" for name in names]
    both = result.series.set_index(key).loc[predictions[key], raw]
    np.testing.assert_allclose(both, predictions[names], atol=1e-5)
    external = evaluate_external(run, other_cache)
    assert len(external.series) == len(other_cache.series)
