"""A training pass in two: a frozen prefix that is a function of each sample alone, and the rest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slt_planner.submodel.lean_program import trained_nodes
from slt_planner.submodel.pieces import graph_of, is_number, is_random, live_values, moves_statistics

_TRAINING_ARGUMENT = 5  # where F.batch_norm is told to use the batch's own statistics


@dataclass(frozen=True)
class Split:
    """The functions of both parts; each takes the sub-model, then what it is given.

    `before` takes the network's arguments and gives the tensors that pass to the rest, each with a row a sample;
    `after` takes those. `tensors` are the fqns of the parameters and buffers that `before` uses.
    """

    before: Callable[..., tuple[Any, ...]]
    after: Sequence[Callable[..., tuple[Any, ...]]]
    tensors: tuple[str, ...]


def split_program(program: fx.Graph, module: nn.Module, depth: int) -> tuple[fx.Graph, fx.Graph] | None:
    """A training program cut before its first call that trains, or is beyond unit `depth`: its two parts, in order.

    None where the first part is empty, is not a fixed function of each sample alone (it draws random numbers, takes
    statistics of the batch, moves its own), or passes on anything but tensors with a row a sample.
    """
    nodes = [node for node in program.nodes if node.op != "get_attr"]
    inputs = sum(node.op == "placeholder" for node in nodes)
    trained = trained_nodes(program, module)
    first = next(i for i in range(inputs, len(nodes)) if nodes[i] in trained or _is_beyond(nodes[i], depth))
    passed = live_values(nodes, first)
    fixed = not any(_is_no_fixed_function(node, module) for node in nodes[inputs:first])
    if first == inputs or not fixed or not all(node.meta.get("rows") for node in passed):
        return None
    return graph_of(nodes[inputs:first], nodes[:inputs], passed), graph_of(nodes[first:], passed, ())


def _is_beyond(node: fx.Node, depth: int) -> bool:
    return not is_number(node) and node.meta.get("unit", depth + 1) > depth


def _is_no_fixed_function(node: fx.Node, module: nn.Module) -> bool:
    return is_random(node, module) or moves_statistics(node, module) or _mixes_samples(node, module)


def _mixes_samples(node: fx.Node, module: nn.Module) -> bool:
    """A batch norm that takes statistics of the batch."""
    if node.op == "call_module":
        norms = [own for own in module.get_submodule(str(node.target)).modules() if isinstance(own, _BatchNorm)]
        return any(own.training or own.running_mean is None for own in norms)
    if getattr(node.target, "__name__", "") != "batch_norm":
        return False
    place = _TRAINING_ARGUMENT
    return bool(node.kwargs.get("training", node.args[place] if len(node.args) > place else False))
