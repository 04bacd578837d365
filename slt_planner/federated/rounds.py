"""One round of a run: a cohort is drawn and trains, its updates are merged, and what came of it is written in a row."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from slt_planner.federated.accounting import RoundCosts, Visit, round_costs
from slt_planner.federated.availability import answer
from slt_planner.federated.client import LocalTraining, learning_rate
from slt_planner.federated.engines.base import Assignment, Engine, RoundLog
from slt_planner.federated.engines.local import LocalEngine
from slt_planner.federated.evaluate import evaluate
from slt_planner.federated.progress import Holders, Progress
from slt_planner.federated.refusals import Screen
from slt_planner.federated.result import RoundRow
from slt_planner.federated.setup import Run
from slt_planner.federated.strategies.base import ClientStep, ServerState, apply
from slt_planner.submodel.extract import extract

_COHORT_STREAM, EVALUATION_STREAM = 2, 3  # keep these uses of the seed apart from the others


def run_round(run: Run, state: ServerState, engine: Engine | None = None) -> tuple[ServerState, RoundRow]:
    """One round: train those of a cohort that answer, merge, evaluate if it is time to.

    Clients train where the engine runs them; by default one after the other in this process.
    """
    began, engine = time.perf_counter(), engine or LocalEngine()
    run = engine.meet(run)
    settings, strategy, number = run.settings, run.strategy, state.round + 1
    stage, config, log = strategy.stage(state), strategy.evaluation_config(state), RoundLog()
    steps = _steps_of_tiers(run, state)
    cohort = draw_cohort(run, state)
    holders = engine.holders(_holders(state, stage, steps))
    samples_a_step = settings.local_batch / settings.local_epochs
    screen = Screen(run.graph, state.weights, state.progress.recent_changes, settings.max_change, samples_a_step)
    answering = [assignment for assignment in cohort if assignment.answer == "in_time"]
    after = apply(run.graph, state, engine.run_clients(run, state, answering, holders, screen, log))
    cohort = [replace(own, answer=log.answers.get(own.client, own.answer)) for own in cohort]
    costs = round_costs(_visits(run, steps, cohort), holders)
    train_loss = _finite(float(np.mean(log.losses))) if log.losses else None
    after = replace(after, progress=_progress(run, state, stage, costs, log, train_loss))
    evaluating = time.perf_counter()
    accuracy, loss = None, None
    if number % settings.evaluate_every == 0 or number == settings.rounds:
        judged = extract(run.graph, after.weights, config, run.plan.step.norms).to(settings.device)
        accuracy, loss = evaluate(judged, run.dataset, settings.seed + EVALUATION_STREAM)
    ended = time.perf_counter()
    row = RoundRow(
        round=number,
        stage=stage,
        config=config,
        learning_rate=_learning_rate(run, state),
        accuracy=accuracy,
        loss=None if loss is None else _finite(loss),
        train_loss=train_loss,
        bytes_up=costs.bytes_up,
        bytes_down=costs.bytes_down,
        train_flops=costs.train_flops,
        clients=len(cohort),
        dropped_out=sum(assignment.answer == "never" for assignment in cohort),
        stragglers=sum(assignment.answer == "late" for assignment in cohort),
        absent=tuple(log.absent),
        refused=len(log.refusals),
        refusals=tuple(log.refusals),
        measured_peak_bytes={tier: run.client_peaks[step] for tier, step in steps.items()},
        train_seconds=log.train_seconds,
        evaluate_seconds=ended - evaluating,
        seconds=ended - began,
    )
    return after, row


def _steps_of_tiers(run: Run, state: ServerState) -> dict[str, ClientStep]:
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
    eligible = run.clients_taking_part
    random = np.random.default_rng([settings.seed, _COHORT_STREAM, number])
    drawn = random.choice(eligible, size=min(settings.cohort_size, len(eligible)), replace=False)

    def assignment(client: int) -> Assignment:
        tier = tiers[run.tier_of[client]]
        step = run.strategy.client_step(state, tier.name, client)
        training = local_training(run, state, step)
        will = answer(settings.seed, number, client, settings.client_dropout, settings.stragglers)
        return Assignment(client, tier.name, step.config, training, run.images_of[client], tier.budget_bytes, will)

    return [assignment(int(client)) for client in drawn]


def local_training(run: Run, state: ServerState, client_step: ClientStep) -> LocalTraining:
    """How a client of the next round trains this step."""
    settings = run.settings
    return LocalTraining(
        step=run.step_with(client_step.levers).settings.model_copy(update={"device": settings.device}),
        batch_size=settings.local_batch,
        epochs=settings.local_epochs,
        learning_rate=_learning_rate(run, state),
        augment=settings.augment,
        enforce=settings.enforce and run.strategy.keeps_budgets,
        widths=client_step.widths,
    )


def _learning_rate(run: Run, state: ServerState) -> float:
    settings = run.settings
    return learning_rate(state.round + 1, settings.rounds, settings.learning_rate, settings.final_learning_rate)
