"""The course of a training: its epochs so far, the best of them, and what ended it early."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ich_keras.files import atomic_write
from ich_keras.run_folder import RunFolder

# Keys of a state.
BEST_WEIGHTS, STOPPED, WINDOWS = "best_weights", "stopped", "windows"


@dataclass
class Course:
    """The progress of a training so far: what validation must remember.

    Args:
        rows: one entry of history.csv per finished epoch.
        best_loss: the lowest validation log loss.
        best_epoch: the epoch that reached it, counted from 1; 0 before the first.
        best_weights: the digest of its weights; None when an older version saved them.
        stopped: why no epoch follows, although not all are done; None while they go on.
        windows: the rows of windows.csv; none without learnable windows.
    """

    rows: list[dict] = field(default_factory=list)
    best_loss: float = np.inf
    best_epoch: int = 0
    best_weights: str | None = None
    stopped: str | None = None
    windows: list[dict] = field(default_factory=list)

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> "Course":
        """Return the course that a state holds."""
        best = (state["best_loss"], state["best_epoch"], state.get(BEST_WEIGHTS))
        return cls(state["history"], *best, state.get(STOPPED), state.get(WINDOWS, []))

    def to_state(self) -> dict[str, Any]:
        """Return the entries of a state, ready for JSON."""
        return {
            "history": self.rows,
            "best_loss": self.best_loss,
            "best_epoch": self.best_epoch,
            BEST_WEIGHTS: self.best_weights,
            **({} if self.stopped is None else {STOPPED: self.stopped}),
            **({WINDOWS: self.windows} if self.windows else {}),
        }

    @property
    def done(self) -> int:
        """Number of finished epochs."""
        return len(self.rows)

    def is_over(self, epochs: int) -> bool:
        """Whether no epoch of so many is left to train."""
        return self.done >= epochs or self.stopped is not None

    def has_no_patience_left(self, patience: int | None) -> bool:
        """Whether the last `patience` epochs gave no better validation log loss.

        >>> Course(rows=[{}] * 5, best_epoch=3).has_no_patience_left(2)
        True
        """
        return patience is not None and self.done - self.best_epoch >= patience


def write_history(run: RunFolder, course: Course) -> None:
    """Write history.csv: a row per finished epoch; and windows.csv, where windows are learned."""
    atomic_write(run.history_file, pd.DataFrame(course.rows).to_csv(index=False))
    if course.windows:
        atomic_write(run.windows_file, pd.DataFrame(course.windows).to_csv(index=False))


def auroc_of(part: str, label: str) -> str:
    """Return the name of a label's AUROC in history.csv and in the logs of callbacks.

    >>> auroc_of("valid", "any")
    'valid_auroc_any'
    """
    return f"{part}_auroc_{label.replace(' ', '_')}"
