"""The private names of Keras and torch: all there, and in one file."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import keras
import pytest
import torch

from ich_keras import keras_private

ROOT = Path(__file__).parents[1]
OWN_FILE = ROOT / "ich_keras" / "keras_private.py"
# Attributes with an underscore that belong to neither: of the standard library.
STANDARD = {"_replace", "_exit", "_fields", "_asdict", "_make"}


def things() -> dict[str, object]:
    """What the first words of the names mean."""
    image = keras.Input((4,))
    model = keras.Model(image, keras.layers.Dense(2)(image))
    optimizer = keras.optimizers.Adam(amsgrad=True)
    model.compile(optimizer, "mse")
    model.train_on_batch(keras.ops.zeros((2, 4)), keras.ops.zeros((2, 2)))
    nodes = [node for level in model._nodes_by_depth.values() for node in level]
    array = torch.zeros(2)
    return {
        "model": model,
        "optimizer": optimizer,
        "variable": model.trainable_variables[0],
        "tensor": model.output,
        "node": next(node for node in nodes if not node.is_input),
        "array": array,
        "keras": keras,
        "torch": torch,
    }


def is_there(name: str, known: dict[str, object]) -> bool:
    first, *others = name.split(".")
    thing = known[first]
    for place, attribute in enumerate(others):
        if not hasattr(thing, attribute) and first in ("keras", "torch"):
            try:
                importlib.import_module(".".join([first, *others[: place + 1]]))
            except ImportError:
                return False
        if not hasattr(thing, attribute):
            return False
        thing = getattr(thing, attribute)
        if attribute == "untyped_storage":
            thing = thing()
    return True


def missing(names) -> list[str]:
    known = things()
    return [name for name in names if not is_there(name, known)]


def names_of_this_backend() -> list[str]:
    is_torch = keras.backend.backend() == "torch"
    return [name for name in keras_private.NAMES if is_torch or ".backend.torch." not in name]


def test_the_installed_keras_and_torch_have_every_private_name():
    gone = missing(names_of_this_backend())
    said = "\n".join(f"{name}: {keras_private.NAMES[name]}" for name in gone)
    assert not gone, (
        f"keras {keras.__version__} or torch {torch.__version__} lacks these; mend"
        f" ich_keras/keras_private.py:\n{said}"
    )


def test_what_is_missing_is_found():
    names = ["model._called", "model._gone", "torch._no_such.name", "keras.src.ops.numpy.Gone"]
    assert missing(names) == names[1:]


@pytest.mark.parametrize("package", ["ich_keras", "weights_convert", "experiments", "benchmarks"])
def test_no_other_file_uses_a_private_name(package):
    used = []
    for path in sorted((ROOT / package).rglob("*.py")):
        if path == OWN_FILE:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in private_names(node):
                used.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    assert used == []


def private_names(node: ast.AST):
    if isinstance(node, ast.ImportFrom) and node.module:
        parts = node.module.split(".")
        if parts[0] in ("keras", "torch") and any(p == "src" or p[0] == "_" for p in parts):
            yield node.module
    if isinstance(node, ast.Attribute):
        owner = node.value
        # Our own: of an object in its own methods, or of the class above it.
        is_own = (isinstance(owner, ast.Name) and owner.id in ("self", "cls")) or (
            isinstance(owner, ast.Call) and getattr(owner.func, "id", "") == "super"
        )
        is_private = node.attr[0] == "_" and not node.attr.startswith("__")
        if is_private and not is_own and node.attr not in STANDARD:
            yield node.attr
        if node.attr == "src" and getattr(owner, "id", "") == "keras":
            yield "keras.src"


def test_importing_it_imports_neither_keras_nor_torch():
    code = (
        "import sys, ich_keras.keras_private;"
        " sys.exit(int(bool({'keras', 'torch'} & set(sys.modules))))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
