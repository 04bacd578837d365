"""A hand-cut CIFAR ResNet, written without slt_planner's graph or extraction: the reference of several tests."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HandCutResNet(nn.Module):
    """Layers are counted by hand: 1 is the first convolution, then two a block; a shortcut counts with the second."""

    def __init__(self, blocks: int, full_depth: int, scale: float, classes: int = 10) -> None:
        super().__init__()

        def width(layer: int, channels: int) -> int:
            return channels if layer <= full_depth else max(1, int(scale * channels + 1e-9))

        self.first = nn.Conv2d(3, width(1, 16), 3, 1, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(width(1, 16), track_running_stats=False)
        self.rows = nn.ModuleList()
        incoming, layer = width(1, 16), 1
        for group, channels in enumerate((16, 32, 64)):
            for block in range(blocks):
                stride = 2 if group > 0 and block == 0 else 1
                middle, out = width(layer + 1, channels), width(layer + 2, channels)
                row = nn.ModuleDict(
                    {
                        "a": nn.Conv2d(incoming, middle, 3, stride, 1, bias=False),
                        "an": nn.BatchNorm2d(middle, track_running_stats=False),
                        "b": nn.Conv2d(middle, out, 3, 1, 1, bias=False),
                        "bn": nn.BatchNorm2d(out, track_running_stats=False),
                    }
                )
                if stride == 2:
                    row["s"] = nn.Conv2d(incoming, out, 3, stride, 1, bias=False)
                    row["sn"] = nn.BatchNorm2d(out, track_running_stats=False)
                self.rows.append(row)
                incoming, layer = out, layer + 2
        self.last = nn.Linear(incoming, classes)

    @classmethod
    def of_resnet20(cls, model: nn.Module, freeze_depth: int, full_depth: int, head_scale: float) -> "HandCutResNet":
        """That of a resnet20 with its weights."""
        network = cls(3, full_depth, head_scale)
        network.load_from(model, freeze_depth)
        return network

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first_norm(self.first(x)))
        for row in self.rows:
            x = self.block(row, x)
        return self.last(F.adaptive_avg_pool2d(x, 1).flatten(1))

    @staticmethod
    def block(row: nn.ModuleDict, x: Tensor) -> Tensor:
        y = row["bn"](row["b"](F.relu(row["an"](row["a"](x)))))
        shortcut = row["sn"](row["s"](x)) if "s" in row else x[:, : y.shape[1]]
        return F.relu(y + shortcut)

    def pairs(self) -> list[tuple[nn.Module, str, int]]:
        """Each layer, its name in `slt_planner`'s CifarResNet, and its number (0 for the classifier)."""
        found: list[tuple[nn.Module, str, int]] = [(self.first, "conv", 1), (self.first_norm, "bn", 1)]
        per_group = len(self.rows) // 3
        for i, row in enumerate(self.rows):
            prefix = f"group{i // per_group + 1}.{i % per_group}"
            names = {"a": "conv1", "an": "bn1", "b": "conv2", "bn": "bn2", "s": "shortcut.0", "sn": "shortcut.1"}
            found += [(row[k], f"{prefix}.{names[k]}", 2 * i + (2 if k in ("a", "an") else 3)) for k in row]
        return [*found, (self.last, "fc", 0)]

    def load_from(self, model: nn.Module, freeze_depth: int) -> None:
        """Copy the first entries of each of the model's tensors, and freeze the first layers."""
        for layer, name, number in self.pairs():
            other = model.get_submodule(name)
            for key, parameter in layer.named_parameters():
                source = getattr(other, key)
                with torch.no_grad():
                    parameter.copy_(source[tuple(slice(0, size) for size in parameter.shape)])
                parameter.requires_grad_(not 0 < number <= freeze_depth)
