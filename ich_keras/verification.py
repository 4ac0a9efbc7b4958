"""Verifying what the library wrote: a run, a cache, an index, a weights file, a model.

Reads everything and compares it with the checksums that were stored when it was written.
"""

from pathlib import Path

from ich_keras.checkpoints import read_state, states_of
from ich_keras.counting import number_of
from ich_keras.ct.series import SeriesIndex
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.reading import indexed_slices, is_in_place
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.files import read_json
from ich_keras.model_file import read_metadata, read_recipe
from ich_keras.models.weights_file import SUFFIX, origin, read_weights
from ich_keras.progress import Progress
from ich_keras.recipe import RECIPE
from ich_keras.run_checksums import changed_files
from ich_keras.run_edits import require_unedited
from ich_keras.run_folder import RunFolder

_NO_CHECKSUMS = "no checksums (an older version wrote it): damage would not be noticed"


def verify(path: Path | str, progress: Progress | None = None) -> list[str]:
    """Check a run, a cache, an index, a `.weights.h5` or a `.keras` file; nothing is changed.

    Args:
        path: a folder or file; its kind is recognised by its content.
        progress: called as progress("verifying", done, total).

    Returns:
        What was checked, one line each.

    Raises:
        UsageError: it is none of these.
        StaleError: a part is lost, damaged or not the one that was written; names it.
    """
    path = Path(path)
    if path.is_dir():
        return _verify_folder(path, progress)
    if not path.is_file():
        what = (
            "is a device or pipe; expected a file or folder" if path.exists() else "does not exist"
        )
        raise UsageError(f"{path} {what}.")
    if path.suffix == ".keras":
        said = "; it carries no recipe, which says how its input is made"
        if RECIPE in read_metadata(path):
            read_recipe(path)
            said = ""
        return [f"{path}: the model's parts match their checksums{said}"]
    if path.name.endswith(SUFFIX):
        return [_verify_weights(path)]
    raise UsageError(
        f"{path} is neither a {SUFFIX} file nor a .keras file.",
        "Give one of these, or the folder of a run, a cache or an index.",
    )


def _verify_folder(path: Path, progress: Progress | None) -> list[str]:
    run = RunFolder(path)
    if (path / "manifest.json").is_file():
        return _verify_cache(path, progress)
    if (path / "index.json").is_file():
        return _verify_index(path)
    if (path / "plan.json").is_file():
        raise StaleError(f"{path} is an unfinished cache.", "Build it again to go on.")
    if any(part.exists() for part in (run.recipe_file, run.best_weights, run.state_folder)):
        return _verify_run(run)
    raise UsageError(
        f"{path} is neither a run nor a cache nor an index: it has no recipe.json, manifest.json or"
        " index.json.",
        "Is it the right folder?",
    )


def _verify_cache(path: Path, progress: Progress | None) -> list[str]:
    cache = CTCache.open(path)
    cache.verify(progress)
    said = "their checksums and the hashes in slices.csv" if cache.pixels_digest else "checksums"
    return [
        f"{path}: a cache; {number_of(len(cache), 'slice')} in"
        f" {number_of(len(cache.pixels.shards), 'shard')} match {said}",
        f"pixels {cache.pixels_digest or f'without digest: {_NO_CHECKSUMS}'}",
    ]


def _verify_index(path: Path) -> list[str]:
    index = SeriesIndex.load(path)
    sizes = index.slices["file_size"].tolist()
    moved = [source.path for source in indexed_slices(index) if not is_in_place(source)]
    if moved:
        raise StaleError(
            f"{path}: {len(moved):,} of {len(sizes):,} files are gone or have another size since"
            f" they were indexed; the first is {moved[0]}.",
            "Index the folder again.",
        )
    return [
        f"{path}: an index; its tables match their checksums",
        f"{len(sizes):,} files are in their places, with their sizes",
    ]


def _verify_run(run: RunFolder) -> list[str]:
    lines = [f"{run}: {'a finished' if run.is_finished else 'an unfinished'} run"]
    changed = changed_files(run)
    if changed:
        raise StaleError(
            f"{run}: {', '.join(changed)} changed or lost since the training finished.",
            "Copy the original run folder again.",
        )
    if changed is not None:
        count = len(read_json(run.checksums_file)["files"])
        lines.append(f"{count} files match their checksums")
    elif run.is_finished:
        lines.append(f"its files have {_NO_CHECKSUMS}")
    if run.best_weights.is_file():
        lines.append(_verify_weights(run.best_weights))
    if run.model_file.is_file():
        read_recipe(run.model_file)
        lines.append(f"{run.model_file.name}: the model's parts match their checksums")
    if not run.is_finished:
        require_unedited(run)
    for epoch, folder in states_of(run.state_folder):
        state, has_checksums = read_state(folder, epoch)
        if state.get("run") not in (None, run.identity()):
            raise StaleError(f"{folder} is a state of another run.", "Remove it.")
        said = "its files match their checksums" if has_checksums else _NO_CHECKSUMS
        lines.append(f"state of epoch {epoch}: {said}")
    return lines


def _verify_weights(path: Path) -> str:
    try:
        file = read_weights(path)
    except DataError as error:
        raise StaleError(error.message, error.hint) from error
    values = sum(array.size for arrays in file.layers.values() for array in arrays)
    said = f"match their checksums, digest {file.digest}"
    if file.digest is None:
        said = f"have {_NO_CHECKSUMS}"
    layers = f"{len(file.layers)} layers, {values:,} values"
    return f"{path.name}: {layers} {said}; {origin(file.record)}"
