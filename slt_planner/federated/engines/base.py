"""What an engine is: where the clients of a round train, and how their updates come back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from slt_planner.config import Config
from slt_planner.federated.availability import Answer
from slt_planner.federated.client import LocalTraining
from slt_planner.federated.progress import Holders
from slt_planner.federated.refusals import Screen, Verdict
from slt_planner.federated.result import Refusal
from slt_planner.federated.setup import Run
from slt_planner.federated.strategies.base import ServerState
from slt_planner.submodel.merge import Update


@dataclass(frozen=True)
class Assignment:
    """A client of this round's cohort: what it trains, how, on which training images, and whether it will answer."""

    client: int
    tier: str
    config: Config
    training: LocalTraining
    indices: np.ndarray
    budget_bytes: int
    answer: Answer = "in_time"


@dataclass
class RoundLog:
    """What came of a round's clients, filled in as they finish.

    `losses` are of the updates that are used, `changes` of all that `Screen` could measure. `answers` has the clients
    that were asked and did not answer in time, `absent` says why; those are found out by engines with real clients.
    """

    losses: list[float] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    answers: dict[int, Answer] = field(default_factory=dict)
    absent: list[Refusal] = field(default_factory=list)
    train_seconds: float = 0.0

    def add(self, client: int, verdict: Verdict, loss: float) -> bool:
        """Take down what the screen says of a client's update; whether it is used."""
        if verdict.change is not None:
            self.changes.append(verdict.change)
        if verdict.reason is None:
            self.losses.append(loss)
        else:
            self.refusals.append(Refusal(client=client, reason=verdict.reason))
        return verdict.reason is None


class Engine(Protocol):
    """Where clients run."""

    def meet(self, run: Run) -> Run:
        """The run before its next round, with what is known of the clients themselves by now: their tiers."""
        ...

    def holders(self, expected: Holders) -> Holders:
        """Of the clients that should have the unchanging weights of a stage, those that have them."""
        ...

    def run_clients(
        self,
        run: Run,
        state: ServerState,
        cohort: Sequence[Assignment],
        holders: Holders,
        screen: Screen,
        log: RoundLog,
    ) -> Iterator[Update]:
        """Train each client of the cohort and yield its update, in the cohort's order.

        Clients among the `holders` have the weights of units 1..`holders.depth`. An update that the screen refuses is
        named in the log, and the round goes on without it.
        """
        ...
