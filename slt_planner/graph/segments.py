"""A network as a chain of segments with a single tensor between them; many of them are alike."""

from bisect import bisect_right
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

from torch import fx, nn

from slt_planner.graph.region import Dimension
from slt_planner.graph.trace import ModelGraph, settings_of
from slt_planner.graph.widths import Cut

_FEWEST_CALLS = 4
"""In a segment: shorter ones would only be more to put together."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Nodes of a training program that take one tensor, that of the node `source`, and pass one on, `result`'s.

    The last segment ends with the program's output and has no `result`. `tensors` are the fqns of the parameters and
    buffers in it, `structure` is equal for segments that compute the same at full width, and `freezes` are the depths
    from which on another part of it is frozen.
    """

    nodes: tuple[fx.Node, ...]
    source: fx.Node
    result: fx.Node | None
    tensors: tuple[str, ...]
    structure: Hashable
    freezes: tuple[int, ...]

    @cached_property
    def _places(self) -> Mapping[fx.Node, int]:
        """The number of each node; the source is before the first."""
        return dict(zip((self.source, *self.nodes), count(-1), strict=False))

    def frozen(self, freeze_depth: int) -> int:
        """How many of its parts are frozen, in the order of units."""
        return bisect_right(self.freezes, freeze_depth)

    def widths(self, cuts: Mapping[fx.Node, Cut]) -> Hashable:
        """What a configuration's cuts keep in the segment; equal for equal segments cut alike."""
        if not cuts:
            return None
        place = self._places
        given = cuts.get(self.source)
        return (given and _plain(given.output, place), *[_cut_key(cuts.get(node), place) for node in self.nodes])


def segments(graph: ModelGraph) -> tuple[Segment, ...]:
    """The segments of a network's training program, as many as there can be with a few calls each.

    None at all for networks that have more than one input, outputs or calls whose place moves with the configuration,
    or parameters with several names.
    """
    nodes = list(graph.programs[True].graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    if len(inputs) != 1 or any(node.meta["auxiliary"] for node in nodes):
        return ()
    if _parameters(graph, True) != _parameters(graph, False) or _has_shared(graph.skeleton):
        return ()
    found: list[Segment] = []
    source = inputs[0]
    for members, result in _split([node for node in nodes if node.op not in ("placeholder", "get_attr")], source):
        own = _with_stored(members, nodes)
        found.append(_segment(graph, own, source, result))
        source = result or source
    stored = [name for segment in found for name in segment.tensors]
    return tuple(found) if len(stored) == len(set(stored)) else ()


def _has_shared(skeleton: nn.Module) -> bool:
    named = dict(skeleton.named_parameters(remove_duplicate=False))
    return len(named) > len(dict(skeleton.named_parameters()))


def _parameters(graph: ModelGraph, mode: bool) -> set[str]:
    return {name for node in graph.programs[mode].graph.nodes for name in graph.tensors_of(node)}


def _split(calls: Sequence[fx.Node], source: fx.Node) -> Iterator[tuple[list[fx.Node], fx.Node | None]]:
    """The calls of each segment, and the node whose tensor it passes on."""
    place = {node: number for number, node in enumerate(calls)}
    last_use = {node: max((place[user] for user in node.users), default=-1) for node in (source, *calls)}
    members: list[fx.Node] = []
    alive = {source}
    for number, node in enumerate(calls):
        members.append(node)
        alive = {one for one in (*alive, node) if last_use[one] > number}
        if len(alive) == 1 and len(members) >= _FEWEST_CALLS:
            (result,) = alive
            if result in members and _is_tensor(result):
                yield members, result
                members = []
    yield members, None


def _is_tensor(node: fx.Node) -> bool:
    full: Any = node.meta.get("full")
    return bool(node.meta["data"] and full and isinstance(full[0], Dimension))


def _with_stored(members: Sequence[fx.Node], nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """The calls with the parameters that they use directly, in the program's order."""
    own = {*members, *[node for call in members for node in call.all_input_nodes if node.op == "get_attr"]}
    return tuple(node for node in nodes if node in own)


def _segment(graph: ModelGraph, nodes: tuple[fx.Node, ...], source: fx.Node, result: fx.Node | None) -> Segment:
    tensors = tuple(dict.fromkeys(name for node in nodes for name in graph.tensors_of(node)))
    units = graph.unit_of_tensor()
    freezes = sorted({units[name] for name in tensors} | {node.meta["unit"] for node in nodes})
    segment = Segment(nodes, source, result, tensors, None, tuple(freezes))
    place, order = segment._places, {unit: number for number, unit in enumerate(freezes)}
    structure = tuple(
        (
            _kind(graph, node),
            _plain((node.args, node.kwargs), place),
            order[node.meta["unit"]],
            tuple(order[units[name]] for name in graph.tensors_of(node)),
            node is result,
        )
        for node in nodes
    )
    return Segment(nodes, source, result, tensors, structure, tuple(freezes))


def _kind(graph: ModelGraph, node: fx.Node) -> Hashable:
    """What a node calls or uses: a module by its class and all that was set on it, if it is one of torch's; others are
    like no other.
    """
    stored = tuple((tuple(graph.tensor(n).shape), graph.tensor(n).dtype) for n in graph.tensors_of(node))
    if node.op != "call_module":
        return node.op, None if node.op in ("get_attr", "output") else node.target, stored
    module: nn.Module = graph.modules[str(node.target)]
    if not type(module).__module__.startswith("torch.nn."):
        return node.target, stored
    return tuple([(type(part), _settings(part)) for part in module.modules()]), stored


def _settings(module: nn.Module) -> Hashable:
    own = settings_of(module).items()
    return tuple([(name, value if isinstance(value, Hashable) else repr(value)) for name, value in own])


def _cut_key(cut: Cut | None, place: Mapping[fx.Node, int]) -> Hashable:
    if cut is None:
        return None
    return _plain(
        (cut.output, cut.inputs, cut.parameters, cut.attributes, cut.arguments, cut.replacement, cut.call), place
    )


def _plain(value: Any, place: Mapping[fx.Node, int]) -> Hashable:
    """A value to compare by: nodes by their place in the segment, dimensions by what is kept of how many entries."""
    if isinstance(value, Dimension):
        return value.size, value.kept, value.batched
    if isinstance(value, fx.Node):
        return "node", place[value]
    if isinstance(value, (list, tuple)):
        return tuple([_plain(entry, place) for entry in value])
    if isinstance(value, Mapping):
        return tuple([(_plain(key, place), _plain(entry, place)) for key, entry in value.items()])
    return ("slice", value.start, value.stop, value.step) if isinstance(value, slice) else value
