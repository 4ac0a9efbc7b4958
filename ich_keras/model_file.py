"""model.keras: a network with its recipe, so that the file alone says what its input is."""

import json
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

from ich_keras.disk import full_disk_told, reserve
from ich_keras.errors import StaleError, UsageError
from ich_keras.files import atomic_path
from ich_keras.leftovers import partial_of
from ich_keras.models.weights import weights_bytes
from ich_keras.recipe import RECIPE, Recipe

_DAMAGED = (zipfile.BadZipFile, zlib.error)
_KERAS_METADATA = "metadata.json"  # inside the archive that a `.keras` file is
_COPIED_BYTES = 2**20


def save_model(model: Any, path: Path, recipe: Recipe) -> None:
    """Write a whole model as `.keras` atomically, with the recipe in its metadata.

    Raises:
        EnvironmentProblem: the disk is full.
    """
    weights = weights_bytes(model)
    parts = partial_of(path.with_name(f"{path.name}.parts"))
    try:
        # Keras' own archive holds the time of day, and ZIP knows none before 1980 or after 2107.
        with full_disk_told(parts, weights):
            reserve(parts, weights)
            parts.unlink(missing_ok=True)
            model.save(parts, zipped=False)
        with atomic_path(path, needed=weights) as temporary:
            _write_archive(temporary, parts, recipe)
    finally:
        shutil.rmtree(parts, ignore_errors=True)


def _write_archive(path: Path, parts: Path, recipe: Recipe) -> None:
    """Put what Keras wrote into an archive as Keras would, and the recipe into the metadata."""
    with zipfile.ZipFile(path, "w") as archive:
        for part in sorted(file for file in parts.rglob("*") if file.is_file()):
            info = zipfile.ZipInfo(part.relative_to(parts).as_posix())  # of 1 January 1980
            if info.filename == _KERAS_METADATA:
                metadata = json.loads(part.read_bytes()) | {RECIPE: recipe.to_dict()}
                archive.writestr(info, json.dumps(metadata))
                continue
            info.file_size = part.stat().st_size  # without it, 4 GiB are the limit
            with open(part, "rb") as source, archive.open(info, "w") as target:
                shutil.copyfileobj(source, target, _COPIED_BYTES)


def read_recipe(path: Path | str) -> Recipe:
    """Read the recipe of a run's `model.keras`: what its input is, and how it was trained.

    Raises:
        UsageError: no such file.
        StaleError: not a model of this library, one without a recipe, or a damaged one: the
            checksums of all its parts are checked.
    """
    content = read_metadata(path).get(RECIPE)
    if content is None:
        raise StaleError(
            f"{path} carries no recipe: nothing says what its input is.",
            "Give the model.keras of a run that ich_keras 0.2 or newer trained.",
        )
    return Recipe.from_dict(content, str(path))


def read_metadata(path: Path | str) -> dict:
    """Read the metadata of a `.keras` file, and check the checksums of all its parts.

    Raises:
        UsageError: no such file.
        StaleError: not a .keras file, or a damaged one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            metadata = json.loads(archive.read(_KERAS_METADATA))
            damaged = archive.testzip()
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist.") from None
    # zipfile may take a flipped bit for encryption (RuntimeError) or an unknown method.
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, *_DAMAGED) as error:
        raise StaleError(
            f"{path} is not a .keras file ({error}).", "Give the model.keras of a run folder."
        ) from error
    if damaged is not None:
        raise StaleError(
            f"{path} is damaged: {damaged} does not match its checksum.", "Copy the file again."
        )
    return metadata if isinstance(metadata, dict) else {}
