"""The promise on the main example: a plan that says it fits, fits; one notch more would not."""

from functools import partial

import pytest

from slt_planner.config import StepSpec
from slt_planner.graph.trace import trace
from slt_planner.models.registry import load_model
from slt_planner.planning.solve import solve
from tests.plain_measure import plain_peak
from tests.reference_resnet import HandCutResNet

MODEL = load_model("resnet20")
GRAPH = trace(MODEL, (3, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budgets", "batch", "statuses"),
    [
        (["64MB", "128MB", "256MB"], 128, ["scheduled", "scheduled", "full"]),
        (["14MB", "16MB"], 32, ["infeasible", "scheduled"]),
    ],
)
def test_every_stage_fits_and_every_proof_is_over_by_an_independent_measurement(budgets, batch, statuses):
    """Nothing of the planner measures here: a network cut by hand, a plain loop, torch's exported trace."""
    plan = solve(GRAPH, budgets, StepSpec(batch_size=batch))
    assert [tier.status for tier in plan.tiers] == statuses
    peaks = {}

    def peak(config):
        if config not in peaks:
            by_hand = partial(HandCutResNet.of_resnet20, MODEL, **config.model_dump())
            peaks[config] = plain_peak(by_hand, batch, steps=2)
        return peaks[config]

    binding = plan.binding_tier
    for tier in plan.feasible_tiers:
        less_frozen = {proof.stage: proof for proof in tier.proofs if proof.kind == "less_frozen"}
        for number, stage in enumerate(tier.stages):
            assert peak(stage.config) <= tier.budget_bytes
            assert peak(stage.config) == stage.measured_peak_bytes
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
