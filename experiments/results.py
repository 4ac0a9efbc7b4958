"""What is kept of a run: small files from which every table and figure can be made again.

OUT/runs/<key>-s<seed>/
    predictions.csv.gz   test split: UIDs, patient, six probabilities (nine digits, which are all
                         of a float32), six labels
    augmented.csv.gz     the same under the thesis's random augmentation (thesis splits only)
    history.csv          per epoch
    result.json          what it was, when and where it was trained, how long, metrics; written last

A patient is a running number over the data set, never a PatientID.
"""

import dataclasses
import gzip
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.data import Place
from experiments.runs import RUNS, SCALES, declaration
from ich_keras.config import RunConfig
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.split import Split
from ich_keras.data.trivial import cache_band_counts, trivial_auroc
from ich_keras.data.views import make_samples
from ich_keras.errors import StaleError
from ich_keras.evaluation import SPLIT
from ich_keras.files import atomic_write, read_json, write_json
from ich_keras.labels import LABELS
from ich_keras.metrics.binary import TRUTH_COLUMNS
from ich_keras.prediction import CONFIG, DATA, load_run, probabilities, run_intensity, run_view
from ich_keras.training import ENVIRONMENT, HISTORY, WEIGHTS

RESULT, PREDICTIONS, AUGMENTED = "result.json", "predictions.csv.gz", "augmented.csv.gz"
_KEPT_METRICS = (
    *("log_loss", "rsna_log_loss", "exact_match", "hamming_loss", "hamming_score"),
    *("precision", "recall", "f1", "specificity", "auroc", "ap", "n", "baseline", "skill"),
    "aggregation",
)


# What the report takes from result.json without asking.
_ENTRIES = {
    **dict.fromkeys(("scale", "config.precision", "config.data.view", "machine.device"), str),
    **dict.fromkeys(("environment.backend", "date"), str),
    **dict.fromkeys(("config.fit", "environment.versions", "patients", "metrics"), dict),
    **dict.fromkeys(("slices", "trivial_auroc_any"), dict),
    **dict.fromkeys(("machine.cores", "steps", "samples_seen"), int),
    **dict.fromkeys(("seconds", "training_operations"), (int, float)),
    "synthetic": bool,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """A finished run.

    Args:
        key, seed: which.
        info: what result.json says.
        predictions: one row a sample of the test split: `sop` ("" for series), `series`,
            `patient`, probabilities by label, labels as `true_<label>`.
        history: one row an epoch.
        augmented: predictions under the thesis's augmentation; None where they were not made.
    """

    key: str
    seed: int
    info: dict
    predictions: pd.DataFrame
    history: pd.DataFrame
    augmented: pd.DataFrame | None

    @property
    def is_series(self) -> bool:
        """Whether it says something about whole series only."""
        return self.info["config"]["data"]["view"] == "series"


def patient_numbers(cache: CTCache) -> pd.Series:
    """Number the patients of a cache: series_uid -> 0, 1, ...; without a PatientID each series
    stands for itself."""
    slices = cache.slices.drop_duplicates("series_uid")
    names = slices["patient_id"].where(slices["patient_id"] != "", slices["series_uid"])
    numbers, _ = pd.factorize(names, sort=True)
    return pd.Series(numbers, index=slices["series_uid"])


def keep_result(place: Place, key: str, seed: int, cache: CTCache, cost: dict) -> None:
    """Copy what is worth keeping of a finished run folder.

    Args:
        place: of the experiments.
        key, seed: of the run.
        cache: the one it was trained on.
        cost: "samples_per_epoch" and "operations_per_sample" of its training.

    Raises:
        StaleError: the run folder does not say when and where it was trained.
    """
    run_dir, out = place.run_dir(key, seed), place.result_dir(key, seed)
    environment, machine = _trained_in(run_dir)
    config = RunConfig.from_dict(read_json(run_dir / CONFIG))
    table = pd.read_csv(run_dir / "predictions-test.csv", dtype={"sop_instance_uid": str})
    numbers = patient_numbers(cache)
    _write(out / PREDICTIONS, _kept_rows(table, numbers))
    (out / AUGMENTED).unlink(missing_ok=True)
    if RUNS[key].is_thesis:
        _write(out / AUGMENTED, _kept_rows(_augmented(config, cache, run_dir, table), numbers))
    history = pd.read_csv(run_dir / HISTORY)
    atomic_write(out / HISTORY, (run_dir / HISTORY).read_text(encoding="utf-8"))
    data, metrics = read_json(run_dir / DATA), read_json(run_dir / "metrics-test.json")
    split = Split.load(run_dir / SPLIT)
    plan = data["plan"]
    samples = cost["samples_per_epoch"] * len(history)
    content = config.to_dict()
    content["data"]["split"] = Path(content["data"]["split"]).name
    if content["weights"]:
        # The run it came from says more than a path on this machine.
        content["weights"] = RUNS[key].weights
    write_json(
        out / RESULT,
        {
            "key": key,
            "title": RUNS[key].title,
            "seed": seed,
            "declaration": declaration(key, place.scale, seed, place.source),
            "files": {
                name: hashlib.sha256((out / name).read_bytes()).hexdigest()
                for name in (PREDICTIONS, HISTORY, AUGMENTED)
                if (out / name).is_file()
            },
            "scale": place.scale.name,
            "synthetic": data["synthetic"],
            "cache": data["cache"],
            "config": content,
            "weights": _weights_record(run_dir),
            "environment": environment,
            "machine": {
                **machine,
                # Of the command that keeps it, as a rule the one that trained it.
                "threads": max(1, place.threads // place.jobs),
                "jobs": place.jobs,
            },
            "date": environment["started"][:10],
            "seconds": float(history["seconds"].sum()),
            "samples_seen": samples,
            "steps": plan["total_steps"] // config.fit.accumulate,
            "training_operations": 3 * samples * cost["operations_per_sample"],
            "patients": plan["num_patients"],
            "series": plan["num_series"],
            "slices": plan["num_slices"],
            "warning": plan["warning"],
            "note": plan["note"],
            "trivial_auroc_any": trivial_auroc(
                cache,
                *(split.indices(cache.slices, part) for part in ("train", "test")),
                counts=_band_counts(cache),
            ),
            "metrics": {
                level: {name: part[name] for name in _KEPT_METRICS if name in part}
                for level, part in metrics.items()
            },
        },
    )


def _trained_in(run_dir: Path) -> tuple[dict, dict]:
    """Return what the training wrote about its environment and its machine: results may be kept
    later, and elsewhere."""
    found = read_json(run_dir / ENVIRONMENT)
    absent = {"started", "device_name", "processor", "cpu_count"} - {*found}
    if absent:
        raise StaleError(
            f"{run_dir / ENVIRONMENT} lacks {', '.join(sorted(absent))}: an older version made it.",
            f"Remove {run_dir}: the same command trains it again.",
        )
    names = {"device_name": "device", "processor": "processor", "cpu_count": "cores"}
    machine = {name: found.pop(of) for of, name in names.items()}
    found.pop("seed", None)
    return found, machine


def _band_counts(cache: CTCache) -> np.ndarray:
    """Count voxels per HU band in all slices of a cache: once, for all runs on it. RSNA's take
    minutes, so the counts stay beside the cache."""
    path = cache.path.with_name(f"{cache.path.name}-bands-{cache.fingerprint[:16]}.npy")
    if not path.is_file():
        content = io.BytesIO()
        np.save(content, cache_band_counts(cache))
        atomic_write(path, content.getvalue())
    return np.load(path)


def _weights_record(run_dir: Path) -> dict | None:
    path = run_dir / WEIGHTS
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
    return kept


def _augmented(
    config: RunConfig, cache: CTCache, run_dir: Path, table: pd.DataFrame
) -> pd.DataFrame:
    """Predict the held-out samples once, each changed at random as the thesis did."""
    from ich_keras.data.batches import CTDataset, CTLoader, EpochPlan

    samples = make_samples(cache.slices, cache.series, run_view(config))
    rows = Split.load(run_dir / SPLIT).indices(cache.slices, "test")
    chosen = samples.of_rows(cache.slices, rows, "test")
    dataset = CTDataset(
        cache.pixels, samples, config.data.size, "thesis", config.seed, run_intensity(config)
    )
    plan = EpochPlan(chosen, np.zeros(len(chosen), bool), config.fit.batch_size)
    _, model = load_run(run_dir, config.device)
    values = probabilities(model, CTLoader(dataset, plan, config.data.loader_workers), len(chosen))
    changed = table.copy()
    changed[list(LABELS)] = values
    return changed


def _write(path: Path, table: pd.DataFrame) -> None:
    text = table.to_csv(index=False, float_format="%.9g", lineterminator="\n")
    # Without the time, so that the same numbers are the same bytes.
    atomic_write(path, gzip.compress(text.encode("utf-8"), mtime=0))


def _read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype={"sop": str, "series": str}, keep_default_na=False)


def is_kept(place: Place, key: str, seed: int) -> bool:
    """Tell whether a run is finished and kept.

    Raises:
        StaleError: what is kept was declared otherwise.
    """
    folder = place.result_dir(key, seed)
    if not (folder / RESULT).is_file():
        return False
    wanted = declaration(key, place.scale, seed, place.source)
    _require_declared(_read_info(folder), folder, wanted)
    return True


def _require_declared(info: dict, folder: Path, wanted: str) -> None:
    if info["declaration"] != wanted:
        raise StaleError(
            f"{folder} is the result of a run that was declared otherwise (its date:"
            f" {info['date']}).",
            "Give another --out and --work, or remove that folder and the run's.",
        )


def require_same_cache(place: Place, cache: CTCache, kept: Sequence[tuple[str, int]]) -> None:
    """Refuse kept results that stand on other data than the cache of the work folder.

    Args:
        place: of the experiments.
        cache: of the work folder.
        kept: key and seed of finished runs that were trained on it.

    Raises:
        StaleError: one stands on other data, or is damaged.
    """
    fingerprint = cache.fingerprint
    for key, seed in kept:
        folder = place.result_dir(key, seed)
        if _read_info(folder)["cache"] != fingerprint:
            raise StaleError(
                f"{folder} is a result on other data than {cache.path}.",
                "Give another --out, or remove the results.",
            )


def _read_info(folder: Path) -> dict:
    """Read result.json and check that the files beside it are those it was written for.

    Raises:
        StaleError: one is damaged or missing.
    """
    try:
        info = read_json(folder / RESULT)
        checksums = dict(info["files"])
        _ = info["declaration"], info["date"], info["cache"]
        name = f"{info['key']}-s{info['seed']}"
    except (StaleError, KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, RESULT) from error
    if folder.name != name:
        raise StaleError(
            f"{folder} holds the result of {name}.", f"Call the folder {name} again, or remove it."
        )
    for name, checksum in checksums.items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != checksum:
            raise _damaged(folder, name)
    return info


def _damaged(folder: Path, name: str) -> StaleError:
    return StaleError(
        f"{folder / name} is missing or damaged.",
        f"Remove {folder}: the command that made it makes it again.",
    )


def load_result(out: Path, key: str, seed: int) -> Result:
    """Read a kept run.

    Raises:
        StaleError: it is not there, or damaged.
    """
    folder = out / "runs" / f"{key}-s{seed}"
    info = _read_info(folder)
    if not all(_has(info, path, kind) for path, kind in _ENTRIES.items()):
        raise _damaged(folder, RESULT)
    history = pd.read_csv(folder / HISTORY)
    columns = ["epoch", "valid_log_loss", "valid_auroc_any"]
    if not _has_numbers(history, columns) or history["valid_log_loss"].isna().all():
        raise _damaged(folder, HISTORY)
    augmented = folder / AUGMENTED
    return Result(
        key,
        seed,
        info,
        _read_rows(folder, PREDICTIONS),
        history,
        _read_rows(folder, AUGMENTED) if augmented.is_file() else None,
    )


def _has(info: dict, path: str, kind: type | tuple[type, ...]) -> bool:
    for name in path.split("."):
        info = info.get(name) if isinstance(info, dict) else None
    return isinstance(info, kind)


def _has_numbers(table: pd.DataFrame, columns: Sequence[str]) -> bool:
    return {*columns} <= {*table} and all(
        pd.api.types.is_numeric_dtype(table[column]) for column in columns
    )


def _read_rows(folder: Path, name: str) -> pd.DataFrame:
    """Read predictions: names, patients, numbers; each sample once."""
    table = _read(folder / name)
    if (
        not {"sop", "series"} <= {*table}
        or not _has_numbers(table, ["patient", *LABELS, *TRUTH_COLUMNS])
        or table.duplicated(["sop", "series"]).any()
    ):
        raise _damaged(folder, name)
    return table


def load_results(out: Path) -> dict[str, list[Result]]:
    """Read all kept runs: key -> results by seed. Runs that are no longer declared are left out.

    Raises:
        StaleError: they stand on different data, or one was declared otherwise.
    """
    found: dict[str, list[Result]] = {}
    for path in sorted(out.glob(f"runs/*/{RESULT}")):
        key, _, seed = path.parent.name.rpartition("-s")
        if key in RUNS and seed.isdecimal():
            result = load_result(out, key, int(seed))
            scale = SCALES.get(result.info["scale"])
            # Not the other way round: DICOM files may be phantoms, to try the road.
            if scale is not None and scale.is_synthetic and not result.info["synthetic"]:
                raise _damaged(path.parent, RESULT)
            # What DICOM files were declared is known only to whoever has them.
            if scale is not None and scale.is_synthetic:
                _require_declared(result.info, path.parent, declaration(key, scale, int(seed)))
            found.setdefault(key, []).append(result)
    scales = sorted({r.info["scale"] for results in found.values() for r in results})
    if len(scales) > 1:
        raise StaleError(
            f"the results in {out} are of the scales {' and '.join(scales)}.",
            "Keep the results of one scale in one folder.",
        )
    for is_other in (False, True):
        caches = _caches(found, is_other)
        if len(caches) > 1:
            raise StaleError(
                f"the results in {out} stand on {len(caches)} different caches.",
                "Keep the results of one set of data in one folder.",
            )
    return {key: sorted(results, key=lambda r: r.seed) for key, results in found.items()}


def _caches(found: dict[str, Sequence[Result]], is_other: bool) -> set[str]:
    return {
        result.info["cache"]
        for key, results in found.items()
        for result in results
        if (RUNS[key].split == "other") == is_other
    }
