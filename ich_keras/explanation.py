"""Where in a scan a network looks: heat maps per label, for slices, slabs and whole series.

`relevance` computes maps on the cells of a network's features, `data.image_space` says where these
cells lie in the slice. A map shows what an answer rests on; it does not show that the answer is
right, nor where blood ends.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ich_keras.ct.head import head_mask
from ich_keras.ct.header import MAX_SPACING_MM, MIN_SPACING_MM
from ich_keras.data.image_space import input_places, interpolation, series_interpolation
from ich_keras.data.inputs import resize_hu, stack_channels
from ich_keras.data.sources import Sources
from ich_keras.data.views import AIR, Samples
from ich_keras.errors import DataError, UsageError
from ich_keras.inference import load_run
from ich_keras.labels import LabelSet
from ich_keras.prediction_samples import inputs_of, series_samples
from ich_keras.progress import Progress
from ich_keras.recipe import InputRecipe, Recipe
from ich_keras.relevance import MapOptions, Relevance, batches, map_options, require_torch
from ich_keras.run_folder import RunFolder

# A run, or what `load_run` made of it.
Explained = RunFolder | Path | str | tuple[Recipe, Any]
_STEP = "explaining"
_HU_LIMITS = (-32768, 32767)


@dataclass(frozen=True, eq=False)
class HeatMaps:
    """Heat maps of one series.

    Args:
        values: label -> float32 (slices, rows, columns) on the pixels of the series, inferior to
            superior; 0 outside the head. From 0 to 1, which is the highest value in the series; all
            0 where nothing speaks for the label. Signed ones go from -1 to 1. With neighbours,
            (slices, slices of a slab, rows, columns).
        scales: label -> what the map was divided by. Values times scale are parts of a logit (per
            cell of the features, or per pixel of the input), and so can be compared between series
            of one run and method.
        seen: bool (slices,), whether the network saw a slice. Between two that it saw, long series
            have ones that it did not; their maps are interpolated.
        options: how they were made; the layer is the one that was chosen.
    """

    values: dict[str, np.ndarray]
    scales: dict[str, float]
    seen: np.ndarray
    options: MapOptions

    @property
    def method(self) -> str:
        """The name of the method."""
        return self.options.method


def explain(
    network: Explained | Any,
    inputs: np.ndarray,
    labels: Sequence[str] | str | None = None,
    method: str | MapOptions = "hirescam",
    baseline: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Explain a network's answers to inputs of its own kind.

    Args:
        network: a finished run, what `load_run` made of it, or a classifier of ours.
        inputs: float (n, [slices,] rows, columns, channels), normalised; `Recipe.inputs.prepare`
            makes them.
        labels: names, or one name; None takes all labels of the network.
        method: its name, or `MapOptions`.
        baseline: for integrated gradients, an input that shows nothing; None takes air for a run,
            and zeros for a network without a recipe.

    Returns:
        Label -> float32 (n, [slices,] rows, columns), on the pixels of the input: parts of the
        logit, not scaled. Signed integrated gradients of a sample add up to the difference of its
        logit from the baseline's.

    Raises:
        UsageError: another backend than torch, an unknown label, method or layer, a wrong shape, or
            a network that cannot be read.
        StaleError, DataError: as `load_run` raises them; values that are not finite.

    >>> from ich_keras.models.classifier import classifier
    >>> from ich_keras.models.spec import ModelSpec
    >>> model = classifier(ModelSpec((32, 32, 1), depth=10, width=4))
    >>> explain(model, np.zeros((2, 32, 32, 1), np.float32), "any", "gradcam")["any"].shape
    (2, 32, 32)
    """
    options = map_options(method)
    recipe, model = _loaded(network)
    names, columns = _columns(_labels_of(recipe, model), labels)
    inputs = _checked_inputs(model, inputs)
    if baseline is None:
        baseline = np.zeros((1,), np.float32) if recipe is None else _air(recipe.inputs)
    try:
        baseline = np.broadcast_to(np.asarray(baseline, np.float32), inputs.shape[1:])
    except ValueError as error:
        raise UsageError(
            f"baseline has the shape {np.shape(baseline)}; expected {inputs.shape[1:]}."
        ) from error
    relevance = Relevance(model, options)
    found = np.zeros((len(columns), *inputs.shape[:-1]), np.float32)
    for chosen in batches(len(inputs), options.batch_of(inputs.shape[1:])):
        cells = _cells(relevance, inputs[chosen], columns, baseline)
        # One axis after the other: each is taken away in front and comes back at the end.
        for axis, size in zip(relevance.axes, inputs.shape[1:-1], strict=True):
            places = np.arange(size, dtype=np.float64)
            matrix = interpolation(places, cells.shape[2], axis.step, axis.centre, size)
            cells = np.tensordot(cells, matrix, axes=(2, 1))
        found[:, chosen] = cells
    return dict(zip(names, found, strict=True))


def explain_series(
    run: Explained,
    hu: np.ndarray,
    spacing_mm: Sequence[float],
    labels: Sequence[str] | str | None = None,
    method: str | MapOptions = "hirescam",
    shear: tuple[float, float] = (0.0, 0.0),
    progress: Progress | None = None,
) -> HeatMaps:
    """Explain a run's answers to one series, on the pixels of its slices.

    The series goes the way of a prediction: slice by slice, stack by stack or slab by slab (the map
    is that of the middle slice), or as a whole. What a run's sequence head makes of the slices is
    not explained: the maps are of its slice network alone. Thin slices are not averaged first, as a
    prediction may do (`ich_keras.data.thin_series`). Beside the result, which takes 4 bytes per
    voxel and label, memory is that of one batch, whatever the number of slices.

    Args:
        run: a finished run, or what `load_run` made of it.
        hu: (slices, rows, columns), HU, integers or floats (which are rounded), inferior to
            superior, columns to the patient's left, rows to the back.
        spacing_mm: between slices, rows and columns.
        labels: names, or one name; None takes all labels of the run.
        method: its name, or `MapOptions`.
        shear: of a tilted series, `shear_row` and `shear_column` of its row in the index: only runs
            that move tilted slices upright ("deshear") need it.
        progress: called as progress(step, done, total) in samples.

    Returns:
        The maps, and what they were divided by.

    Raises:
        UsageError: another backend than torch, an unknown label, method or layer, an array or a
            spacing that cannot be used, neighbours of a run that is not on slabs.
        StaleError, DataError: as `load_run` raises them; values that are not finite; a tilted
            series for a run that skips these.
    """
    options = map_options(method)
    recipe, model = _loaded(run)
    if recipe is None:
        raise UsageError(
            "a network without its recipe does not say how Hounsfield units become its input.",
            "Give the run's folder, or what load_run returns.",
        )
    view = recipe.inputs.view
    if options.neighbours and view.kind != "slab":
        raise UsageError(
            f"neighbours are asked for, and the run's view is {view.kind!r}; only slabs have them.",
            "Leave neighbours out.",
        )
    names, columns = _columns(_labels_of(recipe, model), labels)
    hu = _checked_hu(hu)
    spacing = _checked_spacing(spacing_mm)
    size = recipe.inputs.cache_size
    resized = np.stack([resize_hu(image, size) for image in hu])
    samples = series_samples(view, hu.shape, spacing, shear, recipe.inputs, resized)
    if not samples.usable.any():
        raise DataError(
            "the series is tilted, and the run skips tilted series.",
            "It has no answer for it that could be explained.",
        )
    relevance = Relevance(model, options)
    places = _Places(recipe.inputs, hu.shape, relevance, samples)
    shown = np.flatnonzero(samples.usable)
    head = head_mask(hu, *spacing[1:])
    lead = (view.num_slices,) if options.neighbours else ()
    values = {name: np.zeros((len(hu), *lead, *hu.shape[1:]), np.float32) for name in names}
    air = _air(recipe.inputs)
    batch = options.batch_of(recipe.inputs.shape)
    if progress is not None:
        progress(_STEP, 0, len(shown))
    for numbers in batches(len(shown), batch):
        chosen = shown[numbers]
        inputs = inputs_of(resized, samples, chosen, recipe.inputs)
        cells = _cells(relevance, inputs, columns, air)
        for sample, maps in zip(chosen, np.moveaxis(cells, 1, 0), strict=True):
            for name, one in zip(names, maps, strict=True):
                places.draw(int(sample), one, values[name], head)
        if progress is not None:
            progress(_STEP, int(numbers[-1]) + 1, len(shown))
    # Without a copy of the absolute values.
    scales = {name: float(max(found.max(), -found.min())) for name, found in values.items()}
    for name, found in values.items():
        if scales[name] > 0:
            found /= scales[name]
    seen = np.isin(np.arange(len(hu)), Sources.of(samples, shown).wanted())
    return HeatMaps(values, scales, seen, relevance.options)


class _Places:
    """Where the cells of a sample's map lie in the slices of its series."""

    def __init__(
        self,
        inputs: InputRecipe,
        shape: tuple[int, ...],
        relevance: Relevance,
        samples: Samples,
    ) -> None:
        self._inputs, self._shape, self._samples = inputs, shape, samples
        self._neighbours = relevance.options.neighbours
        self._axes = relevance.axes
        self._across = functools.lru_cache(maxsize=64)(self._matrix)

    def draw(self, sample: int, cells: np.ndarray, out: np.ndarray, head: np.ndarray) -> None:
        """Draw the map of one sample into the maps of the series.

        Args:
            sample: its number.
            cells: float32 ([slices,] cells, cells).
            out: filled in place.
            head: bool (slices, rows, columns).
        """
        view, rows = self._samples.view, self._samples.rows[sample]
        if not view.is_volume:
            # A stack shows one picture, of all its slices: it lies on that of the middle one.
            out[sample] = self._slice(cells, sample, view.num_slices // 2) * head[sample]
            return
        along = self._axes[0]
        count = view.num_slices
        within = interpolation(
            np.arange(count, dtype=np.float64), len(cells), along.step, along.centre, count
        )
        if view.kind == "series":
            shares = self._samples.shares
            between = rows if shares is None else np.where(rows == AIR, AIR, rows + shares[sample])
            to_series = series_interpolation(between, len(out))
            nearest = to_series.argmax(axis=1)
            for number, weights in enumerate(to_series @ within):
                if to_series[number].any():
                    one = np.tensordot(weights, cells, axes=1)
                    out[number] = self._slice(one, sample, int(nearest[number])) * head[number]
            return
        for place in range(count) if self._neighbours else (count // 2,):
            if rows[place] != AIR:
                one = np.tensordot(within[place], cells, axes=1)
                found = self._slice(one, sample, place) * head[rows[place]]
                out[(sample, place) if self._neighbours else sample] = found

    def _slice(self, cells: np.ndarray, sample: int, place: int) -> np.ndarray:
        """Return the map of one slice on its pixels: float32 (rows, columns)."""
        shifts = self._samples.shifts
        down, right = (0.0, 0.0) if shifts is None else map(float, shifts[sample, place])
        top, left, box = 0, 0, 0
        if self._samples.boxes is not None:
            top, left, box = self._samples.boxes[sample].tolist()
        rows = self._across(-2, cells.shape[0], down, top, box)
        columns = self._across(-1, cells.shape[1], right, left, box)
        return rows @ cells @ columns.T

    def _matrix(self, axis: int, cells: int, shift: float, start: int, box: int) -> np.ndarray:
        length, side, size = self._shape[axis], max(self._shape[1:]), self._inputs.size
        whole = self._inputs.cache_size
        cut = (start / whole, box / whole) if box else (0.0, 1.0)
        found, places = self._axes[axis], input_places(length, side, size, shift, *cut)
        return interpolation(places, cells, found.step, found.centre, size)


def _loaded(network: Explained | Any) -> tuple[Recipe | None, Any]:
    require_torch()
    if isinstance(network, (RunFolder, Path, str)):
        return load_run(network, precision="float32")
    import keras

    if isinstance(network, keras.Model):
        return None, network
    is_pair = isinstance(network, tuple) and len(network) == 2
    if is_pair and isinstance(network[0], Recipe) and isinstance(network[1], keras.Model):
        return network
    raise UsageError(
        f"{type(network).__name__} cannot be explained; expected a run's folder, what load_run"
        " returns, or a Keras model."
    )


def _labels_of(recipe: Recipe | None, model: Any) -> LabelSet:
    from ich_keras.models.classifier import labels_of

    return labels_of(model) if recipe is None else recipe.labels


def _columns(
    known: LabelSet, asked: Sequence[str] | str | None
) -> tuple[tuple[str, ...], list[int]]:
    """Return the labels that are asked for, and the numbers of their logits."""
    if asked is None:
        return known.names, list(range(len(known)))
    names = (asked,) if isinstance(asked, str) else tuple(dict.fromkeys(asked))
    unknown = [name for name in names if name not in known.names]
    if unknown or not names:
        raise UsageError(
            f"label {unknown[0]!r} is none of the network's: {', '.join(known.names)}."
            if unknown
            else "no labels are asked for; None takes all."
        )
    return names, [known.names.index(name) for name in names]


def _checked_inputs(model: Any, inputs: Any) -> np.ndarray:
    expected = tuple(model.inputs[0].shape[1:])
    fits = (
        isinstance(inputs, np.ndarray)
        and inputs.dtype.kind in "iuf"
        and inputs.ndim == len(expected) + 1
        and all(e in (None, n) for e, n in zip(expected, inputs.shape[1:], strict=True))
    )
    if not fits:
        shape = ("n", *("any" if length is None else str(length) for length in expected))
        kind = f"{getattr(inputs, 'dtype', type(inputs).__name__)} of shape {np.shape(inputs)}"
        raise UsageError(f"the inputs are {kind}; expected numbers, ({', '.join(shape)}).")
    if not np.isfinite(inputs).all():
        raise DataError("the inputs hold values that are not finite.")
    return inputs.astype(np.float32, copy=False)


def _cells(
    relevance: Relevance, inputs: np.ndarray, columns: list[int], baseline: np.ndarray
) -> np.ndarray:
    """Return the maps of a batch on cells: float32 (labels, n, [slices,] cells, cells)."""
    cells = relevance.maps(inputs, columns, baseline)
    if not np.isfinite(cells).all():
        raise DataError("heat maps are not finite.", "The weights are damaged.")
    return cells if relevance.options.signed else np.maximum(cells, 0)


def _air(inputs: InputRecipe) -> np.ndarray:
    """Return a network's input of air alone: float32 ([slices,] rows, columns, channels)."""
    view, side, intensity = inputs.view, inputs.size, inputs.intensity
    lead = (view.num_slices,) if view.has_slices else ()
    windows = np.zeros((*lead, side, side, intensity.channels), np.float32)
    air = intensity.normalise(windows, view.has_slices)
    return stack_channels(air) if view.is_stack else air


def _checked_hu(hu: Any) -> np.ndarray:
    hu = np.asarray(hu)
    if hu.ndim != 3 or hu.size == 0 or hu.dtype.kind not in "iuf":
        raise UsageError(
            f"hu is {hu.dtype} of shape {hu.shape}; expected numbers, (slices, rows, columns), in"
            " HU."
        )
    if hu.dtype == np.int16:
        return hu
    rounded = np.rint(hu)
    low, high = _HU_LIMITS
    if not ((rounded >= low) & (rounded <= high)).all():
        raise DataError(f"hu holds values that are not finite, or not from {low} to {high} HU.")
    return rounded.astype(np.int16)


def _checked_spacing(spacing_mm: Sequence[float]) -> tuple[float, float, float]:
    try:
        values = np.asarray(spacing_mm, np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.shape != (3,) or not ((values >= MIN_SPACING_MM) & (values <= MAX_SPACING_MM)).all():
        raise UsageError(
            f"spacing_mm is {spacing_mm!r}; expected three numbers from"
            f" {MIN_SPACING_MM:g} to {MAX_SPACING_MM:g} mm.",
            "They are the distances between slices, rows and columns.",
        )
    return tuple(values.tolist())
