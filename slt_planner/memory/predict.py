"""Predicting a training step's memory: a simulated step, and what is known of each operator's scratch memory."""

from collections.abc import Iterator, Mapping

from slt_planner.config import Config, StepSpec
from slt_planner.environment import environment
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory import known
from slt_planner.memory.operators import Operator
from slt_planner.memory.profile import CATEGORIES, Category, MemoryProfile
from slt_planner.memory.simulate import Call, SimulatedStep, simulate
from slt_planner.memory.step import device_name, threads
from slt_planner.memory.timeline import Change, find_peak, timeline


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
    peak = find_peak(history.resident, history.changes)
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
        timeline=timeline(history.resident, history.changes) if details else (),
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
    """How live bytes change during a simulated step."""

    def __init__(self, step: SimulatedStep, growths: Mapping[str, int], block: int) -> None:
        self.resident: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
        born: dict[int, list[tuple[int, Category]]] = {}
        gone: dict[int, list[tuple[int, Category]]] = {}
        for storage in step.storages:
            saved = storage.saved_by is not None and storage.category == "temporaries"
            size = -(-storage.size // block) * block
            entry = (size, "activations" if saved else storage.category)
            if storage.begin < 0:
                self.resident[storage.category] += size
            else:
                born.setdefault(storage.begin, []).append(entry)
            gone.setdefault(storage.end, []).append(entry)
        self.changes = list(self._changes(step.calls, born, gone, growths))

    @staticmethod
    def _changes(
        calls: list[Call],
        born: Mapping[int, list[tuple[int, Category]]],
        gone: Mapping[int, list[tuple[int, Category]]],
        growths: Mapping[str, int],
    ) -> Iterator[Change]:
        for number, call in enumerate(calls):
            for size, category in gone.get(number, ()):
                yield Change(-size, category, "", call.unit, phase=call.phase)
            name = call.operator.name
            scratch = _growth(call, growths) or 0
            for size, category in born.get(number, ()):
                yield Change(size, category, name, call.unit, phase=call.phase)
                scratch -= size
            if scratch > 0:
                yield Change(scratch, "workspace", name, call.unit, phase=call.phase)
                yield Change(-scratch, "workspace", name, call.unit, phase=call.phase)
