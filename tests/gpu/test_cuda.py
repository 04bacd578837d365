"""On a CUDA device: memory measured, predicted, limited; and clients that train there. Skipped where there is none."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import slt_planner as slt
from slt_planner.federated.engines.batched import BatchedEngine
from slt_planner.federated.engines.cached import CachingEngine
from slt_planner.federated.engines.local import LocalEngine
from slt_planner.federated.rounds import run_round
from tests.unit.test_batched_clients import assert_close, trained_by
from tests.unit.test_prefix_cache import PLENTY, running_plan
from tests.unit.tiny_runs import dataset, full_plan, prepared, scheduled_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CONFIGS = [slt.Config.full_network(), slt.Config(freeze_depth=4, full_depth=5, head_scale=0.5)]


@pytest.fixture(scope="module")
def graph():
    return slt.trace(slt.load_model("resnet20"), (3, 32, 32))


def plain_peak(network, batch: int) -> int:
    """The allocator's own high-water mark in the third step of a plain loop."""
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
    # What kernels' libraries keep (cuBLAS) may have come before the plain loop began.
    assert plain_peak(slt.extract(graph, None, config), 64) == pytest.approx(profile.peak_bytes, rel=0.1)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_calibrated_prediction_is_near_the_truth(graph, config):
    spec = slt.StepSpec(batch_size=64, device="cuda")
    slt.calibrate(graph, [config], spec)
    predicted, measured = slt.predict(graph, config, spec), slt.measure(slt.extract(graph, None, config), spec)
    assert predicted.exact
    library = measured.resident["workspace"]  # kept for ever by kernels' libraries: a constant to report
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes - library, rel=0.005)


def test_a_limit_stops_a_step(graph):
    network = slt.extract(graph, None, CONFIGS[0]).to("cuda")
    images = torch.randn(64, 3, 32, 32, device="cuda")
    with pytest.raises(slt.BudgetExceeded, match="aten::"), slt.memory_limit("20MB", network, device="cuda"):
        network(images).sum().backward()


@pytest.fixture
def exact_products():
    """Without TF32, whose 11 bits are another matter than the order of sums."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("strategy", ["slt", "heterofl"])
def test_a_client_trains_on_cuda_as_on_the_cpu(exact_products, strategy):
    there, here = (
        prepared(scheduled_plan(), dataset(), strategy=strategy, cohort_size=5, device=device)
        for device in ("cuda", "cpu")
    )
    state = replace(here.start, round=4)
    (_, on_cuda), (_, on_cpu) = trained_by(LocalEngine(), there, state), trained_by(LocalEngine(), here, state)
    assert all(value.device.type == "cpu" for own, _ in on_cuda for value in own.values())
    assert_close(here, state, on_cuda, on_cpu)
    row = run_round(there, state)[1]
    assert row.loss == pytest.approx(run_round(here, state)[1].loss, rel=1e-3)


@pytest.mark.parametrize("plan", [full_plan, running_plan])
def test_batched_clients_train_on_cuda_as_each_does_alone(exact_products, plan):
    run = prepared(plan(), dataset(), cohort_size=5, device="cuda")
    for number in (0, 5):
        state = replace(run.start, round=number)
        (_, alone), (_, stacked) = trained_by(LocalEngine(), run, state), trained_by(BatchedEngine(5), run, state)
        assert_close(run, state, stacked, alone)


def test_a_prefix_cache_on_cuda_changes_nothing_that_counts(exact_products):
    run = prepared(running_plan(), dataset(), cohort_size=5, device="cuda")
    state = replace(run.start, round=5)
    engine = CachingEngine(PLENTY)
    (_, plain), (_, cached) = trained_by(LocalEngine(), run, state), trained_by(engine, run, state, depth=1)
    assert engine.cache.bytes > 0
    assert_close(run, state, cached, plain)
