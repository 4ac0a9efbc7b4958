"""HU to network input, by hand and against OpenCV's documented resampling."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ich_keras.ct.window import WIDE, WINDOWS
from ich_keras.data.inputs import AIR_HU, resize_hu, slice_input, slice_windows
from ich_keras.data.intensity import INTENSITIES, NNUNET, THESIS_NORMALISATION, normalise
from ich_keras.errors import UsageError


def test_shrinking_averages_areas():
    hu = np.array([[0, 10, 100, 100], [20, 30, 100, 100], [-4, -4, 7, 7], [-4, -4, 7, 9]], np.int16)
    assert resize_hu(hu, 2).tolist() == [[15, 100], [-4, 8]]  # (7+7+7+9)/4 = 7.5, rounded up


def test_same_size_is_unchanged_and_enlarging_keeps_a_constant():
    hu = np.arange(16, dtype=np.int16).reshape(4, 4)
    np.testing.assert_array_equal(resize_hu(hu, 4), hu)
    assert (resize_hu(np.full((8, 8), -77, np.int16), 20) == -77).all()


@pytest.mark.parametrize("shape", [(4, 8), (8, 4)])
def test_a_slice_that_is_not_square_is_padded_with_air(shape):
    resized = resize_hu(np.full(shape, 40, np.int16), 8)
    assert (resized == 40).sum() == 32
    assert (resized == AIR_HU).sum() == 32
    inner = resized[2:6] if shape == (4, 8) else resized[:, 2:6]
    assert (inner == 40).all()


@settings(max_examples=25)
@given(st.integers(5, 40), st.integers(16, 40), st.integers(0, 2**32 - 1))
def test_resizing_stays_within_the_range(side, size, seed):
    hu = np.random.default_rng(seed).integers(-3024, 3072, (side, side)).astype(np.int16)
    resized = resize_hu(hu, size)
    assert resized.shape == (size, size)
    assert resized.dtype == np.int16
    assert hu.min() <= resized.min()
    assert resized.max() <= hu.max()


def test_windows_by_hand():
    # 60 HU: brain (60 - 0) / 80, subdural (60 + 20) / 200, soft tissue (60 + 150) / 380.
    windows = slice_windows(np.full((2, 2), 60, np.int16))
    assert windows.dtype == np.float32
    np.testing.assert_allclose(windows[0, 0], [60 / 80, 80 / 200, 210 / 380], rtol=1e-6)
    np.testing.assert_array_equal(slice_windows(np.full((1, 1), -3024, np.int16)), 0)
    np.testing.assert_array_equal(slice_windows(np.full((1, 1), 3071, np.int16)), 1)


def test_every_hounsfield_unit_is_windowed_as_the_window_says():
    hu = np.arange(-(2**15), 2**15).astype(np.int16).reshape(256, 256)
    for windows in (WINDOWS, (WIDE,)):
        expected = np.stack([window(hu) for window in windows], axis=-1)
        np.testing.assert_array_equal(slice_windows(hu, windows=windows), expected)
        turned = hu[::-1, ::-2]
        np.testing.assert_array_equal(slice_windows(turned, windows=windows), expected[::-1, ::-2])
        np.testing.assert_allclose(
            slice_windows(hu.astype(np.float32), windows=windows), expected, atol=1e-6
        )


@pytest.mark.parametrize("shape", [(3,), (5, 3), (4, 5, 3), (2, 3, 4, 5, 3)])
def test_normalising_is_the_formula_for_any_shape(shape):
    windows = np.random.default_rng(0).random(shape, np.float32)
    before = windows.copy()
    mean, std = (
        np.array(THESIS_NORMALISATION.mean, "f4"),
        np.array(THESIS_NORMALISATION.std, "f4"),
    )
    found = normalise(windows)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, (windows - mean) / std)
    np.testing.assert_array_equal(windows, before)


def test_normalisation_is_last_and_the_thesis_one():
    expected = (np.array([0.75, 0.4, 210 / 380]) - [0.1738, 0.1433, 0.1970]) / [
        0.3161,
        0.2850,
        0.3111,
    ]
    given_60 = slice_input(np.full((3, 2, 2), 60, np.int16))
    assert given_60.shape == (3, 2, 2, 3)
    assert given_60.dtype == np.float32
    np.testing.assert_allclose(given_60[1, 0, 1], expected, rtol=1e-5)
    np.testing.assert_allclose(
        normalise(np.zeros((1, 3), np.float32), THESIS_NORMALISATION)[0],
        [-0.1738 / 0.3161, -0.1433 / 0.2850, -0.1970 / 0.3111],
        rtol=1e-5,
    )


def test_a_smaller_input_windows_first_and_resizes_after():
    hu = np.full((4, 4), -1000, np.int16)
    hu[:, :2] = 1000  # at the edge the average of the HU would be 0, of the windows one half
    hu = np.roll(hu, 1, axis=1)
    windows = slice_windows(hu, size=2)
    assert windows.shape == (2, 2, 3)
    assert windows.max() <= 1
    np.testing.assert_allclose(windows[0, 0], 0.5, atol=1e-6)
    assert slice_windows(hu[None], size=2).shape == (1, 2, 2, 3)


def test_resizing_windows_needs_squares():
    with pytest.raises(UsageError, match="4x6 pixels; expected square"):
        slice_windows(np.zeros((4, 6), np.int16), size=2)


def test_the_wide_range_is_the_thesis_formula():
    hu = np.array([[-2048, -1000, -300, 0, 60, 400, 3000]], np.int16)
    expected = np.clip((hu + 1000) / 1400, 0, 1) - 0.25
    np.testing.assert_allclose(slice_input(hu, intensity="wide")[..., 0], expected, atol=1e-6)


def test_z_score_over_the_head_by_hand():
    # The head: 0, 40 and 80 HU, mean 40, standard deviation sqrt(3200 / 3); air beside it.
    hu = np.array([[[-1024, 0], [40, 80]], [[-1024, -1024], [-1024, -1024]]], np.int16)
    found = slice_input(hu, intensity="head-z-score")
    assert found.shape == (2, 2, 2, 1)
    assert found.dtype == np.float32
    expected = np.array([[0, -40], [0, 40]]) / np.sqrt(3200 / 3)
    np.testing.assert_allclose(found[0, ..., 0], expected, atol=1e-5)
    np.testing.assert_array_equal(found[1], 0)  # no head in it
    one = slice_input(np.full((2, 2), 40, np.int16), intensity="head-z-score")
    np.testing.assert_array_equal(one, 0)  # no spread


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_z_score_has_mean_0_and_spread_1_over_the_head(seed):
    random = np.random.default_rng(seed)
    hu = random.integers(-400, 400, (3, 16, 16)).astype(np.int16)
    hu[:, :4] = -1000
    found = slice_input(hu, intensity="head-z-score")[:, 4:]
    np.testing.assert_allclose(found.mean((1, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(found.std((1, 2, 3)), 1, atol=1e-4)


def test_intensities_have_names_that_configurations_know():
    from ich_keras.config import AUGMENT, INTENSITY, DataConfig, RunConfig
    from ich_keras.data.augment import AUGMENTATIONS

    assert (*INTENSITIES, NNUNET) == INTENSITY
    assert (*AUGMENTATIONS, "none", "own") == AUGMENT
    for name, intensity in INTENSITIES.items():
        RunConfig(data=DataConfig(intensity=name))
        assert slice_input(np.zeros((4, 4), np.int16), intensity=name).shape[-1] == (
            intensity.channels
        )
    with pytest.raises(UsageError, match="intensity 'bone'; expected one of windows, wide"):
        slice_input(np.zeros((4, 4), np.int16), intensity="bone")
