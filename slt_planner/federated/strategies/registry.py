"""Strategies by name."""

from slt_planner.federated.result import RunSettings
from slt_planner.federated.strategies.base import Strategy
from slt_planner.federated.strategies.federated_dropout import FederatedDropout
from slt_planner.federated.strategies.fedolf import OrderedLayerFreezing
from slt_planner.federated.strategies.fedrolex import FedRolex
from slt_planner.federated.strategies.fjord import OrderedDropout
from slt_planner.federated.strategies.full import FullNetwork
from slt_planner.federated.strategies.heterofl import HeteroFL
from slt_planner.federated.strategies.slt import SuccessiveLayerTraining
from slt_planner.federated.strategies.small import SmallNetwork
from slt_planner.graph.trace import ModelGraph
from slt_planner.planning.plan import Plan


def make_strategy(plan: Plan, settings: RunSettings, graph: ModelGraph) -> Strategy:
    """The strategy of a run, by its name.

    Raises:
        InputError: fewer rounds than stages (``slt``), or widths that are no views of the widest (``fjord``).
        InfeasibleError: nothing that the method trains fits any tier.
    """
    match settings.strategy:
        case "slt":
            return SuccessiveLayerTraining(plan, settings.rounds)
        case "small":
            return SmallNetwork(plan, graph)
        case "full":
            return FullNetwork(plan)
        case "federated-dropout":
            return FederatedDropout(plan, graph, settings.seed)
        case "fedrolex":
            return FedRolex(plan, graph)
        case "heterofl":
            return HeteroFL(plan, graph)
        case "fjord":
            return OrderedDropout(plan, graph)
        case "fedolf":
            return OrderedLayerFreezing(plan, graph)
