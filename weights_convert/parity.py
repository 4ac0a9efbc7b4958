"""How much two networks differ on the same input, feature by feature and gradient by gradient.

Every difference is given twice: as the largest absolute value, and relative to the largest absolute
value of the reference's feature.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ich_keras.errors import DataError
from ich_keras.models.spec import FEATURES, ModelSpec
from ich_keras.models.weights import HEAD

if TYPE_CHECKING:
    import keras
    from torch import nn

TOLERANCE = 1e-5  # relative, in float32: rounding stays below, another network does not
# Even, odd and mixed: torch's symmetric padding and Keras' "same" agree on odd sizes only.
IMAGE_SIZES = ((64, 64), (65, 63), (96, 71))
VOLUME_SIZES = ((16, 32, 32), (5, 33, 47), (1, 40, 31))


@dataclass(frozen=True)
class Parity:
    """How much two networks differ.

    Args:
        rows: feature or tensor -> (largest absolute difference, the same relative to the largest
            absolute value of the reference).
    """

    rows: dict[str, tuple[float, float]]

    @property
    def worst(self) -> float:
        """The largest relative difference; NaN when any is not a number."""
        return float(np.max([relative for _, relative in self.rows.values()]))

    def require(self, tolerance: float, place: str) -> None:
        """Refuse networks that differ.

        Raises:
            DataError: naming the first feature, in the order of computation, that differs too much.
        """
        for name, (absolute, relative) in self.rows.items():
            if not np.isfinite(relative):
                raise DataError(
                    f"{place}: the networks overflow at {name} on these weights.",
                    "Nothing was written. The values are far from those of any trained network.",
                )
            if not relative <= tolerance:
                raise DataError(
                    f"{place}: the networks disagree from {name} on: {absolute:.3g} absolute,"
                    f" {relative:.3g} relative; expected at most {tolerance:g}.",
                    "Nothing was written. The shapes fit, but the networks compute differently.",
                )

    def to_dict(self) -> dict[str, float]:
        """Return the relative differences, ready for JSON."""
        return {name: relative for name, (_, relative) in self.rows.items()}

    def __str__(self) -> str:
        lines = [f"{'feature':10} {'absolute':>9} {'relative':>9}"]
        lines += [f"{n:10} {a:9.2e} {r:9.2e}" for n, (a, r) in self.rows.items()]
        return "\n".join(lines)


def difference(value: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Return (largest absolute difference, the same over the largest absolute expected value).

    Both are NaN when either array holds a value that is not finite.

    >>> difference(np.array([1.0, 3.5]), np.array([1.0, 4.0]))
    (0.5, 0.125)
    """
    if value.shape != expected.shape:
        raise ValueError(f"shapes {value.shape} and {expected.shape} cannot be compared")
    if not (np.isfinite(value).all() and np.isfinite(expected).all()):
        return np.nan, np.nan
    absolute = float(np.abs(value.astype(np.float64) - expected).max())
    scale = float(np.abs(expected).max())
    return absolute, absolute / scale if scale else absolute


def worse(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """Return the larger absolute and the larger relative difference; NaN stays NaN.

    Python's `max(0.0, nan)` is 0.0, with which networks that overflow would pass as equal.

    >>> worse((0.5, 0.1), (0.25, 0.2))
    (0.5, 0.2)
    >>> worse((0.0, 0.0), (float("nan"), float("nan")))
    (nan, nan)
    """
    return float(np.maximum(one[0], other[0])), float(np.maximum(one[1], other[1]))


def sizes_of(spec: ModelSpec) -> tuple[tuple[int, ...], ...]:
    """Return the input sizes to compare at: (rows, columns) or (slices, rows, columns)."""
    return IMAGE_SIZES if spec.rank == 2 else VOLUME_SIZES


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Switch TF32 off, which would round products to 10 bits."""
    import torch

    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def torch_features(module: "nn.Module", images: np.ndarray) -> dict[str, np.ndarray]:
    """Run a reference network.

    Args:
        module: from `reference`, or another one that returns a dictionary of features.
        images: float (N, *spatial, channels), channels-last.

    Returns:
        Feature -> array with channels last.
    """
    import torch

    dtype = next(module.parameters()).dtype
    with torch.inference_mode():
        found = module(torch.from_numpy(np.moveaxis(images, -1, 1)).to(dtype))
    return {
        name: np.moveaxis(tensor.numpy(), 1, -1)
        for name, tensor in found.items()
        if tensor is not None
    }


def keras_features(model: "keras.Model", images: np.ndarray) -> dict[str, np.ndarray]:
    """Run a Keras network of ours in inference mode; see `torch_features`."""
    from ich_keras.models.resnet import feature_model

    names = {layer.name for layer in model.layers}
    wanted = [n for n in FEATURES if n != "maxpool" or n in names]
    if HEAD in names:
        wanted.append(HEAD)
    found = feature_model(model, tuple(wanted)).predict_on_batch(images)
    return {name: np.asarray(found[name]) for name in wanted}


def compare(
    module: "nn.Module",
    model: "keras.Model",
    sizes: Iterable[tuple[int, ...]],
    channels: int,
    batch_size: int = 1,
    seed: int = 0,
) -> Parity:
    """Compare the features of a torch and a Keras network, both in evaluation mode.

    Args:
        module: from `reference`.
        model: from `resnet` or `classifier`, with the same weights, for inputs of any size.
        sizes: of the inputs; the largest difference over all of them counts.
        channels: of the inputs.
        batch_size: images or volumes in a batch.
        seed: of the inputs, which are standard normal.
    """
    random = np.random.default_rng(seed)
    rows: dict[str, tuple[float, float]] = {}
    with full_precision():
        for size in sizes:
            images = random.standard_normal((batch_size, *size, channels)).astype(np.float32)
            expected, found = torch_features(module, images), keras_features(model, images)
            for name in found:
                pair = difference(found[name], expected[name])
                rows[name] = worse(rows.get(name, (0.0, 0.0)), pair)
    return Parity(rows)
