"""Reading a torch checkpoint or safetensors file without trusting it.

A `.pth` file is a pickle, and a pickle can run any code. It is read with torch's restricted reader
(`weights_only=True`) only. Every tensor is then checked: it must be dense, of a plain float type,
no larger than its stored bytes, and finite.
"""

import pickle
import re
import struct
import tarfile
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard

import numpy as np

from ich_keras.errors import DataError, UsageError
from ich_keras.files import sha256_of
from ich_keras.models.weights import listed
from weights_convert.mapping import COUNTER
from weights_convert.wrapping import find_network, shown_place

if TYPE_CHECKING:
    import torch

MAX_BYTES = 4 * 2**30  # the largest published file has 0.2 GiB
MAX_AXES = 5
WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIX = "module."  # added by torch's DataParallel
_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")
_FORBIDDEN = re.compile(r"GLOBAL (\S+) (?:was not an allowed global|whose module \S+ is blocked)")
_HTML = (b"<!doctype", b"<html", b"<?xml")
_TAR_MAGIC = slice(257, 262)
_DOWNLOAD_AGAIN = "The file is incomplete or damaged: delete it and fetch it again."
_SAVE_STATE_DICT = "Save model.state_dict() instead of the model, and pass that file."
_SAVE_PLAIN = (
    "If you trust its origin, load it with torch and save plain tensors:"
    " {name: tensor.contiguous().float().clone() for name, tensor in state.items()}."
)
_NO_NETWORK = (
    "It holds no ResNet: expected a state dict with torchvision's or MedicalNet's names, whole,"
    " under one common prefix or key of any name."
)
_BROKEN_WEIGHTS = "These are not trained weights: save another checkpoint."
# Raised on damaged files by torch and by the readers of the formats.
_READ_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    EOFError,
    OSError,
    ImportError,
    struct.error,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    Args:
        path: the file.
        sha256: SHA-256 of the file, 64 hexadecimal digits.
        kind: "zip" or "legacy" (torch's two formats), or "safetensors".
        tensors: torch's name, without what comes before -> float32 array with torch's axes,
            finite. Batch counters (int64) are left out.
        ignored: the rest of the file: what is no weight (epoch, optimiser, batch counters), and
            what belongs to other networks.
        prefix: what came before the names: keys of the file and names of outer modules.
    """

    path: Path
    sha256: str
    kind: str
    tensors: dict[str, np.ndarray]
    ignored: tuple[str, ...]
    prefix: str = ""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: array.shape for name, array in self.tensors.items()}


def read_checkpoint(path: Path | str, prefix: str | None = None) -> Checkpoint:
    """Read the weights in a checkpoint.

    Args:
        path: `.pth` or `.pt` in torch's zip or legacy format, or `.safetensors`. The format is
            recognised by content, not by file name. The file must hold a state dict, in which the
            names of a ResNet may have any common beginning (`module.`, `backbone.`), and which may
            lie under keys of any name ({"state_dict": ...}). Without a ResNet in it all tensors
            are read, which `structure_of` then refuses.
        prefix: which network is meant, where the file holds several: the keys and the beginning of
            the names, joined by dots ("state_dict.teacher"), or the end of that.

    Raises:
        UsageError: the file does not exist, or is a folder; or no network has that prefix.
        DataError: the file is damaged, is not a checkpoint, would run code, holds several networks,
            or a tensor that is not dense, not float, not finite or larger than its bytes.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; expected a checkpoint file.", "Give the file in it.")
    if not path.is_file():
        raise UsageError(f"the checkpoint {path} does not exist.", "Is the name right?")
    kind = _kind(path)
    content = _load_safetensors(path) if kind == "safetensors" else _load_torch(path, kind)
    if not isinstance(content, dict):
        raise DataError(
            f"{path} holds a {type(content).__name__}; expected a state dict.", _SAVE_STATE_DICT
        )
    network = find_network(content, str(path), prefix)
    if network is None:
        state, ignored = _state_dict(path, content)
    else:
        state, ignored = network.entries, network.others
        _require_names(path, state)
    counters = [name for name in state if name.endswith(COUNTER)]
    weights = {name: value for name, value in state.items() if name not in counters}
    if not weights:
        raise DataError(f"{path} holds no weights.", "Expected a state dict of tensors.")
    hint = _SAVE_PLAIN if network else _NO_NETWORK
    claimed = sum(_require_plain(path, name, value, hint) for name, value in weights.items())
    size = path.stat().st_size
    if claimed > size:
        # Many names share one storage, or a legacy file does not fill its storages.
        raise DataError(f"{path} has {size:,} bytes, its tensors claim {claimed:,}; refused.", hint)
    tensors = {name: _array(path, name, value) for name, value in weights.items()}
    place = shown_place(network.prefix) if network and network.prefix else ""
    return Checkpoint(path, sha256_of(path), kind, tensors, (*ignored, *counters), place)


def _kind(path: Path) -> str:
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path} is empty.", _DOWNLOAD_AGAIN)
    if size > MAX_BYTES:
        raise DataError(
            f"{path} has {size:,} bytes; expected at most {MAX_BYTES:,}.",
            "Save the network's state dict alone, without the optimiser.",
        )
    with open(path, "rb") as stream:
        head = stream.read(512)
    if head.lstrip().lower().startswith(_HTML):
        raise DataError(
            f"{path} is a web page, not a checkpoint.",
            "The server asked for a login or a confirmation: download the file in a browser.",
        )
    if head.startswith(b"\x89HDF"):
        raise DataError(
            f"{path} is an HDF5 file, not a torch checkpoint.",
            "A .weights.h5 file needs no conversion: give it to --weights of `ich-train`.",
        )
    if head.startswith(b"PK"):
        _require_plain_zip(path, size)
        return "zip"
    if head[_TAR_MAGIC] == b"ustar":
        raise DataError(
            f"{path} is in torch's tar format (before version 0.4), which cannot be read safely.",
            "If you trust it, load it with torch on an isolated machine and save its state dict"
            " again.",
        )
    # Before torch's own: the length that comes first may begin with the byte of a pickle.
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= size - 8:
        return "safetensors"
    if head[:1] == b"\x80":
        return "legacy"
    raise DataError(
        f"{path} is not a checkpoint: it begins with {head[:8]!r}.",
        "Expected torch's zip or legacy format, or safetensors.",
    )


def _require_plain_zip(path: Path, size: int) -> None:
    """Refuse an archive that torch did not write, or whose bits have changed."""
    try:
        with zipfile.ZipFile(path) as archive:
            _require_members(path, size, archive.infolist())
            # torch does not notice when the bits of a stored tensor have changed.
            damaged = archive.testzip()
    except _READ_ERRORS as error:
        raise DataError(
            f"{path} is a damaged zip archive: {_printable(str(error))}.",
            _DOWNLOAD_AGAIN,
        ) from error
    if damaged is not None:
        raise DataError(
            f"{path}: {_printable(damaged)} does not match its checksum in the archive.",
            _DOWNLOAD_AGAIN,
        )


def _require_members(path: Path, size: int, members: list[zipfile.ZipInfo]) -> None:
    names = [member.filename for member in members]
    if "model.weights.h5" in names or "config.json" in names:
        raise DataError(
            f"{path} is a .keras file, not a torch checkpoint.",
            "Load it with keras.saving.load_model.",
        )
    if any(name.endswith("constants.pkl") or "/code/" in name for name in names):
        raise DataError(f"{path} is a TorchScript program, not a state dict.", _SAVE_STATE_DICT)
    if not any(name.endswith("data.pkl") for name in names):
        raise DataError(
            f"{path} is a zip archive without data.pkl, not a torch checkpoint.",
            "If the checkpoint lies in it, unpack it first.",
        )
    # torch stores the members uncompressed: a compressed one may be a zip bomb.
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or (
        sum(member.file_size for member in members) > size
    ):
        raise DataError(
            f"{path} unpacks to more than its size; refused.",
            "torch.save packs nothing: if you trust its origin, load it with torch and save it"
            " again.",
        )


def _load_torch(path: Path, kind: str) -> Any:
    import torch

    try:
        # A stream, because torch goes by the suffix of a path.
        with warnings.catch_warnings(), open(path, "rb") as stream:
            # torch warns of layouts (sparse, quantized) that are refused below anyway.
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", FutureWarning)
            return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        _refuse_pickle(path, str(error), error)
    except (*_READ_ERRORS, tarfile.TarError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(
            f"{path} is damaged (torch's {kind} format): {_printable(reason)}",
            _DOWNLOAD_AGAIN,
        ) from error


def _refuse_pickle(path: Path, text: str, error: Exception) -> NoReturn:
    forbidden = _FORBIDDEN.search(text)
    if forbidden is None:
        # Quote torch's reason only, without its advice to lift the restriction.
        paragraphs = text.removeprefix("Weights only load failed. ").split("\n\n")
        reason = paragraphs[min(1, len(paragraphs) - 1)].strip().partition("\n")[0].rstrip(".")
        raise DataError(
            f"{path} cannot be read as weights: {_printable(reason)}.",
            "Expected a state dict of tensors; nothing in the file was run.",
        ) from error
    name = _printable(forbidden[1])
    if ".nn." in name or name.startswith(("torchvision.", "monai.", "models.", "__main__.")):
        raise DataError(
            f"{path} holds a whole pickled model ({name}), not its weights; nothing was run.",
            _SAVE_STATE_DICT,
        ) from error
    raise DataError(
        f"{path} asks to run {name} when it is read; refused, nothing was run.",
        "If you trust its origin, save model.state_dict() alone and pass that file. If you do not,"
        " do not open it with torch.load either.",
    ) from error


def _printable(text: str) -> str:
    """Make text from a file safe to print on one line of a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:200])


def _load_safetensors(path: Path) -> dict[str, "torch.Tensor"]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except (SafetensorError, *_READ_ERRORS) as error:
        raise DataError(
            f"{path} is a damaged safetensors file: {_printable(str(error))}", _DOWNLOAD_AGAIN
        ) from error


def _state_dict(path: Path, content: dict[Any, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the state dict of a file without a ResNet, and what lies beside it."""
    ignored: tuple[str, ...] = ()
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), dict):
            ignored = tuple(_shown(key) for key in content if key != wrapper)
            content = content[wrapper]
            break
    _require_names(path, content)
    prefixed = [key for key in content if key.startswith(PREFIX)]
    if prefixed and len(prefixed) != len(content):
        bare = [key for key in content if key not in prefixed]
        raise DataError(
            f"{path}: some names begin with {PREFIX!r} and some do not: {listed(bare)}.",
            _NO_NETWORK,
        )
    return {key.removeprefix(PREFIX): value for key, value in content.items()}, ignored


def _require_names(path: Path, state: dict[Any, Any]) -> None:
    odd = [key for key in state if not _is_name(key)]
    if odd:
        raise DataError(f"{path}: {_shown(odd[0])} is not the name of a tensor.", _SAVE_STATE_DICT)


def _is_name(key: object) -> TypeGuard[str]:
    return isinstance(key, str) and bool(_NAME.fullmatch(key.removeprefix(PREFIX)))


def _shown(key: object) -> str:
    """Show a key of any type in a short text without control characters."""
    if _is_name(key):
        return key
    return f"{key!r:.100}" if isinstance(key, str) else f"<{type(key).__name__}>"


def _require_plain(path: Path, name: str, tensor: object, hint: str) -> int:
    """Refuse a tensor that is not plain or larger than its storage; return its bytes.

    Many tensors may be parts of one storage, as long as all of them claim no more than the file
    holds, which the caller sums up.
    """
    import torch

    place = f"{path}: {name}"
    if not isinstance(tensor, torch.Tensor):
        raise DataError(f"{place} is a {type(tensor).__name__}; expected a tensor.", hint)
    if tensor.is_nested or tensor.is_neg():
        raise DataError(f"{place} is not a dense tensor with data (nested or negated).", hint)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        kind = "quantized" if tensor.is_quantized else f"{tensor.layout}, {tensor.device.type}"
        raise DataError(f"{place} is not a dense tensor with data ({kind}).", hint)
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise DataError(
            f"{place} is {tensor.dtype}; expected float16, bfloat16, float32 or float64.", hint
        )
    if tensor.ndim > MAX_AXES:
        raise DataError(f"{place} has {tensor.ndim} axes; expected at most {MAX_AXES}.", hint)
    claimed, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if claimed > held or any(
        stride == 0 and length > 1
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        # With stride 0, 1.5 KB can claim gigabytes.
        raise DataError(
            f"{place} claims {claimed:,} bytes and its storage holds {held:,}; refused.", hint
        )
    return claimed


def _array(path: Path, name: str, tensor: "torch.Tensor") -> np.ndarray:
    import torch

    place = f"{path}: {name}"
    if not torch.isfinite(tensor).all():
        raise DataError(f"{place} holds values that are not finite.", _BROKEN_WEIGHTS)
    array = tensor.detach().to(torch.float32).contiguous().numpy().copy()
    if name.endswith("running_var") and array.min(initial=0) < 0:
        raise DataError(
            f"{place} is a variance and holds {array.min():.3g}; expected 0 or more.",
            _BROKEN_WEIGHTS,
        )
    if tensor.dtype == torch.float64 and not torch.equal(
        tensor.detach(), torch.from_numpy(array).double()
    ):
        raise DataError(
            f"{place} is float64 and would be rounded.",
            "Convert it first: state = {name: tensor.float() for name, tensor in state.items()}.",
        )
    return array
