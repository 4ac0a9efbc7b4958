"""The command line: `ich` and its commands; `ich-train` is `ich train`.

Every command parses its options, calls one public function and prints the result. Nothing heavy is
imported before a command runs: `--help` answers at once, and `--backend` takes effect before Keras
is loaded.
"""

import importlib
from typing import Any

# Imported on first use, so that `python -m ich_keras.cli.train` does not find its module loaded.
_COMMANDS = {"main": "ich_keras.cli.commands", "train_main": "ich_keras.cli.train"}

__all__ = ["main", "train_main"]


def __getattr__(name: str) -> Any:
    if name in _COMMANDS:
        return getattr(importlib.import_module(_COMMANDS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
