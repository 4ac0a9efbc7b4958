"""From a run and a cache to metrics on one split, per slice and per series."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ich_keras.config import RunConfig
from ich_keras.ct.tables import csv_text
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.labels import series_labels
from ich_keras.data.split import SPLITS, Split
from ich_keras.data.trivial import trivial_auroc
from ich_keras.data.views import make_samples, series_of_rows
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.files import atomic_write, read_json, write_json
from ich_keras.labels import LABELS
from ich_keras.metrics.aggregation import DEFAULT_RULE, aggregate, choose_rule
from ich_keras.metrics.binary import TRUTH_COLUMNS, binary_metrics
from ich_keras.metrics.calibration import calibration, fit_temperature, with_temperature
from ich_keras.metrics.intervals import bootstrap
from ich_keras.metrics.operating import choose_thresholds, rates_at, threshold_table
from ich_keras.phantom.dicom import is_synthetic
from ich_keras.prediction import (
    CACHE_SIZE,
    CHOICES,
    CONFIG,
    DATA,
    load_run,
    probabilities,
    probability_table,
    require_size,
    run_intensity,
    run_view,
)
from ich_keras.progress import Progress

SPLIT = "split.json"
CHOOSING = "valid"  # the split on which rule, temperature and thresholds are chosen


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
        {"slice": metrics, "series": metrics}, of a run on whole series only the latter, of a part
        that does not hold its series whole (a split by slices) only the former; each as
        `binary_metrics` gives them, and "intervals" (by patients), "calibration" and "operating"
        (thresholds); on phantoms also "trivial_auroc_any" (`trivial_auroc`). A series' label is
        positive when any slice's is; its probability is what a run on whole series says, or its
        slices' aggregated by the rule in "aggregation". Rule, temperature and thresholds are
        chosen when the validation split is evaluated for the first time, which training does, and
        kept in choices.json.

    Raises:
        UsageError: unknown split, or the cache's slices have another size than those trained from.
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
    require_size(config, cache)
    # Runs older than the entry lack it.
    trained_at = read_json(run_dir / DATA).get(CACHE_SIZE, cache.size)
    if cache.size != trained_at:
        raise UsageError(
            f"the cache's slices have {cache.size}x{cache.size} pixels, those the run was trained"
            f" from {trained_at}x{trained_at}: windowed and resized, they are not the same images.",
            f"Give a cache of size {trained_at}.",
        )
    members = Split.load(run_dir / SPLIT)
    _require_members(members, split, cache)

    from ich_keras.data.batches import view_batches

    indices = members.indices(cache.slices, split)
    train_indices = members.indices(cache.slices, "train")
    for part, rows in ((split, indices), ("train", train_indices)):
        if len(rows) == 0:
            raise DataError(
                f"no slice of the {part} split has a label in {cache.path}.",
                f"The {split} split is scored, the training split gives the baseline's prevalence:"
                " give the labels of both.",
            )
    view = run_view(config)
    samples = make_samples(cache.slices, cache.series, view)
    chosen = samples.of_rows(cache.slices, indices, split)
    batches = view_batches(
        cache,
        view,
        chosen,
        config.fit.batch_size,
        size=config.data.size,
        intensity=run_intensity(config),
        samples=samples,
        workers=config.data.loader_workers,
    )
    values = probabilities(model, batches, len(chosen), progress, step=f"evaluating {split}")

    truth = samples.labels[chosen]
    rows = (cache.series if view.kind == "series" else cache.slices).iloc[chosen]
    if view.kind == "series":
        table = _series_table(rows, values)
    else:
        table = probability_table(rows, values)
    table[list(TRUTH_COLUMNS)] = truth
    # Without what the view skips, as the network's own numbers.
    scored_rows, train_rows = (
        samples.usable_rows(cache.slices, part) for part in (indices, train_indices)
    )
    train = cache.slices.iloc[train_rows]
    prevalence = {
        "slice": train[list(LABELS)].mean().to_list(),
        "series": series_labels(train).mean().to_list(),
    }
    # A series known by some of its slices has neither its label nor its probability.
    is_whole = not series_of_rows(cache.slices, indices)[1].any()
    metrics = _metrics(run_dir, split, view.kind, is_whole, rows, truth, values, prevalence)
    if is_synthetic(cache.slices):
        trivial = trivial_auroc(cache, train_rows, scored_rows)
        for level in metrics:
            metrics[level]["trivial_auroc_any"] = trivial[level]
    atomic_write(run_dir / f"predictions-{split}.csv", csv_text(table))
    write_json(run_dir / f"metrics-{split}.json", metrics)
    return metrics


@dataclass(frozen=True)
class _Level:
    """What a model said about slices, or about series.

    Args:
        truth: int (n, 6).
        values: float (n, 6), probabilities.
        patients: str (n,), whose each row is.
    """

    truth: np.ndarray
    values: np.ndarray
    patients: np.ndarray


def _metrics(run_dir, split, kind, is_whole, rows, truth, values, prevalence) -> dict:
    """Score both levels; what has to be chosen is chosen on the validation split and kept."""
    # Without a PatientID (only splits by name allow that) each series stands for itself.
    patients = rows["patient_id"].where(rows["patient_id"] != "", rows["series_uid"]).to_numpy()
    levels = {"series" if kind == "series" else "slice": _Level(truth, values, patients)}
    choices = read_json(run_dir / CHOICES) if (run_dir / CHOICES).is_file() else {}
    # Once: predictions and the metrics of other splits stand on them.
    is_choosing = split == CHOOSING and not choices
    is_aggregated = kind != "series" and is_whole
    if is_aggregated:
        uids = rows["series_uid"].to_numpy()
        if is_choosing:
            rule, losses = choose_rule(truth, values, uids)
            choices["aggregation"] = {"rule": rule, "chosen_on": CHOOSING, "log_loss": losses}
        rule = choices.get("aggregation", {"rule": DEFAULT_RULE})["rule"]
        series = aggregate(values, uids, rule)
        levels["series"] = _Level(
            aggregate(truth, uids).to_numpy().astype(np.int8),
            series.to_numpy(),
            pd.Series(patients, index=uids).groupby(level=0).first()[series.index].to_numpy(),
        )
    if is_choosing:
        choices |= {name: _choose(level) for name, level in levels.items()}
        write_json(run_dir / CHOICES, choices)
    metrics = {
        name: {
            **binary_metrics(level.truth, level.values, prevalence[name]),
            "intervals": _intervals(level),
            "calibration": _calibration(level, choices.get(name, {}).get("temperature")),
            "operating": _operating(level, choices.get(name, {}).get("thresholds")),
        }
        for name, level in levels.items()
    }
    if is_aggregated:
        metrics["series"]["aggregation"] = choices.get("aggregation", {"rule": DEFAULT_RULE})
    return metrics


def _choose(level: _Level) -> dict:
    return {
        "temperature": fit_temperature(level.truth, level.values),
        "thresholds": choose_thresholds(level.truth, level.values),
    }


def _intervals(level: _Level) -> dict | None:
    if len(set(level.patients)) < 2:
        return None
    intervals = bootstrap(level.truth, level.values, level.patients)
    return {"patients": len(set(level.patients)), "metrics": intervals}


def _calibration(level: _Level, temperature: float | None) -> dict:
    found = {"labels": calibration(level.truth, level.values), "temperature": temperature}
    if temperature is not None:
        scaled = with_temperature(level.values, temperature)
        found["scaled"] = calibration(level.truth, scaled)
        found["scaled_log_loss"] = binary_metrics(level.truth, scaled)["log_loss"]
    return found


def _operating(level: _Level, thresholds: dict | None) -> dict:
    return {
        "at_specificity": {
            wanted: rates_at(level.truth, level.values, limits)
            for wanted, limits in (thresholds or {}).items()
        },
        "thresholds": threshold_table(level.truth, level.values),
    }


def _series_table(series: pd.DataFrame, values: np.ndarray) -> pd.DataFrame:
    """Put probabilities beside the series they belong to."""
    table = series[["series_uid", "num_slices"]].reset_index(drop=True)
    table = table.rename(columns={"series_uid": "series_instance_uid"})
    return pd.concat([table, pd.DataFrame(values, columns=list(LABELS))], axis=1)


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
