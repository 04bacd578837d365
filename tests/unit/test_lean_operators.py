"""Lean operators against torch's own, in double precision: values, gradients, statistics, and what they leave alone."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from slt_planner.submodel import lean_operators as lean

pytestmark = pytest.mark.usefixtures("one_thread", "convolutions_in_parts")

ACTIVATIONS = {None: lambda x: x, "relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu}
FROM_OUTPUT = [None, "relu", "relu6"]
EPS, MOMENTUM = 1e-3, 0.3


@pytest.fixture(scope="module")
def convolutions_in_parts():
    """Small convolutions run in parts too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lean, "SMALLEST_PART_BYTES", 1)
        yield


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randn(*shape, requires_grad=False, scale=1.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).requires_grad_(requires_grad)


def in_layout(x, channels_last):
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def copied(tensor):
    """A leaf with the same values and strides."""
    return None if tensor is None else tensor.detach().clone().requires_grad_(tensor.requires_grad)


def backward(outputs, inputs, gradients):
    """The gradients of those inputs that have one."""
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    return torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


class Untouched:
    """While this lasts, no entry of some tensors may change."""

    def __init__(self, *tensors):
        self.tensors = [tensor for tensor in tensors if tensor is not None]
        self.before = [tensor.detach().clone() for tensor in self.tensors]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if error[0] is None:
            assert all(torch.equal(tensor, before) for tensor, before in zip(self.tensors, self.before, strict=True))


# Batch norm


def norm_parts(channels, running):
    weight = randn(channels).abs().add(0.5).requires_grad_()
    bias = randn(channels, requires_grad=True)
    statistics = (randn(channels), randn(channels).abs(), torch.tensor(3)) if running else (None, None, None)
    return weight, bias, statistics


def plain_norm(x, weight, bias, mean, variance, activation):
    return ACTIVATIONS[activation](F.batch_norm(x, mean, variance, weight, bias, True, MOMENTUM, EPS))


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("running", [False, True], ids=["static", "running"])
@pytest.mark.parametrize("smallest", [1, 2**17], ids=["in parts", "at once"])
@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [
        *[((6, 5), False), ((3, 5, 7), False), ((8, 5, 4, 3), False), ((1, 5, 4, 3), False), ((20, 5, 3, 3), False)],
        *[((2, 5, 2, 3, 2), False), ((9, 5, 4, 3), True), ((4, 5, 1, 1), True)],
    ],
    ids=str,
)
def test_batch_norm_is_torchs_own(shape, channels_last, smallest, running, activation, owned, monkeypatch):
    monkeypatch.setattr(lean, "SMALLEST_PART_BYTES", smallest)
    x = in_layout(randn(*shape, scale=3.0), channels_last).requires_grad_()
    weight, bias, (mean, variance, count) = norm_parts(5, running)
    plain_mean, plain_variance = copied(mean), copied(variance)
    expected = plain_norm(x, weight, bias, plain_mean, plain_variance, activation)
    with Untouched(x, weight, bias):
        y = lean.batch_norm(x, weight, bias, (mean, variance, count), MOMENTUM, EPS, activation, owned)
        assert_close(y, expected)
        assert y.stride() == expected.stride()
        if running:
            assert_close((mean, variance), (plain_mean, plain_variance))
            assert count == 4
        gradient = torch.randn_like(y)
        gradients = backward(expected, (x, weight, bias), gradient)
        with nullcontext() if owned else Untouched(gradient):
            found = backward(y, (x, weight, bias), gradient)
        assert_close(found, gradients)
    assert (found[0].data_ptr() == gradient.data_ptr()) == (owned and smallest == 1)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_batch_norm_takes_gradients_laid_out_in_any_way(activation):
    """Such as the one number of a sum, seen everywhere, or a part of another tensor."""
    x = randn(9, 5, 4, 3, requires_grad=True)
    weight, bias, statistics = norm_parts(5, running=False)
    for gradient in (
        randn(1, 1, 1, 1).expand(9, 5, 4, 3),
        randn(9, 5, 1, 1).expand(9, 5, 4, 3),
        randn(9, 4, 3, 5).permute(0, 3, 1, 2),
        randn(9, 10, 4, 3)[:, ::2],
    ):
        expected = backward(plain_norm(x, weight, bias, None, None, activation), (x, weight, bias), gradient)
        with Untouched(gradient):
            y = lean.batch_norm(x, weight, bias, statistics, MOMENTUM, EPS, activation, False)
            assert_close(backward(y, (x, weight, bias), gradient), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("trained", [(True, False, False), (False, True, True), (False, False, True)], ids=str)
def test_batch_norm_gives_the_gradients_that_are_wanted(trained, activation):
    x, (weight, bias, statistics) = randn(7, 5, 4, 3), norm_parts(5, running=False)
    inputs = (x, weight, bias)
    for tensor, wanted in zip(inputs, trained, strict=True):
        tensor.requires_grad_(wanted)
    gradient = randn(7, 5, 4, 3)
    expected = backward(plain_norm(x, weight, bias, None, None, activation), inputs, gradient)
    y = lean.batch_norm(x, weight, bias, statistics, MOMENTUM, EPS, activation, False)
    assert_close(backward(y, inputs, gradient), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_batch_norms_gradients_are_those_of_small_differences(activation):
    x, (weight, bias, statistics) = randn(3, 2, 2, 2, requires_grad=True), norm_parts(2, running=False)

    def norm(*inputs):
        return lean.batch_norm(*inputs, statistics, MOMENTUM, EPS, activation, False)

    assert torch.autograd.gradcheck(norm, (x, weight, bias))


def test_batch_norm_has_no_second_gradient_but_says_so():
    x, (weight, bias, statistics) = randn(3, 2, 2, 2, requires_grad=True), norm_parts(2, running=False)
    y = lean.batch_norm(x, weight, bias, statistics, MOMENTUM, EPS, "silu", False)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_batch_norm_moves_no_statistics_when_it_is_recomputed():
    x, (weight, bias, statistics) = randn(6, 5, 3, 3), norm_parts(5, running=True)
    first, again = lean.recomputing()
    with first:
        y = lean.batch_norm(x, weight, bias, statistics, MOMENTUM, EPS, "relu", False)
    with Untouched(*statistics), again:
        assert torch.equal(lean.batch_norm(x, weight, bias, statistics, MOMENTUM, EPS, "relu", False), y)
    before = statistics[0].clone()
    lean.batch_norm(x, weight, bias, statistics, MOMENTUM, EPS, "relu", False)
    assert not torch.equal(statistics[0], before)
    assert statistics[2] == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_batch_norm_rounds_hardly_more_than_torchs_own(activation, dtype):
    """Both against double precision, from rounded numbers; at nearly 0 a ReLU may let through or not."""
    x, gradient = (randn(16, 5, 8, 8).to(dtype) for _ in range(2))
    weight, bias = (own.detach().to(dtype) for own in norm_parts(5, running=False)[:2])
    inputs = (x, weight, bias)

    def outcome(norm, number):
        own = [copied(tensor).to(number).requires_grad_() for tensor in inputs]
        y = norm(*own)
        assert y.dtype == number
        return [value.double() for value in (y, *backward(y, own, gradient.to(number)))]

    def plain(*own):
        return plain_norm(*own, None, None, activation)

    exact, usual = outcome(plain, torch.float64), outcome(plain, dtype)
    found = outcome(lambda *own: lean.batch_norm(*own, (None, None, None), MOMENTUM, EPS, activation, False), dtype)
    for value, ours, torchs in zip(exact, found, usual, strict=True):
        assert (ours - value).norm() <= 1.5 * (torchs - value).norm() + 4 * torch.finfo(dtype).eps * value.norm()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("running", [False, True], ids=["static", "running"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_norm_in_place_writes_torchs_result_over_its_input(channels_last, running, training, activation):
    training = training or not running
    x = in_layout(randn(6, 5, 4, 3), channels_last)
    weight, bias, (mean, variance, count) = norm_parts(5, running)
    plain_mean, plain_variance = copied(mean), copied(variance)
    with torch.no_grad():
        normed = F.batch_norm(x, plain_mean, plain_variance, weight, bias, training, MOMENTUM, EPS)
        expected = ACTIVATIONS[activation](normed)
        statistics = (mean, variance, count)
        with Untouched(weight, bias):
            y = lean.batch_norm_in_place(x, weight, bias, statistics, training, MOMENTUM, EPS, activation)
    assert y.data_ptr() == x.data_ptr()
    assert_close(x, expected)
    if running:
        assert_close((mean, variance), (plain_mean, plain_variance))
        assert count == 3 + training


# Sums

OPERANDS = [
    ((9, 3, 2, 2), (9, 3, 2, 2)),
    ((2, 3, 2, 2), (3, 1, 1)),
    ((2, 3, 1, 1), (2, 3, 4, 4)),
    ((1, 3, 4, 1), (8, 1, 4, 4)),
    ((4,), (2, 4)),
]


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("activation", FROM_OUTPUT, ids=str)
@pytest.mark.parametrize(("first", "second"), OPERANDS, ids=str)
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)], ids=str)
def test_a_sum_is_torchs_own(trained, first, second, activation, over, owned):
    leaves = [randn(*shape, scale=3.0, requires_grad=own) for shape, own in zip((first, second), trained, strict=True)]
    a, b = leaves[0] * 1.0, leaves[1] * 1.0  # a leaf cannot be written over
    expected = ACTIVATIONS[activation](leaves[0] + leaves[1])
    written = over and a.shape == b.shape
    with Untouched(b, *([] if written else [a])):
        y = lean.add(a, b, activation, over, owned)
        assert_close(y, expected)
    assert (y.data_ptr() == a.data_ptr()) == written
    gradient = randn(*expected.shape)
    gradients = backward(expected, leaves, gradient)
    with nullcontext() if owned else Untouched(gradient):
        assert_close(backward(y, leaves, gradient), gradients)


def test_a_sum_of_two_number_formats_is_torchs_own_and_written_over_neither():
    for first, second in ((torch.float32, torch.float64), (torch.bfloat16, torch.float32)):
        leaves = [randn(9, 3).to(dtype).requires_grad_() for dtype in (first, second)]
        expected = F.relu(leaves[0] + leaves[1])
        a = leaves[0] * 1
        with Untouched(a):
            y = lean.add(a, leaves[1], "relu", True, False)
        assert torch.equal(y, expected)
        gradient = torch.randn_like(y)
        found, gradients = backward(y, leaves, gradient), backward(expected, leaves, gradient)
        assert [own.dtype for own in found] == [first, second]
        assert all(map(torch.equal, found, gradients))


@pytest.mark.parametrize("activation", FROM_OUTPUT, ids=str)
def test_the_operands_of_a_sum_may_be_taken_elsewhere_and_share_their_gradient(activation):
    leaves = [randn(9, 3, requires_grad=True) for _ in range(2)]

    def outcome(add):
        a, b = (leaf.sin() for leaf in leaves)
        return backward(add(a, b) * (a * b).cos() + b, leaves, torch.ones(9, 3, dtype=torch.float64))

    expected = outcome(lambda a, b: ACTIVATIONS[activation](a + b))
    assert_close(outcome(lambda a, b: lean.add(a, b, activation, False, False)), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(("first", "second"), OPERANDS, ids=str)
def test_a_sum_in_place_is_written_over_the_first_operand_where_it_is_as_large(first, second, activation):
    a, b = randn(*first), randn(*second)
    expected = ACTIVATIONS[activation](a + b)
    as_large = expected.shape == a.shape
    with Untouched(b, *([] if as_large else [a])):
        y = lean.add_in_place(a, b, activation)
    assert_close(y, expected)
    assert (y.data_ptr() == a.data_ptr()) == as_large
    half = randn(*first).float()
    with Untouched(half):
        assert lean.add_in_place(half, b, activation).dtype == torch.float64


# Cuts

CUTS = [((4, 6, 3), 1, 2), ((4, 6, 3), -1, 1), ((4, 6, 3), 0, 3), ((2, 4, 3, 3), 1, 4)]


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("used", ["both", "whole", "cut", "both, the cut twice"])
@pytest.mark.parametrize(("shape", "dim", "length"), CUTS, ids=str)
def test_a_value_with_its_cut_has_the_gradient_of_both(shape, dim, length, used, owned):
    leaf = randn(*shape, requires_grad=True)
    seeds = [randn(*shape), randn(*leaf.narrow(dim, 0, length).shape)]

    def outcome(whole, cut):
        values = {
            "both": (whole * seeds[0]).sum() + (cut.sin() * seeds[1]).sum(),
            "whole": (whole.sin() * seeds[0]).sum(),
            "cut": (cut.sin() * seeds[1]).sum(),
            "both, the cut twice": whole.sin().sum() + cut.cos().sum() + (cut * seeds[1]).sum(),
        }
        return values[used], torch.autograd.grad(values[used], leaf)

    x = leaf * 2.0
    expected = outcome(x, x.narrow(dim, 0, length))
    x = leaf * 2.0
    with Untouched(x, leaf):
        whole, cut = lean.with_cut(x, dim, length, owned)
        assert whole.data_ptr() == x.data_ptr()
        assert cut.data_ptr() != x.data_ptr()
        assert cut.is_contiguous()
        assert_close(outcome(whole, cut), expected)


@pytest.mark.parametrize("owned", [False, True])
def test_a_cut_adds_to_the_gradient_it_is_given_only_where_it_is_nobody_elses(owned):
    x = randn(4, 6, requires_grad=True)
    whole, cut = lean.with_cut(x * 1.0, 1, 2, owned)
    gradients = randn(4, 6), randn(4, 2)
    expected = gradients[0].clone()
    expected[:, :2] += gradients[1]
    with Untouched(gradients[1], *([] if owned else [gradients[0]])):
        (found,) = torch.autograd.grad((whole, cut), x, gradients)
    assert_close(found, expected)
    assert torch.equal(gradients[0], expected) == owned


def test_a_copied_cut_owns_no_more_than_it_shows():
    x = randn(4, 6, 3, 3)
    with Untouched(x):
        cut = lean.copied_cut(x, 1, 2)
        assert torch.equal(cut, x[:, :2])
        cut.zero_()
    assert cut.untyped_storage().nbytes() == 4 * 2 * 9 * 8
    across = lean.copied_cut(x.contiguous(memory_format=torch.channels_last), 1, 2)
    assert across.is_contiguous(memory_format=torch.channels_last)


# Convolutions

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def plain_convolution(x, weight, bias, settings):
    stride, padding, dilation, groups = settings
    return CONVOLUTIONS[x.dim() - 2](x, weight, bias, stride, padding, dilation, groups)


def each(number, dims):
    return (number,) * dims


@pytest.mark.parametrize("trained", ["everything", "no input", "no weight", "no bias", "only bias"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("batch", [1, 3, 8, 20])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("groups", "stride", "padding", "dilation", "kernel"),
    [(1, 1, 1, 1, 3), (2, 2, 0, 1, 3), (4, (1, 2), (2, 0), 2, 3), (1, 1, 0, 1, 1), (1, 2, 0, 1, 1)],
    ids=str,
)
def test_a_convolution_is_torchs_own(groups, stride, padding, dilation, kernel, channels_last, batch, bias, trained):
    both = [each(value, 2) if isinstance(value, int) else value for value in (stride, padding, dilation)]
    settings_ = (*both, groups)
    x = in_layout(randn(batch, 4, 7, 6), channels_last)
    weight = in_layout(randn(8, 4 // groups, kernel, kernel), channels_last)
    own = randn(8) if bias else None
    x.requires_grad_(trained in ("everything", "no weight", "no bias"))
    weight.requires_grad_(trained in ("everything", "no input", "no bias"))
    if own is not None:
        own.requires_grad_(trained in ("everything", "no input", "no weight", "only bias"))
    inputs = (x, weight, own)
    expected = plain_convolution(*inputs, settings_)
    if not expected.requires_grad:
        trained = None
    gradient = torch.randn_like(expected)
    with Untouched(*inputs, gradient):
        y = lean.convolution(*inputs, settings_)
        assert_close(y, expected)
        assert y.stride() == expected.stride()
        assert y.requires_grad == expected.requires_grad
        if trained:
            assert_close(backward(y, inputs, gradient), backward(expected, inputs, gradient))


@given(
    dims=st.integers(1, 3),
    batch=st.integers(1, 21),
    groups=st.sampled_from([1, 2, 3]),
    widths=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    wants_input=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_convolution_is_torchs_own(
    dims, batch, groups, widths, kernel, stride, padding, dilation, bias, wants_input
):
    x = randn(batch, groups * widths[0], *each(5, dims), requires_grad=wants_input)
    weight = randn(groups * widths[1], widths[0], *each(kernel, dims), requires_grad=True)
    own = randn(groups * widths[1], requires_grad=True) if bias else None
    convolution_settings = (*(each(value, dims) for value in (stride, padding, dilation)), groups)
    expected = plain_convolution(x, weight, own, convolution_settings)
    gradient = torch.randn_like(expected)
    with Untouched(x, weight, own, gradient):
        y = lean.convolution(x, weight, own, convolution_settings)
        assert_close(y, expected)
        assert_close(backward(y, (x, weight, own), gradient), backward(expected, (x, weight, own), gradient))


def three_convolutions(channels_last=False):
    x = in_layout(randn(9, 4, 6, 6), channels_last).requires_grad_()
    weights = [randn(width, 4 // groups, 3, 3, requires_grad=True) for width, groups in ((8, 1), (4, 4), (2, 2))]
    biases = [None, randn(4, requires_grad=True), randn(2, requires_grad=True)]
    settings_ = [
        ((1, 1), (1, 1), (1, 1), 1),
        ((2, 2), (0, 0), (1, 1), 4),
        ((1, 1), (2, 2), (2, 2), 2),
    ]
    return x, weights, biases, settings_


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("used", [(0, 1, 2), (0,), (1,), (1, 2), (2, 0)], ids=str)
def test_convolutions_of_one_tensor_add_up_their_gradients(used, channels_last):
    x, weights, biases, settings_ = three_convolutions(channels_last)
    leaves = [x, *weights, *[bias for bias in biases if bias is not None]]
    plain = [plain_convolution(x, *own) for own in zip(weights, biases, settings_, strict=True)]
    seeds = [torch.randn_like(y) for y in plain]
    expected = torch.autograd.grad(
        [plain[number] for number in used], leaves, [seeds[number] for number in used], allow_unused=True
    )
    with Untouched(*leaves, *seeds):
        found = lean.convolutions(x, weights, biases, settings_)
        assert_close(list(found), plain)
        gradients = torch.autograd.grad(
            [found[number] for number in used], leaves, [seeds[number] for number in used], allow_unused=True
        )
    assert [own is None for own in gradients] == [own is None for own in expected]
    for own, wanted in zip(gradients, expected, strict=True):
        if own is not None:
            assert_close(own, wanted)


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self):
        super().__init__()
        self.number = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("channels_last", "forward", "backward"), [(False, 9, 9), (True, 3, 7)], ids=str)
def test_what_is_channels_last_is_taken_apart_only_where_gradients_are_added(channels_last, forward, backward):
    """Three convolutions of nine images, in parts of three: the first one's gradient is the one added to."""
    x, weights, biases, settings_ = three_convolutions(channels_last)
    with Calls() as calls:
        ys = lean.convolutions(x, weights, biases, settings_)
        torch.autograd.grad(ys, [x, *weights], [torch.ones_like(y) for y in ys])
    assert (calls.number["convolution"], calls.number["convolution_backward"]) == (forward, backward)


def test_a_convolutions_gradients_are_those_of_small_differences():
    x, weights, biases, settings_ = three_convolutions()
    x = randn(2, 4, 3, 3, requires_grad=True)

    def convolutions(x, *tensors):
        return lean.convolutions(x, tensors[:3], [None, *tensors[3:]], settings_)

    assert torch.autograd.gradcheck(convolutions, (x, *weights, *biases[1:]))


def test_frozen_convolutions_keep_nothing():
    layer = nn.Conv2d(3, 4, 3).double().requires_grad_(False)
    y = lean.convolution(randn(5, 3, 6, 6), layer.weight, layer.bias, ((1, 1), (0, 0), (1, 1), 1))
    assert not y.requires_grad


def test_under_autocast_a_convolution_is_torchs_own_under_autocast():
    leaves = [tensor.detach().float().requires_grad_() for tensor in (randn(9, 4, 6, 6), randn(8, 4, 3, 3), randn(8))]
    settings_ = ((1, 1), (1, 1), (1, 1), 1)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = lean.convolution(*leaves, settings_), plain_convolution(*leaves, settings_)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    gradient = torch.randn_like(y)
    found, wanted = backward(y, leaves, gradient), backward(expected, leaves, gradient)
    assert [own.dtype for own in found] == [torch.float32] * 3
    for own, other in zip(found, wanted, strict=True):  # sums over the batch are rounded part by part
        assert (own - other).norm() <= 1e-2 * other.norm()
