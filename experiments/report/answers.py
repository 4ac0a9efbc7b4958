"""The section on answers: calibration, groups, and false positives before and after abstention."""

from collections.abc import Sequence

from experiments.answers import (
    FOLDS,
    REPEATS,
    Answered,
    Estimate,
    answers_of,
    calibration_errors,
    group_errors,
    log_losses,
    positives,
)
from experiments.report.answer_figures import Answers
from experiments.report.figures import VIEWS
from experiments.report.formatting import Results, each, spread
from experiments.scores import LEVELS
from ich_keras.answer_rules import USUAL_ERROR_RATE
from ich_keras.metrics.conformal import patients_needed
from ich_keras.metrics.operating import SPECIFICITIES
from ich_keras.report import markdown_table

_RATES = (0.05, USUAL_ERROR_RATE, 0.2)


def all_answers(results: Results) -> Answers:
    """Return the answers of the three views, by level and view."""
    return {
        level: {view: answers_of(results[view], level) for view in VIEWS if results.get(view)}
        for level in LEVELS
    }


def answers_section(answers: Answers) -> list[str]:
    """Return the section; empty where nothing was answered."""
    rows = [
        (level, view, found)
        for level, views in answers.items()
        for view, found in views.items()
        if found
    ]
    if not rows:
        return []
    return [
        "## Answers: calibration, groups, false positives",
        "",
        "What `ich predict` makes of probabilities: a temperature, groups (low, unsure, high) and"
        " decisions. Results keep test predictions only. So the choices are made on some of the"
        f" test patients and judged on the others: the patients of a seed are dealt into {FOLDS}"
        " folds, all but one choose for the one that is left, and this is repeated with"
        f" {REPEATS} deals. The choices thus rest on about four fifths of the test patients."
        " Numbers are means over deals and seeds. Brackets hold 95 % intervals over patients,"
        " who are drawn again with the answers that they have.",
        "",
        "**Calibration.** ECE of `any` with ten bins (mean; each seed); log loss of all labels.",
        "",
        markdown_table(
            [
                "level",
                "run",
                "temperature (range over seeds)",
                "ECE before",
                "ECE after",
                "log loss before",
                "log loss after",
                "difference (95 %)",
            ],
            [[level, f"`{view}`", *_calibration_cells(found)] for level, view, found in rows],
        ),
        "",
        "**Groups of `any`.** `low` says that there is no bleed, `high` that there is one; each is"
        " wrong for the stated rate of its class, in the mean over patients drawn anew (each counts"
        " once). `unsure` is the share of each class that gets no answer: like both classes, or, at"
        " high rates, like none, so that fewer are wrong than stated. A rate needs patients:"
        f" {patients_needed(USUAL_ERROR_RATE)} of each class at {USUAL_ERROR_RATE:g},"
        f" {patients_needed(_RATES[0])} at {_RATES[0]:g}. {_exceeded(rows)}",
        "",
        markdown_table(
            [
                "level",
                "run",
                "stated error rate",
                "positives called low",
                "negatives called high",
                "positives unsure",
                "negatives unsure",
            ],
            [
                [level, f"`{view}`", f"{rate:g}", *_group_cells(found, rate)]
                for level, view, found in rows
                for rate in _RATES
            ],
        ),
        "",
        "**False positives of `any`**, by thresholds chosen for a specificity, and what is left of"
        f" them where only those count whose group (error rate {USUAL_ERROR_RATE:g}) is `high`.",
        "",
        markdown_table(
            [
                "level",
                "run",
                "specificity",
                "false positives",
                "after abstention",
                "true positives",
                "after abstention",
            ],
            [
                [level, f"`{view}`", f"{wanted:.2f}", *_positive_cells(found, wanted)]
                for level, view, found in rows
                for wanted in SPECIFICITIES
            ],
        ),
        "",
    ]


def _exceeded(rows: Sequence[tuple[str, str, Sequence[Answered]]]) -> str:
    """Name the groups that are wrong more often than stated."""
    found = []
    for level, view, answers in rows:
        for rate in _RATES:
            errors = group_errors(answers, rate) or {}
            for name in ("low", "high"):
                one = errors.get(name)
                if one is not None and one.value > rate:
                    how = "above" if one.low is not None and one.low > rate else "around"
                    found.append(f"`{view}` per {level}, {name} at {rate:g} (interval {how} it)")
    return f"More often wrong than stated: {'; '.join(found) or 'none'}."


def _calibration_cells(found: Sequence[Answered]) -> list[str]:
    temperatures = [float(one.temperatures.mean()) for one in found]
    errors, losses = calibration_errors(found), log_losses(found)
    return [
        spread(temperatures, 2),
        each(errors["before"], 3),
        each(errors["after"], 3),
        f"{losses['before'].value:.3f}",
        f"{losses['after'].value:.3f}",
        _text(losses["difference"], 4),
    ]


def _group_cells(found: Sequence[Answered], rate: float) -> list[str]:
    errors = group_errors(found, rate)
    names = ("low", "high", "unsure positive", "unsure negative")
    if errors is None:
        return ["n/a: too few patients", *["n/a"] * (len(names) - 1)]
    return [_text(errors[name]) for name in names]


def _positive_cells(found: Sequence[Answered], specificity: float) -> list[str]:
    shares = positives(found, specificity, USUAL_ERROR_RATE)
    names = ("false", "false kept", "true", "true kept")
    if shares is None:
        return ["n/a: too few patients", *["n/a"] * (len(names) - 1)]
    return [_text(shares[name]) for name in names]


def _text(one: Estimate, digits: int = 3) -> str:
    bounds = "n/a" if one.low is None else f"{one.low:.{digits}f} to {one.high:.{digits}f}"
    return f"{one.value:.{digits}f} ({bounds})"
