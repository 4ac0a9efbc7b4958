"""Stored results: small files from which every table and figure can be made again.

OUT/runs/<key>-s<seed>/
    predictions.csv.gz   test split: UIDs, patient, six probabilities (nine digits, which are all
                         of a float32), six labels; of a sequence head also its answers to the
                         series
    augmented.csv.gz     the same under the thesis's random augmentation (thesis splits only)
    history.csv          per epoch
    result.json          settings, time and place of the training, metrics; written last

Patients are numbered over the data set; no PatientID is stored.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from experiments.declare import declaration
from experiments.place import Place
from experiments.runs import RUNS
from experiments.scales import SCALES
from ich_keras.data.cache.cache import CTCache
from ich_keras.errors import StaleError
from ich_keras.files import read_json, sha256_of
from ich_keras.labels import LABELS
from ich_keras.metrics.binary import TRUTH_COLUMNS

RESULT, PREDICTIONS, AUGMENTED = "result.json", "predictions.csv.gz", "augmented.csv.gz"
HISTORY = "history.csv"

# Entries of result.json that the report needs, with their types.
_ENTRIES: dict[str, type | tuple[type, ...]] = {
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
        info: the content of result.json.
        predictions: one row per sample of the test split: `sop` ("" for series), `series`,
            `patient`, probabilities by label, labels as `true_<label>`.
        history: one row per epoch.
        augmented: predictions under the thesis's augmentation; None for other splits than its own.
    """

    key: str
    seed: int
    info: dict
    predictions: pd.DataFrame
    history: pd.DataFrame
    augmented: pd.DataFrame | None

    @property
    def is_series(self) -> bool:
        """Whether it has predictions for whole series only."""
        return self.info["config"]["data"]["view"] == "series"


def _read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype={"sop": str, "series": str}, keep_default_na=False)


def is_kept(place: Place, key: str, seed: int) -> bool:
    """Tell whether the result of a run is stored.

    Raises:
        StaleError: the stored result has other settings, or is damaged.
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
            f"{folder} is the result of a run with other settings (of {info['date']}).",
            "Give another --out and --work, or remove that folder and the run's.",
        )


def require_same_cache(place: Place, cache: CTCache, kept: Sequence[tuple[str, int]]) -> None:
    """Refuse stored results of other data than the cache of the work folder.

    Args:
        place: of the experiments.
        cache: of the work folder.
        kept: key and seed of the runs whose stored results must be of this cache.

    Raises:
        StaleError: a result is of other data, or is damaged.
    """
    fingerprint = cache.fingerprint
    for key, seed in kept:
        folder = place.result_dir(key, seed)
        if _read_info(folder)["cache"] != fingerprint:
            raise StaleError(
                f"{folder} is a result of other data than {cache.path}.",
                "Give another --out, or remove the results.",
            )


def _read_info(folder: Path) -> dict:
    """Read result.json and check that the files beside it match its checksums.

    Raises:
        StaleError: a file is damaged or missing.
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
            f"{folder} holds the result of {name}.", f"Rename the folder to {name}, or remove it."
        )
    for name, checksum in checksums.items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != checksum:
            raise _damaged(folder, name)
    return info


def _damaged(folder: Path, name: str) -> StaleError:
    return StaleError(
        f"{folder / name} is missing or damaged.",
        f"Remove {folder}: the command that made it will make it again.",
    )


def load_result(out: Path, key: str, seed: int) -> Result:
    """Read a stored result.

    Raises:
        StaleError: it is missing or damaged.
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


def _has(info: object, path: str, kind: type | tuple[type, ...]) -> bool:
    for name in path.split("."):
        info = info.get(name) if isinstance(info, dict) else None
    return isinstance(info, kind)


def _has_numbers(table: pd.DataFrame, columns: Sequence[str]) -> bool:
    return {*columns} <= {*table} and all(
        pd.api.types.is_numeric_dtype(table[column]) for column in columns
    )


def _read_rows(folder: Path, name: str) -> pd.DataFrame:
    """Read predictions and check their columns, and that each sample occurs once."""
    table = _read(folder / name)
    if (
        not {"sop", "series"} <= {*table}
        or not _has_numbers(table, ["patient", *LABELS, *TRUTH_COLUMNS])
        or table.duplicated(["sop", "series"]).any()
    ):
        raise _damaged(folder, name)
    return table


def load_results(out: Path) -> dict[str, list[Result]]:
    """Read all stored results: key -> results by seed. Runs no longer declared are left out.

    Raises:
        StaleError: they are of different data, or one has other settings.
    """
    found: dict[str, list[Result]] = {}
    for path in sorted(out.glob(f"runs/*/{RESULT}")):
        key, _, seed = path.parent.name.rpartition("-s")
        if key in RUNS and seed.isdecimal():
            result = load_result(out, key, int(seed))
            scale = SCALES.get(result.info["scale"])
            # Not the other way round: the DICOM files may be phantoms, for a trial.
            if scale is not None and scale.is_synthetic and not result.info["synthetic"]:
                raise _damaged(path.parent, RESULT)
            # The declaration of DICOM files is known only to whoever has them.
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
                f"the results in {out} are of {len(caches)} different caches.",
                "Keep the results of one set of data in one folder.",
            )
    return {key: sorted(results, key=lambda r: r.seed) for key, results in found.items()}


def _caches(found: Mapping[str, Sequence[Result]], is_other: bool) -> set[str]:
    return {
        result.info["cache"]
        for key, results in found.items()
        for result in results
        if (RUNS[key].split == "other") == is_other
    }
