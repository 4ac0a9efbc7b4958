"""checksums.json: what the files of a finished run were, so that a changed one is noticed.

It is written just before report.md, which finishes a run. Runs of older versions have none.
"""

import hashlib
import shlex
from collections.abc import Iterable
from pathlib import Path

from ich_keras.errors import StaleError
from ich_keras.files import read_json, sha256_of, write_json
from ich_keras.run_folder import PIXELS_OF, RunFolder

_FILES, _WEIGHTS = "files", "weights"
_COPY = "Copy the original run folder again."


def write_checksums(run: RunFolder, weights: str | None, report: str) -> None:
    """Record the checksums of all files of a run that is complete but for its report.

    Args:
        run: its states are left out: they are removed where they are no longer needed, and have
            checksums of their own.
        weights: digest of the best weights.
        report: the content that report.md is going to have.
    """
    others = (run.lock_file, run.report_file, run.checksums_file)
    found = {
        path.name: sha256_of(path)
        for path in sorted(run.path.iterdir())
        if path.is_file() and path not in others and not path.name.startswith(".")
    }
    found[run.report_file.name] = hashlib.sha256(report.encode("utf-8")).hexdigest()
    write_json(run.checksums_file, {_WEIGHTS: weights, _FILES: found})


def update_checksums(run: RunFolder, names: Iterable[str]) -> None:
    """Record files of a finished run that were rightly written again."""
    record = _read(run)
    if record is None:
        return
    found = {name: sha256_of(run.path / name) for name in names if (run.path / name).is_file()}
    write_json(run.checksums_file, record | {_FILES: record[_FILES] | found})


def changed_files(run: RunFolder) -> list[str] | None:
    """Return the files that are lost or changed since the run finished; None: it cannot be told.

    Raises:
        StaleError: checksums.json is damaged.
    """
    record = _read(run)
    if record is None:
        return None
    return [name for name, checksum in record[_FILES].items() if not _is_same(run, name, checksum)]


def require_unchanged(run: RunFolder, weights: str | None) -> None:
    """Refuse a finished run whose weights, or what says how to use them, were changed since.

    Args:
        run: finished.
        weights: digest of the best weights, as they were loaded.

    Raises:
        StaleError: names the file.
    """
    record = _read(run)
    if record is None:
        return
    if record.get(_WEIGHTS) not in (None, weights):
        raise StaleError(f"{run.best_weights} is not what the training ended with.", _COPY)
    used = [run.config_file, run.recipe_file, run.data_file, run.split_file]
    if run.choices_file.is_file():  # without it, a run takes the defaults until it chooses again
        used.append(run.choices_file)
    for path in used:
        _require_recorded(run, record, path)


def require_file_unchanged(run: RunFolder, path: Path) -> None:
    """Refuse a file of a finished run that is lost or was changed since.

    Raises:
        StaleError: names the file.
    """
    record = _read(run)
    if record is not None:
        _require_recorded(run, record, path)


def _require_recorded(run: RunFolder, record: dict, path: Path) -> None:
    checksum = record[_FILES].get(path.name)
    if checksum is not None and not _is_same(run, path.name, checksum):
        raise StaleError(f"{path} was changed after the training.", _COPY)


def require_choices(run: RunFolder) -> None:
    """Refuse a finished run that made choices and has lost them: the defaults would stand in.

    Raises:
        StaleError: choices.json is lost.
    """
    record = _read(run)
    if record is None or run.choices_file.is_file():
        return
    if run.choices_file.name in record[_FILES]:
        raise StaleError(
            f"{run} has lost its {run.choices_file.name}.",
            f"{_COPY} Or choose again: ich evaluate --run {shlex.quote(str(run))} --cache CACHE"
            " --split valid",
        )


def _is_same(run: RunFolder, name: str, checksum: str) -> bool:
    path = run.path / name
    return path.is_file() and sha256_of(path) == checksum


def _read(run: RunFolder) -> dict | None:
    if not run.checksums_file.is_file():
        if run.is_finished and PIXELS_OF in run.data():  # recorded since runs have checksums
            raise StaleError(
                f"{run} has lost its {run.checksums_file.name}: changes would go unnoticed.", _COPY
            )
        return None
    record = read_json(run.checksums_file)
    if not isinstance(record, dict) or not isinstance(record.get(_FILES), dict):
        raise StaleError(f"{run.checksums_file} is damaged.", _COPY)
    return record
