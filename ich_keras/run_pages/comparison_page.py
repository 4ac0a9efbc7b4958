"""compare.html: several runs on the same test rows."""

from collections.abc import Sequence

from ich_keras.metrics.binary import format_metric
from ich_keras.notices import NOT_CLINICAL, SYNTHETIC_RUNS_NOTE
from ich_keras.pages.chart import colour
from ich_keras.pages.content import Charts, Part, Section, Table, Text, sections_page
from ich_keras.run_pages.comparison import Comparison, LevelComparison, metric_names, value_of
from ich_keras.run_pages.figures import learning_charts, overlaid_curves
from ich_keras.run_pages.numbers import TOO_FEW, counted, shown_labels, signed
from ich_keras.run_pages.scores import read_history

_TITLES = {"log_loss": "log loss", "exact_match": "exact match"}
READING = (
    "A difference is a run minus the first one, on the same rows, with the 95 % interval of"
    " resampled patients. Above 0 is better for AUROC, AP and exact match, below 0 for log loss."
)


def title_of(name: str) -> str:
    """Return a metric as people read it.

    >>> title_of("auroc/any"), title_of("log_loss")
    ('AUROC any', 'log loss')
    """
    metric, _, label = name.partition("/")
    return f"{metric.upper()} {label}" if label else _TITLES[metric]


def comparison_rows(comparison: Comparison, found: LevelComparison) -> list[list[str]]:
    """Return a row for each metric: its title, the first run's value, and for each later run its
    value, its difference, and the interval of that.
    """
    rows = []
    for name in metric_names(comparison.labels):
        row = [title_of(name), format_metric(value_of(found.metrics[0], name))]
        for metrics, differences in zip(found.metrics[1:], found.differences, strict=True):
            difference = differences.get(name) or {"value": None, "low": None, "high": None}
            row += [
                format_metric(value_of(metrics, name)),
                signed(difference["value"]),
                _interval(difference),
            ]
        rows.append(row)
    return rows


def _interval(difference: dict) -> str:
    if difference["low"] is None:
        return "n/a"
    return f"{difference['low']:+.4f} to {difference['high']:+.4f}"


def about_level(comparison: Comparison, level: str, found: LevelComparison) -> list[str]:
    """Say how many rows and patients are compared, and what is left out."""
    plural = "series" if level == "series" else "slices"
    rows = len(found.scores[0].names)
    of = "" if found.num_patients is None else f" of {found.num_patients:,} patients"
    said = [f"{rows:,} {plural}{of}."]
    left_out = {
        name: count
        for name, count in zip(comparison.names, found.num_left_out, strict=True)
        if count
    }
    if left_out:
        said.append(f"Left out, because not all runs answer them: {counted(left_out)}.")
    if found.num_patients is None:
        said.append(
            "The predictions do not say which rows are of one patient: there are no intervals."
            " ich evaluate adds that."
        )
    elif any(
        row["value"] is not None and row["low"] is None
        for differences in found.differences
        for row in differences.values()
    ):
        said.append(f"No interval (n/a): {TOO_FEW}.")
    return said


def comparison_page(comparison: Comparison) -> str:
    """Return the comparison as an HTML page."""
    names = comparison.names
    lead = []
    if comparison.is_synthetic:
        lead.append(Text(SYNTHETIC_RUNS_NOTE.replace("*", ""), is_warning=True))
    lead += [Text(NOT_CLINICAL), Text(READING)]
    sections = [
        Section(f"Differences per {level}", _difference_parts(comparison, level, found))
        for level, found in comparison.levels.items()
    ]
    sections += [
        Section("Curves", _curve_parts(comparison)),
        Section("Learning", _learning_parts(comparison)),
        Section("Settings that differ", _table_parts(comparison.settings, names, "setting")),
        Section("Environment that differs", _table_parts(comparison.environment, names, "")),
    ]
    return sections_page(f"Comparison of {', '.join(names)}", lead, sections)


def _difference_parts(comparison: Comparison, level: str, found: LevelComparison) -> list[Part]:
    parts: list[Part] = [Text(line) for line in about_level(comparison, level, found)]
    first, rows = comparison.names[0], comparison_rows(comparison, found)
    for number, name in enumerate(comparison.names[1:]):
        start = 2 + 3 * number
        header = ["", first, name, "difference", "95 % interval"]
        caption = f"{name} minus {first}, per {level}"
        own = [[*row[:2], *row[start : start + 3]] for row in rows]
        parts.append(Table(caption, header, own))
    return parts


def _legend(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(colour(number), name) for number, name in enumerate(names)]


def _curve_parts(comparison: Comparison) -> list[Part]:
    parts: list[Part] = []
    for level, found in comparison.levels.items():
        runs = list(zip(comparison.names, found.scores, strict=True))
        positive = found.metrics[0]["n"]["positive"]
        charts = [
            chart
            for label in shown_labels(comparison.labels, positive)
            for chart in overlaid_curves(runs, label, level)
        ]
        if charts:
            parts += [Text(f"Per {level}:"), Charts(charts, _legend(comparison.names))]
    return parts


def _learning_parts(comparison: Comparison) -> list[Part]:
    histories = [
        (name, read_history(run), run.best_epoch())
        for name, run in zip(comparison.names, comparison.runs, strict=True)
        if run.history_file.is_file()
    ]
    if len(histories) < len(comparison.runs):
        return []
    charts = learning_charts(histories, comparison.labels.shown)
    return [] if charts is None else [charts]


def _table_parts(rows: list[list[str]], names: list[str], header: str) -> list[Part]:
    if not rows:
        return [Text("Nothing differs.")]
    return [Table("Values in each run", [header, *names], rows, has_numbers=False)]
