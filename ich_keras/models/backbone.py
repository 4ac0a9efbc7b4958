"""The backbone of any network, by its architecture."""

from typing import Any

import keras

from ich_keras.models.densenet import densenet
from ich_keras.models.layers import DTYPE
from ich_keras.models.resnet import resnet
from ich_keras.models.spec import ModelSpec


def backbone(spec: ModelSpec, dtype: Any = DTYPE) -> keras.Model:
    """Build a network up to its pooled features.

    Args:
        spec: the network.
        dtype: a Keras dtype or dtype policy for every layer, whatever the global one.

    Returns:
        A functional model: input (N, *spec.input_shape) channels-last, output
        (N, spec.num_features).

    >>> backbone(ModelSpec((32, 32, 3), 14, width=4, architecture="seresnext")).output.shape
    (None, 128)
    """
    build = densenet if spec.architecture == "densenet" else resnet
    return build(spec, dtype)
