"""A run as one torch module: Hounsfield units, or prepared input, to probabilities."""

from typing import Any

import torch
from torch import nn

from ich_keras.export.head import Head
from ich_keras.export.inputs import HuInputs
from ich_keras.export.probabilities import logits_of, probabilities_of
from ich_keras.inference import with_features
from ich_keras.models.torch.function import FlatFunction
from ich_keras.recipe import Recipe

HU, PREPARED = "hu", "prepared"
PROBABILITIES, RAW = "probabilities", "raw_probabilities"
POSITIONS = "positions_mm"


class Network(nn.Module):
    """A network's answers, by the flat function in float32, with its weights as buffers.

    Args:
        model: functional, of this library; gives probabilities.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._function = FlatFunction(model, training=False, precision="float32")
        self._count = 0
        for tensor in self._function.tensors():
            self.register_buffer(
                f"weight{self._count}", tensor.detach().clone(memory_format=torch.contiguous_format)
            )
            self._count += 1

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the outputs for float32 (n, [slices,] rows, columns, channels)."""
        return self._function(x, [getattr(self, f"weight{n}") for n in range(self._count)])


class Program(nn.Module):
    """What is exported.

    Args:
        recipe: of the run.
        model: its network, with probabilities.
        temperature: that calibrates them.
        side: rows and columns of slices of HU; None takes prepared input.
    """

    def __init__(self, recipe: Recipe, model: Any, temperature: float, side: int | None) -> None:
        super().__init__()
        self.inputs = None if side is None else HuInputs(recipe.inputs, side)
        self.network = Network(self._network(model))
        self._temperature = temperature
        self._exclusive = recipe.labels.exclusive

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return calibrated and raw probabilities, float32 (n, labels) each."""
        (raw,) = self.network(x if self.inputs is None else self.inputs(x))
        return self._calibrated(raw), raw

    def _network(self, model: Any) -> Any:
        return model

    def _calibrated(self, raw: torch.Tensor) -> torch.Tensor:
        if self._temperature == 1:
            return raw
        logits = logits_of(raw, self._exclusive) / self._temperature
        return probabilities_of(logits, self._exclusive)


class SeriesProgram(Program):
    """What is exported of a run with a sequence head: it takes the slices of one series.

    Args:
        recipe: of the run.
        model: its slice network, with probabilities and pooled features.
        temperature: per slice.
        side: as for `Program`.
        head: answers the slices again.
    """

    def __init__(
        self, recipe: Recipe, model: Any, temperature: float, side: int | None, head: Head
    ) -> None:
        super().__init__(recipe, model, temperature, side)
        self.head = head

    def _network(self, model: Any) -> Any:
        return with_features(model)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, positions_mm: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return calibrated and raw probabilities, float32 (n, labels) each.

        Args:
            x: the slices, inferior to superior.
            positions_mm: float32 (n,), along the normal, ascending.
        """
        raw, features = self.network(x if self.inputs is None else self.inputs(x))
        raw = self.head(raw, features, positions_mm)
        return self._calibrated(raw), raw
