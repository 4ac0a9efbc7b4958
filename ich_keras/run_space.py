"""The disk space that a training needs, known before its first step."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ich_keras.checkpoints import KEPT, slots_bytes
from ich_keras.data.cache.cache import missing_bytes
from ich_keras.disk import Need, in_units, require_free, require_free_for_all
from ich_keras.models.weights import weights_bytes
from ich_keras.recipe import Recipe
from ich_keras.run_folder import RunFolder

# A new file is complete before an old one is removed. Weights are those of the best epoch, twice,
# and model.keras with the parts it is packed from.
_STATES, _WEIGHTS = KEPT + 1, 4
_TABLE_BYTES_PER_SLICE = 600  # predictions (two UIDs and twelve numbers) and members of splits
_OTHER_BYTES = 2**20  # configuration, history, metrics, report


@dataclass(frozen=True)
class TrainingSpace:
    """The disk space of a training, bytes.

    Args:
        state: of the state after an epoch: weights, and the slots of the optimiser.
        weights: of one file of weights.
        tables: of all else.
    """

    state: int
    weights: int
    tables: int

    @property
    def num_bytes(self) -> int:
        """The most that lies on the disk at once."""
        return _STATES * self.state + _WEIGHTS * self.weights + self.tables

    def __str__(self) -> str:
        return (
            f"the training writes up to {_STATES} states of {in_units(self.state)},"
            f" {_WEIGHTS} files of weights of {in_units(self.weights)} and tables of"
            f" {in_units(self.tables)}"
        )


def training_space(recipe: Recipe, num_slices: int, model: Any = None) -> TrainingSpace:
    """Return the disk space of a training, its cache left out.

    Args:
        recipe: of the training.
        num_slices: of its data.
        model: its network; None builds one, to count the weights.
    """
    if model is None:
        model = _network(recipe)
    # Adam keeps two averages, and the sum of the gradients where a step takes several batches.
    slots = [math.prod(variable.shape) for variable in model.trainable_variables]
    slots *= 2 + (recipe.training.accumulate > 1) + (recipe.training.ema is not None)
    if recipe.training.swa is not None:
        slots += [math.prod(variable.shape) for variable in model.weights]
    weights = weights_bytes(model)
    tables = num_slices * _TABLE_BYTES_PER_SLICE + _OTHER_BYTES
    return TrainingSpace(weights + slots_bytes(slots), weights, tables)


def require_space(run: RunFolder, space: TrainingSpace) -> None:
    """Check the free disk space of a training; what an interrupted one has written counts.

    Raises:
        EnvironmentProblem: too little is free.
    """
    there = sum(file.stat().st_size for file in run.path.rglob("*") if file.is_file())
    require_free(run.path, max(0, space.num_bytes - there), str(space))


def require_space_with_cache(
    recipe: Recipe, num_slices: int, out: Path, cache_dir: Path, cache_bytes: int
) -> None:
    """Check the free space for a cache and its training, before hours go into the cache.

    Args:
        recipe: of the training.
        num_slices: of its data.
        out: the new run folder.
        cache_dir: where the cache will be built.
        cache_bytes: of all its pixels.

    Raises:
        EnvironmentProblem: too little is free.
    """
    needed = missing_bytes(cache_dir, cache_bytes)
    space = training_space(recipe, num_slices)
    require_free_for_all(
        [
            Need(cache_dir, needed, f"the cache {in_units(needed)}"),
            Need(out, space.num_bytes, str(space)),
        ]
    )


def _network(recipe: Recipe) -> Any:
    from ich_keras.models.classifier import classifier, freeze

    model = classifier(recipe.network, output="logits", labels=recipe.labels)
    if recipe.training.freeze is not None:
        freeze(model, recipe.training.freeze)
    return model
