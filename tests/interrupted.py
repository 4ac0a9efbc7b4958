"""Trainings that end too early, as an interruption ends them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from narrow import preset_of

from ich_keras import fitting
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.data.cache.cache import CTCache
from ich_keras.models.spec import ModelSpec
from ich_keras.training import train

SIZE = 48


class Crash(Exception):
    """Raised in the middle of a training."""


def interrupted_training(cache: CTCache, out: Path, config: RunConfig, epoch: int) -> Path:
    """Train until the state after an epoch is saved, and die there; return the run folder."""
    save_state = fitting.save_state

    def save_and_die(folder, model, number, state):
        save_state(folder, model, number, state)
        if number == epoch:
            raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "save_state", save_and_die)
        with pytest.raises(Crash):
            train(config, cache, out)
    return out


@contextlib.contextmanager
def begun_training(cache: CTCache, out: Path, preset: str) -> Iterator[Path]:
    """Train a narrow network for the first of two epochs; its preset exists in the block only."""
    with preset_of(preset, ModelSpec((SIZE, SIZE, 3), depth=10, width=8)):
        config = RunConfig(
            preset=preset,
            precision="float32",
            data=DataConfig(size=SIZE, balance=True),
            fit=FitConfig(batch_size=16, epochs=2, learning_rate=1e-3),
        )
        yield interrupted_training(cache, out, config, epoch=1)
