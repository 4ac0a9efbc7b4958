"""What enters a network, as pictures: windows before and after augmentation, slabs, whole volumes.

The pixels go the way of a training: the same windows, the same draws of the same augmentation.
Normalisation, which only shifts and scales, is left out, so that a grey value is a window's value.
Pictures carry numbers of series and slices, and no identifier.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from ich_keras.ct.window import BRAIN, SOFT_TISSUE, SUBDURAL, WIDE, Window
from ich_keras.data.augment import Augment
from ich_keras.data.batches import CTDataset
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.inputs import stack_slices_of
from ich_keras.data.intensity import Intensity, Normalisation, intensity_of
from ich_keras.data.views import Samples, View
from ich_keras.errors import UsageError
from ich_keras.labels import LabelSet
from ich_keras.pages.pictures import Word, grey, png
from ich_keras.phantom.dicom import is_synthetic

TILE = 144  # pixels of a slice
MOST_SAMPLES = 50
_GAP, _HEADER, _SIDE = 4, 44, 172
_MOST_SLICES = 8  # of a sample, side by side
_MOST_TILES = 400  # of a volume
_STRIP = 32  # below each of them, for its number and labels
_NAMES = {BRAIN: "brain", SUBDURAL: "subdural", SOFT_TISSUE: "soft tissue", WIDE: "wide"}
_POSITIVE, _PLAIN, _FAINT = "#ffb35c", "white", "#a0a8af"


@dataclass(frozen=True)
class Shown:
    """Which samples to show, and how they enter a network.

    Args:
        view: what a sample is.
        size: rows and columns of the input; None takes the cache's.
        intensity: a key of `INTENSITIES`, or an `Intensity`; None as in `view_batches`.
        augment: as in `view_batches`; None shows no augmentation.
        count: how many samples.
        epoch: of the training whose augmentation is shown, from 0.
        seed: chooses the samples, and is that of the training.

    Raises:
        UsageError: a number is out of range.
    """

    view: View = dataclasses.field(default_factory=View)
    size: int | None = None
    intensity: str | Intensity | None = None
    augment: Augment | None = "fast"
    count: int = 6
    epoch: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("count", self.count, 1, MOST_SAMPLES),
            ("epoch", self.epoch, 0, 2**32 - 1),
            ("seed", self.seed, 0, 2**32 - 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise UsageError(f"{name} is {value!r}; expected {low} to {high}.")


@dataclass(frozen=True, eq=False)
class ShownInputs:
    """What `inputs_of` returns.

    Args:
        numbers: int (n,), the samples.
        before, after: float32 (n, slices, rows, columns, windows), 0 to 1; `after` is None without
            augmentation.
        windows: of the last axis.
    """

    numbers: np.ndarray
    before: np.ndarray
    after: np.ndarray | None
    windows: tuple[Window, ...]


def inputs_of(cache: CTCache, shown: Shown) -> ShownInputs:
    """Make the inputs of some samples, before and after augmentation, without normalisation.

    Half of the samples are positive, as far as there are any, and series are not repeated while
    there are others.

    Raises:
        UsageError: the size is larger than the cache's.
        DataError: the labels do not fit the view.
    """
    samples = cache.samples(shown.view)
    size = shown.size or cache.size
    if not 8 <= size <= cache.size:
        raise UsageError(f"size is {size}; expected 8 to {cache.size}, the size of the cache.")
    kind = intensity_of(shown.intensity or ("wide" if shown.view.is_volume else "windows"))
    nothing = Normalisation("none", (0.0,) * kind.channels, (1.0,) * kind.channels)
    plain = Intensity("windows alone", kind.windows, nothing, kind.keeps_hu)
    numbers = _chosen(cache, samples, shown)

    def made(augment: Augment | None) -> np.ndarray:
        dataset = CTDataset(cache.pixels, samples, size, augment, shown.seed, plain)
        parts = []
        for number in numbers:
            inputs = dataset[shown.epoch, np.array([number])][0]
            # A copy: the memory of a batch is used again.
            one = np.array(inputs)
            one = stack_slices_of(one, samples.view.num_slices) if samples.view.is_stack else one
            parts.append(one.reshape(-1, size, size, kind.channels))
        return np.stack(parts)

    after = None if shown.augment is None else made(shown.augment)
    return ShownInputs(numbers, made(None), after, kind.windows)


def _chosen(cache: CTCache, samples: Samples, shown: Shown) -> np.ndarray:
    """Draw samples: positive and other ones in turn, and a new series each time while it lasts."""
    usable = np.flatnonzero(samples.usable)
    if not len(usable):
        raise UsageError("the view skips every series of this cache.", "Choose another --view.")
    order = np.random.default_rng([shown.seed, 2**63]).permutation(usable)
    series = _series_of(cache, samples)[order]
    # How often its series came before; the sort keeps the drawn order.
    _, first = np.unique(series, return_inverse=True)
    before = np.zeros(len(order), int)
    seen = np.zeros(first.max() + 1, int)
    for place, number in enumerate(first.tolist()):
        before[place], seen[number] = seen[number], seen[number] + 1
    order = order[np.argsort(before, kind="stable")]
    if samples.labels is None:
        return order[: shown.count]
    column = samples.label_set.index(samples.label_set.shown)
    is_positive = samples.labels[order, column] == 1
    positive, others = order[is_positive], order[~is_positive]
    half = max(shown.count - len(others), min(len(positive), (shown.count + 1) // 2))
    return np.concatenate([positive[:half], others[: shown.count - half]])[: shown.count]


def _series_of(cache: CTCache, samples: Samples) -> np.ndarray:
    """Return the place of each sample's series in the table of series."""
    if samples.view.kind == "series":
        return np.arange(len(samples))
    return np.repeat(np.arange(len(cache.series)), cache.series["num_slices"].to_numpy())


def inputs_picture(cache: CTCache, shown: Shown) -> bytes:
    """Draw what `inputs_of` returns as PNG: a row for each sample, or two for volumes.

    Raises:
        UsageError, DataError: as `inputs_of`.
    """
    found = inputs_of(cache, shown)
    samples = cache.samples(shown.view)
    series = _series_of(cache, samples)
    rows: list[tuple[str, bool, list[np.ndarray]]] = []
    for place, number in enumerate(found.numbers.tolist()):
        text, is_positive = _said(cache, samples, series, number)
        parts = [found.before[place]] + ([] if found.after is None else [found.after[place]])
        if shown.view.has_slices:
            for part, when in zip(parts, ("before", "after"), strict=False):
                tiles = [part[one, ..., 0] for one in _kept(shown.view, len(part))]
                said = "after augmentation"
                if when == "before":
                    said = text if found.after is None else f"{text}\nbefore augmentation"
                rows.append((said, is_positive and when == "before", tiles))
        else:
            tiles = [part[0, ..., channel] for part in parts for channel in range(part.shape[-1])]
            rows.append((text, is_positive, tiles))
    return _sheet(cache, rows, _columns(shown, found))


def _kept(view: View, count: int) -> list[int]:
    """Return which slices of a volume are drawn: of a stack or slab always its middle one."""
    most = _MOST_SLICES - 1 if view.has_middle and count > _MOST_SLICES else _MOST_SLICES
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def _columns(shown: Shown, found: ShownInputs) -> list[str]:
    """Return the headings of the columns."""
    names = [f"{_NAMES.get(w, 'window')} {w.level:g}/{w.width:g}" for w in found.windows]
    if not shown.view.has_slices:
        whens = ["before"] if found.after is None else ["before", "augmented"]
        return [f"{name}\n{when}" for when in whens for name in names]
    count = found.before.shape[1]
    if shown.view.has_middle:
        middle = count // 2
        places = [one - middle for one in _kept(shown.view, count)]
        found_names = [
            f"{abs(place)} {'below' if place < 0 else 'above'}" if place else "labelled slice"
            for place in places
        ]
        return [f"{name}\n{names[0]} HU" for name in found_names]
    shown_count = min(count, _MOST_SLICES)
    which = f"{shown_count} of {count} slices" if shown_count < count else f"{count} slices"
    return [f"{which}, inferior to superior\n{names[0]} HU"]


def _said(cache: CTCache, samples: Samples, series: np.ndarray, number: int) -> tuple[str, bool]:
    """Return the text beside a sample, and whether it is positive."""
    place = int(series[number])
    lines = [f"series {place + 1}"]
    length = int(cache.series["num_slices"].iloc[place])
    if samples.view.kind == "series":
        lines.append(f"{length} slices")
    else:
        lines.append(f"slice {cache.slices['slice_index'].iloc[number] + 1} of {length}")
    if samples.labels is None:
        return "\n".join(lines), False
    names, is_positive = label_names(samples.label_set, samples.labels[number])
    return "\n".join([*lines, *names[:5]]), is_positive


def label_names(labels: LabelSet, truth: np.ndarray) -> tuple[list[str], bool]:
    """Return what is written of the labels of a sample, and whether any is positive.

    >>> from ich_keras.labels import SIX
    >>> label_names(SIX, np.array([1, 0, 0, 0, 0, 1])), label_names(SIX, np.zeros(6))
    ((['epidural'], True), (['no label is positive'], False))
    """
    positive = [
        name for name, value in zip(labels.names, truth.tolist(), strict=True) if value == 1
    ]
    parts = [name for name in positive if name != labels.any_label]
    if positive:
        return parts or positive, True
    if (truth < 0).all():
        return ["without label"], False
    return ["no label is positive"], False


def _sheet(
    cache: CTCache, rows: list[tuple[str, bool, list[np.ndarray]]], columns: list[str]
) -> bytes:
    most = max(len(tiles) for _, _, tiles in rows)
    step = TILE + _GAP
    image = np.zeros((_HEADER + len(rows) * step, _SIDE + most * step), np.uint8)
    words = [
        Word(
            text,
            _SIDE + place * step + (0 if len(columns) == 1 else TILE / 2),
            6,
            12,
            _FAINT,
            len(columns) > 1,
        )
        for place, text in enumerate(columns)
    ]
    words.append(
        Word(_source(cache), 8, 6, 12, _POSITIVE if is_synthetic(cache.slices) else _FAINT)
    )
    for number, (text, is_positive, tiles) in enumerate(rows):
        top = _HEADER + number * step
        words.append(Word(text, 8, top + 4, colour=_POSITIVE if is_positive else _PLAIN))
        for place, tile in enumerate(tiles):
            left = _SIDE + place * step
            image[top : top + TILE, left : left + TILE] = grey(tile, TILE)
    return png(image, words)


def _source(cache: CTCache) -> str:
    return "synthetic\n(phantoms)" if is_synthetic(cache.slices) else "not for\nclinical use"


def montage_picture(cache: CTCache, number: int, window: Window = BRAIN) -> bytes:
    """Draw all slices of a series as PNG, inferior to superior.

    Args:
        cache: with or without labels.
        number: of the series in the cache's table, from 1.
        window: that they are shown in.

    Raises:
        UsageError: there is no such series.
    """
    if not 1 <= number <= len(cache.series):
        raise UsageError(
            f"series {number}; expected 1 to {len(cache.series):,}, the series of {cache.path}."
        )
    series = cache.series.iloc[number - 1]
    rows = np.array(cache.series_rows(series["series_uid"]))
    shown = rows[np.linspace(0, len(rows) - 1, min(len(rows), _MOST_TILES)).round().astype(int)]
    columns = int(np.clip(np.ceil(np.sqrt(len(shown) * 1.4)), 1, 20))
    step, down = TILE + _GAP, TILE + _STRIP
    lines = -(-len(shown) // columns)
    image = np.zeros((_HEADER + lines * down, max(columns, 4) * step), np.uint8)
    name = f"{_NAMES.get(window, 'window')} {window.level:g}/{window.width:g} HU"
    spacing = series["slice_spacing_mm"]
    distance = f"{spacing:.2f} mm apart, " if np.isfinite(spacing) else ""
    source = _source(cache).replace("\n", " ")
    title = f"series {number}: {len(rows)} slices, {distance}{series['verdict']}\n{name}, {source}"
    words = [Word(title, 6, 5, 12)]
    labels = cache.labelling if cache.labelling and cache.labelling.level == "slice" else None
    for place, (row, hu) in enumerate(zip(shown, cache.slices_hu(shown), strict=True)):
        top, left = _HEADER + place // columns * down, place % columns * step
        image[top : top + TILE, left : left + TILE] = grey(window(hu), TILE)
        under = top + TILE + 3
        words.append(Word(str(cache.slices["slice_index"].iloc[row] + 1), left + 4, under, 11))
        if labels is None:
            continue
        truth = cache.slices[list(labels.labels.names)].iloc[row].to_numpy(float)
        names, is_positive = label_names(labels.labels, np.nan_to_num(truth, nan=-1))
        if is_positive:
            more = [] if len(names) < 3 else [f"and {len(names) - 1} others"]
            text = "\n".join([*names[: 2 - len(more)], *more])
            words.append(Word(text, left + 26, under, 11, _POSITIVE))
    return png(image, words)
