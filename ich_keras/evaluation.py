"""Evaluating a run on one split of a cache, per slice and per series."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ich_keras.breakdown import broken_down
from ich_keras.context import Context, answers
from ich_keras.ct.tables import csv_text, patient_or_series
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.labels import series_labels, torn_series
from ich_keras.data.pixels import part_digests
from ich_keras.data.split import SPLITS, Split
from ich_keras.data.trivial import trivial_auroc
from ich_keras.data.views import series_of_rows
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.files import atomic_write, lock, write_json
from ich_keras.inference import (
    PATIENT_COLUMN,
    batches_of,
    load_run,
    probability_table,
)
from ich_keras.labels import UNLABELLED, LabelSet
from ich_keras.leftovers import remove_leftovers
from ich_keras.levels import Level, choose, scored
from ich_keras.metrics.aggregation import choose_rule, head_columns, rules_of
from ich_keras.metrics.binary import truth_columns
from ich_keras.metrics.smoothing import NO_SMOOTHING, choose_kernel, smooth
from ich_keras.notices import UNFINISHED
from ich_keras.phantom.dicom import is_synthetic
from ich_keras.progress import Progress
from ich_keras.recipe import Recipe
from ich_keras.run_checksums import update_checksums
from ich_keras.run_folder import PIXELS_OF, RunFolder

_KEYS = {"sop_instance_uid": "slices"}  # by the column that a split names its members with
CHOOSING = "valid"  # the split on which smoothing, rule, temperature, thresholds are chosen


def evaluate(
    run_dir: RunFolder | Path | str,
    cache: CTCache,
    split: str = "test",
    device: str | None = None,
    progress: Progress | None = None,
    unfinished: bool = False,
) -> dict:
    """Predict a split with a run's best weights and compute the metrics over all of it.

    Nothing is augmented. The constant baseline is the prevalence of the training split.

    Args:
        run_dir: a finished run; receives predictions-<split>.csv and metrics-<split>.json.
        cache: the one the run was trained on, or one that holds the same slices.
        split: "train", "valid" or "test".
        device: "auto", "cpu" or "cuda"; None means "auto".
        progress: called as progress("evaluating <split>", done, total).
        unfinished: evaluate the best weights so far of a training that was interrupted or still
            runs. The files are then called predictions-<split>.unfinished.csv and
            metrics-<split>.unfinished.json, each level of the metrics and each row holds
            "unfinished" (`RunFolder.notice`), and nothing that is chosen is kept.

    Returns:
        {"slice": metrics, "series": metrics}; only "series" for a run on whole series, only
        "slice" where the split cuts series apart (a split by slices). Each holds what
        `binary_metrics` returns, and "intervals" (by patients), "calibration" and "operating"
        (thresholds); on phantoms also "trivial_auroc_any" (`trivial_auroc`). Of series there is
        "by": their scores broken down (`ich_keras.breakdown`). A series' label is
        positive when any slice's is. Its probability comes from a run on whole series, or from its
        slices by the rule in "aggregation", or is the sequence head's answer where that rule won.
        Slices are first smoothed along z by the kernel in "smoothing"; "unsmoothed" then holds log
        loss, AUROC and AP without it, and in "gain" the paired differences. Smoothing, rule,
        temperature and thresholds are chosen when training first evaluates the validation split,
        and kept in choices.json.

    Raises:
        UsageError: the split is unknown, or the cache's size is not the one the run was trained on.
        StaleError: the run is not finished, was changed since or is being evaluated by another
            process; or the cache lacks slices of the split, or has other pixels or labels than
            they had in training.
        DataError: the cache has no labels.
    """
    if split not in SPLITS:
        raise UsageError(f"split {split!r}; expected one of {', '.join(SPLITS)}.")
    run = RunFolder.at(run_dir).require_finished(unfinished)
    require_size(run.recipe(), cache)
    remove_leftovers(run.path)
    notice = run.notice()
    recipe, model = load_run(run, device, unfinished=unfinished)
    if notice:
        return evaluate_network(run, recipe, model, cache, split, progress, notice)
    # Two evaluations at once would lose one of two updates of the checksums.
    with lock(run.lock_file, is_kept=False):
        metrics = evaluate_network(run, recipe, model, cache, split, progress, is_again=True)
        written = (run.predictions_file(split), run.metrics_file(split), run.choices_file)
        update_checksums(run, [path.name for path in written])
    return metrics


def _require_same_truth(path: Path, table: pd.DataFrame, labels: LabelSet) -> None:
    """Refuse other labels than a finished run was scored with: its report would contradict it."""
    if not path.is_file():
        return
    key = "sop_instance_uid" if "sop_instance_uid" in table else "series_instance_uid"
    before = pd.read_csv(path, dtype={key: str}).set_index(key)[truth_columns(labels)]
    now = table.set_index(key)[truth_columns(labels)].reindex(before.index)
    count = int((before.to_numpy() != now.to_numpy()).any(axis=1).sum())
    if count:
        raise StaleError(
            f"{count:,} of {len(before):,} rows of {path} have other labels than the run was scored"
            " with.",
            "Give the labels of the training. For others, predict with `ich predict`.",
        )


def evaluate_network(
    run: RunFolder,
    recipe: Recipe,
    model: Any,
    cache: CTCache,
    split: str,
    progress: Progress | None = None,
    notice: str = "",
    is_again: bool = False,
) -> dict:
    """Evaluate a network that is already loaded on one split; see `evaluate`.

    Args:
        run, recipe, model, cache, split, progress: as there and from `load_run`.
        notice: of weights that are not a training's final ones; "" writes final results.
        is_again: refuse other labels than the split was scored with before.
    """
    require_size(recipe, cache)
    labels = recipe.labels
    if cache.labels != labels:
        raise DataError(
            f"{cache.path} has the labels {cache.labels}; the run was trained for {labels}.",
            "Evaluate with the labels of the training.",
        )
    members = run.split()
    require_members(members, split, cache)
    require_pixels(run, members, split, cache)

    indices = members.indices(cache.slices, split, labels)
    train_indices = members.indices(cache.slices, "train", labels)
    for part, rows in ((split, indices), ("train", train_indices)):
        if len(rows) == 0:
            raise DataError(
                f"no slice of the {part} split has a label in {cache.path}.",
                f"The {split} split is scored and the training split gives the baseline's"
                " prevalence: give the labels of both.",
            )
    view = recipe.inputs.view
    samples = recipe.inputs.samples(cache)
    chosen = samples.of_rows(cache.slices, indices, split)
    batches = batches_of(recipe, cache, samples, chosen)
    assert samples.labels is not None  # a cache without labels has no members
    truth = samples.labels[chosen]
    scored = (cache.series if view.kind == "series" else cache.slices).iloc[chosen]
    context = Context.load(run, labels, model)
    values, head = answers(model, batches, scored, context, progress, f"evaluating {split}")
    # From only some of its slices, a series has neither a valid label nor a valid probability.
    is_whole = not series_of_rows(cache.slices, indices, labels)[1].any()
    smoothing, unsmoothed = None, values
    if view.kind == "series":
        table = _series_table(scored, values, labels)
    else:
        smoothing = _smoothing(run, split, is_whole, scored, truth, values, labels)
        values = _smoothed(scored, values, smoothing["kernel"], labels)
        table = probability_table(scored, values, labels)
        if values is not unsmoothed:
            table[[f"unsmoothed_{name}" for name in labels.names]] = unsmoothed
        if head is not None:
            table[head_columns(labels)] = head
    table[truth_columns(labels)] = truth
    table[PATIENT_COLUMN] = pd.factorize(patient_or_series(scored))[0]
    # Leave out what the view skips, as the network's numbers do.
    scored_rows, train_rows = (
        samples.usable_rows(cache.slices, part) for part in (indices, train_indices)
    )
    train = cache.slices.iloc[train_rows]
    prevalence = {
        "slice": _prevalence(train[list(labels.names)]),
        "series": _prevalence(series_labels(train, labels)),
    }
    levels = Level(truth, values, patient_or_series(scored).to_numpy(), labels, unsmoothed, head)
    metrics = _metrics(
        run, split, levels, scored, cache.series, smoothing, is_whole, prevalence, not notice
    )
    if is_again:
        _require_same_truth(run.predictions_file(split), table, labels)
    if is_synthetic(cache.slices) and labels.any_label is not None:
        trivial = trivial_auroc(cache, train_rows, scored_rows)
        for level in metrics:
            metrics[level]["trivial_auroc_any"] = trivial[level]
    if notice:
        table[UNFINISHED] = notice
        metrics = {level: {UNFINISHED: notice, **part} for level, part in metrics.items()}
    atomic_write(run.predictions_file(split, not notice), csv_text(table))
    write_json(run.metrics_file(split, not notice), metrics)
    return metrics


def _prevalence(labels: pd.DataFrame) -> list[float]:
    """Return how often each label is 1 where it is not missing; 0 where it always is."""
    return labels.astype(float).where(labels != UNLABELLED).mean().fillna(0.0).to_list()


def _is_choosing(run: RunFolder, split: str) -> bool:
    # Only once: predictions and the metrics of other splits depend on the choices.
    return split == CHOOSING and not run.choices()


def _smoothing(
    run: RunFolder,
    split: str,
    is_whole: bool,
    rows: pd.DataFrame,
    truth: np.ndarray,
    values: np.ndarray,
    labels: LabelSet,
) -> dict:
    """Return how slices are smoothed; on the validation split, choose it first."""
    if not is_whole:  # neighbours are in other splits
        return {"kernel": NO_SMOOTHING}
    if not _is_choosing(run, split):
        return run.choices().get("smoothing", {"kernel": NO_SMOOTHING})
    kernel, losses = choose_kernel(truth, values, rows["series_uid"], rows["position_mm"], labels)
    return {"kernel": kernel, "chosen_on": CHOOSING, "log_loss": losses}


def _smoothed(rows: pd.DataFrame, values: np.ndarray, kernel: str, labels: LabelSet) -> np.ndarray:
    return smooth(values, rows["series_uid"], rows["position_mm"], kernel, labels)


def _metrics(
    run: RunFolder,
    split: str,
    level: Level,
    rows: pd.DataFrame,
    series: pd.DataFrame,
    smoothing: dict | None,
    is_whole: bool,
    prevalence: dict[str, list[float]],
    keeps: bool,
) -> dict:
    """Score both levels; on the validation split, first choose rule, temperature and thresholds.

    Args:
        run, split: what is scored.
        level: the network's samples.
        rows: their rows of the cache's tables.
        series: the cache's table of series.
        smoothing: of slices; None for whole series.
        is_whole: whether the split holds whole series.
        prevalence: of the training split, by level.
        keeps: whether choices are written.
    """
    labels = level.labels
    levels = {"series" if smoothing is None else "slice": level}
    choices, is_choosing = run.choices(), _is_choosing(run, split)
    # Of a series with several exclusive labels nothing says what it is as a whole.
    is_aggregated = smoothing is not None and is_whole and not torn_series(rows, labels)
    if is_aggregated:
        uids = rows["series_uid"].to_numpy()
        if is_choosing:
            rule, losses = choose_rule(level.truth, level.values, uids, labels, level.head)
            choices["smoothing"] = smoothing
            choices["aggregation"] = {"rule": rule, "chosen_on": CHOOSING, "log_loss": losses}
        usual = {"rule": next(iter(rules_of(labels)))}
        rule = choices.get("aggregation", usual)["rule"]
        levels["series"] = level.aggregated(uids, rule)
    if is_choosing:
        choices |= {name: choose(level) for name, level in levels.items()}
        if keeps:
            write_json(run.choices_file, choices)
    metrics = {
        name: scored(level, prevalence[name], choices.get(name, {}))
        for name, level in levels.items()
    }
    if "series" in levels:
        order = pd.unique(rows["series_uid"])
        of_series = series.set_index("series_uid").loc[order].reset_index()
        metrics["series"]["by"] = broken_down(levels["series"], of_series)
    if is_aggregated:
        metrics["series"]["aggregation"] = choices.get("aggregation", usual)
    if smoothing is not None:
        metrics["slice"]["smoothing"] = smoothing
    return metrics


def _series_table(series: pd.DataFrame, values: np.ndarray, labels: LabelSet) -> pd.DataFrame:
    """Add the probabilities to the table of their series."""
    table = series[["series_uid", "num_slices"]].reset_index(drop=True)
    table = table.rename(columns={"series_uid": "series_instance_uid"})
    return pd.concat([table, pd.DataFrame(values, columns=list(labels.names))], axis=1)


def require_members(members: Split, split: str, cache: CTCache) -> None:
    """Refuse a cache that lacks members of a split.

    Raises:
        StaleError: says how many, and names the first.
    """
    known = pd.Index(cache.slices[members.key].unique())
    wanted = pd.Index(members.members[split])
    absent = wanted.difference(known)
    if len(absent):
        raise StaleError(
            f"{len(absent)} of the {split} split's {len(wanted)} {_KEYS.get(members.key, 'series')}"
            f" are missing from the cache {cache.path}; the first is {absent[0]}.",
            "Evaluate with the cache the run was trained on.",
        )


def require_pixels(run: RunFolder, members: Split, split: str, cache: CTCache) -> None:
    """Refuse a cache of the same slices with other pixels; runs of older versions know none.

    Args:
        run: what was trained.
        members: its split.
        split: the part that is looked at.
        cache: what is given now.

    Raises:
        StaleError: the pixels differ.
    """
    recorded = run.data().get(PIXELS_OF)
    if recorded is None:
        return
    found = part_digests(cache, members) or {}
    # On phantoms, voxels of the training split are counted, too.
    for part in (split, "train") if is_synthetic(cache.slices) else (split,):
        if found.get(part) != recorded[part]:
            raise StaleError(
                f"the series of the {part} split have other pixels in {cache.path} than in the"
                f" training of {run}: digest {found.get(part, 'none')[:12]}, expected"
                f" {recorded[part][:12]}.",
                "Evaluate with the cache the run was trained on. For other data, use ich predict.",
            )


def require_size(recipe: Recipe, cache: CTCache) -> None:
    """Refuse a cache of another size: resizing its windowed slices would give other images."""
    expected = recipe.inputs.cache_size
    if cache.size != expected:
        raise UsageError(
            f"the slices of {cache.path} have {cache.size}x{cache.size} pixels; the run was trained"
            f" from {expected}x{expected}.",
            f"Give a cache of size {expected}.",
        )
