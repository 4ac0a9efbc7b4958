"""Expected training times on processors, computed from measured steps. No GPU was measured."""

from dataclasses import dataclass

from experiments.declare import fitting_of, joint_settings
from experiments.run import Run
from experiments.runs import RUNS
from experiments.scales import Scale
from experiments.splits import LEAKY_PART
from ich_keras.data.split import FRACTIONS


@dataclass(frozen=True)
class Speed:
    """A training step on one core, per slice of a sample.

    Args:
        seconds: of a step in bfloat16, one thread.
        multiply_adds: forward, 10^9.
    """

    seconds: float
    multiply_adds: float


# (preset, view) -> rows and columns -> speed. Measured on one core of an AMD EPYC with torch
# 2.14 and Keras 3.15, batches of 32, 16 and 8.
SPEEDS = {
    ("resnet18_2d", "slice"): {64: Speed(0.0071, 0.15), 96: Speed(0.0115, 0.33)},
    ("resnet50_2d", "slice"): {64: Speed(0.0159, 0.33), 96: Speed(0.0300, 0.75)},
    ("resnet18_3d_slab", "slab"): {64: Speed(0.0154, 0.434), 96: Speed(0.0298, 0.978)},
    ("resnet18_3d_medicalnet", "slab"): {64: Speed(0.0054, 0.474), 96: Speed(0.0118, 1.068)},
    ("resnet18_3d", "slab"): {64: Speed(0.0027, 0.094), 96: Speed(0.0054, 0.212)},
    ("resnet18_3d", "series"): {64: Speed(0.0026, 0.085), 96: Speed(0.0047, 0.162)},
    ("resnet18_3d_medicalnet", "series"): {64: Speed(0.0060, 0.461), 96: Speed(0.0089, 0.767)},
    # Not measured: a stack as a slice whose first convolution has three times the channels.
    ("resnet18_2d_stack", "stack"): {64: Speed(0.0075, 0.16), 96: Speed(0.0122, 0.37)},
    # Not measured: the dilated network on slices, estimated as a slab of one.
    ("resnet18_2d_medicalnet", "slice"): {64: Speed(0.0054, 0.16), 96: Speed(0.0118, 0.36)},
}
# Not measured: operations, at the seconds per operation of resnet18_3d_slab, which likewise keeps
# five slices. preset -> rows and columns -> multiply-adds of a forward pass per slice, 10^9.
_COUNTED = {
    "resnet18_3d_thin": {64: 2.217, 96: 4.987},
    "resnet18_3d_thin_atrous": {64: 2.217, 96: 4.987},
    "r3d_18_slab": {64: 1.677, 96: 3.774},
    "mc3_18_slab": {64: 0.884, 96: 1.990},
    "r2plus1d_18_slab": {64: 1.595, 96: 3.590},
}
# A sequence head's training step, per slice of a filled-up series: (preset) -> seconds. Measured on
# one core of an Intel Xeon while others worked, batches of 16 series of 16 slices, 512 features:
# rather too long.
HEAD_SECONDS = {
    "sequence_gru": 0.00045,
    "sequence_lstm": 0.00049,
    "sequence_conv": 0.00014,
    "sequence_transformer": 0.00018,
    "sequence_attention": 0.00010,
}
TRAINING_PART, VALID_PART, _ = FRACTIONS  # of the patients
THESIS_PARTS = 0.8, 0.2
HEAD_MM = 100  # of a phantom's slices: mean number times mean spacing
POSITIVE = 0.31  # of phantom slices; about half of the series
OVERHEAD_SECONDS = 9  # building, weights and state on disk, evaluation, intervals
FORWARD = 1 / 3  # of a training step: what a validated sample costs
# Both factors are measured on trainings of `small`. Two trainings at a time share the processor's
# memory: the factor is against one alone. Without instructions for bfloat16, training is in
# float32: a step took 2.0 to 3.9 times as long as in bfloat16 on another AMD EPYC (seven runs,
# while tests were running).
TWO_AT_A_TIME = 1.2
IN_FLOAT32 = 3


def expected_seconds(key: str, scale: Scale) -> float | None:
    """Estimate how long one seed of a run takes on one core; None on real data."""
    if not scale.is_synthetic:
        return None
    run = RUNS[key]
    if run.on is not None:
        return _head_seconds(run, scale)
    speed, epochs = _speed(run, scale), _epochs(key, scale)
    part = THESIS_PARTS[1] if run.is_thesis else VALID_PART
    valid = part * _all_samples(run, scale) * FORWARD
    return OVERHEAD_SECONDS + epochs * speed.seconds * (_samples(run, scale) + valid)


def _head_seconds(run: Run, scale: Scale) -> float:
    """Return the time of a head and of its evaluation; that of its slice network is another run's,
    and features are computed once for all heads."""
    assert scale.num_series is not None
    network = _speed(RUNS[run.on or ""], scale).seconds * FORWARD
    evaluated = (1 - TRAINING_PART) * _all_samples(run, scale) * network
    # Series are filled up to a multiple of 16 slices.
    trained = scale.head.epochs * TRAINING_PART * scale.num_series * 16 * HEAD_SECONDS[run.preset]
    if run.end_to_end:
        # Forward twice, since chunks are computed again, and backward.
        steps = joint_settings()["epochs"] * _all_samples(run, scale)
        each = (TRAINING_PART * (1 + FORWARD) + VALID_PART * FORWARD) * network / FORWARD
        trained += steps * each
    return OVERHEAD_SECONDS + evaluated + trained


def _slices(run: Run, scale: Scale) -> int:
    # A stack is one image of more channels.
    one = {"slice": 1, "stack": 1, "slab": run.slices or 5, "series": scale.series_slices}
    return one[run.view]


def _estimated(preset: str, size: int) -> Speed:
    like = SPEEDS["resnet18_3d_slab", "slab"][size]
    operations = _COUNTED[preset][size]
    return Speed(like.seconds * operations / like.multiply_adds, operations)


def _speed(run: Run, scale: Scale) -> Speed:
    if run.preset in _COUNTED:
        one = _estimated(run.preset, scale.size)
    else:
        one = SPEEDS[run.preset, run.view][scale.size]
    slices = _slices(run, scale)
    return Speed(one.seconds * slices, one.multiply_adds * slices)


def _all_samples(run: Run, scale: Scale) -> float:
    series = scale.other_series if run.split == "other" else scale.num_series
    assert series is not None  # times are estimated on phantoms only
    return series * (1 if run.view == "series" else HEAD_MM / (sum(scale.slice_spacing_mm) / 2))


def _samples(run: Run, scale: Scale) -> float:
    """Return the training samples per epoch, half of them positive."""
    balanced = 1.0 if run.view == "series" else 2 * POSITIVE
    part = THESIS_PARTS[0] if run.is_thesis else TRAINING_PART
    if run.split == "leaky":
        part *= LEAKY_PART
    return part * run.fraction * balanced * _all_samples(run, scale)


def _epochs(key: str, scale: Scale) -> float:
    run = RUNS[key]
    epochs = fitting_of(run, scale).epochs
    if run.like is None or run.like[0] == "memory":
        return epochs
    what, base_key = run.like
    base = RUNS[base_key]
    samples = _samples(base, scale) * fitting_of(base, scale).epochs / _samples(run, scale)
    if what == "steps":
        return samples
    return samples * _speed(base, scale).multiply_adds / _speed(run, scale).multiply_adds


def expected_time(key: str, scale: Scale) -> str:
    """Return the expected time of one seed as text."""
    seconds = expected_seconds(key, scale)
    if seconds is None:
        return "not measured"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
