"""A plan goes in, a federated run comes out: the loop over rounds, and the folder it leaves."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from slt_planner.config import Norms
from slt_planner.data.datasets import load_dataset
from slt_planner.environment import environment
from slt_planner.federated.client import LocalTraining, learning_rate
from slt_planner.federated.engines.local import Assignment, RoundLog, run_clients
from slt_planner.federated.evaluate import evaluate, recalibrate
from slt_planner.federated.result import RoundRow, RunResult, RunSettings, RunTier
from slt_planner.federated.run_folder import RunFolder
from slt_planner.federated.setup import Run, default_settings, image_shape, load_network, prepare
from slt_planner.federated.strategies.base import ClientStep, ServerState, apply
from slt_planner.memory.step import threads
from slt_planner.planning.plan import Plan
from slt_planner.submodel.extract import extract

_COHORT_STREAM, _EVALUATION_STREAM = 2, 3  # keep these uses of the seed apart from the others


def run_experiment(
    run: Run,
    folder: Path,
    force: bool = False,
    progress: Callable[[RoundRow], None] = lambda row: None,
) -> RunResult:
    """Do the rounds of a run and leave a run folder; an interrupt (Ctrl-C) ends it early, folder and all.

    Args:
        run: the run, prepared.
        folder: the run folder to make.
        force: overwrite the files of an existing run.
        progress: called after each round.

    Raises:
        InputError: the folder exists and `force` is False, or it cannot be written.
    """
    with threads(run.plan.step) as number:
        result = _empty_result(run, environment(number))
        run_folder = RunFolder(folder, force)
        run_folder.write_settings(result)
        state, rows, outcome = run.start, list[RoundRow](), dict[str, object]()
        try:
            while state.round < run.settings.rounds:
                state, row = run_round(run, state)
                rows.append(row)
                run_folder.append(row)
                progress(row)
            outcome = judge(run, state)
        except KeyboardInterrupt:
            pass  # what is done is kept, and the result says "stopped"
        result = _with_rows(result, rows).model_copy(update=outcome)
        run_folder.write_settings(result)
        trained = run.strategy.evaluation_config(replace(state, round=max(0, state.round - 1)))
        weights = recalibrate(run.graph, state.weights, trained, run.dataset, run.settings.seed)
        run_folder.write_weights(weights, trained)
    return result


def train(
    plan: Plan,
    dataset: str = "digits",
    rounds: int | None = None,
    model: nn.Module | str | None = None,
    strategy: str = "slt",
    out: str | Path = "runs/run",
    force: bool = False,
    **settings: object,
) -> RunResult:
    """Run a plan and leave a run folder; the arguments are those of ``slt-train``.

    Args:
        plan: the plan.
        dataset: ``digits``, ``parquet:DIR`` or ``masks:DIR``.
        rounds: federated rounds; by default by the data set's size.
        model: the network to start from, or its name as `load_model` takes it; by default the plan's, initialised by
            the seed.
        strategy: one of `StrategyName`.
        out: the run folder.
        force: overwrite the files of an existing run.
        settings: more fields of `RunSettings`, such as ``clients=100``.

    Raises:
        ValueError: settings, data or model that are wrong or do not go together, or a folder that exists.
        InfeasibleError: nothing that the strategy trains fits, or a step needs more than its tier's budget here.
    """
    seed = settings.get("seed", 0)
    network = load_network(plan, seed if isinstance(seed, int) else 0, model)
    data = load_dataset(dataset, image_shape(plan), plan.num_classes)
    clients = settings.get("clients")
    defaults = default_settings(plan, data, clients if isinstance(clients, int) else None).model_dump()
    given = {"rounds": rounds, **settings}
    chosen = defaults | {name: value for name, value in given.items() if value is not None}
    run_settings = RunSettings.model_validate({"strategy": strategy, "dataset": dataset, **chosen})
    return run_experiment(prepare(plan, run_settings, data, network), Path(out), force)


def run_round(run: Run, state: ServerState) -> tuple[ServerState, RoundRow]:
    """One round: train a cohort, merge, evaluate."""
    began = time.perf_counter()
    settings, strategy, step, number = run.settings, run.strategy, run.plan.step, state.round + 1
    cohort = draw_cohort(run, state)
    stage, config, log = strategy.stage(state), strategy.evaluation_config(state), RoundLog()
    measured = {
        tier.name: run.client_peaks[strategy.tier_step(state, tier.name)]
        for tier in run.plan.tiers
        if strategy.tier_steps(tier.name)
    }
    updates = run_clients(run.graph, state, cohort, run.dataset, settings.seed, log)
    state = apply(run.graph, state, updates)
    judged = extract(run.graph, state.weights, config, step.norms)
    accuracy, loss = evaluate(judged, run.dataset, step, settings.seed + _EVALUATION_STREAM)
    row = RoundRow(
        round=number,
        stage=stage,
        config=config,
        learning_rate=_learning_rate(run, state),
        accuracy=accuracy,
        loss=_finite(loss),
        train_loss=_finite(float(np.mean(log.losses))) if log.losses else None,
        bytes_up=log.bytes_up,
        bytes_down=log.bytes_down,
        clients=len(cohort),
        refused=log.refused,
        measured_peak_bytes=measured,
        train_seconds=log.train_seconds,
        seconds=time.perf_counter() - began,
    )
    return state, row


def _finite(number: float) -> float | None:
    return number if np.isfinite(number) else None


def draw_cohort(run: Run, state: ServerState) -> Sequence[Assignment]:
    """This round's clients, in the order their updates are folded; those whose tier sits out are not drawn."""
    tiers = run.plan.tiers
    eligible = [client for client, tier in enumerate(run.tier_of) if run.strategy.tier_steps(tiers[tier].name)]
    random = np.random.default_rng([run.settings.seed, _COHORT_STREAM, state.round + 1])
    drawn = random.choice(eligible, size=min(run.settings.cohort_size, len(eligible)), replace=False)

    def assignment(client: int) -> Assignment:
        tier = tiers[run.tier_of[client]]
        step = run.strategy.client_step(state, tier.name, client)
        training = local_training(run, state, step)
        return Assignment(client, step.config, training, run.images_of[client], tier.budget_bytes)

    return [assignment(int(client)) for client in drawn]


def local_training(run: Run, state: ServerState, client_step: ClientStep) -> LocalTraining:
    """How a client of the next round trains this step."""
    settings, rate = run.settings, _learning_rate(run, state)
    step = run.step_with(client_step.levers).settings
    return LocalTraining(step, settings.local_batch, settings.local_epochs, rate, settings.enforce, client_step.widths)


def _learning_rate(run: Run, state: ServerState) -> float:
    settings = run.settings
    return learning_rate(state.round + 1, settings.rounds, settings.learning_rate, settings.final_learning_rate)


def judge(run: Run, state: ServerState) -> dict[str, object]:
    """The final network's accuracy by both kinds of statistics, as fields of a finished result."""
    seed, config = run.settings.seed, run.strategy.evaluation_config(state)
    weights = recalibrate(run.graph, state.weights, config, run.dataset, seed)
    kinds: tuple[tuple[Norms, str], ...] = (
        ("static", "accuracy_batch_statistics"),
        ("running", "accuracy_running_statistics"),
    )
    outcome: dict[str, object] = {"status": "finished"}
    for norms, name in kinds:
        model = extract(run.graph, weights, config, norms)
        outcome[name], _ = evaluate(model, run.dataset, run.plan.step, seed + _EVALUATION_STREAM)
    return outcome


def _empty_result(run: Run, made_on: dict[str, str]) -> RunResult:
    configs = {step.config for tier in run.plan.tiers for step in run.strategy.tier_steps(tier.name)}
    tiers = tuple(
        RunTier(
            name=tier.name,
            budget_bytes=tier.budget_bytes,
            clients=run.tier_of.count(number),
            takes_part=bool(run.strategy.tier_steps(tier.name)),
        )
        for number, tier in enumerate(run.plan.tiers)
    )
    return RunResult(
        settings=run.settings,
        plan=run.plan,
        dataset_title=run.dataset.title,
        metric=run.graph.adapter.metric,
        train_images=len(run.dataset.train_labels),
        test_images=len(run.dataset.test_labels),
        head_scale=configs.pop().head_scale if len(configs) == 1 else None,
        tiers=tiers,
        status="stopped",
        environment=made_on,
    )


def _with_rows(result: RunResult, rows: Sequence[RoundRow]) -> RunResult:
    def highest(tier: RunTier) -> RunTier:
        peaks = [row.measured_peak_bytes[tier.name] for row in rows if tier.name in row.measured_peak_bytes]
        return tier.model_copy(update={"measured_peak_bytes": max(peaks, default=None)})

    return result.model_copy(update={"rows": tuple(rows), "tiers": tuple(highest(tier) for tier in result.tiers)})
