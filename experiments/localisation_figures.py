"""The figures of `experiments.localisation`: hit rates, and examples."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.localisation import BRIGHTEST, OPTIONS, Measured, masks_of, name_of
from ich_keras.ct.window import BRAIN
from ich_keras.explanation import explain_series
from ich_keras.labels import LABELS
from ich_keras.phantom.plan import Phantom
from ich_keras.relevance import MapOptions

MARK = "Synthetic: made of phantoms (drawn head CT). It says nothing about patients."
METHODS = [name_of(options) for options in OPTIONS]
_DEFAULT = MapOptions("hirescam", "layer2")  # of `explain_series`, at these sizes


def rows_of(table: pd.DataFrame, view: str, level: str, metric: str) -> pd.DataFrame:
    """Return the rows of a summary of one view, level and metric."""
    return table[(table["view"] == view) & (table["level"] == level) & (table["metric"] == metric)]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    # The same numbers give the same bytes.
    matplotlib.rcParams.update({"svg.hashsalt": "ich_keras", "font.size": 9})
    from matplotlib import pyplot

    return pyplot


def hit_rates(table: pd.DataFrame) -> bytes:
    """Draw the hit rates per slice, with intervals."""
    pyplot = _pyplot()
    views = list(dict.fromkeys(table["view"]))
    figure, axes = pyplot.subplots(len(views), 1, figsize=(9, 2.7 * len(views)), squeeze=False)
    shown = (*METHODS, BRIGHTEST)
    for axis, view in zip(axes[:, 0], views, strict=True):
        rows = rows_of(table, view, "slice", "hit")
        labels = [label for label in LABELS if label in set(rows["label"])]
        for number, method in enumerate(shown):
            own = rows[rows["method"] == method].set_index("label").loc[labels]
            # What is not judged is left empty.
            drawn = own["judged"] | (method == BRIGHTEST)
            value = own["value"].where(drawn).to_numpy(float)
            edges = [np.abs(own[edge].to_numpy(float) - value) for edge in ("low", "high")]
            places = np.arange(len(labels)) + (number - len(shown) / 2 + 0.5) * 0.13
            axis.bar(places, value, 0.12, yerr=edges, label=method, error_kw={"lw": 0.6})
        chance = rows[rows["method"] == BRIGHTEST].set_index("label").loc[labels, "chance"]
        for place, height in enumerate(chance):
            axis.plot([place - 0.42, place + 0.42], [height, height], color="black", lw=1)
        axis.set_xticks(range(len(labels)), labels)
        axis.set_ylim(0, 1)
        axis.set_title(f"{view}: hit rate per slice (line: chance; gap: not judged)")
    axes[0, 0].legend(fontsize=6.5, ncols=3)
    figure.text(0.01, 0.003, MARK, fontsize=6.5, color="dimgrey")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return stream.getvalue()


def examples(
    runs: Mapping[str, Path], phantoms: Sequence[Phantom], measured: Mapping[str, Measured]
) -> bytes:
    """Draw one slice per subtype, with the maps of each view."""
    pyplot = _pyplot()
    chosen = {}
    for label in LABELS[:-1]:
        fitting = [p for p in phantoms if label in p.spec.subtypes]
        if fitting:
            chosen[label] = fitting[len(fitting) // 2]
    rows = [(view, options) for view in measured for options in (_best(measured[view]), _DEFAULT)]
    rows = list(dict.fromkeys(rows))
    figure, axes = pyplot.subplots(
        len(rows), len(chosen), figsize=(2 * len(chosen), 2.05 * len(rows)), squeeze=False
    )
    for row, (view, options) in zip(axes, rows, strict=True):
        for axis, (label, phantom) in zip(row, chosen.items(), strict=True):
            mask = masks_of(phantom)[label]
            number = int(mask.sum(axis=(1, 2)).argmax())
            maps = explain_series(runs[view], phantom.hu, phantom.spacing_mm, label, options)
            heat = maps.values[label][number]
            # A few pixels of integrated gradients are far above all others.
            heat = np.clip(heat / max(np.quantile(heat, 0.998), 1e-9), 0, 1)
            axis.imshow(BRAIN(phantom.hu[number]), cmap="gray")
            axis.imshow(heat, cmap="inferno", alpha=0.75 * np.sqrt(heat), vmin=0, vmax=1)
            axis.contour(mask[number], [0.5], colors="cyan", linewidths=0.6)
            axis.set_axis_off()
            note = "" if measured[view].is_judged(label) else " (n.j.)"
            axis.set_title(f"{label}{note}", fontsize=7)
        row[0].text(
            -6, 64, f"{view}\n{name_of(options)}", rotation=90, ha="right", va="center", fontsize=7
        )
    figure.text(0.01, 0.005, MARK, fontsize=6, color="dimgrey")
    figure.tight_layout(rect=(0.02, 0.02, 1, 1), pad=0.4)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=75, metadata={"Software": None})
    pyplot.close(figure)
    return stream.getvalue()


def _best(one: Measured) -> Any:
    rows = one.rows[(one.rows["level"] == "slice") & (one.rows["method"] != BRIGHTEST)]
    best = rows.groupby("method", sort=False)["hit"].mean().idxmax()
    return next(options for options in OPTIONS if name_of(options) == best)
