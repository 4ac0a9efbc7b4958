"""Whether a cache still holds what its DICOM files hold: what is compared, and what is read again.

Reading a whole data set again would take as long as caching it. Read again are the slices whose
files have another time than when they were cached, and a few others: archives give all their files
the same time, and libraries change.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from ich_keras import files
from ich_keras.ct.plausibility import Content, content_of_reject, implausible_rows
from ich_keras.ct.rejects import RejectedFile
from ich_keras.data.cache.fill import a_few, hashes_now, pixel_versions
from ich_keras.data.cache.plan import inputs_fingerprint
from ich_keras.data.cache.shards import CachedSlices
from ich_keras.data.cache.tables import PIXEL_HASH, UID
from ich_keras.data.inputs import RESAMPLING
from ich_keras.data.reading import IndexedSlice, indexed_slices, pixel_hash, read_indexed
from ich_keras.errors import StaleError
from ich_keras.progress import Progress

if TYPE_CHECKING:
    from ich_keras.ct.series import SeriesIndex

# The files' times and the cache that were compared: the next look at the same files is short.
SEEN = "seen.json"
_TIME = "file_mtime_ns"


def differing_settings(manifest: dict, size: int | None, index: "SeriesIndex | None") -> list[str]:
    """Compare what a cache was built with to what is wanted; one text per field that differs."""
    wanted = {"resampling": RESAMPLING, "size": manifest["size"] if size is None else size}
    if index is not None:
        wanted["inputs"] = inputs_fingerprint(index)
    return [
        f"{field} is {manifest[field]} in the cache, {value} wanted"
        for field, value in wanted.items()
        if manifest[field] != value
    ]


def differing_data(
    path: Path,
    manifest: dict,
    slices: pd.DataFrame,
    pixels: CachedSlices,
    index: "SeriesIndex",
    workers: int,
    progress: Progress | None,
) -> list[str]:
    """Compare a cache to the files of an index of the same slices.

    Args:
        path: of the cache.
        manifest, slices, pixels: of the cache.
        index: usable slices.
        workers: processes that read; 0 reads in this one.
        progress: called as progress("comparing", slices done, slices to read again).

    Returns:
        One text per difference; empty when there is none.
    """
    found = _differing_patients(slices, index)
    if found:
        return found
    sources = {source.sop_instance_uid: source for source in indexed_slices(index)}
    held = [sources[uid] for uid in slices[UID]]

    def differing(rows: list[int]) -> list[str]:
        """Return the files of those of the rows that have other pixels now."""
        now = hashes_now([held[row] for row in rows], pixels.size, workers, progress)
        return [
            held[row].path
            for row, hashed in zip(rows, now, strict=True)
            if hashed != _hash_of(row, slices, pixels)
        ]

    found = _differences_of_a_few(manifest["versions"], len(held), differing)
    found += _readable_now(sources, index, set(slices[UID]), pixels.size)
    if found:
        return found
    times = dict(zip(index.slices[UID], index.slices[_TIME].tolist(), strict=True))
    now = [times[uid] for uid in slices[UID]]
    seen = {"times": files.fingerprint(now), "cache": files.fingerprint(manifest)}
    changed = [row for row, time in enumerate(slices[_TIME].tolist()) if time != now[row]]
    if not changed or _is_seen(path, seen):
        return []
    others = differing(changed)
    if others:
        return [
            f"{len(others)} of {len(changed)} files that were written since hold other pixels;"
            f" the first is {others[0]}"
        ]
    with contextlib.suppress(OSError):  # a cache may lie on a read-only disk
        files.write_json(path / SEEN, seen)
    return []


def _is_seen(path: Path, seen: dict) -> bool:
    try:
        return files.read_json(path / SEEN) == seen
    except (StaleError, OSError):
        return False


def _hash_of(row: int, slices: pd.DataFrame, pixels: CachedSlices) -> str:
    if PIXEL_HASH in slices:
        return slices[PIXEL_HASH].iloc[row]
    return pixel_hash(pixels.slices_hu([row])[0])  # a cache of schema 1


def _differing_patients(slices: pd.DataFrame, index: "SeriesIndex") -> list[str]:
    """Compare the patient of each slice: splits follow the cache's patients."""
    wanted = index.slices.set_index(UID)["patient_id"].reindex(slices[UID])
    count = int((wanted.to_numpy() != slices["patient_id"].to_numpy()).sum())
    return [f"{count} slices have another PatientID in the cache"] if count else []


def _differences_of_a_few(
    cached: dict, count: int, differing: Callable[[list[int]], list[str]]
) -> list[str]:
    """Read a few slices again; if they differ, say so, and which libraries changed."""
    rows = a_few(count)
    others = differing(rows)
    if not others:
        return []
    changed = [
        f"{name} is {cached.get(name)} in the cache, {version} now"
        for name, version in pixel_versions().items()
        if cached.get(name) != version
    ]
    return [
        *changed,
        f"{len(others)} of {len(rows)} slices read again differ; the first is {others[0]}",
    ]


def _readable_now(
    sources: dict[str, IndexedSlice], index: "SeriesIndex", held: set[str], size: int
) -> list[str]:
    """Try again some slices that the cache lists as rejects."""
    lost = [uid for uid in sources if uid not in held]
    chosen = [lost[number] for number in a_few(len(lost))]
    hashes = hashes_now([sources[uid] for uid in chosen], size)
    readable = [uid for uid, hashed in zip(chosen, hashes, strict=True) if hashed]
    # Some can be read, and are refused with the rest of their series.
    series = index.slices.set_index(UID)["series_uid"]
    refused = {
        uid
        for name in set(series[readable])
        for uid in _refused([sources[uid] for uid in series.index[series == name]], size)
    }
    count = sum(uid not in refused for uid in readable)
    if not count:
        return []
    return [
        f"{count} of {len(chosen)} slices tried again, of {len(lost)} that could not be read,"
        " can be read now"
    ]


def _refused(sources: list[IndexedSlice], size: int) -> list[str]:
    """Return the slices of a series that are refused for what the series shows."""
    contents: list[Content | None] = []
    for source in sources:
        try:
            contents.append(read_indexed(source, size).content)
        except RejectedFile as reject:
            contents.append(content_of_reject(reject))
    rows = implausible_rows([""] * len(contents), contents)
    return [sources[row].sop_instance_uid for row in rows]
