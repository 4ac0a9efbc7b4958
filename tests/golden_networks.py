"""Golden outputs of the networks, made once by torchvision, timm or plain torch, for every backend.

Weights and inputs are not stored: they follow from names by a rule that no library version changes
(raw numbers of PCG64). `python tests/golden_networks.py NAME...` makes files again, with torch.
Those of SE-ResNeXt are timm's own numbers (made with 1.0.31; the tests do without it), those of
DenseNet torchvision's.
"""

import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ich_keras.models.presets import PRESETS
from ich_keras.models.spec import ModelSpec

FOLDER = Path(__file__).parent / "golden"
# Of two architectures a narrow, short network, beside the presets: those take jax too long.
SHORT = {
    "seresnext14_narrow": ModelSpec((None, None, 3), 14, width=8, architecture="seresnext"),
    "densenet21_narrow": ModelSpec((None, None, 3), 21, width=8, architecture="densenet"),
}
# Network -> shape of one input without channels. Even, odd and mixed; thin and thick.
NETWORKS = {
    "resnet18_2d": (65, 64),
    "resnet50_2d": (64, 47),
    "seresnext50_2d": (95, 96),
    "seresnext14_narrow": (65, 64),
    "densenet21_narrow": (64, 79),
    "resnet18_2d_medicalnet": (48, 33),
    "resnet10_3d_medicalnet": (9, 32, 33),
    "resnet18_3d_medicalnet": (8, 33, 32),
    "resnet18_3d": (12, 33, 32),
    "resnet18_3d_slab": (5, 40, 33),
    "r3d_18": (7, 32, 31),
    "mc3_18": (6, 32, 31),
    "r2plus1d_18": (5, 32, 31),
}
BATCH = 2


def uniform(name: str, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
    """Return float32 numbers in [low, high) that depend on the name alone."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    unit = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (low + (high - low) * unit).astype(np.float32).reshape(shape)


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return a torch tensor by its name: He-uniform kernels, statistics away from 0 and 1."""
    if name.endswith("running_var"):
        return uniform(name, shape, 0.5, 2.0)
    if len(shape) > 1:
        bound = (6.0 / np.prod(shape[1:])) ** 0.5
        return uniform(name, shape, -bound, bound)
    if name.endswith("weight"):
        return uniform(name, shape, 0.5, 1.5)
    return uniform(name, shape, -0.3, 0.3)


def images(preset_name: str, channels: int) -> np.ndarray:
    """Return the inputs of a network, float32 (BATCH, *spatial, channels)."""
    shape = (BATCH, *NETWORKS[preset_name], channels)
    return uniform(f"images of {preset_name}", shape, -2.0, 2.0)


def spec_of(name: str) -> ModelSpec:
    """Return a network of `NETWORKS` for inputs of any size."""
    return SHORT[name] if name in SHORT else PRESETS[name].spec.with_any_size()


def short_network(name: str) -> Any:
    """Return a network of `SHORT` by timm or torchvision, with six outputs."""
    if name == "densenet21_narrow":
        from torchvision.models import DenseNet

        return DenseNet(4, (2, 2, 2, 2), num_init_features=8, num_classes=6)
    from timm.models.resnet import Bottleneck, ResNet
    from torch import nn

    net = ResNet(
        Bottleneck,
        (1, 1, 1, 1),
        num_classes=6,
        cardinality=4,
        base_width=32,
        channels=(8, 16, 32, 64),
        block_args={"attn_layer": "se"},
    )
    # timm's stem has 64 channels, whatever those of the stages.
    net.conv1 = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
    net.bn1 = nn.BatchNorm2d(8)
    net.layer1[0].conv1 = nn.Conv2d(8, 16, 1, bias=False)
    net.layer1[0].downsample[0] = nn.Conv2d(8, 32, 1, bias=False)
    return net


def make(names: list[str]) -> None:
    """Write golden files with torchvision or timm, or with plain torch where neither has it."""
    import torch

    from ich_keras.labels import NUM_LABELS
    from weights_convert.parity import torch_features
    from weights_convert.reference import reference
    from weights_convert.selfcheck import oracle_of, published_network, tapped
    from weights_convert.sources import SOURCES

    for name in names or NETWORKS:
        spec = spec_of(name)
        source = next((s for s in SOURCES.values() if s.preset == name), None)
        if name in SHORT:
            owner = short_network(name)
            module = tapped(owner)
        elif source is None:
            module = owner = reference(spec, NUM_LABELS)
        else:
            is_ours = source.name.startswith("medicalnet_")
            assert is_ours or published_network(source, 1) is not None, f"{name}: no oracle here"
            module, owner = oracle_of(source, spec)
        with torch.no_grad():
            for key, value in owner.state_dict().items():
                if not key.endswith("num_batches_tracked"):
                    value.copy_(torch.from_numpy(tensor(key, tuple(value.shape))))
        module.double()
        found = torch_features(module, images(name, spec.channels).astype(np.float64))
        stages = {k: np.abs(v).mean() for k, v in found.items() if v.ndim > 2}
        np.savez_compressed(
            FOLDER / f"{name}.npz",
            avgpool=found["avgpool"].astype(np.float64),
            fc=found["fc"],
            stage_names=np.array(list(stages)),
            stage_means=np.array(list(stages.values())),
        )


if __name__ == "__main__":
    make(sys.argv[1:])
