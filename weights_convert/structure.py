"""Finding out which network tensors belong to, from their names and shapes."""

import re
from collections.abc import Mapping
from typing import TypedDict

from ich_keras.errors import DataError
from ich_keras.models.architectures import ARCHITECTURES
from ich_keras.models.presets import PRESETS
from ich_keras.models.spec import BOTTLENECK_EXPANSION, NUM_STAGES, ModelSpec

_STAGE = re.compile(r"layer(\d+)\.(\d+)\.")
_DENSE_STAGE = re.compile(r"features\.denseblock(\d+)\.denselayer(\d+)\.")
_DENSE_STEM = "features.conv0.weight"
_PART = re.compile(
    r"(conv1|bn1|stem|layer\d+|features\.(conv0|norm0|norm5|denseblock\d+|transition\d+))\."
)
_INCOMPLETE = "The checkpoint is incomplete: expected all weights of the network."
_NAMES = (
    "Expected torchvision's, timm's or MedicalNet's names (conv1, layer1, ...; of a DenseNet"
    " features.conv0, features.denseblock1, ...), whole, under one common prefix or key of any"
    " name."
)
_Shapes = Mapping[str, tuple[int, ...]]


class Structure(TypedDict):
    """A network's structure as its tensors show it, under the names of `ModelSpec`.

    Args:
        architecture: "resnet", "seresnext" or "densenet".
        naming: "image" or "video": whose tensor names these are.
        rank: 2 or 3 spatial axes.
        depth: 10, 18, 34, ...
        shortcut: "A" (zero padding) or "B" (convolution).
        channels: of the input.
        width: channels of the first stage.
        factorised: whether each 3D kernel is split into one within slices and one across them.
        stem_kernel: size of the first kernel, per axis.
        kernels: sizes of each stage's kernels, per axis.
        head: outputs of `fc`, of a DenseNet of `classifier`; None without a head.
    """

    architecture: str
    naming: str
    rank: int
    depth: int
    shortcut: str
    channels: int
    width: int
    factorised: bool
    stem_kernel: tuple[int, ...]
    kernels: tuple[tuple[int, ...], ...]
    head: int | None


def structure_of(shapes: _Shapes, place: str = "the checkpoint") -> Structure:
    """Read a network's structure from its tensors.

    Strides and dilations leave no trace in tensors. Weights can therefore fit a network that
    computes something else; only `parity` shows that.

    Args:
        shapes: torch's name -> torch's shape; may include a head and batch counters.
        place: the origin of the tensors, for the error.

    Returns:
        The fields of `Structure`.

    Raises:
        DataError: the tensors are not those of a known network.

    >>> shapes = {"conv1.weight": (64, 3, 7, 7), "fc.weight": (1000, 512)}
    >>> for stage in (1, 2, 3, 4):
    ...     for name in ("0.conv1", "0.conv2", "1.conv1", "1.conv2"):
    ...         shapes[f"layer{stage}.{name}.weight"] = (32 * 2**stage, 32 * 2**stage, 3, 3)
    >>> shapes["layer2.0.downsample.0.weight"] = (128, 64, 1, 1)
    >>> structure = structure_of(shapes)
    >>> structure["depth"], structure["rank"], structure["kernels"][0]
    (18, 2, (3, 3))
    >>> describe(structure)
    '2D ResNet-18, shortcut B, 3 input channels, width 64, image names, head of 1000'
    >>> fitting_presets(structure)
    ('resnet18_2d', 'resnet18_2d_stack')
    """
    if any(map(_DENSE_STAGE.match, shapes)):
        return _densenet_of(shapes, place)
    naming = "video" if "stem.0.weight" in shapes else "image"
    stem = "stem.0.weight" if naming == "video" else "conv1.weight"
    if stem not in shapes or len(shapes[stem]) not in (4, 5) or not any(map(_STAGE.match, shapes)):
        what = f"{stem} is absent or is not a kernel"
        if len(shapes.get(stem, ())) in (4, 5):
            what = "it has no layer1 to layer4"
        raise DataError(
            f"{place} holds no ResNet: {what}; its first tensors are"
            f" {', '.join(list(shapes)[:3]) or 'none'}.",
            _NAMES,
        )
    architecture = "seresnext" if any(".se.fc1." in name for name in shapes) else "resnet"
    is_bottleneck = any(".conv3." in name for name in shapes)
    depth = _depth(shapes, architecture, is_bottleneck, place)
    factorised = "layer1.0.conv1.0.0.weight" in shapes
    main = _main_kernels(shapes, naming, is_bottleneck, factorised)
    stem_kernel = shapes[stem][2:]
    if factorised:
        stem_kernel = (_shape_of(shapes, "stem.3.weight")[2], *stem_kernel[1:])
    expansion = BOTTLENECK_EXPANSION if is_bottleneck else 1
    return {
        "architecture": architecture,
        "naming": naming,
        "rank": len(shapes[stem]) - 2,
        "depth": depth,
        "shortcut": "B" if any(".downsample." in name for name in shapes) else "A",
        "channels": shapes[stem][1],
        "width": _last_channels(shapes, naming, is_bottleneck, factorised) // expansion,
        "factorised": factorised,
        "stem_kernel": tuple(stem_kernel),
        "kernels": main,
        "head": shapes["fc.weight"][0] if shapes.get("fc.weight") else None,
    }


def _densenet_of(shapes: _Shapes, place: str) -> Structure:
    """Read a DenseNet's structure; see `structure_of`."""
    stem = shapes.get(_DENSE_STEM, ())
    if len(stem) not in (4, 5):
        raise DataError(
            f"{place} holds no whole DenseNet: {_DENSE_STEM} is absent or is not a kernel.", _NAMES
        )
    return {
        "architecture": "densenet",
        "naming": "image",
        "rank": len(stem) - 2,
        "depth": _depth(shapes, "densenet", False, place),
        "shortcut": "B",
        "channels": stem[1],
        "width": stem[0],
        "factorised": False,
        "stem_kernel": tuple(stem[2:]),
        "kernels": tuple(
            tuple(_shape_of(shapes, f"features.denseblock{stage}.denselayer1.conv2.weight")[2:])
            for stage in range(1, NUM_STAGES + 1)
        ),
        "head": shapes["classifier.weight"][0] if shapes.get("classifier.weight") else None,
    }


def _depth(shapes: _Shapes, architecture: str, is_bottleneck: bool, place: str) -> int:
    """Return the depth of a network by its number of blocks.

    Raises:
        DataError: no depth has as many.
    """
    is_resnet, is_densenet = architecture == "resnet", architecture == "densenet"
    blocks = _blocks(shapes, _DENSE_STAGE if is_densenet else _STAGE)
    depths = ARCHITECTURES[architecture].blocks
    for depth, known in depths.items():
        if known == blocks and (not is_resnet or (depth >= 50) == is_bottleneck):
            return depth
    kind = "bottleneck " if is_bottleneck else "basic " if is_resnet else ""
    raise DataError(
        f"{place} has {blocks} {kind}{'layers' if is_densenet else 'blocks'} per stage; known"
        f" depths: {', '.join(f'{depth}: {known}' for depth, known in depths.items())}.",
        "The checkpoint is incomplete, or of a network that is not known here.",
    )


def is_part(name: str) -> bool:
    """Tell whether a tensor belongs to the backbone, by torch's name; a head does not.

    >>> is_part("layer1.0.conv1.weight"), is_part("fc.weight"), is_part("projector.0.weight")
    (True, False, False)
    """
    return _PART.match(name) is not None


def is_complete(shapes: _Shapes) -> bool:
    """Tell whether tensors are those of a known network; see `structure_of`."""
    try:
        structure_of(shapes)
    except DataError:
        return False
    return True


def _shape_of(shapes: _Shapes, name: str) -> tuple[int, ...]:
    """Return the shape of a kernel.

    Raises:
        DataError: it is absent, or not a kernel.
    """
    if len(shapes.get(name, ())) not in (4, 5):
        state = "is not a kernel" if name in shapes else "is absent"
        raise DataError(f"the tensor {name} {state}.", _INCOMPLETE)
    return shapes[name]


def _blocks(shapes: _Shapes, pattern: re.Pattern[str]) -> tuple[int, ...]:
    found = {match.groups() for match in map(pattern.match, shapes) if match}
    return tuple(
        len({block for stage, block in found if stage == str(number)})
        for number in range(1, NUM_STAGES + 1)
    )


def _convolution(shapes: _Shapes, stem: str, naming: str, factorised: bool) -> tuple[int, ...]:
    name = f"{stem}.0.0.weight" if factorised else f"{stem}.{'0.' * (naming == 'video')}weight"
    shape = _shape_of(shapes, name)[2:]
    if factorised:
        shape = (_shape_of(shapes, f"{stem}.0.3.weight")[2], *shape[1:])
    return tuple(shape)


def _main_kernels(
    shapes: _Shapes, naming: str, is_bottleneck: bool, factorised: bool
) -> tuple[tuple[int, ...], ...]:
    position = "conv2" if is_bottleneck else "conv1"
    return tuple(
        _convolution(shapes, f"layer{stage}.0.{position}", naming, factorised)
        for stage in range(1, NUM_STAGES + 1)
    )


def _last_channels(shapes: _Shapes, naming: str, is_bottleneck: bool, factorised: bool) -> int:
    last = f"layer1.0.conv{3 if is_bottleneck else 2}"
    if factorised and not is_bottleneck:
        return _shape_of(shapes, f"{last}.0.3.weight")[0]
    return _shape_of(shapes, f"{last}.{'0.' * (naming == 'video')}weight")[0]


def describe(structure: Structure) -> str:
    """Return a structure in one line."""
    head = f", head of {structure['head']}" if structure["head"] else ", no head"
    title = ARCHITECTURES[structure["architecture"]].title
    has_shortcut = structure["architecture"] != "densenet"
    shortcut = f", shortcut {structure['shortcut']}" if has_shortcut else ""
    kernels = "" if len(set(structure["kernels"])) == 1 else ", mixed kernels"
    return (
        f"{structure['rank']}D {title}-{structure['depth']}{shortcut},"
        f" {structure['channels']} input channel{'s' if structure['channels'] > 1 else ''},"
        f" width {structure['width']}, {structure['naming']} names"
        f"{', factorised kernels' if structure['factorised'] else ''}{kernels}{head}"
    )


def _differing(structure: Structure, spec: ModelSpec) -> dict[str, tuple[object, object]]:
    """Return the fields that differ: name -> (value in the structure, value in the network)."""
    expected = {
        "stem_kernel": spec.per_axis(spec.stem_kernel),
        "kernels": tuple(spec.per_axis(kernel) for kernel in spec.kernels),
        **{n: getattr(spec, n) for n in ("naming", "rank", "depth", "shortcut", "channels")},
        "width": spec.width,
        "factorised": spec.factorised,
        "architecture": spec.architecture,
    }
    there: Mapping[str, object] = structure
    return {n: (there[n], v) for n, v in expected.items() if there[n] != v}


def fitting_presets(structure: Structure) -> tuple[str, ...]:
    """Return the presets whose tensors have this structure, whatever their input channels."""
    return tuple(
        name
        for name, chosen in PRESETS.items()
        if not set(_differing(structure, chosen.spec)) - {"channels"}
    )


def require_structure(structure: Structure, spec: ModelSpec, place: str, wanted: str) -> None:
    """Refuse tensors that belong to another network.

    Args:
        structure: from `structure_of`.
        spec: the expected network.
        place: the checkpoint, for the error.
        wanted: the name of the expected source or preset, for the error.

    Raises:
        DataError: the networks differ; the message names both.
    """
    differing = _differing(structure, spec)
    if differing:
        said = "; ".join(f"{n} {there}, expected {here}" for n, (there, here) in differing.items())
        raise DataError(
            f"{place} holds a {describe(structure)}; {wanted} is another network: {said}.",
            "Give the source or preset that the file belongs to;"
            f" `weights-convert inspect --checkpoint {place}` shows which presets fit.",
        )
