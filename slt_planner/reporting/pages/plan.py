"""What the page of a plan shows."""

from collections.abc import Sequence
from dataclasses import dataclass

from slt_planner.planning.costs import stage_cost
from slt_planner.planning.plan import Plan, TierPlan
from slt_planner.reporting.charts.memory import memory_chart, unit_chart, what_if_chart
from slt_planner.reporting.charts.schedule import schedule_chart
from slt_planner.reporting.charts.timeline import timeline_chart
from slt_planner.reporting.charts.trade_off import trade_off_chart
from slt_planner.reporting.left_over import left_over
from slt_planner.reporting.make_again import plan_command
from slt_planner.reporting.pages.page import flat, render, side_by_side
from slt_planner.reporting.words import (
    DATA_DEPENDENT,
    count,
    how_known,
    lever_letters,
    lever_lines,
    model_title,
    ruler,
    shorten,
    step_ruler,
    tier_headline,
)
from slt_planner.units import format_bytes

_ESTIMATED_SAMPLES = 500


@dataclass(frozen=True)
class Estimate:
    """An estimated quantity of one tier, a value a stage; None where a figure of the device is unknown."""

    title: str
    unit: str
    values: list[float | None]


def plan_page(plan: Plan, command: str | None) -> str:
    """A plan as HTML; `command` is the command line that made the page."""
    profile = plan.full_network
    return render(
        "plan.html.j2",
        {
            "plan": plan,
            "command": command,
            "plan_command": plan_command(plan),
            "title": f"Training plan: {model_title(plan)}",
            "facts": plan_facts(plan),
            "ruler": ruler(plan),
            "how_known": how_known(plan),
            "data_dependent": DATA_DEPENDENT,
            "headlines": [(tier, tier_headline(tier, plan)) for tier in plan.tiers],
            "schedule": schedule_chart(plan),
            "memory": [(memory_chart(number, tier), tier) for number, tier in enumerate(plan.feasible_tiers)],
            "left_over": left_over,
            "letters": lever_letters(plan),
            "lever_lines": lever_lines(plan),
            "predictions": _predictions(plan),
            "trade_off": trade_off_chart(plan, plan.trade_off) if plan.trade_off else None,
            "timeline": timeline_chart(profile) if profile.timeline else None,
            "unit_memory": unit_chart(profile) if profile.units else None,
            "what_if": what_if_chart(plan.what_if) if plan.what_if else None,
            "what_if_ruler": step_ruler(plan.what_if.spec) if plan.what_if else None,
            "estimates": _estimates(plan),
            "estimated_samples": _ESTIMATED_SAMPLES,
            "settings": side_by_side([("", flat(plan.step.model_dump()))]),
            "environment": side_by_side([("", plan.environment)]),
        },
    )


def plan_facts(plan: Plan) -> list[str]:
    """What a plan is for, in a few words each."""
    return [
        f"batch {plan.batch_size}",
        "tiers " + ", ".join(shorten(tier.name, 24) for tier in plan.tiers),
        count(plan.model.depth, "unit"),
        f"input {' × '.join(map(str, plan.input_shape))}",  # noqa: RUF001
        f"{plan.num_classes:,} classes",
    ]


def _predictions(plan: Plan) -> str | None:
    """How true the predictions were that were measured; None where nothing was both."""
    steps = [step for tier in plan.tiers for step in (*tier.stages, *tier.proofs)]
    pairs = [(step.predicted_peak_bytes, step.measured_peak_bytes) for step in steps]
    misses = [abs(predicted - measured) for predicted, measured in pairs if predicted and measured]
    if not misses:
        return None
    return f"at most {format_bytes(max(misses))} off" if any(misses) else "right to the byte"


def _estimates(plan: Plan) -> list[tuple[TierPlan, Sequence[Estimate]]]:
    """What a round of each stage takes a client of the tiers whose devices are known: a column each quantity."""
    known: list[tuple[TierPlan, Sequence[Estimate]]] = []
    for tier in plan.feasible_tiers:
        costs = [stage_cost(own, tier, _ESTIMATED_SAMPLES) for own in tier.stages]
        columns = (
            Estimate("training", "s", [cost.compute_s for cost in costs]),
            Estimate("transfer", "s", [cost.transfer_s for cost in costs]),
            Estimate("round", "s", [cost.round_s for cost in costs]),
            Estimate("energy", "J", [cost.energy_j for cost in costs]),
        )
        if own := [column for column in columns if column.values != [None] * len(costs)]:
            known.append((tier, own))
    return known
