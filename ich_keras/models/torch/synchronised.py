"""Batch normalisation by the statistics of all processes' samples.

torch's own (`torch.nn.SyncBatchNorm`) runs on GPUs only. The mean and the sum of squared deviations
of each process are combined exactly (Chan, Golub and LeVeque 1983), so that a channel whose mean is
far from zero loses no digits.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F

from ich_keras.models.torch.distributed import Group
from ich_keras.models.torch.layout import cast


def synchronised_batch_norm(
    x: torch.Tensor,
    running: tuple[torch.Tensor, torch.Tensor],
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight_of_new: float,
    epsilon: float,
    group: Group,
) -> torch.Tensor:
    """Normalise as `torch.nn.functional.batch_norm` in training, over all processes.

    Args:
        x: (N, channels, ...); N may be 0 and need not be the same in each process.
        running: mean and variance, (channels,); moved in place, the variance unbiased.
        scale, shift: (channels,).
        weight_of_new: of this batch's statistics in the running ones.
        epsilon: added to the variance.
        group: of the training; all its processes must come here.
    """
    return _Normalise.apply(x, scale, shift, running, weight_of_new, epsilon, group)


class _Normalise(torch.autograd.Function):
    """The gradient, too, needs two sums over all processes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        running: tuple[torch.Tensor, torch.Tensor],
        weight_of_new: float,
        epsilon: float,
        group: Group,
    ) -> torch.Tensor:
        mean, variance, count = _statistics(x, group)
        for kept, new in zip(running, (mean, variance * (count / max(count - 1, 1))), strict=True):
            kept.lerp_(new.to(kept.dtype), weight_of_new)
        ctx.save_for_backward(x, scale, mean, torch.rsqrt(variance + epsilon))
        ctx.count, ctx.group = count, group
        wide = mean.dtype
        return F.batch_norm(
            x, mean, variance, cast(scale, wide), cast(shift, wide), False, 0.0, epsilon
        )

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, mean, factor = ctx.saved_tensors
        wide, axes = mean.dtype, _all_but_channels(x)
        gradient = cast(gradients[0], wide)
        normalised = (cast(x, wide) - _along(mean, x)) * _along(factor, x)
        to_shift = gradient.sum(axes)
        to_scale = (gradient * normalised).sum(axes)
        # Of scale and shift the gradients of all processes are added up with those of all weights.
        sums = ctx.group.add_up(torch.stack([to_shift, to_scale])) / ctx.count
        inner = gradient - _along(sums[0], x) - normalised * _along(sums[1], x)
        to_x = cast(inner * _along(factor * cast(scale, wide), x), x.dtype)
        own = cast(to_scale, scale.dtype), cast(to_shift, scale.dtype)
        return (to_x, *own, None, None, None, None)


def _statistics(x: torch.Tensor, group: Group) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return mean and variance per channel over all processes, and the number of values in it."""
    channels, axes = x.shape[1], _all_but_channels(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    rank = group.rank
    own = x[:, 0].numel()
    all_parts = torch.zeros((rank.of, 3, channels), dtype=wide, device=x.device)
    if own:
        variance, mean = torch.var_mean(cast(x, wide), axes, correction=0)
        all_parts[rank.number] = torch.stack([mean.new_full((channels,), own), mean, variance])
    counts, means, variances = group.add_up(all_parts).unbind(1)
    # The share knows how many samples there are, and each has as many values.
    count = group.share.total * math.prod(x.shape[2:])
    weights = counts / count
    mean = (weights * means).sum(0)
    variance = (weights * (variances + (means - mean) ** 2)).sum(0)
    return mean, variance, count


def _all_but_channels(x: torch.Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _along(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Lay values per channel along the channels of x."""
    return values.view(1, -1, *[1] * (x.dim() - 2))
