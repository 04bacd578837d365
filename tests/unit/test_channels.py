"""Sub-models of other channels than the first: the network with everything else set to zero computes the same."""

from functools import cache

import pytest
import torch
from torch import nn

from slt_planner.config import Config
from slt_planner.errors import UnsupportedLayerError
from slt_planner.graph.trace import trace
from slt_planner.graph.widths import chosen_steps
from slt_planner.models.registry import load_model
from slt_planner.submodel.extract import extract, tensor_indices
from slt_planner.submodel.merge import merge
from slt_planner.submodel.slices import take

NETWORKS = {"resnet20": (3, 32, 32), "densenet40": (3, 32, 32), "mobilenet_v2": (3, 32, 32), "resnext": (3, 8, 8)}


class GroupedBlock(nn.Module):
    """As in ResNeXt: narrow, grouped, wide, beside the identity."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(16, 12, 1)
        self.grouped = nn.Conv2d(12, 24, 3, padding=1, groups=6)
        self.last = nn.Conv2d(24, 16, 1)

    def forward(self, x):
        return x + self.last(torch.relu(self.grouped(torch.relu(self.first(x)))))


@cache
def network(name):
    torch.manual_seed(0)
    if name == "resnext":
        model = nn.Sequential(nn.Conv2d(3, 16, 1), GroupedBlock(), nn.Flatten(2), Pooled(), nn.Linear(16, 5))
    else:
        model = load_model(name, num_classes=5)
    graph = trace(model, NETWORKS[name])
    return model.double(), graph


class Pooled(nn.Module):
    def forward(self, x):
        return x.mean(2)


def alone(graph, model, config):
    """A copy of the state in which every entry is zero that the configuration does not keep."""
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    own = {n: take(model.state_dict()[n], index) for n, index in tensor_indices(graph, config).items() if n in state}
    # Added to zero, as the update of a client that trained all of it, the kept entries are what is there.
    return merge(graph, state, [(config, own, 1)])


@pytest.mark.parametrize("channels", ["rolling:1", "rolling:9", "random:7"])
@pytest.mark.parametrize("scale", [0.3, 0.75])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_sub_model_computes_what_the_network_does_with_all_else_zero(name, scale, channels):
    model, graph = network(name)
    config = Config(freeze_depth=0, full_depth=0, head_scale=scale, channels=channels)
    images = torch.randn(3, *NETWORKS[name], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own = extract(graph, model, config).eval()
    whole = extract(graph, alone(graph, model, config), Config.full_network()).eval()
    outputs, expected = own(images), whole(images)
    torch.testing.assert_close(outputs, expected, rtol=1e-9, atol=1e-9)
    first = extract(graph, model, config.model_copy(update={"channels": "first"}))
    assert [p.shape for p in own.parameters()] == [p.shape for p in first.parameters()]


@pytest.mark.parametrize("channels", ["rolling:3", "random:11"])
def test_whole_heads_are_kept_and_the_stream_agrees(channels):
    model = load_model("vit_cifar", num_classes=5)
    graph = trace(model, (3, 32, 32))
    config = Config(freeze_depth=0, full_depth=0, head_scale=0.5, channels=channels)
    sub = extract(graph, model, config)
    sub(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in sub.parameters())


def test_channels_are_chosen_without_replacement_and_layers_that_meet_choose_the_same():
    assert chosen_steps("first", 8, 3, "a") == range(3)
    assert chosen_steps("rolling:6", 8, 4, "a") == (0, 1, 6, 7)
    assert chosen_steps("rolling:14", 8, 4, "b") == (0, 1, 6, 7)
    drawn = chosen_steps("random:1", 64, 32, "a")
    assert len(set(drawn)) == 32
    assert drawn == tuple(sorted(drawn)) == chosen_steps("random:1", 64, 32, "a")
    assert drawn != chosen_steps("random:1", 64, 32, "b")
    assert drawn != chosen_steps("random:2", 64, 32, "a")


def test_where_no_such_channels_can_be_taken_the_layer_is_named():
    graph = trace(load_model("shufflenet_v2_x0_5", weights=False), (3, 32, 32))
    with pytest.raises(UnsupportedLayerError, match=r"^stage\d\.\d: chunk leaves a piece without channels"):
        extract(graph, None, Config(freeze_depth=0, full_depth=0, head_scale=0.5, channels="rolling:30"))
