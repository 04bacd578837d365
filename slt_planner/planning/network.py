"""From a plan to its network. A plan is data: code that it names is not run unless the user names it too."""

from typing import Protocol

from torch import nn

from slt_planner.errors import InputError
from slt_planner.graph.trace import ModelGraph, trace
from slt_planner.models.names import is_reference
from slt_planner.models.registry import load_model, takes_classes
from slt_planner.planning.plan import PlannedModel


class NamesNetwork(Protocol):
    """A plan, as far as its network is concerned."""

    @property
    def model(self) -> PlannedModel:
        """Which network it is."""
        ...

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sample."""
        ...

    @property
    def num_classes(self) -> int:
        """Its outputs."""
        ...


def planned_network(
    plan: NamesNetwork, model: nn.Module | str | None = None, weights: bool = True
) -> tuple[nn.Module, ModelGraph]:
    """The plan's network (or the one given) and its graph.

    Args:
        plan: the plan.
        model: the network, or its name as `load_model` takes it; needed where the plan's is the user's own code.
        weights: False leaves a network that is loaded here without values.

    Raises:
        InputError: the plan names no network of a library and none is given, or the network is not the plan's.
    """
    name = plan.model.name if model is None else model
    if name is None:
        raise InputError("the plan names no model; pass the network it was made for")
    if model is None and is_reference(str(name)):
        raise InputError(f"the plan's model is your own code, {name}; if you trust it, pass --model {name}")
    own_code = is_reference(str(name))
    for classes in _classes_to_try(name, plan.num_classes) if own_code else [plan.num_classes]:
        network = load_model(name, classes, plan.input_shape, weights=weights or isinstance(name, nn.Module))
        graph = trace(network, plan.input_shape, granularity=plan.model.granularity)
        if graph.hash == plan.model.graph_hash:
            return network, graph
    raise InputError(f"the model is not the plan's: {_difference(plan, graph)}; make a plan for this one")


def _classes_to_try(name: nn.Module | str, planned: int) -> list[int | None]:
    """With how many classes the user's own code is built: as it does by itself, then as the plan says."""
    return [None, planned] if isinstance(name, str) and takes_classes(name) else [None]


def _difference(plan: NamesNetwork, graph: ModelGraph) -> str:
    """What tells a network from the planned one, as far as a plan knows that."""
    names, planned = tuple(unit.name for unit in graph.units), plan.model.unit_names
    if graph.num_classes != plan.num_classes:
        return f"it has {graph.num_classes} classes, planned was one of {plan.num_classes}"
    if len(names) != len(planned):
        return f"it has {len(names)} units, planned was one of {len(planned)}"
    for number, (own, other) in enumerate(zip(names, planned, strict=True), start=1):
        if own != other:
            return f"its unit {number} is {own}, planned was {other}"
    return f"its units are the same, but not what they compute (graph {graph.hash}, not {plan.model.graph_hash})"
