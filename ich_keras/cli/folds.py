"""`ich folds`: a cross-validation, trained fold by fold and joined."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ich_keras.cli.options import FOLDER, LABELS_BESIDE, required
from ich_keras.errors import EnvironmentProblem, UsageError
from ich_keras.labels import LabelSource
from ich_keras.terminal import Command, open_terminal, terminal_width

_KEPT_BY_FOLDS = ("--fold", "--split", "--out", "--resume", "--cache", "--labels", "--plan")
_ALSO_TO_RESUME = ("--gpus", "--device", "--tensorboard")
PLAN = "folds.json"  # in the folder of the folds: how they are all trained
# How long a fold that this command's end interrupts has: first by itself, for Ctrl-C in a terminal
# reaches it too; then after it was told.
SECONDS_BY_ITSELF, SECONDS_TO_END = 10, 60


@click.command(
    cls=Command, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
@click.option("--cache", "cache_dir", type=FOLDER, metavar="DIR", help="From `ich cache`.")
@LABELS_BESIDE
@click.option("--folds", "count", type=int, default=5, show_default=True, help="How many.")
@click.option(
    "--join-only", is_flag=True, help="Join runs that are there: OUT/fold-1, OUT/fold-2, ..."
)
@click.option("--out", type=FOLDER, metavar="DIR", help="Folder of the runs and of the result.")
@click.pass_context
def folds(
    context: click.Context,
    cache_dir: Path | None,
    labels: LabelSource | None,
    count: int,
    join_only: bool,
    out: Path | None,
) -> None:
    """Train a network for each fold of a cross-validation by patient, and score all patients.

    All other options are those of `ich train`: --preset, --epochs, --seed, ... The same command
    resumes: finished folds are kept, and other options are refused. The result lies in OUT/joined.
    """
    from ich_keras.folds import METRICS, join_folds
    from ich_keras.run_folder import RunFolder
    from ich_keras.summary import evaluation_summary
    from ich_keras.workflow import open_cache

    cache_dir, out = required(cache_dir, "--cache"), required(out, "--out")
    if count < 3:
        raise UsageError(f"--folds is {count}; expected at least 3.")
    for word in context.args:
        if word.partition("=")[0] in _KEPT_BY_FOLDS:
            raise UsageError(f"{word} is decided by `ich folds`.", "Leave it out.")
    cache = open_cache(cache_dir, labels)
    runs = [RunFolder(out / f"fold-{number}") for number in range(1, count + 1)]
    is_new = not out.exists()
    if not join_only and not all(run.is_finished for run in runs):
        plan = {
            "folds": count,
            "cache": cache.fingerprint,
            "labels": [] if labels is None else labels.words(),
            "options": sorted(_groups(context.args)),
        }
        _keep_plan(out / PLAN, plan, any(run.is_finished or run.is_interrupted for run in runs))
    with open_terminal() as terminal:
        for number, run in enumerate(runs, 1):
            if run.is_finished or join_only:
                continue
            terminal.tell(f"Fold {number} of {count}: {run}")
            words = [sys.executable, "-m", "ich_keras.cli.train"]
            if run.is_interrupted:
                words += ["--resume", str(run)]
                groups = _groups(context.args)
                words += [word for group in groups if group[0] in _ALSO_TO_RESUME for word in group]
            else:
                words += ["--fold", f"{number}/{count}", "--out", str(run), *context.args]
            words += ["--cache", str(cache_dir), *([] if labels is None else labels.words())]
            # Of its own: Keras keeps its global state, and the memory of a network.
            try:
                code = _run(words, number)
            finally:
                if not any(run.is_finished or run.is_interrupted for run in runs):
                    (out / PLAN).unlink(missing_ok=True)  # nothing was begun with it
                    with contextlib.suppress(OSError):
                        if is_new:
                            out.rmdir()
            if code:
                context.exit(code)
        result = join_folds(runs, cache, out / "joined")
    click.echo(evaluation_summary(result.metrics, "out of fold", terminal_width()))
    click.echo(f"Written to {out / 'joined'}: {METRICS} and the predictions")


def _groups(words: Sequence[str]) -> list[list[str]]:
    """Divide the words of a command line into options, each with its value as a word of its own."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            groups.append([name, *([value] if equals else [])])
        elif groups:
            groups[-1].append(word)
        else:
            groups.append([word])
    return groups


def _keep_plan(path: Path, plan: dict[str, Any], is_begun: bool) -> None:
    """Write how the folds are trained, or compare it with how those that are there were begun.

    Raises:
        UsageError: they differ.
        StaleError: the file is damaged.
    """
    from ich_keras.files import read_json, write_json

    if is_begun and path.is_file():
        before = read_json(path)
        for name, now in plan.items():
            then = before.get(name) if isinstance(before, dict) else None
            if now != then:
                raise UsageError(
                    f"the folds in {path.parent} were begun with other {_NAMES[name]}:"
                    f" {_shown(then, now)}; now {_shown(now, then)}.",
                    "Give the command that began them, or another --out.",
                )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, plan)


_NAMES = {
    "folds": "--folds",
    "cache": "data in the cache (its fingerprint)",
    "labels": "--labels",
    "options": "options",
}


def _shown(found: Any, other: Any) -> str:
    """Return what is not the same in the other of two plans."""
    if not isinstance(found, list):
        return str(found)
    in_other = other if isinstance(other, list) else []
    parts = [part for part in found if part not in in_other]
    return " ".join(" ".join(p) if isinstance(p, list) else str(p) for p in parts) or "none"


def _run(words: list[str], number: int) -> int:
    """Train a fold in a process of its own; return its exit code.

    Raises:
        EnvironmentProblem: a signal killed it.
    """
    process = subprocess.Popen(words)
    try:
        code = process.wait()
    except (KeyboardInterrupt, SystemExit) as end:
        _end(process, is_interrupt=isinstance(end, KeyboardInterrupt))
        raise
    if code < 0:
        raise EnvironmentProblem(
            f"the training of fold {number} was killed by {signal.Signals(-code).name}.",
            "It may have run out of memory: try a smaller --batch-size. The same command resumes.",
        )
    return code


def _end(process: "subprocess.Popen[bytes]", is_interrupt: bool) -> None:
    """Let a fold end in order, as this command was told to."""
    try:
        if is_interrupt and _is_in_front():
            # A second Ctrl-C would interrupt what it does on the first.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_BY_ITSELF)
        process.send_signal(signal.SIGINT if is_interrupt else signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)
    finally:
        process.kill()  # nothing happens to one that has ended
        process.wait()


def _is_in_front() -> bool:
    """Whether a terminal sends Ctrl-C to this process and those that it started."""
    try:
        with open("/dev/tty", "rb") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False
