"""A plan goes in, a federated run comes out: the loop over rounds, and the folder it leaves."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from slt_planner.config import Config, Norms, Record, StepSpec
from slt_planner.data.datasets import Dataset, load_dataset
from slt_planner.data.partition import partition
from slt_planner.environment import environment
from slt_planner.errors import InputError
from slt_planner.federated.client import LocalTraining, learning_rate
from slt_planner.federated.engines.local import Assignment, RoundLog, run_clients
from slt_planner.federated.evaluate import evaluate, recalibrate
from slt_planner.federated.result import RoundRow, RunResult, RunSettings, RunTier
from slt_planner.federated.run_folder import RunFolder
from slt_planner.federated.strategies.base import ServerState, Strategy, apply, init
from slt_planner.federated.strategies.slt import SuccessiveLayerTraining
from slt_planner.federated.strategies.small import SmallNetwork
from slt_planner.graph.trace import ModelGraph, trace
from slt_planner.memory.measure import measure
from slt_planner.memory.step import threads
from slt_planner.models.registry import load_model
from slt_planner.planning.plan import Plan, TierPlan
from slt_planner.planning.rounds import largest_remainder
from slt_planner.submodel.extract import extract

_DEAL, _COHORT, _EVALUATION = 1, 2, 3  # what a random stream of the server is for


class Defaults(Record):
    """What a run takes where the user says nothing; a data set's size decides."""

    rounds: int
    clients: int
    cohort_size: int
    local_batch: int


def default_settings(plan: Plan, dataset: Dataset, clients: int | None) -> Defaults:
    """100 clients, cohorts of 10, 100 rounds and the plan's batch; for the embedded digits 10 clients and 30 rounds.

    There the batch is one that a client can fill eight times, so that a round is more than one step.
    """
    small = len(dataset.train_labels) < 10_000
    clients = clients or (10 if small else 100)
    batch = plan.batch_size
    if small:
        images = max(2, len(dataset.train_labels) // clients)
        batch = min(batch, max(2, 2 ** ((images // 8).bit_length() - 1)))
    rounds = max(30 if small else 100, len(plan.stages))
    return Defaults(rounds=rounds, clients=clients, cohort_size=min(10, clients), local_batch=batch)


@dataclass(frozen=True)
class Federation:
    """Who takes part: each client's tier and training images."""

    tiers: tuple[TierPlan, ...]
    tier_of: tuple[int, ...]
    images_of: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Run:
    """What stays the same over a run."""

    plan: Plan
    settings: RunSettings
    graph: ModelGraph
    strategy: Strategy
    dataset: Dataset
    federation: Federation


def check_settings(plan: Plan, settings: RunSettings) -> None:
    """Refuse settings that contradict each other or the plan.

    Raises:
        InputError: a larger local batch than the plan was measured with, or a cohort larger than the clients.
    """
    if settings.local_batch > plan.batch_size:
        raise InputError(
            f"local batch {settings.local_batch} needs more memory than the plan's {plan.batch_size}; "
            "use at most that, or make a plan for the larger one"
        )
    if settings.cohort_size > settings.clients:
        raise InputError(f"cohort size {settings.cohort_size} is more than the {settings.clients} clients")


def load_for_plan(plan: Plan, seed: int, model: nn.Module | None = None) -> tuple[nn.Module, ModelGraph]:
    """The plan's network, freshly initialised by `seed` (or the one given), and its graph.

    Raises:
        InputError: the plan names no network and none is given, or the network is not the plan's.
    """
    if model is None:
        if plan.model.name is None:
            raise InputError("the plan names no model; pass the network it was made for")
        torch.manual_seed(seed)
        model = load_model(plan.model.name, plan.num_classes)
    graph = trace(model, plan.input_shape)
    if graph.hash != plan.model.graph_hash:
        raise InputError(
            f"the model is not the plan's: its graph is {graph.hash}, planned was {plan.model.graph_hash}; "
            "make a plan for this one"
        )
    return model, graph


def prepare(
    plan: Plan, settings: RunSettings, dataset: Dataset, model: nn.Module | None = None
) -> tuple[Run, ServerState]:
    """A run before its first round.

    Raises:
        InputError, InfeasibleError: as `run_experiment`.
    """
    check_settings(plan, settings)
    model, graph = load_for_plan(plan, settings.seed, model)
    strategy = make_strategy(plan, settings, graph)
    federation = make_federation(plan, settings, dataset)
    return Run(plan, settings, graph, strategy, dataset, federation), init(model)


def run_experiment(
    plan: Plan,
    settings: RunSettings,
    dataset: Dataset,
    folder: Path,
    model: nn.Module | None = None,
    force: bool = False,
    progress: Callable[[RoundRow], None] = lambda row: None,
) -> RunResult:
    """Run one strategy with one seed and leave a run folder; an interrupt (Ctrl-C) ends it early, folder and all.

    Args:
        plan: the plan to run.
        settings: everything else that the run depends on.
        dataset: the images, loaded.
        folder: the run folder to make.
        model: the network to start from; by default the plan's, initialised by the seed.
        force: overwrite an existing folder.
        progress: called after each round.

    Raises:
        InputError: settings, data or model that do not go together, or a folder that exists.
        InfeasibleError: no small network fits (strategy ``small``).
    """
    with threads(plan.step) as number:
        run, state = prepare(plan, settings, dataset, model)
        result = _empty_result(run, environment(number))
        run_folder = RunFolder(folder, force)
        run_folder.write_settings(result)
        rows: list[RoundRow] = []
        outcome: dict[str, object] = {}
        try:
            peaks: dict[Config, int] = {}
            while state.round < settings.rounds:
                state, row = run_round(run, state, peaks)
                rows.append(row)
                run_folder.append(row)
                progress(row)
            state, outcome = finish(run, state)
        except KeyboardInterrupt:
            pass  # what is done is kept, and the result says "stopped"
        result = _with_rows(result, rows).model_copy(update=outcome)
        run_folder.write_settings(result)
        run_folder.write_weights(state.weights, run.strategy.evaluation_config(state))
    return result


def train(
    plan: Plan,
    dataset: str = "digits",
    rounds: int | None = None,
    model: nn.Module | None = None,
    strategy: str = "slt",
    out: str | Path = "runs/run",
    force: bool = False,
    **settings: object,
) -> RunResult:
    """Run a plan and leave a run folder; the arguments are those of ``slt-train``.

    Args:
        plan: the plan.
        dataset: ``digits`` or ``parquet:DIR``.
        rounds: federated rounds; by default by the data set's size.
        model: the network to start from; by default the plan's, initialised by the seed.
        strategy: ``slt`` or ``small``.
        out: the run folder.
        force: overwrite it.
        settings: more fields of `RunSettings`, such as ``clients=100``.

    Raises:
        InputError: settings, data or model that do not go together, or a folder that exists.
        InfeasibleError: no small network fits (strategy ``small``).
    """
    data = load_dataset(dataset, image_shape(plan), plan.num_classes)
    clients = settings.get("clients")
    defaults = default_settings(plan, data, clients if isinstance(clients, int) else None).model_dump()
    given = {"rounds": rounds, **settings}
    chosen = defaults | {name: value for name, value in given.items() if value is not None}
    run_settings = RunSettings.model_validate({"strategy": strategy, "dataset": dataset, **chosen})
    return run_experiment(plan, run_settings, data, Path(out), model, force)


def image_shape(plan: Plan) -> tuple[int, int, int]:
    """The plan's input as (channels, height, width).

    Raises:
        InputError: the plan's network does not take images.
    """
    if len(plan.input_shape) != 3:
        raise InputError(f"the plan's input {plan.input_shape} is not an image (channels, height, width)")
    channels, height, width = plan.input_shape
    return channels, height, width


def make_strategy(plan: Plan, settings: RunSettings, graph: ModelGraph) -> Strategy:
    """The strategy of a run, by its name."""
    if settings.strategy == "small":
        return SmallNetwork(plan, graph)
    return SuccessiveLayerTraining(plan, settings.rounds)


def make_federation(plan: Plan, settings: RunSettings, dataset: Dataset) -> Federation:
    """Deal the clients to tiers by share, and the training images to clients; both by the seed."""
    counts = largest_remainder(settings.clients, [tier.share for tier in plan.tiers])
    dealt = [tier for tier, count in enumerate(counts) for _ in range(count)]
    np.random.default_rng([settings.seed, _DEAL]).shuffle(dealt)
    images = partition(dataset.train_labels, settings.clients, settings.partition, settings.seed)
    return Federation(plan.tiers, tuple(dealt), tuple(images))


def run_round(run: Run, state: ServerState, peaks: dict[Config, int]) -> tuple[ServerState, RoundRow]:
    """One round: train a cohort, merge, evaluate. `peaks` remembers the measured steps of earlier rounds."""
    began = time.perf_counter()
    settings, strategy, number = run.settings, run.strategy, state.round + 1
    assignments = draw_cohort(run.federation, strategy, state, settings)
    rate = learning_rate(number, settings.rounds, settings.learning_rate, settings.final_learning_rate)
    training = LocalTraining(run.plan.step, settings.local_batch, settings.local_epochs, rate)
    stage, config, log = strategy.stage(state), strategy.evaluation_config(state), RoundLog()
    updates = run_clients(run.graph, state, assignments, run.dataset, run.plan.step.norms, training, settings.seed, log)
    measured = _measured_peaks(run, state, peaks)
    state = apply(run.graph, state, updates)
    judged = extract(run.graph, state.weights, config, run.plan.step.norms)
    accuracy, loss = evaluate(judged, run.dataset, run.plan.step, settings.seed + _EVALUATION)
    row = RoundRow(
        round=number,
        stage=stage,
        config=config,
        learning_rate=rate,
        accuracy=accuracy,
        loss=_finite(loss),
        train_loss=_finite(float(np.mean(log.losses))) if log.losses else None,
        bytes_up=log.bytes_up,
        bytes_down=log.bytes_down,
        clients=len(assignments),
        refused=log.refused,
        measured_peak_bytes=measured,
        train_seconds=log.train_seconds,
        seconds=time.perf_counter() - began,
    )
    return state, row


def _finite(number: float) -> float | None:
    return number if np.isfinite(number) else None


def draw_cohort(
    federation: Federation, strategy: Strategy, state: ServerState, settings: RunSettings
) -> Sequence[Assignment]:
    """This round's clients, in the order their updates are folded; those whose tier sits out are not drawn."""
    configs = [strategy.client_config(state, tier.name) for tier in federation.tiers]
    eligible = [client for client, tier in enumerate(federation.tier_of) if configs[tier] is not None]
    if not eligible:
        raise InputError(
            f"none of the {len(federation.tier_of)} clients is in a tier that takes part; use more clients"
        )
    random = np.random.default_rng([settings.seed, _COHORT, state.round + 1])
    drawn = random.choice(eligible, size=min(settings.cohort_size, len(eligible)), replace=False)
    return [
        Assignment(int(client), config, federation.images_of[client])
        for client in drawn
        if (config := configs[federation.tier_of[client]]) is not None
    ]


def _measured_peaks(run: Run, state: ServerState, peaks: dict[Config, int]) -> dict[str, int]:
    """A client's measured training step at the local batch, by tier; each configuration is measured once a run."""
    spec = StepSpec(batch_size=run.settings.local_batch, **run.plan.step.model_dump())
    configs = {tier.name: run.strategy.client_config(state, tier.name) for tier in run.federation.tiers}
    for config in configs.values():
        if config is not None and config not in peaks:
            model = extract(run.graph, state.weights, config, spec.norms)
            peaks[config] = measure(model, spec, details=False).peak_bytes
    return {name: peaks[config] for name, config in configs.items() if config is not None}


def _empty_result(run: Run, made_on: dict[str, str]) -> RunResult:
    state = ServerState(0, {})
    tiers = tuple(
        RunTier(
            name=tier.name,
            budget_bytes=tier.budget_bytes,
            clients=run.federation.tier_of.count(number),
            takes_part=run.strategy.client_config(state, tier.name) is not None,
        )
        for number, tier in enumerate(run.federation.tiers)
    )
    return RunResult(
        settings=run.settings,
        plan=run.plan,
        dataset_title=run.dataset.title,
        train_images=len(run.dataset.train_labels),
        test_images=len(run.dataset.test_labels),
        head_scale=run.strategy.head_scale if isinstance(run.strategy, SmallNetwork) else None,
        tiers=tiers,
        status="stopped",
        environment=made_on,
    )


def _with_rows(result: RunResult, rows: Sequence[RoundRow]) -> RunResult:
    def highest(tier: RunTier) -> RunTier:
        peaks = [row.measured_peak_bytes[tier.name] for row in rows if tier.name in row.measured_peak_bytes]
        return tier.model_copy(update={"measured_peak_bytes": max(peaks, default=None)})

    return result.model_copy(update={"rows": tuple(rows), "tiers": tuple(highest(tier) for tier in result.tiers)})


def finish(run: Run, state: ServerState) -> tuple[ServerState, dict[str, object]]:
    """Recalibrate the running statistics and judge the final network by both kinds of statistics."""
    settings, scale = run.settings, run.strategy.evaluation_config(state).head_scale
    weights = recalibrate(run.graph, state.weights, scale, run.dataset, settings.seed)
    outcome: dict[str, object] = {"status": "finished"}
    kinds: tuple[tuple[Norms, str], ...] = (
        ("static", "accuracy_batch_statistics"),
        ("running", "accuracy_running_statistics"),
    )
    for norms, name in kinds:
        model = extract(run.graph, weights, Config(freeze_depth=0, full_depth=0, head_scale=scale), norms)
        outcome[name], _ = evaluate(model, run.dataset, run.plan.step, settings.seed + _EVALUATION)
    return replace(state, weights=weights), outcome
