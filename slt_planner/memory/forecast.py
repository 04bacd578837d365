"""Forecasts of a network's training steps: predicted, calibrated where that is needed, and kept between processes."""

from collections.abc import Mapping

from torch import nn

from slt_planner.config import Config, Record, StepSpec
from slt_planner.environment import digest
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory import known
from slt_planner.memory.calibrate import learn
from slt_planner.memory.composed import Composer
from slt_planner.memory.predict import missing_operators, profile_of
from slt_planner.memory.profile import MemoryProfile, StepCosts
from slt_planner.memory.simulate import SimulatedStep, simulate
from slt_planner.memory.step import threads

_OPEN_SOURCES = ("torch", "torchvision", "timm", "slt_planner", "_operator", "builtins", "math")


class Forecast(Record):
    """A step as it is foreseen. `profile` is None until the scratch memory of all its operators is known."""

    tensor_peak_bytes: int
    costs: StepCosts
    profile: MemoryProfile | None = None


class Forecaster:
    """Foresees steps of one network, each once.

    What it foresees is kept beside what is known of operators, but for networks with code of the user's own, which may
    change under the same name.
    """

    def __init__(self, graph: ModelGraph, spec: StepSpec) -> None:
        with threads(spec) as number:
            self._spec = spec.model_copy(update={"threads": number})
        self._graph, self._threads = graph, number
        self._made: dict[Config, Forecast] = {}
        self._unsaved: dict[str, str] = {}
        self._last: tuple[Config, SimulatedStep] | None = None
        self._composer = Composer(graph, self._spec)
        self._step = digest(f"{graph.hash} {self._spec.model_dump_json()}") if _is_open(graph) else None

    def forecast(self, config: Config) -> Forecast:
        """What can be foreseen without running an operator: maybe all but the profile.

        Raises:
            UnsupportedLayerError: what the step does depends on values, so that it must be measured.
        """
        if config not in self._made:
            self._made[config] = self._remembered(config) or self._foresee(config)
        return self._made[config]

    def profile(self, config: Config) -> MemoryProfile:
        """The step's memory on the allocator ruler, exact; operators that are not known yet are run alone.

        Raises:
            UnsupportedLayerError: as `forecast`.
        """
        forecast = self.forecast(config)
        return forecast.profile or self._calibrated(config)

    def detailed(self, config: Config) -> MemoryProfile:
        """The step as far as it is known, with a row a unit and its timeline; nothing is run."""
        key = f"{_config_key(config)} with timeline"
        text = self._kept().get(key)
        if text:
            return MemoryProfile.model_validate_json(text)
        with threads(self._spec):
            step = simulate(self._graph, config, self._spec, details=True)
            profile = profile_of(step, config, self._spec, self._threads, details=True)
        self._unsaved[key] = profile.model_dump_json(exclude_none=True)
        return profile

    def keep(self) -> None:
        """Write what was foreseen to disk."""
        if self._step is not None and self._unsaved:
            known.keep_forecasts(self._spec.device, self._threads, self._step, self._unsaved)
            self._unsaved = {}

    def _remembered(self, config: Config) -> Forecast | None:
        text = self._kept().get(_config_key(config))
        return Forecast.model_validate_json(text) if text else None

    def _kept(self) -> Mapping[str, str]:
        return known.forecasts(self._spec.device, self._threads, self._step) if self._step else {}

    def _foresee(self, config: Config) -> Forecast:
        step = self._simulated(config)
        return self._note(config, Forecast(tensor_peak_bytes=step.tensor_peak_bytes, costs=step.costs))

    def _calibrated(self, config: Config) -> MemoryProfile:
        with threads(self._spec):
            while True:
                step = self._simulated(config)
                missing = missing_operators(step, known.growths(self._spec.device, self._threads))
                runs = list(learn(list(missing.values()), self._spec.device, self._threads))
                if all(run.as_foreseen for run in runs):
                    break
                self._made.clear()  # made with outputs that turned out to be others
                self._unsaved.clear()
                self._last = None
            profile = profile_of(step, config, self._spec, self._threads, details=False)
        self._note(config, Forecast(tensor_peak_bytes=step.tensor_peak_bytes, costs=step.costs, profile=profile))
        return profile

    def _simulated(self, config: Config) -> SimulatedStep:
        """The step of a configuration; the last one is at hand, because what comes next often needs it again."""
        if self._last is None or self._last[0] != config:
            with threads(self._spec):
                step = self._composer.step(config) or simulate(self._graph, config, self._spec, details=False)
                self._last = config, step
        return self._last[1]

    def _note(self, config: Config, forecast: Forecast) -> Forecast:
        self._made[config] = forecast
        self._unsaved[_config_key(config)] = forecast.model_dump_json(exclude_none=True)
        return forecast


def _config_key(config: Config) -> str:
    """A configuration as text, exactly."""
    return f"{config.freeze_depth} {config.full_depth} {config.head_scale!r} {config.channels}"


def _is_open(graph: ModelGraph) -> bool:
    """Nothing in the step is of the user's own making, so that the graph's hash tells all of it."""
    made_of: list[type[nn.Module] | type | object] = [type(graph.adapter)]
    for program in graph.programs.values():
        for node in program.graph.nodes:
            if node.op == "call_module":
                made_of.append(type(graph.modules[str(node.target)]))
            elif node.op == "call_function":
                made_of.append(node.target)
    return all((getattr(one, "__module__", None) or "torch").partition(".")[0] in _OPEN_SOURCES for one in made_of)
