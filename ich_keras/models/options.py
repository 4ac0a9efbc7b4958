"""The settings of a network and of its training that are given by name or number.

Each table says once what is allowed; `require_choice` and `require_in_range` refuse the rest. Keras
is not imported: the command line reads these tables for its help.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from ich_keras.errors import UsageError
from ich_keras.labels import LabelSet

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
RECOMPUTE = {"stage": r"layer\d+(?=_)", "block": r"layer\d+_[a-z]*\d+(?=_)"}
# Keras' policy of each precision.
PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}
# How learnable windows end: cut off like fixed ones, or smoothly.
WINDOW_KINDS = ("linear", "sigmoid")
# "rsna" is "bce" with the weights of the competition; see `ich_keras.models.loss`.
LOSSES = ("bce", "rsna", "focal", "asymmetric")
# The settings that belong to one loss alone, and their defaults; their ranges are in `RANGES`.
LOSS_SETTINGS: dict[str, dict[str, float | None]] = {
    # As Lin et al. 2017, without the balance by alpha.
    "focal": {"focal_gamma": 2.0, "focal_alpha": None},
    # As Ridnik et al. 2021, section 4.
    "asymmetric": {"gamma_positive": 0.0, "gamma_negative": 4.0, "margin": 0.05},
}

CHOICES: Mapping[str, tuple[str, ...]] = {
    "batch_norm": BATCH_NORMS,
    "freeze": FREEZABLE,
    "loss": LOSSES,
    "norm": NORMS,
    "output": OUTPUTS,
    "precision": tuple(PRECISIONS),
    "recompute": tuple(RECOMPUTE),
    "schedule": SCHEDULES,
    "step": STEPS,
    "windows": WINDOW_KINDS,
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
    "ema": Range(0, 0.999999, is_open=True),
    "focal_alpha": Range(0, 1, is_open=True),
    "focal_gamma": Range(0, 100),
    "gamma_negative": Range(0, 100),
    "gamma_positive": Range(0, 100),
    "label_weight": Range(0, 1e6, is_open=True),
    "learning_rate": Range(0, is_open=True),
    "margin": Range(0, 0.5),
    "positive_weight": Range(0, 1e6, is_open=True),
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


def require_whole(name: str, value: object, least: int, most: int) -> None:
    """Refuse what is no whole number within a range.

    Raises:
        UsageError: with the range.

    >>> require_whole("depth", 2, 1, 16)
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UsageError(f"{name} is {value!r}; expected a whole number {least} to {most}.")


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


@dataclass(frozen=True)
class LossSettings:
    """What a training asks of its loss.

    Args:
        loss: one of `LOSSES`.
        label_weight: label -> its weight in the average over labels; those not named have 1.
        positive_weight: label -> factor of the loss where the label is 1; those not named have 1.
        focal_gamma, focal_alpha: of `FocalLoss`; None takes 2, and no alpha.
        gamma_positive, gamma_negative, margin: of `AsymmetricLoss`; None takes 0, 4 and 0.05.
    """

    loss: str = "bce"
    label_weight: Mapping[str, float] | None = None
    positive_weight: Mapping[str, float] | None = None
    focal_gamma: float | None = None
    focal_alpha: float | None = None
    gamma_positive: float | None = None
    gamma_negative: float | None = None
    margin: float | None = None

    def decided(self) -> dict[str, float | None]:
        """Return the settings of this loss alone, with the defaults of those not given."""
        defaults = LOSS_SETTINGS.get(self.loss, {})
        given = {name: getattr(self, name) for name in defaults}
        return {name: defaults[name] if given[name] is None else given[name] for name in defaults}

    def require_sound(self, labels: LabelSet | None = None, place: str = "") -> None:
        """Refuse settings that do not fit the loss, and a loss that does not fit the labels.

        Args:
            labels: what the network answers; None while that is not known.
            place: what stands before a setting's name in messages, such as "fit.".

        Raises:
            UsageError: an unknown loss or label, a number out of range, a setting of another loss,
                or a loss that these labels have not.
        """
        require_choice("loss", self.loss, f"{place}loss")
        for loss, names in LOSS_SETTINGS.items():
            for name in names:
                value = getattr(self, name)
                if value is not None:
                    _require_of_loss(f"{place}{name}", self.loss, loss)
                    require_in_range(name, value, f"{place}{name}")
        for name in ("label_weight", "positive_weight"):
            _require_weights(name, getattr(self, name), labels, place)
        if self.label_weight and self.loss == "rsna":
            raise UsageError(
                f"{place}label_weight with loss {self.loss!r}, which has label weights of its own.",
                "Leave one of them out; 'rsna' is 'bce' with label_weight any=2.",
            )
        if labels is not None:
            self._require_for(labels, place)

    def _require_for(self, labels: LabelSet, place: str) -> None:
        if self.loss == "rsna" and labels.any_label is None:
            raise UsageError(
                f"{place}loss 'rsna' counts the label twice that stands for the others; of"
                f" {labels}, none does.",
                "Take the loss 'bce'.",
            )
        if labels.exclusive and self.loss != "bce":
            raise UsageError(
                f"{place}loss {self.loss!r} is for labels that are answered each on its own; these"
                " are exclusive.",
                "Take the loss 'bce', which is then the cross-entropy of a softmax.",
            )
        if labels.exclusive and self.positive_weight:
            raise UsageError(
                f"{place}positive_weight means nothing for exclusive labels.",
                "Take label_weight, which weighs samples by their true label.",
            )


def _require_of_loss(setting: str, loss: str, wanted: str) -> None:
    if loss != wanted:
        raise UsageError(
            f"{setting} belongs to the loss {wanted!r}; this one is {loss!r}.",
            f"Leave it out, or take the loss {wanted!r}.",
        )


def _require_weights(name: str, weights: object, labels: LabelSet | None, place: str) -> None:
    if weights is None:
        return
    if not isinstance(weights, Mapping):
        raise UsageError(
            f"{place}{name} is {weights!r}; expected a number per label.",
            "For instance {'any': 3}.",
        )
    for label, value in weights.items():
        if labels is not None and label not in labels.names:
            near = difflib.get_close_matches(str(label), labels.names, n=1)
            meant = f"Did you mean {near[0]!r}? " if near else ""
            raise UsageError(
                f"{place}{name} names the label {label!r}.", f"{meant}Known: {labels}."
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f"{place}{name} of {label} is {value!r}; expected a number.")
        require_in_range(name, value, f"{place}{name} of {label}")
