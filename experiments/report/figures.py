"""Figures of the results, as SVG. matplotlib is imported only to draw one."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.report.answer_figures import Answers, draw_answers
from experiments.report.formatting import Results
from experiments.results import Result
from experiments.runs import RUNS
from experiments.scores import intervals, scored, together
from ich_keras.files import atomic_write
from ich_keras.labels import ANY, LABELS
from ich_keras.metrics.calibration import calibration

VIEWS = ("2d", "slab", "series")
_COLUMN = LABELS.index(ANY)
_POINTS = 200  # per curve; more would only make the file larger


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    # The same numbers give the same bytes.
    matplotlib.rcParams.update({"svg.hashsalt": "ich_keras", "font.size": 9})
    from matplotlib import pyplot

    return pyplot


def draw_all(results: Results, answers: Answers, out: Path, mark: str) -> dict[str, str]:
    """Draw every figure whose runs are finished.

    Args:
        results: key -> results by seed.
        answers: as `experiments.report.answers.all_answers` returns them.
        out: folder; receives figures/<name>.svg.
        mark: a line at the foot of each figure: the data, when and where it ran.

    Returns:
        File name below `out` -> title.
    """
    pyplot = _pyplot()
    made = {}
    for name, title, draw in (
        ("learning-curves", "Learning curves over the training patients", _learning_curves),
        ("reliability", "Reliability of `any`", _reliability),
        ("roc-pr", "ROC and precision-recall of `any`", _roc_pr),
        ("labels", "AUROC per label", _labels),
        (
            "answers",
            "Answers: calibration, errors of the groups, false positives",
            lambda pyplot, _: draw_answers(pyplot, answers),
        ),
    ):
        figure = draw(pyplot, results)
        if figure is None:
            continue
        figure.text(0.01, 0.005, mark, fontsize=6.5, color="dimgrey")
        figure.tight_layout(rect=(0, 0.04, 1, 1))
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
        pyplot.close(figure)
        atomic_write(out / "figures" / f"{name}.svg", stream.getvalue())
        made[f"figures/{name}.svg"] = title
    return made


def _views(results: Results) -> list[str]:
    return [key for key in VIEWS if results.get(key)]


def _pooled(results: Sequence[Result], level: str) -> tuple[np.ndarray, np.ndarray] | None:
    parts = [part for result in results if (part := scored(result, level)) is not None]
    if not parts:
        return None
    truth, values, _ = together(parts)
    return truth, values


def curve_points(results: Results, view: str) -> list[str]:
    """Return the finished runs of a view's learning curve, fewest patients first."""
    keys = [view, *(key for key in RUNS if key.startswith(f"{view}-") and RUNS[key].fraction < 1)]
    return sorted((key for key in keys if results.get(key)), key=lambda key: RUNS[key].fraction)


def _legend(axis: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="best")


def _learning_curves(pyplot: Any, results: Results) -> Any:
    curves = {view: keys for view in VIEWS if len(keys := curve_points(results, view)) > 1}
    if not curves:
        return None
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.8))
    for axis, metric, title in (
        (axes[0], "auroc/any", "AUROC of any, series level"),
        (axes[1], "log_loss", "log loss, series level"),
    ):
        for view, keys in curves.items():
            found = [intervals(results[key], "series") for key in keys]
            rows = [
                (RUNS[key].fraction, part[metric])
                for key, part in zip(keys, found, strict=True)
                if part is not None and part[metric]["value"] is not None
            ]
            places = [fraction for fraction, _ in rows]
            axis.plot(places, [row["value"] for _, row in rows], marker="o", label=view)
            bounded = [(place, row) for place, row in rows if row["low"] is not None]
            axis.fill_between(
                [place for place, _ in bounded],
                [row["low"] for _, row in bounded],
                [row["high"] for _, row in bounded],
                alpha=0.15,
            )
        axis.set_xscale("log", base=2)
        parts = sorted({RUNS[key].fraction for keys in curves.values() for key in keys})
        axis.set_xticks(parts, ["all" if p == 1 else f"1/{round(1 / p)}" for p in parts])
        axis.set_xlabel("part of the training patients (equal optimiser steps)")
        axis.set_title(title)
        _legend(axis)
    return figure


def _reliability(pyplot: Any, results: Results) -> Any:
    views = _views(results)
    if not views:
        return None
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4.2))
    for axis, level in zip(axes, ("slice", "series"), strict=True):
        axis.plot([0, 1], [0, 1], color="lightgrey")
        for view in views:
            pooled = _pooled(results[view], level)
            if pooled is None:
                continue
            found = calibration(*pooled)[ANY]
            axis.plot(
                [row["mean_probability"] for row in found["bins"]],
                [row["frequency"] for row in found["bins"]],
                marker="o",
                label=f"{view}, ECE {found['ece']:.3f}",
            )
        axis.set_xlabel("mean probability of any")
        axis.set_ylabel("frequency")
        axis.set_title(f"{level} level")
        _legend(axis)
    return figure


def _roc_pr(pyplot: Any, results: Results) -> Any:
    from sklearn.metrics import precision_recall_curve, roc_curve

    views = _views(results)
    if not views:
        return None
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4.2))
    for number, view in enumerate(views):
        name: str | None = view
        # Each seed's model alone: probabilities of two models are not comparable.
        for result in results[view]:
            found = scored(result, "series")
            if found is None:
                continue
            labels, chances = found.truth[:, _COLUMN], found.values[:, _COLUMN]
            if labels.min() == labels.max():
                continue
            look = {"color": f"C{number}", "linewidth": 1.2, "label": name}
            false, true, _ = roc_curve(labels, chances)
            axes[0].plot(*_thinned(false, true), **look)
            precision, recall, _ = precision_recall_curve(labels, chances)
            axes[1].plot(*_thinned(recall, precision), **look)
            name = None  # once in the legend
    for axis, title, across, up in (
        (axes[0], "ROC, series level", "1 - specificity", "sensitivity"),
        (axes[1], "precision-recall, series level", "recall", "precision"),
    ):
        axis.set_xlabel(across)
        axis.set_ylabel(up)
        axis.set_title(title)
        _legend(axis)
    return figure


def _thinned(across: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.unique(np.linspace(0, len(across) - 1, min(_POINTS, len(across))).astype(int))
    return across[rows], up[rows]


def _labels(pyplot: Any, results: Results) -> Any:
    views = _views(results)
    if not views:
        return None
    figure, axis = pyplot.subplots(figsize=(9, 3.8))
    width = 0.8 / len(views)
    for number, view in enumerate(views):
        found = intervals(results[view], "series") or {}
        name: str | None = view
        for column, label in enumerate(LABELS):
            row = found.get(f"auroc/{label}", {"value": None})
            if row["value"] is None:
                continue
            place = column + (number - (len(views) - 1) / 2) * width
            axis.bar(
                place,
                row["value"],
                width,
                color=f"C{number}",
                label=name,
            )
            name = None  # once in the legend
            if row["low"] is not None:
                axis.plot([place, place], [row["low"], row["high"]], color="black", linewidth=1)
    axis.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(LABELS)), LABELS)
    axis.set_ylim(0, 1.02)
    axis.set_ylabel("AUROC, series level")
    _legend(axis)
    return figure
