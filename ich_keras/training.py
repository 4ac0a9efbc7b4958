"""Training: from a cache with labels to a run folder, in one go or resumed."""

import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ich_keras.config import RunConfig
from ich_keras.course import Course
from ich_keras.data.augment import Augmentation, Change, augmentation_name
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.pixels import notices_of, require_distinct
from ich_keras.data.seen import Seen
from ich_keras.distribution import (
    distribution_lines,
    join_group,
    require_distributable,
    require_same_statistics,
)
from ich_keras.domain import domain_of
from ich_keras.environment import choose_backend, choose_device, environment_record
from ich_keras.errors import IchError, UsageError
from ich_keras.evaluation import CHOOSING, evaluate_network
from ich_keras.files import atomic_write, lock, require_absent, write_json
from ich_keras.fitting import Fit, compiled_network, fit, restored
from ich_keras.inference import load_network
from ich_keras.leftovers import remove_leftovers
from ich_keras.model_file import save_model
from ich_keras.own_callbacks import (
    callbacks_name,
    own_callbacks,
    require_callbacks_alone,
    require_same_callbacks,
    require_settable_rate,
)
from ich_keras.planning import count_plan, split_indices, start_lines
from ich_keras.progress import Progress, Tell
from ich_keras.ranks import this_rank
from ich_keras.recipe import Recipe
from ich_keras.report import report_text
from ich_keras.run_checksums import write_checksums
from ich_keras.run_edits import require_unedited
from ich_keras.run_folder import (
    CACHE_PATH,
    ENDED_EARLY,
    PLAN,
    RESUMED,
    STAGES,
    START,
    RunFolder,
)
from ich_keras.run_pages.card import CARD, data_card
from ich_keras.run_pages.report import keep_page, report_page
from ich_keras.run_space import require_space, training_space
from ich_keras.training_data import (
    changed_environment,
    data_record,
    require_one_training,
    require_same_data,
)
from ich_keras.training_inputs import make_fit, measured, without_empty

SPLITS_TO_EVALUATE = (CHOOSING, "test")  # choices are made on the first


def train(
    config: RunConfig,
    cache: CTCache,
    out: Path | str,
    progress: Progress | None = None,
    tell: Tell | None = None,
    augment: Change | Augmentation | None = None,
    callbacks: Any = None,
) -> Path:
    """Train a classifier, keep the best weights by validation loss, and evaluate them.

    In the environment that torchrun sets, all processes call it alike, and each takes its part of
    every batch. The first one writes and evaluates; the others return when its last epoch is done.

    Args:
        config: of the training.
        cache: with labels joined.
        out: a new run folder.
        progress: called as progress(step, done, total, detail).
        tell: called with one line of text per epoch.
        augment: your own augmentation (`view_batches`), which replaces the one in the
            configuration.
        callbacks: Keras' callbacks of your own, one or several. They are called between validation
            and the saving of the state, so that they see `val_loss` (the log loss) and
            `val_auroc_any` in the logs, and may set `model.stop_training`: the training is then
            finished. (With several processes only those that look on.)

    Returns:
        The run folder; `RunFolder` lists its files.

    Raises:
        UsageError: `out` exists, the cache's slices are smaller than the input, the configuration
            needs an augmentation of your own, or Keras already runs on another backend.
        DataError: no labels, missing PatientID, too few patients, or a leaking split.
        DivergedError: a loss or weight is not finite; the last good state is kept.
        EnvironmentProblem: the free disk space is too little, or runs out; or another process of
            the training ended.
    """
    _require_cache(cache)
    rank = this_rank()
    run = RunFolder(require_absent(out) if rank.is_first else Path(out))
    tell = tell or (lambda line: None)
    if augment is None:
        config.require_no_own_augment()
    else:
        config = replace(config, data=replace(config.data, augment="own"))
    recipe = Recipe.of(config, cache.size, cache.labels)
    require_distributable(recipe, rank)
    if augment is not None:
        own = replace(recipe.training, own_augment=augmentation_name(augment))
        recipe = replace(recipe, training=own)
    own_ones = own_callbacks(callbacks)
    require_callbacks_alone(own_ones, rank)
    require_settable_rate(own_ones, recipe.training.schedule, recipe.training.warmup_steps)
    named = replace(recipe.training, own_callbacks=callbacks_name(own_ones))
    recipe = replace(recipe, training=named)
    split, indices = split_indices(cache.slices, recipe)
    require_distinct(cache, split, indices)
    recipe = measured(recipe, cache, indices["train"], progress, tell if rank.is_first else None)
    indices, left_out = without_empty(recipe, cache, indices, progress)
    samples = recipe.inputs.samples(cache)
    plan = count_plan(cache.slices, recipe, split, indices, samples)
    plan = replace(plan, note=" ".join(filter(None, [plan.note, left_out])))
    model, loaded = compiled_network(recipe, plan.total_steps, loads_weights=rank.is_first)
    group = join_group(recipe, rank)
    if group is not None and rank.is_first:
        place = {"cache": str(cache.path.absolute()), "out": str(run.path.absolute())}
        group.announce({"config": config.to_dict(), **place})
    require_one_training(group, recipe, cache)
    if not rank.is_first:
        fit(make_fit(recipe, run, cache, samples, indices, model, augment, group), Course())
        return run.path
    require_space(run, training_space(recipe, len(cache.slices), model))
    with lock(run.lock_file):
        if any(path != run.lock_file for path in run.path.iterdir()):
            require_absent(out)  # another training was faster
        try:
            write_json(run.config_file, config.to_dict())
            write_json(run.recipe_file, recipe.to_dict())
            environment = environment_record(recipe.device)
            started = datetime.now(UTC).isoformat(timespec="seconds")
            write_json(
                run.environment_file,
                {**environment, "seed": recipe.training.seed, START: started},
            )
            record = data_record(cache, recipe, split, plan.to_dict())
            write_json(run.data_file, record | {CARD: data_card(cache, recipe.labels)})
            split.save(run.split_file)
            Seen.of(cache, split).save(run.seen_file)
            if loaded is not None:
                write_json(run.started_from_file, {**asdict(loaded), "path": str(loaded.path)})
                tell(f"Weights: {loaded}.")
            for line in notices_of(cache):
                tell(line)
            if left_out:
                tell(left_out)
            for line in start_lines(recipe, plan):
                tell(line)
            training = make_fit(recipe, run, cache, samples, indices, model, augment, group)
            training, course = replace(training, callbacks=own_ones), Course()
            fit(training, course, progress, tell)
            finish(run, recipe, cache, progress, tell, course)
        finally:
            # Without a finished epoch there is nothing to resume or evaluate.
            if not run.is_interrupted and not run.is_finished:
                shutil.rmtree(run.path, ignore_errors=True)
    run.lock_file.unlink(missing_ok=True)
    return run.path


def resume(
    run_dir: RunFolder | Path | str,
    cache: CTCache,
    device: str | None = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
    augment: Change | Augmentation | None = None,
    callbacks: Any = None,
) -> Path:
    """Resume an interrupted training after its last finished epoch.

    On a CPU of the same kind, with the same versions and as many threads and processes, weights and
    history are bit-equal to those of a training that was not interrupted. Differences from the
    original environment are reported and noted in environment.json. Another number of processes is
    one of them, and is refused where batch normalisation takes the statistics of each process.

    Args:
        run_dir: the run folder that `train` left; its recipe and split are used.
        cache: the cache that the training began with, with the same labels.
        device: None takes the run's.
        progress, tell: as in `train`.
        augment: your own augmentation, if the training began with one.
        callbacks: those of your own, if the training began with some. They are new ones: what they
            counted before the interruption is lost, unless they keep it themselves.

    Returns:
        The run folder, as `train` leaves it.

    Raises:
        UsageError: the run is finished, it began with a different augmentation or other callbacks,
            or Keras already runs on another backend.
        LostState: all states are damaged.
        StaleError: there is no interrupted training, the cache or the labels are not those it
            began with, one of its files was edited or is damaged, or it is still running.
        EnvironmentProblem: the run's device is not available, or the disk is too full.
        DivergedError: as in `train`.
    """
    _require_cache(cache)
    rank = this_rank()
    tell = tell if tell is not None and rank.is_first else lambda line: None
    progress = progress if rank.is_first else None
    run = RunFolder.at(run_dir).require_interrupted()
    with lock(run.lock_file) if rank.is_first else nullcontext(False) as is_alone:
        run.require_interrupted()
        for folder in (run.path, run.state_folder) if rank.is_first else ():
            remove_leftovers(folder, is_alone=is_alone)
        require_unedited(run)
        require_same_data(run, cache)
        recipe, own_ones = how_to_resume(run, device, augment, callbacks)
        changes = changed_environment(run, recipe.device)
        for line in changes:
            tell(f"Different from the original environment: {line}.")

        # The split as stored in the run: the file it came from may have changed or gone.
        by_file = replace(recipe.training, split=str(run.split_file))
        _, indices = split_indices(cache.slices, replace(recipe, training=by_file))
        indices, _ = without_empty(recipe, cache, indices, progress)
        samples = recipe.inputs.samples(cache)
        total_steps = run.data()[PLAN]["total_steps"]
        model, _ = compiled_network(recipe, total_steps, loads_weights=False)
        group = join_group(recipe, rank)
        require_one_training(group, recipe, cache)
        training = make_fit(recipe, run, cache, samples, indices, model, augment, group)
        training = replace(training, callbacks=own_ones if rank.is_first else ())
        if not rank.is_first:
            return _follow(training)
        require_space(run, training_space(recipe, len(cache.slices), model))
        course = restored(training, tell)
        if group is not None:
            group.from_first(course)
        if changes:
            record = run.environment()
            resumed = [*record.get(RESUMED, []), {"epoch": course.done, "changed": changes}]
            write_json(run.environment_file, record | {RESUMED: resumed})
        epochs = recipe.training.epochs
        for line in notices_of(cache):
            tell(line)
        tell(
            f"Resuming after epoch {course.done} of {epochs}, {recipe.backend}, {recipe.device},"
            f" {recipe.precision}."
        )
        for line in distribution_lines(recipe, rank):
            tell(line)
        if not course.is_over(epochs):
            fit(training, course, progress, tell)
        finish(run, recipe, cache, progress, tell, course)
    run.lock_file.unlink(missing_ok=True)
    return run.path


def how_to_resume(
    run: RunFolder, device: str | None, augment: Change | Augmentation | None, callbacks: Any
) -> tuple[Recipe, tuple[Any, ...]]:
    """Return the recipe of a run as it is trained here, and the callbacks; arguments as `resume`.

    Raises:
        UsageError, EnvironmentProblem: as `resume`, which calls it before it writes anything.
    """
    rank, asked = this_rank(), run.recipe()
    _require_augmentation(asked, augment)
    recipe = asked.on(choose_backend(asked.backend), choose_device(device or asked.device))
    require_distributable(recipe, rank)
    own_ones = own_callbacks(callbacks)
    require_same_callbacks(recipe.training.own_callbacks, own_ones)
    require_callbacks_alone(own_ones, rank)
    require_settable_rate(own_ones, recipe.training.schedule, recipe.training.warmup_steps)
    require_same_statistics(run.environment(), recipe, rank)
    return recipe, own_ones


def cache_of(run: RunFolder | Path | str) -> Path | None:
    """Return the path of the cache that a training began with; None if it was not recorded."""
    path = RunFolder.at(run).data().get(CACHE_PATH)
    return None if path is None else Path(path)


def _require_cache(cache: CTCache) -> None:
    if isinstance(cache, str | Path):
        raise UsageError(
            f"cache is the path {str(cache)!r}; expected a CTCache.",
            "Open it first: ich_keras.CTCache.open(PATH).",
        )


def _require_augmentation(recipe: Recipe, augment: Change | Augmentation | None) -> None:
    given = None if augment is None else augmentation_name(augment)
    wanted = recipe.training.own_augment
    if given != wanted:
        before = f"with the augmentation {wanted}" if wanted else "without one of your own"
        raise UsageError(
            f"the augmentation differs: the training began {before}; now {given or 'none'} is"
            " given.",
            f"Resume it from Python: ich_keras.resume(RUN, CACHE, augment={wanted}).",
        )


def _follow(training: Fit) -> Path:
    """Train for the epochs that the first process has left, as another one does."""
    assert training.group is not None
    course = training.group.from_first(None)
    if not course.is_over(training.recipe.training.epochs):
        fit(training, course)
    return training.run.path


def finish(
    run: RunFolder,
    recipe: Recipe,
    cache: CTCache,
    progress: Progress | None,
    tell: Tell,
    course: Course,
) -> None:
    """Evaluate the best weights and write the reports and the `.keras` file.

    Args:
        run: with its best weights, and all that is known before they are evaluated.
        recipe, cache: of the training.
        progress, tell: as in `train`.
        course: of the training.
    """
    from ich_keras.models.weights_file import read_weights

    if course.stopped is not None:
        early = {"epoch": course.done, "why": course.stopped}
        write_json(run.environment_file, run.environment() | {ENDED_EARLY: early})
    _, model = load_network(run, recipe.device)
    # In float32, because other machines may not support a faster type.
    save_model(load_network(run, recipe.device, "float32")[1], run.model_file, recipe)
    # Left behind if the unfinished run was evaluated, or its evaluation was interrupted.
    run.forget_evaluations()
    clock = time.perf_counter
    taken: dict[str, float] = {}
    began = clock()
    for split in SPLITS_TO_EVALUATE:
        evaluate_network(run, recipe, model, cache, split, progress)
        taken[f"evaluating {split}"], began = round(clock() - began, 1), clock()
    domain = domain_of(run, recipe, model, cache, progress)
    if domain is not None:
        domain.save(run.domain_file)
    taken["measuring the domain"] = round(clock() - began, 1)
    write_json(run.environment_file, run.environment() | {STAGES: taken})
    # This report comes last: it makes the run a finished one.
    report = report_text(run)
    write_checksums(run, read_weights(run.best_weights).digest, report)
    atomic_write(run.report_file, report)
    try:
        # Without these pictures, too, the run is finished.
        keep_page(run, report_page(run, cache))
    except IchError as error:
        name = run.page_file().name
        tell(f"{name} could not be made: {error} To try again: ich report {run} --cache CACHE")
