"""The presets: which network and which pretrained weights are meant by a name."""

import difflib
from dataclasses import dataclass, replace

from ich_keras.errors import UsageError
from ich_keras.models.spec import ModelSpec, PerAxis
from ich_keras.models.windows import LearnedWindows


@dataclass(frozen=True)
class Preset:
    """A network that has a name, and the pretrained weights that fit it.

    Args:
        spec: the network.
        title: what it is, in one line.
        sources: pretrained weights, by the names of `weights-convert list`; the first is the
            usual one.
        via: the `weights-convert` command that changes the weights to fit, on purpose ("" when
            they fit as they are): "inflate", "collapse" and "channels" change their shapes,
            "restride" lets another network compute with the same tensors. `channels` takes no
            preset, all others do.

    >>> PRESETS["resnet50_3d_medicalnet"].licence
    'MIT'
    """

    spec: ModelSpec
    title: str
    sources: tuple[str, ...] = ()
    via: str = ""

    @property
    def licence(self) -> str:
        """Licence of the weights; "" without any."""
        usual = self.sources[0] if self.sources else ""
        return next((text for begin, text in LICENCES.items() if usual.startswith(begin)), "")


# Licence of the weights, by how the names of sources begin.
LICENCES = {"torchvision_": "BSD-3-Clause", "medicalnet_": "MIT", "timm_": "Apache-2.0"}

SLICE_SHAPE = (256, 256, 3)  # three windows of one slice (thesis, its 2D network)
SERIES_SHAPE = (60, 256, 256, 1)  # a whole series, one channel (thesis, its 3D network)
STACK_SLICES = 3
STACK_SHAPE = (256, 256, 9)  # three windows of three neighbouring slices
SLAB_SHAPE = (5, 256, 256, 1)  # five neighbouring slices (thesis, its third network)
VIDEO_SHAPE = (60, 256, 256, 3)  # Kinetics' networks take three channels
VIDEO_SLAB_SHAPE = (*SLAB_SHAPE[:-1], VIDEO_SHAPE[-1])

_MEDICALNET_SHORTCUTS = {10: "B", 18: "A", 34: "A", 50: "B"}
# Tran et al., A Closer Look at Spatiotemporal Convolutions (2018), as in torchvision.
_VIDEO = ModelSpec(
    VIDEO_SHAPE,
    naming="video",
    stem_kernel=(3, 7, 7),
    stem_stride=(1, 2, 2),
    pool_kernel=None,
)
_MIXED = replace(
    _VIDEO,
    kernels=(3, (1, 3, 3), (1, 3, 3), (1, 3, 3)),
    strides=(1, (1, 2, 2), (1, 2, 2), (1, 2, 2)),
)


def _medicalnet(input_shape: tuple[int, ...], depth: int) -> ModelSpec:
    """Chen et al., Med3D (2019): output stride 8, the last two stages dilated, not strided."""
    return ModelSpec(
        input_shape,
        depth=depth,
        shortcut=_MEDICALNET_SHORTCUTS[depth],
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
    )


def _thin(depth: int, dilations: tuple[PerAxis, ...]) -> ModelSpec:
    """MedicalNet's network for slabs of five: the same tensors, depth stride 1 everywhere.

    MedicalNet halves the number of slices three times: five become three, two and one, so that
    its last two stages see a single slice and padding. Here five stay five. Rows and columns are
    strided and dilated as in the original (output stride 8, dilations 1, 1, 2, 4), and the
    kernels keep their depth (the stem 7, pooling and stages 3).

    Along the slices, the dilations 2 and 4 of the last two stages were made for a grid of many
    slices. Of the ten taps beside the middle one that a 3-tap kernel has on five slices, eight
    fall on slices with dilation 1, six with 2, and two with 4: there the first slice sees the
    fifth, and no other slice sees any. "thin" has depth dilation 1, so that every kernel compares
    neighbours; "thin_atrous" keeps the original dilations, so that strides alone differ.

    Either way a kernel meets slices at other distances than in its training. That is what
    `weights-convert restride` is asked for, and records.
    """
    return replace(
        _medicalnet(SLAB_SHAPE, depth),
        stem_stride=(1, 2, 2),
        pool_stride=(1, 2, 2),
        strides=(1, (1, 2, 2), 1, 1),
        dilations=dilations,
    )


def _slab(depth: int) -> ModelSpec:
    """Slices are never skipped: five of them stay five until the average at the end."""
    return ModelSpec(
        SLAB_SHAPE,
        depth=depth,
        stem_stride=(1, 2, 2),
        pool_kernel=(1, 3, 3),
        pool_stride=(1, 2, 2),
        strides=(1, (1, 2, 2), (1, 2, 2), (1, 2, 2)),
    )


def _video_slab(spec: ModelSpec) -> ModelSpec:
    """A network of Kinetics for five slices in three windows, which are never skipped.

    Its stem strides in the plane alone; here the later stages do, too. The dilations are 1.
    """
    return replace(spec, input_shape=VIDEO_SLAB_SHAPE, strides=(1, (1, 2, 2), (1, 2, 2), (1, 2, 2)))


def _depth_presets(depth: int) -> dict[str, Preset]:
    image = (f"torchvision_resnet{depth}",) if depth != 10 else ()
    medicalnet = (f"medicalnet_resnet{depth}_23datasets", f"medicalnet_resnet{depth}")
    return {
        f"resnet{depth}_2d": Preset(
            ModelSpec(SLICE_SHAPE, depth=depth), f"ResNet-{depth} on slices", image
        ),
        f"resnet{depth}_2d_stack": Preset(
            ModelSpec(STACK_SHAPE, depth=depth),
            f"ResNet-{depth} on stacks: neighbouring slices as channels",
            image,
            via=f"channels --channels {STACK_SHAPE[-1]}" if image else "",
        ),
        f"resnet{depth}_2d_medicalnet": Preset(
            _medicalnet((*SLICE_SHAPE[:2], 1), depth),
            f"MedicalNet's ResNet-{depth} collapsed to slices",
            medicalnet,
            via="collapse",
        ),
        f"resnet{depth}_3d_medicalnet": Preset(
            _medicalnet(SERIES_SHAPE, depth),
            f"MedicalNet's ResNet-{depth}: dilated, output stride 8",
            medicalnet,
        ),
        f"resnet{depth}_3d_thin": Preset(
            _thin(depth, (1, 1, (1, 2, 2), (1, 4, 4))),
            f"MedicalNet's ResNet-{depth} on slabs: depth stride and dilation 1",
            medicalnet,
            via="restride",
        ),
        f"resnet{depth}_3d_thin_atrous": Preset(
            _thin(depth, (1, 1, 2, 4)),
            f"MedicalNet's ResNet-{depth} on slabs: depth stride 1, its dilations",
            medicalnet,
            via="restride",
        ),
        f"resnet{depth}_3d": Preset(
            ModelSpec(SERIES_SHAPE, depth=depth),
            f"ResNet-{depth} on series: strided, no dilation",
            image,
            via="inflate" if image else "",
        ),
        f"resnet{depth}_3d_slab": Preset(
            _slab(depth),
            f"ResNet-{depth} on slabs: depth stride 1",
            image,
            via="inflate" if image else "",
        ),
    }


PRESETS: dict[str, Preset] = {
    **{name: made for depth in (10, 18, 34, 50) for name, made in _depth_presets(depth).items()},
    "densenet121_2d": Preset(
        ModelSpec(SLICE_SHAPE, depth=121, architecture="densenet"),
        "DenseNet-121 on slices",
        ("torchvision_densenet121",),
    ),
    "seresnext50_2d": Preset(
        ModelSpec(SLICE_SHAPE, depth=50, architecture="seresnext"),
        "SE-ResNeXt-50 (32x4d) on slices",
        ("timm_seresnext50_32x4d",),
    ),
    "r3d_18": Preset(_VIDEO, "R3D-18 of Kinetics: 3D kernels", ("torchvision_r3d_18",)),
    "mc3_18": Preset(
        _MIXED,
        "MC3-18 of Kinetics: 3D kernels in the first stage, 2D after",
        ("torchvision_mc3_18",),
    ),
    "r2plus1d_18": Preset(
        replace(_VIDEO, factorised=True),
        "R(2+1)D-18 of Kinetics: factorised kernels",
        ("torchvision_r2plus1d_18",),
    ),
    "r3d_18_slab": Preset(
        _video_slab(_VIDEO),
        "R3D-18 of Kinetics on slabs: depth stride 1",
        ("torchvision_r3d_18",),
        via="restride",
    ),
    # Its later kernels are as deep as one slice: it never had another depth stride than 1.
    "mc3_18_slab": Preset(
        _video_slab(_MIXED), "MC3-18 of Kinetics on slabs", ("torchvision_mc3_18",)
    ),
    "r2plus1d_18_slab": Preset(
        _video_slab(replace(_VIDEO, factorised=True)),
        "R(2+1)D-18 of Kinetics on slabs: depth stride 1",
        ("torchvision_r2plus1d_18",),
        via="restride",
    ),
}


def require_preset(name: str) -> None:
    """Refuse a name that belongs to no preset.

    Raises:
        UsageError: with the nearest name, or all of them.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=1, cutoff=0.8)
        hint = f"Did you mean {near[0]!r}?" if near else "`ich presets` lists them."
        raise UsageError(f"no preset is called {name!r}; known: {', '.join(PRESETS)}.", hint)


def preset(
    name: str,
    input_shape: tuple[int | None, ...] | None = None,
    norm: str = "batch",
    windows: str | None = None,
) -> ModelSpec:
    """Look up a preset by name.

    Args:
        name: a key of `PRESETS`.
        input_shape: replaces the preset's; it must have the same number of axes.
        norm: see `ModelSpec`.
        windows: "linear" or "sigmoid": the network begins with learnable windows, and takes HU in
            one channel, whatever channels the preset has.

    Raises:
        UsageError: unknown name, or an input with another number of axes.

    >>> preset("resnet18_3d_slab").input_shape
    (5, 256, 256, 1)
    >>> preset("resnet18_3d_slab", input_shape=(5, 128, 128, 1)).rank
    3
    """
    require_preset(name)
    spec = replace(PRESETS[name].spec, norm=norm)
    if input_shape is None and windows is None:
        return spec
    if input_shape is None:
        input_shape = (*spec.input_shape[:-1], 1)
    if not isinstance(input_shape, (tuple, list)):
        raise UsageError(f"input_shape {input_shape!r}; expected lengths like {spec.input_shape}.")
    if len(input_shape) != len(spec.input_shape):
        raise UsageError(
            f"preset {name} takes {len(spec.input_shape)} axes like {spec.input_shape};"
            f" received {tuple(input_shape)}."
        )
    learned = None if windows is None else LearnedWindows.of(windows)
    return replace(spec, input_shape=tuple(input_shape), windows=learned)


def view_kind(preset_name: str, view: str | None) -> str:
    """Return what a sample is: as configured, or what suits the preset.

    Args:
        preset_name: a key of `PRESETS`.
        view: "slice", "stack", "slab" or "series"; None suits the preset.

    >>> view_kind("resnet18_3d_slab", None), view_kind("resnet18_3d_slab", "series")
    ('slab', 'series')
    >>> view_kind("resnet18_2d_stack", None)
    'stack'
    """
    if view is not None:
        return view
    spec = PRESETS[preset_name].spec
    if spec.rank == 2:
        return "stack" if spec.channels == STACK_SHAPE[-1] else "slice"
    return "slab" if spec.input_shape[0] == SLAB_SHAPE[0] else "series"
