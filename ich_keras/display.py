"""Showing steps and lines: as bars on a terminal, or as lines only."""

import os
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import click

if TYPE_CHECKING:
    import rich.console
    import rich.progress

SECONDS_BETWEEN_LINES = 60.0
SECONDS_BETWEEN_DRAWINGS = 0.1
_BAR_WIDTH = 40


@dataclass
class Step:
    """The progress of one step.

    Args:
        name: of the step.
        is_part: whether it began within another step.
        began: when it began, seconds on the clock.
        first: units already done when it began; a resumed training starts above 0.
        done: units done, of `total`.
        detail: anything else to show.
        shown: when its last line was printed, seconds on the clock.
    """

    name: str
    is_part: bool
    began: float
    first: int
    done: int
    total: int
    detail: str
    shown: float

    @property
    def is_finished(self) -> bool:
        """Whether all units are done."""
        return self.done >= self.total

    def start_line(self) -> str:
        """Return the line to print at its start."""
        return f"{self.name}: {self.done:,}/{self.total:,}{self._in_brackets()}"

    def line(self, now: float) -> str:
        """Return the line to print on the way: how far it is, and the time left."""
        left = self.seconds_left(now)
        return self.start_line() + ("" if left is None else f", {duration(left)} left")

    def end_line(self, now: float) -> str:
        """Return the line to print at its end: how much was done, and how long it took."""
        state = f"done, {self.total:,}" if self.is_finished else f"{self.done:,}/{self.total:,}"
        return f"{self.name}: {state} in {duration(now - self.began)}{self._in_brackets()}"

    def seconds_left(self, now: float) -> float | None:
        """Return the time left at the pace so far; None before anything is done."""
        done = self.done - self.first
        return None if done <= 0 else (now - self.began) / done * (self.total - self.done)

    def _in_brackets(self) -> str:
        return f" ({self.detail})" if self.detail else ""


def duration(seconds: float) -> str:
    """Return a duration for people to read.

    >>> duration(12.3), duration(140), duration(8000)
    ('12 s', '2 min 20 s', '2 h 13 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def clock(seconds: float) -> str:
    """Return a short duration, for a bar.

    >>> clock(12.3), clock(140), clock(8000)
    ('0:12', '2:20', '2:13:20')
    """
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"


class Display(Protocol):
    """Shows steps and lines, as bars on a terminal or as lines only."""

    def tell(self, line: str) -> None:
        """Print a line on standard output."""

    def warn(self, line: str) -> None:
        """Print a line on standard error."""

    def update(self, step: Step, is_new: bool, now: float) -> None:
        """Show a step that began or advanced."""

    def remove(self, step: Step) -> None:
        """Take a finished step off the screen."""

    def close(self) -> None:
        """Leave the screen as it was."""


class Lines:
    """Shows lines only."""

    def tell(self, line: str) -> None:
        click.echo(line)

    def warn(self, line: str) -> None:
        click.echo(line, err=True)

    def update(self, step: Step, is_new: bool, now: float) -> None:
        if is_new and not step.is_part:
            self.warn(step.start_line())
        elif now - step.shown >= SECONDS_BETWEEN_LINES:
            step.shown = now
            self.warn(step.line(now))

    def remove(self, step: Step) -> None:
        pass

    def close(self) -> None:
        pass


class Bars:
    """Shows bars at the bottom of the terminal, and lines above them.

    The live display runs only while there is a bar, so it never erases what others print between
    steps. It has no thread of its own. Printing and drawing lock the console: rich itself lets two
    threads move the cursor for the same rows, which occasionally erases a line above the bars.
    """

    def __init__(self) -> None:
        self._has_stdout = sys.stdout.isatty()
        self._console = _new_console()
        self._bars: rich.progress.Progress | None = None
        self._tasks: dict[str, rich.progress.TaskID] = {}
        self._drawn = 0.0

    def tell(self, line: str) -> None:
        if self._has_stdout:
            self.warn(line)
        else:
            click.echo(line)

    def warn(self, line: str) -> None:
        self._console.out(line, highlight=False)

    def update(self, step: Step, is_new: bool, now: float) -> None:
        is_due = is_new or now - self._drawn >= SECONDS_BETWEEN_DRAWINGS
        if is_due:
            self._drawn = now
        left = step.seconds_left(now)
        parts = [step.detail, "" if left is None else f"{clock(left)} left"]
        note = ", ".join(part for part in parts if part)
        with self._console:
            if self._bars is None:
                self._bars = _new_bars(self._console, self._has_stdout)
                self._bars.start()
            if step.name not in self._tasks:
                self._tasks[step.name] = self._bars.add_task(step.name, total=step.total, note="")
            task = self._tasks[step.name]
            self._bars.update(
                task, completed=step.done, total=step.total, note=note, refresh=is_due
            )

    def remove(self, step: Step) -> None:
        task = self._tasks.pop(step.name, None)
        if self._bars is None or task is None:
            return
        with self._console:
            if self._tasks:
                self._bars.remove_task(task)
                self._bars.refresh()
            else:
                self.close()

    def close(self) -> None:
        if self._bars is not None:
            with self._console:
                self._bars.stop()
            self._bars = None
            self._tasks.clear()


def _new_console() -> "rich.console.Console":
    """Return a console on standard error that only one thread at a time can use."""
    from rich.console import Console

    class Ordered(Console):
        def __init__(self, **options: Any) -> None:
            self._turn = threading.RLock()
            super().__init__(**options)

        def __enter__(self) -> Console:
            self._turn.acquire()
            return super().__enter__()

        def __exit__(self, *error: Any) -> None:
            try:
                super().__exit__(*error)
            finally:
                self._turn.release()

    # No markup or highlighting: brackets and numbers in paths stay as they are. Soft wrap keeps
    # lines printed by others (warnings) unbroken.
    return Ordered(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)


def _new_bars(console: "rich.console.Console", has_stdout: bool) -> "rich.progress.Progress":
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    return Progress(
        TextColumn("{task.description}", markup=False),
        # On a narrow terminal the bar shrinks first.
        BarColumn(bar_width=_BAR_WIDTH, table_column=Column(no_wrap=False)),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}", markup=False),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        auto_refresh=False,
        # A finished step leaves its last line, not its bar.
        transient=True,
        # Results in a file must not go to the terminal.
        redirect_stdout=has_stdout,
    )


def new_display() -> Display:
    """Return bars where standard error is a terminal that can draw them, otherwise lines."""
    # A dumb terminal cannot move the cursor back over a bar.
    has_bars = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return Bars() if has_bars else Lines()
