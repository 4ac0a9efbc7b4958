"""What a run gave on the patients of a split: on those of validation, for choosing thresholds and
groups."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ich_keras.errors import StaleError
from ich_keras.inference import PATIENT_COLUMN
from ich_keras.labels import UNLABELLED, LabelSet
from ich_keras.metrics.aggregation import (
    HEAD,
    aggregate,
    choose_rule,
    head_columns,
    head_of,
    rules_of,
)
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
        head: of slices, float64 (n, labels): a sequence head's answer to the series of each; None
            without one.
    """

    truth: np.ndarray
    values: np.ndarray
    patients: np.ndarray | None
    rule: str = ""
    head: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class ValidationScores:
    """The rows of predictions-valid.csv, or of another split's.

    Args:
        rows: as they are: slices, or series of a run on whole series.
        uids: str (n,), the series of each row.
        names: str (n,), the UID of each row: of its slice, or of its series.
        is_slices: whether the rows are slices.
        labels: their order.
    """

    rows: Scores
    uids: np.ndarray
    names: np.ndarray
    is_slices: bool
    labels: LabelSet

    def level(self, name: str, rule: str) -> Scores:
        """Return the scores of a level, "slice" or "series"; slices are aggregated by the rule."""
        return self._aggregated(slice(None), rule) if self._is_made(name) else self.rows

    def folds(self, name: str) -> list[Scores]:
        """Return the same in parts, by patient, each scored with what the others choose.

        One part where nothing about the scores is chosen on these patients.
        """
        is_chosen = len(rules_of(self.labels)) > 1 or self.rows.head is not None
        if not self._is_made(name) or not is_chosen:
            return [self.level(name, next(iter(rules_of(self.labels))))]
        assert self.rows.patients is not None  # `answer_rules` asks for folds only then
        fold = patient_folds(self.rows.patients)
        if not fold.any():  # one patient
            return [self.level(name, next(iter(rules_of(self.labels))))]
        truth, values, head = self.rows.truth, self.rows.values, self.rows.head
        found = []
        for number in np.unique(fold):
            others = fold != number
            rule, _ = choose_rule(
                truth[others],
                values[others],
                list(self.uids[others]),
                self.labels,
                None if head is None else head[others],
            )
            found.append(self._aggregated(~others, rule))
        return found

    def _is_made(self, name: str) -> bool:
        return name == "series" and self.is_slices

    def _aggregated(self, chosen: np.ndarray | slice, rule: str) -> Scores:
        uids, patients, head = list(self.uids[chosen]), self.rows.patients, self.rows.head
        head = None if head is None else head[chosen]
        truth = aggregate(self.rows.truth[chosen], uids, "max", self.labels)
        values = aggregate(self.rows.values[chosen], uids, rule, self.labels, head)
        if patients is not None:
            owners = pd.Series(patients[chosen], index=uids).groupby(level=0).first()
            patients = owners[truth.index].to_numpy()
        return Scores(truth.to_numpy().astype(np.int8), values.to_numpy(), patients, rule)


def evaluate_again(run: RunFolder, split: str = "valid") -> str:
    """Return the command that makes the predictions on a split again (and choices, on validation).

    Args:
        run: the run.
        split: "train", "valid" or "test".
    """
    return f"ich evaluate --run {shlex.quote(str(run))} --cache CACHE --split {split}"


def read_validation_scores(run: RunFolder, labels: LabelSet) -> ValidationScores | None:
    """Read the predictions on the validation split; see `read_split_scores`."""
    return read_split_scores(run, labels, "valid")


def read_split_scores(
    run: RunFolder, labels: LabelSet, split: str, is_final: bool = True
) -> ValidationScores | None:
    """Read the predictions on a split; None where the run has none.

    Args:
        run: a run.
        labels: its labels.
        split: "train", "valid" or "test".
        is_final: by the final weights, or by those so far of an unfinished training.

    Raises:
        StaleError: they were changed since the run finished, or are damaged.
    """
    path = run.predictions_file(split, is_final)
    if not path.is_file():
        return None
    if is_final:
        require_file_unchanged(run, path)
    names, truths = list(labels.names), truth_columns(labels)
    try:
        table = pd.read_csv(path, dtype={_SLICE: str, _SERIES: str})
        # The network gave float32, which the shortest decimals bring back exactly.
        values = table[names].to_numpy(np.float32).astype(np.float64)
        if run.rule() == HEAD:
            table[head_columns(labels)]  # a KeyError names those that lack
        head = head_of(table, labels)
        truth = table[truths].to_numpy(np.float64)
        uids = table[_SERIES].to_numpy()
        patients = table[PATIENT_COLUMN].to_numpy() if PATIENT_COLUMN in table else None
    except (KeyError, ValueError) as error:
        raise _damaged(run, path, split, f"{error}") from error
    for is_sound, why in (
        (len(table) > 0, "it has no row"),
        (_are_probabilities(values), "a value is not a probability"),
        (head is None or _are_probabilities(head), "a head's answer is not a probability"),
        (np.isin(truth, (UNLABELLED, 0, 1)).all(), "a true label is none of 0, 1 and -1"),
        (
            patients is None or patients.dtype.kind == "i",
            f"the column {PATIENT_COLUMN} does not hold whole numbers",
        ),
    ):
        if not is_sound:
            raise _damaged(run, path, split, why)
    rows = Scores(truth.astype(np.int8), values, patients, head=head)
    names = table[_SLICE].to_numpy() if _SLICE in table else uids
    return ValidationScores(rows, uids, names, _SLICE in table, labels)


def _are_probabilities(values: np.ndarray) -> bool:
    return bool(((values >= 0) & (values <= 1)).all())


def _damaged(run: RunFolder, path: Path, split: str, why: str) -> StaleError:
    return StaleError(
        f"{path} is damaged: {why}.",
        f"Remove it, then: {evaluate_again(run, split)}",
    )
