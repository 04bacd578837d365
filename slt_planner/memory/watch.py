"""What a dispatch mode sees of a step without values: its operators, answered, and the life of every storage."""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slt_planner.errors import UnsupportedLayerError
from slt_planner.memory.attribution import Attribution
from slt_planner.memory.hollow import Hollow, TensorSpec
from slt_planner.memory.numbers import NUMBER_BYTES, SavedNumbers
from slt_planner.memory.operators import NO_OPERATORS, Operator, operator_of, tensors_in
from slt_planner.memory.profile import Category, Phase
from slt_planner.memory.timeline import most_at_once

_LIFT = torch.ops.aten.lift_fresh.default
_ITEM = torch.ops.aten._local_scalar_dense.default
FOR_EVER = 2**62


@dataclass
class Storage:
    """A storage of `size` bytes that comes with operator number `begin` (-1: before the step) and goes before `end`.

    One for a number (`numbers`) is no tensor's.
    """

    size: int
    begin: int
    end: int = FOR_EVER
    category: Category = "temporaries"
    saved_by: int | None = None
    is_number: bool = False


@dataclass(frozen=True)
class Call:
    """One operator of the step, and where in it."""

    operator: Operator
    unit: int
    phase: Phase


class _Life(weakref.ref):
    """A storage's record, and what is told when the storage goes."""

    record: Storage


class Watch(TorchDispatchMode):
    """Answers every operator with what it gives, and follows the storages; those on other devices take nothing."""

    def __init__(self, attribution: Attribution, details: bool, device: str = "cpu") -> None:
        super().__init__()
        self._device = device
        self.calls: list[Call] = []
        self.storages: list[Storage] = []
        self.parts: list[int] = []
        self.flops = 0
        self._attribution, self._details = attribution, details
        self._preparing = True
        self._numbers = SavedNumbers()
        self._kept_numbers: list[Storage] = []
        self._lives: dict[int, _Life] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and guarding against it takes time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer one operator, and note it."""
        if func is _ITEM:
            return self._item()
        if func in NO_OPERATORS:
            return func(*args)
        kwargs = kwargs or {}
        unit = self._attribution.operator(func, args, kwargs) if self._details else 0
        operator = operator_of(func, args, kwargs)
        if self._device == "cpu":  # where numbers are kept
            self._keep_numbers(self._numbers.change(func, args))
        if func is _LIFT:  # what is made of Python's numbers arrives as a real tensor
            outputs = Hollow.of(TensorSpec.of(args[0]))
        elif operator.changes_shapes:
            outputs = operator.reshape_in_place(args, kwargs)
        else:
            outputs = operator.outputs(args, kwargs)
        if operator.new_bytes or func is _LIFT:
            for tensor in tensors_in((outputs,), {}):
                self.follow(tensor)
        self.calls.append(Call(operator, unit, self._phase()))
        self.flops += operator.flops
        if self._details:
            self._attribution.called(func, args, kwargs, outputs)
        return outputs

    def _phase(self) -> Phase:
        if torch._C._current_autograd_node() is not None:
            return "backward"
        return "optimizer" if self._attribution.in_optimizer else "forward"

    def begin_part(self) -> None:
        """From here on moments are later than the last ones, though no operator was called; `parts` has the first."""
        self.parts.append(self._now() + 1)

    def _now(self) -> int:
        return len(self.calls) + len(self.parts)

    def _item(self) -> float:
        """The optimizer's count of steps is the only value that a step may look at."""
        if not (self._preparing or self._attribution.updating):
            raise UnsupportedLayerError("the step looks at values; measure such steps, do not predict them")
        return 1.0

    def follow(self, tensor: Tensor) -> Storage:
        """The record of a tensor's storage, from now on if it is a new one."""
        storage = tensor.untyped_storage()
        life = self._lives.get(storage._cdata)
        if life is None:
            record = Storage(storage.nbytes() if tensor.device.type == self._device else 0, self._now())
            life = _Life(storage, self._gone(storage._cdata))
            life.record = record
            self._lives[storage._cdata] = life
            self.storages.append(record)
        return life.record

    def _keep_numbers(self, more: int) -> None:
        """Numbers have no storage here, and all are alike: which of them goes makes no difference."""
        now = self._now()
        for _ in range(more):
            self._kept_numbers.append(Storage(NUMBER_BYTES, now, is_number=True))
            self.storages.append(self._kept_numbers[-1])
        for _ in range(-more):
            self._kept_numbers.pop().end = now

    def _gone(self, address: int) -> Any:
        def gone(life: _Life) -> None:
            life.record.end = self._now()
            del self._lives[address]

        return gone

    def hold(self, tensors: Mapping[Category, list[Tensor]]) -> None:
        """Say what these tensors are."""
        for category, own in tensors.items():
            for tensor in own:
                self.follow(tensor).category = category

    def say_saved(self, tensor: Tensor) -> None:
        """Note that a tensor is saved for backward."""
        record = self.follow(tensor)
        if record.saved_by is None:
            record.saved_by = self._attribution.unit

    def forget_calls(self) -> None:
        """The step begins here: what is alive was there before."""
        self._preparing = False
        self.calls.clear()
        alive = [life.record for life in self._lives.values()]
        for record in alive:
            record.begin = -1
        self.storages[:] = alive

    def saved_by_unit(self) -> dict[int, int]:
        """The most bytes saved for backward at once, by the unit that saved them first."""
        saved: dict[int, list[tuple[int, int, int]]] = {}
        for record in self.storages:
            if record.saved_by is not None and record.category == "temporaries":
                saved.setdefault(record.saved_by, []).append((record.size, record.begin, record.end))
        return {unit: most_at_once(lives) for unit, lives in saved.items()}


@contextmanager
def values_refused() -> Iterator[None]:
    """Python code that asks for a tensor's values, as numpy() and tolist() do, is told in our words."""
    try:
        yield
    except RuntimeError as error:
        if "tensor subclasses" not in str(error):
            raise
        raise UnsupportedLayerError("the step looks at values; measure such steps, do not predict them") from error
