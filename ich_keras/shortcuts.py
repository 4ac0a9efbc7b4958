"""One call each for what the commands do: `ich_keras.train`, `split`, `audit`, `presets`, ..."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ich_keras.config import RunConfig
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.leakage import audit_data
from ich_keras.data.split import find_split
from ich_keras.data.split_record import Split
from ich_keras.errors import UsageError
from ich_keras.models.presets import PRESETS, Preset, require_preset
from ich_keras.progress import Progress, Tell
from ich_keras.submission_file import write_submission

if TYPE_CHECKING:
    import pandas as pd


def train(
    cache: CTCache | Path | str,
    out: Path | str,
    config: RunConfig | None = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
    augment: Any = None,
    callbacks: Any = None,
    **settings: Any,
) -> Path:
    """Train a classifier on a cache, keep the best weights, and evaluate them.

        ich_keras.train("CACHE", "RUN", preset="resnet18_2d", epochs=8, learning_rate=1e-4)

    Args:
        cache: with labels; a path is opened.
        out: a new run folder.
        config: settings to begin with; None takes the defaults, and the size of the cache.
        progress, tell, augment, callbacks: as for `ich_keras.training.train`.
        settings: any fields of `RunConfig`, `DataConfig` and `FitConfig`, by name.

    Returns:
        The run folder; `RunFolder` lists its files.

    Raises:
        UsageError: a setting is unknown (the hint names the nearest) or cannot be; and as
            `ich_keras.training.train`, which also says what else is raised.
    """
    from ich_keras import training

    if isinstance(cache, RunConfig):  # (config, cache, out), the order of `training.train`
        if not isinstance(config, str | Path):
            raise UsageError(
                "train was given a configuration first, but no run folder as its third argument.",
                "Call ich_keras.train(CACHE, OUT, config=CONFIG).",
            )
        cache, out, config = out, config, cache
    chosen = (config or RunConfig()).with_settings(settings)
    opened = _opened(cache)
    if config is None and "size" not in settings:
        chosen = replace(chosen, data=replace(chosen.data, size=opened.size))
    return training.train(chosen, opened, out, progress, tell, augment, callbacks)


def split(cache: CTCache | Path | str, name: Path | str = "patient", seed: int = 0) -> Split:
    """Return who trains, who chooses and who is tested, as a training would.

    Args:
        cache: with labels; a path is opened.
        name: "patient", "none", "thesis-slices", "thesis-series", or a file.
        seed: of the draw.

    Returns:
        The split; `split.indices(cache.slices, "train", cache.labels)` gives the rows of a part.

    Raises:
        UsageError: the split is unknown.
        DataError: no labels, missing PatientID, or too few patients.
    """
    opened = _opened(cache)
    return find_split(name, opened.slices, seed, opened.labels)


def audit(
    cache: CTCache | Path | str,
    split: Split | Path | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Look for faults of the labels, equal pixels, and leakage between the parts of a split.

    Args:
        cache: a path is opened.
        split: by name, from a file, or as `ich_keras.split` returned it; None looks at none.
        seed: of the draw.
        progress: called as progress(step, done, total).

    Returns:
        What `ich audit --out` writes: "labels", "equal_pixels" and, with a split, "split" and
        "leaks" (one line each; empty when nothing leaks).

    Raises:
        UsageError, DataError: as `split`.
    """
    opened = _opened(cache)
    if split is None or isinstance(split, Split):
        return audit_data(opened, split, progress)
    chosen = find_split(split, opened.slices, seed, opened.labels)
    return audit_data(opened, chosen, progress)


def presets(*names: str) -> dict[str, Preset]:
    """Return the networks by name: their specification, and what they are.

    Args:
        names: only these; without any, all.

    Raises:
        UsageError: an unknown name.

    >>> presets("resnet18_2d")["resnet18_2d"].spec.depth
    18
    """
    for name in names:
        require_preset(name)
    return {name: PRESETS[name] for name in names or PRESETS}


def submission(
    predictions: "pd.DataFrame | Path | str",
    out: Path | str,
    tell: Tell | None = None,
) -> Path:
    """Write slice predictions in the format of RSNA's competition; see `write_submission`."""
    return write_submission(predictions, out, tell)


def _opened(cache: CTCache | Path | str) -> CTCache:
    if isinstance(cache, str | Path):
        return CTCache.open(cache)
    return cache
