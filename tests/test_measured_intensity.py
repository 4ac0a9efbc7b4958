"""Intensities beyond the thesis's: a bone window beside its three, and nnU-Net's normalisation."""

from dataclasses import replace

import numpy as np
import pytest
from narrow import preset_of

from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.ct.window import BONE, WINDOWS
from ich_keras.data.batches import view_batches
from ich_keras.data.foreground import foreground_counts, nnunet_intensity
from ich_keras.data.inputs import slice_input
from ich_keras.data.intensity import (
    HEAD_ABOVE_HU,
    INTENSITIES,
    NNUNET,
    UNMEASURED,
    Intensity,
    intensity_of,
)
from ich_keras.data.views import View
from ich_keras.errors import DataError, UsageError
from ich_keras.models.spec import ModelSpec
from ich_keras.planning import split_indices
from ich_keras.recipe import Recipe
from ich_keras.run_folder import RunFolder
from ich_keras.training import train


def test_bone_windows_are_the_three_and_bone():
    intensity = INTENSITIES["bone-windows"]
    assert intensity.windows == (*WINDOWS, BONE) and (BONE.low, BONE.high) == (-800, 2000)
    hu = np.random.default_rng(0).integers(-1100, 2500, (2, 9, 9)).astype(np.int16)
    found = slice_input(hu, intensity="bone-windows")
    np.testing.assert_array_equal(found[..., :3], slice_input(hu))
    bone = (np.clip((hu + 800) / 2800, 0, 1) - 0.13) / 0.18
    np.testing.assert_allclose(found[..., 3], bone, atol=1e-5)
    config = RunConfig(preset="resnet18_2d_stack", data=DataConfig(intensity="bone-windows"))
    assert Recipe.of(config).network.channels == 12
    assert "intensity bone-windows (0 to 80, " in Recipe.of(config).input_options[0]


def test_drawn_bone_windows_are_looked_up(phantom_cache):
    found = [
        x for x, _ in view_batches(phantom_cache, View(), np.arange(5), intensity="bone-windows")
    ]
    hu = phantom_cache.slices_hu(np.arange(5))
    np.testing.assert_array_equal(found[0], slice_input(hu, intensity="bone-windows"))


def counts_of(values):
    return np.bincount(np.asarray(values, np.int64) + 2**15, minlength=2**16)


@pytest.mark.parametrize("number", [2, 3, 41, 1000])
def test_percentiles_mean_and_deviation_are_numpys(number):
    values = np.random.default_rng(number).integers(-499, 1800, number)
    intensity = nnunet_intensity(counts_of(values))
    low, high = np.percentile(values, [0.5, 99.5])
    assert intensity.windows[0].low == pytest.approx(low)
    assert intensity.windows[0].high == pytest.approx(high)
    # nnU-Net: cut off, minus mean, by deviation, both of the values before they are cut off.
    hu = np.arange(-1000, 2500, dtype=np.int16).reshape(1, 70, 50)
    expected = (np.clip(hu, low, high) - values.mean()) / values.std()
    found = slice_input(hu, intensity=intensity)
    np.testing.assert_allclose(found[..., 0], expected, atol=2e-4)
    assert Intensity.from_dict(intensity.to_dict()) == intensity


def test_the_foreground_is_that_of_the_slices(phantom_cache):
    rows = np.array([5, 3, 8, 70])
    hu = phantom_cache.slices_hu(rows)
    told = []
    counts = foreground_counts(phantom_cache.pixels, rows, lambda *step: told.append(step))
    np.testing.assert_array_equal(counts, counts_of(hu[hu > HEAD_ABOVE_HU]))
    assert told == [("measuring HU", 4, 4)]


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(DataError, match="holds no pixel above -500 HU"):
        nnunet_intensity(counts_of([]))
    with pytest.raises(DataError, match="nearly all 40 HU"):
        nnunet_intensity(counts_of([40, 40, 40]))
    with pytest.raises(UsageError, match="'nnunet' has no values of its own"):
        intensity_of("nnunet")
    with pytest.raises(UsageError, match=r"data.intensity is 'nnu'.*bone-windows, nnunet"):
        RunConfig(data=DataConfig(intensity="nnu"))


def test_a_training_measures_its_own_split(phantom_cache, tmp_path):
    with preset_of("narrow_2d_grey", ModelSpec((24, 24, 1), depth=10, width=4)):
        config = RunConfig(
            preset="narrow_2d_grey",
            precision="float32",
            data=DataConfig(size=24, intensity="nnunet"),
            fit=FitConfig(epochs=1, learning_rate=1e-3),
        )
        asked = Recipe.of(config, phantom_cache.size)
        assert asked.inputs.intensity == UNMEASURED
        told = []
        run = RunFolder(train(config, phantom_cache, tmp_path / "run", tell=told.append))
        recipe = run.recipe()
        _, indices = split_indices(phantom_cache.slices, recipe)
        hu = phantom_cache.slices_hu(np.sort(indices["train"]))
        expected = nnunet_intensity(counts_of(hu[hu > HEAD_ABOVE_HU]))
        assert recipe.inputs.intensity == expected and expected.name == NNUNET
        assert any(line.startswith("Intensity nnunet, measured on the training") for line in told)
        assert recipe == replace(asked, inputs=replace(asked.inputs, intensity=expected))
        assert "intensity nnunet" in run.report_file.read_text()
        # By value for whoever starts from its weights.
        further = replace(config, weights=str(run.best_weights), data=DataConfig(size=24))
        assert Recipe.of(further).inputs.intensity == expected
