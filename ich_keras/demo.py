"""The demo: phantoms -> index -> labels -> split -> cache -> training -> evaluation -> report.

It calls the same functions as training on real data. Everything it makes is synthetic: its numbers
show that the programs work, not that they work on patients.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.counting import number_of
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.split import Split
from ich_keras.environment import choose_backend, choose_device, choose_precision
from ich_keras.errors import UsageError
from ich_keras.files import read_json, require_absent, write_json
from ich_keras.labels import LABELS
from ich_keras.metrics.binary import format_metric
from ich_keras.phantom.dicom import IMAGES, LABELS_CSV, write_phantoms
from ich_keras.progress import Progress, Tell
from ich_keras.run_folder import RunFolder
from ich_keras.workflow import train_dicom

PHANTOMS, INDEX, CACHE, RUN = "phantoms", "index", "cache", "run"
SUMMARY = "demo.json"


@dataclass(frozen=True)
class DemoSettings:
    """How large the demo is, and which network it trains.

    Args:
        preset: the network.
        precision: "auto" or a type, as for `choose_precision`.
        num_series: phantom series to draw; many patients with few slices teach the network more
            than few patients with many.
        matrix: rows and columns of their DICOM files, pixels (512 on scanners).
        slice_spacing_mm: smallest and largest distance between their slices (about 5 on scanners).
        size: rows and columns of the network's input, pixels.
        epochs: passes over the balanced training slices.
        batch_size: slices per step.
        learning_rate: after the warm-up.
    """

    preset: str = "resnet18_2d"
    precision: str = "auto"
    num_series: int = 600
    matrix: int = 128
    slice_spacing_mm: tuple[float, float] = (8.0, 11.0)
    size: int = 96
    epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 1e-3


# Each takes about four minutes on two cores: "full" with bfloat16 hardware or a GPU, "light" on
# processors that have only float32.
PLANS: dict[str, DemoSettings] = {
    "full": DemoSettings(),
    "light": DemoSettings(preset="resnet10_2d", precision="float32", num_series=500, size=80),
}


def choose_plan(device: str = "cpu") -> str:
    """Return the name of the plan that suits this hardware.

    Args:
        device: "cpu" or "cuda", from `choose_device`.
    """
    is_fast = device == "cuda" or choose_precision("auto", device) != "float32"
    return "full" if is_fast else "light"


def plan_named(name: str) -> DemoSettings:
    """Return the plan of a name.

    Raises:
        UsageError: there is no such plan.

    >>> plan_named("full").num_series
    600
    """
    if name not in PLANS:
        raise UsageError(f"demo plan {name!r}; expected one of {', '.join(PLANS)}.")
    return PLANS[name]


@dataclass(frozen=True)
class DemoResult:
    """The result of the demo.

    Args:
        run_dir: the run folder.
        auroc: slice-level AUROC per label on the held-out patients; None where undefined.
        trivial_auroc: the AUROC of `any` for a detector that only counts voxels per HU band.
        positive_patients: held-out patients per label.
    """

    run_dir: Path
    auroc: dict[str, float | None]
    trivial_auroc: float | None
    positive_patients: dict[str, int]

    def __str__(self) -> str:
        rows = [f"  {'label':18} {'AUROC':>6} {'patients':>9}"]
        rows += [
            f"  {label:18} {format_metric(self.auroc[label], 3):>6}"
            f" {self.positive_patients[label]:>9}"
            for label in LABELS
        ]
        return "\n".join(
            [
                "Held-out patients (synthetic), slice level:",
                *rows,
                "  counting voxels per HU band instead, AUROC(any):"
                f" {format_metric(self.trivial_auroc, 3)}",
            ]
        )


def run_demo(
    out: Path | str,
    seed: int = 0,
    plan: str | None = None,
    settings: DemoSettings | None = None,
    device: str = "auto",
    workers: int = 0,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> DemoResult:
    """Make phantoms and take them all the way to an evaluated run.

    Args:
        out: a new folder; receives phantoms/, index/, cache/, run/ and demo.json.
        seed: of the phantoms and of the training. On the same kind of machine, the same seed and
            plan give the same result.
        plan: a key of `PLANS`; None chooses by the hardware.
        settings: your own settings instead of a plan.
        device: "auto", "cpu" or "cuda".
        workers: processes that draw, index and cache; 0 works in this one.
        progress: called as progress(step, done, total).
        tell: called with single lines of text.

    Raises:
        UsageError: `out` exists, there is no such plan, or both plan and settings are given.
    """
    out = require_absent(out)
    if plan is not None and settings is not None:
        raise UsageError("both a plan and settings are given.", "Give one of them.")
    backend, device = choose_backend(), choose_device(device)
    if settings is None:
        plan = plan or choose_plan(device)
        settings = plan_named(plan)
    tell = tell or (lambda line: None)
    tell(f"Demo on synthetic head CT; backend {backend}, device {device}.")
    tell(
        f"Plan {plan or 'of your own'}: {settings.num_series} series, {settings.preset} at"
        f" {settings.size}x{settings.size} pixels, {number_of(settings.epochs, 'epoch')}."
    )
    phantoms, cache_dir = out / PHANTOMS, out / CACHE
    write_phantoms(
        phantoms,
        settings.num_series,
        seed,
        matrix=settings.matrix,
        slice_spacing_mm=settings.slice_spacing_mm,
        workers=workers,
        progress=progress,
    )
    config = RunConfig(
        preset=settings.preset,
        precision=settings.precision,
        seed=seed,
        device=device,
        # A few hundred steps are too few to learn through rotations and changes of brightness.
        data=DataConfig(size=settings.size, balance=True, augment="flip"),
        fit=FitConfig(
            batch_size=settings.batch_size,
            epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            schedule="cosine",
            warmup_steps=20,
        ),
    )
    run_dir = train_dicom(
        config,
        phantoms / IMAGES,
        phantoms / LABELS_CSV,
        out / RUN,
        cache_dir=cache_dir,
        index_dir=out / INDEX,
        workers=workers,
        progress=progress,
        tell=tell,
    )
    run = RunFolder(run_dir)
    metrics = read_json(run.metrics_file("test"))["slice"]
    trivial = metrics["trivial_auroc_any"]
    patients = _positive_patients(CTCache.open(cache_dir), run.split())
    result = DemoResult(run_dir, metrics["auroc"], trivial, patients)
    write_json(
        out / SUMMARY,
        {
            "synthetic": True,
            "plan": plan,
            "seed": seed,
            "auroc": result.auroc,
            "trivial_auroc_any": trivial,
            "test_patients_with": patients,
        },
    )
    for line in str(result).splitlines():
        tell(line)
    tell(f"Report: {run.report_to_read}")
    return result


def _positive_patients(cache: CTCache, split: Split) -> dict[str, int]:
    """Count the held-out patients with each label."""
    test: pd.DataFrame = cache.slices.iloc[split.indices(cache.slices, "test")]
    patients = test.groupby("patient_id")[list(LABELS)].max().sum()
    return {label: int(patients[label]) for label in LABELS}
