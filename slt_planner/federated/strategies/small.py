"""FedAvg on one small network: the widest that the weakest tier can train end to end."""

from slt_planner.federated.strategies.base import OneStepATier
from slt_planner.federated.strategies.fitting import fitting_steps
from slt_planner.graph.trace import ModelGraph
from slt_planner.planning.largest import WIDTHS
from slt_planner.planning.plan import Plan


class SmallNetwork(OneStepATier):
    """The whole network at one width, for every tier and all rounds (McMahan et al., arXiv 1602.05629).

    It is that of the weakest tier that holds any; still weaker ones sit out.

    Raises:
        InfeasibleError: not even the narrowest network fits any tier.
    """

    def __init__(self, plan: Plan, graph: ModelGraph) -> None:
        held = fitting_steps("small", plan, graph, WIDTHS)
        taking_part = [tier for tier in plan.tiers if tier.name in held]
        weakest = min(taking_part, key=lambda tier: tier.budget_bytes)
        super().__init__({tier.name: held[weakest.name] for tier in taking_part})
