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
    conversion    checkpoint -> `.weights.h5`, and back
    cli           the command `weights-convert`
Modules are nouns so that the verbs (`weights_convert.convert`) can be functions.
"""

import importlib

# Public name -> module that holds it; imported on first use.
_PUBLIC = {
    "SOURCES": "weights_convert.sources",
    "read_checkpoint": "weights_convert.checkpoint",
    "structure_of": "weights_convert.structure",
    "load_state": "weights_convert.conversion",
    "state_of": "weights_convert.conversion",
    "convert": "weights_convert.conversion",
    "verify": "weights_convert.conversion",
    "inflate": "weights_convert.conversion",
    "collapse": "weights_convert.conversion",
    "change_channels": "weights_convert.conversion",
    "export": "weights_convert.conversion",
    "fetch": "weights_convert.fetching",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
