"""A classifier cut at some features: the model that gives these, and its logits."""

from typing import Any

import keras

from ich_keras.errors import UsageError
from ich_keras.models.graph import UnknownStep, read_graph
from ich_keras.models.layers import functional
from ich_keras.models.resnet import feature_tensors
from ich_keras.models.spec import FEATURES
from ich_keras.models.windows import NORMALISED

_STAGES = ("layer4", "layer3", "layer2")
_ACTIVATIONS = ("sigmoid", "softmax")


def logits_of_model(model: keras.Model) -> Any:
    """Return the symbolic tensor of a classifier's logits.

    Raises:
        UnknownStep: the model cannot be read, or ends in neither logits nor probabilities.
    """
    graph = read_graph(model)
    last = graph.steps[-1]
    if len(graph.outputs) == 1 and last.kind in _ACTIVATIONS:
        return last.layer.input
    if len(graph.outputs) == 1 and last.kind == "dense":
        return model.output
    raise UnknownStep(f"{model.name} ends in {last.name}, not in a dense layer")


def last_stage(model: keras.Model, least_cells: int) -> str:
    """Return the last stage whose features have enough cells along rows and columns.

    Args:
        model: with stages called "layer2" to "layer4".
        least_cells: how many are enough.

    Returns:
        Its name; "layer2" where none has as many, "layer3" where the input may have any size.

    Raises:
        UsageError: the network has no such stages.

    >>> from ich_keras.models.classifier import classifier
    >>> from ich_keras.models.spec import ModelSpec
    >>> last_stage(classifier(ModelSpec((96, 96, 1), depth=10, width=4)), 10)
    'layer2'
    """
    known = feature_tensors(model)
    absent = [name for name in _STAGES if name not in known]
    if absent:
        raise UsageError(
            f"{model.name} has no features called {absent[-1]!r}.",
            "Give the name of a layer, as `model.summary()` has it, whose maps are wanted.",
        )
    for name in _STAGES:
        cells = known[name].shape[-3:-1]
        if None in cells:
            return "layer3"
        if min(cells) >= least_cells:
            return name
    return _STAGES[-1]


def cut_model(model: keras.Model, layer: str | None) -> keras.Model:
    """Return a model of the same layers that gives features and logits.

    Args:
        model: a classifier that `ich_keras.models.graph` can read, with logits or probabilities.
        layer: one of `FEATURES` before the pooling, or the name of a layer; None takes the input.

    Returns:
        A functional model with the outputs [features, logits].

    Raises:
        UsageError: no such features, or they have no rows and columns.
        UnknownStep: see `logits_of_model`.

    >>> from ich_keras.models.classifier import classifier
    >>> from ich_keras.models.spec import ModelSpec
    >>> model = classifier(ModelSpec((32, 32, 1), depth=10, width=4))
    >>> [output.shape for output in cut_model(model, "layer3").outputs]
    [(None, 2, 2, 16), (None, 6)]
    """
    logits = logits_of_model(model)
    feature = model.input if layer is None else _feature(model, layer)
    return functional(model.input, [feature, logits], model.name)


def behind_windows(model: keras.Model) -> tuple[keras.Model | None, keras.Model]:
    """Cut a network with learnable windows in two, behind the windows.

    Returns:
        (from HU to normalised windows; from these to what the network gives). (None, the network)
        where it has no such windows.

    >>> from ich_keras.models.classifier import classifier
    >>> from ich_keras.models.spec import ModelSpec
    >>> spec = ModelSpec((32, 32, 1), depth=10, width=4, windows="linear")
    >>> [part.input_shape for part in behind_windows(classifier(spec))]
    [(None, 32, 32, 1), (None, 32, 32, 3)]
    """
    layer = next((layer for layer in model.layers if layer.name == NORMALISED), None)
    if layer is None:
        return None, model
    first = functional(model.input, layer.output, model.name)
    return first, functional(layer.output, model.output, model.name)


def _feature(model: keras.Model, name: str) -> Any:
    known = feature_tensors(model)
    layers = {layer.name: layer for layer in model.layers}
    if name in known:
        found = known[name]
    elif name in layers:
        found = layers[name].output
    else:
        shown = ", ".join(n for n in FEATURES[:-1] if n in known) or ", ".join(layers)
        raise UsageError(
            f"{model.name} has no features called {name!r}; expected one of {shown}.",
            "The name of a layer (`model.summary()`) is taken, too.",
        )
    if len(found.shape) != len(model.input.shape):
        raise UsageError(
            f"{name!r} of {model.name} gives {tuple(found.shape[1:])}: no rows and columns are"
            " left.",
            "Take features before the pooling, such as 'layer4'.",
        )
    return found
