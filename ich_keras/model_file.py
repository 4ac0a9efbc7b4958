"""model.keras: a network with its recipe, so that the file alone says what its input is."""

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

from ich_keras.errors import StaleError, UsageError
from ich_keras.files import atomic_path
from ich_keras.recipe import RECIPE, Recipe

_DAMAGED = (zipfile.BadZipFile, zlib.error)
_KERAS_METADATA = "metadata.json"  # inside the archive that a `.keras` file is


def save_model(model: Any, path: Path, recipe: Recipe) -> None:
    """Write a whole model as `.keras` atomically, with the recipe in its metadata."""
    with atomic_path(path) as temporary:
        model.save(temporary, overwrite=True)
        _write_recipe(temporary, recipe)


def _write_recipe(path: Path, recipe: Recipe) -> None:
    """Put a recipe into the metadata of a `.keras` file, which is rewritten."""
    with zipfile.ZipFile(path) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for info, content in members:
            if info.filename == _KERAS_METADATA:
                metadata = json.loads(content) | {RECIPE: recipe.to_dict()}
                content = json.dumps(metadata).encode("utf-8")
            archive.writestr(info, content)


def read_recipe(path: Path | str) -> Recipe:
    """Read the recipe of a run's `model.keras`: what its input is, and how it was trained.

    Raises:
        UsageError: no such file.
        StaleError: not a model of this library, one without a recipe, or a damaged one: the
            checksums of all its parts are checked.
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
    content = metadata.get(RECIPE) if isinstance(metadata, dict) else None
    if content is None:
        raise StaleError(
            f"{path} carries no recipe: nothing says what its input is.",
            "Give the model.keras of a run that ich_keras 0.2 or newer trained.",
        )
    return Recipe.from_dict(content, str(path))
