"""Sequence heads: networks that read the slices of a series one after another.

A 2D network answers each slice alone; a radiologist looks at its neighbours, too. A sequence head
takes what the 2D network made of every slice (pooled features and logits) and the place of each
slice in mm, and answers every slice and the whole series. All winners of RSNA 2019 had one.

Five kinds: "gru" and "lstm" (bidirectional), "conv" (dilated convolutions along z), "transformer"
(self-attention) and "attention" (gated attention pooling: slices do not see each other).

- **It begins as the slice network.** Its last layers start at zero and add to the logits: untrained
  it gives the slice network's own answers, and for a series the largest of them.
- **Places are in mm.** Distances to the neighbours and to the middle of the series are inputs, so
  gaps and thick slices are told apart from numbers of slices.
- **Any length.** Series are filled up to a common length. The mask says what is a slice; what is
  none changes no answer.

Sources: Wang et al., NeuroImage: Clinical 2021;32:102785 (RSNA 2019's first place: GRUs on
features, their differences and logits). Ilse et al. 2018, arXiv:1802.04712 (gated attention).
Vaswani et al. 2017, arXiv:1706.03762; layers are normalised first, as Xiong et al. 2020,
arXiv:2002.04745.
"""

import math
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from ich_keras.errors import UsageError
from ich_keras.labels import SIX, LabelSet
from ich_keras.models.loss import BinaryCrossEntropy, CategoricalCrossEntropy, is_missing
from ich_keras.models.options import require_choice, require_whole

KINDS = ("gru", "lstm", "conv", "transformer", "attention")
SLICES, SERIES = "slices", "series"
FEATURES, LOGITS, PLACES, MASK = "features", "logits", "places_mm", "mask"
DTYPE = "float32"
_NORMALISED = "normalised"
NEAR_MM, FAR_MM = 10.0, 100.0  # units of the distances to neighbours, and to the middle
MOST_NEAR = 5.0  # of these units: beyond, a neighbour is far away and no more
_NO = -1e9  # added to what no slice has
DILATIONS = (1, 2, 4, 8)


@dataclass(frozen=True)
class SequenceSpec:
    """The shape of a sequence head.

    Args:
        kind: of `KINDS`.
        features: numbers that the slice network gives for a slice.
        width: of its layers; even, and a multiple of `heads`.
        depth: layers of the kind; "attention" has as many dense ones.
        heads: of the attention of a "transformer".
        dropout: share of the features that is left out in training.

    Raises:
        UsageError: a value cannot be used.
    """

    kind: str = "gru"
    features: int = 512
    width: int = 128
    depth: int = 2
    heads: int = 4
    dropout: float = 0.3

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(
                f"no sequence head is called {self.kind!r}; expected one of {', '.join(KINDS)}."
            )
        for name, least, most in (
            ("features", 1, 65536),
            ("width", 2, 4096),
            ("depth", 1, 16),
            ("heads", 1, 64),
        ):
            require_whole(name, getattr(self, name), least, most)
        if self.width % 2:
            raise UsageError(f"width is {self.width}; expected an even number.")
        if self.kind == "transformer" and self.width % self.heads:
            raise UsageError(f"width is {self.width}; expected a multiple of {self.heads} heads.")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise UsageError(f"dropout is {self.dropout!r}; expected 0 or more, and less than 1.")


def sequence_head(
    spec: SequenceSpec, labels: LabelSet = SIX, output: str = "probabilities"
) -> keras.Model:
    """Build a sequence head.

    Args:
        spec: its shape.
        labels: what slice network and head answer.
        output: "probabilities", or "logits", which training uses with the same weights.

    Returns:
        A functional `keras.Model` of stock layers. It takes a dictionary of float32 arrays, each
        series filled up at its end:

        - features (N, slices, features) and logits (N, slices, labels) of the slice network;
        - places_mm (N, slices), the position along the normal, ascending;
        - mask (N, slices), 1 for a slice and 0 for what fills up.

        It gives a dictionary of float32 arrays: slices (N, slices, labels), arbitrary where the
        mask is 0; series (N, labels).

    Raises:
        UsageError: an unknown output.

    >>> head = sequence_head(SequenceSpec("conv", features=8, width=4, depth=1))
    >>> head.output["slices"].shape, head.output["series"].shape
    ((None, None, 6), (None, 6))
    """
    require_choice("output", output)
    count = len(labels)
    features = keras.Input((None, spec.features), name=FEATURES, dtype=DTYPE)
    logits = keras.Input((None, count), name=LOGITS, dtype=DTYPE)
    places = keras.Input((None,), name=PLACES, dtype=DTYPE)
    mask = keras.Input((None,), name=MASK, dtype=DTYPE)
    there = ops.expand_dims(mask, -1)

    # Mean and deviation are weights, which `adapt_features` sets.
    x = layers.Normalization(axis=-1, dtype=DTYPE, name=_NORMALISED)(features)
    x = layers.Dropout(spec.dropout, dtype=DTYPE, name="dropout")(x)
    x = _dense(spec.width, "projected")(x)
    before, after, steps = _neighbours(x, places, mask)
    x = ops.concatenate([x, before, after, logits / 4.0, steps], axis=-1)
    x = _dense(spec.width, "joined", "gelu")(x) * there
    x = _ENCODERS[spec.kind](x, mask, spec)
    x = layers.LayerNormalization(epsilon=1e-5, dtype=DTYPE, name="encoded")(x) * there
    x = layers.Dropout(spec.dropout / 2, dtype=DTYPE, name="dropout_encoded")(x)

    of_slices = logits + _dense(count, "slice_change", kernel_initializer="zeros")(x)
    pooled = _pooled(x, there, spec.width)
    of_series = _joined(of_slices, there, labels) + _dense(
        count, "series_change", kernel_initializer="zeros"
    )(pooled)
    outputs = {SLICES: of_slices, SERIES: of_series}
    if output == "probabilities":
        activation = "softmax" if labels.exclusive else "sigmoid"
        outputs = {
            name: layers.Activation(activation, dtype=DTYPE, name=f"{name}_probabilities")(value)
            for name, value in outputs.items()
        }
    inputs = {FEATURES: features, LOGITS: logits, PLACES: places, MASK: mask}
    return keras.Model(inputs, outputs, name=f"sequence_{spec.kind}")


def adapt_features(model: keras.Model, features: np.ndarray) -> None:
    """Normalise the features by their mean and variance over the training slices.

    Args:
        model: from `sequence_head`.
        features: float (n, features), of training slices only; finite.

    Raises:
        UsageError: none, another number of features, or values that are not finite.
    """
    layer = model.get_layer(_NORMALISED)
    wanted = int(model.input[FEATURES].shape[-1])
    if features.ndim != 2 or features.shape[1] != wanted or not len(features):
        raise UsageError(f"features of shape {features.shape}; expected (n, {wanted}), n above 0.")
    mean, variance = features.mean(0, dtype=np.float64), features.var(0, dtype=np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
        raise UsageError("the features hold values that are not finite; expected numbers.")
    # A feature that never varies (a dead unit) is left at 0.
    variance = np.where(variance > 1e-8, variance, 1.0)
    layer.adapt_mean.assign(mean.astype(np.float32))
    layer.adapt_variance.assign(variance.astype(np.float32))
    layer.finalize_state()


def sequence_losses(labels: LabelSet = SIX, series_weight: float = 1.0) -> dict[str, Any]:
    """Return what `compile` takes to train a head that ends in logits: `loss`, `loss_weights`.

    Labels of slices, of series, or of both may be there: NaN is missing, and adds nothing.

    Args:
        labels: of the head.
        series_weight: of the loss of series, beside that of slices.

    >>> sorted(sequence_losses()["loss"])
    ['series', 'slices']
    """
    if not (math.isfinite(series_weight) and series_weight >= 0):
        raise UsageError(f"series_weight is {series_weight!r}; expected 0 or more.")
    of_series = CategoricalCrossEntropy() if labels.exclusive else BinaryCrossEntropy()
    return {
        "loss": {SLICES: SlicesLoss(labels.exclusive), SERIES: of_series},
        "loss_weights": {SLICES: 1.0, SERIES: float(series_weight)},
    }


@keras.saving.register_keras_serializable("ich_keras")
class SlicesLoss(keras.losses.Loss):
    """Cross-entropy of the slices of series: the mean over a series' labelled slices.

    Each series counts as much as any other, however many slices it has; a slice without labels,
    and what fills up a series, count nowhere.

    Args:
        exclusive: whether the labels are.
        settings: of `keras.losses.Loss`.
    """

    def __init__(self, exclusive: bool = False, **settings: Any) -> None:
        super().__init__(**{**settings, "dtype": settings.get("dtype") or DTYPE})
        self.exclusive = exclusive
        self._each = CategoricalCrossEntropy() if exclusive else BinaryCrossEntropy()

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of each series: float (N, slices, labels) twice, to float (N,)."""
        y_true = ops.cast(y_true, y_pred.dtype)
        each = self._each.call(y_true, y_pred)
        missing = is_missing(y_true)
        known = ops.all(~missing, axis=-1) if self.exclusive else ops.any(~missing, axis=-1)
        known = ops.cast(known, each.dtype)
        return ops.sum(each * known, axis=-1) / ops.maximum(ops.sum(known, axis=-1), 1.0)

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return super().get_config() | {"exclusive": self.exclusive}


def _dense(width: int, name: str, activation: str | None = None, **settings: Any) -> layers.Layer:
    return layers.Dense(width, activation=activation, dtype=DTYPE, name=name, **settings)


def _neighbours(x: Any, places: Any, mask: Any) -> tuple[Any, Any, Any]:
    """Return the differences of features to the slice before and after, and the places.

    Args:
        x: (N, slices, width).
        places: (N, slices), mm.
        mask: (N, slices).

    Returns:
        (N, slices, width) twice, and (N, slices, 3): the distances to both neighbours and to the
        middle of the series. At an end the neighbour is the slice itself.
    """
    has_after = ops.concatenate([mask[:, 1:], ops.zeros_like(mask[:, :1])], axis=1)
    has_before = ops.concatenate([ops.zeros_like(mask[:, :1]), mask[:, 1:]], axis=1)

    def differences(values: Any, has: Any, shifted: Any) -> Any:
        return (values - shifted) * has

    earlier = ops.concatenate([x[:, :1], x[:, :-1]], axis=1)
    later = ops.concatenate([x[:, 1:], x[:, -1:]], axis=1)
    before = differences(x, ops.expand_dims(has_before, -1), earlier)
    after = differences(x, ops.expand_dims(has_after, -1), later)
    below = differences(
        places, has_before, ops.concatenate([places[:, :1], places[:, :-1]], axis=1)
    )
    above = -differences(
        places, has_after, ops.concatenate([places[:, 1:], places[:, -1:]], axis=1)
    )
    number = ops.maximum(ops.sum(mask, axis=1, keepdims=True), 1.0)
    middle = ops.sum(places * mask, axis=1, keepdims=True) / number
    steps = [ops.clip(step / NEAR_MM, 0.0, MOST_NEAR) for step in (below, above)]
    steps.append((places - middle) * mask / FAR_MM)
    return before, after, ops.stack(steps, axis=-1)


def _recurrent(x: Any, mask: Any, spec: SequenceSpec) -> Any:
    cell = layers.GRU if spec.kind == "gru" else layers.LSTM
    is_there = ops.greater(mask, 0.5)
    for number in range(spec.depth):
        layer = layers.Bidirectional(
            cell(spec.width // 2, return_sequences=True, dtype=DTYPE),
            dtype=DTYPE,
            name=f"{spec.kind}{number + 1}",
        )
        x = x + layer(x, mask=is_there) if number else layer(x, mask=is_there)
        x = x * ops.expand_dims(mask, -1)
    return x


def _convolutions(x: Any, mask: Any, spec: SequenceSpec) -> Any:
    there = ops.expand_dims(mask, -1)
    for number in range(spec.depth):
        y = layers.LayerNormalization(epsilon=1e-5, dtype=DTYPE, name=f"norm{number + 1}")(x)
        y = layers.Conv1D(
            spec.width,
            3,
            padding="same",
            dilation_rate=DILATIONS[number % len(DILATIONS)],
            activation="gelu",
            data_format="channels_last",
            dtype=DTYPE,
            name=f"conv{number + 1}",
        )(y * there)
        x = (x + _dense(spec.width, f"mixed{number + 1}")(y)) * there
    return x


def _transformer(x: Any, mask: Any, spec: SequenceSpec) -> Any:
    # Who may be looked at: (N, 1, slices), the same for all who look.
    seen = ops.expand_dims(ops.greater(mask, 0.5), 1)
    for number in range(spec.depth):
        y = layers.LayerNormalization(epsilon=1e-5, dtype=DTYPE, name=f"norm{number + 1}a")(x)
        attention = layers.MultiHeadAttention(
            spec.heads, spec.width // spec.heads, dtype=DTYPE, name=f"attention{number + 1}"
        )
        x = x + attention(y, y, attention_mask=seen)
        y = layers.LayerNormalization(epsilon=1e-5, dtype=DTYPE, name=f"norm{number + 1}b")(x)
        y = _dense(2 * spec.width, f"wide{number + 1}", "gelu")(y)
        x = x + _dense(spec.width, f"narrow{number + 1}")(y)
    return x


def _alone(x: Any, _mask: Any, spec: SequenceSpec) -> Any:
    for number in range(spec.depth):
        x = _dense(spec.width, f"dense{number + 1}", "gelu")(x)
    return x


def _pooled(x: Any, there: Any, width: int) -> Any:
    """Pool slices by gated attention: (N, slices, width) to (N, width)."""
    gate = _dense(width // 2, "gate", "sigmoid")(x)
    score = _dense(1, "score")(_dense(width // 2, "look", "tanh")(x) * gate)
    weights = ops.softmax(score + (1.0 - there) * _NO, axis=1)
    return ops.sum(x * weights, axis=1)


def _joined(logits: Any, there: Any, labels: LabelSet) -> Any:
    """Join the logits of slices to those of the series: the largest; of classes, the mean."""
    if labels.exclusive:
        return ops.sum(logits * there, axis=1) / ops.maximum(ops.sum(there, axis=1), 1.0)
    return ops.max(logits + (1.0 - there) * _NO, axis=1)


_ENCODERS = {
    "gru": _recurrent,
    "lstm": _recurrent,
    "conv": _convolutions,
    "transformer": _transformer,
    "attention": _alone,
}
