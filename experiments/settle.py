"""From a declaration and the data to the final configuration of a run: its split, its weights, and
the epochs or batch size that `like` asks for."""

from dataclasses import dataclass, replace

from experiments.declare import base_config
from experiments.place import Place
from experiments.runs import RUNS
from experiments.splits import FOLDER, split_path
from experiments.weights import starting_weights
from ich_keras.config import RunConfig
from ich_keras.data.cache.cache import CTCache
from ich_keras.planning import plan_training
from ich_keras.processes import usable_cores
from ich_keras.recipe import Recipe


@dataclass(frozen=True)
class Task:
    """One run with one seed."""

    key: str
    seed: int

    def __str__(self) -> str:
        return f"{self.key} seed {self.seed}"


def resolve(place: Place, task: Task, cache: CTCache) -> tuple[RunConfig, dict]:
    """Fill in what a declaration leaves to the data: split, weights, and what `like` asks for.

    Args:
        place: of the experiments.
        task: the run.
        cache: the one it trains on.

    Returns:
        (configuration, {"samples_per_epoch", "operations_per_sample"}).
    """
    run, seed = RUNS[task.key], task.seed
    folder = place.work / FOLDER
    config = base_config(run, place.scale, seed, place.device)
    # More than there are cores only wait for each other; batches are the same.
    workers = min(config.data.loader_workers, max(1, usable_cores() // place.jobs))
    config = replace(config, data=replace(config.data, loader_workers=workers))
    split = split_path(folder, run.split, cache.slices, seed, run.fraction)
    config = replace(config, data=replace(config.data, split=split))
    if run.weights is not None:
        config = replace(config, weights=starting_weights(place, run.weights, run.preset))
    if run.like is not None:
        what, key = run.like
        other, cost = resolve(place, Task(key, seed), cache)
        config = _like(config, what, cache, other, cost)
    plan = plan_training(cache, config)
    return config, {
        "samples_per_epoch": _samples_per_epoch(config, plan),
        "operations_per_sample": _cost(config).multiply_adds,
    }


def _like(
    config: RunConfig, what: str, cache: CTCache, other: RunConfig, other_cost: dict
) -> RunConfig:
    plan = plan_training(cache, config)
    if what == "steps":
        steps = plan_training(cache, other).total_steps / Recipe.of(other).training.accumulate
        epochs = steps * Recipe.of(config).training.accumulate / plan.steps_per_epoch
        return _with_fit(config, epochs=max(1, round(epochs)))
    if what == "operations":
        total = (
            other_cost["operations_per_sample"] * other_cost["samples_per_epoch"] * other.fit.epochs
        )
        one = _cost(config).multiply_adds * _samples_per_epoch(config, plan)
        return _with_fit(config, epochs=max(1, round(total / one)))
    # At least two: batch normalisation has nothing to compare a single sample of a slab with.
    kept = _cost(other).activation_bytes * Recipe.of(other).training.batch_size
    return _with_fit(config, batch_size=max(2, round(kept / _cost(config).activation_bytes)))


def _with_fit(config: RunConfig, **settings) -> RunConfig:
    return replace(config, fit=replace(config.fit, **settings))


def _samples_per_epoch(config: RunConfig, plan) -> int:
    # A last batch that is not full is left out of training.
    return min(plan.samples_per_epoch, plan.steps_per_epoch * Recipe.of(config).training.batch_size)


def _cost(config: RunConfig):
    from ich_keras.models.classifier import classifier
    from ich_keras.models.cost import cost

    return cost(classifier(Recipe.of(config).network))
