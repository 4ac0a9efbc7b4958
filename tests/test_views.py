"""Slabs and series: the right slices in the right order, at both ends, for every series."""

import dataclasses
import json
import shutil
from dataclasses import replace

import cv2
import keras
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from narrow import preset_of
from tiny_dicom import tiny_file, tiny_head

from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.ct.geometry import in_plane_shear, slice_normal
from ich_keras.ct.rejects import NothingUsable
from ich_keras.ct.series import index_folder
from ich_keras.ct.window import WIDE
from ich_keras.data.augment import make_augmentation
from ich_keras.data.batches import series_batches, slab_batches, slice_batches, view_batches
from ich_keras.data.inputs import AIR_HU, slice_input, stack_slices, volume_input
from ich_keras.data.intensity import head_z_score
from ich_keras.data.split import Split
from ich_keras.data.trivial import trivial_auroc
from ich_keras.data.views import AIR, View, make_samples, series_of_rows
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.evaluation import evaluate, evaluate_network
from ich_keras.inference import load_run
from ich_keras.labels import LABELS
from ich_keras.models.presets import PRESETS
from ich_keras.planning import plan_training
from ich_keras.prediction import predict_folder, predict_index
from ich_keras.run_folder import RunFolder
from ich_keras.training import train


def everything(loader):
    batches = [(x.numpy(), y.numpy()) for x, y in loader]
    return (np.concatenate(part) for part in zip(*batches, strict=True))


@pytest.mark.parametrize("edge", ["air", "repeat"])
@pytest.mark.parametrize("num_slices", [1, 3, 5, 31])
def test_neighbours_come_from_the_whole_series_at_every_position(phantom_cache, edge, num_slices):
    inputs, labels = everything(
        slab_batches(phantom_cache, batch_size=7, num_slices=num_slices, edge=edge)
    )
    assert inputs.shape == (len(phantom_cache), num_slices, 48, 48, 1)
    np.testing.assert_array_equal(labels, phantom_cache.slices[list(LABELS)].to_numpy(np.float32))
    air = volume_input(np.full((1, 48, 48), AIR_HU, np.int16))[0]
    assert air.min() == air.max() == -0.25
    row = 0
    for uid in phantom_cache.series_uids:
        hu = phantom_cache.series_hu(uid)
        for middle in range(len(hu)):
            for place, position in enumerate(
                range(middle - num_slices // 2, middle + num_slices // 2 + 1)
            ):
                if 0 <= position < len(hu):
                    expected = volume_input(hu[position : position + 1])[0]
                elif edge == "air":
                    expected = air
                else:
                    expected = volume_input(hu[:1] if position < 0 else hu[-1:])[0]
                np.testing.assert_array_equal(inputs[row, place], expected)
            row += 1
    assert row == len(inputs)


def test_neighbours_do_not_depend_on_the_split(phantom_cache):
    whole, _ = everything(slab_batches(phantom_cache, batch_size=16))
    few = np.array([40, 3, 17])
    found, _ = everything(slab_batches(phantom_cache, few, batch_size=2))
    np.testing.assert_array_equal(found, whole[few])


def test_series_are_whole_ordered_centred_and_masked(phantom_cache):
    loader = series_batches(phantom_cache, batch_size=5, num_slices=40)
    inputs, labels = everything(loader)
    assert inputs.shape == (len(phantom_cache.series), 40, 48, 48, 1)
    mask = loader.dataset.mask(np.arange(len(inputs)))
    for number, uid in enumerate(phantom_cache.series_uids):
        hu = phantom_cache.series_hu(uid)
        start = (40 - len(hu)) // 2
        np.testing.assert_array_equal(np.flatnonzero(mask[number]), start + np.arange(len(hu)))
        np.testing.assert_array_equal(inputs[number, start : start + len(hu)], volume_input(hu))
        assert (inputs[number][~mask[number]] == -0.25).all()
        truth = phantom_cache.slices.iloc[list(phantom_cache.series_rows(uid))]
        np.testing.assert_array_equal(labels[number], truth[list(LABELS)].max())


def test_longer_series_are_spread_or_cropped():
    spread, middle = View("series", 4), View("series", 4, long_series="middle")
    np.testing.assert_array_equal(spread.positions(10), [[0, 3, 6, 9]])
    np.testing.assert_array_equal(middle.positions(10), [[3, 4, 5, 6]])
    np.testing.assert_array_equal(middle.positions(5), [[0, 1, 2, 3]])
    np.testing.assert_array_equal(spread.positions(5), [[0, 1, 3, 4]])
    for view in (spread, middle):
        np.testing.assert_array_equal(view.positions(4), [[0, 1, 2, 3]])
        np.testing.assert_array_equal(view.positions(3), [[0, 1, 2, AIR]])
        np.testing.assert_array_equal(view.positions(1), [[AIR, 0, AIR, AIR]])
    np.testing.assert_array_equal(View("series", 1).positions(9), [[4]])


@given(st.integers(1, 200), st.integers(1, 80), st.sampled_from(["spread", "middle"]))
def test_a_series_keeps_its_order_and_what_fits(length, count, rule):
    (found,) = View("series", count, long_series=rule).positions(length)
    kept = found[found != AIR]
    assert len(found) == count
    assert len(kept) == min(length, count)
    assert (np.diff(kept) > 0).all()
    if length <= count:
        np.testing.assert_array_equal(kept, np.arange(length))
        before, after = np.argmax(found != AIR), np.argmax(found[::-1] != AIR)
        assert 0 <= after - before <= 1
    else:
        assert kept[0] >= 0
        assert kept[-1] < length
        assert abs(kept[0] - (length - 1 - kept[-1])) <= 1


# torch warns of more workers than cores; the batches must be the same even then.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    "view", [View("slab", 5), View("stack", 3), View("series", 12, tilted="deshear")]
)
def test_any_number_of_workers_gives_the_same_volumes(phantom_cache, view):
    settings = {"batch_size": 3, "seed": 5, "augment": "thesis", "reverse": True}
    indices = np.arange(11)
    expected = [list(view_batches(phantom_cache, view, indices, **settings)) for _ in range(2)]
    for workers in (1, 2):
        loader = view_batches(phantom_cache, view, indices, workers=workers, **settings)
        for (x, y), (other_x, other_y) in zip(list(loader), expected[0], strict=True):
            np.testing.assert_array_equal(x.numpy(), other_x.numpy())
            np.testing.assert_array_equal(y.numpy(), other_y.numpy())


@pytest.mark.parametrize("name", ["thesis", "flip"])
@pytest.mark.parametrize("channels", [1, 3])
def test_all_slices_of_a_volume_are_changed_alike(name, channels):
    augment = make_augmentation(name)
    random = np.random.default_rng(0)
    volume = random.random((7, 24, 24, channels), np.float32)
    changed = 0
    for seed in range(12):
        found = augment(volume, seed)
        # Slices as channels of one image have one draw by construction.
        as_one = augment(volume.transpose(1, 2, 0, 3).reshape(24, 24, -1), seed)
        as_one = as_one.reshape(24, 24, 7, channels).transpose(2, 0, 1, 3)
        np.testing.assert_allclose(found, as_one, atol=1e-6)
        changed += not np.array_equal(found, volume)
    assert changed > 3


@pytest.mark.parametrize("name", ["thesis", "flip"])
def test_a_whole_series_in_three_windows_is_changed_alike(name):
    # As channels of one image there would be 180, more than OpenCV 5 takes.
    augment = make_augmentation(name)
    slice_ = np.random.default_rng(0).random((24, 24, 3), np.float32)
    for seed in range(8):
        found = augment(np.repeat(slice_[np.newaxis], 60, axis=0), seed)
        np.testing.assert_array_equal(found, np.repeat(augment(slice_, seed)[np.newaxis], 60, 0))


def test_half_of_the_volumes_are_turned_upside_down(phantom_cache):
    settings = {"batch_size": 8, "seed": 1, "augment": "flip"}
    view, indices = View("slab", 5), np.arange(64)
    plain, _ = everything(view_batches(phantom_cache, view, indices, **settings))
    turned, _ = everything(view_batches(phantom_cache, view, indices, reverse=True, **settings))
    is_same = np.array([np.array_equal(a, b) for a, b in zip(plain, turned, strict=True)])
    is_turned = np.array([np.array_equal(a[::-1], b) for a, b in zip(plain, turned, strict=True)])
    assert (is_same | is_turned).all()
    assert 20 < is_turned.sum() < 44
    with pytest.raises(UsageError, match="reverse turns augmented stacks, slabs or series"):
        slice_batches(phantom_cache, seed=1, augment="flip", reverse=True)


def tables(lengths, verdict="ok", **columns):
    """Slices and series of a made-up index, 100x100 pixels of 0.5 mm, 5 mm apart."""
    series = pd.DataFrame(
        {
            "series_uid": [f"s{number}" for number in range(len(lengths))],
            "num_slices": lengths,
            "rows": 100,
            "columns": 100,
            "row_spacing_mm": 0.5,
            "column_spacing_mm": 0.5,
            "verdict": verdict,
            **columns,
        }
    )
    slices = series.loc[series.index.repeat(lengths), ["series_uid"]].reset_index(drop=True)
    position = slices.groupby("series_uid").cumcount() * 5.0
    return slices.assign(position_mm=position, **dict.fromkeys(LABELS, 0)), series


def test_tilted_series_are_kept_skipped_or_straightened():
    slices, series = tables([3, 4], verdict=["ok", "irregular,tilted"])
    for kind, kept, skipped in (("slab", 7, [0, 1, 2]), ("series", 2, [0])):
        view = View(kind, 3)
        assert make_samples(slices, series, view).usable.sum() == kept
        samples = make_samples(slices, series, replace(view, tilted="skip"))
        every = samples.of_rows(slices, np.arange(7))
        np.testing.assert_array_equal(every, skipped)
        np.testing.assert_array_equal(samples.usable_rows(slices, np.arange(1, 6)), [1, 2])
        with pytest.raises(DataError, match="samples are of series that are skipped: tilted ones"):
            samples.of_rows(slices, np.arange(3, 7))
        with pytest.raises(StaleError, match="lacks shear_row and shear_column"):
            make_samples(slices, series, replace(view, tilted="deshear"))
        with pytest.raises(DataError, match="4 valid samples|1 valid samples"):
            samples.of_rows(slices, np.arange(3, 7), "valid")


def test_series_with_two_slices_at_one_place_are_skipped_unless_kept():
    slices, series = tables([3, 4], verdict=["ok", "duplicate,irregular"])
    for kind, kept in (("slab", [0, 1, 2]), ("series", [0])):
        samples = make_samples(slices, series, View(kind, 3))
        np.testing.assert_array_equal(samples.of_rows(slices, np.arange(7)), kept)
        kept_all = make_samples(slices, series, View(kind, 3, duplicate="keep"))
        assert kept_all.usable.all()
        with pytest.raises(DataError, match="with two slices at one place"):
            samples.of_rows(slices, np.arange(3, 7))
    assert make_samples(slices, series, View()).usable.all()  # slices have no neighbours
    assert View("slab", 3).why_skipped("duplicate") == "duplicate"
    assert View("slab", 3, duplicate="keep", tilted="skip").why_skipped("tilted") == "tilted"


def test_series_of_rows_says_which_are_torn():
    slices, _ = tables([3, 4, 2])
    slices.loc[3, list(LABELS)] = -1  # without a label: nobody misses it
    for rows, touched, torn in (
        ([0, 1, 2], [0], [False]),
        ([1, 8], [0, 2], [True, True]),
        ([4, 5, 6, 7, 8], [1, 2], [False, False]),
        ([], [], []),
    ):
        found = series_of_rows(slices, np.array(rows, int))
        np.testing.assert_array_equal(found[0], touched)
        np.testing.assert_array_equal(found[1], torn)
    unlabelled = slices.drop(columns=list(LABELS))
    assert series_of_rows(unlabelled, np.array([0]))[1].tolist() == [False]


@pytest.mark.parametrize("degrees", [18.5, -12.0])
@pytest.mark.parametrize("kind", ["slab", "series"])
def test_deshear_puts_a_straight_line_upright(degrees, kind):
    """A needle along the normal, seen by a gantry that is tilted while the table moves along z."""
    tilt = np.radians(degrees)
    orientation = np.array([1, 0, 0, 0, np.cos(tilt), -np.sin(tilt)])
    normal = slice_normal(orientation)
    number, spacing = 9, 0.5
    table = np.arange(number)[:, np.newaxis] * (0, 0, 5.0 / normal[2])
    positions = table + np.array((-25.0, -25.0, 100.0))
    row, column = in_plane_shear(orientation, positions)
    assert row == pytest.approx(0, abs=1e-12)
    assert abs(column) == pytest.approx(abs(np.tan(tilt)))
    needle = positions[4] + 25 * orientation[:3] + 25 * orientation[3:]  # the middle of slice 4
    hu = np.full((number, 100, 100), AIR_HU, np.int16)
    for place in range(number):
        point = needle + ((positions[place] - needle) @ normal) * normal
        right, down = (
            (point - positions[place]) @ axis / spacing for axis in np.split(orientation, 2)
        )
        cv2.circle(hu[place], (round(right), round(down)), 3, 1000, -1)
    slices, series = tables([number], "tilted", shear_row=row, shear_column=column)
    slices["position_mm"] = positions @ normal
    samples = make_samples(slices, series, View(kind, number, tilted="deshear"))
    sample = 4 if kind == "slab" else 0
    stack = stack_slices(hu, samples.rows[sample], samples.shifts[sample])
    centres = [np.argwhere(image > 0).mean(axis=0) for image in stack]
    np.testing.assert_allclose(centres, np.broadcast_to(centres[4], (9, 2)), atol=0.6)
    crooked = [np.argwhere(image > 0).mean(axis=0)[0] for image in hu]
    assert np.ptp(crooked) > 15


def test_a_series_is_never_torn_apart():
    slices, series = tables([3, 4])
    samples = make_samples(slices, series, View("series", 3))
    np.testing.assert_array_equal(samples.of_rows(slices, np.array([3, 4, 5, 6])), [1])
    with pytest.raises(DataError, match="the split tears 1 series apart; the first is s1. Some of"):
        samples.of_rows(slices, np.array([0, 1, 2, 3, 4]))
    slices.loc[5:, list(LABELS)] = -1  # what has no label is in no part
    np.testing.assert_array_equal(samples.of_rows(slices, np.array([0, 1, 2, 3, 4])), [0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "cube"}, "view 'cube'; expected one of slice, stack, slab, series"),
        ({"kind": "slab", "num_slices": 4}, "a slab of 4 slices has no middle"),
        ({"kind": "stack", "num_slices": 2}, "a stack of 2 slices has no middle"),
        ({"kind": "slice", "num_slices": 3}, "view 'slice' with 3 slices"),
        ({"kind": "series", "num_slices": 0}, "0 slices per sample"),
        ({"kind": "slab", "num_slices": 5, "edge": "wrap"}, "edge 'wrap'; expected one of air, re"),
        ({"kind": "series", "num_slices": 5, "long_series": "all"}, "long_series 'all'"),
        ({"kind": "series", "num_slices": 5, "tilted": "no"}, "tilted 'no'; expected one of keep"),
        (
            {"duplicate": "keep"},
            "duplicate 'keep' means nothing for view 'slice'; it is for stack and slab and ser",
        ),
        ({"kind": "slab", "duplicate": "no"}, "duplicate 'no'; expected one of skip, keep"),
        (
            {"tilted": "skip"},
            "tilted 'skip' means nothing for view 'slice'; it is for stack and slab and ser",
        ),
        ({"kind": "slab", "num_slices": 5, "long_series": "middle"}, "means nothing for view 'sl"),
        ({"kind": "series", "num_slices": 5, "edge": "repeat"}, "edge 'repeat' means nothing"),
    ],
)
def test_impossible_views_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        View(**arguments)


def test_the_z_score_of_a_volume_is_over_all_its_slices():
    random = np.random.default_rng(0)
    hu = random.integers(-100, 200, (2, 3, 8, 8)).astype(np.int16)
    hu[:, 0] = AIR_HU
    hu[0, 1] += 300
    grey = WIDE(hu)[..., np.newaxis]
    found = volume_input(hu, intensity="head-z-score")
    np.testing.assert_array_equal(found, head_z_score(grey, is_volume=True))
    for volume, values in zip(found, grey, strict=True):
        head = values[1:]
        np.testing.assert_allclose(volume[1:], (head - head.mean()) / head.std(), atol=1e-5)
        assert (volume[0] == 0).all()
    assert not np.allclose(found, head_z_score(grey), atol=0.1)


@pytest.mark.parametrize("intensity", ["wide", "head-z-score", "windows"])
@pytest.mark.parametrize("size", [24, 64])
def test_another_size_keeps_every_axis(phantom_cache, intensity, size):
    """OpenCV drops the axis of a single channel; flips would then turn heads upside down."""
    channels = 3 if intensity == "windows" else 1
    settings = {"size": size, "intensity": intensity, "batch_size": 40}
    plain, _ = everything(slab_batches(phantom_cache, np.arange(40), **settings))
    assert plain.shape == (40, 5, size, size, channels)
    slices, _ = everything(slice_batches(phantom_cache, np.arange(40), **settings))
    assert slices.shape == (40, size, size, channels)
    if intensity != "head-z-score":  # which depends on the whole volume
        np.testing.assert_array_equal(slices, plain[:, 2])
    flipped, _ = everything(
        slab_batches(phantom_cache, np.arange(40), seed=0, augment="flip", **settings)
    )
    loader = slab_batches(phantom_cache, np.arange(40), seed=0, augment="flip", **settings)
    order = loader.plan.batches(0)[0]
    pairs = [(plain[i], image) for i, image in zip(order, flipped, strict=True)]
    mirrored = [np.allclose(one[:, :, ::-1], other, atol=1e-6) for one, other in pairs]
    same = [np.allclose(one, other, atol=1e-6) for one, other in pairs]
    assert (np.array(mirrored) | np.array(same)).all()
    assert 8 < sum(mirrored) < 32


def test_three_windows_of_a_slab(phantom_cache):
    loader = slab_batches(phantom_cache, [9], num_slices=3, intensity="windows", size=24)
    inputs, _ = everything(loader)
    hu = phantom_cache.slices_hu([8, 9, 10])
    np.testing.assert_array_equal(inputs[0], slice_input(hu, 24))


# Training, evaluation and prediction with each view.
NARROW = {
    "stack": replace(PRESETS["resnet10_2d_stack"].spec, width=4),
    "slab": replace(PRESETS["resnet10_3d_slab"].spec, width=4),
    "series": replace(PRESETS["resnet10_3d"].spec, width=4),
}

# As small as batch normalisation allows: a batch of series is one series.
SIZES = {"stack": {"size": 24}, "slab": {"size": 24}, "series": {"size": 40, "slices": 20}}


@pytest.fixture(scope="module", params=["stack", "slab", "series"])
def run(request, phantom_cache, tmp_path_factory):
    name = f"narrow_{request.param}"
    with preset_of(name, NARROW[request.param]):
        config = RunConfig(
            preset=name,
            precision="float32",
            # Smaller than the cache: prediction must resize where training did, after the windows.
            data=DataConfig(reverse=True, **SIZES[request.param]),
            fit=FitConfig(epochs=1, learning_rate=1e-3),
        )
        told = []
        folder = tmp_path_factory.mktemp("run") / name
        yield request.param, train(config, phantom_cache, folder, tell=told.append), told


def with_view(recipe, **changes):
    return replace(
        recipe, inputs=replace(recipe.inputs, view=replace(recipe.inputs.view, **changes))
    )


def test_each_view_trains_is_scored_and_predicts_a_folder(run, phantom_cache, phantom_folder):
    kind, folder, told = run
    what = {
        "stack": "on stacks of 3 slices",
        "slab": "on slabs of 5 slices",
        "series": "on whole series",
    }[kind]
    assert told[0].startswith(f"Training {what} from scratch")
    assert ("8 batches per step" in told[0]) == (kind == "series")
    recipe = RunFolder(folder).recipe()
    assert recipe.backend == keras.config.backend()
    assert recipe.inputs.view.kind == kind
    assert recipe.inputs.intensity.name == ("windows" if kind == "stack" else "wide")
    assert recipe.training.batch_size == {"stack": 32, "slab": 16, "series": 1}[kind]
    metrics = evaluate(folder, phantom_cache, "test")
    assert set(metrics) == ({"series"} if kind == "series" else {"slice", "series"})
    split = Split.load(folder / "split.json")
    rows = [split.indices(phantom_cache.slices, part) for part in ("train", "test")]
    trivial = trivial_auroc(phantom_cache, *rows)
    assert {level: part["trivial_auroc_any"] for level, part in metrics.items()} == {
        level: trivial[level] for level in metrics
    }
    predictions = pd.read_csv(folder / "predictions-test.csv")
    members = set(json.loads((folder / "split.json").read_text())["members"]["test"])
    assert set(predictions["series_instance_uid"]) == members
    assert metrics["series"]["n"]["samples"] == len(members)

    result = predict_folder(folder, phantom_folder / "images")
    if kind != "series":
        key, found = "sop_instance_uid", result.slices
        assert len(found) == len(phantom_cache)
    else:
        key, found = "series_instance_uid", result.series
        assert result.slices is None
        assert repr(result).startswith(f"FolderPrediction({len(phantom_cache.series)} series")
        assert len(found) == len(phantom_cache.series)
    both = found.set_index(key).loc[predictions[key], [f"raw_{name}" for name in LABELS]]
    np.testing.assert_allclose(both, predictions[list(LABELS)], atol=1e-5)
    assert "Per series" in (folder / "report.md").read_text()
    assert ("Per slice" in (folder / "report.md").read_text()) == (kind != "series")


def test_a_split_by_slices_does_not_train_on_series(phantom_cache):
    config = RunConfig(
        preset="resnet10_3d", data=DataConfig(size=48, slices=20, split="thesis-slices")
    )
    with pytest.raises(DataError, match="the split tears"):
        plan_training(phantom_cache, config)
    thin = dataclasses.replace(config, data=DataConfig(size=48, slices=3, split="thesis-series"))
    with pytest.raises(
        UsageError, match="3 slice.s. are too few for this network.*it takes at least 9"
    ):
        plan_training(phantom_cache, thin)


def test_a_tilted_series_is_a_listed_reject_where_none_is_taken(run, phantom_folder):
    _, folder, _ = run
    recipe, model = load_run(folder)
    recipe = with_view(recipe, tilted="skip")
    index = index_folder(phantom_folder / "images")
    tilted = index.series.loc[index.series["verdict"].str.contains("tilted"), "series_uid"]
    assert 0 < len(tilted) < len(index.series)
    result = predict_index(model, index, recipe, batch_size=8)
    rejected = result.rejects[result.rejects["code"] == "TILTED"]
    assert len(rejected) == index.slices["series_uid"].isin(tilted).sum()
    assert not set(result.series["series_instance_uid"]) & set(tilted)


def write_series(folder, heights, **tags):
    for number, height in enumerate(heights):
        content = tiny_file(
            tiny_head(number),
            SOPInstanceUID=f"1.2.3.4.{number}",
            ImagePositionPatient=[-125, -125, height],
            **tags,
        )
        (folder / f"{number}.dcm").write_bytes(content)


def test_two_kernels_that_cannot_be_told_apart_are_listed_rejects(run, tmp_path):
    _, folder, _ = run
    write_series(tmp_path, [5 * (number // 2) for number in range(8)])
    with pytest.raises(NothingUsable) as caught:
        predict_folder(folder, tmp_path)
    rejects = caught.value.rejects
    assert rejects["code"].tolist() == ["DUPLICATE"] * 8
    assert rejects["detail"][0] == "series 1.2.3.4 has two slices at one place"
    assert rejects["series_instance_uid"].tolist() == ["1.2.3.4"] * 8
    recipe, model = load_run(folder)
    recipe = with_view(recipe, duplicate="keep")
    result = predict_index(model, index_folder(tmp_path), recipe, batch_size=8)
    assert result.series["verdict"].tolist() == ["duplicate"]


def test_a_single_slice_is_predicted_by_every_view_with_its_verdict(run, tmp_path):
    """The neighbours of a slab and the rest of a series are air; the verdict says so."""
    kind, folder, _ = run
    write_series(tmp_path, [0])
    result = predict_folder(folder, tmp_path)
    assert result.series[["num_slices", "verdict"]].values.tolist() == [[1, "too few"]]
    assert (result.slices is None) == (kind == "series")
    assert np.isfinite(result.series[list(LABELS)].to_numpy()).all()
    assert len(result.rejects) == 0


def test_another_part_of_the_body_is_predicted_only_on_request(run, tmp_path):
    _, folder, _ = run
    write_series(tmp_path, range(0, 25, 5), BodyPartExamined="ABDOMEN")
    with pytest.raises(NothingUsable, match="BodyPartExamined is 'ABDOMEN'") as caught:
        predict_folder(folder, tmp_path)
    assert "--any-body-part" in caught.value.hint
    result = predict_folder(folder, tmp_path, any_body_part=True)
    assert result.series["verdict"].tolist() == ["ok"]
    assert len(result.rejects) == 0


def test_files_lost_while_predicting_make_a_series_incomplete(run, tmp_path):
    _, folder, _ = run
    for number in range(5):
        values = tiny_head(number)
        values[32:] *= number > 0  # a broken copy, which only its pixels show
        content = tiny_file(
            values,
            SOPInstanceUID=f"1.2.3.4.{number}",
            ImagePositionPatient=[-125, -125, 5 * number],
        )
        (tmp_path / f"{number}.dcm").write_bytes(content)
    result = predict_folder(folder, tmp_path)
    assert result.series[["verdict", "num_rejected"]].values.tolist() == [["incomplete", 1]]
    assert result.rejects[["code", "series_instance_uid"]].values.tolist() == [
        ["ZERO_TAIL", "1.2.3.4"]
    ]


def test_what_a_run_skips_is_in_no_metric(run, phantom_cache, tmp_path):
    _, folder, _ = run
    out = shutil.copytree(folder, tmp_path / "run")
    recipe, model = load_run(out)
    recipe = with_view(recipe, tilted="skip")
    metrics = evaluate_network(RunFolder(out), recipe, model, phantom_cache, "test")
    split = Split.load(out / "split.json")
    slices = phantom_cache.slices
    verdicts = phantom_cache.series.set_index("series_uid")["verdict"]
    is_kept = ~slices["series_uid"].map(verdicts).str.contains("tilted").to_numpy()
    rows = [
        found[is_kept[found]]
        for found in (split.indices(slices, part) for part in ("train", "test"))
    ]
    assert 0 < len(rows[1]) < len(split.indices(slices, "test"))
    trivial = trivial_auroc(phantom_cache, *rows)
    assert {level: part["trivial_auroc_any"] for level, part in metrics.items()} == {
        level: trivial[level] for level in metrics
    }
    train, test = (slices.iloc[part] for part in rows)
    rate = train.groupby("series_uid")["any"].max().mean()
    assert metrics["series"]["n"]["samples"] == test["series_uid"].nunique()
    constant = metrics["series"]["baseline"]["prevalence"]["probabilities"]["any"]
    assert constant == pytest.approx(rate)


def test_samples_of_a_bigger_cache_are_read_once_a_batch(phantom_cache, monkeypatch):
    read = []
    original = type(phantom_cache.pixels).slices_hu

    def counting(self, indices):
        read.extend(np.asarray(indices).tolist())
        return original(self, indices)

    monkeypatch.setattr(type(phantom_cache.pixels), "slices_hu", counting)
    next(iter(slab_batches(phantom_cache, np.arange(6), batch_size=6)))
    assert len(read) == len(set(read)) == 8
