"""The summary that `ich evaluate --external` prints."""

import textwrap
from typing import Any

from ich_keras.breakdown import bleed_size_note, breakdown_rows, unknown_properties
from ich_keras.counting import number_of
from ich_keras.metrics.binary import format_metric
from ich_keras.summary import SYNTHETIC_LINE, text_table

_LEAST_WIDTH = 40
_LONGEST_GROUP = 30


def external_summary(metrics: dict[str, Any], width: int) -> str:
    """Lay out the scores on external data beside the run's own test numbers.

    Args:
        metrics: as `ich_keras.external.evaluate_external` gives them.
        width: columns.
    """
    width = max(width, _LEAST_WIDTH)
    parts = [textwrap.fill(SYNTHETIC_LINE, width)] if metrics["synthetic"] else []
    parts.append(textwrap.fill(_data_line(metrics["data"]), width))
    for level in ("slice", "series"):
        if level in metrics:
            parts.append(_level(level, metrics[level], metrics["own"].get(level)))
    for level, found in metrics.get("recalibrated", {}).items():
        parts.append(_recalibrated(level, found))
    parts += [_broken_down(by, width) for by in metrics["by"].values()]
    if metrics["thin"]:
        parts.append(textwrap.fill(metrics["thin"], width))
    if metrics["domain"] is not None:
        parts.append(textwrap.fill(_domain_line(metrics["domain"]), width))
    if metrics["unseen"]["note"]:
        parts.append(textwrap.fill(metrics["unseen"]["note"], width))
    parts.append(textwrap.fill(metrics["notice"], width))
    return "\n\n".join(parts)


def _data_line(data: dict[str, Any]) -> str:
    positive = ", ".join(
        f"{name} {data['series_positive'][name]:,} of {data['series_with_label'][name]:,}"
        for name in data["labels"]
    )
    line = (
        f"{number_of(data['patients'], 'patient')}, {data['series']:,} series,"
        f" {number_of(data['slices'], 'slice')};"
        f" labels of each {data['label_level']}. Positive series: {positive}."
    )
    if data["missing_labels"]:
        line += f" Not labelled: {', '.join(data['missing_labels'])}."
    if data["unused_labels"]:
        line += f" The run does not answer: {', '.join(data['unused_labels'])}."
    return line


def _domain_line(domain: dict[str, Any]) -> str:
    return (
        f"Outside of what the run was trained on, by the network's features:"
        f" {domain['outside']:,} of {domain['series']:,} series ({100 * domain['share']:.1f} %)."
    )


def _level(level: str, found: dict[str, Any], own: dict[str, Any] | None) -> str:
    rows = [[f"AUROC per {level}", "here", "run's test", "positive"]]
    for label, row in found["per_label"].items():
        if row["log_loss"] is None:
            continue
        rows.append(
            [
                label,
                _with_interval(found, label),
                "n/a" if own is None else _with_interval(own, label),
                f"{row['positive']:,}",
            ]
        )
    for name, title in (("log_loss", "log loss"),):
        there = "n/a" if own is None else format_metric(own[name])
        rows.append([title, format_metric(found[name]), there, ""])
    constant = format_metric(found["baseline"]["prevalence"]["log_loss"])
    rows.append(["log loss, constant", constant, "", ""])
    return text_table(rows)


def _with_interval(part: dict[str, Any], label: str) -> str:
    text = format_metric(part["auroc"][label], 3)
    found = (part.get("intervals") or {"metrics": {}})["metrics"].get(f"auroc/{label}")
    if found is None or found["low"] is None:
        return text
    return f"{text} ({found['low']:.3f}-{found['high']:.3f})"


def _recalibrated(level: str, found: dict[str, Any]) -> str:
    count = found["patients"]
    rows = [
        [f"recalibrated, {level}", "before", "after"],
        [
            "log loss",
            *(
                format_metric(found[when]["calibration"].get("scaled_log_loss"))
                for when in ("before", "after")
            ),
        ],
        ["temperature", *(format_metric(found["temperature"][w], 3) for w in ("run", "local"))],
    ]
    return (
        f"{text_table(rows)}\n{number_of(count['fitted'], 'patient')} fitted, the other"
        f" {count['scored']:,} scored."
    )


def _broken_down(by: dict[str, Any], width: int) -> str:
    rows = [["series by", "", "samples", "positive", "AUROC"]]
    rows += [
        [row.title, row.group[:_LONGEST_GROUP], row.samples, row.positive, row.auroc]
        for row in breakdown_rows(by)
    ]
    lines = [text_table(rows, left=2)]
    if unknown := unknown_properties(by):
        lines.append(textwrap.fill(f"Known of no series: {', '.join(unknown)}.", width))
    if note := bleed_size_note(by):
        lines.append(textwrap.fill(note, width))
    return "\n".join(lines)
