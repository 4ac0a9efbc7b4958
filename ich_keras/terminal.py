"""Progress on the terminal: one bar per step, or a line now and then where there is none."""

import contextlib
import sys
import time
from collections.abc import Iterator

import click

SECONDS_BETWEEN_LINES = 5.0


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
