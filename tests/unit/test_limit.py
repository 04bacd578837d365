"""A limit against the measured peak, to the byte; and what it says when it stops a step."""

import gc
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slt_planner as slt
from slt_planner.config import LeanLever
from slt_planner.memory import corrections, operators
from slt_planner.memory.step import SteadyStep, as_trained

MODELS = {**dict.fromkeys(("resnet20", "vit_cifar", "densenet40", "mobilenet_v2"), (3, 32, 32)), "scaled": (3, 8, 8)}
CASES = [
    ("resnet20", slt.Config(freeze_depth=4, full_depth=5, head_scale=0.5), slt.StepSpec(batch_size=8)),
    ("resnet20", slt.Config.full_network(), slt.StepSpec(batch_size=4, optimizer="adam", set_to_none=False)),
    (
        "resnet20",
        slt.Config(freeze_depth=0, full_depth=2, head_scale=0.25),
        slt.StepSpec(batch_size=4, precision="bf16"),
    ),
    ("vit_cifar", slt.Config(freeze_depth=2, full_depth=3, head_scale=0.5), slt.StepSpec(batch_size=2)),
    ("scaled", slt.Config(freeze_depth=0, full_depth=1, head_scale=0.5), slt.StepSpec(batch_size=2, optimizer="adamw")),
    ("densenet40", slt.Config(freeze_depth=9, full_depth=10, head_scale=0.5), slt.StepSpec(batch_size=2)),
    ("resnet20", slt.Config.full_network(), slt.StepSpec(batch_size=8, micro_batch=3)),
]


class Scaled(nn.Module):
    """Numbers as operands: autograd keeps them as tensors that no operator sees."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)])
        self.out = nn.Linear(4, 10)

    def forward(self, x):
        for conv in self.convs:
            x = torch.relu(conv(x) * 0.5) / 3
        return self.out(x.mean((2, 3)).mul(2))


@pytest.fixture(scope="module")
def graphs():
    def model(name):
        return Scaled() if name == "scaled" else slt.load_model(name, weights=False)

    return {name: slt.trace(model(name), shape) for name, shape in MODELS.items()}


def steady_step(graph, config, spec):
    module = as_trained(slt.extract(graph, None, config, spec.norms), spec)
    step = SteadyStep(module, spec, graph.input_shape, graph.num_classes, graph.adapter)
    step.prepare()
    return step


def run_under(limit, step, times=2):
    for _ in range(times):
        with limit:
            step.run(lambda tensors: None)


@pytest.mark.parametrize(("name", "config", "spec"), CASES, ids=lambda value: str(value)[:40])
def test_a_calibrated_step_runs_at_its_measured_peak_and_fails_one_byte_below(graphs, name, config, spec):
    graph = graphs[name]
    slt.calibrate(graph, [config], spec)
    peak = slt.measure(slt.extract(graph, None, config, spec.norms), spec, details=False).peak_bytes

    step = steady_step(graph, config, spec)
    limit = slt.memory_limit(peak, step.module, step.optimizer)
    run_under(limit, step)
    assert limit.exact
    assert limit.peak_bytes == peak

    step = steady_step(graph, config, spec)
    with pytest.raises(slt.BudgetExceeded) as stopped:
        run_under(slt.memory_limit(peak - 1, step.module, step.optimizer), step)
    error = stopped.value
    assert error.live_bytes + error.asked_bytes == peak
    assert error.operator.startswith("aten::")
    assert "1 over the budget" in str(error)


@pytest.mark.parametrize("levers", [(), get_args(LeanLever)], ids=["plain", "lean"])
@pytest.mark.parametrize(
    ("name", "freeze_depth", "full_depth"),
    [("resnet20", 2, 3), ("mobilenet_v2", 0, 0), ("mobilenet_v2", 11, 12), ("densenet40", 2, 3)],
)
def test_every_operator_is_known_with_channels_last(graphs, name, freeze_depth, full_depth, levers):
    """Heads of one channel and images of one pixel: layouts that look like both."""
    graph = graphs[name]
    head_scale = graph.head_scales(full_depth)[0 if full_depth else -1]
    config = slt.Config(freeze_depth=freeze_depth, full_depth=full_depth, head_scale=head_scale)
    spec = slt.StepSpec(batch_size=2, memory_format="channels_last", levers=levers)
    slt.calibrate(graph, [config], spec)
    predicted = slt.predict(graph, config, spec, details=False)
    step = steady_step(graph, config, spec)
    limit = slt.memory_limit("1GB", step.module, step.optimizer)
    run_under(limit, step)
    assert predicted.exact
    assert not limit.uncalibrated
    assert limit.peak_bytes == predicted.peak_bytes


def test_what_is_not_calibrated_counts_with_its_outputs_and_says_so(graphs, tmp_path, monkeypatch):
    monkeypatch.setenv("SLT_CACHE", str(tmp_path))
    graph, config, spec = graphs["resnet20"], CASES[0][1], slt.StepSpec(batch_size=8)
    tensor_peak = slt.predict(graph, config, spec).tensor_peak_bytes
    step = steady_step(graph, config, spec)
    limit = slt.memory_limit(tensor_peak, step.module, step.optimizer)
    run_under(limit, step)
    assert not limit.exact
    assert "aten::convolution" in limit.uncalibrated
    assert limit.peak_bytes == tensor_peak
    step = steady_step(graph, config, spec)
    with pytest.raises(slt.BudgetExceeded, match="not known here"):
        run_under(slt.memory_limit(tensor_peak - 1, step.module, step.optimizer), step)


def test_it_names_the_unit_and_stops_before_the_operator_runs(graphs):
    """The first convolution's backward asks for most: nothing of it may have been allocated."""
    graph = graphs["resnet20"]
    step = steady_step(graph, slt.Config.full_network(), slt.StepSpec(batch_size=16))
    weights = sum(p.nbytes for p in step.module.parameters())
    with pytest.raises(slt.BudgetExceeded, match=r"in unit 1 \(conv\)"):
        run_under(slt.memory_limit(3 * weights + 400_000, step.module, step.optimizer), step)


def test_units_are_followed_through_backward_and_over_several_steps(graphs):
    """Where a step is stopped: forward meets the units in order, backward in the reverse order."""
    graph = graphs["resnet20"]
    step = steady_step(graph, slt.Config.full_network(), slt.StepSpec(batch_size=4))
    limit = slt.memory_limit("1GB", step.module, step.optimizer)
    seen = []
    follow = limit._guard._refuse_if_over
    limit._guard._refuse_if_over = lambda operator, unit, *rest: (
        seen.append((operator, unit)),
        follow(operator, unit, *rest),
    )
    for _ in range(2):
        seen.clear()
        run_under(limit, step, times=1)
        forward = [unit for operator, unit in seen if operator == "aten::convolution"]
        backward = [unit for operator, unit in seen if operator == "aten::convolution_backward"]
        assert sorted(set(forward)) == list(range(1, 20))
        assert backward == forward[::-1]


def test_any_module_can_be_limited_and_what_is_freed_counts_no_more():
    network = nn.Linear(100, 100)
    limit = slt.memory_limit(40_400 + 3 * 400, network)  # weights, an input, an output and one row to spare
    with limit, torch.no_grad():
        for _ in range(10):
            network(torch.zeros(1, 100))
    kept = []
    with pytest.raises(slt.BudgetExceeded), limit, torch.no_grad():
        kept.extend(network(torch.zeros(1, 100)) for _ in range(10))
    assert 1 <= len(kept) < 10
    kept.clear()
    gc.collect()
    with limit, torch.no_grad():  # it can be entered again after it has stopped something
        network(torch.zeros(1, 100))


def test_results_of_unforeseeable_size_are_counted_when_they_are_there():
    with slt.memory_limit("1kB"):
        assert len(torch.nonzero(torch.ones(5))) == 5
    with pytest.raises(slt.BudgetExceeded, match="nonzero"), slt.memory_limit("1kB"):
        torch.nonzero(torch.ones(100))


def test_a_step_is_the_same_under_a_limit():
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    one, other = slt.load_model("resnet20"), slt.load_model("resnet20")
    other.load_state_dict(one.state_dict())
    F.cross_entropy(one(images), labels).backward()
    with slt.memory_limit("1GB", other):
        F.cross_entropy(other(images), labels).backward()
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_layouts_that_torch_foresees_wrongly_are_learned_by_calibration(tmp_path, monkeypatch):
    """Without our own corrections a calibration finds them out, and predicts as well."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
            self.out = nn.Linear(8, 10)

        def forward(self, x):
            x = F.hardswish(self.two(F.hardtanh(self.one(x))))
            return self.out(x.roll(1, 2).transpose(2, 3).mean((2, 3)))

    monkeypatch.setenv("SLT_CACHE", str(tmp_path))
    monkeypatch.setattr(corrections, "_CORRECTIONS", {})
    operators.forget()
    graph = slt.trace(Mixed(), (3, 12, 12))
    config = slt.Config.full_network()
    spec = slt.StepSpec(batch_size=4, memory_format="channels_last")
    slt.calibrate(graph, [config], spec)
    predicted, measured = slt.predict(graph, config, spec), slt.measure(slt.extract(graph, None, config), spec)
    operators.forget()
    assert predicted.exact
    assert (predicted.peak_bytes, predicted.tensor_peak_bytes) == (measured.peak_bytes, measured.tensor_peak_bytes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_said_in_one_line():
    with pytest.raises(slt.InputError, match="no CUDA device here"):
        slt.memory_limit("1GB", device="cuda")
    with pytest.raises(slt.InputError, match="no CUDA device here"):
        slt.measure(nn.Linear(2, 2), slt.StepSpec(device="cuda"), (2,), 2)
