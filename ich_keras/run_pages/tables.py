"""The tables of results in report.html."""

import math

import numpy as np

from ich_keras.labels import LabelSet
from ich_keras.metrics.binary import CLIP, PER_LABEL, format_metric
from ich_keras.pages.content import Part, Table, Text
from ich_keras.report import summary_rows, trivial_line
from ich_keras.run_pages.numbers import column, signed, with_interval
from ich_keras.run_pages.scores import LevelScores

MOST_CLASSES = 20  # of exclusive labels, in a table of confusions
POINT = "0.90"  # the specificity of decisions, unless another one is asked for


def levels_table(metrics: dict[str, dict], labels: LabelSet) -> Table:
    """Put the rankings per slice beside those per series."""
    header = ["label"]
    for level in metrics:
        header += [f"positive, per {level}", f"AUROC per {level}", f"AP per {level}"]
    rows = []
    for label in labels.names:
        row = [label]
        for part in metrics.values():
            row.append(f"{part['n']['positive'][label]:,} of {_present(part, label):,}")
            row += [with_interval(part, name, label) for name in ("auroc", "ap")]
        rows.append(row)
    return Table("AUROC and average precision (AP) with 95 % intervals by patient", header, rows)


def overall_table(metrics: dict, level: str) -> Table:
    """Put the scores of all labels together beside those of constant answers."""
    source = metrics["baseline"]["prevalence"]["source"]
    header = ["", "model", f"prevalence of the {source}", "all negative", "skill"]
    caption = f"Per {level}: the model beside constant answers (1 is a perfect skill, 0 none)"
    return Table(caption, header, summary_rows(metrics))


def rates_table(metrics: dict, level: str) -> Table:
    """Return every metric of every label; a probability of 0.5 or more is positive."""
    names = PER_LABEL
    rows = [
        [label, *(format_metric(part.get(name), 3) for name in names)]
        for label, part in metrics["per_label"].items()
    ]
    caption = f"Per {level}: every metric, where 0.5 or more is positive"
    return Table(caption, ["label", *names], rows, is_folded=True)


def baseline_parts(metrics: dict, level: str) -> list[Part]:
    """Put each label's scores beside those of constant answers, and of counting voxels."""
    constants = metrics["baseline"]["prevalence"]["probabilities"]
    rows = []
    for label, part in metrics["per_label"].items():
        positive, present = metrics["n"]["positive"][label], _present(metrics, label)
        constant = constant_log_loss(positive, present, constants[label])
        is_ranked = part["auroc"] is not None
        share = positive / present if present else None
        gain = None
        if constant is not None and part["log_loss"] is not None and constant > 10 * CLIP:
            gain = 1 - part["log_loss"] / constant
        rows.append(
            [
                label,
                with_interval(metrics, "auroc", label),
                "0.500" if is_ranked else "n/a",
                with_interval(metrics, "ap", label),
                format_metric(share, 3),
                format_metric(part["log_loss"]),
                format_metric(constant),
                signed(gain, 3),
            ]
        )
    header = ["label", "AUROC", "constant", "AP", "constant", "log loss", "constant", "skill"]
    caption = f"Per {level}: each label beside the constant answer, its prevalence in training"
    parts: list[Part] = [Table(caption, header, rows)]
    if trivial_line(metrics):
        parts.append(Text(f"{trivial_line(metrics)} That is the detector to beat."))
    return parts


def constant_log_loss(positive: int, present: int, chance: float | None) -> float | None:
    """Return the log loss of one answer for all samples; None without samples or an answer.

    >>> round(constant_log_loss(1, 4, 0.25), 4)
    0.5623
    """
    if not present or chance is None:
        return None
    chance = min(max(chance, CLIP), 1 - CLIP)
    share = positive / present
    return -(share * math.log(chance) + (1 - share) * math.log(1 - chance))


def operating_parts(metrics: dict, level: str) -> list[Part]:
    """Show what is decided with the thresholds that were chosen on validation."""
    points = (metrics.get("operating") or {}).get("at_specificity") or {}
    if POINT not in points:
        return []
    rows = []
    limits = column([rates["threshold"] for rates in points[POINT].values()])
    for limit, (label, rates) in zip(limits, points[POINT].items(), strict=True):
        positive, present = metrics["n"]["positive"][label], _present(metrics, label)
        counts = confusion(rates, positive, present - positive)
        rows.append(
            [
                label,
                limit,
                *(("n/a",) * 4 if counts is None else (f"{count:,}" for count in counts)),
                *(format_metric(rates[name], 3) for name in ("recall", "specificity")),
                format_metric(rates["precision"], 3),
                format_metric(_negative_value(counts), 3),
            ]
        )
    header = ["label", "threshold", "found", "missed", "false alarms", "true negatives"]
    header += ["sensitivity", "specificity", "PPV", "NPV"]
    parts: list[Part] = [
        Table(f"Per {level}, thresholds for a specificity of {POINT} on validation", header, rows)
    ]
    others = [name for name in points if name != POINT]
    if others:
        rows = [
            [
                label,
                *(
                    f"{format_metric(points[name][label]['recall'], 3)}"
                    f" ({format_metric(points[name][label]['specificity'], 3)})"
                    for name in others
                ),
            ]
            for label in metrics["per_label"]
        ]
        caption = f"Per {level}: sensitivity (and the specificity reached) at other thresholds"
        parts.append(Table(caption, ["label", *(f"for {name}" for name in others)], rows))
    return parts


def confusion(rates: dict, positive: int, negative: int) -> tuple[int, int, int, int] | None:
    """Return how many are found, missed, false alarms and true negatives.

    Args:
        rates: "recall" and "specificity", which is None where there is nothing to count.
        positive, negative: samples of each kind.

    Returns:
        None where there is no threshold.

    >>> confusion({"threshold": 0.2, "recall": 0.75, "specificity": 0.9}, 4, 10)
    (3, 1, 1, 9)
    """
    if rates["threshold"] is None:
        return None
    found = round((rates["recall"] or 0) * positive)
    right = round((rates["specificity"] or 0) * negative)
    return found, positive - found, negative - right, right


def _negative_value(counts: tuple[int, int, int, int] | None) -> float | None:
    if counts is None or counts[1] + counts[3] == 0:
        return None
    return counts[3] / (counts[1] + counts[3])


def class_confusion(scores: LevelScores, level: str) -> list[Part]:
    """Count which of exclusive labels is answered for which; nothing for other labels."""
    labels = scores.labels
    if not labels.exclusive:
        return []
    if len(labels) > MOST_CLASSES:
        return [Text(f"{len(labels)} classes are too many for a table of confusions.")]
    rows = (scores.truth >= 0).all(axis=1)
    true, answered = scores.truth[rows].argmax(axis=1), scores.values[rows].argmax(axis=1)
    counts = np.zeros((len(labels), len(labels)), int)
    np.add.at(counts, (true, answered), 1)
    table = [
        [name, *(f"{count:,}" for count in row)]
        for name, row in zip(labels.names, counts.tolist(), strict=True)
    ]
    header = ["truly", *(f"answered {name}" for name in labels.names)]
    return [Table(f"Per {level}: the likeliest class", header, table)]


def calibration_table(metrics: dict, level: str) -> list[Part]:
    """Compare calibration before and after the temperature."""
    found = metrics.get("calibration") or {}
    before, after = found.get("labels") or {}, found.get("scaled") or {}
    if not before:
        return []
    header = ["label", "ECE", "Brier score"]
    if after:
        header = ["label", "ECE before", "after", "Brier score before", "after"]
    rows = []
    for label, part in before.items():
        row = [label]
        for name in ("ece", "brier"):
            row.append(format_metric(part[name], 3))
            if after:
                row.append(format_metric(after[label][name], 3))
        rows.append(row)
    caption = f"Per {level}: expected calibration error (ECE) and Brier score"
    parts: list[Part] = [Table(caption, header, rows)]
    if after:
        parts.append(
            Text(
                f"The temperature {found['temperature']:.3f} was fitted on validation. Log loss"
                f" {format_metric(metrics['log_loss'])} before,"
                f" {format_metric(found['scaled_log_loss'])} after."
            )
        )
    return parts


def _present(metrics: dict, label: str) -> int:
    """Return how many samples have a label, positive or negative."""
    number = metrics["n"]
    return number.get("present", {}).get(label, number["samples"])
