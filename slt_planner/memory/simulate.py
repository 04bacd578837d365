"""A training step without values: every operator called, nothing computed, the life of every storage followed."""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slt_planner.config import Config, StepSpec
from slt_planner.errors import UnsupportedLayerError
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory.attribution import Attribution, unit_rows
from slt_planner.memory.flops import step_costs
from slt_planner.memory.hollow import Hollow, TensorSpec
from slt_planner.memory.numbers import NUMBER_BYTES, SavedNumbers
from slt_planner.memory.operators import NO_OPERATORS, Operator, operator_of, tensors_in
from slt_planner.memory.profile import Category, Phase, StepCosts, UnitRow
from slt_planner.memory.step import SteadyStep, as_trained
from slt_planner.memory.timeline import most_at_once
from slt_planner.submodel.extract import extract

_LIFT = torch.ops.aten.lift_fresh.default
_ITEM = torch.ops.aten._local_scalar_dense.default
_FOR_EVER = 2**62


@dataclass
class Storage:
    """A storage of `size` bytes that comes with operator number `begin` (-1: before the step) and goes before `end`."""

    size: int
    begin: int
    end: int = _FOR_EVER
    category: Category = "temporaries"
    saved_by: int | None = None


@dataclass(frozen=True)
class Call:
    """One operator of the step, where in it, and the bytes that are live as it begins and when it is done."""

    operator: Operator
    unit: int
    phase: Phase
    live_before: int
    live_after: int


@dataclass
class SimulatedStep:
    """Every operator of a steady step in order, every storage that is alive in it, and what the step costs.

    `units` has a row a unit if it was asked for.
    """

    calls: list[Call]
    storages: list[Storage]
    costs: StepCosts
    units: tuple[UnitRow, ...] = ()

    @property
    def tensor_peak_bytes(self) -> int:
        """The most that is live at the end of an operator."""
        return max(call.live_after for call in self.calls)


def simulate(graph: ModelGraph, config: Config, spec: StepSpec, details: bool) -> SimulatedStep:
    """Run a steady step of a sub-model on tensors without values.

    Raises:
        UnsupportedLayerError: what the step does depends on values, so that it must be measured.
        InputError: the configuration goes beyond the network's units.
    """
    if graph.adapter.part:
        raise UnsupportedLayerError("the network's shapes depend on data: its memory can be measured, not predicted")
    module = as_trained(extract(graph, None, config, spec.norms, on_meta=True), spec)
    costs = step_costs(module)
    _make_hollow(module, torch.device("cuda:0" if spec.device == "cuda" else "cpu"))
    step = SteadyStep(module, spec, graph.input_shape, graph.num_classes, graph.adapter)
    attribution = Attribution()
    watch = _Watch(attribution, details)
    watch.hold(step.tensors())
    with watch:
        step.prepare()
        watch.hold(step.tensors())
        watch.forget_calls()
        attribution.begin(step.module, step.optimizer)
        hooks = torch.autograd.graph.saved_tensors_hooks(watch.say_saved, lambda tensor: tensor)
        following = attribution.following(module) if details else nullcontext()
        with hooks, following, _values_refused():
            step.run(watch.hold)
    return SimulatedStep(
        calls=watch.calls,
        storages=watch.storages,
        costs=costs.model_copy(update={"train_flops_per_sample": watch.flops // spec.batch_size}),
        units=unit_rows(step, attribution, watch.saved_by_unit(), spec.batch_size) if details else (),
    )


@contextmanager
def _values_refused() -> Iterator[None]:
    """Python code that asks for a tensor's values, as numpy() and tolist() do, is told in our words."""
    try:
        yield
    except RuntimeError as error:
        if "tensor subclasses" not in str(error):
            raise
        raise UnsupportedLayerError("the step looks at values; measure such steps, do not predict them") from error


def _make_hollow(module: nn.Module, device: torch.device) -> None:
    """Turn parameters and buffers on the meta device into hollow ones on another, shared ones staying shared."""
    made: dict[int, Hollow] = {}

    def hollow(tensor: Tensor) -> Hollow:
        if id(tensor) not in made:
            made[id(tensor)] = own = Hollow.of(replace(TensorSpec.of(tensor), device=device))
            own.requires_grad_(tensor.requires_grad)
            if isinstance(tensor, nn.Parameter):
                own._is_param = True  # as nn.Parameter does with a tensor of another class
        return made[id(tensor)]

    for part in module.modules():
        own: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in own:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = hollow(tensor)


class _Life(weakref.ref):
    """A storage's record, and what is told when the storage goes."""

    record: Storage


class _Watch(TorchDispatchMode):
    """Answers every operator with what it gives, and follows the storages."""

    def __init__(self, attribution: Attribution, details: bool) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.storages: list[Storage] = []
        self.flops = 0
        self._attribution, self._details = attribution, details
        self._preparing = True
        self._live = 0
        self._numbers = SavedNumbers()
        self._kept_numbers: list[Storage] = []
        self._lives: dict[int, _Life] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and guarding against it takes time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ITEM:
            return self._item()
        if func in NO_OPERATORS:
            return func(*args)
        kwargs = kwargs or {}
        unit = self._attribution.operator(func, args, kwargs) if self._details else 0
        live_before = self._live
        operator = operator_of(func, args, kwargs)
        self._keep_numbers(self._numbers.change(func, args))
        if func is _LIFT:  # what is made of Python's numbers arrives as a real tensor
            outputs = Hollow.of(TensorSpec.of(args[0]))
        elif operator.changes_shapes:
            outputs = operator.reshape_in_place(args, kwargs)
        else:
            outputs = operator.outputs(args, kwargs)
        if operator.new_bytes or func is _LIFT:
            for tensor in tensors_in((outputs,), {}):
                self._follow(tensor)
        self.calls.append(Call(operator, unit, self._phase(), live_before, self._live))
        self.flops += operator.flops
        if self._details:
            self._attribution.called(func, args, kwargs, outputs)
        return outputs

    def _phase(self) -> Phase:
        if torch._C._current_autograd_node() is not None:
            return "backward"
        return "optimizer" if self._attribution.in_optimizer else "forward"

    def _item(self) -> float:
        """The optimizer's count of steps is the only value that a step may look at."""
        if not (self._preparing or self._attribution.updating):
            raise UnsupportedLayerError("the step looks at values; measure such steps, do not predict them")
        return 1.0

    def _follow(self, tensor: Tensor) -> Storage:
        storage = tensor.untyped_storage()
        life = self._lives.get(storage._cdata)
        if life is None:
            record = Storage(storage.nbytes(), len(self.calls))
            life = _Life(storage, self._gone(storage._cdata))
            life.record = record
            self._lives[storage._cdata] = life
            self.storages.append(record)
            self._live += record.size
        return life.record

    def _keep_numbers(self, more: int) -> None:
        """Numbers have no storage here, and all are alike: which of them goes makes no difference."""
        now = len(self.calls)
        for _ in range(more):
            self._kept_numbers.append(Storage(NUMBER_BYTES, now))
            self.storages.append(self._kept_numbers[-1])
        for _ in range(-more):
            self._kept_numbers.pop().end = now

    def _gone(self, address: int) -> Any:
        def gone(life: _Life) -> None:
            life.record.end = len(self.calls)
            self._live -= life.record.size
            del self._lives[address]

        return gone

    def hold(self, tensors: Mapping[Category, list[Tensor]]) -> None:
        """Say what these tensors are."""
        for category, own in tensors.items():
            for tensor in own:
                self._follow(tensor).category = category

    def say_saved(self, tensor: Tensor) -> Tensor:
        """Note that a tensor is saved for backward; what is saved is an alias."""
        record = self._follow(tensor)
        if record.saved_by is None:
            record.saved_by = self._attribution.unit
        return tensor.detach()  # the tensor itself would make a reference cycle with its own grad_fn

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
