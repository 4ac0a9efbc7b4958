"""Who trains, chooses and reports: one patient split per seed, shared by all models, and parts of
its training patients, nested in each other."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd

from ich_keras.data.labels import is_labelled
from ich_keras.data.split import Split, split_by_patient, thesis_slice_split
from ich_keras.data.stratify import stratify
from ich_keras.errors import UsageError
from ich_keras.labels import ANY, LABELS


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
            split = leaky_split(slices, split, seed)
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


def leaky_split(slices: pd.DataFrame, fair: Split, seed: int) -> Split:
    """Split slices one by one as the thesis did, and train on as many positive and as many
    negative ones as a fair split does, so that only the leak differs.

    Args:
        slices: the cache's table.
        fair: the patient split to be put beside.
        seed: of the draw among the training slices.
    """
    split = thesis_slice_split(slices)
    labelled = slices[is_labelled(slices)].set_index("sop_instance_uid")[ANY]
    candidates = labelled[list(split.members["train"])]
    wanted = slices.iloc[fair.indices(slices, "train")][ANY]
    random = np.random.default_rng([seed, 2])
    drawn: list[str] = []
    for value in (0, 1):
        uids = candidates.index[candidates == value].to_numpy(object)
        count = min(int((wanted == value).sum()), len(uids))
        drawn += random.choice(uids, count, replace=False).tolist()
    return dataclasses.replace(
        split,
        members=split.members | {"train": tuple(sorted(drawn))},
        note=f"{len(drawn):,} of {len(candidates):,} training slices, as the patient split has",
    )
