"""Steps put together from their parts against the simulated step of the whole network: each call, each storage."""

from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slt_planner.config import Config, Optimizer, StepSpec
from slt_planner.errors import InputError, UnsupportedLayerError
from slt_planner.graph.adapter import Adapter
from slt_planner.graph.segments import segments
from slt_planner.graph.trace import trace
from slt_planner.memory import composed
from slt_planner.memory.composed import Composer
from slt_planner.memory.forecast import Forecaster
from slt_planner.memory.predict import predict
from slt_planner.memory.simulate import simulate
from slt_planner.models.registry import load_model
from slt_planner.models.resnet_cifar import CifarResNet
from tests.unit.test_solve_random import networks

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"resnet20": 32, "densenet40": 32, "vgg11_bn": 64, "alexnet": 96, "vit_b_16": 224}
NETWORKS = ("resnet20", "mobilenet_v3_small", "resnet50", "vit_b_16", "vgg11_bn", "squeezenet1_1")
MORE_NETWORKS = ("densenet40", "mobilenet_v2", "regnet_y_400mf", "alexnet", "efficientnet_b0", "densenet121")
STEPS = (
    {},
    {"memory_format": "channels_last", "norms": "running"},
    {"precision": "bf16", "optimizer": Optimizer(momentum=0.0)},
    {"optimizer": "adam"},
    {"optimizer": Optimizer(name="adamw", weight_decay=0.1), "memory_format": "channels_last"},
)


@cache
def traced(name):
    model = load_model(name, weights=False)
    return trace(model, (3, SIZES.get(name, 64), SIZES.get(name, 64)))


def calls(step):
    return [(call.operator.signature, call.phase) for call in step.calls]


def storages(step):
    own = step.storages
    end = np.minimum(own.end, len(step.calls))
    columns = (own.size, own.begin, end, own.category, own.is_number)
    return Counter(zip(*(column.tolist() for column in columns), strict=True))


def assert_same(composed_step, simulated):
    assert calls(composed_step) == calls(simulated)
    assert storages(composed_step) == storages(simulated)
    assert composed_step.costs == simulated.costs
    assert composed_step.tensor_peak_bytes == simulated.tensor_peak_bytes


def configs(draw, graph):
    full_depth = draw(st.integers(0, graph.depth), label="full_depth")
    freeze_depth = draw(st.integers(0, max(0, full_depth - 1)), label="freeze_depth")
    scale = draw(st.sampled_from(graph.head_scales(full_depth)), label="head scale")
    return Config(freeze_depth=freeze_depth, full_depth=full_depth, head_scale=scale)


@pytest.mark.parametrize("name", [*NETWORKS, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE_NETWORKS)])
@given(data=st.data(), settings_=st.sampled_from(STEPS))
@settings(max_examples=3, deadline=None)
def test_a_step_of_its_parts_is_the_step(name, data, settings_):
    graph = traced(name)
    spec = StepSpec(batch_size=2, threads=1, **settings_)
    composer = Composer(graph, spec)
    for _ in range(2):  # the second step has parts of the first
        config = configs(data.draw, graph)
        try:
            simulated = simulate(graph, config, spec, details=False)
        except UnsupportedLayerError:  # a network that makes fp32 tensors of its own takes no bf16
            assert settings_.get("precision") == "bf16"
            with pytest.raises(UnsupportedLayerError):
                composer.step(config)
            return
        assert_same(composer.step(config), simulated)


@given(data=st.data(), network=networks(most=6), settings_=st.sampled_from(STEPS))
@settings(max_examples=30, deadline=None)
def test_a_step_of_its_parts_is_the_step_of_random_networks(data, network, settings_):
    graph, spec = trace(network, (2, 8, 8)), StepSpec(batch_size=2, threads=1, **settings_)
    composer = Composer(graph, spec)
    for _ in range(3):
        config = configs(data.draw, graph)
        own = composer.step(config)
        if own is None:
            assert len(segments(graph)) < composed._FEWEST
        else:
            assert_same(own, simulate(graph, config, spec, details=False))


def test_a_deep_network_has_few_parts(monkeypatch):
    """Twice the depth is twice the stages; what must be simulated hardly grows with it."""
    made = []
    real = composed.segment_part
    monkeypatch.setattr(composed, "segment_part", lambda *args: made.append(args) or real(*args))

    def parts(blocks):
        made.clear()
        graph = trace(CifarResNet(blocks), (3, 32, 32))
        composer = Composer(graph, StepSpec(batch_size=2, threads=1))
        for full_depth in range(1, graph.depth):
            composer.step(Config(freeze_depth=full_depth - 1, full_depth=full_depth, head_scale=0.5))
        return len(made), len(segments(graph)) * (graph.depth - 1)

    shallow, of_shallow = parts(6)
    deep, of_deep = parts(12)
    assert of_deep > 3.5 * of_shallow
    assert deep < 1.3 * shallow < 200


class Attending(nn.Module):
    """Attention layers that differ in what their text does not say."""

    def __init__(self, *heads):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.layers = nn.ModuleList(nn.MultiheadAttention(8, number, batch_first=True) for number in heads)
        self.norms = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8)) for _ in heads)
        self.fc = nn.Linear(8, 3)

    def forward(self, images):
        x = self.stem(images).flatten(2).transpose(1, 2)
        for attention, norm in zip(self.layers, self.norms, strict=True):
            x = norm(attention(x, x, x)[0])
        return self.fc(x.mean(1))


def test_layers_that_only_look_alike_are_told_apart():
    graph, spec = trace(Attending(2, 4, 1, 2), (3, 16, 16)), StepSpec(batch_size=2, threads=1)
    own = Composer(graph, spec).step(Config.full_network())
    assert own is not None
    assert_same(own, simulate(graph, Config.full_network(), spec, details=False))


class Tied(nn.Module):
    """Two convolutions side by side with one weight, whose first name is that of the later call."""

    def __init__(self):
        super().__init__()
        self.later, self.sooner = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
        self.sooner.weight = self.later.weight
        self.more = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(20)])
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        x = torch.relu(self.sooner(x)) + self.later(x)
        return self.fc(self.more(x).mean((2, 3)))


def test_networks_with_shared_parameters_are_simulated_whole():
    assert segments(trace(Tied(), (3, 8, 8))) == ()


class Reweighed(Adapter):
    def step_loss(self, model, images, labels):
        return 2.0 * super().step_loss(model, images, labels)


@pytest.mark.parametrize(
    "more",
    [
        {"micro_batch": 1},
        {"precision": "autocast"},
        {"set_to_none": False},
        {"levers": ("lean_norms",)},
        {"optimizer": Optimizer(foreach=True)},
    ],
)
def test_steps_whose_parts_depend_on_each_other_are_simulated_whole(more):
    spec = StepSpec(batch_size=2, threads=1, norms="running", **more)
    assert Composer(traced("resnet20"), spec).step(Config.full_network()) is None


@pytest.mark.parametrize("name", ["googlenet", "shufflenet_v2_x0_5"])
def test_networks_that_are_no_chain_are_simulated_whole(name):
    assert Composer(traced(name), StepSpec(batch_size=2, threads=1)).step(Config.full_network()) is None


def test_unusual_adapters_and_moving_channels_are_simulated_whole():
    spec = StepSpec(batch_size=2, threads=1)
    unusual = trace(load_model("resnet20"), (3, 32, 32), adapter=Reweighed())
    assert Composer(unusual, spec).step(Config.full_network()) is None
    moving = Config(freeze_depth=0, full_depth=0, head_scale=0.5, channels="rolling:3")
    assert Composer(traced("resnet20"), spec).step(moving) is None


def test_what_cannot_be_is_refused_as_by_simulating():
    lone = [nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)) for _ in range(8)]
    graph = trace(nn.Sequential(nn.Conv2d(2, 2, 9), *lone, nn.Flatten(), nn.Linear(2, 3)), (2, 9, 9))
    spec = StepSpec(batch_size=1, threads=1)
    with pytest.raises(InputError) as simulated:
        simulate(graph, Config.full_network(), spec, details=False)
    with pytest.raises(InputError) as put_together:
        Composer(graph, spec).step(Config.full_network())
    assert str(put_together.value) == str(simulated.value)
    beyond = Config(freeze_depth=0, full_depth=40, head_scale=0.5)
    with pytest.raises(InputError, match="beyond the network's 19 units"):
        Composer(traced("resnet20"), StepSpec(batch_size=2)).step(beyond)


def test_forecasts_are_predictions(tmp_path, monkeypatch):
    monkeypatch.setenv("SLT_CACHE", str(tmp_path))
    graph, spec = traced("resnet20"), StepSpec(batch_size=3, threads=1)
    forecaster = Forecaster(graph, spec)
    for config in (Config.full_network(), Config(freeze_depth=4, full_depth=6, head_scale=0.375)):
        own, reference = forecaster.profile(config), predict(graph, config, spec, details=False)
        assert own.exact
        assert own == reference
