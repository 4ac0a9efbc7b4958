"""The numbers that the thesis published, which our tables are compared with.

Source: "2D vs 3D Convolutional Neural Networks in Hemorrhage Detection" (University of Bucharest,
2021), tables 1 to 4. These are facts of that work, faults included: `convention.py` shows how its
metrics were computed, and table 3 is the score of a predictor that always answers "no".
"""

from dataclasses import dataclass

from ich_keras.labels import ANY
from ich_keras.phantom.plan import RSNA_POSITIVE_SERIES, RSNA_SERIES


@dataclass(frozen=True)
class Published:
    """One row of the thesis: one network, on the thesis's own validation set.

    Args:
        table: number in the thesis.
        title: which network, on which samples.
        loss: binary cross-entropy, mean over the six labels.
        accuracy: share of samples whose six labels are all right.
        hamming_loss, hamming_score, precision, f1, recall, specificity: as in `convention.py`.
    """

    table: int
    title: str
    loss: float
    accuracy: float | None = None
    hamming_loss: float | None = None
    hamming_score: float | None = None
    precision: float | None = None
    f1: float | None = None
    recall: float | None = None
    specificity: float | None = None


# Table 1 reports the loss after four epochs; the third network ended at .0723.
PUBLISHED = {
    "2d-pretrained-4-epochs": Published(1, "2D ResNet-18, ImageNet weights, 4 epochs", 0.0927),
    "2d-scratch-4-epochs": Published(1, "2D ResNet-18 from scratch, 4 epochs", 0.1133),
    "2d-resnet50-4-epochs": Published(1, "2D ResNet-50, ImageNet weights, 4 epochs", 0.0845),
    "2d": Published(
        2, "2D ResNet-18 on slices", 0.0823, 0.8982, 0.0281, 0.9249, 0.8808, 0.7937, 0.7224, 0.9910
    ),
    "series": Published(
        3,
        "3D ResNet-18 on whole series",
        0.4947,
        0.6007,
        0.1995,
        0.6007,
        0.1447,
        0.1447,
        0.1447,
        0.8034,
    ),
    "slab": Published(
        4,
        "3D ResNet-18 on five slices",
        0.2031,
        0.7812,
        0.0572,
        0.8177,
        0.6656,
        0.5678,
        0.4952,
        0.9604,
    ),
}

# The validation set of table 3: series, positive ones per label, and healthy ones.
SERIES_VALIDATION, SERIES_POSITIVE = RSNA_SERIES, RSNA_POSITIVE_SERIES
SERIES_HEALTHY = RSNA_SERIES - RSNA_POSITIVE_SERIES[ANY]
