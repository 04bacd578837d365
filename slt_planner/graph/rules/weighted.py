"""Convolutions and linear layers, as modules and as functions with parameters used directly."""

from dataclasses import dataclass, replace

from torch import fx, nn

from slt_planner.graph.region import MIXED, Dimension, Region, cut_to, is_whole
from slt_planner.graph.widths import Cut, Index, Operator, rule

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class _Weights:
    """What an operator takes of its input's channels, gives, and keeps of its weights."""

    taken: Dimension
    given: Dimension
    weight: Index
    sizes: dict[str, int]


def _groups(op: Operator) -> int:
    return int(op.module.groups if op.module is not None else op.argument(6, "groups", 1))


def _in_channels(op: Operator) -> int:
    return op.region(op.argument(0, "input"))[1].size


def _has_own_width(op: Operator) -> bool:
    """A depthwise convolution follows its producer's width and is no unit of its own."""
    return _groups(op) == 1 or _groups(op) < _in_channels(op)


@rule(*_CONVOLUTIONS, "conv1d", "conv2d", "conv3d", weighted=_has_own_width)
def _convolution(op: Operator) -> Cut:
    groups, arrives, out = _groups(op), op.region(op.argument(0, "input"))[1], op.output[1].size
    if groups == 1:
        given = op.keep(out)
        weights = _Weights(arrives, given, (given, arrives), {"in_channels": arrives.width})
    elif groups == arrives.size:
        weights = _depthwise(arrives, out)
    else:
        weights = _grouped(op, arrives, out, groups)
    sizes = {**weights.sizes, "out_channels": weights.given.width}
    return _convolved(op, replace(weights, sizes=sizes))


def _depthwise(arrives: Dimension, out: int) -> _Weights:
    """Each channel has its own `out / in` outputs; those of the channels that come are kept."""
    each = out // arrives.size
    given = Dimension(out, axis=arrives.axis if each == 1 else MIXED)
    if not arrives.whole:
        given = given.keeping(tuple(c * each + i for c in arrives.indices for i in range(each)))
    sizes = {"in_channels": arrives.width, "groups": arrives.width}
    return _Weights(arrives, given, (given,), sizes)


def _grouped(op: Operator, arrives: Dimension, out: int, groups: int) -> _Weights:
    """Whole groups, usually the first ones, and their inputs."""
    each_in, each_out = arrives.size // groups, out // groups
    op.needs.steps(arrives, each_in)
    given = op.keep(out)
    op.needs.steps(given, each_out)
    op.needs.choose_together(arrives, given)
    kept_groups = sorted({output // each_out for output in given.indices})
    taken = arrives
    if len(kept_groups) < groups:
        taken = arrives.keeping(tuple(group * each_in + i for group in kept_groups for i in range(each_in)))
    if not set(taken.indices) <= set(arrives.indices):
        raise op.refused(
            f"with groups={groups} needs the {taken.width} channels of its groups, and not all of them come"
        )
    return _Weights(taken, given, (given,), {"in_channels": taken.width, "groups": len(kept_groups)})


@rule(*_TRANSPOSED, "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", weighted=True)
def _transposed_convolution(op: Operator) -> Cut:
    groups = _groups(op)
    if groups != 1:
        raise op.refused(f"with groups={groups} has no width rule")
    arrives, given = op.region(op.argument(0, "input"))[1], op.keep(op.output[1].size)
    sizes = {"in_channels": arrives.width, "out_channels": given.width}
    return _convolved(op, _Weights(arrives, given, (arrives, given), sizes))


@rule(nn.Linear, "linear", weighted=True)
def _linear(op: Operator) -> Cut:
    x = op.argument(0, "input")
    *positions, arrives = op.region(x)
    given = op.keep(op.output[-1].size)
    weights = _Weights(arrives, given, (given, arrives), {"in_features": arrives.width, "out_features": given.width})
    return _with_weights(op, weights, {}, (*positions, given))


def _convolved(op: Operator, weights: _Weights) -> Cut:
    """The cut around a convolution of (N, C, positions): positions must be whole."""
    x = op.argument(0, "input")
    batch, arrives, *positions = op.region(x)
    if not is_whole(tuple(positions)):
        raise op.refused("over a dimension that a head scale cuts has no width rule")
    inputs = {} if weights.taken.indices == arrives.indices else {x: (batch, weights.taken, *positions)}
    return _with_weights(op, weights, inputs, (batch, weights.given, *op.output[2:]))


def _with_weights(op: Operator, weights: _Weights, inputs: dict[fx.Node, Region], output: Region) -> Cut:
    """The weights are a module's, or tensors given to a function."""
    if op.module is not None:
        parameters: dict[str, Index] = {"weight": weights.weight}
        if op.module.bias is not None:
            parameters["bias"] = (weights.given,)
        return Cut(output, inputs, parameters, weights.sizes)
    for position, name, index in ((1, "weight", weights.weight), (2, "bias", (weights.given,))):
        node = op.argument(position, name)
        if isinstance(node, fx.Node):
            inputs = {**inputs, node: cut_to(op.region(node), index)}
    groups = {6 if len(op.node.args) > 6 else "groups": weights.sizes["groups"]} if "groups" in weights.sizes else {}
    return Cut(output, inputs, arguments=groups)
