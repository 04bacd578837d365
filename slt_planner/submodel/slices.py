"""Index maps: which entries of a full tensor a sub-model holds, and how they are read and added to."""

from typing import TypeAlias

import torch
from torch import Tensor

from slt_planner.graph.widths import Index

Slices: TypeAlias = tuple[slice | Tensor, ...]
"""One selection a dimension: a slice where the kept entries are the first ones, a long tensor otherwise."""


def slices_of(index: Index) -> Slices:
    """An index as cheap selections; prefixes become views."""
    return tuple(
        slice(0, len(kept)) if kept[-1] == len(kept) - 1 else torch.tensor(kept, dtype=torch.long) for kept in index
    )


def take(full: Tensor, index: Index) -> Tensor:
    """A copy of the kept entries of `full`, contiguous."""
    part = full.detach()
    for dim, selection in enumerate(slices_of(index)):
        if isinstance(selection, slice):
            part = part.narrow(dim, 0, selection.stop)
        else:
            part = part.index_select(dim, selection)
    return part.clone(memory_format=torch.contiguous_format)


def add_at(full: Tensor, index: Index, part: Tensor | float) -> None:
    """Add `part` to the kept entries of `full`, in place."""
    selections = slices_of(index)
    if all(isinstance(selection, slice) for selection in selections):
        full[selections] += part
        return
    lengths = [len(kept) for kept in index]
    open_mesh = tuple(
        torch.tensor(kept).view([-1 if i == dim else 1 for i in range(len(lengths))]) for dim, kept in enumerate(index)
    )
    full[open_mesh] += part
