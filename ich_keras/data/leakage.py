"""Faults of a data set and its splits: shared patients, equal pixels, contradictory labels."""

from itertools import combinations

import pandas as pd

from ich_keras.ct.geometry import SAME_POSITION_MM
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.labels import is_labelled
from ich_keras.data.pixels import equal_slices
from ich_keras.data.split_audit import count_split
from ich_keras.data.split_record import SPLITS, Split
from ich_keras.labels import SIX, UNLABELLED, LabelSet
from ich_keras.progress import Progress


def audit_data(
    cache: CTCache,
    split: Split | None = None,
    progress: Progress | None = None,
) -> dict:
    """Look for leakage between splits and for labels that contradict each other.

    Args:
        cache: with labels joined.
        split: None looks at the labels and at equal pixels of different patients only.
        progress: called as progress("comparing", slices done, all slices).

    Returns:
        Ready for JSON: "labels" (`label_faults`), "equal_pixels" (`equal_slices`, counted), and
        with a split "split" (`count_split`) and "leaks": one sentence per kind of leak, or of what
        may hide one; empty for a clean split.

    Raises:
        DataError: a part of the split is empty, or there are no labels.
    """
    pixels = equal_slices(cache, progress)
    labels = cache.labels
    found = {
        "labels": label_faults(cache.slices, labels),
        "equal_pixels": _count_equal(cache, pixels),
    }
    if split is None:
        return found
    counts = count_split(split, cache.slices, labels)
    leaks = []
    unknown = int((cache.slices["patient_id"] == "").sum())
    if unknown:
        leaks.append(f"{unknown:,} slices have no PatientID: nobody can tell whose they are")
    for one, other in combinations(SPLITS, 2):
        for group, count in counts["shared"][f"{one}/{other}"].items():
            if count:
                leaks.append(f"{one} and {other} share {count:,} {group}")
        rows = {
            part: set(split.indices(cache.slices, part, labels).tolist()) for part in (one, other)
        }
        across = sum(
            bool(rows[one] & set(group)) and bool(rows[other] & set(group)) for group in pixels
        )
        if across:
            leaks.append(f"{one} and {other} share {across:,} groups of slices with equal pixels")
    return found | {"split": {"name": split.name, **counts}, "leaks": leaks}


def _count_equal(cache: CTCache, groups: list[list[int]]) -> dict:
    slices = cache.slices
    labels = None if cache.labelling is None else slices[list(cache.labels.names)]

    def differ(group: list[int], column: str) -> bool:
        return slices[column].iloc[group].nunique() > 1

    return {
        "groups": len(groups),
        "slices": sum(map(len, groups)),
        "of_different_patients": sum(differ(group, "patient_id") for group in groups),
        "of_different_series": sum(differ(group, "series_uid") for group in groups),
        "with_different_labels": 0
        if labels is None
        else sum(_differ(labels.iloc[group]) for group in groups),
    }


def _differ(labels: pd.DataFrame) -> bool:
    """Return whether rows have different labels, apart from missing ones."""
    known = labels.where(labels != UNLABELLED)
    return bool((known.nunique() > 1).any())


def label_faults(slices: pd.DataFrame, labels: LabelSet = SIX) -> dict:
    """Count labels that contradict each other.

    Args:
        slices: the slice table, with labels.
        labels: which.

    Returns:
        Ready for JSON: "any_without_subtype" and "subtype_without_any" (slices; 0 where no label
        stands for the others), "unlabelled" (slices), "partly_labelled_series", and
        "same_place_other_labels": pairs of neighbouring slices of a series at one position with
        different labels.

    Raises:
        DataError: no labels were joined.
    """
    labelled = is_labelled(slices, labels)
    table = slices[labelled]
    subtype = (table[list(labels.parts)] == 1).any(axis=1)
    positive = subtype if labels.any_label is None else table[labels.any_label] == 1
    # Where one is missing, the two do not contradict each other.
    complete = (table[list(labels.names)] != UNLABELLED).all(axis=1)
    by_series = pd.Series(labelled).groupby(slices["series_uid"].to_numpy())
    step = table.groupby("series_uid", sort=False)["position_mm"].diff()
    known = table[list(labels.names)].astype(float).where(table[list(labels.names)] != UNLABELLED)
    changes = (known.diff().fillna(0) != 0).any(axis=1)
    return {
        "any_without_subtype": int((complete & positive & ~subtype).sum()),
        "subtype_without_any": int((complete & subtype & ~positive).sum()),
        "unlabelled": int((~labelled).sum()),
        "partly_labelled_series": int((by_series.any() & ~by_series.all()).sum()),
        "same_place_other_labels": int(((step.abs() < SAME_POSITION_MM) & changes).sum()),
    }
