"""The same networks in plain torch, written for speed: the baseline of the benchmarks."""

import importlib.util

import torch
from torch import nn
from torch.nn import functional

from ich_keras.labels import NUM_LABELS
from ich_keras.models.architectures import STAGE_BLOCKS
from ich_keras.models.presets import PRESETS
from ich_keras.models.spec import ModelSpec
from weights_convert.reference import ImageNet, ZeroPadShortcut, reference


class PlainResNet(nn.Module):
    """The reference network with its logits as the only output.

    The reference is written for clarity, this one for speed: ReLUs and additions in place, pooling
    in the type of its input, shortcut A without leaving channels_last memory.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.network = reference(spec, NUM_LABELS)
        if spec.architecture != "resnet" or not isinstance(self.network, ImageNet):
            kind = f"{spec.architecture}, naming {spec.naming}"
            raise TypeError(f"{kind}: only ResNets with naming 'image' are measured")
        for module in self.network.modules():
            if isinstance(module, nn.Conv3d):
                module.__class__ = _PaddedConv3d

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits float (N, 6) of a batch (N, channels, *spatial)."""
        net = self.network
        x = functional.relu_(net.bn1(net.conv1(x)))
        with torch.autocast(x.device.type, enabled=False):
            x = net.maxpool(x)  # on the CPU autocast would make it float32
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            for block in stage:
                x = _block(block, x)
        return net.fc(x.flatten(2).mean(2))


class _PaddedConv3d(nn.Conv3d):
    """A convolution that pads a shallow volume before it convolves: without that, torch's CPU
    gradient corrupts memory (see `ich_keras.models.torch.function`)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or not self.padding[0] or x.shape[2] > self.kernel_size[0]:
            return super().forward(x)
        x = functional.pad(x, (0, 0, 0, 0, self.padding[0], self.padding[0]))
        padding = (0, *self.padding[1:])
        return functional.conv3d(x, self.weight, None, self.stride, padding, self.dilation)


def _block(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    shortcut = _shortcut(block.downsample, x) if hasattr(block, "downsample") else x
    x = functional.relu_(block.bn1(block.conv1(x)))
    x = block.bn2(block.conv2(x))
    if hasattr(block, "conv3"):
        x = block.bn3(block.conv3(functional.relu_(x)))
    return functional.relu_(x.add_(shortcut))


def _shortcut(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if not isinstance(module, ZeroPadShortcut):
        return module(x)
    x = x.detach() if module.is_detached else x
    x = x[(..., *(slice(None, None, step) for step in module.stride))]
    return functional.pad(x, (*(0, 0) * len(module.stride), 0, module.channels - x.shape[1]))


def plain_network(spec: ModelSpec) -> nn.Module:
    """Build the plain torch baseline: torchvision's own network where it has one.

    Returns:
        A module from float (N, channels, *spatial) to logits (N, 6).
    """
    if not spec.differences(PRESETS["resnet18_2d"].spec):
        from torchvision.models import resnet18

        return resnet18(num_classes=NUM_LABELS)
    return PlainResNet(spec)


def has_monai(spec: ModelSpec, num_slices: int) -> bool:
    """Return whether MONAI is installed and has this network: the strided 3D one, of any width.

    Shallow volumes are left out: its convolutions pad inside (see `_PaddedConv3d`).
    """
    is_same = set(spec.differences(PRESETS["resnet18_3d"].spec)) <= {"width"}
    is_deep = num_slices > max(spec.per_axis(spec.stem_kernel))
    return is_same and is_deep and importlib.util.find_spec("monai") is not None


def monai_network(spec: ModelSpec) -> nn.Module:
    """Build MONAI's ResNet with the strides of ours and shortcuts without a bias."""
    from monai.networks.nets import ResNet

    return ResNet(
        "basic",
        list(STAGE_BLOCKS[spec.depth]),
        [spec.width * 2**stage for stage in range(4)],
        spatial_dims=3,
        n_input_channels=spec.channels,
        conv1_t_stride=2,
        bias_downsample=False,
        num_classes=NUM_LABELS,
    )


def channels_last(rank: int) -> torch.memory_format:
    """Return the memory layout in which torch's convolutions are fastest."""
    return torch.channels_last if rank == 2 else torch.channels_last_3d
