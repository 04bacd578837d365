"""The local engine: the clients of a round one after the other, in this process."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from slt_planner.config import Config
from slt_planner.data.datasets import Dataset
from slt_planner.federated.client import LocalTraining, client_seed, train_client
from slt_planner.federated.strategies.base import ServerState
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory.step import as_trained
from slt_planner.submodel.extract import extract
from slt_planner.submodel.merge import Update


@dataclass(frozen=True)
class Assignment:
    """A client of this round's cohort: what it trains, how, and on which training images."""

    client: int
    config: Config
    training: LocalTraining
    indices: np.ndarray
    budget_bytes: int


@dataclass
class RoundLog:
    """What a round cost, filled in as its clients finish."""

    bytes_up: int = 0
    bytes_down: int = 0
    refused: int = 0
    losses: list[float] = field(default_factory=list)
    train_seconds: float = 0.0


def run_clients(
    graph: ModelGraph,
    state: ServerState,
    cohort: Sequence[Assignment],
    dataset: Dataset,
    seed: int,
    log: RoundLog,
) -> Iterator[Update]:
    """Train each client and yield its update, in the cohort's order; only one sub-model is alive at a time.

    An update that is not finite is refused and counted, and the round goes on without it. Where the training enforces
    budgets, a step that would pass its client's raises BudgetExceeded.
    """
    for assignment in cohort:
        began = time.perf_counter()
        training = assignment.training
        model = as_trained(extract(graph, state.weights, assignment.config, training.step.norms), training.step)
        log.bytes_down += sum(tensor.nbytes for tensor in model.held_state().values())
        own_seed = client_seed(seed, state.round + 1, assignment.client)
        budget = assignment.budget_bytes if training.enforce else None
        loss = train_client(model, dataset, assignment.indices, training, own_seed, budget)
        trained = model.trained_state()
        log.bytes_up += sum(tensor.nbytes for tensor in trained.values())
        log.train_seconds += time.perf_counter() - began
        if all(bool(torch.isfinite(tensor).all()) for tensor in trained.values()):
            log.losses.append(loss)
            yield assignment.config, trained, len(assignment.indices)
        else:
            log.refused += 1
        del model, trained
