"""From a run and a cache to metrics on one split, per slice and per series."""

from pathlib import Path

import pandas as pd

from ich_keras.config import RunConfig
from ich_keras.ct.tables import csv_text
from ich_keras.data.cache import CTCache
from ich_keras.data.labels import series_labels
from ich_keras.data.split import SPLITS, Split
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.files import atomic_write, read_json, write_json
from ich_keras.labels import LABELS
from ich_keras.metrics import TRUTH_COLUMNS, evaluate_table
from ich_keras.prediction import (
    CONFIG,
    Progress,
    load_run,
    probabilities,
    probability_table,
    run_intensity,
)

SPLIT = "split.json"


def evaluate(
    run_dir: Path | str,
    cache: CTCache,
    split: str = "test",
    model=None,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict:
    """Predict a split with a run's best weights and compute the metrics over all of it.

    Nothing is augmented. The constant baseline is the prevalence of the training split.

    Args:
        run_dir: a run folder; receives predictions-<split>.csv and metrics-<split>.json.
        cache: the one the run was trained on, or one that holds the same slices.
        split: "train", "valid" or "test".
        model: the run's network when it is already loaded.
        device: "auto", "cpu" or "cuda"; None means "auto".
        progress: called as progress("evaluating", done, total).

    Returns:
        {"slice": metrics, "series": metrics}, see `ich_keras.metrics.binary_metrics`. A series'
        probability is the highest of its slices'; its label is positive when any slice's is.

    Raises:
        UsageError: unknown split.
        StaleError: not a finished run, or the cache lacks slices of the split.
        DataError: the cache has no labels.
    """
    run_dir = Path(run_dir)
    if split not in SPLITS:
        raise UsageError(f"split {split!r}; expected one of {', '.join(SPLITS)}.")
    if model is None:
        config, model = load_run(run_dir, device)
    else:
        config = RunConfig.from_dict(read_json(run_dir / CONFIG))
    members = Split.load(run_dir / SPLIT)
    _require_members(members, split, cache)

    from ich_keras.data.batches import slice_batches

    indices = members.indices(cache.slices, split)
    train_indices = members.indices(cache.slices, "train")
    for part, rows in ((split, indices), ("train", train_indices)):
        if len(rows) == 0:
            raise DataError(
                f"no slice of the {part} split has a label in {cache.path}.",
                f"The {split} split is scored, the training split gives the baseline's prevalence:"
                " give the labels of both.",
            )
    slices = cache.slices.iloc[indices]
    batches = slice_batches(
        cache,
        indices,
        config.fit.batch_size,
        size=config.data.size,
        intensity=run_intensity(config),
    )
    values = probabilities(model, batches, len(indices), progress, step=f"evaluating {split}")

    table = probability_table(slices, values)
    table[list(TRUTH_COLUMNS)] = slices[list(LABELS)].to_numpy()
    train = cache.slices.iloc[train_indices]
    prevalence = {
        "slice": train[list(LABELS)].mean().to_list(),
        "series": series_labels(train).mean().to_list(),
    }
    metrics = evaluate_table(
        table.rename(columns={"series_instance_uid": "series_uid"}), prevalence
    )
    atomic_write(run_dir / f"predictions-{split}.csv", csv_text(table))
    write_json(run_dir / f"metrics-{split}.json", metrics)
    return metrics


def _require_members(members: Split, split: str, cache: CTCache) -> None:
    known = pd.Index(cache.slices[members.key].unique())
    wanted = pd.Index(members.members[split])
    absent = wanted.difference(known)
    if len(absent):
        raise StaleError(
            f"{len(absent)} of {len(wanted)} {members.key} of the {split} split are not in the"
            f" cache {cache.path}, {absent[0]} first.",
            "Evaluate with the cache the run was trained on.",
        )
