"""ModelSpec, and the presets: which network is meant by a name."""

from dataclasses import dataclass, replace

from ich_keras.errors import UsageError

# Blocks per stage (He et al., Deep Residual Learning, 2016, table 1; 10 as in MedicalNet).
STAGE_BLOCKS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
NUM_STAGES = 4

# A stride or dilation: one number for all axes, or one per axis (slices, rows, columns).
PerAxis = int | tuple[int, ...]


@dataclass(frozen=True)
class ModelSpec:
    """A ResNet, described.

    Args:
        input_shape: (rows, columns, channels) for 2D, (slices, rows, columns, channels) for 3D;
            the number of spatial axes follows from it. A length may be None (any).
        depth: a key of `STAGE_BLOCKS`; 50 and more use bottleneck blocks.
        shortcut: "B" is a strided 1x1 convolution with batch normalisation, "A" is subsampling
            with zero channels appended (He et al. 2016, section 3.3; MedicalNet 18 and 34).
        stem_stride: stride of the first convolution.
        strides: stride of each stage's first block.
        dilations: dilation of each stage's 3x3 convolutions.
        width: channels of the first stage; 64 in the paper, fewer in tests.
        dropout: rate before the head.
    """

    input_shape: tuple[int | None, ...]
    depth: int = 18
    shortcut: str = "B"
    stem_stride: PerAxis = 2
    strides: tuple[PerAxis, ...] = (1, 2, 2, 2)
    dilations: tuple[PerAxis, ...] = (1, 1, 1, 1)
    width: int = 64
    dropout: float = 0.5

    def __post_init__(self):
        if self.rank not in (2, 3):
            raise UsageError(
                f"input_shape {self.input_shape} has {len(self.input_shape)} axes; expected"
                " (rows, columns, channels) or (slices, rows, columns, channels)."
            )
        if self.channels is None or self.channels < 1:
            raise UsageError(
                f"input_shape {self.input_shape}: the last axis, the channels, must be known."
            )
        if self.depth not in STAGE_BLOCKS:
            raise UsageError(f"depth {self.depth}; expected one of {sorted(STAGE_BLOCKS)}.")
        if self.shortcut not in ("A", "B"):
            raise UsageError(f"shortcut {self.shortcut!r}; expected 'A' or 'B'.")
        for name in ("strides", "dilations"):
            if len(getattr(self, name)) != NUM_STAGES:
                raise UsageError(
                    f"{name} {getattr(self, name)}; expected one entry for each of the"
                    f" {NUM_STAGES} stages."
                )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout {self.dropout}; expected a rate of at least 0, below 1.")

    @property
    def rank(self) -> int:
        """Number of spatial axes: 2 or 3."""
        return len(self.input_shape) - 1

    @property
    def channels(self) -> int | None:
        """Length of the last axis of the input."""
        return self.input_shape[-1]

    @property
    def is_bottleneck(self) -> bool:
        """Whether the blocks are 1x1-3x3-1x1 with four times the channels."""
        return self.depth >= 50

    def per_axis(self, value: PerAxis) -> tuple[int, ...]:
        """Spell out a stride or dilation as one number per spatial axis."""
        if isinstance(value, int):
            return (value,) * self.rank
        if len(value) != self.rank:
            raise UsageError(f"{value} has {len(value)} axes; the network has {self.rank}.")
        return tuple(value)


PRESETS = {
    # The thesis's 2D network: torchvision's ResNet-18 on three windows of one slice.
    "resnet18_2d": ModelSpec(input_shape=(256, 256, 3)),
}


def preset(name: str, input_shape: tuple[int | None, ...] | None = None) -> ModelSpec:
    """Look a preset up by name.

    Args:
        name: a key of `PRESETS`.
        input_shape: replaces the preset's; it must have the same number of axes.

    Raises:
        UsageError: unknown name, or an input of another rank.
    """
    if name not in PRESETS:
        raise UsageError(f"no preset is called {name!r}; known: {', '.join(PRESETS)}.")
    spec = PRESETS[name]
    if input_shape is None:
        return spec
    if len(input_shape) != len(spec.input_shape):
        raise UsageError(
            f"preset {name} takes {len(spec.input_shape)} axes like {spec.input_shape};"
            f" received {tuple(input_shape)}."
        )
    return replace(spec, input_shape=tuple(input_shape))
