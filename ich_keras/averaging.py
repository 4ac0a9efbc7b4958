"""Averages of the weights that are judged and kept in place of the last ones: EMA and SWA."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from ich_keras.checkpoints import Averages, averages_of, set_averages
from ich_keras.recipe import TrainingRecipe


def ema_settings(training: TrainingRecipe) -> dict[str, Any]:
    """Return what Keras' optimiser must be told of the moving average; nothing without one.

    Keras averages after each batch, also where several make one optimiser step: the decay is that
    of a step, so each batch has its root.
    """
    if training.ema is None:
        return {}
    momentum = training.ema ** (1 / training.accumulate)
    return {"use_ema": True, "ema_momentum": momentum, "ema_overwrite_frequency": None}


def add_averages(model: Any, training: TrainingRecipe) -> None:
    """Give a compiled network the variables of the average over epochs, if there is to be one.

    They are saved with its states.
    """
    if training.swa is None:
        return
    import keras

    averages = [
        keras.Variable(np.zeros(tuple(weight.shape), np.float32), trainable=False, name="average")
        for weight in model.weights
    ]
    set_averages(model, Averages(averages))


def average_epoch(model: Any, training: TrainingRecipe, epoch: int) -> None:
    """Take the weights after an epoch (from 1) into the average over the last ones."""
    place = _place(training, epoch)
    if place < 1:
        return
    for average, weight in zip(averages_of(model), model.weights, strict=True):
        before, now = _array(average), _array(weight)
        # The first replaces what is there: a run with more epochs brings the average of its last.
        average.assign(now if place == 1 else before + (now - before) / np.float32(place))


@contextlib.contextmanager
def judged_weights(model: Any, training: TrainingRecipe, epoch: int) -> Iterator[None]:
    """Put the average in place of the weights for the length of a block.

    Args:
        model: compiled, with its optimiser built.
        training: says which average, if any.
        epoch: that was finished last, from 1.
    """
    if training.ema is None and _place(training, epoch) < 1:
        yield
        return
    before = [_array(weight) for weight in model.weights]
    try:
        if training.ema is not None:
            model.optimizer.finalize_variable_values(model.trainable_variables)
        else:
            for weight, average in zip(model.weights, averages_of(model), strict=True):
                weight.assign(average)
        yield
    finally:
        for weight, array in zip(model.weights, before, strict=True):
            weight.assign(array)


def _place(training: TrainingRecipe, epoch: int) -> int:
    """Return which of the averaged epochs this is, from 1; less before the first of them."""
    return 0 if training.swa is None else epoch - (training.epochs - training.swa)


def _array(variable: Any) -> np.ndarray:
    import keras

    return np.array(keras.ops.convert_to_numpy(variable))
