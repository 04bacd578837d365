"""The local engine: the clients of a round one after the other, in this process."""

import time
from collections.abc import Iterator, Sequence

from torch import Tensor

from slt_planner.data.datasets import Dataset
from slt_planner.federated.client import client_seed, train_client
from slt_planner.federated.engines.base import Assignment, RoundLog
from slt_planner.federated.progress import Holders
from slt_planner.federated.refusals import Screen
from slt_planner.federated.setup import Run
from slt_planner.federated.strategies.base import ServerState
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory.step import as_trained
from slt_planner.submodel.extract import extract
from slt_planner.submodel.merge import Update


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
        """Train each client and yield its update, in the cohort's order; only one sub-model is alive at a time.

        An update that the screen refuses is named in the log, and the round goes on without it. Where the training
        enforces budgets, a step that would pass its client's raises BudgetExceeded.
        """
        for assignment in cohort:
            began = time.perf_counter()
            trained, loss = train_assignment(run.graph, state, assignment, run.dataset, run.settings.seed)
            samples = len(assignment.indices)
            verdict = screen.verdict(assignment.config, trained, samples, loss)
            log.train_seconds += time.perf_counter() - began
            if log.add(assignment.client, verdict, loss):
                yield assignment.config, trained, samples
            del trained


def train_assignment(
    graph: ModelGraph, state: ServerState, assignment: Assignment, dataset: Dataset, seed: int
) -> tuple[dict[str, Tensor], float]:
    """What a client of the next round has trained, by name, and its mean loss.

    Raises:
        BudgetExceeded: a step would pass the client's budget, and the training enforces it.
    """
    training = assignment.training
    model = as_trained(extract(graph, state.weights, assignment.config, training.step.norms), training.step)
    own_seed = client_seed(seed, state.round + 1, assignment.client)
    budget = assignment.budget_bytes if training.enforce else None
    loss = train_client(model, dataset, assignment.indices, training, own_seed, budget)
    return model.trained_state(), loss
