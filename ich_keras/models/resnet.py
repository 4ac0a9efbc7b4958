"""One ResNet builder for 2D and 3D, of stock Keras layers only.

Layer names are the weight map: torch's module path with "." written as "_" (Keras' torch backend
refuses dots in names), so `layer2.0.downsample.1` is `layer2_0_downsample_1`. That is why they are
not prettier.

Source: He et al., Deep Residual Learning for Image Recognition (2016); torchvision's variant with
the stride on the 3x3 convolution of a bottleneck; Chen et al., Med3D (2019) for the dilated one.
"""

import keras
from keras import layers, ops

from ich_keras.models.presets import STAGE_BLOCKS, ModelSpec

# torch's defaults; its momentum 0.1 weighs the new value, Keras' 0.9 the old one.
BATCH_NORM = {"epsilon": 1e-5, "momentum": 0.9}
BOTTLENECK_EXPANSION = 4


class _Graph:
    """The rank-dependent layers and the settings every layer shares."""

    def __init__(self, spec: ModelSpec, dtype):
        self.spec = spec
        self.dtype = dtype
        suffix = f"{spec.rank}D"
        self.conv_layer = getattr(layers, f"Conv{suffix}")
        self.pad_layer = getattr(layers, f"ZeroPadding{suffix}")
        self.max_pool_layer = getattr(layers, f"MaxPooling{suffix}")

    def pad(self, x, width: tuple[int, ...], name: str):
        # torch pads both ends alike; Keras' "same" pads an even input at stride 2 on one end only
        # and so reads other pixels.
        if not any(width):
            return x
        return self.pad_layer(tuple((w, w) for w in width), dtype=self.dtype, name=name)(x)

    def conv(self, x, filters: int, kernel: int, name: str, stride=1, dilation=1):
        """Convolve with symmetric padding of dilation * (kernel // 2), without bias."""
        stride, dilation = self.spec.per_axis(stride), self.spec.per_axis(dilation)
        x = self.pad(x, tuple(d * (kernel // 2) for d in dilation), f"{name}_pad")
        return self.conv_layer(
            filters,
            kernel,
            strides=stride,
            dilation_rate=dilation,
            use_bias=False,
            kernel_initializer=keras.initializers.VarianceScaling(
                2.0, mode="fan_out", distribution="untruncated_normal"
            ),
            dtype=self.dtype,
            name=name,
        )(x)

    def norm(self, x, name: str):
        return layers.BatchNormalization(**BATCH_NORM, dtype=self.dtype, name=name)(x)

    def relu(self, x, name: str):
        return layers.ReLU(dtype=self.dtype, name=name)(x)


def _shortcut(graph: _Graph, x, filters: int, stride, prefix: str):
    strides = graph.spec.per_axis(stride)
    missing = filters - x.shape[-1]
    if missing == 0 and set(strides) == {1}:
        return x
    if graph.spec.shortcut == "B":
        x = graph.conv(x, filters, 1, f"{prefix}_downsample_0", stride=stride)
        return graph.norm(x, f"{prefix}_downsample_1")
    # Shortcut A as graph operations, not a layer of our own: those load without our package.
    x = x[(slice(None), *(slice(None, None, s) for s in strides), slice(None))]
    return ops.pad(x, [(0, 0)] * (graph.spec.rank + 1) + [(0, missing)])


def _basic_block(graph: _Graph, x, channels: int, stride, dilation, prefix: str):
    shortcut = _shortcut(graph, x, channels, stride, prefix)
    x = graph.conv(x, channels, 3, f"{prefix}_conv1", stride=stride, dilation=dilation)
    x = graph.relu(graph.norm(x, f"{prefix}_bn1"), f"{prefix}_relu1")
    x = graph.conv(x, channels, 3, f"{prefix}_conv2", dilation=dilation)
    x = graph.norm(x, f"{prefix}_bn2")
    x = layers.Add(dtype=graph.dtype, name=f"{prefix}_add")([x, shortcut])
    return graph.relu(x, f"{prefix}_relu2")


def _bottleneck_block(graph: _Graph, x, channels: int, stride, dilation, prefix: str):
    wide = channels * BOTTLENECK_EXPANSION
    shortcut = _shortcut(graph, x, wide, stride, prefix)
    x = graph.conv(x, channels, 1, f"{prefix}_conv1")
    x = graph.relu(graph.norm(x, f"{prefix}_bn1"), f"{prefix}_relu1")
    x = graph.conv(x, channels, 3, f"{prefix}_conv2", stride=stride, dilation=dilation)
    x = graph.relu(graph.norm(x, f"{prefix}_bn2"), f"{prefix}_relu2")
    x = graph.conv(x, wide, 1, f"{prefix}_conv3")
    x = graph.norm(x, f"{prefix}_bn3")
    x = layers.Add(dtype=graph.dtype, name=f"{prefix}_add")([x, shortcut])
    return graph.relu(x, f"{prefix}_relu3")


def resnet(spec: ModelSpec, dtype=None) -> keras.Model:
    """Build the backbone: from an image or volume to pooled features.

    Args:
        spec: the network; its input shape decides between 2D and 3D.
        dtype: a Keras dtype or dtype policy for every layer; None takes the global one.

    Returns:
        A functional model: input (N, *spec.input_shape) channels-last, output (N, features),
        512 features for depths below 50, 2048 from there on (at width 64). The stages' outputs are
        reachable by the names of their last layers (`layer1_1_relu2` and so on).

    Source:
        He et al. 2016, table 1.
    """
    graph = _Graph(spec, dtype)
    image = keras.Input(spec.input_shape, name="image", dtype="float32")
    x = graph.conv(image, spec.width, 7, "conv1", stride=spec.stem_stride)
    x = graph.relu(graph.norm(x, "bn1"), "relu")
    # Zeros stand in for torch's -inf: after a ReLU they never win against a real value.
    x = graph.pad(x, (1,) * spec.rank, "maxpool_pad")
    x = graph.max_pool_layer(3, strides=2, dtype=dtype, name="maxpool")(x)
    block = _bottleneck_block if spec.is_bottleneck else _basic_block
    stages = zip(STAGE_BLOCKS[spec.depth], spec.strides, spec.dilations, strict=True)
    for stage, (num_blocks, stride, dilation) in enumerate(stages):
        for position in range(num_blocks):
            x = block(
                graph,
                x,
                spec.width * 2**stage,
                stride if position == 0 else 1,
                dilation,
                f"layer{stage + 1}_{position}",
            )
    pool_layer = getattr(layers, f"GlobalAveragePooling{spec.rank}D")
    x = pool_layer(dtype=dtype, name="avgpool")(x)
    return keras.Model(image, x, name=f"resnet{spec.depth}_{spec.rank}d")
