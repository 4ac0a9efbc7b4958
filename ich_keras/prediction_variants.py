"""Test-time augmentation: the inputs as they are and turned, and the mean of the answers."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ich_keras.data.inputs import stack_channels, stack_slices_of
from ich_keras.data.views import View
from ich_keras.errors import UsageError

Turn = Callable[[np.ndarray], np.ndarray]


def _flipped(inputs: np.ndarray) -> np.ndarray:
    return inputs[..., ::-1, :]  # columns: rows of pixels run to the patient's left


def _reversed(inputs: np.ndarray, view: View | None = None) -> np.ndarray:
    if view is not None and view.is_stack:
        slices = stack_slices_of(inputs, view.num_slices)
        return stack_channels(slices[:, ::-1])
    return inputs[:, ::-1]


TTA: dict[str, Turn] = {"flip": _flipped, "reverse": _reversed}


def tta_names(asked: Sequence[str], view: View) -> tuple[str, ...]:
    """Return the names of the turns that were asked for, each once and in the order of `TTA`.

    Args:
        asked: of `TTA`: "flip" (left-right), "reverse" (upside down).
        view: what a sample is; only one of several slices can be reversed.

    Raises:
        UsageError: a name is unknown, or does not suit the view.
    """
    for name in [asked] if isinstance(asked, str) else asked:
        if name not in TTA:
            raise UsageError(
                f"test-time augmentation {name!r}; expected some of {', '.join(TTA)}.",
                'In Python, give a sequence: tta=("flip",).',
            )
    if isinstance(asked, str):
        raise UsageError(f"tta is the text {asked!r}; expected a sequence.", f"Give ({asked!r},).")
    if "reverse" in asked and not view.has_slices:
        raise UsageError(
            "test-time augmentation 'reverse' turns volumes upside down; a single slice has no"
            " order of slices.",
            "Leave it out, or predict with a run on stacks, slabs or series.",
        )
    return tuple(name for name in TTA if name in asked)


def turns_of(names: Sequence[str], view: View | None = None) -> tuple[Turn, ...]:
    """Return the functions that turn a batch: every combination of the names but the empty one.

    Each takes inputs (n, rows, columns, channels) or (n, slices, rows, columns, channels), and
    returns as many, contiguous.

    Args:
        names: keys of `TTA`.
        view: what a sample is; the slices of a stack are among its channels. None: no stack.

    >>> [turn(np.array([[[[1], [2]]]])).ravel().tolist() for turn in turns_of(["flip"])]
    [[2, 1]]
    >>> len(turns_of(["flip", "reverse"]))
    3
    """
    chosen = [
        [partial(_reversed, view=view) if name == "reverse" else TTA[name] for name in some]
        for count in range(1, len(names) + 1)
        for some in itertools.combinations(names, count)
    ]
    return tuple(_all_of(some) for some in chosen)


def _all_of(turns: Sequence[Turn]) -> Turn:
    def turn(inputs: np.ndarray) -> np.ndarray:
        for one in turns:
            inputs = one(inputs)
        return np.ascontiguousarray(inputs)  # torch takes no negative strides

    return turn
