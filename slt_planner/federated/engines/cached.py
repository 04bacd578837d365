"""The local engine with a cache: a client's images pass the frozen prefix once, as long as its weights stay."""

from collections.abc import Generator, Sequence

from slt_planner.federated.client import client_seed, train_after_prefix
from slt_planner.federated.engines.base import Assignment
from slt_planner.federated.engines.local import LocalEngine, SentModels, Trained, sent_back, train_assignment
from slt_planner.federated.prefix_cache import PrefixCache
from slt_planner.federated.progress import Holders
from slt_planner.federated.setup import Run
from slt_planner.federated.strategies.base import ServerState


class CachingEngine(LocalEngine):
    """Clients in this process, which remembers for them what units that nobody trains give for their images.

    The memory is the simulation's: a client of a real federation may not have it. Images must not be augmented.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.cache = PrefixCache(limit_bytes)

    def train_cohort(
        self, run: Run, state: ServerState, cohort: Sequence[Assignment], holders: Holders
    ) -> Generator[Trained]:
        """As `LocalEngine.train_cohort`; where nothing is frozen, or a client's rows pass the limit, exactly so."""
        sent = SentModels(run, state)
        self.cache.begin_round(holders.depth)
        for assignment in cohort:
            yield self._train(run, state, assignment, sent)

    def _train(self, run: Run, state: ServerState, assignment: Assignment, sent: SentModels) -> Trained:
        training, client, images = assignment.training, assignment.client, assignment.indices
        model = sent.to(assignment)
        prefix = self.cache.prefix(model, training.step, run.dataset)
        rows = None if prefix is None else self.cache.rows(client, prefix, model, run.dataset, images, training)
        if prefix is None or rows is None:
            return train_assignment(run, state, assignment, sent)
        own_seed = client_seed(run.settings.seed, state.round + 1, client)
        labels = run.dataset.train_labels[images]
        loss = train_after_prefix(model, prefix.split, rows, labels, training, own_seed)
        return sent_back(model.trained_state()), loss
