"""Which network a set of tensors belongs to: read from names and shapes, not from a file's name."""

import re
from collections.abc import Mapping

from ich_keras.errors import DataError
from ich_keras.models.presets import PRESETS
from ich_keras.models.spec import BOTTLENECK_EXPANSION, NUM_STAGES, STAGE_BLOCKS, ModelSpec

_STAGE = re.compile(r"layer(\d+)\.(\d+)\.")


def structure_of(shapes: Mapping[str, tuple[int, ...]], place: str = "the checkpoint") -> dict:
    """Read a ResNet's structure from its tensors.

    Strides and dilations leave no trace in tensors and are not told: weights that load are not yet
    a network that agrees.

    Args:
        shapes: torch's name -> torch's shape; heads and counters may be among them.
        place: for the error.

    Returns:
        naming, rank, depth, shortcut, channels, width, factorised, stem_kernel, kernels, under the
        names of `ModelSpec`; and head: the outputs of `fc`, or None.

    Raises:
        DataError: the tensors are not those of a ResNet known here.
    """
    naming = "video" if "stem.0.weight" in shapes else "image"
    stem = "stem.0.weight" if naming == "video" else "conv1.weight"
    if stem not in shapes or len(shapes[stem]) not in (4, 5):
        raise DataError(
            f"{place} holds no ResNet: {stem} is absent or is no kernel;"
            f" its first tensors are {', '.join(list(shapes)[:3]) or 'none'}.",
            "Expected torchvision's or MedicalNet's names, with or without the prefix 'module.'.",
        )
    blocks = _blocks(shapes)
    is_bottleneck = any(".conv3." in name for name in shapes)
    depth = next(
        (d for d, b in STAGE_BLOCKS.items() if b == blocks and (d >= 50) == is_bottleneck), None
    )
    if depth is None:
        known = ", ".join(f"{d}: {b}" for d, b in STAGE_BLOCKS.items())
        kind = "bottleneck" if is_bottleneck else "basic"
        raise DataError(f"{place} has {blocks} {kind} blocks per stage; known depths: {known}.")
    factorised = "layer1.0.conv1.0.0.weight" in shapes
    main = _main_kernels(shapes, naming, is_bottleneck, factorised)
    stem_kernel = shapes[stem][2:]
    if factorised:
        stem_kernel = (shapes["stem.3.weight"][2], *stem_kernel[1:])
    expansion = BOTTLENECK_EXPANSION if is_bottleneck else 1
    return {
        "naming": naming,
        "rank": len(shapes[stem]) - 2,
        "depth": depth,
        "shortcut": "B" if any(".downsample." in name for name in shapes) else "A",
        "channels": shapes[stem][1],
        "width": _last_channels(shapes, naming, is_bottleneck, factorised) // expansion,
        "factorised": factorised,
        "stem_kernel": tuple(stem_kernel),
        "kernels": main,
        "head": shapes["fc.weight"][0] if "fc.weight" in shapes else None,
    }


def _blocks(shapes: Mapping) -> tuple[int, ...]:
    found = {match.groups() for match in map(_STAGE.match, shapes) if match}
    return tuple(
        len({block for stage, block in found if stage == str(number)})
        for number in range(1, NUM_STAGES + 1)
    )


def _convolution(shapes: Mapping, stem: str, naming: str, factorised: bool) -> tuple[int, ...]:
    name = f"{stem}.0.0.weight" if factorised else f"{stem}.{'0.' * (naming == 'video')}weight"
    if name not in shapes:
        raise DataError(f"the tensor {name} is absent.", "The checkpoint is not whole.")
    shape = shapes[name][2:]
    if factorised:
        temporal = f"{stem}.0.3.weight"
        if temporal not in shapes:
            raise DataError(f"the tensor {temporal} is absent.", "The checkpoint is not whole.")
        shape = (shapes[temporal][2], *shape[1:])
    return tuple(shape)


def _main_kernels(shapes, naming, is_bottleneck, factorised) -> tuple[tuple[int, ...], ...]:
    position = "conv2" if is_bottleneck else "conv1"
    return tuple(
        _convolution(shapes, f"layer{stage}.0.{position}", naming, factorised)
        for stage in range(1, NUM_STAGES + 1)
    )


def _last_channels(shapes, naming, is_bottleneck, factorised) -> int:
    last = f"layer1.0.conv{3 if is_bottleneck else 2}"
    if factorised and not is_bottleneck:
        return shapes[f"{last}.0.3.weight"][0]
    return shapes[f"{last}.{'0.' * (naming == 'video')}weight"][0]


def describe(structure: dict) -> str:
    """Return a structure in one line."""
    head = f", head of {structure['head']}" if structure["head"] else ", no head"
    kernels = "" if len(set(structure["kernels"])) == 1 else ", mixed kernels"
    return (
        f"{structure['rank']}D ResNet-{structure['depth']}, shortcut {structure['shortcut']},"
        f" {structure['channels']} input channel{'s' if structure['channels'] > 1 else ''},"
        f" width {structure['width']}, {structure['naming']} names"
        f"{', factorised kernels' if structure['factorised'] else ''}{kernels}{head}"
    )


def _differing(structure: dict, spec: ModelSpec) -> dict[str, tuple]:
    """Return what a network has otherwise than a structure: name -> (there, expected)."""
    expected = {
        "stem_kernel": spec.per_axis(spec.stem_kernel),
        "kernels": tuple(spec.per_axis(kernel) for kernel in spec.kernels),
        **{n: getattr(spec, n) for n in ("naming", "rank", "depth", "shortcut", "channels")},
        "width": spec.width,
        "factorised": spec.factorised,
    }
    return {n: (structure[n], v) for n, v in expected.items() if structure[n] != v}


def fitting_presets(structure: dict) -> tuple[str, ...]:
    """Return the presets whose tensors have this structure, whatever their input channels."""
    return tuple(
        name
        for name, chosen in PRESETS.items()
        if not set(_differing(structure, chosen.spec)) - {"channels"}
    )


def require_structure(structure: dict, spec: ModelSpec, place: str, wanted: str) -> None:
    """Refuse tensors of another network than the one asked for.

    Args:
        structure: from `structure_of`.
        spec: the network.
        place: the checkpoint, for the error.
        wanted: what was asked for, for the error.

    Raises:
        DataError: naming both.
    """
    differing = _differing(structure, spec)
    if differing:
        said = "; ".join(f"{n} {there}, expected {here}" for n, (there, here) in differing.items())
        raise DataError(
            f"{place} holds a {describe(structure)}; {wanted} is another network: {said}.",
            "Give the source or preset that the file belongs to.",
        )
