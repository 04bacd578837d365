"""ATen operators as a dispatch mode sees them: telling one call from another, and what a call gives without running it.

What a call gives out depends on its signature alone: shapes, strides, types and devices of its tensors, and its other
arguments but for the values of real numbers (those count where there is no tensor, as in arange). It is learned once a
signature, from torch's fake tensors.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils import _pytree as pytree

from slt_planner.errors import UnsupportedLayerError
from slt_planner.memory import known

Key: TypeAlias = tuple[Any, ...]

NO_OPERATORS = (
    torch.ops.profiler._record_function_enter_new.default,
    torch.ops.profiler._record_function_exit._RecordFunction,
)
"""What a dispatch mode sees beside operators; they have no tensors."""

_RESIZING = ("aten::resize_", "aten::resize_as_", "aten::set_")
_MOST_LEARNED = 100_000


@dataclass(frozen=True)
class TensorSpec:
    """All of a tensor but its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        """That of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    @property
    def nbytes(self) -> int:
        """Bytes of a tensor like this that owns its storage."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return 0 if 0 in self.shape else (last + 1) * self.dtype.itemsize

    def lies_like(self, other: "TensorSpec") -> bool:
        """The same entries at the same places; strides of dimensions of one entry say nothing."""

        def places(spec: TensorSpec) -> list[int]:
            return [stride for size, stride in zip(spec.shape, spec.stride, strict=True) if size > 1]

        return self.shape == other.shape and self.dtype == other.dtype and places(self) == places(other)

    def zeros(self) -> Tensor:
        """A real tensor like this."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device).zero_()

    def __str__(self) -> str:
        """Such as ``float32[2, 3]`` when contiguous, else with strides; the device where it is not the CPU."""
        text = f"{_short(self.dtype)}{list(self.shape)}"
        if self.stride != _contiguous(self.shape):
            text += f"/{list(self.stride)}"
        return text if self.device.type == "cpu" else f"{text}@{self.device.type}"


class Hollow(Tensor):
    """A tensor without values; it looks like one of its device, and owns a storage of no memory.

    Operators on it are answered by a dispatch mode: outside of one there are none.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuse: there is nothing to compute with."""
        raise RuntimeError(f"{func}: a tensor without values is not for computing")

    @staticmethod
    def of(spec: TensorSpec, storage_bytes: int | None = None) -> "Hollow":
        """A new one; its storage is as large as it must be, or as said."""
        return torch.Tensor._make_wrapper_subclass(
            Hollow, spec.shape, strides=spec.stride, dtype=spec.dtype, device=spec.device, storage_size=storage_bytes
        )

    def alias(self, spec: TensorSpec, offset: int) -> "Hollow":
        """Another tensor in the same storage."""
        with torch._C._DisableTorchDispatch():
            plain = torch.as_strided(self, spec.shape, spec.stride, offset)
            return torch.Tensor._make_subclass(Hollow, plain)


@dataclass(frozen=True)
class _Output:
    """A tensor that a call gives: its own argument number `argument`, or one in that or a new storage."""

    spec: TensorSpec
    offset: int
    argument: int | None
    new: int
    itself: bool


@dataclass(frozen=True)
class Operator:
    """A call of an ATen operator with one signature. `new_bytes` are those of the storages that it gives out."""

    name: str
    signature: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    new_bytes: int
    changes_shapes: bool
    _new_storages: tuple[int, ...]
    _outputs: tuple[Any, ...]
    _structure: pytree.TreeSpec

    @cached_property
    def gives_views_only(self) -> bool:
        """Nothing is computed and nothing allocated."""
        return getattr(self.function, "is_view", False) and not self.new_bytes

    @property
    def argument_bytes(self) -> int:
        """Bytes of the tensors that it is called with."""
        return sum(spec.nbytes for spec in _specs_in((self.args, self.kwargs)))

    def real_call(self) -> Callable[[], Any]:
        """The call for real, on zeros, which are allocated here."""

        def real(value: Any) -> Any:
            return value.zeros() if isinstance(value, TensorSpec) else value

        args, kwargs = pytree.tree_map(real, (self.args, dict(self.kwargs)))
        return lambda: self.function(*args, **kwargs)

    def other_layout(self, outputs: Any) -> known.Layout | None:
        """The layout of what the call gave for real, if it is not the one foreseen.

        Raises:
            UnsupportedLayerError: outputs of other shapes or number formats.
        """
        leaves = pytree.tree_leaves(outputs)
        as_foreseen = True
        for leaf, output in zip(leaves, self._outputs, strict=True):
            if isinstance(leaf, Tensor):
                real = TensorSpec.of(leaf)
                if (real.shape, real.dtype) != (output.spec.shape, output.spec.dtype):
                    raise UnsupportedLayerError(
                        f"{self.signature} gives {real} here, foreseen was {output.spec}; measure such steps"
                    )
                as_foreseen &= real.lies_like(output.spec)
        return None if as_foreseen else [list(leaf.stride()) if isinstance(leaf, Tensor) else None for leaf in leaves]

    def outputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the call gives for hollow arguments of its signature."""
        if self._gives_its_first:
            return next(tensors_in(args, kwargs))
        own = list(tensors_in(args, kwargs)) if self._needs_arguments else []
        owners: dict[int, Hollow] = {}
        leaves = [self._leaf(output, own, owners) for output in self._outputs]
        return leaves[0] if self._structure.is_leaf() else pytree.tree_unflatten(leaves, self._structure)

    def reshape_in_place(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Change the shape of a hollow argument, as the call does.

        Raises:
            UnsupportedLayerError: the call changes the size of a storage.
        """
        if torch.Tag.inplace_view not in self.function.tags or self.name in _RESIZING:  # type: ignore[attr-defined]
            raise UnsupportedLayerError(f"{self.name}: changes a storage in place; measure the step instead")
        with torch._C._DisableTorchDispatch():
            self.function(*args, **kwargs)
        return args[0]

    @cached_property
    def _gives_its_first(self) -> bool:
        first = self._outputs[0] if self._structure.is_leaf() else None
        return isinstance(first, _Output) and first.itself and first.argument == 0

    @cached_property
    def _needs_arguments(self) -> bool:
        return any(isinstance(output, _Output) and output.argument is not None for output in self._outputs)

    def _leaf(self, output: Any, own: Sequence[Tensor], owners: dict[int, Hollow]) -> Any:
        if not isinstance(output, _Output):
            return output
        if output.argument is not None:
            source = own[output.argument]
            return source if output.itself else Hollow.alias(source, output.spec, output.offset)  # type: ignore[arg-type]
        if output.new in owners:
            return owners[output.new].alias(output.spec, output.offset)
        made = Hollow.of(output.spec, self._new_storages[output.new])
        owners[output.new] = made
        return made.alias(output.spec, output.offset) if output.offset else made


def key_of(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Key:
    """Equal for calls of one signature."""
    if not _takes_tensors(function):
        return (function, str(args), str(kwargs))
    key = (function, *[_key(value) for value in args])
    return (*key, *[(name, _key(value)) for name, value in kwargs.items()]) if kwargs else key


@cache
def _takes_tensors(function: Any) -> bool:
    return any("Tensor" in str(argument.type) for argument in function._schema.arguments)


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        return tuple([_key(entry) for entry in value])
    return float if isinstance(value, float) else value


_UNFORESEEABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
    NotImplementedError,
)
_learned: dict[Key, Operator] = {}


def forget() -> None:
    """Learn all operators anew: more is known of them."""
    _learned.clear()


def operator_of(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Operator:
    """What is known of a call with these tensors, real or hollow; nothing is run.

    Raises:
        UnsupportedLayerError: what it gives depends on values, or torch cannot say it without running it.
    """
    key = key_of(function, args, kwargs)
    operator = _learned.get(key)
    if operator is None:
        if len(_learned) >= _MOST_LEARNED:
            _learned.clear()
        try:
            operator = _learned[key] = _learn(function, args, kwargs)
        except _UNFORESEEABLE as error:
            raise UnsupportedLayerError(
                f"{function}: what it gives cannot be foreseen; measure such steps, do not predict them"
            ) from error
    return operator


def _learn(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Operator:
    mode = _fake_mode()

    def fake(spec: Any) -> Any:
        if not isinstance(spec, TensorSpec):
            return spec
        empty = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device="meta")
        return FakeTensor(mode, empty, spec.device)

    specs = pytree.tree_map(lambda v: TensorSpec.of(v) if isinstance(v, Tensor) else v, (tuple(args), dict(kwargs)))
    fake_args, fake_kwargs = pytree.tree_map(fake, specs)
    own = list(tensors_in(fake_args, fake_kwargs))
    if _changes_its_first_in_place(function):
        outputs = own[0]
    else:
        with mode:
            outputs = _corrected(function, fake_args, function(*fake_args, **fake_kwargs))
    leaves, structure = pytree.tree_flatten(outputs)
    sources = {tensor.untyped_storage()._cdata: i for i, tensor in reversed(list(enumerate(own)))}
    new: dict[int, int] = {}  # bytes of new storages by address

    def described(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        address = leaf.untyped_storage()._cdata
        if address not in sources:
            new.setdefault(address, leaf.untyped_storage().nbytes())
        itself = next((i for i, tensor in enumerate(own) if tensor is leaf), None)
        return _Output(
            spec=TensorSpec.of(leaf),
            offset=int(leaf.storage_offset()),
            argument=itself if itself is not None else sources.get(address),
            new=-1 if address in sources else list(new).index(address),
            itself=itself is not None,
        )

    numbers = "float" if _takes_tensors(function) else None
    signature = f"{function}({_told(specs[0], specs[1], numbers)})"
    described_outputs = _as_known(signature, own, tuple(described(leaf) for leaf in leaves))
    return Operator(
        name=function._schema.name,  # type: ignore[attr-defined]
        signature=signature,
        function=function,
        args=specs[0],
        kwargs=specs[1],
        new_bytes=sum(new.values()),
        changes_shapes=[TensorSpec.of(t) for t in own] != list(_specs_in(specs)),
        _new_storages=tuple(new.values()),
        _outputs=described_outputs,
        _structure=structure,
    )


@cache
def _fake_mode() -> FakeTensorMode:
    return FakeTensorMode()


def _changes_its_first_in_place(function: Any) -> bool:
    """The call writes to its first argument, whose shape stays, and gives it back; nothing need be tried."""
    first, returns = function._schema.arguments[:1], function._schema.returns
    written = [value.alias_info is not None and value.alias_info.is_write for value in (*first, *returns)]
    return written == [True, True] and torch.Tag.inplace_view not in function.tags


def _corrected(function: Any, args: Sequence[Any], outputs: Any) -> Any:
    """Outputs as the CPU's kernels give them, where torch's fake ones differ in number format or layout."""
    on_cpu = isinstance(outputs, (Tensor, tuple)) and isinstance(args[0], Tensor) and args[0].device.type == "cpu"
    return _CORRECTIONS[function](args, outputs) if on_cpu and function in _CORRECTIONS else outputs


_Correction: TypeAlias = Callable[[Sequence[Any], Any], Any]


def _first_lies(layout: Callable[[Sequence[Any], Tensor], Tensor]) -> _Correction:
    """The first output, or the only one, laid out anew; an output that is not asked for stays None."""

    def corrected(args: Sequence[Any], outputs: Any) -> Any:
        if isinstance(outputs, Tensor):
            return layout(args, outputs)
        first, *others = outputs
        return (first if first is None else layout(args, first), *others)

    return corrected


def _as_sum_of(one: int, other: int) -> _Correction:
    return _first_lies(lambda args, _: args[one] + args[other])


def _as_image(argument: int) -> _Correction:
    """Contiguous, or channels_last where that argument is."""
    return _first_lies(lambda args, out: out.contiguous(memory_format=suggest_memory_format(args[argument])))


def _first_in_format_of(argument: int) -> _Correction:
    return _first_lies(lambda args, out: out.to(args[argument].dtype))


def _others_in_format_of(*arguments: int) -> _Correction:
    """Outputs but the first (statistics, gradients of weights) in the format of the first of these that is there."""

    def corrected(args: Sequence[Any], outputs: Any) -> Any:
        like = next((args[argument] for argument in arguments if args[argument] is not None), None)
        first, *others = outputs
        return outputs if like is None else (first, *[o if o is None else o.to(like.dtype) for o in others])

    return corrected


def _both(one: _Correction, other: _Correction) -> _Correction:
    return lambda args, outputs: other(args, one(args, outputs))


_contiguous_first = _first_lies(lambda _, out: out.contiguous())

_CORRECTIONS: dict[Any, _Correction] = {
    torch.ops.aten.native_batch_norm.default: _both(_as_image(0), _others_in_format_of(1, 2, 3, 4)),
    torch.ops.aten.native_group_norm.default: _others_in_format_of(1, 2),
    torch.ops.aten.native_layer_norm.default: _others_in_format_of(2, 3),
    torch.ops.aten.native_batch_norm_backward.default: _both(_as_image(1), _others_in_format_of(2)),
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


def _as_known(signature: str, own: Sequence[Tensor], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Outputs laid out as a calibration has seen them."""
    device = own[0].device.type if own else "cpu"
    layout = known.layouts(device).get(signature)
    if layout is None:
        return outputs
    return tuple(
        replace(output, spec=replace(output.spec, stride=tuple(stride))) if isinstance(output, _Output) else output
        for output, stride in zip(outputs, json.loads(layout), strict=True)
    )


def _specs_in(specs: Any) -> Iterator[TensorSpec]:
    return (leaf for leaf in pytree.tree_leaves(specs) if isinstance(leaf, TensorSpec))


def tensors_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors of a call, those in lists too, in order."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value, {})


def _told(args: Any, kwargs: Mapping[str, Any], real_numbers: str | None) -> str:
    """A call's arguments as text; real numbers as `real_numbers`, or as they are."""

    def text(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(text, value))}]"
        return real_numbers if real_numbers and isinstance(value, float) else str(value)

    return ", ".join([*map(text, args), *[f"{name}={text(value)}" for name, value in kwargs.items()]])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides, size = [], 1
    for extent in reversed(shape):
        strides.append(size)
        size *= max(extent, 1)
    return tuple(reversed(strides))
