import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ich_keras.ct.window import BRAIN, SOFT_TISSUE, SUBDURAL, WINDOWS, Window


def test_named_windows():
    assert [(w.level, w.width) for w in WINDOWS] == [(40, 80), (80, 200), (40, 380)]
    assert WINDOWS == (BRAIN, SUBDURAL, SOFT_TISSUE)


@pytest.mark.parametrize(
    ("window", "hu", "grey"),
    [
        # By hand: (hu - (level - width / 2)) / width.
        (BRAIN, [-3024, -1, 0, 20, 40, 60, 80, 81, 3071], [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]),
        (SUBDURAL, [-32768, -20, 30, 80, 180, 32767], [0, 0, 0.25, 0.5, 1, 1]),
        (SOFT_TISSUE, [-151, -150, -55, 40, 135, 230, 231], [0, 0, 0.25, 0.5, 0.75, 1, 1]),
        (Window(0.5, 1), [0, 1], [0, 1]),
    ],
)
def test_grey_values_by_hand(window, hu, grey):
    result = window(np.array(hu, dtype=np.int16))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, grey, rtol=0, atol=1e-7)


def test_bounds():
    assert (BRAIN.low, BRAIN.high) == (0, 80)
    assert (SUBDURAL.low, SUBDURAL.high) == (-20, 180)
    assert (SOFT_TISSUE.low, SOFT_TISSUE.high) == (-150, 230)


def test_input_is_left_alone_and_shape_is_kept():
    hu = np.full((2, 3, 4), 40, dtype=np.int16)
    grey = BRAIN(hu)
    assert grey.shape == (2, 3, 4)
    assert (hu == 40).all()
    assert BRAIN(hu.astype(np.float32)).dtype == np.float32


@settings(max_examples=50)
@given(
    st.floats(-2000, 2000), st.floats(0.5, 4000), st.lists(st.integers(-32768, 32767), min_size=1)
)
def test_monotonic_and_within_0_and_1(level, width, hu):
    grey = Window(level, width)(np.sort(np.array(hu, dtype=np.int16)))
    assert (np.diff(grey) >= 0).all()
    assert grey.min() >= 0 and grey.max() <= 1
    exact = np.clip((np.sort(np.array(hu, float)) - (level - width / 2)) / width, 0, 1)
    np.testing.assert_allclose(grey, exact, rtol=0, atol=2e-3 / width + 1e-6)


def test_torch_gives_the_same_numbers():
    torch = pytest.importorskip("torch")
    hu = np.arange(-200, 300, dtype=np.int16)
    grey = SUBDURAL(torch.from_numpy(hu))
    assert grey.dtype == torch.float32
    np.testing.assert_array_equal(grey.numpy(), SUBDURAL(hu))


def test_jax_gives_the_same_numbers():
    jnp = pytest.importorskip("jax.numpy")
    hu = np.arange(-200, 300, dtype=np.int16)
    grey = SUBDURAL(jnp.asarray(hu))
    assert grey.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(grey), SUBDURAL(hu), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("level", "width", "message"),
    [
        (40, 0, "width 0 HU: expected more than 0"),
        (40, -80, "width -80 HU"),
        (math.nan, 80, "level nan"),
        (40, math.inf, "width inf: expected finite"),
    ],
)
def test_bad_windows_are_refused(level, width, message):
    with pytest.raises(ValueError, match=message):
        Window(level, width)


def test_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BRAIN.level = 50
    assert len({BRAIN, Window(40, 80)}) == 1
