"""What is measured: networks, inputs and batch sizes. Imports neither torch nor keras."""

import difflib
from dataclasses import dataclass, replace

from ich_keras.errors import UsageError
from ich_keras.models.presets import preset
from ich_keras.models.spec import ModelSpec

TRAIN, PREDICT, UPDATE = "train", "predict", "update"
# Ways to run a network; see `benchmarks.variants`.
OURS, PLAIN, STOCK, MONAI = "ours", "plain torch", "stock Keras", "MONAI"
NOT_COMPILED, COMPILED = f"{OURS}, not compiled", f"{PLAIN}, compiled"


@dataclass(frozen=True)
class Case:
    """One network on one input.

    Args:
        name: its name in tables and for `--cases`.
        preset: a network of `ich presets`.
        shape: of a sample: (rows, columns, channels) or (slices, rows, columns, channels).
        batch: samples per step.
        steps: steps of one timed run. Short steps need many, so that the work `fit` does once
            (callbacks, reading the loss) counts as little as in an epoch.
        modes: "train", "predict"; "update" is the optimiser alone.
        width: channels of the first stage.
        precision: None takes the precision of the run.
        is_any_size: build the network for inputs of any size, because the preset refuses so few
            slices.
        recomputes: also measure training steps that compute activations twice.
        is_long: run only with `--whole`.
    """

    name: str
    preset: str
    shape: tuple[int, ...]
    batch: int
    steps: int = 1
    modes: tuple[str, ...] = (TRAIN, PREDICT)
    width: int = 64
    precision: str | None = None
    is_any_size: bool = False
    recomputes: bool = False
    is_long: bool = False

    @property
    def spec(self) -> ModelSpec:
        """Return the network, without dropout: torchvision's and MONAI's have none."""
        spec = replace(preset(self.preset), width=self.width, dropout=0.0)
        return spec.with_any_size() if self.is_any_size else replace(spec, input_shape=self.shape)


@dataclass(frozen=True)
class Setting:
    """How a benchmark runs.

    Args:
        device: "cpu" or "cuda".
        threads: threads of torch on the CPU.
        precision: "float32" or "bfloat16", unless a case has its own.
        has_stock: whether to measure Keras' own steps, which are slow.
        least_steps: minimum of steps in a timed run. On a GPU a step takes milliseconds, so the
            work `fit` does once would distort a short run.
    """

    device: str
    threads: int
    precision: str
    has_stock: bool = True
    least_steps: int = 1


SLICE, SLAB, SERIES, WHOLE = (256, 256, 3), (5, 256, 256, 1), (32, 128, 128, 1), (60, 256, 256, 1)
DILATED, STRIDED, FLAT = "resnet18_3d_medicalnet", "resnet18_3d", "resnet18_3d_slab"

CASES = (
    Case("2d-b32", "resnet18_2d", SLICE, 32, steps=2),
    Case("2d-b8", "resnet18_2d", SLICE, 8, steps=5),
    Case("slab-dilated-b2", DILATED, SLAB, 2, steps=2),
    Case("slab-dilated-b4", DILATED, SLAB, 4),
    Case("slab-strided-b2", STRIDED, SLAB, 2, steps=5, is_any_size=True),
    Case("slab-strided-b4", STRIDED, SLAB, 4, steps=3, is_any_size=True),
    Case("slab-flat-b2", FLAT, SLAB, 2, steps=2),
    Case("slab-flat-b4", FLAT, SLAB, 4),
    Case("series-dilated", DILATED, SERIES, 1, recomputes=True),
    Case("series-strided", STRIDED, SERIES, 1, steps=3, recomputes=True),
    Case("whole-dilated", DILATED, WHOLE, 1, recomputes=True, is_long=True),
    Case("whole-strided", STRIDED, WHOLE, 1, recomputes=True, is_long=True),
    # Almost no computation: this measures the time of the host.
    Case("narrow", "resnet18_2d", (64, 64, 3), 1, steps=50, width=8, precision="float32"),
    Case("adam", "resnet18_2d", SLICE, 1, steps=20, modes=(UPDATE,), precision="float32"),
)
# With 17 slices, the last stage of the strided network still has two positions.
TINY_SLICES, TINY_SIDE, TINY_WIDTH = 17, 64, 8


@dataclass(frozen=True)
class SequenceCase:
    """A sequence head on a slice network, and a series for both.

    Args:
        name: its name in tables.
        head: a kind of `ich_keras.models.sequence`.
        preset: of the slice network.
        shape: of a slice: (rows, columns, channels).
        slices: of the series.
        chunk: slices per pass of the slice network.
    """

    name: str
    head: str
    preset: str = "resnet18_2d"
    shape: tuple[int, int, int] = SLICE
    slices: int = 40
    chunk: int = 16

    @property
    def spec(self) -> ModelSpec:
        """Return the slice network, without dropout."""
        return replace(preset(self.preset), dropout=0.0, input_shape=self.shape)


SEQUENCE_CASES = (SequenceCase("gru", "gru"), SequenceCase("transformer", "transformer"))


def tiny_sequence(case: SequenceCase) -> SequenceCase:
    """Shrink a case until a step is very short, but still runs the same code."""
    return replace(case, shape=(TINY_SIDE, TINY_SIDE, 3), slices=6, chunk=2)


def tiny(case: Case) -> Case:
    """Shrink a case until a step is very short, but still runs the same code."""
    *slices, _, _, channels = case.shape
    shape = (*(min(number, TINY_SLICES) for number in slices), TINY_SIDE, TINY_SIDE, channels)
    # In 2D the width is kept, so that the baseline remains torchvision's own network.
    width = TINY_WIDTH if slices else case.width
    return replace(case, shape=shape, batch=min(case.batch, 2), steps=1, width=width)


def choose_cases(names: str = "", whole: bool = False, is_tiny: bool = False) -> list[Case]:
    """Select cases, in the table's order.

    Args:
        names: separated by commas; "" takes all except the long ones.
        whole: include the long ones.
        is_tiny: shrink them all.

    Raises:
        UsageError: an unknown name.
    """
    known = [case.name for case in CASES]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"case {name!r}; expected some of {', '.join(known)}.", hint)
    chosen = [
        case
        for case in CASES
        if (case.name in wanted if wanted else whole or is_tiny or not case.is_long)
    ]
    if not is_tiny:
        return chosen
    # Cases that differ only in size become one.
    unique = {replace(tiny(case), name="", is_long=False): case for case in reversed(chosen)}
    return [tiny(case) for case in chosen if case in unique.values()]
