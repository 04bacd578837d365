"""Federated dropout (Caldas et al., arXiv 1812.07210): every client trains channels drawn by chance."""

import numpy as np

from slt_planner.config import Channels
from slt_planner.federated.strategies.base import ServerState
from slt_planner.federated.strategies.fitting import fitting_steps
from slt_planner.federated.strategies.moving import MovingChannels
from slt_planner.graph.trace import ModelGraph
from slt_planner.planning.largest import WIDTHS
from slt_planner.planning.plan import Plan

_STREAM = 4  # keeps this use of the seed apart from the others


class FederatedDropout(MovingChannels):
    """Each client of each round draws a fixed number of channels a layer; layers that are added up draw the same.

    Raises:
        InfeasibleError: the narrowest network fits no tier.
    """

    def __init__(self, plan: Plan, graph: ModelGraph, seed: int) -> None:
        super().__init__(fitting_steps("federated-dropout", plan, graph, WIDTHS), like="random:0")
        self._seed = seed

    def channels(self, state: ServerState, client: int) -> Channels:
        """Drawn by the run's seed, the round and the client."""
        (drawn,) = np.random.SeedSequence([self._seed, _STREAM, state.round + 1, client]).generate_state(1)
        return f"random:{drawn}"
