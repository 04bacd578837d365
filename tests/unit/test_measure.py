"""Measured peaks against the same step found another way, and the sums that must hold."""

from functools import partial

import pytest
import torch
from torch import nn

from slt_planner.config import Config, Optimizer, StepSpec
from slt_planner.errors import InputError
from slt_planner.graph.trace import trace
from slt_planner.memory import recording
from slt_planner.memory.flops import training_flops
from slt_planner.memory.measure import measure
from slt_planner.models.registry import load_model
from slt_planner.submodel.extract import extract
from tests.plain_measure import plain_peak
from tests.reference_resnet import HandCutResNet

MODEL = load_model("resnet20")
GRAPH = trace(MODEL, (3, 32, 32))
CONFIGS = [
    Config(freeze_depth=0, full_depth=0, head_scale=1.0),
    Config(freeze_depth=0, full_depth=0, head_scale=0.125),
    Config(freeze_depth=0, full_depth=1, head_scale=14 / 64),
    Config(freeze_depth=2, full_depth=3, head_scale=1 / 64),
    Config(freeze_depth=4, full_depth=9, head_scale=0.5),
    Config(freeze_depth=18, full_depth=19, head_scale=1.0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_peak_is_that_of_a_plain_loop_over_a_network_cut_by_hand(config):
    """Another network, another loop, torch's exported trace, no assumption about what is alive: the same bytes."""
    by_hand = partial(HandCutResNet.of_resnet20, MODEL, **config.model_dump())
    profile = measure(extract(GRAPH, MODEL, config), StepSpec(batch_size=8))
    assert profile.peak_bytes == plain_peak(by_hand, batch=8)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_the_breakdown_and_the_timeline_add_up_to_the_peak(optimizer, memory_format):
    spec = StepSpec(batch_size=4, optimizer=optimizer, memory_format=memory_format)
    profile = measure(extract(GRAPH, MODEL, Config(freeze_depth=4, full_depth=6, head_scale=0.5)), spec)
    assert sum(profile.breakdown.values()) == profile.peak_bytes
    assert max(point.live_bytes for point in profile.timeline) == profile.peak_bytes
    assert profile.peak_operator.startswith("aten::")
    assert profile.breakdown["batch"] == 4 * 3 * 32 * 32 * 4 + 4 * 8


@pytest.mark.parametrize("norms", ["static", "running"])
def test_the_rows_a_unit_add_up_to_the_network(norms):
    config = Config(freeze_depth=6, full_depth=8, head_scale=0.5)
    sub = extract(GRAPH, MODEL, config, norms)
    profile = measure(sub, StepSpec(batch_size=4, norms=norms))
    rows = profile.units
    assert [row.index for row in rows] == list(range(1, 21))
    trained = sum(p.nbytes for p in sub.parameters() if p.requires_grad)
    assert sum(row.weights_bytes for row in rows) == sum(p.nbytes for p in sub.parameters())
    assert sum(row.gradients_bytes for row in rows) == trained
    assert sum(row.optimizer_bytes for row in rows) == trained
    assert all(row.activations_bytes == 0 for row in rows if row.index < 6)
    assert all(row.gradients_bytes == 0 for row in rows if row.index <= 6)
    # At the peak some saved activations may be gone again, never more of them than were saved.
    assert profile.breakdown["activations"] <= sum(row.activations_bytes for row in rows)
    frame = profile.frame()
    assert list(frame["name"]) == [row.name for row in rows]
    assert frame["activations_bytes"].sum() == sum(row.activations_bytes for row in rows)
    assert profile.breakdown["buffers"] == sum(b.nbytes for b in sub.buffers())


def test_activations_are_what_hand_counting_says():
    """A convolution saves its input, a norm its input and two vectors, a ReLU its output (the next input)."""
    images = 4
    profile = measure(extract(GRAPH, MODEL, Config.full_network()), StepSpec(batch_size=images))
    area = {1: 32 * 32, 8: 16 * 16, 14: 8 * 8}
    for row in profile.units[1:6]:
        feature_map = images * 16 * area[1] * 4
        assert row.activations_bytes == 2 * feature_map + 2 * 16 * 4


def test_multiply_adds_and_flops_agree_with_hand_counting():
    sub = extract(GRAPH, MODEL, Config.full_network())
    convolutions = {n: m for n, m in sub.named_modules() if isinstance(m, nn.Conv2d)}
    sizes = {}
    for name, module in convolutions.items():
        module.register_forward_hook(lambda m, i, o, name=name: sizes.update({name: o.shape[2] * o.shape[3]}))
    sub(torch.zeros(2, 3, 32, 32))
    per_layer = {name: m.weight.numel() * sizes[name] for name, m in convolutions.items()}
    forward = sum(per_layer.values()) + 64 * 10
    # Backward does each product twice, but for the first convolution, whose input needs no gradient.
    assert training_flops(sub) == 2 * (3 * forward - per_layer["conv"])
    last = extract(GRAPH, MODEL, Config(freeze_depth=18, full_depth=19, head_scale=1.0))
    assert training_flops(last) == 2 * (forward + per_layer["group3.2.conv2"] + 2 * 64 * 10)


def test_measuring_is_repeatable_and_leaves_the_module_alone():
    sub = extract(GRAPH, MODEL, Config(freeze_depth=4, full_depth=5, head_scale=0.25), norms="running")
    before = {name: value.clone() for name, value in sub.state_dict().items()}
    spec = StepSpec(batch_size=4, norms="running")
    peaks = {measure(sub, spec, details=details).peak_bytes for details in (True, False, True)}
    assert len(peaks) == 1
    assert all(torch.equal(value, before[name]) for name, value in sub.state_dict().items())
    assert all(parameter.grad is None for parameter in sub.parameters())


def test_values_do_not_matter():
    config = Config(freeze_depth=2, full_depth=4, head_scale=0.5)
    spec = StepSpec(batch_size=4)
    with_values = measure(extract(GRAPH, MODEL, config), spec)
    without = measure(extract(GRAPH, None, config), spec)
    assert with_values.peak_bytes == without.peak_bytes
    assert with_values.breakdown == without.breakdown


def test_the_optimizer_moves_the_peak_by_its_state():
    sub = extract(GRAPH, MODEL, Config(freeze_depth=18, full_depth=19, head_scale=1.0))

    def state(name, momentum=0.9):
        spec = StepSpec(batch_size=2, optimizer=Optimizer(name=name, momentum=momentum))
        return sum(row.optimizer_bytes for row in measure(sub, spec).units)

    trained = [p for p in sub.parameters() if p.requires_grad]
    one = sum(p.nbytes for p in trained)
    assert state("sgd", 0.0) == 0
    assert state("sgd") == one
    assert state("adam") == 2 * one + 4 * len(trained)  # two moments, and a step counter a parameter


def test_any_module_can_be_measured_when_it_says_what_it_takes():
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    profile = measure(module, StepSpec(batch_size=2), input_shape=(3, 2, 2), num_classes=5)
    assert profile.units == ()
    assert profile.breakdown["weights"] == 65 * 4
    with pytest.raises(InputError, match="needs input_shape and num_classes"):
        measure(module, StepSpec(batch_size=2))
    with pytest.raises(InputError, match="running norms, the sub-model static"):
        measure(extract(GRAPH, None, CONFIGS[1]), StepSpec(batch_size=2, norms="running"))


def test_shared_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(12, 12, bias=False)
            self.two = nn.Linear(12, 12, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(x.flatten(1)))

    profile = measure(Tied(), StepSpec(batch_size=2), input_shape=(3, 2, 2), num_classes=12)
    assert profile.breakdown["weights"] == 144 * 4


def test_recording_sees_what_is_given_out_and_taken_back():
    def work():
        recording.mark("begin")
        kept.append(torch.zeros(1000))
        torch.zeros(500).add_(1)

    kept = []
    events = recording.record(work)
    assert [event.name for event in events if isinstance(event, recording.Mark)] == ["begin"]
    allocations = [event for event in events if isinstance(event, recording.Allocation)]
    sizes = [event.size for event in allocations if abs(event.size) >= 2000]
    assert sizes == [4000, 2000, -2000]
    assert sum(event.size for event in allocations) == 4000
