"""The loss: binary cross-entropy over the six labels, plain or weighted as the competition's."""

from typing import Any

import keras
from keras import ops

from ich_keras.errors import UsageError

# How near to 0 and 1 a probability may come before its logarithm is taken: Keras' usual epsilon.
EPSILON = 1e-7


@keras.saving.register_keras_serializable("ich_keras")
class BinaryCrossEntropy(keras.losses.Loss):
    """Binary cross-entropy, averaged over the labels of a sample, then over the batch.

    Args:
        from_logits: whether the model gives logits (numerically safer) or probabilities; it
            cannot be seen from the numbers, and the wrong one trains on the wrong loss. (The fast
            steps of the torch backend see the model and refuse it; `compile_classifier` sets it.)
        label_weights: one weight per label; the average divides by their sum. None: all alike.
            `ich_keras.labels.RSNA_WEIGHTS` makes it the competition's metric.
        settings: of `keras.losses.Loss`; `dtype` is float32 where it is not given.

    Formula:
        -(y log p + (1 - y) log(1 - p)) for each label, with p = 1 / (1 + exp(-logit)).

    >>> loss = BinaryCrossEntropy(from_logits=True)
    >>> zeros = keras.ops.zeros((2, 6))
    >>> round(float(loss(zeros, zeros)), 4)  # log 2: undecided
    0.6931
    """

    def __init__(
        self,
        from_logits: bool = True,
        label_weights: tuple[float, ...] | None = None,
        **settings: Any,
    ) -> None:
        # Keras would take the type from its global floatx.
        super().__init__(**{**settings, "dtype": settings.get("dtype") or "float32"})
        self.from_logits = from_logits
        self.label_weights = None if label_weights is None else tuple(label_weights)

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
        if self.from_logits:
            each = ops.binary_crossentropy(y_true, y_pred, from_logits=True)
        else:
            # Keras would clip at its global epsilon.
            p = ops.clip(y_pred, EPSILON, 1 - EPSILON)
            each = -(y_true * ops.log(p) + (1 - y_true) * ops.log(1 - p))
        if self.shares is None:
            return ops.mean(each, axis=-1)
        return ops.sum(each * ops.convert_to_tensor(self.shares, dtype=each.dtype), axis=-1)

    def require_outputs(self, number: int) -> None:
        """Refuse weights of another number than the model's outputs.

        Raises:
            UsageError: they differ.
        """
        if self.label_weights is not None and len(self.label_weights) != number:
            raise UsageError(
                f"{len(self.label_weights)} label weights for {number} outputs; expected one each."
            )

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return super().get_config() | {
            "from_logits": self.from_logits,
            "label_weights": self.label_weights,
        }
