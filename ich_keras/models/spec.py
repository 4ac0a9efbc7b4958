"""ModelSpec: a network described by its numbers, and what is checked about them."""

import itertools
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, cast

from ich_keras.errors import UsageError
from ich_keras.models.architectures import ARCHITECTURES, TOPOLOGY, Architecture
from ich_keras.models.options import NORMS
from ich_keras.models.windows import LearnedWindows

NUM_STAGES = 4
BOTTLENECK_EXPANSION = 4
MAX_CHANNELS = 1024  # of an input; a typing error must not ask for terabytes
SHORTCUTS = ("A", "B")
NAMINGS = ("image", "video")
# Where the outputs of a backbone can be tapped, in the order of the computation.
FEATURES = ("stem", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")

# Settings that change what a network computes and leave no trace in its weights.
WITHOUT_WEIGHTS = ("stem_stride", "pool_kernel", "pool_stride", "strides", "dilations")

# A kernel, stride or dilation: one number for all axes, or one per axis (slices, rows, columns).
PerAxis = int | tuple[int, ...]


@dataclass(frozen=True)
class ModelSpec:
    """A network described by its numbers; what cannot be built is refused here.

    Args:
        input_shape: (rows, columns, channels) for 2D, (slices, rows, columns, channels) for 3D;
            the number of spatial axes follows from it. A length may be None (any).
        depth: one of the architecture's; a ResNet of 50 and more has bottleneck blocks.
        shortcut: "B" is a strided 1x1 convolution with batch normalisation, "A" is subsampling
            with zero channels appended (He et al. 2016, section 3.3; MedicalNet 18 and 34).
        detach_shortcut: let no gradient through shortcut A. MedicalNet's own code does so (it
            builds the shortcut from `out.data`); only to imitate its training.
        stem_kernel: of the first convolution.
        stem_stride: of the first convolution.
        pool_kernel: of the max pooling after it; None leaves the pooling out.
        pool_stride: of the max pooling.
        kernels: of each stage's 3x3 convolutions.
        strides: stride of each stage's first block.
        dilations: dilation of each stage's 3x3 convolutions.
        factorised: split each 3D kernel into one within slices and one across, with batch
            normalisation and ReLU between (Tran et al. 2018, R(2+1)D).
        naming: how torch names the layers: "image" (`layer1.0.conv1`, `layer1.0.bn1`;
            torchvision's image ResNets, MedicalNet) or "video" (`layer1.0.conv1.0`,
            `layer1.0.conv1.1`; torchvision's video ResNets).
        norm: "batch"; "frozen" keeps the statistics, scale and shift that were loaded, for
            batches of one volume; "group" normalises groups of channels in each sample, likewise
            independent of the batch, but fits no pretrained weights.
        width: channels of the first stage; 64 in the papers, fewer in tests. A DenseNet grows by
            half as many per layer (32), an SE-ResNeXt has half as many groups (32x4d).
        dropout: rate before the head.
        windows: the network begins with windows that are trained with it, and takes HU, in one
            channel: "linear", "sigmoid" or `LearnedWindows` of your own. None takes what was
            windowed before.
        architecture: a key of `ARCHITECTURES`. All but "resnet" are 2D and have one topology: what
            is said above about shortcuts, kernels, strides, pooling, dilations and names stays at
            its default.

    Raises:
        UsageError: a value out of range, or values that exclude each other.

    >>> spec = ModelSpec((96, 96, 3), depth=34)
    >>> spec.rank, spec.num_features
    (2, 512)
    >>> ModelSpec((96, 96, 3), depth=20)
    Traceback (most recent call last):
        ...
    ich_keras.errors.UsageError: depth 20; expected one of (10, 18, 34, 50, 101, 152).
    """

    input_shape: tuple[int | None, ...]
    depth: int = 18
    shortcut: str = "B"
    detach_shortcut: bool = False
    stem_kernel: PerAxis = 7
    stem_stride: PerAxis = 2
    pool_kernel: PerAxis | None = 3
    pool_stride: PerAxis = 2
    kernels: tuple[PerAxis, ...] = (3, 3, 3, 3)
    strides: tuple[PerAxis, ...] = (1, 2, 2, 2)
    dilations: tuple[PerAxis, ...] = (1, 1, 1, 1)
    factorised: bool = False
    naming: str = "image"
    norm: str = "batch"
    width: int = 64
    dropout: float = 0.5
    windows: LearnedWindows | None = None
    architecture: str = "resnet"

    def __post_init__(self) -> None:
        if self.windows is not None:
            object.__setattr__(self, "windows", LearnedWindows.of(self.windows))
        self._check_input()
        allowed: tuple[tuple[str, tuple[int | str, ...]], ...] = (
            ("architecture", tuple(ARCHITECTURES)),
            ("depth", tuple(self._known.blocks) if self.architecture in ARCHITECTURES else ()),
            ("shortcut", SHORTCUTS),
            ("naming", NAMINGS),
            ("norm", NORMS),
        )
        for name, known in allowed:
            value = getattr(self, name)
            if value not in known:
                shown = " or ".join(repr(k) for k in known) if len(known) < 4 else f"one of {known}"
                raise UsageError(f"{name} {value!r}; expected {shown}.")
        for name in ("kernels", "strides", "dilations"):
            if len(getattr(self, name)) != NUM_STAGES:
                raise UsageError(
                    f"{name} {getattr(self, name)}; expected one entry for each of the"
                    f" {NUM_STAGES} stages."
                )
            for value in getattr(self, name):
                self._check_per_axis(name, value)
        for name in ("stem_kernel", "stem_stride", "pool_kernel", "pool_stride"):
            if getattr(self, name) is not None:
                self._check_per_axis(name, getattr(self, name))
        if self.detach_shortcut and self.shortcut != "A":
            raise UsageError("detach_shortcut is about shortcut 'A'; this network has 'B'.")
        if self.factorised and self.rank != 3:
            raise UsageError("factorised kernels need slices: a 3D input.")
        if type(self.width) is not int or self.width < 1:
            raise UsageError(f"width {self.width}; expected a whole number of at least 1.")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout {self.dropout}; expected a rate of at least 0, below 1.")
        self._check_stages()
        if self._known.is_fixed:
            self._check_topology()
        self._check_slices()

    def _check_topology(self) -> None:
        """Refuse what the one topology of an architecture does not have."""
        title = self._known.title
        if self.rank != 2:
            raise UsageError(
                f"input_shape {self.input_shape}: {title} is 2D; expected (rows, columns,"
                " channels).",
                "For slabs and series take a preset with 3d in its name (`ich presets`).",
            )
        if self.width % 2:
            raise UsageError(f"width {self.width}: {title} halves it; expected an even number.")
        usual = {f.name: f.default for f in fields(self) if f.name in TOPOLOGY}
        for name, value in usual.items():
            if getattr(self, name) != value:
                raise UsageError(
                    f"{name} {getattr(self, name)!r}: {title} is built with {value!r} only."
                )
        for length in self.input_shape[:-1]:
            if length is not None and self._shortest(length) < 1:
                least = next(n for n in itertools.count(1) if self._shortest(n))
                raise UsageError(
                    f"input_shape {self.input_shape}: nothing is left of {length} pixels after"
                    f" {NUM_STAGES} stages; {title} takes at least {least}."
                )

    def _shortest(self, length: int) -> int:
        """Return what the last stage leaves of so many pixels."""
        for name, stride in self._strides():
            length = self._after(name, length, stride[0])
        return length

    def _check_input(self) -> None:
        if not isinstance(self.input_shape, tuple) or self.rank not in (2, 3):
            raise UsageError(
                f"input_shape {self.input_shape!r}; expected"
                " (rows, columns, channels) or (slices, rows, columns, channels)."
            )
        odd = [n for n in self.input_shape if n is not None and type(n) is not int]
        if odd:
            raise UsageError(f"input_shape {self.input_shape}; expected whole numbers or None.")
        if self.channels is None or not 1 <= self.channels <= MAX_CHANNELS:
            raise UsageError(
                f"input_shape {self.input_shape}: the last axis, the channels, must be known, from"
                f" 1 to {MAX_CHANNELS}."
            )
        if self.windows is not None and self.channels != 1:
            raise UsageError(
                f"input_shape {self.input_shape} with learnable windows, which make their"
                f" {self.stem_channels} channels of one: expected 1 as its last length.",
                "Leave the windows out, or give HU in one channel.",
            )
        if any(length is not None and length < 1 for length in self.input_shape):
            raise UsageError(f"input_shape {self.input_shape}; expected lengths of at least 1.")

    def _check_per_axis(self, name: str, value: PerAxis) -> None:
        numbers = self.per_axis(value)
        if min(numbers) < 1:
            raise UsageError(f"{name} {value}; expected at least 1.")
        if "kernel" in name and any(number % 2 == 0 for number in numbers):
            raise UsageError(f"{name} {value}; expected odd numbers, which pad both ends alike.")

    def _check_stages(self) -> None:
        """Refuse a convolution that strides and dilates, which Keras does not compute.

        The parts of a factorised one count by themselves: along the slices, and within them.
        """
        parts = [slice(0, 1), slice(1, None)] if self.factorised else [slice(None)]
        for number, pair in enumerate(zip(self.strides, self.dilations, strict=True), 1):
            stride, dilation = map(self.per_axis, pair)
            if any(max(stride[part]) > 1 and max(dilation[part]) > 1 for part in parts):
                raise UsageError(
                    f"stage {number} has stride {stride} and dilation {dilation}; expected one of"
                    " them to be 1 along every axis: Keras has no convolution that does both."
                )

    def _check_slices(self) -> None:
        """Refuse a stride along slices where one slice is left: the input is too thin for it.

        The last stage may stride over one slice: three stages have seen its neighbours by then.
        """
        if self.rank == 2 or self.input_shape[0] is None:
            return
        before: int = self.input_shape[0]
        seen = [str(before)]
        for name, stride in self._strides()[:-1]:
            if before == 1 and stride[0] > 1:
                raise UsageError(
                    f"{self.input_shape[0]} slice(s) are too few for this network: their number"
                    f" goes {' -> '.join(seen)}, and {name} still strides over slices; it takes at"
                    f" least {self._least_slices()}. Take more slices, a preset with depth stride"
                    " 1 (such as resnet18_3d_slab), or a 2D preset; in Python, with input_shape"
                    " (None, ...) the network runs all the same."
                )
            before = _strided(before, stride[0])
            seen.append(f"{before} ({name})")

    def _least_slices(self) -> int:
        """Return the least number of slices that `_check_slices` lets pass."""
        least = 1
        for _, stride in reversed(self._strides()[:-1]):
            # Two have to enter a stride over slices, however many leave it.
            least = max((least - 1) * stride[0] + 1, 2 if stride[0] > 1 else 1)
        return least

    def _strides(self) -> list[tuple[str, tuple[int, ...]]]:
        pool = [] if self.pool_kernel is None else [("maxpool", self.per_axis(self.pool_stride))]
        stages = [(f"layer{n}", self.per_axis(s)) for n, s in enumerate(self.strides, 1)]
        return [("stem", self.per_axis(self.stem_stride)), *pool, *stages]

    @property
    def rank(self) -> int:
        """Number of spatial axes: 2 or 3."""
        return len(self.input_shape) - 1

    @property
    def channels(self) -> int:
        """Length of the last axis of the input."""
        # `_check_input` refuses None.
        return cast(int, self.input_shape[-1])

    @property
    def stem_channels(self) -> int:
        """Channels that the first convolution sees: those of the input, or its windows."""
        return self.channels if self.windows is None else len(self.windows.start)

    @property
    def is_bottleneck(self) -> bool:
        """Whether the blocks are 1x1-3x3-1x1 with four times the channels."""
        return self.architecture == "seresnext" or (
            self.architecture == "resnet" and self.depth >= 50
        )

    @property
    def _known(self) -> Architecture:
        return ARCHITECTURES[self.architecture]

    @property
    def stage_blocks(self) -> tuple[int, ...]:
        """Blocks of each stage; of a DenseNet its dense layers."""
        return self._known.blocks[self.depth]

    @property
    def growth(self) -> int:
        """Channels that each layer of a DenseNet adds."""
        return self.width // 2

    @property
    def groups(self) -> int:
        """Groups of the 3x3 convolutions."""
        return self.width // 2 if self.architecture == "seresnext" else 1

    @property
    def num_features(self) -> int:
        """Length of the pooled feature vector."""
        if self.architecture == "densenet":
            features = self.width
            for stage, layers in enumerate(self.stage_blocks):
                # A transition leaves half of the channels.
                features = (features // 2 if stage else features) + layers * self.growth
            return features
        expansion = BOTTLENECK_EXPANSION if self.is_bottleneck else 1
        return self.width * 2 ** (NUM_STAGES - 1) * expansion

    def per_axis(self, value: PerAxis) -> tuple[int, ...]:
        """Spell out a kernel, stride or dilation as one number per spatial axis."""
        if isinstance(value, int):
            return (value,) * self.rank
        if len(value) != self.rank:
            raise UsageError(f"{value} has {len(value)} axes; the network has {self.rank}.")
        return tuple(value)

    def spatial_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Return the size after the stem, the pooling and each stage.

        Returns:
            Name -> (slices, rows, columns) or (rows, columns); None where the input's length is
            None.

        >>> ModelSpec((64, 64, 3)).spatial_shapes()["layer4"]
        (2, 2)
        """
        shape, shapes = self.input_shape[:-1], {}
        for name, stride in self._strides():
            shape = tuple(
                None if n is None else self._after(name, n, s)
                for n, s in zip(shape, stride, strict=True)
            )
            shapes[name] = shape
        return shapes

    def _after(self, name: str, length: int, stride: int) -> int:
        """Return how many positions a stage leaves of so many."""
        if self.architecture == "densenet" and name.startswith("layer"):
            return length // stride  # averages of two without padding: an odd one is left out
        return _strided(length, stride)

    def with_any_size(self) -> "ModelSpec":
        """Return the same network for inputs of any size, with the same rank and channels."""
        return replace(self, input_shape=(*(None for _ in range(self.rank)), self.channels))

    def differences(self, other: "ModelSpec") -> dict[str, tuple[Any, Any]]:
        """Compare two networks that are to share weights: name -> (here, there).

        A field counts when the other network would lack weights, or would compute something else
        from them. The input's size, the dropout and the way of training (a detached shortcut,
        frozen statistics) do not count, nor do learnable windows that only the other network has:
        it begins with the usual ones.

        >>> ModelSpec((64, 64, 3)).differences(ModelSpec((96, 96, 1), depth=34))
        {'channels': (3, 1), 'depth': (18, 34)}
        """
        left_out = ("input_shape", "dropout", "detach_shortcut", "norm", "windows")
        names = ["rank", "channels", *(f.name for f in fields(self) if f.name not in left_out)]
        pairs = {name: (_spelt_out(self, name), _spelt_out(other, name)) for name in names}
        here, there = ("group" if s.norm == "group" else "batch" for s in (self, other))
        pairs["norm"] = here, there
        if self.windows is not None:
            pairs["windows"] = self.windows.kind, other.windows and other.windows.kind
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def to_dict(self) -> dict[str, Any]:
        """Return the specification ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Any) -> "ModelSpec":
        """Read a specification back from JSON, whose lists become tuples.

        Raises:
            UsageError: not an object, or one with unknown entries or values.

        >>> ModelSpec.from_dict({"input_shape": [64, 64, 3], "depth": 10}).input_shape
        (64, 64, 3)
        """
        known = {f.name for f in fields(cls)}
        if not isinstance(content, dict) or not set(content) <= known:
            raise UsageError(f"network {content!r}; expected an object with {sorted(known)}.")
        try:
            return cls(**{name: _tuples(value) for name, value in content.items()})
        except TypeError as error:
            raise UsageError(f"network {content!r}: {error}.") from error


def _spelt_out(spec: ModelSpec, name: str) -> Any:
    """Return a field with kernels, strides and dilations as one number per axis."""
    value = getattr(spec, name)
    if name in ("kernels", "strides", "dilations"):
        return tuple(spec.per_axis(entry) for entry in value)
    if name == "channels":
        return spec.stem_channels
    if name in ("stem_kernel", "stem_stride", "pool_kernel", "pool_stride"):
        return None if value is None else spec.per_axis(value)
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


def _strided(length: int, stride: int) -> int:
    # Odd kernels padded alike on both ends: the output length depends on the stride alone.
    return (length - 1) // stride + 1
