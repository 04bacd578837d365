"""What kernels, the CPU's above all, give in another number format or layout than torch's fake tensors foresee."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._prims_common import suggest_memory_format

_Correction: TypeAlias = Callable[[Sequence[Any], Any], Any]
_contiguous = torch.contiguous_format


def corrected(function: OpOverload, args: Sequence[Any], outputs: Any) -> Any:
    """Fake outputs of a call as its kernel gives them, for fake arguments."""
    if function in _EVERYWHERE:
        outputs = _EVERYWHERE[function](args, outputs)
    correction = _CORRECTIONS.get(function)
    if args and isinstance(args[0], Tensor) and args[0].device.type == "cpu":
        if correction is not None:
            outputs = correction(args, outputs)
        ambiguous = isinstance(outputs, Tensor) and 1 in outputs.shape
        if ambiguous and _goes_by_entries(function) and _are_alike_and_contiguous(function, args):
            return _laid_out(outputs, _contiguous)
    return outputs


def _laid_out(out: Tensor, layout: torch.memory_format) -> Tensor:
    """Anew, with a layout's own strides also where a dimension has one entry."""
    return torch.empty_like(out, memory_format=layout)


@cache
def _goes_by_entries(function: OpOverload) -> bool:
    """Whether a new tensor is made entry by entry, in the order of memory."""
    if function is torch.ops.aten.clone.default or function._schema.is_mutable:
        return False
    return torch.Tag.pointwise in function.tags or function in _BY_ENTRIES


def _are_alike_and_contiguous(function: OpOverload, args: Sequence[Any]) -> bool:
    """Then the output is contiguous, too: what else the strides could mean is not looked at."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    taken = sum("Tensor" in str(argument.type) for argument in function._schema.arguments)
    return len(tensors) == taken and all(t.shape == tensors[0].shape and t.is_contiguous() for t in tensors)


def _first_lies(layout: Callable[[Sequence[Any], Tensor], Tensor]) -> _Correction:
    """The first output, or the only one, laid out anew; an output that is not asked for stays None."""

    def laid_out(args: Sequence[Any], outputs: Any) -> Any:
        if isinstance(outputs, Tensor):
            return layout(args, outputs)
        first, *others = outputs
        return (first if first is None else layout(args, first), *others)

    return laid_out


def _as_sum_of(one: int, other: int) -> _Correction:
    return _first_lies(lambda args, _: args[one] + args[other])


def _as_image(argument: int) -> _Correction:
    """Contiguous, or channels_last where that argument is."""
    return _first_lies(lambda args, out: _laid_out(out, suggest_memory_format(args[argument])))


def _normed(args: Sequence[Any], out: Tensor) -> Tensor:
    return _laid_out(out, _contiguous if args[0].is_contiguous() else suggest_memory_format(args[0]))


def _gradient_of_normed(args: Sequence[Any], out: Tensor) -> Tensor:
    gradient, x, *_ = args
    alike = suggest_memory_format(gradient) == suggest_memory_format(x)
    return _laid_out(out, _contiguous if alike and x.is_contiguous() else suggest_memory_format(x))


def _first_in_format_of(argument: int) -> _Correction:
    return _first_lies(lambda args, out: out.to(args[argument].dtype))


def _others_in_format_of(*arguments: int) -> _Correction:
    """Outputs but the first (statistics, gradients of weights) in the format of the first of these that is there."""

    def formatted(args: Sequence[Any], outputs: Any) -> Any:
        like = next((args[argument] for argument in arguments if args[argument] is not None), None)
        first, *others = outputs
        return outputs if like is None else (first, *[o if o is None else o.to(like.dtype) for o in others])

    return formatted


def _as_asked(mask: int) -> _Correction:
    """Gradients that are not asked for are not made."""
    return lambda args, outputs: tuple(o if wanted else None for o, wanted in zip(outputs, args[mask], strict=True))


def _both(one: _Correction, other: _Correction) -> _Correction:
    return lambda args, outputs: other(args, one(args, outputs))


_contiguous_first = _first_lies(lambda _, out: _laid_out(out, _contiguous))
_BY_ENTRIES = (
    torch.ops.aten.hardswish.default,
    torch.ops.aten.hardswish_backward.default,
    torch.ops.aten.hardtanh_backward.default,
    torch.ops.aten.hardsigmoid_backward.default,
    torch.ops.aten.softplus_backward.default,
    torch.ops.aten.elu_backward.default,
)

_EVERYWHERE: dict[OpOverload, _Correction] = {torch.ops.aten.native_batch_norm_backward.default: _as_asked(9)}
_CORRECTIONS: dict[OpOverload, _Correction] = {
    torch.ops.aten.native_batch_norm.default: _both(_first_lies(_normed), _others_in_format_of(1, 2, 3, 4)),
    torch.ops.aten.native_group_norm.default: _others_in_format_of(1, 2),
    torch.ops.aten.native_layer_norm.default: _others_in_format_of(2, 3),
    torch.ops.aten.native_batch_norm_backward.default: _both(_first_lies(_gradient_of_normed), _others_in_format_of(2)),
    torch.ops.aten.native_group_norm_backward.default: _both(_first_in_format_of(1), _others_in_format_of(4)),
    torch.ops.aten.native_layer_norm_backward.default: _both(_contiguous_first, _others_in_format_of(5)),
    torch.ops.aten._log_softmax_backward_data.default: _contiguous_first,
    torch.ops.aten.hardswish_backward.default: _as_sum_of(0, 1),
    torch.ops.aten.hardsigmoid_backward.default: _as_sum_of(0, 1),
    torch.ops.aten.hardtanh_backward.default: _as_sum_of(0, 1),
    torch.ops.aten.softplus_backward.default: _as_sum_of(0, 1),
    torch.ops.aten.elu_backward.default: _as_sum_of(0, 5),
    torch.ops.aten.native_dropout_backward.default: _as_sum_of(0, 1),
    torch.ops.aten.roll.default: _as_image(0),
    torch.ops.aten.channel_shuffle.default: _as_image(0),
}
