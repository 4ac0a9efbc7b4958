"""The most memory that a training took: of its process, and of its GPU."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Linux: writing this number sets the high-water mark of the resident memory back to the present.
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"
_BYTES_PER_KB = 1024


@dataclass
class Peak:
    """The most memory taken, bytes; None where it is not known.

    Args:
        resident: of this process, with what it held before and with the libraries; without worker
            processes.
        device: of the GPU, by torch.
    """

    resident: int | None = None
    device: int | None = None

    def to_dict(self) -> dict[str, int | None]:
        """Return it ready for JSON."""
        return asdict(self)


@contextlib.contextmanager
def measured() -> Iterator[Peak]:
    """Measure the memory that the body takes; the yielded `Peak` is filled when the body ends.

    Resident memory is measured on Linux alone.
    """
    peak = Peak()
    is_reset = _reset_resident()
    cuda = _used_cuda()
    if cuda is not None:
        cuda.reset_peak_memory_stats()
    yield peak
    peak.resident = _most_resident() if is_reset else None
    cuda = _used_cuda()
    if cuda is not None:
        peak.device = int(cuda.max_memory_allocated())


def _reset_resident() -> bool:
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:  # another system, or a container that does not allow it
        return False
    return _STATUS.is_file()


def _most_resident() -> int | None:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) * _BYTES_PER_KB
    return None


def _used_cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
