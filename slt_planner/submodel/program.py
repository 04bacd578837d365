"""A sub-model's own program: the network's, with inputs cut and calls changed as the rules say."""

import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from slt_planner.config import Norms
from slt_planner.graph.region import Dimension, Region
from slt_planner.graph.segments import Segment
from slt_planner.graph.widths import Cut


def with_cuts(
    program: fx.Graph, cuts: Mapping[fx.Node, Cut], dropped: Collection[fx.Node], silent: Collection[fx.Node]
) -> fx.Graph:
    """A copy of a recorded program in which inputs are cut to what their operator takes.

    `dropped` nodes are left out; an output among the `silent` ones becomes None. Nodes get ``meta``: ``unit``, and
    ``rows``: whether they give one tensor with a row a sample.
    """
    copied = fx.Graph()
    _copy_nodes(copied, program.nodes, dict.fromkeys(dropped), cuts, silent)
    copied.lint()
    return copied


def segment_program(segment: Segment, cuts: Mapping[fx.Node, Cut]) -> fx.Graph:
    """A segment's nodes as a program of their own; it takes its tensor out of a list that it is given, so that nobody
    else holds it.
    """
    copied = fx.Graph()
    box = copied.placeholder("box")
    copy_of: dict[fx.Node, Any] = {segment.source: copied.call_function(_take_out, (box,))}
    _copy_nodes(copied, segment.nodes, copy_of, cuts, ())
    if segment.result is not None:
        copied.output((copy_of[segment.result],))
    copied.lint()
    return copied


def _take_out(box: list[Tensor]) -> Tensor:
    return box.pop()


def _copy_nodes(
    copied: fx.Graph,
    nodes: Iterable[fx.Node],
    copy_of: dict[fx.Node, Any],
    cuts: Mapping[fx.Node, Cut],
    silent: Collection[fx.Node],
) -> None:
    """Add copies of nodes to a graph, and to `copy_of`; those that are there are not copied."""
    for node in nodes:
        if node in copy_of:
            continue
        cut = cuts.get(node, Cut(()))
        inputs = {source: _narrowed(copied, copy_of[source], source, cuts, want) for source, want in cut.inputs.items()}
        if node.op == "output":
            inputs |= dict.fromkeys(silent)
        copy_of[node] = _copied(copied, node, cut, lambda n: inputs.get(n, copy_of[n]))  # noqa: B023
        known = {"unit": node.meta["unit"], "in_place": node.meta.get("in_place", False), "rows": _gives_rows(node)}
        copy_of[node].meta |= known


def _copied(copied: fx.Graph, node: fx.Node, cut: Cut, own: Callable[[fx.Node], Any]) -> fx.Node:
    if cut.call is not None:
        function, arguments = cut.call
        return copied.call_function(function, fx.node.map_arg(arguments, own))
    if node.op == "output":
        return copied.output(fx.node.map_arg(node.args[0], own))
    args, kwargs = list(node.args), dict(node.kwargs)
    for place, value in cut.arguments.items():
        if isinstance(place, int):
            args[place] = value
        else:
            kwargs[place] = value
    return copied.create_node(
        node.op, node.target, fx.node.map_arg(tuple(args), own), fx.node.map_arg(kwargs, own), node.name
    )


def _gives_rows(node: fx.Node) -> bool:
    """Whether it gives one tensor in which the first dimension, and no other, is the batch."""
    match node.meta.get("dims"):
        case (Dimension(size=1, batched=True), *others):
            return not any(own.batched for own in others)
    return False


def _narrowed(copied: fx.Graph, given: Any, source: fx.Node, cuts: Mapping[fx.Node, Cut], wanted: Region) -> Any:
    arrives: Region = cuts[source].output if source in cuts else source.meta["full"]  # type: ignore[assignment]
    for dim, (has, takes) in enumerate(zip(arrives, wanted, strict=True)):
        if has.indices == takes.indices:
            continue
        positions = _positions(has, takes)
        if isinstance(positions, range):
            given = copied.call_function(torch.narrow, (given, dim, 0, len(positions)))
        else:
            given = copied.call_function(select_entries, (given, dim, positions))
    return given


def _positions(has: Dimension, takes: Dimension) -> range | tuple[int, ...]:
    """Where in what arrives the wanted entries are."""
    if isinstance(has.indices, range) and isinstance(takes.indices, range):
        return range(len(takes.indices))
    place = {entry: i for i, entry in enumerate(has.indices)}
    positions = tuple(place[entry] for entry in takes.indices)
    return range(len(positions)) if positions[-1] == len(positions) - 1 else positions


def select_entries(x: Tensor, dim: int, positions: tuple[int, ...]) -> Tensor:
    """Entries of a tensor along a dimension that are not the first ones."""
    return x.index_select(dim, torch.tensor(positions, device=x.device))


# Where F.batch_norm and F.instance_norm take running statistics, and how they are told to use the batch's own.
_NORM_FUNCTIONS = {"batch_norm": (5, "training"), "instance_norm": (5, "use_input_stats")}


def with_norms(program: fx.Graph, norms: Norms, freeze_depth: int) -> fx.Graph:
    """Norms called as functions, as a sub-model wants them: `static` ones keep no statistics, frozen ones move none."""
    for node in list(program.nodes):
        if node.op != "call_function" or getattr(node.target, "__name__", "") not in _NORM_FUNCTIONS:
            continue
        position, name = _NORM_FUNCTIONS[node.target.__name__]
        if norms == "static":
            _set_argument(node, 1, "running_mean", None)
            _set_argument(node, 2, "running_var", None)
            _set_argument(node, position, name, True)
        elif node.meta["unit"] <= freeze_depth:
            _set_argument(node, position, name, False)
    for node in reversed(list(program.nodes)):
        if node.op == "get_attr" and not node.users:
            program.erase_node(node)
    return program


def _set_argument(node: fx.Node, position: int, name: str, value: Any) -> None:
    if position < len(node.args):
        node.args = (*node.args[:position], value, *node.args[position + 1 :])
    else:
        node.kwargs = {**node.kwargs, name: value}


def with_unit_marks(program: fx.Graph, enter: Callable[[int], None]) -> fx.Graph:
    """A copy that calls `enter` with the number of the unit whenever another one begins."""
    copied = fx.Graph()
    copy_of: dict[fx.Node, fx.Node] = {}
    unit = 0
    for node in program.nodes:
        if node.op.startswith("call") and node.target is not operator.getitem and node.meta.get("unit", unit) != unit:
            unit = node.meta["unit"]
            copied.call_function(enter, (unit,))
        copy_of[node] = copied.node_copy(node, copy_of.__getitem__)
    return copied
