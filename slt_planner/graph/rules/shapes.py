"""What moves, joins, splits and pools entries: sizes written into calls become the sub-model's own."""

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from slt_planner.graph.record import assigned
from slt_planner.graph.region import MIXED, Dimension, Region, Split, common, concatenated, is_whole, reshaped
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


@rule("chunk", "tensor_split", "split", "split_with_sizes")
def _split(op: Operator) -> Cut:
    """Pieces along a dimension.

    Where equal pieces of a width keep unequal parts, and the width is a prefix, the sub-model splits at its own parts:
    a network built at that width would (ShuffleNet).
    """
    x = op.argument(0, "tensor", op.node.kwargs.get("input"))
    region = op.region(x)
    results: tuple[Region, ...] = op.output
    dim = op.argument(2, "dim", 0) % len(region)
    channels, sizes = region[dim], [piece[dim].size for piece in results]
    equal = len(set(sizes)) == 1
    if equal:
        _need_equal_parts(op, channels, len(sizes))
    else:
        op.needs.whole(channels)
    taken, pieces = _pieces(op, channels, sizes)
    axis = channels.axis if equal or channels.axis is None else MIXED
    output = tuple(
        (*region[:dim], replace(piece, batched=results[0][dim].batched, axis=axis), *region[dim + 1 :])
        for piece in pieces
    )
    inputs = {x: (*region[:dim], taken, *region[dim + 1 :])} if taken.indices != channels.indices else {}
    if channels.whole:
        return Cut(output, inputs)
    return Cut(output, inputs, call=(torch.split, (x, tuple(p.width for p in pieces), dim)))


def _pieces(op: Operator, channels: Dimension, sizes: list[int]) -> tuple[Dimension, list[Dimension]]:
    if channels.whole:
        return channels, [Dimension(size) for size in sizes]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    kept = [
        tuple(i - offset for i in channels.indices if offset <= i < offset + size)
        for offset, size in zip(offsets, sizes, strict=True)
    ]
    if len(set(sizes)) == 1 and len(set(map(len, kept))) > 1 and isinstance(channels.kept, range):
        own = channels.width // len(sizes)
        kept = [tuple(range(own))] * len(sizes)
        channels = channels.keeping(range(own * len(sizes)))
    if not all(kept):
        raise op.refused("leaves a piece without channels at this head scale")
    return channels, [Dimension(size).keeping(piece) for size, piece in zip(sizes, kept, strict=True)]


@rule(nn.GLU, "glu")
def _gated_halves(op: Operator) -> Cut:
    """The first half gated by the second: of both the same channels."""
    x = op.argument(0, "input")
    region = op.region(x)
    dim = (op.module.dim if op.module is not None else op.argument(1, "dim", -1)) % len(region)
    channels, half = region[dim], region[dim].size // 2
    _need_equal_parts(op, channels, 2)
    taken, (piece, _) = _pieces(op, channels, [half, half])
    output = (*region[:dim], replace(piece, axis=channels.axis), *region[dim + 1 :])
    return Cut(output, {x: (*region[:dim], taken, *region[dim + 1 :])} if taken.indices != channels.indices else {})


def _need_equal_parts(op: Operator, channels: Dimension, parts: int) -> None:
    """Channels that are taken apart in equal parts must come with the same entries in every part."""
    if channels.axis is not None:
        size = channels.size // parts
        op.needs.split(Split(channels.axis, (parts, size)))
        op.needs.whole(Dimension(parts, axis=replace(channels.axis, stride=channels.axis.stride * size)))


@rule("unbind")
def _unbind(op: Operator) -> Cut:
    region = op.region(op.argument(0, "input"))
    dim = op.argument(1, "dim", 0) % len(region)
    op.needs.whole(region[dim])
    if not region[dim].whole:
        raise op.refused("along a dimension that a head scale cuts has no width rule")
    return Cut((tuple(d for i, d in enumerate(region) if i != dim),) * len(op.output))


@rule("getitem", "select", "narrow", "index_select")
def getitem(op: Operator) -> Cut:
    """One result of several; or a tensor's entries by numbers, slices and at most one tensor of indices."""
    x = op.node.args[0]
    whole: Any = op.regions[x]  # type: ignore[index]
    if whole and not isinstance(whole[0], Dimension):
        return Cut(whole[op.node.args[1]])
    region = op.region(x)
    output, own = _indexed(op, region, _plain_index(op), op.output)
    if is_whole(region):
        return Cut(output)
    return Cut(output, call=(operator.getitem, (x, own)))


def _indexed(op: Operator, region: Region, index: list[Any], result: Region | None) -> tuple[Region, tuple[Any, ...]]:
    """What x[index] gives of a region, and the index by the sub-model's own numbers."""
    output: list[Dimension] = []
    own: list[Any] = []
    dims = iter(region)
    for item in index:
        if item is None:
            output.append(Dimension(1))
            own.append(None)
            continue
        dimension = next(dims)
        if isinstance(item, fx.Node) and _is_tensor(item):
            if not dimension.whole:
                raise op.refused("by a tensor of indices along a cut dimension has no width rule")
            output += op.region(item)
            own.append(item)
        elif isinstance(item, slice):
            piece, position = _sliced(op, dimension, item, None if result is None else result[len(output)])
            output.append(piece)
            own.append(position)
        else:
            op.needs.whole(dimension)
            own.append(_position(op, dimension, item))
    return (*output, *dims), tuple(own)


def _is_tensor(node: fx.Node) -> bool:
    return "dims" in node.meta


def _plain_index(op: Operator) -> list[Any]:
    """The index with an item a dimension, as x[...] would take it."""
    rank = len(op.region(op.node.args[0]))
    if op.name in ("select", "narrow", "index_select"):
        dim, *rest = op.node.args[1:]
        item = slice(rest[0], rest[0] + rest[1]) if op.name == "narrow" else rest[0]  # type: ignore[operator]
        return [slice(None)] * (dim % rank) + [item]  # type: ignore[operator]
    items = list(as_tuple(op.node.args[1]))
    if sum(isinstance(item, fx.Node) and _is_tensor(item) for item in items) > 1:
        raise op.refused("by several tensors of indices has no width rule")
    if Ellipsis in [i for i in items if not isinstance(i, fx.Node)]:
        at = next(i for i, item in enumerate(items) if item is Ellipsis)
        missing = rank - sum(item is not None for item in items) + 1
        items[at : at + 1] = [slice(None)] * missing
    return items


def _sliced(op: Operator, dimension: Dimension, item: slice, result: Dimension | None) -> tuple[Dimension, slice]:
    if item == slice(None):
        return dimension, item
    computed = any(isinstance(x, fx.Node) for x in (item.start, item.stop, item.step))
    if dimension.whole and (computed or item.step not in (None, 1)):
        return (dimension if result is None else result).unmade(dimension), item
    if computed or item.step not in (None, 1):
        raise op.refused("by such a slice along a cut dimension has no width rule")
    start, stop, _ = item.indices(dimension.size)
    size = stop - start
    if 0 < size < dimension.size and dimension.size % size == 0 and start % size == 0:
        _need_equal_parts(op, dimension, dimension.size // size)
    if dimension.whole:
        piece = dimension if size == dimension.size else Dimension(size, batched=dimension.batched).unmade(dimension)
        return piece, item
    inside = [i for i in dimension.indices if start <= i < stop]
    if not inside:
        raise op.refused("leaves no channels at this head scale")
    first = sum(i < start for i in dimension.indices)
    piece = Dimension(stop - start, batched=dimension.batched).keeping(tuple(i - start for i in inside))
    return piece.unmade(dimension), slice(first, first + len(inside))


def _position(op: Operator, dimension: Dimension, item: Any) -> Any:
    if dimension.whole:
        return item
    if isinstance(item, fx.Node) or item % dimension.size not in dimension.indices:
        raise op.refused("takes a channel that is not there at this head scale")
    return list(dimension.indices).index(item % dimension.size)


@rule("assigned")
def _assignment(op: Operator) -> Cut:
    """x[index] = value: what is assigned must be all that the place keeps, and no more."""
    x, _, value = op.node.args
    region = op.region(x)
    place, own = _indexed(op, region, _plain_index(op), None)
    if not isinstance(value, fx.Node) or not _is_tensor(value):
        return Cut(region, call=(assigned, (x, own, value)))
    comes = op.region(value)
    aligned = place[len(place) - len(comes) :]
    wanted = tuple(d.keeping(a.indices) if d.size == a.size else d for d, a in zip(comes, aligned, strict=True))
    if any(not set(w.indices) <= set(d.indices) for w, d in zip(wanted, comes, strict=True)):
        raise op.refused("of fewer channels than its place has is not known; concatenate instead")
    return Cut(region, {value: wanted} if wanted != comes else {}, call=(assigned, (x, own, value)))


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
