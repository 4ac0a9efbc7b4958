"""Carry pretrained weights from torch checkpoints into the networks of `ich_keras`, exactly.

Every conversion matches a checkpoint's tensors and a network's variables one to one, and a
file is written only after both networks have agreed on the same input. Checkpoints are untrusted.

Map of rooms:
    sources       the published weights: address, licence, checksum
    fetching      downloading them, on request only
    checkpoint    reading a file without trusting it
    wrapping      where in a file the network lies: keys, prefixes, several networks
    structure     finding out which network the tensors belong to
    mapping       names and axes, torch <-> Keras (pure)
    shapes        explicit changes of shape: input channels, 2D -> 3D, 3D -> 2D (pure)
    reference     the networks in plain torch, for verification only; reference_densenet
    parity        comparing both networks on the same input
    state         state dicts of Keras models and of weights files
    reshaping     the same changes, from weights file to weights file
    restriding    the same tensors for other strides and dilations, from file to file
    conversion    checkpoint -> `.weights.h5`, and back
    selfcheck     the parity of every network on random weights
    cli           the command `weights-convert`
Modules are named by nouns, so that functions can be verbs (`weights_convert.convert`).
"""

import importlib
from typing import Any

# Public name -> its module, imported on first use.
_PUBLIC = {
    "SOURCES": "weights_convert.sources",
    "read_checkpoint": "weights_convert.checkpoint",
    "structure_of": "weights_convert.structure",
    "load_state": "weights_convert.state",
    "state_of": "weights_convert.state",
    "convert": "weights_convert.conversion",
    "verify": "weights_convert.conversion",
    "verify_weights": "weights_convert.conversion",
    "inflate": "weights_convert.reshaping",
    "collapse": "weights_convert.reshaping",
    "change_channels": "weights_convert.reshaping",
    "restride": "weights_convert.restriding",
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
