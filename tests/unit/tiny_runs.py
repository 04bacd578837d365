"""Federated runs of a tiny network on made-up images, for tests."""

from functools import cache

import torch

from slt_planner.config import StepSpec, Tier
from slt_planner.data.datasets import Dataset
from slt_planner.federated.experiment import run_experiment
from slt_planner.federated.result import RunSettings
from slt_planner.federated.setup import load_network, prepare
from slt_planner.graph.trace import trace
from slt_planner.planning.solve import solve
from tests.unit.test_solve import small_network

SPEC = StepSpec(batch_size=8, threads=1)


def network(seed=0):
    torch.manual_seed(seed)
    return small_network()


GRAPH = trace(network(), (3, 16, 16))


@cache
def full_plan():
    return solve(GRAPH, ["1GB"], SPEC)


@cache
def scheduled_plan():
    """Three tiers: one that cannot, one that is scheduled, one that could train everything."""
    full = full_plan().full_network.peak_bytes
    tiers = [("tiny", 1000), ("weak", full - 1), ("strong", 2 * full)]
    return solve(
        GRAPH, [Tier(name=n, budget_bytes=b, share=s) for (n, b), s in zip(tiers, (0.2, 0.4, 0.4), strict=True)], SPEC
    )


@cache
def dataset():
    """80 training and 23 test images of 3 classes: the class is the brightest channel."""
    random = torch.Generator().manual_seed(5)
    labels = torch.randint(3, (103,), generator=random)
    images = (torch.rand(103, 3, 16, 16, generator=random) * 120).to(torch.uint8)
    images[torch.arange(103), labels] += 100
    return Dataset("made up", images[:80], labels[:80], images[80:], labels[80:], 3, (0.4,) * 3, (0.2,) * 3, False)


def settings_of(**changes):
    values = {
        "strategy": "slt",
        "dataset": "made",
        "rounds": 6,
        "clients": 5,
        "cohort_size": 2,
        "local_batch": 8,
        "seed": 3,
    }
    return RunSettings(**{**values, **changes})


def prepared(plan, data, **changes):
    return prepare(plan, settings_of(**changes), data, load_network(plan, 0, network()))


def run(plan, data, folder, **changes):
    return run_experiment(prepared(plan, data, **changes), folder)
