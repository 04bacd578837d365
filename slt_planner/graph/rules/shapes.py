"""What moves, joins, reshapes and pools entries: sizes written into calls become the sub-model's own."""

from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from slt_planner.graph.region import Dimension, Region, common, concatenated, is_whole, reshaped
from slt_planner.graph.rules.arithmetic import as_tuple
from slt_planner.graph.widths import Cut, Operator, rule

_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d, nn.Upsample),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d),
    *(nn.ConstantPad1d, nn.ConstantPad2d, nn.CircularPad1d, nn.CircularPad2d),
)


@rule(*_POOLS)
@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "lp_pool2d", "interpolate")
@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "upsample", "pad")
@rule("roll", "flip", "cumsum")
def _positions_change(op: Operator) -> Cut:
    """Positions are pooled, resized, padded or rolled; channels come through."""
    region = op.region(op.argument(0, "input"))
    moved = [i for i, (d, full) in enumerate(zip(region, op.output, strict=True)) if d.size != full.size]
    if op.module is None and op.name in ("roll", "flip", "cumsum"):
        moved += [d % len(region) for d in _moved_along(op)]
    if not all(region[i].whole for i in moved):
        raise op.refused("over a dimension that a head scale cuts has no width rule")
    return Cut(
        tuple(full.unmade(d) if i in moved else d for i, (d, full) in enumerate(zip(region, op.output, strict=True)))
    )


def _moved_along(op: Operator) -> tuple[int, ...]:
    if op.name == "flip":
        flipped: Any = op.node.kwargs.get("dims", op.node.args[1:])
        return as_tuple(flipped[0]) if len(flipped) == 1 else tuple(flipped)
    dims = op.argument(2, "dims") if op.name == "roll" else op.argument(1, "dim")
    if dims is None:
        raise op.refused("of all dimensions at once has no width rule")
    return as_tuple(dims)


@rule(nn.Flatten, nn.Unflatten, "flatten", "unsqueeze", "squeeze", "reshape", "view", "unflatten", "view_as")
@rule("reshape_as", "ravel")
def reshape(op: Operator) -> Cut:
    """The same entries in another shape."""
    x = op.argument(0, "input")
    region = op.region(x)
    if any(isinstance(argument, torch.dtype) for argument in op.node.args):
        raise op.refused("as another type has no width rule")
    try:
        taken, output, splits = reshaped(region, op.output)
    except ValueError as error:
        raise op.refused(f"has no width rule here: {error}") from error
    for split in splits:
        op.needs.split(split)
    inputs = {x: taken} if taken != region else {}
    if is_whole(output) or _says_no_sizes(op):
        return Cut(output, inputs)
    sizes = tuple(-1 if d.batched else d.width for d in output)
    if op.module is not None:
        return Cut(output, inputs, attributes={"unflattened_size": sizes[op.module.dim :]})
    return Cut(output, inputs, call=(torch.reshape, (x, sizes)))


def _says_no_sizes(op: Operator) -> bool:
    return isinstance(op.module, nn.Flatten) or op.name in ("flatten", "unsqueeze", "squeeze", "ravel")


@rule("permute", "transpose", "swapaxes", "swapdims", "movedim", "t", "T", "mT")
def permute(op: Operator) -> Cut:
    """Dimensions change places."""
    region = op.region(op.argument(0, "input"))
    return Cut(tuple(region[i] for i in permutation(op, len(region))))


def permutation(op: Operator, rank: int) -> tuple[int, ...]:
    """Which dimension of the input each one of the output is."""
    places = torch.empty(tuple(range(1, rank + 1)), device="meta")
    if op.node.target is getattr:
        moved = getattr(places, op.name)
    else:
        moved = getattr(places, op.name)(*op.node.args[1:], **op.node.kwargs)
    return tuple(size - 1 for size in moved.shape)


@rule(nn.ChannelShuffle, "channel_shuffle")
def _channel_shuffle(op: Operator) -> Cut:
    """(groups, C / groups) read the other way round: of every group the same channels are taken."""
    x = op.argument(0, "input")
    region = op.region(x)
    groups = op.module.groups if op.module is not None else op.argument(1, "groups")
    channels, each = region[1], region[1].size // groups
    square = (Dimension(groups), Dimension(each))
    (taken,), (outer, inner), _ = reshaped((replace(channels, axis=None),), square)
    if outer.width != groups:
        raise op.refused("meets channels of some groups alone")
    _, (output,), _ = reshaped((inner, outer), (Dimension(channels.size),))
    inputs = {x: (region[0], taken, *region[2:])} if taken.indices != channels.indices else {}
    return Cut((region[0], output.unmade(channels), *region[2:]), inputs)


@rule("expand", "expand_as", "broadcast_to")
def expand(op: Operator) -> Cut:
    """Dimensions of size 1 are repeated; the others are as they come."""
    x = op.argument(0, "input")
    region = op.region(x)
    if op.name == "expand_as":
        return _expanded_as(op, region)
    missing = len(op.output) - len(region)
    output = tuple(
        full
        if i < missing or region[i - missing].size != full.size
        else replace(region[i - missing], batched=full.batched)
        for i, full in enumerate(op.output)
    )
    if is_whole(output):
        return Cut(output)
    given = op.node.args[1:]
    sizes = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    if len(sizes) != len(output):
        raise op.refused("to another tensor's shape has no width rule")
    own = tuple(
        -1 if i >= missing and not d.whole else size for i, (d, size) in enumerate(zip(output, sizes, strict=True))
    )
    return Cut(output, call=(torch.Tensor.expand, (x, *own)))


def _expanded_as(op: Operator, region: Region) -> Cut:
    """As many entries as the other tensor has."""
    like = op.region(op.argument(1, "other"))
    missing = len(like) - len(region)
    output = tuple(
        d if i < missing or region[i - missing].size != d.size else region[i - missing] for i, d in enumerate(like)
    )
    if any(own.indices != d.indices for own, d in zip(output, like, strict=True)):
        raise op.refused("meets other channels than it has itself")
    return Cut(output)


@rule("repeat", "repeat_interleave", "tile")
def _repeat(op: Operator) -> Cut:
    x = op.argument(0, "input")
    region = op.region(x)
    missing = len(op.output) - len(region)
    output = list(op.output)
    for i, d in enumerate(region, start=missing):
        if d.size == op.output[i].size:
            output[i] = replace(d, batched=op.output[i].batched)
        elif not d.whole:
            raise op.refused("along a dimension that a head scale cuts has no width rule")
        else:
            output[i] = output[i].unmade(d)
    return Cut(tuple(output))


@rule("cat", "concat", "concatenate")
def _concatenation(op: Operator) -> Cut:
    """Along its dimension everything that comes; across it what all have in common."""
    pieces = as_tuple(op.argument(0, "tensors"))
    regions = [op.region(piece) for piece in pieces]
    dim = op.argument(1, "dim", 0) % len(op.output)
    output = tuple(
        replace(concatenated([r[i] for r in regions]), batched=full.batched)
        if i == dim
        else replace(common([r[i] for r in regions]), batched=full.batched)
        for i, full in enumerate(op.output)
    )
    return Cut(output, _across(pieces, regions, output, dim))


@rule("stack")
def _stack(op: Operator) -> Cut:
    pieces = as_tuple(op.argument(0, "tensors"))
    regions = [op.region(piece) for piece in pieces]
    dim = op.argument(1, "dim", 0) % len(op.output)
    shared = tuple(common(list(meeting)) for meeting in zip(*regions, strict=True))
    taken = _across(pieces, regions, shared, None)
    return Cut((*shared[:dim], op.output[dim], *shared[dim:]), taken)


def _across(pieces: tuple[Any, ...], regions: list[Region], output: Region, along: int | None) -> dict[fx.Node, Region]:
    taken = {}
    for piece, region in zip(pieces, regions, strict=True):
        wanted = tuple(d if i == along else d.keeping(output[i].indices) for i, d in enumerate(region))
        if wanted != region:
            taken[piece] = wanted
    return taken


@rule("meshgrid")
def _whole_only(op: Operator) -> Cut:
    if not all(is_whole(region) for region in op.tensors.values()):
        raise op.refused("of tensors that a head scale cuts has no width rule")
    return Cut(op.output)


@rule(nn.PixelShuffle, "pixel_shuffle")
def _pixel_shuffle(op: Operator) -> Cut:
    """r * r channels become r x r pixels of one."""
    region = op.region(op.argument(0, "input"))
    factor = op.module.upscale_factor if op.module is not None else op.argument(1, "upscale_factor")
    channels, each = region[1], factor * factor
    op.needs.steps(channels, each)
    present = sorted({i // each for i in channels.indices})
    if len(present) * each != channels.width:
        raise op.refused("meets a part of the channels of one pixel")
    return Cut((op.output[0], op.output[1].keeping(tuple(present)).unmade(channels), *op.output[2:]))
