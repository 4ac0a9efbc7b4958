"""Thin series: neighbouring slices are averaged to the slice distance of a training.

A network that was trained on slices 5 mm apart sees in a series of 1 mm slices more noise, sharper
edges, and slabs of 5 mm in place of 25. Scanners make thick slices of thin ones by averaging, and
so does this module, in Hounsfield units, before anything else is done to them.

- **Thin** is a series whose slices are at most half as far apart as those of the training: half the
  lower quartile over its training series. So nothing is averaged where a quarter of the training
  was as thin. All else is left as it is, bit for bit.
- **The grid.** An averaged slice is as thick as the training's slices are apart (the median over
  its series), and so far from the next. The grid lies in the middle of the series. What is left
  over at the ends, or lacks there, makes the first and the last up to a quarter thicker or thinner;
  a series that is shorter than 1.5 of them makes one. No slice is left out.
- **Weights.** A slice stands for the space that is nearer to it than to its neighbours, and counts
  in an averaged slice by the millimetres that it has in there. For five slices of 1 mm in 5 mm that
  is their mean. Positions decide, not numbers of slices: where distances vary, so do the weights.
- **Gaps.** Nothing is averaged across a hole wider than 1.5 times the usual distance: the series is
  averaged in parts, as if each were one. A part of thick slices stays as it is.
- **Answers.** The network sees each averaged slice once, so its answers are smoothed, aggregated
  and compared with thresholds as on validation, and n slices cost fewer passes than before. A
  sliding mean around each slice would cost n, and rules such as the mean of the top three or
  noisy-or would count the same tissue several times. A slice has the answer of the averaged one
  that its centre lies in.
- **Left alone** are series with two slices at one place (verdict "duplicate"), which may be two
  scans. In a tilted series slices are averaged pixel by pixel along the table: at 20 degrees the
  ends of 5 mm are shifted by 0.9 mm each.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd

from ich_keras.ct.geometry import SAME_POSITION_MM, neighbour_distances_mm
from ich_keras.ct.verdict import DUPLICATE, SPACING_TOLERANCE, has_word
from ich_keras.errors import UsageError

AVERAGE, KEEP = THIN = ("average", "keep")
_AT_MOST = 0.5  # of the training's distance
HOLE = 1.5  # times the usual distance of a series
# Lengths are counted in these, as whole numbers: means are then the same on every machine.
_PER_MM = 10_000
_LOWER, _USUAL = "lower_quartile", "median"


@dataclass(frozen=True)
class SliceDistances:
    """How far apart the slices of a training's series lie, mm.

    Args:
        lower_mm: lower quartile over its training series.
        usual_mm: median over them.
    """

    lower_mm: float
    usual_mm: float

    @classmethod
    def of(cls, spacings_mm: Any) -> Self | None:
        """Find them from the slice spacing of each training series; None where none has one.

        Args:
            spacings_mm: float (series,), NaN for those of one slice.

        >>> SliceDistances.of([5.0, 5.0, 2.5, 5.0, float("nan")])
        SliceDistances(lower_mm=4.375, usual_mm=5.0)
        """
        found = np.abs(np.asarray(spacings_mm, np.float64))
        found = found[np.isfinite(found) & (found > SAME_POSITION_MM)]
        if not len(found):
            return None
        lower, usual = np.quantile(found, [0.25, 0.5]).round(4).tolist()
        return cls(lower, usual)

    @classmethod
    def from_record(cls, content: object) -> Self | None:
        """Read what `record` returned; None where it does not say.

        Raises:
            ValueError: it is something else.
        """
        if content is None:
            return None
        if not isinstance(content, dict) or set(content) != {_LOWER, _USUAL}:
            raise ValueError(f"{content!r} does not hold {_LOWER} and {_USUAL}")
        lower, usual = content[_LOWER], content[_USUAL]
        for value in (lower, usual):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{value!r} is not a number")
        if not 0 < lower <= usual < math.inf:
            raise ValueError(f"{lower:g} and {usual:g} are not a quartile and a median in mm")
        return cls(float(lower), float(usual))

    def record(self) -> dict[str, float]:
        """Return them for JSON."""
        return {_LOWER: self.lower_mm, _USUAL: self.usual_mm}


@dataclass(frozen=True, eq=False)
class Blocks:
    """The averaged slices of one series: which slices each is made of.

    Args:
        owner: int64 (slices,), the averaged slice that each slice lies in, ascending from 0.
        centres_mm: float64 (averaged slices,), their positions along the normal.
        rows: of each averaged slice, the slices that count in it; they follow each other.
        weights: of each averaged slice, float64 (len(rows),), whole numbers.
    """

    owner: np.ndarray
    centres_mm: np.ndarray
    rows: tuple[range, ...]
    weights: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.centres_mm)

    def averaged(self, hu: np.ndarray) -> np.ndarray:
        """Average slices.

        Args:
            hu: int16 (slices, rows, columns), HU.

        Returns:
            int16 (averaged slices, rows, columns), HU, rounded to the nearest, halves to even.
        """
        return np.stack([self.one(number, hu[rows]) for number, rows in enumerate(self._slices())])

    def one(self, number: int, hu: np.ndarray) -> np.ndarray:
        """Return one averaged slice, int16 (rows, columns).

        Args:
            number: which.
            hu: int16 (n, rows, columns), the slices `rows[number]`.
        """
        return weighted_mean(hu, self.weights[number])

    def _slices(self) -> list[slice]:
        return [slice(rows.start, rows.stop) for rows in self.rows]

    def middle_rows(self) -> np.ndarray:
        """Return the slice in the middle of each averaged one, int64 (averaged slices,)."""
        starts = np.searchsorted(self.owner, np.arange(len(self)))
        stops = np.searchsorted(self.owner, np.arange(len(self)), side="right")
        return (starts + stops - 1) // 2

    def table(self, slices: pd.DataFrame) -> pd.DataFrame:
        """Return the rows of a series' slice table for its averaged slices.

        Each is the row of the slice in the middle, at the position of the averaged one.
        """
        return slices.iloc[self.middle_rows()].assign(position_mm=self.centres_mm)


def weighted_mean(hu: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean of slices, int16 (rows, columns), rounded to the nearest, halves to even.

    Args:
        hu: int16 (n, rows, columns), HU.
        weights: float64 (n,), whole numbers.

    >>> weighted_mean(np.array([[[10]], [[20]], [[31]]], np.int16), np.array([1.0, 1.0, 2.0]))
    array([[23]], dtype=int16)
    """
    if len(hu) == 1:
        return hu[0]
    # Sums of whole numbers are exact, whatever their order.
    total = np.zeros(hu.shape[1:], np.float64)
    for one, weight in zip(hu, weights, strict=True):
        total += weight * one
    return np.rint(total / weights.sum()).astype(hu.dtype)


def blocks_of(positions_mm: Any, verdict: str, distances: SliceDistances | None) -> Blocks | None:
    """Say how a series is averaged; None where it is left as it is.

    Args:
        positions_mm: float (slices,), along the normal, ascending.
        verdict: of the series.
        distances: of the training; None where nothing says what they were.

    >>> found = blocks_of(np.arange(10) * 1.0, "ok", SliceDistances(5.0, 5.0))
    >>> found.centres_mm.tolist(), found.rows
    ([2.0, 7.0], (range(0, 5), range(5, 10)))
    >>> found = blocks_of(np.arange(5) * 2.0, "ok", SliceDistances(5.0, 5.0))
    >>> [weights.tolist() for weights in found.weights]  # 2, 2 and 1 mm; then 1, 2 and 2
    [[20000.0, 20000.0, 10000.0], [10000.0, 20000.0, 20000.0]]
    """
    if not is_thin(positions_mm, verdict, distances):
        return None
    assert distances is not None
    positions = np.asarray(positions_mm, np.float64)
    usual = float(np.median(neighbour_distances_mm(positions)))
    holes = np.flatnonzero(np.diff(positions) > HOLE * usual) + 1
    owner = np.empty(len(positions), np.int64)
    centres: list[float] = []
    rows: list[range] = []
    weights: list[np.ndarray] = []
    for part in np.split(np.arange(len(positions)), holes):
        edges, found = _grid(positions[part], usual, distances.usual_mm)
        # A centre on an edge belongs to the lower one.
        owner[part] = len(centres) + np.searchsorted(edges[1:-1], positions[part])
        for low, high in itertools.pairwise(edges):
            first, shares = _shares(positions[part], usual, low, high)
            rows.append(range(part[0] + first, part[0] + first + len(shares)))
            weights.append(shares)
        centres += found
    return Blocks(owner, np.array(centres), tuple(rows), tuple(weights))


def is_thin(positions_mm: Any, verdict: str, distances: SliceDistances | None) -> bool:
    """Return whether a series is thinner than those of a training; see `blocks_of`."""
    positions = np.asarray(positions_mm, np.float64)
    if distances is None or has_word(verdict, DUPLICATE) or not np.isfinite(positions).all():
        return False
    found = neighbour_distances_mm(positions)
    # 2.5 mm to a hundredth is half of 5 mm.
    most = _AT_MOST * distances.lower_mm * (1 + SPACING_TOLERANCE)
    return bool(len(found) and np.median(found) <= most)


def _grid(positions: np.ndarray, usual: float, thickness: float) -> tuple[np.ndarray, list[float]]:
    """Return the edges of a part's averaged slices, mm, ascending, and their positions."""
    cells = _cells(positions, usual)
    low, high = cells[0], cells[-1]
    count = max(1, round((high - low) / thickness))
    places = np.arange(count + 1) - count / 2
    edges = (low + high) / 2 + places * thickness
    centres = (edges[:-1] + edges[1:]) / 2
    edges[0], edges[-1] = low, high
    return edges, centres.tolist()


def _cells(positions: np.ndarray, usual: float) -> np.ndarray:
    """Return where the space of each slice begins, and where that of the last ends, mm."""
    distances = np.diff(positions)
    between = positions[:-1] + distances / 2
    first, last = (distances[0], distances[-1]) if len(distances) else (usual, usual)
    return np.concatenate([[positions[0] - first / 2], between, [positions[-1] + last / 2]])


def _shares(positions: np.ndarray, usual: float, low: float, high: float) -> tuple[int, np.ndarray]:
    """Return how much of each slice's space lies between two edges.

    Returns:
        (number of the first slice that has some, float64 (n,), whole numbers).
    """
    cells = np.clip(_cells(positions, usual), low, high)
    # Tenths of a micrometre: what distances of 0.625 mm are cut to still is a whole number.
    shares = np.rint(np.diff(cells) * _PER_MM)
    # Positions are rounded: a slice does not reach into the next but one by that.
    shares[shares < SAME_POSITION_MM * _PER_MM] = 0
    there = np.flatnonzero(shares)
    return int(there[0]), shares[there[0] : there[-1] + 1]


@dataclass(frozen=True)
class ThinRule:
    """What is done with thin series.

    Args:
        distances: of the training; None where nothing says what they were.
        choice: "average" or "keep".

    Raises:
        UsageError: an unknown word.
    """

    distances: SliceDistances | None = None
    choice: str = AVERAGE

    def __post_init__(self) -> None:
        if self.choice not in THIN:
            raise UsageError(f"thin {self.choice!r}; expected one of {', '.join(THIN)}.")

    @property
    def target_mm(self) -> float | None:
        """How far apart averaged slices lie; None where nothing is averaged."""
        if self.choice == KEEP or self.distances is None:
            return None
        return self.distances.usual_mm

    def blocks(self, positions_mm: Any, verdict: str) -> Blocks | None:
        """Say how a series is averaged; None where it is left as it is; see `blocks_of`."""
        return None if self.choice == KEEP else blocks_of(positions_mm, verdict, self.distances)

    def settings(self) -> dict[str, str | None]:
        """Return what predictions depend on, for a journal."""
        name = "averaging_thin_series"
        if self.target_mm is None or self.distances is None:
            return {name: None}
        return {name: f"({_AT_MOST * self.distances.lower_mm:.4g} to {self.target_mm:.4g} mm)"}

    def sentence(self, is_thin_series: Any, whose: str = "the training") -> str:
        """Say, for every reader of the answers, what was done with thin series; "" if nothing.

        Args:
            is_thin_series: bool (series,), which are.
            whose: slice distance it is.
        """
        if self.distances is None:
            if self.choice == KEEP:
                return ""
            return (
                "Thin series were not averaged: the run does not say how far apart the slices of"
                " its training were."
            )
        number, total = int(np.sum(is_thin_series)), len(is_thin_series)
        if not number:
            return ""
        usual = f"{self.distances.usual_mm:g} mm"
        if self.choice == KEEP:
            return (
                f"Thin series: the slices of {number:,} of {total:,} series are at most half as far"
                f" apart as those of {whose} ({usual}). They were predicted as they are (thin:"
                " keep)."
            )
        return (
            f"Thin series: {number:,} of {total:,} series were averaged to slices {usual} apart, as"
            f" those of {whose} (columns num_averaged, averaged_mm). Each slice has the answer of"
            " the averaged one that it lies in."
        )


AS_THEY_ARE = ThinRule(choice=KEEP)
