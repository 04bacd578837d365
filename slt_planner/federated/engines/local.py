"""The local engine: the clients of a round one after the other, in this process."""

import copy
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TypeAlias

from torch import Tensor

from slt_planner.config import Config, StepSettings
from slt_planner.federated.client import client_seed, train_client
from slt_planner.federated.engines.base import Assignment, RoundLog
from slt_planner.federated.progress import Holders
from slt_planner.federated.refusals import Screen
from slt_planner.federated.setup import Run
from slt_planner.federated.strategies.base import ServerState
from slt_planner.memory.step import as_trained
from slt_planner.submodel.extract import SubModel, extract
from slt_planner.submodel.merge import Update

Trained: TypeAlias = tuple[dict[str, Tensor], float]
"""What a client sends back, by name, and its mean loss."""


class LocalEngine:
    """Clients in this process; what is expected of them is so."""

    def meet(self, run: Run) -> Run:
        """Nothing is to be found out."""
        return run

    def holders(self, expected: Holders) -> Holders:
        """Those that should."""
        return expected

    def run_clients(
        self,
        run: Run,
        state: ServerState,
        cohort: Sequence[Assignment],
        holders: Holders,
        screen: Screen,
        log: RoundLog,
    ) -> Iterator[Update]:
        """Train each client and yield its update, in the cohort's order.

        An update that the screen refuses is named in the log, and the round goes on without it. Where the training
        enforces budgets, a step that would pass its client's raises BudgetExceeded.
        """
        with closing(self.train_cohort(run, state, cohort, holders)) as training:
            for assignment in cohort:
                began = time.perf_counter()
                trained, loss = next(training)
                samples = len(assignment.indices)
                verdict = screen.verdict(assignment.config, trained, samples, loss)
                log.train_seconds += time.perf_counter() - began
                if log.add(assignment.client, verdict, loss):
                    yield assignment.config, trained, samples
                del trained

    def train_cohort(
        self, run: Run, state: ServerState, cohort: Sequence[Assignment], holders: Holders
    ) -> Generator[Trained]:
        """What each client has trained, in the cohort's order; one trains at a time."""
        sent = SentModels(run, state)
        for assignment in cohort:
            yield train_assignment(run, state, assignment, sent)


class SentModels:
    """The sub-models of a round as clients get them: each kind is cut once, then copied.

    A tier's clients mostly get the same kind; no more kinds are kept than there are tiers.
    """

    def __init__(self, run: Run, state: ServerState) -> None:
        self._run, self._state = run, state
        self._kept: dict[tuple[Config, StepSettings], SubModel] = {}

    def to(self, assignment: Assignment) -> SubModel:
        """That of a client, to be trained in place."""
        config, step = assignment.config, assignment.training.step
        if (config, step) not in self._kept:
            if len(self._kept) == len(self._run.plan.tiers):
                self._kept.pop(next(iter(self._kept)))
            model = extract(self._run.graph, self._state.weights, config, step.norms).to(step.device)
            cut = as_trained(model, step)
            cut.passes(True)
            self._kept[config, step] = cut
        return copy.deepcopy(self._kept[config, step])


def train_assignment(run: Run, state: ServerState, assignment: Assignment, sent: SentModels) -> Trained:
    """What a client of the next round has trained.

    Raises:
        BudgetExceeded: a step would pass the client's budget, and the training enforces it.
    """
    training, model = assignment.training, sent.to(assignment)
    own_seed = client_seed(run.settings.seed, state.round + 1, assignment.client)
    budget = assignment.budget_bytes if training.enforce else None
    loss = train_client(model, run.dataset, assignment.indices, training, own_seed, budget)
    return sent_back(model.trained_state()), loss


def sent_back(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was trained, where the server is."""
    return {name: value.cpu() for name, value in trained.items()}
