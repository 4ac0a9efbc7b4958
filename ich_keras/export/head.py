"""A sequence head as torch operations on one whole series, of any length.

Keras' layers loop over a length that is fixed when they are exported; these do not. The weights are
those of `ich_keras.models.sequence.sequence_head`, by the names of its layers.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ich_keras.context import MOST_LOGIT, Context
from ich_keras.export.probabilities import logits_of, probabilities_of
from ich_keras.keras_private import scan, tensor_of
from ich_keras.models.sequence import DILATIONS, FAR_MM, MOST_NEAR, NEAR_MM

_EPSILON = 1e-5  # of every layer normalisation
# How the layers of a kind are called, where they are not called like it.
_FIRST_LAYERS = {"attention": "dense", "transformer": "attention"}


class Head(nn.Module):
    """The answers of a run's context: the slice network's, and the head's, blended.

    Args:
        context: of the run.
    """

    def __init__(self, context: Context) -> None:
        super().__init__()
        self._exclusive = context.labels.exclusive
        self._kind = context.head.name.removeprefix("sequence_")
        first = _FIRST_LAYERS.get(self._kind, self._kind)
        self._depth = sum(layer.name.rstrip("0123456789") == first for layer in context.head.layers)
        self.register_buffer("blend", torch.tensor(context.blend, dtype=torch.float32))
        for layer in context.head.layers:
            for number, variable in enumerate(layer.weights):
                value = tensor_of(variable).detach()
                if value.dtype.is_floating_point:
                    name = _buffer(layer.name, number)
                    self.register_buffer(name, value.clone(memory_format=torch.contiguous_format))
        normalised = context.head.get_layer("normalised")
        self.register_buffer("mean", tensor_of(normalised.adapt_mean).detach().clone())
        variance = tensor_of(normalised.adapt_variance).detach()
        self.register_buffer("deviation", variance.sqrt().clamp(min=1e-7))

    def forward(
        self, raw: torch.Tensor, features: torch.Tensor, places_mm: torch.Tensor
    ) -> torch.Tensor:
        """Answer the slices of one series again.

        Args:
            raw: float32 (n, labels), the slice network's probabilities, inferior to superior.
            features: float32 (n, features), its pooled features.
            places_mm: float32 (n,), along the normal.

        Returns:
            float32 (n, labels), probabilities.
        """
        own = logits_of(raw, self._exclusive)
        head = self._logits(features, own.clamp(-MOST_LOGIT, MOST_LOGIT), places_mm - places_mm[0])
        if self._exclusive:
            head = head - torch.logsumexp(head, -1, keepdim=True)
        return probabilities_of((1 - self.blend) * own + self.blend * head, self._exclusive)

    def _logits(
        self, features: torch.Tensor, logits: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        x = self._dense("projected", (features - self.mean) / self.deviation)
        before, after = _steps(x)
        below, above = (step.abs() for step in _steps(places))
        near = [(step / NEAR_MM).clamp(0.0, MOST_NEAR) for step in (below, above)]
        steps = torch.stack([*near, (places - places.mean()) / FAR_MM], dim=-1)
        x = torch.cat([x, before, after, logits / 4.0, steps], dim=-1)
        x = F.gelu(self._dense("joined", x))
        encode: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "gru": self._recurrent,
            "lstm": self._recurrent,
            "conv": self._convolutions,
            "transformer": self._transformer,
            "attention": self._alone,
        }
        x = self._norm("encoded", encode[self._kind](x))
        return logits + self._dense("slice_change", x)

    def _weights(self, layer: str, count: int) -> list[torch.Tensor]:
        return [getattr(self, _buffer(layer, number)) for number in range(count)]

    def _dense(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        kernel, bias = self._weights(layer, 2)
        return x @ kernel + bias

    def _norm(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        gamma, beta = self._weights(layer, 2)
        return F.layer_norm(x, x.shape[-1:], gamma, beta, _EPSILON)

    def _alone(self, x: torch.Tensor) -> torch.Tensor:
        for number in range(self._depth):
            x = F.gelu(self._dense(f"dense{number + 1}", x))
        return x

    def _convolutions(self, x: torch.Tensor) -> torch.Tensor:
        for number in range(self._depth):
            y = self._norm(f"norm{number + 1}", x)
            kernel, bias = self._weights(f"conv{number + 1}", 2)
            dilation = DILATIONS[number % len(DILATIONS)]
            y = y.t().unsqueeze(0)
            y = F.conv1d(y, kernel.permute(2, 1, 0), bias, padding=dilation, dilation=dilation)
            x = x + self._dense(f"mixed{number + 1}", F.gelu(y.squeeze(0).t()))
        return x

    def _transformer(self, x: torch.Tensor) -> torch.Tensor:
        for number in range(self._depth):
            y = self._norm(f"norm{number + 1}a", x)
            wq, bq, wk, bk, wv, bv, wo, bo = self._weights(f"attention{number + 1}", 8)
            query, key, value = (
                torch.einsum("nw,whd->hnd", y, kernel) + bias.unsqueeze(1)
                for kernel, bias in ((wq, bq), (wk, bk), (wv, bv))
            )
            scores = query @ key.transpose(1, 2) / math.sqrt(key.shape[-1])
            x = x + torch.einsum("hnd,hdw->nw", torch.softmax(scores, -1) @ value, wo) + bo
            y = F.gelu(self._dense(f"wide{number + 1}", self._norm(f"norm{number + 1}b", x)))
            x = x + self._dense(f"narrow{number + 1}", y)
        return x

    def _recurrent(self, x: torch.Tensor) -> torch.Tensor:
        run = _gru if self._kind == "gru" else _lstm
        for number in range(self._depth):
            weights = self._weights(f"{self._kind}{number + 1}", 6)
            onward = run(x, *weights[:3])
            backward = torch.flip(run(torch.flip(x, (0,)), *weights[3:]), (0,))
            y = torch.cat([onward, backward], dim=-1)
            x = x + y if number else y
        return x


def _buffer(layer: str, number: int) -> str:
    return f"{layer}_{number}"


def _steps(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the differences to the slice before and after; 0 at the ends."""
    # By numbers: a part of one slice less would be exported for three slices or more.
    numbers = torch.arange(values.shape[0], device=values.device)
    earlier = torch.maximum(numbers - 1, numbers[:1])
    later = torch.minimum(numbers + 1, numbers[-1:])
    return values - values[earlier], values - values[later]


def _gru(
    x: torch.Tensor, kernel: torch.Tensor, recurrent: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Run Keras' GRU (reset after the product) over (n, features): (n, units)."""
    given = x @ kernel + bias[0]
    units = recurrent.shape[0]

    def step(state: torch.Tensor, now: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept = state @ recurrent + bias[1]
        update = torch.sigmoid(now[:units] + kept[:units])
        reset = torch.sigmoid(now[units : 2 * units] + kept[units : 2 * units])
        new = torch.tanh(now[2 * units :] + reset * kept[2 * units :])
        state = update * state + (1 - update) * new
        return state, state.clone()

    return scan(step, torch.zeros_like(given[0, :units]), given)


def _lstm(
    x: torch.Tensor, kernel: torch.Tensor, recurrent: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Run Keras' LSTM over (n, features): (n, units)."""
    given = x @ kernel + bias
    units = recurrent.shape[0]

    def step(state: torch.Tensor, now: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, cell = state[:units], state[units:]
        taken, forgotten, new, shown = (now + hidden @ recurrent).chunk(4)
        cell = torch.sigmoid(forgotten) * cell + torch.sigmoid(taken) * torch.tanh(new)
        hidden = torch.sigmoid(shown) * torch.tanh(cell)
        return torch.cat([hidden, cell]), hidden.clone()

    return scan(step, torch.zeros_like(given[0, : 2 * units]), given)
