"""The local engine with several clients in each step: those that train alike are stacked (torch.func)."""

from collections.abc import Generator, Sequence
from dataclasses import replace

from slt_planner.federated.client import client_seed
from slt_planner.federated.engines.base import Assignment
from slt_planner.federated.engines.local import LocalEngine, SentModels, Trained, sent_back, train_assignment
from slt_planner.federated.progress import Holders
from slt_planner.federated.setup import Run
from slt_planner.federated.stacked_clients import can_be_stacked, train_stacked
from slt_planner.federated.strategies.base import ServerState


class BatchedEngine(LocalEngine):
    """Up to `clients` of a round at once, if they train the same step on equally many images; the others one by one.

    What they train is that of the plain loop up to the order of sums. It takes the memory of so many plain steps:
    levers that save memory and change nothing else are not used.
    """

    def __init__(self, clients: int) -> None:
        self._clients = clients

    def train_cohort(
        self, run: Run, state: ServerState, cohort: Sequence[Assignment], holders: Holders
    ) -> Generator[Trained]:
        """As `LocalEngine.train_cohort`; of each kind up to `clients` - 1 are ahead of what is taken."""
        sent, ahead = SentModels(run, state), dict[int, Trained]()
        waiting = list(range(len(cohort)))
        for place, assignment in enumerate(cohort):
            if place not in ahead:
                alike = [other for other in waiting if _kind(cohort[other]) == _kind(assignment)][: self._clients]
                together = _train(run, state, [cohort[other] for other in alike], sent)
                ahead |= dict(zip(alike, together, strict=True))
                waiting = [other for other in waiting if other not in ahead]
            yield ahead.pop(place)


def _kind(assignment: Assignment) -> tuple[object, ...]:
    """What is equal for clients whose steps have the same shapes."""
    return assignment.config, assignment.training, len(assignment.indices)


def _train(run: Run, state: ServerState, alike: Sequence[Assignment], sent: SentModels) -> list[Trained]:
    training = alike[0].training
    plain = replace(training, step=training.step.model_copy(update={"levers": ()}))
    model = sent.to(replace(alike[0], training=plain)) if len(alike) > 1 else None
    if model is None or not can_be_stacked(model, plain):
        return [train_assignment(run, state, assignment, sent) for assignment in alike]
    seeds = [client_seed(run.settings.seed, state.round + 1, assignment.client) for assignment in alike]
    clients = [assignment.indices for assignment in alike]
    return [(sent_back(own), loss) for own, loss in train_stacked(model, run.dataset, clients, plain, seeds)]
