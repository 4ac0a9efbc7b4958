"""Exporting a run: one file, read again and compared with the run before it is kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ich_keras.answer_rules import LEVELS
from ich_keras.context import Context
from ich_keras.ct.pixels import AIR_HU
from ich_keras.data.cache.cache import CTCache
from ich_keras.environment import loaded_backend
from ich_keras.errors import EnvironmentProblem, UsageError
from ich_keras.export.checking import Asked, Difference, answers_of, differences
from ich_keras.export.head import Head
from ich_keras.export.program import HU, POSITIONS, PREPARED, Program, SeriesProgram
from ich_keras.export.writing import (
    FORMATS,
    KERAS,
    ONNX,
    SUFFIXES,
    exported,
    metadata_of,
    require_onnx,
    write_onnx,
    write_torch,
)
from ich_keras.files import atomic_path
from ich_keras.inference import load_run
from ich_keras.metrics.aggregation import HEAD
from ich_keras.model_file import save_model
from ich_keras.models.presets import PRESETS
from ich_keras.recipe import Recipe
from ich_keras.run_folder import SYNTHETIC, RunFolder

INPUTS = (HU, PREPARED)
USUAL_SIDE = 512
# torch takes some small numbers of samples for constants.
_EXAMPLES = 7
_DTYPES = {HU: torch.int16, PREPARED: torch.float32}


@dataclass(frozen=True)
class Export:
    """A file that was written.

    Args:
        path: where.
        takes: `HU` or `PREPARED`.
        shape: of one sample.
        differences: between the file's answers and the run's.
    """

    path: Path
    takes: str
    shape: tuple[int, ...]
    differences: tuple[Difference, ...]


def export_run(
    run: RunFolder | Path | str,
    out: Path | str,
    kind: str = ONNX,
    takes: str = HU,
    side: int = USUAL_SIDE,
    cache: CTCache | None = None,
) -> Export:
    """Write a run's network as one file that needs no ich_keras.

    The file computes in float32, whatever the precision of the training. It gives two outputs for
    any number of samples, float32 (n, labels): `probabilities`, calibrated by the temperature per
    slice (of whole series: per series), and `raw_probabilities`, on which thresholds are chosen. A
    Keras model gives the raw ones alone. A run with a sequence head becomes a file that takes the
    slices of one series, any number, and their `positions_mm`, float32 (n,). Smoothing along z and
    the rule from slices to series are not inside, nor is a head's own answer to the series: its
    metadata names them.

    Args:
        run: a finished one, on the torch backend.
        out: the file.
        kind: "onnx", "torch" (`torch.export.load` reads it) or "keras".
        takes: "hu" for int16 Hounsfield units (n, [slices,] side, side), inferior to superior;
            "prepared" for float32 input, as `Recipe.inputs.prepare` makes it.
        side: rows and columns of slices of HU.
        cache: compares on a series of it, of slices of its size, and not on a phantom.

    Returns:
        What was written; the file was read again by its runtime and compared with the run.

    Raises:
        UsageError: the format, the input or the side does not exist; the run has a sequence head,
            and the format is keras; its input is made of whole series (`crop`, `depth_mm`).
        EnvironmentProblem: another backend than torch, or packages of the extra "export" missing.
        StaleError: the run is not finished or was changed.
        DataError: the file answers otherwise than the run; it is then removed.
    """
    _require(kind, takes)
    if kind == ONNX:
        require_onnx()
    folder = RunFolder.at(run)
    recipe, model = load_run(folder, device="cpu", precision="float32")
    if loaded_backend() != "torch":
        raise EnvironmentProblem(
            f"export on the backend {loaded_backend()}; it needs torch.",
            "Set KERAS_BACKEND=torch; a run of any backend can be exported.",
        )
    context = Context.load(folder, recipe.labels, model)
    if context is not None and kind == KERAS:
        raise UsageError(
            f"{folder} has a sequence head beside its network; a Keras file would hold one alone.",
            "Export it as onnx or torch.",
        )
    path = _new_file(out, kind)
    if takes == HU and cache is not None:
        side = cache.size
    if recipe.inputs.crop is not None or recipe.inputs.depth_mm is not None:
        raise UsageError(
            f"{folder} makes its input of whole series ({recipe.inputs}), which no file does.",
            "Predict with the run itself, or train one without.",
        )
    is_series = recipe.inputs.view.kind == "series"
    level = folder.choices().get("series" if is_series else "slice", {})
    temperature = float(level.get("temperature", 1.0))
    view, shape = recipe.inputs.view, recipe.inputs.shape
    if takes == HU:
        shape = (*((view.num_slices,) if view.has_slices else ()), side, side)
    metadata = metadata_of(recipe, _facts(folder, recipe, takes, shape, temperature))
    with atomic_path(path) as temporary:
        if kind == KERAS:
            written = temporary.with_suffix(SUFFIXES[KERAS])
            save_model(model, written, recipe)
            written.replace(temporary)
        else:
            enters = side if takes == HU else None
            examples = [torch.zeros((_EXAMPLES, *shape), dtype=_DTYPES[takes])]
            if context is None:
                program = Program(recipe, model, temperature, enters)
            else:
                program = SeriesProgram(recipe, model, temperature, enters, Head(context))
                examples.append(torch.arange(_EXAMPLES, dtype=torch.float32))
            made = exported(program, tuple(examples))
            if kind == ONNX:
                names = [takes] if context is None else [takes, POSITIONS]
                write_onnx(made, names, temporary, metadata)
            else:
                write_torch(made, temporary, metadata)
        answer = answers_of(temporary, kind, temperature, recipe)
        real = None if cache is None else cache.series_hu(cache.series_uids[0])
        asked = Asked(recipe, model, temperature, takes, side, context)
        found = differences(answer, asked, real)
    return Export(path, takes, shape, tuple(found))


def _require(kind: str, takes: str) -> None:
    for name, value, known in (("format", kind, FORMATS), ("input", takes, INPUTS)):
        if value not in known:
            raise UsageError(f"{name} {value!r}; expected one of {', '.join(known)}.")
    if kind == KERAS and takes == HU:
        raise UsageError(
            "a Keras model takes prepared input, not Hounsfield units.",
            f"Give the input {PREPARED!r}; `ich_keras.read_recipe` reads how it is made.",
        )


def _new_file(out: Path | str, kind: str) -> Path:
    path = Path(out)
    if path.suffix != SUFFIXES[kind]:
        raise UsageError(
            f"{path} does not end in {SUFFIXES[kind]}, as files of the format {kind} do.",
            f"Give {path.with_suffix(SUFFIXES[kind])}.",
        )
    if path.exists():
        raise UsageError(f"{path} exists; nothing is overwritten.", "Give another name.")
    return path


def _facts(
    folder: RunFolder, recipe: Recipe, takes: str, shape: tuple[int, ...], temperature: float
) -> dict[str, Any]:
    """Return what a user of the file needs beside it."""
    weights = PRESETS[recipe.preset].licence if recipe.training.weights else ""
    facts: dict[str, Any] = {
        "takes": takes,
        "shape": ["n", *shape],
        "dtype": str(_DTYPES[takes]).removeprefix("torch."),
        "temperature": temperature,
        "trained_on_phantoms": bool(folder.data().get(SYNTHETIC)),
        "licence_of_pretrained_weights": weights,
    }
    if takes == HU:
        facts["unit"] = "Hounsfield units; slices inferior to superior, rows to the patient's left"
    if recipe.inputs.view.has_slices:
        facts["where_there_is_no_slice"] = AIR_HU
    if recipe.inputs.view.kind != "series" and folder.choices():
        facts["smoothing_along_z"] = folder.smoothing()
        rule = folder.rule()
        facts["from_slices_to_series"] = f"{rule}, which this file lacks" if rule == HEAD else rule
    thresholds = {
        name: part.get("thresholds") for name, part in folder.choices().items() if name in LEVELS
    }
    return facts | ({"thresholds_of_raw_probabilities": thresholds} if thresholds else {})
