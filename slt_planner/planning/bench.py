"""What steps of one network need: foreseen first, measured where a plan is to be proven. A measurement decides."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from slt_planner.config import Config, StepSpec
from slt_planner.errors import InputError, UnsupportedLayerError
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory import cuda
from slt_planner.memory.flops import step_costs, training_flops
from slt_planner.memory.forecast import Forecaster
from slt_planner.memory.measure import measure
from slt_planner.memory.profile import MemoryProfile, StepCosts
from slt_planner.memory.step import as_trained
from slt_planner.planning.search import SearchSpace
from slt_planner.submodel.extract import extract

_AnswerT = TypeVar("_AnswerT")
Progress = Callable[[str, int, int | None], None]
"""Told what is done (``searching`` or ``measuring``), how many steps were looked at, and of how many, if known."""


def silent(what: str, done: int, of: int | None) -> None:
    """A progress that tells nobody."""


class Bench:
    """Foresees and measures configurations of one network, each once; as a context, it keeps what it foresaw on disk.

    A network whose step depends on values cannot be foreseen: then every peak is measured.

    Raises:
        InputError: no such device, or, without measuring, a network that cannot be foreseen.
    """

    def __init__(self, graph: ModelGraph, spec: StepSpec, measuring: bool = True, progress: Progress = silent) -> None:
        cuda.check(spec.device)
        self.graph, self.spec = graph, spec
        self._measuring, self._progress = measuring, progress
        self._measured: dict[Config, MemoryProfile] = {}
        self._asked: set[Config] = set()
        self._forecaster: Forecaster | None = Forecaster(graph, spec)
        self._foreseen(lambda forecaster: forecaster.forecast(self.whole))

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

    @property
    def whole(self) -> Config:
        """The whole network, trained end to end."""
        return self.space().config(0, 0, 1.0)

    def space(self) -> SearchSpace:
        """What is searched."""
        return SearchSpace(self.graph.depth, self.graph.head_scales, self.peak, self._at_least)

    def peak(self, config: Config) -> int:
        """What a step needs on the allocator ruler: as measured, if it was, or as predicted."""
        return self.profile(config).peak_bytes

    def _at_least(self, config: Config) -> int:
        """The tensor ruler: the allocator's needs scratch memory beside."""
        self._count(config)
        if config not in self._measured:
            forecast = self._foreseen(lambda forecaster: forecaster.forecast(config))
            if forecast is not None:
                return forecast.tensor_peak_bytes
        return self.peak(config)

    def profile(self, config: Config) -> MemoryProfile:
        """The step of a configuration: as measured, if it was, or as predicted."""
        self._count(config)
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

    def measure_all(self, configs: Iterable[Config]) -> bool:
        """Measure these steps; whether one of them was not measured before."""
        wanted = dict.fromkeys(configs)
        missing = [config for config in wanted if config not in self._measured]
        for number, config in enumerate(missing, start=1):
            self.measure(config)
            self._progress("measuring", len(wanted) - len(missing) + number, len(wanted))
        return bool(missing)

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

    def __enter__(self) -> "Bench":
        """Keep what is foreseen until the end for the next time."""
        return self

    def __exit__(self, *_: object) -> None:
        """Write to disk what was foreseen, however the search ended."""
        if self._forecaster is not None:
            self._forecaster.keep()

    def _run(self, config: Config, details: bool) -> MemoryProfile:
        return measure(extract(self.graph, None, config, self.spec.norms), self.spec, details=details)

    def _count(self, config: Config) -> None:
        if config not in self._asked:
            self._asked.add(config)
            self._progress("searching", len(self._asked), None)
