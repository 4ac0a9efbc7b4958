"""What a step must compute and move at least, and what follows from it: computed, not measured."""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from benchmarks.cases import TRAIN, Case
from benchmarks.report.jobs import BFLOAT16
from benchmarks.report.networks import network

if TYPE_CHECKING:
    from ich_keras.models.cost import Cost

# Forward; gradient of the inputs; gradient of the weights.
TRAINING_PASSES = 3
# Of each tensor that training keeps: written and read in the forward pass, read in the backward
# pass, its gradient written and read. Prediction writes and reads it.
TRANSFERS = {"train": 5, "predict": 2}
# Of each weight, float32: its gradient is written, Adam reads weight, gradient and both moments
# and writes weight and moments. Prediction reads it.
WEIGHT_TRANSFERS = {"train": 8, "predict": 1}
BYTES_PER_WEIGHT = 4


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at most.

    Args:
        name: of the device.
        flops: operations per second of a large matrix product, in the precision in question.
        bytes_per_s: of a large copy, read and written.
    """

    name: str
    flops: float
    bytes_per_s: float


# Measured on such cards (a product of 8192x8192 matrices in bfloat16; a copy of 4 GiB).
H100 = Ceilings("NVIDIA H100", 790e12, 3.0e12)


@dataclass(frozen=True)
class Work:
    """What one sample costs.

    Args:
        flop: operations of the convolutions and the head; one multiply-add is two.
        num_bytes: moved between the device and its memory, at least.
    """

    flop: float
    num_bytes: float

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flop / self.num_bytes

    def samples_per_s(self, ceilings: Ceilings) -> float:
        """Return the speed at the roof: whatever takes longer, computing or moving."""
        seconds = max(self.flop / ceilings.flops, self.num_bytes / ceilings.bytes_per_s)
        return 1 / seconds


@lru_cache
def _cost(preset: str, width: int, shape: tuple[int, ...], is_any_size: bool) -> "Cost":
    from ich_keras.models.classifier import classifier
    from ich_keras.models.cost import cost

    case = Case("", preset, shape, 1, width=width, is_any_size=is_any_size)
    return cost(classifier(case.spec, output="logits"))


def work(case: Case, precision: str, what: str) -> Work:
    """Count what one sample of a network costs.

    Args:
        case: the network, its input and its batch size.
        precision: "float32", "TF32" or "bfloat16".
        what: "train" or "predict".
    """
    costs = _cost(case.preset, case.width, case.shape, case.is_any_size)
    passes = TRAINING_PASSES if what == TRAIN else 1
    kept = costs.activation_bytes / (2 if precision == BFLOAT16 else 1)
    weights = costs.parameters * BYTES_PER_WEIGHT * WEIGHT_TRANSFERS[what] / case.batch
    return Work(2 * costs.multiply_adds * passes, kept * TRANSFERS[what] + weights)


@dataclass(frozen=True)
class ThesisRun:
    """A training that the thesis timed.

    Args:
        title: what it was.
        network: a key of `NETWORKS` with the same operations.
        train, valid: samples per epoch; validation costs one pass each.
        epochs: how many.
        hours: as published.
        device: as published.
    """

    title: str
    network: str
    train: int
    valid: int
    epochs: int
    hours: float
    device: str

    @property
    def flop(self) -> float:
        """Operations of the whole training."""
        case = network(self.network)
        parts = (self.train, TRAIN), (self.valid, "predict")
        return self.epochs * sum(count * work(case, "float32", what).flop for count, what in parts)

    def hours_at(self, flops: float) -> float:
        """Return the hours of the computation alone at a number of operations per second."""
        return self.flop / flops / 3600


GTX_1060_FLOPS = 4.4e12  # float32; NVIDIA's figure for the GeForce GTX 1060
# Source: "2D vs 3D Convolutional Neural Networks in Hemorrhage Detection", University of
# Bucharest, 2021.
THESIS = (
    ThesisRun("2D ResNet-18, slices", "slice", 602_242, 150_561, 6, 57, "GTX 1060 Max-Q"),
    ThesisRun(
        "MedicalNet ResNet-18, whole series", "series-dilated", 5_400, 1_350, 5, 35, "GTX 1060"
    ),
)
