"""FjORD (arXiv 2102.13451): ordered dropout; each batch trains one of several nested widths, drawn by chance."""

from dataclasses import replace

from slt_planner.federated.nested_widths import check_nested
from slt_planner.federated.strategies.base import ClientStep, OneStepATier
from slt_planner.federated.strategies.fitting import fitting_steps
from slt_planner.graph.trace import ModelGraph
from slt_planner.planning.largest import WIDTHS
from slt_planner.planning.plan import Plan
from slt_planner.submodel.extract import extract

_STEPS = 5


class OrderedDropout(OneStepATier):
    """A tier's widths are those fifths of the network that are below its widest, and its widest (section 4).

    A batch updates the entries of its own width alone: others see neither momentum nor weight decay. Distillation
    from the widest network to the drawn one (section 3.3) would need both in memory and is left out.

    Raises:
        InfeasibleError: the narrowest network fits no tier.
        UnsupportedLayerError: a tier's widths are no views of its widest.
    """

    def __init__(self, plan: Plan, graph: ModelGraph) -> None:
        fitting = fitting_steps("fjord", plan, graph, WIDTHS)
        steps = {tier: replace(step, widths=_widths(step)) for tier, step in fitting.items()}
        for step in steps.values():
            check_nested(extract(graph, None, step.config, plan.step.norms, on_meta=True), step.widths)
        super().__init__(steps)


def _widths(step: ClientStep) -> tuple[float, ...]:
    widest = step.config.head_scale
    return (*(part / _STEPS for part in range(1, _STEPS) if part / _STEPS < widest), widest)
