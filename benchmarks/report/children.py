"""Processes of this package that measure and report line by line."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parents[2]


class Child:
    """A command of this package under way; it and what it started end with this block.

    Args:
        arguments: of `python -m benchmarks`.
        limit: seconds after which it is killed.

    Attributes:
        is_late: whether it was killed because its time was up.
        problem: why it failed, in one line; "" if it did not.
    """

    def __init__(self, arguments: list[str], limit: float) -> None:
        self.is_late = False
        self.problem = ""
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            # A group of its own, so that its workers can be ended with it.
            start_new_session=True,
        )
        self._timer = threading.Timer(limit, self._stop)

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        self._kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def lines(self) -> Iterator[str]:
        """Yield the lines of its output as they come; then `problem` is known."""
        if self._process.stdout is not None:
            yield from (line for line in self._process.stdout if line.strip())
        code = self._process.wait()
        if code:
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines() or [_ended(code)]
            # Our own errors have a hint below them.
            ours = [line for line in lines if line.startswith("Error: ")]
            self.problem = (ours or lines)[-1].removeprefix("Error: ").strip()

    def _stop(self) -> None:
        self.is_late = True
        self._kill()

    def _kill(self) -> None:
        if not hasattr(os, "killpg"):
            self._process.kill()
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return  # all of the group have ended (macOS: they wait to be collected)


def _ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    # The system ends what takes too much memory without a word.
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"ended by {signal.Signals(-code).name}{hint}"
