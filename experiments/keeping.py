"""Storing a finished run: the small files that `results.py` describes, made from its run folder."""

import gzip
import io
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.declare import declaration
from experiments.place import Place
from experiments.results import AUGMENTED, HISTORY, PREDICTIONS, RESULT
from experiments.runs import RUNS
from experiments.settle import RunCost
from ich_keras.ct.tables import patient_or_series
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.trivial import cache_band_counts, trivial_auroc
from ich_keras.data.views import make_samples
from ich_keras.errors import StaleError
from ich_keras.files import atomic_write, read_json, sha256_of, write_json
from ich_keras.inference import load_run, probabilities
from ich_keras.labels import LABELS, SIX
from ich_keras.metrics.aggregation import aggregate, head_of
from ich_keras.metrics.binary import TRUTH_COLUMNS, binary_metrics
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
        cost: of its training.

    Raises:
        StaleError: the run folder does not record when and where it was trained.
    """
    run, out = RunFolder(place.run_dir(key, seed)), place.result_dir(key, seed)
    environment, machine = _trained_in(run)
    recipe = run.recipe()
    found = run.metrics("test")
    assert found is not None  # a finished run has been evaluated
    table = pd.read_csv(run.predictions_file("test"), dtype={"sop_instance_uid": str})
    table, metrics = _unsmoothed(table, found)
    numbers = patient_numbers(cache)
    _write(out / PREDICTIONS, _kept_rows(table, numbers))
    (out / AUGMENTED).unlink(missing_ok=True)
    if RUNS[key].is_thesis:
        _write(out / AUGMENTED, _kept_rows(_augmented(recipe, cache, run, table), numbers))
    history = pd.read_csv(run.history_file)
    atomic_write(out / HISTORY, run.history_file.read_text(encoding="utf-8"))
    data, split = run.data(), run.split()
    plan = data["plan"]
    samples = cost.samples_per_epoch * len(history)
    content = recipe.as_config().to_dict()
    content["data"]["split"] = Path(content["data"]["split"]).name
    if content["weights"]:
        # The run they came from is more useful than a path on this machine.
        content["weights"] = RUNS[key].weights
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
            "seconds": round(float(history["seconds"].sum()), 1),
            "best_epoch": run.best_epoch(),
            "samples_seen": samples,
            "steps": plan["total_steps"] // recipe.training.accumulate,
            "training_operations": 3 * samples * cost.operations_per_sample,
            "patients": plan["num_patients"],
            "series": plan["num_series"],
            "slices": plan["num_slices"],
            "warning": plan["warning"],
            "note": plan["note"],
            "trivial_auroc_any": trivial_auroc(
                cache,
                split.indices(cache.slices, "train"),
                split.indices(cache.slices, "test"),
                counts=_band_counts(cache),
            ),
            "metrics": {
                level: {name: part[name] for name in _KEPT_METRICS if name in part}
                for level, part in metrics.items()
            },
        },
    )


def _trained_in(run: RunFolder) -> tuple[dict, dict]:
    """Return the recorded environment and machine of a training: its result may be stored later,
    and elsewhere."""
    environment = run.environment()
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


def _unsmoothed(table: pd.DataFrame, metrics: dict) -> tuple[pd.DataFrame, dict]:
    """Return predictions and metrics without smoothing along z.

    The experiments compare what networks answer, also with results of before there was smoothing.
    The report shows it as a control, with one kernel for all.
    """
    columns = [f"unsmoothed_{label}" for label in LABELS]
    if columns[0] not in table:
        return table, metrics
    values, truth = table[columns].to_numpy(), table[list(TRUTH_COLUMNS)].to_numpy()
    of_levels = {"slice": (truth, values)}
    if "series" in metrics:
        uids = table["series_instance_uid"].tolist()
        rule, head = metrics["series"]["aggregation"]["rule"], head_of(table, SIX)
        series = aggregate(values, uids, rule, head=head).to_numpy()
        of_levels["series"] = (aggregate(truth, uids).to_numpy().astype(int), series)
    found = {}
    for level, part in metrics.items():
        prevalence = part["baseline"]["prevalence"]["probabilities"]
        again = binary_metrics(*of_levels[level], [prevalence[label] for label in LABELS])
        found[level] = part | again
    table = table.drop(columns=list(LABELS))
    return table.rename(columns=dict(zip(columns, LABELS, strict=True))), found


def _kept_rows(table: pd.DataFrame, numbers: pd.Series) -> pd.DataFrame:
    kept = pd.DataFrame({"sop": table.get("sop_instance_uid", "")}, index=table.index)
    kept["series"] = table["series_instance_uid"]
    kept["patient"] = numbers.loc[table["series_instance_uid"]].to_numpy()
    kept[list(LABELS)] = table[list(LABELS)].astype(np.float32).astype(float)
    kept[list(TRUTH_COLUMNS)] = table[list(TRUTH_COLUMNS)].astype(int)
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
