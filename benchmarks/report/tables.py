"""The tables of one report, as Markdown."""

from collections.abc import Sequence

from benchmarks.cases import OURS
from benchmarks.report.findings import fast_precision, feeds, step
from benchmarks.report.jobs import (
    FEED,
    FROM_CACHE,
    FROM_DICOM,
    LOADER,
    MEMORY,
    READY,
    STEPS,
    WORKERS,
)
from benchmarks.report.measurement import Measurement, Report

# What a data-centre GPU would train on per second in 2D: expected, not measured.
HUNGRY = 12_000


def markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a Markdown table, short in bytes."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|--" * len(header) + "|", *lines[1:]])


def number(value: float) -> str:
    """Return a number with three digits that count, or all of a whole number's.

    >>> number(1234.5), number(12.345), number(0.012345)
    ('1,234', '12.3', '0.0123')
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _number(value: float | None, form: str = "", factor: float = 1) -> str:
    if value is None:
        return ""
    return format(value * factor, form) if form else number(value * factor)


def steps_table(report: Report) -> str:
    """Return the steps of all networks, variants and precisions."""
    header = (
        "network",
        "",
        "variant",
        "precision",
        "batch",
        "ms per step (quartiles)",
        "slices/s",
        "samples/s",
        "peak MiB",
        "kept MiB per sample",
        "operations",
        "TFLOP/s",
        "of a matrix product",
        "of a copy",
        "J per 1,000 slices",
    )
    rows = [_step(report, row) for row in report.find(section=STEPS)]
    used = [column for column in range(len(header)) if any(row[column] for row in rows)]
    return markdown(
        tuple(header[column] for column in used),
        [tuple(row[column] for column in used) for row in rows],
    )


def ratios_table(report: Report) -> str:
    """Return the speed of every variant and precision, divided by that of ours in the fast one."""
    usual = fast_precision(report)
    rows = [row for row in report.find(section=STEPS) if row.slices_per_s]
    ways = list(dict.fromkeys((row.variant, row.precision) for row in rows))
    header = ("network", "", *(_way(*way, usual) for way in ways))
    lines = []
    for case, what in dict.fromkeys((row.case, row.what) for row in rows):
        cells = [_ratio(report, case, what, *way) for way in ways]
        lines.append((f"`{case}`", what, *cells))
    return markdown(header, lines)


def _ratio(report: Report, case: str, what: str, variant: str, precision: str) -> str:
    row = step(report, case, what, variant, precision)
    if row is None:
        return ""
    wanted = {"section": STEPS, "case": case, "what": what, "variant": OURS}
    wanted["precision"] = fast_precision(report)
    # That which took turns with it, if there is one.
    beside = report.first(job=row.job, **wanted) or report.first(**wanted)
    if beside is None or not (row.samples_per_s and beside.samples_per_s):
        return ""
    return f"{row.samples_per_s / beside.samples_per_s:.2f}"


def _way(variant: str, precision: str, usual: str) -> str:
    return variant if precision == usual else f"{variant}, {precision}"


def _step(report: Report, row: Measurement) -> tuple[str, ...]:
    quartiles = f"({_number(row.ms_q25)} to {_number(row.ms_q75)})"
    time = row.note or f"{_number(row.ms_median)} {quartiles}"
    held = report.first(
        section=MEMORY,
        case=row.case,
        variant=row.variant,
        precision=row.precision,
        what=row.what,
    )
    return (
        f"`{row.case}`",
        row.what,
        row.variant,
        row.precision,
        str(row.batch),
        time,
        _number(row.slices_per_s),
        _number(row.samples_per_s),
        _number(held.peak_bytes if held else None, factor=2**-20),
        _number(row.kept_bytes_per_sample, factor=2**-20),
        "" if row.operations is None else str(row.operations),
        _number(row.tflops),
        _number(row.matmul_share, ".0%"),
        _number(row.copy_share, ".0%"),
        _number(row.joules_per_1000_slices),
    )


def loader_table(report: Report) -> str:
    """Return the stages from a file to a batch: slices per second of a core."""
    header = ("stage", "view", "slices/s", f"cores for {HUNGRY:,} slices/s")
    rows = []
    for row in report.find(section=LOADER):
        rate = row.slices_per_s or 0
        rows.append((row.case, row.view, number(rate), number(HUNGRY / rate) if rate else ""))
    return markdown(header, rows)


def workers_table(report: Report) -> str:
    """Return the slices per second of worker processes together, beside those of one process.

    Reports of older versions lack the process beside them.
    """
    found = report.find(section=WORKERS)
    counts = sorted({row.workers for row in found if row.workers})
    title = f"{' or '.join(map(str, counts))} worker processes"
    rows = []
    for row in found:
        if not row.workers or not row.slices_per_s:
            continue
        alone = report.first(section=WORKERS, case=row.case, view=row.view, workers=0)
        cells = ["", ""]
        if alone and alone.slices_per_s:
            cells = [number(alone.slices_per_s), f"{row.slices_per_s / alone.slices_per_s:.2f}"]
        rows.append((row.case, row.view, cells[0], number(row.slices_per_s), cells[1]))
    return markdown(("stage", "view", "one process", title, "ratio"), rows)


def feed_table(report: Report) -> str:
    """Return the slices per second of training by source, and what starves."""
    header = ("view", READY, FROM_CACHE, FROM_DICOM, "workers", "which side waits")
    rows = []
    for view in dict.fromkeys(row.view for row in report.find(section=FEED)):
        found = feeds(report, view)
        rates = {source: row.slices_per_s for source, row in found.items() if row.slices_per_s}
        workers = max((row.workers or 0 for row in found.values()), default=0)
        cells = [number(rates[source]) if source in rates else "" for source in header[1:4]]
        rows.append((view, *cells, str(workers), _waiting(rates)))
    return markdown(header, rows)


def _waiting(rates: dict[str, float]) -> str:
    """Say what the network loses to each source.

    >>> _waiting({"ready tensors": 100.0, "cache": 98.0, "DICOM files": 50.0})
    'the network, for DICOM files (50 % slower)'
    """
    parts = []
    for source in (FROM_CACHE, FROM_DICOM):
        if READY in rates and source in rates:
            loss = 1 - rates[source] / rates[READY]
            if loss >= 0.05:
                parts.append(f"{source} ({100 * loss:.0f} % slower)")
    return f"the network, for {' and '.join(parts)}" if parts else "the loader keeps up"
