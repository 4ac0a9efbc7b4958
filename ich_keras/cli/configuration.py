"""The configuration of a training, from a file and from options."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ich_keras.errors import StaleError, UsageError

if TYPE_CHECKING:
    from ich_keras.config import RunConfig

_OF_VIEW = (
    *("view", "slices", "edge", "long_series", "tilted", "duplicate", "reverse", "intensity"),
    *("drop_slices", "mixup", "cutmix", "skip_empty", "depth_mm"),
)


def run_config(config_file: Path | None, options: dict[str, Any]) -> tuple["RunConfig", str]:
    """Apply the given options to a config file, or to the defaults.

    Returns:
        (the configuration, which settings of the file gave way to their defaults).
    """
    from ich_keras.config import RunConfig
    from ich_keras.files import read_json

    content = {}
    if config_file is not None:
        try:
            content = read_json(config_file)
        except (StaleError, IsADirectoryError) as error:
            raise UsageError(f"--config {config_file}: {error}") from error
    content = RunConfig.from_dict(content).to_dict()
    reset = "" if config_file is None else _forget_other_view(content, options)
    for name, value in options.items():
        if value is None:
            continue
        place = next(part for part in (content, content["data"], content["fit"]) if name in part)
        place[name] = value
    return RunConfig.from_dict(content), reset


def _forget_other_view(content: dict[str, Any], options: dict[str, Any]) -> str:
    """Where options lead to a different view than the file, restore that view's defaults.

    The file of a run names a view only where `--view` was given, so what counts is the view that
    each of the two means.

    Returns:
        The options whose values in the file are not used; "" when there are none.
    """
    from ich_keras.config import DataConfig, FitConfig
    from ich_keras.models.presets import PRESETS, view_kind

    in_file = content["data"]["view"]
    preset = content["preset"] if options["preset"] is None else options["preset"]
    if preset not in PRESETS:
        return ""  # refused below, by name
    is_volume = PRESETS[preset].spec.rank == 3
    fits = in_file is not None and is_volume == (in_file in ("slab", "series"))
    wanted = options["view"] or (in_file if fits else None)
    if view_kind(preset, wanted) == view_kind(content["preset"], in_file):
        return ""
    reset = {}
    for part, defaults, names in (
        (content["data"], DataConfig(), _OF_VIEW),
        (content["fit"], FitConfig(), ("batch_size", "accumulate")),
    ):
        for name in names:
            default = getattr(defaults, name)
            if part[name] != default and options.get(name) is None:
                reset[name] = part[name]
            part[name] = default
    return names_of(reset)


def names_of(options: dict[str, Any], but: tuple[str, ...] = ()) -> str:
    """Return the names of the options that were given, except those in `but`."""
    given = [name for name, value in options.items() if value is not None and name not in but]
    return ", ".join(f"--{name.replace('_', '-')}" for name in given)


def split_option(split: str | None, fold: str | None) -> str | None:
    """Return what --split and --fold ask for.

    Raises:
        UsageError: both are given, or the fold is not K/N.
    """
    if fold is None:
        return split
    if split is not None:
        raise UsageError("--fold and --split are both given.", "Leave one of them out.")
    one, slash, of = fold.partition("/")
    if not (slash and one.isdecimal() and of.isdecimal()):
        raise UsageError(f"--fold {fold} is not K/N.", "The first of five folds is 1/5.")
    return f"fold-{int(one)}/{int(of)}"
