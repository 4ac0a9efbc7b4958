"""Writing a run as one file: ONNX, a torch program or a Keras model, with what a reader needs."""

import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from ich_keras import __version__
from ich_keras.errors import EnvironmentProblem
from ich_keras.export.program import PROBABILITIES, RAW, Program
from ich_keras.files import atomic_write
from ich_keras.recipe import Recipe

ONNX, TORCH, KERAS = "onnx", "torch", "keras"
FORMATS = (ONNX, TORCH, KERAS)
SUFFIXES = {ONNX: ".onnx", TORCH: ".pt2", KERAS: ".keras"}
NOTICE = (
    "Not a medical device. Not for clinical use. Nothing in this file was validated on patients."
)
_EXTRA = "ich_keras.json"  # beside the program, in the archive that a .pt2 file is


def metadata_of(recipe: Recipe, content: dict[str, Any]) -> dict[str, Any]:
    """Return what every exported file says of itself, ready for JSON.

    Args:
        recipe: of the run.
        content: further entries.
    """
    return {
        "notice": NOTICE,
        "made_by": f"ich_keras {__version__}",
        "labels": list(recipe.labels.names),
        "exclusive": recipe.labels.exclusive,
        **content,
        "recipe": recipe.to_dict(),
    }


def exported(program: Program, examples: tuple[torch.Tensor, ...]) -> Any:
    """Return the program with any number of samples, as `torch.export` sees it.

    Args:
        program: in evaluation mode.
        examples: its inputs, of two samples or more.
    """
    shapes = tuple({0: torch.export.Dim("n", min=2)} for _ in examples)
    return torch.export.export(program.eval(), examples, dynamic_shapes=shapes)


def write_torch(made: Any, path: Path, metadata: dict[str, Any]) -> None:
    """Write a torch program (`torch.export.load` reads it), with the metadata in its archive."""
    content = io.BytesIO()
    torch.export.save(made, content, extra_files={_EXTRA: json.dumps(metadata, indent=1)})
    atomic_write(path, content.getvalue())


def read_torch(path: Path) -> tuple[Any, dict[str, Any]]:
    """Read what `write_torch` wrote: the program as a module, and the metadata."""
    extra = {_EXTRA: ""}
    program = torch.export.load(path, extra_files=extra)
    return program.module(), json.loads(extra[_EXTRA])


def write_onnx(made: Any, names: list[str], path: Path, metadata: dict[str, Any]) -> None:
    """Write an ONNX model, with the metadata in its properties.

    Args:
        made: from `exported`.
        names: of its inputs.
        path: the file.
        metadata: JSON-able; each entry becomes a property.

    Raises:
        EnvironmentProblem: the packages of the extra "export" are missing.
    """
    require_onnx()
    import onnx

    # torch tells of its own progress and deprecations on every export.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            made,
            dynamo=True,
            input_names=names,
            output_names=[PROBABILITIES, RAW],
            verbose=False,
        )
    model = program.model_proto
    model.producer_name, model.producer_version = "ich_keras", __version__
    model.doc_string = NOTICE
    onnx.helper.set_model_props(
        model,
        {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in metadata.items()
        },
    )
    onnx.checker.check_model(model)
    atomic_write(path, model.SerializeToString())


def require_onnx() -> None:
    """Refuse an export to ONNX without its packages.

    Raises:
        EnvironmentProblem: one is missing.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ImportError as error:
            raise EnvironmentProblem(
                f"the package {package} is not installed; ONNX files need it.",
                "pip install 'ich_keras[export]'",
            ) from error
