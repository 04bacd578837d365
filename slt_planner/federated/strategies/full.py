"""FedAvg on the whole network, whatever it needs: the upper bound that no budget allows."""

from slt_planner.config import Config
from slt_planner.federated.strategies.base import ClientStep, OneStepATier
from slt_planner.planning.plan import Plan


class FullNetwork(OneStepATier):
    """Every tier trains the whole network end to end, with plain steps; budgets are not kept."""

    keeps_budgets = False

    def __init__(self, plan: Plan) -> None:
        super().__init__({tier.name: ClientStep(Config.full_network()) for tier in plan.tiers})
