"""Running trainings: a finished run is skipped, an interrupted one is resumed or started again."""

import contextlib
import multiprocessing
import queue
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing.queues import Queue
from pathlib import Path

from experiments.data import claim_work, open_or_make
from experiments.declare import declaration, seeds_of, stage_of
from experiments.heads import (
    cost_file,
    features_file,
    forget_features,
    is_of_features,
    make_features,
    train_head,
)
from experiments.keeping import keep_result
from experiments.memory import measured
from experiments.place import Place
from experiments.results import is_kept, require_same_cache
from experiments.runs import RUNS
from experiments.settle import Task, resolve
from experiments.weights import absent_weights
from ich_keras.data.cache.cache import CTCache
from ich_keras.environment import choose_device
from ich_keras.errors import EnvironmentProblem, LostState, StaleError
from ich_keras.files import lock, read_json, write_json
from ich_keras.models.weights_lookup import weights_folder
from ich_keras.processes import START_METHOD, process_pool
from ich_keras.progress import Progress, Tell
from ich_keras.run_folder import RunFolder
from ich_keras.training import resume, train
from ich_keras.training_data import changed_environment

_SECONDS_BETWEEN_LINES = 1.0
# In a worker process: where its lines go.
_lines_to_parent: "Queue[str] | None" = None


def plan_tasks(place: Place, keys: Sequence[str], seeds: Sequence[int]) -> list[Task]:
    """Return the tasks that are not finished, dependencies first.

    On phantoms, runs whose weights are missing are left out, and the tables say so.

    Raises:
        EnvironmentProblem: weights are missing, and the scale is that of real data.
        StaleError: a stored result has other settings.
    """
    usable = []
    for key in keys:
        command = absent_weights(key)
        if command and not place.scale.is_synthetic:
            raise EnvironmentProblem(
                f"run {key} starts from {RUNS[key].needs_weights}, which is not in"
                f" {weights_folder()}.",
                f"`{command}` puts it there; `weights-convert list` shows where to get the"
                " checkpoint. --weights-dir names another folder.",
            )
        if not command:
            usable.append(key)
    tasks = [Task(key, seed) for key in usable for seed in seeds_of(key, tuple(seeds), place.scale)]
    # The first seed of every run comes first: it is enough for a first look.
    order = (*seeds, *place.scale.seeds)
    tasks.sort(key=lambda task: (stage_of(task.key), order.index(task.seed)))
    absent = [task for task in tasks if not is_kept(place, task.key, task.seed)]
    # Results may be kept without the work folder, but they contain no weights to start from.
    first = place.scale.seeds[0]
    started_from = {(other, first) for task in absent for other in RUNS[task.key].depends_on}
    stood_on = {(RUNS[task.key].on, task.seed) for task in absent}
    planned = []
    for task in tasks:
        of = (task.key, task.seed)
        if task in absent or (of in started_from and not _has_weights(place, *of)):
            planned.append(task)
        elif of in stood_on and not _has_weights(place, *of):
            planned.append(replace(task, part="weights"))
    return planned


def _has_weights(place: Place, key: str, seed: int) -> bool:
    run = RunFolder(place.run_dir(key, seed))
    return run.best_weights.is_file() and not run.is_interrupted


def make_run(
    place: Place,
    task: Task,
    tell: Tell | None = None,
    train_run: Callable = train,
) -> Task:
    """Train a run unless its folder is finished, and store its result; or do a part of this.

    Args:
        place: claimed; its cache exists.
        task: the run.
        tell: called with single lines of text.
        train_run: called as `ich_keras.training.train`.

    Raises:
        StaleError: the finished folder is of a run with other settings.
    """

    def tell_of_task(line: str) -> None:
        if tell is not None:
            tell(f"{task}: {line}")

    if task.part == "features":
        make_features(place, task, tell_of_task)
        return task
    run, folder = RUNS[task.key], place.run_dir(task.key, task.seed)
    cache = CTCache.open(place.cache_dir(run.split == "other"))
    mark = folder.with_name(f"{folder.name}.json")
    wanted = {"declaration": declaration(task.key, place.scale, task.seed, place.source)}
    made = RunFolder(folder)
    is_finished = (
        mark.is_file()
        and made.is_finished
        and made.best_weights.is_file()
        and (run.on is None or is_of_features(place, task))
    )
    if is_finished and read_json(mark) != wanted:
        raise StaleError(
            f"{folder} is a run with other settings.",
            "Remove that folder, or give another --work.",
        )
    config, cost = resolve(place, task, cache)
    if not is_finished and run.on is not None:
        write_json(mark, wanted)
        train_head(place, task, cache, tell_of_task)
    elif not is_finished:
        is_same = mark.is_file() and read_json(mark) == wanted
        goes_on = is_same and made.is_interrupted
        device = choose_device(config.device)
        augment = _own_augmentation(run.normalise_first)
        forget_features(place, task.key, task.seed)
        with measured() as peak:
            if not goes_on or not _resumed(folder, cache, device, augment, tell_of_task):
                shutil.rmtree(folder, ignore_errors=True)
                write_json(mark, wanted)
                settings = {} if augment is None else {"augment": augment}
                train_run(config, cache, folder, tell=tell_of_task, **settings)
        cost_of_run = {"peak_bytes": peak.to_dict()}
        write_json(cost_file(place, task.key, task.seed), cost_of_run)
    if task.part == "run":
        keep_result(place, task.key, task.seed, cache, cost)
    # Large, and not needed once the result is stored; the best weights stay.
    for path in (made.state_folder, made.model_file):
        _remove(path)
    return task


def _resumed(
    folder: Path, cache: CTCache, device: str, augment: Callable | None, tell: Tell
) -> bool:
    """Go on with an interrupted training, unless what it left is of no use: damaged, or of other
    versions, of which the kept result would name the last ones only."""
    changes = changed_environment(folder, device)
    if changes:
        tell(f"cannot be resumed, starting over: {'; '.join(changes)}")
        return False
    try:
        resume(folder, cache, tell=tell, augment=augment)
    except LostState as error:
        tell(f"cannot be resumed, starting over: {error}")
        return False
    return True


def _own_augmentation(normalise_first: bool) -> Callable | None:
    if not normalise_first:
        return None
    from experiments.normalise_first import in_thesis_order

    return in_thesis_order


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def reproduce(
    place: Place,
    keys: Sequence[str],
    seeds: Sequence[int],
    progress: Progress | None = None,
    tell: Tell | None = None,
    train_run: Callable[..., object] = train,
) -> int:
    """Make the data, and train every run that is not finished.

    Args:
        place: of the experiments.
        keys: of runs; see `chosen_runs`.
        seeds: of the runs that are trained with several.
        progress: called as progress(step, done, total) while the data are made.
        tell: called with single lines of text.
        train_run: called as `ich_keras.training.train`, where there is one job.

    Returns:
        The number of runs trained now.

    Raises:
        StaleError: work or results belong to other settings, or another process works there.
        EnvironmentProblem: weights are missing on real data, or a process died.
    """
    tell = tell or (lambda line: None)
    claim_work(place)
    tasks = plan_tasks(place, keys, seeds)
    usable = [key for key in keys if not absent_weights(key)]
    total = sum(len(seeds_of(key, tuple(seeds), place.scale)) for key in usable)
    tell(f"{len(tasks)} of {total} runs to train; the others are finished.")
    kept = [
        (key, seed)
        for key in usable
        for seed in seeds_of(key, tuple(seeds), place.scale)
        if Task(key, seed) not in tasks and RUNS[key].split != "other"
    ]
    if place.cache_dir().is_dir():
        require_same_cache(place, CTCache.open(place.cache_dir()), kept)
    if not tasks:
        return 0
    with lock(place.work / "experiment.lock"):
        cache = open_or_make(place, progress=progress, tell=tell)
        require_same_cache(place, cache, kept)
        others = {RUNS[task.key].split == "other" for task in tasks}
        if True in others:
            open_or_make(place, is_other=True, progress=progress, tell=tell)
        del cache
        done = 0
        for stage in _stages(place, tasks):
            for task in _finished(place, stage, tell, train_run):
                if task in tasks:
                    done += 1
                    tell(f"{task}: done ({done}/{len(tasks)})")
    return len(tasks)


def _stages(place: Place, tasks: list[Task]) -> Iterator[list[Task]]:
    """Yield tasks that can be done at the same time: runs before what starts from them, and the
    features of a slice network, once, before the heads on it."""
    for stage in sorted({stage_of(task.key) for task in tasks}):
        of_stage = [task for task in tasks if stage_of(task.key) == stage]
        heads = [task for task in of_stage if RUNS[task.key].on is not None]
        yield [task for task in of_stage if task not in heads]
        networks = dict.fromkeys((RUNS[task.key].on or "", task.seed) for task in heads)
        yield [
            Task(key, seed, "features")
            for key, seed in networks
            if not features_file(place, key, seed).is_file()
        ]
        yield heads


def _finished(
    place: Place, tasks: list[Task], tell: Tell, train_run: Callable[..., object]
) -> Iterator[Task]:
    """Train each task and yield it once its result is stored."""
    if place.jobs == 1:
        _set_threads(place.threads)
        for task in tasks:
            yield make_run(place, task, tell, train_run)
            _free_network()
        return
    threads = max(1, place.threads // place.jobs)
    # Lines of the workers pass through this process, which alone may write on the terminal.
    lines = multiprocessing.get_context(START_METHOD).Queue()
    pool = process_pool(place.jobs, _begin_worker, threads, lines)
    try:
        waiting = {pool.submit(_run_in_worker, place, task) for task in tasks}
        while waiting:
            finished, waiting = wait(waiting, _SECONDS_BETWEEN_LINES, FIRST_COMPLETED)
            _tell_all(lines, tell)
            for future in finished:
                yield future.result()
    except BrokenProcessPool as error:
        raise EnvironmentProblem(
            "a process that trained died.", "Out of memory? Give fewer --jobs."
        ) from error
    finally:
        # After an error or an interruption nobody should wait for hours; the next start resumes
        # the unfinished runs.
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def _tell_all(lines: "Queue[str]", tell: Tell) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            tell(lines.get_nowait())


def _begin_worker(threads: int, lines: "Queue[str]") -> None:
    global _lines_to_parent
    _lines_to_parent = lines
    _set_threads(threads)


def _run_in_worker(place: Place, task: Task) -> Task:
    assert _lines_to_parent is not None  # `_begin_worker` ran first
    make_run(place, task, _lines_to_parent.put)
    _free_network()
    return task


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _free_network() -> None:
    """Free a run's network, so that memory does not grow over many runs."""
    import gc

    import keras

    keras.utils.clear_session()
    gc.collect()
