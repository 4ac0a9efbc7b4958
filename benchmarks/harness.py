"""How to measure time, kept activations, dispatched operations and memory.

The functions that need torch import it themselves, so importing this module is cheap.
"""

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ich_keras.errors import UsageError
from ich_keras.keras_private import dispatch_mode, num_graph_breaks

if TYPE_CHECKING:
    import torch

# Takes the given number of steps.
Run = Callable[[int], None]
# Runs a function and returns the seconds that it took.
Stopwatch = Callable[[Callable[[], None]], float]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per step over the repeats: the median and its spread."""

    median: float
    q25: float
    q75: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, times: list[float]) -> "Timing":
        """Summarise times; quartiles are interpolated between the sorted values."""
        q25, median, q75 = (
            statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        )
        return cls(median, q25, q75, min(times), max(times))


def alternate(
    variants: dict[str, Callable[[], None]],
    repeats: int,
    warmup: int = 1,
    sync: Callable[[], None] = lambda: None,
    steps: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    stopwatch: Stopwatch | None = None,
) -> dict[str, Timing]:
    """Time variants in turns (A B C A B C ...), so that a slow phase of the machine affects all.

    Args:
        variants: name -> function to time.
        repeats: timed runs of each.
        warmup: runs of each before the first timed one.
        sync: waits until the device has finished its work; called around each timed run.
        steps: steps of one run; times are divided by it.
        clock: returns seconds.
        stopwatch: used in place of `sync` and `clock`; see `stopwatch_of`.

    Returns:
        Name -> milliseconds per step.
    """
    timed = stopwatch or _between(clock, sync)
    for _ in range(warmup):
        for run in variants.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            times[name].append(timed(run) * 1e3 / steps)
    return {name: Timing.of(found) for name, found in times.items()}


def _between(clock: Callable[[], float], sync: Callable[[], None]) -> Stopwatch:
    def timed(run: Callable[[], None]) -> float:
        sync()
        start = clock()
        run()
        sync()
        return clock() - start

    return timed


def stopwatch_of(device: str) -> Stopwatch:
    """Return the stopwatch of a device: on a GPU, CUDA events before and after the run.

    Args:
        device: "cpu" or "cuda".
    """
    if device == "cpu":
        return _between(time.perf_counter, wait_for(device))
    import torch

    def timed(run: Callable[[], None]) -> float:
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return timed


def wait_for(device: str) -> Callable[[], None]:
    """Return a function that waits for a device; on the CPU nothing is ever pending."""
    if device == "cpu":
        return lambda: None
    import torch

    return torch.cuda.synchronize


def saved_bytes(run: Run, ignored: Iterable["torch.Tensor"]) -> int:
    """Count what autograd saves for the backward pass during one step.

    This counts the memory behind every saved tensor, each storage once and in full: inputs of
    convolutions and activations, statistics of normalisations, indices of poolings, and weights
    cast to another type. It does not see regions that are computed again in the backward pass,
    which save in their own way.

    Args:
        run: takes training steps.
        ignored: tensors that always exist: parameters, buffers, the batch.
    """
    import torch

    always = {tensor.untyped_storage().data_ptr() for tensor in ignored}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in always:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(1)
    return sum(storage.nbytes() for storage in kept.values())


def most_saved_bytes(run: Callable[[], None], ignored: Iterable["torch.Tensor"]) -> int:
    """Count what autograd keeps for backward passes at any one time, at most.

    As `saved_bytes`, but what a backward pass has released no longer counts: a step may take
    several passes.

    Args:
        run: takes a step.
        ignored: tensors that always exist: parameters, buffers, the batch.
    """
    import torch

    always = {tensor.untyped_storage().data_ptr() for tensor in ignored}
    holders: dict[int, int] = {}  # address of a storage -> saved tensors that lie in it
    now = most = 0

    class Saved:
        """A saved tensor, which tells when autograd drops it."""

        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal now, most
            self.tensor, storage = tensor, tensor.untyped_storage()
            self.address, self.bytes = storage.data_ptr(), storage.nbytes()
            if self.address in always:
                return
            holders[self.address] = holders.get(self.address, 0) + 1
            now += self.bytes if holders[self.address] == 1 else 0
            most = max(most, now)

        def __del__(self) -> None:
            nonlocal now
            if self.address in always:
                return
            holders[self.address] -= 1
            if not holders[self.address]:
                del holders[self.address]
                now -= self.bytes

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        run()
    return most


@dataclass(frozen=True)
class Dispatches:
    """What a step sends to torch's dispatcher.

    Args:
        operations: aten operations below autograd, forward and backward, views included.
        uploads: copies of single numbers from the CPU to a device; each makes the host wait.
    """

    operations: int
    uploads: int


def dispatches(run: Run) -> Dispatches:
    """Count the operations of one step: those of two steps minus those of one."""
    one, two = (_dispatched(run, steps) for steps in (1, 2))
    return Dispatches(two.operations - one.operations, two.uploads - one.uploads)


def _dispatched(run: Run, steps: int) -> Dispatches:
    counts = {"operations": 0, "uploads": 0}

    class Count(dispatch_mode()):
        @classmethod
        def ignore_compile_internals(cls) -> bool:
            return True  # torch.compile refuses to run under other modes

        def __torch_dispatch__(
            self,
            function: Any,
            types: Any,
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            if function.namespace == "aten":
                counts["operations"] += 1
                counts["uploads"] += _is_upload(function, args, result)
            return result

    with Count():
        run(steps)
    return Dispatches(**counts)


def _is_upload(function: Any, args: tuple[Any, ...], result: Any) -> bool:
    name = function.overloadpacket.__name__
    if name not in ("_to_copy", "copy_"):
        return False
    source = args[1] if name == "copy_" else args[0]
    return source.numel() == 1 and source.device.type == "cpu" and result.device.type != "cpu"


def graph_breaks(function: Callable[..., Any], *args: Any) -> int:
    """Count the places where `torch.compile` would have to split a function."""
    return num_graph_breaks(function, *args)


def peak_on_cuda(run: Run, steps: int) -> int:
    """Return the peak of GPU memory in bytes during a run, minus what was allocated before."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(steps)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_of_process() -> int:
    """Return the peak memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux ru_maxrss starts at the peak of the parent process.
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int:
    """Return how many bytes of memory this machine can give without using its disk."""
    table = Path("/proc/meminfo")
    if table.exists():
        # Unlike free memory, it counts what the system holds of files.
        lines = table.read_text().splitlines()
        return int(next(row for row in lines if row.startswith("MemAvailable:")).split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def require_torch() -> None:
    """Refuse any backend except torch, before Keras is loaded.

    Raises:
        UsageError: KERAS_BACKEND names another one.
    """
    from ich_keras.environment import loaded_backend

    backend = loaded_backend() or os.environ.get("KERAS_BACKEND", "torch")
    if backend != "torch":
        raise UsageError(
            f"backend {backend}: this benchmark compares with plain torch.",
            "Run it with KERAS_BACKEND=torch, or without KERAS_BACKEND.",
        )
