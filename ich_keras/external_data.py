"""What external data are: counts, case mix, encodings."""

from typing import Any

import numpy as np
import pandas as pd

from ich_keras.ct.tables import patient_or_series
from ich_keras.data.cache.cache import CTCache
from ich_keras.labels import UNLABELLED, LabelSet


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
