"""More epochs for a finished run: a new run that goes on from the last state of the old one."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from ich_keras.checkpoints import POINTER, read_state, states_of, write_state
from ich_keras.counting import number_of
from ich_keras.course import STOPPED
from ich_keras.data.augment import Augmentation, Change
from ich_keras.data.cache.cache import CTCache
from ich_keras.errors import StaleError, UsageError
from ich_keras.files import new_folder, require_absent, write_json
from ich_keras.files import replace as replace_path
from ich_keras.leftovers import partial_of
from ich_keras.models.weights_file import WeightsFile, read_weights, write_record
from ich_keras.progress import Progress, Tell
from ich_keras.ranks import this_rank
from ich_keras.recipe import RECIPE, Recipe
from ich_keras.run_checksums import changed_files
from ich_keras.run_edits import marks_of
from ich_keras.run_folder import ENDED_EARLY, EXTENDED, PLAN, STAGES, RunFolder
from ich_keras.training import how_to_resume, resume
from ich_keras.training_data import require_same_data

MOST_EPOCHS = 10**6


def train_more(
    run_dir: RunFolder | Path | str,
    cache: CTCache,
    out: Path | str,
    epochs: int,
    device: str | None = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
    augment: Change | Augmentation | None = None,
    callbacks: Any = None,
) -> Path:
    """Train a finished run for more epochs, as a new run; the old one stays as it is.

    With a constant learning rate the new run is what a training of all these epochs would have
    been, bit for bit where `resume` is; not with `swa`, which averages other epochs then. `extend`
    says what becomes of a cosine and of patience.

    Args:
        run_dir: a finished run that has its last state.
        cache: that it was trained on, with the same labels.
        out: a new run folder.
        epochs: how many more.
        device, progress, tell, augment, callbacks: as for `resume`.

    Returns:
        The new run folder.

    Raises:
        UsageError: there are several processes.
        As `extend` and `resume`.
    """
    rank = this_rank()
    if not rank.is_alone:
        raise UsageError(
            f"more epochs in {rank.of} processes: they begin in one.",
            "Make the new run in one process by ich_keras.extension.extend(RUN, NEW, N); then"
            " resume it in several.",
        )
    run = RunFolder.at(run_dir).require_finished()
    require_same_data(run, cache)
    require_absent(out)
    # Now: a refusal must not leave a new run behind.
    how_to_resume(run, device, augment, callbacks)
    new = extend(run, out, epochs, tell)
    return resume(new, cache, device, progress, tell, augment, callbacks)


def extend(
    run_dir: RunFolder | Path | str, out: Path | str, epochs: int, tell: Tell | None = None
) -> RunFolder:
    """Make a new run from a finished one, of which `epochs` more are to be trained: `resume` does.

    A cosine is that of the longer training from here on: the learning rate, which had come down to
    zero, goes up again. Patience is left out: the epochs are asked for.

    Args:
        run_dir: a finished run.
        out: a new run folder.
        epochs: how many more, at least 1.
        tell: called with one line of text on the learning rate.

    Returns:
        The new run, as an interrupted training.

    Raises:
        UsageError: `out` exists, `epochs` is out of range, or fewer than the run averages (`swa`).
        StaleError: the run is not finished, was changed, or its last state is lost.
    """
    run = RunFolder.at(run_dir).require_finished()
    if isinstance(epochs, bool) or not isinstance(epochs, int) or not 1 <= epochs <= MOST_EPOCHS:
        raise UsageError(
            f"more epochs: {epochs!r}; expected at least 1, at most {MOST_EPOCHS}.",
            "For instance --more-epochs 3.",
        )
    recipe, done = run.recipe(), len(pd.read_csv(run.history_file))
    swa = recipe.training.swa or 0
    if epochs < swa:
        raise UsageError(
            f"{epochs} more epochs of a run that averages its last {swa}.",
            f"Train at least {swa} more.",
        )
    if changed := changed_files(run):
        raise StaleError(
            f"{run} was changed since it finished: {', '.join(changed)}.",
            "Copy the original run folder again.",
        )
    state = _last_state(run, done)
    best = read_weights(run.best_weights)
    total = done + epochs
    with new_folder(out) as folder:
        temporary = partial_of(folder)
        try:
            temporary.mkdir()
            _write(run, RunFolder(temporary), state, best, _longer(recipe, total), done)
            replace_path(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    if tell is not None:
        said = f"{number_of(done, 'epoch')} {'is' if done == 1 else 'are'} done in {run}"
        tell(f"{said}, {epochs} more make {total} in {out}.")
        if recipe.training.schedule == "cosine":
            tell(
                f"The learning rate follows the cosine of {total} epochs from here on: it goes up"
                f" again. Until epoch {done} it was that of {recipe.training.epochs}."
            )
        if recipe.training.patience is not None:
            tell("Patience is left out.")
    return RunFolder(Path(out))


def _last_state(run: RunFolder, done: int) -> Path:
    states = dict(states_of(run.state_folder))
    if done not in states:
        raise StaleError(
            f"{run.state_folder} has no state of epoch {done}, the last one: the optimiser's part"
            " of it is nowhere else.",
            "Copy the whole run folder again; or begin a new training from its weights:"
            f" ich-train --weights {run.best_weights} --config {run.config_file} --cache CACHE"
            " --out NEW",
        )
    read_state(states[done], done)
    return states[done]


def _longer(recipe: Recipe, epochs: int) -> Recipe:
    return replace(recipe, training=replace(recipe.training, epochs=epochs, patience=None))


def _write(
    run: RunFolder, new: RunFolder, state: Path, best: WeightsFile, recipe: Recipe, done: int
) -> None:
    config = run.config()
    fit = replace(config.fit, epochs=recipe.training.epochs, patience=None)
    write_json(new.config_file, replace(config, fit=fit).to_dict())
    write_json(new.recipe_file, recipe.to_dict())
    data = run.data()
    steps = data[PLAN]["steps_per_epoch"] * recipe.training.epochs
    write_json(new.data_file, data | {PLAN: data[PLAN] | {"total_steps": steps}})
    environment = run.environment()
    environment.pop(STAGES, None)
    before = {"run": str(run.path.absolute()), "epoch": done}
    if ENDED_EARLY in environment:
        before |= {"why": environment.pop(ENDED_EARLY)["why"], "of": run.recipe().training.epochs}
    extended = [*environment.get(EXTENDED, []), before]
    write_json(new.environment_file, environment | {EXTENDED: extended})
    for of in (
        lambda r: r.split_file,
        lambda r: r.seen_file,
        lambda r: r.started_from_file,
        lambda r: r.history_file,
        lambda r: r.windows_file,
    ):
        _copy(of, run, new)
    # The weights stay; their record says by which recipe they are used.
    _copy(lambda r: r.best_weights, run, new)
    write_record(new.best_weights, {**best.record, RECIPE: recipe.to_dict()})
    folder = new.state_folder / state.name
    shutil.copytree(state, folder)
    content, _ = read_state(folder, done)
    content.pop(STOPPED, None)
    write_state(folder, content | marks_of(new))
    write_json(new.state_folder / POINTER, {"state": state.name})


def _copy(of: Callable[[RunFolder], Path], run: RunFolder, new: RunFolder) -> None:
    if of(run).is_file():
        shutil.copyfile(of(run), of(new))
