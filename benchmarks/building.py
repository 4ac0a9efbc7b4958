"""Wall time from DICOM files to an index and a cache, beside pydicom and a process pool."""

import contextlib
import importlib.util
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import h5py
import numpy as np
import pydicom
from pydicom.pixels import apply_modality_lut

from benchmarks.harness import alternate
from benchmarks.records import Place, table, write_csv
from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.data.cache.cache import build_cache
from ich_keras.phantom.dicom import write_phantoms
from ich_keras.processes import process_pool
from ich_keras.progress import Tell

SIZE = 256  # of a cached slice, pixels
BY_PYDICOM = "pydicom and a process pool"
_CHUNK = 8  # files that one task of the pool reads
_HAS_BLOSC2 = importlib.util.find_spec("hdf5plugin") is not None


@dataclass(frozen=True)
class Row:
    """The time of one way to build something.

    Args:
        what: "index" or "cache".
        way: how it was built.
        workers: processes that read.
        slices: number of slices.
        matrix: rows and columns of a file.
        us_median, us_q25, us_q75: microseconds of wall time per slice over the repeats.
        slices_per_s: by the median.
        speed_ratio: against pydicom and a process pool with as many workers; None for an index.
    """

    what: str
    way: str
    workers: int
    slices: int
    matrix: int
    us_median: float
    us_q25: float
    us_q75: float
    slices_per_s: float
    speed_ratio: float | None


def measure(
    num_series: int,
    matrix: int,
    workers: int,
    repeats: int,
    path: Path,
    place: Place,
    tell: Tell,
) -> None:
    """Time index and cache of drawn data sets, and of one ten times as large.

    Args:
        num_series: how many series to draw.
        matrix: rows and columns of their files.
        workers: processes that read, where it is more than one.
        repeats: timed runs of each; one for the large data set.
        path: of the CSV.
        place: where this runs.
        tell: called with the table.
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one = _draw(folder / "one", num_series, matrix, workers)
        packed = folder / "one.zip"
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for file in sorted(one.rglob("*.dcm")):
                archive.write(file, file.relative_to(one))
        for count in sorted({1, workers}):
            with _cluster(count) as executor:
                rows += _rows(one, packed, folder, matrix, count, executor, repeats)
            write_csv(path, rows, place)
        ten = _draw(folder / "ten", 10 * num_series, matrix, workers)
        rows += _rows(ten, None, folder, matrix, workers, None, 1, " of ten times as many slices")
        write_csv(path, rows, place)
    shown = ("what", "way", "workers", "us_median", "slices_per_s", "speed_ratio")
    cells = [
        (
            row.what,
            row.way,
            str(row.workers),
            f"{row.us_median:.0f}",
            f"{row.slices_per_s:.0f}",
            "" if row.speed_ratio is None else f"{row.speed_ratio:.2f}",
        )
        for row in rows
    ]
    tell(table(shown, cells))


def _draw(folder: Path, num_series: int, matrix: int, workers: int) -> Path:
    return write_phantoms(folder, num_series, seed=1, matrix=matrix, workers=workers)


@contextlib.contextmanager
def _cluster(workers: int) -> Iterator[Executor | None]:
    """Yield the executor of a Dask cluster on this machine, if Dask is installed."""
    if importlib.util.find_spec("distributed") is None:
        yield None
        return
    from distributed import Client, LocalCluster

    with (
        LocalCluster(workers, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client.get_executor()


def _rows(
    folder: Path,
    packed: Path | None,
    work: Path,
    matrix: int,
    workers: int,
    executor: Executor | None,
    repeats: int,
    suffix: str = "",
) -> list[Row]:
    """Time every way to build index and cache; `packed` is the same folder in a zip."""
    index = index_folder(folder)
    paths = index.slices["container"].tolist()
    # One worker is the process itself, here and for pydicom.
    processes = workers if workers > 1 else 0

    def cache(source: SeriesIndex, **options: object) -> None:
        out = work / "cache"
        build_cache(source, out, SIZE, **{"workers": processes, **options})
        shutil.rmtree(out)

    indexing: dict[str, Callable[[], object]] = {
        "folder": partial(index_folder, folder, processes),
    }
    caching: dict[str, Callable[[], object]] = {
        BY_PYDICOM: partial(_by_pydicom, paths, work / "pydicom.h5", processes),
        "folder": partial(cache, index),
        "folder, gzip": partial(cache, index, compression="gzip"),
    }
    if _HAS_BLOSC2:
        caching["folder, blosc2"] = partial(cache, index, compression="blosc2")
    if packed is not None:
        indexing["zip"] = partial(index_folder, packed, processes)
        caching["zip"] = partial(cache, index_folder(packed))
    if executor is not None:
        indexing["folder, dask"] = partial(index_folder, folder, executor=executor)
        caching["folder, dask"] = partial(cache, index, executor=executor)
    found = []
    for what, ways in (("index", indexing), ("cache", caching)):
        timings = alternate(ways, repeats, steps=len(paths))
        for way, timing in timings.items():
            ratio = timings[BY_PYDICOM].median / timing.median if what == "cache" else None
            found.append(
                Row(
                    what,
                    way + suffix,
                    workers,
                    len(paths),
                    matrix,
                    timing.median * 1e3,
                    timing.q25 * 1e3,
                    timing.q75 * 1e3,
                    1e3 / timing.median,
                    ratio,
                )
            )
    return found


def _by_pydicom(paths: list[str], out: Path, workers: int) -> None:
    """Do what most scripts do: read in a pool, hand the arrays back, write them to HDF5.

    The pool starts as ours does, as a child of a process that has imported everything.
    """
    pool: ProcessPoolExecutor | None = (
        process_pool(workers, cv2.setNumThreads, 1) if workers else None
    )
    read = partial(pool.map, chunksize=_CHUNK) if pool is not None else map
    try:
        with h5py.File(out, "w") as file:
            hu = file.create_dataset("hu", (len(paths), SIZE, SIZE), np.int16)
            for row, pixels in enumerate(read(read_resized, paths)):
                hu[row] = pixels
    finally:
        if pool is not None:
            pool.shutdown()
    out.unlink()


def read_resized(path: str, size: int = SIZE) -> np.ndarray:
    """Read a slice with pydicom and resize it; returns int16 (size, size), HU."""
    dataset = pydicom.dcmread(path)
    hu = apply_modality_lut(dataset.pixel_array, dataset).astype(np.int16)
    return cv2.resize(hu, (size, size), interpolation=cv2.INTER_AREA)
