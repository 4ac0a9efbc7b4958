"""Short trainings: presets of narrow networks, no evaluation, and the history they leave."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ich_keras import training
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.data.cache.cache import CTCache
from ich_keras.models.presets import PRESETS, Preset
from ich_keras.models.spec import ModelSpec

SLICES = ModelSpec((32, 32, 3), depth=10, width=4)


@contextmanager
def preset_of(name: str, spec: ModelSpec) -> Iterator[None]:
    """Offer a network as if it were one of the library's presets; a real one comes back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, name, Preset(spec, name))
        yield


def train_slices(cache: CTCache, out: Path) -> Path:
    """Train a narrow 2D network for one epoch: what a sequence head stands on."""
    with preset_of("narrow", SLICES):
        config = RunConfig(
            preset="narrow",
            data=DataConfig(size=32),
            fit=FitConfig(batch_size=32, epochs=1, learning_rate=1e-3),
            precision="float32",
            device="cpu",
        )
        return training.train(config, cache, out)


@contextmanager
def without_evaluation() -> Iterator[None]:
    """Evaluating takes longer than a short training; other tests look at it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "evaluate_network", lambda *_: None)
        yield


def history_of(run: Path) -> list[dict[str, str]]:
    """Rows of history.csv as they are written, without their times."""
    with open(run / "history.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [{name: row[name] for name in row if name != "seconds"} for row in rows]
