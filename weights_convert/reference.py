"""The networks in plain torch, for verification only.

Written from the publications and independently of the Keras builder, so that each reveals the
other's errors: He et al. (2016) and torchvision's variant for images, Chen et al. (2019) for
MedicalNet, Tran et al. (2018) for video, Xie et al. (2017) and Hu et al. (2018) for SE-ResNeXt. The
tests compare them with torchvision's own code, bit for bit, and with numbers of timm.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from ich_keras.models.spec import ModelSpec
from weights_convert.reference_densenet import DenseNet


def _layers(rank: int) -> tuple[Callable[..., nn.Module], Callable[..., nn.Module]]:
    return (nn.Conv2d, nn.BatchNorm2d) if rank == 2 else (nn.Conv3d, nn.BatchNorm3d)


def _padding(kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(d * (k // 2) for k, d in zip(kernel, dilation, strict=True))


class ZeroPadShortcut(nn.Module):
    """Shortcut A: subsample by the stride and fill the new channels with zeros; no parameters."""

    def __init__(self, stride: tuple[int, ...], channels: int, is_detached: bool) -> None:
        super().__init__()
        self.stride, self.channels, self.is_detached = stride, channels, is_detached

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the shortcut of x, float (N, channels, *spatial)."""
        if self.is_detached:  # MedicalNet/models/resnet.py takes `out.data` here
            x = x.detach()
        pool = functional.avg_pool2d if len(self.stride) == 2 else functional.avg_pool3d
        x = pool(x, kernel_size=1, stride=self.stride)
        zeros = x.new_zeros(x.shape[0], self.channels - x.shape[1], *x.shape[2:])
        return torch.cat([x, zeros], dim=1)


class SqueezeExcite(nn.Module):
    """Channels weighed by a sigmoid of what they are on average, with timm's names (fc1, fc2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(8, 8 * int(channels / 16 / 8 + 0.5))
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the weighed channels of x, float (N, channels, rows, columns)."""
        weight = self.fc2(functional.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * weight.sigmoid()


class ImageBlock(nn.Module):
    """A basic or bottleneck block with torchvision's names (conv1, bn1, ..., downsample)."""

    def __init__(
        self,
        rank: int,
        channels_in: int,
        channels: int,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        dilation: tuple[int, ...],
        bottleneck: bool,
        shortcut: nn.Module | None,
        groups: int | None = None,  # of an SE-ResNeXt
    ) -> None:
        super().__init__()
        conv, norm = _layers(rank)
        ones, padding = (1,) * rank, _padding(kernel, dilation)
        main = partial(conv, kernel_size=kernel, padding=padding, dilation=dilation, bias=False)
        if bottleneck:
            wide = 4 * channels
            if groups is not None:
                channels = 2 * channels
            self.conv1 = conv(channels_in, channels, ones, bias=False)
            self.conv2 = main(channels, channels, stride=stride, groups=groups or 1)
            self.conv3 = conv(channels, wide, ones, bias=False)
            self.bn3 = norm(wide)
            if groups is not None:
                self.se = SqueezeExcite(wide)
        else:
            self.conv1 = main(channels_in, channels, stride=stride)
            self.conv2 = main(channels, channels)
        self.bn1, self.bn2 = norm(channels), norm(channels)
        if shortcut is not None:
            self.downsample = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output for x, float (N, channels, *spatial)."""
        shortcut = self.downsample(x) if hasattr(self, "downsample") else x
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        if hasattr(self, "conv3"):
            x = self.bn3(self.conv3(functional.relu(x)))
        if hasattr(self, "se"):
            x = self.se(x)
        return functional.relu(x + shortcut)


class ImageNet(nn.Module):
    """An image or volume ResNet or SE-ResNeXt with torchvision's, MedicalNet's and timm's names."""

    def __init__(self, spec: ModelSpec, outputs: int | None = None) -> None:
        super().__init__()
        conv, norm = _layers(spec.rank)
        kernel = spec.per_axis(spec.stem_kernel)
        self.conv1 = conv(
            spec.channels,
            spec.width,
            kernel,
            stride=spec.per_axis(spec.stem_stride),
            padding=tuple(k // 2 for k in kernel),
            bias=False,
        )
        self.bn1 = norm(spec.width)
        pool = nn.MaxPool2d if spec.rank == 2 else nn.MaxPool3d
        if spec.pool_kernel is None:
            raise ValueError("pool_kernel is None; a network with image names has a max pooling")
        pool_kernel = spec.per_axis(spec.pool_kernel)
        self.maxpool = pool(
            pool_kernel,
            stride=spec.per_axis(spec.pool_stride),
            padding=tuple(k // 2 for k in pool_kernel),
        )
        channels = spec.width
        for stage, blocks in enumerate(spec.stage_blocks):
            layer = nn.Sequential()
            for position in range(blocks):
                layer.append(_image_block(spec, channels, stage, position == 0))
                channels = spec.width * 2**stage * (4 if spec.is_bottleneck else 1)
            self.add_module(f"layer{stage + 1}", layer)
        if outputs is not None:
            self.fc = nn.Linear(channels, outputs)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the features by the names of `ich_keras.models.spec.FEATURES`."""
        found = {"stem": functional.relu(self.bn1(self.conv1(x)))}
        found["maxpool"] = self.maxpool(found["stem"])
        return _later_features(self, found, found["maxpool"])


def _image_block(spec: ModelSpec, channels_in: int, stage: int, is_first: bool) -> ImageBlock:
    channels = spec.width * 2**stage
    wide = channels * (4 if spec.is_bottleneck else 1)
    stride = spec.per_axis(spec.strides[stage] if is_first else 1)
    shortcut = None
    if max(stride) > 1 or channels_in != wide:
        if spec.shortcut == "A":
            shortcut = ZeroPadShortcut(stride, wide, spec.detach_shortcut)
        else:
            conv, norm = _layers(spec.rank)
            shortcut = nn.Sequential(
                conv(channels_in, wide, 1, stride=stride, bias=False), norm(wide)
            )
    return ImageBlock(
        spec.rank,
        channels_in,
        channels,
        spec.per_axis(spec.kernels[stage]),
        stride,
        spec.per_axis(spec.dilations[stage]),
        spec.is_bottleneck,
        shortcut,
        spec.width // 2 if spec.architecture == "seresnext" else None,
    )


def _later_features(
    net: nn.Module, found: dict[str, torch.Tensor], x: torch.Tensor
) -> dict[str, torch.Tensor]:
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        x = getattr(net, stage)(x)
        found[stage] = x
    found["avgpool"] = x.flatten(2).mean(2)
    if hasattr(net, "fc"):
        found["fc"] = net.fc(found["avgpool"])
    return found


def _video_conv(
    spec: ModelSpec,
    channels_in: int,
    channels: int,
    middle: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...] = (1, 1, 1),
) -> nn.Module:
    if not spec.factorised:
        return nn.Conv3d(
            channels_in,
            channels,
            kernel,
            stride=stride,
            padding=_padding(kernel, dilation),
            dilation=dilation,
            bias=False,
        )
    within, across = (1, *kernel[1:]), (kernel[0], 1, 1)
    return nn.Sequential(
        nn.Conv3d(
            channels_in,
            middle,
            within,
            stride=(1, *stride[1:]),
            padding=_padding(within, dilation),
            dilation=(1, *dilation[1:]),
            bias=False,
        ),
        nn.BatchNorm3d(middle),
        nn.ReLU(),
        nn.Conv3d(
            middle,
            channels,
            across,
            stride=(stride[0], 1, 1),
            padding=_padding(across, dilation),
            dilation=(dilation[0], 1, 1),
            bias=False,
        ),
    )


class VideoBlock(nn.Module):
    """A basic block with the names of torchvision's video networks (conv1.0, conv1.1, ...)."""

    def __init__(self, spec: ModelSpec, channels_in: int, stage: int, is_first: bool) -> None:
        super().__init__()
        channels = spec.width * 2**stage
        kernel = spec.per_axis(spec.kernels[stage])
        stride = spec.per_axis(spec.strides[stage] if is_first else 1)
        dilation = spec.per_axis(spec.dilations[stage])
        middle = (channels_in * channels * 27) // (channels_in * 9 + 3 * channels)
        first = _video_conv(spec, channels_in, channels, middle, kernel, stride, dilation)
        second = _video_conv(spec, channels, channels, middle, kernel, (1, 1, 1), dilation)
        self.conv1 = nn.Sequential(first, nn.BatchNorm3d(channels), nn.ReLU())
        self.conv2 = nn.Sequential(second, nn.BatchNorm3d(channels))
        if max(stride) > 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv3d(channels_in, channels, 1, stride=stride, bias=False),
                nn.BatchNorm3d(channels),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output for x, float (N, channels, slices, rows, columns)."""
        shortcut = self.downsample(x) if hasattr(self, "downsample") else x
        return functional.relu(self.conv2(self.conv1(x)) + shortcut)


class VideoNet(nn.Module):
    """A video ResNet of basic blocks with torchvision's names."""

    def __init__(self, spec: ModelSpec, outputs: int | None = None) -> None:
        super().__init__()
        kernel, stride = spec.per_axis(spec.stem_kernel), spec.per_axis(spec.stem_stride)
        middle = max(1, 45 * spec.width // 64)  # torchvision: R2Plus1dStem
        conv = _video_conv(spec, spec.channels, spec.width, middle, kernel, stride)
        parts = list(conv) if spec.factorised else [conv]
        self.stem = nn.Sequential(*parts, nn.BatchNorm3d(spec.width), nn.ReLU())
        channels = spec.width
        for stage, blocks in enumerate(spec.stage_blocks):
            layer = nn.Sequential()
            for position in range(blocks):
                layer.append(VideoBlock(spec, channels, stage, position == 0))
                channels = spec.width * 2**stage
            self.add_module(f"layer{stage + 1}", layer)
        if outputs is not None:
            self.fc = nn.Linear(channels, outputs)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the features by the names of `ich_keras.models.spec.FEATURES`."""
        found = {"stem": self.stem(x)}
        return _later_features(self, found, found["stem"])


def without_reference(spec: ModelSpec) -> str:
    """Say what of a network has no counterpart here; "" where all has.

    >>> from ich_keras.models.presets import preset
    >>> without_reference(preset("r3d_18")), without_reference(preset("r3d_18", norm="group"))
    ('', "norm 'group'")
    """
    is_video = spec.naming == "video"
    if spec.norm == "group":
        return "norm 'group'"
    if (spec.pool_kernel is None) != is_video:
        return f"naming {spec.naming!r} with pool_kernel {spec.pool_kernel}"
    if is_video and (spec.is_bottleneck or spec.shortcut == "A" or spec.rank == 2):
        return f"naming 'video' with depth {spec.depth}, shortcut {spec.shortcut}, {spec.rank}D"
    if spec.factorised and not is_video:
        return "naming 'image' with factorised kernels"
    return ""


def reference(spec: ModelSpec, outputs: int | None = None) -> nn.Module:
    """Build a network in plain torch.

    Args:
        spec: the network; the input may have any size.
        outputs: number of outputs of the head (`fc`, of a DenseNet `classifier`); None builds none.

    Returns:
        A module in evaluation mode, from float (N, channels, *spatial) to a dictionary of features.
    """
    if spec.architecture == "densenet":
        return DenseNet(spec, outputs).eval()
    build: type[VideoNet] | type[ImageNet] = VideoNet if spec.naming == "video" else ImageNet
    return build(spec, outputs).eval()
