"""Weights for another network of the same tensors: other strides, dilations and pooling.

Strides and dilations leave no trace in tensors. Weights that were moved this way load without a
word and compute something else. It is therefore done on request only, and the file says so.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ich_keras import __version__
from ich_keras.errors import DataError, UsageError
from ich_keras.models.presets import preset
from ich_keras.models.spec import WITHOUT_WEIGHTS, ModelSpec
from ich_keras.models.weights import save_weights
from ich_keras.models.weights_file import SUFFIX, WeightsFile, read_weights
from ich_keras.models.weights_lookup import changed_file
from weights_convert.conversion import Conversion, checked
from weights_convert.reshaping import require_out
from weights_convert.state import outputs_of, spec_of_file, state_of_file

RESTRIDED_FROM = "restrided_from"  # entry of the record: the network the tensors were made for
# They follow the file: no preset asks for them, and other commands change them.
_OF_THE_FILE = ("channels", "width", "norm")
_WAYS_OUT = {
    "rank": "`weights-convert inflate` makes 3D weights from 2D ones, `collapse` 2D from 3D.",
    "depth": "Take the preset of the file's depth.",
    "shortcut": "Shortcut B has weights, A has none: MedicalNet's networks of depth 18 and 34 have"
    " A (resnet18_3d_thin, ...), all others B.",
    "naming": "Kinetics' networks (r3d_18_slab, r2plus1d_18_slab) and ResNets of images"
    " have other layers: take a preset of the file's kind.",
    "factorised": "R(2+1)D splits its kernels: r2plus1d_18 goes with r2plus1d_18_slab alone.",
    "stem_kernel": "Take a preset whose first kernel is as large.",
    "kernels": "Take a preset whose stages have kernels as large: r3d_18 and mc3_18 differ.",
    "max pooling": "Take a preset of the file's kind.",
}

# A kernel, stride or dilation, and one for each stage, as people give them.
Value = int | tuple[int, ...] | list[int]
Stages = tuple[Value, ...] | list[Value]


def restride(
    weights: Path | str,
    preset_name: str | None = None,
    out: Path | str | None = None,
    *,
    strides: Stages | None = None,
    dilations: Stages | None = None,
    stem_stride: Value | None = None,
    pool_stride: Value | None = None,
) -> Conversion:
    """Give the tensors of a file to a network with other strides, dilations or pooling.

    Not a number of the weights changes; what the network computes from them does. The new network
    is compared with one in plain torch of the same strides and dilations before anything is
    written. Input channels, width and head are those of the file.

    Args:
        weights: a `.weights.h5` file that records its network.
        preset_name: the network to go to, such as "resnet18_3d_thin". None: only what is given
            below changes.
        out: the `.weights.h5` file to write. None: `changed_file`, beside the file; needs a
            preset.
        strides: of each of the four stages: one number, or one per axis (slices, rows, columns).
        dilations: of each stage, in the same way.
        stem_stride: of the first convolution: one number, or one per axis.
        pool_stride: of the max pooling.

    Returns:
        The file, its parity with plain torch, and its record. The record's `changes` name every
        stride and dilation before and after; `restrided_from` is the network that the tensors were
        made for.

    Raises:
        UsageError: neither a preset nor a setting, or both; a setting that no network can have;
            the file has these strides and dilations already; `out` exists.
        DataError: the file is damaged, or the tensors do not fit.
    """
    given = {
        "strides": strides,
        "dilations": dilations,
        "stem_stride": stem_stride,
        "pool_stride": pool_stride,
    }
    settings = {n: _settled(n, value) for n, value in given.items() if value is not None}
    for name in set(settings) & {"strides", "dilations"}:
        if isinstance(settings[name], int):
            raise UsageError(f"{name}: {settings[name]}; expected one entry for each stage.")
    if (preset_name is None) != bool(settings):
        raise UsageError(
            f"{'both' if settings else 'neither'} a preset {'and' if settings else 'nor'} strides"
            " or dilations; expected one of them.",
            "Give --to PRESET, or some of --strides, --dilations, --stem-stride, --pool-stride.",
        )
    path = Path(weights)
    if out is None and preset_name is None:
        raise UsageError("out is missing.", f"Give --out FILE{SUFFIX}.")
    target_preset = None if preset_name is None else preset(preset_name)
    if out is None and preset_name is not None:
        out = changed_file(path, preset_name)
    out = require_out(str(out))
    file = read_weights(path)
    spec = spec_of_file(file)
    if target_preset is not None:
        _require_same_tensors(file, spec, target_preset, str(preset_name))
        settings = {name: getattr(target_preset, name) for name in WITHOUT_WEIGHTS}
    target = _target(file, spec, settings)
    changes = [f"restrided {change}" for change in changes_between(spec, target)]
    if not changes:
        raise UsageError(
            f"{file.path} has these strides and dilations already: nothing to change.",
            "Use the file as it is.",
        )
    first = _first_network(file, spec)
    model, parity = checked(target, state_of_file(file), str(file.path), outputs_of(file), 1)
    record = {
        **file.record,
        "network": target.to_dict(),
        "written_by": f"ich_keras {__version__}",
        "parity": parity.to_dict(),
        "changes": [*file.record.get("changes", []), *changes],
        RESTRIDED_FROM: first.to_dict(),
    }
    record.pop("preset", None)
    if preset_name is not None:
        record["preset"] = preset_name
    if not first.differences(target):
        del record[RESTRIDED_FROM]  # there and back again
    save_weights(model, out, record)
    return Conversion(out, parity, record, ())


def changes_between(before: ModelSpec, after: ModelSpec) -> list[str]:
    """Name the strides, dilations and pooling that differ between two networks of equal tensors.

    >>> slab = preset("r3d_18_slab")
    >>> changes_between(slab, replace(slab, stem_stride=2, strides=(1, 2, (1, 2, 2), (1, 2, 2))))
    ['stem stride 1x2x2 -> 2x2x2', 'layer2 stride 1x2x2 -> 2x2x2']
    """
    differences = before.differences(after)
    said = []
    for name, words in (
        ("stem_stride", "stem stride"),
        ("pool_kernel", "pooling kernel"),
        ("pool_stride", "pooling stride"),
    ):
        if name in differences:
            there, here = differences[name]
            said.append(f"{words} {_shown(there)} -> {_shown(here)}")
    for name, word in (("strides", "stride"), ("dilations", "dilation")):
        for number, pair in enumerate(zip(*differences.get(name, ((), ())), strict=True), 1):
            if pair[0] != pair[1]:
                said.append(f"layer{number} {word} {_shown(pair[0])} -> {_shown(pair[1])}")
    return said


def _shown(value: tuple[int, ...]) -> str:
    return "x".join(map(str, value))


def _settled(name: str, value: Any) -> Any:
    """Return a setting with tuples for lists, as `ModelSpec` takes it.

    Raises:
        UsageError: neither a whole number nor some of them.
    """
    if isinstance(value, (list, tuple)):
        return tuple(_settled(name, entry) for entry in value)
    if type(value) is not int:
        raise UsageError(f"{name}: {value!r}; expected a whole number, or one per axis.")
    return value


def _require_same_tensors(
    file: WeightsFile, spec: ModelSpec, target: ModelSpec, preset_name: str
) -> None:
    differing: dict[str, tuple[Any, Any]] = {
        name: pair
        for name, pair in spec.differences(target).items()
        if name not in (*WITHOUT_WEIGHTS, *_OF_THE_FILE)
    }
    there, here = (network.pool_kernel is not None for network in (spec, target))
    if there != here and "naming" not in differing:
        differing["max pooling"] = there, here
    if "rank" in differing:  # then everything else differs, too
        differing = {"rank": differing["rank"]}
    if not differing:
        return
    said = "; ".join(f"{n} {a} (file), {b} (preset)" for n, (a, b) in differing.items())
    raise DataError(
        f"{file.path} does not fit {preset_name}: {said}.",
        " ".join([*(_WAYS_OUT[name] for name in differing), "`ich presets` lists the presets."]),
    )


def _target(file: WeightsFile, spec: ModelSpec, settings: Mapping[str, Any]) -> ModelSpec:
    """Return the network to go to.

    Raises:
        UsageError: no network can have these settings.
        DataError: the file has no weights for them.
    """
    # Those of a preset include its pooling kernel.
    is_bare = "pool_stride" in settings and "pool_kernel" not in settings
    if is_bare and spec.pool_kernel is None:
        raise UsageError(
            f"pool_stride {settings['pool_stride']}: the network of {file.path} has no max"
            " pooling.",
            "Leave --pool-stride out.",
        )
    try:
        target = replace(spec.with_any_size(), **settings)
    except UsageError as error:
        raise UsageError(f"{file.path}: {error.message}", error.hint) from error
    if _has_own_shortcut(spec) != _has_own_shortcut(target):
        raise DataError(
            f"{file.path} does not fit: with layer1 stride"
            f" {_shown(target.per_axis(target.strides[0]))} the first block"
            f" {'needs' if _has_own_shortcut(target) else 'has no'} weights of a shortcut"
            " (layer1.0.downsample), which the file"
            f" {'lacks' if _has_own_shortcut(target) else 'has'}.",
            f"Keep the stride of layer1: {_shown(spec.per_axis(spec.strides[0]))}.",
        )
    return target


def _has_own_shortcut(spec: ModelSpec) -> bool:
    """Whether the stride of the first stage is what gives it the weights of a shortcut."""
    is_strided = max(spec.per_axis(spec.strides[0])) > 1
    return spec.shortcut == "B" and not spec.is_bottleneck and is_strided


def _first_network(file: WeightsFile, spec: ModelSpec) -> ModelSpec:
    """Return the network that the tensors were made for, however often they were restrided.

    Raises:
        DataError: what the record says of it is no network.
    """
    if RESTRIDED_FROM not in file.record:
        return spec
    try:
        return ModelSpec.from_dict(file.record[RESTRIDED_FROM])
    except UsageError as error:
        raise DataError(
            f"{file.path}: {RESTRIDED_FROM} of its record is damaged: {error.message}",
            "Restride the original file again.",
        ) from error
