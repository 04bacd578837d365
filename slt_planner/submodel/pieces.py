"""A training program cut into pieces, of which some are run again in the backward pass instead of being kept."""

import operator
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from slt_planner.config import LeanLever
from slt_planner.submodel import lean_operators as lean
from slt_planner.submodel.lean_program import trained_nodes


@dataclass(frozen=True)
class Piece:
    """A part of a program: a graph from the values that the piece before gives to those that the next one takes.

    `recomputed`: its own values are not kept for the backward pass, it is run again there.
    """

    graph: fx.Graph
    recomputed: bool = False


def most_recomputed(levers: Collection[LeanLever]) -> int | None:
    """How many pieces these levers recompute at most; None is all.

    >>> most_recomputed(["lean_norms", "recompute:2"]), most_recomputed(["lean_norms"]), most_recomputed(["recompute"])
    (2, 0, None)
    """
    if "recompute" in levers:
        return None
    return max((int(lever.partition(":")[2]) for lever in levers if lever.startswith("recompute:")), default=0)


def in_pieces(program: fx.Graph, module: nn.Module, most: int | None = None) -> list[Piece]:
    """A training program cut where it begins to train, and then before each layer that a single tensor leads to.

    A norm or an activation that only the layer takes goes with it: a piece of a transformer is a norm with its
    attention, or with its MLP, up to the sum. Numbers made of the batch size may pass beside the tensor.

    Recomputed are those that start from a single tensor, but not the frozen part, nor a lone layer, which saves nothing
    but that tensor; nor what draws random numbers, whose state would have to be kept; nor the last, with the
    classifier: what it saves is needed at once. Of these the first `most` (None: all): what they save waits longest for
    its backward pass, and beside a narrow head it is most of what is saved.
    """
    nodes = [node for node in program.nodes if node.op != "get_attr"]
    inputs = sum(node.op == "placeholder" for node in nodes)
    trained = trained_nodes(program, module)
    first = next((i for i in range(inputs, len(nodes)) if nodes[i] in trained), len(nodes) - 1)
    if all(is_number(node) for node in nodes[inputs:first]):
        first = inputs  # nothing is frozen
    before_layers = list(_places(nodes, first, module))
    begins = [*([inputs] if first > inputs else []), first, *before_layers[:-1]]
    pieces: list[Piece] = []
    for begin, end in zip(begins, [*begins[1:], len(nodes)], strict=True):
        given = live_values(nodes, begin) if begin > inputs else nodes[:inputs]
        graph = graph_of(nodes[begin:end], given, live_values(nodes, end))
        more = most is None or sum(piece.recomputed for piece in pieces) < most
        again = more and first <= begin and end < len(nodes) and _is_worth_it(nodes[begin:end], given, module)
        pieces.append(Piece(graph, again))
    return pieces


def _is_worth_it(nodes: Sequence[fx.Node], given: Sequence[fx.Node], module: nn.Module) -> bool:
    """Whether running these again is the same, and only the one tensor that is given need be kept for it."""
    tensors = sum(not is_number(value) for value in given)
    calls = sum(not is_number(node) for node in nodes)
    again = not any(is_random(node, module) or moves_statistics(node, module) for node in nodes)
    return tensors == 1 and calls > 1 and again


def _places(nodes: Sequence[fx.Node], first: int, module: nn.Module) -> Iterator[int]:
    """Before each layer with weights but the first of those trained: the last place that one tensor alone passes.

    Not between a wide tensor and its copied cut: its gradient, as wide, would be there while what comes before runs
    again; nor between a call that gives several tensors and those; nor before a call in place: what a piece is given is
    kept to run it again.
    """
    alive = _tensors_alive(nodes)
    place, weights = None, False
    for i in range(first, len(nodes)):
        tied = nodes[i].target in (operator.getitem, lean.with_cut) or nodes[i].meta.get("in_place", False)
        if i > first and alive[i] == 1 and not tied:
            place = i
        if _bears_weights(nodes[i], module):
            if weights and place is not None:
                yield place
            place, weights = None, True


def _tensors_alive(nodes: Sequence[fx.Node]) -> list[int]:
    """Before each node: how many values that are no numbers were computed and are still to be used."""
    number_of = {node: i for i, node in enumerate(nodes)}
    changes = [0] * (len(nodes) + 2)
    for i, node in enumerate(nodes):
        if node.users and not is_number(node):
            changes[i + 1] += 1
            changes[max(number_of[user] for user in node.users) + 1] -= 1
    return list(accumulate(changes))


def is_number(node: fx.Node) -> bool:
    """Made of the batch size alone (graph/record.py), or the device: it takes no memory."""
    if node.op == "call_method":
        return node.target == "size"
    if node.op != "call_function":
        return False
    if node.target in (operator.add, operator.mul):
        return all(is_number(x) for x in node.all_input_nodes)
    return node.target is getattr and node.args[1:] == ("device",)


_WEIGHTED = (
    lean.convolution, lean.convolutions, F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d,
    F.conv_transpose2d, F.conv_transpose3d,
)  # fmt: skip


def _bears_weights(node: fx.Node, module: nn.Module) -> bool:
    """Convolutions, linear layers, attention; not norms, whose parameters have one dimension."""
    if node.op == "call_module":
        return any(parameter.dim() > 1 for parameter in module.get_submodule(str(node.target)).parameters())
    return node.op == "call_function" and node.target in _WEIGHTED


_RANDOM = (
    "drop", "rand", "bernoulli", "stochastic", "rrelu", "gumbel", "normal", "uniform", "multinomial", "poisson",
    "exponential", "cauchy", "geometric",
)  # fmt: skip
_NOT_RANDOM = ("normalize", "native_batch_norm")
_DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
_DROPOUT_ARGUMENT = 4  # where scaled_dot_product_attention takes it


def is_random(node: fx.Node, module: nn.Module) -> bool:
    """Whether a call may draw random numbers, by its name or its dropout."""
    if node.op == "call_module":
        part = module.get_submodule(str(node.target))
        name, dropout = type(part).__name__, getattr(part, "dropout", 0)
        if isinstance(part, _DropoutNd) and part.p == 0:
            return False
    else:
        name = getattr(node.target, "__name__", str(node.target))
        dropout = 0
        if name == "scaled_dot_product_attention":
            dropout = node.kwargs.get("dropout_p", (*node.args, *[0] * 5)[_DROPOUT_ARGUMENT])
        elif name in _DROPOUTS and node.kwargs.get("p", (*node.args, 0.5, 0.5)[1]) == 0:
            return False
        elif "attention" in name:
            dropout = 1  # another one's arguments are not known
    name = name.lower()
    return bool(dropout) or (name not in _NOT_RANDOM and any(word in name for word in _RANDOM))


def moves_statistics(node: fx.Node, module: nn.Module) -> bool:
    """A norm that is not rewritten, and whose running statistics would move once more if it ran again."""
    if node.op == "call_module":
        part = module.get_submodule(str(node.target))
        return isinstance(part, _NormBase) and part.track_running_stats and part.training
    if node.target is lean.batch_norm or getattr(node.target, "__name__", "") not in ("batch_norm", "instance_norm"):
        return False
    return any(x.op == "get_attr" and "running" in str(x.target) for x in node.all_input_nodes)


def live_values(nodes: Sequence[fx.Node], at: int) -> list[fx.Node]:
    """The values that are computed before a place and used from there on."""
    after = set(nodes[at:])
    return [node for node in nodes[:at] if any(user in after for user in node.users)]


def graph_of(nodes: Sequence[fx.Node], given: Sequence[fx.Node], wanted: Sequence[fx.Node]) -> fx.Graph:
    """A graph of some nodes of a program, from the values that are given to those that are wanted (or the outputs)."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for value in given:
        copies[value] = graph.placeholder(value.name)
    for node in nodes:
        for stored in node.all_input_nodes:
            if stored.op == "get_attr" and stored not in copies:
                copies[stored] = graph.node_copy(stored)
        copies[node] = graph.node_copy(node, copies.__getitem__)
    if nodes[-1].op != "output":
        graph.output(tuple(copies[value] for value in wanted))
    graph.lint()
    return graph
