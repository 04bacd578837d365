"""Realistic plans and runs for tests that read records: a ResNet20-like network and a toy memory model, no torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slt_planner.config import Config, DeviceFigures, StepSettings
from slt_planner.federated.result import RoundRow, RunResult, RunSettings, RunTier
from slt_planner.memory.profile import Category, MemoryProfile, UnitRow
from slt_planner.planning.plan import (
    Frontier,
    Plan,
    PlannedModel,
    PlannedStep,
    Policy,
    Proof,
    Stage,
    TierPlan,
    TierStage,
    TradeOff,
)

BATCH = 128
ENVIRONMENT = {"python": "3.11.4", "torch": "2.14.0", "processor": "x86_64, AVX-512", "threads": "2"}


@dataclass(frozen=True)
class Layer:
    """One convolution of the toy network."""

    name: str
    channels_in: int
    channels: int
    side: int

    def parameters(self, scale_in: float, scale: float) -> int:
        channels_in = 3 if self.channels_in == 3 else width(self.channels_in, scale_in)
        return 9 * channels_in * width(self.channels, scale) + 2 * width(self.channels, scale)


def width(channels: int, scale: float) -> int:
    return max(1, math.floor(scale * channels + 1e-9))


def _layers() -> tuple[Layer, ...]:
    layers = [Layer("conv1", 3, 16, 32)]
    for group, (channels, side) in enumerate([(16, 32), (32, 16), (64, 8)], start=1):
        for block in range(3):
            for conv in (1, 2):
                layers.append(Layer(f"layer{group}.{block}.conv{conv}", layers[-1].channels, channels, side))
    return tuple(layers)


LAYERS = _layers()
DEPTH = len(LAYERS)


def scales(config: Config) -> list[float]:
    return [1.0 if index < config.full_depth else config.head_scale for index in range(DEPTH)]


def parameters(config: Config) -> list[int]:
    by_unit = scales(config)
    return [layer.parameters(by_unit[max(0, index - 1)], by_unit[index]) for index, layer in enumerate(LAYERS)]


def saved_bytes(layer: Layer, scale: float, batch: int) -> int:
    return 2 * 4 * width(layer.channels, scale) * layer.side**2 * batch


def breakdown(config: Config, batch: int = BATCH) -> dict[Category, int]:
    """Bytes by category of a toy memory model, near enough to a ResNet20 to look real."""
    by_unit, counts = scales(config), parameters(config)
    classifier = 10 * width(64, by_unit[-1]) + 10
    trained = sum(counts[config.freeze_depth :]) + classifier
    saved = [saved_bytes(layer, by_unit[index], batch) for index, layer in enumerate(LAYERS)]
    return {
        "weights": 4 * (sum(counts) + classifier),
        "buffers": 1712,
        "gradients": 4 * trained,
        "optimizer": 4 * trained,
        "activations": sum(saved[config.freeze_depth :]),
        "temporaries": max(saved) // 4,
        "workspace": 2_359_296 + 2 * max(counts),
        "batch": batch * (3 * 32 * 32 * 4 + 8),
    }


def peak(config: Config, batch: int = BATCH) -> int:
    return sum(breakdown(config, batch).values())


def unit_rows() -> tuple[UnitRow, ...]:
    full = Config.full_network()
    rows = []
    for index, (layer, count) in enumerate(zip(LAYERS, parameters(full), strict=True), start=1):
        rows.append(
            UnitRow(
                index=index,
                name=layer.name,
                kind="conv",
                output_shape=(layer.channels, layer.side, layer.side),
                parameters=count,
                weights_bytes=4 * count,
                activations_bytes=saved_bytes(layer, 1.0, BATCH),
                gradients_bytes=4 * count,
                optimizer_bytes=4 * count,
                forward_multiply_adds=9 * layer.channels_in * layer.channels * layer.side**2,
                training_flops=6 * 9 * layer.channels_in * layer.channels * layer.side**2,
            )
        )
    return tuple(rows)


def full_network() -> MemoryProfile:
    return MemoryProfile(
        peak_bytes=peak(Config.full_network()),
        peak_operator="aten::convolution_backward",
        device="cpu",
        batch_size=BATCH,
        breakdown=breakdown(Config.full_network()),
        units=unit_rows(),
    )


def largest_scale(full_depth: int, budget: int) -> float | None:
    """The widest head that fits a budget at (full_depth - 1, full_depth), in notches of 1/64."""
    fitting = [
        notch / 64
        for notch in range(1, 65)
        if peak(Config(freeze_depth=full_depth - 1, full_depth=full_depth, head_scale=notch / 64)) <= budget
    ]
    return max(fitting, default=None)


def schedule(budget: int) -> list[tuple[int, float, Any]]:
    """Stages as (full_depth, head_scale, limited_by) for the budget that binds."""
    found: list[tuple[int, float]] = []
    for full_depth in range(1, DEPTH + 1):
        scale = largest_scale(full_depth, budget)
        assert scale is not None, "the sample's binding budget must be feasible"
        found.append((DEPTH if scale == 1.0 else full_depth, scale))
        if scale == 1.0:
            break
    stages: list[tuple[int, float, Any]] = []
    for number, (full_depth, own) in enumerate(found):
        scale = min(later for _, later in found[number:])
        reason = "full" if scale == 1.0 else "budget" if scale == own else "later_stage"
        stages.append((full_depth, scale, reason))
    return stages if stages[0][1] == 1.0 else [(0, stages[0][1], "later_stage"), *stages]


def tier_stage(full_depth: int, scale: float, reason: Any, budget: int) -> TierStage:
    options = [
        Config(freeze_depth=freeze, full_depth=full_depth, head_scale=scale) for freeze in range(max(1, full_depth))
    ]
    config = next(option for option in options if peak(option) <= budget)
    counts = parameters(config)
    trained = sum(counts[config.freeze_depth :]) + 10 * width(64, scales(config)[-1]) + 10
    work = [count * layer.side**2 for count, layer in zip(counts, LAYERS, strict=True)]
    return TierStage(
        freeze_depth=config.freeze_depth,
        full_depth=full_depth,
        head_scale=scale,
        limited_by=reason,
        measured_peak_bytes=peak(config),
        measured_breakdown=breakdown(config),
        trainable_parameters=trained,
        upload_bytes=4 * trained,
        train_flops_per_sample=2 * sum(work) + 4 * sum(work[config.freeze_depth :]),
    )


def proofs(stages: list[TierStage], budget: int, binds: bool) -> tuple[Proof, ...]:
    found = []
    for number, stage in enumerate(stages):
        tries: list[tuple[Any, Config]] = []
        if binds and stage.limited_by == "budget":
            wider = Config(
                freeze_depth=stage.full_depth - 1,
                full_depth=stage.full_depth,
                head_scale=stage.head_scale + 1 / 64,
            )
            tries.append(("wider_head", wider))
        if stage.freeze_depth:
            fields = {**stage.config.model_dump(), "freeze_depth": stage.freeze_depth - 1}
            tries.append(("less_frozen", Config(**fields)))
        found += [
            Proof(stage=number, kind=kind, measured_peak_bytes=peak(config), **config.model_dump())
            for kind, config in tries
            if peak(config) > budget
        ]
    return tuple(found)


def sample_plan(
    budgets: tuple[int, ...] = (64, 128, 256),
    infeasible_mb: int | None = None,
    name: str | None = "resnet20",
    tier_names: tuple[str, ...] = (),
    reason: str | None = None,
    policy: Policy = "coupled",
) -> Plan:
    """A verified plan for budgets in MB, weakest first; `infeasible_mb` adds a tier that can do nothing."""
    binding = budgets[0] * 10**6
    outline = schedule(binding)
    names = tier_names or tuple(f"{budget}MB" for budget in budgets)
    share = 1 / (len(budgets) + (infeasible_mb is not None))
    tiers = []
    if infeasible_mb is not None:
        tiers.append(
            TierPlan(
                name=f"{infeasible_mb}MB",
                budget_bytes=infeasible_mb * 10**6,
                share=share,
                status="infeasible",
                reason=reason
                or "stage 1 needs 38.3 MB even with its narrowest head, 22.3 MB more than there is; "
                "the smallest budget with a schedule is 38.3 MB",
                smallest_budget_bytes=38_214_912,
            )
        )
    for budget_mb, tier_name in zip(budgets, names, strict=True):
        budget = budget_mb * 10**6
        binds = budget == binding or policy == "per-tier"
        own = schedule(budget) if policy == "per-tier" else outline
        own = [*own, *[own[-1]] * (len(outline) - len(own))]
        stages = [
            tier_stage(depth, scale, why if binds or why == "full" else "weakest_tier", budget)
            for depth, scale, why in own
        ]
        tiers.append(
            TierPlan(
                name=tier_name,
                budget_bytes=budget,
                share=share,
                status="full" if peak(Config.full_network()) <= budget else "scheduled",
                stages=tuple(stages),
                proofs=proofs(stages, budget, binds),
            )
        )
    return Plan(
        model=PlannedModel(name=name, graph_hash="5f0c9a", unit_names=tuple(layer.name for layer in LAYERS)),
        input_shape=(3, 32, 32),
        num_classes=10,
        batch_size=BATCH,
        step=StepSettings(threads=2),
        policy=policy,
        environment=ENVIRONMENT,
        full_network=full_network(),
        stages=_shared_stages(outline, next(tier for tier in tiers if tier.stages)),
        tiers=tuple(tiers),
        trade_off=trade_off(tiers),
    )


def trade_off(tiers: list[TierPlan]) -> TradeOff:
    """The toy network's peaks over every second unit and every eighth notch."""
    depths, notches = tuple(range(0, DEPTH, 2)), tuple(notch / 64 for notch in range(8, 65, 8))
    configs = [[Config(freeze_depth=depth, full_depth=depth + 1, head_scale=s) for s in notches] for depth in depths]
    return TradeOff(
        freeze_depths=depths,
        head_scales=notches,
        peak_bytes=tuple(tuple(map(peak, row)) for row in configs),
        frontiers=tuple(
            Frontier(tier=tier.name, head_scales=tuple(largest_scale(depth + 1, tier.budget_bytes) for depth in depths))
            for tier in tiers
        ),
    )


def on_devices(plan: Plan, figures: dict[str, DeviceFigures]) -> Plan:
    """A plan whose stages say what travels down, for tiers of which these device figures are known, by name."""

    def tier_on_device(tier: TierPlan) -> TierPlan:
        stages = [{**stage.model_dump(), "download_bytes": stage.upload_bytes + 4000} for stage in tier.stages]
        known = figures[tier.name].model_dump() if tier.name in figures else {}
        return TierPlan.model_validate({**tier.model_dump(), **known, "stages": stages})

    return plan.model_copy(update={"tiers": tuple(map(tier_on_device, plan.tiers))})


def as_predicted(plan: Plan) -> Plan:
    """The same plan, not verified."""

    def unmeasured(step: PlannedStep) -> dict[str, Any]:
        fields: dict[str, Any] = {"predicted_peak_bytes": step.measured_peak_bytes, "measured_peak_bytes": None}
        if isinstance(step, TierStage):
            fields |= {"predicted_breakdown": step.measured_breakdown, "measured_breakdown": None}
        return fields

    return _with_peaks(plan, unmeasured)


def also_predicted(plan: Plan, off: int) -> Plan:
    """The same verified plan, with what was predicted: so many bytes too little."""

    def predicted(step: PlannedStep) -> dict[str, Any]:
        fields: dict[str, Any] = {"predicted_peak_bytes": step.peak_bytes - off}
        if isinstance(step, TierStage):
            parts = step.breakdown
            fields["predicted_breakdown"] = {**parts, "workspace": parts["workspace"] - off}
        return fields

    return _with_peaks(plan, predicted)


def _with_peaks(plan: Plan, peaks: Callable[[PlannedStep], dict[str, Any]]) -> Plan:
    def changed(tier: TierPlan) -> TierPlan:
        stages = [{**stage.model_dump(), **peaks(stage)} for stage in tier.stages]
        proofs = [{**proof.model_dump(), **peaks(proof)} for proof in tier.proofs]
        return TierPlan.model_validate({**tier.model_dump(), "stages": stages, "proofs": proofs})

    return plan.model_copy(update={"tiers": tuple(map(changed, plan.tiers))})


def _shared_stages(outline: list[tuple[int, float, Any]], binding: TierPlan) -> tuple[Stage, ...]:
    warm_up = outline[0][1]
    later = [stage.trainable_parameters for stage in binding.stages[1:]]
    shares = [warm_up, *(count / sum(later) * (1 - warm_up) for count in later)] if later else [1.0]
    return tuple(
        Stage(full_depth=depth, head_scale=scale, rounds_fraction=share, limited_by=why)
        for (depth, scale, why), share in zip(outline, shares, strict=True)
    )


def sample_run(
    strategy: Any = "slt",
    seed: int = 0,
    rounds: int = 60,
    finished_rounds: int | None = None,
    plan: Plan | None = None,
    dataset_title: str = "CIFAR-10",
) -> RunResult:
    """A run of 10 clients a round; stopped when `finished_rounds` is below `rounds`."""
    plan = plan or sample_plan()
    done = rounds if finished_rounds is None else finished_rounds
    head_scale = None if strategy == "slt" else 14 / 64
    rows = tuple(_row(number, rounds, seed, plan, head_scale) for number in range(1, done + 1))
    finished = done == rounds
    per_tier = {
        tier.name: max((row.measured_peak_bytes[tier.name] for row in rows), default=None)
        for tier in plan.feasible_tiers
    }
    return RunResult(
        settings=RunSettings(
            strategy=strategy,
            dataset="parquet:data/cifar10",
            rounds=rounds,
            clients=100,
            cohort_size=10,
            local_batch=BATCH,
            seed=seed,
        ),
        plan=plan,
        dataset_title=dataset_title,
        train_images=50_000,
        test_images=10_000,
        head_scale=head_scale,
        tiers=tuple(
            RunTier(
                name=tier.name,
                budget_bytes=tier.budget_bytes,
                clients=100 // len(plan.tiers),
                takes_part=tier.status != "infeasible",
                measured_peak_bytes=per_tier.get(tier.name),
            )
            for tier in plan.tiers
        ),
        rows=rows,
        status="finished" if finished else "stopped",
        accuracy_batch_statistics=rows[-1].accuracy if finished else None,
        accuracy_running_statistics=rows[-1].accuracy - 0.0123 if finished else None,
        confusion=confusion(round(1000 * rows[-1].accuracy)) if finished else None,
        images_per_class=tuple(tuple(50 + (7 * client + 3 * own) % 11 for own in range(10)) for client in range(100)),
        environment=ENVIRONMENT,
    )


def confusion(right: int) -> tuple[tuple[int, ...], ...]:
    """Ten classes of 1,000 test images; about `right` of each are taken for their class, the rest for the next ones."""
    rows = []
    for given in range(10):
        own = min(1000, right + 5 * given)
        row = [0] * 10
        row[given], row[(given + 1) % 10], row[(given + 2) % 10] = (
            own,
            (1000 - own) // 2,
            1000 - own - (1000 - own) // 2,
        )
        rows.append(tuple(row))
    return tuple(rows)


def _row(number: int, rounds: int, seed: int, plan: Plan, head_scale: float | None) -> RoundRow:
    stage = 0 if head_scale else _stage_of(number, rounds, plan)
    weakest = plan.binding_tier.stages[stage]
    config = Config(freeze_depth=0, full_depth=0, head_scale=head_scale) if head_scale else weakest.config
    noise = 0.02 * math.sin(12.9898 * number + 4.1 * seed) + 0.006 * seed
    ceiling = 0.44 if head_scale else 0.38 + 0.17 * config.head_scale
    accuracy = 0.1 + (ceiling - 0.1) * (1 - math.exp(-4.5 * number / rounds)) + noise
    upload = 10 * (24_000 if head_scale else weakest.upload_bytes)
    peaks = {
        tier.name: peak(config) if head_scale else tier.stages[stage].measured_peak_bytes
        for tier in plan.feasible_tiers
    }
    seconds = 2.1 + 0.3 * math.cos(number)
    return RoundRow(
        round=number,
        stage=stage,
        config=config,
        learning_rate=0.01 + 0.045 * (1 + math.cos(math.pi * number / rounds)),
        accuracy=min(1.0, max(0.0, accuracy)),
        loss=2.3 - 2 * accuracy,
        train_loss=2.2 - 2 * accuracy,
        bytes_up=upload,
        bytes_down=upload,
        clients=10,
        refused=0,
        measured_peak_bytes=peaks,
        train_seconds=seconds,
        seconds=seconds + 1.4,
    )


def _stage_of(number: int, rounds: int, plan: Plan) -> int:
    end = 0.0
    for stage, shared in enumerate(plan.stages):
        end += shared.rounds_fraction * rounds
        if number <= end + 1e-6:
            return stage
    return len(plan.stages) - 1
