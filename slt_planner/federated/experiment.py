"""A plan goes in, a federated run comes out: the loop over rounds, and the folder it leaves."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from slt_planner.config import Config, LeverSet, Norms
from slt_planner.data.datasets import Dataset, load_dataset
from slt_planner.environment import environment
from slt_planner.errors import InputError
from slt_planner.federated.accounting import RoundCosts, Visit, round_costs
from slt_planner.federated.availability import answer
from slt_planner.federated.checkpoint import load_checkpoint, save_checkpoint
from slt_planner.federated.client import LocalTraining, learning_rate
from slt_planner.federated.engines.local import Assignment, RoundLog, run_clients
from slt_planner.federated.evaluate import evaluate, recalibrate
from slt_planner.federated.progress import Holders, Progress
from slt_planner.federated.refusals import Screen
from slt_planner.federated.result import RoundRow, RunResult, RunSettings, RunTier
from slt_planner.federated.run_folder import TENSORBOARD, RunFolder, load_run
from slt_planner.federated.setup import Run, default_settings, image_shape, load_network, prepare
from slt_planner.federated.strategies.base import ClientStep, ServerState, apply
from slt_planner.federated.tensorboard_log import TensorboardLog
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
    begin_run(run, folder, force)
    return continue_run(run, folder, progress)


def begin_run(run: Run, folder: Path, force: bool = False) -> None:
    """Make the folder of a run, from which `continue_run` can go on; as `run_experiment`."""
    with threads(run.plan.step) as number:
        RunFolder(folder).begin(_empty_result(run, environment(number)), force)


def continue_run(run: Run, folder: Path, progress: Callable[[RoundRow], None] = lambda row: None) -> RunResult:
    """Do the rounds of a run that its folder does not have yet, and come to the end it would have come to at once.

    The run goes on from its checkpoint, or from its first round if it has none; rows of rounds past that are dropped
    and made again. An interrupt (Ctrl-C) ends it early; it can be continued then.

    Raises:
        InputError: the run is not the one that the folder was begun with, the checkpoint and the rows do not go
            together, another process is at work on the run, or its folder cannot be written.
    """
    run_folder = RunFolder(folder)
    with threads(run.plan.step), run_folder.alone():
        result = load_run(folder)
        _check_same(run, result, folder)
        state = load_checkpoint(folder, run.graph, run.start) or run.start
        rows, outcome = run_folder.keep_rounds(state.round), dict[str, object]()
        with closing(TensorboardLog(folder / TENSORBOARD, rows)) as log:
            try:
                while state.round < run.settings.rounds:
                    after, row = run_round(run, state)
                    run_folder.append(row)
                    rows.append(row)
                    state = after
                    if state.round % run.settings.checkpoint_every == 0:
                        save_checkpoint(folder, run.graph, state)
                    log.add(row)
                    progress(row)
                outcome = judge(run, state, _last_config(run, rows))
            except KeyboardInterrupt:  # what is done is kept, and the result says "stopped"
                save_checkpoint(folder, run.graph, state)
        result = _with_rows(result, rows).model_copy(update=outcome)
        trained = _last_config(run, rows)
        weights = recalibrate(run.graph, state.weights, trained, run.dataset, run.settings.seed)
        run_folder.write_weights(weights, trained)
        run_folder.write_settings(result)  # after the weights: what is finished has them
        if result.status == "finished":
            run_folder.remove_checkpoint()
    return result


def resume(folder: str | Path, model: nn.Module | str | None = None) -> RunResult:
    """Go on with a run that was interrupted, killed or never begun, to the end that it would have come to at once.

    Args:
        folder: the run folder.
        model: the network, where the plan's is not one of a library; it must be the one that the run was begun with.

    Raises:
        ValueError: not a run folder, or a network, data or files that are not the run's.
        InfeasibleError: as `train`.
    """
    result = load_run(folder)
    return result if result.status == "finished" else continue_run(prepare_again(result, model), Path(folder))


def prepare_again(result: RunResult, model: nn.Module | str | None = None, dataset: Dataset | None = None) -> Run:
    """The run that a run folder was begun with, prepared as it was then; `dataset` where it is loaded already.

    Raises:
        InputError: the network is not the plan's, or the data are not there any more.
        InfeasibleError: as `prepare`.
    """
    plan, settings = result.plan, result.settings
    network = load_network(plan, settings.seed, model)
    data = dataset or load_dataset(settings.dataset, image_shape(plan), plan.num_classes)
    return prepare(plan, settings, data, network)


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
        strategy: ``slt`` or ``small``.
        out: the run folder.
        force: overwrite the files of an existing run.
        settings: more fields of `RunSettings`, such as ``clients=100``.

    Raises:
        ValueError: settings, data or model that are wrong or do not go together, or a folder that exists.
        InfeasibleError: no small network fits (strategy ``small``), or a step needs more than its tier's budget here.
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
    """One round: train those of a cohort that answer, merge, evaluate if it is time to."""
    began = time.perf_counter()
    settings, strategy, number = run.settings, run.strategy, state.round + 1
    stage, config, log = strategy.stage(state), strategy.evaluation_config(state), RoundLog()
    steps = _tier_steps(run, state)
    cohort = draw_cohort(run, state)
    costs = round_costs(_visits(run, steps, cohort), _holders(state, stage, steps))
    screen = Screen(run.graph, state.weights, state.progress.recent_changes, settings.max_change)
    answering = [assignment for assignment in cohort if assignment.answer == "in_time"]
    updates = run_clients(run.graph, state, answering, run.dataset, settings.seed, screen, log)
    after = apply(run.graph, state, updates)
    train_loss = _finite(float(np.mean(log.losses))) if log.losses else None
    after = replace(after, progress=_progress(run, state, stage, costs, log, train_loss))
    evaluating = time.perf_counter()
    accuracy, loss = None, None
    if number % settings.evaluate_every == 0 or number == settings.rounds:
        judged = extract(run.graph, after.weights, config, run.plan.step.norms)
        accuracy, loss = evaluate(judged, run.dataset, run.plan.step, settings.seed + _EVALUATION_STREAM)
    ended = time.perf_counter()
    row = RoundRow(
        round=number,
        stage=stage,
        config=config,
        learning_rate=local_training(run, state, ()).learning_rate,
        accuracy=accuracy,
        loss=None if loss is None else _finite(loss),
        train_loss=train_loss,
        bytes_up=costs.bytes_up,
        bytes_down=costs.bytes_down,
        train_flops=costs.train_flops,
        clients=len(cohort),
        dropped_out=sum(assignment.answer == "never" for assignment in cohort),
        stragglers=sum(assignment.answer == "late" for assignment in cohort),
        refused=len(log.refusals),
        refusals=tuple(log.refusals),
        measured_peak_bytes={tier: run.client_peaks[step] for tier, step in steps.items()},
        train_seconds=log.train_seconds,
        evaluate_seconds=ended - evaluating,
        seconds=ended - began,
    )
    return after, row


def _tier_steps(run: Run, state: ServerState) -> dict[str, ClientStep]:
    """What the clients of each tier that takes part train in the next round, by size."""
    taking_part = [tier.name for tier in run.plan.tiers if run.strategy.tier_steps(tier.name)]
    return {tier: run.strategy.tier_step(state, tier) for tier in taking_part}


def _visits(run: Run, steps: Mapping[str, ClientStep], cohort: Sequence[Assignment]) -> list[Visit]:
    return [
        Visit(own.client, own.answer, run.client_costs[steps[own.tier]], len(own.indices) * own.training.epochs)
        for own in cohort
    ]


def _holders(state: ServerState, stage: int, steps: Mapping[str, ClientStep]) -> Holders:
    """Who has what nobody trains in this stage: a unit that one tier freezes and another one trains changes."""
    return state.progress.holders.of(stage, min(step.config.freeze_depth for step in steps.values()))


def _progress(
    run: Run, state: ServerState, stage: int, costs: RoundCosts, log: RoundLog, train_loss: float | None
) -> Progress:
    """That of the state after a round."""
    settings, progress = run.settings, state.progress.remembering(log.changes)
    plateau = progress.plateau
    if settings.rounds_policy == "plateau":
        plateau = plateau.after(stage, train_loss, settings.plateau_patience, settings.plateau_threshold)
    return progress.model_copy(update={"plateau": plateau, "holders": costs.holders})


def _finite(number: float) -> float | None:
    return number if np.isfinite(number) else None


def draw_cohort(run: Run, state: ServerState) -> Sequence[Assignment]:
    """This round's clients, in the order their updates are folded; those whose tier sits out are not drawn."""
    settings, tiers, number = run.settings, run.plan.tiers, state.round + 1
    eligible = [client for client, tier in enumerate(run.tier_of) if run.strategy.tier_steps(tiers[tier].name)]
    random = np.random.default_rng([settings.seed, _COHORT_STREAM, number])
    drawn = random.choice(eligible, size=min(settings.cohort_size, len(eligible)), replace=False)

    def assignment(client: int) -> Assignment:
        tier = tiers[run.tier_of[client]]
        step = run.strategy.client_step(state, tier.name, client)
        training = local_training(run, state, step.levers)
        images, availability = run.images_of[client], (settings.client_dropout, settings.stragglers)
        will = answer(settings.seed, number, client, *availability)
        return Assignment(client, tier.name, step.config, training, images, tier.budget_bytes, will)

    return [assignment(int(client)) for client in drawn]


def local_training(run: Run, state: ServerState, levers: LeverSet) -> LocalTraining:
    """How a client of the next round trains with these levers."""
    settings = run.settings
    rate = learning_rate(state.round + 1, settings.rounds, settings.learning_rate, settings.final_learning_rate)
    step = run.step_with(levers).settings
    return LocalTraining(step, settings.local_batch, settings.local_epochs, rate, settings.enforce)


def judge(run: Run, state: ServerState, config: Config) -> dict[str, object]:
    """The accuracy of what was trained last, by both kinds of statistics, as fields of a finished result."""
    seed = run.settings.seed
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


def _last_config(run: Run, rows: Sequence[RoundRow]) -> Config:
    """What the last round was judged by; before the first one, what that will be."""
    return rows[-1].config if rows else run.strategy.evaluation_config(run.start)


def _check_same(run: Run, begun: RunResult, folder: Path) -> None:
    """Whether a run is the one that a folder was begun with; its measured peaks are those of this machine."""
    own = _empty_result(run, begun.environment)
    for name in ("settings", "plan", "metric", "dataset_title", "train_images", "test_images", "head_scale"):
        now, then = getattr(own, name), getattr(begun, name)
        if now != then:
            told = f", {then}, and is {now} here" if isinstance(then, (str, int, float)) else ""
            raise InputError(f"run {folder}: its {name.replace('_', ' ')} was another one when it began{told}")


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
