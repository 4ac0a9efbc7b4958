"""The convolutions of the flat function, with guards against what torch does wrong or slowly."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from ich_keras.models.graph import Step
from ich_keras.models.torch.layout import as_channels, cast, deep, num_interleaved, shallow

# An operation takes all values by number and the tensors of the function, and returns its value.
# Values that are no longer needed are None.
Values = list[torch.Tensor]
Tensors = Sequence[torch.Tensor]
Operation = Callable[[Values, Tensors], torch.Tensor]

# Pixels of a slice up to which slices are not made channels.
_SMALL_IMAGE = 16
# Of these on, oneDNN's gradient of a strided 1x1 kernel is right: a block of AVX512's.
_SAFE_CHANNELS = 16


def convolution(step: Step, kernel: int, bias: int | None, dtype: torch.dtype) -> Operation:
    """Return the operation of a convolution in 2D or 3D.

    Args:
        step: of kind "conv".
        kernel: number of the kernel's tensor, in Keras' order: (..., in, out).
        bias: number of the bias; None without one.
        dtype: of the computation.
    """
    layer, source = step.layer, step.sources[0]
    stride, dilation, groups = layer.strides, layer.dilation_rate, layer.groups
    padding, size = step.amounts, layer.kernel_size

    def shift(tensors: Tensors) -> torch.Tensor | None:
        return None if bias is None else cast(tensors[bias], dtype)

    def conv2d(values: Values, tensors: Tensors) -> torch.Tensor:
        x, weight = cast(values[source], dtype), cast(tensors[kernel], dtype)
        weight = weight.permute(3, 2, 0, 1)
        return _conv2d(x, weight, shift(tensors), stride, padding, dilation, groups)

    if len(size) == 2:
        return conv2d

    middle = size[0] // 2

    is_centred = size[0] % 2 == 1 and padding[0] == middle * dilation[0]
    within = stride[1:], padding[1:], dilation[1:]

    def conv3d(values: Values, tensors: Tensors) -> torch.Tensor:
        x = cast(values[source], dtype)
        # Where every neighbouring slice is padding, the middle slice of the kernel does it all.
        if is_centred and (x.dim() == 4 or (stride[0] == 1 and dilation[0] >= x.shape[2])):
            # Output channel first, as it lies in memory: the gradient then comes in that order.
            weight = tensors[kernel].permute(4, 0, 1, 2, 3)[:, middle]
            weight = cast(weight, dtype).permute(0, 3, 1, 2)
            if x.dim() == 4:
                return _conv2d(x, weight, shift(tensors), *within)
            slices = _conv2d(x.transpose(1, 2).flatten(0, 1), weight, shift(tensors), *within)
            return slices.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
        x = deep(x)
        if dilation[0] == 1 and _is_worth_unrolling(x, size[0]):
            weight = cast(tensors[kernel], dtype)
            weight = _unrolled(weight, x.shape[2], stride[0], padding[0])
            slices = weight.shape[0] // layer.filters
            shifts = None if bias is None else cast(tensors[bias], dtype).repeat(slices)
            x = _conv2d(as_channels(x), weight, shifts, *within)
            return shallow(x.unflatten(1, (slices, -1)).transpose(1, 2))
        if num_interleaved(x):
            # Once for all that read it: each would keep a copy of its own.
            x = values[source] = x.contiguous(memory_format=torch.channels_last_3d)
        weight, inside = cast(tensors[kernel], dtype).permute(4, 3, 0, 1, 2), padding
        if _must_pad_outside(x, size, padding):
            x = F.pad(x, (0, 0, 0, 0, padding[0], padding[0]))
            inside = (0, *padding[1:])
        return shallow(F.conv3d(x, weight, shift(tensors), stride, inside, dilation))

    return conv3d


def _conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> torch.Tensor:
    """Convolve in 2D, without an error of oneDNN that corrupts memory.

    Its gradient of a strided 1x1 kernel on fewer than eight channels that come last (AVX2; torch
    2.14) writes beyond its workspace: wrong gradients without a word with several threads, a crash
    with one. Pixels that the stride skips are left out before; the values are the same. See
    https://github.com/uxlfoundation/oneDNN/issues/6035.
    """
    is_point = tuple(weight.shape[2:]) == (1, 1) and not any(padding)
    is_narrow = weight.shape[1] < _SAFE_CHANNELS and x.device.type == "cpu"  # of each group
    if is_point and is_narrow and max(stride) > 1 and weight.requires_grad:
        x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


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
    if not isinstance(samples, int):
        samples = (
            1  # of an exported program, which takes any number: the choice must not depend on it
        )
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
