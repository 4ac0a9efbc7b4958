"""Heat maps on the pixels of a series: places, slabs, whole series, scale, the head, bad input."""

from dataclasses import replace

import cv2
import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers
from untrained_runs import untrained_run

from ich_keras import explain, explain_series, load_run
from ich_keras.config import DataConfig, RunConfig
from ich_keras.ct.head import head_mask
from ich_keras.data.image_space import input_places, interpolation, series_interpolation
from ich_keras.data.inputs import resize_hu
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.explanation import HeatMaps
from ich_keras.labels import LABELS
from ich_keras.map_checks import agreement, randomisation_check, randomised
from ich_keras.models.spec import ModelSpec
from ich_keras.phantom.plan import PhantomSpec, make_phantom
from ich_keras.prediction_samples import inputs_of, series_samples
from ich_keras.recipe import Recipe
from ich_keras.relevance import MapOptions, Relevance
from ich_keras.run_folder import RunFolder

SPACING = (5.0, 4.0, 4.0)


@given(st.integers(2, 70), st.integers(2, 70), st.integers(2, 70))
def test_places_are_those_of_opencv(side, first, second):
    """A ramp tells where each pixel of the input comes from; resized twice, as a run may do."""
    ramp = np.tile(np.arange(side, dtype=np.float32), (side, 1))
    method = cv2.INTER_AREA if first < side else cv2.INTER_LINEAR
    once = cv2.resize(ramp, (first, first), interpolation=method)
    twice = cv2.resize(once, (second, second), interpolation=cv2.INTER_LINEAR)[0]
    expected = input_places(side, side, second)
    # Interpolation is cut off at the edges.
    reach = max(side / first, 1) + max(side / second, 1) * max(1, first / second)
    inside = (twice > reach) & (twice < side - 1 - reach)
    found = np.interp(twice, np.arange(side), expected)
    np.testing.assert_allclose(found[inside], np.arange(second)[inside], atol=0.3)
    if side % first == 0 and first % second == 0:
        np.testing.assert_allclose(found[inside], np.arange(second)[inside], atol=1e-3)


@pytest.mark.parametrize(("rows", "columns"), [(30, 17), (17, 30), (8, 9)])
def test_padding_is_counted(rows, columns):
    hu = np.zeros((rows, columns), np.int16)
    hu[3, 5] = 1000
    square = resize_hu(hu, max(rows, columns))
    row, column = np.unravel_index(square.argmax(), square.shape)
    side = len(square)
    assert input_places(rows, side, side)[3] == row
    assert input_places(columns, side, side)[5] == column


def test_cells_are_interpolated_and_what_was_not_seen_is_0():
    matrix = interpolation(np.array([-0.6, -0.5, 2.0, 5.0, 9.4, 9.6]), 2, 4, 1.0, 10)
    expected = [[0, 0], [1, 0], [0.75, 0.25], [0, 1], [0, 1], [0, 0]]
    np.testing.assert_allclose(matrix, expected)
    assert interpolation(np.arange(3.0), 1, 32, 0.0, 3).tolist() == [[1], [1], [1]]


def test_slices_of_a_series_are_found_again():
    assert series_interpolation(np.array([-1, 0, 1, -1]), 2).tolist() == [
        [0, 1, 0, 0],
        [0, 0, 1, 0],
    ]
    spread = series_interpolation(np.array([0, 2, 5]), 6)
    np.testing.assert_allclose(spread[1], [0.5, 0.5, 0])
    np.testing.assert_allclose(spread[4], [0, 1 / 3, 2 / 3])
    middle = series_interpolation(np.array([1, 2]), 4)
    assert middle.any(axis=1).tolist() == [False, True, True, False]
    assert not series_interpolation(np.array([-1, -1]), 2).any()


def test_the_head_is_the_largest_solid_piece():
    y, x = np.mgrid[-60:60, -60:60]
    hu = np.where((x / 40) ** 2 + (y / 50) ** 2 < 1, 40, -1000)
    hu[40:50, 50:60] = -1000  # an air cell
    hu[115:118] = 300  # a shell below
    hu[20:27, 110:120] = 100  # a smaller piece beside it
    mask = head_mask(np.stack([hu, np.full_like(hu, -1000)]).astype(np.int16), 2.0, 2.0)
    assert not mask[1].any()
    assert mask[0, 45, 55]
    assert not mask[0, 115:].any() and not mask[0, :, 105:].any()
    expected = (x / 40) ** 2 + (y / 50) ** 2 < 1
    assert (mask[0] != expected).mean() < 0.01


def toy_run(view="slice", slices=None, size=24, **data):
    """A recipe, and a network whose map of every label shows what is bright, pixel by pixel.

    The kernel takes the second pixel of two rows and of two columns: cells look at odd pixels.
    """
    kind = "resnet10_2d" if view == "slice" else "resnet10_3d_slab"
    config = RunConfig(
        preset=kind,
        precision="float32",
        data=DataConfig(size=size, view=view, slices=slices, intensity="wide", **data),
    )
    recipe = Recipe.of(config, size)
    image = keras.Input(recipe.inputs.shape)
    if view == "slice":
        x = layers.Conv2D(1, 2, strides=2, use_bias=False, name="conv")(image)
        x = layers.GlobalAveragePooling2D()(x)
        kernel = np.zeros((2, 2, 1, 1))
        kernel[1, 1] = 1
    else:
        x = layers.Conv3D(1, (1, 2, 2), strides=(1, 2, 2), use_bias=False, name="conv")(image)
        x = layers.GlobalAveragePooling3D()(x)
        kernel = np.zeros((1, 2, 2, 1, 1))
        kernel[0, 1, 1] = 1
    model = keras.Model(image, layers.Dense(6, name="fc")(x))
    model.get_layer("conv").set_weights([kernel])
    model.get_layer("fc").set_weights([np.arange(1.0, 7)[np.newaxis], np.zeros(6)])
    return recipe, model


SHOWN = MapOptions("hirescam", "conv")


def head_of(length, rows=96, columns=80):
    """Slices of water with air around: int16 (length, rows, columns)."""
    y, x = np.mgrid[:rows, :columns]
    inside = ((y - rows / 2) / (0.45 * rows)) ** 2 + ((x - columns / 2) / (0.45 * columns)) ** 2 < 1
    return np.where(np.tile(inside, (length, 1, 1)), -200, -1000).astype(np.int16)


@pytest.mark.parametrize("size", [24, 48])
@pytest.mark.parametrize(("rows", "columns"), [(96, 80), (60, 96), (47, 41)])
def test_a_bright_spot_is_shown_where_it_is(rows, columns, size):
    hu = head_of(3, rows, columns)
    # As large as what a cell looks at, whose middle is an even corner of the input's pixels.
    side = max(rows, columns)
    for row, column in ((rows // 2, columns // 3), (rows // 4 + 5, columns // 2 + 3)):
        spot = hu.copy()
        reach = side // size
        spot[1, row - reach : row + reach + 1, column - reach : column + reach + 1] = 300
        maps = explain_series(toy_run(size=size), spot, SPACING, "subdural", SHOWN)
        values = maps.values["subdural"]
        assert values.shape == hu.shape and values.dtype == np.float32
        peak = np.array(np.argwhere(values == values.max())).mean(axis=0)
        assert peak[0] == 1
        # A cell stands for two pixels of the input.
        assert np.abs(peak[1:] - (row, column)).max() <= 2 * side / size
        assert (values.min(), values.max()) == (0, 1)
        assert not values[~head_mask(spot, *SPACING[1:])].any()


def test_the_middle_of_a_field_is_what_counts():
    """Cells of 2 x 2 pixels look between these: stretching the map would be off by half a cell."""
    hu = head_of(1, 48, 48)
    hu[0, 20:24, 28:32] = 300  # input pixels (10, 11) and (14, 15) of 24: cell (5, 7)
    maps = explain_series(toy_run(size=24), hu, SPACING, "any", SHOWN).values["any"][0]
    places = np.argwhere(maps > maps.max() - 1e-5)
    # The middle of input pixels 10 and 11 is place 10.5, pixel 21.5 of the slice.
    np.testing.assert_allclose(places.mean(axis=0), (21.5, 29.5))


def test_maps_are_scaled_by_what_is_returned():
    hu = head_of(4)
    hu[2, 40:50, 40:50] = 100
    run = toy_run()
    maps = explain_series(run, hu, SPACING, ("any", "epidural"), SHOWN)
    assert isinstance(maps, HeatMaps) and list(maps.values) == ["any", "epidural"]
    assert maps.method == "hirescam" and maps.seen.all()
    # The head's weights are 6 for any and 1 for epidural.
    assert maps.scales["any"] == pytest.approx(6 * maps.scales["epidural"], rel=1e-5)
    np.testing.assert_allclose(maps.values["any"], maps.values["epidural"], atol=1e-6)
    alone = explain_series(run, hu[:2], SPACING, "any", SHOWN)
    ratio = alone.scales["any"] / maps.scales["any"]
    np.testing.assert_allclose(alone.values["any"] * ratio, maps.values["any"][:2], atol=1e-6)


def test_nothing_that_speaks_for_a_label_is_0():
    recipe, model = toy_run()
    model.get_layer("fc").set_weights([-np.ones((1, 6)), np.zeros(6)])
    hu = head_of(2)
    hu[:, 40:60, 40:60] = 200
    maps = explain_series((recipe, model), hu, SPACING, "any", SHOWN)
    signed = explain_series((recipe, model), hu, SPACING, "any", replace(SHOWN, signed=True))
    assert signed.values["any"].min() == -1
    assert maps.values["any"].max() <= 1
    air = explain_series((recipe, model), np.full((2, 30, 30), -1000), SPACING, "any", SHOWN)
    assert air.scales["any"] == 0 and not air.values["any"].any()


def test_a_slab_gives_the_map_of_its_middle_slice():
    hu = head_of(5)
    for number in range(5):
        hu[number, 40:50, 20 + 8 * number : 28 + 8 * number] = 300
    slabs = toy_run("slab", 3)
    found = explain_series(slabs, hu, SPACING, "any", SHOWN)
    alone = explain_series(toy_run(), hu, SPACING, "any", SHOWN)
    np.testing.assert_allclose(found.values["any"], alone.values["any"], atol=1e-5)
    assert found.scales["any"] == pytest.approx(alone.scales["any"] / 3, rel=1e-5)
    options = replace(SHOWN, neighbours=True)
    beside = explain_series(slabs, hu, SPACING, "any", options).values["any"]
    assert beside.shape == (5, 3, 96, 80)
    for number in range(5):
        for place in range(3):
            shown = number + place - 1
            expected = alone.values["any"][shown] if 0 <= shown < 5 else 0
            np.testing.assert_allclose(
                beside[number, place], expected * np.ones((96, 80)), atol=1e-5
            )


def test_a_whole_series_gives_a_map_for_each_slice():
    hu = head_of(3)
    for number in range(3):
        hu[number, 40:50, 20 + 8 * number : 28 + 8 * number] = 300
    alone = explain_series(toy_run(), hu, SPACING, "any", SHOWN)
    padded = explain_series(toy_run("series", 8), hu, SPACING, "any", SHOWN)  # air around
    np.testing.assert_allclose(padded.values["any"], alone.values["any"], atol=1e-5)
    assert padded.seen.tolist() == [True] * 3
    middle = explain_series(toy_run("series", 2, long_series="middle"), hu, SPACING, "any", SHOWN)
    assert middle.seen.tolist() == [True, True, False]
    assert not middle.values["any"][2].any()
    spread = explain_series(toy_run("series", 2), hu, SPACING, "any", SHOWN)
    assert spread.seen.tolist() == [True, False, True]
    # The spots of the outer slices, each by half.
    np.testing.assert_allclose(
        spread.values["any"][1], (alone.values["any"][0] + alone.values["any"][2]) / 2, atol=1e-5
    )


def test_a_tilted_series_is_shown_where_its_slices_lie():
    hu = head_of(3, 96, 96)
    hu[:, 44:52, 44:52] = 300
    run = toy_run("slab", 3, tilted="deshear", size=48)
    upright = explain_series(run, hu, SPACING, "any", replace(SHOWN, neighbours=True))
    # 16 mm from slice to slice: 4 pixels, which are a cell, so that nothing is rounded.
    tilted = explain_series(
        run, hu, SPACING, "any", replace(SHOWN, neighbours=True), shear=(0.0, 3.2)
    )
    for number, place in ((1, 0), (1, 1), (1, 2)):
        centres = []
        for maps in (upright, tilted):
            weight = maps.values["any"][number, place] > 0.7
            centres.append(np.argwhere(weight).mean(axis=0))
        np.testing.assert_allclose(centres[0], centres[1], atol=0.01)
    with pytest.raises(DataError, match="the run skips tilted series"):
        explain_series(toy_run("slab", 3, tilted="skip"), hu, SPACING, "any", SHOWN, (0.0, 1.6))


def test_three_hundred_slices_go_in_small_batches(monkeypatch):
    sizes = []
    whole = Relevance.maps

    def counted(self, inputs, labels, baseline):
        sizes.append(len(inputs))
        return whole(self, inputs, labels, baseline)

    monkeypatch.setattr(Relevance, "maps", counted)
    told = []
    hu = head_of(300, 24, 24)
    explain_series(toy_run(), hu, SPACING, "any", SHOWN, progress=lambda *where: told.append(where))
    assert max(sizes) == 8 and sum(sizes) == 300
    assert told[0] == ("explaining", 0, 300) and told[-1] == ("explaining", 300, 300)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs of narrow networks that nothing trained."""
    folder = tmp_path_factory.mktemp("runs")
    keras.utils.set_random_seed(6)
    slices = ModelSpec((48, 48, 3), depth=10, width=4)
    slabs = ModelSpec((3, 48, 48, 1), depth=10, width=4, stem_stride=(1, 2, 2), pool_kernel=None,
                      strides=(1, (1, 2, 2), (1, 2, 2), (1, 2, 2)))  # fmt: skip
    series = ModelSpec((10, 48, 48, 1), depth=10, width=4)
    return {
        "slice": untrained_run(folder / "slice", "narrow_2d", slices),
        "slab": untrained_run(folder / "slab", "narrow_slab", slabs, view="slab", slices=3),
        "stack": untrained_run(
            folder / "stack", "narrow_2d_stack", replace(slices, input_shape=(48, 48, 9)), slices=3
        ),
        "series": untrained_run(folder / "series", "narrow_3d", series, view="series", slices=10),
    }


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(PhantomSpec(5, subtypes=("subdural",), matrix=64, slice_spacing_mm=(9, 10)))


@pytest.mark.parametrize("method", ["gradcam", "integrated-gradients"])
@pytest.mark.parametrize("view", ["slice", "stack", "slab", "series"])
def test_a_run_is_explained_as_its_inputs_are(runs, phantom, view, method):
    # Of random weights, what speaks for a label may be nothing.
    options = MapOptions(method, "layer2", steps=3, signed=True)
    found = explain_series(runs[view], phantom.hu, phantom.spacing_mm, "any", options)
    values = found.values["any"]
    assert values.shape == phantom.hu.shape and np.isfinite(values).all()
    assert np.abs(values).max() == 1
    recipe, model = load_run(runs[view])
    samples = series_samples(recipe.inputs.view, phantom.hu.shape, phantom.spacing_mm)
    hu = np.stack([resize_hu(image, 48) for image in phantom.hu])
    number = len(values) // 2
    sample = 0 if view == "series" else number
    inputs = inputs_of(hu, samples, np.array([sample]), recipe.inputs)
    direct = explain((recipe, model), inputs, "any", options)["any"][0]
    if view in ("slab", "series"):
        direct = direct[list(samples.rows[sample]).index(number)]
    # The same numbers on another grid: where both are inside the head.
    again = cv2.resize(direct, (64, 64), interpolation=cv2.INTER_LINEAR)
    head = head_mask(phantom.hu, *phantom.spacing_mm[1:])[number]
    one, other = values[number][head] * found.scales["any"], again[head]
    assert np.corrcoef(one, other)[0, 1] > (0.9 if method == "gradcam" else 0.7)


def test_labels_default_to_all_of_the_run(runs, phantom):
    maps = explain_series(RunFolder(runs["slice"]), phantom.hu[:2], phantom.spacing_mm)
    assert tuple(maps.values) == tuple(maps.scales) == LABELS


def test_floats_are_rounded(runs, phantom):
    one, other = (
        explain_series(runs["slice"], hu, phantom.spacing_mm, "any").values["any"]
        for hu in (phantom.hu[:3], phantom.hu[:3].astype(np.float64) + 0.3)
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"labels": "blood"}, UsageError, "label 'blood' is none of the network's"),
        ({"method": "saliency"}, UsageError, "method 'saliency'; expected one of"),
        ({"hu": np.zeros((64, 64), np.int16)}, UsageError, r"int16 of shape \(64, 64\); expected"),
        ({"hu": np.zeros((0, 64, 64), np.int16)}, UsageError, r"expected numbers, \(slices, rows"),
        ({"hu": np.full((1, 9, 9), np.nan)}, DataError, "hu holds values that are not finite"),
        ({"hu": np.full((1, 9, 9), 40000)}, DataError, "not from -32768 to 32767 HU"),
        ({"spacing_mm": (5, 0.5)}, UsageError, r"spacing_mm is \(5, 0.5\); expected three numbers"),
        ({"spacing_mm": (5, 0, 1)}, UsageError, "expected three numbers from 0.02 to 100 mm"),
        ({"spacing_mm": (0.005, 5e-4, 5e-4)}, UsageError, "expected three numbers from 0.02 to"),
        ({"spacing_mm": "wide"}, UsageError, "spacing_mm is 'wide'"),
        (
            {"method": MapOptions(neighbours=True)},
            UsageError,
            "neighbours are asked for, and the run's view is 'slice'; only slabs have them",
        ),
    ],
)
def test_what_cannot_be_explained_is_said(runs, phantom, arguments, kind, message):
    given = {"run": runs["slice"], "hu": phantom.hu[:2], "spacing_mm": phantom.spacing_mm}
    with pytest.raises(kind, match=message):
        explain_series(**{**given, **arguments})


def test_inputs_of_another_view_are_refused(runs):
    with pytest.raises(UsageError, match=r"expected numbers, \(n, 3, 48, 48, 1\)"):
        explain(runs["slab"], np.zeros((1, 48, 48, 3), np.float32))


def test_a_network_alone_says_nothing_about_hounsfield_units(phantom):
    _, model = toy_run()
    with pytest.raises(UsageError, match="a network without its recipe"):
        explain_series(model, phantom.hu, phantom.spacing_mm)


def test_an_unfinished_run_is_refused(runs, phantom, tmp_path):
    with pytest.raises(StaleError):
        explain_series(tmp_path / "nothing", phantom.hu, phantom.spacing_mm)
    spec = ModelSpec((48, 48, 3), depth=10, width=4)
    run = RunFolder(untrained_run(tmp_path / "half", "narrow_2d", spec))
    run.report_file.unlink()
    with pytest.raises(StaleError, match="is not a finished run: report.md is absent"):
        explain_series(run, phantom.hu, phantom.spacing_mm)


def test_maps_change_with_the_weights(runs, phantom):
    where = (phantom.hu, phantom.spacing_mm, "any", MapOptions("hirescam", "layer3"))
    loaded = load_run(runs["slice"], precision="float32")
    before = loaded[1].get_weights()
    for part in ("all", "head"):
        rho = randomisation_check(loaded, *where, part=part, seed=4)["any"]
        assert abs(rho) < 0.8
        _, other = randomised(loaded, part, seed=4)
        changed = [
            name.path
            for name, one, two in zip(other.weights, before, other.get_weights(), strict=True)
            if not np.array_equal(one, two)
        ]
        assert any("fc" in name for name in changed)
        assert (part == "all") == any("layer1" in name for name in changed)
    assert all(np.array_equal(a, b) for a, b in zip(before, loaded[1].get_weights(), strict=True))
    signed = MapOptions("hirescam", "layer3", signed=True)
    maps = explain_series(loaded, phantom.hu, phantom.spacing_mm, "any", signed)
    head = head_mask(phantom.hu, *phantom.spacing_mm[1:])
    assert agreement(maps, maps, head)["any"] == pytest.approx(1)
    with pytest.raises(UsageError, match="part 'layer4'; expected one of all, head"):
        randomised(loaded, "layer4")
    with pytest.raises(DataError, match="shows no head"):
        agreement(maps, maps, np.zeros_like(head))
    with pytest.raises(DataError, match="region of another shape"):
        agreement(maps, maps, head[:1])


def test_a_real_head_is_explained(runs, real_ge_series):
    from ich_keras.ct.dicom import read_hu
    from ich_keras.ct.series import index_folder

    slices = index_folder(real_ge_series).slices
    hu = np.stack([read_hu(path) for path in slices["container"]])[::7]
    maps = explain_series(runs["slice"], hu, (5.0, 0.47, 0.47), "any", "gradcam").values["any"]
    assert maps.shape == hu.shape and np.isfinite(maps).all()
    head = head_mask(hu, 0.47, 0.47)
    assert 0.1 < head.mean() < 0.6 and not maps[~head].any() and maps[head].max() == 1
