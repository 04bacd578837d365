"""FedAvg on one small network: the widest that the weakest tier can train end to end."""

from slt_planner.federated.strategies.base import OneStepATier
from slt_planner.federated.strategies.fitting import fitting_steps
from slt_planner.graph.trace import ModelGraph
from slt_planner.planning.largest import WIDTHS
from slt_planner.planning.plan import Plan


class SmallNetwork(OneStepATier):
    """The whole network at one width, for every tier and all rounds (McMahan et al., arXiv 1602.05629).

    Raises:
        InfeasibleError: not even the narrowest network fits.
    """

    def __init__(self, plan: Plan, graph: ModelGraph) -> None:
        weakest = min(plan.tiers, key=lambda tier: tier.budget_bytes)
        (step,) = fitting_steps("small", plan, graph, WIDTHS, [weakest]).values()
        super().__init__({tier.name: step for tier in plan.tiers})
