"""What commands print: results, warnings, errors with a hint, and one bar per step.

Lines and bars share the screen, so all of them go through `open_terminal`.
"""

import contextlib
import errno
import os
import select
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

import click

from ich_keras.display import Display, Step, new_display
from ich_keras.errors import (
    EXIT_ENVIRONMENT,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    IchError,
    IchWarning,
    LostProcess,
    UsageError,
)
from ich_keras.keras_private import CPU_OUT_OF_MEMORY
from ich_keras.paths import path_of
from ich_keras.progress import Progress, Tell
from ich_keras.ranks import Rank, this_rank
from ich_keras.synonyms import meant_by, question

TRACEBACK = "ICH_TRACEBACK"
# For every group, and for `ich-train`, which runs without the group.
HELP = {"help_option_names": ["-h", "--help"]}
USUAL_WIDTH = 80  # assumed for a file or pipe


# How long a process lets another speak first. Processes fail a second or two apart; who waited for
# one that ended learns of it within seconds.
_SECONDS_FOR_THE_FIRST, _SECONDS_FOR_THE_CAUSE = 4, 10
# Key of the arguments of a command, as they were given.
ARGUMENTS = "ich_keras.arguments"
TRAIN = "train"  # the command that runs in several processes

_PART_IS_A_FILE = "A part of the path is a file; expected folders. Choose another path."
_NOT_ALLOWED = "You may not write there. Choose another folder."
_OS_HINTS = {
    errno.EEXIST: _PART_IS_A_FILE,
    errno.ENOTDIR: _PART_IS_A_FILE,
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.EROFS: _NOT_ALLOWED,
    errno.ENOENT: "No file can be made or found there. Choose another path.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
}


def _fail(
    ctx: click.Context, message: str, hint: str, exit_code: int, is_of_another: bool = False
) -> NoReturn:
    """Print one line that says what is wrong and one that says what to do, and exit."""
    place = _process_that_fails(is_of_another) if ctx.command.name == TRAIN else ""
    message = f"{place}{message}"
    click.echo(f"Error: {message}", err=True)
    if hint:
        click.echo(f"Hint: {hint}", err=True)
    ctx.exit(exit_code)


def _process_that_fails(is_of_another: bool) -> str:
    """Let the process whose error it is speak first, where several train.

    Whoever started them then ends the others, while they wait here.

    Returns:
        What the message begins with.
    """
    rank = _rank()
    if is_of_another:
        time.sleep(_SECONDS_FOR_THE_CAUSE)
    elif not rank.is_first:
        time.sleep(_SECONDS_FOR_THE_FIRST)
    return "" if rank.is_first else f"process {rank.number} of {rank.of}: "


def _rank() -> Rank:
    try:
        return this_rank()
    except UsageError:  # the environment does not say; that is the error to be told
        return Rank()


class Command(click.Command):
    """A command that turns our errors into a message and an exit code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the arguments for a command that starts itself in other processes."""
        ctx.meta[ARGUMENTS] = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise _unknown_option(self, ctx, error.option_name) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; on one of our errors, exit with its code."""
        try:
            with _warnings_shown(lambda line: click.echo(line, err=True)):
                return super().invoke(ctx)
        except IchError as error:
            if os.environ.get(TRACEBACK):
                raise
            is_of_another = isinstance(error, LostProcess)
            _fail(ctx, error.message, error.hint, error.exit_code, is_of_another)
        except OSError as error:
            # Whoever read the output has enough of it: click ends the command without a word.
            has_reader = not (isinstance(error, BrokenPipeError) and _is_output_closed())
            if os.environ.get(TRACEBACK) or error.errno is None or not has_reader:
                raise
            place = f": {error.filename}" if error.filename else ""
            hint = _OS_HINTS.get(error.errno, f"{TRACEBACK}=1 shows where.")
            _fail(ctx, f"{error.strerror}{place}", hint, EXIT_ENVIRONMENT)
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
            if ctx.command.name != TRAIN or _rank().is_first:
                click.echo("Interrupted.", err=True)
            ctx.exit(EXIT_INTERRUPTED)


def _unknown_option(command: click.Command, ctx: click.Context, name: str) -> click.NoSuchOption:
    """Return the error for an option that does not exist, with those that may be meant."""
    if not name.startswith("--"):
        # Of -lr, click tells -l.
        given = [word.partition("=")[0] for word in ctx.meta[ARGUMENTS]]
        name = next((w for w in given if w.startswith(name) and not w.startswith("--")), name)
    known = [o for p in command.params for o in (*p.opts, *p.secondary_opts) if o[:2] == "--"]
    message = f"No such option {name!r}. {question(meant_by(name, known))}"
    return click.NoSuchOption(name, message.rstrip(), ctx=ctx)


def _is_output_closed() -> bool:
    """Tell whether nobody reads our output any more, as in `ich presets | head -1`."""
    # Otherwise the pipe that broke is that of a worker process, for instance.
    if not hasattr(select, "poll"):  # Windows
        return False
    waiting = select.poll()
    try:
        for stream in (sys.stdout, sys.stderr):
            waiting.register(stream.fileno(), 0)
    except (OSError, ValueError):  # a stream without a file, or closed
        return False
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in waiting.poll(0))


@contextlib.contextmanager
def _warnings_shown(warn: Tell) -> Iterator[None]:
    """Print our own warnings as one line each; others stay as they are."""
    show_others = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, IchWarning):
            warn(f"Warning: {message}")
        else:
            show_others(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = show_others


def _is_out_of_memory(error: Exception) -> bool:
    # torch raises RuntimeError on the CPU, and a subclass of it on a GPU. It is not imported here:
    # commands that do not need it start quickly.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or CPU_OUT_OF_MEMORY in str(error)
    )


class Group(click.Group):
    """A group of `Command`s."""

    command_class = Command


class PathType(click.Path):
    """The type of every option that takes a path: see `path_of`.

    Args:
        settings: of `click.Path`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(path_type=Path, **settings)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path that was meant."""
        return super().convert(_path(self, value, param, ctx), param, ctx)


class NameOrPathType(click.ParamType):
    """The type of options that take a name or a path, as text: see `path_of`."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text, with a home folder in place of a leading `~`."""
        found = _path(self, value, param, ctx)
        return str(found) if str(value).startswith("~") else str(value)


def _path(
    kind: click.ParamType, value: Any, param: click.Parameter | None, ctx: click.Context | None
) -> Path:
    try:
        return path_of(str(value), "it")
    except UsageError as error:
        kind.fail(f"{error.message} {error.hint}".strip(), param, ctx)


_SECONDS_TO_ONCE_MORE = 0.2
# Python's previous hook for exceptions that it cannot raise.
_report_others: list[Callable[[Any], Any]] = []


class _Terminated(SystemExit):
    """Raised on SIGTERM."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated(EXIT_TERMINATED)


def catch_termination() -> None:
    """Turn SIGTERM into an orderly exit."""
    # An exception lets temporary files be removed on the way out.
    signal.signal(signal.SIGTERM, _terminate)
    if sys.unraisablehook is not _once_more:
        _report_others.append(sys.unraisablehook)
        sys.unraisablehook = _once_more


def _once_more(lost: "sys.UnraisableHookArgs") -> None:
    """Send SIGTERM again if Python dropped the exception, else the program would run for hours.

    Python does that inside a destructor, for example that of a loader's workers.
    """
    if isinstance(lost.exc_value, _Terminated):
        threading.Timer(_SECONDS_TO_ONCE_MORE, os.kill, (os.getpid(), signal.SIGTERM)).start()
    else:
        _report_others[-1](lost)


@dataclass(frozen=True)
class Terminal:
    """The callables a command reports to, all usable while bars are on the screen.

    Args:
        progress: shows the progress of a long step on standard error.
        tell: prints a line of results on standard output.
        warn: prints a line on standard error.
    """

    progress: Progress
    tell: Tell
    warn: Tell


def terminal_width() -> int:
    """Return the width of the terminal in columns; 80 without one."""
    return shutil.get_terminal_size((USUAL_WIDTH, 24)).columns


@contextlib.contextmanager
def open_terminal(is_silent: bool = False) -> Iterator[Terminal]:
    """Yield the callables that a command reports to.

    If standard error is a terminal, unfinished steps are bars at the bottom of the screen and lines
    appear above them. The terminal wraps long lines, so a path can still be copied. In a file or
    pipe there are no bars: a step prints a line at its start, one at its end, and at most one a
    minute between.

    A step that begins before another has ended (validation within training) is part of it, and
    prints no line at its start and end.

    Args:
        is_silent: neither lines nor bars nor warnings, as for all but the first of several
            processes that train.
    """
    if is_silent:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield Terminal(lambda *step: None, lambda line: None, lambda line: None)
        return
    display = new_display()
    steps = _Steps(display)
    try:
        with _warnings_shown(display.warn):
            yield Terminal(steps.progress, display.tell, display.warn)
        steps.close()
    finally:
        display.close()


class _Steps:
    """Tracks the steps under way. Keras calls from several threads."""

    def __init__(self, display: Display):
        self._display = display
        self._active: dict[str, Step] = {}
        self._finished: dict[str, Step] = {}
        self._lock = threading.RLock()

    def progress(self, name: str, done: int, total: int, detail: str = "", /) -> None:
        with self._lock:
            self._progress(name, done, total, detail)

    def _progress(self, name: str, done: int, total: int, detail: str) -> None:
        now = time.monotonic()
        before = self._finished.get(name)
        if before is not None and done >= before.done:
            # A download of unknown length reports done == total with every call.
            return
        step = self._active.get(name)
        is_new = step is None
        if step is None:
            # A part's time is covered by the last line of the step around it.
            is_part = bool(self._active)
            step = Step(name, is_part, now, done, done, total, detail, now)
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
        """End steps that stopped short of their total, because some files were unreadable."""
        with self._lock:
            for step in self._active.values():
                self._display.remove(step)
                if not step.is_part:
                    self._display.warn(step.end_line(time.monotonic()))
            self._active.clear()
