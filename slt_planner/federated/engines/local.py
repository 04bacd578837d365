"""The local engine: the clients of a round one after the other, in this process."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from slt_planner.config import Config
from slt_planner.data.datasets import Dataset
from slt_planner.federated.availability import Answer
from slt_planner.federated.client import LocalTraining, client_seed, train_client
from slt_planner.federated.refusals import Screen
from slt_planner.federated.result import Refusal
from slt_planner.federated.strategies.base import ServerState
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory.step import as_trained
from slt_planner.submodel.extract import extract
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

    `losses` are of the updates that are used, `changes` of all that `Screen` could measure.
    """

    losses: list[float] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    train_seconds: float = 0.0


def run_clients(
    graph: ModelGraph,
    state: ServerState,
    cohort: Sequence[Assignment],
    dataset: Dataset,
    seed: int,
    screen: Screen,
    log: RoundLog,
) -> Iterator[Update]:
    """Train each client and yield its update, in the cohort's order; only one sub-model is alive at a time.

    An update that the screen refuses is named in the log, and the round goes on without it. Where the training enforces
    budgets, a step that would pass its client's raises BudgetExceeded.
    """
    for assignment in cohort:
        began = time.perf_counter()
        training, samples = assignment.training, len(assignment.indices)
        model = as_trained(extract(graph, state.weights, assignment.config, training.step.norms), training.step)
        own_seed = client_seed(seed, state.round + 1, assignment.client)
        budget = assignment.budget_bytes if training.enforce else None
        loss = train_client(model, dataset, assignment.indices, training, own_seed, budget)
        trained = model.trained_state()
        verdict = screen.verdict(assignment.config, trained, samples, loss)
        log.train_seconds += time.perf_counter() - began
        if verdict.change is not None:
            log.changes.append(verdict.change)
        if verdict.reason is None:
            log.losses.append(loss)
            yield assignment.config, trained, samples
        else:
            log.refusals.append(Refusal(client=assignment.client, reason=verdict.reason))
        del model, trained
