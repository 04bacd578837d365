"""A plan measured again: what holds, what does not, and that a plan is data."""

import io

import pytest
from rich.console import Console

import slt_planner as slt
from slt_planner.planning.verify import verify
from slt_planner.reporting.verify_view import verification_view
from tests.unit.test_solve import small_network

SPEC = slt.StepSpec(batch_size=8, threads=1)
NETWORK = small_network()
GRAPH = slt.trace(NETWORK, (3, 16, 16))


@pytest.fixture(scope="module")
def plan():
    full = slt.solve(GRAPH, ["1GB"], SPEC).full_network.peak_bytes
    tiers = [("tiny", 1000), ("weak", full - 1), ("strong", 2 * full)]
    return slt.solve(GRAPH, [slt.Tier(name=n, budget_bytes=b, share=0.3) for n, b in tiers], SPEC)


def made_elsewhere(plan, factor):
    """The same plan as if another machine had measured less, or more, by a factor; budgets likewise."""
    data = plan.model_dump()
    for tier in data["tiers"]:
        tier["budget_bytes"] = round(tier["budget_bytes"] * factor)
        for peak in (*tier["stages"], *tier["proofs"]):
            peak["measured_peak_bytes"] = round(peak["measured_peak_bytes"] * factor)
        for stage in tier["stages"]:
            stage["measured_peak_bytes"] = min(stage["measured_peak_bytes"], tier["budget_bytes"])
            stage["measured_breakdown"] = {"weights": stage["measured_peak_bytes"]}
        for proof in tier["proofs"]:
            proof["measured_peak_bytes"] = max(proof["measured_peak_bytes"], tier["budget_bytes"] + 1)
    return slt.Plan.model_validate(data)


def shown(verification):
    console = Console(width=80, file=io.StringIO())
    console.print(verification_view(verification))
    return console.file.getvalue()


def test_a_plan_holds_where_it_was_made_and_each_step_is_measured_once(plan):
    told = []
    verification = verify(plan, NETWORK, progress=lambda done, of: told.append((done, of)))
    assert verification.stages_over == verification.proofs_within == ()
    assert all(peak.measured_peak_bytes == peak.planned_peak_bytes for peak in verification.peaks)
    expected = sum(len(tier.stages) + len(tier.proofs) for tier in plan.feasible_tiers)
    assert len(verification.peaks) == expected
    assert {peak.tier for peak in verification.peaks} == {"weak", "strong"}
    different = {peak.config for peak in verification.peaks}
    assert told == [(number + 1, len(different)) for number in range(len(different))]
    text = shown(verification)
    assert "every one within budget" in text
    assert "over budget" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_levers_are_named_with_what_was_measured(plan):
    lean = slt.solve(
        GRAPH, [slt.Tier(name="all", budget_bytes=plan.tiers[1].budget_bytes, share=1)], SPEC, levers="exact"
    )
    text = " ".join(shown(verify(lean, NETWORK)).split())
    assert "fits a" in text
    assert "Levers a: " in text
    assert text.endswith("SGD momentum 0.9, 1 thread, and each stage's levers.")
    assert "lever" not in shown(verify(plan, NETWORK))


def test_a_plan_from_a_machine_that_needs_less_is_over_here(plan):
    verification = verify(made_elsewhere(plan, 0.8), NETWORK)
    assert verification.stages_over
    for peak in verification.stages_over:
        assert peak.measured_peak_bytes > peak.budget_bytes
        assert peak.left_bytes < 0
    assert "over budget" in shown(verification)


def test_a_plan_from_a_machine_that_needs_more_could_be_larger_here(plan):
    verification = verify(made_elsewhere(plan, 1.3), NETWORK)
    assert not verification.stages_over
    assert verification.proofs_within
    assert "One notch more than planned fits here" in shown(verification)


def test_a_plan_is_checked_for_its_own_network_only(plan):
    with pytest.raises(slt.InputError, match="names no model"):
        verify(plan)
    with pytest.raises(slt.InputError, match="not the plan's"):
        verify(plan, slt.load_model("convnet", num_classes=plan.num_classes, input_shape=(3, 16, 16)))


def test_another_device_must_be_there(plan):
    with pytest.raises(slt.InputError, match="no CUDA device here"):
        verify(plan, NETWORK, device="cuda")
