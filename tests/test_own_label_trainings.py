"""Trainings on labels of a person's own: interrupted, resumed, extended, and scored."""

import json

import numpy as np
import pandas as pd
import pytest
from interrupted import interrupted_training
from narrow import preset_of
from tiny_dicom import head_hu

import ich_keras
from ich_keras.arrays import cache_from_arrays
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.data.labels import series_labels, torn_series
from ich_keras.labels import LabelSet
from ich_keras.models.spec import ModelSpec
from ich_keras.prediction import predict_folder
from ich_keras.run_folder import RunFolder
from ich_keras.training import resume

CLASSES = LabelSet(("normal", "bleed"), exclusive=True)
OTHERS = LabelSet(("fracture", "mass"))
SIDE = 32


def cache_of(folder, labels, of_slices):
    """Write a cache of 24 drawn heads of five slices; the upper slices show something."""
    random = np.random.default_rng(0)
    volumes, truth = [], []
    for number in range(24):
        volume = np.stack([head_hu(SIDE, seed=5 * number + n) for n in range(5)]).astype(np.int16)
        own = np.zeros((5, len(labels)), np.int8)
        shows = number % 2 and np.arange(5) >= 3
        if labels.exclusive:
            own[np.arange(5), np.where(shows, 1, 0)] = 1
        else:
            own[:, number % 3 % 2] = shows
        volumes.append(volume + random.integers(0, 3, volume.shape).astype(np.int16))
        truth.append(own if of_slices else own.max(axis=0))
    spacing = [(5.0, 6.0, 6.0)] * len(volumes)
    return cache_from_arrays(volumes, spacing, folder, SIDE, truth, labels)


def config_of():
    return RunConfig(
        preset="tiny",
        precision="float32",
        data=DataConfig(size=SIDE),
        fit=FitConfig(batch_size=8, epochs=2, learning_rate=1e-3),
    )


@pytest.mark.parametrize("labels", [CLASSES, OTHERS], ids=["classes", "others"])
def test_they_resume_finish_extend_and_predict(tmp_path, labels, phantom_folder):
    cache = cache_of(tmp_path / "cache", labels, of_slices=True)
    with preset_of("tiny", ModelSpec((SIDE, SIDE, 3), depth=10, width=4)):
        run = interrupted_training(cache, tmp_path / "run", config_of(), epoch=1)
        said = []
        resume(run, cache, tell=said.append)
        assert not [line for line in said if "damaged" in line]
        finished = RunFolder(run)
        assert finished.is_finished
        assert len(pd.read_csv(finished.history_file)) == 2
        metrics = json.loads(finished.metrics_file("test").read_text())
        # Series of which some slices are normal and some are not are of no class as a whole.
        assert list(metrics) == (["slice"] if labels.exclusive else ["slice", "series"])
        more = ich_keras.train_more(run, cache, tmp_path / "more", epochs=1)
        assert len(pd.read_csv(RunFolder(more).history_file)) == 3
        prediction = predict_folder(more, phantom_folder / "images")
    assert set(labels.names) <= set(prediction.series.columns)
    if labels.exclusive:
        sums = prediction.series[list(labels.names)].sum(axis=1)
        np.testing.assert_allclose(sums, 1, atol=1e-5)


def test_a_series_of_several_classes_has_none_as_a_whole():
    slices = pd.DataFrame(
        {
            "series_uid": list("aabbccdd"),
            "normal": [1, 1, 1, 0, -1, 0, -1, -1],
            "bleed": [0, 0, 0, 1, -1, 1, -1, -1],
        }
    ).astype({"normal": np.int8, "bleed": np.int8})
    assert torn_series(slices, CLASSES) == ["b"]
    found = series_labels(slices, CLASSES)
    assert found.to_dict("index") == {
        "a": {"normal": 1, "bleed": 0},
        "b": {"normal": -1, "bleed": -1},
        "c": {"normal": 0, "bleed": 1},
        "d": {"normal": -1, "bleed": -1},
    }
    others = LabelSet(("normal", "bleed"))
    assert torn_series(slices, others) == []
    assert series_labels(slices, others).loc["b"].tolist() == [1, 1]
