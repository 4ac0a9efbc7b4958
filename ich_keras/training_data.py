"""What a training is trained on: recorded, and compared by those that resume or share it."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ich_keras.data.cache.cache import CTCache
from ich_keras.data.pixels import part_digests
from ich_keras.data.split import Split
from ich_keras.data.thin_series import SliceDistances
from ich_keras.distribution import require_agreement
from ich_keras.environment import PROCESSES, environment_record
from ich_keras.errors import StaleError
from ich_keras.labels import SIX, LabelSet
from ich_keras.phantom.dicom import is_synthetic
from ich_keras.recipe import Recipe
from ich_keras.run_folder import (
    CACHE,
    CACHE_PATH,
    LABELS_DIGEST,
    PIXELS,
    PIXELS_OF,
    PLAN,
    SLICE_SPACING,
    SYNTHETIC,
    RunFolder,
)

if TYPE_CHECKING:
    from ich_keras.models.torch.distributed import Group


def labels_digest(slices: pd.DataFrame, labels: LabelSet = SIX) -> str:
    """Return the SHA-256 of the labels of a slice table, 64 digits."""
    return hashlib.sha256(slices[list(labels.names)].to_numpy(np.int8).tobytes()).hexdigest()


def data_record(cache: CTCache, recipe: Recipe, split: Split, plan: dict) -> dict:
    """Return what data.json says of the data of a training."""
    trained = cache.slices["series_uid"].iloc[split.indices(cache.slices, "train", recipe.labels)]
    is_trained = cache.series["series_uid"].isin(set(trained))
    distances = SliceDistances.of(cache.series.loc[is_trained, "slice_spacing_mm"])
    return {
        CACHE: cache.fingerprint,
        CACHE_PATH: str(cache.path.absolute()),
        PIXELS: cache.pixels_digest,
        PIXELS_OF: part_digests(cache, split),
        LABELS_DIGEST: labels_digest(cache.slices, recipe.labels),
        "slices": len(cache.slices),
        SLICE_SPACING: None if distances is None else distances.record(),
        PLAN: plan,
        SYNTHETIC: is_synthetic(cache.slices),
    }


def require_same_data(run: RunFolder, cache: CTCache) -> None:
    """Refuse a cache or labels other than those that a training began with.

    Raises:
        StaleError: they differ.
    """
    before = run.data()
    if before[CACHE] != cache.fingerprint:
        raise StaleError(
            f"{cache.path} is not the cache that the training in {run} began with: fingerprint"
            f" {cache.fingerprint[:12]}, expected {before[CACHE][:12]}.",
            "Give the cache it began with.",
        )
    if before.get(PIXELS) not in (None, cache.pixels_digest):
        raise StaleError(
            f"{cache.path} holds other pixels than the training in {run} began with: digest"
            f" {(cache.pixels_digest or 'none')[:12]}, expected {before[PIXELS][:12]}.",
            "Give the cache it began with, or start a new training.",
        )
    labels = run.recipe().labels
    if (
        cache.labelling is None
        or cache.labels != labels
        or before.get(LABELS_DIGEST) not in (None, labels_digest(cache.slices, labels))
    ):
        raise StaleError(
            f"the labels are not those that the training in {run} began with.",
            "Give the --labels it began with.",
        )


def require_one_training(group: "Group | None", recipe: Recipe, cache: CTCache) -> None:
    """Refuse processes with other settings, labels or pixels than the first; see
    `require_agreement`.
    """
    facts = {"recipe": recipe.to_dict(), "labels": labels_digest(cache.slices, recipe.labels)}
    pixels = {"cache": cache.fingerprint, "pixels": cache.pixels_digest}
    require_agreement(group, facts | pixels)


def changed_environment(run: RunFolder | Path | str, device: str) -> list[str]:
    """List the differences between the environment a training began in and this one.

    Args:
        run: the run folder.
        device: "cpu" or "cuda": where to resume.

    Returns:
        One "name NOW, was BEFORE" per difference: packages, backend, device, machine, and the
        precision, where this hardware lacks the run's. What the run did not record counts as a
        difference.
    """
    run = RunFolder.at(run)
    recipe = run.recipe()
    before, now = run.environment(), environment_record(device)
    # The processor is either the device itself, or does not matter next to a GPU.
    names = [name for name in now if name not in ("versions", "processor")]
    pairs = {name: (now[name], before.get(name)) for name in names}
    pairs[PROCESSES] = now[PROCESSES], before.get(PROCESSES, 1)  # once there was only one
    for name, version in now["versions"].items():
        pairs[name] = version, before.get("versions", {}).get(name)
    pairs["precision"] = recipe.on(recipe.backend, device).precision, recipe.precision
    return [f"{name} {here}, was {there}" for name, (here, there) in pairs.items() if here != there]
