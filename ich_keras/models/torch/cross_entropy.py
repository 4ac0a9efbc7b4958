"""Plain cross-entropy in one operation of torch, for the fast steps."""

from typing import Any

import torch
import torch.nn.functional as F

from ich_keras.models.loss import BinaryCrossEntropy


class PlainLoss:
    """What `BinaryCrossEntropy` gives for logits, in one operation instead of fifteen.

    On a GPU there are more, because looking for missing labels first would wait for the device.
    """

    def __init__(self) -> None:
        self._shares: tuple[BinaryCrossEntropy, torch.Tensor] | None = None  # on the device

    @staticmethod
    def covers(loss: Any, y: Any, outputs: Any) -> bool:
        """Tell whether this is the loss that was asked for."""
        return (
            type(loss) is BinaryCrossEntropy
            and loss.positive_weights is None
            and loss.from_logits
            and loss.reduction == "sum_over_batch_size"
            and isinstance(y, torch.Tensor)
            and isinstance(outputs, torch.Tensor)
            and y.shape == outputs.shape
        )

    def __call__(
        self, loss: BinaryCrossEntropy, y: torch.Tensor, outputs: torch.Tensor
    ) -> torch.Tensor:
        """Return the mean loss of a batch: labels and logits, both (N, labels)."""
        y = y.to(outputs.dtype)
        loss.require_outputs(outputs.shape[-1])
        is_missing = ~(y >= 0)  # NaN, too
        may_lack = y.device.type != "cpu" or bool(is_missing.any())
        if loss.shares is None and not may_lack:
            return F.binary_cross_entropy_with_logits(outputs, y)
        shares = self._shares_of(loss, outputs)
        if not may_lack:
            each = F.binary_cross_entropy_with_logits(outputs, y, reduction="none")
            return (each @ shares).mean()
        each = F.binary_cross_entropy_with_logits(
            outputs, torch.where(is_missing, 0.0, y), reduction="none"
        )
        present = torch.where(is_missing, 0.0, shares)
        total = present.sum(-1)
        return ((each * present).sum(-1) / torch.where(total > 0, total, 1.0)).mean()

    def _shares_of(self, loss: BinaryCrossEntropy, outputs: torch.Tensor) -> torch.Tensor:
        if self._shares is None or self._shares[0] is not loss:
            number = outputs.shape[-1]
            shares = loss.shares or [1 / number] * number
            tensor = torch.tensor(shares, dtype=outputs.dtype, device=outputs.device)
            self._shares = loss, tensor
        return self._shares[1]
