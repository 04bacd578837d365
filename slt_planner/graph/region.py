"""Which part of a full tensor a sub-model computes: a `Region`, one `Dimension` a dimension. No torch here."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

_ANY_BATCH = 1_000_003  # stands for the batch size where sizes are multiplied: a prime that no network's sizes contain


@dataclass(frozen=True)
class Axis:
    """Where a dimension's width comes from: the weight-bearing operators (by node name) whose outputs it counts.

    One step along the dimension is `stride` steps along their outputs. Channels that were put together from several
    have no makers; positions have no axis at all.
    """

    makers: frozenset[str]
    stride: int = 1


MIXED = Axis(frozenset())
"""Channels without one maker."""


@dataclass(frozen=True)
class Dimension:
    """One dimension of a tensor of the full network: its size and which entries a sub-model keeps, ascending.

    `kept` None means all of them. A batched dimension has B * size entries, the batch outermost; it is kept whole as
    far as the batch goes.
    """

    size: int
    kept: Sequence[int] | None = None
    batched: bool = False
    axis: Axis | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return self.kept is None

    @property
    def indices(self) -> Sequence[int]:
        """The kept entries; a range where they are the first ones."""
        return range(self.size) if self.kept is None else self.kept

    @property
    def width(self) -> int:
        """How many entries are kept."""
        return self.size if self.kept is None else len(self.kept)

    def keeping(self, indices: Iterable[int]) -> "Dimension":
        """The same dimension with other entries kept."""
        return replace(self, kept=_normal(self.size, indices))

    def unmade(self, like: "Dimension") -> "Dimension":
        """The same dimension as channels without one maker, where `like` are channels."""
        return self if like.axis is None else replace(self, axis=MIXED)


Region: TypeAlias = tuple[Dimension, ...]
"""What a sub-model keeps of a tensor, by dimension."""


def is_whole(region: Region) -> bool:
    """Whether a sub-model computes all of the tensor."""
    return all(dimension.kept is None for dimension in region)


def _normal(size: int, indices: Iterable[int]) -> Sequence[int] | None:
    kept = indices if isinstance(indices, (range, tuple)) else tuple(indices)
    if len(kept) == size:
        return None
    if isinstance(kept, tuple) and kept and kept[-1] == len(kept) - 1:
        return range(len(kept))
    return kept


def common(dimensions: Sequence[Dimension]) -> Dimension:
    """What all of several dimensions of one size keep: the wide one is cut to the narrow one's entries."""
    first = dimensions[0]
    axis = reduce(_same_axis, [d.axis for d in dimensions])
    cut = [d.kept for d in dimensions if d.kept is not None]
    batched = any(d.batched for d in dimensions)
    if not cut:
        kept: Sequence[int] | None = None
    elif all(isinstance(kept, range) for kept in cut):
        kept = min(cut, key=len)
    else:
        kept = _normal(first.size, tuple(sorted(set.intersection(*map(set, cut)))))
    return Dimension(first.size, kept, batched, axis)


def _same_axis(one: Axis | None, other: Axis | None) -> Axis | None:
    if one is None or other is None:
        return one or other  # what is stored, or was put together, has the width of what it meets
    if one.stride != other.stride:
        return MIXED
    return Axis(one.makers | other.makers, one.stride)


def cut_to(region: Region, index: Region) -> Region:
    """A region with its first dimensions cut to those of `index`."""
    return tuple(common([d, index[i]]) if i < len(index) else d for i, d in enumerate(region))


def concatenated(dimensions: Sequence[Dimension]) -> Dimension:
    """Dimensions laid one after the other."""
    size = sum(d.size for d in dimensions)
    axis = MIXED if any(d.axis is not None for d in dimensions) else None
    if all(d.whole for d in dimensions):
        return Dimension(size, axis=axis)
    kept: list[int] = []
    offset = 0
    for dimension in dimensions:
        kept.extend(offset + i for i in dimension.indices)
        offset += dimension.size
    return Dimension(size, _normal(size, tuple(kept)), axis=axis)


@dataclass(frozen=True)
class Split:
    """A dimension that a reshape splits: its axis, and the sizes of the factors, outermost first."""

    axis: Axis
    factors: tuple[int, ...]


def reshaped(given: Region, sizes: Region) -> tuple[Region, Region, tuple[Split, ...]]:
    """A reshape: what it takes of its input, what it gives, and which axes it splits.

    `sizes` are the output's dimensions, whole. Where the entries that come do not fill a box of the output, the
    largest box that starts with the outermost dimension is taken.

    Raises:
        ValueError: a kept entry would have to be mixed with the batch.
    """
    taken: list[Dimension] = []
    output: list[Dimension] = []
    splits: list[Split] = []
    for into, outof in _groups(given, sizes):
        part_taken, part_output, split = _reshape_group([given[i] for i in into], [sizes[i] for i in outof])
        taken += part_taken
        output += part_output
        splits += split
    return tuple(taken), tuple(output), tuple(splits)


def _groups(given: Region, sizes: Region) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of input and output dimensions that hold the same entries."""
    ends_in = _products(given)
    ends_out = _products(sizes)
    groups = []
    i = j = 0
    boundaries = [x for x in dict.fromkeys(ends_in) if x in set(ends_out)]
    for position, end in enumerate(boundaries):
        last = position == len(boundaries) - 1
        into, outof = [], []
        while i < len(given) and (ends_in[i] <= end or last):
            into.append(i)
            i += 1
        while j < len(sizes) and (ends_out[j] <= end or last):
            outof.append(j)
            j += 1
        groups.append((into, outof))
    return groups or [(list(range(len(given))), list(range(len(sizes))))]


def _products(region: Region) -> list[int]:
    products, total = [], 1
    for dimension in region:
        total *= dimension.size * (_ANY_BATCH if dimension.batched else 1)
        products.append(total)
    return products


def _reshape_group(
    given: list[Dimension], sizes: list[Dimension]
) -> tuple[list[Dimension], list[Dimension], list[Split]]:
    output, splits = _axes_through(given, sizes)
    if all(d.whole for d in given):
        return given, output, splits
    for side in (given, sizes):
        batch = next((i for i, d in enumerate(side) if d.batched), 0)
        if any(d.size > 1 for d in side[:batch]):
            raise ValueError("channels are mixed with the batch")
    inner_in = [d for d in given if d.size > 1]
    inner_out = [d for d in output if d.size > 1]
    if len(inner_in) == len(inner_out) == 1:
        kept = inner_in[0].kept
        return given, [replace(d, kept=kept) if d.size > 1 else d for d in output], splits
    mask = np.zeros([d.size for d in given], dtype=bool)
    mask[np.ix_(*[np.asarray(d.indices, dtype=int) for d in given])] = True
    box = mask.reshape([d.size for d in output])
    kept_by_dimension: list[np.ndarray] = []
    rest: NDArray[np.bool_] = box
    for _ in output:
        present = rest.reshape(rest.shape[0], -1).any(axis=1)
        kept_by_dimension.append(np.flatnonzero(present))
        rest = np.asarray(rest[present].all(axis=0))
    output = [d.keeping(tuple(map(int, k))) for d, k in zip(output, kept_by_dimension, strict=True)]
    filled = np.zeros_like(box)
    filled[np.ix_(*kept_by_dimension)] = True
    back = filled.reshape(mask.shape)
    taken = [d.keeping(_occupied(back, axis)) for axis, d in enumerate(given)]
    if math.prod(d.width for d in taken) != math.prod(d.width for d in output):
        raise ValueError("the entries that are kept do not fill a box of the new shape")
    return taken, output, splits


def _occupied(mask: np.ndarray, axis: int) -> tuple[int, ...]:
    others = tuple(i for i in range(mask.ndim) if i != axis)
    return tuple(map(int, np.flatnonzero(mask.any(axis=others))))


def _axes_through(given: list[Dimension], sizes: list[Dimension]) -> tuple[list[Dimension], list[Split]]:
    """The output's dimensions, uncut, with the axes that come through: one that is split, merged again or passed."""
    inner = [d for d in given if d.size > 1]
    factors = [d.size for d in sizes if d.size > 1]
    axes = [d.axis for d in inner if d.axis is not None]
    adjoining = all(a.makers == b.makers and a.stride == b.stride * d.size for (a, b), d in _neighbours(axes, inner))
    if not axes or len(axes) < len(inner) or not adjoining:
        mixed = [replace(d, axis=MIXED) if axes and d.size > 1 else d for d in sizes]
        return mixed, _split_off(inner, factors)
    makers, stride = axes[-1].makers, axes[-1].stride
    output: list[Dimension] = []
    for dimension in reversed(sizes):
        axis = Axis(makers, stride) if dimension.size > 1 else None
        output.insert(0, replace(dimension, axis=axis))
        stride *= dimension.size
    return output, [Split(axes[-1], tuple(factors))] if len(factors) > 1 else []


def _split_off(inner: list[Dimension], factors: list[int]) -> list[Split]:
    """Groups that are split off channels and positions laid together, as (N, groups, rest) of (N, C, H, W)."""
    if not inner or inner[0].axis is None or not factors:
        return []
    groups, channels = factors[0], inner[0].size
    whole_groups = groups < channels and channels % groups == 0
    return [Split(inner[0].axis, (groups, channels // groups))] if whole_groups else []


def _neighbours(axes: list[Axis], inner: list[Dimension]) -> list[tuple[tuple[Axis, Axis], Dimension]]:
    return list(zip(pairwise(axes), inner[1:], strict=False))
