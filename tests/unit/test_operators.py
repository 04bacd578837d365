"""What is foreseen of an operator against the operator called for real."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from slt_planner.memory.hollow import Hollow, TensorSpec
from slt_planner.memory.operators import operator_of

ATEN = torch.ops.aten
VIEWS = {
    "transpose": lambda x: (ATEN.transpose.int, (x, 0, -1)),
    "permute": lambda x: (ATEN.permute.default, (x, [*range(1, x.dim()), 0])),
    "detach": lambda x: (ATEN.detach.default, (x,)),
    "select": lambda x: (ATEN.select.int, (x, 1, x.shape[1] - 1)),
    "slice": lambda x: (ATEN.slice.Tensor, (x, -1, 1, 9, 2)),
    "squeeze": lambda x: (ATEN.squeeze.dim, (x, 0)),
    "unsqueeze": lambda x: (ATEN.unsqueeze.default, (x, 1)),
    "expand": lambda x: (ATEN.expand.default, (x, [3, *x.shape])),
    "unbind": lambda x: (ATEN.unbind.int, (x, 1)),
    "split": lambda x: (ATEN.split.Tensor, (x, 2, 0)),
    "view, one more": lambda x: (ATEN.view.default, (x, [*x.shape, 1])),
    "view, the last split": lambda x: (ATEN.view.default, (x, [*x.shape[:-1], 1, x.shape[-1]])),
    "as_strided": lambda x: (ATEN.as_strided.default, (x, [2, 1], [0, 7], 0)),
}


@st.composite
def tensors(draw):
    """Of two to five dimensions, many of them of one entry, in any order in memory."""
    sizes = draw(st.lists(st.sampled_from([1, 1, 2, 3, 7]), min_size=2, max_size=5))
    return torch.zeros(sizes).permute(draw(st.permutations(range(len(sizes)))))


@settings(deadline=None)
@given(tensors(), st.sampled_from(sorted(VIEWS)))
def test_views_lie_where_real_ones_do(tensor, name):
    function, (_, *others) = VIEWS[name](tensor)
    hollow = Hollow.of(TensorSpec.of(tensor))
    operator = operator_of(function, (hollow, *others), {})
    assert operator.gives_views_only
    real = pytree.tree_leaves(function(tensor, *others))
    foreseen = pytree.tree_leaves(operator.outputs((hollow, *others), {}))
    assert list(map(place, foreseen)) == list(map(place, real))
    assert all(view.untyped_storage()._cdata == hollow.untyped_storage()._cdata for view in foreseen)


def place(tensor):
    return TensorSpec.of(tensor), tensor.storage_offset()
