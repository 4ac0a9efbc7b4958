"""Adam as torch defines it, inside Keras' own optimiser, and the schedules of its rate.

Clipping, EMA, accumulation, loss scaling, saving and loading stay Keras'; only the update itself
is ours.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from ich_keras.errors import UsageError
from ich_keras.keras_settings import require_floatx
from ich_keras.models.options import require_choice

# On torch `keras.optimizers.Adam` makes an instance of a faster class: that one is extended.
_BASE: Any = type(keras.optimizers.Adam())


@keras.saving.register_keras_serializable("ich_keras")
class Adam(_BASE):
    """Keras' Adam with torch's place for epsilon, a fused update, and two learning rates.

    Keras adds epsilon to the root of the raw second moment, torch to that of the corrected one
    (Kingma and Ba 2015, algorithm 1). Pretrained recipes mean the latter.

    Args:
        learning_rate: a number or a Keras schedule.
        epsilon: torch's default, which the thesis used; Keras' is 1e-7.
        backbone_factor: multiple of the learning rate (weight decay included) for every variable
            outside `head_layers`. Scaling gradients would do nothing under Adam: the rate itself
            has to differ.
        head_layers: names of the layers that learn at the full rate.
        fused: on the torch backend, use torch's fused kernel: one pass over weights, gradients
            and moments instead of nine.
        settings: of `keras.optimizers.Adam`.

    Raises:
        UsageError: Keras' global floatx is not float32: Keras keeps the learning rate in it.

    Formula:
        w -= rate * m' / (sqrt(v') + epsilon), with m' and v' the first and second moments divided
        by 1 - beta_1^t and 1 - beta_2^t.

    >>> weight = keras.Variable([1.0], name="weight")
    >>> optimizer = Adam(0.1)
    >>> optimizer.apply([keras.ops.convert_to_tensor([5.0])], [weight])
    >>> [round(float(w), 6) for w in weight.numpy()]  # the first step is the rate itself
    [0.9]
    """

    # Keras' own, changed for the length of a call.
    epsilon: Any
    weight_decay: float | None

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        epsilon: float = 1e-8,
        backbone_factor: float = 1.0,
        head_layers: tuple[str, ...] = (),
        fused: bool = True,
        **settings: Any,
    ) -> None:
        require_floatx("ich_keras.Adam")
        super().__init__(learning_rate=learning_rate, epsilon=epsilon, **settings)
        self.backbone_factor = backbone_factor
        self.head_layers = tuple(head_layers)
        self.fused = fused and keras.backend.backend() == "torch"
        # The fused update's views of weights and slots, by the weights: head and backbone are
        # updated apart.
        self.fused_plans: dict[tuple[int, ...], Any] = {}

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return super().get_config() | {
            "backbone_factor": self.backbone_factor,
            "head_layers": list(self.head_layers),
            "fused": self.fused,
        }

    def build(self, variables: Sequence[Any]) -> None:
        """Make the slots.

        Raises:
            UsageError: a head layer that owns none of the variables, or none at all.
        """
        if self.backbone_factor != 1 and not self.built:
            missing = [
                layer
                for layer in self.head_layers
                if not any(variable.path.startswith(f"{layer}/") for variable in variables)
            ]
            if missing or not self.head_layers:
                raise UsageError(
                    f"backbone_factor {self.backbone_factor} with head_layers"
                    f" {list(missing or self.head_layers)}, which own none of the variables that"
                    " are trained: all would learn at the lower rate.",
                    "Name the layers that learn at the full rate, such as 'fc'.",
                )
        super().build(variables)

    def add_variable_from_reference(
        self, reference_variable: Any, name: str | None = None, initializer: Any = "zeros"
    ) -> Any:
        """Add a slot; for the fused update in the memory order of its weight."""
        if self.fused and initializer == "zeros":
            from ich_keras.models.torch.adam import zeros_in_order_of

            initializer = zeros_in_order_of(reference_variable)
        return super().add_variable_from_reference(reference_variable, name, initializer)

    def _is_head(self, variable: Any) -> bool:
        return self.backbone_factor == 1 or variable.path.startswith(
            tuple(f"{layer}/" for layer in self.head_layers)
        )

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        if self.backbone_factor == 1:
            self._update(grads, trainable_variables, learning_rate)
            return
        pairs = list(zip(grads, trainable_variables, strict=True))
        for is_head, factor in ((True, 1.0), (False, self.backbone_factor)):
            group = [pair for pair in pairs if self._is_head(pair[1]) == is_head]
            if group:
                rate = learning_rate * factor
                some_grads, some_variables = map(list, zip(*group, strict=True))
                self._update(some_grads, some_variables, rate)

    def _update(self, grads: Sequence[Any], variables: Sequence[Any], learning_rate: Any) -> None:
        if self.fused:
            from ich_keras.models.torch.adam import fused_update

            fused_update(self, grads, variables, learning_rate)
            return
        # Keras divides by sqrt(v) + epsilon after pulling sqrt(1 - beta_2^t) out of both.
        epsilon, step = self.epsilon, ops.cast(self.iterations + 1, "float32")
        self.epsilon = epsilon * ops.sqrt(1 - ops.power(self.beta_2, step))
        try:
            super()._backend_update_step(grads, variables, learning_rate)
        finally:
            self.epsilon = epsilon

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        if self.weight_decay is None:
            return
        decay = self.weight_decay
        for is_head, factor in ((True, 1.0), (False, self.backbone_factor)):
            group = [v for v in variables if self._is_head(v) == is_head]
            if group:
                self.weight_decay = decay * factor
                super()._apply_weight_decay(group)
        self.weight_decay = decay


def learning_rate_schedule(
    learning_rate: float, schedule: str, total_steps: int | None, warmup_steps: int
) -> Any:
    """Return a constant, or a Keras schedule with a linear warm-up.

    Args:
        learning_rate: the rate after the warm-up.
        schedule: "constant" or "cosine" (down to zero at the last step).
        total_steps: batches of the whole training, which the cosine needs. Keras' schedules count
            batches, also where several make one optimiser step.
        warmup_steps: batches over which the rate rises linearly from zero.

    Raises:
        UsageError: unknown schedule, or a cosine without its length.

    >>> learning_rate_schedule(3e-4, "constant", None, 0)
    0.0003
    >>> cosine = learning_rate_schedule(0.01, "cosine", total_steps=100, warmup_steps=10)
    >>> [round(float(cosine(step)), 4) for step in (0, 5, 10, 55, 100)]
    [0.0, 0.005, 0.01, 0.005, 0.0]
    """
    require_choice("schedule", schedule)
    if schedule == "constant" and not warmup_steps:
        return learning_rate
    if schedule == "cosine" and not total_steps:
        raise UsageError("the cosine schedule needs total_steps, the length of the training.")
    return keras.optimizers.schedules.CosineDecay(
        # Keras warms up only when a target is given; without one it starts at the full rate.
        initial_learning_rate=0.0 if warmup_steps else learning_rate,
        warmup_target=learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps,
        decay_steps=max(1, (total_steps or warmup_steps + 1) - warmup_steps),
        alpha=0.0 if schedule == "cosine" else 1.0,
    )
