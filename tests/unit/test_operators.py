"""What is foreseen of an operator against the operator called for real."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._prims_common import suggest_memory_format
from torch.utils import _pytree as pytree

from slt_planner.memory.corrections import corrected
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


def weights(x):
    return torch.ones(x.shape[1])


KERNELS = {
    "relu": lambda x, _: (ATEN.relu.default, (x,)),
    "hardswish": lambda x, _: (ATEN.hardswish.default, (x,)),
    "clone": lambda x, _: (ATEN.clone.default, (x,)),
    "add": lambda x, other: (ATEN.add.Tensor, (x, other)),
    "times a number": lambda x, _: (ATEN.mul.Tensor, (x, 2.0)),
    "addcmul": lambda x, other: (ATEN.addcmul.default, (x, other, x)),
    "threshold_backward": lambda x, other: (ATEN.threshold_backward.default, (other, x, 0)),
    "hardtanh_backward": lambda x, other: (ATEN.hardtanh_backward.default, (other, x, 0.0, 6.0)),
    "hardsigmoid_backward": lambda x, other: (ATEN.hardsigmoid_backward.default, (other, x)),
    "hardswish_backward": lambda x, other: (ATEN.hardswish_backward.default, (other, x)),
    "elu_backward": lambda x, other: (ATEN.elu_backward.default, (other, 1.0, 1.0, 1.0, False, x)),
    "softplus_backward": lambda x, other: (ATEN.softplus_backward.default, (other, x, 1.0, 20.0)),
    "batch norm": lambda x, _: (
        ATEN.native_batch_norm.default,
        (x, weights(x), weights(x), None, None, True, 0.1, 1e-5),
    ),
    "batch norm backward": lambda x, other: (
        ATEN.native_batch_norm_backward.default,
        (other, x, weights(x), None, None, weights(x), weights(x), True, 1e-5, [True] * 3),
    ),
    "pooling": lambda x, _: (ATEN.avg_pool2d.default, (x, [1, 1])),
    "concatenation": lambda x, other: (ATEN.cat.default, ([x, other], 1)),
    "convolution": lambda x, _: (
        ATEN.convolution.default,
        (x, torch.ones(5, x.shape[1], 1, 1), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    ),
}
SHAPES = [(4, 1, 8, 8), (4, 6, 1, 1), (1, 6, 1, 1), (4, 1, 1, 1), (4, 6, 1, 8), (1, 6, 3, 3)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def laid_out(shape, layout):
    return torch.empty(shape, memory_format=layout).zero_()


@pytest.mark.parametrize("name", KERNELS)
def test_images_of_one_channel_or_pixel_lie_as_kernels_lay_them(name):
    for shape, layout, others_layout in product(SHAPES, LAYOUTS, LAYOUTS):
        function, args = KERNELS[name](laid_out(shape, layout), laid_out(shape, others_layout))
        real = function(*args)
        foreseen = operator_of(function, args, {})
        assert foreseen.other_layout(real) is None, (foreseen.signature, place(pytree.tree_leaves(real)[0]))


def test_strides_that_mean_nothing_are_in_no_signature():
    def signature(*strides):
        return operator_of(ATEN.relu.default, (torch.empty_strided((2, 1, 3, 1), strides),), {}).signature

    assert (
        signature(3, 3, 1, 1)
        == signature(3, 7, 1, 9)
        == signature(3, 1, 1, 5)
        == "aten.relu.default(float32[2, 1, 3, 1])"
    )
    if suggest_memory_format(torch.empty_strided((2, 1, 3, 1), (3, 1, 1, 1))) == torch.channels_last:  # not torch 2.6's
        assert signature(3, 1, 1, 1) != signature(3, 3, 1, 1)  # channels last, to kernels that ask


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gradients_that_are_not_asked_for_are_not_made(device):
    """On every device; meta stands for those that are not there."""
    x, weight = torch.empty(4, 6, 8, 8, device=device), torch.empty(6, device=device)
    args = (x, x, weight, None, None, weight, weight, True, 1e-5, [False, True, True])
    of_x, *others = corrected(ATEN.native_batch_norm_backward.default, args, (x, weight, weight))
    assert of_x is None
    assert [own.shape for own in others] == [weight.shape] * 2


def place(tensor):
    return TensorSpec.of(tensor), tensor.storage_offset()
