"""What a run leaves to be used: weights with running statistics, and the network that they make."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slt_planner.config import Config
from slt_planner.data.datasets import normalise
from slt_planner.errors import InputError
from slt_planner.federated.evaluate import recalibrate
from slt_planner.federated.trained import load_trained
from slt_planner.graph.trace import trace
from tests.unit import tiny_runs
from tests.unit.tiny_runs import GRAPH, network, run


@pytest.fixture(scope="module")
def scheduled_plan():
    return tiny_runs.scheduled_plan()


@pytest.fixture(scope="module")
def dataset():
    return tiny_runs.dataset()


def test_recalibrated_statistics_are_the_mean_over_the_servers_images(dataset):
    weights = network().state_dict()
    new = recalibrate(GRAPH, weights, Config.full_network(), dataset, seed=1)
    first = copy.deepcopy(network()[0])
    with torch.no_grad():
        outputs = first(normalise(dataset.train_images, dataset))
    torch.testing.assert_close(new["1.running_mean"], outputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(new[k], weights[k]) for k in weights if "running" not in k)


def test_recalibrating_draws_nothing_and_counts_every_norm_that_has_running_statistics(dataset):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    graph, before = trace(model, (3, 16, 16)), torch.random.get_rng_state()
    first, again = (recalibrate(graph, model.state_dict(), Config.full_network(), dataset, seed=1) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    with torch.no_grad():
        convolved = model[0](normalise(dataset.train_images, dataset))
        normed = F.batch_norm(convolved, None, None, model[2].weight, model[2].bias, training=True)
    torch.testing.assert_close(first["2.running_mean"], convolved.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first["3.running_var"], normed.var((2, 3)).mean(0), rtol=1e-4, atol=1e-6)


def test_a_trained_network_classifies_one_image_as_the_run_says(scheduled_plan, dataset, tmp_path):
    for strategy in ("slt", "small"):
        result = run(scheduled_plan, dataset, tmp_path / strategy, strategy=strategy)
        trained = load_trained(tmp_path / strategy, network())
        images = dataset.test_images / 255
        with torch.no_grad():
            together, alone = trained(images), torch.cat([trained(image[None]) for image in images])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        right = (together.argmax(1) == dataset.test_labels).float().mean().item()
        assert right == pytest.approx(result.accuracy_running_statistics)
    (tmp_path / "small" / "weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"weights\.safetensors cannot be read"):
        load_trained(tmp_path / "small", network())
