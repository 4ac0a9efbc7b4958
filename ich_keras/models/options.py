"""The settings of a network and of its training that are given by name or number.

Each table says once what is allowed; `require_choice` and `require_in_range` refuse the rest. Keras
is not imported: the command line reads these tables for its help.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ich_keras.errors import UsageError
from ich_keras.labels import RSNA_WEIGHTS

NORMS = ("batch", "frozen", "group")
# Whose statistics batch normalisation takes where several processes train.
PER_PROCESS, SYNCHRONISED = BATCH_NORMS = ("per-process", "synchronised")
# What a classifier gives: sigmoids, or the numbers before them.
OUTPUTS = ("probabilities", "logits")
SCHEDULES = ("constant", "cosine")
# The steps of `fit`: ours, or Keras' own; see `ich_keras.models.steps`.
STEPS = ("fast", "stock")
# What can be frozen while the rest is trained: everything up to and including that part.
FREEZABLE = ("stem", "layer1", "layer2", "layer3", "layer4")
# What may be computed twice to save memory. All layers of one such part share this beginning of
# their names.
RECOMPUTE = {"stage": r"layer\d+(?=_)", "block": r"layer\d+_\d+(?=_)"}
# Keras' policy of each precision.
PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}
# The weight of each label in the loss; None weighs all alike.
LOSSES: dict[str, tuple[float, ...] | None] = {"bce": None, "rsna": RSNA_WEIGHTS}

CHOICES: Mapping[str, tuple[str, ...]] = {
    "batch_norm": BATCH_NORMS,
    "freeze": FREEZABLE,
    "loss": tuple(LOSSES),
    "norm": NORMS,
    "output": OUTPUTS,
    "precision": tuple(PRECISIONS),
    "recompute": tuple(RECOMPUTE),
    "schedule": SCHEDULES,
    "step": STEPS,
}


@dataclass(frozen=True)
class Range:
    """The numbers that a setting takes.

    Args:
        least: the lower end.
        most: the upper end; infinity itself is never taken.
        is_open: whether `least` itself is refused.
    """

    least: float
    most: float = math.inf
    is_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.least < value if self.is_open else self.least <= value
        return above and value <= self.most and value < math.inf

    def __str__(self) -> str:
        if math.isinf(self.most):
            return (
                f"a number above {self.least}"
                if self.is_open
                else (f"a number of at least {self.least}")
            )
        lower = f"above {self.least}" if self.is_open else f"at least {self.least}"
        return f"{lower}, at most {self.most}"


RANGES: Mapping[str, Range] = {
    "accumulate": Range(1, 10**6),
    "backbone_factor": Range(0, 1, is_open=True),
    "learning_rate": Range(0, is_open=True),
    "warmup_steps": Range(0, 10**9),
    "weight_decay": Range(0),
}


def require_choice(
    name: str, value: str | None, place: str = "", also: tuple[str, ...] = ()
) -> None:
    """Refuse a name that a setting does not know.

    Args:
        name: a key of `CHOICES`.
        value: what was given. None is refused like any unknown name: where a setting may be left
            out, do not ask.
        place: what the message calls the setting, such as "fit.step"; "" takes its name.
        also: names that are allowed here beside those of the table, such as "auto"; the message
            lists them first.

    Raises:
        UsageError: with the names that are known.

    >>> require_choice("schedule", "cosine")
    >>> require_choice("schedule", "linear", place="fit.schedule")
    Traceback (most recent call last):
        ...
    ich_keras.errors.UsageError: fit.schedule is 'linear'; expected one of constant, cosine.
    """
    known = (*also, *CHOICES[name])
    if value not in known:
        raise UsageError(f"{place or name} is {value!r}; expected one of {', '.join(known)}.")


def require_in_range(name: str, value: float, place: str = "") -> None:
    """Refuse a number that a setting does not take; NaN is refused everywhere.

    Args:
        name: a key of `RANGES`.
        value: what was given.
        place: what the message calls the setting, such as "fit.accumulate"; "" takes its name.

    Raises:
        UsageError: with the range.

    >>> require_in_range("backbone_factor", 0.1)
    >>> require_in_range("backbone_factor", 1.5)
    Traceback (most recent call last):
        ...
    ich_keras.errors.UsageError: backbone_factor is 1.5; expected above 0, at most 1.
    """
    if value not in RANGES[name]:
        raise UsageError(f"{place or name} is {value}; expected {RANGES[name]}.")
