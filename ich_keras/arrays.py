"""Volumes that are NumPy arrays of Hounsfield units: predicting them, and caching them.

They are written as DICOM files into a folder that does not outlive the call, and go the way of all
others: the same verdicts, checks and rejects.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ich_keras.answer_rules import USUAL_ERROR_RATE
from ich_keras.ct.array_files import ArrayVolume, VolumeUids, write_slices
from ich_keras.ct.header import MAX_ROWS_COLUMNS, MAX_SPACING_MM, MIN_SPACING_MM
from ich_keras.ct.rejects import MAX_REJECTS, RejectedFile
from ich_keras.ct.series import index_folder
from ich_keras.data.cache.cache import CTCache, build_cache
from ich_keras.data.labels import LabelTable, contradicts_any
from ich_keras.data.thin_series import AVERAGE
from ich_keras.disk import require_free
from ich_keras.errors import DataError, UsageError
from ich_keras.files import require_absent
from ich_keras.labels import UNLABELLED, Labelling, LabelSet, label_set
from ich_keras.prediction import predict_folder
from ich_keras.prediction_members import AnyRun
from ich_keras.prediction_tables import FolderPrediction

Volumes = np.ndarray | Sequence[np.ndarray] | Mapping[str, np.ndarray]
Spacing = Sequence[float] | Sequence[Sequence[float]]

MAX_SLICES = 9999  # names of files count so far
_FOLDER = "ich-arrays-"
_EXPECTED = "Expected numbers, (slices, rows, columns), in HU."


def predict_arrays(
    run_dir: AnyRun | Sequence[AnyRun],
    volumes: Volumes,
    spacing_mm: Spacing,
    batch_size: int | None = None,
    device: str | None = None,
    any_body_part: bool = False,
    unfinished: bool = False,
    max_rejects: float = MAX_REJECTS,
    specificity: float | None = None,
    sensitivity: float | None = None,
    error_rate: float = USUAL_ERROR_RATE,
    tta: Sequence[str] = (),
    thin: str = AVERAGE,
) -> FolderPrediction:
    """Predict volumes in memory with a trained run.

    Args:
        run_dir: a finished run, or a sequence of them; see `predict_folder`.
        volumes: one array, several, or several by name; each (slices, rows, columns), HU, integers
            or floats (which are rounded), inferior to superior, columns to the patient's left, rows
            to the back. Without names they are called volume-1, volume-2, ...
        spacing_mm: between slices, rows and columns; one for all volumes, or one each.
        batch_size, device, any_body_part, unfinished, max_rejects, specificity, sensitivity,
            error_rate, tta, thin: as for `predict_folder`.

    Returns:
        The prediction. Paths are `NAME/0001.dcm` for the most inferior slice of a volume.

    Raises:
        UsageError: an array or a spacing cannot be used.
        DataError: the values of a volume cannot be HU; and as `predict_folder` raises it.
        StaleError: as `predict_folder` raises it.
        EnvironmentProblem: the disk is full.
    """
    found = _named(volumes, spacing_mm, None)
    with _written(found, None) as (folder, _):
        return predict_folder(
            run_dir,
            folder,
            batch_size=batch_size,
            device=device,
            any_body_part=any_body_part,
            unfinished=unfinished,
            max_rejects=max_rejects,
            specificity=specificity,
            sensitivity=sensitivity,
            error_rate=error_rate,
            tta=tta,
            thin=thin,
        )


def cache_from_arrays(
    volumes: Volumes,
    spacing_mm: Spacing,
    out: Path | str,
    size: int,
    labels: Sequence[Any] | Mapping[str, Any] | None = None,
    label_names: LabelSet | Sequence[str] | None = None,
    patients: Sequence[str] | None = None,
    any_body_part: bool = False,
    max_rejects: float = MAX_REJECTS,
    **options: Any,
) -> CTCache:
    """Make the cache of volumes in memory, for `ich_keras.train` and the batch loaders.

    Args:
        volumes, spacing_mm: as for `predict_arrays`.
        out: the new cache's folder; it must not exist.
        size: rows and columns of the cached slices, pixels.
        labels: one array for each volume, in order or by name: int (slices, labels) for slices, or
            (labels,) for the series as a whole; 0, 1, or -1 where a label is missing. All are of
            one kind; None stands for a volume without labels.
        label_names: of the labels, in order; None takes RSNA's six.
        patients: whose each volume is, so that splits keep patients apart; None takes every volume
            for another patient.
        any_body_part: as for `index_folder`.
        max_rejects: as for `build_cache`.
        options: `workers`, `progress`, `compression`, `shard_bytes` and `restart` of `build_cache`.

    Returns:
        The opened cache. Its column `container` names files that are gone.

    Raises:
        UsageError: an array, a spacing or an argument cannot be used, or `out` exists.
        DataError: the values of a volume cannot be HU, or labels are faulty; and as `index_folder`
            and `build_cache` raise it.
        EnvironmentProblem: as `build_cache` raises it.
    """
    found = _named(volumes, spacing_mm, patients)
    names = label_set(label_names)
    given = None if labels is None else _labels_of(found, labels, names)
    out = require_absent(out).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with _written(found, out.parent) as (folder, uids):
        index = index_folder(folder, any_body_part=any_body_part)
        table = None if given is None else _label_table(uids, given, names)
        return build_cache(index, out, size, labels=table, max_rejects=max_rejects, **options)


def _named(
    volumes: Volumes, spacing_mm: Spacing, patients: Sequence[str] | None
) -> list[ArrayVolume]:
    """Check arrays, spacings and names, before anything is written."""
    if isinstance(volumes, Mapping):
        named = {str(name): hu for name, hu in volumes.items()}
    else:
        several = [volumes] if isinstance(volumes, np.ndarray) and volumes.ndim == 3 else volumes
        named = {f"volume-{number}": hu for number, hu in enumerate(several, 1)}
    if not named:
        raise UsageError("no volumes were given.", _EXPECTED)
    if len(named) < len(volumes) and isinstance(volumes, Mapping):
        raise UsageError("two volumes have the same name.", "Names are compared as texts.")
    for name in named:
        if not re.fullmatch(r"[\w. +-]{1,100}", name) or name.strip(". ") != name:
            raise UsageError(
                f"a volume is called {name!r}.",
                "Files are called so: use letters, digits, '_', '-', '+' and '.'.",
            )
    if len({name.lower() for name in named}) < len(named):
        raise UsageError(
            "two volumes have names that differ only in capitals.", "Files are called so."
        )
    spacings = _spacings(spacing_mm, len(named))
    owners = list(named) if patients is None else [str(patient) for patient in patients]
    if len(owners) != len(named):
        raise UsageError(f"{len(owners)} patients for {len(named)} volumes; expected one for each.")
    if any(not re.fullmatch(r"[^\x00-\x1f\x7f\\]{1,64}", owner.strip()) for owner in owners):
        raise UsageError(
            "a patient has no usable name.",
            "Give up to 64 characters, without backslashes and control characters.",
        )
    found = []
    for (name, hu), owner, spacing in zip(named.items(), owners, spacings, strict=True):
        found.append(ArrayVolume(name, owner, _array(name, hu), spacing))
    return found


def _array(name: str, hu: Any) -> np.ndarray:
    hu = np.asarray(hu)
    if hu.ndim != 3 or hu.size == 0 or hu.dtype.kind not in "iuf":
        raise UsageError(f"{name} is {hu.dtype} of shape {hu.shape}.", _EXPECTED)
    if max(hu.shape[1:]) > MAX_ROWS_COLUMNS or len(hu) > MAX_SLICES:
        raise UsageError(
            f"{name} has the shape {hu.shape}; expected at most {MAX_SLICES} slices of"
            f" {MAX_ROWS_COLUMNS} x {MAX_ROWS_COLUMNS}."
        )
    return hu


def _spacings(spacing_mm: Spacing, count: int) -> list[tuple[float, float, float]]:
    try:
        values = np.asarray(spacing_mm, np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.shape == (3,):
        values = np.tile(values, (count, 1))
    if values.shape != (count, 3):
        raise UsageError(
            f"spacing_mm is {spacing_mm!r}; expected three numbers, in mm, for all volumes or for"
            f" each of the {count}.",
            "They are the distances between slices, rows and columns.",
        )
    if not ((values >= MIN_SPACING_MM) & (values <= MAX_SPACING_MM)).all():
        raise UsageError(
            f"spacing_mm is {spacing_mm!r}; expected numbers from {MIN_SPACING_MM:g} to"
            f" {MAX_SPACING_MM:g} mm.",
            "They are the distances between slices, rows and columns, in mm.",
        )
    return [tuple(row) for row in values.tolist()]


@contextlib.contextmanager
def _written(
    volumes: list[ArrayVolume], beside: Path | None
) -> Iterator[tuple[Path, dict[str, VolumeUids]]]:
    """Yield a folder with the volumes as DICOM files, and the UIDs of each by its name.

    Args:
        volumes: what to write.
        beside: where the folder lies for as long as it is there; None takes the system's place.
    """
    with tempfile.TemporaryDirectory(prefix=_FOLDER, dir=beside) as name:
        folder = Path(name)
        require_free(folder, sum(one.hu.size * 2 for one in volumes), "the volumes")
        uids: dict[str, VolumeUids] = {}
        for volume in volumes:
            try:
                own = write_slices(folder / volume.name, volume)
            except RejectedFile as error:
                raise DataError(f"{volume.name}: {error.message}", error.hint) from error
            if twin := next((name for name, other in uids.items() if other == own), None):
                raise DataError(
                    f"{twin} and {volume.name} are equal, voxel by voxel.", "Leave one of them out."
                )
            uids[volume.name] = own
        yield folder, uids


def _labels_of(
    volumes: list[ArrayVolume], labels: Sequence[Any] | Mapping[str, Any], names: LabelSet
) -> dict[str, np.ndarray]:
    """Return the labels of each volume that has some, int8: (slices, labels), or (labels,)."""
    if isinstance(labels, Mapping):
        given = {str(name): values for name, values in labels.items()}
        if unknown := sorted(set(given) - {one.name for one in volumes}):
            raise UsageError(f"labels are given for {unknown[0]!r}, which is no volume.")
    elif len(labels) != len(volumes):
        raise UsageError(
            f"labels are given for {len(labels)} volumes of {len(volumes)}.",
            "Give an array for each, or None.",
        )
    else:
        given = dict(zip((one.name for one in volumes), labels, strict=True))
    found: dict[str, np.ndarray] = {}
    for volume in volumes:
        values = given.get(volume.name)
        if values is not None:
            found[volume.name] = _label_array(volume, np.asarray(values), names)
    if not found:
        raise UsageError("labels are given, and all of them are None.", "Leave labels out.")
    if len({values.ndim for values in found.values()}) > 1:
        raise UsageError(
            "some labels are of slices, others of whole volumes.", "Give all of one kind."
        )
    return found


def _label_array(volume: ArrayVolume, values: np.ndarray, names: LabelSet) -> np.ndarray:
    shapes = (len(volume.hu), len(names)), (len(names),)
    if values.shape not in shapes or values.dtype.kind not in "biuf":
        raise UsageError(
            f"the labels of {volume.name} are {values.dtype} of shape {values.shape}; expected"
            f" {shapes[0]} for its slices, or {shapes[1]} for the volume.",
            f"The labels are {names}; others are named by label_names.",
        )
    wrong = values[~np.isin(values, (UNLABELLED, 0, 1))]
    if wrong.size:
        raise DataError(
            f"the labels of {volume.name} hold {wrong[0]}; expected 0, 1, or -1 where one is"
            " missing."
        )
    rows = values.reshape(-1, len(names)).astype(np.int8)
    place = names.any_column
    if place is not None and len(names) > 1:
        wrong_rows = np.flatnonzero(contradicts_any(rows, names))
        if wrong_rows.size:
            raise DataError(
                f"the labels of {volume.name}: row {wrong_rows[0]} has {names.any_label}"
                f" {rows[wrong_rows[0], place]}; expected 1 where any of the others is, else 0."
            )
    if names.exclusive:
        is_one = ((rows == 1).sum(axis=1) == 1) & (rows != UNLABELLED).all(axis=1)
        wrong_rows = np.flatnonzero(~is_one & (rows != UNLABELLED).any(axis=1))
        if wrong_rows.size:
            raise DataError(
                f"the labels of {volume.name}: row {wrong_rows[0]} is"
                f" {rows[wrong_rows[0]].tolist()}; expected exactly one 1 of exclusive labels."
            )
    return rows if values.ndim == 2 else rows[0]


def _label_table(
    uids: dict[str, VolumeUids], labels: dict[str, np.ndarray], names: LabelSet
) -> LabelTable:
    rows: dict[str, np.ndarray] = {}
    for name, values in labels.items():
        level = "series" if values.ndim == 1 else "slice"
        keys = (uids[name].series,) if values.ndim == 1 else uids[name].slices
        rows |= zip(keys, np.atleast_2d(values), strict=True)
    table = pd.DataFrame(np.stack(list(rows.values())), list(rows), list(names.names), "int8")
    labelling = Labelling(names, level)
    return LabelTable(table, "arrays", len(table), labelling=labelling, kind="arrays")
