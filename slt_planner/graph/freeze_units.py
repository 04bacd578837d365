"""Freeze units: a weight-bearing operator and what follows it, frozen together, in the order of execution."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

from slt_planner.graph.widths import is_weighted, kind_of


@dataclass(frozen=True)
class Unit:
    """A freeze unit: `name` is the fqn of its weight-bearing module, `modules` the fqns of all its modules.

    `index` counts from 1 in the order of execution; `output_shape` is (channels, ...) of one sample.
    """

    index: int
    name: str
    kind: str
    output_shape: tuple[int, ...]
    modules: tuple[str, ...]


def assign_units(program: fx.Graph, modules: Mapping[str, nn.Module]) -> tuple[Unit, ...]:
    """Write ``meta["unit"]`` on every node and return the units in order.

    Inputs are 0; the classifier (weight-bearing operators that no other one follows) and what comes after it are
    depth + 1. A projection that an addition merges belongs to the unit of the later operand.
    """
    weighted = [node for node in program.nodes if is_weighted(kind_of_call(node, modules))]
    classifiers = _without_weighted_followers(program, weighted)
    leader = _merge_projections(program, weighted, classifiers)
    order = {node: i for i, node in enumerate(program.nodes)}
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in weighted:
        if node not in classifiers:
            groups.setdefault(leader[node], []).append(node)
    ordered = sorted(groups.values(), key=lambda group: max(order[node] for node in group))
    index_of = {node: i for i, group in enumerate(ordered, start=1) for node in group}

    for node in program.nodes:
        own = len(ordered) + 1 if node in classifiers else index_of.get(node, 0)
        node.meta["unit"] = max([own, *(x.meta["unit"] for x in node.all_input_nodes)])

    depth_of = _weighted_depth(program, set(weighted))
    return tuple(
        _unit(i, max(group, key=lambda node: (depth_of[node], order[node])), program, modules)
        for i, group in enumerate(ordered, start=1)
    )


def kind_of_call(node: fx.Node, modules: Mapping[str, nn.Module]) -> object:
    """The kind of a node that calls something, None for inputs and outputs."""
    return kind_of(node, modules) if node.op.startswith("call") else None


def _unit(index: int, main: fx.Node, program: fx.Graph, modules: Mapping[str, nn.Module]) -> Unit:
    members = [str(n.target) for n in program.nodes if n.op == "call_module" and n.meta["unit"] == index]
    return Unit(
        index=index,
        name=str(main.target),
        kind=type(modules[str(main.target)]).__name__,
        output_shape=tuple(main.meta["shape"]),
        modules=tuple(dict.fromkeys(members)),
    )


def _without_weighted_followers(program: fx.Graph, weighted: list[fx.Node]) -> set[fx.Node]:
    """The weight-bearing nodes from which no other weight-bearing node can be reached."""
    leads_to_weighted: dict[fx.Node, bool] = {}
    for node in reversed(program.nodes):
        leads_to_weighted[node] = any(user in weighted or leads_to_weighted[user] for user in node.users)
    return {node for node in weighted if not leads_to_weighted[node]}


def _merge_projections(program: fx.Graph, weighted: list[fx.Node], classifiers: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Each weight-bearing node's leader; two have the same one where an addition merges what only they produce."""
    leader = {node: node for node in weighted}
    for node in program.nodes:
        if len(node.all_input_nodes) < 2:
            continue
        producers = [_sole_producer(x, leader) for x in node.all_input_nodes]
        merged = {leader[p] for p in producers if p is not None and p not in classifiers}
        for member in weighted:
            if leader[member] in merged:
                leader[member] = min(merged, key=weighted.index)
    return leader


def _sole_producer(node: fx.Node, weighted: Mapping[fx.Node, fx.Node]) -> fx.Node | None:
    """The weight-bearing node that a value comes from, if nothing else uses what lies between."""
    while len(node.users) == 1:
        if node in weighted:
            return node
        if len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    return None


def _weighted_depth(program: fx.Graph, weighted: set[fx.Node]) -> dict[fx.Node, int]:
    """How many weight-bearing nodes lie on the longest way to each node, itself included."""
    depth: dict[fx.Node, int] = {}
    for node in program.nodes:
        depth[node] = (node in weighted) + max((depth[x] for x in node.all_input_nodes), default=0)
    return depth
