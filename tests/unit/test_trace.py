"""Tracing: units, scales, hashes, and what is refused."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from slt_planner.config import Config
from slt_planner.errors import InputError, UnsupportedLayerError
from slt_planner.graph.trace import trace
from slt_planner.graph.widths import scaled_width
from slt_planner.models.registry import find_model, load_model, model_names


@pytest.mark.parametrize("name", [name for name in model_names() if name.startswith("resnet")])
def test_a_cifar_resnet_has_a_unit_a_layer_and_shortcuts_join_the_last_of_their_block(name):
    model = load_model(name)
    graph = trace(model, find_model(name).input_shape)
    depth = int(name.removesuffix("_pad").removeprefix("resnet"))
    assert graph.depth == depth - 1
    assert [unit.index for unit in graph.units] == list(range(1, depth))
    blocks = (depth - 2) // 6
    shortcut_unit = graph.units[2 * blocks + 2]
    assert shortcut_unit.name == "group2.0.conv2"
    assert ("group2.0.shortcut.0" in shortcut_unit.modules) == (not name.endswith("_pad"))
    assert "fc" not in {module for unit in graph.units for module in unit.modules}


def test_torchvision_orders_the_shortcut_last_and_the_units_are_the_same():
    graph = trace(load_model("resnet18"), (3, 64, 64))
    assert graph.depth == 17
    unit = graph.units[6]
    assert unit.name == "layer2.0.conv2"
    assert "layer2.0.downsample.0" in unit.modules


def test_the_hash_is_of_structure_alone():
    first, second = load_model("resnet20"), load_model("resnet20")
    hashes = {trace(model, (3, 32, 32)).hash for model in (first, second, first.eval())}
    assert len(hashes) == 1
    others = [
        (load_model("resnet20", 11), 32),
        (load_model("resnet20_pad"), 32),
        (load_model("resnet32"), 32),
        (first, 64),
    ]
    assert len({trace(model, (3, size, size)).hash for model, size in others} | hashes) == 5


def test_the_structure_hash_depends_on_settings_and_not_on_how_torch_words_them(monkeypatch):
    """Versions of torch write the same norm in different words, and plans go from one machine to another."""

    def hash_with(stride=1, eps=1e-5):
        network = nn.Sequential(nn.Conv2d(3, 4, 3, stride), nn.BatchNorm2d(4, eps), nn.Flatten(), nn.LazyLinear(5))
        network(torch.zeros(2, 3, 8, 8))
        return trace(network, (3, 8, 8)).hash

    def hash_resized_to(size):
        layers = nn.Conv2d(3, 4, 3), nn.Upsample(size), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return trace(nn.Sequential(*layers, nn.Linear(4, 5)), (3, 8, 8)).hash

    assert hash_resized_to([8, 8]) == hash_resized_to((8, 8)) != hash_resized_to([9, 9])
    here = hash_with()
    assert len({here, hash_with(stride=2), hash_with(eps=1e-3)}) == 3
    monkeypatch.setattr(nn.BatchNorm2d, "extra_repr", lambda self: "in other words")
    assert hash_with() == here


def test_tracing_leaves_the_model_as_it_is_and_holds_no_weights():
    model = load_model("resnet20").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = trace(model, (3, 32, 32))
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.is_meta for parameter in graph.skeleton.parameters())
    assert all(buffer.is_meta for buffer in graph.skeleton.buffers())


@pytest.mark.parametrize("full_depth", [0, 1, 7, 8, 13, 14, 18, 19])
def test_head_scales_are_where_some_width_of_the_head_changes(full_depth):
    graph = trace(load_model("resnet20"), (3, 32, 32))
    widths = [16] * 7 + [32] * 6 + [64] * 6
    head = widths[full_depth:]
    fine = [k / 4096 for k in range(1, 4097)]

    def widths_at(scale):
        return [max(1, math.floor(scale * width + 1e-9)) for width in head]

    changes = {scale for before, scale in pairwise(fine) if widths_at(before) != widths_at(scale)}
    narrowest = {1 / max(head)} if head else set()
    assert graph.head_scales(full_depth) == tuple(sorted(changes | narrowest | {1.0}))


def test_scales_that_change_no_width_are_not_legal():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)
    )
    scales = trace(network, (3, 8, 8)).head_scales(0)
    widths = [(scaled_width(4, s), scaled_width(6, s)) for s in scales]
    assert widths == [(1, 1), (1, 2), (2, 3), (2, 4), (3, 4), (3, 5), (4, 6)]


def test_widths_of_whole_notches_are_whole_in_floating_point():
    for channels in range(1, 2049):
        for k in (1, channels // 3 or 1, channels - 1 or 1, channels):
            assert scaled_width(channels, k / channels) == k


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(3, 10)

    def forward(self, x):
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(self.conv(self.conv(x)), 1), 1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.b.weight = self.a.weight
        self.fc = nn.Linear(3, 10)

    def forward(self, x):
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(self.b(self.a(x)), 1), 1))


class Body(nn.Module):
    """A convolution, what is given, and a classifier."""

    def __init__(self, work, **parts):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.work = work
        for name, part in parts.items():
            setattr(self, name, part)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.work(self, self.conv(x)).mean((2, 3)))


def without_gradients(body, x):
    with torch.no_grad():
        return x * 2


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        (Branching(), (3, 8, 8), "the network: what it computes depends on values"),
        (Doubled(), (3, 8, 8), "conv: uses the weights of conv again on what they gave"),
        (Tied(), (3, 8, 8), "b: uses the weights of a again on what they gave"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.FractionalMaxPool2d(2, output_size=2)),
            (3, 8, 8),
            "1: FractionalMaxPool2d has no width rule; teach it with @slt_planner.graph.widths.rule(FractionalMax",
        ),
        (Body(lambda body, x: torch.fft.rfft(x).real), (3, 8, 8), "fft_rfft has no width rule; teach it with"),
        (
            Body(lambda body, x: x * body.plain, plain=torch.ones(8, 1, 1)),
            (3, 8, 8),
            "neither a parameter nor a buffer",
        ),
        (Body(lambda body, x: x[: len(x) // 2]), (3, 8, 8), "depends on the batch size, and not in proportion"),
        (Body(lambda body, x: x / (1 / len(x))), (3, 8, 8), "depends on the batch size"),
        (
            Body(lambda body, x: F.pixel_shuffle(torch.cat([x] * 4, 1), 2)),
            (3, 8, 8),
            "a part of the channels of one pixel",
        ),
        (Body(lambda body, x: x.chunk(2, 1)[0].repeat(1, 2, 1, 1)), (3, 8, 8), "repeat along a dimension"),
        (nn.Sequential(spectral_norm(nn.Conv2d(3, 4, 3))), (3, 8, 8), "computes its weights anew each time"),
        (Body(without_gradients), (3, 8, 8), "switches gradients on or off"),
        (
            Body(lambda body, x: x.transpose(0, 1).reshape(-1, 1, 6, 6).expand(-1, 8, 6, 6)),
            (3, 8, 8),
            "mixed with the batch",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_place_and_kind(model, shape, words):
    with pytest.raises(UnsupportedLayerError) as caught:
        trace(model, shape)
    assert words in str(caught.value)


def test_inputs_and_networks_that_do_not_fit():
    with pytest.raises(InputError, match="does not take inputs of 4x32x32: conv: "):
        trace(load_model("resnet20"), (4, 32, 32))
    with pytest.raises(InputError, match="no layer to freeze"):
        trace(nn.Sequential(nn.Flatten(), nn.Linear(12, 10)), (3, 2, 2))
    with pytest.raises(InputError, match=r"unknown model 'resnet21'; did you mean resnet"):
        load_model("resnet21")
    with pytest.raises(InputError, match="number of classes 0"):
        load_model("resnet20", 0)


def test_a_cut_never_takes_more_than_there_is():
    graph = trace(load_model("resnet20_pad"), (3, 32, 32))
    for full_depth in range(20):
        config = Config(freeze_depth=max(0, full_depth - 1), full_depth=full_depth, head_scale=3 / 64)
        for mode in (True, False):
            cuts = graph.cuts(config, mode)
            for cut in cuts.values():
                for source, taken in cut.inputs.items():
                    arrives = cuts[source].output if source in cuts else source.meta["full"]
                    for has, takes in zip(arrives, taken, strict=True):
                        assert set(takes.indices) <= set(has.indices)
