"""The state of a training after each epoch: a crash loses at most one epoch.

`state/epoch-0003/` holds the weights, the optimiser's slots, the states of the random generators
(dropout) and a JSON with the rest, and with the checksums of all. The pointer `state/latest.json`
is swapped last, so the state it names is complete. The previous state is kept as a backup.
"""

import contextlib
import re
import shutil
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ich_keras.errors import DataError, LostState, StaleError, UsageError
from ich_keras.files import (
    atomic_path,
    fingerprint,
    read_json,
    replace,
    sha256_of,
    write_json,
)
from ich_keras.labels import SIX, LabelSet
from ich_keras.leftovers import partial_of
from ich_keras.models.weights import BYTES_PER_VALUE, load_weights, save_weights
from ich_keras.progress import Tell

POINTER = "latest.json"
WEIGHTS = "model.weights.h5"
VARIABLES = "variables.npz"
STATE = "state.json"
# Entries of the JSON: whose state it is; checksums of the other files, and of the JSON itself.
RUN, FILES, CHECKSUM = "run", "files", "checksum"
_AVERAGES = "_ich_averages"  # attribute of a network
KEPT = 2
_BYTES_PER_MEMBER = 1024  # two headers in the archive, and that of NumPy
_NEW = "Start a new training."
_NAME = re.compile(r"epoch-(\d{4,})")


@dataclass(frozen=True)
class Averages:
    """Variables of an average over epochs, which belong to the state of a training.

    Not a plain list: Keras would take its variables for weights of the network.
    """

    variables: list[Any]


def set_averages(model: Any, averages: Averages) -> None:
    """Let the states of a network hold these variables, too."""
    setattr(model, _AVERAGES, averages)


def averages_of(model: Any) -> list[Any]:
    """Return the variables that `set_averages` gave a network; none without."""
    found = getattr(model, _AVERAGES, None)
    return [] if found is None else found.variables


def _other_variables(model: Any) -> dict[str, Any]:
    """Return what `save_weights` leaves out: optimiser slots, generator states, averages."""
    weights = {id(variable) for variable in model.weights}
    generators = [v for v in model.variables if id(v) not in weights and "seed" in v.path]
    found = {f"optimizer/{n}": v for n, v in enumerate(model.optimizer.variables)}
    found |= {f"average/{n}": v for n, v in enumerate(averages_of(model))}
    return found | {f"generator/{n}": v for n, v in enumerate(generators)}


def save_state(folder: Path, model: Any, epoch: int, state: dict) -> None:
    """Save the state after an epoch and make it the latest.

    Args:
        folder: the run's `state` folder.
        model: compiled, with its optimiser built.
        epoch: epochs finished so far, from 1.
        state: JSON-able; everything else the training must remember, and under `RUN` what tells
            the run from others.

    Raises:
        EnvironmentProblem: the disk is full; earlier states stay.
    """
    import keras

    name = f"epoch-{epoch:04d}"
    temporary = partial_of(folder / name)
    try:
        temporary.mkdir(parents=True)
        save_weights(model, temporary / WEIGHTS)
        arrays = {k: keras.ops.convert_to_numpy(v) for k, v in _other_variables(model).items()}
        needed = slots_bytes(array.size for array in arrays.values())
        with (
            atomic_path(temporary / VARIABLES, needed=needed) as path,
            open(path, "wb") as stream,
        ):
            np.savez(stream, **arrays)
        write_state(temporary, {**state, "epoch": epoch})
        # Left by a run that crashed between this rename and the pointer's: no longer needed.
        shutil.rmtree(folder / name, ignore_errors=True)
        replace(temporary, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_json(folder / POINTER, {"state": name})
    for old in _epochs(folder)[KEPT:]:
        shutil.rmtree(folder / f"epoch-{old:04d}")


def slots_bytes(sizes: Iterable[int]) -> int:
    """Return the size of the file of optimiser slots and generator states, bytes.

    Args:
        sizes: of each array, in values.
    """
    return sum(size * BYTES_PER_VALUE + _BYTES_PER_MEMBER for size in sizes)


def write_state(folder: Path, state: dict) -> None:
    """Write the JSON of a state, with the checksums of its files, which are complete."""
    state = {**state, FILES: {name: sha256_of(folder / name) for name in (WEIGHTS, VARIABLES)}}
    write_json(folder / STATE, {**state, CHECKSUM: fingerprint(state)})


def has_state(folder: Path) -> bool:
    """Return whether a training saved a state after any epoch."""
    return bool(_epochs(folder))


def load_state(
    folder: Path,
    model: Any,
    tell: Tell | None = None,
    run: dict | None = None,
    labels: LabelSet = SIX,
) -> dict:
    """Restore the latest complete state into a compiled model of the same network.

    Args:
        folder: the run's `state` folder.
        model: compiled.
        tell: called with one line of text for each damaged or foreign state that is skipped, and
            for one of an older version, which has no checksums.
        run: what tells the run from others; None takes a state of any.
        labels: of the model's head.

    Returns:
        The JSON that was given to `save_state`, with `epoch`.

    Raises:
        LostState: there is no state, or all are damaged or belong to another run or network.
    """
    epochs, latest = _epochs(folder), _latest(folder / POINTER)
    if latest is not None:
        epochs = [epoch for epoch in epochs if epoch <= latest]
    problems = []
    for epoch in epochs:
        try:
            return _load(folder / f"epoch-{epoch:04d}", model, epoch, run, tell, labels)
        except (StaleError, DataError, UsageError) as error:
            problems.append(error)
            if tell is not None:
                tell(f"Skipping a damaged state: {error}")
    if problems:
        raise LostState(problems[0].message, problems[0].hint) from problems[0]
    raise LostState(f"{folder} holds no state of a training.", "Start a new training.")


def states_of(folder: Path) -> list[tuple[int, Path]]:
    """Return the epochs that have a state, with its folder, latest first."""
    return [(epoch, folder / f"epoch-{epoch:04d}") for epoch in _epochs(folder)]


def _epochs(folder: Path) -> list[int]:
    """Return the epochs that have a state, latest first."""
    # By number: as text, epoch 10000 comes before 9999.
    found = [_NAME.fullmatch(path.name) for path in folder.glob("epoch-*")]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def _latest(pointer: Path) -> int | None:
    """Return the epoch that the pointer names; None when the pointer is lost.

    The folders can then be trusted: each gets its name only once it is complete.
    """
    try:
        name = read_json(pointer)["state"]
    except (StaleError, KeyError, TypeError):
        return None
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    return int(match[1]) if match else None


def read_state(folder: Path, epoch: int) -> tuple[dict, bool]:
    """Read the JSON of a state, and check the state's files against their checksums.

    Args:
        folder: of the state.
        epoch: after which it should be.

    Returns:
        (what `save_state` was given, with `epoch`; whether it has checksums at all: states of
        older versions have none).

    Raises:
        StaleError: a file is absent or damaged, or the state is of another epoch.
    """
    state, checksums = _read_record(folder)
    for name, checksum in (checksums or {}).items():
        if not (folder / name).is_file() or sha256_of(folder / name) != checksum:
            raise StaleError(f"{folder / name} is lost or does not match its checksum.", _NEW)
    if state["epoch"] != epoch:
        raise StaleError(f"{folder} holds the state of epoch {state['epoch']}.", _NEW)
    return state, checksums is not None


def recorded_states(folder: Path) -> list[dict]:
    """Return the JSON of every state that is whole, latest first; other files are not looked at."""
    found = []
    for _, state in states_of(folder):
        with contextlib.suppress(StaleError):
            found.append(_read_record(state)[0])
    return found


def _read_record(folder: Path) -> tuple[dict, dict[str, str] | None]:
    """Return the JSON of a state, and the checksums of its files (None: it has none)."""
    state = read_json(folder / STATE)
    if not isinstance(state, dict) or not isinstance(state.get("epoch"), int):
        raise StaleError(f"{folder / STATE} is damaged.", _NEW)
    # Those of older versions do not say whose they are, either.
    if CHECKSUM not in state and FILES not in state and RUN not in state:
        return state, None
    if state.pop(CHECKSUM, None) != fingerprint(state):
        raise StaleError(f"{folder / STATE} does not match its checksum.", _NEW)
    return state, state.pop(FILES)


def _load(
    folder: Path,
    model: Any,
    epoch: int,
    run: dict | None,
    tell: Tell | None,
    labels: LabelSet,
) -> dict:
    state, has_checksums = read_state(folder, epoch)
    of = state.get(RUN)
    if run is not None and of is not None and of != run:
        others = sorted(name for name in of | run if of.get(name) != run.get(name))
        raise StaleError(
            f"{folder} belongs to another run (different: {', '.join(others)}).",
            "Bring back the state of this run, or start a new training.",
        )
    if not has_checksums and tell is not None:
        tell(f"{folder} has no checksums (an older version saved it): damage would go unnoticed.")
    arrays = _arrays(folder / VARIABLES)
    load_weights(model, folder / WEIGHTS, needs_head=True, labels=labels)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    wanted = _other_variables(model)
    differing = set(wanted) ^ set(arrays) or {
        name for name, v in wanted.items() if tuple(v.shape) != arrays[name].shape
    }
    if differing:
        raise StaleError(
            f"{folder} belongs to another network or optimiser:"
            f" {len(differing)} variables differ; the first is {min(differing)}.",
            "Resume with the configuration the run began with.",
        )
    for name, variable in wanted.items():
        variable.assign(arrays[name])
    return state


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    # zipfile may take a flipped bit for encryption (RuntimeError) or an unknown method.
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise StaleError(f"{path} is damaged ({error}).", _NEW) from error
