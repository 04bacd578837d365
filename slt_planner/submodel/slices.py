"""Index maps: which entries of a full tensor a sub-model holds, and how they are read and added to."""

from typing import TypeAlias

import torch
from torch import Tensor

from slt_planner.graph.region import Dimension
from slt_planner.graph.widths import Index

Slices: TypeAlias = tuple[slice | Tensor, ...]
"""One selection a dimension: a slice where the kept entries are the first ones, a long tensor otherwise."""


def slices_of(index: Index) -> Slices:
    """An index as cheap selections; prefixes become views."""
    return tuple(map(_selection, index))


def _selection(dimension: Dimension) -> slice | Tensor:
    kept = dimension.indices
    return slice(0, len(kept)) if isinstance(kept, range) else torch.tensor(kept, dtype=torch.long)


def shape_of(index: Index, full: torch.Size) -> tuple[int, ...]:
    """The shape of the kept part of a tensor; dimensions beyond the index are whole."""
    return tuple(dimension.width for dimension in index) + tuple(full[len(index) :])


def take(full: Tensor, index: Index) -> Tensor:
    """A copy of the kept entries of `full`, contiguous."""
    part = full.detach()
    for dim, selection in enumerate(slices_of(index)):
        if isinstance(selection, slice):
            part = part.narrow(dim, 0, selection.stop)
        else:
            part = part.index_select(dim, selection.to(part.device))
    return part.clone(memory_format=torch.contiguous_format)


def add_at(full: Tensor, index: Index, part: Tensor | float) -> None:
    """Add `part` to the kept entries of `full`, in place."""
    selections = slices_of(index)
    if all(isinstance(selection, slice) for selection in selections):
        full[selections] += part
        return
    open_mesh = tuple(
        torch.as_tensor(dimension.indices).view([-1 if i == dim else 1 for i in range(len(index))])
        for dim, dimension in enumerate(index)
    )
    full[open_mesh] += part
