"""What a run answered on a split, per slice and per series, and how it was trained, read back."""

import csv
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ich_keras.errors import StaleError
from ich_keras.files import read_json
from ich_keras.labels import UNLABELLED, LabelSet
from ich_keras.run_folder import RunFolder
from ich_keras.run_pages.metrics_form import LEVELS, wrong_entry
from ich_keras.validation_scores import evaluate_again, read_split_scores

TEST = "test"


@dataclass(frozen=True, eq=False)
class LevelScores:
    """Answers and truth of slices, or of series.

    Args:
        labels: their order.
        truth: int8 (n, labels), 0 or 1; -1 is missing.
        values: float64 (n, labels), probabilities.
        patients: int (n,), a number for each patient; None in runs of older versions.
        names: str (n,), the UID of each row.
        series: str (n,), the series of each row.
    """

    labels: LabelSet
    truth: np.ndarray
    values: np.ndarray
    patients: np.ndarray | None
    names: np.ndarray
    series: np.ndarray

    def of(self, label: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return truth (bool), probabilities and patients of the rows that have a label."""
        column = self.labels.index(label)
        kept = self.truth[:, column] != UNLABELLED
        patients = None if self.patients is None else self.patients[kept]
        return self.truth[kept, column] == 1, self.values[kept, column], patients

    def taken(self, rows: np.ndarray) -> "LevelScores":
        """Return some rows."""
        patients = None if self.patients is None else self.patients[rows]
        return LevelScores(
            self.labels,
            self.truth[rows],
            self.values[rows],
            patients,
            self.names[rows],
            self.series[rows],
        )


@dataclass(frozen=True, eq=False)
class Results:
    """What is known of a run on a split.

    Args:
        metrics: by level, as `ich_keras.evaluation.evaluate` returned them; empty where the split
            was not evaluated.
        scores: by level; empty where there are no predictions.
    """

    metrics: dict[str, dict[str, Any]]
    scores: dict[str, LevelScores]

    @property
    def levels(self) -> list[str]:
        """The levels with metrics, slices first."""
        return [name for name in LEVELS if name in self.metrics]


def read_results(run: RunFolder, split: str = TEST) -> Results:
    """Read metrics and predictions of a split.

    Args:
        run: finished, or unfinished: then those of its best weights so far.
        split: "train", "valid" or "test".

    Raises:
        StaleError: a file is damaged, or was changed since the run finished.
    """
    is_final = run.is_finished
    path = run.metrics_file(split, is_final)
    metrics = read_json(path) if path.is_file() else {}
    labels = run.recipe().labels
    if wrong := wrong_entry(metrics, labels):
        raise StaleError(
            f"{path} is damaged: {wrong}.", f"Evaluate again: {evaluate_again(run, split)}"
        )
    found = read_split_scores(run, labels, split, is_final)
    scores: dict[str, LevelScores] = {}
    if found is not None:
        rows, rule = found.rows, run.rule()
        if found.is_slices:
            scores["slice"] = LevelScores(
                labels, rows.truth, rows.values, rows.patients, found.names, found.uids
            )
        if not found.is_slices or "series" in metrics:
            series = found.level("series", rule)
            uids = pd.unique(found.uids)  # in the order of `aggregate`
            scores["series"] = LevelScores(
                labels, series.truth, series.values, series.patients, uids, uids
            )
    return Results(metrics, {name: scores[name] for name in LEVELS if name in scores})


def read_history(run: RunFolder) -> pd.DataFrame:
    """Read history.csv: float64, a row for each epoch; empty where the run has none.

    Args:
        run: finished or unfinished.

    Raises:
        StaleError: the file is damaged.
    """
    if not run.history_file.is_file():
        return pd.DataFrame()
    hint = "Copy the original run folder again."
    try:
        table = pd.read_csv(run.history_file)
        if not {"epoch", "train_loss", "valid_log_loss"} <= set(table):
            return table[:0]
        table = table.astype(float)
    except (ValueError, csv.Error) as error:
        raise StaleError(f"{run.history_file} is damaged: {error}.", hint) from error
    if not np.isfinite(table["epoch"]).all():
        raise StaleError(f"{run.history_file} is damaged: an epoch has no number.", hint)
    return table
