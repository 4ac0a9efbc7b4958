"""Storing a finished run: the small files that `results.py` describes, made from its run folder."""

import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.declare import declaration
from experiments.place import Place
from experiments.results import AUGMENTED, HISTORY, PREDICTIONS, RESULT
from experiments.runs import RUNS
from experiments.settle import RunCost
from experiments.trained import evaluated, of_head, of_run
from ich_keras.ct.tables import patient_or_series
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.trivial import cache_band_counts, trivial_auroc
from ich_keras.data.views import make_samples
from ich_keras.errors import StaleError
from ich_keras.files import atomic_write, read_json, sha256_of, write_json
from ich_keras.inference import load_run, probabilities
from ich_keras.labels import ANY, LABELS, SIX
from ich_keras.metrics.aggregation import head_columns
from ich_keras.metrics.binary import TRUTH_COLUMNS
from ich_keras.recipe import Recipe
from ich_keras.run_folder import RunFolder

_KEPT_METRICS = (
    *("log_loss", "rsna_log_loss", "exact_match", "hamming_loss", "hamming_score"),
    *("precision", "recall", "f1", "specificity", "auroc", "ap", "n", "baseline", "skill"),
    "aggregation",
)


def patient_numbers(cache: CTCache) -> pd.Series:
    """Number the patients of a cache.

    Returns:
        series_uid -> 0, 1, ...; a series without a PatientID counts as a patient of its own.
    """
    slices = cache.slices.drop_duplicates("series_uid")
    numbers, _ = pd.factorize(patient_or_series(slices), sort=True)
    return pd.Series(numbers, index=slices["series_uid"])


def keep_result(place: Place, key: str, seed: int, cache: CTCache, cost: RunCost) -> None:
    """Store the result of a finished run folder.

    Args:
        place: of the experiments.
        key, seed: of the run.
        cache: the one it was trained on.
        cost: of its training; of a sequence head, of the slice network's.

    Raises:
        StaleError: the run folder does not record when and where it was trained.
    """
    run, out = RunFolder(place.run_dir(key, seed)), place.result_dir(key, seed)
    is_head = RUNS[key].on is not None
    # First of all: it refuses runs that do not know where they were trained.
    training = of_head(place, key, seed, cache, cost) if is_head else of_run(place, key, seed, cost)
    environment, machine = _machine_of(training.environment, run)
    recipe = run.recipe()
    table, metrics = evaluated(run, "test")
    numbers = patient_numbers(cache)
    _write(out / PREDICTIONS, _kept_rows(table, numbers))
    (out / AUGMENTED).unlink(missing_ok=True)
    if RUNS[key].is_thesis:
        _write(out / AUGMENTED, _kept_rows(_augmented(recipe, cache, run, table), numbers))
    atomic_write(out / HISTORY, training.history)
    data, split = run.data(), run.split()
    plan = data["plan"]
    content = recipe.as_config().to_dict()
    content["preset"] = RUNS[key].preset
    content["fit"] |= training.fit
    content["data"]["split"] = Path(content["data"]["split"]).name
    if content["weights"]:
        # The run they came from is more useful than a path on this machine.
        content["weights"] = RUNS[RUNS[key].on or key].weights
    # A head learns from all series as they are; the other entries are its slice network's.
    content["data"]["balance"] &= not is_head
    train, valid, test = (split.indices(cache.slices, part) for part in ("train", "valid", "test"))
    counts = _band_counts(cache)
    write_json(
        out / RESULT,
        {
            "key": key,
            "title": RUNS[key].title,
            "seed": seed,
            "declaration": declaration(key, place.scale, seed, place.source),
            "files": {
                name: sha256_of(out / name)
                for name in (PREDICTIONS, HISTORY, AUGMENTED)
                if (out / name).is_file()
            },
            "scale": place.scale.name,
            "synthetic": data["synthetic"],
            "cache": data["cache"],
            "config": content,
            "weights": _weights_record(run),
            "environment": environment,
            "machine": {
                **machine,
                # Of the command that stores the result, as a rule the one that trained the run.
                "threads": max(1, place.threads // place.jobs),
                "jobs": place.jobs,
            },
            "date": environment["started"][:10],
            "seconds": round(training.seconds, 1),
            "peak_bytes": training.peak_bytes,
            "best_epoch": training.best_epoch,
            "samples_seen": training.samples_seen,
            "steps": training.steps,
            "training_operations": training.operations,
            "patients": plan["num_patients"],
            "series": plan["num_series"],
            "slices": plan["num_slices"],
            "warning": plan["warning"],
            "note": plan["note"],
            "trivial_auroc_any": trivial_auroc(cache, train, test, counts=counts),
            "valid": _validated(run, trivial_auroc(cache, train, valid, counts=counts)),
            "metrics": {
                level: {name: part[name] for name in _KEPT_METRICS if name in part}
                for level, part in metrics.items()
            },
            **training.more,
        },
    )


def _validated(run: RunFolder, counting: dict[str, float | None]) -> dict[str, Any]:
    """Return the scores on validation, beside counting voxels: of the runs, not of a choice."""
    levels = {}
    if run.metrics("valid") is not None:
        _, metrics = evaluated(run, "valid")
        levels = {
            level: {"log_loss": part["log_loss"], "auroc_any": part["auroc"][ANY]}
            for level, part in metrics.items()
        }
    return {"metrics": levels, "trivial_auroc_any": counting}


def _machine_of(environment: dict, run: RunFolder) -> tuple[dict, dict]:
    """Part what a training recorded into environment and machine: its result may be stored later,
    and elsewhere."""
    environment = dict(environment)
    absent = {"started", "device_name", "processor", "cpu_count"} - {*environment}
    if absent:
        raise StaleError(
            f"{run.environment_file} lacks {', '.join(sorted(absent))}: an older version wrote it.",
            f"Remove {run}: the same command trains it again.",
        )
    names = {"device_name": "device", "processor": "processor", "cpu_count": "cores"}
    machine = {name: environment.pop(entry) for entry, name in names.items()}
    environment.pop("seed", None)
    return environment, machine


def _band_counts(cache: CTCache) -> np.ndarray:
    """Count the voxels per HU band in all slices of a cache.

    The counts are stored beside the cache for all runs on it: RSNA's take minutes.
    """
    of = cache.pixels_digest or cache.fingerprint
    path = cache.path.with_name(f"{cache.path.name}-bands-{of[:16]}.npy")
    if not path.is_file():
        content = io.BytesIO()
        np.save(content, cache_band_counts(cache))
        atomic_write(path, content.getvalue())
    return np.load(path)


def _weights_record(run: RunFolder) -> dict | None:
    path = run.started_from_file
    if not path.is_file():
        return None
    loaded = read_json(path)
    return {name: loaded[name] for name in ("fresh", "ignored", "record")}


def _kept_rows(table: pd.DataFrame, numbers: pd.Series) -> pd.DataFrame:
    kept = pd.DataFrame({"sop": table.get("sop_instance_uid", "")}, index=table.index)
    kept["series"] = table["series_instance_uid"]
    kept["patient"] = numbers.loc[table["series_instance_uid"]].to_numpy()
    kept[list(LABELS)] = table[list(LABELS)].astype(np.float32).astype(float)
    kept[list(TRUTH_COLUMNS)] = table[list(TRUTH_COLUMNS)].astype(int)
    own = head_columns(SIX)
    if own[0] in table:  # a sequence head's answers to the series
        kept[own] = table[own].astype(np.float32).astype(float)
    return kept


def _augmented(recipe: Recipe, cache: CTCache, run: RunFolder, table: pd.DataFrame) -> pd.DataFrame:
    """Predict the held-out samples once, each augmented at random as in the thesis."""
    from ich_keras.data.batches import CTDataset
    from ich_keras.data.epochs import EpochPlan
    from ich_keras.data.loader import CTLoader

    samples = make_samples(cache.slices, cache.series, recipe.inputs.view)
    rows = run.split().indices(cache.slices, "test")
    chosen = samples.of_rows(cache.slices, rows, "test")
    inputs, training = recipe.inputs, recipe.training
    dataset = CTDataset(
        cache.pixels, samples, inputs.size, "thesis", training.seed, inputs.intensity
    )
    plan = EpochPlan(chosen, np.zeros(len(chosen), bool), training.batch_size)
    _, model = load_run(run, recipe.device)
    values = probabilities(model, CTLoader(dataset, plan, training.loader_workers), len(chosen))
    changed = table.copy()
    changed[list(LABELS)] = values
    return changed


def _write(path: Path, table: pd.DataFrame) -> None:
    text = table.to_csv(index=False, float_format="%.9g", lineterminator="\n")
    # Without the time, so that the same numbers give the same bytes.
    atomic_write(path, gzip.compress(text.encode("utf-8"), mtime=0))
