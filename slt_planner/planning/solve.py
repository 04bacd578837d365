"""From a ModelGraph and tiers to a Plan: the schedule found on predicted steps, and proven by measured ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from slt_planner.config import Config, StepSpec, Tier, equal_tiers
from slt_planner.environment import environment
from slt_planner.errors import InfeasibleError, InputError
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory.profile import MemoryProfile
from slt_planner.planning.bench import Bench, Progress, StepBench, silent
from slt_planner.planning.infeasible import Infeasibility, explain
from slt_planner.planning.levers import lever_sets
from slt_planner.planning.plan import (
    LimitedBy,
    Plan,
    PlannedModel,
    Policy,
    Proof,
    ProofKind,
    RoundsPolicy,
    Stage,
    TierPlan,
    TierStage,
)
from slt_planner.planning.rounds import rounds_fractions
from slt_planner.planning.search import NoSchedule, SearchSpace, StageChoice, find_schedule, least_frozen
from slt_planner.planning.trade_off import trade_off


@dataclass(frozen=True)
class OwnStage:
    """A tier's configuration in a stage, why its head is no wider, and what must be over for it to be maximal."""

    config: Config
    limited_by: LimitedBy
    beyond: Mapping[ProofKind, Config]


Outcome: TypeAlias = tuple[OwnStage, ...] | NoSchedule


def solve(
    graph: ModelGraph,
    tiers: Sequence[str] | Sequence[Tier],
    spec: StepSpec,
    model_name: str | None = None,
    progress: Progress = silent,
    verify: bool = True,
    policy: Policy = "coupled",
    rounds_policy: RoundsPolicy = "parameters",
    map_trade_off: bool = False,
    levers: str = "none",
) -> Plan:
    """The largest schedule that fits each tier (METHOD, section 1).

    With the policy ``coupled`` the weakest tier that has a schedule sets full_depth and head_scale of each stage, and
    each tier freezes as little as fits; with ``per-tier`` only full_depth is shared, and every tier has the widest head
    that fits it. Memory does not depend on values, so the network's weights are not needed.

    Args:
        graph: the traced network.
        tiers: budgets such as ``["64MB", "128MB"]``, or tiers.
        spec: the training step; its threads, if None, become this process's.
        model_name: what the plan calls the network.
        progress: told what is going on.
        verify: measure every stage and every proof; a measurement overrules a prediction. Without, the plan rests on
            predictions, for which operators are calibrated that are not known yet.
        policy: which of a stage's numbers the tiers share.
        rounds_policy: a stage's rounds in proportion to its trainable parameters, or ``equal``.
        map_trade_off: also map what freezing and narrowing buy, where steps can be predicted.
        levers: how steps may be run in less memory: ``none``, ``auto``, ``exact`` or a list (`levers.lever_sets`). A
            configuration fits if it does with one of the sets; its stage has the cheapest with which it does.

    Raises:
        InputError: a budget that cannot be read, tiers that share a name, a batch of one, or, without `verify`, a
            network whose steps cannot be predicted.
        InfeasibleError: no tier has a schedule; the message gives each tier's reason.
    """
    if spec.batch_size < 2:
        raise InputError(f"batch size {spec.batch_size}: a plan is for batches of 2 or more")
    if spec.threads is None:
        spec = spec.model_copy(update={"threads": torch.get_num_threads()})
    ordered = _ordered_tiers(tiers)
    sets = lever_sets(levers, spec, images=len(graph.input_shape) == 3)
    with Bench(graph, spec, verify, progress, sets) as bench:
        outcomes = _search(bench.space(), ordered, policy)
        while (
            bench.measure_all(_within(ordered, outcomes), [bench.whole, *_over(outcomes)])
            if verify
            else bench.examine([bench.whole, *_over(outcomes)])
        ):
            outcomes = _search(bench.space(), ordered, policy)
        if verify:
            bench.plain.measure(bench.whole)
        reasons = {
            tier.name: explain(bench, tier.budget_bytes, outcome, measuring=verify)
            for tier in ordered
            if isinstance(outcome := outcomes[tier.name], NoSchedule)
        }
        if len(reasons) == len(ordered):
            raise InfeasibleError("; ".join(f"{name}: {reason.text}" for name, reason in reasons.items()))
        tier_plans = tuple(
            _infeasible(tier, reasons[tier.name])
            if isinstance(outcome := outcomes[tier.name], NoSchedule)
            else _feasible(tier, outcome, bench, timed=verify)
            for tier in ordered
        )
        return Plan(
            model=PlannedModel(
                name=model_name,
                graph_hash=graph.hash,
                granularity=graph.granularity,
                data_dependent=bool(graph.adapter.part),
                unit_names=tuple(u.name for u in graph.units),
            ),
            input_shape=graph.input_shape,
            num_classes=graph.num_classes,
            batch_size=spec.batch_size,
            step=spec.settings,
            policy=policy,
            rounds_policy=rounds_policy,
            lever_sets=sets,
            environment=environment(spec.threads or 0),
            full_network=_whole_network(bench.plain, bench.whole),
            stages=_shared_stages(next(tier for tier in tier_plans if tier.stages), rounds_policy),
            tiers=tier_plans,
            trade_off=trade_off(bench, ordered) if map_trade_off and bench.predicts else None,
        )


def _whole_network(bench: StepBench, whole: Config) -> MemoryProfile:
    """The network's own step with its units; and its timeline, unless that is a foreseen one with another peak."""
    profile, detailed = bench.profile(whole), bench.detailed(whole)
    update: dict[str, object] = {"units": detailed.units}
    if detailed.peak_bytes == profile.peak_bytes:
        update |= {"resident": detailed.resident, "timeline": detailed.timeline}
    return profile.model_copy(update=update)


def _ordered_tiers(tiers: Sequence[str] | Sequence[Tier]) -> tuple[Tier, ...]:
    named = [tier for tier in tiers if isinstance(tier, Tier)]
    if not named:
        return equal_tiers([tier for tier in tiers if isinstance(tier, str)])
    if len(named) < len(tiers) or len({tier.name for tier in named}) < len(named):
        raise InputError("tiers: give budgets alone, or tiers alone, each with a name of its own")
    return tuple(sorted(named, key=lambda tier: tier.budget_bytes))


def _search(space: SearchSpace, tiers: Sequence[Tier], policy: Policy) -> dict[str, Outcome]:
    """Each tier's stages, or why it has none."""
    outcomes: dict[str, Outcome] = {}
    shared: tuple[StageChoice, ...] | None = None  # as the weakest tier that has a schedule sets them
    for tier in tiers:
        found = find_schedule(space, tier.budget_bytes) if shared is None or policy == "per-tier" else shared
        if isinstance(found, NoSchedule):
            outcomes[tier.name] = found
            continue
        binds = shared is None or policy == "per-tier"
        shared = shared or found
        own = (*found, *[found[-1]] * (len(shared) - len(found)))  # who is through trains the whole network
        outcomes[tier.name] = tuple(_own_stages(space, own, tier.budget_bytes, binds))
    return outcomes


def _own_stages(space: SearchSpace, choices: Sequence[StageChoice], budget: int, binds: bool) -> Iterator[OwnStage]:
    freeze_depth = 0
    for choice in choices:
        freeze_depth = least_frozen(space, choice, budget, guess=freeze_depth)
        beyond: dict[ProofKind, Config] = {}
        if binds and choice.wider_head is not None:
            beyond["wider_head"] = choice.wider_head
        if freeze_depth > 0:
            beyond["less_frozen"] = space.config(freeze_depth - 1, choice.full_depth, choice.head_scale)
        yield OwnStage(
            config=space.config(freeze_depth, choice.full_depth, choice.head_scale),
            limited_by=choice.limited_by if binds or choice.limited_by == "full" else "weakest_tier",
            beyond=beyond,
        )


def _within(tiers: Sequence[Tier], outcomes: Mapping[str, Outcome]) -> Iterator[tuple[Config, int]]:
    """The configurations that the outcomes say fit, each with its budget."""
    for tier in tiers:
        outcome = outcomes[tier.name]
        if not isinstance(outcome, NoSchedule):
            yield from ((stage.config, tier.budget_bytes) for stage in outcome)


def _over(outcomes: Mapping[str, Outcome]) -> Iterator[Config]:
    """The configurations that the outcomes say do not fit."""
    for outcome in outcomes.values():
        if isinstance(outcome, NoSchedule):
            yield outcome.floor
        else:
            yield from (config for stage in outcome for config in stage.beyond.values())


def _infeasible(tier: Tier, reason: Infeasibility) -> TierPlan:
    return TierPlan(
        **tier.model_dump(),
        status="infeasible",
        reason=reason.text,
        smallest_budget_bytes=reason.smallest_budget_bytes,
        largest_batch=reason.largest_batch,
    )


def _feasible(tier: Tier, stages: Sequence[OwnStage], bench: Bench, timed: bool) -> TierPlan:
    return TierPlan(
        **tier.model_dump(),
        status="full" if bench.peak(bench.whole) <= tier.budget_bytes else "scheduled",
        stages=tuple(_tier_stage(stage, tier.budget_bytes, bench, timed) for stage in stages),
        proofs=tuple(
            _proof(number, kind, config, bench)
            for number, stage in enumerate(stages)
            for kind, config in stage.beyond.items()
        ),
    )


def _tier_stage(stage: OwnStage, budget: int, bench: Bench, timed: bool) -> TierStage:
    levers = bench.cheapest(stage.config, budget)
    assert levers is not None, "the search found that it fits"
    step = bench.with_levers(levers)
    predicted, measured = step.predicted(stage.config), step.measured(stage.config)
    return TierStage(
        freeze_depth=stage.config.freeze_depth,
        full_depth=stage.config.full_depth,
        head_scale=stage.config.head_scale,
        limited_by=stage.limited_by,
        levers=levers,
        relative_time=bench.relative_time(stage.config, levers) if timed and levers else None,
        predicted_peak_bytes=predicted.peak_bytes if predicted else None,
        predicted_breakdown=predicted.breakdown if predicted else None,
        measured_peak_bytes=measured.peak_bytes if measured else None,
        measured_breakdown=measured.breakdown if measured else None,
        **step.costs(stage.config).model_dump(),
    )


def _proof(stage: int, kind: ProofKind, config: Config, bench: Bench) -> Proof:
    step = bench.leanest(config)
    predicted, measured = step.predicted(config), step.measured(config)
    return Proof(
        stage=stage,
        kind=kind,
        freeze_depth=config.freeze_depth,
        full_depth=config.full_depth,
        head_scale=config.head_scale,
        levers=step.levers,
        predicted_peak_bytes=predicted.peak_bytes if predicted else None,
        measured_peak_bytes=measured.peak_bytes if measured else None,
    )


def _shared_stages(binding: TierPlan, rounds_policy: RoundsPolicy) -> tuple[Stage, ...]:
    weights = [1 if rounds_policy == "equal" else stage.trainable_parameters for stage in binding.stages]
    return tuple(
        Stage(
            full_depth=stage.full_depth,
            head_scale=stage.head_scale,
            rounds_fraction=fraction,
            limited_by=stage.limited_by,
        )
        for stage, fraction in zip(binding.stages, rounds_fractions(weights), strict=True)
    )
