"""Which slices train, which choose (valid), which report (test).

Splits by patient, the thesis's own splits, and the user's lists; see `split_record` for what a
split is, and `split_audit` for who leaks.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ich_keras.data.labels import is_labelled
from ich_keras.data.split_audit import audit
from ich_keras.data.split_lists import split_from_file
from ich_keras.data.split_record import (
    LEAKING,
    NAMES,
    SPLITS,
    Split,
    known_part,
    require_members,
    require_patient_ids,
    require_two_classes,
    series_split,
)
from ich_keras.data.stratify import stratify
from ich_keras.errors import DataError, UsageError
from ich_keras.labels import SIX, LabelSet
from ich_keras.paths import path_of

FRACTIONS = (0.70, 0.15, 0.15)
_FOLD = re.compile(r"fold-(\d{1,4})/(\d{1,4})")


def make_split(
    name_or_path: str | Path, slices: pd.DataFrame, seed: int, labels: LabelSet = SIX
) -> Split:
    """Make a split by name, or read one from a file, and refuse it when it leaks.

    Args:
        name_or_path: "patient", "fold-2/5" (`split_by_fold`), "none", "thesis-slices",
            "thesis-series", a CSV file (see `split_from_file`), or a JSON file that `Split.save`
            wrote.
        slices: the slice table, with labels.
        seed: of the draw; used by "patient" and folds only.
        labels: the label columns.

    Raises:
        UsageError: neither a name nor a file.
        DataError: the split cannot be made, or leaks (see `audit`).

    >>> slices = pd.DataFrame({name: [0, 1] * 10 for name in SIX.names}).assign(
    ...     sop_instance_uid=[f"ID_{number}" for number in range(20)]
    ... )
    >>> for key in ("series_uid", "study_instance_uid", "patient_id"):
    ...     slices[key] = [f"{key}-{number // 2}" for number in range(20)]  # ten patients
    >>> split = make_split("patient", slices, seed=0)
    >>> split
    Split('patient', seed=0, series_uid: train 7, valid 2, test 1)
    >>> split.indices(slices, "valid").tolist()
    [2, 3, 12, 13]
    """
    split = find_split(name_or_path, slices, seed, labels)
    audit(split, slices, labels)
    return split


def find_split(
    name_or_path: str | Path, slices: pd.DataFrame, seed: int, labels: LabelSet = SIX
) -> Split:
    """Make or read a split as `make_split` does, without checking whether it leaks."""
    name = str(path_of(str(name_or_path), "split"))
    if name == "patient":
        split = split_by_patient(slices, seed, labels=labels)
    elif (found := _FOLD.fullmatch(name)) is not None:
        split = split_by_fold(slices, seed, int(found[1]), int(found[2]), labels)
    elif name == "none":
        split = split_none(slices, labels)
    elif name == "thesis-slices":
        split = thesis_slice_split(slices, labels)
    elif name == "thesis-series":
        split = thesis_series_split(slices, labels)
    elif Path(name).is_file():
        is_ours = Path(name).suffix == ".json"
        split = (
            known_part(Split.load(name), slices, labels)
            if is_ours
            else split_from_file(name, slices, labels)
        )
    else:
        near = difflib.get_close_matches(name, NAMES, n=1)
        guess = f"Did you mean {near[0]!r}? " if near else ""
        raise UsageError(
            f"split {name!r} is neither a known name nor a file.",
            f"{guess}Known: {', '.join(NAMES)}, fold-1/5, or a CSV file, or a split saved as JSON.",
        )
    return split


def split_by_patient(
    slices: pd.DataFrame,
    seed: int,
    fractions: Sequence[float] = FRACTIONS,
    labels: LabelSet = SIX,
) -> Split:
    """Split into train, valid and test by patient, alike in all labels and in size.

    A patient is positive for a label when any of its slices is; see `stratify`. The result depends
    on the seed and the data, not on the order of rows.

    Args:
        slices: the slice table, with labels.
        seed: of the draw.
        fractions: of patients in train, valid and test; positive, summing to 1.
        labels: the label columns.

    Raises:
        UsageError: the fractions are unusable.
        DataError: a PatientID is missing, there are fewer than three patients, or the slices are
            all positive or all negative.
    """
    is_usable = len(fractions) == len(SPLITS) and min(fractions) > 0
    if not (is_usable and abs(sum(fractions) - 1) < 1e-9):
        raise UsageError(
            f"split fractions {tuple(fractions)} are unusable.",
            "Give three positive numbers that sum to 1.",
        )
    parts, series = _parts_of_patients(slices, seed, np.array(fractions), labels)
    names = parts.map(lambda part: SPLITS[part])
    return series_split("patient", seed, series["series_uid"], series["patient_id"].map(names))


def split_by_fold(
    slices: pd.DataFrame, seed: int, fold: int, of: int, labels: LabelSet = SIX
) -> Split:
    """Split for cross-validation: one part of the patients for testing, the next for validation.

    The parts are alike in all labels and in size; see `stratify`. With one seed, each patient is in
    the test split of exactly one fold.

    Args:
        slices: the slice table, with labels.
        seed: of the draw.
        fold: which, from 1.
        of: how many there are, 3 or more.
        labels: the label columns.

    Raises:
        UsageError: there is no such fold.
        DataError: as `split_by_patient`, with as many patients as folds.
    """
    if not (of >= len(SPLITS) and 1 <= fold <= of):
        raise UsageError(
            f"fold {fold} of {of}; expected three folds or more, and one of them.",
            "The first of five folds is 1/5.",
        )
    parts, series = _parts_of_patients(slices, seed, np.full(of, 1 / of), labels)
    test, valid = fold - 1, fold % of
    names = parts.map(lambda part: {test: "test", valid: "valid"}.get(part, "train"))
    members = series["patient_id"].map(names)
    return series_split(f"fold-{fold}/{of}", seed, series["series_uid"], members)


def _parts_of_patients(
    slices: pd.DataFrame, seed: int, fractions: np.ndarray, labels: LabelSet
) -> tuple[pd.Series, pd.DataFrame]:
    """Divide patients: return the part of each, by patient_id, and the table of their series."""
    labelled = slices[is_labelled(slices, labels)]
    require_patient_ids(labelled)
    require_two_classes(labelled, labels)
    by_patient = labelled.groupby("patient_id", sort=True)
    positive = (by_patient[list(labels.names)].max().to_numpy() == 1).astype(np.int64)
    num_slices = by_patient.size().to_numpy()
    if len(num_slices) < len(fractions):
        count, hint = "three splits need at least three", "Add patients"
        if len(fractions) > len(SPLITS):
            count = f"{len(fractions)} folds need as many"
            hint = f"{hint}, or take fewer folds"
        raise DataError(
            f"{len(num_slices)} patient(s) with labels; {count}.",
            f"{hint}, or overfit deliberately with --split none.",
        )
    parts = stratify(positive, num_slices, fractions, np.random.default_rng(seed))
    series = labelled[["series_uid", "patient_id"]].drop_duplicates()
    return pd.Series(parts, index=by_patient.size().index), series


def split_none(slices: pd.DataFrame, labels: LabelSet = SIX) -> Split:
    """Put every labelled slice into train, valid and test alike, for deliberate overfitting."""
    series = slices.loc[is_labelled(slices, labels), "series_uid"].unique()
    everything = tuple(sorted(series))
    require_members({"train": everything}, "none")
    return Split("none", None, "series_uid", dict.fromkeys(SPLITS, everything), LEAKING["none"])


def thesis_slice_split(slices: pd.DataFrame, labels: LabelSet = SIX) -> Split:
    """Split slices two ways as the thesis did for its 2D network.

    Imitated: single slices, not patients, are split; sorted by image ID (SOPInstanceUID); the
    first 80 % train, rounded down (602,242 of RSNA's 752,803); the others (150,561) both choose
    the model and give the reported numbers. Not imitated: that its unreadable files became zeros.
    """
    return _two_way_split("thesis-slices", slices, "sop_instance_uid", labels)


def thesis_series_split(slices: pd.DataFrame, labels: LabelSet = SIX) -> Split:
    """Split series two ways as the thesis did for its 3D network.

    Imitated: whole series, not patients, are split, in their order (here: sorted by series UID);
    the first 80 % train, rounded down (5,400 of its 6,750); the others (1,350) both choose the
    model and give the reported numbers. Not imitated: which 6,750 series it had.
    """
    return _two_way_split("thesis-series", slices, "series_uid", labels)


def _two_way_split(name: str, slices: pd.DataFrame, key: str, labels: LabelSet) -> Split:
    labelled = slices[is_labelled(slices, labels)]
    require_two_classes(labelled, labels)
    uids = sorted(labelled[key].unique())
    num_train = len(uids) * 4 // 5
    held_out = tuple(uids[num_train:])
    members = {"train": tuple(uids[:num_train]), "valid": held_out, "test": held_out}
    require_members(members, name)
    return Split(name, None, key, members, LEAKING[name])
