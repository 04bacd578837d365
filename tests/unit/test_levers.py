"""Which sets of levers a planner tries, and plans whose stages use them."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import slt_planner as slt
from slt_planner.config import Config, StepSpec, Tier
from slt_planner.errors import InfeasibleError, InputError
from slt_planner.graph.trace import trace
from slt_planner.memory.calibrate import calibrate
from slt_planner.memory.measure import measure
from slt_planner.memory.predict import predict
from slt_planner.planning.levers import EXACT, lever_sets
from slt_planner.planning.solve import solve
from slt_planner.planning.verify import verify
from slt_planner.reporting.words import tier_headline
from slt_planner.submodel.extract import extract
from slt_planner.submodel.pieces import most_recomputed
from tests.unit.test_solve_random import BUDGETS, Brute, Residual, convolution, networks


def test_no_levers_is_one_set_without_any():
    assert lever_sets("none", StepSpec(), images=True) == ((),)


def test_auto_begins_with_the_plain_step_and_ends_with_all_exact_levers():
    sets = auto_sets()
    assert sets[0] == ()
    assert set(sets[-1]) == set(EXACT)
    assert len(set(sets)) == len(sets)


def test_exact_is_all_exact_levers_always():
    (only,) = lever_sets("exact", StepSpec(), images=True)
    assert set(only) == set(EXACT)


def test_what_the_step_has_or_cannot_have_is_no_lever():
    for spec, images, missing in (
        (StepSpec(memory_format="channels_last"), True, {"channels_last"}),
        (StepSpec(), False, {"channels_last"}),
        (StepSpec(levers=("recompute",)), True, {"recompute"}),
        (StepSpec(batch_size=32, micro_batch=8), True, {"early_updates"}),
    ):
        (only,) = lever_sets("exact", spec, images)
        assert set(only) == set(EXACT) - missing


def test_recomputing_comes_in_amounts():
    """The planner tries the small ones first; a list names what it may use."""
    amounts = ["recompute:1", "recompute:2", "recompute:4", "recompute"]
    tried = [[lever for lever in levers if lever.startswith("recompute")] for levers in auto_sets()]
    assert tried == [[], [], *[[amount] for amount in amounts[:3]], ["recompute:2"], ["recompute"], ["recompute"]]
    sets = lever_sets("recompute:4,split_convolutions", StepSpec(), images=True)
    assert sets == ((), ("recompute:4",), ("split_convolutions",), ("split_convolutions", "recompute:4"))
    assert StepSpec().with_levers(["recompute", "recompute:2"]).levers == ("recompute:2", "recompute")
    assert most_recomputed(("recompute:2", "recompute")) is None
    assert most_recomputed(("recompute:2", "lean_norms")) == 2
    assert most_recomputed(("lean_norms",)) == 0
    only_all = lever_sets("auto", StepSpec(levers=("recompute",)), images=True)
    assert not any(lever.startswith("recompute") for levers in only_all for lever in levers)


def auto_sets():
    return lever_sets("auto", StepSpec(), images=True)


def test_a_list_is_used_alone_and_what_is_not_exact_comes_last():
    sets = lever_sets("recompute,bf16,lean_norms", StepSpec(), images=True)
    assert sets == ((), ("lean_norms",), ("lean_norms", "recompute"), ("lean_norms", "recompute", "bf16"))


def test_micro_batches_leave_early_updates_out():
    sets = lever_sets("early_updates,micro_batches:8", StepSpec(batch_size=32), images=True)
    assert sets == ((), ("early_updates",), ("micro_batches:8",))


@pytest.mark.parametrize(
    "asked", ["recomputed", "recompute,", "recompute:3", "micro_batches:0", "micro_batches", "auto,recompute"]
)
def test_a_lever_that_does_not_exist_is_refused_with_the_list_of_those_that_do(asked):
    with pytest.raises(InputError, match="known are auto, none, exact, or a list of in_place_prefix"):
        lever_sets(asked, StepSpec(), images=True)


@pytest.mark.parametrize("asked", ["micro_batches:8,micro_batches:4", "lean_norms,bf16,autocast"])
def test_levers_that_exclude_each_other_are_refused(asked):
    with pytest.raises(InputError, match=f"--levers {asked}: .* and .* exclude each other; leave one of them out"):
        lever_sets(asked, StepSpec(batch_size=32), images=True)


def test_a_step_with_levers_is_the_same_step_but_for_them():
    spec = StepSpec(batch_size=32, optimizer="adam", threads=1)
    lean = spec.with_levers(["recompute", "in_place_prefix", "channels_last", "micro_batches:8", "autocast"])
    assert lean.levers == ("in_place_prefix", "recompute")
    assert (lean.memory_format, lean.micro_batch, lean.precision) == ("channels_last", 8, "autocast")
    assert (
        lean.model_copy(update={"levers": (), "memory_format": "contiguous", "micro_batch": None, "precision": "fp32"})
        == spec
    )


class LeanBrute(Brute):
    """What each set of levers makes of each configuration; searched is the least of the two leanest sets."""

    def __init__(self, graph, spec, sets):
        self.graph = graph
        everything = {
            self.config(f, k, s) for k in range(graph.depth + 1) for s in graph.head_scales(k) for f in range(max(1, k))
        }
        self.by_set = {}
        for levers in sets:
            own = spec.with_levers(levers)
            calibrate(graph, list(everything), own)
            self.by_set[levers] = {c: predict(graph, c, own, details=False).peak_bytes for c in everything}
        self.peaks = {config: min(self.by_set[levers][config] for levers in sets[-2:]) for config in everything}
        self.least = {config: min(peaks[config] for peaks in self.by_set.values()) for config in everything}


LISTED = "copied_cuts,lean_norms,recompute:1,recompute"


@given(networks(most=2), st.sampled_from(["coupled", "per-tier"]))
@settings(max_examples=3, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))  # shrinking takes long
def test_a_plan_is_no_worse_than_brute_force_with_the_leanest_levers_and_no_lever_refutes_it(network, policy):
    """And where there is none, brute force finds none."""
    graph, spec = trace(network, (2, 6, 6)), StepSpec(batch_size=4)
    sets = lever_sets(LISTED, spec, images=True)
    brute = LeanBrute(graph, spec, sets)
    low, high = min(brute.peaks.values()), max(brute.peaks.values())
    for number in range(BUDGETS):
        budget = low + (high - low) * (number - 1) // (BUDGETS - 2)
        expected = brute.plan((budget,), policy)[budget]
        tier = Tier(name="one", budget_bytes=budget, share=1.0)
        try:
            plan = solve(graph, [tier], spec, verify=False, policy=policy, levers=LISTED)
        except InfeasibleError:
            assert expected is None
            continue
        found = {stage.full_depth: stage.head_scale for stage in plan.stages}
        for _, full_depth, head_scale in expected or ():
            assert found.get(full_depth, 1.0) >= head_scale
        (only,) = plan.tiers
        for stage in only.stages:
            fitting = [levers for levers in sets if brute.by_set[levers][brute.legal(stage.config)] <= budget]
            assert stage.levers == fitting[0]  # the cheapest that fits
        for proof in only.proofs:
            assert proof.peak_bytes == brute.least[brute.legal(proof.config)] > budget


def residual_network():
    torch.manual_seed(0)
    blocks = [Residual(8, 8, norm=True) for _ in range(2)]
    return nn.Sequential(
        convolution(3, 8, 3, norm=True), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )


SPEC = StepSpec(batch_size=8)


@pytest.fixture(scope="module")
def lean_plan():
    """In half of what a plain step of the whole network needs, and in three quarters."""
    graph = trace(residual_network(), (3, 16, 16))
    whole = measure(extract(graph, None, Config.full_network()), SPEC, details=False).peak_bytes
    tiers = [Tier(name=str(share), budget_bytes=int(share * whole), share=0.5) for share in (0.5, 0.75)]
    return graph, solve(graph, tiers, SPEC, levers="auto")


def test_every_stage_is_measured_within_budget_with_its_levers(lean_plan):
    graph, plan = lean_plan
    for tier in plan.tiers:
        for stage in tier.stages:
            spec = plan.spec.with_levers(stage.levers)
            assert stage.measured_peak_bytes <= tier.budget_bytes
            again = measure(extract(graph, None, stage.config, spec.norms), spec, details=False).peak_bytes
            assert again == stage.measured_peak_bytes == stage.predicted_peak_bytes
            assert (stage.relative_time is None) == (not stage.levers)


def test_no_set_of_levers_makes_a_proof_fit(lean_plan):
    graph, plan = lean_plan
    for tier in plan.tiers:
        for proof in tier.proofs:
            for levers in plan.lever_sets:
                spec = plan.spec.with_levers(levers)
                sub = extract(graph, None, proof.config, spec.norms)
                assert measure(sub, spec, details=False).peak_bytes >= proof.measured_peak_bytes > tier.budget_bytes


def test_a_plan_with_levers_is_saved_loaded_and_verified(lean_plan, tmp_path):
    _, plan = lean_plan
    plan.save(tmp_path / "plan.json")
    loaded = slt.load_plan(tmp_path / "plan.json")
    assert loaded == plan
    checked = verify(loaded, residual_network())
    assert not checked.stages_over
    assert not checked.proofs_within
    assert any(peak.levers for peak in checked.peaks)


def test_levers_that_a_plan_does_not_have_are_refused(lean_plan):
    _, plan = lean_plan
    fields = plan.model_dump()
    fields["tiers"][0]["stages"][0]["levers"] = ["recompute"]
    with pytest.raises(ValueError, match="levers that the plan does not have"):
        slt.Plan.model_validate(fields)


def test_a_client_trains_with_the_levers_of_its_stage(lean_plan, tmp_path):
    """Under the enforced budget, which plain steps would pass; and the small network gets the same levers."""
    _, plan = lean_plan
    for strategy, rounds in (("slt", len(plan.stages)), ("small", 1)):
        result = slt.train(
            plan, rounds=rounds, strategy=strategy, out=tmp_path / strategy, clients=40, cohort_size=2,
            enforce=True, model=residual_network(), local_batch=8, seed=1,
        )  # fmt: skip
        assert all(tier.measured_peak_bytes <= tier.budget_bytes for tier in result.tiers)
        assert result.status == "finished"


def test_a_whole_network_that_levers_make_fit_is_said_to_need_them(lean_plan):
    graph, plan = lean_plan
    budget = plan.full_network.peak_bytes * 9 // 10
    plan = solve(graph, [Tier(name="one", budget_bytes=budget, share=1.0)], SPEC, levers="auto")
    (tier,) = plan.tiers
    assert tier.status == "full"
    assert [stage.config for stage in tier.stages] == [Config(freeze_depth=0, full_depth=graph.depth, head_scale=1.0)]
    assert tier.stages[0].levers
    assert tier_headline(tier, plan) == "could train the whole network alone, with levers"
