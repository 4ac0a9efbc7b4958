"""The runs of the questions "context" and "labels" that no other question has. Declarations only.

A stack is three neighbouring slices as channels of a 2D network (2.5D).

A sequence head is trained on the slice network of another run (`on`): it reads the slices of a
series one after another, and answers each again.
"""

from experiments.run import STAND_IN, Run

HEADS = {
    "gru": "GRU",
    "lstm": "LSTM",
    "conv": "convolutions along z",
    "transformer": "transformer",
    "attention": "gated attention",
}
# The heads of the question "labels": the first of the five, and the one of multiple-instance
# learning, whose slices do not see each other.
LABEL_HEADS = ("gru", "attention")
_LEARNT = {"slices": "labels of slices alone", "series": "labels of series alone"}


def _head(kind: str, on: str = "2d", learn_from: str = "both", also: str = "") -> Run:
    title = f"2D ResNet-18 on slices, then {HEADS[kind]} over the series"
    return Run(
        title=f"{title}, {also}" if also else title,
        preset=f"sequence_{kind}",
        view="slice",
        on=on,
        learn_from=learn_from,
    )


_EACH = {f"sequence-{kind}": _head(kind) for kind in HEADS}

# The slice network has the operations of the slabs; the head adds next to none.
_AT_EQUAL_OPERATIONS = {
    "sequence-gru-operations": _head("gru", "2d-operations", also="operations of the slabs"),
}

_OF_LABELS = {
    f"sequence-{kind}-{learnt}": _head(kind, learn_from=learnt, also=f"the head from {words}")
    for kind in LABEL_HEADS
    for learnt, words in _LEARNT.items()
}

_TOGETHER = {
    "sequence-gru-end-to-end": Run(
        title="2D ResNet-18 on slices, then GRU over the series, trained end to end",
        preset="sequence_gru",
        view="slice",
        on="2d",
        end_to_end=True,
    ),
}

_STACKS = {
    "stack": Run(
        title="2D ResNet-18 on stacks of three slices, from scratch",
        preset="resnet18_2d_stack",
        view="stack",
    ),
    "stack-operations": Run(
        title="2D ResNet-18 on stacks of three slices, from scratch, operations of the slabs",
        preset="resnet18_2d_stack",
        view="stack",
        like=("operations", "slab"),
    ),
}

# MedicalNet's network with depth stride 1 costs five times the operations of `slab`. At equal
# patients the question "thin" trains it; here it has the slabs' operations, or one epoch.
_RESTRIDED = {
    "slab-thin-operations": Run(
        title="MedicalNet's ResNet-18 on slabs of five, depth stride and dilation 1, from scratch,"
        " operations of the slabs",
        preset="resnet18_3d_thin",
        view="slab",
        like=("operations", "slab"),
        intensity="windows",
    ),
    "slab-thin-stand-in-operations": Run(
        title="MedicalNet's ResNet-18 on slabs of five, depth stride and dilation 1,"
        f" {STAND_IN}, restrided, operations of the slabs",
        preset="resnet18_3d_thin",
        view="slab",
        weights="restrided:stand-in-3d-18",
        like=("operations", "slab"),
        first_seed=True,
    ),
}

CONTEXT_RUNS = {
    **_EACH,
    **_AT_EQUAL_OPERATIONS,
    **_OF_LABELS,
    **_TOGETHER,
    **_STACKS,
    **_RESTRIDED,
}
