"""`ich train`, also installed as `ich-train`: training, resuming and the demo."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ich_keras.cli.configuration import names_of, run_config, split_option
from ich_keras.cli.options import (
    ANY_BODY_PART,
    ANY_IMAGE_TYPE,
    BACKEND,
    DICOM,
    FOLDER,
    HELP,
    LABELS,
    MAX_REJECTS,
    WORKERS,
    num_workers,
    required,
    share_of_rejects,
)
from ich_keras.cli.ranks import asked_device, follow, require_data, require_gpus, require_more_alone
from ich_keras.cli.resuming import how_to_resume, resume_training
from ich_keras.cli.sequence import (
    END_TO_END,
    FEATURES,
    JOINT_EPOCHS,
    JOINT_RATE,
    LEARN_FROM,
    is_head,
    train_head,
)
from ich_keras.cli.training_options import training_options
from ich_keras.errors import UsageError
from ich_keras.labels import LabelSource
from ich_keras.launching import run_ranks
from ich_keras.ranks import Rank, this_rank
from ich_keras.tensorboard_log import require_tensorboard, tensorboard_callback
from ich_keras.terminal import (
    ARGUMENTS,
    TRAIN,
    Command,
    Terminal,
    catch_termination,
    open_terminal,
    terminal_width,
)

if TYPE_CHECKING:
    from ich_keras.config import RunConfig
    from ich_keras.workflow import Preparation


@click.command(cls=Command, name=TRAIN, context_settings=HELP)
@DICOM
@LABELS
@click.option(
    "--cache",
    "cache_dir",
    type=FOLDER,
    metavar="DIR",
    help="The cache: used if it exists, else built from --dicom. Default: RUN-cache.",
)
@click.option("--out", type=FOLDER, metavar="RUN", help="New run folder; default: runs/DATE-TIME.")
@click.option("--config", "config_file", type=FOLDER, metavar="JSON", help="A run's config.json.")
@training_options
@FEATURES
@LEARN_FROM
@END_TO_END
@JOINT_EPOCHS
@JOINT_RATE
@click.option(
    "--resume",
    type=FOLDER,
    metavar="RUN",
    help="Resume an interrupted training; takes --cache, --labels, --device and --gpus only.",
)
@click.option(
    "--more-epochs",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --resume, train a finished run for N more epochs, as the new run --out.",
)
@click.option(
    "--tensorboard",
    type=FOLDER,
    metavar="DIR",
    help="Write each epoch's losses and AUROC of `any` (or the first label) for TensorBoard.",
)
@ANY_BODY_PART
@ANY_IMAGE_TYPE
@BACKEND
@click.option("--device", help="auto (default), cpu or cuda; cuda fails without a usable GPU.")
@MAX_REJECTS
@WORKERS
@click.option(
    "--plan",
    is_flag=True,
    help="Show what training would do and how long it would take; write nothing.",
)
@click.option(
    "--demo-plan",
    metavar="NAME",
    help="For the demo: full or light; default: to suit the hardware.",
)
def train_main(
    dicom: Path | None,
    labels: LabelSource | None,
    cache_dir: Path | None,
    out: Path | None,
    config_file: Path | None,
    max_rejects: float | None,
    workers: int | None,
    plan: bool,
    demo_plan: str | None,
    download: bool,
    resume: Path | None,
    more_epochs: int | None,
    tensorboard: Path | None,
    any_body_part: bool,
    any_image_type: bool,
    gpus: int | None,
    features: Path | None,
    learn_from: str | None,
    end_to_end: bool,
    joint_epochs: int | None,
    joint_rate: float | None,
    **options: Any,
) -> None:
    """Train a classifier, keep its best weights and evaluate them.

    Give --dicom and --labels to train on your data, or --cache to train on a cache. Without either,
    the demo runs on synthetic head CT; it takes about four minutes on two cores.

    Not a medical device; not for clinical use.
    """
    catch_termination()
    rank = this_rank()
    options["split"] = split_option(options["split"], options.pop("fold"))
    if more_epochs is not None:
        require_more_alone(rank, gpus, resume)
    if tensorboard is not None:
        require_tensorboard(tensorboard)
    if gpus is not None and rank.is_alone and gpus > 1:
        require_data(plan, resume is None and dicom is None and cache_dir is None)
        device = asked_device(Rank(of=gpus), config_file, resume, options)
        require_gpus(gpus, device)
        ctx = click.get_current_context()
        ctx.exit(run_ranks(gpus, _train_as_rank, ctx.meta[ARGUMENTS]))
    if gpus not in (None, rank.of):
        raise UsageError(
            f"--gpus {gpus} in one of {rank.of} processes that were started already.",
            "Leave --gpus out: torchrun decides.",
        )
    if not rank.is_alone:
        require_data(plan, resume is None and dicom is None and cache_dir is None)
    joint = {"end_to_end": end_to_end, "joint_epochs": joint_epochs, "joint_rate": joint_rate}
    of_heads = {"learn_from": learn_from, **joint, "end_to_end": end_to_end or None}
    if features is None and (given := names_of(of_heads)):
        raise UsageError(f"{given} is for sequence heads.", "Add --features, or leave it out.")
    others: dict[str, Any] = {
        "config": config_file,
        "download": download or None,
        "any_body_part": any_body_part or None,
        "any_image_type": any_image_type or None,
        "demo_plan": demo_plan,
        "max_rejects": max_rejects,
    }
    if features is not None or is_head(options["preset"]):
        others |= {"dicom": dicom, "resume": resume, "plan": plan or None, "gpus": gpus}
        others |= {"tensorboard": tensorboard, "more_epochs": more_epochs, "workers": workers}
        train_head(features, learn_from, joint, cache_dir, labels, out, options, others)
        return
    if resume is not None:
        device = options.pop("device")
        others |= {"dicom": dicom, "workers": workers, "plan": plan or None}
        others |= {"out": out} if more_epochs is None else {}
        more = None if more_epochs is None else (more_epochs, required(out, "--out"))
        resume_training(resume, cache_dir, labels, device, options | others, more, tensorboard)
        return
    config, reset = run_config(config_file, options)
    out = out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    if dicom is None and cache_dir is None:
        if plan:
            raise UsageError(
                "--plan needs --dicom or --cache.", "The demo takes about four minutes."
            )
        del others["demo_plan"]
        _refuse_without_data(options | others | {"labels": labels, "tensorboard": tensorboard})
        _demo(out, config, demo_plan, num_workers(workers))
        return
    if demo_plan is not None:
        raise UsageError("--demo-plan given with data.", "It is only for the demo: leave it out.")
    of_files = {name: others[name] for name in ("any_body_part", "any_image_type", "max_rejects")}
    if dicom is None and (given := names_of(of_files)):
        raise UsageError(
            f"{given} given without --dicom.", "A cache is used as it is: leave it out."
        )
    _train(
        config,
        out,
        dicom,
        labels,
        cache_dir,
        takes_cache_size=options["size"] is None and config_file is None,
        workers=num_workers(workers),
        is_plan=plan,
        downloads=download,
        note=reset and f"The file is for another view, so these keep their defaults: {reset}.",
        any_body_part=any_body_part,
        any_image_type=any_image_type,
        max_rejects=share_of_rejects(max_rejects),
        tensorboard=tensorboard,
    )


def _train(
    config: "RunConfig",
    out: Path,
    dicom: Path | None,
    labels: LabelSource | None,
    cache_dir: Path | None,
    takes_cache_size: bool,
    workers: int,
    is_plan: bool,
    downloads: bool,
    note: str,
    any_body_part: bool,
    any_image_type: bool,
    max_rejects: float,
    tensorboard: Path | None,
) -> None:
    """Train on data, or with --plan show what that would do."""
    from ich_keras.distribution import require_torch
    from ich_keras.environment import choose_backend, choose_device
    from ich_keras.planning import plan_lines
    from ich_keras.summary import run_summary
    from ich_keras.workflow import prepare_training

    rank = this_rank()
    require_torch(config.backend, rank)
    backend, device = choose_backend(config.backend), choose_device(config.device)
    require_torch(backend, rank)
    with open_terminal(is_silent=not rank.is_first) as terminal:
        if not rank.is_first:
            follow(labels, device)
            return
        if not rank.is_alone:
            from ich_keras.models.torch.distributed import join

            join(rank, device)  # now: the others wait while the cache is built
        terminal.tell(f"Backend {backend}, device {device}.")
        if note:
            terminal.tell(note)
        if downloads:
            # The only import of weights_convert, and only on request.
            from weights_convert.fetching import ensure_weights

            ensure_weights(required(config.weights, "--weights"), config.preset, terminal.progress)
        preparation = prepare_training(
            config,
            out,
            dicom,
            labels,
            cache_dir,
            takes_cache_size=takes_cache_size,
            workers=workers,
            progress=terminal.progress,
            tell=terminal.tell,
            any_body_part=any_body_part,
            any_image_type=any_image_type,
            max_rejects=max_rejects,
        )
        for line in plan_lines(preparation.plan, preparation.recipe):
            terminal.tell(line)
        if preparation.plan.warning:
            terminal.warn(f"Warning: {preparation.plan.warning}")
        if is_plan:
            _show_costs(preparation, terminal)
            return
        with how_to_resume(out, labels, terminal):
            log = None if tensorboard is None else tensorboard_callback(tensorboard)
            preparation.train(None, workers, terminal.progress, terminal.tell, log)
        terminal.tell(run_summary(out, terminal_width()))


def _train_as_rank(arguments: list[str]) -> int:
    """Run the command again, in a process that `run_ranks` started; return its exit code."""
    try:
        train_main.main(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def _show_costs(preparation: "Preparation", terminal: Terminal) -> None:
    from ich_keras.step_time import seconds_per_step

    if preparation.cache is None:
        terminal.tell(f"  cache to build: {preparation.cache_bytes / 2**30:.2f} GiB")
    seconds = seconds_per_step(preparation.recipe) * preparation.plan.total_steps
    terminal.tell(
        f"  about {seconds / 60:.0f} minutes of training steps here (one step measured;"
        " reading, augmentation and validation come on top)"
    )
    terminal.tell("Nothing was written.")


def _demo(out: Path, config: "RunConfig", plan: str | None, workers: int) -> None:
    from ich_keras.demo import run_demo
    from ich_keras.environment import choose_backend

    choose_backend(config.backend)
    began = time.monotonic()
    with open_terminal() as terminal:
        result = run_demo(
            out,
            seed=config.seed,
            plan=plan,
            device=config.device,
            workers=workers,
            progress=terminal.progress,
            tell=terminal.tell,
        )
        seconds = time.monotonic() - began
        terminal.tell(f"Run folder: {result.run_dir}  ({seconds:.0f} s)")


_DEMO_OPTIONS = ("seed", "backend", "device")


def _refuse_without_data(options: dict[str, Any]) -> None:
    given = names_of(options, but=_DEMO_OPTIONS)
    if given:
        raise UsageError(
            f"{given} given, but no data.",
            "Add --dicom DIR or --cache DIR; without data only the demo runs, which takes"
            " --out, --seed, --backend, --device, --workers and --demo-plan.",
        )


if __name__ == "__main__":
    train_main()
