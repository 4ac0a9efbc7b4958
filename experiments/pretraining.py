"""Phantoms as pretraining: weights of our own, whose licence lets anyone use them.

A network is trained on phantoms, and its weights are written with a record of where they come
from. Do they help? On a few phantoms of another seed and style, the network is trained from scratch
and from these weights, several times each, and both are scored on the same patients. Real slices,
where some are given, are put into the order of their probabilities. None of this says anything
about patients.

Fine-tuning chooses its learning rate by validation, for each start and seed; the test split chooses
nothing.
"""

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.pretraining_plans import Drawn, Plan
from experiments.real_slices import rank_real
from ich_keras import __version__
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.split import Split, split_by_patient
from ich_keras.data.trivial import trivial_auroc
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.files import read_json, write_json
from ich_keras.labels import ANY, LABELS
from ich_keras.metrics.aggregation import aggregate
from ich_keras.metrics.binary import binary_metrics
from ich_keras.models.weights_file import SUFFIX
from ich_keras.progress import Tell
from ich_keras.run_folder import RunFolder

LICENCE = "Apache-2.0"
STARTS = ("scratch", "pretrained")
AS_IT_IS = "pretrained, not fine-tuned"
MARK = "pretraining.json"
_NO_CLAIM = "drawn phantoms only: these weights say nothing about patients"
# Of a split file: the few training patients, as in `experiments.splits`.
_FEW = "few"


@dataclass(frozen=True, eq=False)
class Answered:
    """What a network answers on the slices of a test split, unsmoothed.

    Args:
        truth: int (n, 6).
        values: float (n, 6), probabilities.
        patients: str (n,).
        series: str (n,).
    """

    truth: np.ndarray
    values: np.ndarray
    patients: np.ndarray
    series: np.ndarray


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured.

    Args:
        plan: of it.
        weights: the file that was written.
        record: in that file.
        scores: a row per start and seed.
        answers: start -> of each seed.
        real: of real slices, most suspicious first; None where none were given.
    """

    plan: Plan
    weights: Path
    record: dict[str, Any]
    scores: pd.DataFrame
    answers: dict[str, list[Answered]]
    real: pd.DataFrame | None


def measure(
    plan: Plan,
    work: Path,
    weights: Path,
    real: Path | None = None,
    real_labels: Path | None = None,
    device: str = "auto",
    workers: int = 0,
    tell: Tell | None = None,
) -> Measured:
    """Pretrain, write the weights, and measure what they are good for; finished parts are taken as
    they are.

    Args:
        plan: what to do.
        work: folder of caches and runs.
        weights: the new file, `.weights.h5`.
        real: DICOM files whose slices are ranked; None ranks none.
        real_labels: RSNA's csv of them.
        device: "auto", "cpu" or "cuda".
        workers: processes that draw phantoms.
        tell: called with single lines of text.

    Raises:
        UsageError: the file does not end in `.weights.h5`.
        StaleError: the folder is of another plan.
    """
    tell = tell or (lambda line: None)
    if not str(weights).endswith(SUFFIX):
        raise UsageError(f"weights file {str(weights)!r}; expected one that ends in {SUFFIX}.")
    _claim(plan, work)
    source = _cache(work / "source", plan.source, plan.size, workers, tell)
    run = _trained(plan, source, work / "pretrained", {"seed": plan.seed}, device, tell)
    record = write_pretrained(plan, run, source, weights)
    tell(f"Weights: {weights}")
    target = _cache(work / "target", plan.target, plan.size, workers, tell)
    rows: list[dict[str, Any]] = []
    answers: dict[str, list[Answered]] = {start: [] for start in (*STARTS, AS_IT_IS)}
    for seed in plan.seeds:
        split = few_patients(split_by_patient(target.slices, seed), target.slices, plan.patients)
        path = work / f"{_FEW}-s{seed}.json"
        split.save(path)
        counting = trivial_auroc(
            target, *(split.indices(target.slices, part) for part in ("train", "test"))
        )
        for start in STARTS:
            name = str(weights) if start == "pretrained" else None
            best = _fine_tuned(plan, target, work, path, seed, start, name, device, tell)
            answers[start].append(answers_of(best, target, split, device))
            chosen = {
                "learning rate": best.recipe().training.learning_rate,
                "validation log loss": _validation_loss(best),
            }
            rows.append(_row(start, seed, answers[start][-1], counting) | chosen)
        answers[AS_IT_IS].append(answers_of(run, target, split, device))
        rows.append(_row(AS_IT_IS, seed, answers[AS_IT_IS][-1], counting))
    ranked = None if real is None else rank_real(run, real, real_labels, device)
    return Measured(plan, weights, record, pd.DataFrame(rows), answers, ranked)


def _claim(plan: Plan, work: Path) -> None:
    settings = {"plan": _settings(plan)}
    mark = work / MARK
    if mark.is_file():
        if read_json(mark) != settings:
            raise StaleError(
                f"{work} was made by another pretraining.", "Give another --work, or remove it."
            )
    elif work.is_dir() and any(work.iterdir()):
        raise UsageError(
            f"{work} is not a work folder of a pretraining, and it is not empty.",
            "Give another --work.",
        )
    else:
        write_json(mark, settings)


def _settings(plan: Plan) -> dict[str, Any]:
    content = asdict(plan)
    for name in ("source", "target"):
        content[name]["slice_spacing_mm"] = list(content[name]["slice_spacing_mm"])
    return content | {"rates": list(plan.rates), "seeds": list(plan.seeds)}


def _cache(path: Path, drawn: Drawn, size: int, workers: int, tell: Tell) -> CTCache:
    from ich_keras.phantom.dicom import IMAGES, LABELS_CSV, write_phantoms
    from ich_keras.workflow import cache_dicom

    if path.is_dir():
        return CTCache.open(path)
    phantoms = path.with_name(f"{path.name}-phantoms")
    if not phantoms.is_dir():
        tell(f"Drawing {drawn.num_series:,} phantoms.")
        write_phantoms(
            phantoms,
            drawn.num_series,
            drawn.seed,
            matrix=drawn.matrix,
            workers=workers,
            slice_spacing_mm=drawn.slice_spacing_mm,
            mix=drawn.mix,
        )
    cache = cache_dicom(phantoms / IMAGES, phantoms / LABELS_CSV, path, size, workers=workers)
    # The cache holds all that is needed, and the phantoms can be drawn again.
    shutil.rmtree(phantoms)
    return cache


def _trained(
    plan: Plan, cache: CTCache, out: Path, settings: dict[str, Any], device: str, tell: Tell
) -> RunFolder:
    """Train a run unless its folder is finished; an interrupted one is trained from the start."""
    from ich_keras.config import RunConfig
    from ich_keras.training import train

    run = RunFolder(out)
    if run.is_finished:
        return run
    shutil.rmtree(out, ignore_errors=True)
    tell(f"Training {out.name}.")
    asked = {
        "preset": plan.preset,
        "size": plan.size,
        "balance": True,
        "augment": "flip",
        "intensity": "windows",
        "epochs": plan.epochs,
        "batch_size": plan.batch_size,
        "learning_rate": plan.learning_rate,
        "schedule": "cosine",
        "warmup_steps": 20,
        "accumulate": 1,
        "device": device,
        "loader_workers": 0,
        **settings,
    }
    train(RunConfig().with_settings(asked), cache, out, tell=tell)
    run.model_file.unlink(missing_ok=True)
    shutil.rmtree(run.state_folder, ignore_errors=True)
    return run


def write_pretrained(plan: Plan, run: RunFolder, cache: CTCache, out: Path) -> dict[str, Any]:
    """Write the weights of a run with a record of where they come from.

    Args:
        plan: of the pretraining.
        run: finished.
        cache: of its phantoms.
        out: the file, which is replaced.

    Returns:
        The record.
    """
    from ich_keras.inference import load_run
    from ich_keras.models.weights import save_weights

    recipe, model = load_run(run, precision="float32")
    metrics = run.metrics("test")
    assert metrics is not None  # a finished run has been evaluated
    record = {
        "network": recipe.network.to_dict(),
        "labels": list(recipe.labels.names),
        "preset": plan.preset,
        "intensity": recipe.inputs.intensity.name,
        "source": f"phantoms_{plan.preset}",
        "licence": LICENCE,
        "synthetic": True,
        "note": _NO_CLAIM,
        "made_by": f"ich_keras {__version__}, python -m experiments pretrain",
        "date": run.environment()["started"][:10],
        "phantoms": _settings(plan)["source"],
        "patients": run.data()["plan"]["num_patients"],
        "training": {
            "size": plan.size,
            "epochs": plan.epochs,
            "batch_size": plan.batch_size,
            "learning_rate": plan.learning_rate,
            "seed": plan.seed,
            "best_epoch": run.best_epoch(),
        },
        "cache": cache.fingerprint,
        "auroc_any_of_other_phantoms": {
            level: part["auroc"][ANY] for level, part in metrics.items()
        },
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_weights(model, out, record)
    return record


def few_patients(split: Split, slices: pd.DataFrame, count: int) -> Split:
    """Keep a few training patients of a split, half of them with a bleed; the rest stays.

    Args:
        split: by patient, with a seed.
        slices: the table it was made for.
        count: patients.

    Raises:
        DataError: there are not as many.
    """
    table = slices.iloc[split.indices(slices, "train")]
    bleeds = table.groupby("patient_id")[ANY].max()
    random = np.random.default_rng([split.seed or 0, 4])
    chosen: list[str] = []
    for is_bleeding, wanted in ((1, count // 2), (0, count - count // 2)):
        patients = sorted(bleeds.index[bleeds == is_bleeding])
        if len(patients) < wanted:
            raise DataError(
                f"{len(patients)} training patients are {'' if is_bleeding else 'not '}bleeding;"
                f" expected {wanted}.",
                "Draw more phantoms.",
            )
        chosen += list(random.choice(patients, wanted, replace=False))
    kept = set(table.loc[table["patient_id"].isin(chosen), split.key])
    members = split.members | {"train": tuple(sorted(kept))}
    return replace(split, members=members, note=f"{count} training patients")


def _fine_tuned(
    plan: Plan,
    cache: CTCache,
    work: Path,
    split: Path,
    seed: int,
    start: str,
    weights: str | None,
    device: str,
    tell: Tell,
) -> RunFolder:
    """Fine-tune with every rate, and return the run whose validation log loss is the lowest."""
    found = []
    for rate in plan.rates:
        settings: dict[str, Any] = {"seed": seed, "split": str(split), "learning_rate": rate}
        settings |= {"epochs": plan.fine_epochs, "weights": weights}
        out = work / f"{start}-s{seed}-{rate:g}"
        found.append(_trained(plan, cache, out, settings, device, tell))
    return min(found, key=_validation_loss)


def _validation_loss(run: RunFolder) -> float:
    return float(pd.read_csv(run.history_file)["valid_log_loss"].min())


def answers_of(run: RunFolder, cache: CTCache, split: Split, device: str) -> Answered:
    """Return what a run's network answers on the test split of some phantoms."""
    from ich_keras.inference import batches_of, load_run, probabilities

    recipe, model = load_run(run, device)
    samples = cache.samples(recipe.inputs.view)
    chosen = samples.of_rows(cache.slices, split.indices(cache.slices, "test"), "test")
    values = probabilities(model, batches_of(recipe, cache, samples, chosen), len(chosen))
    table = cache.slices.iloc[chosen]
    return Answered(
        table[list(LABELS)].to_numpy(int),
        values.astype(np.float64),
        table["patient_id"].to_numpy(),
        table["series_uid"].to_numpy(),
    )


def _row(start: str, seed: int, answered: Answered, counting: dict) -> dict[str, Any]:
    found = scores_of(answered)
    return {
        "start": start,
        "seed": seed,
        **found,
        **{f"counting voxels, AUROC per {level}": value for level, value in counting.items()},
    }


def scores_of(answered: Answered) -> dict[str, float | None]:
    """Return log loss and AUROC of `any`, per slice, and per series by its worst slice."""
    uids = list(answered.series)
    levels = {
        "slice": (answered.truth, answered.values),
        "series": (
            aggregate(answered.truth, uids).to_numpy().astype(int),
            aggregate(answered.values, uids).to_numpy(),
        ),
    }
    found = {}
    for level, (truth, values) in levels.items():
        metrics = binary_metrics(truth, values)
        found[f"AUROC of any per {level}"] = metrics["auroc"][ANY]
        found[f"log loss per {level}"] = metrics["log_loss"]
    return found
