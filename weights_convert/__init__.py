"""Carry pretrained weights from torch checkpoints into the networks of `ich_keras`, exactly.

Every conversion is a bijection between a checkpoint's tensors and a network's variables, and it is
written only after both networks agreed on the same input. Checkpoints are untrusted.

Map of rooms:
    sources       which weights there are, where they come from, licence, checksum
    fetching      downloading one, when asked to
    checkpoint    reading a file without trusting it
    structure     which network the tensors belong to
    mapping       names and axes, torch <-> Keras (pure)
    shapes        changing shapes on purpose: input channels, 2D -> 3D, 3D -> 2D (pure)
    reference     the networks in plain torch, for verification only
    parity        both networks on the same input
    state         state dicts of Keras models and of weights files
    reshaping     weights files of another shape, on purpose
    conversion    checkpoint -> `.weights.h5`, and back
    selfcheck     the parity of every network, without a checkpoint
    cli           the command `weights-convert`
Modules are nouns so that the verbs (`weights_convert.convert`) can be functions.
"""

import importlib
from typing import Any

# Public name -> module that holds it; imported on first use.
_PUBLIC = {
    "SOURCES": "weights_convert.sources",
    "read_checkpoint": "weights_convert.checkpoint",
    "structure_of": "weights_convert.structure",
    "load_state": "weights_convert.state",
    "state_of": "weights_convert.state",
    "convert": "weights_convert.conversion",
    "verify": "weights_convert.conversion",
    "inflate": "weights_convert.reshaping",
    "collapse": "weights_convert.reshaping",
    "change_channels": "weights_convert.reshaping",
    "export": "weights_convert.conversion",
    "fetch": "weights_convert.fetching",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
