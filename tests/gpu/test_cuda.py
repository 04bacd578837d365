"""Memory on a CUDA device: measured, predicted, limited. Skipped where there is none."""

import pytest
import torch
import torch.nn.functional as F

import slt_planner as slt

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
