"""Several plans in one chart."""

from collections.abc import Callable, Sequence
from itertools import accumulate

from slt_planner.planning.plan import Plan, TierPlan, TierStage
from slt_planner.reporting.charts.chart import Chart, Trace, axis, label, line
from slt_planner.reporting.looks import LOOKS
from slt_planner.reporting.words import count, scale_text, shorten


def plans_charts(labelled: Sequence[tuple[str, Plan]]) -> tuple[Chart, ...]:
    """Head scale, frozen units and use of the budget over the rounds, a line a tier of each plan."""
    tiers = [(name, plan, tier) for name, plan in labelled for tier in plan.feasible_tiers]

    def chart(name: str, title: str, caption: str, value: Callable[[Plan, TierPlan, TierStage], float]) -> Chart:
        traces = [_tier_line(number, *own, value) for number, own in enumerate(tiers)]
        layout = {"xaxis": axis("share of the rounds (%)", range=[0, 100]), "yaxis": axis(title, rangemode="tozero")}
        return Chart(name, caption, 340, tuple(traces), layout)

    return (
        chart(
            "head-scales",
            "head scale (%)",
            "How wide the head is over the rounds; at 100 % the network is of full width",
            lambda plan, tier, stage: 100 * stage.head_scale,
        ),
        chart(
            "frozen",
            "units frozen (%)",
            "The share of the network's units that is frozen, over the rounds",
            lambda plan, tier, stage: 100 * stage.freeze_depth / plan.model.depth,
        ),
        chart(
            "use",
            "peak in % of the budget",
            "How much of its budget each tier uses, over the rounds",
            lambda plan, tier, stage: 100 * stage.peak_bytes / tier.budget_bytes,
        ),
    )


def _tier_line(
    number: int, name: str, plan: Plan, tier: TierPlan, value: Callable[[Plan, TierPlan, TierStage], float]
) -> Trace:
    edges = [100 * edge for edge in accumulate((stage.rounds_fraction for stage in plan.stages), initial=0.0)]
    look, own = LOOKS[number % len(LOOKS)], label(f"{shorten(name, 30)}, {shorten(tier.name, 20)}", 60)
    heights = [value(plan, tier, stage) for stage in tier.stages]
    words = [
        f"<b>{own}</b>, stage {place}<br>{count(stage.freeze_depth, 'unit')} frozen, full width up to "
        f"{stage.full_depth}, head {scale_text(stage.head_scale)}"
        for place, stage in enumerate(tier.stages)
    ]
    style = {"color": look.colour, "width": 2.2, "dash": look.dash, "shape": "hv"}
    return line(own, edges, [*heights, heights[-1]], style, hovertext=[*words, words[-1]])
