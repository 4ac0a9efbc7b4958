"""Explicit changes of shape of weights files: input channels, 2D -> 3D, 3D -> 2D."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ich_keras.errors import DataError, UsageError
from ich_keras.files import require_absent
from ich_keras.models.presets import preset
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights import listed, save_weights
from ich_keras.models.weights_file import SUFFIX, read_weights
from weights_convert.shapes import to_2d, to_3d, with_channels
from weights_convert.state import (
    build,
    load_state,
    outputs_of,
    shapes_by_name,
    spec_of_file,
    state_of_file,
)

if TYPE_CHECKING:
    import keras

# Torch's name -> array, and torch's name -> shape.
_State = Mapping[str, np.ndarray]
_Shapes = Mapping[str, tuple[int, ...]]
_CHOOSE_ALIKE = (
    "Choose a preset with the depth, shortcut and kind of network of the file; `ich presets` lists"
    " them."
)
_SAME_IN_2D_AND_3D = ("architecture", "depth", "shortcut", "naming", "factorised")


def require_out(out: Path | str) -> Path:
    """Return the path if a weights file can be written there.

    Raises:
        UsageError: the suffix is not `.weights.h5`, or the file exists.
    """
    if not str(out).endswith(SUFFIX):
        raise UsageError(f"out {str(out)!r}; expected a file name ending in {SUFFIX}.")
    return require_absent(out)


def rechannelled(
    state: _State, spec: ModelSpec, record: dict[str, Any], channels: int, outputs: int | None
) -> tuple["keras.Model", dict[str, Any]]:
    """Return the model and record of the same network with another number of input channels."""
    state = with_channels(state, channels)
    changed = replace(spec.with_any_size(), input_shape=(*(None,) * spec.rank, channels))
    model = build(changed, outputs)
    load_state(model, state)
    change = f"input channels {spec.channels} -> {channels}"
    return model, {
        **record,
        "network": changed.to_dict(),
        "changes": [*record.get("changes", []), change],
    }


def change_channels(weights: Path | str, out: Path | str, channels: int) -> Path:
    """Change the input channels of converted or trained weights; see `shapes.with_channels`.

    Args:
        weights: a `.weights.h5` file that records its network.
        out: the `.weights.h5` file to write.
        channels: new number of input channels.

    Returns:
        The path `out`.
    """
    out = require_out(out)
    file = read_weights(weights)
    spec, state = spec_of_file(file), state_of_file(file)
    model, record = rechannelled(state, spec, file.record, channels, outputs_of(file))
    save_weights(model, out, record)
    return out


def _reshape(
    weights: Path | str,
    preset_name: str,
    out: Path | str,
    rank: int,
    channels: int | None,
    change: str,
    reshape: Callable[[_State, _Shapes], dict[str, np.ndarray]],
) -> Path:
    """Read weights, change their kernels and write them for a preset of another rank."""
    out = require_out(out)
    file = read_weights(weights)
    spec, state = spec_of_file(file), state_of_file(file)
    target = preset(preset_name).with_any_size()
    if spec.rank == rank or target.rank != rank:
        raise UsageError(
            f"{file.path} is {spec.rank}D and {preset_name} is {target.rank}D;"
            f" expected weights that are {5 - rank}D and a preset that is {rank}D.",
            "`weights-convert inflate` makes 3D weights from 2D ones, `collapse` 2D from 3D;"
            " `ich presets` lists the presets.",
        )
    target = replace(target, input_shape=(*(None,) * rank, spec.channels), width=spec.width)
    other = {n: p for n, p in spec.differences(target).items() if n in _SAME_IN_2D_AND_3D}
    if other:
        said = "; ".join(
            f"{n} {there} (file), {here} (preset)" for n, (there, here) in other.items()
        )
        raise DataError(
            f"{file.path} does not fit {preset_name}: {said}.",
            _CHOOSE_ALIKE,
        )
    outputs = outputs_of(file)
    model = build(target, outputs)
    wanted = shapes_by_name(model)
    absent = [name for name in wanted if name not in state]
    if absent or len(wanted) != len(state):
        surplus = [name for name in state if name not in wanted]
        raise DataError(
            f"{file.path} does not fit {preset_name}: missing {listed(absent)};"
            f" surplus {listed(surplus)}.",
            _CHOOSE_ALIKE,
        )
    state = reshape(state, wanted)
    record = {
        **file.record,
        "preset": preset_name,
        "network": target.to_dict(),
        "changes": [*file.record.get("changes", []), change],
    }
    if channels is not None and channels != spec.channels:
        model, record = rechannelled(state, target, record, channels, outputs)
    else:
        load_state(model, state, str(file.path))
    save_weights(model, out, record)
    return out


def inflate(
    weights: Path | str,
    preset_name: str,
    out: Path | str,
    method: str = "mean",
    channels: int | None = None,
) -> Path:
    """Make 3D weights from 2D ones; see `shapes.to_3d`.

    Args:
        weights: a `.weights.h5` file of a 2D network.
        preset_name: a 3D network of the same depth and shortcut, such as "resnet18_3d".
        out: the `.weights.h5` file to write.
        method: "mean" or "centre".
        channels: also change the number of input channels; None keeps it.

    Raises:
        UsageError: unknown names, wrong ranks, or `out` exists.
        DataError: the weights do not fit.
    """

    def reshape(state: _State, wanted: _Shapes) -> dict[str, np.ndarray]:
        depths = {name: shape[2] for name, shape in wanted.items() if len(shape) == 5}
        return to_3d(state, depths, method)

    return _reshape(weights, preset_name, out, 3, channels, f"inflated ({method})", reshape)


def collapse(
    weights: Path | str, preset_name: str, out: Path | str, channels: int | None = None
) -> Path:
    """Make 2D weights from 3D ones; see `shapes.to_2d`.

    Args:
        weights: a `.weights.h5` file of a 3D network.
        preset_name: a 2D network of the same depth and shortcut, such as
            "resnet18_2d_medicalnet".
        out: the `.weights.h5` file to write.
        channels: also change the number of input channels; None keeps it.

    Raises:
        UsageError: unknown names, wrong ranks, or `out` exists.
        DataError: the weights do not fit.
    """
    return _reshape(
        weights, preset_name, out, 2, channels, "collapsed over slices", lambda s, _: to_2d(s)
    )
