"""Where in a file a network lies: under which keys, and under which beginning of its names.

People save a network inside dictionaries (`state_dict`, `model`, `model_ema`) and inside other
modules, whose names come first (`module.`, `_orig_mod.`, `backbone.`). Both are one thing here: a
full name, of keys and names joined by dots. The prefix under which a network lies is found by the
tensors that every such network has, not from a list. So are ResNets that were taken apart into an
`nn.Sequential` of their children, which numbers them.
"""

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ich_keras.errors import DataError, UsageError
from ich_keras.models.weights import listed
from weights_convert.structure import is_complete, is_part

MAX_DEPTH = 4  # of dictionaries inside each other
MAX_ENTRIES = 10_000
MAX_NETWORKS = 32
_LAYERS = ("layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True)
class _Naming:
    """How the parts of a network are named.

    Args:
        stem: the first kernel.
        first_block: the first kernel of the first block: any of these.
        parts: name of a part -> torch's; parts that are not in it keep their names.
    """

    stem: str
    first_block: tuple[str, ...]
    parts: Mapping[str, str]


_NAMINGS = (
    _Naming("conv1.weight", ("layer1.0.conv1.weight",), {}),
    _Naming(
        "features.conv0.weight",
        tuple(f"features.denseblock1.denselayer1.{n}.weight" for n in ("conv1", "conv.1")),
        {},
    ),
    _Naming("stem.0.weight", ("layer1.0.conv1.0.weight", "layer1.0.conv1.0.0.weight"), {}),
    # `nn.Sequential(*network.children())`; 2 and 3 are the ReLU and the pooling.
    _Naming(
        "0.weight",
        ("4.0.conv1.weight",),
        dict(zip("014567", ("conv1", "bn1", *_LAYERS), strict=True)),
    ),
    _Naming(
        "0.0.weight",
        ("1.0.conv1.0.weight", "1.0.conv1.0.0.weight"),
        dict(zip("01234", ("stem", *_LAYERS), strict=True)),
    ),
)
# torch allowed dots in names when torchvision's DenseNets were trained: `denselayer1.norm.1.weight`
# is `denselayer1.norm1.weight` today (torchvision/models/densenet.py renames them as well).
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
_SAVE_ALONE = "Save the network's state dict alone: torch.save(model.state_dict(), FILE)."
_SHOWN_LENGTH = 80


@dataclass(frozen=True)
class Wrapped:
    """A network as it lies in a file.

    Args:
        prefix: what comes before torch's names, without the last dot; "" for nothing.
        entries: torch's name -> what the file holds there: as a rule a tensor.
        others: the rest of the file, each a text that is safe to print.
    """

    prefix: str
    entries: dict[str, Any]
    others: tuple[str, ...]


def find_network(content: Mapping[Any, Any], place: str, prefix: str | None) -> Wrapped | None:
    """Find the one network in what a file holds.

    Args:
        content: of the file.
        place: the file, for the errors.
        prefix: of the network that is wanted, or the end of it; None for the only one.

    Returns:
        None if the file holds none, and no prefix was given.

    Raises:
        DataError: it holds several networks, or too many entries.
        UsageError: no network lies under the prefix.
    """
    found, odd = _flattened(content, place)
    prefixes = _prefixes(found, place)
    if prefix is None:
        candidates = list(prefixes)
        if len(candidates) > 1:
            complete = [p for p in prefixes if _is_complete(found, p, prefixes)]
            candidates = complete or candidates
            candidates = _without_aliases(found, candidates, prefixes)
        if len(candidates) > 1:
            names = listed(map(shown_place, candidates))
            raise DataError(
                f"{place} holds {len(candidates)} networks: {names}.",
                "Choose one with --prefix NAME (in Python: prefix=NAME).",
            )
        if not candidates:
            return None
        chosen = candidates[0]
    else:
        chosen = _asked(prefix, list(prefixes), place)
    entries = _under(found, chosen, prefixes)
    if len(entries) < sum(_is_under(name, chosen, prefixes) for name in found):
        raise DataError(f"{place} holds two entries for one tensor of its network.", _SAVE_ALONE)
    others = [*odd, *_others(found, chosen, prefixes)]
    # A number or a text beside the weights is not a weight; a tensor may be, and is kept.
    beside = [n for n, v in entries.items() if not is_part(n) and _shape_of(v) is None]
    entries = {name: value for name, value in entries.items() if name not in beside}
    others += [shown_place(name) for name in beside]
    return Wrapped(chosen.removesuffix("."), entries, tuple(dict.fromkeys(others)))


def shown_place(name: str) -> str:
    """Show a name from a file, which may hold any character and be of any length.

    >>> shown_place("state_dict.model."), shown_place(""), shown_place("a b")
    ('state_dict.model', "''", "'a b'")
    """
    text = name.removesuffix(".")
    is_plain = text.isascii() and text.isprintable() and " " not in text
    return text if text and is_plain and len(text) <= _SHOWN_LENGTH else repr(text[:_SHOWN_LENGTH])


def _asked(prefix: str, prefixes: list[str], place: str) -> str:
    wanted = prefix.removesuffix(".")
    known = [p for p in prefixes if p.removesuffix(".") == wanted]
    known = known or [p for p in prefixes if wanted and p.endswith(f".{wanted}.")]
    if len(known) == 1:
        return known[0]
    there = listed(map(shown_place, known or prefixes)) if prefixes else "none"
    raise UsageError(
        f"prefix {prefix!r}: {place} holds {len(known) or 'no'} networks there; its networks:"
        f" {there}.",
        "Give one of these names, or no prefix where there is only one network.",
    )


def _flattened(content: Mapping[Any, Any], place: str) -> tuple[dict[str, Any], list[str]]:
    """Return (full name -> entry, what to call the keys that are not text).

    Dictionaries are opened down to `MAX_DEPTH`. No network lies below a key that is not text:
    no name of a tensor begins so.
    """
    found: dict[str, Any] = {}
    odd: list[str] = []
    waiting = deque([("", content, 1)])
    while waiting:
        before, entries, depth = waiting.popleft()
        for key, value in entries.items():
            if not isinstance(key, str):
                odd.append(f"<{type(key).__name__}>")
            elif isinstance(value, dict) and depth < MAX_DEPTH:
                waiting.append((f"{before}{key}.", value, depth + 1))
            elif f"{before}{key}" in found:
                name = shown_place(f"{before}{key}")
                raise DataError(f"{place} holds two entries called {name}.", _SAVE_ALONE)
            else:
                found[f"{before}{key}"] = value
        if len(found) + len(odd) + len(waiting) > MAX_ENTRIES:
            raise DataError(f"{place} holds more than {MAX_ENTRIES:,} entries.", _SAVE_ALONE)
    return found, odd


def _prefixes(found: Mapping[str, Any], place: str) -> dict[str, _Naming]:
    """Return the places where a network begins, each "" or ending in a dot, and its naming."""
    prefixes: dict[str, _Naming] = {}
    for name, value in found.items():
        if len(_shape_of(value) or ()) not in (4, 5):
            continue
        for naming in _NAMINGS:
            before = name.removesuffix(naming.stem)
            if before == name or (before and not before.endswith(".")):
                continue
            if any(before + block in found for block in naming.first_block):
                prefixes.setdefault(before, naming)
    if len(prefixes) > MAX_NETWORKS:
        raise DataError(
            f"{place} holds {len(prefixes)} networks; expected at most {MAX_NETWORKS}.",
            _SAVE_ALONE,
        )
    return prefixes


def _is_under(name: str, prefix: str, prefixes: Mapping[str, _Naming]) -> bool:
    """Tell whether an entry lies below a prefix, and not in another network inside it."""
    inner = tuple(p for p in prefixes if p != prefix and p.startswith(prefix))
    return name.startswith(prefix) and not name.startswith(inner)


def _under(
    found: Mapping[str, Any], prefix: str, prefixes: Mapping[str, _Naming]
) -> dict[str, Any]:
    """Return the entries of one network by torch's names."""
    entries = {}
    for full_name, value in found.items():
        if _is_under(full_name, prefix, prefixes):
            part, dot, rest = full_name.removeprefix(prefix).partition(".")
            name = f"{prefixes[prefix].parts.get(part, part)}{dot}{rest}"
            entries[_OLD_DENSENET.sub(r"\1\2", name)] = value
    return entries


def _is_complete(found: Mapping[str, Any], prefix: str, prefixes: Mapping[str, _Naming]) -> bool:
    entries = _under(found, prefix, prefixes)
    return is_complete({name: _shape_of(value) or () for name, value in entries.items()})


def _without_aliases(
    found: Mapping[str, Any], candidates: list[str], prefixes: Mapping[str, _Naming]
) -> list[str]:
    """Keep one of several names for the same memory: a module that is an attribute of two others
    is saved twice."""
    kept: dict[str, dict[str, tuple[Any, ...]]] = {}
    for prefix in candidates:
        entries = _under(found, prefix, prefixes)
        memory = {name: _memory(value) for name, value in entries.items() if is_part(name)}
        if memory not in kept.values():
            kept[prefix] = memory
    return list(kept)


def _shape_of(value: Any) -> tuple[int, ...] | None:
    """Return the shape of a tensor; None for one without a single shape, and for other things."""
    import torch

    if not isinstance(value, torch.Tensor) or value.is_nested:
        return None
    return tuple(value.shape)


def _memory(value: Any) -> tuple[Any, ...]:
    """Return what a tensor shares with every other one over the same numbers, and no other does."""
    import torch

    if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta:
        return value.data_ptr(), value.shape, value.stride(), value.dtype
    return (id(value),)


def _others(found: Mapping[str, Any], prefix: str, prefixes: Mapping[str, _Naming]) -> list[str]:
    """Name the rest of a file; what lies under another of its keys goes by that key alone."""
    key = prefix.partition(".")[0]
    names = []
    for name in found:
        if not _is_under(name, prefix, prefixes):
            top = name.partition(".")[0]
            names.append(shown_place(name if top == key or not prefix else top))
    return names
