"""Where converted weights lie, and which file is meant by a name."""

import difflib
import os
from pathlib import Path

from ich_keras.errors import UsageError
from ich_keras.models.presets import PRESETS, require_preset
from ich_keras.models.weights_file import SUFFIX, require_weights_file
from ich_keras.paths import path_of

FOLDER_VARIABLE = "ICH_KERAS_WEIGHTS"
# What people call the sources of a preset -> how the names of those sources begin.
FAMILIES = {
    "imagenet": ("torchvision_resnet", "torchvision_densenet", "timm_"),
    "kinetics": ("torchvision_",),
    "medicalnet": ("medicalnet_",),
}


def weights_folder() -> Path:
    """Return where converted weights lie: $ICH_KERAS_WEIGHTS, or the user's cache folder."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return path_of(chosen, f"${FOLDER_VARIABLE}")
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "ich_keras" / "weights"


def converted_file(source: str) -> Path:
    """Return where the converted weights of a source lie; they need not exist."""
    return weights_folder() / f"{source}{SUFFIX}"


def changed_file(path: Path, preset_name: str) -> Path:
    """Return where a weights file lies once it was changed for a preset: beside it.

    It need not exist. For the file of a source it is where `find_weights` looks.

    Args:
        path: the unchanged file.
        preset_name: a key of `PRESETS`.

    >>> changed_file(Path("medicalnet_resnet18.weights.h5"), "resnet18_3d_thin").name
    'medicalnet_resnet18-resnet18_3d_thin.weights.h5'
    """
    return path.with_name(f"{path.name.removesuffix(SUFFIX)}-{preset_name}{SUFFIX}")


def source_of(name: str, preset_name: str) -> str:
    """Return the source that a family name means for a preset.

    Args:
        name: "imagenet", "kinetics" or "medicalnet"; any other name is a source already.
        preset_name: a key of `PRESETS`.

    Raises:
        UsageError: the preset has no weights of that family.

    >>> source_of("imagenet", "resnet18_2d")
    'torchvision_resnet18'
    """
    require_preset(preset_name)
    if name not in FAMILIES:
        return name
    fitting = [s for s in PRESETS[preset_name].sources if s.startswith(FAMILIES[name])]
    # "torchvision_" begins the image networks' names as well.
    if name == "kinetics":
        fitting = [s for s in fitting if not s.startswith(FAMILIES["imagenet"])]
    if not fitting:
        raise UsageError(
            f"there are no {name} weights for {preset_name};"
            f" known: {', '.join(PRESETS[preset_name].sources) or 'none'}."
        )
    # Of several releases the one that is there.
    return next((source for source in fitting if converted_file(source).is_file()), fitting[0])


def find_weights(name: str | Path, preset_name: str) -> Path:
    """Find a weights file by path, by source or by family.

    Args:
        name: a path ending in `.weights.h5`; or the name of a source once it was converted
            ("torchvision_resnet18"); or "imagenet", "kinetics", "medicalnet" for the source that
            belongs to the preset. Where a preset takes a source with a change, the file is the
            changed one (`changed_file`).
        preset_name: a key of `PRESETS`.

    Returns:
        The file, not opened yet.

    Raises:
        UsageError: no such file; the hint says what to run.
    """
    if str(name).endswith(SUFFIX) or os.sep in str(name):
        return require_weights_file(path_of(str(name), "weights"))
    _require_known_name(str(name))
    source, via = source_of(str(name), preset_name), ""
    if source in PRESETS[preset_name].sources:
        via = PRESETS[preset_name].via
    path = converted_file(source)
    if path.is_file() and not via:
        return path
    to_convert = (
        f"weights-convert convert --source {source} --checkpoint FILE.pth puts it there"
        " (`weights-convert list` says where the checkpoint comes from)"
    )
    if via and changed_file(path, preset_name).is_file():
        return changed_file(path, preset_name)
    if via == "restride":
        raise UsageError(
            f"{preset_name} takes {source} with its strides changed on purpose.",
            ("" if path.is_file() else f"{to_convert}, then ")
            + f"weights-convert restride --weights {path} --to {preset_name}, then the same again.",
        )
    if via:
        preset_given = "" if via.startswith("channels") else f" --preset {preset_name}"
        raise UsageError(
            f"{preset_name} takes {source} with its shape changed on purpose.",
            ("" if path.is_file() else f"{to_convert}, then ")
            + f"weights-convert {via} --weights {path}{preset_given} --out FILE{SUFFIX},"
            f" then --weights FILE{SUFFIX}.",
        )
    raise UsageError(
        f"weights {str(name)!r}: {path} does not exist.",
        f"{to_convert}; if you are online, `ich-train --download` does both.",
    )


def _require_known_name(name: str) -> None:
    known = {*FAMILIES, *(s for chosen in PRESETS.values() for s in chosen.sources)}
    if name in known or (name and converted_file(name).is_file()):
        return
    if (Path(name) / f"best{SUFFIX}").is_file() and name:
        hint = f"For the weights of that run give {Path(name) / f'best{SUFFIX}'}."
    else:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f"Did you mean {near[0]!r}?" if near else "`weights-convert list` lists the sources."
    raise UsageError(
        f"weights {name!r}; expected a file ending in {SUFFIX}, or the name of a source that was"
        " converted.",
        hint,
    )
