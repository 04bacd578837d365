"""FedRolex (arXiv 2212.01548): a window of channels that moves on by one each round."""

from slt_planner.config import Channels
from slt_planner.federated.strategies.base import ServerState
from slt_planner.federated.strategies.fitting import fitting_steps
from slt_planner.federated.strategies.moving import MovingChannels
from slt_planner.graph.trace import ModelGraph
from slt_planner.planning.largest import WIDTHS
from slt_planner.planning.plan import Plan


class FedRolex(MovingChannels):
    """In round r (from 1) every layer keeps its channels r - 1, r, ... around the end (section 3, equation 4).

    Raises:
        InfeasibleError: the narrowest network fits no tier.
    """

    def __init__(self, plan: Plan, graph: ModelGraph) -> None:
        super().__init__(fitting_steps("fedrolex", plan, graph, WIDTHS), like="rolling:1")

    def channels(self, state: ServerState, client: int) -> Channels:
        """The same window for all clients of a round."""
        return f"rolling:{state.round}"
