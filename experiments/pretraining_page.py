"""The page of the pretraining on phantoms: what was made, and what it was good for."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.pretraining import AS_IT_IS, LICENCE, STARTS, Measured, scores_of
from ich_keras.files import atomic_write
from ich_keras.labels import ANY
from ich_keras.metrics.intervals import mean_paired_bootstrap
from ich_keras.notices import NOT_CLINICAL
from ich_keras.report import markdown_table

PAGE, SCORES, RECORD = "README.md", "scores.csv", "record.json"
LEAST_SEEDS, LEAST_PATIENTS = 3, 30


def write_page(out: Path, measured: Measured) -> Path:
    """Write scores.csv and README.md; neither the weights nor anything of a real slice's file.

    Returns:
        The page.
    """
    text = measured.scores.to_csv(index=False, float_format="%.6f", lineterminator="\n")
    atomic_write(out / SCORES, text)
    atomic_write(out / PAGE, page_text(measured))
    return out / PAGE


def page_text(measured: Measured) -> str:
    """Return the page as Markdown."""
    plan, record = measured.plan, measured.record
    own = record["auroc_any_of_other_phantoms"]
    parts = [
        "# Phantoms as pretraining",
        "",
        "**Synthetic data.** The weights were made of phantoms (drawn head CT). They say nothing"
        f" about patients. {NOT_CLINICAL} Made by `python -m experiments pretrain`; all scores:"
        f" [{SCORES}]({SCORES}).",
        "",
        *_too_small(measured),
        "## The weights",
        "",
        f"`{plan.preset}` from scratch on {record['patients']['train']:,} patients of"
        f" {plan.source.num_series:,} series ({_style(plan.source)}), {plan.size} pixels,"
        f" {plan.epochs} epochs. On other patients of the same phantoms its AUROC of `any` is"
        f" {', '.join(f'{value:.3f} per {level}' for level, value in own.items())}. The file is"
        f" `{measured.weights.name}`, licence {LICENCE}; it is not in the repository, and the"
        f" command makes it again. `ich-train --preset {plan.preset} --weights FILE` takes it; its"
        " record names the phantoms, their seed, the version and the licence.",
        "",
        "## On a few other phantoms",
        "",
        f"Each network is trained on {plan.patients} patients of phantoms of another seed and style"
        f" ({_style(plan.target)}), for {plan.fine_epochs} epochs. The learning rate"
        f" ({', '.join(f'{rate:g}' for rate in plan.rates)}) and the epoch are chosen on"
        " validation, for each start and seed. Series have the score of their worst slice.",
        "",
        _scores_table(measured.scores),
        "",
        *_difference(measured),
    ]
    return "\n".join([*parts, *_real(measured.real)]).rstrip() + "\n"


def _style(drawn) -> str:
    low, high = drawn.slice_spacing_mm
    return (
        f"seed {drawn.seed}, {drawn.mix} mix of subtypes, slices {low:g} to {high:g} mm apart,"
        f" {drawn.matrix} pixels"
    )


def _too_small(measured: Measured) -> list[str]:
    seeds = len(measured.plan.seeds)
    patients = min(len(set(one.patients)) for one in measured.answers[STARTS[0]])
    if seeds >= LEAST_SEEDS and patients >= LEAST_PATIENTS:
        return []
    return [
        f"**Too small for any conclusion**: {seeds} seed(s), {patients} test patients; expected at"
        f" least {LEAST_SEEDS} and {LEAST_PATIENTS}.",
        "",
    ]


def _scores_table(scores: pd.DataFrame) -> str:
    counting = [name for name in scores if name.startswith("counting")]
    columns = [name for name in scores if name.startswith(("AUROC", "log loss"))] + counting
    rows = []
    for start in (*STARTS, AS_IT_IS):
        part = scores[scores["start"] == start]
        rates = part["learning rate"].dropna()
        rows.append(
            [
                start,
                ", ".join(f"{rate:g}" for rate in rates) or "n/a",
                *(_each(part[name].tolist()) for name in columns),
            ]
        )
    header = ["start", "learning rate of each seed", *columns]
    return markdown_table(header, rows)


def _each(values: Sequence[float]) -> str:
    defined = [value for value in values if value is not None and np.isfinite(value)]
    if not defined:
        return "n/a"
    each = ", ".join("n/a" if not np.isfinite(v) else f"{v:.3f}" for v in values)
    return f"{np.mean(defined):.3f} ({each})"


def _difference(measured: Measured) -> list[str]:
    """Compare both starts on the same test patients, per slice."""
    scratch, pretrained = (measured.answers[start] for start in STARTS)
    if len({patient for one in scratch for patient in one.patients}) < 2:
        return []
    found = mean_paired_bootstrap(
        [
            (one.truth, one.values, other.values, one.patients)
            for one, other in zip(pretrained, scratch, strict=True)
        ]
    )
    lines = []
    for name, metric in ((f"AUROC of {ANY}", f"auroc/{ANY}"), ("log loss", "log_loss")):
        row = found[metric]
        own = f"{name} per slice"
        each = [
            _minus(scores_of(one)[own], scores_of(other)[own])
            for one, other in zip(pretrained, scratch, strict=True)
        ]
        bounds = "n/a" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        lines.append(
            [name, "n/a" if row["value"] is None else f"{row['value']:.3f}", bounds, _list(each)]
        )
    header = ["pretrained minus scratch, per slice", "mean", "95 % over patients", "each seed"]
    return [markdown_table(header, lines), ""]


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _list(values: Sequence[float | None]) -> str:
    return ", ".join("n/a" if value is None else f"{value:.3f}" for value in values)


def _real(real: pd.DataFrame | None) -> list[str]:
    """Show the order of real slices; a few of them prove nothing."""
    lines = ["## Real slices", ""]
    if real is None:
        return [*lines, "None were given (`--real`).", ""]
    known = real[real["label"] != ""]
    shown = known if len(known) else real
    rows = [
        [str(row["rank"]), row["label"] or "unknown", f"{row['probability']:.4f}"]
        for _, row in shown.iterrows()
    ]
    return [
        *lines,
        f"{len(real)} real slices in the order of their probability of any bleed, by the pretrained"
        f" network alone; {len(known)} of them have a label and are shown. So few slices prove"
        " nothing; they show whether the network answers at random on what it has never seen.",
        "",
        markdown_table([f"rank of {len(real)}", "label", "probability of any bleed"], rows),
        "",
    ]
