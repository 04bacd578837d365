"""ATen operators as a dispatch mode sees them: telling one call from another, and what a call gives without running it.

What a call gives out depends on its signature alone: shapes, strides, types and devices of its tensors, and its other
arguments but for the values of real numbers (those count where there is no tensor, as in arange). It is learned once a
signature, from torch's fake tensors.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import OpOverload
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
from slt_planner.memory.corrections import corrected
from slt_planner.memory.flops import operator_flops
from slt_planner.memory.hollow import Hollow, TensorSpec

_Key: TypeAlias = tuple[Any, ...]
_Kind = TypeVar("_Kind")

NO_OPERATORS = (
    torch.ops.profiler._record_function_enter_new.default,
    torch.ops.profiler._record_function_exit._RecordFunction,
)
"""What a dispatch mode sees beside operators; they have no tensors."""

_RESIZING = ("aten::resize_", "aten::resize_as_", "aten::set_")
_MOST_LEARNED = 100_000


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
    """A call of an ATen operator with one signature.

    `new_bytes` are those of the storages that it gives out, `flops` its arithmetic (`flops.operator_flops`).
    """

    name: str
    signature: str
    function: OpOverload
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    new_bytes: int
    flops: int
    changes_shapes: bool
    _new_storages: tuple[int, ...]
    _outputs: tuple[Any, ...]
    _structure: pytree.TreeSpec

    @cached_property
    def gives_views_only(self) -> bool:
        """Nothing is computed and nothing allocated."""
        return self.function.is_view and not self.new_bytes

    @property
    def argument_bytes(self) -> int:
        """Bytes of the tensors that it is called with."""
        return sum(spec.nbytes for spec in _specs_in(self.args, self.kwargs))

    def real_call(self) -> Callable[[], Any]:
        """The call for real, on zeros, which are allocated here."""
        args, kwargs = _mapped((self.args, self.kwargs), TensorSpec, TensorSpec.zeros)
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
                as_foreseen &= real.layout == output.spec.layout
        return None if as_foreseen else [list(leaf.stride()) if isinstance(leaf, Tensor) else None for leaf in leaves]

    def outputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the call gives for hollow arguments of its signature."""
        if self._gives_its_first:
            return next(tensors_in(args, kwargs))
        own = list(tensors_in(args, kwargs)) if self._needs_arguments else []
        owners: dict[int, Hollow] = {}
        leaves = [self._leaf(output, own, owners) for output in self._outputs]
        if self._structure.is_leaf():
            return leaves[0]
        return tuple(leaves) if self._is_flat_tuple else pytree.tree_unflatten(leaves, self._structure)

    def reshape_in_place(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Change the shape of a hollow argument, as the call does.

        Raises:
            UnsupportedLayerError: the call changes the size of a storage.
        """
        if torch.Tag.inplace_view not in self.function.tags or self.name in _RESIZING:
            raise UnsupportedLayerError(f"{self.name}: changes a storage in place; measure the step instead")
        with torch._C._DisableTorchDispatch():
            self.function(*args, **kwargs)
        return args[0]

    @cached_property
    def _gives_its_first(self) -> bool:
        first = self._outputs[0] if self._structure.is_leaf() else None
        return isinstance(first, _Output) and first.itself and first.argument == 0

    @cached_property
    def _is_flat_tuple(self) -> bool:
        return self._structure.type is tuple and self._structure.num_children == self._structure.num_leaves

    @cached_property
    def _needs_arguments(self) -> bool:
        return any(isinstance(output, _Output) and output.argument is not None for output in self._outputs)

    def _leaf(self, output: Any, own: Sequence[Tensor], owners: dict[int, Hollow]) -> Any:
        if not isinstance(output, _Output):
            return output
        if output.argument is not None:
            source = own[output.argument]
            return source if output.itself else Hollow.alias(source, output.spec, output.offset)
        if output.new in owners:
            return Hollow.alias(owners[output.new], output.spec, output.offset)
        made = Hollow.of(output.spec, self._new_storages[output.new])
        owners[output.new] = made
        return Hollow.alias(made, output.spec, output.offset) if output.offset else made


_UNFORESEEABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
    NotImplementedError,
)
_learned: dict[_Key, Operator] = {}


def forget() -> None:
    """Learn all operators anew: more is known of them."""
    _learned.clear()


def operator_of(function: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Operator:
    """What is known of a call with these tensors, real or hollow; nothing is run.

    Raises:
        UnsupportedLayerError: what it gives depends on values, or torch cannot say it without running it.

    >>> operator = operator_of(torch.ops.aten.mm.default, (torch.zeros(2, 3), torch.zeros(3, 4)), {})
    >>> operator.signature, operator.new_bytes
    ('aten.mm.default(float32[2, 3], float32[3, 4])', 32)
    """
    key = _key_of(function, args, kwargs)
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


def _key_of(function: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Key:
    """Equal for calls of one signature."""
    if not _takes_tensors(function):
        return (function, str(args), str(kwargs))
    key = (function, *[_key(value) for value in args])
    return (*key, *[(name, _key(value)) for name, value in kwargs.items()]) if kwargs else key


@cache
def _takes_tensors(function: OpOverload) -> bool:
    return any("Tensor" in str(argument.type) for argument in function._schema.arguments)


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        return tuple([_key(entry) for entry in value])
    return float if isinstance(value, float) else value


def _learn(function: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Operator:
    args, kwargs = _mapped((args, kwargs), Tensor, TensorSpec.of)
    specs = list(_specs_in(args, kwargs))
    signature = f"{function}({_told(args, kwargs, 'float' if _takes_tensors(function) else None)})"
    taken, given = _tried(function, args, kwargs)
    leaves, structure = pytree.tree_flatten(given)
    outputs, new_storages = _described(leaves, taken, specs)
    return Operator(
        name=function._schema.name,
        signature=signature,
        function=function,
        args=args,
        kwargs=kwargs,
        new_bytes=sum(new_storages),
        flops=_flops(function, args, kwargs, given),
        changes_shapes=any((t.shape, t.stride()) != (s.shape, s.stride) for t, s in zip(taken, specs, strict=False)),
        _new_storages=new_storages,
        _outputs=_as_known(signature, specs, outputs),
        _structure=structure,
    )


def _flops(function: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], given: Any) -> int:
    args, kwargs = _mapped((args, kwargs), TensorSpec, _meta)
    return operator_flops(function, args, kwargs, given)


def _tried(function: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], Any]:
    """A call without values: stand-ins for the tensors that it takes (the first, if nothing need be tried), outputs."""
    if _changes_its_first_in_place(function):
        first = _meta(next(_specs_in(args, kwargs)))
        return [first], first
    views = _gives_views(function)
    args, kwargs = _mapped((args, kwargs), TensorSpec, _meta if views else _fake)
    taken = list(tensors_in(args, kwargs))
    if views:  # on every device by the same code, in which fake tensors would only take longer
        return taken, function(*args, **kwargs)
    with _fake_mode():
        return taken, corrected(function, args, function(*args, **kwargs))


def _meta(spec: TensorSpec) -> Tensor:
    return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device="meta")


def _fake(spec: TensorSpec) -> FakeTensor:
    return FakeTensor(_fake_mode(), _meta(spec), spec.device)


@cache
def _fake_mode() -> FakeTensorMode:
    # The mode pretends that there is a GPU; autograd that starts after that has a thread for it, and can't be forked.
    torch.zeros((), requires_grad=True).backward()
    mode = FakeTensorMode()
    mode.cache_enabled = False  # what is asked here is new, and to look it up takes a third of the time
    return mode


@cache
def _changes_its_first_in_place(function: OpOverload) -> bool:
    """The call writes to its first argument, whose shape stays, and gives it back; nothing need be tried."""
    first, returns = function._schema.arguments[:1], function._schema.returns
    written = [value.alias_info is not None and value.alias_info.is_write for value in (*first, *returns)]
    return written == [True, True] and torch.Tag.inplace_view not in function.tags


@cache
def _gives_views(function: OpOverload) -> bool:
    """The call gives nothing but views; one that is made of others, such as reshape, may copy."""
    return function.is_view and not function.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)


def _described(
    outputs: Sequence[Any], taken: Sequence[Tensor], specs: Sequence[TensorSpec]
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """What a call gives for stand-ins of tensors like these, and the bytes of each new storage."""
    sources = {tensor.untyped_storage()._cdata: number for number, tensor in reversed(list(enumerate(taken)))}
    new: dict[int, int] = {}  # bytes by address

    def described(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        storage = leaf.untyped_storage()
        itself = next((number for number, tensor in enumerate(taken) if tensor is leaf), None)
        source = sources.get(storage._cdata) if itself is None else itself
        if source is None:
            new.setdefault(storage._cdata, storage.nbytes())
        spec = TensorSpec.of(leaf)
        return _Output(
            spec=spec if source is None else replace(spec, device=specs[source].device),
            offset=int(leaf.storage_offset()),
            argument=source,
            new=list(new).index(storage._cdata) if source is None else -1,
            itself=itself is not None,
        )

    return tuple([described(leaf) for leaf in outputs]), tuple(new.values())


def _as_known(signature: str, specs: Sequence[TensorSpec], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Outputs laid out as a calibration has seen them."""
    device = specs[0].device.type if specs else "cpu"
    layout = known.layouts(device).get(signature)
    if layout is None:
        return outputs
    return tuple(
        replace(output, spec=replace(output.spec, stride=tuple(stride))) if isinstance(output, _Output) else output
        for output, stride in zip(outputs, json.loads(layout), strict=True)
    )


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Arguments with each value of a kind changed, those in lists and dicts too."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, (list, tuple)):
        return [_mapped(entry, kind, change) for entry in value]
    return {name: _mapped(own, kind, change) for name, own in value.items()} if isinstance(value, dict) else value


def tensors_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors of a call, those in lists too, in order."""
    return _all_in((*args, *kwargs.values()), Tensor)


def _specs_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[TensorSpec]:
    return _all_in((*args, *kwargs.values()), TensorSpec)


def _all_in(values: Sequence[Any], kind: type[_Kind]) -> Iterator[_Kind]:
    for value in values:
        if isinstance(value, kind):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _all_in(value, kind)


def _told(args: Any, kwargs: Mapping[str, Any], real_numbers: str | None) -> str:
    """A call's arguments as text; real numbers as `real_numbers`, or as they are."""

    def text(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(text, value))}]"
        return real_numbers if real_numbers and isinstance(value, float) else str(value)

    return ", ".join([*map(text, args), *[f"{name}={text(value)}" for name, value in kwargs.items()]])
