"""The fused Adam kernel of torch on the slots of Keras' optimiser."""

import keras
import torch


@torch.no_grad()
def fused_update(optimizer, grads: list, variables: list, learning_rate) -> None:
    """Make one Adam step in place.

    Args:
        optimizer: an `ich_keras.models.optimizer.Adam`, built.
        grads: torch tensors, one per variable.
        variables: Keras variables.
        learning_rate: a Keras variable, a tensor or a number.

    Source:
        `torch.optim.Adam(fused=True)`.
    """
    steps = optimizer.iterations
    steps = (steps._value if isinstance(steps, keras.Variable) else steps) + 1
    steps = steps.to(torch.float32)
    rate = learning_rate._value if isinstance(learning_rate, keras.Variable) else learning_rate
    by_dtype: dict[torch.dtype, list] = {}
    for grad, variable in zip(grads, variables, strict=True):
        weight, place = variable._value, optimizer._get_variable_index(variable)
        row = [weight, _in_order_of(weight, grad)]
        row += [_laid_out(weight, slots[place]) for slots in _slots(optimizer)]
        if not weight.is_contiguous():
            # As flat arrays: what is not contiguous the kernel copies first.
            row = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in row]
        by_dtype.setdefault(weight.dtype, []).append(row)
    for rows in by_dtype.values():
        columns = [list(column) for column in zip(*rows, strict=True)]
        weights, ordered, momentums, velocities, *highest = columns
        torch._fused_adam_(
            weights,
            ordered,
            momentums,
            velocities,
            highest[0] if highest else [],
            [steps] * len(rows),
            lr=rate,
            beta1=optimizer.beta_1,
            beta2=optimizer.beta_2,
            weight_decay=0.0,  # Keras has decayed the weights already
            eps=optimizer.epsilon,
            amsgrad=optimizer.amsgrad,
            maximize=False,
        )


def _slots(optimizer) -> tuple[list, ...]:
    slots = optimizer._momentums, optimizer._velocities
    return (*slots, optimizer._velocity_hats) if optimizer.amsgrad else slots


# The kernel pairs elements by their place in memory, whatever the shape says: unequal strides
# would train the wrong weights without a word. So every step looks.


def _laid_out(weight: torch.Tensor, variable) -> torch.Tensor:
    """Return an optimiser's slot, laid out like the weight from now on."""
    slot = variable._value
    if slot.stride() != weight.stride():
        slot.data = _in_order_of(weight, slot.data)
    return slot


def _in_order_of(weight: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the other tensor with the memory order and type of the weight."""
    if other.stride() == weight.stride() and other.dtype is weight.dtype:
        return other
    is_alike = other.dtype is weight.dtype and all(
        # The stride of an axis of length 1 is never used.
        length == 1 or one == two
        for length, one, two in zip(weight.shape, weight.stride(), other.stride(), strict=True)
    )
    return other if is_alike else torch.empty_like(weight).copy_(other)
