"""The workflow from DICOM files and labels to a trained run: index, cache, plan, training.

All commands and the experiments use it. Existing results are reused, never overwritten.
"""

import dataclasses
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from ich_keras.config import RunConfig
from ich_keras.ct.leftovers import remove_rejects, require_absent_or_rejects
from ich_keras.ct.rejects import (
    MAX_REJECTS,
    nothing_usable,
    rejects_kept,
    require_few_rejects,
    require_share,
)
from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.data.cache.cache import CTCache, build_cache
from ich_keras.data.label_files import Labels, label_table
from ich_keras.data.labels import join_labels
from ich_keras.distribution import require_distributable
from ich_keras.errors import UsageError
from ich_keras.keras_settings import require_trainable_settings
from ich_keras.phantom.record import with_bleed_volumes
from ich_keras.planning import TrainingPlan, labels_in, plan_lines, plan_of
from ich_keras.progress import Progress, Tell
from ich_keras.ranks import this_rank
from ich_keras.recipe import Recipe
from ich_keras.run_space import require_space_with_cache
from ich_keras.training import train


def prepare_index(
    dicom: Path | str,
    labels: Labels | None = None,
    limit_series: int | None = None,
    workers: int = 0,
    journal: Path | str | None = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
    any_body_part: bool = False,
    any_image_type: bool = False,
    max_rejects: float = MAX_REJECTS,
    executor: Executor | None = None,
) -> SeriesIndex:
    """Index a folder and join its labels.

    Args:
        dicom: the folder.
        labels: a label file, or what is in it; None leaves the index without labels.
        limit_series: keep only this many series, the first ones.
        workers: processes that read headers; 0 reads them in this one.
        journal: a file from which an interrupted indexing continues.
        progress: called as progress(step, done, total).
        tell: called with lines about the index and the labels.
        any_body_part, any_image_type, executor: as for `index_folder`.
        max_rejects: as for `require_few_rejects`.

    Raises:
        UsageError: a path does not exist, or `max_rejects` is not a share.
        TooManyRejects: too many files are refused.
        DataError: no CT slice in the folder, a faulty label file, or labels that match no image.
    """
    require_share(max_rejects)
    # Labels first: a fault in them shows before the long walk through the folder.
    table = None if labels is None else label_table(labels)
    index = index_folder(
        dicom, workers, journal, progress, any_body_part, None, any_image_type, executor
    )
    index = dataclasses.replace(index, series=with_bleed_volumes(index.series, dicom))
    if tell is not None:
        tell(f"Found {index}.")
    usable = index.usable()
    if table is not None and usable.slices.empty:
        raise nothing_usable(
            f"no series in {dicom} can be trained on", usable.rejects, "There is no usable slice."
        )
    require_few_rejects(usable.slices, index.rejects, max_rejects)
    if table is not None:
        index, join = join_labels(index, table)
        if tell is not None:
            tell(f"Labels: {table}.")
            tell(str(join))
    # Localizers and non-axial series do not count towards the limit.
    return index if limit_series is None else first_series(index.usable(), limit_series)


def first_series(index: SeriesIndex, count: int | None) -> SeriesIndex:
    """Keep the first `count` series of an index (None: all)."""
    if count is None:
        return index
    if count < 1:
        raise UsageError(f"--limit-series is {count}; expected at least 1.")
    series = index.series.iloc[:count]
    slices = index.slices[index.slices["series_uid"].isin(series["series_uid"])]
    return dataclasses.replace(
        index, series=series.reset_index(drop=True), slices=slices.reset_index(drop=True)
    )


def open_cache(path: Path | str, labels: Labels | None = None) -> CTCache:
    """Open a cache with other labels, or with those it was built with.

    Raises:
        StaleError: not a complete cache.
        DataError: a faulty label file, or labels that match no image.
    """
    table = None if labels is None else label_table(labels)
    return CTCache.open(path, labels=table)


def make_cache(
    index: SeriesIndex,
    out: Path | str,
    size: int,
    workers: int = 0,
    progress: Progress | None = None,
    restart: bool = False,
    max_rejects: float = MAX_REJECTS,
    compression: str | None = None,
    executor: Executor | None = None,
) -> CTCache:
    """Cache the usable series of an index, as `build_cache` does; others become rejects."""
    return build_cache(
        index.usable(),
        out,
        size,
        workers=workers,
        progress=progress,
        restart=restart,
        max_rejects=max_rejects,
        compression=compression,
        executor=executor,
    )


def cache_dicom(
    dicom: Path | str,
    labels: Labels | None,
    cache_dir: Path | str,
    size: int,
    index_dir: Path | str | None = None,
    workers: int = 0,
    journal: Path | str | None = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
    any_body_part: bool = False,
    any_image_type: bool = False,
    max_rejects: float = MAX_REJECTS,
) -> CTCache:
    """Index a folder, join its labels and cache it: the first half of the workflow.

    Args:
        dicom, labels, workers, journal, progress, tell, any_body_part, any_image_type, max_rejects:
            as for `prepare_index`.
        cache_dir: a new folder.
        size: rows and columns of a cached slice.
        index_dir: a new folder that also receives the index; None keeps none.

    Raises:
        UsageError: a path does not exist, or a folder to write already does.
        DataError: as `prepare_index`.
    """
    index = prepare_index(
        dicom,
        labels,
        None,
        workers,
        journal,
        progress,
        tell,
        any_body_part=any_body_part,
        any_image_type=any_image_type,
        max_rejects=max_rejects,
    )
    if index_dir is not None:
        index.save(index_dir)
    return make_cache(
        index, cache_dir, size, workers=workers, progress=progress, max_rejects=max_rejects
    )


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What is known before anything is written: `Preparation.train` does the rest.

    Args:
        config: the requested settings.
        recipe: the settings in use.
        plan: what the training will do.
        out: the new run folder.
        cache_dir: where the cache is, or will be built.
        cache: the cache; None when it has to be built.
        index: the index to build the cache from; None when only a cache was given.
        max_rejects: the largest share of refused files in a cache that is built.
    """

    config: RunConfig
    recipe: Recipe
    plan: TrainingPlan
    out: Path
    cache_dir: Path
    cache: CTCache | None
    index: SeriesIndex | None
    max_rejects: float = MAX_REJECTS

    @property
    def cache_bytes(self) -> int:
        """Size of the cache to build, bytes; 0 when it exists."""
        if self.cache is not None or self.index is None:
            return 0
        return len(self.index.usable().slices) * self.recipe.inputs.cache_size**2 * 2

    def train(
        self,
        index_dir: Path | str | None = None,
        workers: int = 0,
        progress: Progress | None = None,
        tell: Tell | None = None,
        callbacks: Any = None,
    ) -> Path:
        """Build the cache if there is none, and train.

        Args:
            index_dir: a new folder for the index; None keeps none.
            workers: processes that cache; 0 caches in this one.
            progress, tell, callbacks: as for `train`.

        Returns:
            The run folder.

        Raises:
            EnvironmentProblem: the free disk space is too little for the cache and the training.
        """
        if self.cache is None and self.index is not None:
            num_slices = len(self.index.usable().slices)
            require_space_with_cache(
                self.recipe, num_slices, self.out, self.cache_dir, self.cache_bytes
            )
        if index_dir is not None and self.index is not None:
            self.index.save(index_dir)
        cache = self.cache
        if cache is None:
            assert self.index is not None
            cache = make_cache(
                self.index,
                self.cache_dir,
                self.recipe.inputs.cache_size,
                workers,
                progress,
                max_rejects=self.max_rejects,
            )
        remove_rejects(self.out)  # of a try that refused the same data
        return train(self.config, cache, self.out, progress, tell, callbacks=callbacks)


def prepare_training(
    config: RunConfig,
    out: Path | str,
    dicom: Path | str | None = None,
    labels: Labels | None = None,
    cache_dir: Path | str | None = None,
    takes_cache_size: bool = False,
    workers: int = 0,
    progress: Progress | None = None,
    tell: Tell | None = None,
    any_body_part: bool = False,
    any_image_type: bool = False,
    max_rejects: float = MAX_REJECTS,
) -> Preparation:
    """Index and plan a training; nothing is written but a refused folder's rejects.csv.

    Args:
        config: of the training.
        out: the new run folder.
        dicom: a folder of DICOM files; None requires an existing cache.
        labels: a label file, or what is in it; required with `dicom`; by default the cache's.
        cache_dir: the cache, used when it exists; None is `cache_beside(out)`.
        takes_cache_size: use the size of an existing cache instead of the config's.
        workers: processes that read headers; 0 reads them in this one.
        progress: called as progress(step, done, total).
        tell: called with lines about the index and the labels.
        any_body_part, any_image_type: as for `index_folder`.
        max_rejects: the largest share of refused files; see `require_few_rejects`.

    Raises:
        UsageError: `out` exists, a path does not, the cache is smaller than the input, or Keras'
            global settings would make the training another one.
        StaleError: the cache is incomplete, or was made from other files than those in `dicom`.
        DataError: as `prepare_index` and `plan_of`.
    """
    config.require_no_own_augment()
    out = require_absent_or_rejects(out)
    cache_dir = cache_beside(out) if cache_dir is None else Path(cache_dir)
    tables: SeriesIndex | CTCache
    if dicom is not None and labels is None:
        raise UsageError("--labels is missing.", "Training needs --labels stage_2_train.csv.")
    index = cache = None
    if dicom is not None:
        with rejects_kept(out):
            index = prepare_index(
                dicom,
                labels,
                # Of a cache, the split takes the first series; it holds them all.
                None if cache_dir.exists() else config.data.limit_series,
                workers,
                progress=progress,
                tell=tell,
                any_body_part=any_body_part,
                any_image_type=any_image_type,
                max_rejects=max_rejects,
            )
    if cache_dir.exists():
        cache = open_cache(cache_dir, labels)
        if index is not None:
            cache.require(index=index.usable(), workers=workers, progress=progress)
        if takes_cache_size:
            data = dataclasses.replace(config.data, size=cache.size)
            config = dataclasses.replace(config, data=data)
        tables = cache
    elif index is not None:
        tables = index.usable()
    else:
        raise UsageError(f"the cache {cache_dir} does not exist.", "Add --dicom to build it.")
    recipe = Recipe.of(config, None if cache is None else cache.size, labels_in(tables))
    require_distributable(recipe, this_rank())
    require_trainable_settings()  # before a cache is built; imports Keras, so not before mistakes
    plan = plan_of(tables, recipe, cache)
    return Preparation(config, recipe, plan, out, cache_dir, cache, index, max_rejects)


def train_dicom(
    config: RunConfig,
    dicom: Path | str,
    labels: Labels,
    out: Path | str,
    cache_dir: Path | str | None = None,
    index_dir: Path | str | None = None,
    workers: int = 0,
    progress: Progress | None = None,
    tell: Tell | None = None,
    any_body_part: bool = False,
    any_image_type: bool = False,
    max_rejects: float = MAX_REJECTS,
) -> Path:
    """Run the whole workflow: from DICOM files and labels to index, cache and trained run.

    Args:
        config: of the training; its size is also that of a new cache.
        dicom: a folder of DICOM files.
        labels: RSNA's csv.
        out: the new run folder.
        cache_dir: the cache, used when it exists; None is `cache_beside(out)`.
        index_dir: a new folder that also receives the index; None keeps none.
        workers: processes that read and cache; 0 works in this one.
        progress: called as progress(step, done, total).
        tell: called with single lines of text.
        any_body_part, any_image_type: as for `index_folder`.
        max_rejects: the largest share of refused files; see `require_few_rejects`.

    Returns:
        The run folder.

    Raises:
        UsageError, StaleError, DataError: as `prepare_training`.
        DivergedError: as `train`.
    """
    preparation = prepare_training(
        config,
        out,
        dicom,
        labels,
        cache_dir,
        workers=workers,
        progress=progress,
        tell=tell,
        any_body_part=any_body_part,
        any_image_type=any_image_type,
        max_rejects=max_rejects,
    )
    if tell is not None:
        for line in plan_lines(preparation.plan, preparation.recipe):
            tell(line)
        if preparation.plan.warning:
            tell(f"Warning: {preparation.plan.warning}")
    return preparation.train(index_dir, workers, progress, tell)


def cache_beside(out: Path | str) -> Path:
    """Return the default path of a run's cache.

    >>> cache_beside("/data/run1").name
    'run1-cache'
    """
    # Next to the run, not in it: the next run on the same data can reuse it.
    path = Path(out).absolute()
    return path.with_name(f"{path.name}-cache")
