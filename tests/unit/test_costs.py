"""Estimates of time and energy against arithmetic by hand; what need not travel against what a round leaves alone."""

import doctest
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from slt_planner.config import DeviceFigures, StepSpec, Tier
from slt_planner.graph.trace import trace
from slt_planner.planning.costs import RoundCost, round_cost, stage_cost, unchanging_bytes
from slt_planner.planning.solve import solve
from slt_planner.planning.tiers import load_tiers
from slt_planner.submodel.extract import extract
from slt_planner.submodel.merge import merge
from tests.unit.sample_records import sample_plan

ROOT = Path(__file__).parents[2]
PHONE = DeviceFigures(flops_per_s=2e9, upload_bytes_per_s=1e6, download_bytes_per_s=5e6, power_w=4.0, link_power_w=2.0)


def test_a_round_by_hand():
    """10^10 FLOP at 2 * 10^9 a second; 3 MB up at 1 MB/s, 10 MB down at 5 MB/s; 4 W for 5 s and 2 W for 5 s."""
    cost = round_cost(PHONE, 10**10, 3_000_000, 10_000_000)
    assert cost == RoundCost(compute_s=5.0, transfer_s=5.0, compute_j=20.0, transfer_j=10.0)
    assert (cost.round_s, cost.energy_j) == (10.0, 30.0)
    assert RoundCost.model_validate_json(cost.model_dump_json()) == cost


FIGURES = ["flops_per_s", "upload_bytes_per_s", "download_bytes_per_s", "power_w", "link_power_w"]


@pytest.mark.parametrize("known", list(itertools.product([False, True], repeat=len(FIGURES))))
def test_what_is_unknown_makes_unknown_what_needs_it_and_nothing_else(known):
    has = dict(zip(FIGURES, known, strict=True))
    device = DeviceFigures(**{name: getattr(PHONE, name) for name in FIGURES if has[name]})
    cost = round_cost(device, 10**10, 3_000_000, 10_000_000)
    link = has["upload_bytes_per_s"] and has["download_bytes_per_s"]
    compute_j, transfer_j = has["flops_per_s"] and has["power_w"], link and has["link_power_w"]
    assert (cost.compute_s, cost.transfer_s) == (5.0 if has["flops_per_s"] else None, 5.0 if link else None)
    assert (cost.compute_j, cost.transfer_j) == (20.0 if compute_j else None, 10.0 if transfer_j else None)
    assert cost.round_s == (10.0 if has["flops_per_s"] and link else None)
    assert cost.energy_j == (30.0 if compute_j and transfer_j else None)


@given(st.integers(1, 10**15), st.integers(0, 10**10), st.integers(0, 10**10), st.integers(2, 5))
def test_costs_grow_in_proportion(flops, up, down, times):
    one, many = round_cost(PHONE, flops, up, down), round_cost(PHONE, times * flops, times * up, times * down)
    assert many.round_s == pytest.approx(times * one.round_s)
    assert many.energy_j == pytest.approx(times * one.energy_j)


def test_a_stage_by_hand():
    stage = (
        sample_plan()
        .tiers[0]
        .stages[0]
        .model_copy(update={"train_flops_per_sample": 10**7, "upload_bytes": 3_000_000, "download_bytes": 10_000_000})
    )
    assert stage.frozen_bytes == 7_000_000
    assert stage_cost(stage, PHONE, samples=500, local_epochs=2) == round_cost(PHONE, 10**10, 3_000_000, 10_000_000)
    again = stage_cost(stage, PHONE, samples=500, held_bytes=5_000_000)
    assert (again.compute_s, again.transfer_s) == (2.5, 3.0 + 1.0)


def test_plans_without_download_bytes_have_no_transfer_estimate():
    plan = sample_plan()
    assert plan.tiers[0].stages[0].download_bytes is plan.tiers[0].stages[0].frozen_bytes is None
    assert unchanging_bytes(plan, 0) is None
    cost = stage_cost(plan.tiers[0].stages[0], PHONE, samples=10)
    assert cost.compute_s is not None
    assert cost.transfer_s is cost.energy_j is cost.round_s is None


class Narrowing(nn.Module):
    """Early layers hold most of the memory: the weaker a tier, the more it freezes."""

    def __init__(self):
        super().__init__()
        widths = [3, 8, 8, 12, 12]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.fc = nn.Linear(12, 3)

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu()
        return self.fc(x.mean((2, 3)))


def twin(name):
    """Averages leave a norm's count of batches alone; it goes with the norm's running statistics."""
    return name.replace("num_batches_tracked", "running_mean")


@pytest.mark.parametrize("norms", ["static", "running"])
def test_what_need_not_travel_again_is_what_a_round_leaves_alone(norms):
    """The clients of every tier train everything they may; what is then the same on the server stays unsent."""
    model = Narrowing()
    graph = trace(model, (3, 16, 16))
    spec = StepSpec(batch_size=16, norms=norms)
    budgets = [1, 10**9]
    first = solve(graph, [Tier(name=str(size), budget_bytes=size, share=0.5) for size in budgets], spec)
    smallest, enough = first.tiers[0].smallest_budget_bytes, first.full_network.peak_bytes
    budgets = [smallest, (smallest + enough) // 2]
    plan = solve(graph, [Tier(name=str(size), budget_bytes=size, share=0.5) for size in budgets], spec)
    assert len(plan.feasible_tiers) == 2
    before = model.state_dict()
    unchanging = []
    for number in range(len(plan.stages)):
        updates, held = [], {}
        for tier in plan.tiers:
            sub = extract(graph, model, tier.stages[number].config, norms)
            held = sub.state_dict()
            assert tier.stages[number].download_bytes == sum(t.numel() * t.element_size() for t in held.values())
            trained = {name: value + 1 for name, value in sub.trained_state().items()}
            updates.append((tier.stages[number].config, trained, 1))
        after = merge(graph, before, updates)
        unchanging.append(sum(held[name].nbytes for name in held if torch.equal(before[twin(name)], after[twin(name)])))
    assert [unchanging_bytes(plan, number) for number in range(len(plan.stages))] == unchanging
    weak, strong = ([stage.frozen_bytes for stage in tier.stages] for tier in plan.tiers)
    assert 0 < sum(strong) < sum(weak)  # so the test is of tiers that freeze different parts


def test_the_example_in_the_documentation(monkeypatch):
    monkeypatch.chdir(ROOT)
    result = doctest.testfile(str(ROOT / "docs" / "costs.md"), module_relative=False)
    assert (result.failed, result.attempted) == (0, 6)
    (phone,) = load_tiers("profiles/devices.toml", "phone-a")
    text = (ROOT / "docs" / "costs.md").read_text()
    compute, transfer = 156_602_112 * 500 / 5.6e9, 965_160 / (11e6 / 8) + 1_171_816 / (36e6 / 8)
    assert (
        f"takes {compute:.1f} s of training and {transfer:.1f} s of transfer, and {compute * 2.5 + transfer * 2:.1f} J"
        in text
    )
    assert (phone.flops_per_s, phone.power_w, phone.link_power_w) == (5.6e9, 2.5, 2.0)
