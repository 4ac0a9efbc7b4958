"""What follows from the rows of a report: numbers that its page and its figures share."""

from dataclasses import dataclass

from benchmarks.cases import COMPILED, OURS, PLAIN, PREDICT, TRAIN
from benchmarks.report.jobs import (
    CEILINGS,
    FEED,
    FLOAT32,
    GPU,
    LOADER,
    MEMORY,
    NO_AUGMENTATION,
    READ_CACHE,
    STEPS,
    SWEEP,
    batches_with,
)
from benchmarks.report.measurement import Measurement, Report
from benchmarks.report.networks import MAIN, network, num_slices
from benchmarks.report.roofs import Ceilings, work


def fast_precision(report: Report) -> str:
    """Return the precision of the first steps: the fast one of the machine."""
    first = next((row for row in report.rows if row.section == STEPS), None)
    return first.precision if first else FLOAT32


def step(
    report: Report, case: str, what: str, variant: str = OURS, precision: str | None = None
) -> Measurement | None:
    """Return the time of a step; None where it was not measured."""
    return report.first(
        section=STEPS,
        case=case,
        what=what,
        variant=variant,
        precision=precision or fast_precision(report),
    )


def peak(report: Report, case: str, variant: str) -> int | None:
    """Return the peak memory of training in the fast precision, bytes."""
    row = report.first(section=MEMORY, case=case, variant=variant, precision=fast_precision(report))
    return row.peak_bytes if row else None


def rival(report: Report) -> str:
    """Return the variant that ours is measured beside."""
    return COMPILED if report.kind == GPU else PLAIN


def costs_in_slices(report: Report, what: str) -> dict[str, float]:
    """Return how many 2D slices a sample of each view costs: view -> ratio of times per sample."""
    rows = {case: step(report, case, what) for case in MAIN}
    rates = {case: row.samples_per_s for case, row in rows.items() if row and row.samples_per_s}
    if "slice" not in rates:
        return {}
    return {case: rates["slice"] / rate for case, rate in rates.items() if case != "slice"}


def computed_costs_in_slices(ceilings: Ceilings, precision: str, patients: int) -> dict[str, float]:
    """Return the same at the roof of a device: computed."""
    rates = {
        case: work(network(case, patients), precision, TRAIN).samples_per_s(ceilings)
        for case in MAIN
    }
    return {case: rates["slice"] / rate for case, rate in rates.items() if case != "slice"}


def measured_ceilings(report: Report, precision: str) -> Ceilings | None:
    """Return what the report's own device reached in a matrix product and a copy."""
    product = report.first(section=CEILINGS, what="matmul", precision=precision)
    copy = report.first(section=CEILINGS, what="copy")
    if product is None or copy is None or not product.tflops or not copy.gb_per_s:
        return None
    return Ceilings(report.place.device, product.tflops * 1e12, copy.gb_per_s * 1e9)


@dataclass(frozen=True)
class Stack:
    """Where the time of a training step goes: milliseconds per slice, by stage.

    Args:
        view: "slice", "slab" or "series".
        loading: on one core: stage -> ms.
        network: on the device: stage -> ms.
    """

    view: str
    loading: dict[str, float]
    network: dict[str, float]


def stacks(report: Report, augmentation: str = "fast") -> list[Stack]:
    """Return the stages of a training step from the cache, for the views that have them all."""
    found = []
    for view in MAIN:
        names = {
            "cache": (READ_CACHE, ""),
            "plain": (batches_with(NO_AUGMENTATION), view),
            "changed": (batches_with(augmentation), view),
        }
        rows = {
            key: report.first(section=LOADER, case=case, view=where)
            for key, (case, where) in names.items()
        }
        ms = {key: row.ms_median for key, row in rows.items() if row and row.ms_median}
        train, predict = (step(report, view, what) for what in (TRAIN, PREDICT))
        if len(ms) < len(names) or not (train and predict and train.slices_per_s):
            continue
        if not predict.slices_per_s:
            continue
        whole, forward = 1e3 / train.slices_per_s, 1e3 / predict.slices_per_s
        loading = {
            "read the cache": ms["cache"],
            "windows, normalise": max(0.0, ms["plain"] - ms["cache"]),
            f"augmentation ({augmentation})": max(0.0, ms["changed"] - ms["plain"]),
        }
        passes = {"forward": forward, "backward, update": max(0.0, whole - forward)}
        found.append(Stack(view, loading, passes))
    return found


def largest_batches(report: Report) -> dict[str, tuple[Measurement, Measurement, str]]:
    """Return per view the fastest and the largest batch of the sweep, and why it ended."""
    found = {}
    for view in MAIN:
        rows = report.find(section=SWEEP, view=view)
        variant = rows[0].variant if rows else ""
        rows = [row for row in rows if row.variant == variant]
        measured = [row for row in rows if not row.note and row.slices_per_s]
        if measured:
            fastest = max(measured, key=lambda row: row.slices_per_s or 0)
            largest = max(measured, key=lambda row: row.batch or 0)
            ends = [row.note for row in rows if row.note]
            found[view] = fastest, largest, ends[-1] if ends else ""
    return found


def feeds(report: Report, view: str) -> dict[str, Measurement]:
    """Return how fast training went from each source: source -> row."""
    return {row.case: row for row in report.find(section=FEED, view=view) if not row.note}


def seconds_per_patient(row: Measurement, samples: int) -> float | None:
    """Return the time of as many samples as answer for one patient, seconds."""
    return samples / row.samples_per_s if row.samples_per_s else None


def slices_of(case: str) -> int:
    """Return how many slices a sample of a network has."""
    return num_slices(network(case))
