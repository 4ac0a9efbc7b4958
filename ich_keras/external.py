"""Scoring a run on labelled data that it was not trained on, beside its own test numbers.

All usable series are scored, not a part of them. What the training has seen is refused: by the UIDs
of its series and studies, and by equal pixels. Smoothing, rule, temperature and thresholds are the
run's own; `recalibrate` fits temperature and thresholds again, to a part of the local patients, and
scores the others before and after. Thin series are averaged as in a prediction.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ich_keras.breakdown import broken_down
from ich_keras.context import Context, answers
from ich_keras.ct.tables import csv_text, patient_or_series
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.csv_rows import FAULTS_SHOWN, first_few
from ich_keras.data.seen import PARTS, Seen
from ich_keras.data.thin_cache import AveragedCache, averaged_cache
from ich_keras.data.thin_series import AVERAGE, ThinRule
from ich_keras.data.views import Samples, View, make_samples
from ich_keras.domain import OUTSIDE, VERDICT, Domain, domain_columns
from ich_keras.errors import DataError, UsageError
from ich_keras.evaluation import require_size
from ich_keras.external_data import described, truth_of
from ich_keras.files import atomic_write, require_absent, write_json
from ich_keras.inference import batches_of, load_run, network_digest
from ich_keras.labels import UNLABELLED, LabelSet
from ich_keras.levels import Level, choose, scored
from ich_keras.metrics.aggregation import aggregate
from ich_keras.metrics.binary import truth_columns
from ich_keras.metrics.smoothing import smooth
from ich_keras.notices import NOT_CLINICAL, SYNTHETIC_NOTE
from ich_keras.phantom.dicom import is_synthetic
from ich_keras.progress import Progress
from ich_keras.recipe import Recipe
from ich_keras.run_folder import RunFolder
from ich_keras.thin_tables import AVERAGED_SLICE, averaged_columns, numbers_or_missing

METRICS, PREDICTIONS, SERIES = "metrics.json", "predictions.csv", "series.csv"
MIN_PATIENTS = 10  # of each part, to recalibrate
NOT_COMPARED = (
    "The pixels were not compared: the run or the cache has no hashes of them. A copy under other"
    " UIDs would not be noticed."
)


@dataclass(frozen=True, eq=False)
class External:
    """The result of `evaluate_external`.

    Args:
        metrics: JSON-able. "slice" and "series": as `ich_keras.evaluate` returns them, as far as
            the labels say something of slices. "own": the run's test metrics. "data": what the data
            are. "unseen": how it was made sure that the training has not seen them. "by": level ->
            what `ich_keras.breakdown.broken_down` returns. "recalibrated", if asked for: level ->
            the scores of the same patients before and after. "domain": how many series are outside
            of what the run was trained on (`ich_keras.domain`); None where it does not say.
            "thin": what was done with thin series, in words; "" where there is none.
        slices, series: probabilities and labels, a row each; `slices` is None for a run on series.
    """

    metrics: dict[str, Any]
    slices: pd.DataFrame | None
    series: pd.DataFrame


def evaluate_external(
    run_dir: RunFolder | Path | str,
    cache: CTCache,
    out: Path | str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    recalibrate: float | None = None,
    seed: int = 0,
    thin: str = AVERAGE,
) -> External:
    """Score a run on data that it was not trained on.

    Labels that the data lack count in no metric; labels that the run does not answer are not used.
    Where labels are of series, studies or patients, single slices are not scored.

    Args:
        run_dir: a finished run.
        cache: with labels, of the size that the run was trained from.
        out: a new folder, which receives metrics.json, series.csv and (not for a run on whole
            series) predictions.csv; None writes nothing.
        device: "auto", "cpu" or "cuda"; None means "auto".
        progress: called as progress("evaluating", done, total).
        recalibrate: share of the patients to whom temperature and thresholds are fitted again.
        seed: of the draw of these patients.
        thin: "average" or "keep" thin series; see `ich_keras.predict_folder`.

    Raises:
        UsageError: `out` exists, the share is not between 0 and 1, or the cache has another size.
        DataError: no label is one of the run's, the training has seen some of the data, or there
            are too few patients to recalibrate.
        StaleError: the run is not finished, or was changed.
    """
    if recalibrate is not None and not 0 < recalibrate < 1:
        raise UsageError(f"recalibrate is {recalibrate}; expected a share between 0 and 1.")
    folder = None if out is None else require_absent(out)
    run = RunFolder.at(run_dir).require_finished()
    recipe = run.recipe()
    rule = ThinRule(run.slice_distances(), thin)
    require_size(recipe, cache)
    labels = recipe.labels
    common = common_labels(cache, labels)
    unseen = _require_unseen(run, cache)
    recipe, model = load_run(run, device)
    domain, context = Domain.load(run, network_digest(model)), Context.load(run, labels, model)
    view = recipe.inputs.view
    seen = averaged_cache(cache, rule)
    unlabelled = seen.cache.slices.drop(columns=list(cache.labels.names))
    samples = make_samples(unlabelled, seen.cache.series, view)
    samples = replace(recipe.inputs.of_cache(samples, seen.cache), label_set=labels)
    chosen = _labelled(samples, seen.cache, view)
    if recalibrate is not None:
        # What is scored is known before it is predicted, which may take hours.
        even = np.full((len(chosen), len(labels)), 1 / len(labels), np.float32)
        for level in _levels(run, cache, seen, labels, view, chosen, even, even)[0].values():
            _drawn(level, recalibrate, seed)
    found: list[np.ndarray] = []
    asked = model, seen.cache, recipe, samples, chosen, progress, domain
    values, head = _predict(*asked, found, context)
    levels, tables = _levels(run, cache, seen, labels, view, chosen, values, head)
    if domain is not None:
        _add_domain(tables["series"], domain, seen.cache, view, chosen, np.concatenate(found))
    _add_averaged(tables["series"], cache, seen, rule)
    own = run.metrics("test") or {}
    choices = run.choices()
    metrics: dict[str, Any] = {}
    for name, level in levels.items():
        prevalence = _training_prevalence(own.get(name), labels)
        metrics[name] = scored(level, prevalence, choices.get(name, {}))
    if "series" in metrics and view.kind != "series":
        metrics["series"]["aggregation"] = choices.get("aggregation", {"rule": run.rule()})
    metrics |= {
        "own": {name: own[name] for name in levels if name in own},
        "data": described(cache, labels, common, tables["series"]),
        "unseen": unseen,
        "thin": rule.sentence(seen.is_thin),
        "domain": None if domain is None else _outside(tables["series"]),
        "by": _by(levels, cache, tables["series"]),
        "synthetic": is_synthetic(cache.slices),
        "notice": f"{SYNTHETIC_NOTE} {NOT_CLINICAL}"
        if is_synthetic(cache.slices)
        else NOT_CLINICAL,
    }
    if recalibrate is not None:
        metrics["recalibrated"] = {
            name: _recalibrated(level, choices.get(name, {}), recalibrate, seed)
            for name, level in levels.items()
        }
    result = External(metrics, tables.get("slice"), tables["series"])
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if result.slices is not None:
            atomic_write(folder / PREDICTIONS, csv_text(result.slices))
        atomic_write(folder / SERIES, csv_text(result.series))
        write_json(folder / METRICS, metrics)
    return result


def common_labels(cache: CTCache, labels: LabelSet) -> list[str]:
    """Return the labels of a run that the data have.

    Raises:
        DataError: there is none, or exclusive labels differ.
    """
    there = cache.labels
    common = [name for name in labels.names if name in there.names]
    if labels.exclusive != there.exclusive or (labels.exclusive and there != labels):
        raise DataError(
            f"the data have the labels {there}; the run answers {labels}. Exclusive labels must be"
            " the same, in the same order.",
            "Rename the data's labels with --label-map, and give --exclusive if the run's are.",
        )
    if not common:
        raise DataError(
            f"the data have the labels {there}; the run answers {labels}.",
            "Rename the data's labels with --label-map.",
        )
    return common


def _require_unseen(run: RunFolder, cache: CTCache) -> dict[str, Any]:
    """Refuse data that the training has seen; return how that was looked for."""
    split, slices = run.split(), cache.slices
    members = set().union(*(split.members[part] for part in PARTS))
    found = {split.key: np.flatnonzero(slices[split.key].isin(members))}
    seen = Seen.load(run.seen_file)
    has_pixels = seen is not None and len(seen.pixels) > 0 and cache.pixels_digest is not None
    if seen is not None:
        studies, pixels = seen.rows_in(cache)
        found |= {"study": studies, "pixels": pixels}
    said = {"series_uid": "UID of a series", "sop_instance_uid": "UID of an image"}
    for kind, rows in found.items():
        if not len(rows):
            continue
        uids = slices["series_uid"].iloc[rows].drop_duplicates()
        what = said.get(kind, {"study": "UID of a study", "pixels": "pixels of an image"}.get(kind))
        raise DataError(
            f"{len(rows):,} slices of {len(uids):,} series have the {what} that the training of"
            f" {run} used: {first_few(list(uids[:FAULTS_SHOWN]), len(uids))}.",
            "Leave these patients out: scored on them, any network looks too good. For the run's"
            " own splits use --split.",
        )
    return {
        "series": True,
        "studies": seen is not None,
        "pixels": has_pixels,
        "note": "" if has_pixels else NOT_COMPARED,
    }


def _labelled(samples: Samples, cache: CTCache, view: View) -> np.ndarray:
    """Return the samples to predict: usable ones of series that have a label."""
    names = list(cache.labels.names)
    table = cache.series if view.kind == "series" else cache.slices
    if view.kind != "series" and cache.labelling is not None and cache.labelling.level == "slice":
        # The whole series is predicted: its probability depends on all slices.
        has_label = (cache.series[names] != UNLABELLED).any(axis=1).to_numpy()
        is_in = cache.slices["series_uid"].isin(cache.series["series_uid"][has_label]).to_numpy()
    else:
        is_in = (table[names] != UNLABELLED).any(axis=1).to_numpy()
    chosen = np.flatnonzero(samples.usable & is_in)
    if not len(chosen):
        raise DataError("no usable series of the data has a label.", "Look at --labels.")
    return chosen


def _predict(
    model: Any,
    cache: CTCache,
    recipe: Recipe,
    samples: Samples,
    chosen: np.ndarray,
    progress: Progress | None,
    domain: Domain | None,
    distances: list[np.ndarray],
    context: Context | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return what `answers` does; `distances` receives those of the samples from the training."""
    batches = batches_of(recipe, cache, samples, chosen)
    table = cache.series if recipe.inputs.view.kind == "series" else cache.slices
    take = None
    if domain is not None:

        def take(features: np.ndarray) -> None:
            distances.append(domain.sample_distances(features))

    return answers(model, batches, table.iloc[chosen], context, progress, "evaluating", take)


def _add_domain(
    series: pd.DataFrame,
    domain: Domain,
    cache: CTCache,
    view: View,
    chosen: np.ndarray,
    distances: np.ndarray,
) -> None:
    """Add the columns of the domain to the table of series."""
    table = cache.series if view.kind == "series" else cache.slices
    owners = table["series_uid"].iloc[chosen].to_numpy()
    rows = pd.Series(owners).groupby(owners).indices
    scores: list[float | None] = [
        domain.score(distances[rows[uid]]) for uid in series["series_uid"]
    ]
    for place, (name, column) in enumerate(domain_columns(domain, scores).items(), 3):
        series.insert(place, name, column)


def _numbers(seen: AveragedCache) -> Any:
    """Return the averaged slice of each slice of the data, missing where there is none."""
    series = seen.cache.series
    lengths = series["num_slices"].to_numpy()
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)[seen.owner]
    is_averaged = np.array([block is not None for block in seen.blocks])
    is_averaged = np.repeat(is_averaged, lengths)[seen.owner]
    return numbers_or_missing(np.where(is_averaged, seen.owner - first, -1))


def _add_averaged(
    series: pd.DataFrame, cache: CTCache, seen: AveragedCache, rule: ThinRule
) -> None:
    """Add how many averaged slices a series has to the table of series."""
    blocks = dict(zip(cache.series["series_uid"], seen.blocks, strict=True))
    columns = averaged_columns([blocks[uid] for uid in series["series_uid"]], rule)
    for place, (name, column) in enumerate(columns.items(), 3):
        series.insert(place, name, column)


def _outside(series: pd.DataFrame) -> dict[str, Any]:
    number = int((series[VERDICT] == OUTSIDE).sum())
    return {"series": len(series), "outside": number, "share": number / len(series)}


def _levels(
    run: RunFolder,
    cache: CTCache,
    seen: AveragedCache,
    labels: LabelSet,
    view: View,
    chosen: np.ndarray,
    values: np.ndarray,
    head: np.ndarray | None,
) -> tuple[dict[str, Level], dict[str, pd.DataFrame]]:
    """Return what is scored, and the tables that are written, by level."""
    names = list(labels.names)
    levels: dict[str, Level] = {}
    tables: dict[str, pd.DataFrame] = {}
    if view.kind == "series":
        rows = cache.series.iloc[chosen].reset_index(drop=True)
        of_series = pd.DataFrame(values, columns=names)
    else:
        of = seen.cache.slices.iloc[chosen]
        uids = of["series_uid"].to_numpy()
        values = smooth(values, uids, of["position_mm"].to_numpy(), run.smoothing(), labels)
        found = aggregate(values, uids, run.rule(), labels, head)
        rows = cache.series.set_index("series_uid").loc[found.index].reset_index()
        of_series = found.reset_index(drop=True)
        # Every slice is scored, with the answer of what the network saw of it.
        answered = np.flatnonzero(np.isin(seen.owner, chosen))
        slices = cache.slices.iloc[answered].reset_index(drop=True)
        values = values[np.searchsorted(chosen, seen.owner[answered])]
        truth = truth_of(slices, labels)
        table = slices[["sop_instance_uid", "series_uid", "slice_index", "position_mm"]]
        table = table.assign(**{AVERAGED_SLICE: _numbers(seen)[answered]})
        tables["slice"] = pd.concat([table, pd.DataFrame(values, columns=names)], axis=1)
        if cache.labelling is not None and cache.labelling.level == "slice":
            tables["slice"][truth_columns(labels)] = truth
            is_known = (truth != UNLABELLED).any(axis=1)
            owners = patient_or_series(slices).to_numpy()
            levels["slice"] = Level(truth[is_known], values[is_known], owners[is_known], labels)
    truth = truth_of(rows, labels)
    is_known = (truth != UNLABELLED).any(axis=1)
    table = rows[["series_uid", "num_slices", "verdict"]]
    tables["series"] = pd.concat([table, of_series], axis=1)
    tables["series"][truth_columns(labels)] = truth
    if is_known.any():
        owners = patient_or_series(rows).to_numpy()
        levels["series"] = Level(
            truth[is_known], of_series.to_numpy()[is_known], owners[is_known], labels
        )
    if not levels:
        raise DataError("no usable series of the data has one of the run's labels.")
    return levels, tables


def _by(levels: dict[str, Level], cache: CTCache, table: pd.DataFrame) -> dict[str, Any]:
    """Break down the scores of the series that have a label."""
    if "series" not in levels:
        return {}
    is_known = (table[truth_columns(levels["series"].labels)].to_numpy() != UNLABELLED).any(axis=1)
    rows = cache.series.set_index("series_uid").loc[table["series_uid"][is_known]].reset_index()
    return {"series": broken_down(levels["series"], rows)}


def _training_prevalence(own: dict | None, labels: LabelSet) -> list[float] | None:
    if own is None:
        return None
    found = own["baseline"]["prevalence"]["probabilities"]
    return [found[name] for name in labels.names]


def _drawn(level: Level, share: float, seed: int) -> np.ndarray:
    """Return the patients to recalibrate with."""
    patients = np.unique(level.patients)
    drawn = np.random.default_rng(seed).permutation(patients)
    count = round(share * len(patients))
    if min(count, len(patients) - count) < MIN_PATIENTS:
        raise DataError(
            f"{len(patients)} patients with a share of {share:g} give {count} to recalibrate with"
            f" and {len(patients) - count} to score; expected {MIN_PATIENTS} of each.",
            "Leave --recalibrate out, or give more data.",
        )
    return drawn[:count]


def _recalibrated(level: Level, chosen: dict, share: float, seed: int) -> dict[str, Any]:
    """Fit temperature and thresholds to some patients, and score the others before and after."""
    local = _drawn(level, share, seed)
    is_local = np.isin(level.patients, local)
    parts = [
        Level(level.truth[rows], level.values[rows], level.patients[rows], level.labels)
        for rows in (is_local, ~is_local)
    ]
    fitted = choose(parts[0])
    return {
        "patients": {"fitted": len(local), "scored": len(np.unique(level.patients[~is_local]))},
        "seed": seed,
        "temperature": {"run": chosen.get("temperature"), "local": fitted["temperature"]},
        "before": scored(parts[1], None, chosen),
        "after": scored(parts[1], None, fitted),
    }
