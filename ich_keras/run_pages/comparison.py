"""Comparing runs on the same test rows: paired differences, and what differs in their settings."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.labels import LabelSet
from ich_keras.metrics.binary import binary_metrics
from ich_keras.metrics.intervals import paired_bootstrap
from ich_keras.run_folder import CACHE, PIXELS_OF, SYNTHETIC, RunFolder
from ich_keras.run_pages.metrics_form import LEVELS
from ich_keras.run_pages.numbers import flat
from ich_keras.run_pages.scores import TEST, LevelScores, Results, read_results
from ich_keras.validation_scores import evaluate_again

_PLACES = ("backend", "device", "device_name", "processor", "python", "system", "versions")


@dataclass(frozen=True, eq=False)
class LevelComparison:
    """Runs on the same rows of one level.

    Args:
        scores: of each run, the same rows in the same order.
        metrics: of each run on these rows, as `binary_metrics` returns them.
        differences: each later run minus the first, as `paired_bootstrap` returns it; without
            intervals where nothing says which rows are of one patient, or all are of one.
        num_patients: of these rows; None where it is not known.
        num_left_out: rows of each run that not all runs have.
    """

    scores: list[LevelScores]
    metrics: list[dict[str, Any]]
    differences: list[dict[str, dict]]
    num_patients: int | None
    num_left_out: list[int]


@dataclass(frozen=True, eq=False)
class Comparison:
    """The result of `compare`.

    Args:
        runs: the first one is the reference.
        names: what they are called, different for each.
        labels: of all.
        levels: "slice" and "series", those that all runs have.
        settings: (setting, its value in each run), those that differ.
        environment: the same, of packages and machine.
        is_synthetic: whether any was trained on phantoms.
    """

    runs: list[RunFolder]
    names: list[str]
    labels: LabelSet
    levels: dict[str, LevelComparison]
    settings: list[list[str]]
    environment: list[list[str]]
    is_synthetic: bool


def compare(run_dirs: Sequence[RunFolder | Path | str]) -> Comparison:
    """Compare runs with the first of them, on the test rows that they share.

    Args:
        run_dirs: at least two runs that were tested on the same patients. They may differ in
            network, view, size and training. Slices are compared with whole series per series.

    Raises:
        UsageError: there are fewer than two, or one is given twice.
        DataError: their test rows cannot be compared; says why.
        StaleError: a run is not finished, is damaged, or was not tested.
    """
    runs = [_finished(path) for path in run_dirs]
    if len(runs) < 2:
        raise UsageError(f"{len(runs)} run; expected at least two to compare.")
    for one, other in combinations(runs, 2):
        if one.path.resolve() == other.path.resolve():
            raise UsageError(f"{one} is given twice.", "Give different runs.")
    names = _names(runs)
    _require_same_labels(runs, names)
    results = [_tested(run) for run in runs]
    _require_same_test(runs, names, results)
    common = [name for name in LEVELS if all(name in found.scores for found in results)]
    if not common:
        raise DataError(
            f"{' and '.join(names)} have no level in common: one answers whole series, the other"
            " was tested on single slices of series that its split cuts apart.",
            "Compare runs whose splits keep series whole.",
        )
    data = [run.data() for run in runs]
    return Comparison(
        runs=runs,
        names=names,
        labels=runs[0].recipe().labels,
        levels={
            name: _level(name, names, [found.scores[name] for found in results]) for name in common
        },
        settings=_differing([flat(run.recipe().to_dict()) for run in runs]),
        environment=_differing([_environment(run) for run in runs]),
        is_synthetic=any(record.get(SYNTHETIC) for record in data),
    )


def _finished(path: RunFolder | Path | str) -> RunFolder:
    run = RunFolder.at(path)
    for is_so, hint in (
        (not run.is_finished and run.is_running, "Wait until it finishes."),
        (run.is_interrupted, f"Finish it first: ich-train --resume {shlex.quote(str(run))}"),
    ):
        if is_so:
            raise StaleError(
                f"the training in {run} is not finished; only finished runs are compared.", hint
            )
    return run.require_finished()


def _names(runs: list[RunFolder]) -> list[str]:
    """Return the shortest ends of the paths that tell the runs apart."""
    paths = [run.path.resolve() for run in runs]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = [str(Path(*path.parts[-length:])) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _require_same_labels(runs: list[RunFolder], names: list[str]) -> None:
    first = runs[0].recipe().labels
    for run, name in zip(runs[1:], names[1:], strict=True):
        labels = run.recipe().labels
        if labels != first:
            raise DataError(
                f"{names[0]} answers {first}; {name} answers {labels}.",
                "Compare runs of the same labels.",
            )


def _tested(run: RunFolder) -> Results:
    results = read_results(run)
    if not results.scores:
        raise DataError(
            f"{run} has no predictions of the test split.", f"First: {evaluate_again(run, TEST)}"
        )
    return results


def _require_same_test(runs: list[RunFolder], names: list[str], results: list[Results]) -> None:
    """Refuse runs that were tested on other series, other pixels or other labels."""
    first, data = _series(results[0]), runs[0].data()
    for run, name, found in zip(runs[1:], names[1:], results[1:], strict=True):
        record = run.data()
        if record.get(CACHE) != data.get(CACHE):
            own = _series(found)
            shared = len(first & own)
            if first != own:
                raise DataError(
                    f"{names[0]} and {name} were trained on different caches, and of their"
                    f" {len(first):,} and {len(own):,} test series they share {shared:,}.",
                    "Train both on the same data with the same split (--split FILE).",
                )
        one, other = (_test_members(r) for r in (runs[0], run))
        if one is not None and other is not None and one != other:
            raise DataError(
                f"{names[0]} and {name} have different splits: their test parts hold"
                f" {len(one):,} and {len(other):,} members, {len(one & other):,} of them the same.",
                "Differences need the same test patients: train with the same --seed and --split,"
                " or the same --fold.",
            )
        digests = [(r.get(PIXELS_OF) or {}).get(TEST) for r in (data, record)]
        is_one_cache = record.get(CACHE) == data.get(CACHE)
        if is_one_cache and None not in digests and digests[0] != digests[1]:
            raise DataError(
                f"{names[0]} and {name} were tested on other pixels of the same series.",
                "Train both on one cache.",
            )


def _series(results: Results) -> set[str]:
    return set(next(iter(results.scores.values())).series.tolist())


def _test_members(run: RunFolder) -> set[str] | None:
    if not run.split_file.is_file():
        return None
    return set(run.split().members[TEST])


def _level(level: str, names: list[str], scores: list[LevelScores]) -> LevelComparison:
    """Compare on the rows that all have, in the order of the first."""
    for name, found in zip(names, scores, strict=True):
        if len(set(found.names.tolist())) != len(found.names):
            raise DataError(f"{name} has two predictions of one {level}.")
    shared = set(scores[0].names.tolist()).intersection(*(s.names.tolist() for s in scores[1:]))
    if not shared:
        raise DataError(f"{' and '.join(names)} share no {level} of the test split.")
    order = [uid for uid in scores[0].names.tolist() if uid in shared]
    taken = []
    for found in scores:
        place = {uid: row for row, uid in enumerate(found.names.tolist())}
        taken.append(found.taken(np.array([place[uid] for uid in order])))
    first = taken[0]
    for name, found in zip(names[1:], taken[1:], strict=True):
        wrong = (found.truth != first.truth).any(axis=1)
        if wrong.any():
            raise DataError(
                f"{names[0]} and {name} were tested with different labels: {int(wrong.sum()):,}"
                f" of {len(order):,} rows per {level} differ, the first is"
                f" {order[int(wrong.argmax())]}.",
                "Train or evaluate both with the same --labels.",
            )
    patients = next((found.patients for found in taken if found.patients is not None), None)
    metrics = [binary_metrics(s.truth, s.values, label_set=s.labels) for s in taken]
    num_patients = None if patients is None else len(np.unique(patients))
    has_intervals = num_patients is not None and num_patients > 1
    differences = [
        paired_bootstrap(first.truth, other.values, first.values, patients, label_set=first.labels)
        if has_intervals and patients is not None
        else _plain(metrics[0], metrics[number], first.labels)
        for number, other in enumerate(taken[1:], start=1)
    ]
    left_out = [len(found.names) - len(order) for found in scores]
    return LevelComparison(taken, metrics, differences, num_patients, left_out)


def _plain(first: dict, other: dict, labels: LabelSet) -> dict[str, dict]:
    """Return differences without intervals."""
    found = {}
    for name in metric_names(labels):
        one, two = value_of(first, name), value_of(other, name)
        value = None if one is None or two is None else two - one
        found[name] = {"value": value, "low": None, "high": None}
    return found


def metric_names(labels: LabelSet) -> list[str]:
    """Return the metrics that are compared: of all labels together, then of each."""
    ranked = [f"{metric}/{name}" for name in labels.names for metric in ("auroc", "ap")]
    return ["log_loss", "exact_match", *ranked]


def value_of(metrics: dict, name: str) -> float | None:
    """Return a metric by the name that `paired_bootstrap` gives it."""
    metric, _, label = name.partition("/")
    return metrics[metric][label] if label else metrics[metric]


def _differing(settings: list[dict[str, str]]) -> list[list[str]]:
    """Return the settings whose values differ, in the order of their first run."""
    names = list(dict.fromkeys(name for found in settings for name in found))
    rows = [[name, *(found.get(name, "absent") for found in settings)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def _environment(run: RunFolder) -> dict[str, str]:
    if not run.environment_file.is_file():
        return {}
    record = run.environment()
    return flat({name: record[name] for name in _PLACES if name in record})
