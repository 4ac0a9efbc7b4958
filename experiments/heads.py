"""Sequence heads, the second stage of a run: features of its slice network, then a head on them.

```text
WORK/features/<run>-s<seed>.h5     features of all slices of the cache, once for all heads
WORK/features/<run>-s<seed>.json   what they cost
WORK/runs/<head>-s<seed>/          the head's run folder; beside it, what it cost
```
"""

import math
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from experiments.declare import head_settings, joint_settings
from experiments.memory import measured
from experiments.place import Place
from experiments.runs import RUNS
from experiments.settle import Task
from ich_keras.data.cache.cache import CTCache
from ich_keras.environment import choose_device, environment_record
from ich_keras.files import read_json, write_json
from ich_keras.progress import Tell
from ich_keras.run_folder import START, RunFolder

END_TO_END = "end_to_end"  # in context.json: how head and slice network were trained together
_TRAINING = ("training the head", "training head and slice network")
SERIES_CHANGE = "series_change"  # the head's layer that answers series, not slices


def cost_file(place: Place, key: str, seed: int) -> Path:
    """Return the file beside a run folder that says what its training took."""
    return place.run_dir(key, seed).with_name(f"{key}-s{seed}.cost.json")


def features_file(place: Place, key: str, seed: int) -> Path:
    """Return where the features of a run's slice network lie."""
    return place.work / "features" / f"{key}-s{seed}.h5"


def forget_features(place: Place, key: str, seed: int) -> None:
    """Remove the features of a network that is trained again."""
    path = features_file(place, key, seed)
    for name in (path.name, f"{path.name}.partial"):
        path.with_name(name).unlink(missing_ok=True)


def make_features(place: Place, task: Task, tell: Tell) -> None:
    """Compute the features of all slices with the network of a run; an interrupted one resumes.

    Args:
        place: of the experiments; the run is finished there.
        task: the run.
        tell: called with single lines of text.
    """
    from ich_keras.features import extract_features

    path = features_file(place, task.key, task.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    cache = CTCache.open(place.cache_dir())
    tell(f"computing the features of {len(cache.slices):,} slices")
    began = time.perf_counter()
    with measured() as peak:
        extract_features(
            place.run_dir(task.key, task.seed), cache, path, device=choose_device(place.device)
        )
    seconds = round(time.perf_counter() - began, 1)
    write_json(path.with_suffix(".json"), {"seconds": seconds, "peak_bytes": peak.to_dict()})


def is_of_features(place: Place, task: Task) -> bool:
    """Whether the head in a finished run folder stands on the network whose features are there."""
    from ich_keras.slice_features import read_record

    on = RUNS[task.key].on
    assert on is not None
    path = features_file(place, on, task.seed)
    record = head_record(RunFolder(place.run_dir(task.key, task.seed)))
    network = record.get(END_TO_END, {}).get("began_with", record["network"])
    return path.is_file() and read_record(path)[0].network == network


def train_head(place: Place, task: Task, cache: CTCache, tell: Tell) -> None:
    """Train a sequence head into its run folder, from the beginning, and record what it took.

    Args:
        place: of the experiments; the features are there.
        task: a run with `on`.
        cache: the one that its slice network was trained on.
        tell: called with single lines of text.
    """
    from ich_keras.context_fitting import ContextConfig
    from ich_keras.context_training import train_context
    from ich_keras.end_to_end import JointConfig

    run, out = RUNS[task.key], place.run_dir(task.key, task.seed)
    assert run.on is not None
    # An interrupted one took minutes at most.
    for path in (out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(path, ignore_errors=True)
    device = choose_device(place.device)
    environment = environment_record(device) | {START: _now()}
    began = time.perf_counter()
    fitted = [began]

    def note_time(*_: object) -> None:
        fitted[0] = time.perf_counter()

    with measured() as peak:
        train_context(
            features_file(place, run.on, task.seed),
            cache,
            out,
            ContextConfig(**head_settings(run, place.scale, task.seed)),
            run=place.run_dir(run.on, task.seed),
            device=device,
            progress=lambda step, *rest: note_time() if step in _TRAINING else None,
            tell=tell,
            joint=JointConfig(**joint_settings()) if run.end_to_end else None,
        )
    write_json(
        cost_file(place, task.key, task.seed),
        {
            "environment": environment,
            # Until the last step; evaluation and pages are no part of the training.
            "seconds": round(fitted[0] - began, 1),
            "peak_bytes": peak.to_dict(),
        },
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def cost_of(place: Place, key: str, seed: int) -> dict[str, Any]:
    """Return what the training of a run took, as far as it was recorded."""
    path = cost_file(place, key, seed)
    return read_json(path) if path.is_file() else {}


def features_cost(place: Place, key: str, seed: int) -> dict[str, Any]:
    """Return what computing the features of a run took, as far as it was recorded."""
    path = features_file(place, key, seed).with_suffix(".json")
    return read_json(path) if path.is_file() else {}


def head_record(run: RunFolder) -> dict[str, Any]:
    """Read context.json of a run with a head."""
    from ich_keras.context import FILE

    return read_json(run.path / FILE)


def built_head(record: dict[str, Any]) -> Any:
    """Build the head that a context.json describes, with random weights."""
    from ich_keras.models.sequence import SequenceSpec, sequence_head

    return sequence_head(SequenceSpec(**record["spec"]))


def head_operations(head: Any, slices: int) -> int:
    """Count the multiply-adds of a forward pass of a head.

    Every kernel is applied once for each slice, but for that of the answer to the series. A
    transformer also compares each slice with every other one, and sums over them.

    Args:
        head: a model of `ich_keras.models.sequence`.
        slices: of the series, filled up.
    """
    total = 0
    for layer in head.layers:
        kernels = [weight for weight in layer.trainable_weights if _is_kernel(weight)]
        times = 1 if layer.name == SERIES_CHANGE else slices
        total += times * sum(math.prod(weight.shape) for weight in kernels)
        if type(layer).__name__ == "MultiHeadAttention":
            width = layer.num_heads * layer.key_dim
            total += 2 * slices**2 * width
    return total


def _is_kernel(weight: Any) -> bool:
    # Biases of recurrent and attention layers have two axes, too.
    return len(weight.shape) > 1 and "bias" not in weight.path.rsplit("/", 1)[-1]


def padded_lengths(lengths: np.ndarray) -> np.ndarray:
    """Return the numbers of slices to which a head fills up series: int (n,)."""
    from ich_keras.context import LENGTH_STEP

    return -(-np.asarray(lengths) // LENGTH_STEP) * LENGTH_STEP
