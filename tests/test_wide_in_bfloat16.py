"""What bfloat16 does to the wide range: measured, because it is left as it is."""

import keras
import numpy as np
import pytest
import torch
from scipy import ndimage

from ich_keras import read_hu
from ich_keras.data.inputs import volume_input
from ich_keras.models.classifier import classifier
from ich_keras.models.spec import ModelSpec

on_torch = pytest.mark.skipif(keras.backend.backend() != "torch", reason="bfloat16 by torch")


def rounded(inputs):
    return torch.from_numpy(inputs).to(torch.bfloat16).to(torch.float32).numpy()


def in_hu(inputs):
    return (inputs.astype(np.float64) + 0.25) * 1400 - 1000


def test_the_steps_where_brain_and_blood_lie():
    """bfloat16 has eight binary digits: steps of 2**-9 below 0.5 (50 HU), of 2**-8 above."""
    hu = np.arange(-1024, 500, dtype=np.int16).reshape(1, 1, -1)
    found = in_hu(rounded(volume_input(hu, None, "wide"))).ravel()
    steps = np.diff(np.unique(found[(hu.ravel() >= 0) & (hu.ravel() < 40)]))
    np.testing.assert_allclose(steps, 1400 / 2**9, rtol=1e-6)  # 2.7 HU
    steps = np.diff(np.unique(found[(hu.ravel() >= 56) & (hu.ravel() < 100)]))
    np.testing.assert_allclose(steps, 1400 / 2**8, rtol=1e-6)  # 5.5 HU


def test_it_is_small_beside_noise_on_real_slices(real_ge_series, real_rsna_slices):
    errors, noises, biases, means = [], [], [], []
    for folder in (real_ge_series, real_rsna_slices):
        for path in sorted(folder.rglob("*.dcm")):
            hu = read_hu(path)
            brain = ndimage.binary_erosion((hu > 15) & (hu < 60), iterations=2)
            if brain.sum() < 2000:
                continue
            inputs = volume_input(hu[np.newaxis], None, "wide")[0, ..., 0]
            error = in_hu(rounded(inputs)) - in_hu(inputs)
            errors.append(error[brain].std())
            biases.append(error[brain].mean())
            means.append(ndimage.uniform_filter(error, 7)[brain].std())
            smooth = ndimage.uniform_filter(hu.astype(float), 5)
            noises.append((hu - smooth)[brain].std())
    assert len(errors) > 20
    assert np.mean(errors) < 0.3 * np.mean(noises)
    assert abs(np.mean(biases)) < 0.05 and np.mean(means) < 0.2


@on_torch
def test_the_input_is_the_smaller_part_of_what_bfloat16_changes(phantom_cache):
    """With the same weights: the input rounded alone, and all of the network in bfloat16."""
    from ich_keras.data.batches import slice_batches
    from ich_keras.models.torch.function import FlatFunction

    keras.utils.set_random_seed(0)
    model = classifier(ModelSpec((48, 48, 1), depth=10, width=8, dropout=0.0), "logits")
    inputs = next(iter(slice_batches(phantom_cache, batch_size=64, intensity="wide", seed=0)))[0]
    inputs = np.array(inputs, copy=True) if isinstance(inputs, np.ndarray) else inputs.numpy()

    def logits(given, precision):
        function = FlatFunction(model, False, precision)
        with torch.no_grad():
            return function(torch.from_numpy(given), function.tensors())[0].float().numpy()

    # Statistics of these images, as a training would have them.
    model.compile(keras.optimizers.SGD(0.0), "mse")
    for _ in range(40):
        model.train_on_batch(inputs, np.zeros((len(inputs), 6), np.float32))
    exact = logits(inputs, "float32")
    by_input = np.sqrt(np.mean((logits(rounded(inputs), "float32") - exact) ** 2))
    by_all = np.sqrt(np.mean((logits(inputs, "bfloat16") - exact) ** 2))
    assert 0 < by_input < 0.6 * by_all < 0.05 * exact.std()
