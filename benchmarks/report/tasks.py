"""What one process of the report does: ceilings, steps, memory and batch sizes of networks."""

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import keras
import torch

from benchmarks import harness
from benchmarks.cases import PREDICT, SLAB, TRAIN, Case, Setting
from benchmarks.harness import Timing
from benchmarks.records import cell
from benchmarks.report.energy import joules
from benchmarks.report.jobs import BFLOAT16, CEILINGS, FLOAT32, MEMORY, STEPS, SWEEP, TF32, Job
from benchmarks.report.networks import network, num_slices, view_of
from benchmarks.report.roofs import work
from benchmarks.variants import Variant, variants_of
from ich_keras.keras_private import forget_compiled

# The columns of a `Measurement` that a task knows.
Found = dict[str, Any]

_REPEATS, _LEAST_REPEATS = 5, 3
_MEMORY_STEPS = 2  # in the second, the optimiser's state exists beside the activations
_MOST_STEPS = 200
# A sweep on a CPU ends before it takes more than this share of the memory that is available.
_MEMORY_SHARE = 0.5
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Conditions:
    """How a process measures.

    Args:
        device: "cpu" or "cuda".
        threads: threads of torch on the CPU.
        patients: how many patients' voxels a batch holds.
        is_tiny: a trial: tiny inputs, one repeat.
        end: when the process will be stopped, on `time.monotonic`.
    """

    device: str
    threads: int
    patients: int
    is_tiny: bool
    end: float

    @property
    def least_seconds(self) -> float:
        """How long a timed run must be, so that what `fit` does once does not count."""
        if self.is_tiny:
            return 0.0
        return 1.0 if self.device == "cuda" else 0.5

    @property
    def seconds_left(self) -> float:
        """Seconds until the process will be stopped."""
        return self.end - time.monotonic()

    def case(self, job: Job) -> Case:
        """Return the network and batch of a job."""
        return network(job.network, self.patients, self.is_tiny)


def set_precision(name: str) -> str:
    """Let torch compute as a precision means, and return the type of the network.

    torch's own default is TF32 in convolutions but not in matrix products.
    """
    is_tf32 = name == TF32
    torch.backends.cudnn.allow_tf32 = is_tf32
    torch.backends.cuda.matmul.allow_tf32 = is_tf32
    return FLOAT32 if is_tf32 else name


def forget() -> None:
    """Free what the last network held."""
    keras.backend.clear_session()
    forget_compiled()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def ceilings(job: Job, conditions: Conditions) -> Iterator[Found]:
    """Measure what the device reaches at most: a matrix product and a copy."""
    device, is_tiny = conditions.device, conditions.is_tiny
    is_cuda = device == "cuda"
    side = 256 if is_tiny else 8192 if is_cuda else 2048
    precisions = [FLOAT32, TF32, BFLOAT16] if is_cuda else [FLOAT32, BFLOAT16]
    for name in precisions:
        dtype = getattr(torch, set_precision(name))
        left = torch.rand(side, side, device=device).to(dtype)
        result = torch.empty_like(left)
        timing, steps, repeats = _timed(
            {"": _repeated(partial(torch.mm, left, left, out=result))}, conditions
        )
        flop = 2 * side**3
        yield {
            "section": job.task,
            "case": f"{side}x{side}",
            "precision": name,
            "what": "matmul",
            "tflops": flop / timing[""].median / 1e9,
            **times(timing[""], steps, repeats),
        }
    values = 2**16 if is_tiny else 2**28 if is_cuda else 2**26
    source = torch.rand(values, device=device)
    target = torch.empty_like(source)
    timing, steps, repeats = _timed({"": _repeated(lambda: target.copy_(source))}, conditions)
    yield {
        "section": job.task,
        "case": f"{source.nbytes / 2**20:g} MiB",
        "what": "copy",
        "gb_per_s": 2 * source.nbytes / timing[""].median / 1e6,
        **times(timing[""], steps, repeats),
    }


def _repeated(call: Callable[[], Any]) -> harness.Run:
    def run(steps: int) -> None:
        for _ in range(steps):
            call()

    return run


def _timed(
    runs: dict[str, harness.Run], conditions: Conditions
) -> tuple[dict[str, Timing], int, int]:
    """Time runs in turns with as many steps and repeats as there is time for.

    Returns:
        Name -> milliseconds per step; steps of a run; repeats.
    """
    stopwatch = harness.stopwatch_of(conditions.device)
    for run in runs.values():
        run(1)  # compiles, allocates
    seconds = {name: stopwatch(partial(run, 1)) for name, run in runs.items()}
    shortest = max(min(seconds.values()), 1e-6)
    steps = max(1, min(_MOST_STEPS, math.ceil(conditions.least_seconds / shortest)))
    round_seconds = sum(seconds.values()) * steps
    fitting = int(conditions.seconds_left / 2 / max(round_seconds, 1e-6))
    repeats = 1 if conditions.is_tiny else max(_LEAST_REPEATS, min(_REPEATS, fitting))
    timings = harness.alternate(
        {name: partial(run, steps) for name, run in runs.items()},
        repeats,
        # Runs of several steps warm up once more: `fit` treats the first of many differently.
        warmup=int(steps > 1),
        steps=steps,
        stopwatch=stopwatch,
    )
    return timings, steps, repeats


def times(timing: Timing, steps: int, repeats: int) -> Found:
    """Return the columns of a time."""
    return {
        "steps": steps,
        "repeats": repeats,
        "ms_median": timing.median,
        "ms_q25": timing.q25,
        "ms_q75": timing.q75,
        "ms_min": timing.lowest,
        "ms_max": timing.highest,
    }


def _described(job: Job, case: Case, variant: str, what: str) -> Found:
    return {
        "section": job.task,
        "view": view_of(job.network),
        "case": job.network,
        "variant": variant,
        "precision": job.precision,
        "what": what,
        "input_shape": cell(case.shape),
        "batch": case.batch,
    }


def rates(case: Case, precision: str, what: str, ms: float) -> Found:
    """Turn the time of a step into rates.

    Args:
        case: network, input and batch.
        precision: "float32", "TF32" or "bfloat16".
        what: "train" or "predict".
        ms: milliseconds per step.
    """
    samples = case.batch / ms * 1e3
    needed = work(case, precision, what)
    return {
        "samples_per_s": samples,
        "slices_per_s": samples * num_slices(case),
        "gflop_per_sample": needed.flop / 1e9,
        "tflops": needed.flop * samples / 1e12,
        "gb_per_s": needed.num_bytes * samples / 1e9,
    }


def builders(job: Job, conditions: Conditions, case: Case) -> dict[str, Callable[[], Variant]]:
    """Return how to build the variants of a job that exist here."""
    setting = Setting(conditions.device, conditions.threads, set_precision(job.precision))
    found = variants_of(case, setting)
    return {name: found[name] for name in job.variants if name in found}


def steps(job: Job, conditions: Conditions) -> Iterator[Found]:
    """Time training, then prediction; variants in turns."""
    case = conditions.case(job)
    variants: dict[str, Variant] = {}
    for name, build in builders(job, conditions, case).items():
        try:
            variant = build()
            variant.train(1)
            variants[name] = variant
        except torch.cuda.OutOfMemoryError:
            yield {**_described(job, case, name, TRAIN), "note": OUT_OF_MEMORY}
    for what in (TRAIN, PREDICT):
        runs = {name: getattr(variant, what) for name, variant in variants.items()}
        if not runs:
            return
        timings, number, repeats = _timed(runs, conditions)
        for name, run in runs.items():
            found = _described(job, case, name, what)
            found |= times(timings[name], number, repeats)
            found |= rates(case, job.precision, what, timings[name].median)
            found["operations"] = harness.dispatches(run).operations
            if what == TRAIN:
                kept = harness.saved_bytes(run, variants[name].tensors())
                found["kept_bytes_per_sample"] = kept / case.batch
            if conditions.device == "cuda" and not conditions.is_tiny:
                used = joules(partial(run, number))
                slices = number * case.batch * num_slices(case)
                found["joules_per_1000_slices"] = used and used / slices * 1e3
            yield found


def memory(job: Job, conditions: Conditions) -> Iterator[Found]:
    """Measure the peak of training that one variant adds to the built network.

    This process must be fresh.
    """
    case = conditions.case(job)
    for name, build in builders(job, conditions, case).items():
        found = _described(job, case, name, TRAIN)
        try:
            peak = _peak(build(), conditions.device)
        except torch.cuda.OutOfMemoryError:
            yield found | {"note": OUT_OF_MEMORY}
        else:
            yield found | {"steps": _MEMORY_STEPS, "peak_bytes": peak}


def _peak(variant: Variant, device: str) -> int:
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        variant.train(1)  # what compiling needs is needed once
        return _peak_since(before, variant)
    before = harness.peak_of_process()
    variant.train(_MEMORY_STEPS)
    return harness.peak_of_process() - before


def _peak_since(before: int, variant: Variant) -> int:
    """Return the peak of GPU memory in bytes beyond `before`: the optimiser's state counts."""
    held = torch.cuda.memory_allocated() - before
    return held + harness.peak_on_cuda(variant.train, _MEMORY_STEPS)


def sweep(job: Job, conditions: Conditions) -> Iterator[Found]:
    """Double the batch until it no longer fits or time is up, then try half way back."""
    whole = conditions.case(job)
    batch, seconds, is_back = 1 if num_slices(whole) > SLAB[0] else 4, 0.0, False
    while True:
        case = replace(whole, batch=batch)
        end = _end_of_sweep(job, case, conditions, seconds)
        if not end:
            begun = time.monotonic()
            try:
                (build,) = builders(job, conditions, case).values()
                yield from _swept(job, case, build, conditions)
            except torch.cuda.OutOfMemoryError:
                end = OUT_OF_MEMORY
            forget()
            seconds = time.monotonic() - begun
        if end:
            yield {**_described(job, case, job.variants[0], TRAIN), "note": end}
        if is_back or (end and (end != OUT_OF_MEMORY or batch < 4)):
            return
        is_back = end == OUT_OF_MEMORY
        batch = batch * 3 // 4 if is_back else batch * 2


def _end_of_sweep(job: Job, case: Case, conditions: Conditions, seconds: float) -> str:
    """Say why a batch is not tried; "" if it is. The last one took `seconds`."""
    # The next takes twice as long as the last did, and a little more.
    if seconds * 2.5 > conditions.seconds_left or (conditions.is_tiny and case.batch > 8):
        return f"stopped before batch {case.batch}: no time left"
    if conditions.device == "cpu" and not _fits(case, job.precision):
        return f"stopped before batch {case.batch}: half of the available memory"
    return ""


def _swept(
    job: Job, case: Case, build: Callable[[], Variant], conditions: Conditions
) -> Iterator[Found]:
    is_cuda = conditions.device == "cuda"
    variant = build()
    before = torch.cuda.memory_allocated() if is_cuda else 0
    found = _described(job, case, job.variants[0], TRAIN)
    timings, number, repeats = _timed({"": variant.train}, conditions)
    found |= times(timings[""], number, repeats)
    found |= rates(case, job.precision, TRAIN, timings[""].median)
    if is_cuda:
        found["peak_bytes"] = _peak_since(before, variant)
    yield found


def _fits(case: Case, precision: str) -> bool:
    """Tell whether a step leaves enough memory to a CPU, which would otherwise use its disk."""
    available = harness.available_memory()
    # What is moved is five times what is kept; a step was measured to take half of that.
    return work(case, precision, TRAIN).num_bytes * case.batch < _MEMORY_SHARE * available


TASKS: dict[str, Callable[[Job, Conditions], Iterator[Found]]] = {
    CEILINGS: ceilings,
    STEPS: steps,
    MEMORY: memory,
    SWEEP: sweep,
}
