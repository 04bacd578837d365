"""The promise on the main example: a plan that says it fits, fits; one notch more would not."""

from functools import partial

import pytest

from slt_planner.config import Config, StepSpec, Tier
from slt_planner.errors import InfeasibleError
from slt_planner.graph.trace import trace
from slt_planner.models.registry import load_model
from slt_planner.planning.solve import solve
from tests.plain_measure import plain_peak
from tests.reference_resnet import HandCutResNet

MODEL = load_model("resnet20")
GRAPH = trace(MODEL, (3, 32, 32))


def independent_peak(batch):
    """Nothing of the planner measures here: a network cut by hand, a plain loop, torch's exported trace."""
    peaks = {}

    def peak(config):
        if config not in peaks:
            by_hand = partial(HandCutResNet.of_resnet20, MODEL, **config.model_dump())
            peaks[config] = plain_peak(by_hand, batch, steps=2)
        return peaks[config]

    return peak


def check_promise(plan, peak):
    """Every stage fits, everything one notch further is over, and no proof is missing."""
    binding = plan.binding_tier
    for tier in plan.feasible_tiers:
        less_frozen = {proof.stage: proof for proof in tier.proofs if proof.kind == "less_frozen"}
        for number, stage in enumerate(tier.stages):
            assert peak(stage.config) <= tier.budget_bytes
            assert peak(stage.config) == stage.measured_peak_bytes == stage.predicted_peak_bytes
            if stage.freeze_depth > 0:
                proof = less_frozen[number]
                assert (proof.freeze_depth, proof.head_scale) == (stage.freeze_depth - 1, stage.head_scale)
                assert peak(proof.config) > tier.budget_bytes
    wider = {proof.stage: proof for proof in binding.proofs if proof.kind == "wider_head"}
    for number, stage in enumerate(plan.stages):
        assert (number in wider) == (stage.limited_by == "budget")
        if stage.limited_by == "budget":
            config = wider[number].config
            assert config.freeze_depth == max(0, stage.full_depth - 1)
            scales = GRAPH.head_scales(stage.full_depth)
            assert config.head_scale == scales[scales.index(stage.head_scale) + 1]
            assert peak(config) > binding.budget_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budgets", "batch", "statuses"),
    [
        (["64MB", "128MB", "256MB"], 128, ["scheduled", "scheduled", "full"]),
        (["14MB", "16MB"], 32, ["infeasible", "scheduled"]),
    ],
)
def test_every_stage_fits_and_every_proof_is_over_by_an_independent_measurement(budgets, batch, statuses):
    plan = solve(GRAPH, budgets, StepSpec(batch_size=batch))
    assert [tier.status for tier in plan.tiers] == statuses
    check_promise(plan, independent_peak(batch))


@pytest.mark.slow
def test_the_promise_holds_from_the_smallest_budget_on_and_a_byte_less_has_no_schedule():
    spec = StepSpec(batch_size=8)
    ends = solve(GRAPH, ["1kB", "1GB"], spec)
    smallest, whole = ends.tiers[0].smallest_budget_bytes, ends.full_network.peak_bytes
    peak = independent_peak(8)
    for times in (1, 1.05, 1.5, 2):
        plan = solve(GRAPH, [Tier(name="one", budget_bytes=int(times * smallest), share=1.0)], spec)
        assert plan.tiers[0].status == "scheduled"
        check_promise(plan, peak)
    assert 2 * smallest < whole
    narrowest = [Config(freeze_depth=max(0, k - 1), full_depth=k, head_scale=1 / 64) for k in range(19)]
    first = next(k for k, config in enumerate(narrowest) if peak(config) >= smallest)
    words = rf"stage {first} needs .* 1 B more than there is \(in .*, backward, .*the largest batch within this one 7 "
    with pytest.raises(InfeasibleError, match=words):
        solve(GRAPH, [Tier(name="one", budget_bytes=smallest - 1, share=1.0)], spec)
