"""`python -m benchmarks model`: steps of the networks, ours beside stock Keras and plain torch."""

import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import keras
import torch

from benchmarks import harness
from benchmarks.cases import CASES, OURS, PLAIN, TRAIN, Case, Setting
from benchmarks.records import Place, cell, table, write_csv
from benchmarks.variants import KerasVariant, Variant, variants_of
from ich_keras.errors import EnvironmentProblem, UsageError
from ich_keras.keras_private import forget_compiled
from ich_keras.models.torch.function import FlatFunction
from ich_keras.models.torch.memory import activation_bytes
from ich_keras.models.torch.step import accelerated

_MEMORY_STEPS = 2  # in the second, the optimiser's state exists beside the activations


@dataclass(frozen=True)
class Row:
    """One variant of one case in one mode; None where nothing was measured.

    Args:
        ms_median: median of the milliseconds per step; then the quartiles and extremes.
        speed_ratio: time of plain torch divided by this one's; above 1 is faster.
        saved_bytes_per_sample: kept between forward and backward pass; see `harness.saved_bytes`.
        saved_ratio: those bytes divided by plain torch's; below 1 is less.
        dispatches_per_step: aten operations; see `harness.Dispatches`.
        uploads_per_step: single numbers sent to the device; None on the CPU.
        graph_breaks: of the function that training runs (`torch._dynamo.explain`).
        peak_bytes: peak memory of training; see HOWTO.md.
    """

    case: str
    variant: str
    mode: str
    precision: str
    input_shape: tuple[int, ...]
    batch: int
    steps: int
    repeats: int
    ms_median: float
    ms_q25: float
    ms_q75: float
    ms_min: float
    ms_max: float
    speed_ratio: float | None = None
    saved_bytes_per_sample: float | None = None
    saved_ratio: float | None = None
    dispatches_per_step: int | None = None
    uploads_per_step: int | None = None
    graph_breaks: int | None = None
    peak_bytes: int | None = None


def measure(
    cases: list[Case],
    setting: Setting,
    repeats: int,
    out: Path,
    place: Place,
    memory: bool = False,
    tell: Callable[[str], None] = print,
) -> list[Row]:
    """Measure cases one after the other; the file is complete after each.

    Args:
        cases: what to measure.
        setting: how the benchmark runs.
        repeats: timed runs of each variant.
        out: CSV to write.
        place: machine and versions.
        memory: also measure the peak memory of training; on the CPU in separate processes.
        tell: called with each case's table.
    """
    torch.set_num_threads(setting.threads)
    rows: list[Row] = []
    for case in cases:
        found = with_ratios(_measure_case(case, setting, repeats, memory))
        rows += found
        write_csv(out, rows, place)
        tell(readable(found) + "\n")
    return rows


def _measure_case(case: Case, setting: Setting, repeats: int, memory: bool) -> list[Row]:
    variants = {name: build() for name, build in variants_of(case, setting).items()}
    rows, steps = [], max(case.steps, setting.least_steps)
    for mode in case.modes:
        # Our variants differ in training only.
        taking = {
            name: getattr(variant, mode)
            for name, variant in variants.items()
            if mode == TRAIN or not name.startswith(f"{OURS},")
        }
        timings = harness.alternate(
            {name: partial(run, steps) for name, run in taking.items()},
            repeats,
            sync=harness.wait_for(setting.device),
            steps=steps,
        )
        for name, run in taking.items():
            counted = harness.dispatches(run)
            row = Row(
                case=case.name,
                variant=name,
                mode=mode,
                precision=case.precision or setting.precision,
                input_shape=case.shape,
                batch=case.batch,
                steps=steps,
                repeats=repeats,
                ms_median=timings[name].median,
                ms_q25=timings[name].q25,
                ms_q75=timings[name].q75,
                ms_min=timings[name].lowest,
                ms_max=timings[name].highest,
                dispatches_per_step=counted.operations,
                uploads_per_step=counted.uploads if setting.device == "cuda" else None,
            )
            if mode == TRAIN:
                row = _with_training(row, variants[name], case, setting, memory)
            rows.append(row)
    del variants, taking
    keras.backend.clear_session()
    forget_compiled()
    gc.collect()
    return rows


def _with_training(row: Row, variant: Variant, case: Case, setting: Setting, memory: bool) -> Row:
    """Add the measurements that only training has."""
    options = accelerated(variant.model) if isinstance(variant, KerasVariant) else None
    if options is not None and options.recompute:
        function = FlatFunction(variant.model, True, options.precision, options.recompute)
        saved = activation_bytes(function, case.shape, case.batch)
    else:
        saved = harness.saved_bytes(variant.train, variant.tensors())
    row = replace(row, saved_bytes_per_sample=saved / case.batch)
    if memory and setting.device == "cuda":
        row = replace(row, peak_bytes=harness.peak_on_cuda(variant.train, _MEMORY_STEPS))
    elif memory:
        row = replace(row, peak_bytes=_peak_on_cpu(case, row.variant, setting))
    if options is not None and not options.recompute:
        function = FlatFunction(variant.model, True, options.precision)
        breaks = harness.graph_breaks(function, variant.batch[0], function.tensors())
        row = replace(row, graph_breaks=breaks)
    return row


def with_ratios(rows: list[Row]) -> list[Row]:
    """Add the ratios to plain torch in the same case and mode."""
    plain = {(row.case, row.mode): row for row in rows if row.variant == PLAIN}
    found = []
    for row in rows:
        beside = plain.get((row.case, row.mode))
        if beside is not None:
            row = replace(row, speed_ratio=beside.ms_median / row.ms_median)
            if row.saved_bytes_per_sample is not None and beside.saved_bytes_per_sample:
                ratio = row.saved_bytes_per_sample / beside.saved_bytes_per_sample
                row = replace(row, saved_ratio=ratio)
        found.append(row)
    return found


def readable(rows: list[Row]) -> str:
    """Return the rows of one case as a table."""
    first = rows[0]
    shape = cell((first.batch, *first.input_shape))
    header = (
        "mode",
        "variant",
        "ms",
        "quartiles",
        "speed",
        "saved MiB/sample",
        "ratio",
        "operations",
        "uploads",
        "breaks",
        "peak MiB",
    )
    lines = [
        (
            row.mode,
            row.variant,
            f"{row.ms_median:.4g}",
            f"{row.ms_q25:.4g} - {row.ms_q75:.4g}",
            _rounded(row.speed_ratio),
            _mebibytes(row.saved_bytes_per_sample),
            _rounded(row.saved_ratio),
            cell(row.dispatches_per_step),
            cell(row.uploads_per_step),
            cell(row.graph_breaks),
            _mebibytes(row.peak_bytes),
        )
        for row in rows
    ]
    return f"{first.case}: {shape}, {first.precision}\n{table(header, lines)}"


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mebibytes(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:.3g}"


def take_steps(case: Case, variant: str, setting: Setting, steps: int) -> int:
    """Build one variant, train it for `steps` steps and return the peak of the process in bytes.

    Raises:
        UsageError: the case has no such variant here.
    """
    torch.set_num_threads(setting.threads)
    builders = variants_of(case, setting)
    if variant not in builders:
        known = ", ".join(map(repr, builders))
        raise UsageError(f"variant {variant!r} of {case.name}; expected one of {known}.")
    built = builders[variant]()
    if steps:
        built.train(steps)
    return harness.peak_of_process()


def _peak_on_cpu(case: Case, variant: str, setting: Setting) -> int:
    """Return the memory that training adds to the built network, from two fresh processes."""
    some, none = (_peak(case, variant, setting, steps) for steps in (_MEMORY_STEPS, 0))
    return some - none


def _peak(case: Case, variant: str, setting: Setting, steps: int) -> int:
    command = [sys.executable, "-m", "benchmarks", "peak"]
    command += ["--case", case.name, "--variant", variant, "--steps", str(steps)]
    command += ["--precision", setting.precision, "--threads", str(setting.threads)]
    command += [] if case in CASES else ["--tiny"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EnvironmentProblem(f"memory of {case.name}, {variant}: {last}")
    return int(done.stdout.split()[-1])
