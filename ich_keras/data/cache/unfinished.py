"""The folder in which a cache is built: what an earlier build left there, and whether it fits.

Each finished shard has a record beside it, a small JSON file. A build goes on from the shards of
the same plan. It deletes no finished shard unless it is asked to (`restart`).
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ich_keras import files
from ich_keras.ct.journal import NEVER_KEPT
from ich_keras.data.cache.fill import a_few, hashes_now
from ich_keras.data.cache.plan import PlannedShard, Settings
from ich_keras.data.cache.shards import Shard, ShardEntry
from ich_keras.data.reading import indexed_slices
from ich_keras.errors import StaleError, UsageError
from ich_keras.executors import Workers
from ich_keras.leftovers import PARTIAL, remove_leftovers
from ich_keras.progress import Progress

if TYPE_CHECKING:
    from ich_keras.ct.series import SeriesIndex

PLAN = "plan.json"
TEMPORARY = f"{PARTIAL}-"
# What else differs with the slices themselves; only the first that differs is said.
_OF_SLICES = {
    "inputs": "it is of other slices",
    "order": "the slices are in another order",
    "shards": "the shards have other sizes",
}


def working_folder(out: Path) -> Path:
    """Return the folder in which a cache is built."""
    return out.with_name(f"{out.name}{PARTIAL}")


def make_ready(partial: Path, plan: dict, restart: bool, is_alone: bool) -> None:
    """Make the working folder ready: remove what is unfinished, keep the shards of the same plan.

    Args:
        partial: the working folder; it need not exist.
        plan: what will be built.
        restart: remove finished shards, too.
        is_alone: whether the caller holds the lock of the build.

    Raises:
        UsageError: the folder is not that of an unfinished cache.
        StaleError: it holds finished shards of another plan; says what differs.
    """
    if not partial.exists():
        return
    remove_leftovers(partial, is_alone=is_alone)
    if not any(partial.iterdir()):
        return
    if not (partial / PLAN).is_file():
        raise UsageError(
            f"{partial} exists and is not an unfinished cache; nothing is overwritten.",
            "The cache is built there first: move that folder away or choose another name.",
        )
    if restart:
        shutil.rmtree(partial)
        return
    require_plan(partial, plan)
    if _read(partial / PLAN, partial) != plan:
        shutil.rmtree(partial)


def require_plan(partial: Path, plan: dict) -> None:
    """Check that finished shards in a working folder are those of a plan.

    Raises:
        StaleError: they are of another one; says what differs.
    """
    there = _read(partial / PLAN, partial)
    finished = len(list(partial.glob("shard-*.h5")))
    if there != plan and finished:
        raise StaleError(
            f"{partial} holds {finished} finished shard{'s' if finished > 1 else ''} of another"
            f" build: {'; '.join(_differences(there, plan))}.",
            _start_over(partial),
        )


def write_record(partial: Path, plan: dict, name: str, record: dict) -> dict:
    """Record a finished shard; `finished_records` reads it."""
    record = {"plan": files.fingerprint(plan), **record}
    files.write_json((partial / name).with_suffix(".json"), record)
    return record


def finished_records(
    partial: Path,
    plan: dict,
    shards: list[PlannedShard],
    settings: Settings,
    is_final: bool = False,
) -> dict[str, dict]:
    """Return the records of the shards that an earlier build finished.

    A shard that was lost is built again. So is one with rejects that depend on the machine, such
    as NO_DECODER. Other rejects are remembered: a file that crashed its decoder is not tried again.

    Args:
        partial: the working folder.
        plan: what is built.
        shards: of the plan, those that are asked for.
        settings: of the build.
        is_final: take all rejects as they are: nothing will be built again.

    Raises:
        StaleError: a shard or a record is not the one that was written; names it.
    """
    found = {}
    for shard in shards:
        path = partial / shard.name
        record_path = path.with_suffix(".json")
        if not record_path.is_file():
            continue
        record = _read(record_path, partial)
        if record.get("plan") != files.fingerprint(plan):
            raise StaleError(f"{record_path} belongs to another build.", _start_over(partial))
        if not is_final and any(code in NEVER_KEPT for _, code, *_ in record["rejected"]):
            continue
        if record["num_slices"]:
            if not path.is_file():
                continue
            entry = entry_of(shard.name, record, 0)
            try:
                Shard(path, entry, settings.size, settings.compression).check()
            except StaleError as error:
                hint = f"To build this shard alone again, remove it. {_start_over(partial)}"
                raise StaleError(error.message, hint) from error
        found[shard.name] = record
    return found


def entry_of(name: str, record: dict, first_slice: int) -> ShardEntry:
    """Return what the manifest will say of a finished shard."""
    fields = ("num_slices", "dataset_offset", "checksums")
    return ShardEntry(name, record["num_bytes"], first_slice, *(record[field] for field in fields))


def require_same_pixels(
    index: "SeriesIndex",
    shards: list[PlannedShard],
    records: dict[str, dict],
    settings: Settings,
    workers: Workers,
    progress: Progress | None,
) -> None:
    """Look again at the slices of finished shards whose files have another time, and a few others.

    A reject is tried again only when its file has another time: it may crash or hang its decoder.

    Raises:
        StaleError: some have other pixels now, or can or cannot be read only now.
    """
    times = index.slices["file_mtime_ns"].tolist()
    rows: list[int] = []
    hashes: dict[int, str] = {}
    for shard in shards:
        if shard.name in records:
            record, own = records[shard.name], range(shard.start, shard.stop)
            hashes |= zip(own, record["hashes"], strict=True)
            rows += [
                row for row, time in zip(own, record["times"], strict=True) if times[row] != time
            ]
    known = [row for row, pixel_hash in hashes.items() if pixel_hash]
    rows = sorted({*rows, *(known[number] for number in a_few(len(known)))})
    sources = indexed_slices(index)
    now = hashes_now([sources[row] for row in rows], settings.size, workers, progress)
    differ = [
        sources[row].path for row, found in zip(rows, now, strict=True) if found != hashes[row]
    ]
    if differ:
        raise StaleError(
            f"{len(differ)} of {len(rows)} slices of finished shards that were read again differ:"
            f" in their pixels, or in whether they can be read; the first is {differ[0]}.",
            "Start over: ich cache --restart, or build_cache(..., restart=True).",
        )


def clean(partial: Path, kept: str = "shard-*.h5") -> None:
    """Remove the unfinished shards of this build; the whole folder when nothing `kept` is there."""
    for leftover in partial.glob(f"{TEMPORARY}*"):
        leftover.unlink()
    if not any(partial.glob(kept)):
        shutil.rmtree(partial)


def _read(path: Path, partial: Path) -> dict:
    try:
        content = files.read_json(path)
    except StaleError as error:
        raise StaleError(error.message, _start_over(partial)) from error
    if not isinstance(content, dict):
        raise StaleError(f"{path} is damaged.", _start_over(partial))
    return content


def _start_over(partial: Path) -> str:
    return (
        "To go on, build with the data and settings it began with. To start over: ich cache"
        f" --restart, or build_cache(..., restart=True), or remove {partial}."
    )


def _differences(there: dict, here: dict) -> list[str]:
    found = []
    flat_there, flat_here = (
        {key: value for key, value in plan.items() if key not in (*_OF_SLICES, "versions")}
        | {f"{name}'s version": version for name, version in plan.get("versions", {}).items()}
        for plan in (there, here)
    )
    for key in flat_here | flat_there:
        if flat_there.get(key) != flat_here.get(key):
            found.append(f"{key} {flat_there.get(key)}, not {flat_here.get(key)}")
    found += [said for key, said in _OF_SLICES.items() if there.get(key) != here[key]][:1]
    return found
