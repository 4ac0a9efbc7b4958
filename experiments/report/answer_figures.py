"""The figure of the answers: reliability, errors of the groups, false positives; both levels."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.answers import (
    ERROR_RATES,
    Answered,
    group_errors,
    positives,
    reliability,
)
from ich_keras.answer_rules import USUAL_ERROR_RATE
from ich_keras.metrics.operating import SPECIFICITIES

Answers = Mapping[str, Mapping[str, Sequence[Answered]]]  # level -> view -> answers by seed
_BEFORE = {"linestyle": "--", "linewidth": 1.1, "marker": "o", "markersize": 3.5, "mfc": "white"}
_AFTER = {"linestyle": "-", "linewidth": 1.6, "marker": "o", "markersize": 3.5}
_GREY = "darkgrey"
_APART = 0.015  # between runs, of the width
_BINS = {"slice": 10, "series": 5}  # of reliability: series are few


def draw_answers(pyplot: Any, answers: Answers) -> Any:
    """Draw what was answered, before and after the choices; None where nothing was."""
    levels = [level for level in answers if any(answers[level].values())]
    if not levels:
        return None
    figure, grid = pyplot.subplots(len(levels), 3, figsize=(10.5, 3.7 * len(levels)), squeeze=False)
    views = list(dict.fromkeys(view for level in levels for view in answers[level]))
    colours = {view: f"C{number}" for number, view in enumerate(views)}
    for axes, level in zip(grid, levels, strict=True):
        for number, (view, found) in enumerate(answers[level].items()):
            if found:
                # Side by side, so that no interval hides another.
                _draw_view(axes, found, colours[view], (number - 1) * _APART, _BINS[level])
        _dress(axes, level)
    _legends(pyplot, grid[0], colours)
    return figure


def _draw_view(axes: Any, found: Sequence[Answered], colour: str, aside: float, bins: int) -> None:
    for is_scaled, look in ((False, _BEFORE), (True, _AFTER)):
        axes[0].plot(*reliability(found, is_scaled, bins), color=colour, **look)
    errors = {rate: part for rate in ERROR_RATES if (part := group_errors(found, rate))}
    shown = {
        1 - wanted: part
        for wanted in SPECIFICITIES
        if (part := positives(found, wanted, USUAL_ERROR_RATE))
    }
    for axis, parts, names, width in (
        (axes[1], errors, ("high", "low"), max(ERROR_RATES)),
        (axes[2], shown, ("false", "false kept"), 1 - min(SPECIFICITIES)),
    ):
        for name, look, shift in zip(names, (_BEFORE, _AFTER), (0.0, _APART / 3), strict=True):
            places = [place + (aside + shift) * width for place in parts]
            rows = [part[name] for part in parts.values()]
            axis.plot(places, [row.value for row in rows], color=colour, **look)
            ends = [
                (at, r.low, r.high) for at, r in zip(places, rows, strict=True) if r.low is not None
            ]
            if ends:
                axis.vlines(*zip(*ends, strict=True), color=colour, linewidth=0.8, alpha=0.45)


def _dress(axes: Any, level: str) -> None:
    titles = (
        ("reliability of any", "mean probability", "frequency"),
        ("errors of the groups", "stated error rate", "share of the class"),
        ("false positives", "1 - specificity that was chosen", "share of negatives"),
    )
    for axis, (title, across, up) in zip(axes, titles, strict=True):
        axis.set_title(f"{level} level: {title}")
        axis.set_xlabel(across)
        axis.set_ylabel(up)
    axes[0].plot([0, 1], [0, 1], color=_GREY, linewidth=0.8, zorder=0)
    axes[0].set_aspect("equal", adjustable="datalim")
    for axis in axes[1:]:
        right, top = axis.get_xlim()[1], axis.get_ylim()[1]
        axis.axline((0, 0), slope=1, color=_GREY, linewidth=0.8, zorder=0)
        axis.set_xlim(0, right)
        axis.set_ylim(0, top)


def _legends(pyplot: Any, axes: Any, colours: Mapping[str, str]) -> None:
    """Say what colours and lines mean, in each panel of the first row."""
    line = pyplot.Line2D
    views = [line([], [], color=colour, label=view) for view, colour in colours.items()]
    texts = (
        ("network", "temperature"),
        ("negatives called high", "positives called low"),
        ("all that are yes", "yes, and not unsure"),
    )
    for number, (axis, (before, after)) in enumerate(zip(axes, texts, strict=True)):
        lines = [
            line([], [], color="dimgrey", label=before, **_BEFORE),
            line([], [], color="dimgrey", label=after, **_AFTER),
        ]
        handles = views + lines if number == 0 else lines
        axis.legend(
            handles=handles, loc=("lower right" if number == 1 else "upper left"), fontsize=8
        )
