"""Reading the series of a prediction, in this process or ahead of the network in others."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import cv2
import numpy as np

from ich_keras.ct.plausibility import Content, content_of_reject, implausible_rows
from ich_keras.ct.rejects import Reject, RejectedFile
from ich_keras.data.reading import IndexedSlice, read_indexed
from ich_keras.data.skull import SeriesFlags, SkullProfile, flags_of
from ich_keras.errors import EnvironmentProblem
from ich_keras.processes import map_ahead, process_pool

AHEAD_BYTES = 2**30  # most memory for series read ahead of the network


@contextlib.contextmanager
def series_reading(
    size: int, num_series: int, longest: int, workers: int
) -> Iterator[Callable[[Iterable[list[IndexedSlice]]], Iterator]]:
    """Yield a function that reads series, each given as a list of slices; see `read_series`."""
    one = partial(read_series, size)
    ahead = min(2 * workers, num_series, AHEAD_BYTES // max(1, longest * size * size * 2))
    if ahead <= 1:
        yield partial(map, one)
        return
    # One OpenCV thread per process: the processes already use the cores.
    pool = process_pool(min(workers, ahead), cv2.setNumThreads, 1)
    try:
        yield lambda series: map_ahead(pool, one, series, ahead)
    except BrokenProcessPool as error:
        raise EnvironmentProblem(
            "a process that was reading slices has died (killed, or out of memory).",
            "Run again with fewer workers. A script that uses workers needs an"
            " `if __name__ == '__main__':` guard.",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def read_series(
    size: int, slices: list[IndexedSlice]
) -> tuple[np.ndarray, list[str], list[Reject], SeriesFlags]:
    """Read the files of one series, without those whose values cannot be HU.

    Returns:
        (HU, int16 (n, size, size); the hashes of all slices' pixels, "" for those without HU; the
        rejects; what the pixels show of the head).
    """
    hu, rejects = [], []
    skulls: list[SkullProfile | None] = [None] * len(slices)
    contents: list[Content | None] = []
    hashes = [""] * len(slices)
    for number, indexed in enumerate(slices):
        try:
            read = read_indexed(indexed, size, with_skull=True)
        except RejectedFile as reject:
            rejects.append(Reject.of(indexed.path, reject))
            contents.append(content_of_reject(reject))
        else:
            hu.append(read.hu)
            contents.append(read.content)
            hashes[number] = read.pixel_hash
            skulls[number] = read.skull
    implausible = implausible_rows([""] * len(slices), contents)
    rows = [row for row, pixels in enumerate(hashes) if pixels]
    hu = [one for row, one in zip(rows, hu, strict=True) if row not in implausible]
    for row in sorted(implausible.keys() & set(rows)):
        rejects.append(Reject(slices[row].path, *implausible[row]))
        hashes[row] = ""
        skulls[row] = None
    flags = flags_of(skulls, [indexed.position_mm for indexed in slices])
    return np.stack(hu) if hu else np.zeros((0, size, size), np.int16), hashes, rejects, flags
