"""What of a series is predicted, and in which batches."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ich_keras.ct.series import SeriesIndex
from ich_keras.ct.tables import shown_paths
from ich_keras.ct.verdict import TILTED as TILTED_WORD
from ich_keras.data.inputs import slice_input, stack_channels, volume_input
from ich_keras.data.sources import Sources
from ich_keras.data.thin_series import AS_THEY_ARE, ThinRule
from ich_keras.data.views import Samples, View, make_samples
from ich_keras.prediction_journal import SeriesResult
from ich_keras.recipe import InputRecipe

# Why a view skips a series, by the word of its verdict: the reject code, and what is told.
SKIPPED = {
    "tilted": ("TILTED", "is tilted"),
    "duplicate": ("DUPLICATE", "has two slices at one place"),
}


def series_groups(samples: Sequence[int], batch_size: int) -> list[range]:
    """Divide series into groups, each of as many as it takes to fill a batch.

    What a network computes for a sample depends, in the last digits, on the size of its batch. So
    no batch goes from one group into the next: wherever a prediction is interrupted, it resumes
    with the batches it would have had. One group per series would do, but would let a network on
    whole series, or a folder of short ones, never have a full batch.

    Args:
        samples: of each series, as the index has them, whatever can be read.
        batch_size: samples per step.

    Returns:
        The numbers of the series in each group; only the last may have less than a batch.

    >>> series_groups([40, 3, 5, 20, 1], batch_size=8)
    [range(0, 1), range(1, 3), range(3, 4), range(4, 5)]
    """
    groups, start, count = [], 0, 0
    for number, more in enumerate(samples, 1):
        count += more
        if count >= batch_size or number == len(samples):
            groups.append(range(start, number))
            start, count = number, 0
    return groups


def sample_counts(index: SeriesIndex, view: View, thin: ThinRule = AS_THEY_ARE) -> list[int]:
    """Return how many samples each series of an index has, if all of it can be read."""
    if view.kind == "series":
        return [1] * len(index.series)
    by_series = index.slices.groupby("series_uid", sort=False)["position_mm"]
    positions = {uid: part.to_numpy() for uid, part in by_series}
    found = []
    for uid, verdict in zip(index.series["series_uid"], index.series["verdict"], strict=True):
        blocks = thin.blocks(positions[uid], verdict)
        found.append(len(positions[uid] if blocks is None else blocks))
    return found


@dataclass(frozen=True, eq=False)
class SeriesReading:
    """One series that was read.

    Args:
        hu: int16 (slices, size, size), what could be read; of a thin series, averaged.
        samples: of these slices.
        usable: int (n,), the samples to predict.
        positions_mm: float64 (n,), where their slices lie along the normal; () of whole series.
        result: as yet without probabilities.
    """

    hu: Any
    samples: Any
    usable: np.ndarray
    positions_mm: np.ndarray
    result: SeriesResult


def judged(
    series: Any,
    table: pd.DataFrame,
    content: tuple,
    inputs: InputRecipe,
    thin: ThinRule = AS_THEY_ARE,
) -> SeriesReading:
    """Say which samples of a series can be predicted.

    Args:
        series: its row in the index.
        table: its slices in the index.
        content: its files, as they were read: (HU, int16 (n, size, size); the hashes of all slices'
            pixels, "" for those without HU; the rejects; the flags).
        inputs: of the run.
        thin: what is done with a thin series.
    """
    view = inputs.view
    hu, hashes, bad, flags = content
    place = {path: row for row, path in enumerate(shown_paths(table))}
    rejects = [(place[path], code, detail, hint) for path, code, detail, hint, _ in bad]
    found = [row for row, is_read in enumerate(hashes) if is_read]
    samples, usable, positions = None, np.zeros(0, np.int64), np.zeros(0)
    if found:
        seen = table.iloc[found]
        blocks = thin.blocks(seen["position_mm"], series.verdict)
        if blocks is not None:
            seen, hu = blocks.table(seen), blocks.averaged(hu)
        alone = pd.DataFrame([series]).assign(num_slices=len(seen))
        samples = inputs.adapted(make_samples(seen, alone, view), seen, alone, hu)
        usable = np.flatnonzero(samples.usable)
        if view.kind != "series":
            positions = seen["position_mm"].to_numpy(np.float64)[usable]
        if not len(usable):
            code, what = SKIPPED[view.why_skipped(series.verdict)]
            # The remaining files are rejects already.
            rejects += [(row, code, f"series {series.series_uid} {what}", "") for row in found]
    times = tuple(table["file_mtime_ns"].tolist())
    nothing = np.zeros((0, 0), np.float32)
    result = SeriesResult(
        series.series_uid, times, tuple(hashes), tuple(rejects), nothing, flags=flags
    )
    return SeriesReading(hu, samples, usable, positions, result)


def places_of(readings: Sequence[SeriesReading]) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of the series, and the position in mm, of each slice to predict."""
    numbers = np.repeat(np.arange(len(readings)), [len(one.usable) for one in readings])
    return numbers, np.concatenate([one.positions_mm for one in readings])


def series_samples(
    view: View,
    shape: tuple[int, ...],
    spacing_mm: Sequence[float],
    shear: tuple[float, float] = (0.0, 0.0),
    inputs: InputRecipe | None = None,
    hu: np.ndarray | None = None,
) -> Samples:
    """Return the samples of one series whose slices are all there, evenly spaced.

    Args:
        view: what a sample is.
        shape: (slices, rows, columns).
        spacing_mm: between slices, rows and columns.
        shear: of a tilted series, `shear_row` and `shear_column` of the index.
        inputs, hu: of the run, and int16 (slices, size, size), its pixels as they are cached: for a
            run that crops or resamples.

    >>> series_samples(View("slab", 3), (2, 8, 8), (5, 1, 1)).rows.tolist()
    [[-1, 0, 1], [0, 1, -1]]
    """
    length, rows, columns = shape
    slices = pd.DataFrame(
        {"series_uid": ["series"] * length, "position_mm": np.arange(length) * spacing_mm[0]}
    )
    series = pd.DataFrame(
        {
            "num_slices": [length],
            "verdict": [TILTED_WORD if any(shear) else ""],
            "rows": rows,
            "columns": columns,
            "row_spacing_mm": spacing_mm[1],
            "column_spacing_mm": spacing_mm[2],
            "shear_row": shear[0],
            "shear_column": shear[1],
        }
    )
    samples = make_samples(slices, series, view)
    if inputs is None or hu is None:
        return samples
    return inputs.adapted(samples, slices, series, hu)


def inputs_of(
    hu: np.ndarray, samples: Samples, chosen: np.ndarray, inputs: InputRecipe
) -> np.ndarray:
    """Make the network's input of some samples of a series, float32."""
    stacks = Sources.of(samples, chosen).stacked(hu, np.arange(len(hu)))
    if not samples.view.has_slices:
        return slice_input(stacks[:, 0], inputs.size, inputs.intensity)
    volumes = volume_input(stacks, inputs.size, inputs.intensity)
    return stack_channels(volumes) if samples.view.is_stack else volumes


def full_batches(parts: Iterable[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """Join parts of at most `batch_size` samples into full batches; the last may be smaller."""
    waiting: list[np.ndarray] = []
    for part in parts:
        waiting.append(part)
        if sum(map(len, waiting)) >= batch_size:
            joined = np.concatenate(waiting)
            yield joined[:batch_size]
            waiting = [joined[batch_size:]] if len(joined) > batch_size else []
    if waiting:
        yield np.concatenate(waiting)
