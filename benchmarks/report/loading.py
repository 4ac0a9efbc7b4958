"""What one process of the report does with files: the stages of the loader, and whether it keeps
up with the network."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import torch
from pydicom.pixels import apply_modality_lut

from benchmarks import harness
from benchmarks.cases import TRAIN, Case
from benchmarks.records import cell
from benchmarks.report.jobs import (
    BY_PYDICOM,
    BY_READ_HU,
    FROM_CACHE,
    FROM_DICOM,
    ONE_WINDOW,
    READ_CACHE,
    READY,
    THREE_WINDOWS,
    Job,
    batches_with,
    raw_batches_with,
)
from benchmarks.report.networks import MAIN, network, num_slices, view_of
from benchmarks.report.tasks import Conditions, Found, builders, times
from benchmarks.variants import KerasVariant
from ich_keras.ct.dicom import read_hu
from ich_keras.ct.window import WINDOWS
from ich_keras.data.augment import AUGMENTATIONS
from ich_keras.data.batches import CTDataset, is_drawn, view_batches
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.cache.tables import UID
from ich_keras.data.epochs import EpochPlan, epoch_plan
from ich_keras.data.inputs import resize_hu, slice_windows
from ich_keras.data.intensity import INTENSITIES
from ich_keras.data.loader import CTLoader
from ich_keras.data.views import View, make_samples
from ich_keras.errors import EnvironmentProblem
from ich_keras.phantom.dicom import write_phantoms
from ich_keras.processes import usable_cores
from ich_keras.workflow import make_cache, prepare_index

_MATRIX, _SIZE = 512, 256
# Such series have about 60 slices; with fewer, reading a series would mean filling it with air.
_SPACING_MM, _TINY_SPACING_MM = (1.4, 1.4), (5.0, 8.0)
_MOST_WORKERS = 8
_REPEATS = 5
_BATCH_SLICES = 32
_FEED_STEPS = 4  # per worker, so that the first batches do not hide the speed of the others


def _sizes(conditions: Conditions) -> tuple[int, int]:
    return (64, 64) if conditions.is_tiny else (_MATRIX, _SIZE)


def _phantoms(folder: Path, count: int, conditions: Conditions) -> tuple[CTCache, list[str]]:
    """Draw series, index and cache them; return the cache and the file of each of its slices."""
    matrix, size = _sizes(conditions)
    workers = 0 if conditions.is_tiny else min(usable_cores(), _MOST_WORKERS)
    spacing = _TINY_SPACING_MM if conditions.is_tiny else _SPACING_MM
    data = write_phantoms(
        folder / "data", count, 1, matrix=matrix, workers=workers, slice_spacing_mm=spacing
    )
    index = prepare_index(data / "images", data / "stage_2_train.csv")
    make_cache(index, folder / "cache", size)
    cache = CTCache.open(folder / "cache")
    return cache, index.slices.set_index(UID)["container"].loc[cache.slices[UID]].tolist()


def _view(name: str, case: Case) -> View:
    kind = view_of(name)
    return View() if kind == "slice" else View(kind, num_slices(case))


def loader(job: Job, conditions: Conditions) -> Iterator[Found]:
    """Time the stages from a file to a batch, on one core and, on a GPU, on the device."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        cache, paths = _phantoms(Path(name), 1, conditions)
        count = len(cache)
        repeats = 1 if conditions.is_tiny else _REPEATS
        stages = _stages(cache, paths, conditions) | _on_the_device(cache, conditions)
        yield from _rows(job, "", stages, count, repeats, conditions.device)
        for view in MAIN:
            case = network(view, is_tiny=conditions.is_tiny)
            passes, slices = _passes(cache, view, case, conditions)
            yield from _rows(job, view, passes, slices, repeats, conditions.device)


def workers(job: Job, conditions: Conditions) -> Iterator[Found]:
    """Time the whole loader with a worker process for each core, and one process beside them."""
    torch.set_num_threads(1)  # each of the worker processes has one, too
    count = min(usable_cores(), _MOST_WORKERS)
    repeats = 1 if conditions.is_tiny else _REPEATS
    with tempfile.TemporaryDirectory() as name:
        cache, _ = _phantoms(Path(name), 1, conditions)
        for kind in MAIN:
            case = network(kind, is_tiny=conditions.is_tiny)
            view, per_sample = _view(kind, case), num_slices(case)
            samples = make_samples(cache.slices, cache.series, view)
            batch = max(1, _BATCH_SLICES // per_sample)
            # The same samples again and again, so that the first batches do not count.
            indices = np.resize(
                np.flatnonzero(samples.usable), batch * count * (2 if conditions.is_tiny else 10)
            )
            make = partial(view_batches, cache, view, indices, batch, seed=0, samples=samples)
            for augment in (None, *AUGMENTATIONS):
                # They take turns, so that their ratio does not depend on the day.
                passes = {
                    str(number): partial(_exhaust, make(augment=augment, workers=number))
                    for number in (0, count)
                }
                slices = len(indices) * per_sample
                timings = harness.alternate(passes, repeats, steps=slices)
                for number, timing in timings.items():
                    row = _row(job, kind, batches_with(augment), timing, slices, repeats)
                    what = {} if int(number) else {"what": "load, one process"}
                    yield row | what | {"workers": int(number)}


def _rows(
    job: Job,
    view: str,
    stages: dict[str, Callable[[], Any]],
    slices: int,
    repeats: int,
    device: str,
) -> Iterator[Found]:
    stopwatch = harness.stopwatch_of(device)
    timings = harness.alternate(stages, repeats, steps=slices, stopwatch=stopwatch)
    for name, timing in timings.items():
        yield _row(job, view, name, timing, slices, repeats)


def _row(
    job: Job, view: str, case: str, timing: harness.Timing, slices: int, repeats: int
) -> Found:
    return {
        "section": job.task,
        "view": view,
        "case": case,
        "what": "load",
        **times(timing, slices, repeats),
        "slices_per_s": 1e3 / timing.median,
    }


def _each(function: Callable[[Any], Any], items: list) -> Callable[[], None]:
    def run() -> None:
        for item in items:
            function(item)

    return run


def _by_pydicom(path: str) -> np.ndarray:
    dataset = pydicom.dcmread(path)
    return apply_modality_lut(dataset.pixel_array, dataset).astype(np.int16)


def _stages(
    cache: CTCache, paths: list[str], conditions: Conditions
) -> dict[str, Callable[[], Any]]:
    """Return the stages on one core: name -> function over all slices."""
    raw = [read_hu(path) for path in paths]
    numbers = np.random.default_rng(0).permutation(len(cache))
    hu = cache.slices_hu(np.arange(len(cache)))
    windows, wide = INTENSITIES["windows"], INTENSITIES["wide"]
    images = slice_windows(hu, None, windows.windows)
    _, size = _sizes(conditions)
    return {
        BY_PYDICOM: _each(_by_pydicom, paths),
        BY_READ_HU: _each(read_hu, paths),
        "resize": _each(partial(resize_hu, size=size), raw),
        READ_CACHE: lambda: cache.slices_hu(numbers),
        THREE_WINDOWS: lambda: slice_windows(hu, None, windows.windows),
        ONE_WINDOW: lambda: slice_windows(hu, None, wide.windows),
        "normalise": lambda: windows.normalise(images, False),
    }


def _on_the_device(cache: CTCache, conditions: Conditions) -> dict[str, Callable[[], Any]]:
    """Return what a GPU can do of it; nothing on a CPU."""
    if conditions.device == "cpu":
        return {}
    hu = torch.from_numpy(cache.slices_hu(np.arange(len(cache)))).pin_memory()
    images = torch.empty((*hu.shape, len(WINDOWS)), dtype=torch.float32).pin_memory()
    there = hu.cuda()
    return {
        "copy int16 to the device": lambda: hu.to("cuda", non_blocking=True),
        "copy float32 windows to the device": lambda: images.to("cuda", non_blocking=True),
        "three windows on the device": lambda: torch.stack(
            [window(there) for window in WINDOWS], dim=-1
        ),
    }


def _passes(
    cache: CTCache, name: str, case: Case, conditions: Conditions
) -> tuple[dict[str, Callable[[], Any]], int]:
    """Return passes over the whole loader, by augmentation, and the slices of one pass."""
    view = _view(name, case)
    samples = make_samples(cache.slices, cache.series, view)
    indices = np.flatnonzero(samples.usable)
    if name == "slab":  # a fifth of them: each has five slices
        indices = indices[:: num_slices(case)]
    batch = max(1, _BATCH_SLICES // num_slices(case))
    passes: dict[str, Callable[[], Any]] = {}
    for augment in (None, *AUGMENTATIONS):
        make = partial(
            view_batches, cache, view, indices, batch, seed=0, augment=augment, samples=samples
        )
        passes[batches_with(augment)] = partial(_exhaust, make())
        if not is_drawn(augment):
            continue
        raw = CTDataset(cache.pixels, samples, cache.size, augment, 0, is_raw=True)
        plan = epoch_plan(samples, indices, batch, seed=0)
        passes[raw_batches_with(augment)] = partial(_make_all, raw, plan)
        if conditions.device != "cpu":
            on_device = make(device=conditions.device)
            passes[f"{batches_with(augment)}, on the device"] = partial(_exhaust, on_device)
    return passes, len(indices) * num_slices(case)


def _make_all(dataset: CTDataset, plan: EpochPlan) -> None:
    """Make the batches of an epoch as a device receives them, without sending them."""
    for indices in plan.batches(0):
        dataset[0, indices]


def _exhaust(loader: CTLoader) -> None:
    for _ in loader:
        pass


class DicomSlices:
    """Slices read from their files whenever they are asked for, like `CachedSlices`."""

    def __init__(self, paths: list[str], size: int) -> None:
        self._paths, self.size = paths, size

    def slices_hu(self, indices: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Return int16 (n, size, size), HU; in `out` where it is given."""
        if out is None:
            out = np.empty((len(indices), self.size, self.size), np.int16)
        for place, number in enumerate(indices):
            out[place] = resize_hu(read_hu(self._paths[number]), self.size)
        return out


def feed(job: Job, conditions: Conditions) -> Iterator[Found]:
    """Train from ready tensors, from the cache and from DICOM files, in turns.

    The loader has no augmentation: `loader` tells what that adds. On a GPU it has worker
    processes; on a CPU the network needs the cores.
    """
    case = conditions.case(job)
    (build,) = builders(job, conditions, case).values()
    workers = min(usable_cores() - 1, _MOST_WORKERS) if conditions.device == "cuda" else 0
    with tempfile.TemporaryDirectory() as folder:
        cache, paths = _phantoms(Path(folder), conditions.patients, conditions)
        variant = build()
        if not isinstance(variant, KerasVariant):
            raise TypeError(f"{job.name}: expected a Keras model")
        number = 1 if conditions.is_tiny else max(2, _FEED_STEPS * workers)
        loaders = _loaders(cache, paths, job.network, case, number, workers)
        try:
            for batches in loaders.values():
                _exhaust(batches)
        except EnvironmentProblem:
            # Too little shared memory, as in many containers.
            workers, number = 0, _FEED_STEPS
            loaders = _loaders(cache, paths, job.network, case, number, workers)
        runs: dict[str, Callable[[], Any]] = {READY: partial(variant.train, number)}
        for source, batches in loaders.items():
            runs[source] = partial(variant.model.fit, batches, epochs=1, shuffle=False, verbose=0)
        repeats = 1 if conditions.is_tiny else 3
        timings = harness.alternate(
            runs, repeats, steps=number, stopwatch=harness.stopwatch_of(conditions.device)
        )
    for source, timing in timings.items():
        samples = case.batch / timing.median * 1e3
        yield {
            "section": job.task,
            "view": view_of(job.network),
            "case": source,
            "variant": job.variants[0],
            "precision": job.precision,
            "what": TRAIN,
            "input_shape": cell(case.shape),
            "batch": case.batch,
            "workers": 0 if source == READY else workers,
            **times(timing, number, repeats),
            "samples_per_s": samples,
            "slices_per_s": samples * num_slices(case),
        }


def _loaders(
    cache: CTCache, paths: list[str], name: str, case: Case, number: int, workers: int
) -> dict[str, CTLoader]:
    """Return loaders of `number` batches each; a small data set is gone through several times."""
    view = _view(name, case)
    samples = make_samples(cache.slices, cache.series, view)
    usable = np.flatnonzero(samples.usable)
    indices = np.resize(usable, number * case.batch)
    from_files = DicomSlices(paths, cache.size)
    intensity = "wide" if view.is_volume else "windows"
    plan = epoch_plan(samples, indices, case.batch)
    # It only asks for `slices_hu`.
    dataset = CTDataset(from_files, samples, cache.size, intensity=intensity)  # type: ignore[arg-type]
    cached = view_batches(
        cache, view, indices, case.batch, workers=workers, samples=samples, intensity=intensity
    )
    return {FROM_CACHE: cached, FROM_DICOM: CTLoader(dataset, plan, workers)}
