"""`ich train` in several processes: what is asked before they start, and what the others do."""

import os
from pathlib import Path
from typing import Any

from ich_keras.cli.configuration import run_config
from ich_keras.errors import EnvironmentProblem, UsageError
from ich_keras.labels import LabelSource
from ich_keras.ranks import Rank, this_rank


def follow(labels: LabelSource | None, device: str) -> None:
    """Train as one of the other processes, once the first has said on what."""
    from ich_keras.config import RunConfig
    from ich_keras.models.torch.distributed import join
    from ich_keras.training import train
    from ich_keras.workflow import open_cache

    start = join(this_rank(), device).wait_for_start()
    train(RunConfig.from_dict(start["config"]), open_cache(start["cache"], labels), start["out"])


def require_data(is_plan: bool, is_demo: bool) -> None:
    """Refuse several processes where one does the work.

    Raises:
        UsageError: `--plan` or the demo was asked for.
    """
    for is_asked, what in ((is_plan, "--plan"), (is_demo, "the demo")):
        if is_asked:
            raise UsageError(
                f"{what} runs in one process.",
                "Leave out --gpus and torchrun, or train on data: --dicom or --cache.",
            )


def require_more_alone(rank: Rank, gpus: int | None, resume: Path | None) -> None:
    """Refuse `--more-epochs` without a run, and in several processes.

    Raises:
        UsageError: one of the two.
    """
    if resume is None:
        raise UsageError(
            "--more-epochs given without --resume.",
            "Name the finished run: --resume RUN --more-epochs N --out NEW.",
        )
    if not rank.is_alone or (gpus or 1) > 1:
        raise UsageError(
            "--more-epochs begins in one process.",
            "In Python, ich_keras.extension.extend(RUN, NEW, N) makes the new run; then: ich-train"
            " --resume NEW --gpus N.",
        )


def asked_device(
    rank: Rank, config_file: Path | None, resume: Path | None, options: dict[str, Any]
) -> str:
    """Choose the backend that was asked for, and return the device, which may be "auto"."""
    from ich_keras.distribution import require_torch
    from ich_keras.environment import choose_backend
    from ich_keras.run_folder import RunFolder

    if resume is not None:
        recipe = RunFolder(resume).require_interrupted().recipe()
        device = options["device"] or recipe.device
        backend: str | None = recipe.backend
    else:
        config, _ = run_config(config_file, options)
        backend, device = config.backend, config.device
    require_torch(backend, rank)
    require_torch(choose_backend(backend), rank)
    return device


def require_gpus(count: int, device: str) -> None:
    """Refuse more processes than GPUs, unless the processor was asked for.

    Raises:
        UsageError, EnvironmentProblem: as `choose_device`; or there are fewer GPUs.
    """
    from ich_keras.environment import TORCH_DEVICE, choose_device

    if device == "cpu" or os.environ.get(TORCH_DEVICE, "").startswith("cpu"):
        return
    import torch

    found = torch.cuda.device_count() if choose_device(device) == "cuda" else 0
    if count > found:
        raise EnvironmentProblem(
            f"--gpus {count}: torch finds {found}.",
            f"Use --gpus {found}, or --device cpu for {count} processes on the processor."
            if found > 1
            else f"Leave it out, or use --device cpu for {count} processes on the processor.",
        )
