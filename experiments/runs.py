"""Every training by name. Declarations only: nothing runs here.

A number that depends on another run is declared as such: `like=("operations", "slab")` trains for
as many epochs as it takes to spend the operations of the run "slab"; `settle.py` works it out.
"""

from experiments.context_runs import CONTEXT_RUNS
from experiments.run import MEDICALNET_2D, MEDICALNET_3D, STAND_IN, Run
from experiments.slab_runs import KINETICS, THIN

SLICES = "2D ResNet-18 on slices, from scratch"
SLABS = "3D ResNet-18 on slabs of five, depth stride 1, from scratch"
SERIES = "3D ResNet-18 on whole series, from scratch"

# These stand in for pretrained weights that are not available: trained on other phantoms.
_STAND_INS = {
    "stand-in-2d-18": Run(
        title="ResNet-18 on other phantoms",
        preset="resnet18_2d",
        view="slice",
        split="other",
        first_seed=True,
    ),
    "stand-in-2d-50": Run(
        title="ResNet-50 on other phantoms",
        preset="resnet50_2d",
        view="slice",
        split="other",
        first_seed=True,
    ),
    # On slabs, which have the labels of single slices: MedicalNet itself learned from
    # segmentations, with a label per voxel. 107 patients teach it little; the report says where it
    # has hardly learned.
    "stand-in-3d-18": Run(
        title="MedicalNet's ResNet-18 on slabs of other phantoms",
        preset="resnet18_3d_medicalnet",
        view="slab",
        split="other",
        first_seed=True,
    ),
}

# The three views from scratch: everything else is compared with these. All see the same three
# windows: in the thesis's wide range brain and blood lie 0.02 apart, and the value of a view would
# be mixed up with the value of its intensities (the question "intensity").
_VIEWS = {
    "2d": Run(title=SLICES, preset="resnet18_2d", view="slice", published="2d-scratch-4-epochs"),
    "slab": Run(title=SLABS, preset="resnet18_3d_slab", view="slab", intensity="windows"),
    "series": Run(title=SERIES, preset="resnet18_3d", view="series", intensity="windows"),
}


def _pretrained(
    key: str,
    *,
    title: str,
    preset: str,
    view: str,
    source: str,
    stand_in: str,
    published: str,
    one_seed: bool = True,
) -> dict[str, Run]:
    """Declare a pretrained network four times: real weights or a stand-in, each with the patient
    split and with the thesis's split and augmentation.

    A stand-in takes the place of weights that are not available, and supports no claim: it has one
    seed (`one_seed`), except for the cheapest network.
    """
    thesis_split = "thesis-series" if view == "series" else "thesis-slices"
    runs = {}
    for name, origin, weights, is_single in (
        ("pretrained", f"weights {source}", source, False),
        ("stand-in", STAND_IN, f"run:{stand_in}", one_seed),
    ):
        runs[f"{key}-{name}"] = Run(
            title=f"{title}, {origin}",
            preset=preset,
            view=view,
            weights=weights,
            published=published,
            first_seed=is_single,
        )
        runs[f"{key}-{name}-thesis"] = Run(
            title=f"{title}, {origin}, thesis split and augmentation",
            preset=preset,
            view=view,
            weights=weights,
            published=published,
            split=thesis_split,
            augment="thesis",
            first_seed=True,
        )
    return runs


_TABLES = {
    "2d-thesis": Run(
        title=f"{SLICES}, thesis split and augmentation",
        preset="resnet18_2d",
        view="slice",
        split="thesis-slices",
        augment="thesis",
        published="2d-scratch-4-epochs",
        first_seed=True,
    ),
    **_pretrained(
        "2d",
        title="2D ResNet-18 on slices",
        preset="resnet18_2d",
        view="slice",
        source="torchvision_resnet18",
        stand_in="stand-in-2d-18",
        published="2d",
        one_seed=False,
    ),
    **_pretrained(
        "2d-50",
        title="2D ResNet-50 on slices",
        preset="resnet50_2d",
        view="slice",
        source="torchvision_resnet50",
        stand_in="stand-in-2d-50",
        published="2d-resnet50-4-epochs",
    ),
    **_pretrained(
        "series-medicalnet",
        title="MedicalNet's ResNet-18 on whole series",
        preset="resnet18_3d_medicalnet",
        view="series",
        source=MEDICALNET_3D,
        stand_in="stand-in-3d-18",
        published="series",
    ),
    **_pretrained(
        "slab-medicalnet",
        title="MedicalNet's ResNet-18 on slabs of five",
        preset="resnet18_3d_medicalnet",
        view="slab",
        source=MEDICALNET_3D,
        stand_in="stand-in-3d-18",
        published="slab",
    ),
}

# The question "leak".
_LEAK = {
    "2d-leaky": Run(
        title=f"{SLICES}, slices split one by one",
        preset="resnet18_2d",
        view="slice",
        split="leaky",
        like=("steps", "2d"),
    ),
}

# The question "views", at equal operations.
_OPERATIONS = {
    "2d-operations": Run(
        title=f"{SLICES}, operations of the slabs",
        preset="resnet18_2d",
        view="slice",
        like=("operations", "slab"),
    ),
    "series-operations": Run(
        title=f"{SERIES}, operations of the slabs",
        preset="resnet18_3d",
        view="series",
        like=("operations", "slab"),
        intensity="windows",
    ),
}

# The questions "stride" and "stride-9": MedicalNet's network reduces five slices to one; the
# strided network needs nine.
_STRIDES = {
    "slab-medicalnet": Run(
        title="MedicalNet's ResNet-18 on slabs of five, from scratch",
        preset="resnet18_3d_medicalnet",
        view="slab",
        intensity="windows",
    ),
    "slab-9": Run(
        title="3D ResNet-18 on slabs of nine, depth stride 1, from scratch",
        preset="resnet18_3d_slab",
        view="slab",
        slices=9,
        intensity="windows",
    ),
    "slab-9-strided": Run(
        title="3D ResNet-18 on slabs of nine, strided in depth, from scratch",
        preset="resnet18_3d",
        view="slab",
        slices=9,
        intensity="windows",
    ),
}


def _part(key: str, fraction: float) -> Run:
    """Declare a view's run again on a part of the training patients, with as many steps."""
    base = _VIEWS[key]
    return Run(
        title=f"{base.title}, 1/{round(1 / fraction)} of the training patients",
        preset=base.preset,
        view=base.view,
        fraction=fraction,
        like=("steps", key),
        intensity="windows",
    )


# The question "fractions".
FRACTIONS = {
    f"{key}-{name}": _part(key, fraction)
    for key in _VIEWS
    for fraction, name in {0.125: "eighth", 0.25: "quarter", 0.5: "half"}.items()
}

# The question "memory".
_MEMORY = {
    "slab-memory": Run(
        title=f"{SLABS}, memory of the slices",
        preset="resnet18_3d_slab",
        view="slab",
        like=("memory", "2d"),
        intensity="windows",
    ),
    "series-memory": Run(
        title=f"{SERIES}, memory of the slices",
        preset="resnet18_3d",
        view="series",
        like=("memory", "2d"),
        intensity="windows",
    ),
}

# The question "intensity".
_INTENSITY = {
    "slab-wide": Run(
        title=f"{SLABS}, the thesis's wide range",
        preset="resnet18_3d_slab",
        view="slab",
        intensity="wide",
    ),
    "series-wide": Run(
        title=f"{SERIES}, the thesis's wide range",
        preset="resnet18_3d",
        view="series",
        intensity="wide",
    ),
}

# The question "normalise". It needs the thesis's augmentation: flips alone, which phantoms are
# trained with otherwise, do not depend on the order.
_NORMALISE = {
    "2d-normalise-last": Run(
        title=f"{SLICES}, normalised after brightness",
        preset="resnet18_2d",
        view="slice",
        augment="thesis",
    ),
    "2d-normalise-first": Run(
        title=f"{SLICES}, normalised before brightness",
        preset="resnet18_2d",
        view="slice",
        augment="thesis",
        normalise_first=True,
    ),
}

# The question "pretraining": MedicalNet's weights in 2D; those in 3D are in the tables.
_PRETRAINING = {
    "2d-medicalnet-pretrained": Run(
        title="MedicalNet's ResNet-18 collapsed to slices, its weights",
        preset="resnet18_2d_medicalnet",
        view="slice",
        weights=MEDICALNET_2D,
    ),
    "2d-medicalnet-stand-in": Run(
        title=f"MedicalNet's ResNet-18 collapsed to slices, {STAND_IN}",
        preset="resnet18_2d_medicalnet",
        view="slice",
        weights="collapsed:stand-in-3d-18",
    ),
}

RUNS: dict[str, Run] = {
    **_STAND_INS,
    **_VIEWS,
    **_TABLES,
    **_LEAK,
    **_OPERATIONS,
    **_STRIDES,
    **FRACTIONS,
    **_MEMORY,
    **_INTENSITY,
    **_NORMALISE,
    **_PRETRAINING,
    **THIN,
    **KINETICS,
    **CONTEXT_RUNS,
}
