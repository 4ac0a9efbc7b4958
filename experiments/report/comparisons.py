"""A section per question: the scores of its runs, and their differences on the same patients."""

from collections.abc import Sequence

import numpy as np

from experiments.declare import is_made_at
from experiments.questions import QUESTIONS, TABLE_RUNS
from experiments.report import context
from experiments.report.confounders import (
    behind_notes,
    early_notes,
    over_seeds,
    trivial_values,
    unlike_places,
    verdict,
)
from experiments.report.figures import curve_points
from experiments.report.formatting import HEADLINE, Results, bounds, each, seeds_text, spread
from experiments.results import Result
from experiments.runs import RUNS
from experiments.scales import SCALES
from experiments.scores import (
    CONTROL,
    LEVELS,
    Difference,
    baseline_values,
    compare,
    intervals,
    pick,
    seed_values,
    shared_scores,
    smoothed,
)
from ich_keras.labels import LABELS
from ich_keras.report import markdown_table

Compared = tuple[str, str, str, Difference]  # two runs, level, first minus second


def compare_runs(name: str, results: Results) -> list[Compared]:
    """Compare the pairs of a question at each level that both runs have."""
    question = QUESTIONS[name]
    return [
        (one, other, level, found)
        for one, other in question.pairs
        if one in results and other in results
        for level in LEVELS
        if (found := compare(results[one], results[other], level, question.only_shared))
    ]


def question_section(name: str, results: Results, compared: Sequence[Compared]) -> list[str]:
    """Return the section of a question; empty when none of its runs is finished."""
    question = QUESTIONS[name]
    finished = [key for key in question.runs if key in results]
    if not finished or (not question.in_all and set(finished) <= _shared_runs(name)):
        return []
    lines = [f"## {name}: {question.title}", ""]
    lines += [question.note, ""] if question.note else []
    scale = SCALES.get(results[finished[0]][0].info["scale"])
    absent = [
        key
        for key in question.runs
        if key not in results and (scale is None or is_made_at(RUNS[key], scale))
    ]
    if absent:
        lines += [f"Not run: {', '.join(f'`{key}`' for key in absent)}.", ""]
    lines += _scores_table(finished, results)
    lines += unlike_places([(one, other, d.seeds) for one, other, _, d in compared], results)
    if name == "leak":
        return lines + leak_section(results, compared)
    if name == "fractions":
        lines += _fractions_note(results)
    if name == "views":
        return lines + _differences(compared) + smoothing_section(results)
    if name in context.NAMES:
        return lines + _differences(compared) + context_parts(name, results)
    return lines + _differences(compared)


def context_parts(name: str, results: Results) -> list[str]:
    """Return what the sections of "context" and "labels" show beside scores and differences."""
    smoothing = context.smoothing_differences(name, results)
    lines = context.heads_note(name, results) + context.networks_note(name, results)
    if smoothing:
        lines += [*context.smoothing_note(), *_differences(smoothing)]
    lines += context.labels_table(name, results) + context.costs_table(name, results)
    return lines + context.taught_nothing(name, results)


def smoothing_section(results: Results) -> list[str]:
    """Return the control for slabs: slices that know their neighbours' answers, too."""
    if "2d" not in results or "slab" not in results:
        return []
    plain = {key: results[key] for key in ("2d", "slab")}
    smooth = {key: smoothed(group) for key, group in plain.items()}
    found = [
        (one, other, "slice", difference)
        for one, other, difference in (
            ("2d, smoothed", "2d", compare(smooth["2d"], plain["2d"], "slice")),
            ("slab, smoothed", "slab", compare(smooth["slab"], plain["slab"], "slice")),
            ("slab", "2d, smoothed", compare(plain["slab"], smooth["2d"], "slice")),
            ("slab, smoothed", "2d, smoothed", compare(smooth["slab"], smooth["2d"], "slice")),
        )
        if difference
    ]
    if not found:
        return []
    return [
        "**Smoothing as a control.** A slab sees the neighbours of its slice. Here the slices know"
        f" theirs, too: each slice's logits are averaged with its neighbours' ({CONTROL}).",
        "",
        *_differences(found),
    ]


def _shared_runs(name: str) -> set[str]:
    """Return the runs of a question that other questions or tables need too."""
    others = [set(q.runs) for other, q in QUESTIONS.items() if other != name]
    return set().union(*others, *(set(keys) for keys in TABLE_RUNS.values()))


def _scores_table(keys: Sequence[str], results: Results) -> list[str]:
    rows = []
    for key in keys:
        for level in LEVELS:
            group = results[key]
            if not seed_values(group, level, "log_loss"):
                continue
            found = intervals(group, level) or {}
            skill = [r.info["metrics"][level]["skill"]["log_loss"] for r in group]
            rows.append(
                [
                    f"`{key}`",
                    level,
                    seeds_text(group),
                    _counts_text(group, level),
                    *(
                        text
                        for metric in HEADLINE
                        for text in (
                            spread(seed_values(group, level, metric)),
                            bounds(found.get(metric)),
                        )
                    ),
                    spread(baseline_values(group, level, "log_loss")),
                    spread([value for value in skill if value is not None], 3),
                    spread(trivial_values(group, level), 3),
                    ", ".join(_rules(group)) if level == "series" else "",
                ]
            )
    header = ["run", "level", "seeds", "samples (any)"]
    header += ["log loss", "95 % interval", "AUROC(any)", "95 % interval"]
    header += ["log loss of the prevalence", "skill", "counting voxels: AUROC(any)"]
    header += ["slices to series by"]
    return [
        markdown_table(header, rows),
        "",
        "Mean over seeds (range), and its interval over patients. Samples (any): the samples of the"
        " test set and, of these, the ones with any haemorrhage, for each seed. Counting voxels: a"
        " logistic regression on how many voxels lie in each band of HU, fitted on the slices that"
        " the run was trained on; a series has the score of its worst slice.",
        "",
        *_balance_note([result for key in keys for result in results[key]]),
        *behind_notes(keys, results),
        *early_notes(keys, results),
    ]


def _counts_text(group: Sequence[Result], level: str) -> str:
    counts = [r.info["metrics"][level]["n"] for r in group if level in r.info["metrics"]]
    return "; ".join(f"{n['samples']:,} ({n['positive']['any']:,})" for n in counts)


def _balance_note(results: Sequence[Result]) -> list[str]:
    if not any(r.info["config"]["data"]["balance"] and not r.is_series for r in results):
        return []
    return [
        "Slices, stacks and slabs were trained on as many positive as negative samples, but are"
        " scored on all samples: this shift affects their log loss, not their AUROC. Series were"
        " trained nearly as they are, about half of them positive.",
        "",
    ]


def _rules(results: Sequence[Result]) -> list[str]:
    """Return the rules from slices to series, which each seed chose on validation."""
    found = (result.info["metrics"].get("series", {}).get("aggregation") for result in results)
    return sorted({choice["rule"] for choice in found if choice})


def _differences(found: Sequence[Compared], metrics: Sequence[str] = HEADLINE) -> list[str]:
    if not found:
        return []
    rows = [difference_row(*compared, metric) for compared in found for metric in metrics]
    header = ["difference", "level", "metric", "mean of the seeds (each)"]
    header += ["95 % interval over patients", "95 % interval over seeds"]
    header += ["seeds", "samples / patients", "the interval over patients"]
    return [
        "Paired differences on the same test patients (log loss: below 0 means that the first run"
        " is better; AUROC: above 0):",
        "",
        markdown_table(header, rows),
        "",
    ]


def difference_row(
    one: str, other: str, level: str, difference: Difference, metric: str
) -> list[str]:
    """Return the cells of a difference's row."""
    row = difference.mean[metric]
    values = [value for value in difference.per_seed[metric] if value is not None]
    return [
        f"`{one}` - `{other}`",
        level,
        metric,
        each(difference.per_seed[metric]),
        bounds(row),
        over_seeds(values),
        ", ".join(map(str, difference.seeds)),
        f"{difference.num_samples:,} / {difference.num_patients:,}",
        verdict(row, difference.num_patients, values),
    ]


def leak_section(results: Results, compared: Sequence[Compared]) -> list[str]:
    """Return the comparison on the slices that both splits held out."""
    if "2d" not in results or "2d-leaky" not in results:
        return []
    if not compared:
        return [
            "No paired comparison: no seed has both runs, or no slice was held out by both.",
            "",
        ]
    seeds = compared[0][3].seeds
    infos = [
        [result.info for result in results[key] if result.seed in seeds]
        for key in ("2d-leaky", "2d")
    ]
    patients, slices = (
        " and ".join(f"{np.mean([i[what]['train'] for i in group]):,.0f}" for group in infos)
        for what in ("patients", "slices")
    )
    names = [*HEADLINE, "rsna_log_loss"]
    names += [f"{kind}/{label}" for kind in ("auroc", "log_loss") for label in LABELS]
    return [
        "Both models are scored on the slices of the patient split's test patients that the leaky"
        f" split held out. They trained on {patients} patients and {slices} slices (leaky and"
        " patient split, mean over seeds), with as many optimiser steps. Neither chose its epoch on"
        " these slices. The leaky model was trained on other slices of these patients, the other"
        " model on none. The leaky model had fewer slices, so the difference is, if anything, too"
        " small:",
        "",
        _shared_table(results["2d-leaky"], results["2d"]),
        "",
        *_differences(compared, tuple(dict.fromkeys(names))),
    ]


def _shared_table(leaky: Sequence[Result], fair: Sequence[Result]) -> str:
    """Return the scores of two runs on the slices that both held out."""
    found = shared_scores(leaky, fair, "slice")
    rows = [
        [
            f"`{group[0].key}`",
            "; ".join(f"{m['n']['samples']} ({m['n']['positive']['any']})" for m in metrics),
            *(
                spread([v for m in metrics if (v := pick(m, name)) is not None])
                for name in HEADLINE
            ),
        ]
        for group, metrics in zip((leaky, fair), zip(*found, strict=True), strict=True)
    ]
    header = ["run, on the shared slices", "samples (any)", "log loss", "AUROC(any)"]
    return markdown_table(header, rows)


def _fractions_note(results: Results) -> list[str]:
    views = [view for view in ("2d", "slab", "series") if len(curve_points(results, view)) > 1]
    if not views:
        return []
    counts = []
    for view in views:
        steps = [
            f"{np.mean([r.info['steps'] for r in results[key]]):,.0f}"
            for key in curve_points(results, view)
        ]
        counts.append(f"{view} {', '.join(steps)}")
    return [
        f"Optimiser steps, from the fewest patients to all: {'; '.join(counts)}. Fewer patients are"
        " shown more often; they are also validated more often, since an epoch is shorter.",
        "",
    ]
