"""What a network answers: names and order of its labels. The six of RSNA are the default.

Source of the six: RSNA 2019 Brain CT Hemorrhage Challenge, `stage_2_train.csv` (Flanders et al.,
Radiology: Artificial Intelligence 2020;2(3):e190211). `any` is the OR of the five subtypes in every
row.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ich_keras.errors import UsageError

SUBTYPES = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
ANY = "any"
LABELS = (*SUBTYPES, ANY)
NUM_LABELS = len(LABELS)
# In label tables: nobody said.
UNLABELLED = -1

MAX_LABELS = 1000
# Labels become columns of tables and parts of file names.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}(?: [A-Za-z0-9_.+-]{1,63})*")
_MAX_NAME = 64
_PREFIXES = ("true_", "raw_", "unsmoothed_", "decision_", "group_")


@dataclass(frozen=True)
class LabelSet:
    """Names of labels, in the order of a network's outputs.

    Args:
        names: one for each output; letters, digits, "_", ".", "+", "-" and single spaces.
        any_label: the label that is 1 where any of the others is; None if there is none.
        exclusive: whether exactly one label is 1 in every sample (a softmax); otherwise each is
            answered on its own (sigmoids).

    Raises:
        UsageError: no names, too many, unusable or repeated ones; `any_label` is not among them, or
            they are exclusive.

    >>> LabelSet(("fracture", "bleed")).index("bleed"), SIX.any_column
    (1, 5)
    """

    names: tuple[str, ...]
    any_label: str | None = None
    exclusive: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.names, str) or not isinstance(self.names, Sequence):
            raise UsageError(
                f"labels {self.names!r}; expected a sequence of names.",
                'Give ("one",) for one label.',
            )
        object.__setattr__(self, "names", tuple(self.names))
        if not 1 <= len(self.names) <= MAX_LABELS:
            raise UsageError(f"{len(self.names)} labels; expected 1 to {MAX_LABELS}.")
        for name in self.names:
            if not isinstance(name, str) or len(name) > _MAX_NAME or not _NAME.fullmatch(name):
                raise UsageError(
                    f"label {name!r} is no usable name.",
                    f"Use up to {_MAX_NAME} letters, digits, '_', '.', '+', '-' and single spaces.",
                )
            if name.startswith(_PREFIXES):
                raise UsageError(
                    f"label {name!r} begins as columns of results do ({', '.join(_PREFIXES)}).",
                    "Give it another name.",
                )
        repeated = [name for name in self.names if self.names.count(name) > 1]
        if repeated:
            raise UsageError(f"label {repeated[0]!r} is given {len(repeated)} times.")
        if self.any_label is not None and self.any_label not in self.names:
            raise UsageError(f"any_label {self.any_label!r} is not one of the labels ({self}).")
        if self.exclusive and (self.any_label is not None or len(self.names) < 2):
            raise UsageError(
                "exclusive labels are two or more, of which exactly one is 1 in every sample; none"
                f" of them stands for the others: got {self}.",
                "Give labels that are not exclusive"
                + (", or more of them." if self.any_label is None else ", or leave any_label out."),
            )

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        return ", ".join(self.names)

    @property
    def parts(self) -> tuple[str, ...]:
        """The labels without `any_label`."""
        return tuple(name for name in self.names if name != self.any_label)

    @property
    def any_column(self) -> int | None:
        """The place of `any_label`; None if there is none."""
        return None if self.any_label is None else self.index(self.any_label)

    @property
    def shown(self) -> str:
        """The label that stands for all where only one is shown: `any_label`, or the first."""
        return self.any_label or self.names[0]

    @property
    def competition_weights(self) -> tuple[float, ...] | None:
        """Weights that count `any_label` twice, as the competition's log loss; None without it.

        For the six: 1 1 1 1 1 2, divided by 7.
        """
        if self.any_label is None:
            return None
        return tuple(2.0 if name == self.any_label else 1.0 for name in self.names)

    def index(self, name: str) -> int:
        """Return the place of a label.

        Raises:
            UsageError: it is not one of them.
        """
        if name not in self.names:
            raise UsageError(f"label {name!r} is unknown; expected one of {self}.")
        return self.names.index(name)

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads, for JSON."""
        return {
            "names": list(self.names),
            "any_label": self.any_label,
            "exclusive": self.exclusive,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any] | None) -> Self:
        """Read a record; None stands for the six, which older records do not mention.

        Raises:
            UsageError: it is not one that `to_dict` made.
        """
        if record is None:
            return cls(LABELS, ANY)
        kinds: dict[str, Any] = {
            "names": list,
            "any_label": (str, type(None)),
            "exclusive": bool,
        }
        if set(record) != set(kinds) or not all(
            isinstance(record[name], kind) for name, kind in kinds.items()
        ):
            raise UsageError(f"labels {record!r}; expected {', '.join(kinds)}.")
        return cls(tuple(record["names"]), record["any_label"], record["exclusive"])


SIX = LabelSet(LABELS, ANY)
RSNA_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0, 2.0)


def label_set(labels: "LabelSet | Sequence[str] | int | None", exclusive: bool = False) -> LabelSet:
    """Return a label set for what a person gives.

    Args:
        labels: a LabelSet; names, of which "any" (if it is there, with others, and they are not
            exclusive) stands for the others; a number of labels, which get the names "class_0",
            "class_1", ...; None for the six.
        exclusive: see `LabelSet`; a LabelSet says so itself.

    Raises:
        UsageError: they cannot be used.

    >>> label_set(("epidural", "any")).any_label, label_set(3, exclusive=True).names
    ('any', ('class_0', 'class_1', 'class_2'))
    """
    if isinstance(labels, LabelSet):
        if exclusive and not labels.exclusive:
            raise UsageError(
                "exclusive is given beside a LabelSet that is not exclusive.",
                "Say so there: LabelSet(names, exclusive=True).",
            )
        return labels
    if labels is None:
        if exclusive:
            raise UsageError("the six labels of RSNA are not exclusive.", "Give labels.")
        return SIX
    if isinstance(labels, int) and not isinstance(labels, bool):
        return LabelSet(tuple(f"class_{n}" for n in range(labels)), exclusive=exclusive)
    found = LabelSet(labels, exclusive=exclusive)  # type: ignore[arg-type]  # it checks
    if ANY in found.names and len(found) > 1 and not exclusive:
        return LabelSet(found.names, ANY)
    return found


# What one row of a label table is of -> the column of the slice table that names it.
LEVELS = {
    "slice": "sop_instance_uid",
    "series": "series_instance_uid",
    "study": "study_instance_uid",
    "patient": "patient_id",
}


@dataclass(frozen=True)
class Labelling:
    """Which labels the tables of a data set have, and of what.

    Args:
        labels: the label columns.
        level: of `LEVELS`. Labels of series, studies or patients stand in the row of every slice,
            and say nothing about it alone: slices and slabs cannot be trained with them.

    Raises:
        UsageError: an unknown level.
    """

    labels: LabelSet = SIX
    level: str = "slice"

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise UsageError(f"label level {self.level!r}; expected one of {', '.join(LEVELS)}.")

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads, for JSON."""
        return {"labels": self.labels.to_dict(), "level": self.level}

    @classmethod
    def from_dict(cls, record: dict | None) -> Self:
        """Read a record; None stands for RSNA's labels of slices, as in older caches."""
        if record is None:
            return cls()
        return cls(LabelSet.from_dict(record["labels"]), record["level"])


RSNA_LABELLING = Labelling()


@dataclass(frozen=True)
class LabelSource:
    """A label file, and what a person says about it; `ich_keras.data.label_files` reads it.

    Args:
        path: the file.
        label_map, exclusive: see `read_labels` there.
    """

    path: Path
    label_map: str | None = None
    exclusive: bool = False

    def words(self) -> list[str]:
        """Return the options of the command line that name it."""
        words = ["--labels", str(self.path)]
        words += [] if self.label_map is None else ["--label-map", self.label_map]
        return [*words, "--exclusive"] if self.exclusive else words
