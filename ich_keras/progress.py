"""How long work reports back to whoever called it: two kinds of callables, declared once."""

from collections.abc import Callable
from typing import Protocol

# Called with one line of text.
Tell = Callable[[str], None]


class Progress(Protocol):
    """Called while a long step is under way."""

    def __call__(self, step: str, done: int, total: int, detail: str = "", /) -> None:
        """Take note of how far a step is.

        Args:
            step: the name of the step, the same from its beginning to its end.
            done: units of work finished; `total` at the end.
            total: units of work in all.
            detail: what else is worth showing, such as the epoch and the loss. Only training
                gives it: a function of three arguments serves for everything else.
        """
