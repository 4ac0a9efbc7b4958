"""From Hounsfield units and draws to network input, as operations on whole batches on a device.

What `ich_keras.data.drawn_inputs` does on a CPU, slice by slice, in torch: int16 HU travel to the
device, a sixth of the bytes of three float32 windows, and are flipped, moved, windowed and
normalised there.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ich_keras.data.draws import Draws
from ich_keras.data.intensity import HeadZScore, Intensity, Normalisation
from ich_keras.data.mixing import Mix
from ich_keras.errors import UsageError


class RawBatch(NamedTuple):
    """A batch whose inputs are made on a device.

    Args:
        hu: int16 (n, slices, rows, columns), HU.
        draws: of n samples.
        labels: float32 (n, labels), NaN where there are none.
        mix: how the samples are mixed; None mixes nothing.

    Worker processes hand over tensors in place of arrays.
    """

    hu: np.ndarray | torch.Tensor
    draws: Draws
    labels: np.ndarray | torch.Tensor
    mix: Mix | None = None


class DeviceInputs:
    """Makes the inputs of batches on a device.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        intensity: from HU to input.
        is_volume: whether a sample has several slices; otherwise it has one.
        size: rows and columns of the inputs.
        is_stack: whether the slices become channels (`ich_keras.data.inputs.stack_channels`).
    """

    def __init__(
        self,
        device: str,
        intensity: Intensity,
        is_volume: bool,
        size: int,
        is_stack: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self._intensity = intensity
        self._is_volume = is_volume
        self._size = size
        self._is_stack = is_stack
        # Made once: to copy a number to a GPU, the host waits until the GPU has nothing to do.
        self._low, self._width = (
            self._there([getattr(window, name) for window in intensity.windows])
            for name in ("low", "width")
        )
        if isinstance(intensity.normalisation, Normalisation):
            self._mean = self._there(intensity.normalisation.mean)
            self._std = self._there(intensity.normalisation.std)
        self._copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def send(self, batch: RawBatch) -> "SentBatch":
        """Start to move a batch to the device; on CUDA this returns before it has arrived."""
        draws = batch.draws
        arrays = [batch.hu, batch.labels, *_mix_numbers(batch.mix), *_numbers(draws)]
        tensors = [torch.as_tensor(array) for array in arrays]
        if self._copying is None:
            return SentBatch([tensor.to(self.device) for tensor in tensors], None)
        pinned = [tensor.pin_memory() for tensor in tensors]
        with torch.cuda.stream(self._copying):
            sent = [tensor.to(self.device, non_blocking=True) for tensor in pinned]
            arrived = self._copying.record_event()
        # torch keeps pinned memory until copies from it are done.
        return SentBatch(sent, arrived)

    def make(self, sent: "SentBatch") -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs and labels of a batch, on the device.

        Returns:
            float32 (n, rows, columns, channels) or (n, slices, rows, columns, channels), and
            float32 (n, labels).
        """
        if sent.arrived is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(sent.arrived)
            for tensor in sent.tensors:
                tensor.record_stream(stream)
        hu, labels, partners, shares, boxes, *numbers = sent.tensors
        with torch.no_grad():
            moved = _move(hu, *numbers[:-2])
            inputs = self._input(moved, *numbers[-2:])
            if self._is_stack:
                # (n, slices, rows, columns, channels): slices beside channels, and one with them.
                inputs = inputs.permute(0, 2, 3, 1, 4).flatten(3)
            elif not self._is_volume:
                inputs = inputs[:, 0]
            return _mixed(inputs, labels, partners, shares, boxes)

    def _input(self, hu: torch.Tensor, amounts: torch.Tensor, jitter: torch.Tensor) -> torch.Tensor:
        """Turn HU into input: float32 (n, slices, rows, columns) -> (..., channels)."""
        n, _, side, _ = hu.shape
        # One axis for each of n, slices, rows, columns, channels.
        contrast, brightness = (amounts[:, k].view(n, 1, 1, 1, 1) for k in (0, 1))
        low, width = self._low, self._width
        if len(jitter):
            level, factor = (jitter[:, k].view(n, 1, 1, 1, 1) for k in (0, 1))
            low, width = low + width / 2 + level - width * factor / 2, width * factor
        normalisation = self._intensity.normalisation
        if side == self._size and not isinstance(normalisation, HeadZScore):
            # Windows, contrast, brightness and normalisation are each linear and cut off: all of
            # them together are, too.
            mean, std = self._mean, self._std
            factor = contrast / width
            ends = [(end - mean) / std for end in (brightness, contrast + brightness)]
            ends = [end.clamp((0 - mean) / std, (1 - mean) / std) for end in ends]
            scaled = torch.addcmul(
                (brightness - low * factor - mean) / std, hu.unsqueeze(-1), factor / std
            )
            return scaled.clamp_(*ends)
        windows = ((hu.unsqueeze(-1) - low) / width).clamp_(0, 1)
        if side != self._size:
            windows = _resized(windows, self._size)
        windows = (windows * contrast + brightness).clamp_(0, 1)
        if isinstance(normalisation, HeadZScore):
            return _head_z_score(windows, self._is_volume, self._intensity, normalisation)
        return (windows - self._mean) / self._std

    def _there(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)


def _mixed(
    inputs: torch.Tensor,
    labels: torch.Tensor,
    partners: torch.Tensor,
    shares: torch.Tensor,
    boxes: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix a batch as `ich_keras.data.mixing` does; without partners it stays as it is."""
    if not len(partners):
        return inputs, labels
    others = inputs[partners]
    if len(boxes):
        top, left, bottom, right = (boxes[:, k, None, None, None] for k in range(4))
        places = torch.arange(inputs.shape[1], device=inputs.device)
        rows, columns = places[:, None, None], places[:, None]
        is_other = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
        inputs = torch.where(is_other, others, inputs)
    else:
        own = shares[:, None, None, None]
        inputs = inputs * own + others * (1 - own)
    own = shares[:, None]
    return inputs, labels * own + labels[partners] * (1 - own)


def require_device(device: str | None) -> None:
    """Refuse what batches cannot be sent to.

    Raises:
        UsageError: neither None, "cpu", "cuda" nor "cuda:N", or a GPU that is not there.
    """
    if device in (None, "cpu"):
        return
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise UsageError(f"device is {device!r}; expected cpu, cuda or cuda:N, or None.")
    number = int(device.partition(":")[2] or 0)
    if number >= torch.cuda.device_count():
        raise UsageError(
            f"device is {device!r}; torch finds {torch.cuda.device_count()} GPUs.",
            "Leave the device out, or name one that is there.",
        )


class SentBatch(NamedTuple):
    """A batch on its way to a device.

    Args:
        tensors: HU, the numbers of the draws, labels.
        arrived: on CUDA, what tells that they have arrived.
    """

    tensors: list[torch.Tensor]
    arrived: Any


def _numbers(draws: Draws) -> list[np.ndarray]:
    """Return draws as arrays for `_move`, contrast and brightness, and the jitter if there is any.

    Samples are numbered here, because choosing them by truth values makes the host wait for CUDA.
    """
    moved = np.flatnonzero(draws.is_moved)
    whole = np.tile(np.eye(3), (len(moved), 1, 1))
    whole[:, :2] = draws.matrices[moved]
    return [
        np.flatnonzero(draws.is_reversed),
        np.flatnonzero(draws.flips[:, 1]),
        np.flatnonzero(draws.flips[:, 0]),
        moved,
        np.linalg.inv(whole)[:, :2].astype(np.float32),
        np.column_stack([draws.contrast, draws.brightness]).astype(np.float32),
        np.column_stack([draws.level, draws.width])[: len(draws) * draws.has_jitter].astype(
            np.float32
        ),
    ]


def _mix_numbers(mix: Mix | None) -> list[np.ndarray]:
    """Return a mix as arrays for `_mixed`, empty ones for none."""
    if mix is None:
        return [np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros((0, 4), np.int64)]
    return [mix.partners, mix.shares, mix.boxes]


def _move(
    hu: torch.Tensor,
    is_reversed: torch.Tensor,
    upside_down: torch.Tensor,
    left_right: torch.Tensor,
    moved: torch.Tensor,
    back: torch.Tensor,
) -> torch.Tensor:
    """Flip, shift, scale and rotate.

    Args:
        hu: int16 (n, slices, rows, columns), HU.
        is_reversed, upside_down, left_right, moved: int64, numbers of the samples that are.
        back: float32 (moved, 2, 3), from the pixels of the result to those of the source.

    Returns:
        float32 (n, slices, rows, columns), HU, whole numbers.
    """
    out = hu.to(torch.float32)
    for chosen, axis in ((is_reversed, 1), (upside_down, 2), (left_right, 3)):
        if len(chosen):
            out[chosen] = out[chosen].flip(axis)
    if not len(moved):
        return out
    side = out.shape[-1]
    places = torch.arange(side, dtype=torch.float32, device=out.device)
    x, y = places.view(1, 1, side), places.view(1, side, 1)
    # By sums: in TensorFloat-32, a product of matrices would miss by a quarter of a pixel.
    source = [row[:, 0] * x + row[:, 1] * y + row[:, 2] for row in back[..., None, None].unbind(1)]
    grid = torch.stack(source, dim=-1) * (2 / (side - 1)) - 1
    # Slices are the channels of an image: they all take the same grid. "reflection" around the
    # centres of the outermost pixels is OpenCV's BORDER_REFLECT_101.
    warped = F.grid_sample(out[moved], grid, "bilinear", "reflection", align_corners=True)
    out[moved] = warped.round_()
    return out


def _resized(windows: torch.Tensor, size: int) -> torch.Tensor:
    """Resize the windows linearly, as `slice_windows` does."""
    n, slices, rows, columns, channels = windows.shape
    flat = windows.view(n * slices, rows, columns, channels).permute(0, 3, 1, 2)
    resized = F.interpolate(flat, (size, size), mode="bilinear", align_corners=False)
    return resized.permute(0, 2, 3, 1).reshape(n, slices, size, size, channels)


def _head_z_score(
    grey: torch.Tensor, is_volume: bool, intensity: Intensity, normalisation: HeadZScore
) -> torch.Tensor:
    """See `ich_keras.data.intensity.head_z_score`."""
    axes = (1, 2, 3, 4) if is_volume else (2, 3, 4)
    window = intensity.windows[0]
    head = grey > (normalisation.above_hu - window.low) / window.width
    count = head.sum(axes, keepdim=True).clamp_(min=1)
    mean = (grey * head).sum(axes, keepdim=True, dtype=torch.float64) / count
    variance = ((grey - mean) ** 2 * head).sum(axes, keepdim=True) / count
    spread = torch.where(variance > 0, variance.sqrt(), 1.0)
    return ((grey - mean) / spread * head).to(torch.float32)
