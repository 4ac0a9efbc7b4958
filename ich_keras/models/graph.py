"""A functional model read as a flat list of steps, for code that runs it another way.

Reading imports no backend and changes nothing. Padding layers are merged into the convolution or
pooling that follows them, which pads by itself.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import keras
from keras import layers

from ich_keras.keras_private import nodes_by_depth, operation_kind

CONVOLUTIONS = (layers.Conv2D, layers.Conv3D)
PADDINGS = (layers.ZeroPadding2D, layers.ZeroPadding3D)
MAX_POOLINGS = (layers.MaxPooling2D, layers.MaxPooling3D)
AVERAGE_POOLINGS = (layers.AveragePooling2D, layers.AveragePooling3D)
MEANS = (layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D)


class UnknownStep(Exception):
    """The model contains something that cannot be read as a step; the text says what."""


@dataclass(frozen=True)
class Step:
    """One operation of the flat list.

    Args:
        kind: "conv", "batch_norm", "group_norm", "relu", "max_pool", "avg_pool", "mean" (of all
            positions), "add", "multiply", "concat" (of channels), "dropout", "dense", "sigmoid",
            "softmax" (of the last axis), "gate" (a sigmoid before the head), "pad", "channels"
            (zero channels appended), "subsample" (every n-th position), "detach", "clip" (to 0 and
            an upper limit), "rescale" (by one number) or "standardise" (channels by given
            numbers).
        name: of the layer or operation.
        layer: the Keras layer or operation.
        sources: numbers of the values it reads; 0 is the model's input.
        target: number of the value it makes.
        dtype: Keras' name of the type it computes in.
        amounts: per axis: padding of "conv" (symmetric), "max_pool" (symmetric) and "pad"
            (before, after); steps of "subsample"; channels added by "channels" (one number).
        norm: the batch normalisation folded into a "conv" (`fold_norms`); None without one.
    """

    kind: str
    name: str
    layer: Any
    sources: tuple[int, ...]
    target: int
    dtype: str
    amounts: tuple[Any, ...] = ()
    norm: Any = None


@dataclass(frozen=True)
class Graph:
    """A model as a list of steps in an order that works.

    Args:
        steps: what to do.
        outputs: numbers of the values that the model gives, flat.
        readers: number of a value -> how many steps and outputs read it.
    """

    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    readers: dict[int, int]

    @property
    def num_values(self) -> int:
        """One more than the highest number of a value."""
        return 1 + max(step.target for step in self.steps)


def read_graph(model: keras.Model) -> Graph:
    """Read a functional model of one input.

    Args:
        model: functional, channels-last.

    Raises:
        UnknownStep: a layer, a setting of a layer, or a structure that is not covered.

    >>> image = keras.Input((8, 8, 3))
    >>> x = layers.Conv2D(4, 3, use_bias=False)(layers.ZeroPadding2D(1)(image))
    >>> [(step.kind, step.amounts) for step in read_graph(keras.Model(image, x)).steps]
    [('conv', (1, 1))]
    """
    nodes = nodes_by_depth(model)
    if nodes is None or len(model.inputs) != 1:
        raise UnknownStep("the model is not a functional one with a single input")
    numbers = {id(model.inputs[0]): 0}
    steps: list[Step] = []
    for depth in sorted(nodes, reverse=True):
        for node in nodes[depth]:
            if node.is_input:
                continue
            sources = tuple(numbers[id(tensor)] for tensor in node.input_tensors)
            if len(node.outputs) != 1:
                raise UnknownStep(f"{node.operation.name} has {len(node.outputs)} outputs")
            numbers[id(node.outputs[0])] = len(numbers)
            steps.append(_step(node, sources, numbers[id(node.outputs[0])]))
    outputs = tuple(numbers[id(tensor)] for tensor in model.outputs)
    return _with_padding_inside(steps, outputs)


def _step(node: Any, sources: tuple[int, ...], target: int) -> Step:
    operation = node.operation
    if isinstance(operation, layers.Layer):
        kind, amounts = _layer_kind(node)
        dtype = operation.compute_dtype
    else:
        kind, amounts = _operation_kind(node)
        dtype = node.outputs[0].dtype
    return Step(kind, operation.name, operation, sources, target, dtype, amounts)


def _require(is_met: bool, layer: Any, what: str) -> None:
    if not is_met:
        raise UnknownStep(f"layer {layer.name} ({type(layer).__name__}) {what}")


def _layer_kind(node: Any) -> tuple[str, tuple[Any, ...]]:
    layer = node.operation
    kind = type(layer)
    ranks = {len(tensor.shape) for tensor in node.input_tensors}
    _require(getattr(layer, "activity_regularizer", None) is None, layer, "regularises outputs")
    _require(layer.quantization_mode is None, layer, "is quantised")
    _require("call" not in vars(layer), layer, "has a call of its own")
    if kind in CONVOLUTIONS:
        _require(layer.padding == "valid", layer, f"pads {layer.padding!r}")
        _require(layer.data_format == "channels_last", layer, "is not channels-last")
        _require(layer.activation is keras.activations.linear, layer, "has an activation")
        _require(not getattr(layer, "lora_enabled", False), layer, "has LoRA weights")
        _require(layer.groups == 1 or kind is layers.Conv2D, layer, "has groups in 3D")
        return "conv", (0,) * len(layer.kernel_size)
    if kind is layers.Dense:
        _require(layer.activation is keras.activations.linear, layer, "has an activation")
        _require(not getattr(layer, "lora_enabled", False), layer, "has LoRA weights")
        # Values are channels-first here: the last axis would be the columns.
        _require(ranks == {2}, layer, "works on more than one axis")
        return "dense", ()
    if kind is layers.BatchNormalization:
        _require(layer.axis == -1 and layer.scale and layer.center, layer, "is not the usual kind")
        return "batch_norm", ()
    if kind is layers.GroupNormalization:
        _require(layer.axis == -1 and layer.scale and layer.center, layer, "is not the usual kind")
        return "group_norm", ()
    if kind is layers.ReLU:
        _require(not layer.negative_slope and not layer.threshold, layer, "is not a plain ReLU")
        return "relu" if layer.max_value is None else "clip", ()
    if kind is layers.Rescaling:
        numbers = (layer.scale, layer.offset)
        are_single = all(isinstance(number, int | float) for number in numbers)
        _require(are_single, layer, "scales by more than one number")
        return "rescale", ()
    if kind is layers.Normalization:
        is_given = layer.input_mean is not None and tuple(layer.axis) == (-1,) and not layer.invert
        _require(is_given, layer, "does not normalise channels by given numbers")
        return "standardise", ()
    if kind in MAX_POOLINGS:
        _require(layer.padding == "valid", layer, f"pads {layer.padding!r}")
        _require(layer.data_format == "channels_last", layer, "is not channels-last")
        return "max_pool", (0,) * len(layer.pool_size)
    if kind in AVERAGE_POOLINGS:
        # Padding counts as zeros in torch, and not at all in Keras.
        _require(layer.padding == "valid", layer, f"pads {layer.padding!r}")
        _require(layer.data_format == "channels_last", layer, "is not channels-last")
        return "avg_pool", (0,) * len(layer.pool_size)
    if kind in MEANS:
        _require(layer.data_format == "channels_last", layer, "is not channels-last")
        return "mean", ()
    if kind in PADDINGS:
        _require(layer.data_format == "channels_last", layer, "is not channels-last")
        return "pad", tuple(layer.padding)
    if kind is layers.Dropout:
        # With a seed Keras draws from a generator of the layer's own, not from the backend's.
        _require(layer.seed is None and layer.noise_shape is None, layer, "has a seed or shape")
        return "dropout", ()
    if kind is layers.Add:
        return "add", ()
    if kind is layers.Multiply:
        _require(len(ranks) == 1, layer, "multiplies values of different ranks")
        return "multiply", ()
    if kind is layers.Concatenate:
        _require(layer.axis in (-1, max(ranks) - 1), layer, "joins no channels")
        return "concat", ()
    if kind is layers.Activation:
        if layer.activation is keras.activations.softmax:
            return "softmax", ()
        _require(layer.activation is keras.activations.sigmoid, layer, "is no sigmoid or softmax")
        return ("sigmoid" if ranks == {2} else "gate"), ()
    raise UnknownStep(f"layer {layer.name} is a {kind.__name__}")


def _operation_kind(node: Any) -> tuple[str, tuple[Any, ...]]:
    """Read what shortcut A is made of (`ich_keras.models.resnet._shortcut`)."""
    operation = node.operation
    kind = operation_kind(operation)
    if kind == "StopGradient":
        return "detach", ()
    if kind == "GetItem":
        key = node.arguments.args[1]
        full = slice(None)
        plain = (
            isinstance(key, tuple)
            and len(key) == len(node.input_tensors[0].shape)
            and key[0] == key[-1] == full
            and all(isinstance(k, slice) and k.start is None and k.stop is None for k in key)
        )
        if plain:
            return "subsample", tuple(k.step or 1 for k in key[1:-1])
    if kind == "Pad" and operation.mode == "constant" and not _constant(node):
        *before, last = (tuple(pair) for pair in operation.pad_width)
        if set(before) == {(0, 0)} and last[0] == 0:
            return "channels", (last[1],)
    raise UnknownStep(f"operation {operation.name} ({type(operation).__name__})")


def _constant(node: Any) -> float:
    return node.arguments.kwargs.get("constant_values") or 0.0


def _with_padding_inside(steps: list[Step], outputs: tuple[int, ...]) -> Graph:
    """Let convolutions pad by themselves, and max pooling too where a ReLU comes before."""
    readers = _count_readers(steps, outputs)
    made = {step.target: step for step in steps}
    inside: set[int] = set()
    kept: list[Step] = []
    for step in steps:
        pad = made.get(step.sources[0])
        if (
            step.kind in ("conv", "max_pool")
            and pad is not None
            and pad.kind == "pad"
            and readers[pad.target] == 1
            and all(before == after for before, after in pad.amounts)
            and (step.kind == "conv" or _pools_like_torch(step, pad, made.get(pad.sources[0])))
        ):
            inside.add(pad.target)
            step = replace(
                step, sources=pad.sources, amounts=tuple(before for before, _ in pad.amounts)
            )
        kept.append(step)
    left = tuple(step for step in kept if step.target not in inside)
    return Graph(left, outputs, _count_readers(left, outputs))


def _pools_like_torch(step: Step, pad: Step, before: Step | None) -> bool:
    # torch pads with -inf, at most half the kernel; the graph with zeros: alike after a ReLU.
    small = all(2 * p[0] <= k for p, k in zip(pad.amounts, step.layer.pool_size, strict=True))
    return small and before is not None and before.kind == "relu"


def fold_norms(graph: Graph) -> Graph:
    """Fold batch normalisation into the convolution before it, where nothing else reads that."""
    convolutions = {step.target: step for step in graph.steps if step.kind == "conv"}
    steps: list[Step] = []
    taken: set[int] = set()
    for step in graph.steps:
        conv = convolutions.get(step.sources[0])
        if step.kind == "batch_norm" and conv and graph.readers[conv.target] == 1:
            taken.add(conv.target)
            step = replace(conv, target=step.target, norm=step.layer)
        steps.append(step)
    kept = tuple(step for step in steps if step.target not in taken)
    return Graph(kept, graph.outputs, _count_readers(kept, graph.outputs))


def _count_readers(steps: Iterable[Step], outputs: tuple[int, ...]) -> dict[int, int]:
    counts = Counter(outputs)
    counts.update(source for step in steps for source in step.sources)
    return dict(counts)
