"""On a CUDA device: memory measured, predicted, limited; and clients that train there. Skipped where there is none."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import slt_planner as slt
from slt_planner.federated.engines.batched import BatchedEngine
from slt_planner.federated.engines.cached import CachingEngine
from slt_planner.federated.engines.local import LocalEngine
from slt_planner.federated.experiment import begin_run, continue_run
from slt_planner.federated.rounds import run_round
from slt_planner.memory import step as memory_step
from slt_planner.planning.solve import solve
from tests.unit.test_batched_clients import assert_close, trained_by
from tests.unit.test_prefix_cache import PLENTY, running_plan
from tests.unit.tiny_runs import GRAPH, SPEC, dataset, full_plan, prepared, run, scheduled_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CONFIGS = [slt.Config.full_network(), slt.Config(freeze_depth=4, full_depth=5, head_scale=0.5)]


@pytest.fixture(scope="module")
def graph():
    return slt.trace(slt.load_model("resnet20"), (3, 32, 32))


def plain_peak(network, batch: int) -> int:
    """The allocator's own high-water mark in the third step of a plain loop."""
    square = torch.ones(2, 2, device="cuda", requires_grad=True)
    square.mm(square).sum().backward()  # the matrix library's workspaces, of both threads, are not the loop's
    before = torch.cuda.memory_allocated()
    network = network.to("cuda").train()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9, weight_decay=1e-3, foreach=False)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        images, labels = torch.randn(batch, 3, 32, 32, device="cuda"), torch.randint(10, (batch,), device="cuda")
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        del images, labels
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_measured_step_is_that_of_a_plain_loop(graph, config):
    spec = slt.StepSpec(batch_size=64, device="cuda")
    profile = slt.measure(slt.extract(graph, None, config), spec)
    assert sum(profile.breakdown.values()) == profile.peak_bytes
    assert profile.requested_bytes <= profile.peak_bytes <= profile.reserved_bytes
    # Blocks of the same sizes, but for remainders below 1 MB that the allocator does not split off.
    assert plain_peak(slt.extract(graph, None, config), 64) == pytest.approx(profile.peak_bytes, rel=0.02)


LEVERS = ("in_place_prefix", "copied_cuts", "lean_norms", "recompute")
STEPS = [
    {},
    {"optimizer": slt.Optimizer(name="adam")},  # its counters are on the CPU
    {"norms": "running", "levers": ("in_place_prefix",)},
    {"levers": (*LEVERS, "early_updates", "split_convolutions")},
    {"precision": "bf16", "levers": LEVERS},
    {"precision": "autocast", "memory_format": "channels_last"},
]


@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_calibrated_prediction_is_near_the_truth(graph, config, step):
    spec = slt.StepSpec.model_validate({"batch_size": 64, "device": "cuda", **step})
    slt.calibrate(graph, [config], spec)
    measured = slt.measure(slt.extract(graph, None, config, spec.norms), spec)
    predicted = slt.predict(graph, config, spec)
    assert predicted.exact
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.005)
    assert measured.resident["workspace"] < 2**20  # the ends of blocks; what libraries keep for ever is not a step's


def test_a_limit_stops_a_step(graph):
    network = slt.extract(graph, None, CONFIGS[0]).to("cuda")
    images = torch.randn(64, 3, 32, 32, device="cuda")
    with pytest.raises(slt.BudgetExceeded, match="aten::"), slt.memory_limit("20MB", network, device="cuda"):
        network(images).sum().backward()


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def close(request, monkeypatch):
    """How near two ways to train must come, of the update's size, in a number format: float64 tells mistakes from
    rounding, float32 is what runs have. Without TF32, whose 11 bits are another matter than the order of sums.
    """
    monkeypatch.setattr(memory_step, "dtype", lambda step: request.param)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield 1e-8 if request.param == torch.float64 else 1e-3
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("strategy", ["slt", "heterofl"])
def test_a_client_trains_on_cuda_as_on_the_cpu(close, strategy):
    there, here = (
        prepared(scheduled_plan(), dataset(), strategy=strategy, cohort_size=5, device=device)
        for device in ("cuda", "cpu")
    )
    state = replace(here.start, round=4)
    (_, on_cuda), (_, on_cpu) = trained_by(LocalEngine(), there, state), trained_by(LocalEngine(), here, state)
    assert all(value.device.type == "cpu" for own, _ in on_cuda for value in own.values())
    assert_close(here, state, on_cuda, on_cpu, close)
    row = run_round(there, state)[1]
    assert row.loss == pytest.approx(run_round(here, state)[1].loss, rel=1e-3)


@pytest.mark.parametrize("plan", [full_plan, running_plan])
def test_batched_clients_train_on_cuda_as_each_does_alone(close, plan):
    here = prepared(plan(), dataset(), cohort_size=5, device="cuda")
    for number in (0, 5):
        state = replace(here.start, round=number)
        (_, alone), (_, stacked) = trained_by(LocalEngine(), here, state), trained_by(BatchedEngine(5), here, state)
        assert_close(here, state, stacked, alone, close)


def test_a_prefix_cache_on_cuda_changes_nothing_that_counts(close):
    here = prepared(running_plan(), dataset(), cohort_size=5, device="cuda")
    state = replace(here.start, round=5)
    engine = CachingEngine(PLENTY)
    (_, plain), (_, cached) = trained_by(LocalEngine(), here, state), trained_by(engine, here, state, depth=1)
    assert engine.cache.bytes > 0
    assert_close(here, state, cached, plain, close)


@pytest.mark.parametrize("levers", [(), LEVERS])
def test_a_run_keeps_its_enforced_budgets_and_goes_on(tmp_path, levers):
    spec = SPEC.model_copy(update={"device": "cuda"}).with_levers(levers)
    full = solve(GRAPH, ["1GB"], spec).full_network.peak_bytes
    plan = solve(GRAPH, [slt.Tier(name="weak", budget_bytes=full - 1, share=1.0)], spec)
    whole = run(plan, dataset(), tmp_path / "whole", device="cuda", enforce=True)
    assert whole.status == "finished"
    begun = prepared(plan, dataset(), device="cuda", enforce=True)
    begin_run(begun, tmp_path / "cut")

    def stop(row):
        raise KeyboardInterrupt

    while (result := continue_run(begun, tmp_path / "cut", stop)).status == "stopped":
        pass
    assert [row.config for row in result.rows] == [row.config for row in whole.rows]
    assert not any(row.refused for row in (*result.rows, *whole.rows))
