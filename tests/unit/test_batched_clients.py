"""Clients that are stacked and trained at once: what each of them trains is what the plain loop makes of it alone.

float32 has 24 bits, so one rounding is up to 6e-8 of a number. Stacked convolutions add up the same products in another
order, and a handful of steps carries the differences on; measured, with the small network they stay below 4e-6 of how
far an update moves the weights. Tests allow 1e-4 of that: another momentum (0.89) moves them by a hundredth and more.
In a deep network rounding grows faster from step to step, so resnet20 is compared in float64: what is left there is
rounding of 53 bits, and a mistake would not be.
"""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from slt_planner.config import Config, StepSpec
from slt_planner.data.datasets import Dataset
from slt_planner.federated.client import LocalTraining, train_client
from slt_planner.federated.engines import batched
from slt_planner.federated.engines.batched import BatchedEngine
from slt_planner.federated.engines.local import LocalEngine
from slt_planner.federated.experiment import begin_run, continue_run
from slt_planner.federated.progress import Holders
from slt_planner.federated.rounds import draw_cohort
from slt_planner.federated.stacked_clients import can_be_stacked, train_stacked
from slt_planner.graph.adapter import Adapter
from slt_planner.graph.trace import trace
from slt_planner.memory import step as memory_step
from slt_planner.models.registry import load_model
from slt_planner.submodel.extract import extract
from tests.unit.test_prefix_cache import running_plan
from tests.unit.tiny_runs import GRAPH, dataset, full_plan, network, prepared, run, scheduled_plan

CLOSE = 1e-4  # of the update's size


def trained_by(engine, here, state, depth=0):
    cohort = draw_cohort(here, state)
    return cohort, list(engine.train_cohort(here, state, cohort, Holders(depth=depth)))


def assert_close(here, state, ours, theirs, close=CLOSE):
    """Each client's trained tensors and loss."""
    for (own, loss), (expected, expected_loss) in zip(ours, theirs, strict=True):
        assert own.keys() == expected.keys()
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        moved = max(float((expected[n] - reference(here, state, n, expected[n])).abs().max()) for n in expected)
        for name, value in expected.items():
            assert own[name].dtype == value.dtype
            assert float((own[name] - value).abs().max()) <= close * moved, name


def reference(here, state, name, like):
    """The entries of a tensor that are trained first; those of the first channels."""
    return state.weights[name][tuple(slice(0, size) for size in like.shape)]


def stacks(monkeypatch):
    """How many clients were in each stack."""
    sizes, train = [], batched.train_stacked
    monkeypatch.setattr(batched, "train_stacked", lambda *own: (sizes.append(len(own[2])), train(*own))[1])
    return sizes


@pytest.mark.parametrize(
    ("strategy", "plan"),
    [
        ("slt", scheduled_plan),
        ("heterofl", scheduled_plan),
        ("small", full_plan),
        *[(name, running_plan) for name in ("slt", "small", "heterofl")],
    ],
)
def test_each_client_trains_as_it_does_alone(monkeypatch, strategy, plan):
    """Static norms, and running ones, whose statistics move; warm-up, frozen and full stages."""
    sizes = stacks(monkeypatch)
    here = prepared(plan(), dataset(), strategy=strategy, clients=8, cohort_size=8, local_epochs=2)
    for number in range(0, here.settings.rounds, 2):
        state = replace(here.start, round=number)
        cohort, theirs = trained_by(LocalEngine(), here, state)
        _, ours = trained_by(BatchedEngine(4), here, state)
        assert_close(here, state, ours, theirs)
    assert max(sizes) > 1
    assert max(sizes) <= 4
    assert cohort


@pytest.mark.parametrize("norms", ["static", "running"])
@pytest.mark.parametrize(
    "config", [Config.full_network(), Config(freeze_depth=4, full_depth=5, head_scale=0.5)], ids=str
)
def test_a_deep_network_trains_alike_in_float64(monkeypatch, norms, config):
    monkeypatch.setattr(memory_step, "dtype", lambda step: torch.float64)
    torch.manual_seed(0)
    model = load_model("resnet20")
    graph = trace(model, (3, 32, 32))
    images, labels = (torch.rand(96, 3, 32, 32) * 255).to(torch.uint8), torch.randint(10, (96,))
    data = Dataset("made up", images, labels, images[:0], labels[:0], 10, (0.5,) * 3, (0.25,) * 3, augment=True)
    training = LocalTraining(StepSpec(batch_size=16, norms=norms).settings, 16, 1, 0.1)
    clients, seeds = [np.arange(43), np.arange(48, 91)], [1, 2]
    stacked = train_stacked(extract(graph, model, config, norms).double(), data, clients, training, seeds)
    for (own, loss), indices, seed in zip(stacked, clients, seeds, strict=True):
        alone = extract(graph, model, config, norms).double()
        assert train_client(alone, data, indices, training, seed) == pytest.approx(loss, rel=1e-6)  # summed in float32
        for name, value in alone.trained_state().items():
            assert torch.allclose(own[name].double(), value.double(), rtol=0, atol=1e-11), name


class _Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.patches(x).flatten(2).transpose(1, 2))
        return self.classifier((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def test_attention_trains_as_it_does_alone_and_without_a_word(recwarn):
    torch.manual_seed(0)
    model = _Attentive()
    sub = extract(trace(model, (3, 16, 16)), model, Config.full_network())
    training = LocalTraining(StepSpec(batch_size=8).settings, 8, 1, 0.1)
    assert can_be_stacked(sub, training)
    clients, seeds = [np.arange(16), np.arange(16, 32)], [1, 2]
    stacked = train_stacked(sub, dataset(), clients, training, seeds)
    assert not [warning.message for warning in recwarn]
    for (own, loss), indices, seed in zip(stacked, clients, seeds, strict=True):
        alone = deepcopy(sub)
        assert train_client(alone, dataset(), indices, training, seed) == pytest.approx(loss, rel=1e-5)
        for name, value in alone.trained_state().items():
            torch.testing.assert_close(own[name], value, rtol=0, atol=1e-6)


def test_levers_that_only_save_memory_are_left_out_and_change_nothing(monkeypatch):
    sizes = stacks(monkeypatch)
    levers = ("lean_norms", "early_updates", "recompute")
    plan = full_plan().model_copy(update={"step": full_plan().step.model_copy(update={"levers": levers})})
    here = prepared(plan, dataset(), strategy="full", cohort_size=5)
    _, theirs = trained_by(LocalEngine(), here, here.start)
    _, ours = trained_by(BatchedEngine(5), here, here.start)
    assert_close(here, here.start, ours, theirs)
    assert sizes == [5]


def test_clients_of_other_sizes_and_lone_ones_train_in_the_plain_loop(monkeypatch):
    sizes = stacks(monkeypatch)
    here = prepared(full_plan(), dataset(), clients=5, cohort_size=5)
    images = (16, 13, 16, 9, 16)  # tails of 5 and of 1, which is dropped
    cohort = [
        replace(own, indices=own.indices[:n]) for own, n in zip(draw_cohort(here, here.start), images, strict=True)
    ]
    theirs, ours = (
        list(engine.train_cohort(here, here.start, cohort, Holders())) for engine in (LocalEngine(), BatchedEngine(2))
    )
    assert_close(here, here.start, ours, theirs)
    assert sizes == [2]
    for lone in (1, 3, 4):
        assert all(torch.equal(ours[lone][0][name], value) for name, value in theirs[lone][0].items())


@pytest.mark.parametrize("strategy", ["fjord", "fedrolex"])
def test_what_cannot_be_stacked_is_the_plain_loop_to_the_bit(tmp_path, monkeypatch, strategy):
    """Several widths a client, other channels a round; decided before anything is trained."""
    sizes = stacks(monkeypatch)
    if strategy == "fedrolex":
        monkeypatch.setattr(batched, "can_be_stacked", lambda *own: False)
    results = [
        run(
            scheduled_plan(),
            dataset(),
            tmp_path / str(n),
            strategy=strategy,
            rounds=3,
            cohort_size=5,
            batched_clients=n,
        )
        for n in (1, 4)
    ]
    weights = [(tmp_path / n / "weights.safetensors").read_bytes() for n in ("1", "4")]
    assert weights[0] == weights[1]
    assert [row.train_loss for row in results[0].rows] == [row.train_loss for row in results[1].rows]
    assert sizes == []


class _OwnLoss(Adapter):
    def loss(self, outputs, labels):
        return super().loss(outputs, labels)


def test_what_can_be_stacked_is_known_before():
    def stackable(model, training=None, adapter=None, norms="running", **step):
        settings = StepSpec(batch_size=8, **step).settings
        graph = trace(model, (3, 16, 16), adapter)
        sub = extract(graph, model, Config.full_network(), norms)
        return can_be_stacked(sub, training or LocalTraining(settings, 8, 1, 0.1))

    dropping = nn.Sequential(*network()[:8], nn.Dropout(0.1), network()[8])
    assert stackable(network())
    assert stackable(network(), optimizer="adam")
    assert not stackable(dropping)
    assert not stackable(network(), adapter=_OwnLoss())
    assert not stackable(network(), precision="autocast")
    assert not stackable(network(), micro_batch=4)
    settings = StepSpec(batch_size=8).settings
    assert not stackable(network(), LocalTraining(settings, 8, 1, 0.1, enforce=True))
    assert not stackable(network(), LocalTraining(settings, 8, 1, 0.1, widths=(0.5, 1.0)))
    assert GRAPH.depth == 3


def test_a_run_goes_on_to_the_same_end(tmp_path):
    changes = {"rounds": 6, "cohort_size": 4, "batched_clients": 4}
    run(scheduled_plan(), dataset(), tmp_path / "whole", **changes)
    begun = prepared(scheduled_plan(), dataset(), **changes)
    begin_run(begun, tmp_path / "cut")

    def stop(row):
        raise KeyboardInterrupt

    while continue_run(begun, tmp_path / "cut", stop).status == "stopped":
        pass
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_what_does_not_go_together_is_refused_in_a_line(monkeypatch):
    def refused(words, plan=None, **changes):
        with pytest.raises(ValueError, match=words):
            prepared(plan or full_plan(), dataset(), **changes)

    refused("an enforced budget is of one", batched_clients=2, enforce=True)
    refused("neither with workers nor", batched_clients=2, workers=2)
    refused("neither with workers nor", batched_clients=2, prefix_cache="1kB")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("torch sees no CUDA device", device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refused("measured there; train with --device cpu, not cuda", device="cuda", enforce=True)
    for_cuda = full_plan().model_copy(update={"step": full_plan().step.model_copy(update={"device": "cuda"})})
    refused("measured there; train with --device cuda, not cpu", plan=for_cuda)
