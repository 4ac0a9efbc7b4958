"""The summaries that commands print at their end: short tables that fit the terminal."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ich_keras.answer_rules import DECISION, GROUP
from ich_keras.answers import NO, YES
from ich_keras.context import context_sentence
from ich_keras.labels import SIX, LabelSet
from ich_keras.metrics.binary import format_metric
from ich_keras.metrics.conformal import GROUPS
from ich_keras.report import summary_rows, trivial_line
from ich_keras.run_folder import SYNTHETIC, RunFolder

SYNTHETIC_LINE = (
    "Synthetic data (phantoms): these numbers show that the programs work; they say nothing about"
    " patients."
)
# As radiologists abbreviate them, for tables too narrow for the names.
ABBREVIATIONS = {
    "epidural": "EDH",
    "intraparenchymal": "IPH",
    "intraventricular": "IVH",
    "subarachnoid": "SAH",
    "subdural": "SDH",
    "any": "any",
}
FLAGS = {"contrast": "contrast medium", "operated": "gap in the skull", "empty": "no head"}
SHOWN_SERIES = 15  # with header and legend they fit on 24 rows
_LEAST_WIDTH = 40
_LEAST_UID = 13
_LONGEST_VERDICT = 20


def text_table(rows: Sequence[Sequence[str]], left: int = 1, gap: int = 2) -> str:
    """Lay out rows of text in columns: the first `left` aligned left, the others right.

    >>> print(text_table([["label", "AUROC"], ["any", "0.9"]]))
    label  AUROC
    any      0.9
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((" " * gap).join(cells).rstrip())
    return "\n".join(lines)


def _fitted(rows: Sequence[Sequence[str]], width: int) -> str:
    """Lay out rows with the wider of two gaps if it fits, else with the narrower."""
    table = text_table(rows)
    is_too_wide = max(map(len, table.splitlines())) > width
    return text_table(rows, gap=1) if is_too_wide else table


def shorten_middle(text: str, width: int) -> str:
    """Cut the middle out of a text longer than `width`: both ends of a UID identify it.

    >>> shorten_middle("1.2.840.113619.2.5.1762583", 13)
    '1.2.84…762583'
    """
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def run_summary(run: RunFolder | Path | str, width: int) -> str:
    """Summarise a finished run: AUROC per split and label, log loss, best epoch, files.

    Args:
        run: a finished run folder.
        width: columns; only the folder's path may be longer.

    Raises:
        StaleError: the folder lacks a file of a finished run.
    """
    run, width = RunFolder.at(run), max(width, _LEAST_WIDTH)
    history = pd.read_csv(run.history_file)
    best = history[history["epoch"] == run.best_epoch()].iloc[0]
    found = {name: run.metrics(name) for name in ("valid", "test")}
    splits = {name: metrics for name, metrics in found.items() if metrics is not None}
    parts = []
    if run.data()[SYNTHETIC]:
        parts.append(textwrap.fill(SYNTHETIC_LINE, width))
    levels = dict.fromkeys(level for metrics in splits.values() for level in metrics)
    for level in levels:
        of_level = {name: metrics[level] for name, metrics in splits.items() if level in metrics}
        parts.append(_level_table(level, of_level, width))
    legend = "constant: always predicting how common each label is."
    if any("trivial_auroc_any" in part for metrics in splits.values() for part in metrics.values()):
        legend += " voxel counts: a detector that only counts voxels per HU band."
    parts.append(textwrap.fill(legend, width))
    if sentence := context_sentence(run):
        parts.append(textwrap.fill(sentence, width))
    parts.append(
        textwrap.fill(
            f"Best epoch: {best['epoch']:.0f} of {len(history)} (validation log loss"
            f" {best['valid_log_loss']:.4f}).",
            width,
        )
    )
    return "\n".join([*parts, f"Report: {run.report_to_read}", f"Run folder: {run}"])


def _level_table(level: str, splits: dict[str, dict], width: int) -> str:
    """Return AUROC and log loss of one level, one column per split."""
    metrics = splits.values()
    rows = [[f"AUROC per {level}", *splits]]
    names = next(iter(metrics))["per_label"]
    rows += [[label, *(_auroc(part, label, width) for part in metrics)] for label in names]
    if any("trivial_auroc_any" in part for part in metrics):
        counted = [format_metric(part.get("trivial_auroc_any"), 3) for part in metrics]
        rows.append(["any, voxel counts", *counted])
    rows.append(["log loss", *(format_metric(part["log_loss"]) for part in metrics)])
    constant = [format_metric(part["baseline"]["prevalence"].get("log_loss")) for part in metrics]
    rows.append(["log loss, constant", *constant])
    return _fitted(rows, width)


def _auroc(part: dict, label: str, width: int) -> str:
    """Return the AUROC of a label, with its 95 % interval if there is one and it fits."""
    text = format_metric(part["auroc"][label], 3)
    intervals = (part.get("intervals") or {"metrics": {}})["metrics"]
    interval = intervals.get(f"auroc/{label}")
    if width < 60 or interval is None or interval["low"] is None:
        return text
    return f"{text} ({interval['low']:.3f}-{interval['high']:.3f})"


def evaluation_summary(metrics: dict[str, dict], split: str, width: int) -> str:
    """Lay out the metrics of one split next to those of constant predictions.

    Args:
        metrics: as `ich_keras.evaluation.evaluate` returns them.
        split: its name.
        width: columns.
    """
    width = max(width, _LEAST_WIDTH)
    parts = []
    for level, part in metrics.items():
        rows = summary_rows(part)
        header = [f"{split}, per {level}", "model", "prevalence", "negative", "skill"]
        labels = [
            [
                label,
                f"{part['n']['positive'][label]:,}",
                _auroc(part, label, width),
                format_metric(part["per_label"][label]["ap"], 3),
            ]
            for label in part["per_label"]
        ]
        parts.append(_fitted([header, *rows], width))
        parts.append(_fitted([["label", "positive", "AUROC", "AP"], *labels], width))
        if trivial_line(part):
            parts.append(textwrap.fill(trivial_line(part), width))
    parts.append(
        textwrap.fill(
            "prevalence, negative: a constant prediction of each label's prevalence, and of no"
            " haemorrhage. skill: 1 - loss / loss of the constant.",
            width,
        )
    )
    return "\n\n".join(parts)


def prediction_table(series: pd.DataFrame, width: int, labels: LabelSet = SIX) -> str:
    """Lay out the probabilities of each series.

    Args:
        series: as `FolderPrediction.series`: series_instance_uid, verdict and one column per label.
        width: columns of the terminal; a long UID loses its middle, a long verdict its end.
        labels: the columns of probabilities.

    Returns:
        At most `SHOWN_SERIES` rows, and the number of further series.

    >>> row = {"series_instance_uid": "ID_4f3d994c83", "verdict": "ok"}
    >>> print(prediction_table(pd.DataFrame([row | dict.fromkeys(SIX.names, 0.5)]), 60))
    series        verdict   EDH   IPH   IVH   SAH   SDH   any
    ID_4f3d994c83 ok      0.500 0.500 0.500 0.500 0.500 0.500
    EDH epidural, IPH intraparenchymal, IVH intraventricular,
    SAH subarachnoid, SDH subdural.
    """
    width = max(width, 60)
    shown = series.iloc[:SHOWN_SERIES]
    verdicts = [str(verdict) for verdict in shown["verdict"]]
    longest_verdict = min(max(map(len, ["verdict", *verdicts])), _LONGEST_VERDICT)
    longest_uid = max(map(len, ["series", *map(str, shown["series_instance_uid"])]))
    names = list(labels.names)
    # Full names take the room they need; abbreviations fit in that of a probability.
    needed = sum(2 + max(len(name), 5) for name in names) + longest_verdict + 2
    is_short = width < needed + min(longest_uid, 2 * _LEAST_UID)
    is_short &= set(names) <= set(ABBREVIATIONS)
    if not is_short and width < needed + _LEAST_UID:
        # Labels of a person's own have no abbreviations: only the highest is shown.
        return _highest_table(series, shown, verdicts, width, labels)
    gap = 1 if is_short else 2
    if is_short:
        names = [ABBREVIATIONS[name] for name in names]
    numbers = sum(gap + max(len(name), 5) for name in names)
    room = width - numbers - gap
    longest_verdict = min(longest_verdict, room - _LEAST_UID)
    rows = [["series", "verdict", *names]]
    for values, verdict in zip(shown.to_dict("records"), verdicts, strict=True):
        uid = shorten_middle(str(values["series_instance_uid"]), room - longest_verdict)
        if len(verdict) > longest_verdict:
            verdict = f"{verdict[: longest_verdict - 1]}…"
        rows.append([uid, verdict, *(f"{values[label]:.3f}" for label in labels.names)])
    lines = [text_table(rows, left=2, gap=gap)]
    if is_short:
        legend = ", ".join(
            f"{ABBREVIATIONS[name]} {name}" for name in labels.names if name != "any"
        )
        lines.append(textwrap.fill(f"{legend}.", width))
    return "\n".join([*lines, *_more(series, shown)])


def answers_table(series: pd.DataFrame, width: int, labels: LabelSet = SIX) -> str:
    """Count the answers of all series, label by label.

    Args:
        series: as `FolderPrediction.series`, with answers.
        width: columns of the terminal.
        labels: those that were answered.

    >>> row = {"decision_bleed": "yes", "group_bleed": "high"}
    >>> print(answers_table(pd.DataFrame([row] * 3), 60, LabelSet(("bleed",))))
    series  yes  no  low  unsure  high
    bleed     3   0    0       0     3
    """
    rows = [["series", YES, NO, *GROUPS]]
    for name in labels.names:
        decisions, groups = (series[f"{kind}{name}"] for kind in (DECISION, GROUP))
        counts = [
            (column == word).sum() if column.ne("").any() else "n/a"
            for column, words in ((decisions, (YES, NO)), (groups, GROUPS))
            for word in words
        ]
        rows.append([shorten_middle(name, max(width, _LEAST_WIDTH) // 3), *map(str, counts)])
    return _fitted(rows, max(width, _LEAST_WIDTH))


def flags_line(series: pd.DataFrame) -> str:
    """Count the series that are flagged; "" where none is.

    Args:
        series: as `FolderPrediction.series`.

    >>> flags_line(pd.DataFrame({"contrast": ["yes", "no", ""], "operated": ["yes", "", "yes"]}))
    'Flagged in series.csv, of 3 series: contrast medium 1, gap in the skull 2.'
    """
    counts = {
        title: int((series[name] == YES).sum()) for name, title in FLAGS.items() if name in series
    }
    found = ", ".join(f"{title} {count:,}" for title, count in counts.items() if count)
    return f"Flagged in series.csv, of {len(series):,} series: {found}." if found else ""


def _more(series: pd.DataFrame, shown: pd.DataFrame) -> list[str]:
    more = len(series) - len(shown)
    return [f"{more:,} more series are in series.csv."] if more else []


def _highest_table(
    series: pd.DataFrame, shown: pd.DataFrame, verdicts: list[str], width: int, labels: LabelSet
) -> str:
    """Lay out the label with the highest probability of each series."""
    values = shown[list(labels.names)].to_numpy(float)
    best = values.argmax(axis=1)
    rows = [["series", "verdict", "highest", ""]]
    for uid, verdict, row, column in zip(
        shown["series_instance_uid"], verdicts, values, best, strict=True
    ):
        name = shorten_middle(labels.names[column], width // 4)
        rows.append([shorten_middle(str(uid), width // 4), verdict[: width // 4], name])
        rows[-1].append(f"{row[column]:.3f}")
    return "\n".join([text_table(rows, left=3), *_more(series, shown)])
