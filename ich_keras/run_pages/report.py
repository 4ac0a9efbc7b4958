"""report.html: a run to look at. It is made again from what lies in the run folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ich_keras import __version__
from ich_keras.context import MAPS_ALONE, context_sentence
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.split import Split
from ich_keras.errors import StaleError
from ich_keras.evaluation import require_pixels, require_size
from ich_keras.files import atomic_write, lock
from ich_keras.learned_windows import moved_windows, read_windows
from ich_keras.leftovers import remove_leftovers
from ich_keras.metrics.aggregation import rule_in_words
from ich_keras.notices import NOT_CLINICAL, SYNTHETIC_NOTE
from ich_keras.pages.content import Part, Section, Table, Text, sections_page
from ich_keras.recipe import Recipe
from ich_keras.report import course_lines, settings_line
from ich_keras.run_checksums import update_checksums
from ich_keras.run_folder import PLAN, STAGES, SYNTHETIC, RunFolder
from ich_keras.run_pages.card import CARD, card_parts, data_card
from ich_keras.run_pages.figures import (
    learning_charts,
    level_chart,
    ranking_charts,
    reliability_charts,
)
from ich_keras.run_pages.numbers import column, duration, flat, without_interval
from ich_keras.run_pages.scores import TEST, Results, read_history, read_results
from ich_keras.run_pages.tables import (
    baseline_parts,
    calibration_table,
    class_confusion,
    levels_table,
    operating_parts,
    overall_table,
    rates_table,
)
from ich_keras.run_pages.thumbnails import HeatMaps, mistake_parts
from ich_keras.run_pages.windows import window_charts

NO_CACHE = (
    "There are no pictures here, because this page was made without the cache. `ich report RUN"
    " --cache CACHE` adds them."
)
MOST_ROWS = 200  # of the history


def write_report_page(
    run_dir: RunFolder | Path | str,
    cache: CTCache | None = None,
    heat_maps: HeatMaps | None = None,
) -> Path:
    """Make report.html in a run folder, in place of an earlier one.

    Args:
        run_dir: a run, of this version or an older one. An unfinished one gets
            report.unfinished.html, which says so.
        cache: that of the training; adds pictures of the worst mistakes.
        heat_maps: draws on these pictures where the network looked.

    Returns:
        The file.

    Raises:
        StaleError: there is no run, one of its files is damaged or was changed since it finished,
            another process evaluates it, or the cache has other pixels.
        UsageError: the cache has another size.
        EnvironmentProblem: the disk is full.
    """
    run = RunFolder.at(run_dir).require_finished(unfinished=True)
    remove_leftovers(run.path)
    page = report_page(run, cache, heat_maps)
    if not run.is_finished:
        atomic_write(run.page_file(False), page)
        return run.page_file(False)
    # An evaluation at the same time would lose one of two updates of the checksums.
    with lock(run.lock_file, is_kept=False):
        keep_page(run, page)
    return run.page_file()


def keep_page(run: RunFolder, page: str) -> None:
    """Write report.html of a finished run, whose lock is held, and its checksum."""
    atomic_write(run.page_file(), page)
    update_checksums(run, [run.page_file().name])


def report_page(
    run: RunFolder, cache: CTCache | None = None, heat_maps: HeatMaps | None = None
) -> str:
    """Return the content of report.html; arguments as for `write_report_page`."""
    recipe, data = run.recipe(), run.data()
    labels = recipe.labels
    split = run.split() if run.split_file.is_file() else None
    if cache is not None:
        require_size(recipe, cache)
        if split is not None:
            require_pixels(run, split, TEST, cache)
    environment = run.environment() if run.environment_file.is_file() else {}
    history = read_history(run)
    results = read_results(run)
    card = data.get(CARD)
    if card is None and cache is not None and cache.labelling is not None:
        card = data_card(cache, labels)
    title = f"Run {run.path.absolute().name}"
    sections = [
        Section("Results", _result_parts(results, recipe)),
        Section("Curves", _curve_parts(results)),
        Section("Decisions", _decision_parts(results)),
        Section("Calibration", _calibration_parts(results, recipe)),
        Section("Worst mistakes", _mistake_parts(run, results, cache, split, heat_maps)),
        Section("Learning", _learning_parts(run, recipe, history)),
        *_window_sections(run, recipe),
        Section("Data", card_parts(data, split, card, labels)),
        Section("Settings", [_settings("Settings, as they were decided", recipe.to_dict())]),
        Section("Environment and time", _environment_parts(run, environment, history)),
    ]
    return sections_page(title, _lead(run, recipe, data, environment), sections)


def _lead(run: RunFolder, recipe: Recipe, data: dict, environment: dict) -> list[Text]:
    """Return what stands at the top, warnings first."""
    found = []
    if not run.is_finished:
        found.append(Text(run.notice(), is_warning=True))
    if data.get(SYNTHETIC):
        found.append(Text(SYNTHETIC_NOTE.replace("*", ""), is_warning=True))
    plan = data.get(PLAN) or {}
    if plan.get("warning"):
        found.append(Text(f"Warning: {plan['warning']}", is_warning=True))
    found.append(Text(NOT_CLINICAL))
    if "backend" in environment and "device" in environment:
        found.append(Text(settings_line(recipe, environment)))
    said = course_lines(run, recipe, plan, environment) if plan else []
    found += [Text(line.replace("`", "")) for line in said]
    found.append(Text(f"Made by ich_keras {__version__} from the files of the run folder."))
    return found


def _result_parts(results: Results, recipe: Recipe) -> list[Part]:
    if not results.metrics:
        return [Text("The test split was not evaluated: ich evaluate does that.", is_warning=True)]
    metrics = {level: results.metrics[level] for level in results.levels}
    parts: list[Part] = [Text(_counts(results))]
    parts.append(levels_table(metrics, recipe.labels))
    if lacking := without_interval(metrics, recipe.labels):
        parts.append(Text(lacking))
    chart = level_chart(metrics, recipe.labels)
    parts += [] if chart is None else [chart]
    for level, part in metrics.items():
        parts += [overall_table(part, level), *baseline_parts(part, level)]
        parts.append(rates_table(part, level))
    for level, part in metrics.items():
        if "aggregation" in part and level == "series":
            rule = part["aggregation"]["rule"]
            parts.append(Text(f"A series' probability is {rule_in_words(rule)}."))
        if "smoothing" in part:
            kernel = part["smoothing"]["kernel"]
            parts.append(Text(f"The slices' logits were smoothed along z: {kernel}."))
    return parts


def _counts(results: Results) -> str:
    said = []
    for level in results.levels:
        part = results.metrics[level]
        patients = (part.get("intervals") or {}).get("patients")
        of = "" if patients is None else f" of {patients:,} patients"
        plural = "series" if level == "series" else "slices"
        said.append(f"{part['n']['samples']:,} {plural}{of}")
    return f"The test split: {', '.join(said)}. What is chosen was chosen on validation."


def _curve_parts(results: Results) -> list[Part]:
    parts: list[Part] = []
    for level in results.levels:
        if level not in results.scores:
            continue
        scores = results.scores[level]
        drawn = ranking_charts(results.metrics[level], scores, level)
        if not drawn:
            continue
        band = "Bands and brackets are 95 % intervals of resampled patients."
        if scores.patients is None:
            band = "The predictions do not say which rows are of one patient: there are no bands."
        parts += [Text(f"Per {level}. {band} Dashed lines are constant answers."), *drawn]
    if results.metrics and not parts:
        parts.append(Text("There are no predictions of the test split to draw curves from."))
    return parts


def _decision_parts(results: Results) -> list[Part]:
    parts: list[Part] = []
    for level in results.levels:
        parts += operating_parts(results.metrics[level], level)
        if level in results.scores:
            parts += class_confusion(results.scores[level], level)
    if results.metrics and not parts:
        parts.append(Text("Nothing was chosen on validation: there are no thresholds."))
    return parts


def _calibration_parts(results: Results, recipe: Recipe) -> list[Part]:
    parts: list[Part] = []
    for level in results.levels:
        metrics = results.metrics[level]
        chart = reliability_charts(metrics, recipe.labels, level)
        parts += [] if chart is None else [Text(f"Per {level}:"), chart]
        parts += calibration_table(metrics, level)
    return parts


def _mistake_parts(
    run: RunFolder,
    results: Results,
    cache: CTCache | None,
    split: Split | None,
    heat_maps: HeatMaps | None,
) -> list[Part]:
    levels = [level for level in results.levels if level in results.scores]
    if not levels:
        return []
    if cache is None:
        return [Text(NO_CACHE.replace("`", ""))]
    level = levels[0]
    alone: list[Part] = []
    if heat_maps is not None and context_sentence(run):
        alone.append(Text(MAPS_ALONE))
    found = mistake_parts(results.metrics[level], results.scores[level], level, cache, heat_maps)
    return [*alone, *found]


def _learning_parts(run: RunFolder, recipe: Recipe, history: pd.DataFrame) -> list[Part]:
    if not len(history):
        return [Text("No epoch is recorded.")]
    best = run.best_epoch()
    parts: list[Part] = [
        Text(f"Kept: epoch {best} of {len(history)}, the lowest validation log loss.")
    ]
    charts = learning_charts([("run", history, best)], recipe.labels.shown)
    parts += [] if charts is None else [charts]
    shown = history.iloc[-MOST_ROWS:]
    columns = [column(shown[name].tolist(), fewest=5) for name in shown]
    rows = [list(row) for row in zip(*columns, strict=True)]
    last = "" if len(shown) == len(history) else f", the last {MOST_ROWS}"
    parts.append(Table(f"Every epoch{last}", list(history.columns), rows, is_folded=True))
    return parts


def _window_sections(run: RunFolder, recipe: Recipe) -> list[Section]:
    learned, table = recipe.network.windows, read_windows(run)
    if learned is None or table is None:
        return []
    parts = window_charts(learned, table, moved_windows(run), run.best_epoch())
    rows = [
        list(row) for row in zip(*(column(table[name].tolist()) for name in table), strict=True)
    ]
    return [Section("Windows", [*parts, Table("Every epoch", list(table), rows, is_folded=True)])]


def _environment_parts(run: RunFolder, environment: dict, history: pd.DataFrame) -> list[Part]:
    stages = []
    if "seconds" in history and len(history):
        seconds = history["seconds"].astype(float)
        stages.append([f"training, {len(history)} epochs", duration(float(seconds.sum()))])
        stages.append(["an epoch with its validation", duration(float(seconds.mean()))])
    taken = environment.get(STAGES)
    if isinstance(taken, dict):
        for name, value in taken.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise StaleError(
                    f"{run.environment_file} is damaged: {STAGES}.{name} is {value!r}; expected"
                    " seconds.",
                    "Copy the original run folder again.",
                )
        stages += [[name, duration(float(value))] for name, value in taken.items()]
    parts: list[Part] = []
    if stages:
        parts.append(Table("Time", ["stage", "time"], stages))
    if environment:
        said = {name: value for name, value in environment.items() if name != STAGES}
        parts.append(_settings("Environment", said))
    return parts


def _settings(caption: str, content: Any) -> Table:
    rows: Sequence[Sequence[str]] = [[name, value] for name, value in flat(content).items()]
    return Table(caption, ["setting", "value"], rows, is_folded=True, has_numbers=False)
