"""The demo: phantoms -> index -> labels -> split -> cache -> training -> evaluation -> report.

It takes the road that real data take, through the same functions. Everything it makes is
synthetic; its numbers say that the programs work, not that they work on patients.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.split import Split
from ich_keras.files import read_json, require_absent, write_json
from ich_keras.labels import LABELS
from ich_keras.metrics.binary import format_metric
from ich_keras.phantom.dicom import IMAGES, LABELS_CSV, write_phantoms
from ich_keras.preparation import make_cache, prepare_index
from ich_keras.progress import Progress, Tell
from ich_keras.run_folder import RunFolder
from ich_keras.training import train

PHANTOMS, INDEX, CACHE, RUN = "phantoms", "index", "cache", "run"
SUMMARY = "demo.json"


@dataclass(frozen=True)
class DemoSettings:
    """How large the demo is: by default four minutes on two CPU cores.

    Args:
        num_series: phantom series to draw; many patients with few slices teach the network more
            than few with many.
        matrix: rows and columns of their DICOM files, pixels (scanners make 512).
        slice_spacing_mm: lowest and highest distance of their slices (scanners make about 5).
        size: rows and columns of the network's input, pixels.
        epochs: passes over the balanced training slices.
        batch_size: slices a step.
        learning_rate: after the warm-up.
    """

    num_series: int = 600
    matrix: int = 128
    slice_spacing_mm: tuple[float, float] = (8.0, 11.0)
    size: int = 96
    epochs: int = 6
    batch_size: int = 32
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class DemoResult:
    """What the demo made.

    Args:
        run_dir: the run folder.
        auroc: slice-level AUROC per label on the held-out patients; None where undefined.
        trivial_auroc: the same for `any`, of the detector that only counts voxels per HU band.
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
    settings: DemoSettings | None = None,
    device: str = "auto",
    workers: int = 0,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> DemoResult:
    """Make phantoms and walk them all the way to an evaluated run.

    Args:
        out: a new folder; receives phantoms/, index/, cache/, run/ and demo.json.
        seed: of the phantoms and of the training.
        settings: how large; None is the default of four minutes.
        device: "auto", "cpu" or "cuda".
        workers: processes that draw, index and cache; 0 works in this one.
        progress: called as progress(step, done, total).
        tell: called with single lines of text.

    Raises:
        UsageError: `out` exists.
    """
    out = require_absent(out)
    settings = settings or DemoSettings()
    tell = tell or (lambda line: None)
    phantoms = out / PHANTOMS
    write_phantoms(
        phantoms,
        settings.num_series,
        seed,
        matrix=settings.matrix,
        slice_spacing_mm=settings.slice_spacing_mm,
        workers=workers,
        progress=progress,
    )
    index = prepare_index(
        phantoms / IMAGES, phantoms / LABELS_CSV, workers=workers, progress=progress, tell=tell
    )
    index.save(out / INDEX)
    cache = make_cache(index, out / CACHE, settings.size, workers=workers, progress=progress)
    config = RunConfig(
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
    run_dir = train(config, cache, out / RUN, progress=progress, tell=tell)
    run = RunFolder(run_dir)
    metrics = read_json(run.metrics_file("test"))["slice"]
    trivial = metrics["trivial_auroc_any"]
    patients = _positive_patients(cache, run.split())
    result = DemoResult(run_dir, metrics["auroc"], trivial, patients)
    write_json(
        out / SUMMARY,
        {
            "synthetic": True,
            "seed": seed,
            "auroc": result.auroc,
            "trivial_auroc_any": trivial,
            "test_patients_with": patients,
        },
    )
    tell(str(result))
    tell(f"Report: {run.report_file}")
    return result


def _positive_patients(cache: CTCache, split: Split) -> dict[str, int]:
    """Count the held-out patients with each label."""
    test: pd.DataFrame = cache.slices.iloc[split.indices(cache.slices, "test")]
    patients = test.groupby("patient_id")[list(LABELS)].max().sum()
    return {label: int(patients[label]) for label in LABELS}
