"""Files as earlier versions of the library wrote them, made from today's."""

import json
from pathlib import Path

import h5py

from ich_keras import files
from ich_keras.checkpoints import CHECKSUM, FILES, RUN, STATE
from ich_keras.ct.tables import write_table
from ich_keras.data.cache.cache import CTCache
from ich_keras.models.weights_file import CHECKSUMS, RECORD


def sealed_manifest(path: Path, manifest: dict) -> None:
    """Write a cache's manifest with a checksum that fits."""
    manifest = {name: value for name, value in manifest.items() if name != "checksum"}
    files.write_json(path / "manifest.json", {**manifest, "checksum": files.fingerprint(manifest)})


def cache_of_schema_1(path: Path) -> CTCache:
    """Take the hashes and digests from a cache."""
    manifest = json.loads((path / "manifest.json").read_text())
    slices = CTCache.open(path).slices[list(manifest["tables"]["slices"]["columns"])]
    manifest["tables"]["slices"] = write_table(
        path / "slices.csv", slices.drop(columns="pixel_hash")
    )
    for entry in manifest["shards"]:
        del entry["checksums"]
    del manifest["pixels"]
    sealed_manifest(path, manifest | {"schema": 1})
    return CTCache.open(path)


def weights_without_checksums(path: Path) -> None:
    """Take the checksums from a weights file."""
    with h5py.File(path, "r+") as file:
        record = json.loads(file.attrs[RECORD])
        del record[CHECKSUMS]
        file.attrs[RECORD] = json.dumps(record)


def state_without_checksums(folder: Path) -> None:
    """Take the checksums, and what tells whose it is, from a state."""
    state = files.read_json(folder / STATE)
    for name in (CHECKSUM, FILES, RUN, "best_weights"):
        state.pop(name, None)
    files.write_json(folder / STATE, state)
    weights_without_checksums(folder / "model.weights.h5")
