"""Planning a training before it starts: splits, counts, steps."""

from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from ich_keras.config import RunConfig
from ich_keras.counting import number_of
from ich_keras.ct.series import SeriesIndex
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.labels import has_labels
from ich_keras.data.pixels import require_distinct
from ich_keras.data.split import SPLITS, Split, make_split
from ich_keras.data.views import SAMPLE_NAMES, Samples, make_samples
from ich_keras.distribution import distribution_lines, samples_per_statistics
from ich_keras.errors import DataError, UsageError
from ich_keras.labels import LabelSet
from ich_keras.ranks import this_rank
from ich_keras.recipe import Recipe, TrainingRecipe

# Part of the weights after the first step in their moving average, beyond which a line says so.
MOST_OF_FIRST_WEIGHTS = 0.1


@dataclass(frozen=True)
class TrainingPlan:
    """What a training will do.

    Args:
        num_slices: slices per split.
        num_series: series per split.
        num_patients: patients per split.
        num_positive: positive training samples per label.
        samples_per_epoch: slices, stacks, slabs or series the network sees in an epoch.
        steps_per_epoch: batches per epoch.
        total_steps: batches in all, as the schedule counts them; `accumulate` of them make one
            optimiser step.
        learning_rate: the rate after the warm-up.
        warning: what is wrong with the chosen split ("" for a sound one).
        note: how much the split left out ("" when nothing).
        weights: the file training starts from, and its source ("" from scratch).
    """

    num_slices: dict[str, int]
    num_series: dict[str, int]
    num_patients: dict[str, int]
    num_positive: dict[str, int]
    samples_per_epoch: int
    steps_per_epoch: int
    total_steps: int
    learning_rate: float
    warning: str
    note: str
    weights: str = ""

    def to_dict(self) -> dict:
        """Return the plan as a dictionary, ready for JSON."""
        return asdict(self)


def limit_series(slices: pd.DataFrame, count: int | None) -> np.ndarray:
    """Return the rows of the first `count` series of a slice table (None: of all)."""
    if count is None:
        return np.arange(len(slices))
    uids = slices["series_uid"].drop_duplicates()[:count]
    return np.flatnonzero(slices["series_uid"].isin(uids).to_numpy())


def split_indices(slices: pd.DataFrame, recipe: Recipe) -> tuple[Split, dict[str, np.ndarray]]:
    """Split a slice table as the recipe says, and refuse a split that leaks.

    Returns:
        (the split, rows of the table for "train", "valid" and "test").

    Raises:
        DataError: no labels, missing PatientID, too few patients, or a leaking split.
    """
    labels = recipe.labels
    if not has_labels(slices, labels):
        raise DataError("the data have no labels.", "Give --labels stage_2_train.csv.")
    training = recipe.training
    rows = limit_series(slices, training.limit_series)
    chosen = slices.iloc[rows]
    split = make_split(training.split, chosen, training.seed, labels)
    return split, {name: rows[split.indices(chosen, name, labels)] for name in SPLITS}


def plan_training(tables: SeriesIndex | CTCache, config: RunConfig) -> TrainingPlan:
    """Plan what `train` would do: slices, series and patients per split, steps, learning rate.

    Args:
        tables: an index or a cache, with labels.
        config: of the training.

    Raises:
        UsageError, DataError: as `train`.
    """
    cache = tables if isinstance(tables, CTCache) else None
    recipe = Recipe.of(config, None if cache is None else cache.size, labels_in(tables))
    return plan_of(tables, recipe, cache)


def labels_in(tables: SeriesIndex | CTCache) -> LabelSet:
    """Return the labels of an index or a cache.

    Raises:
        DataError: it has none.
    """
    if tables.labelling is None:
        raise DataError("the data have no labels.", "Give --labels stage_2_train.csv.")
    return tables.labelling.labels


def plan_of(
    tables: SeriesIndex | CTCache, recipe: Recipe, cache: CTCache | None = None
) -> TrainingPlan:
    """Plan a training by a recipe; see `plan_training`.

    Args:
        tables: an index or a cache, with labels.
        recipe: of the training.
        cache: that of the tables, to compare the pixels of the splits; None does not.
    """
    slices = tables.slices
    split, indices = split_indices(slices, recipe)
    if cache is not None:
        require_distinct(cache, split, indices)
    samples = make_samples(slices, tables.series, recipe.inputs.view, tables.labelling)
    return count_plan(slices, recipe, split, indices, samples)


def count_plan(
    slices: pd.DataFrame,
    recipe: Recipe,
    split: Split,
    indices: dict[str, np.ndarray],
    samples: Samples,
) -> TrainingPlan:
    """Make the plan from what `split_indices` and `make_samples` returned.

    Raises:
        UsageError: the optimiser would make no step, or its steps would change nothing.
    """
    from ich_keras.data.batches import epoch_plan
    from ich_keras.models.batch_statistics import require_trainable

    training = recipe.training
    require_trainable(recipe.network, samples_per_statistics(recipe, this_rank()))
    chosen = {name: samples.of_rows(slices, rows, name) for name, rows in indices.items()}
    epoch = epoch_plan(
        samples, chosen["train"], training.batch_size, seed=0, balance=training.balance
    )
    total_steps = epoch.num_batches * training.epochs
    if total_steps < training.accumulate:
        raise UsageError(
            f"{total_steps} batches in all ({training.epochs} epochs), but one optimiser step takes"
            f" {training.accumulate}: no weight would change.",
            "Lower --accumulate, raise --epochs, or use more data.",
        )
    tables = {name: slices.iloc[rows] for name, rows in indices.items()}
    return TrainingPlan(
        num_slices={name: len(table) for name, table in tables.items()},
        num_series={name: table["series_uid"].nunique() for name, table in tables.items()},
        num_patients={name: table["patient_id"].nunique() for name, table in tables.items()},
        num_positive=_positive(samples, chosen["train"]),
        samples_per_epoch=sum(len(batch) for batch in epoch.batches(0)),
        steps_per_epoch=epoch.num_batches,
        total_steps=total_steps,
        learning_rate=training.learning_rate,
        warning=split.warning,
        note=split.note,
        weights=_weights_line(recipe),
    )


def _positive(samples: Samples, chosen: np.ndarray) -> dict[str, int]:
    assert samples.labels is not None  # `split_indices` refuses data without labels
    counts = (samples.labels[chosen] == 1).sum(axis=0).tolist()
    return dict(zip(samples.label_set.names, counts, strict=True))


def plan_lines(plan: TrainingPlan, recipe: Recipe) -> list[str]:
    """Say what a training will do, one line each."""
    training = recipe.training
    lines = [
        f"  {name:5} {number_of(plan.num_patients[name], 'patient')},"
        f" {plan.num_series[name]:,} series, {number_of(plan.num_slices[name], 'slice')}"
        for name in plan.num_slices
    ]
    lines.append(
        f"  {number_of(training.epochs, 'epoch')} of {number_of(plan.steps_per_epoch, 'step')},"
        f" {plan.samples_per_epoch:,} {SAMPLE_NAMES[recipe.inputs.view.kind]} each"
    )
    if training.accumulate > 1:
        lines.append(f"  {training.accumulate} batches of {training.batch_size} per optimiser step")
    if plan.weights:
        lines.append(f"  weights: {plan.weights}")
    if plan.note:
        lines.append(f"  {plan.note}")
    return lines


def start_lines(recipe: Recipe, plan: TrainingPlan) -> list[str]:
    """Say how a training that begins is trained, one line each."""
    lines = [
        _first_line(recipe, plan),
        *recipe.input_options,
        *_average_lines(recipe.training, plan.total_steps),
    ]
    return [*lines, *distribution_lines(recipe, this_rank())]


def _average_lines(training: TrainingRecipe, total_steps: int) -> list[str]:
    """Say so if the moving average would mostly be of the weights it began with."""
    steps = total_steps // training.accumulate
    if training.ema is None or training.ema**steps <= MOST_OF_FIRST_WEIGHTS:
        return []
    return [
        f"After all {steps:,} optimiser steps, the moving average of the weights (--ema"
        f" {training.ema:g}) still has {training.ema**steps:.0%} of those after the first step."
        " Lower --ema, or train for longer."
    ]


def _first_line(recipe: Recipe, plan: TrainingPlan) -> str:
    training, view = recipe.training, recipe.inputs.view
    start = f"from weights {training.weights}" if training.weights else "from scratch"
    of = f"s of {view.num_slices} slices"
    kinds = {"stack": f"stack{of}", "slab": f"slab{of}", "series": "whole series"}
    what = f"on {kinds[view.kind]} " if view.kind in kinds else ""
    line = f"Training {what}{start}, learning rate {plan.learning_rate:g} ({training.schedule})"
    if training.backbone_factor != 1:
        line += f", backbone at {training.backbone_factor:g} times that rate"
    if training.freeze is not None:
        line += f", frozen up to {training.freeze}"
    if training.accumulate > 1:
        line += f", {training.accumulate} batches per step"
    return f"{line}, {recipe.precision}."


def _weights_line(recipe: Recipe) -> str:
    from ich_keras.models.weights_file import origin, read_record
    from ich_keras.models.weights_lookup import find_weights

    if recipe.training.weights is None:
        return ""
    path = find_weights(recipe.training.weights, recipe.preset)
    return f"{path} ({origin(read_record(path))})"
