"""Two networks on the same input: how far apart they are, feature by feature, gradient by gradient.

Every difference is given twice: its largest absolute value, and that value relative to the largest
absolute value of the reference's own feature.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ich_keras.errors import DataError
from ich_keras.models.spec import FEATURES, ModelSpec
from ich_keras.models.weights import HEAD

TOLERANCE = 1e-5  # float32, relative: rounding, not another network
# Even, odd and mixed sizes: torch's symmetric padding and Keras' "same" agree on odd ones only.
IMAGE_SIZES = ((64, 64), (65, 63), (96, 71))
VOLUME_SIZES = ((16, 32, 32), (5, 33, 47), (1, 40, 31))


@dataclass(frozen=True)
class Parity:
    """How far two networks are apart.

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
            DataError: naming the first feature, in the order of the computation, that is off.
        """
        for name, (absolute, relative) in self.rows.items():
            if not np.isfinite(relative):
                raise DataError(
                    f"{place}: the networks overflow at {name} on these weights.",
                    "Nothing was written. The values are far from those of a trained network.",
                )
            if not relative <= tolerance:
                raise DataError(
                    f"{place}: the networks disagree from {name} on: {absolute:.3g} absolute,"
                    f" {relative:.3g} relative; expected at most {tolerance:g}.",
                    "Nothing was written. The weights load, but the networks are not the same.",
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

    NaN for both when either holds a value that is not finite.
    """
    if value.shape != expected.shape:
        raise ValueError(f"shapes {value.shape} and {expected.shape} cannot be compared")
    if not (np.isfinite(value).all() and np.isfinite(expected).all()):
        return np.nan, np.nan
    absolute = float(np.abs(value.astype(np.float64) - expected).max())
    scale = float(np.abs(expected).max())
    return absolute, absolute / scale if scale else absolute


def worse(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """Return the larger of each pair's entries; what is not a number stays so.

    Python's `max(0.0, nan)` is 0.0: networks that overflow would pass for equal.
    """
    return float(np.maximum(one[0], other[0])), float(np.maximum(one[1], other[1]))


def sizes_of(spec: ModelSpec) -> tuple[tuple[int, ...], ...]:
    """Return input sizes worth comparing at: (rows, columns) or (slices, rows, columns)."""
    return IMAGE_SIZES if spec.rank == 2 else VOLUME_SIZES


@contextlib.contextmanager
def full_precision():
    """Switch TF32 off: it rounds products to 10 bits, which no parity survives."""
    import torch

    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def torch_features(module, images: np.ndarray) -> dict[str, np.ndarray]:
    """Run a reference network.

    Args:
        module: from `reference`, or one that returns such a dictionary.
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


def keras_features(model, images: np.ndarray) -> dict[str, np.ndarray]:
    """Run a Keras network of ours in inference mode; see `torch_features`."""
    from ich_keras.models.resnet import feature_model

    names = {layer.name for layer in model.layers}
    wanted = [n for n in FEATURES if n != "maxpool" or n in names]
    if HEAD in names:
        wanted.append(HEAD)
    found = feature_model(model, tuple(wanted)).predict_on_batch(images)
    return {name: np.asarray(found[name]) for name in wanted}


def compare(
    module,
    model,
    sizes: Iterable[tuple[int, ...]],
    channels: int,
    batch_size: int = 1,
    seed: int = 0,
) -> Parity:
    """Compare the features of a torch and a Keras network, both in evaluation mode.

    Args:
        module: from `reference`.
        model: from `resnet` or `classifier`, with the same weights, for inputs of any size.
        sizes: of the inputs; the worst difference over all of them is kept.
        channels: of the inputs.
        batch_size: images or volumes at a time.
        seed: of the inputs, standard normal.
    """
    random, rows = np.random.default_rng(seed), {}
    with full_precision():
        for size in sizes:
            images = random.standard_normal((batch_size, *size, channels)).astype(np.float32)
            expected, found = torch_features(module, images), keras_features(model, images)
            for name in found:
                pair = difference(found[name], expected[name])
                rows[name] = worse(rows.get(name, (0.0, 0.0)), pair)
    return Parity(rows)
