"""The answers in the tables of a prediction: calibrated, decided, grouped; where to look first."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ich_keras.answer_rules import DECISION, GROUP, RAW, AnswerRules, LevelRules
from ich_keras.labels import LabelSet
from ich_keras.metrics.aggregation import HEAD, aggregate, head_columns
from ich_keras.metrics.calibration import with_temperature
from ich_keras.prediction_tables import PLACE_COLUMNS, FolderPrediction
from ich_keras.thin_tables import rows_seen

YES, NO = "yes", "no"
LOOK_FIRST = 5  # slices per series and label


def with_answers(prediction: FolderPrediction, rules: AnswerRules) -> FolderPrediction:
    """Return a prediction with answers in place of the network's probabilities.

    Args:
        prediction: with the network's probabilities.
        rules: of its run.

    Returns:
        The label columns hold calibrated probabilities. Columns `raw_*`, `decision_*` (yes, no, or
        empty without a threshold) and `group_*` (low, unsure, high, or empty) follow them. The
        notice says how they were made, a line for each fact.
    """
    labels, slices, series = rules.labels, prediction.slices, prediction.series
    names = list(labels.names)
    look_first = None
    if slices is not None:
        # Series are made of what the network saw: of each averaged slice once.
        seen = rows_seen(slices)
        values = slices[names].to_numpy(np.float64)
        uids = slices["series_instance_uid"].to_numpy()[seen]
        part = rules.levels.get("slice")
        scored = [values] * len(part.rules) if part is not None else []
        slices = _answered(slices, part, scored, rules)
    part = rules.levels.get("series")
    scored = []
    for rule in () if part is None else part.rules:
        if rule == HEAD:
            scored.append(series[head_columns(labels)].to_numpy(np.float64))
        elif rule and prediction.slices is not None:
            made = aggregate(values[seen], uids, rule, labels)
            scored.append(made.loc[series["series_instance_uid"]].to_numpy())
        else:
            scored.append(series[names].to_numpy(np.float64))
    series = _answered(series, part, scored, rules)
    if slices is not None:
        look_first = _look_first(slices.iloc[seen], series, labels)
    return dataclasses.replace(
        prediction,
        slices=slices,
        series=series,
        look_first=look_first,
        decisions=rules.to_dict(),
        notice="\n".join([prediction.notice, *rules.sentences()]),
    )


def _answered(
    table: pd.DataFrame,
    part: LevelRules | None,
    scored: Sequence[np.ndarray],
    rules: AnswerRules,
) -> pd.DataFrame:
    """Add answers to a table of raw probabilities.

    Args:
        table: with a column for each label.
        part: of its level; None leaves the answers empty.
        scored: for the groups, float64 (rows, labels), once for each of `part.rules`.
        rules: of the run.
    """
    names = list(rules.labels.names)
    raw = table[names]
    values = raw.to_numpy(np.float64)
    found = table.copy()
    new = {f"{RAW}{name}": raw[name] for name in names}
    if part is not None:
        calibrated = with_temperature(values, part.temperature, rules.labels)
        found[names] = calibrated.astype(raw.to_numpy().dtype)
    for column, name in enumerate(names):
        limit = None if part is None else part.thresholds[name]
        new[f"{DECISION}{name}"] = (
            np.full(len(table), "", object)
            if limit is None
            else np.where(values[:, column] >= limit, YES, NO).astype(object)
        )
    for column, name in enumerate(names):
        new[f"{GROUP}{name}"] = (
            np.full(len(table), "", object)
            if part is None or name in part.ungrouped
            else part.scores[name].groups(
                [one[:, column] for one in scored], rules.point.error_rate
            )
        )
    # At once: hundreds of labels would fragment the table.
    return pd.concat([found, pd.DataFrame(new, index=table.index)], axis=1)


def _look_first(slices: pd.DataFrame, series: pd.DataFrame, labels: LabelSet) -> pd.DataFrame:
    """Return the slices of each series with the most evidence, by label.

    For every label that is decided yes; where none is, for the one that stands for all (where
    there is no such label, for the most probable one).

    Args:
        slices: of averaged slices, the one in the middle.
        series: decided.
        labels: their order.
    """
    rows = slices.groupby("series_instance_uid", sort=False).indices
    names = list(labels.names)
    decided = series[[f"{DECISION}{name}" for name in names]].to_numpy() == YES
    probable = series[[f"{RAW}{name}" for name in names]].to_numpy().argmax(axis=1)
    raw = slices[[f"{RAW}{name}" for name in names]].to_numpy()
    parts = []
    for number, uid in enumerate(series["series_instance_uid"]):
        shown = probable[number] if labels.any_column is None else labels.any_column
        columns = np.flatnonzero(decided[number]) if decided[number].any() else [shown]
        for column in columns:
            # The first of equal slices stays first.
            order = np.argsort(-raw[rows[uid], column], kind="stable")[:LOOK_FIRST]
            part = slices.iloc[rows[uid][order]][
                ["series_instance_uid", "sop_instance_uid", "slice_index", *PLACE_COLUMNS]
            ]
            part.insert(1, "label", names[column])
            part.insert(2, "decision", series[f"{DECISION}{names[column]}"].iloc[number])
            part.insert(3, "rank", np.arange(1, len(order) + 1))
            part["probability"] = slices[names[column]].iloc[rows[uid][order]]
            parts.append(part)
    return pd.concat(parts, ignore_index=True)
