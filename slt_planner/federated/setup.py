"""Before the first round: who takes part, with which images, on which strategy, and whether every step fits."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from slt_planner.config import Config, LeverSet, Record, StepSpec
from slt_planner.data.datasets import Dataset, load_dataset
from slt_planner.data.partition import Partition, partition
from slt_planner.errors import InfeasibleError, InputError
from slt_planner.federated.accounting import ClientCosts, client_costs
from slt_planner.federated.nested_widths import calibrate_nested, nested_peak
from slt_planner.federated.network_and_data import check_labels, check_lone_images
from slt_planner.federated.result import RunSettings
from slt_planner.federated.strategies.base import ClientStep, ServerState, Strategy, init
from slt_planner.federated.strategies.registry import make_strategy
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory import cuda
from slt_planner.memory.calibrate import calibrate
from slt_planner.memory.measure import measure
from slt_planner.memory.step import threads
from slt_planner.planning.network import planned_network
from slt_planner.planning.plan import Plan
from slt_planner.planning.rounds import largest_remainder
from slt_planner.submodel.extract import extract
from slt_planner.units import format_bytes

_DEAL_STREAM = 1  # keeps this use of the seed apart from the others
_SMALL_DATASET = 10_000


class Defaults(Record):
    """What a run takes where the user says nothing; `images_a_client` are those of a client on average."""

    rounds: int
    clients: int
    cohort_size: int
    local_batch: int
    images_a_client: int


@dataclass(frozen=True)
class Run:
    """A run ready for its first round; `client_peaks` are measured training steps at the local batch.

    `client_costs` are what else these steps cost a client.

    `tier_of` is each client's tier (a place in the plan's tiers), `images_of` its training images.
    """

    plan: Plan
    settings: RunSettings
    graph: ModelGraph
    strategy: Strategy
    dataset: Dataset
    tier_of: tuple[int, ...]
    images_of: Partition
    client_peaks: Mapping[ClientStep, int]
    client_costs: Mapping[ClientStep, ClientCosts]
    start: ServerState

    @cached_property
    def clients_taking_part(self) -> NDArray[np.int64]:
        """The clients whose tier trains anything, ascending."""
        taking_part = [place for place, tier in enumerate(self.plan.tiers) if self.strategy.tier_steps(tier.name)]
        return np.flatnonzero(np.isin(self.tier_of, taking_part))

    def step_with(self, levers: LeverSet) -> StepSpec:
        """A training step at the local batch."""
        return step_with(self.plan, self.settings, levers)


def load_data(plan: Plan, name: str, data_root: str | None = None, download: bool = False) -> Dataset:
    """The images of a run, of the size that the plan's network takes; as `load_dataset`."""
    root = None if data_root is None else Path(data_root).expanduser()
    return load_dataset(name, image_shape(plan), plan.num_classes, root=root, download=download)


def default_settings(
    plan: Plan, dataset: Dataset, clients: int | None, scheme: str = "iid", minimum_samples: int = 2, seed: int = 0
) -> Defaults:
    """100 clients (with the partition ``natural`` all there are), cohorts of 10, 100 rounds and the plan's batch.

    With fewer than 10,000 training images: 10 clients, 30 rounds (more if the plan has more stages), and a batch that a
    client can fill eight times, so that a round is more than one step.
    """
    small, taken = len(dataset.train_labels) < _SMALL_DATASET, len(dataset.train_labels)
    if scheme == "natural":
        groups = dataset.train_groups
        shares = partition(dataset.train_labels, clients, scheme, seed, groups=groups, minimum=minimum_samples)
        clients, taken = len(shares), int(shares.sizes.sum())  # fewer clients than writers take fewer images
    clients = clients or (10 if small else 100)
    batch, images = plan.batch_size, max(2, taken // clients)
    if small:
        batch = min(batch, max(2, 2 ** ((images // 8).bit_length() - 1)))
    rounds = max(30 if small else 100, len(plan.stages))
    return Defaults(
        rounds=rounds, clients=clients, cohort_size=min(10, clients), local_batch=batch, images_a_client=images
    )


def image_shape(plan: Plan) -> tuple[int, int, int]:
    """The plan's input as (channels, height, width).

    Raises:
        InputError: the plan's network does not take images.
    """
    if len(plan.input_shape) != 3:
        raise InputError(f"the plan's input {plan.input_shape} is not an image (channels, height, width)")
    channels, height, width = plan.input_shape
    return channels, height, width


def load_network(plan: Plan, seed: int, model: nn.Module | str | None = None) -> tuple[nn.Module, ModelGraph]:
    """The plan's network, freshly initialised by `seed` (or the one given), and its graph.

    Raises:
        InputError: as `planned_network`, or the network computes its own loss.
    """
    torch.manual_seed(seed)
    network, graph = planned_network(plan, model)
    if graph.adapter.part:
        raise InputError(
            "networks that compute their own loss can be planned and measured, not trained in a federation"
        )
    return network, graph


def prepare(plan: Plan, settings: RunSettings, dataset: Dataset, network: tuple[nn.Module, ModelGraph]) -> Run:
    """A run before its first round; every step that any client will take is measured here, on this machine.

    Args:
        plan: the plan to run.
        settings: everything else that the run depends on.
        dataset: the images, loaded.
        network: the network to start from and its graph, as `load_network` gives them.

    Raises:
        InputError: settings that contradict each other, the plan or the data, or a network that cannot be trained so
            or on these data.
        InfeasibleError: nothing that the strategy trains fits, or a step needs more than its tier's budget here.
    """
    model, graph = network
    _check_settings(plan, settings)
    check_labels(graph, dataset)
    if settings.prefix_cache is not None:
        _check_prefix_cache(plan, settings, dataset, graph)
    with threads(plan.step):
        tier_of = deal_clients(plan, settings)
        strategy = make_strategy(_with_clients(clients_plan(plan, settings), tier_of), settings, graph)
        if not any(strategy.tier_steps(plan.tiers[tier].name) for tier in tier_of):
            raise InputError(f"none of the {settings.clients} clients is in a tier that takes part; use more clients")
        images = partition(
            dataset.train_labels,
            settings.clients,
            settings.partition,
            settings.seed,
            groups=dataset.train_groups,
            minimum=settings.minimum_samples,
        )
        check_lone_images(graph, plan.step.norms, dataset, _trained_on_one_image(plan, strategy, tier_of, images))
        peaks = _client_peaks(plan, settings, graph, strategy)
        costs = {step: client_costs(graph, step, step_with(plan, settings, step.levers)) for step in peaks}
    return Run(plan, settings, graph, strategy, dataset, tier_of, images, peaks, costs, init(model))


def deal_clients(plan: Plan, settings: RunSettings) -> tuple[int, ...]:
    """Each client's tier: as many a tier as its share says, dealt by the seed."""
    counts = largest_remainder(settings.clients, [tier.share for tier in plan.tiers])
    dealt = [tier for tier, count in enumerate(counts) for _ in range(count)]
    np.random.default_rng([settings.seed, _DEAL_STREAM]).shuffle(dealt)
    return tuple(dealt)


def _with_clients(plan: Plan, tier_of: Sequence[int]) -> Plan:
    """The plan for those of its tiers that have clients: what nobody trains is not judged and binds nobody."""
    return plan.model_copy(update={"tiers": tuple(plan.tiers[place] for place in sorted(set(tier_of)))})


def _trained_on_one_image(
    plan: Plan, strategy: Strategy, tier_of: Sequence[int], images: Partition
) -> dict[int, list[Config]]:
    """What clients with one image may train: the first such client of each tier stands for the others."""
    clients = np.flatnonzero(images.sizes == 1)
    tiers, first = np.unique(np.asarray(tier_of)[clients], return_index=True)
    return {
        int(client): [step.config for step in strategy.tier_steps(plan.tiers[tier].name)]
        for tier, client in zip(tiers, clients[first], strict=True)
    }


def _check_settings(plan: Plan, settings: RunSettings) -> None:
    cuda.check(settings.device)
    if plan.step.device != settings.device and (plan.step.device == "cuda" or settings.enforce):
        raise InputError(
            f"the plan is for {plan.step.device}, and its steps are measured there; train with --device "
            f"{plan.step.device}, not {settings.device}"
        )
    if settings.local_batch > plan.batch_size:
        raise InputError(
            f"local batch {settings.local_batch} needs more memory than the plan's {plan.batch_size}; "
            "use at most that, or make a plan for the larger one"
        )
    if settings.workers > 1 and (sys.platform != "linux" or torch.cuda.is_available()):
        raise InputError(
            f"{settings.workers} workers are forked, which torch bears on Linux and where it sees no GPU; "
            "use one, or hide the GPU with CUDA_VISIBLE_DEVICES="
        )
    if settings.cohort_size > settings.clients:
        raise InputError(f"cohort size {settings.cohort_size} is more than the {settings.clients} clients")


def _check_prefix_cache(plan: Plan, settings: RunSettings, dataset: Dataset, graph: ModelGraph) -> None:
    """Whether what a frozen prefix gives for an image can be the same each time."""
    if settings.augment and dataset.augment:
        raise InputError(
            f"a prefix cache keeps what images give, and those of {dataset.title} are augmented anew each time; "
            "train with --no-augmentation"
        )
    if plan.step.norms == "static" and graph.has_batch_norm:
        raise InputError(
            "a prefix cache keeps what an image gives alone, and the plan's norms take statistics of the batch; "
            "plan with --norms running"
        )


def clients_plan(plan: Plan, settings: RunSettings) -> Plan:
    """The plan with the step that clients train: a worker has one thread."""
    if settings.workers == 1:
        return plan
    return plan.model_copy(update={"step": plan.step.model_copy(update={"threads": 1})})


def step_with(plan: Plan, settings: RunSettings, levers: LeverSet) -> StepSpec:
    """The plan's training step with levers, at the local batch."""
    return clients_plan(plan, settings).spec.with_levers(levers).settings.with_batch(settings.local_batch)


def _peak(graph: ModelGraph, step: ClientStep, spec: StepSpec) -> int:
    if step.widths:
        return nested_peak(graph, step.config, step.widths, spec)
    return measure(extract(graph, None, step.config, spec.norms), spec, details=False).peak_bytes


def _client_peaks(plan: Plan, settings: RunSettings, graph: ModelGraph, strategy: Strategy) -> dict[ClientStep, int]:
    """The measured step of everything that is trained, at the local batch; one over its tier's budget is an error.

    Where budgets are enforced, its operators are calibrated too.
    """
    peaks: dict[ClientStep, int] = {}
    for tier in plan.tiers:
        for step in strategy.tier_steps(tier.name):
            spec = step_with(plan, settings, step.levers)
            if step not in peaks:
                peaks[step] = _peak(graph, step, spec)
            if settings.enforce:
                calibrate(graph, [step.config], spec)
                if step.widths:
                    calibrate_nested(graph, step.config, step.widths, spec)
            if strategy.keeps_budgets and peaks[step] > tier.budget_bytes:
                raise InfeasibleError(
                    f"tier {tier.name}: a step of {step.config} at batch {spec.batch_size} needs "
                    f"{format_bytes(peaks[step], round_up=True)} on this machine; make the plan again here, "
                    f"with --threads {spec.threads}"
                )
    return peaks
