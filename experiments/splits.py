"""Who trains, chooses and reports: one patient split per seed, shared by all models, and parts of
its training patients, nested in each other."""

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
# In a work folder. Another name when a rule below changes: files made by the old one stay behind.
FOLDER = "splits-2"


def split_path(
    folder: Path, name: str, slices: pd.DataFrame, seed: int, fraction: float = 1.0
) -> str:
    """Return what `data.split` of a run is: a name of the library's, or the file of a split that
    is made when it is not there.

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

    Halved again and again with the split's seed, so that the smaller part is inside the larger.

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

    All test patients of the fair split are among these, the others are drawn from its training
    patients. Of all slices, drawn one by one, four fifths train. The others are tested where they
    belong to test patients of the fair split, and choose the model where they do not: beside the
    fair split's model, nothing but the leak is in favour of this one, which sees as many patients
    and one slice in five fewer.

    Args:
        slices: the cache's table.
        fair: the patient split to be put beside, with a seed.
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
