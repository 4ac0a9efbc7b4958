"""How a run's probabilities become answers: temperature, thresholds and groups, from validation.

Decisions are made on raw probabilities, for which thresholds are chosen. A temperature keeps the
order within a label, except where labels are exclusive.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from ich_keras.errors import StaleError, UsageError
from ich_keras.labels import UNLABELLED, LabelSet
from ich_keras.metrics.aggregation import rule_in_words
from ich_keras.metrics.calibration import with_temperature
from ich_keras.metrics.conformal import LabelScores
from ich_keras.metrics.operating import threshold_at_sensitivity, threshold_at_specificity
from ich_keras.metrics.smoothing import NO_SMOOTHING
from ich_keras.run_checksums import require_file_unchanged
from ich_keras.run_folder import RunFolder
from ich_keras.validation_scores import (
    Scores,
    ValidationScores,
    evaluate_again,
    read_validation_scores,
)

LEVELS = ("slice", "series")
RAW, DECISION, GROUP = "raw_", "decision_", "group_"
USUAL_SPECIFICITY = 0.90
USUAL_ERROR_RATE = 0.1
_MAX_ERROR_RATE = 0.5


@dataclass(frozen=True)
class OperatingPoint:
    """What a person asks of the answers.

    Args:
        specificity: on validation, of the decisions; above 0, at most 1. None without a
            sensitivity stands for 0.9.
        sensitivity: the same; at most one of the two is given.
        error_rate: of the groups; above 0, at most 0.5.

    Raises:
        UsageError: a value is out of its range, or both rates are given.

    >>> str(OperatingPoint()), str(OperatingPoint(sensitivity=0.95))
    ('specificity 0.9', 'sensitivity 0.95')
    """

    specificity: float | None = None
    sensitivity: float | None = None
    error_rate: float = USUAL_ERROR_RATE

    def __post_init__(self) -> None:
        for name in ("specificity", "sensitivity"):
            if getattr(self, name) is not None:
                _require_share(name, getattr(self, name), 1)
        _require_share("error rate", self.error_rate, _MAX_ERROR_RATE)
        if self.specificity is not None and self.sensitivity is not None:
            raise UsageError(
                f"specificity {self.specificity:g} and sensitivity {self.sensitivity:g} are both"
                " given; a threshold is chosen for one of them.",
                "Leave one out.",
            )

    def __str__(self) -> str:
        return " ".join(f"{name} {value:g}" for name, value in self.wanted.items())

    @property
    def is_usual(self) -> bool:
        """Whether no operating point is asked for."""
        return self.specificity is None and self.sensitivity is None

    @property
    def wanted(self) -> dict[str, float]:
        """The rate that thresholds are chosen for, by its name."""
        if self.sensitivity is not None:
            return {"sensitivity": float(self.sensitivity)}
        chosen = USUAL_SPECIFICITY if self.specificity is None else self.specificity
        return {"specificity": float(chosen)}


@dataclass(frozen=True, eq=False)
class LevelRules:
    """How probabilities of slices, or of series, become answers.

    Args:
        temperature: that calibrates them.
        thresholds: label -> the raw probability from which the decision is yes; None without one.
        rules: how series are made of slices for the groups, one per way of scoring; "" as they are.
        scores: label -> what its groups come from; empty where there are none at all.
        ungrouped: label -> why it has no groups.
    """

    temperature: float
    thresholds: Mapping[str, float | None]
    rules: tuple[str, ...]
    scores: Mapping[str, LabelScores]
    ungrouped: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class AnswerRules:
    """How the probabilities of a run become answers.

    Args:
        labels: their order.
        point: what was asked for.
        levels: by "slice" and "series"; a level may be absent.
        without: why there are no answers at all; "" if there are.
        smoothing: the kernel that slices were smoothed with along z; "" where they were not.
        rule: from slices to series; "" for a run on whole series.
    """

    labels: LabelSet
    point: OperatingPoint
    levels: Mapping[str, LevelRules]
    without: str = ""
    smoothing: str = ""
    rule: str = ""

    def sentences(self) -> list[str]:
        """Say what the answers are, a paragraph each."""
        if self.without:
            return [
                "The probabilities are as the network gives them, without decisions and groups:"
                f" {self.without}."
            ]
        temperatures = [f"{part.temperature:.4g} per {name}" for name, part in self.levels.items()]
        found = [
            "Probabilities are calibrated: their logits are divided by a temperature fitted on"
            f" validation ({', '.join(temperatures)}). Columns {RAW}* hold what they were before:"
            f" {self._made()}.",
            *self._decisions(),
            *self._groups(),
        ]
        absent = [name for name in LEVELS if name not in self.levels]
        if absent == ["series"]:
            found.append(
                "Series have raw probabilities only, without decisions and groups: the run's split"
                " cuts series apart, so nothing was chosen for them."
            )
        return found

    def _made(self) -> str:
        """Say how the network's probabilities became those of the tables."""
        smoothed = f", smoothed along z by {self.smoothing}" if self.smoothing else ""
        series = f"; of a series, {rule_in_words(self.rule)}" if self.rule else ""
        return f"what the network gives{smoothed}{series}"

    def _decisions(self) -> list[str]:
        which = "highest" if self.point.sensitivity is not None else "lowest"
        found = []
        for name, part in self.levels.items():
            limits = [f"{n} {x:.4g}" for n, x in part.thresholds.items() if x is not None]
            text = (
                f"Decisions per {name}: yes where {RAW}* is at least the {which} threshold with"
                f" {self.point} on validation ({', '.join(limits)})."
            )
            without = [n for n, limit in part.thresholds.items() if limit is None]
            if without:
                lacking = "positive" if self.point.sensitivity is not None else "negative"
                text += f" None for {', '.join(without)}: validation has no {lacking} {name}."
            found.append(text)
        return found

    def _groups(self) -> list[str]:
        grouped = [n for n, part in self.levels.items() if len(part.ungrouped) < len(self.labels)]
        found = []
        if grouped:
            rate = f"{100 * self.point.error_rate:g} %"
            found.append(
                f"Groups per {' and '.join(grouped)}: low is wrong for about {rate} at most of"
                f" those with the label, high for about {rate} at most of those without it, in the"
                " worst case for twice as many (conformal, from the validation patients); unsure"
                " could be either. This is void outside the training"
                " domain: for patients, scanners or hospitals unlike those of the validation split,"
                " groups promise nothing."
            )
        for name, part in self.levels.items():
            reasons: dict[str, list[str]] = {}
            for label, why in part.ungrouped.items():
                reasons.setdefault(why, []).append(label)
            found += [
                f"No groups per {name} for {', '.join(names)}: {why}."
                for why, names in reasons.items()
            ]
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, for JSON."""
        return {
            "decided_on": "raw probabilities",
            "chosen_on": "valid",
            "operating_point": self.point.wanted,
            "error_rate": float(self.point.error_rate),
            "without": self.without,
            "smoothing": self.smoothing,
            "series_rule": self.rule,
            "levels": {name: self._level_dict(part) for name, part in self.levels.items()},
        }

    def _level_dict(self, part: LevelRules) -> dict[str, Any]:
        labels = {}
        for label in self.labels.names:
            limit, scores = part.thresholds[label], part.scores.get(label)
            found: dict[str, Any] = {"threshold": limit}
            if limit is not None and not self.labels.exclusive:
                calibrated = with_temperature(np.array([[limit]]), part.temperature)
                found["threshold_calibrated"] = float(calibrated[0, 0])
            if scores is not None:
                found["positive_patients"] = scores.positive_patients
                found["negative_patients"] = scores.negative_patients
            labels[label] = found | {"no_groups": part.ungrouped.get(label, "")}
        return {
            "temperature": part.temperature,
            "series_rules_of_groups": sorted({rule for rule in part.rules if rule}),
            "labels": labels,
        }


def answer_rules(run: RunFolder, point: OperatingPoint) -> AnswerRules:
    """Return how a run's probabilities become answers.

    Without choices (an unfinished training, a run of an older version) there are none, and
    `AnswerRules.without` says why; so it is for groups without predictions on validation.

    Raises:
        UsageError: an operating point is asked of an unfinished training.
        StaleError: an operating point is asked for, and the run lacks what it is chosen from; its
            choices or its predictions on validation are damaged, changed, or of another run.
    """
    labels = run.recipe().labels
    if run.notice():
        if not point.is_usual:
            raise UsageError(
                f"{point} was asked for, but the training in {run} is unfinished: nothing was"
                " chosen on validation yet.",
                "Leave it out, or finish the training.",
            )
        return AnswerRules(labels, point, {}, "the training is unfinished")
    require_file_unchanged(run, run.choices_file)
    choices = {name: part for name, part in run.choices().items() if name in LEVELS}
    if not choices:
        if not point.is_usual:
            raise StaleError(
                f"{point} was asked for, but {run} has no choices made on validation.",
                f"Make them: {evaluate_again(run)}",
            )
        return AnswerRules(
            labels,
            point,
            {},
            f"the run has no choices made on validation ({evaluate_again(run)} makes them)",
        )
    is_series = run.recipe().inputs.view.kind == "series"
    if ("slice" in choices) is is_series:
        raise _of_another_run(
            run, f"of {' and '.join(choices)}", "series" if is_series else "slices"
        )
    for name, part in choices.items():
        _require_whole(run, name, part, labels)
    found = read_validation_scores(run, labels)
    rule = run.rule()
    levels = {
        name: _level_rules(run, point, labels, name, choices[name], rule, found)
        for name in LEVELS
        if name in choices
    }
    kernel = run.smoothing()
    is_series = run.recipe().inputs.view.kind == "series"
    smoothing = "" if kernel == NO_SMOOTHING else kernel
    rule = "" if is_series else run.rule()
    return AnswerRules(labels, point, levels, smoothing=smoothing, rule=rule)


def _level_rules(
    run: RunFolder,
    point: OperatingPoint,
    labels: LabelSet,
    name: str,
    chosen: dict,
    rule: str,
    found: ValidationScores | None,
) -> LevelRules:
    thresholds = _kept_thresholds(chosen, point)
    if thresholds is None:
        if found is not None:
            thresholds = _thresholds(found.level(name, rule), point, labels)
        elif point.is_usual:
            thresholds = dict.fromkeys(labels.names)
        else:
            raise StaleError(
                f"{point} was asked for, but {run.predictions_file('valid')}, from which its"
                " thresholds are chosen, does not exist.",
                f"Make it: {evaluate_again(run)}",
            )
    why = ""
    if found is None:
        why = "the run has lost its predictions on validation"
    elif found.rows.patients is None:
        why = "the run's predictions on validation do not say which are of one patient"
    if found is None or why:
        ungrouped = dict.fromkeys(labels.names, f"{why} ({evaluate_again(run)} makes them again)")
        return LevelRules(chosen["temperature"], thresholds, (), {}, ungrouped)
    folds = found.folds(name)
    scores = {
        label: LabelScores.of([_column(part, column) for part in folds])
        for column, label in enumerate(labels.names)
    }
    few = {label: part.too_few(point.error_rate) for label, part in scores.items()}
    ungrouped = {
        label: f"validation has {why} for an error rate of {point.error_rate:g}"
        for label, why in few.items()
        if why
    }
    rules = tuple(part.rule for part in folds)
    return LevelRules(chosen["temperature"], thresholds, rules, scores, ungrouped)


def _column(part: Scores, column: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    assert part.patients is not None
    return part.truth[:, column], part.values[:, column], part.patients


def _kept_thresholds(chosen: dict, point: OperatingPoint) -> dict[str, float | None] | None:
    """Return the thresholds that were chosen at the end of training, if they are for this point."""
    wanted = point.wanted.get("specificity")
    for text, limits in chosen["thresholds"].items():
        if wanted is not None and math.isclose(float(text), wanted, abs_tol=1e-9):
            return limits
    return None


def _thresholds(scores: Scores, point: OperatingPoint, labels: LabelSet) -> dict[str, float | None]:
    find = threshold_at_specificity if point.sensitivity is None else threshold_at_sensitivity
    (rate,) = point.wanted.values()
    found = {}
    for column, label in enumerate(labels.names):
        is_known = scores.truth[:, column] != UNLABELLED
        truth, values = scores.truth[is_known, column], scores.values[is_known, column]
        found[label] = find(truth == 1, values, rate)
    return found


def _require_whole(run: RunFolder, name: str, part: dict, labels: LabelSet) -> None:
    """Refuse choices of one level that are damaged, or of other labels."""
    temperature, thresholds = part.get("temperature"), part.get("thresholds")
    if not (_is_number(temperature) and temperature > 0):  # type: ignore[operator]
        raise _damaged(run, f"the temperature per {name} is {temperature!r}")
    if not isinstance(thresholds, dict):
        raise _damaged(run, f"the thresholds per {name} are {thresholds!r}")
    for text, limits in thresholds.items():
        if not _is_rate(text) or not isinstance(limits, dict):
            raise _damaged(run, f"the thresholds per {name} for {text!r} are {limits!r}")
        if set(limits) != set(labels.names):
            raise _of_another_run(run, f"for {', '.join(limits)}", str(labels))
        for label, limit in limits.items():
            if limit is not None and not (_is_number(limit) and 0 <= limit <= 1 + 1e-9):
                raise _damaged(run, f"the threshold of {label} per {name} is {limit!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_rate(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def _require_share(name: str, value: object, most: float) -> None:
    if _is_number(value) and 0 < value <= most:  # type: ignore[operator]
        return
    is_percent = _is_number(value) and 2 <= value <= 100  # type: ignore[operator]
    raise UsageError(
        f"{name} {value!r}; expected a share above 0, at most {most:g}.",
        f"Give {value / 100:g} for {value:g} %." if is_percent else "",  # type: ignore[operator]
    )


def _damaged(run: RunFolder, why: str) -> StaleError:
    return StaleError(
        f"{run.choices_file} is damaged: {why}.", f"Remove it, then: {evaluate_again(run)}"
    )


def _of_another_run(run: RunFolder, found: str, expected: str) -> StaleError:
    return StaleError(
        f"{run.choices_file} is of another run: its choices are {found}, expected {expected}.",
        f"Copy the original run folder again; or remove the file, then: {evaluate_again(run)}",
    )
