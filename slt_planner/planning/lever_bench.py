"""Levers of the whole network's training step, and a bench that measures its peak and time with them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from slt_planner.config import Config, LeanLever, StepSpec
from slt_planner.errors import InputError
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory.measure import measure
from slt_planner.memory.predict import predict
from slt_planner.memory.profile import MemoryProfile
from slt_planner.memory.step import SteadyStep
from slt_planner.planning.levers import Alternative, Change, joined
from slt_planner.planning.step_times import paired_times
from slt_planner.submodel.extract import extract
from slt_planner.units import LARGEST_BYTES


@dataclass(frozen=True)
class Lever:
    """A way to need less memory: in words, what it changes, and the step with it."""

    words: str
    changes: tuple[Change, ...]
    applied: Callable[[StepSpec], StepSpec]


Levers: TypeAlias = tuple[Lever, ...]
_LEAN: tuple[LeanLever, ...] = ("in_place_prefix", "copied_cuts", "lean_norms")  # those that micro-batches go with


def levers_of(graph: ModelGraph, spec: StepSpec) -> list[Levers]:
    """Levers but micro-batches; of each group one can be used at a time."""
    precisions = {"fp32": ("bf16", "autocast"), "autocast": ("bf16",), "bf16": ()}[spec.precision]
    groups = [tuple(_with(precision, ("number_format",), precision=precision) for precision in precisions)]
    if spec.memory_format == "contiguous" and len(graph.input_shape) == 3:
        groups.append((_with("channels_last", (), memory_format="channels_last"),))
    if spec.optimizer.name != "sgd":
        groups.append((_optimizer("SGD momentum 0.9", momentum=0.9), _optimizer("SGD without momentum", momentum=0.0)))
    elif spec.optimizer.momentum > 0:
        groups.append((_optimizer("SGD without momentum", momentum=0.0),))
    if spec.optimizer.foreach:
        groups.append((Lever("no foreach", (), lambda own: _with_optimizer(own, foreach=False)),))
    if not spec.levers:
        groups.append((_lean("lean operators", *_LEAN), _lean("lean operators and recompute", *_LEAN, "recompute")))
    if not spec.set_to_none:
        groups.append((_with("set_to_none", (), set_to_none=True),))
    return groups


def _lean(words: str, *levers: LeanLever) -> Lever:
    return _with(words, (), levers=levers)


def _with(words: str, changes: tuple[Change, ...], **update: object) -> Lever:
    return Lever(words, changes, lambda spec: spec.model_copy(update=update))


def _optimizer(words: str, momentum: float) -> Lever:
    return Lever(words, ("optimizer",), lambda spec: _with_optimizer(spec, name="sgd", momentum=momentum))


def _with_optimizer(spec: StepSpec, **update: object) -> StepSpec:
    return spec.model_copy(update={"optimizer": spec.optimizer.model_copy(update=update)})


def micro_batches(graph: ModelGraph, size: int) -> Lever:
    """The lever that is not in `levers_of`: it comes in sizes."""
    changes: dict[Change, bool] = {
        "batch_statistics": graph.has_batch_norm,
        "loss_weights": not graph.adapter.loss_is_mean,
    }
    changed = tuple(change for change, is_so in changes.items() if is_so)
    return _with(f"micro-batches of {size}", changed, micro_batch=size)


def micro_batch_sizes(graph: ModelGraph, spec: StepSpec) -> list[int]:
    """Micro-batches smaller than the step's own, largest first, each of fewer samples at once than the one before."""
    batch, smallest = spec.batch_size, 2 if graph.has_batch_norm else 1
    counts = range(len(spec.pieces(batch)) + 1, batch + 1)
    sizes = sorted({-(-batch // count) for count in counts}, reverse=True)
    return [size for size in sizes if min(spec.model_copy(update={"micro_batch": size}).pieces(batch)) >= smallest]


def _applied(spec: StepSpec, levers: Levers) -> StepSpec:
    for lever in levers:
        spec = lever.applied(spec)
    return spec


def words_of(levers: Levers) -> tuple[str, ...]:
    """Each lever as it is said."""
    return tuple(lever.words for lever in levers)


def changes_of(levers: Levers) -> tuple[Change, ...]:
    """What the levers change together, each once."""
    return tuple(dict.fromkeys(change for lever in levers for change in lever.changes))


class LeverBench:
    """Measures steps of the whole network, each once; one that this network does not take has a reason instead."""

    def __init__(self, graph: ModelGraph, spec: StepSpec, progress: Callable[[str], None]) -> None:
        self.graph, self.spec, self._progress = graph, spec, progress
        self._config = Config.full_network()
        progress("the plain step")
        self.plain_profile = self._measure(spec)
        self._peaks: dict[StepSpec, int | str] = {spec: self.plain_profile.peak_bytes}
        self._bounds: dict[StepSpec, int] = {}
        self._alternatives: dict[StepSpec, Alternative] = {}

    def bound(self, levers: Levers) -> int:
        """What a step needs at least: its tensors, predicted to the byte; where that cannot be, as measured.

        A step that cannot be run needs more than there is.
        """
        spec = _applied(self.spec, levers)
        if spec not in self._bounds:
            try:
                self._bounds[spec] = predict(self.graph, self._config, spec, details=False).tensor_peak_bytes or 0
            except (InputError, RuntimeError):  # if it is the step's own fault, measuring says so
                peak = self.peak(levers)
                self._bounds[spec] = peak if isinstance(peak, int) else LARGEST_BYTES + 1
        return self._bounds[spec]

    def peak(self, levers: Levers) -> int | str:
        """As measured; or why the step cannot be run, though the plain one can."""
        spec = _applied(self.spec, levers)
        if spec not in self._peaks:
            self._progress(joined(words_of(levers)))
            try:
                self._peaks[spec] = self._measure(spec).peak_bytes
            except (InputError, RuntimeError) as error:  # torch has no error of its own for kernels that are missing
                self._peaks[spec] = (str(error).strip() or type(error).__name__).splitlines()[0]
        return self._peaks[spec]

    def alternative(self, levers: Levers) -> Alternative:
        """The levers with their figures."""
        spec = _applied(self.spec, levers)
        if spec not in self._alternatives:
            peak = self.peak(levers)
            seconds, ratio = self._times(spec) if isinstance(peak, int) else (None, None)
            self._alternatives[spec] = Alternative(
                levers=words_of(levers),
                changes=changes_of(levers),
                spec=spec,
                peak_bytes=peak if isinstance(peak, int) else None,
                step_s=seconds,
                relative_time=ratio,
                refused=None if isinstance(peak, int) else peak,
            )
        return self._alternatives[spec]

    def _measure(self, spec: StepSpec) -> MemoryProfile:
        return measure(extract(self.graph, None, self._config, spec.norms), spec, details=False)

    def _times(self, spec: StepSpec) -> tuple[float, float]:
        """Median seconds of a step, and its median ratio to the plain one; they run by turns."""
        plain = self._plain_step
        other = plain if spec == self.spec else SteadyStep.of(self.graph, self._config, spec)
        return paired_times(plain, other)

    @cached_property
    def _plain_step(self) -> SteadyStep:
        return SteadyStep.of(self.graph, self._config, self.spec)
