"""How values lie in memory between the operations: types, axes, and slices beside channels."""

import torch


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in a type; itself where it has that type already."""
    return x if x.dtype is dtype else x.to(dtype)


# A volume one slice deep is carried as an image, (N, channels, rows, columns).


def shallow(x: torch.Tensor) -> torch.Tensor:
    """Take the axis of slices away from a volume one slice deep."""
    return x.squeeze(2) if x.dim() == 5 and x.shape[2] == 1 else x


def deep(x: torch.Tensor) -> torch.Tensor:
    """Give an image the axis of one slice back."""
    return x.unsqueeze(2) if x.dim() == 4 else x


# A volume of a few slices may have them interleaved with its channels in memory: the shape is
# still (N, channels, slices, rows, columns), the order (N, rows, columns, slices, channels).


def num_interleaved(x: torch.Tensor) -> int:
    """Return how many slices lie interleaved with the channels; 0 where none do."""
    if x.dim() != 5:
        return 0
    _, channels, slices, _, columns = x.shape
    step = slices * channels
    in_order = x.stride()[1:] == (1, channels, columns * step, step)
    return slices if in_order else 0


def as_channels(x: torch.Tensor) -> torch.Tensor:
    """Turn a volume into an image (N, slices * channels, rows, columns), slice by slice."""
    return x.transpose(1, 2).flatten(1, 2)


def side_by_side(x: torch.Tensor) -> torch.Tensor:
    """Turn interleaved slices into an image (N, channels, rows, columns * slices), not copied."""
    return x.permute(0, 1, 3, 4, 2).flatten(3)


def interleaved(x: torch.Tensor, slices: int) -> torch.Tensor:
    """Undo `side_by_side`."""
    return x.unflatten(3, (-1, slices)).permute(0, 1, 4, 2, 3)


def channels_last(x: torch.Tensor, rank: int) -> torch.Tensor:
    """Return a value in Keras' order (N, ..., channels), with its slices if rank is 3."""
    if x.dim() == 2:
        return x
    return (deep(x) if rank == 3 else x).movedim(1, -1)
