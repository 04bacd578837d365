"""HeteroFL (arXiv 2010.01264): every tier trains the first channels of each layer, as many as fit it."""

from slt_planner.federated.strategies.base import OneStepATier
from slt_planner.federated.strategies.fitting import fitting_steps
from slt_planner.graph.trace import ModelGraph
from slt_planner.planning.largest import WIDTHS
from slt_planner.planning.plan import Plan


class HeteroFL(OneStepATier):
    """Nested widths, averaged entry by entry over the clients that train an entry (section 3).

    The paper scales outputs by the inverse of the width before its static batch norm, which divides that out again;
    it is left out here, and so is the masking of classes that a client does not hold.

    Raises:
        InfeasibleError: the narrowest network fits no tier.
    """

    def __init__(self, plan: Plan, graph: ModelGraph) -> None:
        super().__init__(fitting_steps("heterofl", plan, graph, WIDTHS))
