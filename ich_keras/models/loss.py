"""The losses over the labels of a sample: cross-entropy, focal and asymmetric; weights by label."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from ich_keras.errors import UsageError
from ich_keras.labels import LabelSet
from ich_keras.models.options import LossSettings, require_in_range

# How near to 0 and 1 a probability may come before its logarithm is taken: Keras' usual epsilon.
EPSILON = 1e-7


def is_missing(y_true: Any) -> Any:
    """Tell which labels are missing: NaN, or below 0."""
    # Not "unless >= 0": XLA turns that into "< 0", which no NaN is.
    return ops.logical_or(ops.isnan(y_true), y_true < 0)


@keras.saving.register_keras_serializable("ich_keras")
class BinaryCrossEntropy(keras.losses.Loss):
    """Binary cross-entropy, averaged over the labels of a sample, then over the batch.

    A label of NaN or below 0 is missing: it adds nothing to loss and gradient. The average of a
    sample is over the labels it has, weighted as they are. A sample without any label counts as 0.

    Args:
        from_logits: whether the model gives logits (numerically safer) or probabilities; it
            cannot be seen from the numbers, and the wrong one trains on the wrong loss. (The fast
            steps of the torch backend see the model and refuse it; `compile_classifier` sets it.)
        label_weights: one weight per label; the average divides by their sum. None: all alike.
            `ich_keras.labels.RSNA_WEIGHTS` makes it the competition's metric.
        positive_weights: one factor per label for the loss where the label is 1, as torch's
            `pos_weight`; the average does not divide by them. None: 1 for all.
        settings: of `keras.losses.Loss`; `dtype` is float32 where it is not given.

    Formula:
        -(w y log p + (1 - y) log(1 - p)) for each label, with p = 1 / (1 + exp(-logit)) and w its
        positive weight.

    >>> loss = BinaryCrossEntropy(from_logits=True)
    >>> zeros = keras.ops.zeros((2, 6))
    >>> round(float(loss(zeros, zeros)), 4)  # log 2: undecided
    0.6931
    >>> float(loss(zeros - 1, zeros))  # no label
    0.0
    """

    def __init__(
        self,
        from_logits: bool = True,
        label_weights: Sequence[float] | None = None,
        positive_weights: Sequence[float] | None = None,
        **settings: Any,
    ) -> None:
        # Keras would take the type from its global floatx.
        super().__init__(**{**settings, "dtype": settings.get("dtype") or "float32"})
        self.from_logits = from_logits
        self.label_weights = None if label_weights is None else tuple(label_weights)
        self.positive_weights = None if positive_weights is None else tuple(positive_weights)

    @property
    def shares(self) -> list[float] | None:
        """Return the share of each label in the average; None when all are alike."""
        if self.label_weights is None:
            return None
        return [weight / sum(self.label_weights) for weight in self.label_weights]

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of each sample: (labels, outputs), both float (N, 6), to float (N,)."""
        self.require_outputs(y_pred.shape[-1])
        y_true = ops.cast(y_true, y_pred.dtype)
        absent = is_missing(y_true)
        each = self.of_labels(ops.where(absent, 0.0, y_true), y_pred)
        shares = ops.ones_like(each) if self.shares is None else self._tensor(self.shares, each)
        shares = ops.where(absent, 0.0, shares)
        total = ops.sum(shares, axis=-1)
        return ops.sum(each * shares, axis=-1) / ops.where(total > 0, total, 1.0)

    def of_labels(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of each label: (labels 0..1, outputs), float (N, 6), to float (N, 6)."""
        if self.from_logits and self.positive_weights is None:
            return ops.binary_crossentropy(y_true, y_pred, from_logits=True)
        log_p, log_q = self.logarithms(y_pred)
        return -(y_true * self.weighted(log_p) + (1 - y_true) * log_q)

    def logarithms(self, y_pred: Any) -> tuple[Any, Any]:
        """Return the logarithms of p and of 1 - p, finite for every finite output."""
        if self.from_logits:
            return -ops.softplus(-y_pred), -ops.softplus(y_pred)
        # Keras would clip at its global epsilon.
        p = ops.clip(y_pred, EPSILON, 1 - EPSILON)
        return ops.log(p), ops.log(1 - p)

    def weighted(self, positive: Any) -> Any:
        """Return the term of positive labels, float (N, 6), times the positive weights."""
        if self.positive_weights is None:
            return positive
        return positive * self._tensor(self.positive_weights, positive)

    def _tensor(self, values: Sequence[float], like: Any) -> Any:
        return ops.convert_to_tensor(values, dtype=like.dtype)

    def require_outputs(self, number: int) -> None:
        """Refuse weights of another number than the model's outputs.

        Raises:
            UsageError: they differ.
        """
        for weights, what in ((self.label_weights, "label"), (self.positive_weights, "positive")):
            if weights is not None and len(weights) != number:
                raise UsageError(
                    f"{len(weights)} {what} weights for {number} outputs; expected one each."
                )

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return super().get_config() | {
            "from_logits": self.from_logits,
            "label_weights": self.label_weights,
            "positive_weights": self.positive_weights,
        }


@keras.saving.register_keras_serializable("ich_keras")
class FocalLoss(BinaryCrossEntropy):
    """Focal loss: cross-entropy that counts labels less the surer and righter the network is.

    Args:
        gamma: how much less; 0 is cross-entropy.
        alpha: weight of positive labels, 1 - alpha that of negative ones; None weighs both by 1.
        settings: of `BinaryCrossEntropy`; its averages, weights and missing labels hold here, too.

    Formula:
        -alpha (1 - p)^gamma log p where the label is 1, -(1 - alpha) p^gamma log(1 - p) where it
        is 0.

    Source:
        Lin et al. 2017, arXiv:1708.02002, equation 5.

    >>> loss = FocalLoss(gamma=2.0)
    >>> zeros = keras.ops.zeros((2, 6))
    >>> round(float(loss(zeros, zeros)), 4)  # a quarter of log 2
    0.1733
    """

    def __init__(self, gamma: float = 2.0, alpha: float | None = None, **settings: Any) -> None:
        require_in_range("focal_gamma", gamma, "gamma")
        if alpha is not None:
            require_in_range("focal_alpha", alpha, "alpha")
        super().__init__(**settings)
        self.gamma = gamma
        self.alpha = alpha

    def of_labels(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of each label; see `BinaryCrossEntropy.of_labels`."""
        log_p, log_q = self.logarithms(y_pred)
        # Powers of e, not of p: their derivatives stay finite where p is 0.
        positive = self.weighted(-ops.exp(self.gamma * log_q) * log_p)
        negative = -ops.exp(self.gamma * log_p) * log_q
        if self.alpha is not None:
            positive, negative = self.alpha * positive, (1 - self.alpha) * negative
        return y_true * positive + (1 - y_true) * negative

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return super().get_config() | {"gamma": self.gamma, "alpha": self.alpha}


@keras.saving.register_keras_serializable("ich_keras")
class AsymmetricLoss(BinaryCrossEntropy):
    """Asymmetric loss: focal, with another gamma for negative labels, and without the surest ones.

    Args:
        gamma_positive: gamma of positive labels.
        gamma_negative: gamma of negative labels.
        margin: negative labels with a probability up to this add nothing.
        settings: of `BinaryCrossEntropy`; its averages, weights and missing labels hold here, too.

    Formula:
        -(1 - p)^gamma_positive log p where the label is 1, -m^gamma_negative log(1 - m) where it is
        0, with m = max(p - margin, 0).

    Source:
        Ridnik et al. 2021, arXiv:2009.14119, equation 7; the defaults are those of its section 4.

    >>> loss = AsymmetricLoss(margin=0.5)
    >>> zeros = keras.ops.zeros((2, 6))
    >>> float(loss(zeros, zeros)), round(float(loss(zeros + 1, zeros)), 4)
    (0.0, 0.6931)
    """

    def __init__(
        self,
        gamma_positive: float = 0.0,
        gamma_negative: float = 4.0,
        margin: float = 0.05,
        **settings: Any,
    ) -> None:
        require_in_range("gamma_positive", gamma_positive)
        require_in_range("gamma_negative", gamma_negative)
        require_in_range("margin", margin)
        super().__init__(**settings)
        self.gamma_positive = gamma_positive
        self.gamma_negative = gamma_negative
        self.margin = margin

    def of_labels(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of each label; see `BinaryCrossEntropy.of_labels`."""
        log_p, log_q = self.logarithms(y_pred)
        positive = self.weighted(-ops.exp(self.gamma_positive * log_q) * log_p)
        return y_true * positive + (1 - y_true) * self._negative(log_p, log_q)

    def _negative(self, log_p: Any, log_q: Any) -> Any:
        if self.margin == 0:
            return -ops.exp(self.gamma_negative * log_p) * log_q
        shifted = ops.exp(log_p) - self.margin
        counts = shifted > 0
        # Within the margin the power of 0 has no derivative, though its factor is 0: there,
        # another number takes its place.
        power = ops.exp(self.gamma_negative * ops.log(ops.where(counts, shifted, 1.0)))
        rest = ops.where(counts, ops.exp(log_q) + self.margin, 1.0)
        return ops.where(counts, -power * ops.log(rest), 0.0)

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return super().get_config() | {
            "gamma_positive": self.gamma_positive,
            "gamma_negative": self.gamma_negative,
            "margin": self.margin,
        }


@keras.saving.register_keras_serializable("ich_keras")
class CategoricalCrossEntropy(BinaryCrossEntropy):
    """Cross-entropy of exclusive labels: exactly one is 1 in each sample.

    A sample with a missing label (NaN, or below 0) adds nothing.

    Args:
        settings: of `BinaryCrossEntropy`; `label_weights` weigh samples by their true label, and
            nothing divides by their sum.

    Formula:
        -log p of the true label, with p = softmax(logits).

    >>> loss = CategoricalCrossEntropy()
    >>> one = keras.ops.convert_to_tensor([[0.0, 1.0, 0.0]])
    >>> round(float(loss(one, keras.ops.zeros((1, 3)))), 4)  # log 3: undecided
    1.0986
    """

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of each sample: (labels, outputs), both float (N, labels)."""
        self.require_outputs(y_pred.shape[-1])
        y_true = ops.cast(y_true, y_pred.dtype)
        absent = ops.any(is_missing(y_true), axis=-1, keepdims=True)
        y_true = ops.where(absent, 0.0, y_true)
        if self.from_logits:
            log_p = ops.log_softmax(y_pred, axis=-1)
        else:
            log_p = ops.log(ops.clip(y_pred, EPSILON, 1.0))
        if self.label_weights is not None:
            y_true = y_true * self._tensor(self.label_weights, log_p)
        return -ops.sum(y_true * log_p, axis=-1)


def make_loss(settings: LossSettings, from_logits: bool, labels: LabelSet) -> BinaryCrossEntropy:
    """Make the loss that a training asks for.

    Args:
        settings: see `LossSettings`.
        from_logits: what the model gives.
        labels: of the model, in the order of its outputs.

    Raises:
        UsageError: as `LossSettings.require_sound`.
    """
    settings.require_sound(labels)
    common: dict[str, Any] = {
        "from_logits": from_logits,
        "label_weights": in_order(settings.label_weight, labels.names),
        "positive_weights": in_order(settings.positive_weight, labels.names),
        "name": settings.loss,
    }
    if settings.loss == "rsna":
        common["label_weights"] = labels.competition_weights
    if labels.exclusive:
        return CategoricalCrossEntropy(**common)
    own: dict[str, Any] = settings.decided()
    if settings.loss == "focal":
        return FocalLoss(own["focal_gamma"], own["focal_alpha"], **common)
    if settings.loss == "asymmetric":
        return AsymmetricLoss(**own, **common)
    return BinaryCrossEntropy(**common)


def in_order(
    weights: Mapping[str, float] | None, labels: Sequence[str]
) -> tuple[float, ...] | None:
    """Return the weight of each label, 1 for those that are not named; None without weights.

    >>> in_order({"any": 3}, ("subdural", "any"))
    (1.0, 3.0)
    """
    if not weights:
        return None
    return tuple(float(weights.get(label, 1.0)) for label in labels)
