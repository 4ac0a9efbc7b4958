"""From Hounsfield units to a network's input, as operations that can be exported.

What `ich_keras.data.inputs` does slice by slice with OpenCV and tables, on whole batches in torch.
"""

import numpy as np
import torch
from torch import nn

from ich_keras.data.intensity import HeadZScore
from ich_keras.errors import UsageError
from ich_keras.recipe import InputRecipe

# OpenCV averages areas of 2x2 whole numbers by (sum + 2) >> 2; all others it rounds to even.
_ROUNDED_UP = 2


class HuInputs(nn.Module):
    """HU of square slices to the network's input.

    Args:
        inputs: of the run.
        side: rows and columns of the slices that come in, pixels; at least those of the run's
            cache.

    Raises:
        UsageError: the slices would have to be enlarged.
    """

    def __init__(self, inputs: InputRecipe, side: int) -> None:
        super().__init__()
        if side < inputs.cache_size:
            raise UsageError(
                f"slices of {side}x{side} pixels are smaller than those that the run was trained"
                f" on, {inputs.cache_size}x{inputs.cache_size}.",
                f"Give a side of {inputs.cache_size} or more.",
            )
        self._inputs, self._side = inputs, side
        self._area = _as_buffer(self, "area", _area_means(side, inputs.cache_size))
        self._line = _as_buffer(self, "line", _lines(inputs.cache_size, inputs.size))
        intensity = inputs.intensity
        self.register_buffer("low", torch.tensor([w.low for w in intensity.windows]))
        self.register_buffer("width", torch.tensor([float(w.width) for w in intensity.windows]))
        normalisation = intensity.normalisation
        if not isinstance(normalisation, HeadZScore):
            self.register_buffer("mean", torch.tensor(normalisation.mean))
            self.register_buffer("std", torch.tensor(normalisation.std))

    def forward(self, hu: torch.Tensor) -> torch.Tensor:
        """Turn HU into input.

        Args:
            hu: int16 or float32 (n, [slices,] side, side), HU.

        Returns:
            float32 (n, [slices,] size, size, channels); of stacks (n, size, size, slices *
            channels).
        """
        hu = hu.to(torch.float32)
        if self._area:
            hu = self.area @ hu @ self.area.t()
            is_half = self._side == _ROUNDED_UP * self._inputs.cache_size
            hu = torch.floor(hu + 0.5) if is_half else torch.round(hu)
        windows = (hu.unsqueeze(-1) - self.low) / self.width
        windows = windows.clamp(0, 1)
        if self._line:
            windows = torch.einsum("ij,...jkc,lk->...ilc", self.line, windows, self.line)
        normalisation = self._inputs.intensity.normalisation
        if isinstance(normalisation, HeadZScore):
            inputs = self._z_score(windows, normalisation.above_hu)
        else:
            inputs = (windows - self.mean) / self.std
        if self._inputs.view.is_stack:
            # As `stack_channels`: all channels of a slice, then those of the next.
            return inputs.movedim(-4, -2).flatten(-2)
        return inputs

    def _z_score(self, grey: torch.Tensor, above_hu: float) -> torch.Tensor:
        axes = (-4, -3, -2, -1) if self._inputs.view.has_slices else (-3, -2, -1)
        window = self._inputs.intensity.windows[0]
        head = (grey > (above_hu - window.low) / window.width).to(torch.float32)
        count = head.sum(axes, keepdim=True).clamp(min=1)
        mean = (grey * head).sum(axes, keepdim=True) / count
        variance = ((grey - mean) ** 2 * head).sum(axes, keepdim=True) / count
        spread = torch.where(variance > 0, variance.sqrt(), torch.ones_like(variance))
        return (grey - mean) / spread * head


def _as_buffer(module: nn.Module, name: str, weights: np.ndarray | None) -> bool:
    if weights is not None:
        module.register_buffer(name, torch.from_numpy(weights.astype(np.float32)))
    return weights is not None


def _area_means(long: int, short: int) -> np.ndarray | None:
    """Return the matrix that averages areas along one axis; None where nothing changes.

    Returns:
        float64 (short, long); rows sum to 1.

    >>> _area_means(3, 2).round(2).tolist()
    [[0.67, 0.33, 0.0], [0.0, 0.33, 0.67]]
    """
    if long == short:
        return None
    scale = long / short
    starts = np.arange(short)[:, None] * scale
    pixels = np.arange(long)[None, :]
    overlap = np.minimum(starts + scale, pixels + 1) - np.maximum(starts, pixels)
    return np.clip(overlap, 0, None) / scale


def _lines(long: int, short: int) -> np.ndarray | None:
    """Return the matrix that interpolates linearly along one axis; None where nothing changes.

    Centres of pixels are matched, and the border is repeated, as OpenCV does.

    Returns:
        float64 (short, long); rows sum to 1.

    >>> _lines(4, 2).tolist()
    [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    if long == short:
        return None
    places = np.clip((np.arange(short) + 0.5) * long / short - 0.5, 0, long - 1)
    first = np.minimum(np.floor(places).astype(int), long - 1)
    second = np.minimum(first + 1, long - 1)
    weights = np.zeros((short, long))
    rows = np.arange(short)
    weights[rows, first] += 1 - (places - first)
    weights[rows, second] += places - first
    return weights
