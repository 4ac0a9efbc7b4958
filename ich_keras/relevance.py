"""Which parts of an input a logit rests on: Grad-CAM, HiResCAM and integrated gradients.

All three are computed by torch's automatic differentiation, in float32, from logits (also where a
network ends in a sigmoid or a softmax: probabilities near 0 or 1 have no gradient left).

Sources:
    Selvaraju et al., Grad-CAM (ICCV 2017), equations 1 and 2. Draelos and Carin, Use HiResCAM
    instead of Grad-CAM for faithful explanations (2020), arXiv:2011.08891. Sundararajan et al.,
    Axiomatic Attribution for Deep Networks (ICML 2017), equations 1 to 3.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ich_keras.environment import choose_backend
from ich_keras.errors import UsageError

METHODS = ("gradcam", "hirescam", "integrated-gradients")
LEAST_CELLS = 10
_FEWEST_STEPS, _MOST_STEPS = 2, 1000
# Slices at a time, in samples of one and of several; a sample with more of them goes alone.
_BATCH, _BATCH_OF_VOLUMES = 8, 16


@dataclass(frozen=True)
class MapOptions:
    """How heat maps are made.

    Args:
        method: "gradcam": features, each weighted by its mean gradient; "hirescam": features times
            their gradients, place by place; "integrated-gradients": the input's distance from air
            times the mean gradient on the way from there, pixel by pixel (behind learnable
            windows). From the last features
            of our networks ("layer4") the first two are the same, and add up to the logit without
            its bias.
        layer: the features that gradcam and hirescam look at: "stem", "maxpool", "layer1" to
            "layer4", or the name of a layer. Early ones have more cells, and know less. None takes
            the last stage with at least `LEAST_CELLS` along rows and columns, and "layer2" where
            none has: "layer3" at 256 pixels, "layer2" below 160. On phantoms, maps of fewer cells
            seldom hit what they are of (`python -m experiments localisation`).
        steps: points between air and the input; integrated gradients only.
        signed: keep what speaks against a label, below 0. Without it, that is 0.
        neighbours: of slabs, keep the maps of all their slices, not of the middle one alone.
        batch_size: samples computed at a time; None takes 8 slices, three slabs of five, or one
            series.

    Raises:
        UsageError: an unknown method, or a number that cannot be used.

    >>> MapOptions("gradcam").layer is None
    True
    """

    method: str = "hirescam"
    layer: str | None = None
    steps: int = 32
    signed: bool = False
    neighbours: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"method {self.method!r}; expected one of {', '.join(METHODS)}.")
        if not isinstance(self.layer, str | None):
            raise UsageError(f"layer {self.layer!r}; expected a name, such as 'layer4'.")
        if type(self.steps) is not int or not _FEWEST_STEPS <= self.steps <= _MOST_STEPS:
            raise UsageError(
                f"steps {self.steps!r}; expected a whole number from {_FEWEST_STEPS} to"
                f" {_MOST_STEPS}."
            )
        size = self.batch_size
        if size is not None and (type(size) is not int or size < 1):
            raise UsageError(f"batch_size {size!r}; expected a whole number of at least 1.")

    def batch_of(self, shape: tuple[int, ...]) -> int:
        """Return the samples per batch, by the shape of a sample: ([slices,] rows, ...).

        >>> MapOptions().batch_of((96, 96, 3)), MapOptions().batch_of((60, 96, 96, 1))
        (8, 1)
        """
        usual = _BATCH if len(shape) == 3 else max(1, _BATCH_OF_VOLUMES // shape[0])
        return self.batch_size or usual


def map_options(method: "str | MapOptions") -> MapOptions:
    """Return the options of a method by its name; `MapOptions` are returned as they are."""
    return method if isinstance(method, MapOptions) else MapOptions(method)


def require_torch() -> None:
    """Refuse another backend than torch.

    Raises:
        UsageError: Keras runs, or would run, on another one.
    """
    backend = choose_backend()
    if backend != "torch":
        raise UsageError(
            f"heat maps need the backend torch; Keras runs on {backend}.",
            "Set KERAS_BACKEND=torch before keras is imported; runs of all backends load there.",
        )


class Relevance:
    """The relevance maps of one network, on the cells of its features.

    Args:
        model: a classifier of ours, or another one of the same kinds of layers, with logits or
            probabilities.
        options: how they are made; the attribute has the layer that was chosen.

    Raises:
        UsageError: another backend than torch, a network that cannot be read, or features that it
            lacks.
    """

    def __init__(self, model: Any, options: MapOptions) -> None:
        require_torch()
        from ich_keras.models.cut import behind_windows, cut_model, last_stage
        from ich_keras.models.graph import UnknownStep
        from ich_keras.models.torch.gradients import LogitGradients

        self._is_path = options.method == "integrated-gradients"
        self._windows = None
        if self._is_path:
            # The way from air to tissue in HU is a long one, of which windows see a small part.
            self._windows, model = behind_windows(model)
        try:
            if options.layer is None and not self._is_path:
                options = replace(options, layer=last_stage(model, LEAST_CELLS))
            cut = cut_model(model, None if self._is_path else options.layer)
            self._gradients = LogitGradients(cut)
        except UnknownStep as reason:
            raise UsageError(
                f"this network cannot be explained: {reason}.",
                "`ich_keras.choose_step` says which layers are known.",
            ) from reason
        self.options, self.axes = options, self._gradients.axes

    def maps(self, inputs: np.ndarray, labels: Sequence[int], baseline: np.ndarray) -> np.ndarray:
        """Compute the maps of one batch.

        Args:
            inputs: float32 (n, [slices,] rows, columns, channels).
            labels: numbers of logits.
            baseline: an input that shows nothing, of a shape that fits; integrated gradients only.

        Returns:
            float32 (labels, n, [slices,] cells, cells): parts of the logit, with their sign.
        """
        if self._is_path:
            return np.stack([self._integrated(one, labels, baseline) for one in inputs], axis=1)
        features, gradients, _ = self._gradients(inputs, labels)
        if self.options.method == "gradcam":
            spatial = tuple(range(1, features.ndim - 1))
            gradients = [gradient.mean(axis=spatial, keepdims=True) for gradient in gradients]
        return np.stack([(features * gradient).sum(axis=-1) for gradient in gradients])

    def _integrated(
        self, sample: np.ndarray, labels: Sequence[int], baseline: np.ndarray
    ) -> np.ndarray:
        """Return the integrated gradients of one sample: float32 (labels, [slices,] rows, ...)."""
        if self._windows is not None:
            pair = np.stack([sample, np.broadcast_to(baseline, sample.shape)])
            sample, baseline = self._windows.predict_on_batch(pair)
        # Gauss and Legendre's points and weights, from -1..1 to 0..1.
        places, weights = np.polynomial.legendre.leggauss(self.options.steps)
        places, weights = (places + 1) / 2, weights / 2
        away = sample - baseline
        total = np.zeros((len(labels), *sample.shape), np.float64)
        batch = self.options.batch_of(sample.shape)
        for start in range(0, len(places), batch):
            part = places[start : start + batch].astype(np.float32)
            points = baseline + part.reshape(-1, *(1,) * sample.ndim) * away
            _, gradients, _ = self._gradients(points.astype(np.float32), labels)
            for number, gradient in enumerate(gradients):
                total[number] += np.tensordot(weights[start : start + batch], gradient, axes=1)
        return (total * away).sum(axis=-1).astype(np.float32)


def batches(count: int, size: int) -> Iterator[np.ndarray]:
    """Yield the numbers of samples, batch after batch.

    >>> [part.tolist() for part in batches(5, 2)]
    [[0, 1], [2, 3], [4]]
    """
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))
