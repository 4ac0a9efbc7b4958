"""The augmentation by draws: what is drawn, and what the CPU and a device make of it."""

import dataclasses

import cv2
import numpy as np
import pytest
from tiny_dicom import head_hu

from ich_keras.ct.window import WIDE, Window
from ich_keras.data import augment as library
from ich_keras.data.augment import make_augmentation
from ich_keras.data.batches import series_batches, slab_batches, slice_batches
from ich_keras.data.device_inputs import DeviceInputs, RawBatch
from ich_keras.data.drawn_inputs import change_windows, drawn_inputs
from ich_keras.data.draws import draw, no_draws
from ich_keras.data.inputs import slice_input, slice_windows, volume_input
from ich_keras.data.intensity import INTENSITIES, Intensity, Normalisation
from ich_keras.data.seeds import sample_seed
from ich_keras.errors import UsageError

SEEDS = [sample_seed(7, 0, index) for index in range(120)]


def heads(count, side=64):
    """Heads with edges as soft as a scanner's: int16 (count, side, side), HU."""
    return np.stack(
        [
            cv2.GaussianBlur(head_hu(side, seed).astype(np.float32), (0, 0), 1).astype(np.int16)
            for seed in range(count)
        ]
    )


# --- What is drawn --------------------------------------------------------------------------


@pytest.mark.parametrize("side", [24, 33])
def test_the_same_seeds_change_windows_as_albumentations_does(side):
    windows = slice_windows(heads(1, side)[0])
    change, draws = make_augmentation("thesis"), draw(SEEDS, side)
    for number, seed in enumerate(SEEDS):
        expected = change(windows.copy(), seed)
        np.testing.assert_allclose(change_windows(windows, draws, number), expected, atol=1e-6)
    kinds = np.column_stack([draws.flips, draws.is_moved, draws.contrast != 1])
    assert len(np.unique(kinds, axis=0)) == 16  # every combination was there


def test_flips_are_those_of_albumentations():
    windows = slice_windows(heads(1, 16)[0])
    change, draws = make_augmentation("flip"), draw(SEEDS, 16, flips_only=True)
    for number, seed in enumerate(SEEDS):
        found = change_windows(windows, draws, number)
        np.testing.assert_array_equal(found, change(windows.copy(), seed))
    assert not draws.flips[:, 1].any() and not draws.is_moved.any() and (draws.contrast == 1).all()


def test_draws_have_the_distribution_of_the_thesis():
    count, side = 4000, 256
    draws = draw([sample_seed(1, 2, index) for index in range(count)], side, may_reverse=True)
    switches = np.column_stack(
        [draws.flips, draws.is_moved, draws.brightness != 0, draws.is_reversed]
    )
    # Four standard deviations of a binomial.
    assert (abs(switches.mean(axis=0) - 0.5) < 4 * 0.5 / np.sqrt(count)).all()
    # Independent: correlations of independent coins are as small.
    correlations = np.corrcoef(switches.T.astype(float)) - np.eye(5)
    assert abs(correlations).max() < 4 / np.sqrt(count)
    matrices = draws.matrices[draws.is_moved]
    scale = np.sqrt(np.linalg.det(matrices[:, :, :2]))
    angle = np.degrees(np.arctan2(matrices[:, 0, 1], matrices[:, 0, 0]))
    middle = np.array([side / 2 - 0.5] * 2)
    shift = matrices[:, :, :2] @ middle + matrices[:, :, 2] - middle
    np.testing.assert_allclose(shift, shift.round(), atol=1e-9)  # whole pixels, as albumentations
    is_adjusted = draws.brightness != 0
    for values, limit in (
        (scale - 1, library.MAX_SCALE),
        (angle, library.MAX_ROTATION_DEGREES),
        (draws.contrast[is_adjusted] - 1, library.MAX_CONTRAST),
        (draws.brightness[is_adjusted], library.MAX_BRIGHTNESS),
    ):
        # Kolmogorov and Smirnov's distance from the uniform distribution, at p = 0.001.
        ranks = np.sort(values / limit / 2 + 0.5)
        steps = np.arange(len(ranks) + 1) / len(ranks)
        distance = max(abs(ranks - steps[1:]).max(), abs(ranks - steps[:-1]).max())
        assert distance < 1.95 / np.sqrt(len(ranks))
    assert abs(shift).max().round() == 15  # of 16, cut towards 0


# --- On the CPU -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", INTENSITIES)
def test_without_draws_inputs_are_those_of_prediction(name):
    hu = heads(3)
    intensity = INTENSITIES[name]
    for size in (None, 48):
        found = drawn_inputs(hu[:, np.newaxis], no_draws(3), intensity, False, size)
        np.testing.assert_array_equal(found, slice_input(hu, size, intensity))
        found = drawn_inputs(hu[np.newaxis], no_draws(1), intensity, True, size)
        np.testing.assert_array_equal(found[0], volume_input(hu, size, intensity))


def test_values_beyond_the_windows_are_cut_off():
    hu = np.array([[-(2**15), -2000, -151], [40, 3071, 2**15 - 1], [80, 231, -1024]], np.int16)
    found = drawn_inputs(hu[np.newaxis, np.newaxis], no_draws(1), INTENSITIES["windows"], False)
    np.testing.assert_array_equal(found, slice_input(hu)[np.newaxis])


def test_moving_hounsfield_units_differs_from_the_thesis_at_edges_of_bone_only():
    hu = heads(1, 256)[0]
    windows, draws = slice_windows(hu), draw(SEEDS, 256)
    plain = dataclasses.replace(
        INTENSITIES["windows"],
        normalisation=dataclasses.replace(
            INTENSITIES["windows"].normalisation, mean=(0.0,) * 3, std=(1.0,) * 3
        ),
    )
    found = drawn_inputs(np.tile(hu, (len(SEEDS), 1, 1, 1)), draws, plain, is_volume=False)
    # Where a 3x3 neighbourhood stays between the ends of a window, the two orders are the same.
    low, high = (
        cv2.morphologyEx(hu, way, np.ones((3, 3))) for way in (cv2.MORPH_ERODE, cv2.MORPH_DILATE)
    )
    differences, far = [], []
    for number in np.flatnonzero(draws.is_moved):
        expected = change_windows(windows, draws, number)
        difference = abs(found[number] - expected)
        differences.append(difference)
        for channel, window in enumerate(INTENSITIES["windows"].windows):
            is_inside = ((low > window.low) & (high < window.low + window.width)).astype(np.float32)
            inside = change_windows(
                is_inside[..., np.newaxis],
                dataclasses.replace(
                    draws, contrast=np.ones(len(SEEDS)), brightness=np.zeros(len(SEEDS))
                ),
                number,
            )
            # Half a unit is lost to rounding.
            limit = 0.6 * 1.2 / window.width
            far.append((difference[..., channel][inside[..., 0] > 0.999] > limit).mean())
    assert max(far) == 0
    differences = np.stack(differences)
    assert 0.0005 < (differences > 0.02).mean() < 0.03
    assert differences.mean() < 0.004


def test_all_slices_of_a_volume_get_the_same_draw():
    hu = np.repeat(heads(1)[:, np.newaxis], 4, axis=1)
    for seed in SEEDS[:8]:
        found = drawn_inputs(hu, draw([seed], 64, may_reverse=True), INTENSITIES["wide"], True)
        assert (found == found[:, :1]).all()


def test_reversed_volumes_are_upside_down():
    hu = heads(5)[np.newaxis]
    draws = dataclasses.replace(no_draws(1), is_reversed=np.array([True]))
    found = drawn_inputs(hu, draws, INTENSITIES["wide"], True)
    np.testing.assert_array_equal(found[0], volume_input(hu[0, ::-1]))


@pytest.mark.parametrize("level", [40_000, -40_000])
def test_a_window_beyond_every_value_is_plain(level):
    intensity = Intensity("far", (Window(level, 100),), Normalisation("own", (0.5,), (0.5,)))
    hu = heads(1)
    found = drawn_inputs(hu[:, np.newaxis], no_draws(1), intensity, False)
    np.testing.assert_array_equal(found, slice_input(hu, None, intensity))
    assert len(np.unique(found)) == 1


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_any_number_of_windows_is_looked_up(channels):
    windows = tuple(Window(20 * number, 100 + number) for number in range(1, channels + 1))
    normalisation = Normalisation("own", (0.1,) * channels, (0.5,) * channels)
    intensity = Intensity("own", windows, normalisation)
    hu = heads(2)
    found = drawn_inputs(hu[:, np.newaxis], no_draws(2), intensity, False)
    np.testing.assert_array_equal(found, slice_input(hu, None, intensity))


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf")])
def test_a_deviation_that_cannot_be_one_is_refused(std):
    with pytest.raises(UsageError, match="expected finite numbers, and deviations above 0"):
        Intensity("own", (WIDE,), Normalisation("own", (0.5,), (std,)))


# --- On a device ----------------------------------------------------------------------------


def on_device(hu, draws, intensity, is_volume, size):
    inputs = DeviceInputs("cpu", intensity, is_volume, size)
    batch = RawBatch(hu, draws, np.zeros((len(hu), 6), np.float32))
    made, labels = inputs.make(inputs.send(batch))
    assert labels.shape == (len(hu), 6)
    return made.numpy()


@pytest.mark.parametrize("name", INTENSITIES)
@pytest.mark.parametrize("size", [64, 48])
def test_a_device_makes_what_the_cpu_makes(name, size):
    intensity = INTENSITIES[name]
    hu = heads(36).reshape(12, 3, 64, 64)
    # What one HU is in the input, contrast 1.2 included.
    units = {
        "windows": 1.2 / 80 / 0.28,
        "bone-windows": 1.2 / 80 / 0.28,
        "wide": 1.2 / 1400,
        "head-z-score": 1.2 / 150,
        "hu": 1.2,
    }
    scale = 4096 if name == "hu" else 1  # the others are about 1
    unit = units[name]
    for draws in (
        no_draws(12),
        draw(SEEDS[:12], 64, flips_only=True, may_reverse=True),
        draw(SEEDS[:12], 64, may_reverse=True),
    ):
        for is_volume in (True, False):
            given = hu if is_volume else hu[:, :1]
            expected = drawn_inputs(given, draws, intensity, is_volume, size)
            found = on_device(given, draws, intensity, is_volume, size)
            assert found.dtype == np.float32 and found.shape == expected.shape
            difference = abs(found - expected) / scale
            if not draws.is_moved.any():
                assert difference.max() < 3e-5
            # OpenCV and torch interpolate alike, but for what lies on the edge of rounding.
            assert (difference > 1e-3).mean() < 1e-3
            assert difference.max() < 1.01 * unit / scale


def test_the_thesis_order_agrees_with_a_device_away_from_the_windows_ends():
    """A window that cuts nothing off: both orders are one, and albumentations is the oracle."""
    hu = np.clip(heads(4), WIDE.low + 1, WIDE.low + WIDE.width - 1).astype(np.int16)
    intensity = INTENSITIES["wide"]
    change = make_augmentation("thesis")
    for start in range(0, 40, 4):
        seeds = SEEDS[start : start + 4]
        found = on_device(hu[:, np.newaxis], draw(seeds, 64), intensity, False, 64)
        windows = slice_windows(hu, None, intensity.windows)
        for number, seed in enumerate(seeds):
            expected = intensity.normalise(change(windows[number], seed), False)
            assert abs(found[number] - expected).max() < 0.02


@pytest.mark.parametrize("make", [slice_batches, slab_batches, series_batches])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_of_a_device_are_those_of_the_cpu(phantom_cache, make, workers):
    settings = {"indices": np.arange(8), "batch_size": 3, "seed": 4, "augment": "fast"}
    if make is not slice_batches:
        settings |= {"num_slices": 5, "reverse": True}
    expected = make(phantom_cache, **settings)
    found = make(phantom_cache, device="cpu", workers=workers, **settings)
    for _ in range(2):
        assert found.epoch == expected.epoch
        batches = list(zip(found, expected, strict=True))
        assert len(batches) == len(expected)
        for (x, y), (other_x, other_y) in batches:
            np.testing.assert_array_equal(y, other_y)
            assert (abs(x - other_x) > 1e-3).float().mean() < 2e-3
            assert x.shape == other_x.shape


def test_what_a_device_cannot_do_is_done_on_the_cpu(phantom_cache):
    settings = {"indices": np.arange(8), "batch_size": 4, "seed": 4, "augment": "thesis"}
    for (x, _), (other, _) in zip(
        slice_batches(phantom_cache, device="cpu", **settings),
        slice_batches(phantom_cache, **settings),
        strict=True,
    ):
        np.testing.assert_array_equal(x, other)


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "cuda:99", "mps"])
@pytest.mark.parametrize("augment", ["fast", "thesis"])
def test_devices_that_are_none_are_refused(phantom_cache, device, augment):
    with pytest.raises(UsageError, match="device is "):
        slice_batches(phantom_cache, seed=0, augment=augment, device=device)


def test_raw_batches_that_are_kept_stay_what_they_were(phantom_cache):
    dataset = slice_batches(phantom_cache, seed=0, device="cpu").dataset
    kept = [dataset[0, np.array([number])].hu for number in range(6)]
    for number, hu in enumerate(kept):
        np.testing.assert_array_equal(hu[0, 0], phantom_cache.slice_hu(number))


def test_fast_is_no_function_of_windows():
    with pytest.raises(UsageError, match='augmentation "fast" changes Hounsfield units'):
        make_augmentation("fast")
