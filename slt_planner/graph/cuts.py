"""The cut around every operator of a network under a configuration: the rules, applied in the program's order."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import fx, nn

from slt_planner.config import Config
from slt_planner.errors import InputError
from slt_planner.graph import rules  # noqa: F401 - importing registers them
from slt_planner.graph.freeze_units import Unit, assign_units
from slt_planner.graph.region import Dimension, Region, is_whole, reshaped
from slt_planner.graph.rules.shapes import permutation
from slt_planner.graph.widths import (
    Cut,
    Layout,
    Needs,
    Operator,
    is_weighted,
    kind_name,
    kind_of,
    made_by,
    refusal,
    rule_of,
)

_UNUSED_KEEP: Callable[[int], Dimension] = Dimension


def annotate(program: fx.Graph, modules: Mapping[str, nn.Module], main: Collection[fx.Node]) -> tuple[Unit, ...]:
    """Write on every node what the rules need to know, once a graph; gives the freeze units.

    Nodes get ``meta``: ``data`` (depends on the inputs), ``unit``, ``freezes`` and ``auxiliary`` (see `assign_units`),
    ``full`` (what it gives at full width, with axes), and weight-bearing ones ``layout``.

    Raises:
        UnsupportedLayerError: an operator has no rule, or its rule refuses it.
    """
    for node in program.nodes:
        inputs = [x for x in node.all_input_nodes if "dims" in x.meta]
        made_here = node.op == "call_method" and str(node.target).startswith("new_")
        node.meta["data"] = node.op == "placeholder" or (not made_here and any(x.meta["data"] for x in inputs))
        node.meta.setdefault("auxiliary", False)
    walk = _Walk(program, modules)
    weighted = [node for node in program.nodes if node.meta["data"] and _bears_weights(walk, node)]
    _note_twins(walk, weighted)
    units = assign_units(program, modules, weighted, main)
    whole = _gives_outputs(program, weighted, main)
    for node in program.nodes:
        walk.visit(node, lambda size, node=node: made_by(node, size))  # type: ignore[misc]
        node.meta["full"] = walk.regions.get(node)
        _check_sizes(walk, node)
        for region in _regions_of(node.meta["full"]):
            walk.needs.join(region)
    for node in weighted:
        if node.meta.get("projects"):
            _step_the_stream(walk, node)
    for node in weighted:
        size = _made_size(node)
        fixed = node in whole or node.meta["auxiliary"] or node.meta["unit"] > len(units)
        node.meta["layout"] = Layout(size, 1, 1) if fixed else walk.needs.layout(node.meta["twin"].name, size)
    return units


def _regions_of(result: Any) -> list[Region]:
    """The regions of a node's results, one or several."""
    several = bool(result) and not isinstance(result[0], Dimension)
    return [r for r in (result if several else [result]) if r]


def _check_sizes(walk: "_Walk", node: fx.Node) -> None:
    """A rule's full result must be what the operator gives; else it does not know this use of the operator."""

    def sizes(result: Any) -> list[list[tuple[int, bool]]]:
        return [[(d.size, d.batched) for d in region] for region in _regions_of(result)]

    if "dims" in node.meta and sizes(node.meta["full"]) != sizes(node.meta["dims"]):
        raise refusal(node, kind_name(node, walk.module(node)), "is used in a way that its width rule does not know")


def _step_the_stream(walk: "_Walk", projection: fx.Node) -> None:
    """The stream that attention reads is whole heads wide (METHOD, section 1, Widths)."""
    heads = walk.needs.layout(projection.meta["twin"].name, _made_size(projection)).count
    source = projection.args[0]
    linear = kind_of(projection, walk.module(projection)) in (nn.Linear, "linear", "matmul")
    stream = source.meta["full"][-1 if linear else 1] if isinstance(source, fx.Node) else Dimension(1)
    if heads > 1 and stream.size % heads == 0:
        walk.needs.steps(stream, stream.size // heads)


def _note_twins(walk: "_Walk", weighted: Collection[fx.Node]) -> None:
    """``meta["twin"]`` of a weight-bearing node: the first that uses the same weights, usually itself."""
    first: dict[int, fx.Node] = {}
    for node in weighted:
        module = walk.module(node)
        stored = [attrgetter(str(n.target))(walk.modules[""]) for n in node.all_input_nodes if n.op == "get_attr"]
        weights = [*module.parameters()] if module is not None else stored
        node.meta["twin"] = next((first[id(w)] for w in weights if id(w) in first), node)
        first |= {id(w): node.meta["twin"] for w in weights}


def cut_program(program: fx.Graph, modules: Mapping[str, nn.Module], config: Config, depth: int) -> dict[fx.Node, Cut]:
    """The cuts of a configuration: of every operator in the head, whole or not. All others are as in the network.

    Raises:
        InputError: the configuration goes beyond the last unit.
        UnsupportedLayerError: a rule refuses an operator at these widths.
    """
    if config.full_depth > depth:
        raise InputError(f"configuration {config}: full_depth is beyond the network's {depth} units")
    if config.head_scale == 1.0:
        return {}
    walk = _walk_head(program, modules, config, {})
    stored = _pulled_back(walk)
    if stored:
        walk = _walk_head(program, modules, config, stored)
    return walk.cuts


def _walk_head(
    program: fx.Graph, modules: Mapping[str, nn.Module], config: Config, stored: Mapping[fx.Node, Region]
) -> "_Walk":
    walk = _Walk(program, modules, stored)
    for node in program.nodes:
        if node.meta["unit"] <= config.full_depth or "full" not in node.meta:
            walk.regions[node] = node.meta.get("full")
        else:
            walk.visit(node, walk.keep(node, config.head_scale))
    return walk


@dataclass
class _Walk:
    """One pass over a program: what comes from every node, its cut, and what its rules asked for."""

    program: fx.Graph
    modules: Mapping[str, nn.Module]
    stored: Mapping[fx.Node, Region] = field(default_factory=dict)
    regions: dict[fx.Node, Any] = field(default_factory=dict)
    cuts: dict[fx.Node, Cut] = field(default_factory=dict)
    needs: Needs = field(default_factory=Needs)
    held: dict[int, list[Sequence[int]]] = field(default_factory=dict)

    def operator(self, node: fx.Node, keep: Callable[[int], Dimension] = _UNUSED_KEEP) -> Operator:
        """A node as its rule sees it."""
        return Operator(node, self.module(node), self.regions, keep, self.needs)

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def visit(self, node: fx.Node, keep: Callable[[int], Dimension]) -> None:
        """Apply the node's rule."""
        if node.op in ("placeholder", "get_attr"):
            self.regions[node] = self.stored.get(node, node.meta["dims"])
            if not is_whole(self.regions[node]):
                self.cuts[node] = Cut(self.regions[node])
        elif node.op != "output" and ("dims" in node.meta or kind_of(node, self.module(node)) == "setitem"):
            cut = rule_of(node, self.module(node))(self.operator(node, keep))
            self._check_shared(node, cut)
            self.cuts[node] = cut
            self.regions[node] = cut.output

    def _check_shared(self, node: fx.Node, cut: Cut) -> None:
        module = self.module(node)
        if cut.parameters and module is not None:
            stored = {*dict(module.named_parameters()), *dict(module.named_buffers())}
            if not stored.issuperset(cut.parameters):
                why = "computes its weights anew each time, which has no width rule"
                raise refusal(node, kind_name(node, module), why)
        for name, index in cut.parameters.items():
            kept = [dimension.indices for dimension in index]
            if self.held.setdefault(id(attrgetter(name)(module)), kept) != kept:
                raise refusal(node, kind_name(node, module), "is used more than once, at different widths")

    def keep(self, node: fx.Node, head_scale: float) -> Callable[[int], Dimension]:
        """The width a node is to give: the scaled one, the one it gates, or what those need that it is stored for."""

        def width(size: int) -> Dimension:
            full = made_by(node, size)
            if node in self.stored:
                return full.keeping(self.stored[node][-1].indices)
            gated = node.meta.get("gates")
            if gated is not None:
                channels = [d for d in self.regions[gated] if d.size == size and not d.batched]
                if len({tuple(d.indices) for d in channels}) == 1:
                    return full.keeping(channels[0].indices)
            if not node.meta["data"]:
                return full
            layout: Layout = node.meta.get("layout", Layout(1, size, 1))
            return full.keeping(layout.kept(head_scale))

        return width


def _bears_weights(walk: _Walk, node: fx.Node) -> bool:
    walk.regions[node] = node.meta.get("dims")
    return node.op.startswith("call") and "dims" in node.meta and is_weighted(walk.operator(node))


def _made_size(node: fx.Node) -> int:
    """How many outputs a weight-bearing operator has at full width: the size of the dimension it makes."""
    region, *_ = _regions_of(node.meta["full"])
    (made,) = [d for d in region if d.axis is not None and node.meta["twin"].name in d.axis.makers]
    return int(made.size)


def _gives_outputs(program: fx.Graph, weighted: Collection[fx.Node], main: Collection[fx.Node]) -> set[fx.Node]:
    """The weight-bearing nodes whose channels reach a main output: these are never scaled."""
    reaching: set[fx.Node] = set()
    for node in reversed(program.nodes):
        if node in main or any(user in reaching and user not in weighted for user in node.users):
            reaching.add(node)
    return reaching & set(weighted)


def _pulled_back(walk: _Walk) -> dict[fx.Node, Region]:
    """What is stored and used directly follows the width of what it meets (METHOD, section 1, Widths).

    From what operators take of tensors that do not depend on the inputs, back to the parameters these come from.
    """
    wanted: dict[fx.Node, Region] = {}
    for cut in walk.cuts.values():
        for source, taken in cut.inputs.items():
            if not source.meta["data"] and (source not in wanted or _entries(taken) > _entries(wanted[source])):
                wanted[source] = taken
    stored: dict[fx.Node, Region] = {}
    for node in reversed(walk.program.nodes):
        if node in wanted and not is_whole(wanted[node]):
            _pull(walk, node, wanted, stored)
    return stored


def _entries(region: Region) -> int:
    total = 1
    for dimension in region:
        total *= dimension.width
    return total


def _pull(walk: _Walk, node: fx.Node, wanted: dict[fx.Node, Region], stored: dict[fx.Node, Region]) -> None:
    """One step back: what the node's own inputs need keep so that it gives `wanted`; unknown steps stay whole."""
    region = wanted[node]
    if node.op == "get_attr":
        stored[node] = tuple(Dimension(d.size, d.kept) for d in region)
        return
    kind, module = kind_of(node, walk.module(node)), walk.module(node)
    inputs = [x for x in node.all_input_nodes if "dims" in x.meta]
    if kind in (nn.Linear, "linear"):
        stored[node] = region
        return
    if kind in ("permute", "transpose"):
        places = permutation(walk.operator(node), len(region))
        wanted[inputs[0]] = tuple(region[places.index(i)] for i in range(len(region)))
    elif kind in ("view", "reshape", "flatten", "unsqueeze", "squeeze", "unflatten"):
        _, back, _ = reshaped(tuple(Dimension(d.size, d.kept, d.batched) for d in region), inputs[0].meta["dims"])
        wanted[inputs[0]] = back
    elif kind == "getitem" and len(inputs) == 2:  # a table of vectors, read by a tensor of numbers
        rest = inputs[0].meta["dims"][1:]
        wanted[inputs[0]] = (inputs[0].meta["dims"][0], *region[len(region) - len(rest) :])
    elif len(inputs) >= 1 and module is None and kind not in ("stack", "matmul", "getitem"):
        for source in inputs:
            full = source.meta["dims"]
            aligned = region[len(region) - len(full) :]
            wanted[source] = tuple(a if a.size == d.size else d for a, d in zip(aligned, full, strict=True))
    elif module is not None and len(inputs) == 1 and inputs[0].meta["dims"] == node.meta["dims"]:
        wanted[inputs[0]] = region
