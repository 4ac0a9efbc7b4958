"""The calls of Python: flat settings, and what the commands do, without a configuration."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import ich_keras
from ich_keras import training
from ich_keras.config import FitConfig, RunConfig
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.leakage import audit_data
from ich_keras.data.split import make_split
from ich_keras.errors import DataError, UsageError
from ich_keras.labels import LABELS
from ich_keras.run_folder import RunFolder


@pytest.fixture
def begun(monkeypatch):
    """What `training.train` was called with, in place of training."""
    calls = []
    monkeypatch.setattr(training, "train", lambda *given: calls.append(given) or given[2])
    return calls


def test_flat_settings_make_the_configuration(begun, phantom_cache, phantom_cache_folder, tmp_path):
    out = tmp_path / "run"
    callback = object()
    for cache in (phantom_cache, phantom_cache_folder, str(phantom_cache_folder)):
        ich_keras.train(
            cache, out, preset="resnet10_2d", epochs=3, positive_weight={"any": 2.0}, seed=4,
            tell=print, callbacks=callback,
        )  # fmt: skip
        config, opened, where, *others = begun.pop()
        assert isinstance(opened, CTCache) and opened.path == phantom_cache.path
        fit = FitConfig(epochs=3, positive_weight={"any": 2.0})
        assert config.fit == fit and config.seed == 4 and config.preset == "resnet10_2d"
        assert config.data.size == phantom_cache.size == 48
        assert where == out and others == [None, print, None, callback]
    ich_keras.train(phantom_cache, out, size=32)
    assert begun.pop()[0].data.size == 32
    own = RunConfig(seed=7)
    ich_keras.train(phantom_cache, out, config=own, epochs=2)
    assert begun.pop()[0] == RunConfig(seed=7, fit=FitConfig(epochs=2))
    # The order of `training.train`.
    ich_keras.train(own, phantom_cache, out)
    assert begun.pop()[:3] == (own, phantom_cache, out)


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"lr": 1e-3}, "there is no setting 'lr'", "Did you mean 'learning_rate'?"),
        ({"epochs": 0}, "fit.epochs is 0; expected at least 1", ""),
        ({"epochs": "3"}, "fit.epochs is '3'; expected int", ""),
        ({"learning_rate": float("nan")}, "learning_rate is nan", ""),
        ({"preset": "resnet19"}, "no preset is called 'resnet19'", None),
    ],
    ids=str,
)
def test_bad_settings_are_refused_before_anything_is_written(
    begun, phantom_cache, tmp_path, settings, message, hint
):
    with pytest.raises(UsageError, match=message) as caught:
        ich_keras.train(phantom_cache, tmp_path / "run", **settings)
    assert hint is None or caught.value.hint == hint
    assert begun == [] and list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="no run folder as its third argument"):
        ich_keras.train(RunConfig(), phantom_cache)


def test_a_training_in_one_call(phantom_cache_folder, tmp_path):
    run = ich_keras.train(
        phantom_cache_folder, tmp_path / "run", preset="resnet10_2d", size=32, epochs=1,
        limit_series=14, precision="float32", device="cpu", augment=None, balance=True,
    )  # fmt: skip
    assert RunFolder(run).is_finished
    assert RunFolder(run).config().fit.epochs == 1


def test_split_and_audit_are_those_of_a_training(phantom_cache, phantom_cache_folder):
    split = ich_keras.split(phantom_cache_folder, seed=3)
    expected = make_split("patient", phantom_cache.slices, 3)
    for part in ("train", "valid", "test"):
        rows = split.indices(phantom_cache.slices, part)
        np.testing.assert_array_equal(rows, expected.indices(phantom_cache.slices, part))
    found = ich_keras.audit(phantom_cache, split)
    assert found == audit_data(phantom_cache, expected)
    assert found["leaks"] == []
    assert ich_keras.audit(phantom_cache, "thesis-slices", seed=3)["leaks"]
    assert "split" not in ich_keras.audit(phantom_cache_folder)
    with pytest.raises(UsageError, match="split 'patients'"):
        ich_keras.split(phantom_cache, "patients")
    bare = CTCache.open(phantom_cache_folder)
    bare.labelling = None
    for call in (ich_keras.split, lambda cache: ich_keras.audit(cache, "patient")):
        with pytest.raises(DataError, match="the data have no labels"):
            call(bare)


def test_presets_and_submission(tmp_path):
    assert {"resnet18_2d", "resnet18_3d"} <= set(ich_keras.presets())
    assert list(ich_keras.presets("resnet18_3d")) == ["resnet18_3d"]
    with pytest.raises(UsageError, match="no preset is called 'resnet19'"):
        ich_keras.presets("resnet19")
    table = pd.DataFrame([{"sop_instance_uid": "ID_1", **dict.fromkeys(LABELS, 0.25)}])
    path = ich_keras.submission(table, tmp_path / "out.csv")
    assert path.read_text().splitlines()[1] == "ID_1_epidural,0.25"
    assert callable(ich_keras.submission)  # no module of that name takes its place


def test_the_calls_are_light():
    program = (
        "import sys, ich_keras; ich_keras.presets(); ich_keras.train, ich_keras.submission\n"
        "assert not {'keras', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=os.environ, check=False)
    assert done.returncode == 0
