"""The rows of a report: one measurement each, in one CSV per run. Imports no torch, no keras."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.records import Place
from ich_keras.errors import DataError

# What became of a job; the word stands in `what` of its last row.
DONE, FAILED, LEFT_OUT = "done", "failed", "left out"
JOB = "job"  # the section of those rows
# How the files are called.
STEM, TINY_STEM = "report", "report-tiny"


@dataclass(frozen=True)
class Measurement:
    """One measurement; None where it has no such number.

    Args:
        kind: "cpu" or "gpu".
        job: the name of the job that measured it.
        section: "ceilings", "steps", "memory", "loader", "workers", "feed", "sweep"; "job" for the
            last row of a job.
        view: "slice", "slab" or "series".
        case: a network, or what was timed.
        variant: the way to run a network.
        precision: "float32", "TF32" or "bfloat16".
        what: "train", "predict", ...; of a job "done", "failed" or "left out".
        input_shape: of a sample.
        batch: samples per step.
        workers: processes that make batches; 0 makes them in the process that asks.
        steps: per timed run.
        repeats: timed runs.
        ms_median: milliseconds per step; then quartiles and extremes.
        samples_per_s: of the median.
        slices_per_s: those samples times their slices; of the loader, per core; of
            "workers", by all of them together, and by one process that took turns with them.
        kept_bytes_per_sample: between forward and backward pass; see `harness.saved_bytes`.
        peak_bytes: that a step adds to the built network, in a fresh process. On a GPU: memory
            allocated by torch; on a CPU: resident memory of the process.
        operations: sent to torch per step; see `harness.dispatches`.
        gflop_per_sample: of the convolutions and the head, by the network's definition.
        tflops: those operations times samples per second; of a ceiling, what it reached.
        gb_per_s: bytes by the count in `benchmarks.report.roofs` per second, in 10^9.
        matmul_share: `tflops` divided by that of a matrix product of the same precision.
        copy_share: `gb_per_s` divided by that of a copy.
        joules_per_1000_slices: of the device, where it tells.
        patients: how many patients' voxels a batch of `steps` holds.
        note: what a reader must know.
        date: when it was measured, ISO 8601; "" until it is kept.
    """

    kind: str
    job: str
    section: str
    view: str = ""
    case: str = ""
    variant: str = ""
    precision: str = ""
    what: str = ""
    input_shape: str = ""
    batch: int | None = None
    workers: int | None = None
    steps: int | None = None
    repeats: int | None = None
    ms_median: float | None = None
    ms_q25: float | None = None
    ms_q75: float | None = None
    ms_min: float | None = None
    ms_max: float | None = None
    samples_per_s: float | None = None
    slices_per_s: float | None = None
    kept_bytes_per_sample: float | None = None
    peak_bytes: int | None = None
    operations: int | None = None
    gflop_per_sample: float | None = None
    tflops: float | None = None
    gb_per_s: float | None = None
    matmul_share: float | None = None
    copy_share: float | None = None
    joules_per_1000_slices: float | None = None
    patients: int = 1
    note: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What two runs must share for their numbers to be comparable."""
        parts = (self.section, self.view, self.case, self.variant, self.precision, self.what)
        return (*parts, "" if self.batch is None else str(self.batch))


@dataclass(frozen=True)
class Report:
    """The measurements of one run, and where they were made."""

    path: Path
    rows: tuple[Measurement, ...]
    place: Place

    @property
    def kind(self) -> str:
        """Return "cpu" or "gpu"."""
        return self.rows[0].kind

    @property
    def later_days(self) -> dict[str, list[str]]:
        """Return what was measured on other days than the first row: day -> sections."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            day = row.date[:10]
            if day and day != self.place.date[:10] and row.section != JOB:
                found.setdefault(day, [])
                if row.section not in found[day]:
                    found[day].append(row.section)
        return found

    def find(self, **wanted: Any) -> list[Measurement]:
        """Return the rows whose fields have these values, in the file's order."""
        return [
            row
            for row in self.rows
            if all(getattr(row, name) == value for name, value in wanted.items())
        ]

    def first(self, **wanted: Any) -> Measurement | None:
        """Return the first of those rows with a time, a size or a rate."""
        found = (row for row in self.find(**wanted) if not row.note)
        return next(found, None)

    @property
    def ends(self) -> dict[str, Measurement]:
        """Return the last row of each job that was tried or left out: name -> row."""
        return {row.job: row for row in self.rows if row.section == JOB}


_TEXT = "str"
_READ: dict[str, Any] = {
    _TEXT: str,
    "int": int,
    "float": float,
    "int | None": int,
    "float | None": float,
}


def _typed(kind: type, row: dict[str, str], path: Path, line: int) -> Any:
    values = {}
    for field in fields(kind):
        name = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        text = row[field.name]
        try:
            values[field.name] = None if not text and name != _TEXT else _READ[name](text)
        except ValueError as error:
            raise DataError(
                f"{path}, line {line}: {field.name} is {text!r}; expected a number."
            ) from error
    return kind(**values)


def read_report(path: Path) -> Report:
    """Read the CSV of a run.

    Args:
        path: written by `python -m benchmarks cpu` or `gpu`.

    Raises:
        DataError: it is not such a file.
    """
    hint = "Give a file that `python -m benchmarks cpu` or `gpu` wrote (report_*.csv)."
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            wanted = [field.name for kind in (Measurement, Place) for field in fields(kind)]
            lacking = [name for name in wanted if name not in (reader.fieldnames or [])]
            if lacking:
                raise DataError(f"{path} is no report: it has no column {lacking[0]!r}.", hint)
            table = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no report: {error}.", hint) from error
    if not table:
        raise DataError(f"{path} is no report: it has no rows.", hint)
    for line, row in enumerate(table, 2):
        if None in row or None in row.values():
            raise DataError(f"{path}, line {line}: not as many cells as columns.", hint)
    rows = tuple(_typed(Measurement, row, path, line) for line, row in enumerate(table, 2))
    return Report(path, rows, _typed(Place, table[0], path, 2))


def finished(rows: Iterable[Measurement]) -> set[str]:
    """Return the names of the jobs that need not run again."""
    return {row.job for row in rows if row.section == JOB and row.what == DONE}
