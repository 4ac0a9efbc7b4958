"""The environment of the code: backend, device, versions, decoders; and what `ich doctor` says."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

from ich_keras import __version__
from ich_keras.errors import EnvironmentProblem, UsageError
from ich_keras.keras_private import has_bfloat16_cpu, keras_device
from ich_keras.keras_settings import keras_settings, require_settings_file
from ich_keras.ranks import Rank, this_rank

BACKENDS = ("torch", "jax", "tensorflow")
DEVICES = ("auto", "cpu", "cuda")
TORCH_DEVICE = "KERAS_TORCH_DEVICE"  # Keras' own variable
CUDA_DEVICES = "CUDA_VISIBLE_DEVICES"
DEFAULT_BACKEND = "torch"
PROCESSES = "processes"  # entry of the record of a training by several
PACKAGES = (
    "keras",
    "torch",
    "jax",
    "tensorflow",
    "numpy",
    "pandas",
    "scikit-learn",
    "scipy",
    "h5py",
    "hdf5plugin",
    "nibabel",
    "pydicom",
    "albumentations",
    "opencv-python-headless",
    "safetensors",
)
# Optional packages, and what `doctor` adds when one is absent.
OPTIONAL = {
    "jax": "",
    "tensorflow": "",
    "hdf5plugin": " (only caches compressed with blosc2 need it:"
    " pip install 'ich_keras[compression]')",
    "nibabel": " (only NIfTI volumes need it: pip install 'ich_keras[nifti]')",
}


def loaded_backend() -> str | None:
    """Return the backend Keras is running on, or None while Keras is not imported."""
    if "keras" not in sys.modules:
        return None
    return sys.modules["keras"].config.backend()


def choose_backend(name: str | None = None) -> str:
    """Choose Keras' backend before Keras is imported.

    Args:
        name: "torch", "jax" or "tensorflow"; None keeps KERAS_BACKEND, or torch when it is unset.

    Returns:
        The backend in force.

    Raises:
        UsageError: the name is unknown, Keras already runs on another backend, or its keras.json
            keeps it from being imported.
        EnvironmentProblem: the backend is not installed.
    """
    usual = loaded_backend() or os.environ.get("KERAS_BACKEND") or DEFAULT_BACKEND
    wanted = usual if name is None else name
    if wanted not in BACKENDS:
        raise UsageError(f"backend {wanted!r}; expected one of {', '.join(BACKENDS)}.")
    current = loaded_backend()
    if current is not None and current != wanted:
        raise UsageError(
            f"Keras is already loaded with the backend {current}; {wanted} was asked for.",
            f"Set KERAS_BACKEND={wanted} before keras is imported.",
        )
    if importlib.util.find_spec(wanted) is None:
        raise EnvironmentProblem(
            f"the backend {wanted} is not installed.", f"pip install 'ich_keras[{wanted}]'"
        )
    os.environ["KERAS_BACKEND"] = wanted
    if current is None:
        require_settings_file()
    return wanted


def choose_device(name: str = "auto") -> str:
    """Choose where the network runs, before Keras is imported.

    Args:
        name: "cuda" requires a GPU; "auto" takes the device in KERAS_TORCH_DEVICE (on torch), or
            else the GPU if one is usable. With several GPUs the first is used;
            CUDA_VISIBLE_DEVICES decides which that is.

    Returns:
        "cpu" or "cuda".

    Raises:
        UsageError: the name, or that in KERAS_TORCH_DEVICE, is unknown, or Keras already runs on
            another device.
        EnvironmentProblem: "cuda" was requested but is not available; the message says why.
    """
    if name not in DEVICES:
        raise UsageError(f"device {name!r}; expected one of {', '.join(DEVICES)}.")
    backend = choose_backend()
    if name != "cpu" and backend == "torch":
        _take_own_gpu(this_rank())
    if loaded_backend() is not None:
        return _loaded_device(name, backend)
    device, _ = _wanted_device(name, backend)
    if backend == "torch":
        # Keras uses a GPU by itself when it sees one, but fails if the variable is empty.
        if device == "cpu" or TORCH_DEVICE in os.environ:
            os.environ[TORCH_DEVICE] = device
    elif device == "cpu":
        variable, value = {
            "jax": ("JAX_PLATFORMS", "cpu"),
            "tensorflow": (CUDA_DEVICES, "-1"),
        }[backend]
        os.environ[variable] = value
    return device


_has_own_gpu = False


def _take_own_gpu(rank: Rank) -> None:
    """Let a process that trains with others see its own GPU alone, as the first.

    Keras, torch and what measures memory then need not be told which one it is.

    Raises:
        EnvironmentProblem: there are fewer GPUs than processes on this machine, or Keras already
            sees them all.
    """
    global _has_own_gpu
    if rank.is_alone or _has_own_gpu:
        return
    import torch

    # Unless it has to, this does not open the GPUs, after which the variable is not read again.
    count = torch.cuda.device_count()
    visible = [name for name in os.environ.get(CUDA_DEVICES, "").split(",") if name.strip()]
    if count == 0 or len(visible) == 1:  # none, or given by whoever started the process
        return
    if rank.local >= count:
        raise EnvironmentProblem(
            f"process {rank.local} of this machine has no GPU: torch finds {count}.",
            f"Start at most {count} on this machine, or use --device cpu.",
        )
    if loaded_backend() is not None:
        raise EnvironmentProblem(
            f"Keras was imported before this process took its GPU, one of {count}.",
            f"Import keras later, or give each process its GPU in {CUDA_DEVICES}.",
        )
    os.environ[CUDA_DEVICES] = visible[rank.local] if visible else str(rank.local)
    _has_own_gpu = True


def _wanted_device(name: str, backend: str) -> tuple[str, str]:
    """Return the device, and for "cpu" the reason."""
    source = f"--device {name}"
    chosen = os.environ.get(TORCH_DEVICE, "") if backend == "torch" else ""
    if chosen and name in ("auto", chosen.partition(":")[0]):
        source = f"{TORCH_DEVICE}={chosen}"
        name = _kind(chosen, source, f"Unset {TORCH_DEVICE}.")
    if name == "cpu":
        return "cpu", source
    reason = why_no_cuda(backend)
    if name == "cuda" and reason:
        raise EnvironmentProblem(f"{source}: {reason}", "Use --device cpu.")
    return "cpu" if reason else "cuda", reason


def _kind(device: str, source: str, hint: str) -> str:
    """Return "cpu" or "cuda" for one of torch's device names.

    A second GPU is refused: memory is measured, and torch itself computes, on the first.
    """
    if device in ("cpu", "cpu:0", "cuda", "cuda:0"):
        return device.partition(":")[0]
    raise UsageError(
        f"{source}; expected cpu or cuda.",
        f"{hint} CUDA_VISIBLE_DEVICES chooses among several GPUs.",
    )


def _loaded_device(name: str, backend: str) -> str:
    if backend == "torch":
        found = keras_device()
        hint = f"Set {TORCH_DEVICE} before keras is imported."
        current = _kind(found, f"Keras runs on {found}", hint)
    else:
        current = "cuda" if not why_no_cuda(backend) else "cpu"
    if name in ("auto", current):
        return current
    reason = why_no_cuda(backend) if name == "cuda" else ""
    if reason:
        raise EnvironmentProblem(f"--device cuda: {reason}", "Use --device cpu or auto.")
    raise UsageError(
        f"Keras already runs on {current}; {name} was asked for.",
        "Choose the device before keras is imported.",
    )


def choose_precision(name: str = "auto", device: str = "cpu") -> str:
    """Choose the precision of a network on the current backend.

    Args:
        name: "float32", "bfloat16" or "float16"; "auto" takes bfloat16 on torch where the
            hardware supports it, otherwise float32.
        device: "cpu" or "cuda", from `choose_device`.
    """
    if name != "auto":
        return name
    return "bfloat16" if choose_backend() == "torch" and has_bfloat16(device) else "float32"


def has_bfloat16(device: str) -> bool:
    """Return whether this hardware has bfloat16 instructions that torch uses."""
    if device == "cuda":
        import torch

        return torch.cuda.is_bf16_supported(including_emulation=False)
    return has_bfloat16_cpu()


def why_no_cuda(backend: str) -> str:
    """Say why no CUDA device can be used; empty when one can."""
    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            return ""
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is a build without CUDA."
        return (
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no usable GPU:"
            " no device or no driver."
        )
    if backend == "jax":
        import jax

        if any(device.platform in ("gpu", "cuda") for device in jax.devices()):
            return ""
        return f"jax {jax.__version__} finds only {jax.devices()[0].platform} devices."
    import tensorflow

    if tensorflow.config.list_physical_devices("GPU"):
        return ""
    return f"tensorflow {tensorflow.__version__} finds no GPU."


def versions() -> dict[str, str | None]:
    """Return the installed version of every package in PACKAGES; None for absent ones."""
    found: dict[str, str | None] = {"ich_keras": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def environment_record(device: str) -> dict:
    """Return the record stored with every run: versions, backend, Keras' settings, machine."""
    return {
        "backend": choose_backend(),
        **keras_settings(),
        "device": device,
        "device_name": device_name(device),
        "processor": device_name("cpu"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "versions": versions(),
        PROCESSES: this_rank().of,
    }


# Compressed transfer syntaxes found in head CT (DICOM PS3.6, table A-1).
_SYNTAXES = (
    ("1.2.840.10008.1.2.5", "RLE Lossless"),
    ("1.2.840.10008.1.2.4.70", "JPEG Lossless"),
    ("1.2.840.10008.1.2.4.80", "JPEG-LS Lossless"),
    ("1.2.840.10008.1.2.4.90", "JPEG 2000 Lossless"),
    ("1.2.840.10008.1.2.4.201", "HTJ2K Lossless"),
)


def decoders() -> dict[str, bool]:
    """Return, for each compressed transfer syntax of head CT, whether it can be decoded here."""
    from pydicom.pixels import get_decoder

    return {label: get_decoder(uid).is_available for uid, label in _SYNTAXES}


def doctor(folder: Path | str = ".") -> list[tuple[str, bool, str]]:
    """Check the installation and the machine.

    Args:
        folder: where runs and caches would be written; its free disk space is reported.

    Returns:
        Rows of (what, whether it is fine, detail). A row that is not fine keeps the library from
        working; absent decoders and GPUs only show in the detail.
    """
    rows = []
    for package, version in versions().items():
        is_well = version is not None or package in OPTIONAL
        detail = version or f"not installed{OPTIONAL.get(package, '')}"
        rows.append((package, is_well, detail))
    try:
        backend = choose_backend()
        rows.append(("backend", True, backend))
    except (EnvironmentProblem, UsageError) as error:
        rows.append(("backend", False, str(error)))
    else:
        rows += _device_rows(backend)
    for label, available in decoders().items():
        detail = "yes" if available else "no: pip install 'ich_keras[codecs]'"
        rows.append((f"decoder {label}", True, detail))
    free = shutil.disk_usage(folder).free / 2**30
    rows.append(("free disk", free > 2, f"{free:.1f} GiB in {Path(folder).resolve()}"))
    rows.append(("cores", True, str(os.cpu_count())))
    return rows


def _device_rows(backend: str) -> list[tuple[str, bool, str]]:
    try:
        if loaded_backend() is None:
            device, reason = _wanted_device("auto", backend)
        else:
            device, reason = _loaded_device("auto", backend), "Keras runs there"
    except (EnvironmentProblem, UsageError) as error:
        return [("device", False, str(error))]
    return [
        ("device", True, f"cpu ({reason})" if device == "cpu" else device),
        ("precision", True, choose_precision("auto", device)),
    ]


def device_name(device: str) -> str:
    """Return the model name of the processor or GPU."""
    if device == "cuda":
        import torch

        # Perhaps only another backend can use the GPU.
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "GPU"
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
