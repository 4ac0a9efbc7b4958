"""The layers of learnable windows, all stock and in float32, and what their weights mean in HU."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import layers

from ich_keras.errors import UsageError
from ich_keras.models.windows import (
    CLIP,
    GAIN,
    NORMALISED,
    SCALE,
    SIGMOID,
    WINDOWS,
    LearnedWindows,
    in_hu,
)

# Of bfloat16 a step would be 0.5 HU at 100 HU from the middle of the scale, and 4 HU in bone.
DTYPE = "float32"


def apply_windows(hu: Any, windows: LearnedWindows) -> Any:
    """Put learnable windows on the symbolic input of a network.

    Args:
        hu: float32 (N, ..., 1), HU.
        windows: the windows before training.

    Returns:
        float32 (N, ..., windows), normalised.
    """
    rank = len(hu.shape) - 2
    x = _rescaling(1 / windows.unit_hu, -windows.zero_hu / windows.unit_hu, SCALE)(hu)
    constant = keras.initializers.Constant
    x = getattr(layers, f"Conv{rank}D")(
        len(windows.start),
        1,
        data_format="channels_last",
        kernel_initializer=constant(list(windows.kernel)),
        bias_initializer=constant(list(windows.bias)),
        dtype=DTYPE,
        name=WINDOWS,
    )(x)
    if windows.kind == "linear":
        x = layers.ReLU(max_value=1.0, dtype=DTYPE, name=CLIP)(x)
    else:
        x = _rescaling(windows.gain, -windows.gain / 2, GAIN)(x)
        x = layers.Activation("sigmoid", dtype=DTYPE, name=SIGMOID)(x)
    # Not `Rescaling`: several factors would go to the first axis under image_data_format
    # "channels_first".
    return layers.Normalization(
        axis=-1,
        mean=list(windows.mean),
        variance=[std**2 for std in windows.std],
        dtype=DTYPE,
        name=NORMALISED,
    )(x)


def _rescaling(scale: float, offset: float, name: str) -> layers.Layer:
    return layers.Rescaling(scale, offset, dtype=DTYPE, name=name)


def window_layer(model: keras.Model) -> Any:
    """Return the layer that holds the windows of a network; None where there are none."""
    return next((layer for layer in model.layers if layer.name == WINDOWS), None)


def levels_and_widths(model: keras.Model) -> tuple[tuple[float, float], ...]:
    """Return the windows of a network, as they are now: (level, width) of each, HU.

    Args:
        model: with learnable windows; one that was saved and loaded will do.

    Raises:
        UsageError: the network has none.
        DataError: a window has become unusable; see `in_hu`.
    """
    layer = window_layer(model)
    scales = [one for one in model.layers if one.name == SCALE]
    if layer is None or not scales:
        raise UsageError(
            f"{model.name} has no learnable windows.",
            "A network has them that was built or trained with windows 'linear' or 'sigmoid'.",
        )
    unit = 1 / scales[0].scale
    kernel, bias = (keras.ops.convert_to_numpy(one) for one in (layer.kernel, layer.bias))
    return in_hu(kernel, bias, -scales[0].offset * unit, unit)


def keep_from_decay(optimizer: Any, model: keras.Model) -> None:
    """Let weight decay leave the windows alone: it would widen them, whatever the loss says.

    Args:
        optimizer: of Keras, not yet built.
        model: with or without windows.
    """
    layer = window_layer(model)
    variables: Sequence[Any] = [] if layer is None else [layer.kernel]
    optimizer.exclude_from_weight_decay(var_list=variables, var_names=["gamma", "beta", "bias"])
