"""Freeze units: a weight-bearing operator and what follows it, frozen together, in the order of execution."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import fx, nn

from slt_planner.errors import UnsupportedLayerError
from slt_planner.graph.record import WHOLE, where
from slt_planner.graph.widths import kind_name, kind_of

Kinds: TypeAlias = Callable[[fx.Node], object]


@dataclass(frozen=True)
class Unit:
    """A freeze unit: `name` is the fqn of its weight-bearing module, `modules` the fqns of all its modules.

    `index` counts from 1 in the order of execution; `output_shape` is (channels, ...) of one sample. Several units
    that `blocks.merge_to_blocks` made one are of kind "block", and have the name of their common module.
    """

    index: int
    name: str
    kind: str
    output_shape: tuple[int, ...]
    modules: tuple[str, ...]


def assign_units(
    program: fx.Graph,
    modules: Mapping[str, nn.Module],
    weighted: Collection[fx.Node],
    main: Collection[fx.Node],
    trained: Mapping[str, fx.Node] | None = None,
) -> tuple[Unit, ...]:
    """Write ``meta["unit"]`` (whose width a node has) and ``meta["freezes"]`` (with which unit) on every node.

    The two differ only for what is stored and used by several units. Inputs and what precedes the first unit belong to
    unit 1; classifiers (weight-bearing operators that no other one follows) and what comes after them are depth + 1.
    What an addition or a product merges belongs to the later operand's unit; gates belong to what they gate; an
    attention's projections are one unit, and those of queries, keys and values carry ``meta["projects"]``. Nodes that
    only auxiliary outputs need (not `main`) carry ``meta["auxiliary"]``; they belong to the unit they hang on.

    Args:
        program: the recorded graph; nodes carry ``meta["data"]``, whether they depend on the inputs.
        modules: the skeleton's modules by fqn.
        weighted: its weight-bearing nodes.
        main: the nodes of the main outputs.
        trained: for evaluation mode, the weight-bearing nodes of training mode by the name of their weights; their
            units hold in both modes.

    Raises:
        UnsupportedLayerError: weights are used again on what they gave, or in evaluation mode alone.
    """

    def kinds(node: fx.Node) -> object:
        return kind_of(node, modules[str(node.target)] if node.op == "call_module" else None)

    order = {node: i for i, node in enumerate(program.nodes)}
    needed = _leading_to(program, main)
    for node in _leading_to(program, output_nodes(program)):
        node.meta["auxiliary"] = node.meta["data"] and node not in needed
    gates = _gates(program, weighted, kinds)
    bearing = [node for node in program.nodes if node in weighted and node in needed and node not in gates]
    classifiers = _without_followers(program, set(bearing))
    leader = _merged(program, bearing, classifiers, kinds)
    if trained is not None:
        _take_over_units(program, weighted, trained)
        return ()
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in bearing:
        if node not in classifiers:
            groups.setdefault(leader[node], []).append(node)
    ordered = sorted(groups.values(), key=lambda group: max(order[node] for node in group))
    index_of = {node: i for i, group in enumerate(ordered, start=1) for node in group}
    _write_units(program, index_of | dict.fromkeys(classifiers, len(ordered) + 1))
    depth_of = _weighted_depth(program, set(bearing))
    return tuple(
        _unit(i, max(group, key=lambda node: (depth_of[node], order[node])), program, modules)
        for i, group in enumerate(ordered, start=1)
    )


def output_nodes(program: fx.Graph) -> set[fx.Node]:
    """The nodes whose results the network gives."""
    return set(program.output_node().all_input_nodes)


def weights_name(node: fx.Node) -> str:
    """What a weight-bearing node's weights are known by: its module's fqn, or its first stored tensor's."""
    if node.op == "call_module":
        return str(node.target)
    stored = [x for x in node.all_input_nodes if not x.meta["data"]]
    while stored and stored[0].op != "get_attr":
        stored = [x for x in stored[0].all_input_nodes if not x.meta["data"]]
    return str(stored[0].target) if stored else node.name


def _take_over_units(program: fx.Graph, weighted: Collection[fx.Node], trained: Mapping[str, fx.Node]) -> None:
    for node in weighted:
        if weights_name(node) not in trained:
            raise UnsupportedLayerError(f"{where(node)}: is used in evaluation mode and not in training")
    _write_units(program, {node: trained[weights_name(node)].meta["unit"] for node in weighted})


def _write_units(program: fx.Graph, index_of: Mapping[fx.Node, int]) -> None:
    for node in program.nodes:
        before = [x.meta["unit"] for x in node.all_input_nodes if x.meta["data"]]
        node.meta["unit"] = node.meta["freezes"] = max([index_of.get(node, 0), *before])
    for node in program.nodes:
        if node.meta["data"] and node.op not in ("placeholder", "output"):
            node.meta["unit"] = node.meta["freezes"] = max(1, node.meta["unit"])
    for node in reversed(program.nodes):
        if not node.meta["data"] and node.users:
            node.meta["unit"] = min(user.meta["unit"] for user in node.users)
            node.meta["freezes"] = max(user.meta["freezes"] for user in node.users)


def _unit(index: int, main: fx.Node, program: fx.Graph, modules: Mapping[str, nn.Module]) -> Unit:
    members = [str(n.target) for n in program.nodes if n.op == "call_module" and n.meta["unit"] == index]
    module = modules[str(main.target)] if main.op == "call_module" else None
    return Unit(
        index=index,
        name=where(main) if where(main) != WHOLE else weights_name(main).removesuffix(".weight"),
        kind=kind_name(main, module),
        output_shape=sample_shape(main),
        modules=tuple(dict.fromkeys(members)),
    )


def sample_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of what a node gives for one sample; of several results the first."""
    dims = node.meta["dims"]
    dims = dims[0] if dims and isinstance(dims[0], tuple) else dims
    return tuple(d.size for i, d in enumerate(dims) if i > 0 or d.size > 1)


def _leading_to(program: fx.Graph, goals: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes that the goals depend on, themselves included."""
    needed: set[fx.Node] = set()
    for node in reversed(program.nodes):
        if node in goals or any(user in needed for user in node.users):
            needed.add(node)
    return needed


def _without_followers(program: fx.Graph, bearing: Collection[fx.Node]) -> set[fx.Node]:
    """The weight-bearing nodes from which no other weight-bearing node can be reached."""
    leads_on: dict[fx.Node, bool] = {}
    for node in reversed(program.nodes):
        leads_on[node] = any(user in bearing or leads_on[user] for user in node.users)
    return {node for node in bearing if not leads_on[node]}


def _gates(program: fx.Graph, weighted: Collection[fx.Node], kinds: Kinds) -> set[fx.Node]:
    """Weight-bearing nodes between a tensor and its product with something smaller that is computed from it alone.

    Squeeze-excite (Hu et al. 2018, arXiv 1709.01507) is the usual one. The last of them gives as many channels as it
    gates: ``meta["gates"]`` says of which node.
    """
    found: set[fx.Node] = set()
    order = {node: i for i, node in enumerate(program.nodes)}
    for product in program.nodes:
        if product.op == "output" or kinds(product) != "mul" or len(_data_inputs(product)) != 2:
            continue
        for gated, gate in (_data_inputs(product), _data_inputs(product)[::-1]):
            between = _between(gated, gate)
            bearing = [node for node in between or () if node in weighted]
            if bearing and _entries(_before_expansion(gate, kinds)) < _entries(gated):
                found.update(bearing)
                max(bearing, key=order.__getitem__).meta["gates"] = gated
    return found


def _before_expansion(node: fx.Node, kinds: Kinds) -> fx.Node:
    while kinds(node) in ("expand", "expand_as", "broadcast_to"):
        node = _data_inputs(node)[0]
    return node


def _between(start: fx.Node, end: fx.Node) -> set[fx.Node] | None:
    """All nodes that `end` is computed from, back to `start`; None if it is computed from something else as well."""
    found: set[fx.Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node is start or node in found:
            continue
        if node.op == "placeholder":
            return None
        found.add(node)
        waiting += _data_inputs(node)
    return found


def _data_inputs(node: fx.Node) -> list[fx.Node]:
    return [x for x in node.all_input_nodes if x.meta["data"]]


def _data_users(node: fx.Node) -> list[fx.Node]:
    return [x for x in node.users if x.meta["data"]]


def _entries(node: fx.Node) -> int:
    size = 1
    for dimension in node.meta["dims"]:
        size *= dimension.size
    return size


_MERGING = {"add", "mul", "sub"}
_MIXING = {"matmul", "bmm", "einsum", "scaled_dot_product_attention"}


def _merged(
    program: fx.Graph, bearing: list[fx.Node], classifiers: Collection[fx.Node], kinds: Kinds
) -> dict[fx.Node, fx.Node]:
    """Each weight-bearing node's leader: those with the same one are one unit."""
    leader = {node: node for node in bearing}
    place = {node: i for i, node in enumerate(bearing)}

    def merge(nodes: Iterable[fx.Node]) -> None:
        leaders = {leader[node] for node in nodes if node not in classifiers}
        for member in bearing:
            if leader[member] in leaders:
                leader[member] = min(leaders, key=place.__getitem__)

    for node in bearing:
        twin = node.meta["twin"]
        if twin is not node and twin in _leading_to(program, [node]):
            raise UnsupportedLayerError(
                f"{where(node)}: uses the weights of {where(twin)} again on what they gave; give each use its own"
            )
        merge((node, twin))
    for node in program.nodes:
        inputs = _data_inputs(node)
        if node.op == "output" or node in leader or not inputs:
            continue
        if kinds(node) in _MERGING and len(inputs) > 1:
            merge(p for p in (_sole_producer(x, leader) for x in inputs) if p is not None)
        elif kinds(node) in _MIXING and len(inputs) > 1:
            projections = {p for x in inputs for p in _projections(x, leader, kinds)}
            for projection in projections:
                projection.meta["projects"] = True
            if projections:
                merge(projections | _next_bearing(node, leader))
    return leader


def _sole_producer(node: fx.Node, bearing: Mapping[fx.Node, fx.Node]) -> fx.Node | None:
    """The weight-bearing node that a value comes from, if nothing else uses what lies between."""
    while len(_data_users(node)) == 1:
        if node in bearing:
            return node
        if len(_data_inputs(node)) != 1:
            return None
        (node,) = _data_inputs(node)
    return None


def _projections(node: fx.Node, bearing: Mapping[fx.Node, fx.Node], kinds: Kinds) -> set[fx.Node]:
    """The weight-bearing nodes that make an attention's queries, keys or values, and nothing else."""
    if node in bearing:
        return {node} if _only_mixed(node, bearing, kinds) else set()
    found = [_projections(x, bearing, kinds) for x in _data_inputs(node)]
    several = set().union(*found)
    return several if len(several) == 1 or len(found) == 1 or kinds(node) in _MIXING else set()


def _only_mixed(node: fx.Node, bearing: Mapping[fx.Node, fx.Node], kinds: Kinds) -> bool:
    """Whether all that a node gives goes into products of two computed tensors before any other weights."""
    for user in _data_users(node):
        mixes = kinds(user) in _MIXING and len(_data_inputs(user)) > 1
        if user in bearing or user.op == "output" or not (mixes or _only_mixed(user, bearing, kinds)):
            return False
    return bool(node.users)


def _next_bearing(node: fx.Node, bearing: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """The weight-bearing node that an attention's result goes to next, if it goes nowhere else."""
    while len(_data_users(node)) == 1:
        (node,) = _data_users(node)
        if node in bearing:
            return {node}
    return set()


def _weighted_depth(program: fx.Graph, weighted: set[fx.Node]) -> dict[fx.Node, int]:
    """How many weight-bearing nodes lie on the longest way to each node, itself included."""
    depth: dict[fx.Node, int] = {}
    for node in program.nodes:
        depth[node] = (node in weighted) + max((depth[x] for x in node.all_input_nodes), default=0)
    return depth
