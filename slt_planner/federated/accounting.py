"""What a round costs its clients: bytes that must travel, and arithmetic (docs/training.md)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from slt_planner.config import Config, StepSpec
from slt_planner.federated.availability import Answer
from slt_planner.federated.progress import Holders
from slt_planner.federated.strategies.base import ClientStep
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory.flops import step_costs, training_flops
from slt_planner.memory.step import as_trained
from slt_planner.submodel.extract import SubModel, extract


@dataclass(frozen=True)
class ClientCosts:
    """What training a sub-model costs a client: the bytes of its tensors by freeze unit, and what it sends back."""

    bytes_by_unit: Mapping[int, int]
    upload_bytes: int
    train_flops_per_sample: int

    def download_bytes(self, held_depth: int) -> int:
        """What a client must get that has units 1..held_depth already.

        >>> ClientCosts({1: 100, 2: 20, 3: 3}, 23, 0).download_bytes(held_depth=1)
        23
        """
        return sum(size for unit, size in self.bytes_by_unit.items() if unit > held_depth)


@dataclass(frozen=True)
class Visit:
    """A chosen client of a round, as far as it costs something: how it answers, and on how many images it trains."""

    client: int
    answer: Answer
    costs: ClientCosts
    images: int


@dataclass(frozen=True)
class RoundCosts:
    """The sums of a round, and who has the unchanging weights after it."""

    bytes_down: int
    bytes_up: int
    train_flops: int
    holders: Holders


def client_costs(graph: ModelGraph, step: ClientStep, spec: StepSpec) -> ClientCosts:
    """Those of what a client trains; nothing is computed. Of several widths the FLOPs are the mean."""
    model = _unmade(graph, step.config, spec)
    costs, units, by_unit = step_costs(model, training_flops(model)), graph.unit_of_tensor(), Counter[int]()
    for name, tensor in model.held_state().items():
        by_unit[units[name]] += tensor.nbytes
    flops = costs.train_flops_per_sample
    if step.widths:
        widths = [step.config.model_copy(update={"head_scale": width}) for width in step.widths]
        models = [_unmade(graph, config, spec) for config in widths]
        flops = round(mean(step_costs(own, training_flops(own)).train_flops_per_sample for own in models))
    return ClientCosts(by_unit, costs.upload_bytes, flops)


def _unmade(graph: ModelGraph, config: Config, spec: StepSpec) -> SubModel:
    return as_trained(extract(graph, None, config, spec.norms, on_meta=True), spec)


def round_costs(visits: Sequence[Visit], holders: Holders) -> RoundCosts:
    """What the visits of a round cost in all.

    Units 1..`holders.depth` do not change as long as the stage lasts: a client that has them gets what is beyond them,
    another one everything. A client that never answers was not reached; a late one has got its weights and has trained,
    and nothing of it comes up.
    """
    reached = [visit for visit in visits if visit.answer != "never"]
    have = set(holders.clients)
    return RoundCosts(
        bytes_down=sum(v.costs.download_bytes(holders.depth if v.client in have else 0) for v in reached),
        bytes_up=sum(v.costs.upload_bytes for v in reached if v.answer == "in_time"),
        train_flops=sum(v.costs.train_flops_per_sample * v.images for v in reached),
        holders=holders.joined_by(visit.client for visit in reached),
    )
