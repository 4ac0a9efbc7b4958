"""Each step of a graph as a torch operation over numbered values."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ich_keras.keras_private import tensor_of
from ich_keras.models.graph import Step
from ich_keras.models.torch.convolution import Operation, Tensors, Values, convolution
from ich_keras.models.torch.distributed import Group
from ich_keras.models.torch.layout import (
    as_channels,
    cast,
    deep,
    interleaved,
    num_interleaved,
    shallow,
    side_by_side,
)
from ich_keras.models.torch.synchronised import synchronised_batch_norm
from ich_keras.models.windows import WINDOW_LAYERS, WINDOWS

# The head, what follows it and learnable windows stay in float32 whatever the precision.
FULL_PRECISION = ("dense", "dropout", "sigmoid", "softmax")


@dataclass(frozen=True)
class Across:
    """A training across several processes.

    Args:
        group: the processes.
        synchronised: batch normalisation takes the statistics of all; otherwise each process takes
            those of its own samples.
    """

    group: Group
    synchronised: bool


class Operations:
    """Makes the operations of one function, and numbers the tensors that they take.

    Args:
        training: use batch statistics and dropout.
        precision: see `FlatFunction`.
        across: the processes that train together; None for one alone.
    """

    def __init__(self, training: bool, precision: str | None, across: Across | None = None):
        self._training = training
        self._precision = precision
        self._across = across
        self._makers: list[Callable[[], torch.Tensor]] = []
        self._replaying = False

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that the operations take, in the order of their numbers."""
        return [make() for make in self._makers]

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """Compute for a second time: the statistics of normalisation stay."""
        self._replaying = True
        try:
            yield
        finally:
            self._replaying = False

    def of(self, step: Step, owned: set[int]) -> Operation:
        """Return the operation of a step.

        Args:
            step: of a graph.
            owned: numbers of the values that may be overwritten.
        """
        return getattr(self, f"_{step.kind}")(step, owned)

    def _dtype(self, step: Step) -> torch.dtype:
        is_full = step.kind in FULL_PRECISION or step.name in WINDOW_LAYERS
        if self._precision is None or is_full:
            return getattr(torch, step.dtype)
        return getattr(torch, self._precision)

    def _number(self, variable: Any) -> int:
        """Take a variable's tensor into the list and return its number."""
        return self._number_of(lambda: tensor_of(variable))

    def _number_of(self, make: Callable[[], torch.Tensor]) -> int:
        self._makers.append(make)
        return len(self._makers) - 1

    def _conv(self, step: Step, owned: set[int]) -> Operation:
        layer, dtype = step.layer, self._dtype(step)
        if step.norm is None:
            kernel = self._number(layer.kernel)
            bias = self._number(layer.bias) if layer.use_bias else None
        else:
            kernel = self._number_of(lambda: _folded_kernel(step, dtype))
            bias = self._number_of(lambda: _folded_bias(step, dtype))
        if step.name == WINDOWS and bias is not None:
            return _windows(step.sources[0], kernel, bias, dtype)
        return convolution(step, kernel, bias, dtype)

    def _batch_norm(self, step: Step, owned: set[int]) -> Operation:
        layer, dtype, source = step.layer, self._dtype(step), step.sources[0]
        gamma, beta = self._number(layer.gamma), self._number(layer.beta)
        mean, variance = self._number(layer.moving_mean), self._number(layer.moving_variance)
        by_batch = self._training and layer.trainable
        weight_of_new, epsilon = 1 - layer.momentum, layer.epsilon
        across = self._across
        group = across.group if across is not None and across.synchronised else None

        def batch_norm(values: Values, tensors: Tensors) -> torch.Tensor:
            x, running = cast(values[source], dtype), (tensors[mean], tensors[variance])
            slices = num_interleaved(x)
            x = side_by_side(x) if slices else x
            if by_batch and self._replaying:
                # Computed again for the backward pass: the statistics must not move twice.
                running = running[0].clone(), running[1].clone()
            scale, shift = tensors[gamma], tensors[beta]
            if by_batch and group is not None:
                x = synchronised_batch_norm(x, running, scale, shift, weight_of_new, epsilon, group)
                return interleaved(x, slices) if slices else x
            if by_batch and x.numel() == x.shape[1]:
                return _norm_of_one(x, *running, scale, shift, weight_of_new)
            x = F.batch_norm(x, *running, scale, shift, by_batch, weight_of_new, epsilon)
            return interleaved(x, slices) if slices else x

        return batch_norm

    def _group_norm(self, step: Step, owned: set[int]) -> Operation:
        layer, dtype, source = step.layer, self._dtype(step), step.sources[0]
        gamma, beta = self._number(layer.gamma), self._number(layer.beta)
        groups, epsilon = layer.groups, layer.epsilon
        wide = torch.promote_types(dtype, torch.float32)  # mixed types are not for every device

        def group_norm(values: Values, tensors: Tensors) -> torch.Tensor:
            x = cast(values[source], wide)
            scale, shift = cast(tensors[gamma], wide), cast(tensors[beta], wide)
            return cast(F.group_norm(x, groups, scale, shift, epsilon), dtype)

        return group_norm

    def _relu(self, step: Step, owned: set[int]) -> Operation:
        source = step.sources[0]
        # What made an owned value (normalisation, addition) does not need it for its gradient.
        is_owned = source in owned

        def relu(values: Values, tensors: Tensors) -> torch.Tensor:
            x = values[source]
            # Interleaved slices are views: autograd would copy the gradient of an overwritten one.
            return torch.relu_(x) if is_owned and not num_interleaved(x) else torch.relu(x)

        return relu

    def _clip(self, step: Step, owned: set[int]) -> Operation:
        source, most = step.sources[0], step.layer.max_value
        # As Keras: at 0 there is no gradient, at the upper limit there is.
        return lambda values, tensors: torch.relu(values[source]).clamp(max=most)

    def _rescale(self, step: Step, owned: set[int]) -> Operation:
        source, dtype = step.sources[0], self._dtype(step)
        scale, offset = float(step.layer.scale), float(step.layer.offset)
        return lambda values, tensors: cast(values[source], dtype) * scale + offset

    def _standardise(self, step: Step, owned: set[int]) -> Operation:
        layer, source, dtype = step.layer, step.sources[0], self._dtype(step)
        mean = self._number_of(lambda: layer.mean.flatten())
        std = self._number_of(lambda: torch.sqrt(layer.variance.flatten()))

        def standardise(values: Values, tensors: Tensors) -> torch.Tensor:
            x = cast(values[source], dtype)
            shape = (1, -1, *[1] * (x.dim() - 2))
            shift, scale = (cast(tensors[number], dtype).view(shape) for number in (mean, std))
            return (x - shift) / scale

        return standardise

    def _add(self, step: Step, owned: set[int]) -> Operation:
        first, *others = step.sources
        is_owned, dtype = first in owned, self._dtype(step)

        def add(values: Values, tensors: Tensors) -> torch.Tensor:
            total = cast(values[first], dtype)
            for number in others:
                other = cast(values[number], dtype)
                is_mine = is_owned and not num_interleaved(total)
                total = total.add_(other) if is_mine else total + other
            return total

        return add

    def _max_pool(self, step: Step, owned: set[int]) -> Operation:
        layer, source = step.layer, step.sources[0]
        size, stride, padding = layer.pool_size, layer.strides, step.amounts
        if len(size) == 2:
            return lambda values, tensors: F.max_pool2d(values[source], size, stride, padding)
        within = size[1:], stride[1:], padding[1:]
        # Whether one slice in gives one slice out.
        is_flat = 0 <= 1 + 2 * padding[0] - size[0] < stride[0]

        def max_pool(values: Values, tensors: Tensors) -> torch.Tensor:
            x = values[source]
            if x.dim() == 4 and is_flat:
                return F.max_pool2d(x, *within)
            slices = num_interleaved(x)
            if not slices:
                return shallow(F.max_pool3d(deep(x), size, stride, padding))
            x = F.max_pool2d(as_channels(x), *within)
            if size[0] == stride[0] == 1:
                return x.unflatten(1, (slices, -1)).transpose(1, 2)
            rows_and_columns = x.shape[2:]
            x = x.unflatten(1, (slices, -1)).permute(0, 2, 3, 4, 1).flatten(2, 3)
            x = F.max_pool2d(x, (1, size[0]), (1, stride[0]), (0, padding[0]))
            return shallow(x.unflatten(2, rows_and_columns).permute(0, 1, 4, 2, 3))

        return max_pool

    def _avg_pool(self, step: Step, owned: set[int]) -> Operation:
        layer, source, dtype = step.layer, step.sources[0], self._dtype(step)
        size, stride = layer.pool_size, layer.strides
        if len(size) == 2:
            return lambda values, tensors: F.avg_pool2d(cast(values[source], dtype), size, stride)
        return lambda values, tensors: shallow(
            F.avg_pool3d(deep(cast(values[source], dtype)), size, stride)
        )

    def _mean(self, step: Step, owned: set[int]) -> Operation:
        source, dtype = step.sources[0], self._dtype(step)
        if not step.layer.keepdims:
            return lambda values, tensors: cast(values[source], dtype).flatten(2).mean(dim=2)

        def mean(values: Values, tensors: Tensors) -> torch.Tensor:
            x = cast(values[source], dtype)
            return shallow(x.mean(dim=tuple(range(2, x.dim())), keepdim=True))

        return mean

    def _multiply(self, step: Step, owned: set[int]) -> Operation:
        sources, dtype = step.sources, self._dtype(step)

        def multiply(values: Values, tensors: Tensors) -> torch.Tensor:
            factors = [cast(values[source], dtype) for source in sources]
            if len({factor.dim() for factor in factors}) > 1:  # an image, of volumes one slice deep
                factors = [deep(factor) for factor in factors]
            return math.prod(factors[1:], start=factors[0])

        return multiply

    def _concat(self, step: Step, owned: set[int]) -> Operation:
        sources, dtype = step.sources, self._dtype(step)

        def concat(values: Values, tensors: Tensors) -> torch.Tensor:
            return torch.cat([cast(values[source], dtype) for source in sources], 1)

        return concat

    def _gate(self, step: Step, owned: set[int]) -> Operation:
        return self._sigmoid(step, owned)

    def _dropout(self, step: Step, owned: set[int]) -> Operation:
        source, dtype, rate = step.sources[0], self._dtype(step), step.layer.rate
        if not self._training:
            return lambda values, tensors: cast(values[source], dtype)
        if self._across is None:
            return lambda values, tensors: F.dropout(cast(values[source], dtype), rate, True)
        group = self._across.group

        def dropout(values: Values, tensors: Tensors) -> torch.Tensor:
            # Each process draws for the whole batch, alike, and uses the rows of its own samples:
            # they are dropped as in one process.
            x, share = cast(values[source], dtype), group.share
            drawn = F.dropout(x.new_ones((share.total, *x.shape[1:])), rate, True)
            return x * drawn[share.start : share.start + share.own]

        return dropout

    def _dense(self, step: Step, owned: set[int]) -> Operation:
        layer, source, dtype = step.layer, step.sources[0], self._dtype(step)
        kernel = self._number(layer.kernel)
        bias = self._number(layer.bias) if layer.use_bias else None

        def dense(values: Values, tensors: Tensors) -> torch.Tensor:
            shift = None if bias is None else cast(tensors[bias], dtype)
            return F.linear(cast(values[source], dtype), cast(tensors[kernel], dtype).t(), shift)

        return dense

    def _sigmoid(self, step: Step, owned: set[int]) -> Operation:
        source, dtype = step.sources[0], self._dtype(step)
        return lambda values, tensors: torch.sigmoid(cast(values[source], dtype))

    def _softmax(self, step: Step, owned: set[int]) -> Operation:
        source, dtype = step.sources[0], self._dtype(step)
        return lambda values, tensors: torch.softmax(cast(values[source], dtype), -1)

    def _pad(self, step: Step, owned: set[int]) -> Operation:
        source, rank = step.sources[0], len(step.amounts)
        amounts = [n for pair in reversed(step.amounts) for n in pair]  # torch: last axis first

        def pad(values: Values, tensors: Tensors) -> torch.Tensor:
            x = values[source]
            return shallow(F.pad(deep(x) if rank == 3 else x, amounts))

        return pad

    def _channels(self, step: Step, owned: set[int]) -> Operation:
        source, missing = step.sources[0], step.amounts[0]

        def channels(values: Values, tensors: Tensors) -> torch.Tensor:
            x = values[source]
            return F.pad(x, [0, 0] * (x.dim() - 2) + [0, missing])

        return channels

    def _subsample(self, step: Step, owned: set[int]) -> Operation:
        source, steps = step.sources[0], step.amounts

        def subsample(values: Values, tensors: Tensors) -> torch.Tensor:
            x = values[source]
            inner = steps[len(steps) - (x.dim() - 2) :]
            return shallow(x[(slice(None), slice(None), *(slice(None, None, s) for s in inner))])

        return subsample

    def _detach(self, step: Step, owned: set[int]) -> Operation:
        source = step.sources[0]
        return lambda values, tensors: values[source].detach()


def _windows(source: int, kernel: int, bias: int, dtype: torch.dtype) -> Operation:
    """Return the 1x1 convolution of one channel by plain operations: no GPU rounds these to
    TensorFloat-32, and a compiler fuses them with what follows.
    """

    def windows(values: Values, tensors: Tensors) -> torch.Tensor:
        hu = cast(values[source], dtype).movedim(1, -1)
        factor, shift = (cast(tensors[number], dtype).flatten() for number in (kernel, bias))
        return torch.addcmul(shift, hu, factor).movedim(-1, 1)

    return windows


def _norm_of_one(
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight_of_new: float,
) -> torch.Tensor:
    """Normalise one value per channel, as Keras does: torch refuses, for n - 1 is zero."""
    with torch.no_grad():
        mean.lerp_(x.flatten().to(mean.dtype), weight_of_new)
        variance.mul_(1 - weight_of_new)
    shape = (1, -1, *[1] * (x.dim() - 2))
    return ((x - x) * scale.view(shape) + shift.view(shape)).to(x.dtype)


def _norm_factor(layer: Any) -> torch.Tensor:
    variance = tensor_of(layer.moving_variance)
    return tensor_of(layer.gamma).to(variance.dtype) * torch.rsqrt(variance + layer.epsilon)


def _folded_kernel(step: Step, dtype: torch.dtype) -> torch.Tensor:
    """W' = W gamma / sqrt(variance + epsilon), per output channel (the last axis)."""
    with torch.no_grad():
        return (tensor_of(step.layer.kernel) * _norm_factor(step.norm)).to(dtype)


def _folded_bias(step: Step, dtype: torch.dtype) -> torch.Tensor:
    """b' = beta + (b - mean) gamma / sqrt(variance + epsilon)."""
    with torch.no_grad():
        before = tensor_of(step.layer.bias) if step.layer.use_bias else 0.0
        offset = (before - tensor_of(step.norm.moving_mean)) * _norm_factor(step.norm)
        return (tensor_of(step.norm.beta) + offset).to(dtype)
