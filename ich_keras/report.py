"""report.md: a run's settings and results, next to the results of constant predictors."""

import shlex

import pandas as pd

from ich_keras.breakdown import (
    MIN_SAMPLES,
    bleed_size_note,
    breakdown_rows,
    shown_label,
    unknown_properties,
)
from ich_keras.config import loss_settings_of
from ich_keras.context import context_sentence
from ich_keras.errors import StaleError
from ich_keras.labels import LabelSet
from ich_keras.learned_windows import window_lines
from ich_keras.metrics.aggregation import rule_in_words
from ich_keras.metrics.binary import METRICS, PER_LABEL, format_metric
from ich_keras.notices import NOT_CLINICAL, SYNTHETIC_NOTE
from ich_keras.recipe import Recipe, TrainingRecipe
from ich_keras.run_folder import ENDED_EARLY, EXTENDED, PLAN, SYNTHETIC, RunFolder

_SPLIT_TITLES = {"valid": "Validation (chose the weights)", "test": "Test"}
_COUNTED = ("patients", "series", "slices")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["--"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary_rows(metrics: dict) -> list[list[str]]:
    """Return one row per metric: name, the model's, the baselines', the skill.

    Args:
        metrics: as `ich_keras.metrics.binary.binary_metrics` returns them.
    """
    baseline, skill = metrics["baseline"], metrics["skill"]
    return [
        [
            metric.title,
            format_metric(metrics[name]),
            format_metric(baseline["prevalence"].get(name)),
            format_metric(baseline["all_negative"].get(name)),
            format_metric(skill.get(name)),
        ]
        for name, metric in METRICS.items()
    ]


def trivial_line(metrics: dict) -> str:
    """Return the result of counting voxels on the same phantoms; "" on other data.

    Args:
        metrics: of one level, as `ich_keras.evaluation.evaluate` returns them.
    """
    if "trivial_auroc_any" not in metrics:
        return ""
    found = format_metric(metrics["trivial_auroc_any"], 3)
    return f"Counting voxels per HU band instead, AUROC(any): {found}."


def _split_section(title: str, metrics: dict, is_broken_down: bool) -> list[str]:
    lines = [f"## {title}", ""]
    for level, part in metrics.items():
        source = part["baseline"]["prevalence"]["source"]
        lines += [
            f"### Per {level}: {part['n']['samples']:,}",
            "",
            markdown_table(
                ["metric", "model", f"prevalence of the {source}", "all negative", "skill"],
                summary_rows(part),
            ),
            "",
            markdown_table(
                ["label", "positive", *PER_LABEL],
                [
                    [
                        label,
                        f"{part['n']['positive'][label]:,}",
                        *(_with_interval(part, label, metric) for metric in PER_LABEL),
                    ]
                    for label in part["per_label"]
                ],
            ),
            "",
            *([trivial_line(part), ""] if trivial_line(part) else []),
            *_beyond_rankings(part),
            *(_breakdown_lines(part) if is_broken_down else []),
        ]
    return lines


def _breakdown_lines(part: dict) -> list[str]:
    """Return the scores of groups of series; nothing where there are none, as of older runs."""
    by = part.get("by")
    if not by:
        return []
    header = ["by", "", "series", "patients", "positive", f"AUROC({shown_label(by)})", "log loss"]
    lines = [
        "Groups of series, with 95 % intervals; those of fewer than"
        f" {MIN_SAMPLES} series are only counted:",
        "",
        markdown_table(header, [list(row) for row in breakdown_rows(by)]),
        "",
    ]
    if unknown := unknown_properties(by):
        lines += [f"Known of no series: {', '.join(unknown)}.", ""]
    if note := bleed_size_note(by):
        lines += [note, ""]
    return lines


def _with_interval(part: dict, label: str, metric: str) -> str:
    text = format_metric(part["per_label"][label][metric], 3)
    intervals = (part.get("intervals") or {"metrics": {}})["metrics"]
    found = intervals.get(f"{metric}/{label}")
    if found is None or found["low"] is None:
        return text
    return f"{text} ({found['low']:.3f}-{found['high']:.3f})"


def _beyond_rankings(part: dict) -> list[str]:
    """Return the text on smoothing, aggregation, intervals, calibration, operating points."""
    lines = _smoothing_lines(part)
    if "aggregation" in part:
        rule, is_chosen = part["aggregation"]["rule"], "chosen_on" in part["aggregation"]
        why = "chosen on validation" if is_chosen else "nothing was chosen on validation"
        lines += [f"A series' probability: {rule_in_words(rule)} ({why}).", ""]
    if part.get("intervals"):
        log_loss = part["intervals"]["metrics"]["log_loss"]
        lines += [
            f"In brackets: 95 % intervals, {part['intervals']['patients']:,} patients resampled;"
            f" log loss {_range(log_loss)}.",
            "",
        ]
    if part.get("operating", {}).get("at_specificity"):
        lines += [
            "Sensitivity (and the specificity reached) at thresholds chosen on validation:",
            "",
            markdown_table(
                ["label", *(f"at {wanted}" for wanted in part["operating"]["at_specificity"])],
                [
                    [
                        label,
                        *(
                            f"{format_metric(rates[label]['recall'], 3)}"
                            f" ({format_metric(rates[label]['specificity'], 3)})"
                            for rates in part["operating"]["at_specificity"].values()
                        ),
                    ]
                    for label in part["per_label"]
                ],
            ),
            "",
        ]
    if part.get("triage"):
        found = part["triage"]
        reached = dict(zip(found["read"], found["found"], strict=True))
        lines += [
            "Read in the order of the network, the likeliest first: "
            + ", ".join(f"{reached[share]:.0%} found in {share:.0%}" for share in (0.1, 0.2, 0.5))
            + f"; the first positive is number {found['first_positive']:.1f}"
            f" ({found['first_positive_as_they_come']:.1f} in random order).",
            "",
        ]
    if part.get("calibration", {}).get("temperature"):
        found = part["calibration"]
        lines += [
            f"Temperature (fitted on validation) {found['temperature']:.3f}: log loss"
            f" {part['log_loss']:.4f} to {found['scaled_log_loss']:.4f}. Expected calibration error"
            " before and after:"
            + ",".join(
                f" {label} {format_metric(found['labels'][label]['ece'], 3)}"
                f" to {format_metric(found['scaled'][label]['ece'], 3)}"
                for label in part["per_label"]
            )
            + ".",
            "",
        ]
    return lines


def _smoothing_lines(part: dict) -> list[str]:
    """Return the text on smoothing along z, with the scores that it changed."""
    lines = []
    if "smoothing" in part:
        kernel, is_chosen = part["smoothing"]["kernel"], "chosen_on" in part["smoothing"]
        why = "chosen on validation" if is_chosen else "nothing was chosen on validation"
        lines += [f"Smoothing of the slices' logits along z: {kernel} ({why}).", ""]
    if "unsmoothed" in part:
        before = part["unsmoothed"]
        gain = before["gain"] or {}
        names = {"log loss": "log_loss"} | {f"AUROC({n})": f"auroc/{n}" for n in before["auroc"]}
        old = {"log_loss": before["log_loss"]}
        old |= {f"auroc/{name}": value for name, value in before["auroc"].items()}
        rows = [
            [title, format_metric(old[name]), *_gain(gain.get(name))]
            for title, name in names.items()
        ]
        header = ["", "without smoothing", "smoothing adds", "95 % interval"]
        lines += [markdown_table(header, rows), ""]
    return lines


def _gain(row: dict | None) -> list[str]:
    if row is None or row["value"] is None:
        return ["n/a", "n/a"]
    if row["low"] is None:
        return [f"{row['value']:+.4f}", "n/a"]
    return [f"{row['value']:+.4f}", f"{row['low']:+.4f} to {row['high']:+.4f}"]


def _range(interval: dict) -> str:
    if interval["low"] is None:
        return "n/a"
    return f"{interval['low']:.4f}-{interval['high']:.4f}"


def _loss_text(training: TrainingRecipe, labels: LabelSet) -> str:
    """Return the loss with the settings that were given."""
    kind = "softmax cross-entropy" if labels.exclusive else training.loss
    settings = vars(loss_settings_of(training)) | {"loss": None}
    given = [f"{name} {value}" for name, value in settings.items() if value is not None]
    return f"{kind} ({', '.join(given)})" if given else kind


def _average_line(best: int, training: TrainingRecipe, environment: dict) -> str:
    """Say which weights were kept where the last epochs were to be averaged."""
    assert training.swa is not None
    # A run with more epochs may keep the best weights of one before, which had its own last epochs.
    ends = [before.get("of", before["epoch"]) for before in environment.get(EXTENDED, ())]
    done = [before["epoch"] for before in environment.get(EXTENDED, ())]
    parts = zip([*done, training.epochs], [*ends, training.epochs], strict=True)
    end = next(end for last, end in parts if best <= last)
    first = end - training.swa + 1
    if best > first:
        return f"Kept: the average of the weights after epochs {first} to {best}."
    why = "the first of the epochs that are averaged" if best == first else "no average"
    return f"Kept: the weights after epoch {best}, {why}."


def course_lines(run: RunFolder, recipe: Recipe, plan: dict, environment: dict) -> list[str]:
    """Say where a training began, what is special about it, and why it ended.

    Args:
        run, recipe, environment: of the training.
        plan: its entry of data.json.

    Returns:
        Sentences; names of a user's code are in backticks.
    """
    training = recipe.training
    ended_early = environment.get(ENDED_EARLY)
    lines = [f"Started from {plan['weights']}."] if plan.get("weights") else []
    if plan.get("note"):
        lines.append(plan["note"])
    lines += recipe.input_options
    if training.own_augment:
        lines.append(f"Augmented by a function of the user's: `{training.own_augment}`.")
    if training.own_callbacks:
        lines.append(f"Trained with callbacks of the user's: `{training.own_callbacks}`.")
    for before in environment.get(EXTENDED, ()):
        lines.append(f"Goes on after epoch {before['epoch']} of the finished run {before['run']}.")
    lines += [f"Windows {line}." for line in window_lines(run)]
    if training.ema is not None:
        lines.append(f"Judged and kept: the moving average of the weights ({training.ema:g}).")
    if training.swa is not None:
        lines.append(_average_line(run.best_epoch(), training, environment))
    if ended_early is not None:
        early = f"{ended_early['epoch']} of {training.epochs} epochs: {ended_early['why']}"
        lines.append(f"Stopped after {early}.")
    if sentence := context_sentence(run):
        lines.append(sentence)
    return lines


def settings_line(recipe: Recipe, environment: dict) -> str:
    """Say in a sentence what was trained, and how."""
    training, size = recipe.training, recipe.inputs.size
    return (
        f"{recipe.preset}, {size}x{size} pixels,"
        f" {'weights ' + training.weights if training.weights else 'from scratch'},"
        f" Adam at {training.learning_rate:g} ({training.schedule}),"
        f" loss {_loss_text(training, recipe.labels)}, batch {training.batch_size},"
        f" seed {training.seed}, on {environment['backend']} ({environment['device']})."
    )


def report_text(run: RunFolder) -> str:
    """Return the content of report.md, made from the other files of a run folder.

    Raises:
        StaleError: the folder lacks a file of a finished training, or not all epochs are done. A
            run that has a report counts as finished.
    """
    recipe, data, environment = run.recipe(), run.data(), run.environment()
    training = recipe.training
    history = pd.read_csv(run.history_file)
    ended_early = environment.get(ENDED_EARLY)
    if len(history) < training.epochs and ended_early is None:
        raise StaleError(
            f"the training in {run} has done {len(history)} of {training.epochs} epochs: a report"
            " would declare it finished.",
            f"Finish it: ich-train --resume {shlex.quote(str(run))}",
        )
    plan = data[PLAN]
    lines = [f"# Run {run.path.name}", "", NOT_CLINICAL, ""]
    if data[SYNTHETIC]:
        lines += [SYNTHETIC_NOTE, ""]
    if plan["warning"]:
        lines += [f"**Warning:** {plan['warning']}", ""]
    for line in course_lines(run, recipe, plan, environment):
        lines += [line, ""]
    best = history[history["epoch"] == run.best_epoch()].iloc[0]
    lines += [
        settings_line(recipe, environment),
        "",
        markdown_table(
            ["split", "patients", "series", "slices"],
            [
                [name, *(f"{plan[f'num_{what}'][name]:,}" for what in _COUNTED)]
                for name in ("train", "valid", "test")
            ],
        ),
        "",
        f"Best epoch: {best['epoch']:.0f} of {len(history)} (validation log loss"
        f" {best['valid_log_loss']:.4f}). A probability of 0.5 or more counts as positive. Skill is"
        " 1 - loss / (loss of the constant answer): 1 is perfect, 0 is no better than the constant"
        " answer.",
        "",
    ]
    for name, title in _SPLIT_TITLES.items():
        metrics = run.metrics(name)
        if metrics is not None:
            lines += _split_section(title, metrics, is_broken_down=name == "test")
    lines += [
        "## History",
        "",
        markdown_table(
            list(history.columns),
            [
                ["n/a" if pd.isna(value) else f"{value:.6g}" for value in row]
                for row in history.itertuples(index=False)
            ],
        ),
    ]
    return "\n".join(lines) + "\n"
