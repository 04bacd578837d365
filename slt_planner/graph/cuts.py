"""The cut around every operator of a network under a configuration: the rules, applied in the program's order."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, TypeAlias

from torch import fx, nn

from slt_planner.config import Config, Granularity
from slt_planner.errors import InputError
from slt_planner.graph.blocks import merge_to_blocks
from slt_planner.graph.freeze_units import Unit, assign_units, weights_name
from slt_planner.graph.region import Dimension, Region, is_whole, reshaped
from slt_planner.graph.rules import arithmetic, shapes
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


def annotate(
    program: fx.Graph,
    modules: Mapping[str, nn.Module],
    main: Collection[fx.Node],
    trained: fx.Graph | None = None,
    granularity: Granularity = "layer",
) -> tuple[Unit, ...]:
    """Write on every node what the rules need to know, once a graph; gives the freeze units.

    Evaluation mode takes the units (so their granularity) and the steps of widths over from `trained`, the graph of
    training mode.

    Nodes get ``meta``: ``data`` (depends on the inputs), ``unit``, ``freezes`` and ``auxiliary`` (see `assign_units`),
    ``full`` (what it gives at full width, with axes), and weight-bearing ones ``layout``.

    Raises:
        UnsupportedLayerError: an operator has no rule, or its rule refuses it.
    """
    for node in program.nodes:
        inputs = [x for x in node.all_input_nodes if "dims" in x.meta]
        name = kind_of(node, None) if node.op in ("call_method", "call_function") else ""
        made_here = name.startswith("new_") or name.endswith("_like")  # of another tensor's shape alone
        computed = "dims" in node.meta and not made_here and any(x.meta["data"] for x in inputs)
        node.meta["data"] = node.op in ("placeholder", "output") or computed  # numbers made of the batch size are not
        node.meta.setdefault("auxiliary", False)
    calls = Counter(node.target for node in program.nodes if node.op == "call_module")
    for node in program.nodes:
        node.meta["reused"] = calls[node.target] > 1
    walk = _Walk(program, modules)
    weighted = [node for node in program.nodes if node.meta["data"] and _bears_weights(walk, node)]
    _note_twins(walk, weighted)
    known = None if trained is None else {weights_name(n): n for n in trained.nodes if "layout" in n.meta}
    units = assign_units(program, modules, weighted, main, known)
    if units and granularity == "block":
        units = merge_to_blocks(program, main, weighted, units)
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
        if known is not None:
            node.meta["layout"] = known[weights_name(node)].meta["layout"]
            continue
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
            walk.hold_whole(node)
        else:
            walk.visit(node, walk.keep(node, config))
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
    held: dict[int, list[Sequence[int]] | None] = field(default_factory=dict)

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
        elif node.op != "output" and "dims" in node.meta:
            cut = rule_of(node, self.module(node))(self.operator(node, keep))
            self._check_shared(node, cut)
            self.cuts[node] = cut
            self.regions[node] = cut.output

    def hold_whole(self, node: fx.Node) -> None:
        """The node's own weights are whole; where another node uses them again, they stay so."""
        if node.op == "call_module" and node.meta["reused"]:
            self.held |= {id(p): None for p in self.modules[str(node.target)].parameters()}

    def _check_shared(self, node: fx.Node, cut: Cut) -> None:
        module = self.module(node)
        if cut.parameters and module is not None:
            stored = {*dict(module.named_parameters()), *dict(module.named_buffers())}
            if not stored.issuperset(cut.parameters):
                why = "computes its weights anew each time, which has no width rule"
                raise refusal(node, kind_name(node, module), why)
        for name, index in cut.parameters.items():
            kept = None if is_whole(index) else [dimension.indices for dimension in index]
            if self.held.setdefault(id(attrgetter(name)(module)), kept) != kept:
                raise refusal(node, kind_name(node, module), "is used more than once, at different widths")

    def keep(self, node: fx.Node, config: Config) -> Callable[[int], Dimension]:
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
            return full.keeping(layout.kept(config.head_scale, config.channels))

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
    wishes: dict[fx.Node, Wish] = {}
    for cut in walk.cuts.values():
        for source, taken in cut.inputs.items():
            if not source.meta["data"]:
                _add_wish(wishes, source, taken)
    stored: dict[fx.Node, Region] = {}
    for node in reversed(walk.program.nodes):
        wish = wishes.get(node)
        if wish is None:
            continue
        if node.op == "get_attr" or kind_of(node, walk.module(node)) in (nn.Linear, "linear"):
            full = node.meta["dims"]
            stored[node] = tuple(d if w is None else d.keeping(w.indices) for d, w in zip(full, wish, strict=True))
        else:
            for source, part in _wishes_before(walk, node, wish):
                if not source.meta["data"]:
                    _add_wish(wishes, source, part)
    return {node: region for node, region in stored.items() if not is_whole(region)}


Wish: TypeAlias = tuple[Dimension | None, ...]
"""What is wanted of each dimension of a stored tensor; None where nothing is known."""


def _add_wish(wishes: dict[fx.Node, Wish], node: fx.Node, wish: Wish) -> None:
    """Where several use a tensor, the largest wish holds."""

    def larger(one: Dimension | None, other: Dimension | None) -> Dimension | None:
        return max((d for d in (one, other) if d is not None), key=lambda d: d.width, default=None)

    known = wishes.get(node, (None,) * len(wish))
    wishes[node] = tuple(larger(a, b) for a, b in zip(known, wish, strict=True))


def _wishes_before(walk: _Walk, node: fx.Node, wish: Wish) -> list[tuple[fx.Node, Wish]]:
    """One step back: what the node's own inputs must keep so that it gives what is wanted."""
    inputs = [x for x in node.all_input_nodes if "dims" in x.meta]
    if not inputs:
        return []
    kind, first = kind_of(node, walk.module(node)), inputs[0]
    rule = rule_of(node, walk.module(node))
    if rule is shapes.permute:
        places = shapes.permutation(walk.operator(node), len(wish))
        return [(first, tuple(wish[places.index(i)] for i in range(len(wish))))]
    if rule is shapes.reshape:
        region = tuple(d if w is None else d.keeping(w.indices) for d, w in zip(node.meta["dims"], wish, strict=True))
        _, back, _ = reshaped(tuple(replace(d, axis=None) for d in region), first.meta["dims"])
        return [(first, back)]
    if kind == "getitem":
        return [(first, _wish_before_indexing(node, first, inputs, wish))]
    if rule is arithmetic.entry_by_entry or kind in ("expand", "expand_as", "cat", "repeat_interleave"):
        return [(source, _aligned(source, wish)) for source in inputs]
    return []


def _aligned(source: fx.Node, wish: Wish) -> Wish:
    """A wish for a broadcast result, as one for what is broadcast: dimensions count from the last."""
    full = source.meta["dims"]
    aligned = wish[len(wish) - len(full) :]
    return tuple(w if w is not None and w.size == d.size else None for w, d in zip(aligned, full, strict=True))


def _wish_before_indexing(node: fx.Node, source: fx.Node, inputs: list[fx.Node], wish: Wish) -> Wish:
    """Whole slices and new dimensions pass a wish on; a table read by a tensor of numbers passes on its rows' width."""
    full = source.meta["dims"]
    if len(inputs) == 2:
        return (None, *wish[len(wish) - len(full) + 1 :])
    items = node.args[1] if isinstance(node.args[1], (tuple, list)) else (node.args[1],)
    if Ellipsis in items:
        return (None,) * len(full)
    before: list[Dimension | None] = []
    place = 0
    for item in items:
        if item is None:
            place += 1
        elif isinstance(item, slice):
            wanted = wish[place]
            before.append(wanted if wanted is not None and wanted.size == full[len(before)].size else None)
            place += 1
        else:
            before.append(None)
    return (*before, *wish[place:])
