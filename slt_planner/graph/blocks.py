"""Blocks: neighbouring freeze units, merged until one tensor is all that leads from each block to the next."""

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, takewhile

from torch import fx

from slt_planner.graph.freeze_units import Unit, sample_shape
from slt_planner.graph.region import Dimension


def merge_to_blocks(
    program: fx.Graph, main: Collection[fx.Node], weighted: Collection[fx.Node], units: Sequence[Unit]
) -> tuple[Unit, ...]:
    """Merge units between which several tensors cross; ``meta["unit"]`` and ``meta["freezes"]`` become the blocks'.

    A block ends where one tensor separates all weights up to there from all later ones: no skip connection and no
    branch is open. That is a matter of the graph alone: a chain has a block a layer, a residual network one a
    residual, and a network without such a place is one block.

    Args:
        program: the recorded graph, after `assign_units`.
        main: the nodes of the main outputs; what only other outputs need opens no branch.
        weighted: the weight-bearing nodes.
        units: the units to merge. One that is a block of its own stays as it is but for its index.
    """
    outlets = _outlets(program, main, weighted, len(units))
    ends = sorted({*outlets, len(units)})
    block_of = [0, *(bisect_left(ends, index) + 1 for index in range(1, len(units) + 2))]
    for node in program.nodes:
        node.meta["unit"], node.meta["freezes"] = block_of[node.meta["unit"]], block_of[node.meta["freezes"]]
    return tuple(
        _merged(index, units[start:end], [*units[:start], *units[end:]], outlets.get(end))
        for index, (start, end) in enumerate(pairwise([0, *ends]), start=1)
    )


def _outlets(
    program: fx.Graph, main: Collection[fx.Node], weighted: Collection[fx.Node], depth: int
) -> Mapping[int, fx.Node]:
    """By the index of each unit that ends a block: the first node whose tensor is all that later weights see."""
    flow = _main_flow(program, main)
    done, to_come = [0] * (depth + 2), [len(flow)] * (depth + 2)
    for place, node in enumerate(flow):
        if node in weighted:
            unit = node.meta["unit"]
            done[unit], to_come[unit] = max(done[unit], place), min(to_come[unit], place)
    passages = _passages(flow, main)
    outlets = {}
    for unit in range(1, depth + 1):
        last, first = max(done[: unit + 1]), min(to_come[unit + 1 :])
        found = bisect_left(passages, last)
        if found < len(passages) and passages[found] < first:
            outlets[unit] = flow[passages[found]]
    return outlets


def _main_flow(program: fx.Graph, main: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes, in order, that lie on a way of data from an input to a main output."""
    flow: dict[fx.Node, None] = {}
    for node in reversed(program.nodes):
        if node.meta["data"] and (node in main or any(user in flow for user in node.users)):
            flow[node] = None
    return list(flow)[::-1]


def _passages(flow: Sequence[fx.Node], main: Collection[fx.Node]) -> list[int]:
    """The places, ascending, of nodes that give one tensor through which every way leads.

    They are those that no edge passes over in the order of execution: a way around a node has such an edge, and every
    edge lies on a way.
    """
    places = {node: place for place, node in enumerate(flow)}
    farthest = max((place for node, place in places.items() if node.op == "placeholder"), default=0)  # there at once
    found = []
    for node, place in places.items():
        if farthest <= place and all(isinstance(dimension, Dimension) for dimension in node.meta["dims"]):
            found.append(place)
        users = (places[user] for user in node.users if user in places)
        farthest = max(farthest, len(flow) if node in main else 0, *users)
    return found


def _merged(index: int, parts: Sequence[Unit], others: Sequence[Unit], outlet: fx.Node | None) -> Unit:
    if len(parts) == 1:
        return replace(parts[0], index=index)
    return Unit(
        index=index,
        name=block_name([part.name for part in parts], [other.name for other in others]),
        kind="block",
        output_shape=sample_shape(outlet) if outlet else parts[-1].output_shape,
        modules=tuple(dict.fromkeys(name for part in parts for name in part.modules)),
    )


def block_name(names: Sequence[str], others: Collection[str]) -> str:
    """A block's name: the path of the module that holds these units and no others, else the first and the last.

    >>> block_name(["layer1.0.conv1", "layer1.0.conv2"], ["conv1", "layer1.1.conv1"])
    'layer1.0'
    >>> block_name(["layer1.0.conv1", "layer1.0.conv2"], ["conv1", "layer1.0.conv3"])
    'layer1.0.conv1 .. layer1.0.conv2'
    """
    steps = zip(*(name.split(".") for name in names), strict=False)
    path = [step[0] for step in takewhile(lambda step: len(set(step)) == 1, steps)]
    shared = any(name.split(".")[: len(path)] == path for name in others)
    return " .. ".join(dict.fromkeys((names[0], names[-1]))) if shared or not path else ".".join(path)
