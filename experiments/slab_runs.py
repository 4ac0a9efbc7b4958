"""Trainings on slabs of five: MedicalNet's network with depth stride 1, and Kinetics' networks.

Declarations only; `runs.RUNS` holds them.
"""

from experiments.run import MEDICALNET_3D, STAND_IN, Run

# The question "thin": MedicalNet's network, and the same tensors with depth stride 1.
_THIN_TITLES = {
    "thin": "MedicalNet's ResNet-18 on slabs of five, depth stride and dilation 1",
    "thin-atrous": "MedicalNet's ResNet-18 on slabs of five, depth stride 1, its own dilations",
}


def _thin(name: str) -> dict[str, Run]:
    """Declare a network with depth stride 1: from scratch, from a stand-in, from MedicalNet."""
    title, preset = _THIN_TITLES[name], f"resnet18_3d_{name.replace('-', '_')}"
    return {
        f"slab-{name}": Run(
            title=f"{title}, from scratch", preset=preset, view="slab", intensity="windows"
        ),
        f"slab-{name}-pretrained": Run(
            title=f"{title}, weights {MEDICALNET_3D} restrided",
            preset=preset,
            view="slab",
            weights=MEDICALNET_3D,
        ),
        f"slab-{name}-stand-in": Run(
            title=f"{title}, {STAND_IN}, restrided",
            preset=preset,
            view="slab",
            weights="restrided:stand-in-3d-18",
            first_seed=True,
        ),
    }


THIN = {
    **_thin("thin"),
    **_thin("thin-atrous"),
    "slab-medicalnet-operations": Run(
        title="MedicalNet's ResNet-18 on slabs of five, from scratch, operations of the thin one",
        preset="resnet18_3d_medicalnet",
        view="slab",
        like=("operations", "slab-thin"),
        intensity="windows",
    ),
}


def _kinetics(name: str, title: str) -> dict[str, Run]:
    """Declare a network of Kinetics on slabs: from scratch, and with its weights."""
    title = f"{title} on slabs of five, depth stride 1"
    return {
        f"slab-{name}": Run(
            title=f"{title}, from scratch",
            preset=f"{name}_slab",
            view="slab",
            intensity="windows",
        ),
        f"slab-{name}-pretrained": Run(
            title=f"{title}, weights torchvision_{name}",
            preset=f"{name}_slab",
            view="slab",
            weights=f"torchvision_{name}",
            intensity="windows",
        ),
    }


# The question "kinetics".
KINETICS = {
    **_kinetics("r3d_18", "R3D-18"),
    **_kinetics("mc3_18", "MC3-18"),
    **_kinetics("r2plus1d_18", "R(2+1)D-18"),
}
