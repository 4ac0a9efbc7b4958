"""`python -m benchmarks report`: README.md from the reports in a folder, always the same bytes."""

from pathlib import Path

from benchmarks.cases import MONAI, OURS, PREDICT, TRAIN
from benchmarks.report.comparison import described
from benchmarks.report.computed import computed_table, computed_words, thesis_table
from benchmarks.report.figures import FOLDER, draw_all, figures_of
from benchmarks.report.findings import (
    costs_in_slices,
    fast_precision,
    largest_batches,
    peak,
    seconds_per_patient,
    slices_of,
    step,
)
from benchmarks.report.jobs import CPU, FEED, GPU, LOADER, STEPS, SWEEP, WORKERS, jobs_of
from benchmarks.report.measurement import DONE, FAILED, LEFT_OUT, STEM, Report, read_report
from benchmarks.report.networks import MAIN, samples_per_patient
from benchmarks.report.tables import (
    feed_table,
    loader_table,
    markdown,
    number,
    ratios_table,
    steps_table,
    workers_table,
)
from ich_keras.files import atomic_write

NOT_MEASURED = "not measured"
KINDS = {GPU: "a GPU", CPU: "a processor"}
PAGE = "README.md"
_HEAD = """# Benchmarks

<!-- `python -m benchmarks report` writes this page from the files in results/. -->

"""
_COMMANDS = """
```sh
python -m benchmarks gpu                  # on a GPU, for 9 minutes; again: it goes on
python -m benchmarks cpu --minutes 30     # on the processor
python -m benchmarks compare A.csv B.csv  # your machine against one of results/
python -m benchmarks report               # write this page from results/
```

[HOWTO.md](HOWTO.md) says how to read the numbers. It also has the older, finer measurements: every
network beside plain torch and stock Keras, and the cost of the checks.
"""
_VIEWS = """
A **slice** is 256x256 with three windows (`resnet18_2d`), a **slab** is five slices
(`resnet18_3d_slab`), a **series** 60 slices (`resnet18_3d`). A batch holds the same voxels in every
view. Slices per second count what goes in: five per slab, 60 per series. A **patient** is 60
slices: 60 samples in 2D, 60 slabs (one per slice), or one series.
"""
_DETAILS = """<details><summary>Every measured step on {device}</summary>

{table}

</details>"""


def newest(results: Path) -> list[Report]:
    """Return the newest report of each device and number of threads, GPUs first.

    Args:
        results: folder of the CSVs. Trials are not among them.

    Raises:
        DataError: one of them is no report.
    """
    reports = [read_report(path) for path in sorted(results.glob(f"{STEM}_*.csv"))]
    reports.sort(key=lambda report: (report.place.date, report.path.name))
    last = {(report.place.device, report.place.threads): report for report in reports}
    return sorted(last.values(), key=lambda r: (r.kind != GPU, r.place.device, r.place.threads))


def write_page(results: Path, out: Path) -> list[Path]:
    """Write README.md and its figures.

    Args:
        results: folder of the CSVs.
        out: folder of README.md; the figures go to results/figures in it.

    Returns:
        The files.

    Raises:
        DataError: a file in `results` is no report.
    """
    reports = newest(results)
    shown = _shown(reports)
    made = [path for report in shown for path in draw_all(report, out)]
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / PAGE, page(reports))
    return [*made, out / PAGE]


def _shown(reports: list[Report]) -> list[Report]:
    """Return one report of each kind: those that have figures and tables of their own."""
    first: dict[str, Report] = {}
    for report in [*_with_steps(reports), *reports]:
        first.setdefault(report.kind, report)
    return list(first.values())


def _with_steps(reports: list[Report]) -> list[Report]:
    """Return those with a network's times: a report may hold the loader alone."""
    return [report for report in reports if report.find(section=STEPS)]


def page(reports: list[Report]) -> str:
    """Return the whole page as Markdown.

    Args:
        reports: from `newest`.
    """
    shown = _shown(reports)
    parts = [_HEAD + f"**{_sentence(shown)}**", _second_sentence(shown), _VIEWS.strip()]
    parts += ["## At a glance", _glance(reports)]
    parts += _figures(shown)
    parts += ["## Beside others", *_steps(shown)]
    parts += ["## From the file to the batch", *_loading(reports)]
    parts += ["## The largest batches", *_batches(shown)]
    parts += ["## The thesis's times", thesis_table(reports)]
    parts += ["## What is missing", *_missing(reports)]
    parts += ["## Measure it yourself", _COMMANDS.strip()]
    return "\n\n".join(parts) + "\n"


def _not_measured(measured: set[str]) -> list[str]:
    """Say which kinds of devices a section has no numbers of."""
    names = [name for kind, name in KINDS.items() if kind not in measured]
    return [f"On {' and '.join(names)}: {NOT_MEASURED}."] if names else []


def _source(report: Report) -> str:
    name = report.path.name
    later = "".join(
        f" ({', '.join(sections)}: {day})" for day, sections in report.later_days.items()
    )
    return f"{described(report.place)}{later}: [the file](results/{name})"


def _sentence(shown: list[Report]) -> str:
    for report in shown:
        costs = costs_in_slices(report, TRAIN)
        if "series" in costs:
            return (
                f"On {report.place.device}, training on a whole series of {slices_of('series')}"
                f" slices costs as much as on {costs['series']:.0f} slices in 2D."
            )
    return computed_words()


def _second_sentence(shown: list[Report]) -> str:
    for report in shown:
        costs, predict = costs_in_slices(report, TRAIN), costs_in_slices(report, PREDICT)
        if "slab" in costs and "series" in predict:
            return (
                f"A slab of {slices_of('slab')} costs as much as {costs['slab']:.1f} slices."
                f" Prediction: a series as {predict['series']:.0f}, a slab as"
                f" {predict['slab']:.1f}. Measured in {fast_precision(report)} on"
                f" {described(report.place)}."
            )
    return (
        "Nothing of this page has been measured yet; the columns say so. [HOWTO.md](HOWTO.md) has"
        " older measurements on a processor."
    )


def _glance(reports: list[Report]) -> str:
    """Return the first table: devices beside each other, measured and computed."""
    columns = _with_steps(reports)
    kinds = {report.kind for report in columns}
    titles = [f"{report.place.device}, measured" for report in columns]
    absent = [f"{name}, measured" for kind, name in KINDS.items() if kind not in kinds]
    computed = computed_table()
    header = ("", "", *titles, *absent, *computed.header)
    rows = []
    for what in (TRAIN, PREDICT):
        for view in MAIN:
            cells = [_cell(report, view, what) for report in columns]
            cells += [NOT_MEASURED] * len(absent)
            rows.append((what, view, *cells, *computed.cells[view, what]))
    notes = (
        "Slices per second; in brackets the seconds of one patient, the peak memory that a step"
        " adds, and the share of the ceiling (a matrix product on the same device; oneDNN's"
        " convolutions on a processor may be faster than that, and then exceed 100%). In italics:"
        " computed at the roof, the most that such a card can do, and no expectation.\n\n"
        f"{computed.note}"
    )
    sources = [f"- {_source(report)}, {fast_precision(report)}" for report in columns]
    return "\n".join([markdown(header, rows), "", notes, *([""] if sources else []), *sources])


def _cell(report: Report, view: str, what: str) -> str:
    row = step(report, view, what)
    if row is None or row.slices_per_s is None:
        return NOT_MEASURED
    seconds = seconds_per_patient(row, samples_per_patient(view))
    share = f", {row.matmul_share:.0%} of the ceiling" if row.matmul_share else ""
    memory = peak(report, view, OURS) if what == TRAIN else None
    held = f", {memory / 2**20:,.0f} MiB" if memory else ""
    return f"{number(row.slices_per_s)} ({seconds:.3g} s{held}{share})"


def _figures(shown: list[Report]) -> list[str]:
    """Return the figures of each report, two in a row."""
    parts = []
    for report in shown:
        images = [
            f"![{title}, {report.place.device}]({(FOLDER / name).as_posix()})"
            for name, (title, _) in figures_of(report).items()
        ]
        rows = [tuple([*images[at : at + 2], ""][:2]) for at in range(0, len(images), 2)]
        parts += [markdown(("", ""), rows)] if rows else []
    return parts


def _steps(shown: list[Report]) -> list[str]:
    parts = []
    for report in shown:
        precision = fast_precision(report)
        title = (
            f"Speed divided by that of `{OURS}` in {precision}; above 1 is faster. Variants took"
            " turns, precisions did not."
        )
        parts += [f"{title} {_source(report)}.", ratios_table(report)]
        parts.append(_DETAILS.format(device=report.place.device, table=steps_table(report)))
    return parts + _not_measured({report.kind for report in shown})


def _loading(reports: list[Report]) -> list[str]:
    parts = []
    for report in reports:
        if report.find(section=LOADER):
            parts.append(f"One core each, {_source(report)}.\n\n{loader_table(report)}")
        if report.find(section=WORKERS):
            parts.append(
                f"Worker processes in turns with one process, {_source(report)}."
                f"\n\n{workers_table(report)}"
            )
        if report.find(section=FEED):
            parts.append(f"Training (`{OURS}`) from each source.\n\n{feed_table(report)}")
    measured = {r.kind for r in reports if r.find(section=LOADER) and r.find(section=FEED)}
    return parts + _not_measured(measured)


def _batches(shown: list[Report]) -> list[str]:
    lines = []
    for report in shown:
        for view, (fastest, largest, end) in largest_batches(report).items():
            reason = f" ({end})" if end else ""
            lines.append(
                f"- {report.place.device}, {view}, `{largest.variant}`: fastest with a batch of"
                f" {fastest.batch} ({number(fastest.slices_per_s or 0)} slices/s); the largest"
                f" measured is {largest.batch}{reason}."
            )
    measured = {report.kind for report in shown if report.find(section=SWEEP)}
    return ["\n".join(lines)] * bool(lines) + _not_measured(measured)


def _missing(reports: list[Report]) -> list[str]:
    lines = []
    kinds = {report.kind for report in reports}
    for kind, name in KINDS.items():
        if kind not in kinds:
            lines.append(f"- On {name} nothing has been measured.")
    for report in reports:
        for word in (FAILED, LEFT_OUT):
            names = [
                f"{name} ({end.note})" for name, end in report.ends.items() if end.what == word
            ]
            if names:
                lines.append(f"- {report.place.device}, {word}: {'; '.join(names)}.")
        names = [
            job.name
            for job in jobs_of(report.kind, fast_precision(report))
            if job.name not in report.ends
        ]
        if names:
            lines.append(f"- {report.place.device}, not reached: {'; '.join(names)}.")
        elif all(end.what == DONE for end in report.ends.values()):
            lines.append(f"- {report.place.device}: nothing of the list is missing.")
        # A report may go on after MONAI was installed.
        if not report.place.monai and not report.find(variant=MONAI):
            lines.append(f"- {report.place.device}: MONAI was not installed.")
    return ["\n".join(lines)]
