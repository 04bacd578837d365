"""DenseNets for 32x32 images without bottlenecks (Huang et al. 2017, arXiv 1608.06993, section 4.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """Batch norm, ReLU and a 3x3 convolution; its input is kept beside its `growth` new channels."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, in_channels + growth, H, W)."""
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], dim=1)


class Transition(nn.Sequential):
    """Batch norm, ReLU, a 1x1 convolution that keeps the channels, and 2x2 average pooling."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 1, bias=False))
        self.append(nn.AvgPool2d(2))


class CifarDenseNet(nn.Module):
    """Three dense blocks of `layers` layers with transitions between them, average pooling, one linear layer.

    DenseNet40 has 12 layers a block and a growth of 12.
    """

    def __init__(self, layers: int, growth: int = 12, num_classes: int = 10) -> None:
        super().__init__()
        channels = 16
        self.conv = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        for block in range(3):
            blocks += [DenseLayer(channels + i * growth, growth) for i in range(layers)]
            channels += layers * growth
            if block < 2:
                blocks.append(Transition(channels))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) images to (N, num_classes) logits."""
        x = F.relu(self.norm(self.blocks(self.conv(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
