"""DenseNet in plain torch, for verification only; see `reference`.

Source: Huang et al., Densely Connected Convolutional Networks (2017), with torchvision's names.
"""

import torch
from torch import nn
from torch.nn import functional

from ich_keras.models.spec import ModelSpec


class DenseLayer(nn.Module):
    """Two convolutions after their normalisations; what they give is appended to what came in."""

    def __init__(self, channels_in: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x, float (N, channels, rows, columns), with the new channels behind."""
        new = self.conv1(functional.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(functional.relu(self.norm2(new)))], 1)


class DenseNet(nn.Module):
    """A DenseNet with torchvision's names (features.conv0, features.denseblock1, ...)."""

    def __init__(self, spec: ModelSpec, outputs: int | None = None) -> None:
        super().__init__()
        channels, growth = spec.width, spec.width // 2
        self.features = nn.Module()
        self.features.conv0 = nn.Conv2d(spec.channels, channels, 7, 2, padding=3, bias=False)
        self.features.norm0 = nn.BatchNorm2d(channels)
        for block, num_layers in enumerate(spec.stage_blocks, 1):
            if block > 1:
                transition = nn.Module()
                transition.norm = nn.BatchNorm2d(channels)
                transition.conv = nn.Conv2d(channels, channels // 2, 1, bias=False)
                self.features.add_module(f"transition{block - 1}", transition)
                channels //= 2
            layers = nn.Sequential()
            for number in range(1, num_layers + 1):
                layers.add_module(f"denselayer{number}", DenseLayer(channels, growth))
                channels += growth
            self.features.add_module(f"denseblock{block}", layers)
        self.features.norm5 = nn.BatchNorm2d(channels)
        if outputs is not None:
            self.classifier = nn.Linear(channels, outputs)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the features by the names of `ich_keras.models.spec.FEATURES`."""
        parts = dict(self.features.named_children())
        found = {"stem": functional.relu(parts["norm0"](parts["conv0"](x)))}
        x = found["maxpool"] = functional.max_pool2d(found["stem"], 3, 2, padding=1)
        for stage in (1, 2, 3, 4):
            if stage > 1:
                between = dict(parts[f"transition{stage - 1}"].named_children())
                x = between["conv"](functional.relu(between["norm"](x)))
                x = functional.avg_pool2d(x, 2)
            x = found[f"layer{stage}"] = parts[f"denseblock{stage}"](x)
        x = found["layer4"] = functional.relu(parts["norm5"](x))
        found["avgpool"] = x.mean((2, 3))
        if hasattr(self, "classifier"):
            found["fc"] = self.classifier(found["avgpool"])
        return found
