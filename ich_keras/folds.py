"""Joining the runs of a cross-validation: every patient scored by a network that never saw them.

The test predictions of all folds are put together. Ranking probabilities of different networks
against each other is what the AUROC over all of them does; the mean of the folds' own AUROCs does
not, and stands beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ich_keras.ct.tables import csv_text, patient_or_series
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.labels import is_labelled
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.files import atomic_write, require_absent, write_json
from ich_keras.labels import LabelSet
from ich_keras.levels import Level, scored
from ich_keras.metrics.aggregation import aggregate, head_of
from ich_keras.metrics.binary import truth_columns
from ich_keras.planning import limit_series
from ich_keras.run_folder import CACHE, LABELS_DIGEST, PIXELS, RunFolder

FOLD = "fold"
METRICS = "metrics.json"
# What the folds must have in common, of data.json.
_DATA = {CACHE: "the cache", PIXELS: "the pixels", LABELS_DIGEST: "the labels"}
_KEYS = {"slice": "sop_instance_uid", "series": "series_instance_uid"}


@dataclass(frozen=True, eq=False)
class Folds:
    """The result of `join_folds`.

    Args:
        metrics: level ("slice", "series") -> as `ich_keras.evaluate` returns them, of all folds
            together, and "auroc_of_folds": label -> the AUROC of each fold.
        tables: level -> probabilities and labels of all rows, with the fold of each.
    """

    metrics: dict[str, dict]
    tables: dict[str, pd.DataFrame]


def join_folds(
    runs: Sequence[RunFolder | Path | str], cache: CTCache, out: Path | str | None = None
) -> Folds:
    """Join the test predictions of the folds of one cross-validation.

    Args:
        runs: finished runs, one for each fold, in any order.
        cache: what they were trained on: it says whose slices these are.
        out: a new folder, which receives metrics.json and out-of-fold-<level>.csv; None writes
            nothing.

    Raises:
        UsageError: `out` exists, or fewer than two runs are given.
        DataError: a run is not of a fold, a fold is missing or given twice, the runs were trained
            in different ways or on different data, several test the same image, none tests a
            labelled series of the cache, or the cache lacks some of their images.
        StaleError: a run is not finished, or is damaged.
    """
    if len(runs) < 2:
        raise UsageError(f"{len(runs)} run(s); a cross-validation has at least three folds.")
    folder = None if out is None else require_absent(out)
    folders = [RunFolder.at(run).require_finished() for run in runs]
    _require_one_validation(folders)
    labels = folders[0].recipe().labels
    _require_all_tested(folders, cache, labels)
    parts: dict[str, list[pd.DataFrame]] = {}
    for run in folders:
        for level, table in _tables(run, labels).items():
            number = int(run.split().name.removeprefix("fold-").partition("/")[0])
            parts.setdefault(level, []).append(table.assign(**{FOLD: number}))
    tables = {level: pd.concat(found, ignore_index=True) for level, found in parts.items()}
    for level, table in tables.items():
        _require_once(table, level)
    metrics = {level: _scored(table, cache, labels, level) for level, table in tables.items()}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for level, table in tables.items():
            atomic_write(folder / f"out-of-fold-{level}.csv", csv_text(table))
        write_json(folder / METRICS, metrics)
    return Folds(metrics, tables)


def _require_one_validation(runs: Sequence[RunFolder]) -> None:
    """Refuse runs that are not the folds of one cross-validation."""
    seen: dict[str, RunFolder] = {}
    first: dict[str, Any] | None = None
    of = ""
    for run in runs:
        split = run.split()
        fold, slash, number = split.name.removeprefix("fold-").partition("/")
        if not slash or not split.name.startswith("fold-"):
            raise DataError(
                f"{run} was split by {split.name!r}, not by a fold.",
                "Train it with --fold K/N.",
            )
        if fold in seen:
            raise DataError(f"{run} and {seen[fold]} are both fold {fold}.", "Give each fold once.")
        seen[fold] = run
        settings = _settings(run)
        _require_same_data(run, runs[0])
        if first is None:
            first, of = settings, number
        differing = [name for name in settings if settings[name] != first[name]]
        if differing or number != of:
            what = ", ".join(differing) or f"the number of folds ({number}, {of})"
            raise DataError(
                f"{run} was trained in another way than {runs[0]}: {what}.",
                "Join the folds of one cross-validation.",
            )
    missing = [str(n) for n in range(1, int(of) + 1) if str(n) not in seen]
    if missing:
        raise DataError(
            f"fold(s) {', '.join(missing)} of {of} are missing.", "Train them, or give their runs."
        )


def _require_same_data(run: RunFolder, first: RunFolder) -> None:
    here, there = run.data(), first.data()
    for entry, what in _DATA.items():
        value, other = here.get(entry), there.get(entry)
        # Runs of older versions have not recorded all of them.
        if value is not None and other is not None and value != other:
            raise DataError(
                f"{run} was trained on other data than {first}: {what} ({value[:12]},"
                f" {other[:12]}).",
                "Join folds that were trained on one cache with the same labels.",
            )


def _require_all_tested(runs: Sequence[RunFolder], cache: CTCache, labels: LabelSet) -> None:
    """Refuse folds whose test parts together are not all labelled series."""
    rows = limit_series(cache.slices, runs[0].recipe().training.limit_series)
    slices = cache.slices.iloc[rows]
    labelled = slices["series_uid"][is_labelled(slices, labels)].drop_duplicates()
    tested = {uid for run in runs for uid in run.split().members["test"]}
    absent = labelled[~labelled.isin(tested)]
    if len(absent):
        raise DataError(
            f"{len(absent):,} of {len(labelled):,} labelled series of {cache.path} are in the test"
            f" part of no fold, for instance {absent.iloc[0]}.",
            "Give the cache and the labels that the folds were trained on.",
        )


def _require_once(table: pd.DataFrame, level: str) -> None:
    key = _KEYS[level]
    repeated = table[key][table[key].duplicated()]
    if len(repeated):
        raise DataError(
            f"{repeated.nunique():,} {key} are predicted more than once, for instance"
            f" {repeated.iloc[0]} in the folds"
            f" {', '.join(map(str, table[FOLD][table[key] == repeated.iloc[0]]))}.",
            "Every image belongs to the test part of one fold: train the folds again.",
        )


def _settings(run: RunFolder) -> dict[str, Any]:
    """Return what all folds must have in common, by name."""
    content = run.recipe().to_dict()
    training = {name: value for name, value in content["training"].items() if name != "split"}
    places = ("backend", "device", "precision", "training", "schema")
    return training | {name: value for name, value in content.items() if name not in places}


def _tables(run: RunFolder, labels: LabelSet) -> dict[str, pd.DataFrame]:
    """Return the test predictions of a run, by level."""
    path = run.predictions_file("test")
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(_KEYS.values(), "str"))
    except (OSError, ValueError) as error:
        raise StaleError(
            f"{path} cannot be read ({error}).",
            "Evaluate the run again: ich evaluate --run RUN --cache CACHE",
        ) from error
    names, true = list(labels.names), truth_columns(labels)
    absent = [name for name in (_KEYS["series"], *names, *true) if name not in table]
    if absent:
        raise StaleError(f"{path} lacks {', '.join(absent)}.", "Evaluate the run again.")
    if _KEYS["slice"] not in table:
        return {"series": table}
    uids = table[_KEYS["series"]].to_numpy()
    head = head_of(table, labels)
    values = aggregate(table[names].to_numpy(), uids, run.rule(), labels, head)
    truth = aggregate(table[true].to_numpy(), uids, "max", labels).to_numpy().astype(np.int8)
    series = values.rename_axis(_KEYS["series"]).reset_index()
    series[true] = truth
    return {"slice": table, "series": series}


def _scored(table: pd.DataFrame, cache: CTCache, labels: LabelSet, level: str) -> dict:
    slices = cache.slices
    column = {"slice": "sop_instance_uid", "series": "series_uid"}[level]
    owner = pd.Series(patient_or_series(slices).to_numpy(), slices[column]).groupby(level=0).first()
    owners = owner.reindex(table[_KEYS[level]])
    if owners.isna().any():
        raise DataError(
            f"{int(owners.isna().sum()):,} of {len(table):,} predictions are of images that"
            f" {cache.path} lacks.",
            "Give the cache that the folds were trained on.",
        )
    truth = table[truth_columns(labels)].to_numpy().astype(np.int8)
    values = table[list(labels.names)].to_numpy()
    found = scored(Level(truth, values, owners.to_numpy(), labels), None, {})
    by_fold = {
        int(fold): scored_fold(truth[rows], values[rows], labels)
        for fold, rows in table.groupby(FOLD).indices.items()
    }
    found["auroc_of_folds"] = {
        name: {fold: aurocs[name] for fold, aurocs in by_fold.items()} for name in labels.names
    }
    return found


def scored_fold(truth: np.ndarray, values: np.ndarray, labels: LabelSet) -> dict[str, Any]:
    """Return the AUROC of each label in one fold; None where it is not defined."""
    from ich_keras.metrics.binary import binary_metrics

    return binary_metrics(truth, values, label_set=labels)["auroc"]
