"""The page of `experiments.localisation`: tables, a CSV file and figures of what was measured."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.localisation import (
    BRIGHTEST,
    CHECKED_SERIES,
    METRICS,
    NETWORKS,
    NUM_SERIES,
    OPTIONS,
    RIM_MM,
    SEED,
    SMOOTHING_MM,
    TOLERANCE_MM,
    TOO_BRIGHT_HU,
    TRAINING_SERIES,
    Measured,
    masks_of,
    name_of,
)
from ich_keras.ct.window import BRAIN
from ich_keras.explanation import explain_series
from ich_keras.files import atomic_write
from ich_keras.labels import LABELS
from ich_keras.metrics.intervals import mean_interval
from ich_keras.phantom.plan import Phantom
from ich_keras.relevance import MapOptions

CSV, PAGE, BARS, EXAMPLES = "localisation.csv", "README.md", "hits.svg", "examples.png"
MARK = "Synthetic: made of phantoms (drawn head CT). It says nothing about patients."
_CHANCE = {"hit": "chance_hit", "share": "chance_share", "precision": "chance_share"}
_DEFAULT = MapOptions("hirescam", "layer2")  # of `explain_series`, at these sizes
_METHODS = [name_of(options) for options in OPTIONS]


def summary(measured: Mapping[str, Measured]) -> pd.DataFrame:
    """Average the scores of each view, level, label, method and metric.

    Returns:
        One row each: the mean with its interval by patients, what chance and the brightest voxels
        achieve on the same slices, the difference from the latter with its interval, how many
        slices (or series) and patients, and whether the network finds the label at all.
    """
    found = []
    for view, one in measured.items():
        for (level, label), rows in one.rows.groupby(["level", "label"], sort=False):
            bright = rows[rows["method"] == BRIGHTEST].set_index(["series", "slice"])
            for method, part in rows.groupby("method", sort=False):
                part = part.set_index(["series", "slice"]).loc[bright.index]
                patients = part["patient"].to_numpy()
                for metric in METRICS:
                    own = mean_interval(part[metric].to_numpy(), patients)
                    gain = mean_interval((part[metric] - bright[metric]).to_numpy(), patients)
                    found.append(
                        {
                            "view": view,
                            "level": level,
                            "label": label,
                            "method": method,
                            "metric": metric,
                            "value": own["value"],
                            "low": own["low"],
                            "high": own["high"],
                            "chance": float(part[_CHANCE[metric]].mean()),
                            "brightest": float(bright[metric].mean()),
                            "gain": gain["value"],
                            "gain_low": gain["low"],
                            "gain_high": gain["high"],
                            "rows": len(part),
                            "patients": len(set(patients)),
                            "auroc": one.aurocs[label]["value"],
                            "auroc_low": one.aurocs[label]["low"],
                            "judged": one.is_judged(str(label)),
                        }
                    )
    return pd.DataFrame(found)


def write_page(
    out: Path,
    measured: Mapping[str, Measured],
    phantoms: Sequence[Phantom],
    runs: Mapping[str, Path],
) -> Path:
    """Write CSV, figures and page; everything says that it is synthetic.

    Returns:
        The page.
    """
    table = summary(measured)
    atomic_write(out / CSV, table.to_csv(index=False, float_format="%.4f", lineterminator="\n"))
    atomic_write(out / BARS, _bars(table))
    atomic_write(out / EXAMPLES, _examples(runs, phantoms, measured))
    atomic_write(out / PAGE, page_text(table, measured))
    return out / PAGE


def page_text(table: pd.DataFrame, measured: Mapping[str, Measured]) -> str:
    """Return the page as Markdown."""
    parts = [
        "# Do heat maps point at the bleed?",
        "",
        f"**{MARK}** Made by `python -m experiments localisation`; all numbers: [{CSV}]({CSV}).",
        "",
        *_how(measured),
        "",
        "## In short",
        "",
        *_short(table, measured),
        "",
        f"![Hit rates per view and label]({BARS})",
        "",
        *_knows(measured),
        "",
        *_scores(
            table,
            "hit",
            "slice",
            "Pointing game, per slice",
            f"How often the highest value of a slice's map lies within {TOLERANCE_MM:g} mm of the"
            " bleed.",
        ),
        *_scores(
            table,
            "hit",
            "series",
            "Pointing game, per series",
            f"How often the highest value of the whole series lies within {TOLERANCE_MM:g} mm of"
            " the bleed, in a slice that shows it.",
        ),
        *_scores(
            table,
            "share",
            "slice",
            "Overlap, per slice",
            "As many pixels as the bleed has, with the highest values: the share of them that is"
            " bleed (Dice's coefficient).",
        ),
        *_checks(measured),
        "",
        "## Examples",
        "",
        "The slice with most of the bleed, brain window (level 40, width 80); the outline is the"
        " phantom's mask. Of each view the method that hits most often, and hirescam on layer2."
        " Each map is shown from 0 to the highest values of its slice.",
        "",
        f"![Examples]({EXAMPLES})",
        "",
    ]
    return "\n".join(parts)


def _how(measured: Mapping[str, Measured]) -> list[str]:
    nets = "; ".join(
        f"{view}: {network.preset} at {network.size} pixels, {network.epochs} epochs"
        + (f", {network.slices} slices" if network.slices else "")
        for view, network in NETWORKS.items()
        if view in measured
    )
    absent = [view for view in NETWORKS if view not in measured]
    return [
        *([f"Not measured: {', '.join(absent)}.", ""] if absent else []),
        f"One small network per view ({nets}), trained once on {TRAINING_SERIES} phantom series;"
        f" scored on {NUM_SERIES} others (seed {SEED}), on each slice that shows at least 100 mm2"
        " of a bleed, whatever the network answers. Intervals: 95 %, from resampled patients. They"
        " ignore how another training would turn out.",
        "",
        "- *Chance*: a random pixel of the head; for the overlap, the bleed's share of the head.",
        f"- *Brightest voxels*: Hounsfield units, smoothed by {SMOOTHING_MM:g} mm, inside the skull"
        f" and at least {RIM_MM:g} mm from it (which the phantom knows exactly), up to"
        f" {TOO_BRIGHT_HU} HU (calcifications are left out). It needs no network, and does not"
        " know one bleed from another.",
        "- A network that does not find a label (its AUROC's interval on these phantoms includes"
        " .5) is not judged for it: *n.j.*",
        "- gradcam and hirescam on layer4 are the same for these networks. Layer4 has few cells"
        " here: 3 x 3 at 80 pixels, 2 x 2 at 64 and 48.",
    ]


def _short(table: pd.DataFrame, measured: Mapping[str, Measured]) -> list[str]:
    lines = []
    for view in measured:
        rows = _of(table, view, "slice", "hit")
        judged = rows[rows["judged"] & (rows["method"] != BRIGHTEST)]
        if judged.empty:
            lines.append(f"- **{view}**: the network finds no label; its maps are not judged.")
            continue
        means = judged.groupby("method", sort=False)["value"].mean()
        best = means.idxmax()
        own = judged[judged["method"] == best]
        against = _against(own)
        overlap = _of(table, view, "slice", "share")
        overlap = overlap[overlap["judged"] & (overlap["method"] == best)]
        lines.append(
            f"- **{view}**: the maps that hit most often are those of {best}"
            f" ({_number(means[best])} in the mean over the judged labels; chance"
            f" {_number(own['chance'].mean())}, brightest voxels"
            f" {_number(own['brightest'].mean())}). Label by label: {against}. In overlap:"
            f" {_against(overlap)}."
        )
    lines.append(
        "- The method was picked after seeing these scores, which favours it; five were compared."
        " So was the rule for the default layer of `explain_series`, which is layer2 here."
    )
    return lines


def _against(rows: pd.DataFrame) -> str:
    """Say for which labels a map or the brightest voxels win; intervals that hold 0 say nothing."""
    words = {
        "the map wins": rows["gain_low"] > 0,
        "the brightest voxels win": rows["gain_high"] < 0,
        "no difference is seen": (rows["gain_low"] <= 0) & (rows["gain_high"] >= 0),
    }
    named = {
        word: [name for name in LABELS if name in set(rows["label"][chosen])]
        for word, chosen in words.items()
    }
    return "; ".join(f"{word} for {', '.join(labels)}" for word, labels in named.items() if labels)


def _knows(measured: Mapping[str, Measured]) -> list[str]:
    lines = [
        "## What the networks know",
        "",
        "AUROC on the scored phantoms, of slices for slices and slabs, of series for series.",
        "",
        "| view | " + " | ".join(LABELS) + " |",
        "|--|" + "--|" * len(LABELS),
    ]
    for view, one in measured.items():
        cells = [
            _with_interval(found["value"], found["low"], found["high"])
            + ("" if one.is_judged(label) else " n.j.")
            for label, found in one.aurocs.items()
        ]
        lines.append(f"| {view} | " + " | ".join(cells) + " |")
    return lines


def _scores(table: pd.DataFrame, metric: str, level: str, title: str, what: str) -> list[str]:
    lines = [f"## {title}", "", what, ""]
    for view in dict.fromkeys(table["view"]):
        rows = _of(table, view, level, metric)
        labels = [label for label in LABELS if label in set(rows["label"])]
        counts = rows.groupby("label")[["rows", "patients"]].first()
        heads = [f"{label} (n {counts['rows'][label]})" for label in labels]
        lines += [
            f"**{view}**",
            "",
            "| map | " + " | ".join(heads) + " |",
            "|--|" + "--|" * len(labels),
        ]
        for method in (*_METHODS, BRIGHTEST):
            own = rows[rows["method"] == method].set_index("label")
            cells = [
                _with_interval(*own.loc[label, ["value", "low", "high"]])
                if method == BRIGHTEST or own.loc[label, "judged"]
                else "n.j."
                for label in labels
            ]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        chance = rows[rows["method"] == BRIGHTEST].set_index("label")["chance"]
        lines += ["| chance | " + " | ".join(_number(chance[label]) for label in labels) + " |", ""]
    return lines


def _checks(measured: Mapping[str, Measured]) -> list[str]:
    lines = [
        "## Do the maps depend on what was learned?",
        "",
        "Rank correlation (Spearman) between a network's signed map of `any` and that of random"
        f" weights, over the voxels of the head: mean over {CHECKED_SERIES} series, and the mean of"
        " its size. Far from 1, the map is not only an image of the head (Adebayo et al. 2018).",
        "",
        "| view | map | head random | all random |",
        "|--|--|--|--|",
    ]
    for view, one in measured.items():
        for method in _METHODS:
            rows = one.agreements[one.agreements["method"] == method]
            cells = []
            for part in ("head", "all"):
                rho = rows[rows["part"] == part]["rho"].dropna()
                cells.append(
                    f"{_number(rho.mean())} (size {_number(rho.abs().mean())})"
                    if len(rho)
                    else "n/a"
                )
            lines.append(f"| {view} | {method} | " + " | ".join(cells) + " |")
    return lines


def _of(table: pd.DataFrame, view: str, level: str, metric: str) -> pd.DataFrame:
    return table[(table["view"] == view) & (table["level"] == level) & (table["metric"] == metric)]


def _number(value: float | None) -> str:
    if value is None or np.isnan(value):
        return "n/a"
    return f"{value:.2f}".replace("0.", ".", 1)


def _with_interval(value: float | None, low: float | None, high: float | None) -> str:
    if low is None or high is None or np.isnan(low) or np.isnan(high):
        return _number(value)
    return f"{_number(value)} ({_number(low)} to {_number(high)})"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    # The same numbers give the same bytes.
    matplotlib.rcParams.update({"svg.hashsalt": "ich_keras", "font.size": 9})
    from matplotlib import pyplot

    return pyplot


def _bars(table: pd.DataFrame) -> bytes:
    """Draw the hit rates per slice, with intervals."""
    pyplot = _pyplot()
    views = list(dict.fromkeys(table["view"]))
    figure, axes = pyplot.subplots(len(views), 1, figsize=(9, 2.7 * len(views)), squeeze=False)
    shown = (*_METHODS, BRIGHTEST)
    for axis, view in zip(axes[:, 0], views, strict=True):
        rows = _of(table, view, "slice", "hit")
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


def _examples(
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
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return stream.getvalue()


def _best(one: Measured) -> Any:
    rows = one.rows[(one.rows["level"] == "slice") & (one.rows["method"] != BRIGHTEST)]
    best = rows.groupby("method", sort=False)["hit"].mean().idxmax()
    return next(options for options in OPTIONS if name_of(options) == best)
