"""The page of `experiments.localisation`: tables, a CSV file and figures of what was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.localisation import (
    BRIGHTEST,
    CHECKED_SERIES,
    METRICS,
    NETWORKS,
    NUM_SERIES,
    RIM_MM,
    SEED,
    SMOOTHING_MM,
    TOLERANCE_MM,
    TOO_BRIGHT_HU,
    TRAINING_SERIES,
    Measured,
)
from experiments.localisation_figures import MARK, METHODS, examples, hit_rates, rows_of
from ich_keras.files import atomic_write
from ich_keras.labels import LABELS
from ich_keras.metrics.intervals import mean_interval
from ich_keras.phantom.plan import Phantom

CSV, PAGE, BARS, EXAMPLES = "localisation.csv", "README.md", "hits.svg", "examples.png"
_CHANCE = {"hit": "chance_hit", "share": "chance_share", "precision": "chance_share"}


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
    atomic_write(out / BARS, hit_rates(table))
    atomic_write(out / EXAMPLES, examples(runs, phantoms, measured))
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
        rows = rows_of(table, view, "slice", "hit")
        judged = rows[rows["judged"] & (rows["method"] != BRIGHTEST)]
        if judged.empty:
            lines.append(f"- **{view}**: the network finds no label; its maps are not judged.")
            continue
        means = judged.groupby("method", sort=False)["value"].mean()
        best = means.idxmax()
        own = judged[judged["method"] == best]
        against = _against(own)
        overlap = rows_of(table, view, "slice", "share")
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
        rows = rows_of(table, view, level, metric)
        labels = [label for label in LABELS if label in set(rows["label"])]
        counts = rows.groupby("label")[["rows", "patients"]].first()
        heads = [f"{label} (n {counts['rows'][label]})" for label in labels]
        lines += [
            f"**{view}**",
            "",
            "| map | " + " | ".join(heads) + " |",
            "|--|" + "--|" * len(labels),
        ]
        for method in (*METHODS, BRIGHTEST):
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
        for method in METHODS:
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


def _number(value: float | None) -> str:
    if value is None or np.isnan(value):
        return "n/a"
    return f"{value:.2f}".replace("0.", ".", 1)


def _with_interval(value: float | None, low: float | None, high: float | None) -> str:
    if low is None or high is None or np.isnan(low) or np.isnan(high):
        return _number(value)
    return f"{_number(value)} ({_number(low)} to {_number(high)})"
