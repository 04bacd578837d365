"""Measuring a real training step on CPU, on the allocator ruler."""

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slt_planner.config import StepSpec
from slt_planner.errors import InputError
from slt_planner.graph.adapter import Adapter
from slt_planner.memory import cpu
from slt_planner.memory.flops import forward_multiply_adds
from slt_planner.memory.profile import CATEGORIES, Category, MemoryProfile, TimelinePoint, UnitRow
from slt_planner.memory.step import make_optimizer, memory_format, threads, training_step
from slt_planner.submodel.extract import SubModel


def measure(
    module: nn.Module,
    spec: StepSpec,
    input_shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
    details: bool = True,
    adapter: Adapter | None = None,
) -> MemoryProfile:
    """Peak memory of one steady training step, by running it on random images and labels.

    Everything the allocator gives out during the step counts, added to what was alive before it (weights, buffers,
    gradients, optimizer state). The module itself is not changed. With `details`, the profile has a row a freeze unit
    (for a SubModel) and the timeline of live bytes.

    Args:
        module: a SubModel, or any module of one input.
        spec: the step; its norms must be those that a SubModel was extracted with.
        input_shape: of one sample; a SubModel knows its own.
        num_classes: number of labels to draw from; a SubModel knows its own.
        details: also make the unit rows and the timeline.
        adapter: between images and the module; a SubModel knows its own.

    Raises:
        InputError: shape or classes missing for a module that is no SubModel, or norms that differ.

    >>> from slt_planner.models.registry import load_model
    >>> spec = StepSpec(batch_size=2)
    >>> profile = measure(load_model("resnet20"), spec, input_shape=(3, 32, 32), num_classes=10)
    >>> profile.peak_bytes == sum(profile.breakdown.values())
    True
    """
    if isinstance(module, SubModel):
        extraction = module.extraction
        graph = extraction.graph
        input_shape, num_classes, adapter = graph.input_shape, graph.num_classes, graph.adapter
        if extraction.norms != spec.norms:
            raise InputError(f"the step has {spec.norms} norms, the sub-model {extraction.norms} ones")
    if input_shape is None or num_classes is None:
        raise InputError("measuring a module that is no SubModel needs input_shape and num_classes")
    with threads(spec) as number, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # made-up data is the same every time: a detector's shapes depend on it
        step = _RecordedStep(copy.deepcopy(module), spec, input_shape, num_classes, adapter or Adapter(), details)
        allocations, marks = cpu.record(step.run)
    blocks = _blocks(allocations)
    begin = next(mark.time_ns for mark in marks if mark.name == "step")
    peak_at = _peak_time(step.alive_before, allocations, begin)
    categories = step.categories(blocks, marks)
    breakdown = dict.fromkeys(CATEGORIES, 0) | step.resident_bytes()
    for block, category in zip(blocks, categories, strict=True):
        if block.begin_ns <= peak_at < block.end_ns:
            breakdown[category] += block.size
    return MemoryProfile(
        peak_bytes=sum(breakdown.values()),
        peak_operator=_operator_at(allocations, peak_at),
        device=f"cpu, {number} thread{'s' if number > 1 else ''}",
        batch_size=spec.batch_size,
        breakdown=breakdown,
        units=step.unit_rows(blocks, marks) if details and isinstance(module, SubModel) else (),
        timeline=_timeline(step.alive_before, allocations, begin) if details else (),
    )


@dataclass(frozen=True)
class _Block:
    """A piece of memory from its allocation to its release (`end_ns` is far away where it outlives the recording)."""

    address: int
    size: int
    begin_ns: int
    end_ns: int
    within_one_call: bool


_NEVER = 2**63


class _Place:
    """The unit that a forward pass is in; apart from the step, so that what calls `enter` does not hold the network."""

    def __init__(self) -> None:
        self.unit = 0

    def enter(self, unit: int) -> None:
        self.unit = unit


class _RecordedStep:
    """A module, its optimizer, and one steady step of them that says what it saves."""

    def __init__(
        self,
        module: nn.Module,
        spec: StepSpec,
        input_shape: tuple[int, ...],
        classes: int,
        adapter: Adapter,
        details: bool,
    ) -> None:
        self._spec = spec
        self._details = details
        self._adapter = adapter
        self._input_shape = input_shape
        self._classes = classes
        self._module = module.to(memory_format=memory_format(spec)) if len(input_shape) == 3 else module
        self._module.train()
        self._optimizer = make_optimizer(module.parameters(), spec.optimizer, learning_rate=0.0)
        self._place = _Place()
        self._addresses: dict[Category, set[int]] = {}
        self.alive_before = sum(self.resident_bytes().values())

    def resident_bytes(self) -> dict[Category, int]:
        """What is allocated before the recording and stays: weights and buffers, each storage once."""
        weights = _storages(self._module.parameters())
        buffers = _storages(self._module.buffers())
        return {"weights": sum(weights.values()), "buffers": sum(buffers.values())}

    def run(self) -> None:
        """Bring gradients and optimizer state into being, then do the step that is measured."""
        trained = [p for p in self._module.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        old_gradients = set(_storages(p.grad for p in trained))

        cpu.mark("step")
        batch = torch.randn(self._spec.batch_size, *self._input_shape)
        if batch.dim() == 4:
            batch = batch.to(memory_format=memory_format(self._spec))
        labels = self._adapter.example_labels(self._spec.batch_size, self._classes, self._input_shape)
        with self._following_units(), torch.autograd.graph.saved_tensors_hooks(self._say_saved, lambda tensor: tensor):
            training_step(self._module, self._optimizer, batch, labels, self._spec, self._adapter)
        cpu.mark("end")
        state = [value for entry in self._optimizer.state.values() for value in entry.values()]
        self._addresses = {
            "batch": set(_storages(x for x in pytree.tree_leaves([batch, labels]) if isinstance(x, Tensor))),
            "gradients": set(_storages(p.grad for p in trained)) | old_gradients,
            "optimizer": set(_storages(v for v in state if isinstance(v, Tensor))),
        }

    def _say_saved(self, tensor: Tensor) -> Tensor:
        cpu.mark(f"saved {tensor.untyped_storage().data_ptr()} {self._place.unit}")
        return tensor.detach()  # the tensor itself would make a reference cycle with its own grad_fn

    def _following_units(self) -> AbstractContextManager[None]:
        if not self._details or not isinstance(self._module, SubModel):
            return nullcontext()
        return self._module.following_units(self._place.enter)

    def categories(self, blocks: list[_Block], marks: list[cpu.Mark]) -> list[Category]:
        """What each block is."""
        saved = self._saved(blocks, marks)
        (end,) = (mark.time_ns for mark in marks if mark.name == "end")
        (begin,) = (mark.time_ns for mark in marks if mark.name == "step")

        def category(number: int, block: _Block) -> Category:
            for known, addresses in self._addresses.items():
                # An address is used again and again: only what is there before or after the step is known by it.
                outlives = block.end_ns > end or block.begin_ns < begin
                if outlives and block.address in addresses:
                    return known
            if number in saved:
                return "activations"
            return "workspace" if block.within_one_call else "temporaries"

        return [category(number, block) for number, block in enumerate(blocks)]

    def _saved(self, blocks: list[_Block], marks: list[cpu.Mark]) -> dict[int, int]:
        """The numbers of the blocks that were saved for backward, and the unit that saved each first."""
        by_address: dict[int, list[int]] = {}
        for number, block in enumerate(blocks):
            by_address.setdefault(block.address, []).append(number)
        saved: dict[int, int] = {}
        for mark in marks:
            if not mark.name.startswith("saved "):
                continue
            _, address, unit = mark.name.split()
            for number in by_address.get(int(address), ()):
                if blocks[number].begin_ns <= mark.time_ns < blocks[number].end_ns:
                    saved.setdefault(number, int(unit))
        return saved

    def unit_rows(self, blocks: list[_Block], marks: list[cpu.Mark]) -> tuple[UnitRow, ...]:
        """A row a freeze unit, and one for the classifier; activations count where they were saved first."""
        assert isinstance(self._module, SubModel)
        graph = self._module.extraction.graph
        categories = self.categories(blocks, marks)
        activations: dict[int, int] = {}
        for number, unit in self._saved(blocks, marks).items():
            if categories[number] == "activations":
                activations[unit] = activations.get(unit, 0) + blocks[number].size
        multiply_adds = forward_multiply_adds(self._module)
        unit_of = graph.unit_of_tensor()
        parameters = dict(self._module.named_parameters())
        names = {unit.index: (unit.name, unit.kind, unit.output_shape) for unit in graph.units}
        names[graph.depth + 1] = ("classifier", "classifier", (graph.num_classes,))
        rows = []
        for index, (name, kind, output_shape) in names.items():
            own = [parameter for fqn, parameter in parameters.items() if unit_of[fqn] == index]
            states = [self._optimizer.state[p] for p in own if p in self._optimizer.state]
            tensors = (v for state in states for v in state.values() if isinstance(v, Tensor))
            rows.append(
                UnitRow(
                    index=index,
                    name=name,
                    kind=kind,
                    output_shape=output_shape,
                    parameters=sum(p.numel() for p in own),
                    weights_bytes=sum(_storages(own).values()),
                    activations_bytes=activations.get(index, 0),
                    gradients_bytes=sum(_storages(p.grad for p in own).values()),
                    optimizer_bytes=sum(_storages(tensors).values()),
                    forward_multiply_adds=multiply_adds[index],
                )
            )
        return tuple(rows)


def _storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Bytes of each storage by its address; views of one storage count once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _blocks(allocations: list[cpu.Allocation]) -> list[_Block]:
    open_blocks: dict[int, cpu.Allocation] = {}
    blocks = []
    for event in allocations:
        if event.size > 0:
            open_blocks[event.address] = event
        elif event.address in open_blocks:
            begin = open_blocks.pop(event.address)
            same_call = begin.call == event.call and bool(begin.operator)
            blocks.append(_Block(event.address, begin.size, begin.time_ns, event.time_ns, same_call))
    for begin in open_blocks.values():
        blocks.append(_Block(begin.address, begin.size, begin.time_ns, _NEVER, False))
    return blocks


def _peak_time(alive_before: int, allocations: list[cpu.Allocation], begin: int) -> int:
    live, peak, peak_at = alive_before, 0, begin
    for event in allocations:
        live += event.size
        if event.time_ns >= begin and live > peak:
            peak, peak_at = live, event.time_ns
    return peak_at


def _operator_at(allocations: list[cpu.Allocation], time_ns: int) -> str:
    return next((event.operator for event in allocations if event.time_ns == time_ns), "") or "(none)"


def _timeline(alive_before: int, allocations: list[cpu.Allocation], begin: int) -> tuple[TimelinePoint, ...]:
    live, points = alive_before, []
    for event in allocations:
        live += event.size
        if event.time_ns >= begin:
            time_us = (event.time_ns - begin) / 1000
            points.append(TimelinePoint(time_us=time_us, live_bytes=live, operator=event.operator))
    return tuple(points)
