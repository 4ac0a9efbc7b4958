"""Reading the manifest of a cache, and the tables that it names."""

from pathlib import Path

import pandas as pd

from ich_keras import files
from ich_keras.ct.tables import read_table
from ich_keras.data.cache.build import MANIFEST
from ich_keras.data.cache.plan import SCHEMA
from ich_keras.data.cache.shards import REBUILD
from ich_keras.errors import StaleError

MIN_SIZE = 8
MAX_SIZE = 4096
# Caches of schema 1 have no hashes of their pixels: what needs those is not checked.
_READABLE = (1, SCHEMA)
# What else a folder may be, by a file in it: in words, and what to do.
_OTHERS = {
    "index.json": ("an index", "Make a cache of it: ich cache --index {path} --out CACHE"),
    "recipe.json": ("a run", "Give the cache of the data."),
    "notice.txt": ("a prediction", "Give the cache of the data."),
}


def read_cache_table(path: Path, name: str, manifest: dict) -> pd.DataFrame:
    """Read a table of a cache.

    Raises:
        StaleError: it is absent, damaged, or another than the manifest says.
    """
    try:
        return read_table(path / f"{name}.csv", manifest["tables"][name])
    except StaleError as error:
        raise StaleError(error.message, REBUILD) from error


def read_manifest(path: Path) -> dict:
    """Read the manifest of a cache.

    Args:
        path: the cache's folder.

    Raises:
        StaleError: it is absent, damaged, or of a schema that this version cannot read.
    """
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        for name, (what, hint) in _OTHERS.items():
            if (path / name).is_file():
                raise StaleError(f"{path} is {what}, not a cache.", hint.format(path=path))
        raise StaleError(
            f"{path} is not a finished cache: it has no {MANIFEST}.",
            "Is it the right folder? If so, build the cache.",
        )
    manifest = files.read_json(manifest_path)
    found = manifest.get("schema") if isinstance(manifest, dict) else None
    if found not in _READABLE:
        raise StaleError(
            f"{manifest_path}: schema is {found} in the cache, {SCHEMA} wanted.", REBUILD
        )
    checksum = manifest.pop("checksum", None)
    if checksum != files.fingerprint(manifest):
        raise StaleError(f"{manifest_path} does not match its checksum.", REBUILD)
    if not MIN_SIZE <= manifest["size"] <= MAX_SIZE:
        raise StaleError(
            f"{manifest_path}: size {manifest['size']}; expected {MIN_SIZE} to {MAX_SIZE}.", REBUILD
        )
    return manifest
