"""Hand-cut networks, written without slt_planner's graph or extraction: the reference of its tests.

Each builds itself at the scaled widths, counts its units by hand, and knows by hand which entries of the whole
network's parameters it holds.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kept = Sequence[int]  # positions along one dimension of the whole network's parameter


class HandCut(nn.Module):
    """What the hand-cut networks share: the width law, and loading the kept entries.

    Units are numbered from 1; the classifier has the number after the last, so it is neither scaled nor frozen.
    `entries` lists each parameter with its name in the whole network, its unit, and the kept positions along each
    dimension (None for all).
    """

    depth: int

    def __init__(self, full_depth: int, scale: float) -> None:
        super().__init__()
        self.full_depth, self.scale = full_depth, scale
        self.head_steps: set[int] = set()  # in how many steps the layers of the head are scaled
        self.entries: list[tuple[nn.Parameter, str, int, tuple[Kept | None, ...]]] = []

    def width(self, unit: int, channels: int, step: int = 1) -> int:
        if unit <= self.full_depth:
            return channels
        self.head_steps.add(channels // step)
        return step * max(1, math.floor(self.scale * (channels // step) + 1e-9))

    def add(self, layer: nn.Module, name: str, unit: int, rows: Kept | None, columns: Kept | None = None) -> nn.Module:
        """Record a layer whose weight keeps these rows and columns, and whose other parameters keep these rows."""
        for key, parameter in layer.named_parameters():
            kept = (rows, columns) if parameter.dim() > 1 else (rows,)
            self.entries.append((parameter, f"{name}.{key}", unit, kept))
        return layer

    def conv(
        self, name: str, unit: int, inputs: Kept, outputs: Kept, kernel: int, stride: int = 1, bias: bool = False
    ) -> nn.Module:
        padding = 1 if kernel == 3 else 0
        layer = nn.Conv2d(len(inputs), len(outputs), kernel, stride, padding, bias=bias)
        return self.add(layer, name, unit, outputs, inputs)

    def depthwise(self, name: str, unit: int, channels: Kept, stride: int) -> nn.Module:
        layer = nn.Conv2d(len(channels), len(channels), 3, stride, 1, groups=len(channels), bias=False)
        return self.add(layer, name, unit, channels)

    def batch_norm(self, name: str, unit: int, channels: Kept) -> nn.Module:
        return self.add(nn.BatchNorm2d(len(channels), track_running_stats=False), name, unit, channels)

    def layer_norm(self, name: str, unit: int, channels: Kept, eps: float) -> nn.Module:
        return self.add(nn.LayerNorm(len(channels), eps=eps), name, unit, channels)

    def linear(self, name: str, unit: int, inputs: Kept, outputs: Kept, bias: bool = True) -> nn.Module:
        return self.add(nn.Linear(len(inputs), len(outputs), bias=bias), name, unit, outputs, inputs)

    def classifier(self, name: str, inputs: Kept, classes: int) -> nn.Module:
        return self.linear(name, self.depth + 1, inputs, range(classes))

    def loose(self, name: str, unit: int, shape: tuple[int, ...], *kept: Kept | None) -> nn.Parameter:
        """A parameter that is no layer's weight or bias."""
        parameter = nn.Parameter(torch.empty(shape))
        self.entries.append((parameter, name, unit, kept))
        return parameter

    @torch.no_grad()
    def load_from(self, model: nn.Module, freeze_depth: int) -> None:
        """Copy the kept entries of the model's parameters, and freeze the first units."""
        for parameter, name, unit, kept in self.entries:
            source = model.get_parameter(name)
            for dimension, positions in enumerate(kept):
                if positions is not None:
                    source = source.index_select(dimension, torch.tensor(list(positions)))
            assert source.shape == parameter.shape, name  # copy_ would broadcast
            parameter.copy_(source)
            parameter.requires_grad_(unit > freeze_depth)


def side_by_side(producers: list[tuple[int, int]]) -> list[int]:
    """Where the prefixes of concatenated producers, each of (all channels, kept ones), lie in the concatenation."""
    kept, start = [], 0
    for channels, width in producers:
        kept += range(start, start + width)
        start += channels
    return kept


def added(x: Tensor, y: Tensor, dimension: int) -> Tensor:
    """The sum of a stream and what came later in it, which is as wide or narrower."""
    return x.narrow(dimension, 0, y.shape[dimension]) + y


class HandCutDenseNet(HandCut):
    """DenseNet40: 1 is the first convolution, then one a layer and one a transition.

    A norm follows the concatenation that it normalises, which is complete with the convolution before it.
    """

    depth = 1 + 12 + 1 + 12 + 1 + 12

    def __init__(self, full_depth: int, scale: float, classes: int = 10) -> None:
        super().__init__(full_depth, scale)
        self.first = self.conv("conv", 1, range(3), range(self.width(1, 16)), 3)
        self.rows = nn.ModuleList()
        producers, unit = [(16, self.width(1, 16))], 1
        for group in range(3):
            for layer in range(12):
                name, unit, inputs = f"blocks.{13 * group + layer}", unit + 1, side_by_side(producers)
                width = self.width(unit, 12)
                norm = self.batch_norm(f"{name}.norm", unit - 1, inputs)
                conv = self.conv(f"{name}.conv", unit, inputs, range(width), 3)
                self.rows.append(nn.ModuleDict({"norm": norm, "conv": conv}))
                producers.append((12, width))
            if group < 2:
                name, unit, inputs = f"blocks.{13 * group + 12}", unit + 1, side_by_side(producers)
                channels = (160, 304)[group]
                width = self.width(unit, channels)
                norm = self.batch_norm(f"{name}.0", unit - 1, inputs)
                conv = self.conv(f"{name}.2", unit, inputs, range(width), 1)
                self.rows.append(nn.ModuleDict({"norm": norm, "conv": conv}))
                producers = [(channels, width)]
        self.last_norm = self.batch_norm("norm", unit, side_by_side(producers))
        self.last = self.classifier("fc", side_by_side(producers), classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i, row in enumerate(self.rows):
            y = row["conv"](F.relu(row["norm"](x)))
            x = F.avg_pool2d(y, 2) if i in (12, 25) else torch.cat([x, y], 1)
        return self.last(F.relu(self.last_norm(x)).mean((2, 3)))


class HandCutMobileNetV2(HandCut):
    """MobileNetV2: 1 is the stem with the first block's depthwise convolution, 2 that block's projection.

    Then two a block, expansion (with the depthwise convolution behind it) and projection, and the last convolution.
    """

    depth = 2 + 2 * 16 + 1
    blocks = (  # output channels and stride
        *((24, 2), (24, 1)),
        *((32, 2), (32, 1), (32, 1)),
        *((64, 2), (64, 1), (64, 1), (64, 1)),
        *((96, 1), (96, 1), (96, 1)),
        *((160, 2), (160, 1), (160, 1)),
        *((320, 1),),
    )

    def __init__(self, full_depth: int, scale: float, classes: int = 10) -> None:
        super().__init__(full_depth, scale)
        stem, kept = range(self.width(1, 32)), range(self.width(2, 16))
        self.stem = nn.Sequential(
            self.conv("features.0.0", 1, range(3), stem, 3, 2),
            self.batch_norm("features.0.1", 1, stem),
            nn.ReLU6(),
            self.depthwise("features.1.conv.0.0", 1, stem, 1),
            self.batch_norm("features.1.conv.0.1", 1, stem),
            nn.ReLU6(),
            self.conv("features.1.conv.1", 2, stem, kept, 1),
            self.batch_norm("features.1.conv.2", 2, kept),
        )
        self.rows = nn.ModuleList()
        incoming = 16
        for i, (channels, stride) in enumerate(self.blocks):
            name, unit = f"features.{i + 2}.conv", 2 * i + 3
            middle, out = range(self.width(unit, 6 * incoming)), range(self.width(unit + 1, channels))
            self.rows.append(
                nn.Sequential(
                    self.conv(f"{name}.0.0", unit, kept, middle, 1),
                    self.batch_norm(f"{name}.0.1", unit, middle),
                    nn.ReLU6(),
                    self.depthwise(f"{name}.1.0", unit, middle, stride),
                    self.batch_norm(f"{name}.1.1", unit, middle),
                    nn.ReLU6(),
                    self.conv(f"{name}.2", unit + 1, middle, out, 1),
                    self.batch_norm(f"{name}.3", unit + 1, out),
                )
            )
            incoming, kept = channels, out
        out = range(self.width(35, 1280))
        self.top = nn.Sequential(
            self.conv("features.18.0", 35, kept, out, 1), self.batch_norm("features.18.1", 35, out), nn.ReLU6()
        )
        self.last = self.classifier("classifier.1", out, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        incoming = 16
        for (channels, _), row in zip(self.blocks, self.rows, strict=True):
            x = added(x, row(x), 1) if channels == incoming else row(x)
            incoming = channels
        return self.last(self.top(x).mean((2, 3)))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a perceptron, each added to the stream."""

    def __init__(
        self, cut: HandCut, names: dict[str, str], unit: int, stream: int, dim: int, size: int, eps: float
    ) -> None:
        """`unit` is the attention's, `stream` the incoming width, `dim` the whole network's, `size` a head's."""
        super().__init__()
        attended = cut.width(unit, dim, size)
        hidden, self.out = cut.width(unit + 1, 4 * dim), cut.width(unit + 2, dim, size)
        self.heads = attended // size
        # the first rows of each of queries, keys and values
        rows = [part * dim + i for part in range(3) for i in range(attended)]
        between = min(stream, attended)
        self.norm1 = cut.layer_norm(names["norm1"], unit - 1, range(stream), eps)
        self.qkv = nn.Linear(stream, 3 * attended)
        cut.entries.append((self.qkv.weight, names["qkv_weight"], unit, (rows, range(stream))))
        cut.entries.append((self.qkv.bias, names["qkv_bias"], unit, (rows,)))
        self.proj = cut.linear(names["proj"], unit, range(attended), range(attended))
        self.norm2 = cut.layer_norm(names["norm2"], unit, range(between), eps)
        self.mlp1 = cut.linear(names["mlp1"], unit + 1, range(between), range(hidden))
        self.mlp2 = cut.linear(names["mlp2"], unit + 2, range(hidden), range(self.out))

    def forward(self, x: Tensor) -> Tensor:
        x = added(x, self.mix(self.norm1(x)), -1)
        return added(x, self.mlp2(F.gelu(self.mlp1(self.norm2(x)))), -1)

    def mix(self, x: Tensor) -> Tensor:
        return self.attend(x)

    def attend(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention among the tokens of each row, with `bias` (heads first) on the scores."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(x).chunk(3, -1))
        scores = torch.einsum("...qhd,...khd->...hqk", q, k) / math.sqrt(q.shape[-1])
        if bias is not None:
            scores = scores + bias
        return self.proj(torch.einsum("...hqk,...khd->...qhd", scores.softmax(-1), v).flatten(-2))


class HandCutViT(HandCut):
    """ViT-B/16 with heads of any size: 1 is the patch convolution, then attention and two linear layers a block.

    The class token and the positions are used where the patches come in, so they are in unit 1.
    """

    depth = 1 + 3 * 12

    def __init__(self, full_depth: int, scale: float, size: int = 64, tokens: int = 5, classes: int = 10) -> None:
        super().__init__(full_depth, scale)
        stream = self.width(1, 12 * size, size)
        self.patches = self.conv("conv_proj", 1, range(3), range(stream), 16, 16, bias=True)
        self.token = self.loose("class_token", 1, (1, 1, stream), None, None, range(stream))
        self.positions = self.loose("encoder.pos_embedding", 1, (1, tokens, stream), None, None, range(stream))
        self.blocks = nn.ModuleList()
        for i in range(12):
            name = f"encoder.layers.encoder_layer_{i}"
            names = {
                "norm1": f"{name}.ln_1",
                "qkv_weight": f"{name}.self_attention.in_proj_weight",
                "qkv_bias": f"{name}.self_attention.in_proj_bias",
                "proj": f"{name}.self_attention.out_proj",
                "norm2": f"{name}.ln_2",
                "mlp1": f"{name}.mlp.0",
                "mlp2": f"{name}.mlp.3",
            }
            self.blocks.append(Block(self, names, 3 * i + 2, stream, 12 * size, size, 1e-6))
            stream = self.blocks[-1].out
        self.norm = self.layer_norm("encoder.ln", self.depth, range(stream), 1e-6)
        self.last = self.classifier("heads.head", range(stream), classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), 1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.last(self.norm(x)[:, 0])


class WindowBlock(Block):
    """A block that attends within windows of 7x7, every second time shifted by 3."""

    def __init__(self, cut: HandCut, name: str, unit: int, stream: int, dim: int, size: int, shift: int) -> None:
        names = {
            "norm1": f"{name}.norm1",
            "qkv_weight": f"{name}.attn.qkv.weight",
            "qkv_bias": f"{name}.attn.qkv.bias",
            "proj": f"{name}.attn.proj",
            "norm2": f"{name}.norm2",
            "mlp1": f"{name}.mlp.0",
            "mlp2": f"{name}.mlp.3",
        }
        super().__init__(cut, names, unit, stream, dim, size, 1e-5)
        self.shift = shift
        table = f"{name}.attn.relative_position_bias_table"
        self.table = cut.loose(table, unit, (169, self.heads), None, range(self.heads))

    def mix(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        rows, columns = -(-height // 7), -(-width // 7)
        x = F.pad(x, (0, 0, 0, 7 * columns - width, 0, 7 * rows - height))
        # a single window holds everything already
        down, right = self.shift if rows > 1 else 0, self.shift if columns > 1 else 0
        windows = x.roll((-down, -right), (1, 2)).unflatten(2, (columns, 7)).unflatten(1, (rows, 7))
        windows = windows.transpose(2, 3).flatten(3, 4)  # batch, rows, columns, tokens, channels
        mixed = self.attend(windows, self.offsets() + self.seams(rows, columns, down, right))
        mixed = mixed.unflatten(3, (7, 7)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return mixed.roll((down, right), (1, 2))[:, :height, :width]

    def offsets(self) -> Tensor:
        """The learned bias of each head for two tokens by how far apart they are: the table is 13x13 offsets."""
        y, x = torch.arange(49) // 7, torch.arange(49) % 7
        return self.table[(y[:, None] - y + 6) * 13 + (x[:, None] - x + 6)].movedim(-1, 0)

    def seams(self, rows: int, columns: int, down: int, right: int) -> Tensor:
        """-100 for two tokens of one window that only the roll brought together; one head, broadcast over all."""

        def wrapped(windows: int, shift: int) -> Tensor:
            return torch.arange(7 * windows) >= 7 * windows - shift

        seam = wrapped(rows, down)[:, None] * 2 + wrapped(columns, right)
        seam = seam.unflatten(1, (columns, 7)).unflatten(0, (rows, 7)).transpose(1, 2).flatten(2)
        apart = seam[..., :, None] != seam[..., None, :]
        return apart[:, :, None] * torch.tensor(-100.0, dtype=self.table.dtype)


class HandCutSwin(HandCut):
    """Swin-T with heads of any size: 1 is the patch convolution, then three a block and one a merging of patches.

    A block has attention and two linear layers. A merging's norm follows the stream, so it is in the unit before the
    merging's linear layer.
    """

    depth = 1 + 3 * 2 + 1 + 3 * 2 + 1 + 3 * 6 + 1 + 3 * 2

    def __init__(self, full_depth: int, scale: float, size: int = 32, classes: int = 10) -> None:
        super().__init__(full_depth, scale)
        stream = self.width(1, 3 * size, size)
        self.patches = self.conv("features.0.0", 1, range(3), range(stream), 4, 4, bias=True)
        self.first_norm = self.layer_norm("features.0.2", 1, range(stream), 1e-5)
        self.stages, self.merges = nn.ModuleList(), nn.ModuleList()
        unit = 1
        for stage, blocks in enumerate((2, 2, 6, 2)):
            dim = 3 * 2**stage * size
            if stage > 0:
                name, unit = f"features.{2 * stage}", unit + 1
                inputs, width = side_by_side([(dim // 2, stream)] * 4), self.width(unit, dim, size)
                norm = self.layer_norm(f"{name}.norm", unit - 1, inputs, 1e-5)
                linear = self.linear(f"{name}.reduction", unit, inputs, range(width), bias=False)
                self.merges.append(nn.Sequential(norm, linear))
                stream = width
            self.stages.append(nn.Sequential())
            for i in range(blocks):
                name = f"features.{2 * stage + 1}.{i}"
                block = WindowBlock(self, name, unit + 1, stream, dim, size, shift=3 * (i % 2))
                self.stages[-1].append(block)
                stream, unit = block.out, unit + 3
        self.norm = self.layer_norm("norm", unit, range(stream), 1e-5)
        self.last = self.classifier("head", range(stream), classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_norm(self.patches(x).movedim(1, -1))
        for stage in range(4):
            if stage > 0:
                x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
                quarters = [x[:, dy::2, dx::2] for dx in (0, 1) for dy in (0, 1)]
                x = self.merges[stage - 1](torch.cat(quarters, -1))
            x = self.stages[stage](x)
        return self.last(self.norm(x).mean((1, 2)))
