"""The layers that all networks are made of, and what these settle whatever Keras' global settings.

Source: the initial kernels are those of He et al., Delving Deep into Rectifiers (2015).
"""

import math
from typing import Any

import keras
from keras import layers

from ich_keras.keras_private import set_policy
from ich_keras.models.spec import ModelSpec, PerAxis
from ich_keras.models.window_layers import apply_windows

# Layers that are not told take both from Keras' global settings (keras.json).
DATA_FORMAT = "channels_last"
DTYPE = "float32"
# torch's defaults; its momentum 0.1 weighs the new value, Keras' 0.9 the old one.
BATCH_NORM = {"epsilon": 1e-5, "momentum": 0.9}
MAX_NORM_GROUPS = 32  # Wu and He, Group Normalization (2018)


class Layers:
    """The rank-dependent layers and the settings every layer shares.

    Args:
        spec: of the network.
        dtype: a Keras dtype or dtype policy for every layer.
        fan: by what the variance of an initial kernel is scaled: "fan_out" or "fan_in".
    """

    def __init__(self, spec: ModelSpec, dtype: Any, fan: str = "fan_out") -> None:
        self.spec = spec
        self.dtype = dtype
        self.fan = fan
        suffix = f"{spec.rank}D"
        self.conv_layer = getattr(layers, f"Conv{suffix}")
        self.pad_layer = getattr(layers, f"ZeroPadding{suffix}")
        self.max_pool_layer = getattr(layers, f"MaxPooling{suffix}")
        self.mean_layer = getattr(layers, f"GlobalAveragePooling{suffix}")

    def windowed(self, image: Any) -> Any:
        """Return what the network behind learnable windows sees; the image where it has none."""
        windows = self.spec.windows
        return image if windows is None else apply_windows(image, windows)

    def pad(self, x: Any, width: tuple[int, ...], name: str) -> Any:
        # torch pads both ends alike; Keras' "same" pads an even input at stride 2 on one end only
        # and so reads other pixels.
        if not any(width):
            return x
        widths = tuple((w, w) for w in width)
        return self.pad_layer(widths, data_format=DATA_FORMAT, dtype=self.dtype, name=name)(x)

    def conv(
        self,
        x: Any,
        filters: int,
        kernel: PerAxis,
        name: str,
        stride: PerAxis = 1,
        dilation: PerAxis = 1,
        groups: int = 1,
        use_bias: bool = False,
    ) -> Any:
        """Convolve with symmetric padding of dilation * (kernel // 2)."""
        kernels, strides, dilations = map(self.spec.per_axis, (kernel, stride, dilation))
        width = tuple(d * (k // 2) for d, k in zip(dilations, kernels, strict=True))
        x = self.pad(x, width, f"{name}_pad")
        return self.conv_layer(
            filters,
            kernels,
            strides=strides,
            data_format=DATA_FORMAT,
            dilation_rate=dilations,
            groups=groups,
            use_bias=use_bias,
            kernel_initializer=keras.initializers.VarianceScaling(
                2.0, mode=self.fan, distribution="untruncated_normal"
            ),
            dtype=self.dtype,
            name=name,
        )(x)

    def max_pool(self, x: Any, kernel: PerAxis, stride: PerAxis) -> Any:
        """Pool after the stem, padded as a convolution is."""
        kernels, strides = self.spec.per_axis(kernel), self.spec.per_axis(stride)
        # Zeros stand in for torch's -inf: after a ReLU they never win against a real value.
        x = self.pad(x, tuple(k // 2 for k in kernels), "maxpool_pad")
        return self.max_pool_layer(
            kernels, strides=strides, data_format=DATA_FORMAT, dtype=self.dtype, name="maxpool"
        )(x)

    def mean(self, x: Any, name: str, keepdims: bool = False) -> Any:
        """Average over all positions."""
        layer = self.mean_layer(
            data_format=DATA_FORMAT, keepdims=keepdims, dtype=self.dtype, name=name
        )
        return layer(x)

    def norm(self, x: Any, name: str) -> Any:
        if self.spec.norm == "group":
            return layers.GroupNormalization(
                math.gcd(MAX_NORM_GROUPS, x.shape[-1]),
                axis=-1,
                epsilon=BATCH_NORM["epsilon"],
                dtype=self.dtype,
                name=name,
            )(x)
        is_trainable = self.spec.norm != "frozen"
        return layers.BatchNormalization(
            axis=-1, **BATCH_NORM, trainable=is_trainable, dtype=self.dtype, name=name
        )(x)

    def relu(self, x: Any, name: str) -> Any:
        return layers.ReLU(dtype=self.dtype, name=name)(x)


def functional(inputs: Any, outputs: Any, name: str) -> keras.Model:
    """Return a functional model that is float32 itself, whatever Keras' global policy."""
    model = keras.Model(inputs, outputs, name=name)
    inputs_taken = [layer for layer in model.layers if isinstance(layer, layers.InputLayer)]
    for made in (model, *inputs_taken):  # which take no policy when they are made
        set_policy(made, DTYPE)
    return model
