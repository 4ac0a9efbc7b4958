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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import keras
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ich_keras.models.graph import Graph, Step, fold_norms, read_graph
from ich_keras.models.presets import RECOMPUTE

# The head and what follows it stay in float32 whatever the precision.
FULL_PRECISION = ("dense", "dropout", "sigmoid")
# Whose results must not be overwritten: their gradient needs them, or they are their source's.
_NOT_TO_OVERWRITE = ("relu", "sigmoid", "subsample", "detach", "dropout")

# Pixels of a slice up to which slices are not made channels.
_SMALL_IMAGE = 16

Operation = Callable[[list, Sequence[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class _Part:
    """A run of operations.

    Args:
        operations: (operation, number of the value it makes, numbers of values no longer needed).
        read: numbers of the values it needs from before.
        left: numbers of the values it leaves for later.
        recomputed: whether it keeps nothing for the backward pass but what it reads.
        draws: whether it has dropout, which must draw the same again.
    """

    operations: tuple[tuple[Operation, int, tuple[int, ...]], ...]
    read: tuple[int, ...]
    left: tuple[int, ...]
    recomputed: bool
    draws: bool


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

    Raises:
        UnknownStep: the model is not covered.
    """

    def __init__(
        self,
        model: keras.Model,
        training: bool,
        precision: str | None = None,
        recompute: str | None = None,
    ):
        graph = read_graph(model)
        if not training:
            graph = fold_norms(graph)
        self._training = training
        self._precision = precision
        self._makers: list[Callable[[], torch.Tensor]] = []
        self._replaying = False
        self._outputs = graph.outputs
        self._num_values = graph.num_values
        groups = _groups(graph.steps, recompute if training else None)
        self.parts = [self._part(steps, graph, again) for steps, again in groups]

    def _part(self, steps: Sequence[Step], graph: Graph, recomputed: bool) -> _Part:
        made = {step.target for step in steps}
        own = set(map(id, steps))
        later = {s for step in graph.steps if id(step) not in own for s in step.sources}
        left = made & (later | set(graph.outputs))
        # Values that may be overwritten: nobody but the next step of this part reads them.
        needed = {step.target for step in steps if step.kind in _NOT_TO_OVERWRITE}
        owned = {value for value in made - left - needed if graph.readers[value] == 1}
        last_reader = {source: step.target for step in steps for source in step.sources}
        operations = tuple(
            (
                self._operation(step, owned),
                step.target,
                tuple(s for s, t in last_reader.items() if t == step.target and s in made - left),
            )
            for step in steps
        )
        return _Part(
            operations,
            tuple(sorted({source for step in steps for source in step.sources} - made)),
            tuple(sorted(left)),
            recomputed,
            draws=any(step.kind == "dropout" for step in steps),
        )

    def tensors(self) -> list[torch.Tensor]:
        """Return what the function takes: the model's parameters, or what folding made of them."""
        return [make() for make in self._makers]

    def __call__(self, x: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
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
                    context_fn=lambda: (contextlib.nullcontext(), self._replay()),
                )
                for number, value in zip(part.left, made, strict=True):
                    values[number] = value
            else:
                _run(part, values, tensors)
        return [_channels_last(values[number], x.dim() - 2) for number in self._outputs]

    def begin(self, x: torch.Tensor) -> list:
        """Return the list of values with the input in its place; `parts` fill in the rest."""
        values: list = [None] * self._num_values
        values[0] = _shallow(x.movedim(-1, 1))
        return values

    def _run_apart(self, part: _Part, tensors, *inputs) -> tuple:
        values: list = [None] * self._num_values
        for number, value in zip(part.read, inputs, strict=True):
            values[number] = value
        _run(part, values, tensors)
        return tuple(values[number] for number in part.left)

    @contextlib.contextmanager
    def _replay(self):
        self._replaying = True
        try:
            yield
        finally:
            self._replaying = False

    def _dtype(self, step: Step) -> torch.dtype:
        is_full = self._precision is None or step.kind in FULL_PRECISION
        return getattr(torch, step.dtype if is_full else self._precision)

    def _number(self, variable) -> int:
        """Take a variable's tensor into the list and return its place."""
        return self._number_of(lambda: variable._value)

    def _number_of(self, make: Callable[[], torch.Tensor]) -> int:
        self._makers.append(make)
        return len(self._makers) - 1

    def _operation(self, step: Step, owned: set[int]) -> Operation:
        return getattr(self, f"_{step.kind}")(step, owned)

    def _conv(self, step: Step, owned) -> Operation:
        layer, dtype = step.layer, self._dtype(step)
        if step.norm is None:
            kernel = self._number(layer.kernel)
            bias = self._number(layer.bias) if layer.use_bias else None
        else:
            kernel = self._number_of(lambda: _folded_kernel(step, dtype))
            bias = self._number_of(lambda: _folded_bias(step, dtype))
        return _convolution(step, kernel, bias, dtype)

    def _batch_norm(self, step: Step, owned) -> Operation:
        layer, dtype, source = step.layer, self._dtype(step), step.sources[0]
        gamma, beta = self._number(layer.gamma), self._number(layer.beta)
        mean, variance = self._number(layer.moving_mean), self._number(layer.moving_variance)
        by_batch = self._training and layer.trainable
        weight_of_new, epsilon = 1 - layer.momentum, layer.epsilon

        def batch_norm(values, tensors):
            x, running = _cast(values[source], dtype), (tensors[mean], tensors[variance])
            slices = _num_interleaved(x)
            x = _side_by_side(x) if slices else x
            if by_batch and self._replaying:
                # Computed again for the backward pass: the statistics must not move twice.
                running = running[0].clone(), running[1].clone()
            scale, shift = tensors[gamma], tensors[beta]
            if by_batch and x.numel() == x.shape[1]:
                return _norm_of_one(x, *running, scale, shift, weight_of_new)
            x = F.batch_norm(x, *running, scale, shift, by_batch, weight_of_new, epsilon)
            return _interleaved(x, slices) if slices else x

        return batch_norm

    def _group_norm(self, step: Step, owned) -> Operation:
        layer, dtype, source = step.layer, self._dtype(step), step.sources[0]
        gamma, beta = self._number(layer.gamma), self._number(layer.beta)
        groups, epsilon = layer.groups, layer.epsilon
        wide = torch.promote_types(dtype, torch.float32)  # mixed types are not for every device

        def group_norm(values, tensors):
            x = _cast(values[source], wide)
            scale, shift = _cast(tensors[gamma], wide), _cast(tensors[beta], wide)
            return _cast(F.group_norm(x, groups, scale, shift, epsilon), dtype)

        return group_norm

    def _relu(self, step: Step, owned: set[int]) -> Operation:
        source = step.sources[0]
        # What made an owned value (normalisation, addition) does not need it for its gradient.
        is_owned = source in owned

        def relu(values, tensors):
            x = values[source]
            # Interleaved slices are views: autograd would copy the gradient of an overwritten one.
            return torch.relu_(x) if is_owned and not _num_interleaved(x) else torch.relu(x)

        return relu

    def _add(self, step: Step, owned: set[int]) -> Operation:
        first, *others = step.sources
        is_owned, dtype = first in owned, self._dtype(step)

        def add(values, tensors):
            total = _cast(values[first], dtype)
            for number in others:
                other = _cast(values[number], dtype)
                is_mine = is_owned and not _num_interleaved(total)
                total = total.add_(other) if is_mine else total + other
            return total

        return add

    def _max_pool(self, step: Step, owned) -> Operation:
        layer, source = step.layer, step.sources[0]
        size, stride, padding = layer.pool_size, layer.strides, step.amounts
        if len(size) == 2:
            return lambda values, tensors: F.max_pool2d(values[source], size, stride, padding)
        within = size[1:], stride[1:], padding[1:]
        # Whether one slice in gives one slice out.
        is_flat = 0 <= 1 + 2 * padding[0] - size[0] < stride[0]

        def max_pool(values, tensors):
            x = values[source]
            if x.dim() == 4 and is_flat:
                return F.max_pool2d(x, *within)
            slices = _num_interleaved(x)
            if not slices:
                return _shallow(F.max_pool3d(_deep(x), size, stride, padding))
            x = F.max_pool2d(_as_channels(x), *within)
            if size[0] == stride[0] == 1:
                return x.unflatten(1, (slices, -1)).transpose(1, 2)
            rows_and_columns = x.shape[2:]
            x = x.unflatten(1, (slices, -1)).permute(0, 2, 3, 4, 1).flatten(2, 3)
            x = F.max_pool2d(x, (1, size[0]), (1, stride[0]), (0, padding[0]))
            return _shallow(x.unflatten(2, rows_and_columns).permute(0, 1, 4, 2, 3))

        return max_pool

    def _mean(self, step: Step, owned) -> Operation:
        source, dtype = step.sources[0], self._dtype(step)
        return lambda values, tensors: _cast(values[source], dtype).flatten(2).mean(dim=2)

    def _dropout(self, step: Step, owned) -> Operation:
        source, dtype, rate = step.sources[0], self._dtype(step), step.layer.rate
        if not self._training:
            return lambda values, tensors: _cast(values[source], dtype)
        return lambda values, tensors: F.dropout(_cast(values[source], dtype), rate, True)

    def _dense(self, step: Step, owned) -> Operation:
        layer, source, dtype = step.layer, step.sources[0], self._dtype(step)
        kernel = self._number(layer.kernel)
        bias = self._number(layer.bias) if layer.use_bias else None

        def dense(values, tensors):
            shift = None if bias is None else _cast(tensors[bias], dtype)
            return F.linear(_cast(values[source], dtype), _cast(tensors[kernel], dtype).t(), shift)

        return dense

    def _sigmoid(self, step: Step, owned) -> Operation:
        source, dtype = step.sources[0], self._dtype(step)
        return lambda values, tensors: torch.sigmoid(_cast(values[source], dtype))

    def _pad(self, step: Step, owned) -> Operation:
        source, rank = step.sources[0], len(step.amounts)
        amounts = [n for pair in reversed(step.amounts) for n in pair]  # torch: last axis first

        def pad(values, tensors):
            x = values[source]
            return _shallow(F.pad(_deep(x) if rank == 3 else x, amounts))

        return pad

    def _channels(self, step: Step, owned) -> Operation:
        source, missing = step.sources[0], step.amounts[0]

        def channels(values, tensors):
            x = values[source]
            return F.pad(x, [0, 0] * (x.dim() - 2) + [0, missing])

        return channels

    def _subsample(self, step: Step, owned) -> Operation:
        source, steps = step.sources[0], step.amounts

        def subsample(values, tensors):
            x = values[source]
            inner = steps[len(steps) - (x.dim() - 2) :]
            return _shallow(x[(slice(None), slice(None), *(slice(None, None, s) for s in inner))])

        return subsample

    def _detach(self, step: Step, owned) -> Operation:
        source = step.sources[0]
        return lambda values, tensors: values[source].detach()


def _run(part: _Part, values: list, tensors) -> None:
    for operation, target, finished in part.operations:
        values[target] = operation(values, tensors)
        for number in finished:
            values[number] = None


def _groups(steps: Sequence[Step], recompute: str | None) -> list[tuple[list[Step], bool]]:
    """Cut the steps into parts: stem, each stage or block, head (which is never recomputed)."""
    if recompute is None:
        return [(list(steps), False)]
    pattern = re.compile(RECOMPUTE[recompute])
    names = [(found := pattern.match(step.name)) and found[0] for step in steps]
    last = {name: place for place, name in enumerate(names) if name}
    ends = sorted(last.values())
    first = min((place for place, name in enumerate(names) if name), default=len(steps))
    groups, start = [], 0
    for end in [first - 1, *ends]:
        groups.append((list(steps[start : end + 1]), True))
        start = end + 1
    groups.append((list(steps[start:]), False))
    return [(group, again) for group, again in groups if group]


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x if x.dtype is dtype else x.to(dtype)


# A volume one slice deep is carried as an image, (N, channels, rows, columns).


def _shallow(x: torch.Tensor) -> torch.Tensor:
    return x.squeeze(2) if x.dim() == 5 and x.shape[2] == 1 else x


def _deep(x: torch.Tensor) -> torch.Tensor:
    return x.unsqueeze(2) if x.dim() == 4 else x


# A volume hardly deeper may have its slices interleaved with its channels in memory: the shape is
# still (N, channels, slices, rows, columns), the order (N, rows, columns, slices, channels).


def _num_interleaved(x: torch.Tensor) -> int:
    """Return how many slices lie interleaved with the channels; 0 where none do."""
    if x.dim() != 5:
        return 0
    _, channels, slices, _, columns = x.shape
    step = slices * channels
    in_order = x.stride()[1:] == (1, channels, columns * step, step)
    return slices if in_order else 0


def _as_channels(x: torch.Tensor) -> torch.Tensor:
    """(N, channels, slices, rows, columns) to an image of all slices' channels, slice by slice."""
    return x.transpose(1, 2).flatten(1, 2)


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    """Interleaved slices as an image (N, channels, rows, columns * slices), without a copy."""
    return x.permute(0, 1, 3, 4, 2).flatten(3)


def _interleaved(x: torch.Tensor, slices: int) -> torch.Tensor:
    """Undo `_side_by_side`."""
    return x.unflatten(3, (-1, slices)).permute(0, 1, 4, 2, 3)


def _channels_last(x: torch.Tensor, rank: int) -> torch.Tensor:
    if x.dim() == 2:
        return x
    return (_deep(x) if rank == 3 else x).movedim(1, -1)


def _convolution(step: Step, kernel: int, bias: int | None, dtype: torch.dtype) -> Operation:
    layer, source = step.layer, step.sources[0]
    stride, dilation = layer.strides, layer.dilation_rate
    padding, size = step.amounts, layer.kernel_size

    def shift(tensors):
        return None if bias is None else _cast(tensors[bias], dtype)

    def conv2d(values, tensors):
        x, weight = _cast(values[source], dtype), _cast(tensors[kernel], dtype)
        weight = weight.permute(3, 2, 0, 1)
        return F.conv2d(x, weight, shift(tensors), stride, padding, dilation)

    if len(size) == 2:
        return conv2d

    middle = size[0] // 2

    is_centred = size[0] % 2 == 1 and padding[0] == middle * dilation[0]
    within = stride[1:], padding[1:], dilation[1:]

    def conv3d(values, tensors):
        x = _cast(values[source], dtype)
        # Where every neighbouring slice is padding, the middle slice of the kernel does it all.
        if is_centred and (x.dim() == 4 or (stride[0] == 1 and dilation[0] >= x.shape[2])):
            # Output channel first, as it lies in memory: the gradient then comes in that order.
            weight = tensors[kernel].permute(4, 0, 1, 2, 3)[:, middle]
            weight = _cast(weight, dtype).permute(0, 3, 1, 2)
            if x.dim() == 4:
                return F.conv2d(x, weight, shift(tensors), *within)
            slices = F.conv2d(x.transpose(1, 2).flatten(0, 1), weight, shift(tensors), *within)
            return slices.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
        x = _deep(x)
        if dilation[0] == 1 and _is_worth_unrolling(x, size[0]):
            weight = _cast(tensors[kernel], dtype)
            weight = _unrolled(weight, x.shape[2], stride[0], padding[0])
            slices = weight.shape[0] // layer.filters
            shifts = None if bias is None else shift(tensors).repeat(slices)
            x = F.conv2d(_as_channels(x), weight, shifts, *within)
            return _shallow(x.unflatten(1, (slices, -1)).transpose(1, 2))
        if _num_interleaved(x):
            # Once for all that read it: each would keep a copy of its own.
            x = values[source] = x.contiguous(memory_format=torch.channels_last_3d)
        weight, inside = _cast(tensors[kernel], dtype).permute(4, 3, 0, 1, 2), padding
        if _must_pad_outside(x, size, padding):
            x = F.pad(x, (0, 0, 0, 0, padding[0], padding[0]))
            inside = (0, *padding[1:])
        return _shallow(F.conv3d(x, weight, shift(tensors), stride, inside, dilation))

    return conv3d


def _must_pad_outside(x: torch.Tensor, size: tuple[int, ...], padding: tuple[int, ...]) -> bool:
    """Tell whether torch's CPU convolution would corrupt memory.

    oneDNN's gradient of a 3D kernel (torch 2.14, AVX512) reads and writes beyond its arrays when
    the kernel is at least as deep as the volume and the slices around it are padded inside the
    operation: wrong gradients without a word, or a crash. MedicalNet's 7x7x7 stem on five slices
    is such a case in float32 and bfloat16, a 3x3x3 kernel on two slices in bfloat16.
    """
    return x.device.type == "cpu" and padding[0] > 0 and x.shape[2] <= size[0]


def _is_worth_unrolling(x: torch.Tensor, slices_of_kernel: int) -> bool:
    """Tell whether slices should become channels: they are fewer than the kernel's, so that some
    of the kernel always lies on padding, and the image outweighs the kernel, which is copied.

    Never for the smallest images: of slices of one pixel torch's gradient of batch normalisation
    is wrong when it arrives in another memory order than the values (torch 2.14, CPU).
    """
    samples, channels, slices, rows, columns = x.shape
    size = rows * columns
    return slices < slices_of_kernel and size > _SMALL_IMAGE and samples * size > channels


def _unrolled(kernel: torch.Tensor, depth: int, stride: int, padding: int) -> torch.Tensor:
    """Make the 2D kernel that does to slices as channels what a 3D kernel does to a volume.

    Args:
        kernel: (slices, rows, columns, in, out), output channels first in memory.
        depth: slices of the volume.
        stride: between slices.
        padding: slices of zeros on either side.

    Returns:
        (slices out * out, depth * in, rows, columns), channels_last.
    """
    slices_out = (depth + 2 * padding - kernel.shape[0]) // stride + 1
    starts = [padding - stride * place for place in range(slices_out)]  # in the kernel
    before, after = max(0, -starts[-1]), max(0, padding + depth - kernel.shape[0])
    kernel = F.pad(kernel.permute(4, 1, 2, 0, 3), (0, 0, before, after))
    rows = [kernel.narrow(3, before + start, depth) for start in starts]
    return torch.cat(rows).flatten(3).permute(0, 3, 1, 2)


def _norm_of_one(x, mean, variance, scale, shift, weight_of_new: float) -> torch.Tensor:
    """Normalise one value per channel, as Keras does: torch refuses, for n - 1 is zero."""
    with torch.no_grad():
        mean.lerp_(x.flatten().to(mean.dtype), weight_of_new)
        variance.mul_(1 - weight_of_new)
    shape = (1, -1, *[1] * (x.dim() - 2))
    return ((x - x) * scale.view(shape) + shift.view(shape)).to(x.dtype)


def _norm_factor(layer) -> torch.Tensor:
    variance = layer.moving_variance._value
    return layer.gamma._value.to(variance.dtype) * torch.rsqrt(variance + layer.epsilon)


def _folded_kernel(step: Step, dtype: torch.dtype) -> torch.Tensor:
    """W' = W gamma / sqrt(variance + epsilon), per output channel (the last axis)."""
    with torch.no_grad():
        return (step.layer.kernel._value * _norm_factor(step.norm)).to(dtype)


def _folded_bias(step: Step, dtype: torch.dtype) -> torch.Tensor:
    """b' = beta + (b - mean) gamma / sqrt(variance + epsilon)."""
    with torch.no_grad():
        before = step.layer.bias._value if step.layer.use_bias else 0.0
        offset = (before - step.norm.moving_mean._value) * _norm_factor(step.norm)
        return (step.norm.beta._value + offset).to(dtype)


def activation_bytes(
    function: FlatFunction, input_shape: tuple[int, ...], batch_size: int = 1
) -> int:
    """Count what one training step keeps between its forward and its backward pass.

    Nothing is computed: the function runs on tensors without memory. Counted is every tensor that
    autograd saves, each storage once; neither parameters nor the input. With recomputation, what
    the largest part keeps while it is computed again comes on top. Exact in float32; in two-byte
    types 4 bytes per normalised channel are missing (torch's own account of its statistics).

    Args:
        function: in training.
        input_shape: (rows, columns, channels) or (slices, rows, columns, channels).
        batch_size: samples a step.
    """
    own = function.tensors()
    # Fake tensors know device and memory order, which decide what is copied, and hold no memory.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tensors = [mode.from_tensor(tensor) for tensor in own]
        return _kept_bytes(
            function, torch.empty((batch_size, *input_shape), device=own[0].device), tensors
        )


def _kept_bytes(function: FlatFunction, x: torch.Tensor, tensors: list[torch.Tensor]) -> int:
    values = function.begin(x)
    ignored = {_storage(tensor)[0] for tensor in (*tensors, x)}
    kept: dict[int, torch.UntypedStorage] = {}  # whole storages: the number of a freed one returns
    most_again = 0
    for part in function.parts:
        saved: dict[int, torch.UntypedStorage] = {}

        def pack(tensor, saved=saved):
            number, storage = _storage(tensor)
            if number not in ignored:
                saved[number] = storage
            return tensor

        before = dict(_storage(values[n]) for n in part.read if values[n].requires_grad)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _run(part, values, tensors)
        if part.recomputed:
            kept |= before
            again = sum(s.nbytes() for n, s in saved.items() if n not in kept)
            most_again = max(most_again, again)
        else:
            kept |= saved
    return sum(storage.nbytes() for storage in kept.values()) + most_again


def _storage(tensor: torch.Tensor) -> tuple[int, torch.UntypedStorage]:
    storage = tensor.untyped_storage()
    return storage._cdata, storage
