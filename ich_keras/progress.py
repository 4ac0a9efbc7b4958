"""The two kinds of callables through which long work reports to its caller."""

from collections.abc import Callable
from typing import Protocol

# Called with one line of text.
Tell = Callable[[str], None]


class Progress(Protocol):
    """Called while a long step is under way."""

    def __call__(self, step: str, done: int, total: int, detail: str = "", /) -> None:
        """Receive how far a step is.

        Args:
            step: the name of the step, the same from its beginning to its end.
            done: units of work finished; `total` at the end.
            total: units of work in all.
            detail: anything else worth showing, such as the epoch and the loss. Only training
                passes it: a function of three arguments is enough for everything else.
        """
