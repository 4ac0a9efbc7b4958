"""What the report measures and in which order: jobs, each for a process of its own.

Imports neither torch nor keras.
"""

from dataclasses import dataclass, replace

from benchmarks.cases import COMPILED, MONAI, NOT_COMPILED, OURS, PLAIN, STOCK
from benchmarks.report.networks import MAIN

CPU, GPU = "cpu", "gpu"
CEILINGS, STEPS, MEMORY, LOADER, WORKERS, FEED, SWEEP = (
    "ceilings",
    "steps",
    "memory",
    "loader",
    "workers",
    "feed",
    "sweep",
)
TASKS = (CEILINGS, STEPS, MEMORY, LOADER, WORKERS, FEED, SWEEP)
FLOAT32, TF32, BFLOAT16 = "float32", "TF32", "bfloat16"
# Where training takes its batches from.
READY, FROM_CACHE, FROM_DICOM = "ready tensors", "cache", "DICOM files"
# Stages of the loader.
BY_PYDICOM, BY_READ_HU = "read a DICOM file: pydicom", "read a DICOM file: read_hu"
READ_CACHE, THREE_WINDOWS, ONE_WINDOW = "read the cache", "three windows", "one window"
NO_AUGMENTATION = "none"


def batches_with(augmentation: str | None) -> str:
    """Name the pass through the whole loader with an augmentation.

    >>> batches_with("thesis")
    'batches, augmentation thesis'
    """
    return f"batches, augmentation {augmentation or NO_AUGMENTATION}"


def raw_batches_with(augmentation: str | None) -> str:
    """Name the pass that leaves the inputs to a device: int16 HU, and what was drawn."""
    return f"HU for a device, augmentation {augmentation or NO_AUGMENTATION}"


@dataclass(frozen=True)
class Job:
    """One process that measures.

    Args:
        task: what it does; see `benchmarks.report.tasks`.
        seconds: how long it takes on the machine of the committed results, start included. On
            others the estimates are scaled by what the first jobs took.
        network: a key of `NETWORKS`.
        precision: "float32", "TF32" or "bfloat16".
        variants: ways to run the network, timed in turns. Those that do not exist for the network
            or the machine are left out.
    """

    task: str
    seconds: int
    network: str = ""
    precision: str = ""
    variants: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its name in the file and on the command line."""
        parts = (self.task, self.network, self.precision, " + ".join(self.variants))
        return " / ".join(part for part in parts if part)


# Seconds on two cores of an AMD EPYC with bfloat16 instructions.
_CPU_STEPS = {"slice": 60, "slab": 130, "series": 40, "slab-dilated": 90, "series-dilated": 90}
_CPU_FEED = {"slice": 90, "slab": 150, "series": 60}
# Expected on a data-centre GPU; most of it is torch.compile. Not measured yet.
_GPU_COMPILED, _GPU_EAGER = 110, 60


def jobs_of(kind: str, precision: str) -> list[Job]:
    """Return the jobs in the order in which they run.

    Args:
        kind: "cpu" or "gpu".
        precision: the fast one of this machine: "bfloat16", or "float32" where it has none.
    """
    is_gpu = kind == GPU
    rival = COMPILED if is_gpu else PLAIN

    def steps(network: str, precision: str, *variants: str) -> Job:
        if is_gpu:
            seconds = _GPU_COMPILED if OURS in variants else _GPU_EAGER
        else:
            slower = 1 if precision == BFLOAT16 else 2
            seconds = _CPU_STEPS[network] * slower * max(2, len(variants)) // 2
        return Job(STEPS, seconds, network, precision, variants)

    def memory(network: str, precision: str, variant: str) -> Job:
        seconds = _GPU_EAGER if is_gpu else _CPU_STEPS[network] // 2
        return Job(MEMORY, seconds, network, precision, (variant,))

    def sweep(network: str, variant: str) -> Job:
        return Job(SWEEP, 90 if is_gpu else 2 * _CPU_STEPS[network], network, precision, (variant,))

    # Ours among them: ratios are those of variants that take turns.
    others = (OURS, NOT_COMPILED, PLAIN, STOCK, MONAI) if is_gpu else (OURS, STOCK, MONAI)
    jobs = [Job(CEILINGS, 20)]
    jobs += [steps(name, precision, OURS, rival) for name in MAIN]
    jobs += [memory(name, precision, variant) for name in MAIN for variant in (OURS, rival)]
    jobs += [Job(LOADER, 90)]
    jobs += [
        Job(FEED, 120 if is_gpu else _CPU_FEED[name], name, precision, (OURS,)) for name in MAIN
    ]
    if precision != FLOAT32:
        slower = (FLOAT32, TF32) if is_gpu else (FLOAT32,)
        jobs += [steps(name, other, OURS, rival) for other in slower for name in MAIN]
    jobs += [sweep(name, NOT_COMPILED if is_gpu else OURS) for name in MAIN]
    jobs += [steps(name, precision, *others) for name in MAIN]
    jobs += [steps(name, precision, OURS, rival) for name in ("slab-dilated", "series-dilated")]
    jobs += [memory(name, precision, STOCK) for name in MAIN]
    jobs += [memory("series-dilated", precision, OURS), Job(WORKERS, 120)]
    if precision != FLOAT32:  # the thesis's network in its precision
        jobs += [steps("series-dilated", FLOAT32, OURS, rival)]
    if is_gpu:
        jobs += [memory(name, precision, PLAIN) for name in MAIN]
        jobs += [replace(sweep(name, OURS), seconds=400) for name in MAIN]
    return jobs


def job_called(name: str, jobs: list[Job]) -> Job:
    """Return a job by name.

    Raises:
        KeyError: there is none.
    """
    return {job.name: job for job in jobs}[name]
