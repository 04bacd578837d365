"""Ordered layer freezing (FedOLF): every tier trains the last layers at full width, as many as fit it."""

from slt_planner.federated.strategies.base import OneStepATier
from slt_planner.federated.strategies.fitting import fitting_steps
from slt_planner.graph.trace import ModelGraph
from slt_planner.planning.largest import DEPTHS
from slt_planner.planning.plan import Plan


class OrderedLayerFreezing(OneStepATier):
    """The network's full width, with the first layers frozen as they were initialised or as others trained them.

    Of FedOLF it is the freezing alone, without the approximation of tensors that travel.

    Raises:
        InfeasibleError: not even the last layer at full width fits any tier.
    """

    def __init__(self, plan: Plan, graph: ModelGraph) -> None:
        super().__init__(fitting_steps("fedolf", plan, graph, DEPTHS))
