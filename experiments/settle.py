"""From a declaration and the data to the final configuration of a run: its split, its weights, and
the epochs or batch size that `like` asks for."""

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from experiments.declare import base_config
from experiments.place import Place
from experiments.runs import RUNS
from experiments.splits import FOLDER, split_path
from experiments.weights import starting_weights
from ich_keras.config import RunConfig
from ich_keras.data.cache.cache import CTCache
from ich_keras.models.presets import ModelSpec
from ich_keras.planning import plan_training
from ich_keras.processes import usable_cores
from ich_keras.recipe import Recipe

if TYPE_CHECKING:
    from ich_keras.models.cost import Cost


@dataclass(frozen=True)
class Task:
    """One run with one seed.

    Args:
        key, seed: of the run.
        part: "run"; "weights" trains it for its weights alone, which results do not hold, and
            leaves its stored result as it is; "features" computes those of its slice network.

    >>> str(Task("2d", 0)), str(Task("2d", 0, "weights"))
    ('2d seed 0', '2d seed 0 (weights)')
    """

    key: str
    seed: int
    part: str = "run"

    def __str__(self) -> str:
        part = "" if self.part == "run" else f" ({self.part})"
        return f"{self.key} seed {self.seed}{part}"


@dataclass(frozen=True)
class RunCost:
    """What an epoch of a run costs.

    Args:
        samples_per_epoch: training samples.
        operations_per_sample: multiply-adds of a forward pass.
    """

    samples_per_epoch: int
    operations_per_sample: int

    @property
    def operations_per_epoch(self) -> int:
        """Multiply-adds of a forward pass of all training samples."""
        return self.samples_per_epoch * self.operations_per_sample


def resolve(place: Place, task: Task, cache: CTCache) -> tuple[RunConfig, RunCost]:
    """Fill in what depends on the data: the split, the weights, and what `like` asks for.

    Args:
        place: of the experiments.
        task: the run.
        cache: the one it trains on.

    Returns:
        The configuration, and what an epoch costs; of a sequence head, its slice network's.
    """
    run, seed = RUNS[task.key], task.seed
    if run.on is not None:
        return resolve(place, Task(run.on, seed), cache)
    folder = place.work / FOLDER
    config = base_config(run, place.scale, seed, place.device)
    # More workers than cores would only wait for each other; the batches are the same.
    workers = min(config.data.loader_workers, max(1, usable_cores() // place.jobs))
    config = replace(config, data=replace(config.data, loader_workers=workers))
    split = split_path(folder, run.split, cache.slices, seed, run.fraction)
    config = replace(config, data=replace(config.data, split=split))
    if run.weights is not None:
        config = replace(config, weights=starting_weights(place, run.weights, run.preset))
    if run.like is not None:
        what, key = run.like
        other, other_cost = resolve(place, Task(key, seed), cache)
        config = _like(config, what, cache, other, other_cost)
    return config, _run_cost(config, cache)


def _run_cost(config: RunConfig, cache: CTCache) -> RunCost:
    plan = plan_training(cache, config)
    return RunCost(plan.samples_per_epoch, _network_cost(Recipe.of(config).network).multiply_adds)


def _like(
    config: RunConfig, what: str, cache: CTCache, other: RunConfig, other_cost: RunCost
) -> RunConfig:
    if what == "steps":
        steps = plan_training(cache, other).total_steps / Recipe.of(other).training.accumulate
        batches = steps * Recipe.of(config).training.accumulate
        epochs = batches / plan_training(cache, config).steps_per_epoch
        return _with_fit(config, epochs=max(1, round(epochs)))
    if what == "operations":
        total = other_cost.operations_per_epoch * other.fit.epochs
        epochs = total / _run_cost(config, cache).operations_per_epoch
        return _with_fit(config, epochs=max(1, round(epochs)))
    # At least two: batch normalisation needs more than a single sample of a slab.
    available = (
        _network_cost(Recipe.of(other).network).activation_bytes
        * Recipe.of(other).training.batch_size
    )
    fitting = round(available / _network_cost(Recipe.of(config).network).activation_bytes)
    return _with_fit(config, batch_size=max(2, fitting))


def _with_fit(config: RunConfig, **settings: int) -> RunConfig:
    # The checker cannot tell which field a keyword names.
    return replace(config, fit=replace(config.fit, **settings))  # type: ignore[arg-type]


# Building a network takes seconds, and many runs share one.
@functools.cache
def _network_cost(network: ModelSpec) -> "Cost":
    from ich_keras.models.classifier import classifier
    from ich_keras.models.cost import cost

    return cost(classifier(network))
