"""Which runs each table of the thesis needs, and which runs answer each question. Declarations
only."""

from dataclasses import dataclass

from experiments.context_runs import HEADS, LABEL_HEADS
from experiments.runs import FRACTIONS
from experiments.slab_runs import KINETICS

TABLES = (1, 2, 3, 4)

TABLE_RUNS = {
    1: (
        *("2d", "2d-thesis", "2d-pretrained", "2d-pretrained-thesis", "2d-stand-in"),
        *("2d-stand-in-thesis", "2d-50-pretrained", "2d-50-pretrained-thesis"),
        *("2d-50-stand-in", "2d-50-stand-in-thesis"),
    ),
    2: ("2d-pretrained", "2d-pretrained-thesis", "2d-stand-in", "2d-stand-in-thesis"),
    3: tuple(
        f"series-medicalnet-{name}"
        for name in ("pretrained", "pretrained-thesis", "stand-in", "stand-in-thesis")
    ),
    4: tuple(
        f"slab-medicalnet-{name}"
        for name in ("pretrained", "pretrained-thesis", "stand-in", "stand-in-thesis")
    ),
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the runs are compared for.

    Args:
        title: the question.
        runs: keys of `RUNS`.
        pairs: (a, b): compared on the same test patients, a minus b.
        in_all: whether the command `all` answers it.
        only_shared: whether the two runs held out different samples, and are compared only on the
            samples that both held out.
        note: how the runs differ beyond the question (confounders).
    """

    title: str
    runs: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...] = ()
    in_all: bool = False
    only_shared: bool = False
    note: str = ""


_END_TO_END = "sequence-gru-end-to-end"
_SEQUENCES = tuple(f"sequence-{kind}" for kind in HEADS)
_LEARNT = tuple(
    f"sequence-{kind}{learnt}" for kind in LABEL_HEADS for learnt in ("-slices", "", "-series")
)

QUESTIONS = {
    "leak": Question(
        title="How much does splitting slices one by one flatter a model?",
        runs=("2d", "2d-leaky"),
        pairs=(("2d-leaky", "2d"),),
        in_all=True,
        only_shared=True,
    ),
    "views": Question(
        title="Slice, slab or series, at equal patients and at equal operations?",
        runs=("2d", "slab", "series", "2d-operations", "series-operations"),
        pairs=(
            *(("slab", "2d"), ("series", "2d"), ("series", "slab")),
            *(("slab", "2d-operations"), ("series-operations", "2d-operations")),
            ("series-operations", "slab"),
        ),
        in_all=True,
        note=(
            "`2d`, `slab` and `series` have the epochs and learning rate of their view."
            " `2d-operations` and `series-operations` are the same networks, trained for as many"
            " operations as `slab`."
        ),
    ),
    "stride": Question(
        title="Depth stride 1 or MedicalNet's network on slabs of five?",
        runs=("slab", "slab-medicalnet"),
        pairs=(("slab", "slab-medicalnet"),),
        in_all=True,
        note=(
            "The networks differ in their strides in depth and in the plane, in dilation and in the"
            " kind of shortcut. Both are trained from scratch with a learning rate and epochs that"
            " were chosen on `slab`. The difference is that of the two networks at this budget, not"
            " the cost of a stride (`stride-9` changes nothing but the strides in depth)."
        ),
    ),
    "stride-9": Question(
        title="What do strides along the slices cost on slabs of nine, all else equal?",
        runs=("slab", "slab-9", "slab-9-strided"),
        pairs=(("slab-9", "slab-9-strided"), ("slab-9", "slab")),
    ),
    "fractions": Question(
        title="Can computation replace data? Equal optimiser steps on fewer patients.",
        runs=("2d", "slab", "series", *FRACTIONS),
        pairs=(
            *(("2d", "2d-half"), ("slab", "slab-half"), ("series", "series-half")),
            # Five slices per sample on half of the patients, against one on all of them.
            *(("slab-half", "2d"), ("series-half", "2d")),
        ),
        in_all=True,
    ),
    "memory": Question(
        title="Slice, slab or series, with batches of equal activation memory?",
        runs=("2d", "slab-memory", "series-memory"),
        pairs=(("slab-memory", "2d"), ("series-memory", "2d")),
    ),
    "intensity": Question(
        title="Three windows or one wide one in 3D?",
        runs=("slab", "slab-wide", "series", "series-wide"),
        pairs=(("slab", "slab-wide"), ("series", "series-wide")),
    ),
    "normalise": Question(
        title="Normalise before brightness and contrast (a fault of the thesis) or after?",
        runs=("2d-normalise-last", "2d-normalise-first"),
        pairs=(("2d-normalise-last", "2d-normalise-first"),),
    ),
    "pretraining": Question(
        title="MedicalNet's weights in 2D and in 3D?",
        runs=(
            *("2d-medicalnet-pretrained", "2d-medicalnet-stand-in"),
            *("series-medicalnet-pretrained", "series-medicalnet-stand-in"),
            *("slab-medicalnet-pretrained", "slab-medicalnet-stand-in"),
        ),
        pairs=(
            ("slab-medicalnet-stand-in", "2d-medicalnet-stand-in"),
            ("series-medicalnet-stand-in", "2d-medicalnet-stand-in"),
            ("slab-medicalnet-pretrained", "2d-medicalnet-pretrained"),
            ("series-medicalnet-pretrained", "2d-medicalnet-pretrained"),
        ),
    ),
    "thin": Question(
        title="Does MedicalNet's network on slabs of five gain when no slice is thrown away?",
        runs=(
            *("slab-medicalnet", "slab-thin", "slab-thin-atrous", "slab"),
            "slab-medicalnet-operations",
            *("slab-medicalnet-stand-in", "slab-thin-stand-in", "slab-thin-atrous-stand-in"),
            *("slab-medicalnet-pretrained", "slab-thin-pretrained", "slab-thin-atrous-pretrained"),
        ),
        pairs=(
            *(("slab-thin", "slab-medicalnet"), ("slab-thin-atrous", "slab-medicalnet")),
            *(("slab-thin", "slab-thin-atrous"), ("slab-thin", "slab-medicalnet-operations")),
            ("slab", "slab-thin"),
            ("slab-thin-stand-in", "slab-medicalnet-stand-in"),
            ("slab-thin-atrous-stand-in", "slab-medicalnet-stand-in"),
            ("slab-thin-pretrained", "slab-medicalnet-pretrained"),
            ("slab-thin-atrous-pretrained", "slab-medicalnet-pretrained"),
            ("slab-thin-pretrained", "slab-thin-atrous-pretrained"),
        ),
        note=(
            "`slab-medicalnet` and the thin networks have the same tensors, and the same strides"
            " and dilations in the plane. The thin ones keep five slices, and so compute more per"
            " sample: `slab-medicalnet-operations` is trained for as many operations as"
            " `slab-thin`. `slab` differs in the plane, in its shortcut and in its pooling, too."
            " Runs from scratch see three windows, the others the one wide range of their weights."
            " Restrided weights meet slices at other distances than in their training, and"
            " MedicalNet's network does not."
        ),
    ),
    "kinetics": Question(
        title="Networks of video on slabs of five: R3D, MC3 or R(2+1)D, and Kinetics' weights?",
        runs=("slab", *KINETICS),
        pairs=(
            *(("slab-r3d_18", "slab"), ("slab-mc3_18", "slab"), ("slab-r2plus1d_18", "slab")),
            *(("slab-mc3_18", "slab-r3d_18"), ("slab-r2plus1d_18", "slab-r3d_18")),
            *((f"{key}-pretrained", key) for key in KINETICS if f"{key}-pretrained" in KINETICS),
        ),
        note=(
            "All keep five slices, and see the same three windows. The networks of video have no"
            " max pooling: their stages have twice the rows and columns, so that a sample costs"
            " several times the operations of `slab`, at equal epochs and learning rate (those"
            " that were chosen on `slab`). The weights of R3D and R(2+1)D are restrided; MC3 is as"
            " it was trained."
        ),
    ),
    "context": Question(
        title="What do the other slices of a series tell about a slice, and how best to see them?",
        runs=(
            *("2d", "stack", "slab", *_SEQUENCES, _END_TO_END, "series"),
            *("2d-operations", "stack-operations", "slab-thin-operations"),
            *("slab-thin-stand-in-operations", "sequence-gru-operations", "series-operations"),
        ),
        pairs=(
            *((key, "2d") for key in ("stack", "slab", *_SEQUENCES, _END_TO_END, "series")),
            *((key, "slab") for key in ("stack", *_SEQUENCES, _END_TO_END)),
            (_END_TO_END, "sequence-gru"),
            *((key, "slab") for key in ("2d-operations", "stack-operations")),
            *((key, "slab") for key in ("slab-thin-operations", "slab-thin-stand-in-operations")),
            *((key, "slab") for key in ("sequence-gru-operations", "series-operations")),
            ("sequence-gru-operations", "2d-operations"),
        ),
        note=(
            "**At equal patients** each network has the epochs and learning rate of its view. **At"
            " equal operations** it is trained for as many as `slab`, which stands in both; a"
            " sequence head spends nearly nothing beside its slice network. MedicalNet's network"
            " with depth stride 1 costs five times the operations of `slab` and has at least one"
            " epoch, so about a quarter more; a stand-in has one seed, and sees one wide range. A"
            " head is trained on"
            " all series as they are, slices and slabs on as many positive samples as negative"
            " ones: this is in their log loss, not in their AUROC. A head begins as its slice"
            " network, and its share beside it is chosen on validation, as is the epoch of every"
            " network."
        ),
    ),
    "labels": Question(
        title="Labels of slices, or labels of series alone?",
        runs=("2d", *_LEARNT, "series"),
        pairs=(
            *((f"sequence-{kind}-series", f"sequence-{kind}-slices") for kind in LABEL_HEADS),
            *((f"sequence-{kind}", f"sequence-{kind}-slices") for kind in LABEL_HEADS),
            *((f"sequence-{kind}-series", "2d") for kind in LABEL_HEADS),
            *((f"sequence-{kind}-series", "series") for kind in LABEL_HEADS),
        ),
        note=(
            "Heads on the same features of the same slice network, which itself has learned from"
            " labels of slices: what differs is what the head learns from. `series` has seen no"
            " label of a slice at all, and answers none."
        ),
    ),
}
