"""Logits of probabilities and back, in torch: what `ich_keras.metrics.logits` does in NumPy."""

import torch

from ich_keras.metrics.binary import CLIP


def logits_of(values: torch.Tensor, exclusive: bool) -> torch.Tensor:
    """Return the logits of probabilities (..., labels); of exclusive labels their logarithms."""
    if exclusive:
        return torch.log(values.clamp(min=CLIP))
    # 1 - 1e-7 and 1 are the same float32, or nearly: the logits of both ends must stay apart.
    cut = values.to(torch.float64).clamp(CLIP, 1 - CLIP)
    return (torch.log(cut) - torch.log1p(-cut)).to(torch.float32)


def probabilities_of(logits: torch.Tensor, exclusive: bool) -> torch.Tensor:
    """Return the probabilities of logits (..., labels); of exclusive labels, rows sum to 1."""
    return torch.softmax(logits, -1) if exclusive else torch.sigmoid(logits)
