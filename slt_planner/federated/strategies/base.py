"""The interface of a federated method: init and apply over a state that is never edited in place."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor, nn

from slt_planner.config import Config, LeverSet
from slt_planner.federated.progress import Progress
from slt_planner.graph.trace import ModelGraph
from slt_planner.submodel.merge import Update, merge


@dataclass(frozen=True)
class ServerState:
    """The global model (a full state dict) after `round` rounds, and what else the next ones depend on."""

    round: int
    weights: Mapping[str, Tensor]
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True)
class ClientStep:
    """What a client trains, and the levers of its step, beside those of the plan's.

    With `widths` each batch trains the sub-model of one of these head scales, drawn by chance; `config` has the widest.
    """

    config: Config
    levers: LeverSet = ()
    widths: tuple[float, ...] = ()


class Strategy(Protocol):
    """A federated method. Rounds count from 1; a state of `round` r is about to do round r + 1."""

    @property
    def keeps_budgets(self) -> bool:
        """Whether what its clients train must fit their tier's budget."""
        ...

    def tier_steps(self, tier: str) -> tuple[ClientStep, ...]:
        """Everything a client of a tier will ever train, a step for each size; empty if the tier sits out."""
        ...

    def tier_step(self, state: ServerState, tier: str) -> ClientStep:
        """Of what `tier_steps` has, the one as large as what the tier's clients train in the next round."""
        ...

    def stage(self, state: ServerState) -> int:
        """The stage (from 0) of the next round; a method without stages is always in stage 0."""
        ...

    def client_step(self, state: ServerState, tier: str, client: int) -> ClientStep:
        """What a client of a tier that takes part trains in the next round."""
        ...

    def evaluation_config(self, state: ServerState) -> Config:
        """The sub-model that the next round is judged by: the widest that it trains."""
        ...


class OneStepATier:
    """A method without stages: every tier trains its own step in all rounds; tiers without one sit out."""

    keeps_budgets = True

    def __init__(self, steps: Mapping[str, ClientStep]) -> None:
        self._steps = dict(steps)

    def tier_steps(self, tier: str) -> tuple[ClientStep, ...]:
        """The tier's one step."""
        return (self._steps[tier],) if tier in self._steps else ()

    def tier_step(self, state: ServerState, tier: str) -> ClientStep:
        """The tier's one step."""
        return self._steps[tier]

    def stage(self, state: ServerState) -> int:
        """There is one stage."""
        return 0

    def client_step(self, state: ServerState, tier: str, client: int) -> ClientStep:
        """What all clients of the tier train."""
        return self._steps[tier]

    def evaluation_config(self, state: ServerState) -> Config:
        """The widest network that a tier trains."""
        widest = max(step.config.head_scale for step in self._steps.values())
        return Config(freeze_depth=0, full_depth=0, head_scale=widest)


def init(model: nn.Module) -> ServerState:
    """The state before the first round; a copy of the model's values."""
    return ServerState(0, {name: value.detach().clone() for name, value in model.state_dict().items()})


def apply(graph: ModelGraph, state: ServerState, updates: Iterable[Update]) -> ServerState:
    """The state after a round: trained elements averaged over the clients that trained them, by their samples."""
    return replace(state, round=state.round + 1, weights=merge(graph, state.weights, updates))
