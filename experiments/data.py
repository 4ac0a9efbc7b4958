"""The data of a work folder: phantoms, or the user's DICOM files -> index -> one cache."""

import shutil
from typing import Any

from experiments.declare import data_settings
from experiments.place import OTHER, Place
from ich_keras.data.cache.cache import CTCache
from ich_keras.errors import StaleError, UsageError
from ich_keras.files import read_json, write_json
from ich_keras.phantom.dicom import IMAGES, LABELS_CSV, write_phantoms
from ich_keras.progress import Progress, Tell
from ich_keras.workflow import cache_dicom

MARK = "experiment.json"


def claim_work(place: Place) -> None:
    """Mark a work folder as belonging to these data, or check that it does.

    Raises:
        UsageError: the scale needs DICOM files, or takes none.
        StaleError: it was made with other settings.
    """
    scale = place.scale
    if scale.is_synthetic == (place.source is not None):
        needs = "draws phantoms" if scale.is_synthetic else "needs --dicom and --labels"
        raise UsageError(f"scale {scale.name!r} {needs}.")
    settings = {"scale": scale.name, "data": data_settings(scale, place.source)}
    mark = place.work / MARK
    if not mark.is_file():
        if place.work.is_dir() and any(place.work.iterdir()):
            raise UsageError(
                f"{place.work} is not a work folder of the experiments, and it is not empty.",
                "Give another --work.",
            )
        write_json(mark, settings)
        return
    found = read_json(mark)
    if not isinstance(found, dict) or not isinstance(found.get("data"), dict):
        raise StaleError(f"{mark} is damaged.", "Give another --work, or remove this one.")
    if found != settings:
        here, there = _flat(settings), _flat(found)
        differing = sorted(name for name in here | there if here.get(name) != there.get(name))
        changes = ", ".join(f"{n} {there.get(n)!r} (now {here.get(n)!r})" for n in differing)
        raise StaleError(
            f"{place.work} was made with other settings: {changes}.",
            "Give another --work, or remove it.",
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {"scale": settings.get("scale"), **settings.get("data", {})}


def open_or_make(
    place: Place,
    is_other: bool = False,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> CTCache:
    """Open the cache of a work folder, or build it when it is missing.

    To build it, the phantoms are drawn or the DICOM files are indexed. An interrupted build starts
    from the beginning.

    Args:
        place: claimed.
        is_other: use the second set of phantoms.
        progress: called as progress(step, done, total).
        tell: called with single lines of text.
    """
    path, scale = place.cache_dir(is_other), place.scale
    if path.is_dir():
        return CTCache.open(path)
    workers = place.threads if place.threads > 1 else 0
    if place.source is not None:
        journal = place.work / "index.journal"
        return cache_dicom(
            place.source.dicom,
            place.source.labels,
            path,
            scale.size,
            workers=workers,
            journal=journal,
            progress=progress,
            tell=tell,
        )
    phantoms = place.work / (f"{OTHER}-phantoms" if is_other else "phantoms")
    if not phantoms.is_dir():
        assert scale.num_series is not None  # `claim_work`: without DICOM files there are phantoms
        write_phantoms(
            phantoms,
            scale.other_series if is_other else scale.num_series,
            scale.other_seed if is_other else scale.phantom_seed,
            matrix=scale.matrix,
            slice_spacing_mm=scale.slice_spacing_mm,
            workers=workers,
            progress=progress,
        )
    cache = cache_dicom(
        phantoms / IMAGES,
        phantoms / LABELS_CSV,
        path,
        scale.size,
        workers=workers,
        progress=progress,
        tell=tell,
    )
    # The cache holds all that is needed, and the phantoms can be drawn again.
    shutil.rmtree(phantoms)
    return cache
