"""What the page of several plans shows."""

from collections.abc import Mapping, Sequence
from typing import Any

from slt_planner.planning.plan import Plan
from slt_planner.reporting.charts.plans import plans_charts
from slt_planner.reporting.charts.schedule import schedule_chart
from slt_planner.reporting.comparison import FORMATS, plan_comparison
from slt_planner.reporting.make_again import plan_command
from slt_planner.reporting.pages.page import flat, render, side_by_side
from slt_planner.reporting.pages.plan import plan_facts
from slt_planner.reporting.words import model_title, ruler, tier_headline


def plans_page(labelled: Sequence[tuple[str, Plan]], texts: Mapping[str, str], command: str | None) -> str:
    """Plans compared, as HTML; `texts` is the table in the formats that can be copied."""
    frame = plan_comparison(labelled)
    models = ", ".join(dict.fromkeys(model_title(plan) for _, plan in labelled))
    context: dict[str, Any] = {
        "title": f"Training plans compared: {models}",
        "facts": [f"{len(labelled)} plans"],
        "command": command,
        "plans": [
            (name, plan, [(tier, tier_headline(tier, plan)) for tier in plan.tiers], plan_facts(plan), ruler(plan))
            for name, plan in labelled
        ],
        "commands": [plan_command(plan) for _, plan in labelled],
        "frame": frame,
        "texts": texts,
        "formats": FORMATS,
        "charts": plans_charts(labelled),
        "schedules": [schedule_chart(plan, f"schedule-{number}") for number, (_, plan) in enumerate(labelled)],
        "settings": side_by_side(
            [(name, {"batch": str(plan.batch_size)} | flat(plan.step.model_dump())) for name, plan in labelled]
        ),
        "environment": side_by_side([(name, plan.environment) for name, plan in labelled]),
    }
    return render("plans.html.j2", context)
