"""The parts of the page that are computed, not measured; they say so."""

from dataclasses import dataclass

from benchmarks.cases import PREDICT, TRAIN
from benchmarks.report.findings import computed_costs_in_slices, step
from benchmarks.report.jobs import BFLOAT16, FLOAT32
from benchmarks.report.measurement import Report
from benchmarks.report.networks import MAIN, network, num_slices, samples_per_patient
from benchmarks.report.roofs import GTX_1060_FLOPS, H100, THESIS, TRANSFERS, work
from benchmarks.report.tables import markdown, number

# Patients in a batch: what `gpu` takes.
_PATIENTS = 4


@dataclass(frozen=True)
class ComputedColumn:
    """A column of the first table.

    Args:
        header: its title.
        cells: (view, what) -> cells.
        note: how it was computed.
    """

    header: tuple[str, ...]
    cells: dict[tuple[str, str], tuple[str, ...]]
    note: str


def computed_words() -> str:
    """Return the first sentence while nothing is measured."""
    cost = computed_costs_in_slices(H100, BFLOAT16, _PATIENTS)["series"]
    return (
        f"Computed, not measured: on an {H100.name}, training on a whole series of"
        f" {num_slices(network('series'))} slices costs as much as on {cost:.0f} slices in 2D."
    )


def computed_table() -> ComputedColumn:
    """Return what a data-centre GPU does at its roof."""
    cells: dict[tuple[str, str], tuple[str, ...]] = {}
    for what in (TRAIN, PREDICT):
        for view in MAIN:
            case = network(view, _PATIENTS)
            rate = work(case, BFLOAT16, what).samples_per_s(H100)
            seconds = samples_per_patient(view) / rate
            cells[view, what] = (
                f"*{number(float(f'{rate * num_slices(case):.2g}'))} ({seconds:.2g} s)*",
            )
    note = (
        f"The roof: {H100.flops / 1e12:.0f} TFLOP/s in bfloat16 and {H100.bytes_per_s / 1e12:.1f}"
        " TB/s, as measured on such cards in a matrix product and a copy. Operations are those of"
        f" the convolutions; bytes are {TRANSFERS['train']} transfers of each tensor that training"
        f" keeps ({TRANSFERS['predict']} in prediction), and those of the weights."
    )
    return ComputedColumn((f"*{H100.name}, computed roof*",), cells, note)


def thesis_table(reports: list[Report]) -> str:
    """Return the thesis's times beside those that the operations alone would take.

    Args:
        reports: the newest of each machine; the share of a matrix product that training in float32
            reached there is taken over.
    """
    header = ["training", "operations", "*at the roof, computed*"]
    header += [f"*at the share of {report.place.device}, computed*" for report in reports]
    rows = []
    for run in THESIS:
        cells = [
            run.title,
            f"{run.flop / 1e15:.0f} x 10^15",
            f"*{run.hours_at(GTX_1060_FLOPS):.1f} h*",
        ]
        for report in reports:
            found = step(report, run.network, TRAIN, precision=FLOAT32)
            # The dilated network was perhaps measured in the fast precision only.
            found = found or step(report, run.network, TRAIN)
            if found is None or not found.matmul_share:
                cells.append("not measured")
                continue
            hours = run.hours_at(GTX_1060_FLOPS * found.matmul_share)
            cells.append(f"*{hours:.1f} h* ({found.matmul_share:.0%}, {found.precision})")
        rows.append((*cells, f"{run.hours:g} h, {run.device}"))
    text = (
        f"Hours of the whole training on a GTX 1060 with {GTX_1060_FLOPS / 1e12:g} TFLOP/s in"
        " float32 (NVIDIA's figure), validation included: operations divided by that, and by the"
        " share of a matrix product that our own steps reach. It checks the count of"
        " operations; the remaining hours went into slower steps, loading or waiting."
    )
    return f"{markdown((*header, 'as published'), rows)}\n\n{text}"
