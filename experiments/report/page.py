"""README.md of the results. Everything it states is computed from the numbers; no conclusion is
written in advance."""

from pathlib import Path

from experiments.questions import QUESTIONS, TABLE_RUNS, TABLES
from experiments.report.answer_figures import Answers
from experiments.report.answers import all_answers, answers_section
from experiments.report.comparisons import compare_runs, question_section
from experiments.report.figures import draw_all
from experiments.report.formatting import LEAST_PATIENTS, LEAST_SEEDS, Results
from experiments.report.summary import summary_section
from experiments.report.thesis_tables import METRICS_NOTES, loss_table, metrics_table
from experiments.report.trainings import runs_section
from experiments.results import Result
from experiments.runs import RUNS
from experiments.scores import sound_results
from ich_keras.errors import StaleError
from ich_keras.files import atomic_write
from ich_keras.metrics.intervals import RESAMPLES
from ich_keras.notices import NOT_CLINICAL
from ich_keras.progress import Tell

README = "README.md"
SYNTHETIC = "phantoms (synthetic): says nothing about patients"


def write_report(out: Path, tell: Tell | None = None, scale: str | None = None) -> Path:
    """Write tables and figures from the stored results of a folder.

    Args:
        out: has runs/; receives README.md and figures/.
        tell: called with single lines of text.
        scale: that the results must have; None accepts any.

    Returns:
        README.md.

    Raises:
        StaleError: no run is finished, or the results are damaged, do not belong together or are
            of another scale.
    """
    results = sound_results(out, scale)
    if not results:
        raise StaleError(
            f"{out} has no finished run.",
            "Run `python -m experiments all` with one of the scales first.",
        )
    compared = {}
    for name in QUESTIONS:
        if tell is not None:
            tell(f"question {name}")
        compared[name] = compare_runs(name, results)
    lines = [*_head(results), *summary_section(compared, results), *runs_section(results)]
    shown = [table for table in TABLES if set(TABLE_RUNS[table]) & set(results)]
    for table in shown:
        lines += loss_table(results) if table == 1 else metrics_table(table, results)
    if set(shown) - {1}:
        lines += [*METRICS_NOTES, ""]
    for name in QUESTIONS:
        lines += question_section(name, results, compared[name])
    if tell is not None:
        tell("answers")
    answers = all_answers(results)
    lines += answers_section(answers)
    lines += _figures(results, answers, out)
    path = out / README
    atomic_write(path, "\n".join(lines).rstrip() + "\n")
    return path


def _all(results: Results) -> list[Result]:
    return [result for group in results.values() for result in group]


def mark_of(results: Results) -> str:
    """Describe results in one line: data, dates, machines, seeds, time."""
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
            "**Synthetic data.** All our numbers below come from phantoms (drawn head CT). They"
            " show how the programs and the comparisons behave; they say nothing about patients."
            " The columns *as published* hold the thesis's numbers on RSNA 2019. They must not be"
            " compared with numbers on phantoms.",
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
        f"{NOT_CLINICAL} Made by `python -m experiments report`; experiments/README.md of the"
        " clone explains the runs and how to read this report.",
        "",
        "All models on the patient split of a seed have the same test patients. Models on the"
        " thesis's split, and the stand-ins on other phantoms, have their own. Numbers are means"
        f" over seeds. Intervals over patients are 95 %, percentiles of {RESAMPLES:,} resamples:"
        " patients are drawn once for all seeds, and a patient counts in each seed whose test set"
        " contains them. These intervals hold for these trained models on other patients; they do"
        " not include the variation between trainings. A seed changes the split and the training"
        " together. The range over seeds only describes a few values, and the interval over seeds"
        " (Student's t; the test sets of seeds overlap) is wide because there are so few. The"
        " number of comparisons is not corrected for.",
        "",
    ]


def _figures(results: Results, answers: Answers, out: Path) -> list[str]:
    made = draw_all(results, answers, out, mark_of(results))
    lines = ["## Figures", ""] if made else []
    for name, title in made.items():
        lines += [f"**{title}** ({mark_of(results)})", "", f"![{title}]({name})", ""]
    return lines
