"""FjORD (arXiv 2102.13451): ordered dropout; each batch trains one of several nested widths, drawn by chance."""

from dataclasses import replace

from slt_planner.config import Config, StepSpec
from slt_planner.errors import InfeasibleError
from slt_planner.federated.nested_widths import nested_peak
from slt_planner.federated.strategies.base import ClientStep, OneStepATier
from slt_planner.federated.strategies.fitting import fitting_steps
from slt_planner.graph.trace import ModelGraph
from slt_planner.planning.largest import WIDTHS
from slt_planner.planning.plan import Plan

_STEPS = 5


class OrderedDropout(OneStepATier):
    """A tier's widths are those fifths of the network that are below its widest, and its widest (section 4).

    All of them fit its budget, each measured as it runs; with the next wider ones, one does not.

    A batch updates the entries of its own width alone: others see neither momentum nor weight decay. Distillation
    from the widest network to the drawn one (section 3.3) would need both in memory and is left out.

    Raises:
        InfeasibleError: the narrowest network fits no tier.
        UnsupportedLayerError: a tier's widths are no views of its widest.
    """

    def __init__(self, plan: Plan, graph: ModelGraph) -> None:
        fitting = fitting_steps("fjord", plan, graph, WIDTHS)
        budgets = {tier.name: tier.budget_bytes for tier in plan.tiers}
        nested = {tier: _nested(graph, plan.spec, step, budgets[tier]) for tier, step in fitting.items()}
        steps = {tier: step for tier, step in nested.items() if step is not None}
        if not steps:
            raise InfeasibleError("fjord: no tier holds its smallest step, which trains views of its widest network")
        super().__init__(steps)


def _nested(graph: ModelGraph, spec: StepSpec, widest: ClientStep, budget: int) -> ClientStep | None:
    """The widest step of views that a budget holds, from one on that it holds alone; None if there is none."""
    for scale in reversed(graph.head_scales(0)):
        config = widest.config.model_copy(update={"head_scale": scale})
        if scale > widest.config.head_scale:
            continue
        if nested_peak(graph, config, _widths(config), spec.with_levers(widest.levers)) <= budget:
            return replace(widest, config=config, widths=_widths(config))
    return None


def _widths(config: Config) -> tuple[float, ...]:
    widest = config.head_scale
    return (*(part / _STEPS for part in range(1, _STEPS) if part / _STEPS < widest), widest)
