"""What a training will do, worked out before it does it: splits, counts, steps, settings."""

from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from ich_keras.config import RunConfig
from ich_keras.ct.series import SeriesIndex
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.inputs import INTENSITIES
from ich_keras.data.split import SPLITS, Split, make_split
from ich_keras.data.views import Samples, make_samples
from ich_keras.environment import choose_backend, choose_device, choose_precision
from ich_keras.errors import DataError, UsageError
from ich_keras.labels import LABELS
from ich_keras.models.presets import PRESETS
from ich_keras.prediction import DEFAULT_BATCH, network, run_view

# Batches whose gradients make one step: batches of one series are too few samples for one.
DEFAULT_ACCUMULATION = {"slice": 1, "slab": 1, "series": 8}


@dataclass(frozen=True)
class TrainingPlan:
    """What a training will do, before it does it.

    Args:
        num_slices: slices per split.
        num_series: series per split.
        num_patients: patients per split.
        num_positive: positive training slices per label.
        samples_per_epoch: slices, slabs or series an epoch shows to the network.
        steps_per_epoch: batches an epoch.
        total_steps: batches in all, which the schedule counts; `fit.accumulate` of them make one
            step of the optimiser.
        learning_rate: the rate in force.
        warning: what is wrong with the split by name ("" for a sound one).
        note: what the split left out, counted ("" when nothing was).
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
        """Return the plan ready for JSON."""
        return asdict(self)


def limit_series(slices: pd.DataFrame, count: int | None) -> np.ndarray:
    """Return the rows of the first `count` series of a slice table (None: of all)."""
    if count is None:
        return np.arange(len(slices))
    uids = slices["series_uid"].drop_duplicates()[:count]
    return np.flatnonzero(slices["series_uid"].isin(uids).to_numpy())


def split_indices(slices: pd.DataFrame, config: RunConfig) -> tuple[Split, dict[str, np.ndarray]]:
    """Split a slice table as configured and refuse what leaks.

    Returns:
        (the split, rows of the table for "train", "valid" and "test").

    Raises:
        DataError: no labels, missing PatientID, too few patients, or a leaking split.
    """
    if not set(LABELS) <= set(slices):
        raise DataError("the data have no labels.", "Give --labels stage_2_train.csv.")
    rows = limit_series(slices, config.data.limit_series)
    chosen = slices.iloc[rows]
    split = make_split(config.data.split, chosen, config.seed)
    return split, {name: rows[split.indices(chosen, name)] for name in SPLITS}


def plan_training(tables: SeriesIndex | CTCache, config: RunConfig) -> TrainingPlan:
    """Say what `train` would do: slices, series and patients per split, steps, learning rate.

    Args:
        tables: an index or a cache, with labels.
        config: of the training.

    Raises:
        DataError: as `train`.
    """
    config = settled(config)
    split, indices = split_indices(tables.slices, config)
    samples = make_samples(tables.slices, tables.series, run_view(config))
    return plan_of(tables.slices, config, split, indices, samples)


def plan_of(
    slices: pd.DataFrame, config: RunConfig, split: Split, indices: dict, samples: Samples
) -> TrainingPlan:
    """Count what `split_indices` and `make_samples` found.

    Raises:
        UsageError: no step of the optimiser would be made, or none that learns.
    """
    from ich_keras.data.batches import epoch_plan
    from ich_keras.models.presets import require_trainable

    require_trainable(network(config), config.fit.batch_size)
    chosen = {name: samples.of_rows(slices, rows, name) for name, rows in indices.items()}
    epoch = epoch_plan(
        samples, chosen["train"], config.fit.batch_size, seed=0, balance=config.data.balance
    )
    total_steps = epoch.num_batches * config.fit.epochs
    if total_steps < config.fit.accumulate:
        raise UsageError(
            f"{total_steps} batches in all ({config.fit.epochs} epochs), of which"
            f" {config.fit.accumulate} make one step of the optimiser: no weight would change.",
            "Give fewer --accumulate, more --epochs or more data.",
        )
    tables = {name: slices.iloc[rows] for name, rows in indices.items()}
    return TrainingPlan(
        num_slices={name: len(table) for name, table in tables.items()},
        num_series={name: table["series_uid"].nunique() for name, table in tables.items()},
        num_patients={name: table["patient_id"].nunique() for name, table in tables.items()},
        num_positive={label: int(tables["train"][label].sum()) for label in LABELS},
        samples_per_epoch=sum(len(batch) for batch in epoch.batches(0)),
        steps_per_epoch=epoch.num_batches,
        total_steps=total_steps,
        learning_rate=config.learning_rate,
        warning=split.warning,
        note=split.note,
        weights=_weights_line(config),
    )


def _weights_line(config: RunConfig) -> str:
    from ich_keras.models.weights import find_weights, origin, read_record

    if config.weights is None:
        return ""
    path = find_weights(config.weights, config.preset)
    return f"{path} ({origin(read_record(path))})"


def resolved(config: RunConfig) -> RunConfig:
    """Settle backend, device and precision, before Keras is imported, and what enters the
    network."""
    backend, device = choose_backend(config.backend), choose_device(config.device)
    precision = choose_precision(config.precision, device)
    return settled(replace(config, backend=backend, device=device, precision=precision))


def settled(config: RunConfig) -> RunConfig:
    """Fill in what was left open about the samples: view, slices, batch size, accumulation and
    intensity.

    Raises:
        UsageError: the view does not fit the preset, or the weights do not exist.
    """
    view = run_view(config)
    data = replace(config.data, view=view.kind, slices=view.num_slices)
    if data.reverse and not (view.is_volume and data.augment != "none"):
        raise UsageError(
            "data.reverse turns augmented slabs and series upside down; this run has none.",
            "Leave it out.",
        )
    fit = replace(
        config.fit,
        batch_size=config.fit.batch_size or DEFAULT_BATCH[view.kind],
        accumulate=config.fit.accumulate or DEFAULT_ACCUMULATION[view.kind],
    )
    return _with_intensity(replace(config, data=data, fit=fit))


def _with_intensity(config: RunConfig) -> RunConfig:
    """Settle the intensity: as given, as the weights were made for, or as the preset's channels
    ask. A weights file that does not exist is refused here, before anything long begins."""
    from ich_keras.models.weights import find_weights, read_record

    record = {}
    if config.weights is not None:
        record = read_record(find_weights(config.weights, config.preset))
    if config.data.intensity is not None:
        return config
    network_of_file = record.get("network") or {}
    # The channels as they are in the file: `weights-convert` may have changed them.
    channels = (network_of_file.get("input_shape") or [PRESETS[config.preset].spec.channels])[-1]
    fitting = [name for name, known in INTENSITIES.items() if known.channels == channels]
    made_for = record.get("intensity")
    intensity = made_for if made_for in fitting or not fitting else fitting[0]
    return replace(config, data=replace(config.data, intensity=intensity))
