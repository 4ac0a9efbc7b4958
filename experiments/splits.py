"""Which patients train, choose the epoch and are reported: one patient split per seed, shared by
all models, and nested parts of its training patients."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd

from ich_keras.data.labels import is_labelled
from ich_keras.data.split import Split, split_by_patient
from ich_keras.data.stratify import stratify
from ich_keras.errors import UsageError
from ich_keras.labels import LABELS

LEAKY_PART = 0.8  # of the slices that train; the thesis's
# In a work folder. When a rule below changes, so must this name: old files are left behind.
FOLDER = "splits-2"


def split_path(
    folder: Path, name: str, slices: pd.DataFrame, seed: int, fraction: float = 1.0
) -> str:
    """Return the value of a run's `data.split`: a name that the library knows, or a split file,
    which is written when it is missing.

    Args:
        folder: where split files lie.
        name: as `Run.split`.
        slices: the cache's table.
        seed: of the patient split.
        fraction: of its training patients.
    """
    if name.startswith("thesis-"):
        return name
    part = "" if fraction == 1 else f"-{fraction:g}"
    path = folder / f"{name}-s{seed}{part}.json"
    if not path.is_file():
        split = split_by_patient(slices, seed)
        if name == "leaky":
            split = leaky_split(slices, split)
        elif fraction != 1:
            split = with_fraction(split, slices, fraction)
        split.save(path)
    return str(path)


def with_fraction(split: Split, slices: pd.DataFrame, fraction: float) -> Split:
    """Keep a part of the training patients, stratified over the labels; validation and test stay.

    The patients are halved repeatedly with the split's seed, so that a smaller part lies inside
    each larger one.

    Args:
        split: by patient.
        slices: the table it was made for.
        fraction: one half, one quarter, ...

    Raises:
        UsageError: not a power of one half.
    """
    halvings = -math.log2(fraction) if fraction > 0 else math.nan
    if not (halvings >= 0 and halvings == int(halvings)):
        raise UsageError(f"fraction {fraction}; expected 1, 1/2, 1/4, ...")
    table = slices.iloc[split.indices(slices, "train")]
    by_patient = table.groupby("patient_id", sort=True)
    positive = by_patient[list(LABELS)].max().to_numpy(np.int64)
    sizes = by_patient.size()
    kept = np.arange(len(sizes))
    random = np.random.default_rng([split.seed or 0, 1])
    for _ in range(int(halvings)):
        parts = stratify(positive[kept], sizes.to_numpy()[kept], np.array([0.5, 0.5]), random)
        kept = kept[parts == 0]
    is_kept = table["patient_id"].isin(sizes.index[kept])
    members = split.members | {"train": tuple(sorted(set(table.loc[is_kept, split.key])))}
    note = f"{fraction:g} of the training patients"
    return dataclasses.replace(split, members=members, note=note)


def leaky_split(slices: pd.DataFrame, fair: Split) -> Split:
    """Split slices one by one, as the thesis did, of as many patients as a fair split trains on.

    These patients are all test patients of the fair split, and others drawn from its training
    patients. Four fifths of their slices, drawn one by one, train. Of the remaining slices, those
    of the fair split's test patients are tested, and the others choose the model. Compared with
    the fair split's model, only the leak favours this one: it sees as many patients, and one slice
    in five fewer.

    Args:
        slices: the cache's table.
        fair: the patient split to compare with, which has a seed.
    """
    patients = slices["patient_id"]
    train, test = (
        np.unique(patients.iloc[fair.indices(slices, part)].astype(str))
        for part in ("train", "test")
    )
    random = np.random.default_rng([fair.seed or 0, 2])
    others = random.choice(train, max(0, len(train) - len(test)), replace=False)
    rows = random.permutation(np.flatnonzero(patients.isin([*test, *others]) & is_labelled(slices)))
    chosen, held_out = np.split(rows, [round(len(rows) * LEAKY_PART)])
    is_tested = patients.iloc[held_out].isin(test).to_numpy()
    uids = slices["sop_instance_uid"].to_numpy()
    parts = {"train": chosen, "valid": held_out[~is_tested], "test": held_out[is_tested]}
    return Split(
        "thesis-slices",
        fair.seed,
        "sop_instance_uid",
        {part: tuple(sorted(uids[rows])) for part, rows in parts.items()},
        "slices are split one by one: training has other slices of the test patients; the metrics"
        " are too good.",
        f"slices of {len(test) + len(others):,} patients, as many as the patient split trains on",
    )
