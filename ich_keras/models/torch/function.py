"""A Keras model as one flat list of torch operations over its own parameters.

The same numbers as the layers give, up to the order of additions; only the running variance of
batch normalisation differs, which is torch's (sum of squares over n - 1; Keras divides by n), as
in the networks the pretrained weights come from.

Why it is faster: a channels-last batch seen through `permute` is torch's own channels_last layout,
so nothing is copied between layouts; padding happens inside the convolution; normalisation is one
operation instead of ten; where a kernel is as deep as the volume, most of what it multiplies is
padding, so the slices become channels of an image and the exact 2D convolution leaves the padding
out (one slice: the middle slice of the kernel); and no layer is called.
"""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import keras
import torch
from torch.utils.checkpoint import checkpoint

from ich_keras.models.graph import Graph, Step, fold_norms, read_graph
from ich_keras.models.options import RECOMPUTE
from ich_keras.models.torch.convolution import Operation, Tensors, Values
from ich_keras.models.torch.layout import channels_last, shallow
from ich_keras.models.torch.operations import Across, Operations

# Steps whose results must not be overwritten: their gradient needs the result, or the result shares
# the memory of its source.
_NOT_TO_OVERWRITE = ("relu", "sigmoid", "gate", "softmax", "subsample", "detach", "dropout")


@dataclass(frozen=True)
class Part:
    """Operations that run one after the other.

    Args:
        operations: (operation, number of the value it makes, numbers of values no longer needed).
        read: numbers of the values that it takes from earlier parts.
        left: numbers of the values that later parts need.
        recomputed: whether it keeps only what it reads and is computed again in the backward pass.
        draws: whether it has dropout, whose second draw must equal the first.
    """

    operations: tuple[tuple[Operation, int, tuple[int, ...]], ...]
    read: tuple[int, ...]
    left: tuple[int, ...]
    recomputed: bool
    draws: bool

    def run(self, values: Values, tensors: Tensors) -> None:
        """Compute the values of this part, and drop those that are no longer needed."""
        for operation, target, finished in self.operations:
            values[target] = operation(values, tensors)
            for number in finished:
                values[number] = None


class FlatFunction:
    """The model as a function of its input and a list of tensors.

    Args:
        model: functional; `ich_keras.models.graph` says what is covered.
        training: use batch statistics and dropout. Without it, batch normalisation is folded into
            the convolution before it.
        precision: "float32", "bfloat16" or "float16" for all but the head; None computes each
            layer in the type of its own policy.
        recompute: keep only what lies between the parts and compute each part again in the
            backward pass: "stage" or "block"; None keeps everything.
        across: the processes that train together; None for one alone.

    Raises:
        UnknownStep: the model is not covered.
    """

    def __init__(
        self,
        model: keras.Model,
        training: bool,
        precision: str | None = None,
        recompute: str | None = None,
        across: Across | None = None,
    ):
        graph = read_graph(model)
        if not training:
            graph = fold_norms(graph)
        self._operations = Operations(training, precision, across)
        self._outputs = graph.outputs
        self._num_values = graph.num_values
        groups = _groups(graph.steps, recompute if training else None)
        self.parts = [self._part(steps, graph, again) for steps, again in groups]

    def _part(self, steps: Sequence[Step], graph: Graph, recomputed: bool) -> Part:
        made = {step.target for step in steps}
        own = set(map(id, steps))
        later = {s for step in graph.steps if id(step) not in own for s in step.sources}
        left = made & (later | set(graph.outputs))
        # Values that may be overwritten: only the next step of this part reads them.
        needed = {step.target for step in steps if step.kind in _NOT_TO_OVERWRITE}
        owned = {value for value in made - left - needed if graph.readers[value] == 1}
        last_reader = {source: step.target for step in steps for source in step.sources}
        operations = tuple(
            (
                self._operations.of(step, owned),
                step.target,
                tuple(s for s, t in last_reader.items() if t == step.target and s in made - left),
            )
            for step in steps
        )
        return Part(
            operations,
            tuple(sorted({source for step in steps for source in step.sources} - made)),
            tuple(sorted(left)),
            recomputed,
            draws=any(step.kind == "dropout" for step in steps),
        )

    def tensors(self) -> list[torch.Tensor]:
        """Return what the function takes: the model's parameters, or what folding made of them."""
        return self._operations.tensors()

    def __call__(self, x: torch.Tensor, tensors: Tensors) -> list[torch.Tensor]:
        """Compute the outputs.

        Args:
            x: (N, ..., channels).
            tensors: from `tensors`.

        Returns:
            The model's outputs, flat: pooled ones (N, channels), others (N, ..., channels).
        """
        values = self.begin(x)
        for part in self.parts:
            if part.recomputed and torch.is_grad_enabled():
                made = checkpoint(
                    self._run_apart,
                    part,
                    tensors,
                    *(values[number] for number in part.read),
                    use_reentrant=False,
                    preserve_rng_state=part.draws,
                    context_fn=lambda: (contextlib.nullcontext(), self._operations.replay()),
                )
                for number, value in zip(part.left, made, strict=True):
                    values[number] = value
            else:
                part.run(values, tensors)
        return [channels_last(values[number], x.dim() - 2) for number in self._outputs]

    def from_first_output(
        self, x: torch.Tensor, tensors: Tensors
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute the outputs, with gradients from the first one on, and no earlier.

        Args:
            x: (N, ..., channels).
            tensors: from `tensors`.

        Returns:
            (the first output as it lies in memory, channels first, a leaf of the gradients; the
            other outputs, as from a call).
        """
        values, place = self.begin(x), self._outputs[0]
        leaf = None
        if place == 0:
            leaf = values[0] = values[0].detach().requires_grad_()
        for part in self.parts:
            for operation, target, finished in part.operations:
                with torch.set_grad_enabled(leaf is not None):
                    values[target] = operation(values, tensors)
                if target == place:
                    leaf = values[target] = values[target].detach().requires_grad_()
                for number in finished:
                    values[number] = None
        assert leaf is not None  # an output is the input, or made by a step
        return leaf, [channels_last(values[number], x.dim() - 2) for number in self._outputs[1:]]

    def begin(self, x: torch.Tensor) -> Values:
        """Return the list of values with the input in its place; `parts` fill in the rest."""
        values: Values = [None] * self._num_values
        values[0] = shallow(x.movedim(-1, 1))
        return values

    def _run_apart(
        self, part: Part, tensors: Tensors, *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        values: Values = [None] * self._num_values
        for number, value in zip(part.read, inputs, strict=True):
            values[number] = value
        part.run(values, tensors)
        return tuple(values[number] for number in part.left)


def _groups(steps: Sequence[Step], recompute: str | None) -> list[tuple[list[Step], bool]]:
    """Cut the steps into parts: stem, each stage or block, head (which is never recomputed)."""
    if recompute is None:
        return [(list(steps), False)]
    pattern = re.compile(RECOMPUTE[recompute])
    matches = [pattern.match(step.name) for step in steps]
    last = {match[0]: place for place, match in enumerate(matches) if match}
    ends = sorted(last.values())
    first = min((place for place, match in enumerate(matches) if match), default=len(steps))
    groups: list[tuple[list[Step], bool]] = []
    start = 0
    for end in [first - 1, *ends]:
        groups.append((list(steps[start : end + 1]), True))
        start = end + 1
    groups.append((list(steps[start:]), False))
    return [(group, again) for group, again in groups if group]
