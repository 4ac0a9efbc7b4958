"""Mixed samples: mixup and CutMix, of pairs within a batch.

What is drawn depends on seed, epoch and the batch alone. Labels are mixed as the pixels are; where
one of the two is missing, the mixed one is missing (NaN). The losses of this library are linear in
the labels, so that mixing labels is mixing losses.

Worker processes import this module: it must not import keras.
"""

from dataclasses import dataclass

import numpy as np

from ich_keras.input_changes import InputChanges

_STREAM = 5  # beside those of `ich_keras.data.changes`


@dataclass(frozen=True, eq=False)
class Mix:
    """How the samples of a batch are mixed.

    Args:
        partners: int64 (n,), with which sample of the batch each is mixed.
        shares: float32 (n,), what each sample keeps of itself; the rest is its partner's.
        boxes: int64 (n, 4), top, left, bottom and right of the pixels that are the partner's, the
            last two exclusive; (0, 4) where all pixels are mixed by the share.
    """

    partners: np.ndarray
    shares: np.ndarray
    boxes: np.ndarray


def draw_mix(changes: InputChanges, seed: int, epoch: int, indices: np.ndarray, side: int) -> Mix:
    """Draw how a batch is mixed.

    Args:
        changes: with a mixup or CutMix.
        seed, epoch: of the training.
        indices: int (n,), the samples of the batch, at least one.
        side: rows and columns of the input, pixels.
    """
    # The first sample names the batch: it is in no other one of the epoch.
    random = np.random.default_rng([seed, epoch, int(indices[0]), _STREAM])
    count = len(indices)
    partners = random.permutation(count)
    takes_boxes = changes.cutmix is not None
    if changes.mixup is not None and changes.cutmix is not None:
        takes_boxes = random.random() < 0.5
    alpha = changes.cutmix if takes_boxes else changes.mixup
    assert alpha is not None
    shares = random.beta(alpha, alpha, count)
    if not takes_boxes:
        return Mix(partners, shares.astype(np.float32), np.zeros((0, 4), np.int64))
    centres = random.integers(0, side, (count, 2))
    halves = (side * np.sqrt(1 - shares)).astype(np.int64)[:, np.newaxis] // 2
    boxes = np.hstack([centres - halves, centres + halves]).clip(0, side)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return Mix(partners, (1 - areas / side**2).astype(np.float32), boxes)


def mixed_inputs(inputs: np.ndarray, mix: Mix) -> np.ndarray:
    """Mix inputs, float32 (n, rows, columns, channels)."""
    others = inputs[mix.partners]
    if len(mix.boxes):
        mixed = inputs.copy()
        for one, other, (top, left, bottom, right) in zip(mixed, others, mix.boxes, strict=True):
            one[top:bottom, left:right] = other[top:bottom, left:right]
        return mixed
    shares = mix.shares.reshape(-1, *(1,) * (inputs.ndim - 1))
    return inputs * shares + others * (1 - shares)


def mixed_labels(labels: np.ndarray, mix: Mix) -> np.ndarray:
    """Mix labels, float32 (n, labels), NaN where one is missing.

    >>> mix = Mix(np.array([1, 0]), np.array([0.75, 1.0], np.float32), np.zeros((0, 4), int))
    >>> mixed_labels(np.array([[0.0, 1.0], [1.0, np.nan]], np.float32), mix).tolist()
    [[0.25, nan], [1.0, nan]]
    """
    shares = mix.shares[:, np.newaxis]
    return labels * shares + labels[mix.partners] * (1 - shares)
