"""What takes tensors apart, and what is put into them: splits, indices, assignments."""

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from slt_planner.graph.record import assigned
from slt_planner.graph.region import MIXED, Dimension, Region, Split, is_whole
from slt_planner.graph.rules.arithmetic import as_tuple
from slt_planner.graph.widths import Cut, Operator, rule


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
    x = op.argument(0, "input")
    whole = op.regions[x]
    if whole and not isinstance(whole[0], Dimension):
        return Cut(whole[op.argument(1, "index")])
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
    rank = len(op.region(op.argument(0, "input")))
    if op.name in ("select", "narrow", "index_select"):
        dim = op.argument(1, "dim")
        if op.name == "narrow":
            start = op.argument(2, "start")
            item = slice(start, start + op.argument(3, "length"))
        else:
            item = op.argument(2, "index")
        return [slice(None)] * (dim % rank) + [item]
    items = list(as_tuple(op.argument(1, "index")))
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
