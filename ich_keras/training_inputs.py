"""What a training makes its batches of: the loaders, and what is measured on its split first."""

from dataclasses import replace
from typing import Any

import numpy as np

from ich_keras.data.augment import Augmentation, Change
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.emptiness import brain_mm2
from ich_keras.data.foreground import foreground_counts, nnunet_intensity
from ich_keras.data.intensity import UNMEASURED
from ich_keras.data.labels import is_positive
from ich_keras.data.views import Samples
from ich_keras.errors import DataError
from ich_keras.fitting import Fit
from ich_keras.inference import batches_of
from ich_keras.progress import Progress, Tell
from ich_keras.ranks import this_rank
from ich_keras.recipe import Recipe
from ich_keras.run_edits import marks_of
from ich_keras.run_folder import RunFolder


def measured(
    recipe: Recipe,
    cache: CTCache,
    rows: np.ndarray,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> Recipe:
    """Return a recipe with the values that are measured on the training split.

    Args:
        recipe: as `Recipe.of` decided it.
        cache: of the training.
        rows: int (n,), the slices of the training split.
        progress: as `foreground_counts`.
        tell: called with a line that names the values.

    Raises:
        DataError: nothing can be measured.
    """
    if recipe.inputs.intensity != UNMEASURED:
        return recipe
    intensity = nnunet_intensity(foreground_counts(cache.pixels, rows, progress))
    if tell is not None:
        window = intensity.windows[0]
        tell(
            f"Intensity {intensity.name}, measured on the training split: {window.low:g} to"
            f" {window.high:g} HU."
        )
    return replace(recipe, inputs=replace(recipe.inputs, intensity=intensity))


def without_empty(
    recipe: Recipe,
    cache: CTCache,
    indices: dict[str, np.ndarray],
    progress: Progress | None = None,
) -> tuple[dict[str, np.ndarray], str]:
    """Leave slices without brain out of the training split, if the recipe says so.

    Slices with a positive label stay, whatever they show.

    Args:
        recipe, cache: of the training.
        indices: rows of the slice table by split.
        progress: as `brain_mm2`.

    Returns:
        (the rows that are left, a sentence that counts what is not; "" where none is asked for).

    Raises:
        DataError: no slice is left.
    """
    least = recipe.training.skip_empty_mm2
    if least is None:
        return indices, ""
    rows = indices["train"]
    truth = cache.slices[list(recipe.labels.names)].to_numpy()[rows]
    kept = (brain_mm2(cache.pixels, cache.series, rows, progress) >= least) | (
        is_positive(truth, recipe.labels)
    )
    if not kept.any():
        raise DataError(
            f"none of {len(rows):,} training slices shows {least:g} mm2 of brain.",
            "Leave --skip-empty out, or look at the cache (`ich show`).",
        )
    line = (
        f"Left out of training: {(~kept).sum():,} of {len(rows):,} slices, with less than"
        f" {least:g} mm2 of brain."
    )
    return indices | {"train": rows[kept]}, line


def make_fit(
    recipe: Recipe,
    run: RunFolder,
    cache: CTCache,
    samples: Samples,
    indices: dict[str, np.ndarray],
    model: Any,
    augment: Change | Augmentation | None,
    group: Any = None,
) -> Fit:
    """Put together what `fit` needs: the network, the loaders and the labels of validation.

    Args:
        recipe, run, cache: of the training.
        samples: of the recipe's view.
        indices: rows of the slice table for "train" and "valid".
        model: compiled.
        augment: of the user's, if there is one.
        group: of processes that train together.
    """
    rank = this_rank()
    chosen = {name: samples.of_rows(cache.slices, rows, name) for name, rows in indices.items()}
    training = recipe.training

    def batches(part: str, **settings: Any) -> Any:
        return batches_of(recipe, cache, samples, chosen[part], **settings)

    loader = batches(
        "train",
        seed=training.seed,
        balance=training.balance,
        augment=augment or (None if training.augment == "none" else training.augment),
        reverse=training.reverse,
        changes=training.changes,
    )
    assert samples.labels is not None  # `split_indices` refuses data without labels
    labels = samples.labels[chosen["valid"]]
    loader.rank = rank
    chosen["valid"] = chosen["valid"][rank.part(len(labels))]
    validation = batches("valid") if len(chosen["valid"]) else None
    marks = marks_of(run) if rank.is_first else {}
    return Fit(recipe, run, model, loader, validation, labels, marks, group)
