"""`ich-train --resume`, and what is said when a training is interrupted."""

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ich_keras.cli.configuration import names_of
from ich_keras.errors import EnvironmentProblem, UsageError
from ich_keras.labels import LabelSource
from ich_keras.ranks import this_rank
from ich_keras.tensorboard_log import tensorboard_callback
from ich_keras.terminal import Terminal, open_terminal, terminal_width


def resume_training(
    run_dir: Path,
    cache_dir: Path | None,
    labels: LabelSource | None,
    device: str | None,
    options: dict[str, Any],
    more: tuple[int, Path] | None,
    tensorboard: Path | None,
) -> None:
    """Resume a training; with (epochs, new run), train a finished one for more epochs."""
    from ich_keras.environment import choose_backend, choose_device
    from ich_keras.extension import train_more
    from ich_keras.files import require_absent
    from ich_keras.run_edits import require_unedited
    from ich_keras.run_folder import RunFolder
    from ich_keras.summary import run_summary
    from ich_keras.training import cache_of, resume
    from ich_keras.workflow import cache_beside, open_cache

    given = names_of(options)
    if given:
        raise UsageError(
            f"{given} given with --resume: the run's own configuration holds.",
            "Leave it out, or start a new training.",
        )
    if more is None:
        require_unedited(RunFolder(run_dir).require_interrupted())
    else:
        RunFolder(run_dir).require_finished()
    cache_dir = cache_dir or cache_of(run_dir) or cache_beside(run_dir)
    if not cache_dir.exists():
        raise UsageError(
            f"the cache {cache_dir} does not exist.",
            "Give the cache's new place with --cache.",
        )
    cached = open_cache(cache_dir, labels)
    with open_terminal(is_silent=not this_rank().is_first) as terminal:
        out = run_dir if more is None else require_absent(more[1])
        with how_to_resume(out, labels, terminal):
            log = None
            if tensorboard is not None:
                recipe = RunFolder(run_dir).recipe()
                choose_backend(recipe.backend)  # now: the callback imports Keras
                choose_device(device or recipe.device)
                log = tensorboard_callback(tensorboard)
            others = device, terminal.progress, terminal.tell
            if more is None:
                resume(run_dir, cached, *others, callbacks=log)
            else:
                train_more(run_dir, cached, out, more[0], *others, callbacks=log)
        if this_rank().is_first:
            terminal.tell(run_summary(out, terminal_width()))


@contextlib.contextmanager
def how_to_resume(run_dir: Path, labels: LabelSource | None, terminal: Terminal) -> Iterator[None]:
    """When a training is interrupted, say which command resumes it.

    By Ctrl-C or SIGTERM, or by something of the machine: a worker that died, a full disk, memory.
    """
    from ich_keras.run_folder import RunFolder

    try:
        yield
    except _ENDINGS as error:
        if RunFolder(run_dir).is_interrupted:
            words = ["ich-train", "--resume", str(run_dir)]
            words += [] if labels is None else labels.words()
            rank = this_rank()
            words += [] if rank.is_alone else ["--gpus", str(rank.of)]
            terminal.warn(f"To resume: {shlex.join(words)}")
        elif isinstance(error, KeyboardInterrupt | SystemExit):
            terminal.warn("No epoch was finished: start the training again.")
        raise


# Of a training, though nothing is wrong with it: its state is whole.
_ENDINGS = (
    *(KeyboardInterrupt, SystemExit, BrokenPipeError),
    *(EnvironmentProblem, MemoryError, RuntimeError),
)
