"""The figures of a report, as SVG. matplotlib is imported only to draw one."""

import io
from pathlib import Path
from typing import Any

from benchmarks.cases import OURS, PREDICT, STOCK, TRAIN
from benchmarks.report.comparison import described
from benchmarks.report.findings import fast_precision, measured_ceilings, peak, rival, stacks, step
from benchmarks.report.jobs import SWEEP
from benchmarks.report.measurement import Report
from benchmarks.report.networks import MAIN, NETWORKS, network
from benchmarks.report.roofs import work
from ich_keras.files import atomic_write

FOLDER = Path("results") / "figures"
_COLOURS = {"slice": "tab:blue", "slab": "tab:orange", "series": "tab:green"}
_MARKS = {OURS: "o", STOCK: "x"}


def figures_of(report: Report) -> dict[str, tuple[str, Any]]:
    """Return the figures that a report has the numbers for: file name -> (title, function)."""
    kinds = {
        "throughput": ("Throughput of training against its memory", _throughput, _has_memory),
        "step": ("Where the time of a training step goes", _stacked, lambda r: bool(stacks(r))),
        "roofline": ("Roofline", _roofline, _has_roof),
        "batches": ("Throughput by batch size", _batches, lambda r: bool(r.find(section=SWEEP))),
    }
    return {
        f"{report.kind}-{name}.svg": (title, draw)
        for name, (title, draw, has_numbers) in kinds.items()
        if has_numbers(report)
    }


def draw_all(report: Report, out: Path) -> list[Path]:
    """Draw every figure of a report.

    Args:
        report: the numbers.
        out: folder of the page; receives results/figures/<name>.svg.

    Returns:
        The files.
    """
    import matplotlib

    matplotlib.use("Agg")
    # The same numbers give the same bytes.
    matplotlib.rcParams.update({"svg.hashsalt": "ich_keras", "font.size": 9})
    from matplotlib import pyplot

    made = []
    for name, (title, draw) in figures_of(report).items():
        figure, axis = pyplot.subplots(figsize=(6, 3.6))
        draw(axis, report)
        axis.set_title(title)
        figure.text(0.01, 0.01, described(report.place), fontsize=6.5, color="dimgrey")
        figure.tight_layout(rect=(0, 0.04, 1, 1))
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
        pyplot.close(figure)
        path = out / FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, stream.getvalue())
        made.append(path)
    return made


def _points(report: Report) -> list[tuple[str, str, float, float]]:
    """Return (view, variant, peak MiB, slices/s) of all that has both."""
    found = []
    for view in MAIN:
        for variant in (OURS, rival(report), STOCK):
            row, top = step(report, view, TRAIN, variant), peak(report, view, variant)
            if row and row.slices_per_s and top:
                found.append((view, variant, top / 2**20, row.slices_per_s))
    return found


def _has_memory(report: Report) -> bool:
    return bool(_points(report))


def _throughput(axis: Any, report: Report) -> None:
    for view, variant, mebibytes, rate in _points(report):
        axis.scatter(
            mebibytes,
            rate,
            marker=_MARKS.get(variant, "s"),
            color=_COLOURS[view],
            zorder=3,
            label=f"{view}, {variant}",
        )
    axis.set_xlabel("peak memory of a training step on the same voxels, MiB")
    axis.set_ylabel("slices/s")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def _stacked(axis: Any, report: Report) -> None:
    found = stacks(report)
    places = range(len(found))
    for parts, shift, colours in (
        ("loading", -0.2, ("#c6dbef", "#6baed6", "#2171b5")),
        ("network", 0.2, ("#fdae6b", "#e6550d")),
    ):
        base = [0.0] * len(found)
        for name, colour in zip(getattr(found[0], parts), colours, strict=True):
            heights = [getattr(stack, parts)[name] for stack in found]
            where = [place + shift for place in places]
            axis.bar(where, heights, 0.36, bottom=base, color=colour, label=name)
            base = [low + high for low, high in zip(base, heights, strict=True)]
    axis.set_xticks(list(places), [stack.view for stack in found])
    axis.set_ylabel("ms per slice")
    axis.set_xlabel("left: loading, on one core; right: the network")
    axis.legend(fontsize=7)


def _roof_points(report: Report) -> list[tuple[str, str, float, float]]:
    """Return (network, what, operations per byte, operations per second)."""
    found = []
    precision = fast_precision(report)
    for case in NETWORKS:
        for what in (TRAIN, PREDICT):
            row = step(report, case, what)
            if row and row.tflops:
                needed = work(network(case, row.patients), precision, what)
                found.append((case, what, needed.intensity, row.tflops * 1e12))
    return found


def _has_roof(report: Report) -> bool:
    return bool(measured_ceilings(report, fast_precision(report)) and _roof_points(report))


def _roofline(axis: Any, report: Report) -> None:
    ceilings = measured_ceilings(report, fast_precision(report))
    points = _roof_points(report)
    if ceilings is None:
        return
    ridge = ceilings.flops / ceilings.bytes_per_s
    low = min(ridge, *(point[2] for point in points)) / 2
    high = max(ridge, *(point[2] for point in points)) * 2
    axis.plot(
        [low, ridge, high],
        [low * ceilings.bytes_per_s / 1e12, ceilings.flops / 1e12, ceilings.flops / 1e12],
        color="dimgrey",
        label="measured: copy, matrix product",
    )
    for case, what, intensity, rate in points:
        view = case.partition("-")[0]
        axis.scatter(
            intensity,
            rate / 1e12,
            color=_COLOURS[view],
            zorder=3,
            marker="o" if what == TRAIN else "^",
            facecolors="none" if case != view else _COLOURS[view],
            label=f"{case}, {what}",
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations per byte (counted)")
    axis.set_ylabel(f"TFLOP/s, {fast_precision(report)}")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=6)


def _batches(axis: Any, report: Report) -> None:
    for view in MAIN:
        rows = report.find(section=SWEEP, view=view)
        for number, variant in enumerate(dict.fromkeys(row.variant for row in rows)):
            measured = [row for row in rows if row.variant == variant and row.slices_per_s]
            slices = len(measured) and _slices(measured[0])
            axis.plot(
                [(row.batch or 0) * slices for row in measured],
                [row.slices_per_s for row in measured],
                marker=".",
                color=_COLOURS[view],
                linestyle="--" if number else "-",
                label=f"{view}, {variant}",
            )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("slices in a batch")
    axis.set_ylabel("slices/s in training")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def _slices(row: Any) -> int:
    shape = row.input_shape.split("x")
    return int(shape[0]) if len(shape) == 4 else 1
