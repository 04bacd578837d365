"""The local engine: the clients of a round one after the other, in this process."""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TypeAlias

import torch
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
    """The sub-models of a round as clients get them: each kind is cut once, and made as it was sent for each client.

    A tier's clients mostly get the same kind; no more kinds are kept than there are tiers.
    """

    def __init__(self, run: Run, state: ServerState) -> None:
        self._run, self._state = run, state
        self._kept: dict[tuple[Config, StepSettings], _SentModel] = {}

    def to(self, assignment: Assignment) -> SubModel:
        """That of a client, to be trained in place until the next client gets its own."""
        config, step = assignment.config, assignment.training.step
        if (config, step) not in self._kept:
            if len(self._kept) == len(self._run.plan.tiers):
                self._kept.pop(next(iter(self._kept)))
            model = extract(self._run.graph, self._state.weights, config, step.norms).to(step.device)
            self._kept[config, step] = _SentModel(as_trained(model, step))
        return self._kept[config, step].as_sent()


class _SentModel:
    """A sub-model and its values when it was sent: copying those is several times faster than copying modules."""

    def __init__(self, model: SubModel) -> None:
        self._model = model
        self._tensors = [*model.parameters(), *model.buffers()]
        self._values = [tensor.detach().clone() for tensor in self._tensors]

    @torch.no_grad()
    def as_sent(self) -> SubModel:
        self._model.zero_grad()
        for tensor, value in zip(self._tensors, self._values, strict=True):
            tensor.copy_(value)
        return self._model


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
    """What was trained, where the server is; a copy, which the next client's training leaves alone."""
    return {name: value.to("cpu", copy=True) for name, value in trained.items()}
