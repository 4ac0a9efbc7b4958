"""What a finished run gave on its validation patients, for choosing thresholds and groups."""

import shlex
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ich_keras.errors import StaleError
from ich_keras.inference import PATIENT_COLUMN
from ich_keras.labels import UNLABELLED, LabelSet
from ich_keras.metrics.aggregation import aggregate, choose_rule, rules_of
from ich_keras.metrics.binary import truth_columns
from ich_keras.metrics.conformal import patient_folds
from ich_keras.run_checksums import require_file_unchanged
from ich_keras.run_folder import RunFolder

_SLICE, _SERIES = "sop_instance_uid", "series_instance_uid"


@dataclass(frozen=True, eq=False)
class Scores:
    """Raw probabilities and truth of slices, or of series.

    Args:
        truth: int8 (n, labels), 0 or 1; -1 is missing.
        values: float64 (n, labels).
        patients: int (n,), a number for each patient; None where nothing says whose they are.
        rule: how series were made of slices; "" where they were not.
    """

    truth: np.ndarray
    values: np.ndarray
    patients: np.ndarray | None
    rule: str = ""


@dataclass(frozen=True, eq=False)
class ValidationScores:
    """The rows of predictions-valid.csv.

    Args:
        rows: as they are: slices, or series of a run on whole series.
        uids: str (n,), the series of each row.
        is_slices: whether the rows are slices.
        labels: their order.
    """

    rows: Scores
    uids: np.ndarray
    is_slices: bool
    labels: LabelSet

    def level(self, name: str, rule: str) -> Scores:
        """Return the scores of a level, "slice" or "series"; slices are aggregated by the rule."""
        return self._aggregated(slice(None), rule) if self._is_made(name) else self.rows

    def folds(self, name: str) -> list[Scores]:
        """Return the same in parts, by patient, each scored with what the others choose.

        One part where nothing about the scores is chosen on these patients.
        """
        if not self._is_made(name) or len(rules_of(self.labels)) == 1:
            return [self.level(name, next(iter(rules_of(self.labels))))]
        assert self.rows.patients is not None  # `answer_rules` asks for folds only then
        fold = patient_folds(self.rows.patients)
        if not fold.any():  # one patient
            return [self.level(name, next(iter(rules_of(self.labels))))]
        truth, values = self.rows.truth, self.rows.values
        found = []
        for number in np.unique(fold):
            others = fold != number
            rule, _ = choose_rule(
                truth[others], values[others], list(self.uids[others]), self.labels
            )
            found.append(self._aggregated(~others, rule))
        return found

    def _is_made(self, name: str) -> bool:
        return name == "series" and self.is_slices

    def _aggregated(self, chosen: np.ndarray | slice, rule: str) -> Scores:
        uids, patients = list(self.uids[chosen]), self.rows.patients
        truth = aggregate(self.rows.truth[chosen], uids, "max", self.labels)
        values = aggregate(self.rows.values[chosen], uids, rule, self.labels)
        if patients is not None:
            owners = pd.Series(patients[chosen], index=uids).groupby(level=0).first()
            patients = owners[truth.index].to_numpy()
        return Scores(truth.to_numpy().astype(np.int8), values.to_numpy(), patients, rule)


def evaluate_again(run: RunFolder) -> str:
    """Return the command that makes choices and predictions on validation again."""
    return f"ich evaluate --run {shlex.quote(str(run))} --cache CACHE --split valid"


def read_validation_scores(run: RunFolder, labels: LabelSet) -> ValidationScores | None:
    """Read the predictions on the validation split; None where the run has none.

    Raises:
        StaleError: they were changed since the run finished, or are damaged.
    """
    path = run.predictions_file("valid")
    if not path.is_file():
        return None
    require_file_unchanged(run, path)
    names, truths = list(labels.names), truth_columns(labels)
    try:
        table = pd.read_csv(path, dtype={_SLICE: str, _SERIES: str})
        # The network gave float32, which the shortest decimals bring back exactly.
        values = table[names].to_numpy(np.float32).astype(np.float64)
        truth = table[truths].to_numpy(np.float64)
        uids = table[_SERIES].to_numpy()
        patients = table[PATIENT_COLUMN].to_numpy() if PATIENT_COLUMN in table else None
    except (KeyError, ValueError) as error:
        raise _damaged(run, f"{error}") from error
    if not len(table):
        raise _damaged(run, "it has no row")
    if not ((values >= 0) & (values <= 1)).all():
        raise _damaged(run, "a value is not a probability")
    if not np.isin(truth, (UNLABELLED, 0, 1)).all():
        raise _damaged(run, "a true label is none of 0, 1 and -1")
    if patients is not None and patients.dtype.kind != "i":
        raise _damaged(run, f"the column {PATIENT_COLUMN} does not hold whole numbers")
    rows = Scores(truth.astype(np.int8), values, patients)
    return ValidationScores(rows, uids, _SLICE in table, labels)


def _damaged(run: RunFolder, why: str) -> StaleError:
    return StaleError(
        f"{run.predictions_file('valid')} is damaged: {why}.",
        f"Remove it, then: {evaluate_again(run)}",
    )
