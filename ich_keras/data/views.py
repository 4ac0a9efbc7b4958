"""What one sample of a network is: a slice, neighbouring slices, or a whole series.

A view only says which slices make a sample; the pixels stay in the one cache. Neighbours always
come from the whole series, in its order, never from the rows of a split or of a label file.

Worker processes import this module: it must not import keras.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ich_keras.ct.verdict import DUPLICATE as DUPLICATE_WORD
from ich_keras.ct.verdict import TILTED as TILTED_WORD
from ich_keras.ct.verdict import has_word
from ich_keras.data.labels import has_labels, is_labelled, series_labels, torn_series
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.labels import RSNA_LABELLING, SIX, Labelling, LabelSet

VIEWS = ("slice", "stack", "slab", "series")
SAMPLE_NAMES = {"slice": "slices", "stack": "stacks", "slab": "slabs", "series": "series"}
EDGES = ("air", "repeat")
LONG_SERIES = ("spread", "middle")
TILTED = ("keep", "skip", "deshear")
# Neighbours of two scans or two kernels make no volume, whatever a network was trained on.
DUPLICATE = ("skip", "keep")
AIR = -1  # in place of the number of a slice
SHEAR_COLUMNS = ("shear_row", "shear_column")


@dataclass(frozen=True)
class View:
    """Which slices make one sample.

    Args:
        kind: "slice"; "slab": neighbouring slices with the label of the middle one; "stack": the
            same slices as channels of an image, for a 2D network (`inputs.stack_channels` has their
            order); "series": the whole volume, positive where any of its slices is.
        num_slices: of a sample: 1 for a slice, odd for a stack or slab, any number for a series.
        edge: what a stack or slab has beyond the ends of its series: "air" (after windowing: a
            window's lowest value) or "repeat" (the last slice again). Both ends alike.
        long_series: how a series with more slices is cut: "spread" (evenly spaced slices, the
            first and the last among them) or "middle". Shorter ones get air, half on either side.
        tilted: series with the verdict "tilted", but for single slices: "keep", "skip", or
            "deshear", which moves each slice within its plane until the volume is upright.
        duplicate: series with the verdict "duplicate", but for single slices: "skip" or "keep".

    Raises:
        UsageError: an unknown word, a number of slices that does not fit, or a setting that has no
            meaning for this view.

    >>> View("slab", 3).positions(length=2).tolist()  # -1 is air
    [[-1, 0, 1], [0, 1, -1]]
    >>> View("slab", 3, edge="repeat").positions(length=2).tolist()
    [[0, 0, 1], [0, 1, 1]]
    >>> View("series", 4).positions(length=7).tolist()
    [[0, 2, 4, 6]]
    """

    kind: str = "slice"
    num_slices: int = 1
    edge: str = "air"
    long_series: str = "spread"
    tilted: str = "keep"
    duplicate: str = "skip"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("view", self.kind, VIEWS),
            ("edge", self.edge, EDGES),
            ("long_series", self.long_series, LONG_SERIES),
            ("tilted", self.tilted, TILTED),
            ("duplicate", self.duplicate, DUPLICATE),
        ):
            if value not in known:
                raise UsageError(f"{name} {value!r}; expected one of {', '.join(known)}.")
        count = self.num_slices
        if type(count) is not int or count < 1:
            raise UsageError(f"{count!r} slices per sample; expected a whole number of at least 1.")
        if self.kind == "slice" and count != 1:
            raise UsageError(f"view 'slice' with {count} slices; that is a stack, slab or series.")
        for name, value, usual, needs in (
            ("edge", self.edge, EDGES[0], ("stack", "slab")),
            ("long_series", self.long_series, LONG_SERIES[0], ("series",)),
            ("tilted", self.tilted, TILTED[0], VIEWS[1:]),
            ("duplicate", self.duplicate, DUPLICATE[0], VIEWS[1:]),
        ):
            if value != usual and self.kind not in needs:
                raise UsageError(
                    f"{name} {value!r} means nothing for view {self.kind!r}; it is for"
                    f" {' and '.join(needs)}.",
                    "Leave it out.",
                )
        if self.has_middle and count % 2 == 0:
            raise UsageError(
                f"a {self.kind} of {count} slices has no middle; expected an odd number."
            )

    @property
    def is_volume(self) -> bool:
        """Whether a sample has an axis of slices, for a 3D network."""
        return self.kind in ("slab", "series")

    @property
    def has_slices(self) -> bool:
        """Whether a sample is made of several slices, whatever axis they lie on."""
        return self.kind != "slice"

    @property
    def has_middle(self) -> bool:
        """Whether a sample is made of the neighbours of a slice, whose label it has."""
        return self.kind in ("stack", "slab")

    @property
    def is_stack(self) -> bool:
        """Whether the slices of a sample are channels of an image."""
        return self.kind == "stack"

    def why_skipped(self, verdict: str) -> str:
        """Return the word of a series' verdict for which this view skips it; "" if it does not.

        >>> View("series", 60).why_skipped("duplicate,tilted"), View().why_skipped("duplicate")
        ('duplicate', '')
        """
        if not self.has_slices:
            return ""
        skipped = {DUPLICATE_WORD: self.duplicate, TILTED_WORD: self.tilted}
        words = (w for w, choice in skipped.items() if choice == "skip" and has_word(verdict, w))
        return next(words, "")

    def positions(self, length: int) -> np.ndarray:
        """Say which slices of one series make its samples.

        Args:
            length: slices of the series, at least 1.

        Returns:
            int64 (samples, num_slices), positions in the series, inferior to superior, `AIR` where
            there is none. A whole series is one sample; other views have `length` samples.
        """
        if self.kind == "series":
            return self._whole(length)[np.newaxis]
        reach = self.num_slices // 2
        found = np.arange(length)[:, np.newaxis] + np.arange(-reach, reach + 1)
        if self.edge == "repeat":
            return found.clip(0, length - 1)
        return np.where((found >= 0) & (found < length), found, AIR)

    def _whole(self, length: int) -> np.ndarray:
        count = self.num_slices
        if length > count:
            if self.long_series == "middle":
                return np.arange(count) + (length - count) // 2
            if count == 1:
                return np.array([(length - 1) // 2])
            return np.rint(np.linspace(0, length - 1, count)).astype(np.int64)
        found = np.full(count, AIR, np.int64)
        start = (count - length) // 2
        found[start : start + length] = np.arange(length)
        return found


def with_absent_choices(view: dict) -> dict:
    """Add to a recorded view what could not be chosen when it was recorded, as it was then."""
    return {"duplicate": "skip" if view.get("kind") == "slice" else "keep"} | view


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of a data set in one view.

    Args:
        view: what a sample is.
        rows: int64 (samples, slices), rows of the slice table, `AIR` for air. Sample i of series
            is row i of the series table; of all other views it has row i of the slice table in its
            middle.
        shifts: float64 (samples, slices, 2), how far each slice has to move, in units of a
            slice's side, along columns of pixels (down) and along rows of pixels (right); None
            where nothing moves.
        labels: int8 (samples, labels), -1 without label; None where the table has none.
        usable: bool (samples,), False for what the view skips.
        label_set: what the columns of `labels` mean.
        others, shares: int64 and float32 (samples, slices), a second row in each place and its
            share of the HU, where series are resampled along z; None where they are not.
        boxes: int64 (samples, 3), top, left and side of the square that is cut out of each slice,
            in pixels of the cache; a side of 0 cuts nothing. None where no head is cut out.
    """

    view: View
    rows: np.ndarray
    shifts: np.ndarray | None
    labels: np.ndarray | None
    usable: np.ndarray
    label_set: LabelSet = SIX
    others: np.ndarray | None = None
    shares: np.ndarray | None = None
    boxes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def of_rows(self, slices: pd.DataFrame, rows: np.ndarray, part: str = "chosen") -> np.ndarray:
        """Return the samples that belong to some slices of the table.

        Args:
            slices: the table that the samples were made of.
            rows: int (n,), rows of it: those of a split.
            part: how an error message calls them.

        Returns:
            int64, ascending for series, in the order of `rows` otherwise; without unusable ones.

        Raises:
            DataError: only some of the labelled slices of a series are among them, or no sample
                is usable.
        """
        rows = np.asarray(rows, np.int64)
        found = self._whole_series(slices, rows) if self.view.kind == "series" else rows
        kept = found[self.usable[found]]
        if len(found) and not len(kept):
            raise DataError(
                f"all {len(found):,} {part} samples are of series that are skipped: tilted ones, or"
                " with two slices at one place.",
                'Take tilted "keep" or "deshear", duplicate "keep", another seed, or more data.',
            )
        return kept

    def usable_rows(self, slices: pd.DataFrame, rows: np.ndarray) -> np.ndarray:
        """Leave out the slices of skipped samples.

        Args:
            slices: the table that the samples were made of.
            rows: int (n,), rows of it.
        """
        if self.view.kind != "series":
            return rows[self.usable[rows]]
        numbers, _ = pd.factorize(slices["series_uid"])
        return rows[self.usable[numbers[rows]]]

    def _whole_series(self, slices: pd.DataFrame, rows: np.ndarray) -> np.ndarray:
        touched, is_torn = series_of_rows(slices, rows, self.label_set)
        torn = touched[is_torn]
        if len(torn):
            uid = slices["series_uid"].drop_duplicates().iloc[torn[0]]
            raise DataError(
                f"the split tears {len(torn):,} series apart; the first is {uid}. Some of its"
                " slices are in one part, some in another, but a series is one sample.",
                'Take a split by patient or by series ("thesis-series").',
            )
        return touched


def series_of_rows(
    slices: pd.DataFrame, rows: np.ndarray, labels: LabelSet = SIX
) -> tuple[np.ndarray, np.ndarray]:
    """Return the series that some slices belong to, and which of those are only partly covered.

    Args:
        slices: the table, series after series.
        rows: int (n,), rows of it.
        labels: its label columns, if it has any.

    Returns:
        (int64 (m,), numbers of series in the order of the table; bool (m,), whether a labelled
        slice of it is not among the rows).
    """
    numbers, uids = pd.factorize(slices["series_uid"])
    inside = np.zeros(len(slices), bool)
    inside[rows] = True
    outside = np.zeros(len(slices), bool)
    if has_labels(slices, labels):
        outside = is_labelled(slices, labels) & ~inside
    touched = np.flatnonzero(np.bincount(numbers, inside, len(uids)))
    return touched, np.bincount(numbers, outside, len(uids))[touched] > 0


def make_samples(
    slices: pd.DataFrame, series: pd.DataFrame, view: View, labelling: Labelling | None = None
) -> Samples:
    """Find the samples of a view in the tables of an index or a cache.

    Args:
        slices: one row per slice, series after series, each inferior to superior.
        series: one row per series, in the same order.
        view: what a sample is.
        labelling: the label columns; None takes RSNA's, where the tables have them.

    Raises:
        DataError: the labels are of something else than the view's samples, and do not say what
            these show.
        StaleError: `deshear` needs the shear of each series, which older tables lack.

    >>> slices = pd.DataFrame({"series_uid": ["a", "a", "b"]})
    >>> series = pd.DataFrame({"num_slices": [2, 1], "verdict": ["ok", "tilted"]})
    >>> make_samples(slices, series, View("slab", 3)).rows.tolist()  # never across series
    [[-1, 0, 1], [0, 1, -1], [-1, 2, -1]]
    >>> make_samples(slices, series, View("series", 2, tilted="skip")).usable.tolist()
    [True, False]
    """
    lengths = series["num_slices"].to_numpy()
    starts = np.cumsum(lengths) - lengths
    parts = [view.positions(length) for length in lengths.tolist()]
    rows_of_series = [
        np.where(part == AIR, AIR, part + start) for part, start in zip(parts, starts, strict=True)
    ]
    no_rows = np.zeros((0, view.num_slices), np.int64)
    rows = np.concatenate(rows_of_series) if rows_of_series else no_rows
    labelling = labelling or RSNA_LABELLING
    labels = _labels(slices, view, labelling)
    tilted = series["verdict"].map(lambda verdict: has_word(verdict, TILTED_WORD))
    tilted = tilted.to_numpy(bool)
    is_used = series["verdict"].map(view.why_skipped).to_numpy() == ""
    usable = is_used if view.kind == "series" else np.repeat(is_used, lengths)
    shifts = None
    if view.has_slices and view.tilted == "deshear" and tilted.any():
        shifts = _shifts(slices, series, rows, np.repeat(tilted, lengths))
    return Samples(view, rows, shifts, labels, usable, labelling.labels)


def _labels(slices: pd.DataFrame, view: View, labelling: Labelling) -> np.ndarray | None:
    """Return the label of each sample, int8 (samples, labels); None where there are none."""
    labels, level = labelling.labels, labelling.level
    if not has_labels(slices, labels):
        return None
    if view.kind != "series":
        if level != "slice":
            raise DataError(
                f"the labels are of a {level} as a whole: they do not say which of its slices"
                f" shows what, which a network for a {view.kind} learns from.",
                "Train on whole series (--preset resnet18_3d), or give labels of slices.",
            )
        return slices[list(labels.names)].to_numpy(np.int8)
    if labels.exclusive and level == "slice":
        torn = torn_series(slices, labels)
        if torn:
            raise DataError(
                f"exclusive labels differ between the slices of series {torn[0]}: they do not say"
                " what the whole series is.",
                "Give labels of series.",
            )
    return series_labels(slices, labels).to_numpy(np.int8)


def _shifts(
    slices: pd.DataFrame, series: pd.DataFrame, rows: np.ndarray, tilted: np.ndarray
) -> np.ndarray:
    """Return how far the slices of each sample move to stand upright over its middle."""
    absent = [name for name in SHEAR_COLUMNS if name not in series]
    if absent:
        raise StaleError(
            f"the table of series lacks {' and '.join(absent)}, which `deshear` needs.",
            "Make index and cache again.",
        )
    lengths = series["num_slices"].to_numpy()
    # A slice that is not square is padded to one before it is resized.
    side = series[["rows", "columns"]].max(axis=1).to_numpy(float)[:, np.newaxis]
    side_mm = side * series[["row_spacing_mm", "column_spacing_mm"]].to_numpy(float)
    # The first pixel of a slice lies `shear * distance` beyond that of an upright stack: seen from
    # there, what the slice shows has to move as far.
    shear = np.repeat(series[["shear_column", "shear_row"]].to_numpy(float) / side_mm, lengths, 0)
    along = np.where(tilted, slices["position_mm"].to_numpy(float), 0.0)
    places = along[:, np.newaxis] * shear
    is_air = rows == AIR
    found = places[rows]
    # Around the middle of the slices that exist, so that the head stays in the picture.
    count = np.maximum((~is_air).sum(axis=1), 1)[:, np.newaxis, np.newaxis]
    middle = np.where(is_air[..., np.newaxis], 0.0, found).sum(axis=1, keepdims=True) / count
    return np.where(is_air[..., np.newaxis], 0.0, found - middle)
