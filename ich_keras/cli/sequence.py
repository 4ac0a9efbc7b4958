"""Sequence heads: the command that computes features, and `ich-train --features`."""

import time
from pathlib import Path
from typing import Any

import click

from ich_keras.cli.configuration import names_of
from ich_keras.cli.options import BACKEND, DEVICE, FOLDER, RUN, required
from ich_keras.errors import UsageError
from ich_keras.labels import LabelSource
from ich_keras.terminal import Command, open_terminal, terminal_width

# `sequence_gru`, ...: the kinds of `ich_keras.models.sequence`, which a test compares: it imports
# Keras, which would slow down `--help`.
PREFIX = "sequence_"
KINDS = ("gru", "lstm", "conv", "transformer", "attention")
FEATURES = click.option(
    "--features",
    type=FOLDER,
    metavar="FILE",
    help="From `ich features`: train a sequence head on them, --preset "
    + ", ".join(f"{PREFIX}{kind}" for kind in KINDS)
    + ". RUN then answers with both networks.",
)
LEARN_FROM = click.option(
    "--learn-from",
    type=click.Choice(["both", "slices", "series"]),
    help="With --features: the labels that the head learns from; default: both.",
)
END_TO_END = click.option(
    "--end-to-end",
    is_flag=True,
    help="With --features: then train head and slice network together, on whole series (torch).",
)
JOINT_EPOCHS = click.option(
    "--joint-epochs",
    type=int,
    metavar="N",
    help="Of --end-to-end: epochs of both together; default 3.",
)
JOINT_RATE = click.option(
    "--joint-rate",
    type=float,
    metavar="X",
    help="Of --end-to-end: the head's learning rate, default 1e-4; the slice network's is"
    " --backbone-factor times it, default 0.1.",
)
# Options of a training that are a head's, too.
_SETTINGS = ("epochs", "batch_size", "learning_rate", "weight_decay", "seed")


def is_head(preset: str | None) -> bool:
    """Return whether a preset is a sequence head."""
    return preset is not None and preset.startswith(PREFIX)


def train_head(
    features: Path | None,
    learn_from: str | None,
    joint: dict[str, Any],
    cache_dir: Path | None,
    labels: LabelSource | None,
    out: Path | None,
    options: dict[str, Any],
    others: dict[str, Any],
) -> None:
    """Train a sequence head, as `ich-train --preset sequence_gru --features FILE` asks.

    Args:
        features, learn_from, cache_dir, labels, out: as given.
        joint: end_to_end, joint_epochs and joint_rate, as given.
        options: those of the training and of the device.
        others: further ones, none of which a head takes.

    Raises:
        UsageError: an option lacks, is unknown, or is not for heads.
    """
    preset = options.pop("preset")
    path = required(features, f"--features, which --preset {preset} needs,")
    if preset is None or not is_head(preset):
        raise UsageError(
            f"--features given with --preset {preset}."
            if preset
            else "--features given without --preset.",
            f"Name a sequence head: {', '.join(PREFIX + kind for kind in KINDS)}.",
        )
    kind = preset.removeprefix(PREFIX)
    if kind not in KINDS:
        known = ", ".join(PREFIX + one for one in KINDS)
        raise UsageError(f"no sequence head is called {preset!r}.", f"Known: {known}.")
    backend, device = options.pop("backend"), options.pop("device")
    settings = {name: options.pop(name) for name in _SETTINGS}
    is_joint = joint.pop("end_to_end")
    if is_joint:
        joint["backbone_factor"] = options.pop("backbone_factor")
    elif lost := names_of(joint):
        raise UsageError(f"{lost} given without --end-to-end.", "Add it, or leave this out.")
    given = names_of(options | others)
    if given:
        raise UsageError(
            f"{given} given with --features: a head takes none of it.",
            "Leave it out; "
            + ", ".join("--" + name.replace("_", "-") for name in _SETTINGS)
            + " are for heads, too.",
        )
    from ich_keras.environment import choose_backend

    choose_backend(backend)
    from ich_keras.context_fitting import ContextConfig
    from ich_keras.context_training import train_context
    from ich_keras.end_to_end import JointConfig
    from ich_keras.summary import run_summary
    from ich_keras.workflow import open_cache

    settings |= {"kind": kind, "learn_from": learn_from}
    config = ContextConfig(**{name: one for name, one in settings.items() if one is not None})
    names = {"joint_epochs": "epochs", "joint_rate": "learning_rate"}
    of_both = {names.get(name, name): one for name, one in joint.items() if one is not None}
    out = out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    cache = open_cache(required(cache_dir, "--cache"), labels)
    with open_terminal() as terminal:
        train_context(
            path,
            cache,
            out,
            config,
            device=device,
            progress=terminal.progress,
            tell=terminal.tell,
            joint=JointConfig(**of_both) if is_joint else None,
        )
        terminal.tell(run_summary(out, terminal_width()))


@click.command(cls=Command)
@RUN
@click.option(
    "--cache",
    "cache_dir",
    type=FOLDER,
    required=True,
    metavar="DIR",
    help="From `ich cache`; of the run's size, any patients.",
)
@click.option("--out", type=FOLDER, required=True, metavar="FILE", help="New file, .h5.")
@click.option("--half", is_flag=True, help="Keep features in float16, half the space.")
@BACKEND
@DEVICE
def features(
    run_dir: Path, cache_dir: Path, out: Path, half: bool, backend: str | None, device: str
) -> None:
    """Compute the features of every slice of a cache once, with the network of a run.

    A sequence head is trained on them. The same command resumes an interrupted one.
    """
    from ich_keras.environment import choose_backend

    choose_backend(backend)
    from ich_keras.data.cache.cache import CTCache
    from ich_keras.features import extract_features

    with open_terminal() as terminal:
        found = extract_features(
            run_dir, CTCache.open(cache_dir), out, half, device, terminal.progress
        )
    click.echo(f"Features: {found}; {found.path}")
