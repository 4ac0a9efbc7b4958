"""One ResNet builder for 2D and 3D, of stock Keras layers only.

Layer names are the weight map: torch's module path with "." written as "_" (Keras' torch backend
refuses dots in names), so `layer2.0.downsample.1` is `layer2_0_downsample_1`. That is why they are
not prettier.

Source: He et al., Deep Residual Learning for Image Recognition (2016); torchvision's variant with
the stride on the 3x3 convolution of a bottleneck; Chen et al., Med3D (2019) for the dilated one;
Tran et al., A Closer Look at Spatiotemporal Convolutions (2018) for the video networks; Xie et al.,
Aggregated Residual Transformations (2017) and Hu et al., Squeeze-and-Excitation Networks (2018) for
SE-ResNeXt, with timm's names.
"""

import re
from typing import Any

import keras
from keras import layers, ops

from ich_keras.errors import UsageError
from ich_keras.models.architectures import ARCHITECTURES
from ich_keras.models.layers import DTYPE, Layers, functional
from ich_keras.models.spec import BOTTLENECK_EXPANSION, FEATURES, ModelSpec, PerAxis

# torchvision writes 45 in R(2+1)D's stem, not its formula for the blocks.
FACTORISED_STEM_CHANNELS, FACTORISED_STEM_WIDTH = 45, 64
RESNEXT_WIDENING = 2  # of the grouped convolutions against a ResNet's (Xie et al. 2017, 32x4d)
SQUEEZE_REDUCTION, SQUEEZE_DIVISOR = 16, 8


class _Graph(Layers):
    """The layers of a ResNet, whose convolutions may be split in two."""

    def names(self, prefix: str, number: int | str) -> tuple[str, str]:
        """Return torch's names of a block's convolution and of its normalisation."""
        if self.spec.naming == "video":
            return f"{prefix}_conv{number}_0", f"{prefix}_conv{number}_1"
        return f"{prefix}_conv{number}", f"{prefix}_bn{number}"

    def main_conv(
        self, x: Any, filters: int, stage: int, name: str, middle: int, stride: PerAxis = 1
    ) -> Any:
        """Convolve with the stage's kernel, whole or split into rows-and-columns and slices."""
        kernel, dilation = self.spec.kernels[stage], self.spec.dilations[stage]
        if not self.spec.factorised:
            return self.conv(x, filters, kernel, name, stride, dilation, self.spec.groups)
        names = (f"{name}_0", f"{name}_1", f"{name}_3")
        return self.factorised_conv(x, filters, kernel, names, middle, stride, dilation)

    def factorised_conv(
        self,
        x: Any,
        filters: int,
        kernel: PerAxis,
        names: tuple[str, str, str],
        middle: int,
        stride: PerAxis = 1,
        dilation: PerAxis = 1,
    ) -> Any:
        """Convolve within slices, normalise, and convolve across slices."""
        settings = [self.spec.per_axis(value) for value in (kernel, stride, dilation)]
        within = [(1, *values[1:]) for values in settings]
        across = [(values[0], 1, 1) for values in settings]
        spatial, norm, temporal = names
        x = self.conv(x, middle, within[0], spatial, within[1], within[2])
        x = self.relu(self.norm(x, norm), f"{norm}_relu")
        return self.conv(x, filters, across[0], temporal, across[1], across[2])


def _stem(graph: _Graph, x: Any) -> Any:
    spec = graph.spec
    if spec.naming == "image":
        x = graph.conv(x, spec.width, spec.stem_kernel, "conv1", spec.stem_stride)
        x = graph.relu(graph.norm(x, "bn1"), "relu")
    elif spec.factorised:
        middle = max(1, FACTORISED_STEM_CHANNELS * spec.width // FACTORISED_STEM_WIDTH)
        names = ("stem_0", "stem_1", "stem_3")
        x = graph.factorised_conv(x, spec.width, spec.stem_kernel, names, middle, spec.stem_stride)
        x = graph.relu(graph.norm(x, "stem_4"), "relu")
    else:
        x = graph.conv(x, spec.width, spec.stem_kernel, "stem_0", spec.stem_stride)
        x = graph.relu(graph.norm(x, "stem_1"), "relu")
    if spec.pool_kernel is None:
        return x
    return graph.max_pool(x, spec.pool_kernel, spec.pool_stride)


def _shortcut(graph: _Graph, x: Any, filters: int, stride: PerAxis, prefix: str) -> Any:
    strides = graph.spec.per_axis(stride)
    missing = filters - x.shape[-1]
    if missing == 0 and set(strides) == {1}:
        return x
    if graph.spec.shortcut == "B":
        x = graph.conv(x, filters, 1, f"{prefix}_downsample_0", stride=stride)
        return graph.norm(x, f"{prefix}_downsample_1")
    # Shortcut A as graph operations, not a layer of our own: those load without our package.
    if graph.spec.detach_shortcut:
        x = ops.stop_gradient(x)
    x = x[(slice(None), *(slice(None, None, s) for s in strides), slice(None))]
    return ops.pad(x, [(0, 0)] * (graph.spec.rank + 1) + [(0, missing)])


def _middle_channels(before: int, after: int) -> int:
    # As many parameters as the unsplit 3x3x3 kernel (Tran et al. 2018, section 3.5).
    return before * after * 27 // (before * 9 + 3 * after)


def _basic_block(
    graph: _Graph, x: Any, channels: int, stage: int, stride: PerAxis, prefix: str
) -> Any:
    shortcut = _shortcut(graph, x, channels, stride, prefix)
    middle = _middle_channels(x.shape[-1], channels)
    (conv1, norm1), (conv2, norm2) = graph.names(prefix, 1), graph.names(prefix, 2)
    x = graph.main_conv(x, channels, stage, conv1, middle, stride)
    x = graph.relu(graph.norm(x, norm1), f"{prefix}_relu1")
    x = graph.main_conv(x, channels, stage, conv2, middle)
    x = graph.norm(x, norm2)
    x = layers.Add(dtype=graph.dtype, name=f"{prefix}_add")([x, shortcut])
    return graph.relu(x, f"{prefix}_relu2")


def _bottleneck_block(
    graph: _Graph, x: Any, channels: int, stage: int, stride: PerAxis, prefix: str
) -> Any:
    wide = channels * BOTTLENECK_EXPANSION
    shortcut = _shortcut(graph, x, wide, stride, prefix)
    if graph.spec.architecture == "seresnext":
        channels *= RESNEXT_WIDENING
    middle = _middle_channels(x.shape[-1], channels)
    (conv1, norm1), (conv2, norm2), (conv3, norm3) = (graph.names(prefix, n) for n in (1, 2, 3))
    x = graph.conv(x, channels, 1, conv1)
    x = graph.relu(graph.norm(x, norm1), f"{prefix}_relu1")
    x = graph.main_conv(x, channels, stage, conv2, middle, stride)
    x = graph.relu(graph.norm(x, norm2), f"{prefix}_relu2")
    x = graph.conv(x, wide, 1, conv3)
    x = graph.norm(x, norm3)
    if graph.spec.architecture == "seresnext":
        x = _squeeze_excite(graph, x, f"{prefix}_se")
    x = layers.Add(dtype=graph.dtype, name=f"{prefix}_add")([x, shortcut])
    return graph.relu(x, f"{prefix}_relu3")


def _squeeze_excite(graph: _Graph, x: Any, prefix: str) -> Any:
    """Weigh the channels by what they are on average (Hu et al. 2018, section 3)."""
    gate = graph.mean(x, f"{prefix}_avgpool", keepdims=True)
    # The 1x1 convolutions are timm's; the paper calls the same thing fully connected layers.
    gate = graph.conv(gate, squeezed(x.shape[-1]), 1, f"{prefix}_fc1", use_bias=True)
    gate = graph.relu(gate, f"{prefix}_relu")
    gate = graph.conv(gate, x.shape[-1], 1, f"{prefix}_fc2", use_bias=True)
    gate = layers.Activation("sigmoid", dtype=graph.dtype, name=f"{prefix}_gate")(gate)
    return layers.Multiply(dtype=graph.dtype, name=f"{prefix}_scale")([x, gate])


def squeezed(channels: int) -> int:
    """Return the channels between the two layers of a squeeze and excitation.

    A sixteenth (Hu et al. 2018), as a multiple of eight (timm).

    >>> squeezed(256), squeezed(64)
    (16, 8)
    """
    eighths = (channels // SQUEEZE_REDUCTION + SQUEEZE_DIVISOR // 2) // SQUEEZE_DIVISOR
    return max(1, eighths) * SQUEEZE_DIVISOR


def resnet(spec: ModelSpec, dtype: Any = DTYPE) -> keras.Model:
    """Build the backbone of a ResNet or SE-ResNeXt: from an image or volume to pooled features.

    Args:
        spec: the network; its input shape decides between 2D and 3D.
        dtype: a Keras dtype or dtype policy for every layer, whatever the global one.

    Returns:
        A functional model: input (N, *spec.input_shape) channels-last (HU where the network has
        learnable windows), output (N, features), 512 features for depths below 50, 2048 from there
        on (at width 64). `feature_model` taps what lies between.

    Raises:
        UsageError: the specification is of another architecture.

    Source:
        He et al. 2016, table 1; Xie et al. 2017, table 1 (32x4d); Hu et al. 2018, table 1.

    >>> resnet(ModelSpec((32, 32, 1), depth=10, width=4)).output.shape
    (None, 32)
    """
    if spec.architecture not in ("resnet", "seresnext"):
        raise UsageError(
            f"{ARCHITECTURES[spec.architecture].title} is no ResNet.",
            "`ich_keras.models.backbone` builds all of them.",
        )
    graph = _Graph(spec, dtype)
    image = keras.Input(spec.input_shape, name="image", dtype="float32")
    x = _stem(graph, graph.windowed(image))
    block = _bottleneck_block if spec.is_bottleneck else _basic_block
    for stage, num_blocks in enumerate(spec.stage_blocks):
        for position in range(num_blocks):
            x = block(
                graph,
                x,
                spec.width * 2**stage,
                stage,
                spec.strides[stage] if position == 0 else 1,
                f"layer{stage + 1}_{position}",
            )
    x = graph.mean(x, "avgpool")
    return functional(image, x, f"{spec.architecture}{spec.depth}_{spec.rank}d")


def feature_model(model: keras.Model, names: tuple[str, ...] = FEATURES) -> keras.Model:
    """Tap a network of ours between its stages.

    Args:
        model: from `resnet`, `build_backbone` or `build_classifier`; its layers are shared.
        names: one or several of `FEATURES`: "stem" (after its ReLU), "maxpool", "layer1" to
            "layer4", "avgpool"; for a classifier also "fc" (the logits).

    Returns:
        A functional model with the same input that returns a dictionary: name -> features
        channels-last (N, ..., channels), pooled ones (N, channels).

    Raises:
        UsageError: a name the network does not have.

    >>> maps = feature_model(resnet(ModelSpec((32, 32, 1), depth=10, width=4)), ("layer2",))
    >>> maps.output["layer2"].shape
    (None, 4, 4, 8)
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    last = feature_tensors(model)
    unknown = [name for name in names if name not in last]
    if unknown or not names:
        raise UsageError(
            f"{model.name} has no feature called {', '.join(map(repr, unknown)) or '(none given)'};"
            f" it has {', '.join(last)}."
        )
    return functional(model.input, {name: last[name] for name in names}, model.name)


def feature_tensors(model: keras.Model) -> dict[str, Any]:
    """Return the symbolic tensors of a network's `FEATURES`, and of its logits ("fc"), by name."""
    last: dict[str, Any] = {}
    for layer in model.layers:
        stage = re.match(r"layer\d+(?=_)", layer.name)
        name = "stem" if layer.name == "relu" else stage[0] if stage else layer.name
        if name in (*FEATURES, "fc"):
            last[name] = layer.output
    return last
