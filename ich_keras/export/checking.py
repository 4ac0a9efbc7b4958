"""Whether an exported file answers as the run does: the file is read again, and both are asked."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ich_keras.context import Context
from ich_keras.errors import DataError
from ich_keras.export.program import HU, PROBABILITIES
from ich_keras.export.writing import KERAS, ONNX, read_torch
from ich_keras.inference import tapped
from ich_keras.metrics.calibration import with_temperature
from ich_keras.phantom.plan import make_phantom, plan_phantoms
from ich_keras.recipe import Recipe

MOST_DIFFERENCE = 1e-4
_RANDOM_HU = -1100, 2100
_DISTANCES_MM = np.array([0, 5, 5, 2.5, 5, 10, 5, 5, 60, 5])
# Input, and the positions of a sequence head, to probabilities.
Answer = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Difference:
    """How far a file's answers are from the run's.

    Args:
        inputs: what both were asked about.
        samples: how many.
        largest: absolute difference of calibrated probabilities.
    """

    inputs: str
    samples: int
    largest: float


def answers_of(path: Path, kind: str, temperature: float, recipe: Recipe) -> Answer:
    """Read an exported file as its user would, and return its answers as a function.

    Args:
        path: the file.
        kind: of `FORMATS`.
        temperature: that a Keras model leaves to its user.
        recipe: of the run.

    Returns:
        Function from an array of input to float (n, labels), calibrated probabilities.
    """
    if kind == ONNX:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [taken.name for taken in session.get_inputs()]
        return lambda *x: session.run([PROBABILITIES], dict(zip(names, x, strict=True)))[0]
    if kind == KERAS:
        import keras

        model = keras.saving.load_model(path)
        return lambda x: with_temperature(
            np.asarray(model.predict_on_batch(x)), temperature, recipe.labels
        )
    import torch

    program, _ = read_torch(path)

    def answer(*x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return program(*map(torch.from_numpy, x))[0].numpy()

    return answer


@dataclass(frozen=True, eq=False)
class Asked:
    """The run that a file is compared with.

    Args:
        recipe, model: of the run; the network gives probabilities in float32.
        temperature: that calibrates them.
        takes: what the file takes, `HU` or `PREPARED`.
        side: rows and columns of slices.
        context: of the run; None without a sequence head.
    """

    recipe: Recipe
    model: Any
    temperature: float
    takes: str
    side: int
    context: Context | None = None

    def answer(self, samples: np.ndarray, places_mm: np.ndarray) -> np.ndarray:
        """Return the run's own calibrated probabilities: float64 (n, labels)."""
        labels = self.recipe.labels
        prepared = self.recipe.inputs.prepare(samples)
        if self.context is None:
            raw = np.asarray(self.model.predict_on_batch(prepared))
        else:
            own, features = tapped(self.model).answer(prepared)
            raw = self.context.answer(own, features, ["one"] * len(own), places_mm)
        return with_temperature(raw, self.temperature, labels)


def differences(answer: Answer, asked: Asked, real: np.ndarray | None) -> list[Difference]:
    """Ask a file and the run about the same inputs.

    Args:
        answer: from `answers_of`.
        asked: the run.
        real: int16 (slices, side, side), HU of a series; None draws a phantom.

    Raises:
        DataError: they differ by more than `MOST_DIFFERENCE`.
    """
    kind = "slices of the cache" if real is not None else "a phantom"
    series = phantom_hu(asked.side) if real is None else real
    low, high = _RANDOM_HU
    noise = np.random.default_rng(0).integers(low, high, series.shape, np.int16)
    found = []
    for name, hu in ((kind, series), ("random values", noise)):
        samples = _samples(hu, asked.recipe)
        given = samples if asked.takes == HU else asked.recipe.inputs.prepare(samples)
        places = np.cumsum(_DISTANCES_MM[: len(samples)]).astype(np.float32)
        wanted = asked.answer(samples, places)
        answered = answer(given) if asked.context is None else answer(given, places)
        largest = float(np.abs(answered - wanted).max())
        if not largest <= MOST_DIFFERENCE:
            raise DataError(
                f"the exported file differs from the run by {largest:.2g} on {name}; at most"
                f" {MOST_DIFFERENCE:g} is allowed.",
                "Nothing was kept. Please report it, with the recipe.json of the run.",
            )
        found.append(Difference(name, len(samples), largest))
    return found


def phantom_hu(side: int) -> np.ndarray:
    """Draw a head with bleeds: int16 (slices, side, side), HU."""
    (spec, *_) = plan_phantoms(1, 0, side, prevalence=1.0, slice_spacing_mm=(8.0, 8.0))
    return make_phantom(spec).hu


def _samples(hu: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Cut a series into the samples that a network takes: three at least, for any batch."""
    view = recipe.inputs.view
    if not view.has_slices:
        return np.ascontiguousarray(hu[:: max(1, len(hu) // 6)][:6])
    places = np.linspace(0, len(hu) - 1, view.num_slices).round().astype(int)
    if view.kind == "series":
        return hu[places][np.newaxis]
    middles = np.linspace(0, len(hu) - 1, 3).round().astype(int)
    around = np.arange(view.num_slices) - view.num_slices // 2
    return hu[np.clip(middles[:, np.newaxis] + around, 0, len(hu) - 1)]
