"""Which process of a training this is, where several train together.

The environment says so, in the variables that torchrun sets. Without them a process is alone.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ich_keras.errors import UsageError

NUMBER, OF, LOCAL = "RANK", "WORLD_SIZE", "LOCAL_RANK"
ADDRESS, PORT = "MASTER_ADDR", "MASTER_PORT"
_HOW = "Start the processes with `ich-train --gpus N` or with torchrun."


@dataclass(frozen=True)
class Rank:
    """One of the processes of a training.

    Args:
        number: from 0; the first one writes.
        of: how many processes there are.
        local: number among those of this machine, which is that of its GPU.
    """

    number: int = 0
    of: int = 1
    local: int = 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process."""
        return self.of == 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and lines; also that of a process alone."""
        return self.number == 0

    def part(self, count: int) -> slice:
        """Return which of `count` samples are this process's: equal parts, in order.

        >>> [Rank(number, 2).part(3) for number in (0, 1)]
        [slice(0, 1, None), slice(1, 3, None)]
        """
        return slice(count * self.number // self.of, count * (self.number + 1) // self.of)


def this_rank(environment: Mapping[str, str] | None = None) -> Rank:
    """Read which process this is.

    Args:
        environment: None reads that of this process.

    Raises:
        UsageError: a variable that belongs to the others is absent, or is no number in its range.

    >>> this_rank({})
    Rank(number=0, of=1, local=0)
    """
    values = os.environ if environment is None else environment
    if values.get(OF, "1").strip() == "1":
        return Rank()
    absent = [name for name in (NUMBER, LOCAL, ADDRESS, PORT) if not values.get(name)]
    if absent:
        raise UsageError(
            f"{OF} is {values[OF]!r}, but {', '.join(absent)} {_is_or_are(absent)} not set: which"
            " process of how many is this?",
            f"{_HOW} For one process unset {OF}.",
        )
    of = _number(values, OF, 1, 2**16)
    number = _number(values, NUMBER, 0, of - 1)
    return Rank(number, of, _number(values, LOCAL, 0, of - 1))


def _is_or_are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _number(values: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = values[name].strip()
    if not (text.isascii() and text.isdecimal() and least <= int(text) <= most):
        raise UsageError(
            f"{name} is {values[name]!r}; expected a whole number from {least} to {most}.", _HOW
        )
    return int(text)
