"""A training program cut into pieces, of which some are run again in the backward pass instead of being kept."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

from slt_planner.submodel import lean_operators as lean
from slt_planner.submodel.lean_program import CONVOLUTIONS, trained_nodes


@dataclass(frozen=True)
class Piece:
    """A part of a program: a graph from the values that the piece before gives to those that the next one takes.

    `recomputed`: its own values are not kept for the backward pass, it is run again there.
    """

    graph: fx.Graph
    recomputed: bool = False


def in_pieces(program: fx.Graph, module: nn.Module) -> list[Piece]:
    """A training program cut where it begins to train, and then before each layer that a single tensor leads to.

    Recomputed are those that start from a single tensor, but not the frozen part, nor the last: what it saves is needed
    at once; nor what draws random numbers, whose state would have to be kept.
    """
    trained = trained_nodes(program, module)
    nodes = [node for node in program.nodes if node.op != "get_attr"]
    first = next((i for i, node in enumerate(nodes) if node in trained and node.op != "placeholder"), len(nodes) - 1)
    places = [first] if first > sum(node.op == "placeholder" for node in nodes) else []
    for i in range(first + 1, len(nodes)):
        if _bears_weights(nodes[i], module) and len(_live(nodes, i)) == 1:
            places.append(i)
    ends = [*places, len(nodes)]
    pieces = []
    for begin, end in zip([0, *places], ends, strict=True):
        given = _live(nodes, begin) if begin else []
        graph = _piece(nodes[begin:end], given, _live(nodes, end))
        same_again = not any(_is_random(n, module) or _moves_statistics(n, module) for n in nodes[begin:end])
        pieces.append(Piece(graph, begin >= first and end < len(nodes) and len(given) == 1 and same_again))
    return pieces


def _bears_weights(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), (*CONVOLUTIONS, nn.Linear))
    return node.op == "call_function" and node.target in (lean.convolution, lean.convolutions)


_RANDOM = (
    "drop", "rand", "bernoulli", "stochastic", "rrelu", "gumbel", "normal", "uniform", "multinomial", "poisson",
    "exponential", "cauchy", "geometric",
)  # fmt: skip
_NOT_RANDOM = ("normalize", "native_batch_norm")
_DROPOUT_ARGUMENT = 4  # where scaled_dot_product_attention takes it


def _is_random(node: fx.Node, module: nn.Module) -> bool:
    """Whether a call may draw random numbers, by its name or its dropout."""
    if node.op == "call_module":
        part = module.get_submodule(str(node.target))
        name, dropout = type(part).__name__, getattr(part, "dropout", 0)
    else:
        name = getattr(node.target, "__name__", str(node.target))
        dropout = 0
        if name == "scaled_dot_product_attention":
            dropout = node.kwargs.get("dropout_p", (*node.args, *[0] * 5)[_DROPOUT_ARGUMENT])
        elif "attention" in name:
            dropout = 1  # another one's arguments are not known
    name = name.lower()
    return bool(dropout) or (name not in _NOT_RANDOM and any(word in name for word in _RANDOM))


def _moves_statistics(node: fx.Node, module: nn.Module) -> bool:
    """A norm that is not rewritten, and whose running statistics would move once more if it ran again."""
    if node.op == "call_module":
        part = module.get_submodule(str(node.target))
        return isinstance(part, _NormBase) and part.track_running_stats and part.training
    if node.target is lean.batch_norm or getattr(node.target, "__name__", "") not in ("batch_norm", "instance_norm"):
        return False
    return any(x.op == "get_attr" and "running" in str(x.target) for x in node.all_input_nodes)


def _live(nodes: Sequence[fx.Node], at: int) -> list[fx.Node]:
    """The values that are computed before a place and used from there on."""
    after = set(nodes[at:])
    return [node for node in nodes[:at] if any(user in after for user in node.users)]


def _piece(nodes: Sequence[fx.Node], given: Sequence[fx.Node], wanted: Sequence[fx.Node]) -> fx.Graph:
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
