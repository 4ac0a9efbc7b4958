"""What a network costs, counted on its graph: parameters, operations, memory of a training step."""

import math
from dataclasses import dataclass
from typing import Any

import keras

from ich_keras.keras_private import maker_of
from ich_keras.models.classifier import build_classifier
from ich_keras.models.presets import PRESETS, preset
from ich_keras.models.weights import BYTES_PER_VALUE

_COLUMNS = (
    "preset",
    "what",
    "input",
    "depth",
    "GMAC",
    "parameters",
    "activations, MiB",
    "weights",
    "licence",
)


@dataclass(frozen=True)
class Cost:
    """The cost of one sample.

    Args:
        parameters: trainable numbers.
        multiply_adds: of the convolutions and the head, forward; a training step takes about
            three times as many (forward, gradient of the inputs, gradient of the weights).
        activation_bytes: float32 values that a training step must keep between its forward and
            backward pass: the inputs of every convolution, normalisation, pooling and dense layer,
            each tensor once. Two-byte types keep half.
    """

    parameters: int
    multiply_adds: int
    activation_bytes: int


def cost(model: keras.Model) -> Cost:
    """Count what a network costs per sample.

    Args:
        model: of ours, built for inputs of a known size.

    >>> from ich_keras.models.resnet import resnet
    >>> from ich_keras.models.spec import ModelSpec
    >>> cost(resnet(ModelSpec((32, 32, 1), depth=10, width=4))).parameters
    19660
    """
    multiply_adds = 0
    kept: dict[int, int] = {}
    for layer in model.layers:
        kernel = getattr(layer, "kernel", None)
        if kernel is not None:
            positions = math.prod(layer.output.shape[1:-1])
            multiply_adds += positions * math.prod(kernel.shape)
        if layer.weights or "pool" in layer.name:
            source = _before_padding(layer.input)
            if type(maker_of(source)).__name__ != "InputLayer":
                kept[id(source)] = math.prod(source.shape[1:])
    return Cost(
        parameters=sum(math.prod(variable.shape) for variable in model.trainable_variables),
        multiply_adds=multiply_adds,
        activation_bytes=sum(kept.values()) * BYTES_PER_VALUE,
    )


def _before_padding(tensor: Any) -> Any:
    """Look through a padding layer: a good implementation pads inside the convolution."""
    layer = maker_of(tensor)
    return layer.input if "ZeroPadding" in type(layer).__name__ else tensor


def preset_table(names: tuple[str, ...]) -> str:
    """Return a Markdown table of presets and their costs.

    Args:
        names: keys of `PRESETS`.

    Raises:
        UsageError: an unknown name.

    >>> preset_table(("resnet10_2d",)).splitlines()[-1]
    '| `resnet10_2d` | ResNet-10 on slices | 256x256x3 | 10 | ... | none | - |'
    """
    lines = [f"| {' | '.join(_COLUMNS)} |", "|--" * len(_COLUMNS) + "|"]
    for name in names:
        spec, costs, chosen = preset(name), cost(build_classifier(name)), PRESETS[name]
        weights = ", ".join(f"`{source}`" for source in chosen.sources) or "none"
        if chosen.via:
            weights += f" ({chosen.via})"
        cells = (
            f"`{name}`",
            chosen.title,
            "x".join(map(str, spec.input_shape)),
            f"{spec.depth}",
            f"{costs.multiply_adds / 1e9:,.1f}",
            f"{costs.parameters:,}",
            f"{costs.activation_bytes / 2**20:,.0f}",
            weights,
            chosen.licence or "-",
        )
        lines.append(f"| {' | '.join(cells)} |")
        keras.backend.clear_session()
    return "\n".join(lines)
