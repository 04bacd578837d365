"""Predicting a training step's memory: a simulated step, and what is known of each operator's scratch memory."""

from collections.abc import Iterator, Mapping

import numpy as np

from slt_planner.config import Config, StepSpec
from slt_planner.environment import environment
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory import known
from slt_planner.memory.operators import Operator
from slt_planner.memory.profile import CATEGORIES, Category, MemoryProfile
from slt_planner.memory.simulate import SimulatedStep, simulate
from slt_planner.memory.step import device_name, threads
from slt_planner.memory.storages import Column
from slt_planner.memory.timeline import Change, Peak, timeline
from slt_planner.memory.watch import Call


def predict(graph: ModelGraph, config: Config, spec: StepSpec, details: bool = True) -> MemoryProfile:
    """Peak memory of one steady training step, without running a kernel or allocating the network.

    The tensor ruler (live storages at the end of each operator) needs nothing else and is exact. The allocator ruler
    adds the scratch memory inside operators, which `calibrate` learns once a device; where an operator is not known,
    the profile has ``exact`` False, ``missing`` names it, and ``peak_bytes`` is the tensor peak.

    Args:
        graph: the traced network.
        config: what is frozen, trained at full width, and scaled.
        spec: the step.
        details: also make the unit rows and the timeline.

    Raises:
        InputError: the configuration goes beyond the network's units, or its shapes depend on data.

    >>> from slt_planner.graph.trace import trace
    >>> from slt_planner.models.registry import load_model
    >>> graph = trace(load_model("resnet20"), (3, 32, 32))
    >>> config = Config(freeze_depth=4, full_depth=5, head_scale=0.5)
    >>> predict(graph, config, StepSpec(batch_size=32)).tensor_peak_bytes
    22255040
    """
    with threads(spec) as number:
        step = simulate(graph, config, spec, details)
        return profile_of(step, config, spec, number, details)


def profile_of(
    step: SimulatedStep, config: Config, spec: StepSpec, number_of_threads: int, details: bool
) -> MemoryProfile:
    """What is known of operators now, put on a simulated step."""
    growths = known.growths(spec.device, number_of_threads)
    missing = missing_operators(step, growths)
    history = _History(step, {} if missing else growths, _BLOCK_BYTES[spec.device])
    peak = history.peak()
    return MemoryProfile(
        config=config,
        spec=spec.model_copy(update={"threads": number_of_threads}),
        source="PREDICTED",
        exact=not missing,
        missing=tuple(sorted(missing)),
        peak_bytes=peak.size,
        tensor_peak_bytes=step.tensor_peak_bytes,
        peak_operator=peak.operator,
        peak_unit=peak.unit,
        peak_phase=peak.phase,
        device=device_name(spec.device, number_of_threads),
        batch_size=spec.batch_size,
        breakdown=peak.breakdown,
        resident=history.resident,
        environment=environment(number_of_threads),
        units=step.units,
        timeline=timeline(history.resident, history.changes()) if details else (),
    )


def missing_operators(step: SimulatedStep, growths: Mapping[str, int]) -> dict[str, Operator]:
    """The operators of a step whose scratch memory is not known, by signature."""
    return {call.operator.signature: call.operator for call in step.calls if _growth(call, growths) is None}


_BLOCK_BYTES = {"cpu": 1, "cuda": 512}
"""The allocator gives out multiples of this."""


def _growth(call: Call, growths: Mapping[str, int]) -> int | None:
    """The most that live bytes rise while an operator runs, its outputs included; None where it is not known."""
    return 0 if call.operator.gives_views_only else growths.get(call.operator.signature)


class _History:
    """How live bytes change during a simulated step: what is there at its begin, and its peak."""

    def __init__(self, step: SimulatedStep, growths: Mapping[str, int], block: int) -> None:
        self._calls, self._storages = step.calls, step.storages.in_blocks(block)
        self._growths = np.array([_growth(call, growths) or 0 for call in step.calls], dtype=np.int64)
        self.resident = _named(self._storages.by_category(self._storages.resident))

    def peak(self) -> Peak:
        """The first moment with the most live bytes; inside an operator its outputs count as there already."""
        count = len(self._calls)
        born, gone = self._storages.born(count), self._storages.gone(count)
        scratch = np.maximum(self._growths - born, 0)
        begin = sum(self.resident.values())
        live = begin + (born - gone).cumsum()
        at = int((live + scratch).argmax())
        if live[at] + scratch[at] <= begin:
            return Peak(begin, self.resident, "(none)", 0)
        there = (self._storages.begin <= at) & (self._storages.end > at)
        breakdown = _named(self._storages.by_category(there)) | {"workspace": int(scratch[at])}
        call = self._calls[at]
        return Peak(int(live[at] + scratch[at]), breakdown, call.operator.name, call.unit, call.phase)

    def changes(self) -> Iterator[Change]:
        """One after the other."""
        born, gone = self._by_call(self._storages.begin), self._by_call(self._storages.end)
        for number, call in enumerate(self._calls):
            for size, category in gone.get(number, ()):
                yield Change(-size, category, "", call.unit, phase=call.phase)
            name = call.operator.name
            scratch = int(self._growths[number])
            for size, category in born.get(number, ()):
                yield Change(size, category, name, call.unit, phase=call.phase)
                scratch -= size
            if scratch > 0:
                yield Change(scratch, "workspace", name, call.unit, phase=call.phase)
                yield Change(-scratch, "workspace", name, call.unit, phase=call.phase)

    def _by_call(self, places: Column) -> dict[int, list[tuple[int, Category]]]:
        found: dict[int, list[tuple[int, Category]]] = {}
        columns = (places, self._storages.size, self._storages.category)
        for place, size, category in zip(*(column.tolist() for column in columns), strict=True):
            found.setdefault(place, []).append((size, CATEGORIES[category]))
        return found


def _named(bytes_by_category: Column) -> dict[Category, int]:
    return dict(zip(CATEGORIES, bytes_by_category.tolist(), strict=True))
