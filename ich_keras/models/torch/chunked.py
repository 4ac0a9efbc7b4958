"""Gradients of a loss over many inputs of a network, with a chunk of them in memory at a time.

The loss of a head on all slices of a series needs the slice network's answers to all of them. Two
passes give the gradients of one whole pass: first all answers without a graph, and from them the
loss and its gradients on the answers; then each chunk again, with a graph, which is given its part
of those gradients. Memory is that of one chunk, whatever the number of slices; the forward pass is
computed twice.

Source: Gao et al. 2021, arXiv:2101.06983 (gradient caching); Chen et al. 2016, arXiv:1604.06174
(recomputation).
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
import torch

from ich_keras.keras_private import tensor_of
from ich_keras.models.torch.function import FlatFunction

Chunk: TypeAlias = np.ndarray | torch.Tensor


class ChunkedNetwork:
    """A network of ours as it is trained: with dropout; frozen layers as they are.

    Args:
        model: gives logits and pooled features.

    Raises:
        UnknownStep: the model is not one of our layers.
    """

    def __init__(self, model: Any) -> None:
        self._function = FlatFunction(model, training=True)
        self._tensors = self._function.tensors()
        self.variables = list(model.trainable_variables)

    @property
    def weights(self) -> list[torch.Tensor]:
        """The tensors of its trainable variables."""
        return [tensor_of(variable) for variable in self.variables]

    def __call__(self, inputs: Chunk, seed: int) -> tuple[torch.Tensor, ...]:
        """Return the logits (n, labels) and the features (n, features) of a chunk.

        Args:
            inputs: float (n, ..., channels).
            seed: of dropout: the same one draws the same.
        """
        torch.manual_seed(seed)
        x = torch.as_tensor(inputs).to(self._tensors[0].device)
        found = self._function(x, self._tensors)
        return tuple(one.to(torch.promote_types(one.dtype, torch.float32)) for one in found)


def chunked_gradients(
    network: ChunkedNetwork,
    head: list[Any],
    chunks: Callable[[], Iterable[Chunk]],
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    seed: int = 0,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Compute a loss over all chunks, and its gradients.

    Args:
        network: answers the chunks.
        head: trainable variables on which the loss depends, too.
        chunks: called twice; gives the same inputs in the same order both times.
        loss_of: takes the logits and features of all inputs, in order; gives a number.
        seed: of dropout.

    Returns:
        The loss, and the gradients of the network's trainable variables, then of the head's.
    """
    with torch.no_grad():
        parts = [network(chunk, seed + 1 + n) for n, chunk in enumerate(chunks())]
        answers = [torch.cat(one) for one in zip(*parts, strict=True)]
    del parts
    for answer in answers:
        answer.requires_grad_()
    torch.manual_seed(seed)
    loss = loss_of(*answers)
    of_head = [tensor_of(variable) for variable in head]
    cached = torch.autograd.grad(loss, [*answers, *of_head], allow_unused=True)
    weights = network.weights
    sums = [torch.zeros_like(weight) for weight in weights]
    start = 0
    for n, chunk in enumerate(chunks() if weights else ()):
        found = network(chunk, seed + 1 + n)
        here = slice(start, start + len(found[0]))
        pairs = [
            (one, gradient[here])
            for one, gradient in zip(found, cached[: len(found)], strict=True)
            if gradient is not None
        ]
        outputs, gradients = map(list, zip(*pairs, strict=True))
        own = torch.autograd.grad(outputs, weights, gradients, allow_unused=True)
        for total, one in zip(sums, own, strict=True):
            if one is not None:
                total.add_(one)
        start = here.stop
    rest = [
        torch.zeros_like(weight) if gradient is None else gradient
        for weight, gradient in zip(of_head, cached[len(answers) :], strict=True)
    ]
    return loss.detach(), [*sums, *rest]


def padded(values: torch.Tensor, mask: np.ndarray) -> torch.Tensor:
    """Lay values out where a mask is 1: (n, width) to (series, slices, width), 0 elsewhere.

    Args:
        values: of the slices of one series after the other.
        mask: (series, slices), with n ones.
    """
    found = values.new_zeros((*mask.shape, values.shape[1]))
    places = torch.from_numpy(mask > 0.5).to(values.device)
    return found.masked_scatter(places[..., None], values)
