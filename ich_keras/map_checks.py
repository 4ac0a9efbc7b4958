"""Do heat maps depend on what was learned? They are compared with those of random weights.

A map that stays the same when the weights are replaced shows the image (its edges, its outline),
not what the answer rests on.

Source:
    Adebayo et al., Sanity Checks for Saliency Maps (NeurIPS 2018), section 3.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ich_keras.ct.head import head_mask
from ich_keras.errors import DataError, UsageError
from ich_keras.explanation import Explained, HeatMaps, explain_series
from ich_keras.inference import load_run
from ich_keras.metrics.localisation import rank_correlation
from ich_keras.recipe import Recipe
from ich_keras.relevance import MapOptions, map_options, require_torch
from ich_keras.run_folder import RunFolder

PARTS = ("all", "head")


def randomised(run: Explained, part: str = "all", seed: int = 0) -> tuple[Recipe, Any]:
    """Return a run's network with random weights in place of those that it learned.

    Args:
        run: a finished run, or what `load_run` made of it; it is not changed.
        part: "all" weights, or those of the "head" (the last, dense layer) alone.
        seed: of the weights.

    Returns:
        What `load_run` returns: the recipe, and another model.

    Raises:
        UsageError: an unknown part.
    """
    if part not in PARTS:
        raise UsageError(f"part {part!r}; expected one of {', '.join(PARTS)}.")
    require_torch()
    if isinstance(run, tuple):
        recipe, model = run
    else:
        recipe, model = load_run(RunFolder.at(run), precision="float32")
    from ich_keras.models.classifier import classifier
    from ich_keras.models.weights import HEAD

    other = classifier(recipe.network, precision="float32", labels=recipe.labels)
    other.set_weights(model.get_weights())
    rng = np.random.default_rng(seed)
    for layer in other.layers:
        if layer.weights and (part == "all" or layer.name == HEAD):
            layer.set_weights([_drawn(weight, rng) for weight in layer.weights])
    return recipe, other


def _drawn(weight: Any, rng: np.random.Generator) -> np.ndarray:
    """Draw a weight as it may be before any training (He et al. 2015, by the values it feeds)."""
    name, shape = weight.path.rsplit("/", 1)[-1], tuple(weight.shape)
    if name == "kernel":
        fan_out = int(np.prod(shape[:-2])) * shape[-1]
        return rng.normal(0, np.sqrt(2 / fan_out), shape).astype(np.float32)
    is_one = name in ("gamma", "moving_variance")
    return np.full(shape, float(is_one), np.float32)


def randomisation_check(
    run: Explained,
    hu: np.ndarray,
    spacing_mm: Sequence[float],
    labels: Sequence[str] | str | None = None,
    method: str | MapOptions = "hirescam",
    part: str = "all",
    seed: int = 0,
) -> dict[str, float]:
    """Compare a run's maps of a series with those of random weights.

    Args:
        run, hu, spacing_mm, labels, method: as for `explain_series`. Signed maps are compared,
            since the others are mostly 0 where random weights speak against a label.
        part, seed: as for `randomised`.

    Returns:
        Label -> Spearman's rank correlation of the two maps over the voxels of the head, -1 to 1.
        Near 1, the map does not depend on what was learned. NaN where one of them is constant.

    Raises:
        UsageError, StaleError, DataError: as `explain_series` raises them; no head in the series.
    """
    options = replace(map_options(method), signed=True)
    loaded = run if isinstance(run, tuple) else load_run(RunFolder.at(run), precision="float32")
    pairs = [
        explain_series(one, hu, spacing_mm, labels, options)
        for one in (loaded, randomised(loaded, part, seed))
    ]
    return agreement(pairs[0], pairs[1], head_mask(np.asarray(hu), *spacing_mm[1:]))


def agreement(one: HeatMaps, other: HeatMaps, region: np.ndarray) -> dict[str, float]:
    """Return the rank correlation of two maps of one series, label by label.

    Args:
        one, other: of the same labels.
        region: bool, the shape of a map: which voxels are compared.

    Raises:
        DataError: the region is empty, or labels or shapes differ.
    """
    if set(one.values) != set(other.values):
        raise DataError(f"maps of {', '.join(one.values)} and of {', '.join(other.values)}.")
    if any(
        values.shape != region.shape for values in (*one.values.values(), *other.values.values())
    ):
        raise DataError(f"maps are compared on a region of another shape, {region.shape}.")
    if not region.any():
        raise DataError("the series shows no head.", "Maps are 0 outside the head.")
    return {
        name: rank_correlation(values[region], other.values[name][region])
        for name, values in one.values.items()
    }
