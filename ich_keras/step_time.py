"""How long a training step takes here, for the plan of a training."""

import time

import numpy as np

from ich_keras.fitting import compiled_network
from ich_keras.recipe import Recipe


def seconds_per_step(recipe: Recipe, repeats: int = 2) -> float:
    """Time one training step of a recipe's network on random input, after a warm-up step.

    Returns:
        Seconds; the shortest of the repeats. Preparing batches and validation come on top.
    """
    model, _ = compiled_network(recipe, total_steps=repeats + 1)
    random = np.random.default_rng(0)
    size = recipe.training.batch_size
    inputs = random.standard_normal((size, *recipe.inputs.shape), np.float32)
    if recipe.labels.exclusive:
        classes = random.integers(0, len(recipe.labels), size)
        labels = np.eye(len(recipe.labels), dtype=np.float32)[classes]
    else:
        labels = random.integers(0, 2, (size, len(recipe.labels))).astype(np.float32)
    model.train_on_batch(inputs, labels)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        model.train_on_batch(inputs, labels)
        seconds.append(time.perf_counter() - began)
    return min(seconds)
