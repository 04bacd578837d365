"""Measuring a real training step, on the allocator ruler and on the tensor ruler."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slt_planner.config import StepSpec
from slt_planner.environment import environment
from slt_planner.errors import InputError
from slt_planner.graph.adapter import Adapter
from slt_planner.memory import cuda, recording
from slt_planner.memory.attribution import Attribution, storage_bytes, unit_rows
from slt_planner.memory.numbers import NUMBER_BYTES, SAVING
from slt_planner.memory.profile import CATEGORIES, Category, MemoryProfile
from slt_planner.memory.recording import NO_SPAN, Allocation, Event, Mark, SpanEnd
from slt_planner.memory.saved import saving_seen
from slt_planner.memory.step import SteadyStep, as_trained, device_name, threads
from slt_planner.memory.timeline import Change, Peak, find_peak, most_at_once, timeline
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
    gradients, optimizer state); on CUDA not what cuBLAS keeps for ever. The module itself is not changed. With
    `details`, the profile has a row a freeze unit (for a SubModel) and the timeline of live bytes.

    Args:
        module: a SubModel, or any module of one input.
        spec: the step; its norms must be those that a SubModel was extracted with.
        input_shape: of one sample; a SubModel knows its own.
        num_classes: number of labels to draw from; a SubModel knows its own.
        details: also make the unit rows and the timeline.
        adapter: between images and the module; a SubModel knows its own.

    Raises:
        InputError: shape or classes missing for a module that is no SubModel, norms that differ, or no such device.

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
    cuda.check(spec.device)
    before = cuda.live_now() if spec.device == "cuda" else None
    with threads(spec) as number, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # made-up data is the same every time: a detector's shapes depend on it
        own = as_trained(copy.deepcopy(module).to(spec.device), spec)
        step = _RecordedStep(SteadyStep(own, spec, input_shape, num_classes, adapter or Adapter()), details)
        history, peak, on_cuda = _recorded(step, before)
    return MemoryProfile(
        config=module.extraction.config if isinstance(module, SubModel) else None,
        spec=spec.model_copy(update={"threads": number}),
        peak_bytes=peak.size,
        tensor_peak_bytes=history.tensor_peak() if spec.device == "cpu" else None,
        peak_operator=peak.operator,
        peak_unit=peak.unit,
        device=device_name(spec.device, number),
        batch_size=spec.batch_size,
        breakdown=peak.breakdown,
        resident=history.resident,
        environment=environment(number),
        units=unit_rows(step.step, step.attribution, history.saved_by_unit(), spec.batch_size) if details else (),
        timeline=timeline(history.resident, history.changes) if details else (),
        requested_bytes=None if on_cuda is None else on_cuda.requested,
        reserved_bytes=None if on_cuda is None else on_cuda.reserved,
    )


def peak_of(make: Callable[[], SteadyStep], spec: StepSpec) -> int:
    """The peak of a step that is made here, such as one of views; as `measure`, on the allocator ruler."""
    before = cuda.live_now() if spec.device == "cuda" else None
    with threads(spec), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, peak, _ = _recorded(_RecordedStep(make(), details=False), before)
    return peak.size


def _recorded(
    step: "_RecordedStep", before: cuda.AllocatorBytes | None
) -> "tuple[_History, Peak, cuda.AllocatorBytes | None]":
    """A step run and read, its peak, and on CUDA what the allocator says, beyond what was there before the module."""
    if before is not None:  # blocks are larger than what is asked for
        step.unaccounted = cuda.live_now().allocated - before.allocated - sum(step.resident.values())
    history = _History(step, recording.record(step.run, step.step.device))
    peak = find_peak(history.resident, history.changes)
    on_cuda = None if before is None or step.peaks is None else step.peaks.above(before)
    return history, peak if on_cuda is None else _as_allocator_says(peak, on_cuda.allocated), on_cuda


def _as_allocator_says(peak: Peak, allocated: int) -> Peak:
    """The peak with CUDA's own high-water mark; what the history does not know of is scratch memory."""
    unknown = allocated - peak.size
    if unknown < 0:
        raise RuntimeError(f"the allocator's peak is {allocated} bytes, its history's {peak.size}")
    more = {**peak.breakdown, "workspace": peak.breakdown["workspace"] + unknown}
    return replace(peak, size=allocated, breakdown=more)


class _Spans(TorchDispatchMode):
    """Makes every operator a span of the recording, and remembers which it was."""

    def __init__(self, attribution: Attribution | None) -> None:
        super().__init__()
        self.operators: list[tuple[str, int]] = []
        self._attribution = attribution

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and guarding against it takes time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        unit = self._attribution.operator(func, args, kwargs) if self._attribution else 0
        self.operators.append((func._schema.name, unit))
        with recording.span(len(self.operators) - 1):
            outputs = func(*args, **kwargs)
        if self._attribution:
            self._attribution.called(func, args, kwargs, outputs)
        return outputs


class _RecordedStep:
    """A steady step that is run so that a recording of it can be read."""

    def __init__(self, step: SteadyStep, details: bool) -> None:
        self.step = step
        self.resident = {category: storage_bytes(tensors) for category, tensors in step.tensors().items()}
        self.unaccounted = 0
        self.known: dict[Category, set[int]] = {}
        self.peaks: cuda.AllocatorBytes | None = None
        self.attribution = Attribution()
        self._details = details
        self.spans = _Spans(self.attribution if details else None)

    def run(self) -> None:
        """Bring the step to its steady state, then run it, marked."""
        if self.step.device == "cuda":  # what kernels' libraries keep for ever comes with the first step
            self.step.run(lambda tensors: None)
        self.step.prepare()
        self.attribution.begin(self.step.module, self.step.optimizer)
        old_gradients = _addresses(self.step.tensors()["gradients"])

        def remember(tensors: Mapping[Category, list[Tensor]]) -> None:
            recording.mark("end")
            self.known = {category: _addresses(own) for category, own in tensors.items()}
            self.known["gradients"] |= old_gradients

        def steady() -> None:
            recording.mark("step")
            following = self.attribution.following(self.step.module) if self._details else nullcontext()
            with self.spans, saving_seen(self._say_saved), following:
                self.step.run(remember)

        if self.step.device == "cuda":
            self.peaks = cuda.peaks_during(steady)
        else:
            steady()

    def _say_saved(self, tensor: Tensor) -> None:
        recording.mark(f"saved {tensor.untyped_storage().data_ptr()} {self.attribution.unit}")


@dataclass
class _Block:
    """A piece of memory from its allocation to its release (far away where it outlives the recording)."""

    address: int
    size: int
    begin_ns: int
    within_one_operator: bool = False
    end_ns: int = 2**63
    saved_by: int | None = None


class _History:
    """A recording read: every block from begin to end, what it is, and how live bytes change during the step."""

    def __init__(self, step: _RecordedStep, events: Sequence[Event]) -> None:
        events = _without_doubled_numbers(events)
        self._step, self._events = step, events
        self._begin = _time_of("step", events)
        self._end = _time_of("end", events)
        self._block_of = _blocks(events)
        self._blocks = list({id(block): block for block in self._block_of.values()}.values())
        self.resident = dict.fromkeys(CATEGORIES, 0) | step.resident
        self.resident["workspace"] += step.unaccounted
        self.changes: list[Change] = []
        for number, event in enumerate(events):
            if not isinstance(event, Allocation) or number not in self._block_of:
                continue
            category = self._category(self._block_of[number])
            if event.time_ns < self._begin:
                self.resident[category] += event.size
                continue
            name, unit = step.spans.operators[event.span] if event.span != NO_SPAN else ("", 0)
            self.changes.append(Change(event.size, category, name, unit, (event.time_ns - self._begin) / 1000))

    def tensor_peak(self) -> int:
        """The most live bytes at the end of an operator, of storages that operators see."""
        live = peak = sum(self._step.resident.values())
        unseen = self._saved_numbers()
        for number, event in enumerate(self._events):
            if isinstance(event, Allocation):
                live += 0 if number in unseen else event.size
            elif isinstance(event, SpanEnd):
                peak = max(peak, live)
        return peak

    def _saved_numbers(self) -> set[int]:
        """The events of numbers that autograd keeps as tensors: no operator sees those."""
        blocks: list[_Block] = []
        waiting: list[_Block] = []
        for number, event in enumerate(self._events):
            if isinstance(event, Allocation) and event.span == NO_SPAN and event.size == NUMBER_BYTES:
                waiting.append(self._block_of[number])
            elif isinstance(event, SpanEnd):
                blocks += waiting if self._step.spans.operators[event.span][0] in SAVING else []
                waiting.clear()
        ours = set(map(id, blocks))
        return {number for number, block in self._block_of.items() if id(block) in ours}

    def saved_by_unit(self) -> dict[int, int]:
        """The most bytes saved for backward at once, by the unit that saved them first."""
        saved: dict[int, list[tuple[int, int, int]]] = {}
        for block in self._blocks:
            if block.saved_by is not None and self._category(block) == "activations":
                saved.setdefault(block.saved_by, []).append((block.size, block.begin_ns, block.end_ns))
        return {unit: most_at_once(lives) for unit, lives in saved.items()}

    def _category(self, block: _Block) -> Category:
        # An address is used again and again: only what is there before or after the step is known by it.
        if block.end_ns > self._end or block.begin_ns < self._begin:
            for category, addresses in self._step.known.items():
                if block.address in addresses:
                    return category
            if block.begin_ns < self._begin:
                return "workspace"  # kept by a kernels' library
        if block.saved_by is not None:
            return "activations"
        return "workspace" if block.within_one_operator else "temporaries"


def _without_doubled_numbers(events: Sequence[Event]) -> list[Event]:
    """Events without those of Python's numbers that are made into tensors twice because a dispatch mode looks on.

    A number that is an operator's operand becomes a tensor of 8 bytes when the operator is called. With a mode that
    happens before the mode is asked, outside every span, and once more when the mode calls the operator.
    """
    opened: dict[int, tuple[int, int]] = {}  # by address: the event's number and how many spans had ended
    ended, doubled = 0, set[int]()
    for number, event in enumerate(events):
        if isinstance(event, SpanEnd):
            ended += 1
        elif isinstance(event, Allocation) and event.span == NO_SPAN and event.size == NUMBER_BYTES:
            opened[event.address] = (number, ended)
        elif isinstance(event, Allocation) and event.size == -NUMBER_BYTES and event.address in opened:
            begin, ended_before = opened.pop(event.address)
            if event.span == NO_SPAN and ended == ended_before + 1:
                doubled |= {begin, number}
    return [event for number, event in enumerate(events) if number not in doubled]


def _time_of(name: str, events: Iterable[Event]) -> int:
    return next(event.time_ns for event in events if isinstance(event, Mark) and event.name == name)


def _blocks(events: Sequence[Event]) -> dict[int, _Block]:
    """The block of each allocation and release, by the event's number; releases of what was there before have none."""
    open_blocks: dict[int, tuple[_Block, int]] = {}
    blocks: dict[int, _Block] = {}
    for number, event in enumerate(events):
        if isinstance(event, Mark) and event.name.startswith("saved "):
            _, address, unit = event.name.split()
            if int(address) in open_blocks:
                block, _span = open_blocks[int(address)]
                block.saved_by = int(unit) if block.saved_by is None else block.saved_by
        if not isinstance(event, Allocation):
            continue
        if event.size > 0:
            block = _Block(event.address, event.size, event.time_ns)
            open_blocks[event.address] = (block, event.span)
        elif event.address in open_blocks:
            block, begun_in = open_blocks.pop(event.address)
            block.end_ns, block.within_one_operator = event.time_ns, begun_in == event.span != NO_SPAN
        else:
            continue
        blocks[number] = block
    return blocks


def _addresses(tensors: Iterable[Tensor]) -> set[int]:
    """Where the storages of tensors lie in memory."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}
