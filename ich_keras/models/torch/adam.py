"""The fused Adam kernel of torch on the slots of Keras' optimiser."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch

from ich_keras.keras_private import adam_slots, fused_adam, slot_place, tensor_of


@torch.no_grad()
def fused_update(
    optimizer: Any, grads: Sequence[torch.Tensor], variables: Sequence[Any], learning_rate: Any
) -> None:
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
    steps = (tensor_of(steps) if isinstance(steps, keras.Variable) else steps) + 1
    steps = steps.to(torch.float32)
    rate = tensor_of(learning_rate) if isinstance(learning_rate, keras.Variable) else learning_rate
    by_dtype: dict[torch.dtype, list[tuple[torch.Tensor, ...]]] = {}
    for grad, variable in zip(grads, variables, strict=True):
        weight, *slots = _tensors(optimizer, variable)
        grad = _in_order_of(tensor_of(variable), grad)
        if (grad.shape, grad.stride()) != (weight.shape, weight.stride()):
            grad = grad.as_strided(weight.shape, weight.stride())
        row = (weight, grad, *slots)
        by_dtype.setdefault(weight.dtype, []).append(row)
    for rows in by_dtype.values():
        columns = [list(column) for column in zip(*rows, strict=True)]
        weights, ordered, momentums, velocities, *highest = columns
        fused_adam(
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


# The kernel pairs elements by their place in memory, whatever the shape says: unequal strides
# would silently train the wrong weights. So every step checks.


def zeros_in_order_of(variable: Any) -> Callable[..., torch.Tensor]:
    """Return a Keras initialiser for a slot that lies in memory like its weight.

    Rearranging the slots in the first step instead would hold most of them twice.
    """
    return lambda shape, dtype: torch.zeros_like(tensor_of(variable).detach())


def _lay_out(slot: Any, weight: torch.Tensor) -> None:
    tensor = tensor_of(slot)
    if tensor.stride() != weight.stride():
        tensor.data = _in_order_of(weight, tensor.data)


def _tensors(optimizer: Any, variable: Any) -> list[torch.Tensor]:
    """Return a weight and its slots as the kernel takes them without a copy.

    They are made once: the views hold their memory, so an equal address is the same memory.
    """
    place = slot_place(optimizer, variable)
    slots = adam_slots(optimizer, place)
    weight = tensor_of(variable)
    tensors = [weight, *map(tensor_of, slots)]
    views = optimizer.fused_views.get(place)
    if views is None or any(
        tensor.data_ptr() != view.data_ptr() for tensor, view in zip(tensors, views, strict=True)
    ):
        for slot in slots:
            _lay_out(slot, weight)
        if _takes_any(weight):
            shape, stride = weight.shape, weight.stride()
        else:
            shape, stride = (weight.numel(),), (1,)
        views = [tensor.as_strided(shape, stride) for tensor in tensors]
        optimizer.fused_views[place] = views
    return views


def _takes_any(weight: torch.Tensor) -> bool:
    """Tell whether the kernel takes any memory order that all its arrays share, as on a GPU; on
    the CPU it copies what is not contiguous."""
    return weight.device.type != "cpu"


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
