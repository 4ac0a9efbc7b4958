"""From pooled features to probabilities, and how a classifier is compiled."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import layers
from keras.activations import softmax

from ich_keras.errors import UsageError
from ich_keras.labels import SIX, LabelSet, label_set
from ich_keras.models.backbone import backbone
from ich_keras.models.layers import DTYPE, functional
from ich_keras.models.loss import make_loss
from ich_keras.models.optimizer import Adam, learning_rate_schedule
from ich_keras.models.options import (
    FREEZABLE,
    PRECISIONS,
    LossSettings,
    require_choice,
    require_in_range,
)
from ich_keras.models.presets import preset
from ich_keras.models.spec import ModelSpec
from ich_keras.models.steps import built_precision, choose_step
from ich_keras.models.weights import HEAD, LABELS_OF_MODEL, load_weights
from ich_keras.models.weights_lookup import find_weights
from ich_keras.models.window_layers import keep_from_decay, window_layer
from ich_keras.models.windows import WINDOWS

PROBABILITIES = "probabilities"


def classifier(
    spec: ModelSpec,
    output: str = "probabilities",
    precision: str | None = None,
    labels: LabelSet = SIX,
) -> keras.Model:
    """Build the network with its head: backbone, dropout, dense layer, probabilities or logits.

    Args:
        spec: the network.
        output: "probabilities" (sigmoids, or a softmax of exclusive labels; what users build and
            save) or "logits" (what training uses, with the same weights). Both are float32
            (N, labels) in the order of `labels`.
        labels: what the head answers.
        precision: "float32", "bfloat16" or "float16"; None is float32, whatever Keras' global
            policy. The head computes in float32 in any case.

    Returns:
        A functional `keras.Model` of stock layers: a saved `.keras` loads without this package.
        On torch it takes the fast steps; see `choose_step`.

    Raises:
        UsageError: unknown output or precision.

    >>> model = classifier(ModelSpec((32, 32, 1), depth=10, width=4), output="logits")
    >>> model.output.shape
    (None, 6)
    """
    require_choice("output", output)
    if precision is not None:
        require_choice("precision", precision)
    body = backbone(spec, dtype=PRECISIONS[precision or "float32"])
    x = body.output
    if spec.dropout:
        x = layers.Dropout(spec.dropout, dtype=DTYPE, name="dropout")(x)
    x = layers.Dense(len(labels), dtype=DTYPE, name=HEAD)(x)
    model = functional(body.input, x, f"{body.name}_classifier")
    if output == "probabilities":
        return with_probabilities(model, labels)
    return _called(choose_step(model), labels)


def with_probabilities(model: keras.Model, labels: LabelSet | None = None) -> keras.Model:
    """Return a model that shares all layers of a logits model and ends in probabilities.

    Args:
        model: from `classifier`.
        labels: of its head; None takes `labels_of`.
    """
    labels = labels or labels_of(model)
    activation = "softmax" if labels.exclusive else "sigmoid"
    x = layers.Activation(activation, dtype=DTYPE, name=PROBABILITIES)(model.output)
    return _called(choose_step(functional(model.input, x, model.name)), labels)


def _called(model: keras.Model, labels: LabelSet) -> keras.Model:
    setattr(model, LABELS_OF_MODEL, labels)
    return model


def labels_of(model: keras.Model) -> LabelSet:
    """Return the labels that a network was built with.

    A model that was saved and loaded no longer has them. It then answers the six if it has six
    outputs, and others without names; exclusive ones if it ends in a softmax.
    """
    found = getattr(model, LABELS_OF_MODEL, None)
    if isinstance(found, LabelSet):
        return found
    number = int(model.output_shape[-1])
    last = model.layers[-1]
    is_softmax = isinstance(last, layers.Activation) and last.activation is softmax
    if number == len(SIX) and not is_softmax:
        return SIX
    return label_set(number, exclusive=is_softmax)


def build_classifier(
    name: str,
    weights: str | None = None,
    input_shape: tuple[int | None, ...] | None = None,
    output: str = "probabilities",
    precision: str | None = None,
    norm: str = "batch",
    labels: LabelSet | Sequence[str] | int | None = None,
    exclusive: bool = False,
    windows: str | None = None,
) -> keras.Model:
    """Build a preset with its head: RSNA's six labels, or your own.

    Keras' global settings (keras.json, `keras.config`) do not change it: every layer names its data
    format, its types and its epsilon. Channels come last, and `precision` decides which layers
    compute in which type. The one exception is floatx: `compile` and `fit` accept only float32,
    and `evaluate` and `predict` refuse float16 and bfloat16, because Keras would round their
    inputs.

    Args:
        name: a preset, such as "resnet18_2d".
        weights: a `.weights.h5` file of the same network, with or without a head; or the name of
            converted weights ("imagenet", "torchvision_resnet18", ...; see `find_weights`). None
            starts from random weights.
        input_shape: (rows, columns, channels) or (slices, rows, columns, channels) in place of
            the preset's.
        output: "probabilities" or "logits".
        precision: see `classifier`.
        norm: "batch"; "frozen" (the statistics of the weights) or "group" for batches of one
            volume.
        labels: names of the outputs, or their number; None takes RSNA's six (`ich_keras.LABELS`).
        exclusive: exactly one label is true in each sample: a softmax, and its loss.
        windows: "linear" or "sigmoid": the network begins with windows that are trained with it
            (`ich_keras.get_windows`) and takes HU, in one channel.

    Returns:
        A functional `keras.Model`: normalised windows (or HU) float32 (N, *input_shape) to float32
        (N, labels), in the order of `labels`.

    Raises:
        UsageError: an unknown name or value.
        DataError: the weights file is not one for this network.

    >>> model = build_classifier("resnet10_2d", input_shape=(32, 32, 1))
    >>> model.input_shape, model.output_shape
    ((None, 32, 32, 1), (None, 6))
    >>> build_classifier("resnet10_3d", input_shape=(16, 32, 32, 1), labels=3).output_shape
    (None, 3)
    """
    spec = preset(name, input_shape, norm, windows)
    found = label_set(labels, exclusive)
    model = classifier(spec, output=output, precision=precision, labels=found)
    if weights is not None:
        load_weights(model, find_weights(weights, name), spec, labels=found)
    return model


def build_backbone(
    name: str,
    weights: str | None = None,
    input_shape: tuple[int | None, ...] | None = None,
) -> keras.Model:
    """Build a preset without its head, for features.

    Args:
        name: a preset.
        weights: as in `build_classifier`; a head in the file is not used.
        input_shape: None takes inputs of any size with the preset's rank and channels.

    Returns:
        A functional `keras.Model`: float32 (N, *input_shape) to pooled features (N, features).

    >>> build_backbone("resnet10_2d").output_shape
    (None, 512)
    """
    spec = preset(name).with_any_size() if input_shape is None else preset(name, input_shape)
    model = choose_step(backbone(spec))
    if weights is not None:
        load_weights(model, find_weights(weights, name), spec)
    return model


def freeze(model: keras.Model, up_to: str) -> int:
    """Freeze the first part of a network, so that only the rest is trained.

    Frozen batch normalisation uses its stored statistics, also in training. What was frozen before
    stays frozen. Learnable windows are not frozen: who asks for them wants them to move.

    Args:
        model: of ours; compile it afterwards.
        up_to: of `FREEZABLE`: "stem", or "layer1" to "layer4" ("layer4" leaves only the head).

    Returns:
        The number of layers with weights that are frozen.

    Raises:
        UsageError: unknown name.

    >>> model = classifier(ModelSpec((32, 32, 1), depth=10, width=4))
    >>> freeze(model, "layer4"), len(model.trainable_variables)  # the head's kernel and bias
    (24, 2)
    """
    require_choice("freeze", up_to)
    later = FREEZABLE[FREEZABLE.index(up_to) + 1 :]
    frozen = [
        layer
        for layer in model.layers
        if layer.weights and layer.name not in (HEAD, WINDOWS) and not layer.name.startswith(later)
    ]
    for layer in frozen:
        layer.trainable = False
    return len(frozen)


def _trained_windows(model: keras.Model) -> list[keras.layers.Layer]:
    layer = window_layer(model)
    return [layer] if layer is not None and layer.trainable else []


def ends_in_logits(model: keras.Model) -> bool:
    """Tell whether a classifier of ours gives logits; False means probabilities."""
    return model.output_names != [PROBABILITIES] and model.layers[-1].name == HEAD


def compile_classifier(
    model: keras.Model,
    learning_rate: float = 3e-4,
    loss: str | LossSettings = "bce",
    schedule: str = "constant",
    total_steps: int | None = None,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    backbone_factor: float = 1.0,
    accumulate: int = 1,
    step: str = "fast",
    precision: str | None = None,
    recompute: str | None = None,
    compiled: bool | None = None,
    labels: LabelSet | Sequence[str] | None = None,
    **adam: Any,
) -> keras.Model:
    """Compile a classifier for `fit`: Adam and the loss alone.

    Metrics are left out on purpose: batch-wise ones are wrong for rare labels and slow; compute
    them over a whole split with `ich_keras.evaluate`.

    Args:
        model: from `build_classifier`, with logits or probabilities.
        learning_rate: 3e-4 from scratch, 1e-5 with pretrained weights (the thesis's values).
        loss: "bce", "rsna" (`any` counted twice), "focal" or "asymmetric"; or `LossSettings`.
        schedule: "constant" or "cosine".
        total_steps: batches of the whole training (for "cosine"): Keras' schedules count batches,
            also where `accumulate` of them make one step.
        warmup_steps: steps of linear rise.
        weight_decay: decoupled; kernels only, but for those of learnable windows.
        backbone_factor: the backbone learns at this multiple of the learning rate, the head and
            learnable windows at the full one; below 1 for pretrained weights under a new head.
        accumulate: batches whose gradients are averaged into one optimiser step.
        step, precision, recompute, compiled: see `choose_step`.
        labels: of a model that was saved and loaded, which no longer has them; None takes
            `labels_of`. Exclusive ones decide the loss.
        adam: further settings of `ich_keras.Adam`.

    Returns:
        The same model.

    Raises:
        UsageError: an unknown name or a value out of range.

    >>> model = classifier(ModelSpec((32, 32, 1), depth=10, width=4), output="logits")
    >>> compile_classifier(model, 1e-4, loss="rsna").loss.name
    'rsna'
    """
    settings = loss if isinstance(loss, LossSettings) else LossSettings(loss)
    labels = labels_of(model) if labels is None else label_set(labels)
    if len(labels) != int(model.output_shape[-1]):
        raise UsageError(f"{len(labels)} labels for {model.output_shape[-1]} outputs.")
    _called(model, labels)
    settings.require_sound(labels)
    require_in_range("learning_rate", learning_rate)
    require_in_range("weight_decay", weight_decay)
    require_in_range("backbone_factor", backbone_factor)
    require_in_range("accumulate", accumulate)
    require_in_range("warmup_steps", warmup_steps)
    choose_step(model, step, precision, recompute, compiled)
    optimizer = Adam(
        learning_rate=learning_rate_schedule(learning_rate, schedule, total_steps, warmup_steps),
        weight_decay=weight_decay or None,
        backbone_factor=backbone_factor,
        head_layers=(HEAD, *(layer.name for layer in _trained_windows(model))),
        fused=step == "fast",
        gradient_accumulation_steps=accumulate if accumulate > 1 else None,
        **adam,
    )
    if weight_decay:
        keep_from_decay(optimizer, model)
    if (precision or built_precision(model)) == "float16":
        # Keras does so by itself only where the global policy is mixed_float16.
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(
        optimizer=optimizer,
        loss=make_loss(settings, ends_in_logits(model), labels),
        # Keras reads precision from the global policy; what needs scaling is wrapped above.
        auto_scale_loss=False,
    )
    return model
