"""The options of `ich train` that say what is trained and how; each is a setting of `RunConfig`.

`--download` and `--gpus` stand with them, because they belong to the weights and the device.
"""

from collections.abc import Callable
from typing import Any

import click

from ich_keras.cli.options import NAME_OR_PATH, numbers_of_labels

_OPTIONS = (
    click.option("--preset", help="Network; default resnet18_2d."),
    click.option(
        "--weights",
        type=NAME_OR_PATH,
        help="A .weights.h5 file, or converted weights by name (imagenet, torchvision_resnet18,"
        " ...); default: from scratch.",
    ),
    click.option("--download", is_flag=True, help="Download and convert the named weights first."),
    click.option("--norm", help="batch (default), frozen (needs weights) or group."),
    click.option(
        "--intensity",
        help="windows, bone-windows, wide, head-z-score, nnunet (measured on the training split) or"
        " hu; default: to suit the weights.",
    ),
    click.option(
        "--windows",
        help="linear or sigmoid: learn level and width of the three windows with the network;"
        " default: they stay as they are.",
    ),
    click.option(
        "--size", type=int, help="Rows and columns of the input; default 256, or the cache's."
    ),
    click.option(
        "--split",
        type=NAME_OR_PATH,
        help="patient (default), none, thesis-slices, thesis-series, or a file.",
    ),
    click.option(
        "--fold",
        metavar="K/N",
        help="Cross-validation by patient: test on part K of N, validate on the next. `ich folds`"
        " trains all and joins them.",
    ),
    click.option("--view", help="slice, stack, slab or series; default: to suit the preset."),
    click.option(
        "--slices",
        type=int,
        metavar="N",
        help="Slices in a stack (default 3), slab (5) or series (60).",
    ),
    click.option(
        "--edge",
        help="How stacks and slabs are filled beyond the ends of a series: air (default) or"
        " repeat.",
    ),
    click.option(
        "--long-series",
        help="Which slices of a longer series to use: spread (evenly spaced; default) or middle.",
    ),
    click.option(
        "--tilted",
        help="What to do with tilted stacks, slabs and series: keep (default), skip or deshear.",
    ),
    click.option(
        "--duplicate",
        help="Stacks, slabs and series with two slices at one place: skip (default) or keep.",
    ),
    click.option(
        "--reverse/--no-reverse",
        default=None,
        help="Turn every second stack, slab or series upside down in training.",
    ),
    click.option("--epochs", type=int, help="Default 6."),
    click.option(
        "--patience",
        type=int,
        metavar="N",
        help="Stop after N epochs without a lower validation log loss; default: train for all.",
    ),
    click.option(
        "--batch-size",
        type=int,
        help="Samples per batch, of all processes together; default 32 slices or stacks, 16 slabs"
        " or 1 series.",
    ),
    click.option(
        "--ema",
        type=float,
        metavar="DECAY",
        help="Judge and keep a moving average of the weights, such as 0.999; default: none.",
    ),
    click.option(
        "--swa",
        type=int,
        metavar="N",
        help="Judge and keep the average of the weights of the last N epochs; default: none.",
    ),
    click.option("--learning-rate", type=float, help="Default 1e-5 with --weights, 3e-4 without."),
    click.option(
        "--backbone-factor",
        type=float,
        metavar="X",
        help="The backbone's learning rate is X times --learning-rate; default 1.",
    ),
    click.option(
        "--freeze", help="Freeze everything up to stem, layer1, ... layer4; default: nothing."
    ),
    click.option("--schedule", help="constant (default) or cosine."),
    click.option(
        "--warmup-steps",
        type=int,
        help="Steps over which the learning rate rises from 0; default 0.",
    ),
    click.option("--weight-decay", type=float, help="Decoupled weight decay; default 0."),
    click.option(
        "--accumulate",
        type=int,
        metavar="N",
        help="Batches per optimiser step; default 8 for series, else 1.",
    ),
    click.option(
        "--precision",
        help="auto (default; bfloat16 on torch if the hardware supports it), float32, bfloat16 or"
        " float16.",
    ),
    click.option("--step", help="Training step: fast (default), or stock for Keras' own."),
    click.option(
        "--recompute",
        help="stage or block: less memory, but slower steps; default: recompute nothing.",
    ),
    click.option(
        "--compiled/--not-compiled", default=None, help="Use torch.compile; default: only on a GPU."
    ),
    click.option(
        "--gpus",
        type=click.IntRange(min=1),
        metavar="N",
        help="Train on N GPUs of this machine, a process each; with --device cpu in N processes.",
    ),
    click.option(
        "--batch-norm",
        help="With several processes: per-process (default; batch statistics of each one's"
        " samples) or synchronised (of all samples).",
    ),
    click.option("--loss", help="bce (default), rsna (any counted twice), focal or asymmetric."),
    click.option(
        "--positive-weight",
        multiple=True,
        metavar="LABEL=X",
        callback=numbers_of_labels,
        help="Count the loss of positive samples of this label X times; may be repeated.",
    ),
    click.option(
        "--label-weight",
        multiple=True,
        metavar="LABEL=X",
        callback=numbers_of_labels,
        help="Weight of a label in the loss, where others have 1; may be repeated.",
    ),
    click.option("--focal-gamma", type=float, help="Of --loss focal; default 2."),
    click.option(
        "--focal-alpha",
        type=float,
        help="Of --loss focal: weight of positive labels, 1 minus it of negative ones; default: 1"
        " for both.",
    ),
    click.option("--gamma-positive", type=float, help="Of --loss asymmetric; default 0."),
    click.option("--gamma-negative", type=float, help="Of --loss asymmetric; default 4."),
    click.option(
        "--margin",
        type=float,
        help="Of --loss asymmetric: negative labels up to this probability add nothing; default"
        " 0.05.",
    ),
    click.option(
        "--balance/--no-balance",
        default=None,
        help="Train on one negative sample per positive one.",
    ),
    click.option(
        "--augment",
        help="fast (default), thesis (by albumentations; slower), flip (left-right) or none.",
    ),
    click.option(
        "--hu-noise",
        type=float,
        metavar="SIGMA",
        help="Add normal noise of SIGMA HU to training slices; default: none.",
    ),
    click.option(
        "--window-jitter",
        type=float,
        metavar="LEVEL",
        help="Move the windows' levels by up to LEVEL HU in training, and change their widths by"
        " up to a tenth (--width-jitter); default: not.",
    ),
    click.option(
        "--width-jitter",
        type=float,
        metavar="SHARE",
        help="Change the windows' widths by up to SHARE in training; default 0.1 with"
        " --window-jitter, else not.",
    ),
    click.option(
        "--drop-slices",
        type=float,
        metavar="P",
        help="In training, leave out slices of stacks, slabs (never the middle one) and series with"
        " a chance of P; default: none.",
    ),
    click.option(
        "--mixup",
        type=float,
        metavar="ALPHA",
        help="Mix training images of 2D networks, and their labels, by Beta(ALPHA, ALPHA);"
        " default: not.",
    ),
    click.option(
        "--cutmix",
        type=float,
        metavar="ALPHA",
        help="Put boxes of other training images into those of 2D networks, and mix their labels;"
        " default: not.",
    ),
    click.option(
        "--skip-empty/--no-skip-empty",
        default=None,
        help="Leave slices without brain out of training (never out of evaluation).",
    ),
    click.option("--crop", help="head: cut the head out of each series; default: whole slices."),
    click.option(
        "--depth-mm",
        type=float,
        metavar="MM",
        help="Resample whole series to slices MM apart; default: as they are.",
    ),
    click.option(
        "--loader-workers",
        type=int,
        metavar="N",
        help="Processes that prepare batches; default 0. Their number does not change the batches.",
    ),
    click.option("--limit-series", type=int, metavar="N", help="Use the first N series only."),
    click.option("--seed", type=int, help="Default 0."),
)


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command these options, in the order of this file."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
