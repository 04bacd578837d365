"""What steps of one network need: foreseen first, measured where a plan is to be proven. A measurement decides."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

from slt_planner.config import Config, LeverSet, StepSpec
from slt_planner.errors import InputError, UnsupportedLayerError
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory import cuda
from slt_planner.memory.flops import step_costs, training_flops
from slt_planner.memory.forecast import Forecaster
from slt_planner.memory.measure import measure
from slt_planner.memory.profile import MemoryProfile, StepCosts
from slt_planner.memory.step import SteadyStep, as_trained
from slt_planner.planning.search import SearchSpace
from slt_planner.planning.step_times import paired_times
from slt_planner.submodel.extract import extract

_AnswerT = TypeVar("_AnswerT")
Progress = Callable[[str, int, int | None], None]
"""Told what is done (``searching`` or ``measuring``), how many steps were looked at, and of how many, if known."""

_SEARCHED = 2
_ENOUGH_S = 0.3


def silent(what: str, done: int, of: int | None) -> None:
    """A progress that tells nobody."""


class StepBench:
    """Foresees and measures configurations of one network at one step, each once; `levers` are those of the step.

    A network whose step depends on values cannot be foreseen: then every peak is measured.

    Raises:
        InputError: without measuring, a network that cannot be foreseen.
    """

    def __init__(self, graph: ModelGraph, spec: StepSpec, levers: LeverSet, measuring: bool) -> None:
        self.graph, self.spec, self.levers = graph, spec.with_levers(levers), levers
        self._measuring = measuring
        self._measured: dict[Config, MemoryProfile] = {}
        self._forecaster: Forecaster | None = Forecaster(graph, self.spec)

    def _foreseen(self, ask: Callable[[Forecaster], _AnswerT]) -> _AnswerT | None:
        """What the forecaster says; None, from then on, if a step turns out to be one that it cannot foresee."""
        if self._forecaster is None:
            return None
        try:
            return ask(self._forecaster)
        except UnsupportedLayerError as error:
            if not self._measuring:
                raise InputError(f"the steps of this network can only be measured: {error}") from error
            self._forecaster = None
            return None

    @property
    def predicts(self) -> bool:
        """Whether steps can be foreseen; else every peak is measured."""
        return self._forecaster is not None

    def at_least(self, config: Config) -> int:
        """The tensor ruler: the allocator's needs scratch memory beside."""
        if config not in self._measured:
            forecast = self._foreseen(lambda forecaster: forecaster.forecast(config))
            if forecast is not None:
                return forecast.tensor_peak_bytes
        return self.profile(config).peak_bytes

    def profile(self, config: Config) -> MemoryProfile:
        """The step of a configuration: as measured, if it was, or as predicted."""
        return self._measured.get(config) or self.predicted(config) or self.measure(config)

    def predicted(self, config: Config) -> MemoryProfile | None:
        """The step as predicted; None for a network that cannot be foreseen."""
        return self._foreseen(lambda forecaster: forecaster.profile(config))

    def measured(self, config: Config) -> MemoryProfile | None:
        """The step as measured, if it was."""
        return self._measured.get(config)

    def measure(self, config: Config) -> MemoryProfile:
        """The step, measured now if it was not yet."""
        if config not in self._measured:
            self._measured[config] = self._run(config, details=False)
        return self._measured[config]

    def detailed(self, config: Config) -> MemoryProfile:
        """The step's profile with a row a unit, and the moment of its peak."""
        return self._foreseen(lambda forecaster: forecaster.detailed(config)) or self._run(config, details=True)

    def costs(self, config: Config) -> StepCosts:
        """What a client computes and sends in a step's round."""
        forecast = self._foreseen(lambda forecaster: forecaster.forecast(config))
        if forecast is not None:
            return forecast.costs
        sub = as_trained(extract(self.graph, None, config, self.spec.norms), self.spec)
        return step_costs(sub, training_flops(sub))

    def keep(self) -> None:
        """Write to disk what was foreseen."""
        if self._forecaster is not None:
            self._forecaster.keep()

    def _run(self, config: Config, details: bool) -> MemoryProfile:
        return measure(extract(self.graph, None, config, self.spec.norms), self.spec, details=details)


class Bench:
    """What configurations of one network need, with the set of levers that makes it least; as a context, it keeps what
    it foresaw on disk.

    `lever_sets` may be used, the cheapest in step time first. The last two are looked at in a search; all of them where
    it ends (`examine`), so that nothing is claimed that one of them refutes.

    Raises:
        InputError: no such device, or, without measuring, a network that cannot be foreseen.
    """

    def __init__(
        self,
        graph: ModelGraph,
        spec: StepSpec,
        measuring: bool = True,
        progress: Progress = silent,
        lever_sets: Sequence[LeverSet] = ((),),
    ) -> None:
        cuda.check(spec.device)
        self.graph, self.spec, self.lever_sets = graph, spec, tuple(lever_sets)
        self._progress = progress
        self._asked: set[Config] = set()
        self._examined: set[Config] = set()
        self._times: dict[tuple[Config, LeverSet], float] = {}
        self._steps = {levers: StepBench(graph, spec, levers, measuring) for levers in lever_sets}
        self.plain.at_least(self.whole)

    @property
    def plain(self) -> StepBench:
        """Steps with the first set of levers: usually without any."""
        return self._steps[self.lever_sets[0]]

    def with_levers(self, levers: LeverSet) -> StepBench:
        """Steps with one of the sets."""
        return self._steps[levers]

    @property
    def predicts(self) -> bool:
        """Whether steps can be foreseen; else every peak is measured."""
        return all(step.predicts for step in self._steps.values())

    @property
    def whole(self) -> Config:
        """The whole network, trained end to end."""
        return self.space().config(0, 0, 1.0)

    def space(self) -> SearchSpace:
        """What is searched."""
        return SearchSpace(self.graph.depth, self.graph.head_scales, self.peak, self._at_least)

    def peak(self, config: Config) -> int:
        """The least that a step needs on the allocator ruler: as measured, if it was, or as predicted."""
        return self.leanest(config).profile(config).peak_bytes

    def leanest(self, config: Config) -> StepBench:
        """The step that needs least. What a bound excludes is not looked at closer."""
        self._count(config)
        best, *others = sorted(self._considered(config), key=lambda step: step.at_least(config))
        for step in others:
            if step.at_least(config) < best.profile(config).peak_bytes:
                best = min(best, step, key=lambda own: own.profile(config).peak_bytes)
        return best

    def cheapest(self, config: Config, budget: int) -> LeverSet | None:
        """The first set of levers with which a configuration fits a budget; None if there is none."""
        for levers, step in self._steps.items():
            if step.at_least(config) <= budget and step.profile(config).peak_bytes <= budget:
                return levers
        return None

    def _at_least(self, config: Config) -> int:
        self._count(config)
        return min(step.at_least(config) for step in self._considered(config))

    def _considered(self, config: Config) -> list[StepBench]:
        steps = list(self._steps.values())
        return steps if config in self._examined else steps[-_SEARCHED:]

    def examine(self, configs: Iterable[Config]) -> bool:
        """From now on consider these with every set of levers; whether some were not before."""
        new = set(configs) - self._examined
        self._examined |= new
        return bool(new) and len(self._steps) > _SEARCHED

    def relative_time(self, config: Config, levers: LeverSet) -> float:
        """The time of a step with levers, next to that of the plain one; they run by turns."""
        key = (config, levers)
        if key not in self._times:
            plain, own = (SteadyStep.of(self.graph, config, spec) for spec in (self.spec, self._steps[levers].spec))
            self._times[key] = paired_times(plain, own, _ENOUGH_S)[1]
        return self._times[key]

    def measure_least(self, config: Config) -> bool:
        """Measure the step that needs least, until that is a measured one; whether anything new was learned."""
        anything = self.examine([config])
        while (step := self.leanest(config)).measured(config) is None:
            step.measure(config)
            anything = True
        return anything

    def measure_fitting(self, config: Config, budget: int) -> bool:
        """Measure the cheapest step that fits, if it was not; whether it was measured now."""
        levers = self.cheapest(config, budget)
        if levers is None or self._steps[levers].measured(config) is not None:
            return False
        self._steps[levers].measure(config)
        return True

    def measure_all(self, within: Iterable[tuple[Config, int]], over: Iterable[Config]) -> bool:
        """Measure what fits its budget, with the cheapest levers, and what does not, with the leanest.

        Whether anything new was learned.
        """
        work = [partial(self.measure_fitting, *own) for own in dict.fromkeys(within)]
        work += [partial(self.measure_least, config) for config in dict.fromkeys(over)]
        anything = False
        for number, measure_one in enumerate(work, start=1):
            anything |= measure_one()
            self._progress("measuring", number, len(work))
        return anything

    def __enter__(self) -> "Bench":
        """Keep what is foreseen until the end for the next time."""
        return self

    def __exit__(self, *_: object) -> None:
        """Write to disk what was foreseen, however the search ended."""
        for step in self._steps.values():
            step.keep()

    def _count(self, config: Config) -> None:
        if config not in self._asked:
            self._asked.add(config)
            self._progress("searching", len(self._asked), None)
