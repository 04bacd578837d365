"""Operators that compute what plain ones compute, in less memory; without copies where nobody else needs a tensor.

`lean_program` says where that is so (`owned`): a gradient that no other operator holds may be written over.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

aten = torch.ops.aten

PARTS = 8
"""In how many parts of the batch what goes into an activation is computed again, at most."""
CONVOLUTION_PARTS = 4
"""In how many a convolution runs, which takes longer in more parts."""
SMALLEST_PART_BYTES = 2**17
"""Parts are no smaller than this: their scratch memory does not matter, their number does."""


@dataclass(frozen=True)
class Activation:
    """An activation function: in place, and its gradient, from what went in, written over the gradient after it.

    `from_output`: the gradient can as well be told from what came out.
    """

    in_place: Callable[[Tensor], Tensor]
    gradient_in_place: Callable[[Tensor, Tensor], Tensor]
    from_output: bool = False


ACTIVATIONS = {
    "relu": Activation(
        torch.relu_, lambda g, x: aten.threshold_backward.grad_input(g, x, 0, grad_input=g), from_output=True
    ),
    "relu6": Activation(
        lambda x: F.hardtanh_(x, 0.0, 6.0),
        lambda g, x: aten.hardtanh_backward.grad_input(g, x, 0.0, 6.0, grad_input=g),
        from_output=True,
    ),
    "hardswish": Activation(
        lambda x: F.hardswish(x, inplace=True), lambda g, x: g.copy_(aten.hardswish_backward(g, x))
    ),
    "silu": Activation(
        lambda x: F.silu(x, inplace=True), lambda g, x: aten.silu_backward.grad_input(g, x, grad_input=g)
    ),
}

Statistics: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
"""A norm's running mean and variance, and how many batches they are of; None with batch statistics alone."""

_recomputing: ContextVar[bool] = ContextVar("_recomputing", default=False)


@contextmanager
def _recomputation() -> Iterator[None]:
    token = _recomputing.set(True)
    try:
        yield
    finally:
        _recomputing.reset(token)


def recomputing() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for a first run and for its recomputation, in which running statistics do not move again."""
    return nullcontext(), _recomputation()


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Statistics,
    momentum: float,
    eps: float,
    activation: str | None,
    owned: bool,
) -> Tensor:
    """Batch norm by the batch's statistics, and the activation after it: what went in is saved, nothing else so large.

    The activation's gradient is found by norming again, a part of the batch at a time.
    """
    mean, variance, count = statistics
    if _recomputing.get():
        momentum = 0.0
    elif count is not None:
        count.add_(1)
    return _BatchNorm.apply(x, weight, bias, mean, variance, momentum, eps, activation, owned)


def batch_norm_in_place(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Statistics,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
) -> Tensor:
    """Batch norm and the activation after it, written over what went in; no gradients."""
    mean, variance, count = statistics
    if count is not None and training:
        count.add_(1)
    on_cuda = x.device.type == "cuda"  # where statistics are given in evaluation too, and in full precision
    kind = torch.promote_types(weight.dtype, torch.float32) if on_cuda else weight.dtype
    kept = (weight.new_empty(x.shape[1] if training or on_cuda else 0, dtype=kind) for _ in range(2))
    names = dict(zip(("save_mean", "save_invstd"), kept, strict=True))
    aten.native_batch_norm.out(x, weight, bias, mean, variance, training, momentum, eps, out=x, **names)
    return x if activation is None else ACTIVATIONS[activation].in_place(x)


class _BatchNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_variance: Tensor | None,
        momentum: float,
        eps: float,
        activation: str | None,
        owned: bool,
    ) -> Tensor:
        y, mean, inverse = aten.native_batch_norm(x, weight, bias, running_mean, running_variance, True, momentum, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        ctx.eps, ctx.activation, ctx.owned = eps, activation, owned
        return y if activation is None else ACTIVATIONS[activation].in_place(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse = ctx.saved_tensors
        g = gradient if ctx.owned else gradient.clone()
        scale = weight * inverse
        if ctx.activation is not None:
            _through_activation(g, x, scale, bias - mean * scale, ACTIVATIONS[ctx.activation])
        wanted = ctx.needs_input_grad
        rounded = x.dtype in (torch.bfloat16, torch.float16)  # a sum in several steps would lose too much
        at_once = rounded or _parts(x.nbytes, PARTS) == 1
        of_x, of_weight, of_bias = aten.native_batch_norm_backward(
            g, x, weight, None, None, mean, inverse, True, ctx.eps, [at_once, True, True]
        )
        if not at_once:
            of_x = _through_statistics(g, x, scale, mean, inverse, of_weight, of_bias)
        gradients = (of_x, of_weight, of_bias)
        return *[g if want else None for g, want in zip(gradients, wanted, strict=False)], *[None] * 6


def _through_statistics(
    g: Tensor, x: Tensor, scale: Tensor, mean: Tensor, inverse: Tensor, of_weight: Tensor, of_bias: Tensor
) -> Tensor:
    """The gradient before a norm, written over the one after it: mean and variance depend on what went in, too."""
    count = x.numel() // x.shape[1]
    slope = -scale * inverse * of_weight / count
    shift = -scale * of_bias / count - slope * mean
    return g.mul_(_along_channels(scale, g)).addcmul_(x, _along_channels(slope, g)).add_(_along_channels(shift, g))


def _along_channels(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))


def _parts(size: int, most: int) -> int:
    """In how many parts of the batch so many bytes are worked on."""
    return min(most, max(1, size // SMALLEST_PART_BYTES))


def _through_activation(g: Tensor, x: Tensor, scale: Tensor, shift: Tensor, activation: Activation) -> None:
    """The gradient before an activation, written over the one after it; the activation's input is normed again."""
    scale, shift = _along_channels(scale, x), _along_channels(shift, x)
    parts = _parts(x.nbytes, PARTS)
    for own, given in zip(g.chunk(parts), x.chunk(parts), strict=True):
        activation.gradient_in_place(own, torch.addcmul(shift, given, scale).to(x.dtype))


def add(a: Tensor, b: Tensor, activation: str | None, over: bool, owned: bool) -> Tensor:
    """A sum and the activation after it; with `over`, written over the first operand."""
    return _Sum.apply(a, b, activation, over and a.shape == b.shape and a.dtype == b.dtype, owned)


def add_in_place(a: Tensor, b: Tensor, activation: str | None) -> Tensor:
    """A sum and the activation after it, written over the first operand where it is as large; no gradients."""
    y = a.add_(b) if torch.broadcast_shapes(a.shape, b.shape) == a.shape and a.dtype == b.dtype else a + b
    return y if activation is None else ACTIVATIONS[activation].in_place(y)


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, activation: str | None, over: bool, owned: bool) -> Tensor:
        ctx.shapes, ctx.activation, ctx.owned = (a.shape, b.shape), activation, owned
        if over:
            ctx.mark_dirty(a)
        y = a.add_(b) if over else a + b
        if activation is not None:
            ACTIVATIONS[activation].in_place(y)
            ctx.save_for_backward(y.detach())  # in old versions of torch hooks would make an output hold itself
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        g = gradient
        if ctx.activation is not None:
            (y,) = ctx.saved_tensors
            g = gradient if ctx.owned else gradient.clone()
            ACTIVATIONS[ctx.activation].gradient_in_place(g, y)
        of_a, of_b = (
            g.sum_to_size(shape) if wanted else None
            for shape, wanted in zip(ctx.shapes, ctx.needs_input_grad, strict=False)
        )
        return of_a, of_b, None, None, None


def copied_cut(x: Tensor, dim: int, length: int) -> Tensor:
    """The first entries along a dimension, as a tensor of their own; no gradients."""
    return x.narrow(dim, 0, length).clone()


def with_cut(x: Tensor, dim: int, length: int, owned: bool) -> tuple[Tensor, Tensor]:
    """A tensor as it is, and a copy of its first entries along a dimension.

    Their gradients are added up in place: that of a plain cut would be as wide as the tensor.
    """
    return _WithCut.apply(x, dim, length, owned)


class _WithCut(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, length: int, owned: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dim, ctx.length, ctx.owned = x.shape, dim, length, owned
        return x.view_as(x), copied_cut(x, dim, length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_whole: Tensor | None, of_cut: Tensor | None) -> tuple[Tensor | None, ...]:
        g = of_whole
        if of_cut is not None:
            if g is None:
                g = of_cut.new_zeros(ctx.shape)
            elif not ctx.owned:
                g = g.clone()
            g.narrow(ctx.dim, 0, ctx.length).add_(of_cut)
        return g, None, None, None


Settings: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""A convolution's stride, padding (zeros on both sides), dilation and groups."""


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    """A convolution, a part of the batch at a time, forward and backward: scratch memory is that of a part."""
    (y,) = convolutions(x, [weight], [bias], [settings])
    return y


def convolutions(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], settings: Sequence[Settings]
) -> tuple[Tensor, ...]:
    """Convolutions of one tensor, a part of the batch at a time; its gradients are added up where they are made."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):  # there is none on meta
        dtype = torch.get_autocast_dtype(kind)
        x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
        biases = [None if bias is None else bias.to(dtype) for bias in biases]
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights, *biases))
    if trained and (len(weights) > 1 or _convolution_parts(x, weights[0]) > 1):
        return _Convolutions.apply(x, settings, *weights, *biases)
    return tuple(_in_parts(x, *own) for own in zip(weights, biases, settings, strict=True))


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _convolution_parts(x: Tensor, weight: Tensor, added: bool = False) -> int:
    """In how many parts of the batch a convolution runs; `added`: its gradient is added to another one of `x`.

    What is channels_last kernels take as it is; else they copy what goes in and comes out, with few channels padded to
    16.
    """
    layout = _CHANNELS_LAST.get(x.dim())
    if layout is not None and x.is_contiguous(memory_format=layout) and not x.is_contiguous():
        size = x.nbytes if added else 0
    else:
        size = x.nbytes // x.shape[1] * max(x.shape[1], len(weight), 16)
    return _parts(size, CONVOLUTION_PARTS)


def _in_parts(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    stride, padding, dilation, groups = settings

    def convolved(part: Tensor) -> Tensor:
        return torch.convolution(part, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)

    if (number := _convolution_parts(x, weight)) == 1:
        return convolved(x)
    y, places = None, ()
    parts = x.chunk(number)
    for number, part in enumerate(parts):
        own = convolved(part)
        if y is None:
            shape, layout = (len(x), *own.shape[1:]), suggest_memory_format(own)
            y = torch.empty(shape, dtype=own.dtype, device=own.device, memory_format=layout)
            places = y.split(len(part))
        places[number].copy_(own)
    assert y is not None
    return y


class _Convolutions(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: Sequence[Settings], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        weights, biases = tensors[: len(settings)], tensors[len(settings) :]
        ctx.save_for_backward(x, *weights)
        ctx.settings, ctx.bias_sizes = settings, [None if bias is None else list(bias.shape) for bias in biases]
        return tuple(_in_parts(x, *own) for own in zip(weights, biases, settings, strict=True))  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        of_x, wanted = None, (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
        of_tensors: list[Tensor | None] = [None] * (len(wanted) - 1)
        for number, (gradient, weight, bias_size, own) in enumerate(
            zip(gradients, weights, ctx.bias_sizes, ctx.settings, strict=True)
        ):
            if gradient is None:
                continue
            places = (number, number + len(weights))
            mask = [wanted[0], *[wanted[1 + place] for place in places]]
            of_x, *sums = _backward_in_parts(gradient, x, weight, bias_size, own, of_x, mask)
            for place, total in zip(places, sums, strict=True):
                of_tensors[place] = total
        return of_x, None, *of_tensors


def _backward_in_parts(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_size: list[int] | None,
    settings: Settings,
    so_far: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of what went in, weight and bias, those that are wanted; the first is added to that so far."""
    stride, padding, dilation, groups = settings
    parts = _convolution_parts(x, weight, added=so_far is not None)
    of_x = torch.empty_like(x) if so_far is None and wanted[0] and parts > 1 else so_far
    own_parts = x.chunk(parts)
    places = [None] * len(own_parts) if of_x is None else of_x.chunk(parts)
    sums: list[Tensor | None] = [None, None]
    for g, own, place in zip(gradient.chunk(parts), own_parts, places, strict=True):
        of_part, *of_rest = aten.convolution_backward(
            g, own, weight, bias_size, stride, padding, dilation, False, [0] * len(stride), groups, wanted
        )
        if place is None:
            of_x = of_part
        else:
            (place.copy_ if so_far is None else place.add_)(of_part)
        for number, more in enumerate(of_rest):
            if more is not None:
                sums[number] = more if (before := sums[number]) is None else before.add_(more)
        del of_part, of_rest
    return [of_x, *sums]
