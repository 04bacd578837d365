"""From a ModelGraph and tiers to a Plan: the schedule found and proven by measured training steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from slt_planner.config import Config, StepSpec, Tier, equal_tiers
from slt_planner.environment import environment
from slt_planner.errors import InfeasibleError, InputError
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory.flops import training_flops
from slt_planner.memory.measure import measure
from slt_planner.memory.profile import MemoryProfile
from slt_planner.memory.step import as_trained
from slt_planner.planning.plan import Plan, PlannedModel, Proof, Stage, TierPlan, TierStage
from slt_planner.planning.rounds import rounds_fractions
from slt_planner.planning.search import (
    NoSchedule,
    SearchSpace,
    StageChoice,
    find_schedule,
    least_frozen,
    smallest_budget,
)
from slt_planner.submodel.extract import extract
from slt_planner.units import format_bytes

Progress = Callable[[int, Config], None]
"""Told after each measured step: how many there were, and which configuration it was."""


def solve(
    graph: ModelGraph,
    tiers: Sequence[str] | Sequence[Tier],
    spec: StepSpec,
    model_name: str | None = None,
    progress: Progress = lambda count, config: None,
) -> Plan:
    """The `coupled` schedule, every stage of every tier measured (METHOD, section 1).

    The weakest tier that has a schedule sets full_depth and head_scale of each stage; each tier then freezes as
    little as fits. Memory does not depend on values, so the network's weights are not needed.

    Args:
        graph: the traced network.
        tiers: budgets such as ``["64MB", "128MB"]``, or tiers.
        spec: the training step; its threads, if None, become this process's.
        model_name: what the plan calls the network.
        progress: called after each measured step.

    Raises:
        InputError: a budget that cannot be read, tiers that share a name, or a batch of one.
        InfeasibleError: no tier has a schedule; the message gives each tier's reason.
    """
    if spec.batch_size < 2:
        raise InputError(f"batch size {spec.batch_size}: a plan is for batches of 2 or more")
    if spec.threads is None:
        spec = spec.model_copy(update={"threads": torch.get_num_threads()})
    ordered = _ordered_tiers(tiers)
    bench = MeasuringBench(graph, spec, progress)
    space = bench.space()
    full_network = bench.profile_full_network()
    outcomes = _search_until_feasible(space, ordered)
    schedule = next((o for o in outcomes.values() if not isinstance(o, NoSchedule)), None)
    if schedule is None:
        reasons = [f"{t.name}: {_reason(outcomes[t.name], space)}" for t in ordered]  # type: ignore[arg-type]
        raise InfeasibleError("; ".join(reasons))
    tier_plans = tuple(
        _infeasible(tier, outcome, space)
        if isinstance(outcome := outcomes.get(tier.name), NoSchedule)
        else _feasible(tier, schedule, bench, full_network.peak_bytes, binding=tier.name in outcomes)
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
        environment=environment(spec.threads or 0),
        full_network=full_network,
        stages=_shared_stages(schedule, next(tier for tier in tier_plans if tier.stages)),
        tiers=tier_plans,
    )


def _shared_stages(schedule: Sequence[StageChoice], binding: TierPlan) -> tuple[Stage, ...]:
    fractions = rounds_fractions([stage.trainable_parameters for stage in binding.stages])
    return tuple(
        Stage(
            full_depth=choice.full_depth,
            head_scale=choice.head_scale,
            rounds_fraction=fraction,
            limited_by=choice.limited_by,
        )
        for choice, fraction in zip(schedule, fractions, strict=True)
    )


@dataclass
class MeasuringBench:
    """Measures configurations of one network, each once."""

    graph: ModelGraph
    spec: StepSpec
    progress: Progress = lambda count, config: None
    profiles: dict[Config, MemoryProfile] = field(default_factory=dict)

    def space(self) -> SearchSpace:
        """The search space whose peaks are measured."""
        return SearchSpace(self.graph.depth, self.graph.head_scales, lambda config: self.profile(config).peak_bytes)

    def profile(self, config: Config) -> MemoryProfile:
        """The measured step of a configuration."""
        if config not in self.profiles:
            self.profiles[config] = self._measure(config, details=False)
            self.progress(len(self.profiles), config)
        return self.profiles[config]

    def profile_full_network(self) -> MemoryProfile:
        """The whole network end to end, with a row a unit."""
        config = self.space().config(0, 0, 1.0)
        rows = self._measure(config, details=True).units
        return self.profile(config).model_copy(update={"units": rows})

    def _measure(self, config: Config, details: bool) -> MemoryProfile:
        return measure(extract(self.graph, None, config, self.spec.norms), self.spec, details=details)


def _ordered_tiers(tiers: Sequence[str] | Sequence[Tier]) -> tuple[Tier, ...]:
    named = [tier for tier in tiers if isinstance(tier, Tier)]
    if not named:
        return equal_tiers([tier for tier in tiers if isinstance(tier, str)])
    if len(named) < len(tiers) or len({tier.name for tier in named}) < len(named):
        raise InputError("tiers: give budgets alone, or tiers alone, each with a name of its own")
    return tuple(sorted(named, key=lambda tier: tier.budget_bytes))


def _search_until_feasible(
    space: SearchSpace, tiers: Sequence[Tier]
) -> dict[str, tuple[StageChoice, ...] | NoSchedule]:
    """The outcomes of the tiers from the weakest up to the first that has a schedule: that one binds the stronger."""
    outcomes: dict[str, tuple[StageChoice, ...] | NoSchedule] = {}
    for tier in tiers:
        outcomes[tier.name] = find_schedule(space, tier.budget_bytes)
        if not isinstance(outcomes[tier.name], NoSchedule):
            break
    return outcomes


def _feasible(
    tier: Tier, schedule: Sequence[StageChoice], bench: MeasuringBench, full_peak: int, binding: bool
) -> TierPlan:
    space = bench.space()
    stages, proofs = [], []
    freeze_depth = 0
    for number, choice in enumerate(schedule):
        freeze_depth = least_frozen(space, choice, tier.budget_bytes, guess=freeze_depth)
        config = space.config(freeze_depth, choice.full_depth, choice.head_scale)
        stages.append(_tier_stage(config, choice, bench, binding))
        if binding and choice.wider_head is not None:
            proofs.append(_proof(number, "wider_head", choice.wider_head, space))
        if freeze_depth > 0:
            less = space.config(freeze_depth - 1, choice.full_depth, choice.head_scale)
            proofs.append(_proof(number, "less_frozen", less, space))
    return TierPlan(
        name=tier.name,
        budget_bytes=tier.budget_bytes,
        share=tier.share,
        status="full" if full_peak <= tier.budget_bytes else "scheduled",
        stages=tuple(stages),
        proofs=tuple(proofs),
    )


def _tier_stage(config: Config, choice: StageChoice, bench: MeasuringBench, binding: bool) -> TierStage:
    profile = bench.profile(config)
    on_meta = not bench.graph.adapter.part  # shapes that depend on data need some
    sub = as_trained(extract(bench.graph, None, config, bench.spec.norms, on_meta), bench.spec)
    return TierStage(
        freeze_depth=config.freeze_depth,
        full_depth=config.full_depth,
        head_scale=config.head_scale,
        limited_by=choice.limited_by if binding or choice.limited_by == "full" else "weakest_tier",
        measured_peak_bytes=profile.peak_bytes,
        measured_breakdown=profile.breakdown,
        trainable_parameters=sum(p.numel() for p in sub.parameters() if p.requires_grad),
        upload_bytes=sum(t.nbytes for t in sub.trained_state().values()),
        train_flops_per_sample=training_flops(sub),
    )


def _proof(stage: int, kind: str, config: Config, space: SearchSpace) -> Proof:
    return Proof.model_validate(
        {"stage": stage, "kind": kind, **config.model_dump(), "measured_peak_bytes": space.peak(config)}
    )


def _infeasible(tier: Tier, outcome: NoSchedule, space: SearchSpace) -> TierPlan:
    return TierPlan(
        name=tier.name,
        budget_bytes=tier.budget_bytes,
        share=tier.share,
        status="infeasible",
        reason=_reason(outcome, space),
        smallest_budget_bytes=smallest_budget(space),
    )


def _reason(outcome: NoSchedule, space: SearchSpace) -> str:
    stage = f"the stage with {outcome.full_depth} full layers" if outcome.full_depth else "the warm-up"
    return (
        f"{stage} needs {format_bytes(outcome.floor_bytes, round_up=True)} even with its narrowest head; "
        f"the smallest budget with a schedule is {format_bytes(smallest_budget(space), round_up=True)}"
    )
