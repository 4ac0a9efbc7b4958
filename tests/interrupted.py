"""Trainings that end too early, as an interruption ends them."""

from pathlib import Path

import pytest

from ich_keras import fitting
from ich_keras.config import RunConfig
from ich_keras.data.cache.cache import CTCache
from ich_keras.training import train


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
