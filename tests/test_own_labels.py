"""A person's own labels and arrays, on whatever backend KERAS_BACKEND names."""

import keras
import numpy as np
import pytest

from ich_keras.models.classifier import build_classifier, compile_classifier


@pytest.mark.parametrize("output", ["logits", "probabilities"])
def test_a_person_s_own_classes_train_in_ten_lines(output):
    """Three kinds of volumes, told apart by where they are bright."""
    random = np.random.default_rng(0)
    classes = random.integers(0, 3, 24)
    volumes = random.normal(0, 0.3, (24, 12, 32, 32, 1)).astype("float32")
    for volume, where in zip(volumes, classes, strict=True):
        volume[4 * where : 4 * where + 4, 8:24, 8:24] += 2
    truth = np.eye(3, dtype="float32")[classes]

    names = ("low", "middle", "high")
    model = build_classifier(
        "resnet10_3d", input_shape=(12, 32, 32, 1), output=output, labels=names, exclusive=True
    )
    compile_classifier(model, learning_rate=1e-3)
    losses = model.fit(volumes, truth, batch_size=8, epochs=8, verbose=0).history["loss"]
    found = np.asarray(model.predict(volumes, verbose=0))

    assert losses[-1] < 0.5 * losses[0]
    assert found.shape == (24, 3)
    if output == "probabilities":
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)


def test_one_label_of_one_s_own_trains_and_missing_ones_change_nothing():
    random = np.random.default_rng(1)
    truth = random.integers(0, 2, (16, 2)).astype("float32")
    images = random.normal(0, 0.3, (16, 32, 32, 1)).astype("float32")
    images[truth[:, 0] == 1, 8:24, 8:24] += 2
    for number in (1, 2):
        keras.utils.set_random_seed(0)
        model = build_classifier("resnet10_2d", input_shape=(32, 32, 1), labels=number)
        compile_classifier(model, learning_rate=1e-3)
        y = truth[:, :number].copy()
        y[:, 1:] = np.nan  # nobody looked at the second
        head = np.array(model.layers[-2].get_weights()[0])
        loss = model.fit(images, y, batch_size=8, epochs=6, verbose=0).history["loss"]
        assert np.isfinite(loss).all() and loss[-1] < 0.7 * loss[0]
    # Only the column of the label that is there was trained.
    changed = np.abs(np.array(model.layers[-2].get_weights()[0]) - head).max(axis=0)
    assert changed[0] > 1e-4 and changed[1] < 1e-7
