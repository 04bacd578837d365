"""Learning operators' scratch memory: each new signature is run once alone on this device, and kept on disk."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slt_planner.config import Config, StepSpec
from slt_planner.errors import UnsupportedLayerError
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory import cuda, known, recording
from slt_planner.memory.operators import NO_OPERATORS, Operator, forget, operator_of
from slt_planner.memory.recording import Event, Mark
from slt_planner.memory.simulate import simulate
from slt_planner.memory.step import SteadyStep, threads

_AT_ONCE = 64


@dataclass(frozen=True)
class Calibration:
    """What a calibration did: operators that its steps use, those that were run, and how long it took.

    `largest_bytes` is the most that was alive for one of those: its arguments, its outputs and its scratch memory.
    """

    operators: int
    learned: int
    largest_bytes: int
    seconds: float


def calibrate(
    graph: ModelGraph,
    configs: Sequence[Config],
    spec: StepSpec,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Calibration:
    """Learn the scratch memory of the operators of these steps that are not known on this device yet.

    Each is run once, alone, on zeros; no more is alive than that operator needs (`Calibration.largest_bytes`), though
    the C library may keep more of the process resident. What is learned is kept under the user's cache folder (or the
    folder that the variable SLT_CACHE names), by processor, torch version and number
    of threads.

    Args:
        graph: the traced network.
        configs: the configurations to predict later.
        spec: the step.
        progress: told how many operators are done, and of how many.

    Raises:
        InputError: a configuration goes beyond the network's units, no such device, or the cache cannot be written.

    >>> from slt_planner.graph.trace import trace
    >>> from slt_planner.models.registry import load_model
    >>> from slt_planner.memory.predict import predict
    >>> graph, spec = trace(load_model("resnet20"), (3, 32, 32)), StepSpec(batch_size=2)
    >>> calibrate(graph, [Config.full_network()], spec).operators > 50
    True
    >>> predict(graph, Config.full_network(), spec).exact
    True
    """
    cuda.check(spec.device)
    began, learned, total, largest = time.perf_counter(), 0, 0, 0
    with threads(spec) as number:
        while True:
            operators = _operators(graph, configs, spec)
            growths = known.growths(spec.device, number)
            new = [operator for signature, operator in operators.items() if signature not in growths]
            total += len(new)
            as_foreseen = True
            for run in learn(new, spec.device, number):
                learned += run.operators
                largest = max(largest, run.largest_bytes)
                as_foreseen &= run.as_foreseen
                progress(learned, total)
            if as_foreseen:  # else what comes after those operators may be others
                return Calibration(len(operators), learned, largest, time.perf_counter() - began)


def calibrate_as_run(step: SteadyStep, spec: StepSpec) -> None:
    """As `calibrate`, for a step that no simulation shows, such as one of views: it is run to see its operators."""
    with threads(spec) as number:
        step.prepare()
        batch, labels = step.example_batch()
        with _Seen() as seen:
            step.train(batch, labels)
        growths = known.growths(spec.device, number)
        new = [operator for signature, operator in seen.operators.items() if signature not in growths]
        for _ in learn(new, spec.device, number):
            pass


class _Seen(TorchDispatchMode):
    """Collects the operators that run, by signature."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: dict[str, Operator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in NO_OPERATORS:
            with suppress(UnsupportedLayerError):  # what can only be measured is not learned
                operator = operator_of(func, args, kwargs)
                if not operator.gives_views_only:
                    self.operators[operator.signature] = operator
        return func(*args, **kwargs)


@dataclass(frozen=True)
class LearnedSome:
    """Operators that were run alone, the most that was alive for one, and whether all gave what was foreseen."""

    operators: int
    largest_bytes: int
    as_foreseen: bool


def learn(operators: Sequence[Operator], device: str, number_of_threads: int) -> Iterator[LearnedSome]:
    """Run operators alone, some at a time, and keep what is learned.

    Where their outputs are not those that were foreseen, simulated steps that use them are no longer true.
    """
    for some in (operators[i : i + _AT_ONCE] for i in range(0, len(operators), _AT_ONCE)):
        results = _run_alone(some, device)
        known.keep_growths(device, number_of_threads, {o.signature: growth for o, growth, _ in results})
        layouts = {o.signature: layout for o, _, layout in results if layout is not None}
        if layouts:
            known.keep_layouts(device, layouts)
            forget()
        largest = max(operator.argument_bytes + growth for operator, growth, _ in results)
        yield LearnedSome(len(some), largest, not layouts)


def _operators(graph: ModelGraph, configs: Sequence[Config], spec: StepSpec) -> dict[str, Operator]:
    """The operators that these steps use, by signature."""
    return {
        call.operator.signature: call.operator
        for config in configs
        for call in simulate(graph, config, spec, details=False).calls
        if not call.operator.gives_views_only
    }


def _run_alone(operators: Sequence[Operator], device: str) -> list[tuple[Operator, int, known.Layout | None]]:
    """How live bytes grow in each operator, and the layout of its outputs where that is not what was foreseen."""
    layouts: list[known.Layout | None] = []

    def work() -> None:
        for number, operator in enumerate(operators):
            call = operator.real_call()
            if device == "cuda":  # what kernels' libraries keep for ever comes with the first call
                call()
            recording.mark(f"begin {number}")
            outputs = call()
            recording.mark(f"end {number}")
            layouts.append(operator.other_layout(outputs))
            del outputs, call

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        events = recording.record(work, device)
    growths: list[int] = []
    inside: list[Event] = []
    for event in events:
        if isinstance(event, Mark):
            if event.name.startswith("end "):
                growths.append(recording.peak_growth(inside))
            inside = []
        else:
            inside.append(event)
    return list(zip(operators, growths, layouts, strict=True))
