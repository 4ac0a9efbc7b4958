"""What the sections of the questions "context" and "labels" show beside scores and differences:
smoothing as a run without training, scores of each label, costs, and what taught nothing."""

from collections.abc import Sequence

import numpy as np

from experiments.questions import QUESTIONS
from experiments.report.confounders import kept_epoch, trained_on
from experiments.report.formatting import RANKING, Results, bounds, mean_text, spread
from experiments.results import Result
from experiments.runs import RUNS
from experiments.scores import (
    CONTROL,
    LEVELS,
    Difference,
    compare,
    intervals,
    pick,
    seed_values,
    smoothed,
)
from ich_keras.labels import LABELS
from ich_keras.metrics.binary import format_metric
from ich_keras.report import markdown_table

NAMES = ("context", "labels")
SMOOTHED = ", smoothed"  # behind the name of a run whose answers are smoothed
NOT_RECORDED = "not recorded"
_SMOOTHED_RUNS = ("2d", "slab", "2d-operations")
_TERA, _GIGA, _GIBIBYTES = 1e12, 1e9, 2**30


def smoothing_differences(name: str, results: Results) -> list[tuple[str, str, str, Difference]]:
    """Compare the runs of a question with slices that are smoothed along z, without training.

    Returns:
        (one, other, level, first minus second): what smoothing gives each run that has no context
        of its own to learn from, and every other run against smoothed slices.
    """
    if "2d" not in results:
        return []
    found = []
    kernel = {key: smoothed(results[key]) for key in _SMOOTHED_RUNS if key in results}
    pairs = [(f"{key}{SMOOTHED}", kernel[key], key, results[key]) for key in kernel]
    pairs += [
        (key, results[key], f"2d{SMOOTHED}", kernel["2d"])
        for key in QUESTIONS[name].runs
        if key in results and key != "2d" and not key.endswith("-operations")
    ]
    for one, ones, other, others in pairs:
        for level in LEVELS:
            difference = compare(ones, others, level)
            if difference is not None:
                found.append((one, other, level, difference))
    return found


def smoothing_note() -> list[str]:
    """Say what the smoothed rows are."""
    return [
        "**Smoothed along z** needs no training: each slice's logits are averaged with its"
        f" neighbours' ({CONTROL}; one kernel for all, chosen by no result). Series are made of"
        " slices by the rule that the run chose without smoothing.",
        "",
    ]


def labels_table(name: str, results: Results) -> list[str]:
    """Return the AUROC of every label: mean over seeds, and its interval over patients."""
    keys = [key for key in QUESTIONS[name].runs if key in results]
    groups = {key: results[key] for key in keys}
    groups |= {f"{key}{SMOOTHED}": smoothed(results[key]) for key in _SMOOTHED_RUNS if key in keys}
    rows = []
    for key, group in groups.items():
        for level in LEVELS:
            found = intervals(group, level)
            if found is None:
                continue
            cells = [_with_bounds(found.get(f"auroc/{label}")) for label in LABELS]
            rows.append([f"`{key}`", level, _with_bounds(found.get("log_loss")), *cells])
    return [
        "**AUROC of each label**, mean over seeds (95 % interval over patients):",
        "",
        markdown_table(["run", "level", "log loss", *LABELS], rows),
        "",
    ]


def _with_bounds(row: dict | None) -> str:
    if row is None or row["value"] is None:
        return "n/a"
    return f"{row['value']:.3f} ({bounds(row, 3)})"


def costs_table(name: str, results: Results) -> list[str]:
    """Return what each run of a question costs: operations, seconds, memory."""
    rows = []
    for key in QUESTIONS[name].runs:
        group = results.get(key)
        if not group:
            continue
        infos = [result.info for result in group]
        rows.append(
            [
                f"`{key}`",
                mean_text([info["patients"]["train"] for info in infos], 0),
                mean_text([training_operations(info) / _TERA for info in infos], 1),
                mean_text([series_operations(result) / _GIGA for result in group], 1),
                spread([training_seconds(info) for info in infos], 0),
                _memory_text(infos),
                "; ".join(sorted(set(map(trained_on, infos)))),
            ]
        )
        if key in _SMOOTHED_RUNS:
            rows.append([f"`{key}{SMOOTHED}`", *["as above"] * 6])
    header = ["run", "training patients", "training (10^12 multiply-adds)"]
    header += ["a predicted series (10^9 multiply-adds)", "seconds of training (range)"]
    header += ["most memory (GiB, range)", "trained on"]
    return [
        "**Costs**, means over seeds. Operations and seconds of a sequence head include those of"
        " its slice network and of the features, which several heads share. Operations of a"
        " training: three times the forward pass. Memory: the most that the training's process"
        " held, libraries included, or the GPU where there was one. Seconds depend on device,"
        " precision and on how many ran at the same time.",
        "",
        markdown_table(header, rows),
        "",
    ]


def training_operations(info: dict) -> float:
    """Return the multiply-adds of a training, with those of what it stands on."""
    return info["training_operations"] + info.get("on", {}).get("training_operations", 0)


def training_seconds(info: dict) -> float:
    """Return the seconds of a training, with those of what it stands on."""
    return info["seconds"] + info.get("on", {}).get("seconds", 0.0)


def series_operations(result: Result) -> float:
    """Return the multiply-adds of predicting a series of the test split, in the mean."""
    if "predicting_operations" in result.info:
        return result.info["predicting_operations"]
    of_sample = result.info["training_operations"] / (3 * result.info["samples_seen"])
    return of_sample * len(result.predictions) / result.predictions["series"].nunique()


def peak_bytes(info: dict) -> int | None:
    """Return the most memory of a training and of what it stands on; None where one of them was
    not recorded."""
    parts = [info.get("peak_bytes")] + ([info["on"]["peak_bytes"]] if "on" in info else [])
    found = []
    for part in parts:
        part = part or {}
        on_device = part.get("device")
        value = part.get("resident") if on_device is None else on_device
        if value is None:
            return None
        found.append(value)
    return max(found)


def _memory_text(infos: Sequence[dict]) -> str:
    found = [peak_bytes(info) for info in infos]
    known = [value / _GIBIBYTES for value in found if value is not None]
    if not known:
        return NOT_RECORDED
    absent = len(found) - len(known)
    return spread(known, 1) + (f"; {absent} {NOT_RECORDED}" if absent else "")


def networks_note(name: str, results: Results) -> list[str]:
    """Say where heads stand on another training of a slice network than its stored result."""
    found = []
    for key in QUESTIONS[name].runs:
        for result in results.get(key, ()):
            on = result.info.get("on")
            stored = {r.seed: r for r in results.get(on["key"], ())} if on else {}
            if on is None or result.seed not in stored:
                continue
            kept = pick(stored[result.seed].info["metrics"]["slice"], RANKING)
            here = on["metrics"].get("slice", {}).get("auroc_any")
            if here is not None and kept is not None and here != kept:
                found.append((on["key"], result.seed, kept, here))
    if not found:
        return []
    shown = [
        f"`{key}` seed {seed} ({kept:.3f} stored, {here:.3f} here)"
        for key, seed, kept, here in dict.fromkeys(found)
    ]
    return [
        "**Slice networks that were trained again.** Results hold no weights, so some heads stand"
        " on a slice network that was trained a second time, on another machine or in another"
        " precision than the stored result of its run. That is part of their difference to it."
        f" AUROC of `any` per slice on the test split: {', '.join(shown)}.",
        "",
    ]


def validation_score(result: Result, level: str) -> float | None:
    """Return a run's AUROC of `any` on validation; None where it is not known."""
    part = result.info.get("valid", {}).get("metrics", {}).get(level)
    if part is not None:
        return part["auroc_any"]
    if level != ("series" if result.is_series else "slice"):
        return None
    rows = result.history[result.history["epoch"] == kept_epoch(result)]["valid_auroc_any"]
    return float(rows.iloc[0]) if len(rows) and np.isfinite(rows.iloc[0]) else None


def validation_counting(result: Result, level: str, results: Results) -> float | None:
    """Return what counting voxels scores on the validation split of a run.

    Results of before it was recorded take it from any run with the same data and split.
    """
    of = _split_of(result)
    for other in (result, *(r for group in results.values() for r in group)):
        found = other.info.get("valid", {}).get("trivial_auroc_any", {}).get(level)
        if found is not None and _split_of(other) == of:
            return found
    return None


def _split_of(result: Result) -> tuple[str | None, str | None]:
    return result.info.get("cache"), result.info["config"]["data"].get("split")


def taught_nothing(name: str, results: Results) -> list[str]:
    """Return the runs of a question that rank no better on validation than counting voxels."""
    rows, unknown = [], []
    for key in QUESTIONS[name].runs:
        for result in results.get(key, ()):
            level = "series" if result.is_series else "slice"
            own = validation_score(result, level)
            counting = validation_counting(result, level, results)
            if own is None or counting is None:
                unknown.append(f"`{key}` seed {result.seed}")
                continue
            if own > counting:
                continue
            info = result.info
            fit = info["config"]["fit"]
            rows.append(
                [
                    f"`{key}`",
                    str(result.seed),
                    level,
                    f"{own:.3f}",
                    f"{counting:.3f}",
                    spread(seed_values([result], level, RANKING), 3),
                    format_metric(info["trivial_auroc_any"][level], 3),
                    f"{info['patients']['train']} patients, {fit['epochs']} epochs at"
                    f" {fit['learning_rate']:g}",
                ]
            )
    lines = [
        "**Taught nothing.** Runs that rank no better on validation than counting voxels, in AUROC"
        f" of `any`: {'see below. Their rows above mean little.' if rows else 'none.'}",
        "",
    ]
    if rows:
        header = ["run", "seed", "level", "validation", "counting voxels there", "test"]
        lines += [markdown_table([*header, "counting voxels there", "what it had"], rows), ""]
    if unknown:
        lines += [f"Not known, since it was {NOT_RECORDED}: {', '.join(unknown)}.", ""]
    return lines


def heads_note(name: str, results: Results) -> list[str]:
    """Say what share the heads have beside their slice network."""
    shown = []
    for key in QUESTIONS[name].runs:
        group = results.get(key, ())
        if RUNS[key].on is None or not group:
            continue
        shares = [result.info["head"]["share"]["any"] for result in group]
        shown.append(f"`{key}` {', '.join(f'{share:g}' for share in shares)}")
    if not shown:
        return []
    return [
        "Share of the head in the logits of `any`, chosen on validation, each seed:"
        f" {'; '.join(shown)}. A head from labels of series alone has all of it.",
        "",
    ]
