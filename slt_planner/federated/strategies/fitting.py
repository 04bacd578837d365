"""What each tier can hold, for methods without stages: the same search and the same measurements as a plan's."""

from collections.abc import Sequence

from slt_planner.config import Config, Tier
from slt_planner.errors import InfeasibleError
from slt_planner.federated.strategies.base import ClientStep
from slt_planner.graph.trace import ModelGraph
from slt_planner.planning.bench import Bench
from slt_planner.planning.largest import Family, largest_fitting
from slt_planner.planning.plan import Plan, TierPlan
from slt_planner.units import format_bytes


def fitting_steps(
    name: str, plan: Plan, graph: ModelGraph, family: Family, tiers: Sequence[TierPlan | Tier] | None = None
) -> dict[str, ClientStep]:
    """The largest step of a family for each tier, of all or of those given; tiers in which nothing fits are left out.

    The step is the plan's own, with its batch and its sets of levers.

    Raises:
        InfeasibleError: nothing fits any tier; `name` is what the method is called.
    """
    tiers = plan.tiers if tiers is None else tiers
    steps: dict[str, ClientStep] = {}
    with Bench(graph, plan.spec, lever_sets=plan.lever_sets) as bench:
        for tier in tiers:
            config = largest_fitting(family, bench, tier.budget_bytes)
            if config is not None:
                steps[tier.name] = ClientStep(_as_written(config), bench.cheapest(config, tier.budget_bytes) or ())
        if not steps:
            most = max(tier.budget_bytes for tier in tiers)
            least = format_bytes(bench.peak(family.smallest(bench.space())), round_up=True)
            raise InfeasibleError(
                f"{name}: no tier holds its smallest step, which needs {least} of {format_bytes(most)}"
            )
    return steps


def _as_written(config: Config) -> Config:
    """Where nothing is scaled full_depth is immaterial; a network trained end to end is written (0, 0, s)."""
    return config if config.freeze_depth else config.model_copy(update={"full_depth": 0})
