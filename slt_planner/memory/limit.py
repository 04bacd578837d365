"""Enforcing a budget: a training step fails before the operator that would pass it."""

import weakref
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from slt_planner.errors import BudgetExceeded, UnsupportedLayerError
from slt_planner.memory import cuda, known
from slt_planner.memory.attribution import Attribution
from slt_planner.memory.numbers import NUMBER_BYTES, SavedNumbers
from slt_planner.memory.operators import NO_OPERATORS, Operator, operator_of, tensors_in
from slt_planner.memory.step import state_of
from slt_planner.submodel.extract import SubModel
from slt_planner.units import parse_bytes

Held = nn.Module | torch.optim.Optimizer | Tensor

CUDA_SLACK_BYTES = 64 * 2**20
"""On CUDA the allocator's own cap stands this far behind the budget: it counts what is reserved, not what is live."""


def memory_limit(budget: str | int, *held: Held, device: str = "cpu") -> "MemoryLimit":
    """Make training steps fail before they need more memory than a budget (allocator ruler).

    Use it around a step, again and again if there are several. Before each operator, the live bytes and what the
    operator will add (its outputs, and its scratch memory where `calibrate` has learned it on this device) must fit.
    Operators that are not calibrated count with their outputs alone; `MemoryLimit.exact` says whether there were any.

    Args:
        budget: bytes, or text such as ``"64MB"``.
        held: modules, optimizers and tensors that are alive from the begin; other tensors count from the first
            operator that takes or gives them. Units are named for a SubModel among them.
        device: ``cpu`` or ``cuda``; tensors elsewhere don't count. On CUDA the allocator's own cap stands behind it,
            with a slack of 64 MiB.

    Raises:
        InputError: a budget that cannot be read, or no such device.
        BudgetExceeded: in the step; it names the operator and unit, the bytes it asks for and those alive.

    >>> from torch import nn
    >>> network = nn.Linear(1000, 1000)
    >>> with memory_limit("4.1MB", network):
    ...     _ = network(torch.zeros(2, 1000))
    >>> with memory_limit("4MB", network):
    ...     _ = network(torch.zeros(2, 1000))
    Traceback (most recent call last):
        ...
    slt_planner.errors.BudgetExceeded: aten::zeros asks for 8,000 bytes while 4,004,000 are alive: ...
    """
    cuda.check(device)
    return MemoryLimit(parse_bytes(budget) if isinstance(budget, str) else budget, held, device)


class MemoryLimit:
    """A limit on the live bytes of what runs inside; see `memory_limit`. It can be entered more than once."""

    def __init__(self, budget_bytes: int, held: Sequence[Held], device: str) -> None:
        self.budget_bytes = budget_bytes
        self._guard = _Guard(budget_bytes, device)
        self._held, self._device = held, device
        self._entered = ExitStack()
        self._guard.unit_names = _unit_names(held)

    @property
    def exact(self) -> bool:
        """Every operator so far was calibrated."""
        return not self._guard.uncalibrated

    @property
    def uncalibrated(self) -> frozenset[str]:
        """Names of operators that counted with their outputs alone."""
        return frozenset(self._guard.uncalibrated)

    @property
    def peak_bytes(self) -> int:
        """The most that was alive so far, scratch memory included."""
        return self._guard.peak

    def __enter__(self) -> "MemoryLimit":
        """Begin to count; what is held counts at once."""
        with ExitStack() as stack:
            for handle in self._guard.begin(self._held):
                stack.callback(handle.remove)
            if self._device == "cuda":
                stack.enter_context(cuda.cap(self.budget_bytes + CUDA_SLACK_BYTES))
            stack.enter_context(self._guard)
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop counting."""
        self._entered.close()


class _Guard(TorchDispatchMode):
    """Follows live storages, and refuses an operator that would make them too many."""

    def __init__(self, budget: int, device: str) -> None:
        super().__init__()
        self.peak = 0
        self.uncalibrated: set[str] = set()
        self.unit_names: dict[int, str] = {}
        self._budget, self._device = budget, device
        self._live = 0
        self._numbers = SavedNumbers()
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and guarding against it takes time

    def begin(self, held: Sequence[Held]) -> list[Any]:
        """Count what is held, and follow the units of a sub-model; gives hooks to remove at the end."""
        self._growths = known.growths(self._device, torch.get_num_threads())
        self._attribution = Attribution()
        self._live -= NUMBER_BYTES * self._numbers.forget()
        for tensor in _tensors_of(held):
            self._follow(tensor)
        optimizer = next((entry for entry in held if isinstance(entry, torch.optim.Optimizer)), None)
        modules = [entry for entry in held if isinstance(entry, SubModel)]
        return [hook for module in modules for hook in self._attribution.begin(module, optimizer, by_parameters=True)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in NO_OPERATORS:
            return func(*args, **kwargs)
        for tensor in tensors_in(args, kwargs):
            self._follow(tensor)
        if self._device == "cpu":
            self._live += NUMBER_BYTES * self._numbers.change(func, args)
        unit = self._attribution.operator(func, args, kwargs)
        operator = self._known(func, args, kwargs)
        if operator is not None:
            self._refuse_if_over(operator.name, unit, *self._growth(operator))
        outputs = func(*args, **kwargs)
        given = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
        for tensor in given:
            self._follow(tensor)
        if operator is None and given:
            self._refuse_if_over(func._schema.name, unit, 0, False)
        return outputs

    def _known(self, func: Any, args: Any, kwargs: Any) -> Operator | None:
        try:
            return operator_of(func, args, kwargs)
        except UnsupportedLayerError:
            return None  # how much it gives is known only when it is done

    def _growth(self, operator: Operator) -> tuple[int, bool]:
        """The bytes that an operator will add at most, and whether that is calibrated."""
        if operator.gives_views_only:
            return 0, True
        growth = self._growths.get(operator.signature)
        return (operator.new_bytes, False) if growth is None else (growth, True)

    def _refuse_if_over(self, operator: str, unit: int, asked: int, calibrated: bool) -> None:
        if not calibrated:
            self.uncalibrated.add(operator)
        self.peak = max(self.peak, self._live + asked)
        if self._live + asked > self._budget:
            name = self.unit_names.get(unit, "")
            raise BudgetExceeded(operator, name, asked, self._live, self._budget, calibrated)

    def _follow(self, tensor: Tensor) -> None:
        if tensor.device.type != self._device:
            return
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._storages:
            return

        def gone(_: object) -> None:
            self._live -= size
            del self._storages[address]

        self._storages[address] = weakref.ref(storage, gone)
        self._live += size


def _tensors_of(held: Sequence[Held]) -> Iterable[Tensor]:
    for entry in held:
        if isinstance(entry, Tensor):
            yield entry
        elif isinstance(entry, nn.Module):
            yield from entry.buffers()
            for parameter in entry.parameters():
                yield parameter
                if parameter.grad is not None:
                    yield parameter.grad
        else:
            for group in entry.param_groups:
                for parameter in group["params"]:
                    yield from state_of(entry, parameter)


def _unit_names(held: Sequence[Held]) -> dict[int, str]:
    graph = next((entry.extraction.graph for entry in held if isinstance(entry, SubModel)), None)
    if graph is None:
        return {}
    names = {unit.index: f"unit {unit.index} ({unit.name})" for unit in graph.units}
    return {**names, graph.depth + 1: "the classifier"}
