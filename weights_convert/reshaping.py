"""Changing the shape of weights files on purpose: input channels, 2D -> 3D, 3D -> 2D."""

from dataclasses import replace
from pathlib import Path

from ich_keras.errors import DataError, UsageError
from ich_keras.files import require_absent
from ich_keras.models.presets import preset
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights import HEAD, listed, save_weights
from ich_keras.models.weights_file import SUFFIX, read_weights
from weights_convert.shapes import to_2d, to_3d, with_channels
from weights_convert.state import build, load_state, shapes_by_name, spec_of_file, state_of_file

_SAME_IN_2D_AND_3D = ("depth", "shortcut", "naming", "factorised")


def require_out(out: Path | str) -> Path:
    """Return the path when a weights file can be written there.

    Raises:
        UsageError: another suffix, or something is there.
    """
    if not str(out).endswith(SUFFIX):
        raise UsageError(f"out {str(out)!r}; expected a file name ending in {SUFFIX}.")
    return require_absent(out)


def rechannelled(state, spec: ModelSpec, record: dict, channels: int, has_head: bool):
    """Return (model, record) with another number of input channels."""
    state = with_channels(state, channels)
    changed = replace(spec.with_any_size(), input_shape=(*(None,) * spec.rank, channels))
    model = build(changed, has_head)
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
        weights: a `.weights.h5` file that knows its network.
        out: a new one.
        channels: wanted.
    """
    out = require_out(out)
    file = read_weights(weights)
    spec, state = spec_of_file(file), state_of_file(file)
    model, record = rechannelled(state, spec, file.record, channels, HEAD in file.layers)
    save_weights(model, out, record)
    return out


def _reshape(weights, preset_name: str, out, rank: int, channels: int | None, change: str, reshape):
    """Read weights, change their kernels, write them for a preset of another rank."""
    out = require_out(out)
    file = read_weights(weights)
    spec, state = spec_of_file(file), state_of_file(file)
    target = preset(preset_name).with_any_size()
    if spec.rank == rank or target.rank != rank:
        raise UsageError(
            f"{file.path} is {spec.rank}D and {preset_name} is {target.rank}D;"
            f" expected weights that are {5 - rank}D and a preset that is {rank}D.",
        )
    target = replace(target, input_shape=(*(None,) * rank, spec.channels), width=spec.width)
    other = {n: p for n, p in spec.differences(target).items() if n in _SAME_IN_2D_AND_3D}
    if other:
        said = "; ".join(
            f"{n} {there} (file), {here} (preset)" for n, (there, here) in other.items()
        )
        raise DataError(
            f"{file.path} does not fit {preset_name}: {said}.",
            "Depth, shortcut and kind of network must be the same in 2D and 3D.",
        )
    has_head = HEAD in file.layers
    model = build(target, has_head)
    wanted = shapes_by_name(model)
    absent = [name for name in wanted if name not in state]
    if absent or len(wanted) != len(state):
        surplus = [name for name in state if name not in wanted]
        raise DataError(
            f"{file.path} does not fit {preset_name}: missing {listed(absent)};"
            f" surplus {listed(surplus)}.",
            "Depth, shortcut and kind of network must be the same in 2D and 3D.",
        )
    state = reshape(state, wanted)
    record = {
        **file.record,
        "preset": preset_name,
        "network": target.to_dict(),
        "changes": [*file.record.get("changes", []), change],
    }
    if channels is not None and channels != spec.channels:
        model, record = rechannelled(state, target, record, channels, has_head)
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
        preset_name: of a 3D network with the same depth and shortcut ("resnet18_3d").
        out: a new `.weights.h5` file.
        method: "mean" or "centre".
        channels: change the input channels as well; None keeps them.

    Raises:
        UsageError: unknown names, wrong ranks, or `out` exists.
        DataError: the weights do not fit.
    """

    def reshape(state, wanted):
        depths = {name: shape[2] for name, shape in wanted.items() if len(shape) == 5}
        return to_3d(state, depths, method)

    return _reshape(weights, preset_name, out, 3, channels, f"inflated ({method})", reshape)


def collapse(
    weights: Path | str, preset_name: str, out: Path | str, channels: int | None = None
) -> Path:
    """Make 2D weights from 3D ones; see `shapes.to_2d`.

    Args:
        weights: a `.weights.h5` file of a 3D network.
        preset_name: of a 2D network with the same depth and shortcut ("resnet18_2d_medicalnet").
        out: a new `.weights.h5` file.
        channels: change the input channels as well; None keeps them.

    Raises:
        UsageError: unknown names, wrong ranks, or `out` exists.
        DataError: the weights do not fit.
    """
    return _reshape(
        weights, preset_name, out, 2, channels, "collapsed over slices", lambda s, _: to_2d(s)
    )
