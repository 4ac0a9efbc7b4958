"""What external data are: counts, case mix, encodings, and scores by what the tables say."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from ich_keras.ct.tables import patient_or_series
from ich_keras.data.cache.cache import CTCache
from ich_keras.labels import UNLABELLED, LabelSet
from ich_keras.levels import Level
from ich_keras.metrics.binary import binary_metrics, truth_columns
from ich_keras.metrics.intervals import bootstrap

# Groups with fewer samples are counted, not scored.
MIN_SAMPLES = 10


def truth_of(table: pd.DataFrame, labels: LabelSet) -> np.ndarray:
    """Return the run's labels of each row, int8 (n, labels); -1 where the data lack one."""
    columns = [
        table[name].to_numpy(np.int8) if name in table else np.full(len(table), UNLABELLED, np.int8)
        for name in labels.names
    ]
    return np.stack(columns, axis=1)


def described(
    cache: CTCache, labels: LabelSet, common: list[str], series: pd.DataFrame
) -> dict[str, Any]:
    """Say what the data are: counts, prevalence, case mix, and how they were encoded."""
    table = cache.series[cache.series["series_uid"].isin(series["series_uid"])]
    truth = truth_of(table, labels)
    there = truth != UNLABELLED
    counts, positive = there.sum(axis=0), (truth == 1).sum(axis=0)
    return {
        "patients": int(patient_or_series(table).nunique()),
        "series": len(table),
        "slices": int(table["num_slices"].sum()),
        "rejects": len(cache.rejects),
        "label_level": cache.labelling.level if cache.labelling is not None else "",
        "labels": common,
        "missing_labels": [name for name in labels.names if name not in common],
        "unused_labels": [name for name in cache.labels.names if name not in labels.names],
        "series_with_label": dict(zip(labels.names, counts.tolist(), strict=True)),
        "series_positive": dict(zip(labels.names, positive.tolist(), strict=True)),
        "verdicts": table["verdict"].value_counts().to_dict(),
        "matrix": _counted(table["rows"].astype(str) + " x " + table["columns"].astype(str)),
        "repaired_slices": int(cache.slices["repaired"].sum()) if "repaired" in cache.slices else 0,
        **{
            name: _quartiles(table[column])
            for name, column in (
                ("slices_per_series", "num_slices"),
                ("slice_spacing_mm", "slice_spacing_mm"),
                ("pixel_spacing_mm", "row_spacing_mm"),
                ("tilt_degrees", "tilt_degrees"),
            )
        },
    }


def _counted(values: pd.Series) -> dict[str, int]:
    return {str(value): int(count) for value, count in values.value_counts().items()}


def _quartiles(values: pd.Series) -> list[float | None]:
    """Return the lowest value, the quartiles and the highest."""
    found = values.dropna().to_numpy(float)
    if not len(found):
        return [None] * 5
    return np.quantile(found, [0, 0.25, 0.5, 0.75, 1]).round(3).tolist()


def by_property(level: Level, cache: CTCache, table: pd.DataFrame) -> dict[str, Any]:
    """Break the scores of series down by what the tables say of them."""
    is_known = (table[truth_columns(level.labels)].to_numpy() != UNLABELLED).any(axis=1)
    uids = table["series_uid"].to_numpy()[is_known]
    series = cache.series.set_index("series_uid").loc[uids]
    spacing = pd.cut(
        series["slice_spacing_mm"].abs(),
        [0, 1.5, 3.5, 6, np.inf],
        labels=["up to 1.5 mm", "1.5 to 3.5 mm", "3.5 to 6 mm", "above 6 mm"],
    )
    groups = {
        "slice_spacing": spacing.astype(object).where(spacing.notna(), "unknown"),
        "kernel": series["kernel"].replace("", "unknown"),
        "verdict": series["verdict"],
    }
    return {
        name: {
            str(value): _brief(level, np.flatnonzero((values == value).to_numpy()))
            for value in sorted(values.unique())
        }
        for name, values in groups.items()
    }


def _brief(level: Level, rows: np.ndarray) -> dict[str, Any]:
    """Score some rows of a level in a few numbers; None where there are too few."""
    truth, values = level.truth[rows], level.values[rows]
    shown = level.labels.shown
    column = level.labels.index(shown)
    found: dict[str, Any] = {
        "samples": len(rows),
        "patients": len(set(level.patients[rows])),
        "positive": int((truth[:, column] == 1).sum()),
        f"auroc_{shown}": None,
        "log_loss": None,
    }
    if len(rows) >= MIN_SAMPLES:
        part = replace(level, truth=truth, values=values, patients=level.patients[rows])
        metrics = binary_metrics(truth, values, label_set=level.labels)
        found |= {f"auroc_{shown}": metrics["auroc"][shown], "log_loss": metrics["log_loss"]}
        intervals = _intervals(part)
        if intervals is not None:
            found[f"auroc_{shown}_interval"] = [
                intervals[f"auroc/{shown}"][end] for end in ("low", "high")
            ]
    return found


def _intervals(level: Level) -> dict[str, dict] | None:
    """Return the 95 % intervals of a level's metrics; None for a single patient."""

    if len(set(level.patients)) < 2:
        return None
    return bootstrap(level.truth, level.values, level.patients, label_set=level.labels)
