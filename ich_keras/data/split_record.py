"""What a split is: UIDs per part, in one JSON file, and what every part needs.

A split names series (or single slices) by UID, never patients: the file lies in the run folder,
and a PatientID has no business there. Slices without labels belong to no split.
"""

import dataclasses
from collections.abc import Mapping, Sized
from pathlib import Path

import numpy as np
import pandas as pd

from ich_keras import files
from ich_keras.data.csv_rows import FAULTS_SHOWN, first_few
from ich_keras.data.labels import is_labelled, is_positive
from ich_keras.errors import DataError, UsageError
from ich_keras.labels import SIX, LabelSet

SPLITS = ("train", "valid", "test")
_SCHEMA = 1

# Chosen by these names, a split may leak; whoever sees its numbers sees the warning too.
LEAKING = {
    "none": (
        "split 'none': training, validation and test use the same slices (deliberate overfitting); "
        "the metrics say nothing about other patients."
    ),
    "thesis-slices": (
        "split 'thesis-slices': slices are split one by one as in the thesis, so that nearly every "
        "held-out series has neighbouring slices in training, and the test slices also choose the "
        "model; the metrics are too good."
    ),
    "thesis-series": (
        "split 'thesis-series': series are split as in the thesis, so that training and test can "
        "share patients, and the test series also choose the model; the metrics are too good."
    ),
}
NAMES = ("patient", *LEAKING)


@dataclasses.dataclass(frozen=True, repr=False)
class Split:
    """Which series or slices belong to train, valid and test.

    Attributes:
        name: one of `NAMES`, or "file:<file name>".
        seed: of the draw; None if nothing was drawn.
        key: the column of the slice table that `members` name: series_uid or sop_instance_uid.
        members: per split a sorted tuple of UIDs.
        warning: what is wrong with the metrics of such a split; "" for a clean one.
        note: what was left out, with counts; "" if nothing was.

    >>> Split("patient", 0, "series_uid", {"train": ("a", "b"), "valid": ("c",), "test": ("d",)})
    Split('patient', seed=0, series_uid: train 2, valid 1, test 1)
    """

    name: str
    seed: int | None
    key: str
    members: dict[str, tuple[str, ...]]
    warning: str = ""
    note: str = ""

    def __repr__(self) -> str:
        counts = ", ".join(f"{part} {len(self.members[part]):,}" for part in SPLITS)
        return f"Split({self.name!r}, seed={self.seed}, {self.key}: {counts})"

    def indices(self, slices: pd.DataFrame, part: str, labels: LabelSet = SIX) -> np.ndarray:
        """Return the positions of a split's labelled slices, ascending.

        Args:
            slices: the table the split was made for, or one of the same UIDs in any order.
            part: "train", "valid" or "test".
            labels: the label columns.

        Returns:
            int64 (slices of this part,), positions of rows.
        """
        if part not in SPLITS:
            raise UsageError(f"unknown split {part!r}.", f"Known: {', '.join(SPLITS)}.")
        member = slices[self.key].isin(self.members[part]).to_numpy(bool)
        return np.flatnonzero(member & is_labelled(slices, labels))

    def save(self, path: Path | str) -> None:
        """Write the split as JSON, in one step."""
        files.write_json(path, {"schema": _SCHEMA, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: Path | str) -> "Split":
        """Read a split that `save` wrote.

        Raises:
            StaleError: the file is absent or is not JSON.
            DataError: it is not a split of this version, or has a name of `LEAKING` and no warning.
        """
        content = files.read_json(path)
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(content, dict) or content.get("schema") != _SCHEMA:
            raise DataError(
                f"{path} is not a split file of schema {_SCHEMA}.", "Save the split again."
            )
        if set(content) != names | {"schema"} or not (
            isinstance(content["members"], dict) and set(content["members"]) == set(SPLITS)
        ):
            raise DataError(
                f"{path} lacks fields of a split, or has others.", "Save the split again."
            )
        del content["schema"]
        _check_content(content, path)
        content["members"] = {part: tuple(content["members"][part]) for part in SPLITS}
        if content["name"] in LEAKING and not content["warning"].strip():
            # By that name it would pass unchecked, and nobody who sees its numbers would know.
            raise DataError(
                f"{path} is called {content['name']!r}, which leaks, and has no warning.",
                "Save the split again, or give it another name.",
            )
        return cls(**content)


def _check_content(content: dict, path: Path | str) -> None:
    texts = ("name", "warning", "note")
    is_ours = (
        content["key"] in ("series_uid", "sop_instance_uid")
        and all(isinstance(content[field], str) for field in texts)
        and (content["seed"] is None or type(content["seed"]) is int)
        and all(
            isinstance(uids, list) and all(isinstance(uid, str) for uid in uids)
            for uids in content["members"].values()
        )
    )
    if not is_ours:
        raise DataError(
            f"{path} holds values of the wrong kind for a split.", "Save the split again."
        )


def known_part(split: Split, slices: pd.DataFrame, labels: LabelSet = SIX) -> Split:
    """Return a split that was read from a file, with what does not fit the slices in its note.

    Raises:
        DataError: none of its UIDs is that of a labelled slice.
    """
    labelled = slices.loc[is_labelled(slices, labels), split.key]
    members = set().union(*split.members.values())
    unknown, unnamed = len(members - set(labelled)), int((~labelled.isin(members)).sum())
    if unknown == len(members):
        raise DataError(
            f"split {split.name!r}: none of its {len(members):,} values of {split.key} belongs to a"
            " labelled slice.",
            "Give the split that belongs to these DICOM files.",
        )
    notes = [
        (unknown, f"of {len(members):,} values of {split.key} belong to no labelled slice"),
        (
            unnamed,
            f"labelled slice{'' if unnamed == 1 else 's'} that the split does not name, left out",
        ),
    ]
    # A split that left slices out when it was made says so already.
    new = [
        f"{count:,} {what}"
        for count, what in notes
        if count and f"{count:,} labelled slices" not in split.note
    ]
    return dataclasses.replace(split, note="; ".join([split.note, *new]).removeprefix("; "))


def series_split(name: str, seed: int | None, series: pd.Series, parts: pd.Series) -> Split:
    """Return a split of whole series.

    Args:
        name, seed: as in `Split`.
        series: str (n,), series UIDs.
        parts: str (n,), the part of each.

    Raises:
        DataError: a part is empty.
    """
    members = members_of(series, parts)
    require_members(members, name)
    return Split(name, seed, "series_uid", members)


def members_of(uids: pd.Series, parts: pd.Series) -> dict[str, tuple[str, ...]]:
    """Return the sorted UIDs of each part."""
    return {part: tuple(sorted(uids[(parts == part).to_numpy()])) for part in SPLITS}


def require_members(members: Mapping[str, Sized], name: str) -> None:
    """Refuse a split with an empty part.

    Raises:
        DataError: names the empty parts.
    """
    empty = [part for part, uids in members.items() if not len(uids)]
    if empty:
        raise DataError(
            f"split {name!r}: {' and '.join(empty)} would hold no labelled slice.",
            "Every part needs some: add data or change the split.",
        )


def require_patient_ids(slices: pd.DataFrame) -> None:
    """Refuse slices without a PatientID: nobody could tell whether a patient is in two parts.

    Raises:
        DataError: counts them and names the first few images.
    """
    missing = slices.loc[slices["patient_id"] == "", "sop_instance_uid"]
    if len(missing):
        examples = first_few(list(missing[:FAULTS_SHOWN]), len(missing))
        raise DataError(
            f"{len(missing):,} of {len(slices):,} slices have no PatientID (0010,0020), so that "
            f"nobody can tell whose they are: {examples}.",
            "Restore the tag, remove these files, or overfit deliberately with --split none.",
        )


def require_two_classes(labelled: pd.DataFrame, labels: LabelSet = SIX) -> None:
    """Refuse labels that are all alike.

    Raises:
        DataError: all slices are positive, or all are negative; or all have the same labels, where
            none stands for the others.
    """
    values = labelled[list(labels.names)].to_numpy()
    if labels.any_column is None:
        only = "alike" if len(np.unique(values, axis=0)) < 2 else ""
    else:
        num_positive = int(is_positive(values, labels).sum())
        only = {0: "negative", len(labelled): "positive"}.get(num_positive, "")
        only += f" (label {labels.any_label})" if only else ""
    if only:
        raise DataError(
            f"all {len(labelled):,} labelled slices are {only}; there is nothing to tell apart.",
            "Add the other class, or overfit deliberately with --split none.",
        )
