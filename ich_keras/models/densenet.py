"""DenseNet, of stock Keras layers only.

Stages are called layer1 to layer4, as in the other networks, so that freezing, recomputation and
heat maps need no words of their own. A stage begins with the transition that halves its input and
ends with the last dense layer; the last stage includes the final normalisation. From there on the
names are torch's: `features.denseblock2.denselayer1.conv1` is `layer2_denselayer1_conv1`, and
`features.transition1.norm` is `layer2_transition1_norm`.

Source: Huang et al., Densely Connected Convolutional Networks (2017), DenseNet-BC; torchvision's
densenet.py for what the paper leaves open.
"""

from typing import Any

import keras
from keras import layers

from ich_keras.errors import UsageError
from ich_keras.models.architectures import ARCHITECTURES
from ich_keras.models.layers import DATA_FORMAT, DTYPE, Layers, functional
from ich_keras.models.spec import ModelSpec

BOTTLENECK_FACTOR = 4  # channels of the 1x1 convolution, in growths


def _dense_layer(graph: Layers, x: Any, prefix: str) -> Any:
    """Append new channels that are computed from all that came before."""
    growth = graph.spec.growth
    new = graph.relu(graph.norm(x, f"{prefix}_norm1"), f"{prefix}_relu1")
    new = graph.conv(new, BOTTLENECK_FACTOR * growth, 1, f"{prefix}_conv1")
    new = graph.relu(graph.norm(new, f"{prefix}_norm2"), f"{prefix}_relu2")
    new = graph.conv(new, growth, 3, f"{prefix}_conv2")
    return layers.Concatenate(dtype=graph.dtype, name=f"{prefix}_concat")([x, new])


def _transition(graph: Layers, x: Any, prefix: str) -> Any:
    """Halve channels, rows and columns."""
    x = graph.relu(graph.norm(x, f"{prefix}_norm"), f"{prefix}_relu")
    x = graph.conv(x, x.shape[-1] // 2, 1, f"{prefix}_conv")
    return layers.AveragePooling2D(
        2, data_format=DATA_FORMAT, dtype=graph.dtype, name=f"{prefix}_pool"
    )(x)


def densenet(spec: ModelSpec, dtype: Any = DTYPE) -> keras.Model:
    """Build the backbone: from an image to pooled features.

    Args:
        spec: the network, of the architecture "densenet".
        dtype: a Keras dtype or dtype policy for every layer, whatever the global one.

    Returns:
        A functional model: input (N, *spec.input_shape) channels-last (HU where the network has
        learnable windows), output (N, features), 1024 features for depth 121 at width 64.

    Raises:
        UsageError: the specification is of another architecture.

    >>> densenet(ModelSpec((32, 32, 3), 21, width=8, architecture="densenet")).output.shape
    (None, 16)
    """
    if spec.architecture != "densenet":
        raise UsageError(
            f"{ARCHITECTURES[spec.architecture].title} is no DenseNet.",
            "`ich_keras.models.backbone` builds all of them.",
        )
    # torchvision scales DenseNet's initial kernels by what enters them.
    graph = Layers(spec, dtype, fan="fan_in")
    image = keras.Input(spec.input_shape, name="image", dtype="float32")
    x = graph.conv(graph.windowed(image), spec.width, spec.stem_kernel, "conv0", spec.stem_stride)
    x = graph.relu(graph.norm(x, "norm0"), "relu")
    assert spec.pool_kernel is not None  # the specification has refused it
    x = graph.max_pool(x, spec.pool_kernel, spec.pool_stride)
    for stage, num_layers in enumerate(spec.stage_blocks, 1):
        if stage > 1:
            x = _transition(graph, x, f"layer{stage}_transition{stage - 1}")
        for number in range(1, num_layers + 1):
            x = _dense_layer(graph, x, f"layer{stage}_denselayer{number}")
    x = graph.relu(graph.norm(x, f"layer{stage}_norm5"), f"layer{stage}_relu5")
    x = graph.mean(x, "avgpool")
    return functional(image, x, f"densenet{spec.depth}_2d")
