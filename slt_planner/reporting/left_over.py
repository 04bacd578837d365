"""How full a plan's stages are, and why no more of a budget is used: sentences."""

from slt_planner.planning.plan import TierPlan
from slt_planner.units import format_bytes


def left_over(tier: TierPlan) -> str:
    """How much of its budget a feasible tier's fullest and its emptiest stage leave, and why."""
    peaks = [stage.peak_bytes for stage in tier.stages]
    fullest, emptiest = peaks.index(max(peaks)), peaks.index(min(peaks))
    if fullest == emptiest:
        return _sentence(tier, fullest, "leaves ")
    return f"{_sentence(tier, fullest, 'leaves least, ')} {_sentence(tier, emptiest, 'leaves most, ')}"


def _sentence(tier: TierPlan, number: int, leaves: str) -> str:
    left = format_bytes(tier.budget_bytes - tier.stages[number].peak_bytes)
    return f"Stage {number} {leaves}{left}: {', and '.join(_reasons(tier, number))}."


def _reasons(tier: TierPlan, number: int) -> list[str]:
    """What keeps a stage from using the rest of its budget: why its head is no wider, and why no less is frozen."""
    stage = tier.stages[number]
    over = {proof.kind: proof.peak_bytes - tier.budget_bytes for proof in tier.proofs if proof.stage == number}
    if stage.limited_by == "full" and stage.freeze_depth == 0:
        return ["the whole network trains"]
    reasons = []
    if "wider_head" in over:
        reasons.append(f"the next wider head is {format_bytes(over['wider_head'])} over")
    elif stage.limited_by == "later_stage":
        reasons.append("a later stage fits no wider head")
    elif stage.limited_by == "weakest_tier":
        reasons.append("the weakest tier sets its head")
    if "less_frozen" in over:
        reasons.append(f"one unit less frozen is {format_bytes(over['less_frozen'])} over")
    elif stage.freeze_depth == 0:
        reasons.append("nothing is frozen")
    return reasons or ["one notch more does not fit"]
