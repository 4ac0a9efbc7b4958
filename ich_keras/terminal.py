"""How commands talk: results, warnings, errors with a hint, and one bar per step.

Lines and bars share the screen, so they go through one place: `open_terminal`.
"""

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import click

from ich_keras.errors import EXIT_ENVIRONMENT, EXIT_INTERRUPTED, EXIT_TERMINATED, IchError
from ich_keras.progress import Progress, Tell

if TYPE_CHECKING:
    import rich.console
    import rich.progress

TRACEBACK = "ICH_TRACEBACK"
SECONDS_BETWEEN_LINES = 60.0
SECONDS_BETWEEN_DRAWINGS = 0.1
USUAL_WIDTH = 80  # of a file or pipe, which has none
_BAR_WIDTH = 40


def _fail(ctx: click.Context, message: str, hint: str, exit_code: int) -> NoReturn:
    """Print one line that says what is wrong and one that says what to do, and exit."""
    click.echo(f"Error: {message}", err=True)
    if hint:
        click.echo(f"Hint: {hint}", err=True)
    ctx.exit(exit_code)


class Command(click.Command):
    """A command that turns our errors into a line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; on an error of ours exit with its code."""
        try:
            return super().invoke(ctx)
        except IchError as error:
            if os.environ.get(TRACEBACK):
                raise
            _fail(ctx, error.message, error.hint, error.exit_code)
        except OSError as error:
            if os.environ.get(TRACEBACK) or error.errno is None:
                raise
            place = f": {error.filename}" if error.filename else ""
            _fail(ctx, f"{error.strerror}{place}", f"{TRACEBACK}=1 shows where.", EXIT_ENVIRONMENT)
        except (MemoryError, RuntimeError) as error:
            if os.environ.get(TRACEBACK) or not _is_out_of_memory(error):
                raise
            _fail(
                ctx,
                "out of memory.",
                "Use a smaller --batch-size or --size; training also takes --accumulate and"
                " --recompute stage.",
                EXIT_ENVIRONMENT,
            )
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(EXIT_INTERRUPTED)


def _is_out_of_memory(error: Exception) -> bool:
    # torch raises RuntimeError on processors, and its own kind of it on a GPU; it is not imported
    # here, where commands that do without it start quickly.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


class Group(click.Group):
    """A group whose commands are ours."""

    command_class = Command


_SECONDS_TO_ONCE_MORE = 0.2
# What Python did with lost exceptions before.
_report_others: list[Callable[[Any], Any]] = []


class _Terminated(SystemExit):
    """SIGTERM came."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated(EXIT_TERMINATED)


def catch_termination() -> None:
    """Turn SIGTERM into an orderly exit."""
    # As an exception, so that temporary files are removed on the way out.
    signal.signal(signal.SIGTERM, _terminate)
    if sys.unraisablehook is not _once_more:
        _report_others.append(sys.unraisablehook)
        sys.unraisablehook = _once_more


def _once_more(lost: "sys.UnraisableHookArgs") -> None:
    """Send SIGTERM again when Python dropped the exception, as it does inside a destructor (of a
    loader's workers, say): the program would run on for hours."""
    if isinstance(lost.exc_value, _Terminated):
        threading.Timer(_SECONDS_TO_ONCE_MORE, os.kill, (os.getpid(), signal.SIGTERM)).start()
    else:
        _report_others[-1](lost)


@dataclass(frozen=True)
class Terminal:
    """Where a command reports to. All of it may be used while bars are on the screen.

    Args:
        progress: shows how far a long step is, on standard error.
        tell: prints a line of results on standard output.
        warn: prints a line on standard error.
    """

    progress: Progress
    tell: Tell
    warn: Tell


def terminal_width() -> int:
    """Return the columns of the terminal, 80 where there is none."""
    return shutil.get_terminal_size((USUAL_WIDTH, 24)).columns


@contextlib.contextmanager
def open_terminal() -> Iterator[Terminal]:
    """Yield what a command reports to.

    Where standard error is a terminal, unfinished steps are bars at the bottom of the screen, and
    every line appears above them, whole: long ones are left to the terminal to wrap, so that a path
    can be copied. In a file or pipe there are no bars: a step has a line at its start, one at its
    end, and at most one a minute between.

    A step that begins before another has ended (validation within training) is part of it, and
    leaves no line at its start and end.
    """
    display: _Display = _Bars() if _has_bars() else _Lines()
    steps = _Steps(display)
    try:
        yield Terminal(steps.progress, display.tell, display.warn)
        steps.close()
    finally:
        display.close()


def _has_bars() -> bool:
    # A dumb terminal cannot move the cursor back over a bar.
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@dataclass
class _Step:
    """How far a step is.

    Args:
        name: of the step.
        is_part: whether it began within another one.
        began: seconds on the clock.
        first: units that were done when it began; a resumed training begins with some.
        done: units of `total`.
        detail: what else there is to show.
        shown: seconds on the clock when its last line was printed.
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
        return self.done >= self.total

    def start_line(self) -> str:
        return f"{self.name}: {self.done:,}/{self.total:,}{self._in_brackets()}"

    def line(self, now: float) -> str:
        left = self.seconds_left(now)
        return self.start_line() + ("" if left is None else f", {duration(left)} left")

    def end_line(self, now: float) -> str:
        state = f"done, {self.total:,}" if self.is_finished else f"{self.done:,}/{self.total:,}"
        return f"{self.name}: {state} in {duration(now - self.began)}{self._in_brackets()}"

    def seconds_left(self, now: float) -> float | None:
        """Return the time left at the pace so far; None before there is one."""
        done = self.done - self.first
        return None if done <= 0 else (now - self.began) / done * (self.total - self.done)

    def _in_brackets(self) -> str:
        return f" ({self.detail})" if self.detail else ""


def duration(seconds: float) -> str:
    """Return a time as people read it.

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
    """Return a time in little room, for a bar.

    >>> clock(12.3), clock(140), clock(8000)
    ('0:12', '2:20', '2:13:20')
    """
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"


class _Display(Protocol):
    """What shows steps and lines: bars on a terminal, or lines only."""

    def tell(self, line: str) -> None:
        """Print a line on standard output."""

    def warn(self, line: str) -> None:
        """Print a line on standard error."""

    def update(self, step: _Step, is_new: bool, now: float) -> None:
        """Show a step that began or went on."""

    def remove(self, step: _Step) -> None:
        """Take a finished step off the screen."""

    def close(self) -> None:
        """Leave the screen as it was."""


class _Steps:
    """Keeps count of the steps under way. Keras calls from several threads."""

    def __init__(self, display: _Display):
        self._display = display
        self._active: dict[str, _Step] = {}
        self._finished: dict[str, _Step] = {}
        self._lock = threading.RLock()

    def progress(self, name: str, done: int, total: int, detail: str = "", /) -> None:
        with self._lock:
            self._progress(name, done, total, detail)

    def _progress(self, name: str, done: int, total: int, detail: str) -> None:
        now = time.monotonic()
        before = self._finished.get(name)
        if before is not None and done >= before.done:
            # A download of unknown length is at its end with every call.
            return
        step = self._active.get(name)
        is_new = step is None
        if step is None:
            # Shown in the line at its end, which covers them.
            is_part = bool(self._active)
            step = _Step(name, is_part, now, done, done, total, detail, now)
            self._active[name] = step
            self._finished.pop(name, None)
        else:
            step.done, step.total = max(step.done, done), total
            step.detail = detail or step.detail
        if not step.is_finished:
            self._display.update(step, is_new, now)
            return
        del self._active[name]
        self._finished[name] = step
        self._display.remove(step)
        if not step.is_part:
            self._display.warn(step.end_line(now))

    def close(self) -> None:
        """End what stopped short of its total: files that turned out to be unreadable."""
        with self._lock:
            for step in self._active.values():
                self._display.remove(step)
                if not step.is_part:
                    self._display.warn(step.end_line(time.monotonic()))
            self._active.clear()


class _Lines:
    """Lines only."""

    def tell(self, line: str) -> None:
        click.echo(line)

    def warn(self, line: str) -> None:
        click.echo(line, err=True)

    def update(self, step: _Step, is_new: bool, now: float) -> None:
        if is_new and not step.is_part:
            self.warn(step.start_line())
        elif now - step.shown >= SECONDS_BETWEEN_LINES:
            step.shown = now
            self.warn(step.line(now))

    def remove(self, step: _Step) -> None:
        pass

    def close(self) -> None:
        pass


class _Bars:
    """Bars at the bottom of the terminal, lines above them.

    The live display runs only while there is a bar: between steps, what others print stays. It has
    no thread of its own, and whatever prints or draws first takes the console: rich itself lets two
    threads move the cursor for the same rows, which now and then erases a line above the bars.
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

    def update(self, step: _Step, is_new: bool, now: float) -> None:
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

    def remove(self, step: _Step) -> None:
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
    """Return a console on standard error that one thread at a time prints on."""
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

    # Without markup and highlighting: brackets and numbers in paths stay as they are. With soft
    # wrap what others print (warnings) is not broken up either.
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
        # The line at the end of a step stays, not its bar.
        transient=True,
        # Results in a file must not go to the terminal.
        redirect_stdout=has_stdout,
    )
