"""The fused Adam kernel of torch on the slots of Keras' optimiser."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import torch

from ich_keras.keras_private import adam_slots, fused_adam, slot_place, tensor_of


@dataclass(frozen=True)
class Group:
    """Weights of one type, which one call of the kernel updates.

    Args:
        places: of their gradients among all.
        like: each one's weight, whose order in memory the gradient must have.
        columns: weights, first and second moments and, with amsgrad, the largest second ones, as
            the kernel takes them without a copy.
    """

    places: list[int]
    like: list[torch.Tensor]
    columns: list[list[torch.Tensor]]


@dataclass(frozen=True)
class FusedPlan:
    """What the kernel takes, made once: looking it up for each weight takes as long as the kernel.

    Args:
        variables: Keras variables that are trained.
        sources: those and their slots.
        addresses: where each source lay, and its strides.
        groups: of weights.
    """

    variables: list[Any]
    sources: list[Any]
    addresses: list[tuple[int, tuple[int, ...]]]
    groups: list[Group]

    def holds(self) -> bool:
        """Tell whether all still lies where it lay."""
        return _addresses(self.sources) == self.addresses


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
    key = tuple(map(id, variables))  # the plan keeps them, so no other gets their numbers
    plan = optimizer.fused_plans.get(key)
    if plan is None or not plan.holds():
        plan = optimizer.fused_plans[key] = _plan(optimizer, variables)
    for group in plan.groups:
        weights, momentums, velocities, *highest = group.columns
        ordered = [
            _as_laid_out(grads[place], like, weight)
            for place, like, weight in zip(group.places, group.like, weights, strict=True)
        ]
        fused_adam(
            weights,
            ordered,
            momentums,
            velocities,
            highest[0] if highest else [],
            [steps] * len(weights),
            lr=rate,
            beta1=optimizer.beta_1,
            beta2=optimizer.beta_2,
            weight_decay=0.0,  # Keras has decayed the weights already
            eps=optimizer.epsilon,
            amsgrad=optimizer.amsgrad,
            maximize=False,
        )


def _plan(optimizer: Any, variables: Sequence[Any]) -> FusedPlan:
    by_dtype: dict[torch.dtype, list[tuple[int, list[torch.Tensor]]]] = {}
    sources: list[Any] = []
    for place, variable in enumerate(variables):
        slots = adam_slots(optimizer, slot_place(optimizer, variable))
        weight = tensor_of(variable)
        for slot in slots:
            _lay_out(slot, weight)
        sources += [variable, *slots]
        views = _views([weight, *map(tensor_of, slots)])
        by_dtype.setdefault(weight.dtype, []).append((place, [weight, *views]))
    groups = []
    for rows in by_dtype.values():
        like, *columns = (list(column) for column in zip(*(row for _, row in rows), strict=True))
        groups.append(Group([place for place, _ in rows], like, columns))
    return FusedPlan(list(variables), sources, _addresses(sources), groups)


def _addresses(sources: list[Any]) -> list[tuple[int, tuple[int, ...]]]:
    tensors = map(tensor_of, sources)
    return [(tensor.data_ptr(), tensor.stride()) for tensor in tensors]


def _as_laid_out(grad: torch.Tensor, like: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return a gradient as the kernel takes it: in its weight's order, in the shape of its view."""
    grad = _in_order_of(like, grad)
    if weight is like and grad.stride() == weight.stride():
        return grad
    return grad.as_strided(weight.shape, weight.stride())


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


def _views(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return a weight and its slots as the kernel takes them without a copy."""
    weight = tensors[0]
    if weight.is_contiguous() or _takes_any(weight):
        return tensors
    return [tensor.as_strided((weight.numel(),), (1,)) for tensor in tensors]


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
