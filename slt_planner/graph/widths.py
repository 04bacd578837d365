"""What a head scale does to every width: one small rule a layer kind, in a registry.

A rule sees one operator of the traced graph and says which channels a sub-model keeps around it. A kind that has no
rule is refused by name; nothing is guessed. To add a kind, write a function and decorate it with `rule`.
"""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import fx, nn

from slt_planner.config import Config
from slt_planner.errors import InputError, UnsupportedLayerError

Channels: TypeAlias = tuple[int, ...]
"""Which channels (dimension 1) of a tensor of the full network a sub-model keeps, ascending."""

Index: TypeAlias = tuple[Channels, ...]
"""Which entries of a parameter a sub-model keeps, by dimension; dimensions beyond are kept whole."""


@dataclass(frozen=True)
class Operator:
    """One operator of the traced graph: `module` is None for functions and methods; shapes have no batch dimension."""

    node: fx.Node
    module: Any
    input_shapes: tuple[tuple[int, ...], ...]
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """What a sub-model keeps around one operator.

    `inputs` are the channels the operator takes of each input tensor; where that is less than its producer gives, the
    input is cut. `attributes` are the sizes written into the sub-model's copy of the module.
    """

    inputs: tuple[Channels, ...]
    output: Channels
    parameters: Mapping[str, Index] = field(default_factory=dict)
    attributes: Mapping[str, int] = field(default_factory=dict)


Keep: TypeAlias = Callable[[int], Channels]
"""From a full width to the channels kept: all of them outside the head, the first ones inside."""

Rule: TypeAlias = Callable[[Operator, tuple[Channels, ...], Keep], Cut]

_RULES: dict[Any, Rule] = {}
_WEIGHTED: set[Any] = set()


def rule(*kinds: Any, weighted: bool = False) -> Callable[[Rule], Rule]:
    """Register a width rule for layer kinds: module classes, functions, or names of tensor methods.

    `weighted` kinds start a freeze unit (METHOD: convolution, linear); the others belong to their producer's.
    """

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(kinds, function))
        if weighted:
            _WEIGHTED.update(kinds)
        return function

    return register


def kind_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Any:
    """The key of a node's rule: its module's class, its function, or its method's name."""
    return type(modules[str(node.target)]) if node.op == "call_module" else node.target


def is_weighted(kind: Any) -> bool:
    """Whether a kind starts a freeze unit."""
    return kind in _WEIGHTED


def has_rule(kind: Any) -> bool:
    """Whether a kind is understood."""
    return kind in _RULES


def refusal(node: fx.Node, kind: Any, why: str = "has no width rule") -> UnsupportedLayerError:
    """The error for an operator that is not understood, with its place and kind."""
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", repr(kind))
    where = node.target if node.op in ("call_module", "get_attr") else f"{node.op} node {node.name!r}"
    return UnsupportedLayerError(
        f"{where}: {name} {why}; teach it with @slt_planner.graph.widths.rule({name}) or replace the layer"
    )


def scaled_width(channels: int, head_scale: float) -> int:
    """Width of a head layer: max(1, floor(s * C)), with 1e-9 so that k/C gives k in floating point.

    >>> scaled_width(16, 0.5), scaled_width(16, 1 / 64), scaled_width(64, 29 / 64)
    (8, 1, 29)
    """
    return max(1, math.floor(head_scale * channels + 1e-9))


def cut_graph(program: fx.Graph, modules: Mapping[str, nn.Module], config: Config, depth: int) -> dict[fx.Node, Cut]:
    """The cut around every operator of a traced program under a configuration, in the program's order.

    Nodes carry ``meta["unit"]`` (0 for inputs, depth + 1 for the classifier) and ``meta["shape"]``.

    Raises:
        UnsupportedLayerError: a rule refuses an operator.
    """
    if config.full_depth > depth:
        raise InputError(f"configuration {config}: full_depth is beyond the network's {depth} units")
    cuts: dict[fx.Node, Cut] = {}
    for node in program.nodes:
        if node.op == "placeholder":
            cuts[node] = Cut((), tuple(range(node.meta["shape"][0])))
        elif node.op == "output":
            cuts[node] = Cut(tuple(cuts[x].output for x in node.all_input_nodes), ())
        else:
            scaled = config.full_depth < node.meta["unit"] <= depth
            scale = config.head_scale if scaled else 1.0
            inputs = tuple(cuts[x].output for x in node.all_input_nodes)
            keep = _first_channels(scale)
            cuts[node] = _RULES[kind_of(node, modules)](operator_of(node, modules), inputs, keep)
    return cuts


def operator_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Operator:
    """A node as its rule sees it."""
    module = modules[str(node.target)] if node.op == "call_module" else None
    shapes = tuple(tuple(x.meta["shape"]) for x in node.all_input_nodes)
    return Operator(node, module, shapes, tuple(node.meta["shape"]))


def _first_channels(scale: float) -> Keep:
    return lambda channels: tuple(range(channels if scale == 1.0 else scaled_width(channels, scale)))


@rule(nn.Conv2d, weighted=True)
def _convolution(op: Operator, inputs: tuple[Channels, ...], keep: Keep) -> Cut:
    if op.module.groups != 1:
        raise refusal(op.node, nn.Conv2d, f"with groups={op.module.groups} has no width rule")
    return _dense(op.module, inputs[0], keep(op.module.out_channels), "in_channels", "out_channels")


@rule(nn.Linear, weighted=True)
def _linear(op: Operator, inputs: tuple[Channels, ...], keep: Keep) -> Cut:
    if len(op.output_shape) != 1:
        raise refusal(op.node, nn.Linear, "on more than one position a sample has no width rule")
    return _dense(op.module, inputs[0], keep(op.module.out_features), "in_features", "out_features")


def _dense(module: nn.Module, taken: Channels, kept: Channels, size_in: str, size_out: str) -> Cut:
    """All inputs that come are taken, the first outputs are kept."""
    parameters: dict[str, Index] = {"weight": (kept, taken)}
    if module.bias is not None:
        parameters["bias"] = (kept,)
    return Cut((taken,), kept, parameters, {size_in: len(taken), size_out: len(kept)})


@rule(nn.BatchNorm2d, nn.BatchNorm1d)
def _batch_norm(op: Operator, inputs: tuple[Channels, ...], keep: Keep) -> Cut:
    (kept,) = inputs
    tensors = ("weight", "bias", "running_mean", "running_var")
    parameters = {name: (kept,) for name in tensors if getattr(op.module, name) is not None}
    return Cut(inputs, kept, parameters, {"num_features": len(kept)})


@rule(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid)
@rule(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
@rule(nn.Dropout, nn.Dropout2d, nn.Identity)
@rule(torch.relu, F.relu, F.relu6, F.gelu, F.silu, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.dropout)
@rule("relu", "relu_", "contiguous")
def _channels_pass(op: Operator, inputs: tuple[Channels, ...], keep: Keep) -> Cut:
    if len(inputs) != 1:
        raise refusal(op.node, op.node.target, "with several tensors has no width rule")
    return Cut(inputs, inputs[0])


@rule(torch.add, operator.add, operator.iadd, "add", "add_")
def _addition(op: Operator, inputs: tuple[Channels, ...], keep: Keep) -> Cut:
    if len({shape[0] for shape in op.input_shapes}) != 1:
        raise refusal(op.node, op.node.target, "of tensors with different channels has no width rule")
    common = tuple(sorted(set.intersection(*map(set, inputs))))
    return Cut((common,) * len(inputs), common)


@rule(torch.flatten, nn.Flatten, "flatten")
def _flatten(op: Operator, inputs: tuple[Channels, ...], keep: Keep) -> Cut:
    channels, *positions = op.input_shapes[0]
    area = math.prod(positions)
    if op.output_shape != (channels * area,):
        raise refusal(op.node, op.node.target, "into more than one dimension a sample has no width rule")
    return Cut(inputs, tuple(channel * area + i for channel in inputs[0] for i in range(area)))
