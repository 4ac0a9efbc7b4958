"""README.md of the results: tables beside the thesis's, questions, figures. What it says is worked
out from the numbers; nothing is concluded in advance."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from experiments.caveats import (
    LEAST_PATIENTS,
    LEAST_SEEDS,
    RANKING,
    Results,
    behind_notes,
    early_notes,
    flags,
    kept_epoch,
    over_seeds,
    place,
    source_notes,
    trivial_values,
    unlike_places,
    verdict,
)
from experiments.figures import curve_points, draw_all
from experiments.reproduce import absent_weights
from experiments.results import Result
from experiments.runs import QUESTIONS, RUNS, SCALES, TABLE_RUNS, TABLES, is_made_at
from experiments.scores import (
    LEVELS,
    THESIS_NAMES,
    Difference,
    compare,
    constant_under_convention,
    intervals,
    pick,
    scored,
    seed_values,
    shared_scores,
    sound_results,
    under_convention,
)
from experiments.tables import PUBLISHED
from ich_keras.errors import StaleError
from ich_keras.files import atomic_write
from ich_keras.labels import LABELS
from ich_keras.metrics.binary import binary_metrics, format_metric
from ich_keras.metrics.intervals import RESAMPLES
from ich_keras.notices import NOT_CLINICAL
from ich_keras.report import markdown_table

README = "README.md"
SYNTHETIC = "phantoms (synthetic): says nothing about patients"
_HEADLINE = ("log_loss", RANKING)
_TABLE_TITLES = {
    1: "loss after four epochs, three networks on slices",
    2: "2D ResNet-18 on slices",
    3: "3D ResNet-18 on whole series",
    4: "3D ResNet-18 on slabs of five slices",
}
# Table 1's rows: the published one, and our runs beside it (sound split, thesis split).
_TABLE_1 = (
    ("2d-pretrained-4-epochs", "2d-pretrained", "2d-pretrained-thesis"),
    ("2d-pretrained-4-epochs", "2d-stand-in", "2d-stand-in-thesis"),
    ("2d-scratch-4-epochs", "2d", "2d-thesis"),
    ("2d-resnet50-4-epochs", "2d-50-pretrained", "2d-50-pretrained-thesis"),
    ("2d-resnet50-4-epochs", "2d-50-stand-in", "2d-50-stand-in-thesis"),
)
TABLE_1_EPOCHS = 4

_CONVENTION = (
    "Thesis convention: its split, on which the same held-out samples choose the model; each"
    " held-out sample changed once by its random augmentation; means over batches of its size"
    " (32 slices, 16 slabs, 1 series), an undefined rate counting as 0. Not imitated: its"
    " reading faults (zeros for unreadable files, neighbours from the rows of a table), windows"
    " before resizing, normalising before brightness, and the changing rules for undefined"
    " rates. Constants on the same samples: under the convention its loss is that of the"
    " training set's prevalence, its other metrics those of never any haemorrhage. Skill: 1 -"
    " loss / loss of the constant (log loss against the prevalence, Hamming loss and error"
    " against never any haemorrhage)."
)

_MACRO_NOTE = (
    "Precision, recall, F1 and specificity are means over the labels that have such a rate: a label"
    " that is never predicted has no precision. For these and the Hamming metrics no intervals are"
    " made (n/a)."
)

Compared = tuple[str, str, str, Difference]  # one, other, level, one minus other


def write_report(out: Path, tell=None, scale: str | None = None) -> Path:
    """Make tables and figures of all that is finished below a folder, from nothing else.

    Args:
        out: has runs/; receives README.md and figures/.
        tell: called with single lines of text.
        scale: that the results are said to have; None takes any.

    Returns:
        README.md.

    Raises:
        StaleError: nothing is finished, the results are damaged, do not belong together or are of
            another scale.
        EnvironmentProblem: matplotlib is absent.
    """
    results = sound_results(out, scale)
    if not results:
        raise StaleError(
            f"{out} has no finished run.",
            "`python -m experiments all`, of one of the scales, first.",
        )
    compared = {}
    for name in QUESTIONS:
        if tell is not None:
            tell(f"question {name}")
        compared[name] = _compared(name, results)
    lines = [*_head(results), *_in_short(compared, results), *_runs_section(results)]
    shown = [table for table in TABLES if set(TABLE_RUNS[table]) & set(results)]
    for table in shown:
        lines += _table_1(results) if table == 1 else _table(table, results)
    if set(shown) - {1}:
        lines += [_CONVENTION, _MACRO_NOTE, ""]
    for name in QUESTIONS:
        lines += _question(name, results, compared[name])
    lines += _figures(results, out)
    path = out / README
    atomic_write(path, "\n".join(lines).rstrip() + "\n")
    return path


def _all(results: Results) -> list[Result]:
    return [result for group in results.values() for result in group]


def mark_of(results: Results) -> str:
    """Say in one line what results are: data, date, machine, seeds, time."""
    every = _all(results)
    infos = [result.info for result in every]
    dates = sorted({info["date"] for info in infos})
    machines = sorted(
        {f"{info['machine']['device']}, {info['machine']['cores']} cores" for info in infos}
    )
    seeds = sorted({result.seed for result in every})
    hours = sum(info["seconds"] for info in infos) / 3600
    data = SYNTHETIC if any(info["synthetic"] for info in infos) else "DICOM files, not synthetic"
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"{data}; {when}; {'; '.join(machines)}; seeds {', '.join(map(str, seeds))};"
        f" {hours:.2f} process hours of training"
    )


def _head(results: Results) -> list[str]:
    info = _all(results)[0].info
    lines = [f"# Experiments: scale `{info['scale']}`", "", f"*{mark_of(results)}.*", ""]
    if any(result.info["synthetic"] for result in _all(results)):
        lines += [
            "**Synthetic data.** All numbers of ours below come from phantoms (drawn head CT). They"
            " say how the programs and the comparisons behave; they say nothing about patients. The"
            " columns *as published* are the thesis's, on RSNA 2019: beside numbers on phantoms"
            " they can be read, not compared.",
            "",
        ]
    seeds = {result.seed for result in _all(results)}
    patients = min(
        (r.info["patients"]["test"] for r in _all(results) if RUNS[r.key].split != "other"),
        default=0,
    )
    if len(seeds) < LEAST_SEEDS or patients < LEAST_PATIENTS:
        lines += [
            f"**Too small for any conclusion**: {len(seeds)} seed(s), {patients} test patients in"
            f" the smallest run; expected at least {LEAST_SEEDS} and {LEAST_PATIENTS}.",
            "",
        ]
    return [
        *lines,
        f"{NOT_CLINICAL} Made by `python -m experiments report`; what the runs are is in"
        " experiments/README.md of the clone.",
        "",
        "All models on the patient split of a seed have the same test patients (those on the"
        " thesis's split and the stand-ins on other phantoms have their own). Numbers are means"
        f" over seeds. Intervals over patients are 95 %, percentiles of {RESAMPLES:,} resamples:"
        " patients are drawn once for all seeds, and count in each seed in whose test set they are."
        " They hold for these trained models on other patients, and have no variation between"
        " trainings in them. A seed changes split and training together; the range of so few values"
        " describes them, and the interval over seeds (Student's t; the test sets of seeds overlap)"
        " is as wide as so few values make it. No correction is made for the number of"
        " comparisons.",
        "",
    ]


def _compared(name: str, results: Results) -> list[Compared]:
    """Compare what a question puts side by side, at each level that both have."""
    question = QUESTIONS[name]
    return [
        (one, other, level, found)
        for one, other in question.pairs
        if one in results and other in results
        for level in LEVELS
        if (found := compare(results[one], results[other], level, question.only_shared))
    ]


def _in_short(compared: Mapping[str, Sequence[Compared]], results: Results) -> list[str]:
    """Say of each comparison that `all` makes how far the two lie apart, in one line."""
    rows = []
    for name, question in QUESTIONS.items():
        pairs = compared[name] if question.in_all else ()
        for (one, other, level, difference), metric in itertools.product(pairs, _HEADLINE):
            # Slices are balanced in training, series are not: it would be in their log loss.
            if metric != RANKING and len({results[key][0].is_series for key in (one, other)}) > 1:
                continue
            row = _difference_row(one, other, level, difference, metric)
            rows.append(
                [
                    name,
                    *row[:7],
                    "; ".join([row[-1], *flags(one, other, level, difference.seeds, results)]),
                ]
            )
    if not rows:
        return []
    header = ["question", "difference", "level", "metric", "mean of the seeds (each)"]
    header += ["95 % interval over patients", "95 % interval over seeds", "seeds"]
    return [
        "## In short",
        "",
        "Differences on the same test patients (AUROC: above 0 is better; log loss: below 0). Log"
        " loss is left out where one of the two was trained on whole series, which are balanced"
        " otherwise. The last column says where the interval over patients lies; where it excludes"
        " 0, whether the seeds bear it; and what the comparison has in it beside its question. What"
        " the runs are, and all metrics, stand below.",
        "",
        markdown_table([*header, "the interval over patients"], rows),
        "",
    ]


def _runs_section(results: Results) -> list[str]:
    rows = []
    for key in RUNS:
        if key not in results:
            continue
        group = results[key]
        infos = [result.info for result in group]
        rows.append(
            [
                f"`{key}`",
                RUNS[key].title,
                ", ".join(str(result.seed) for result in group),
                "; ".join(sorted(set(map(place, infos)))),
                _mean_text([info["patients"]["train"] for info in infos], 0),
                _mean_text([info["patients"]["test"] for info in infos], 0),
                _fitting_text(infos),
                ", ".join(f"{kept_epoch(result)} of {len(result.history)}" for result in group),
                _mean_text([info["steps"] for info in infos], 0),
                _mean_text([info["samples_seen"] for info in infos], 0),
                _mean_text([info["training_operations"] / 1e12 for info in infos], 1),
                spread([info["seconds"] for info in infos], 0),
            ]
        )
    header = ["run", "what", "seeds", "trained on", "training patients", "test patients"]
    header += [
        "learning rate, batch",
        "epoch kept",
        "steps",
        "samples seen",
        "operations (10^12 multiply-adds)",
        "seconds",
    ]
    return [
        "## Runs",
        "",
        "Means over seeds. Precision: bfloat16 where the device has instructions for it, float32"
        " where it has not. Epoch kept, of all: that of the lowest validation log loss, seed by"
        " seed. Operations: three times the forward pass, of all training samples. Seconds (range):"
        " training and validation after each epoch, of one process; of different devices and"
        " precisions they do not compare.",
        "",
        markdown_table(header, rows),
        "",
        *behind_notes([key for key in RUNS if key in results], results),
        *early_notes([key for key in RUNS if key in results], results),
    ]


def _fitting_text(infos: Sequence[dict]) -> str:
    fits = [info["config"]["fit"] for info in infos]
    return "; ".join(sorted({f"{fit['learning_rate']:g}, {fit['batch_size']}" for fit in fits}))


def _mean_text(values: Sequence[float], digits: int) -> str:
    return f"{np.mean(values):,.{digits}f}"


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Write the mean and, of several, the range."""
    if not values:
        return "n/a"
    mean = format_metric(float(np.mean(values)), digits)
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def each(values: Sequence[float | None], digits: int = 4) -> str:
    """Write the mean of what is defined and, of several seeds, the value of each, in order."""
    defined = [value for value in values if value is not None]
    mean = format_metric(float(np.mean(defined)) if defined else None, digits)
    if len(values) == 1:
        return mean
    return f"{mean} ({', '.join(format_metric(value, digits) for value in values)})"


def bounds(row: dict | None, digits: int = 4) -> str:
    """Write an interval."""
    if row is None or row["low"] is None:
        return "n/a"
    return f"{row['low']:.{digits}f} to {row['high']:.{digits}f}"


def _absent(key: str) -> str:
    """Say why a run has no result."""
    command = absent_weights(key)
    return f"n/a: weights not fetched (`{command}`)" if command else "n/a: not run"


def loss_after(result: Result, epochs: int = TABLE_1_EPOCHS) -> float:
    """Return the validation log loss after so many epochs, or after the last one."""
    return float(result.history["valid_log_loss"].iloc[min(epochs, len(result.history)) - 1])


def _table_1(results: Results) -> list[str]:
    rows = []
    for published, sound, thesis in _TABLE_1:
        group = results.get(sound, [])
        if not group and RUNS[sound].depends_on:
            continue  # a stand-in that nobody asked for
        found = intervals(group, "slice") if group else None
        constant = seed_values_of_baseline(group, "slice", "log_loss")
        skill = [result.info["metrics"]["slice"]["skill"]["log_loss"] for result in group]
        rows.append(
            [
                RUNS[sound].title,
                _seeds_text(group),
                format_metric(PUBLISHED[published].loss),
                spread([loss_after(r) for r in results[thesis]])
                + _fewer_text(results[thesis], group)
                if thesis in results
                else _absent(thesis),
                spread([loss_after(result) for result in group]) if group else _absent(sound),
                spread(seed_values(group, "slice", "log_loss")),
                bounds(found["log_loss"] if found else None),
                spread(constant),
                spread([value for value in skill if value is not None], 3),
            ]
        )
    header = ["network", "seeds", "as published", "thesis split and augmentation, validation"]
    header += ["patient split, validation", "patient split, test, epoch kept", "95 % interval"]
    header += ["test, constant: prevalence", "test, skill"]
    return [
        f"## Table 1: {_TABLE_TITLES[1]}",
        "",
        markdown_table(header, rows),
        "",
        f"Validation: log loss after {TABLE_1_EPOCHS} epochs, as published, or after the last of"
        f" fewer{_under_way(results)}. Test: of the epoch kept. The two validation columns differ"
        " in the split and in how training was augmented; what the split alone does is under"
        " *leak*. Skill: 1 - loss / loss of the constant. A constant answer of no haemorrhage has"
        " no finite log loss.",
        "",
        *source_notes([sound for _, sound, _ in _TABLE_1], results),
    ]


def _under_way(results: Results) -> str:
    """Say that the learning rate falls over a whole training, where it does."""
    schedules = {
        result.info["config"]["fit"].get("schedule")
        for _, *keys in _TABLE_1
        for key in keys
        for result in results.get(key, ())
    }
    if "cosine" not in schedules:
        return ""
    return (
        "; the learning rate of ours falls over more epochs (see Runs), so that a training is under"
        " way there"
    )


def _fewer_text(group: Sequence[Result], others: Sequence[Result]) -> str:
    """Name the seeds of a number that stands beside one of more seeds."""
    if others and len(group) >= len(others):
        return ""
    return f" (seed {', '.join(str(result.seed) for result in group)})"


def _seeds_text(group: Sequence[Result]) -> str:
    """Name the seeds, and say where they are too few to conclude from."""
    if not group:
        return "n/a"
    few = "" if len(group) >= LEAST_SEEDS else " (too few)"
    return ", ".join(str(result.seed) for result in group) + few


def seed_values_of_baseline(results: Sequence[Result], level: str, name: str) -> list[float]:
    """Return what the prevalence of the training set scores, per seed."""
    found = (
        result.info["metrics"][level]["baseline"]["prevalence"].get(name) for result in results
    )
    return [value for value in found if value is not None]


def _negative(results: Sequence[Result], level: str, name: str) -> list[float]:
    found = (
        result.info["metrics"][level]["baseline"]["all_negative"].get(name) for result in results
    )
    return [value for value in found if value is not None]


def _table(table: int, results: Results) -> list[str]:
    lines = [f"## Table {table}: {_TABLE_TITLES[table]}", ""]
    keys = TABLE_RUNS[table]
    for key in keys:
        if RUNS[key].is_thesis:
            continue
        thesis_key = f"{key}-thesis"
        if key not in results:
            if not RUNS[key].depends_on:
                lines += [f"**{RUNS[key].title}**: {_absent(key)}.", ""]
            continue
        lines += [
            f"**{RUNS[key].title}** (seeds {_seeds_text(results[key])}; thesis convention: seeds"
            f" {_seeds_text(results.get(thesis_key, []))}; {_intensity_text(results[key])})",
            "",
            _network_table(results[key], results.get(thesis_key, []), thesis_key),
            "",
            *source_notes([key], results),
        ]
    return lines


def _intensity_text(group: Sequence[Result]) -> str:
    names = {
        "windows": "three windows",
        "wide": "one wide range",
        "head-z-score": "z-scores over the head",
        None: "intensity not recorded",
    }
    found = {result.info["config"]["data"].get("intensity") for result in group}
    return ", ".join(sorted(names[name] for name in found))


def _network_table(group: Sequence[Result], thesis: Sequence[Result], thesis_key: str) -> str:
    level = "series" if group[0].is_series else "slice"
    published = asdict(PUBLISHED[RUNS[group[0].key].published])
    convention = [under_convention(result) for result in thesis]
    constant = [constant_under_convention(result) for result in thesis]
    found = intervals(group, level)
    defined = [
        binary_metrics(part.truth, part.values)["defined_labels"]
        for part in (scored(result, level) for result in group)
    ]
    rows = []
    for name, ours in THESIS_NAMES.items():
        skill_name = ours if ours in ("log_loss", "hamming_loss", "exact_match") else None
        skills = [result.info["metrics"][level]["skill"].get(skill_name) for result in group]
        rows.append(
            [
                name.replace("_", " "),
                format_metric(published[name]),
                spread([row[name] for row in convention]) if thesis else _absent(thesis_key),
                spread([row[name] for row in constant]),
                spread(seed_values(group, level, ours)) + _labels_text(defined, ours),
                bounds((found or {}).get(ours)),
                spread(seed_values_of_baseline(group, level, ours)),
                spread(_negative(group, level, ours)),
                spread([skill for skill in skills if skill is not None], 3),
            ]
        )
    for name in ("auroc/any", "ap/any"):
        is_auroc = name.startswith("auroc")
        counting = f"counting voxels: {spread(trivial_values(group, level))}" if is_auroc else "n/a"
        rows.append(
            [
                name.replace("/", " of "),
                *("n/a", "n/a", "n/a", spread(seed_values(group, level, name))),
                *(bounds((found or {}).get(name)), counting, "n/a", "n/a"),
            ]
        )
    header = ["metric", "as published", "thesis convention", "thesis convention: constant"]
    header += ["done properly", "95 % interval", "constant: prevalence", "constant: never", "skill"]
    return markdown_table(header, rows)


def _labels_text(defined: Sequence[dict[str, int]], metric: str) -> str:
    """Say of a mean over labels over how many it is, where some label has no such rate."""
    number = min(numbers.get(metric, len(LABELS)) for numbers in defined)
    return f" ({number} of {len(LABELS)} labels)" if number < len(LABELS) else ""


def _question(name: str, results: Results, compared: Sequence[Compared]) -> list[str]:
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
        return lines + _leak(results, compared)
    if name == "fractions":
        lines += _fractions_note(results)
    return lines + _differences(compared)


def _shared_runs(name: str) -> set[str]:
    """Return the runs of a question that others ask for as well."""
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
                    _seeds_text(group),
                    _counts_text(group, level),
                    *(
                        text
                        for metric in _HEADLINE
                        for text in (
                            spread(seed_values(group, level, metric)),
                            bounds(found.get(metric)),
                        )
                    ),
                    spread(seed_values_of_baseline(group, level, "log_loss")),
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
        "Mean over seeds (range), and its interval over patients. Samples (any): of the test set,"
        " and those with any haemorrhage, seed by seed. Counting voxels: a logistic regression on"
        " how many voxels lie in each band of HU, fitted on the slices that the run was trained on;"
        " of a series its worst slice.",
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
        "Slices and slabs were trained on as many positive as negative samples and are scored on"
        " all of them: their log loss contains that shift, their AUROC does not. Series were"
        " trained nearly as they are, about half of them positive.",
        "",
    ]


def _rules(results: Sequence[Result]) -> list[str]:
    """Return the rules by which a run's slices became series, chosen on each seed's validation."""
    found = (result.info["metrics"].get("series", {}).get("aggregation") for result in results)
    return sorted({choice["rule"] for choice in found if choice})


def _differences(found: Sequence[Compared], metrics: Sequence[str] = _HEADLINE) -> list[str]:
    if not found:
        return []
    rows = [_difference_row(*compared, metric) for compared in found for metric in metrics]
    header = ["difference", "level", "metric", "mean of the seeds (each)"]
    header += ["95 % interval over patients", "95 % interval over seeds"]
    header += ["seeds", "samples / patients", "the interval over patients"]
    return [
        "On the same test patients, paired (log loss: below 0 is better; AUROC: above 0 is"
        " better):",
        "",
        markdown_table(header, rows),
        "",
    ]


def _difference_row(
    one: str, other: str, level: str, difference: Difference, metric: str
) -> list[str]:
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


def _leak(results: Results, compared: Sequence[Compared]) -> list[str]:
    if "2d" not in results or "2d-leaky" not in results:
        return []
    if not compared:
        return ["No seed has both, or no slice was held out by both; no paired comparison.", ""]
    seeds = compared[0][3].seeds
    infos = [
        [result.info for result in results[key] if result.seed in seeds]
        for key in ("2d-leaky", "2d")
    ]
    patients, slices = (
        " and ".join(f"{np.mean([i[what]['train'] for i in group]):,.0f}" for group in infos)
        for what in ("patients", "slices")
    )
    names = [*_HEADLINE, "rsna_log_loss"]
    names += [f"{kind}/{label}" for kind in ("auroc", "log_loss") for label in LABELS]
    return [
        "The slices that the leaky split held out of the patient split's test patients, scored by"
        f" both models. They trained on {patients} patients and {slices} slices (leaky and patient"
        " split, mean over seeds), with as many optimiser steps, and neither chose its epoch on"
        " these slices; the leaky model was trained on other slices of these patients, the other"
        " on none of theirs. It had fewer slices, so that the difference is, if anything, too"
        " small:",
        "",
        _shared_table(results["2d-leaky"], results["2d"]),
        "",
        *_differences(compared, tuple(dict.fromkeys(names))),
    ]


def _shared_table(leaky: Sequence[Result], fair: Sequence[Result]) -> str:
    """Score two runs on the slices that both held out, seed by seed."""
    found = shared_scores(leaky, fair, "slice")
    rows = [
        [
            f"`{group[0].key}`",
            "; ".join(f"{m['n']['samples']} ({m['n']['positive']['any']})" for m in metrics),
            *(spread([pick(m, name) for m in metrics]) for name in _HEADLINE),
        ]
        for group, metrics in zip((leaky, fair), zip(*found, strict=True), strict=True)
    ]
    header = ["run, on the shared slices", "samples (any)", "log loss", "AUROC(any)"]
    return markdown_table(header, rows)


def _fractions_note(results: Results) -> list[str]:
    views = [view for view in ("2d", "slab", "series") if len(curve_points(results, view)) > 1]
    if not views:
        return []
    said = []
    for view in views:
        steps = [
            f"{np.mean([r.info['steps'] for r in results[key]]):,.0f}"
            for key in curve_points(results, view)
        ]
        said.append(f"{view} {', '.join(steps)}")
    return [
        f"Optimiser steps, from the smallest part to the whole: {'; '.join(said)}. Fewer patients"
        " are shown more often; they are also validated more often, since an epoch is shorter.",
        "",
    ]


def _figures(results: Results, out: Path) -> list[str]:
    made = draw_all(results, out, mark_of(results))
    lines = ["## Figures", ""] if made else []
    for name, title in made.items():
        lines += [f"**{title}** ({mark_of(results)})", "", f"![{title}]({name})", ""]
    return lines
