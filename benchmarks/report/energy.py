"""The energy that an NVIDIA GPU uses, where it tells; never needed."""

import contextlib
import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from statistics import mean

from benchmarks.harness import stopwatch_of

_PERIOD_MS = 50


def joules(run: Callable[[], None]) -> float | None:
    """Measure a run that takes a second or longer on the first GPU.

    It reads the counter of NVML (package nvidia-ml-py), or else samples the power that nvidia-smi
    tells.

    Returns:
        Joules; None if neither is there or the card does not tell.
    """
    import torch

    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    if importlib.util.find_spec("pynvml") is not None:
        found = _by_counter(run, uuid)
        if found is not None:
            return found
    return _by_samples(run, uuid) if shutil.which("nvidia-smi") else None


def _by_counter(run: Callable[[], None], uuid: str) -> float | None:
    import pynvml
    import torch

    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            card = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            torch.cuda.synchronize()
            before = pynvml.nvmlDeviceGetTotalEnergyConsumption(card)
            run()
            torch.cuda.synchronize()
            return (pynvml.nvmlDeviceGetTotalEnergyConsumption(card) - before) / 1e3
        finally:
            pynvml.nvmlShutdown()
    return None


def _by_samples(run: Callable[[], None], uuid: str) -> float | None:
    command = ["nvidia-smi", "-i", uuid, "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    sampler = subprocess.Popen(
        [*command, "-lms", str(_PERIOD_MS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        seconds = stopwatch_of("cuda")(run)
    finally:
        sampler.terminate()
        told, _ = sampler.communicate()
    watts = mean_watts(told)
    return None if watts is None else watts * seconds


def mean_watts(told: str) -> float | None:
    """Return the mean of the lines that are numbers; None without any.

    >>> mean_watts("[N/A]")
    >>> mean_watts("100.0\\n300.5\\n")
    200.25
    """
    watts = []
    for line in told.splitlines():
        with contextlib.suppress(ValueError):
            watts.append(float(line))
    return mean(watts) if watts else None
