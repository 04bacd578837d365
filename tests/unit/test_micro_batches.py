"""Micro-batches: the same gradients as the batch's, memory as a plain loop needs it, and what is refused."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from slt_planner.config import Config, StepSettings, StepSpec
from slt_planner.data.datasets import Dataset
from slt_planner.errors import InputError
from slt_planner.federated.client import LocalTraining, local_batches, train_client
from slt_planner.federated.result import RunSettings
from slt_planner.federated.setup import default_settings, load_network, prepare
from slt_planner.graph.adapter import Adapter
from slt_planner.graph.trace import trace
from slt_planner.memory.calibrate import calibrate
from slt_planner.memory.measure import measure
from slt_planner.memory.predict import predict
from slt_planner.memory.step import make_optimizer, training_step
from slt_planner.models.adapters import Detection
from slt_planner.models.registry import load_model
from slt_planner.planning.plan import Plan
from slt_planner.planning.solve import solve
from slt_planner.submodel.extract import extract
from tests.plain_measure import plain_peak
from tests.plain_tensors import plain_tensor_peak
from tests.unit.test_solve import small_network

FULL = Config.full_network()


@dataclass
class Rescaled(Adapter):
    """Labels of two kinds, and a loss of both."""

    def loss(self, outputs, labels):
        return F.cross_entropy(outputs, labels["class"]) + F.mse_loss(outputs.mean(1), labels["size"][0])

    def example_labels(self, batch_size, num_classes, input_shape):
        return {"class": torch.randint(num_classes, (batch_size,)), "size": (torch.randn(batch_size).double(),)}


def without_norms():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


def with_norms():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )


def data(batch, side, adapter, number=torch.float64):
    torch.manual_seed(1)
    return torch.randn(batch, 3, side, side, dtype=number), adapter.example_labels(batch, 10, (3, side, side))


def gradients(network, batch, labels, adapter, **settings):
    """Of one step that changes nothing, in numbers of double precision; and the loss."""
    step = StepSettings(**settings)
    optimizer = make_optimizer(network.parameters(), step.optimizer, learning_rate=0.0)
    loss = training_step(network, optimizer, batch, labels, step, adapter)
    return loss, [parameter.grad for parameter in network.parameters()]


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 10, 11, 12])
@pytest.mark.parametrize("adapter", [Adapter(), Rescaled()], ids=["classes", "two kinds of labels"])
@pytest.mark.parametrize("name", ["vit_cifar", "without norms"])
def test_without_batch_norm_gradients_and_loss_are_the_whole_batchs(name, adapter, micro_batch):
    """But for the order of sums: at 52 bits a sum of a few thousand terms is off by some 1e-13 of the largest."""
    side = 32 if name == "vit_cifar" else 8
    network = (load_model(name) if name == "vit_cifar" else without_norms()).double().train()
    batch, labels = data(11, side, adapter)
    whole_loss, whole = gradients(network, batch, labels, adapter)
    loss, added_up = gradients(network, batch, labels, adapter, micro_batch=micro_batch)
    assert float(loss) == pytest.approx(float(whole_loss), rel=1e-6)  # pieces are added up in 32 bits
    for one, other in zip(whole, added_up, strict=True):
        assert (one - other).abs().max() <= 1e-12 * one.abs().max()


def test_with_batch_norm_each_piece_has_its_own_statistics():
    """Ghost batch norm: the sum of the pieces' own gradients, found by running each alone."""
    network = with_norms().double().train()
    batch, labels = data(11, 8, Adapter())
    _, added_up = gradients(network, batch, labels, Adapter(), micro_batch=4)
    expected = [torch.zeros_like(parameter) for parameter in network.parameters()]
    for images, own in zip(batch.split([4, 4, 3]), labels.split([4, 4, 3]), strict=True):
        network.zero_grad()
        F.cross_entropy(network(images), own).backward()
        expected = [e + len(own) / 11 * p.grad for e, p in zip(expected, network.parameters(), strict=True)]
    assert all(torch.allclose(*pair, rtol=1e-10, atol=1e-14) for pair in zip(expected, added_up, strict=True))
    _, whole = gradients(network, batch, labels, Adapter())
    assert not all(torch.allclose(*pair, rtol=1e-3) for pair in zip(whole, added_up, strict=True))


def test_a_detectors_targets_are_a_list():
    adapter = Detection(5)
    targets = adapter.example_labels(4, 5, (3, 40, 40))
    assert adapter.labels_of(targets, slice(1, 3)) == targets[1:3]


@pytest.mark.parametrize(("batch", "micro_batch"), [(1, 1), (7, None), (12, 5), (128, 12), (9, 2), (20, 128)])
def test_pieces_are_few_and_nearly_equal(batch, micro_batch):
    pieces = StepSettings(micro_batch=micro_batch).pieces(batch)
    assert sum(pieces) == batch
    assert max(pieces) <= (micro_batch or batch)
    assert len(pieces) == -(-batch // (micro_batch or batch))
    assert max(pieces) - min(pieces) <= 1


# Memory

CASES = [
    ("resnet20", FULL, {"batch_size": 11, "micro_batch": 4}),
    ("resnet20", Config(freeze_depth=4, full_depth=5, head_scale=0.5), {"batch_size": 8, "micro_batch": 2}),
    ("convnet", FULL, {"batch_size": 16, "micro_batch": 4, "optimizer": "adam"}),
    ("vit_cifar", FULL, {"batch_size": 5, "micro_batch": 1}),
    ("resnet20", FULL, {"batch_size": 8, "micro_batch": 3, "precision": "bf16", "memory_format": "channels_last"}),
    ("vit_cifar", FULL, {"batch_size": 4, "micro_batch": 2, "precision": "autocast", "set_to_none": False}),
]


@pytest.mark.parametrize(("name", "config", "settings"), CASES, ids=str)
def test_predicted_is_measured_is_what_a_plain_loop_needs(name, config, settings):
    graph, spec = trace(load_model(name, weights=False), (3, 32, 32)), StepSpec(threads=1, **settings)
    calibrate(graph, [config], spec)
    predicted, measured = predict(graph, config, spec), measure(extract(graph, None, config), spec)
    assert predicted.exact
    assert predicted.peak_bytes == measured.peak_bytes
    assert predicted.tensor_peak_bytes == measured.tensor_peak_bytes
    assert predicted.units == measured.units
    others = {key: value for key, value in settings.items() if key != "batch_size"}
    assert predicted.tensor_peak_bytes == plain_tensor_peak(extract(graph, None, config), spec.batch_size, **others)
    whole = spec.model_copy(update={"micro_batch": None})
    rows = predict(graph, config, whole).units
    assert [row.training_flops for row in predicted.units] == [row.training_flops for row in rows]
    share = max(spec.pieces(spec.batch_size)) / spec.batch_size
    if spec.precision != "autocast":  # which saves the weights' copies too
        for row, own in zip(rows, predicted.units, strict=True):
            assert own.activations_bytes == pytest.approx(row.activations_bytes * share, rel=0.01, abs=4096)


def test_the_allocators_peak_is_that_of_a_plain_loop():
    model = load_model("resnet20")
    spec = StepSpec(batch_size=11, micro_batch=4, norms="running")
    profile = measure(extract(trace(model, (3, 32, 32)), model, FULL, "running"), spec)
    assert profile.peak_bytes == plain_peak(lambda: load_model("resnet20"), 11, micro_batch=4)
    assert profile.peak_bytes < 0.6 * plain_peak(lambda: load_model("resnet20"), 11)


# What is refused


def test_a_micro_batch_is_not_larger_than_the_batch():
    with pytest.raises(ValidationError, match="micro-batches of 5 in a batch of 4: use at most that"):
        StepSpec(batch_size=4, micro_batch=5)
    assert StepSettings(micro_batch=5).with_batch(4) == StepSpec(batch_size=4)
    assert StepSettings(micro_batch=3).with_batch(4) == StepSpec(batch_size=4, micro_batch=3)
    assert StepSettings.model_validate({"precision": "bf16"}).micro_batch is None  # as written before there were any


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(12, 8), nn.Linear(8, 10)

    def forward(self, x):
        return self.out(F.batch_norm(self.layer(x.flatten(1)), None, None, training=True))


@pytest.mark.parametrize("make", [with_norms, Functional])
@pytest.mark.parametrize(("batch", "micro_batch", "right"), [(4, 1, 2), (5, 2, 3), (7, 1, 3)])
def test_batch_norm_takes_no_lone_sample(make, batch, micro_batch, right):
    side = 2 if make is Functional else 8
    graph, spec = trace(make(), (3, side, side)), StepSpec(batch_size=batch, micro_batch=micro_batch)
    for work in (predict, lambda graph, config, spec: measure(extract(graph, None, config), spec)):
        with pytest.raises(InputError, match=f"batch norm would see a single sample; use {right} or more"):
            work(graph, FULL, spec)
    work(graph, FULL, spec.model_copy(update={"micro_batch": right}))


# The trainer


def dataset(count):
    images = torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8)
    labels, mean, deviation = torch.arange(count) % 3, (0.5,) * 3, (0.3,) * 3
    return Dataset("noise", images, labels, images[:2], labels[:2], 3, mean, deviation, augment=False)


def test_a_client_takes_the_micro_batches_of_its_plan():
    """Against the same steps by hand, with fewer samples in the last batch, one of which would be alone."""
    graph = trace(small_network(), (3, 16, 16))
    torch.manual_seed(0)
    network, images = small_network(), dataset(21)
    training = LocalTraining(StepSettings(micro_batch=2), batch_size=8, epochs=1, learning_rate=0.1)
    trained = extract(graph, network, FULL)
    train_client(trained, images, np.arange(21), training, seed=1)
    generator = torch.Generator().manual_seed(1)
    batches = list(local_batches(images, np.arange(21), training, generator))
    assert [len(batch) for batch, _ in batches] == [8, 8, 4]
    by_hand = extract(graph, network, FULL)
    optimizer = torch.optim.SGD(by_hand.parameters(), 0.1, 0.9, weight_decay=1e-3)
    for batch, labels in batches:
        optimizer.zero_grad()
        for own, wanted in zip(batch.split(2), labels.split(2), strict=True):
            (F.cross_entropy(by_hand(own), wanted) * 2 / len(batch)).backward()
        optimizer.step()
    for one, other in zip(trained.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_plans_micro_batches_hold_for_smaller_local_batches_too():
    network = small_network()
    graph = trace(network, (3, 16, 16))
    plan = solve(graph, ["1GB"], StepSpec(batch_size=8, micro_batch=4, threads=1))
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert plan.spec.micro_batch == 4
    data = dataset(80)
    assert default_settings(plan, data, None).local_batch == 2
    for local_batch in (2, 8):
        settings = RunSettings(
            strategy="slt", dataset="noise", rounds=1, clients=5, cohort_size=2, local_batch=local_batch
        )
        run = prepare(plan, settings, data, load_network(plan, 0, network))
        spec = StepSpec(batch_size=local_batch, micro_batch=4 if local_batch == 8 else None, threads=1)
        (step,) = run.client_peaks
        assert run.client_peaks[step] == measure(extract(graph, None, step.config), spec, details=False).peak_bytes
