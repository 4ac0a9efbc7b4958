"""How commands speak: errors as one line and a hint, progress as one bar per step."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import click

from ich_keras.errors import EXIT_ENVIRONMENT, EXIT_INTERRUPTED, EXIT_TERMINATED, IchError

TRACEBACK = "ICH_TRACEBACK"
SECONDS_BETWEEN_LINES = 5.0


class _Failure(click.ClickException):
    """One line that says what is wrong, a second one that says what to do."""

    def __init__(self, message: str, hint: str, exit_code: int):
        super().__init__(message)
        self.hint = hint
        self.exit_code = exit_code

    def show(self, file=None) -> None:
        click.echo(f"Error: {self.message}", err=True)
        if self.hint:
            click.echo(f"Hint: {self.hint}", err=True)


class Command(click.Command):
    """A command that turns our errors into a line and an exit code."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except IchError as error:
            if os.environ.get(TRACEBACK):
                raise
            raise _Failure(error.message, error.hint, error.exit_code) from error
        except OSError as error:
            if os.environ.get(TRACEBACK) or error.errno is None:
                raise
            place = f": {error.filename}" if error.filename else ""
            raise _Failure(
                f"{error.strerror}{place}", f"{TRACEBACK}=1 shows where.", EXIT_ENVIRONMENT
            ) from error
        except (MemoryError, RuntimeError) as error:
            if os.environ.get(TRACEBACK) or not _is_out_of_memory(error):
                raise
            raise _Failure(
                "out of memory.",
                "Use a smaller --batch-size or --size; training also takes --accumulate and"
                " --recompute stage.",
                EXIT_ENVIRONMENT,
            ) from error
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
_report_others: list = []  # what Python did with lost exceptions before


class _Terminated(SystemExit):
    """SIGTERM came."""


def _terminate(number, frame) -> None:
    raise _Terminated(EXIT_TERMINATED)


def catch_termination() -> None:
    """Turn SIGTERM into an orderly exit."""
    # As an exception, so that temporary files are removed on the way out.
    signal.signal(signal.SIGTERM, _terminate)
    if sys.unraisablehook is not _once_more:
        _report_others.append(sys.unraisablehook)
        sys.unraisablehook = _once_more


def _once_more(lost) -> None:
    """Send SIGTERM again when Python dropped the exception: it came in a destructor (of a loader's
    workers, say), and the program would go on for hours."""
    if isinstance(lost.exc_value, _Terminated):
        threading.Timer(_SECONDS_TO_ONCE_MORE, os.kill, (os.getpid(), signal.SIGTERM)).start()
    else:
        _report_others[-1](lost)


@contextlib.contextmanager
def terminal_progress() -> Iterator:
    """Yield a function progress(step, done, total) that shows long steps on standard error.

    On a terminal a bar with rate and time left; into a file or pipe a plain line every few
    seconds and at each step's end.
    """
    if not sys.stderr.isatty():
        yield _plain_lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, int] = {}

        def show(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield show


def _plain_lines():
    last: dict[str, float] = {}

    def show(step: str, done: int, total: int) -> None:
        now = time.monotonic()
        began = last.setdefault(step, now)
        if done >= total or now - began >= SECONDS_BETWEEN_LINES:
            last[step] = now
            click.echo(f"{step}: {done:,}/{total:,}", err=True)

    return show
