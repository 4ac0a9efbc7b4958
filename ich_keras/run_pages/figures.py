"""The charts of the pages of runs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ich_keras.course import auroc_of
from ich_keras.labels import LabelSet
from ich_keras.metrics.binary import format_metric
from ich_keras.metrics.curves import Curve, curves
from ich_keras.pages.chart import (
    Axis,
    Band,
    Dots,
    Line,
    Mark,
    chart,
    colour,
    fitted,
    round_ticks,
)
from ich_keras.pages.content import Chart, Charts
from ich_keras.run_pages.numbers import interval_of, shown_labels, with_interval
from ich_keras.run_pages.scores import LevelScores

_ROC = (Axis("1 - specificity"), Axis("sensitivity"))
_PR = (Axis("recall"), Axis("precision"))
_MOST_EPOCHS = 400  # points of a learning curve
_NAME_ROOM, _TITLE_ROOM = 130, 190  # beside an axis; alt, captions and tables have the whole


def colour_of(labels: LabelSet, label: str) -> str:
    """Return the colour of a label, the same in all charts."""
    return colour(labels.index(label))


def ranking_charts(metrics: dict, scores: LevelScores, level: str) -> list[Charts]:
    """Draw ROC and precision-recall curves, a chart for each label.

    Args:
        metrics: of the level.
        scores: of the same samples.
        level: "slice" or "series".

    Returns:
        The ROC curves, and the precision-recall curves.
    """
    labels = scores.labels
    roc, pr = [], []
    for label in shown_labels(labels, metrics["n"]["positive"]):
        truth, values, patients = scores.of(label)
        found = curves(truth, values, patients)
        style = colour_of(labels, label)
        if found.roc is not None:
            said = with_interval(metrics, "auroc", label)
            alt = f"ROC curve of {label} per {level}: area {said}."
            marks = [Line([0, 1], [0, 1], "rule"), *_marks(found.roc, style)]
            roc.append(Chart(chart(*_ROC, marks, alt), f"{label}: AUROC {said}"))
        if found.pr is not None:
            said, share = with_interval(metrics, "ap", label), float(truth.mean())
            alt = (
                f"Precision-recall curve of {label} per {level}: average precision {said};"
                f" a constant answer has {share:.3f}."
            )
            marks = [Line([0, 1], [share, share], "rule"), *_marks(_stepped(found.pr), style)]
            pr.append(Chart(chart(*_PR, marks, alt), f"{label}: AP {said}"))
    return [Charts(part) for part in (roc, pr) if part]


def _marks(curve: Curve, style: str) -> list[Mark]:
    return [Band(curve.grid, curve.low, curve.high, style), Line(curve.across, curve.up, style)]


def _stepped(curve: Curve) -> Curve:
    """Return a precision-recall curve as average precision sums it: the precision at a threshold
    holds back to the recall of the one above.
    """
    across, up = np.repeat(curve.across, 2)[:-1], np.repeat(curve.up, 2)[1:]
    return dataclasses.replace(curve, across=across, up=up)


def overlaid_curves(runs: Sequence[tuple[str, LevelScores]], label: str, level: str) -> list[Chart]:
    """Draw the curves of several runs into one chart each: ROC, and precision and recall.

    Args:
        runs: (what the run is called, its scores), in the order of their colours.
        label: whose curves.
        level: "slice" or "series".
    """
    roc: list[Mark] = [Line([0, 1], [0, 1], "rule")]
    pr: list[Mark] = []
    for number, (_, scores) in enumerate(runs):
        truth, values, _ = scores.of(label)
        found = curves(truth, values)
        if found.roc is not None:
            roc.append(Line(found.roc.across, found.roc.up, colour(number)))
        if found.pr is not None:
            share = float(truth.mean())
            pr = pr or [Line([0, 1], [share, share], "rule")]
            steps = _stepped(found.pr)
            pr.append(Line(steps.across, steps.up, colour(number)))
    names = ", ".join(name for name, _ in runs)
    found_charts = []
    for axes, marks, kind in ((_ROC, roc, "ROC"), (_PR, pr, "precision-recall")):
        if len(marks) > 1:
            alt = f"{kind} curves of {label} per {level}, of {names}."
            found_charts.append(Chart(chart(*axes, marks, alt), f"{label}, {kind}"))
    return found_charts


def reliability_charts(metrics: dict, labels: LabelSet, level: str) -> Charts | None:
    """Draw reliability before and after the temperature, a chart for each label."""
    found = metrics.get("calibration") or {}
    before, after = found.get("labels") or {}, found.get("scaled")
    axes = (Axis("mean probability"), Axis("frequency"))
    drawn = []
    for label in shown_labels(labels, metrics["n"]["positive"]):
        if not before.get(label, {}).get("bins"):
            continue
        marks: list[Mark] = [Line([0, 1], [0, 1], "rule"), _bins(before[label], "s1")]
        text = f"ECE {format_metric(before[label]['ece'], 3)}"
        if after is not None and label in after:
            marks.append(_bins(after[label], "s0"))
            text += f" before, {format_metric(after[label]['ece'], 3)} after"
        alt = f"Reliability of {label} per {level}: {text}."
        drawn.append(Chart(chart(*axes, marks, alt), f"{label}: {text}"))
    if not drawn:
        return None
    legend = [("s1", "as the network answers")]
    if after is not None:
        legend.append(("s0", f"with the temperature {found['temperature']:.3f}"))
    return Charts(drawn, legend)


def _bins(label: dict, style: str) -> Line:
    bins = label["bins"]
    return Line(
        [row["mean_probability"] for row in bins], [row["frequency"] for row in bins], style, True
    )


def level_chart(metrics: dict[str, dict], labels: LabelSet) -> Charts | None:
    """Draw the AUROC of each label with its interval, slices beside series.

    Args:
        metrics: level -> its metrics.
        labels: of the run.
    """
    first = next(iter(metrics.values()))
    names = shown_labels(labels, first["n"]["positive"])
    marks: list[Mark] = [Line([0.5, 0.5], [-0.6, len(names) - 0.4], "rule")]
    lowest, said = 0.5, []
    for number, (level, part) in enumerate(metrics.items()):
        shift = 0 if len(metrics) == 1 else 0.3 * number - 0.15
        for place, label in enumerate(reversed(names)):
            value = part["auroc"].get(label)
            if value is None:
                continue
            bounds = interval_of(part, f"auroc/{label}")
            if bounds is not None:
                marks.append(Line(bounds, [place - shift] * 2, colour(2 * number)))
                lowest = min(lowest, bounds[0])
            marks.append(Dots([value], [place - shift], colour(2 * number)))
            lowest = min(lowest, value)
            said.append(f"{label} per {level} {value:.3f}")
    if not said:
        return None
    step = 0.1 if lowest >= 0.5 else 0.2
    low = np.floor(lowest / step + 1e-9) * step
    texts = tuple(fitted(name, _NAME_ROOM) for name in reversed(names))
    up = Axis("", -0.6, len(names) - 0.4, tuple(range(len(names))), texts)
    ticks = tuple(np.round(np.arange(low, 1.01, step), 1).tolist())
    svg = chart(
        Axis("AUROC", float(low), 1.02, ticks),
        up,
        marks,
        f"AUROC with 95 % intervals: {', '.join(said)}.",
        width=460,
        height=90 + 34 * len(names),
    )
    legend = [(colour(2 * number), f"per {level}") for number, level in enumerate(metrics)]
    return Charts([Chart(svg, "The dashed line is a constant answer.")], legend, is_wide=True)


def learning_charts(
    histories: Sequence[tuple[str, pd.DataFrame, int | None]], label: str
) -> Charts | None:
    """Draw losses and AUROC by epoch.

    Args:
        histories: (name of the run, history.csv, its best epoch); one alone is drawn with its
            training loss, too.
        label: the label whose AUROC validation shows.
    """
    if not histories or not any(len(table) for _, table, _ in histories):
        return None
    is_alone = len(histories) == 1
    losses: list[Mark] = []
    ranks: list[Mark] = []
    auroc = auroc_of("valid", label)
    for number, (_, table, best) in enumerate(histories):
        table = _thinned(table)
        epochs, style = table["epoch"], colour(number)
        if is_alone:
            losses.append(Line(epochs, table["train_loss"], "s1", len(table) < 30))
        losses.append(Line(epochs, table["valid_log_loss"], style, len(table) < 30))
        if auroc in table:
            ranks.append(Line(epochs, table[auroc], style, len(table) < 30))
        if best is not None:
            at = table[table["epoch"] == best]
            if is_alone:
                losses.append(Line([best] * 2, [0, 1], "rule"))
                ranks.append(Line([best] * 2, [0, 1], "rule"))
            losses.append(Dots(at["epoch"], at["valid_log_loss"], style))
    last = max(int(table["epoch"].max()) for _, table, _ in histories if len(table))
    across = _epochs(last)
    drawn = []
    for marks, title, name in (
        (losses, "loss", "Losses" if is_alone else "Validation log loss"),
        (ranks, fitted(f"AUROC of {label}", _TITLE_ROOM), f"Validation AUROC of {label}"),
    ):
        up = _room(marks, title)
        if up is not None:
            alt = f"{name} over {last} epochs."
            svg = chart(across, up, _cut(marks, up), alt, width=460, height=260)
            drawn.append(Chart(svg, f"{name} by epoch"))
    if not drawn:
        return None
    if is_alone:
        legend = [("s1", "training loss"), ("s0", "validation log loss, and AUROC")]
        legend += [("rule", "the epoch that was kept")] if histories[0][2] is not None else []
    else:
        legend = [(colour(number), name) for number, (name, _, _) in enumerate(histories)]
    return Charts(drawn, legend, is_wide=True)


def _thinned(table: pd.DataFrame) -> pd.DataFrame:
    if len(table) <= _MOST_EPOCHS:
        return table
    return table.iloc[np.unique(np.linspace(0, len(table) - 1, _MOST_EPOCHS).astype(int))]


def _epochs(last: int) -> Axis:
    if last <= 8:
        ticks = tuple(float(epoch) for epoch in range(1, last + 1))
    else:
        ticks = tuple(t for t in round_ticks(0, last, 6) if 0 < t <= last)
    return Axis("epoch", 0.5, last + 0.5, ticks)


def _room(marks: Sequence[Any], label: str) -> Axis | None:
    """Return an axis that holds all lines but the guides."""
    values = [np.asarray(mark.up, float) for mark in marks if "rule" not in mark.style]
    found = np.concatenate(values) if values else np.empty(0)
    found = found[np.isfinite(found)]
    if not len(found):
        return None
    low, high = float(found.min()), float(found.max())
    ticks = round_ticks(low, high if high > low else low + abs(low) * 0.1 + 1e-3)
    return Axis(label, ticks[0], ticks[-1], ticks)


def _cut(marks: Sequence[Any], up: Axis) -> list[Mark]:
    """Cut guides to the height of a chart."""
    return [
        Line(mark.across, [up.low, up.high], mark.style) if "rule" in mark.style else mark
        for mark in marks
    ]
