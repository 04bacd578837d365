"""ResNets for 32x32 images: 6n + 2 layers (He et al. 2015, arXiv 1512.03385, section 4.2)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slt_planner.graph.widths import Cut, Operator, rule

Shortcut = Literal["conv", "pad"]


class PadShortcut(nn.Module):
    """The parameter-free shortcut (He et al. 2015, option A): every `stride`-th pixel, new channels are zero.

    Takes (N, C, H, W) and gives (N, out_channels, H/stride, W/stride); the zeros come after the C old channels.
    """

    def __init__(self, out_channels: int, stride: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Subsample and pad."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.out_channels - x.shape[1]))

    def extra_repr(self) -> str:
        """Its two numbers; they are part of a graph's hash."""
        return f"{self.out_channels}, stride={self.stride}"


@rule(PadShortcut)
def _pad_shortcut(op: Operator) -> Cut:
    """A narrower sub-model pads fewer zeros, as the same network built at that width would."""
    x = op.argument(0, "x")
    batch, channels, *_ = op.region(x)
    given = op.keep(op.module.out_channels)
    taken = channels.keeping(range(min(channels.width, given.width)))
    inputs = {x: (batch, taken, *op.region(x)[2:])} if taken.indices != channels.indices else {}
    output = (batch, given, *op.output[2:])
    return Cut(output, inputs, attributes={"out_channels": given.width})


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = (
                PadShortcut(out_channels, stride)
                if shortcut == "pad"
                else nn.Sequential(
                    nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
                    nn.BatchNorm2d(out_channels),
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """Three groups of `blocks` residual blocks with 16, 32 and 64 channels, average pooling, one linear layer.

    `shortcut` is ``conv`` (a 3x3 convolution where the shape changes, as the SLT authors use) or ``pad`` (without
    parameters, as in He et al. 2015).
    """

    def __init__(self, blocks: int, num_classes: int = 10, shortcut: Shortcut = "conv") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.group1 = _group(16, 16, blocks, 1, shortcut)
        self.group2 = _group(16, 32, blocks, 2, shortcut)
        self.group3 = _group(32, 64, blocks, 2, shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) images to (N, num_classes) logits."""
        x = F.relu(self.bn(self.conv(x)))
        x = self.group3(self.group2(self.group1(x)))
        return self.fc(torch.flatten(self.pool(x), 1))


def _group(in_channels: int, out_channels: int, blocks: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, shortcut)
    rest = [BasicBlock(out_channels, out_channels, 1, shortcut) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)
