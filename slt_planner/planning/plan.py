"""plan.json: the records of a plan, read and written. Plans are data, never code; no torch here."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from slt_planner.config import MAX_BATCH, Config, DeviceFigures, Granularity, LeverSet, Record, StepSettings, StepSpec
from slt_planner.files import read_record, write_text
from slt_planner.memory.profile import Category, MemoryProfile
from slt_planner.models.names import is_reference
from slt_planner.planning.levers import WhatIf
from slt_planner.units import LARGEST_BYTES

LimitedBy = Literal["budget", "later_stage", "weakest_tier", "full"]
ProofKind = Literal["wider_head", "less_frozen"]
Policy = Literal["coupled", "per-tier"]
RoundsPolicy = Literal["parameters", "equal"]


class PlannedModel(Record):
    """Which network the plan is for; `name` is what was given on the command line, None for a module in memory.

    `data_dependent` networks (detectors) have parts whose shapes depend on data: their peaks were measured on made-up
    targets of one size, drawn with a fixed seed. `granularity` says what the units are: layers, or blocks of them.
    """

    name: str | None
    graph_hash: str
    granularity: Granularity = "layer"
    data_dependent: bool = False
    unit_names: tuple[str, ...]

    @property
    def depth(self) -> int:
        """K, the number of freeze units."""
        return len(self.unit_names)

    @property
    def is_own_code(self) -> bool:
        """The network is the user's own code, which runs only where it is named again."""
        return self.name is not None and is_reference(self.name)


class Stage(Record):
    """One step of the schedule, shared by all tiers; with the policy ``per-tier`` head_scale is the weakest tier's.

    `limited_by` says what set head_scale: the binding tier's ``budget``, a ``later_stage`` (a head never shrinks), or
    nothing (``full``).
    """

    full_depth: int = Field(ge=0)
    head_scale: float = Field(gt=0, le=1)
    rounds_fraction: float = Field(gt=0, le=1)
    limited_by: LimitedBy


class PlannedStep(Config):
    """A configuration and the peak of its step on the allocator ruler: predicted, measured, or both.

    `levers` are those of its step beside the plan's own. `predicted_peak_bytes` is None where nothing was predicted,
    `measured_peak_bytes` in a plan that was not verified.
    """

    levers: LeverSet = ()
    predicted_peak_bytes: int | None = Field(default=None, gt=0)
    measured_peak_bytes: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _has_a_peak(self) -> "PlannedStep":
        if self.predicted_peak_bytes is None and self.measured_peak_bytes is None:
            raise ValueError("a step has a peak, predicted or measured")
        return self

    @property
    def peak_bytes(self) -> int:
        """What was measured; what was predicted, where nothing was."""
        peak = self.predicted_peak_bytes if self.measured_peak_bytes is None else self.measured_peak_bytes
        return peak or 0

    @property
    def config(self) -> Config:
        """The configuration alone."""
        return Config(freeze_depth=self.freeze_depth, full_depth=self.full_depth, head_scale=self.head_scale)


class TierStage(PlannedStep):
    """A configuration that one tier holds for one stage, and what it costs there.

    The breakdowns are by category at the peak's moment and add up to it. `upload_bytes` are the trained parameters (and
    their norms' running statistics, if there are any), sent once a round by each client; `download_bytes` every tensor
    that the sub-model holds: what a client that has nothing yet must get (None in plans of older versions).
    `train_flops_per_sample` counts a multiply and an add as two; the frozen part runs forward only. `relative_time` is
    what the levers cost: the time of a step, next to that of the plain one (None: not measured, or no levers).
    """

    limited_by: LimitedBy
    predicted_breakdown: dict[Category, int] | None = None
    measured_breakdown: dict[Category, int] | None = None
    relative_time: float | None = Field(default=None, gt=0)
    trainable_parameters: int = Field(gt=0)
    upload_bytes: int = Field(gt=0)
    download_bytes: int | None = Field(default=None, gt=0)
    train_flops_per_sample: int = Field(gt=0)

    @model_validator(mode="after")
    def _breakdowns_add_up(self) -> "TierStage":
        for what, peak, breakdown in (
            ("predicted", self.predicted_peak_bytes, self.predicted_breakdown),
            ("measured", self.measured_peak_bytes, self.measured_breakdown),
        ):
            if peak != (None if breakdown is None else sum(breakdown.values())):
                raise ValueError(f"the {what} breakdown does not add up to the peak")
        return self

    @property
    def breakdown(self) -> dict[Category, int]:
        """That of `peak_bytes`."""
        return self.measured_breakdown or self.predicted_breakdown or {}

    @property
    def frozen_bytes(self) -> int | None:
        """The part of `download_bytes` that this tier's clients leave as it is.

        What all tiers freeze need travel only at a client's first selection in the stage (`costs.unchanging_bytes`).
        """
        return None if self.download_bytes is None else self.download_bytes - self.upload_bytes


class Proof(PlannedStep):
    """A configuration over budget: one notch more than stage number `stage` (from 0) does not fit.

    ``wider_head`` is the next legal head scale at (K_T - 1, K_T), for a tier whose budget sets it; ``less_frozen`` is
    one freeze unit less at the stage's own scale, for every tier.
    """

    stage: int = Field(ge=0)
    kind: ProofKind


class TierPlan(DeviceFigures):
    """One device tier's answer. `status` says what the tier could do alone: ``full`` = train the whole network.

    An infeasible tier has the `reason`, the smallest budget with a schedule, and the largest batch that has one at its
    own budget (None: not even a batch of 2 has, or it was not looked for).
    """

    name: str
    budget_bytes: int = Field(gt=0, le=LARGEST_BYTES)
    share: float = Field(gt=0, le=1)
    status: Literal["full", "scheduled", "infeasible"]
    reason: str | None = None
    smallest_budget_bytes: int | None = None
    largest_batch: int | None = Field(default=None, ge=2)
    stages: tuple[TierStage, ...] = ()
    proofs: tuple[Proof, ...] = ()


class Frontier(Record):
    """How wide a head a tier can have at each freeze depth of a `TradeOff`; None: not even the narrowest fits."""

    tier: str
    head_scales: tuple[float | None, ...]


class TradeOff(Record):
    """Peaks over freeze_depth and head_scale, on the allocator ruler: measured where the plan was, else predicted.

    `peak_bytes` has a row a freeze depth K_F and a column a head scale s, of the configuration (K_F, K_F + 1, s).
    """

    freeze_depths: tuple[int, ...] = Field(min_length=1)
    head_scales: tuple[float, ...] = Field(min_length=1)
    peak_bytes: tuple[tuple[int, ...], ...]
    frontiers: tuple[Frontier, ...]

    @model_validator(mode="after")
    def _is_a_grid(self) -> "TradeOff":
        if [len(self.head_scales)] * len(self.freeze_depths) != [len(row) for row in self.peak_bytes]:
            raise ValueError("a trade-off has a row a freeze depth and a column a head scale")
        if any(axis != sorted(set(axis)) for axis in (list(self.freeze_depths), list(self.head_scales))):
            raise ValueError("a trade-off's freeze depths and head scales ascend")
        if any(len(frontier.head_scales) != len(self.freeze_depths) for frontier in self.frontiers):
            raise ValueError("a frontier has a head scale a freeze depth")
        return self


class Plan(Record):
    """A schedule for every tier, with the measurements (or predictions) that prove it. Saved as plan.json.

    `policy` says whether all tiers share a stage's head scale (``coupled``) or only its full_depth (``per-tier``);
    `rounds_policy` whether a stage's rounds are in proportion to its trainable parameters or ``equal``. `lever_sets`
    are those that a step may use, the cheapest first: a stage has the first with which it fits, and a proof is over
    budget with the one that makes it least.
    """

    schema_version: Literal[1] = 1
    model: PlannedModel
    input_shape: tuple[Annotated[int, Field(ge=1, le=2**16)], ...] = Field(min_length=1)
    num_classes: int = Field(ge=1, le=10**6)
    batch_size: int = Field(ge=2, le=MAX_BATCH)
    step: StepSettings
    policy: Policy = "coupled"
    rounds_policy: RoundsPolicy = "parameters"
    lever_sets: tuple[LeverSet, ...] = Field(default=((),), min_length=1)
    environment: dict[str, str]
    full_network: MemoryProfile
    stages: tuple[Stage, ...] = Field(min_length=1)
    tiers: tuple[TierPlan, ...] = Field(min_length=1)
    trade_off: TradeOff | None = None
    what_if: WhatIf | None = None

    @model_validator(mode="after")
    def _tiers_hold_together(self) -> "Plan":
        if len({tier.name for tier in self.tiers}) < len(self.tiers):
            raise ValueError("two tiers have the same name")
        for tier in self.tiers:
            self._check_tier(tier)
        if not self.feasible_tiers:
            raise ValueError("no tier is feasible")
        if self.step.micro_batch is not None and self.step.micro_batch > self.batch_size:
            raise ValueError("step.micro_batch is larger than batch_size")
        for levers in self.lever_sets:
            self.spec.with_levers(levers)
        if self.trade_off and not {f.tier for f in self.trade_off.frontiers} <= {tier.name for tier in self.tiers}:
            raise ValueError("the trade-off names a tier that the plan does not have")
        return self

    def _check_tier(self, tier: TierPlan) -> None:
        if tier.status == "infeasible":
            if tier.stages or not tier.reason:
                raise ValueError(f"tier {tier.name}: an infeasible tier has a reason and no stages")
            return
        if len(tier.stages) != len(self.stages):
            raise ValueError(f"tier {tier.name}: its stages differ from the plan's")
        for number, (stage, shared) in enumerate(zip(tier.stages, self.stages, strict=True)):
            own_scale = self.policy == "per-tier" and stage.head_scale >= shared.head_scale
            full_depth = self.model.depth if own_scale and stage.head_scale == 1.0 else shared.full_depth
            if stage.full_depth != full_depth or (stage.head_scale != shared.head_scale and not own_scale):
                raise ValueError(f"tier {tier.name}, stage {number}: its stages differ from the plan's")
            if stage.full_depth > self.model.depth:
                raise ValueError(f"tier {tier.name}, stage {number}: full_depth is beyond unit {self.model.depth}")
            if stage.peak_bytes > tier.budget_bytes:
                raise ValueError(f"tier {tier.name}, stage {number}: the peak is over the budget")
        if not {step.levers for step in (*tier.stages, *tier.proofs)} <= set(self.lever_sets):
            raise ValueError(f"tier {tier.name}: a stage or proof with levers that the plan does not have")
        for proof in tier.proofs:
            if proof.peak_bytes <= tier.budget_bytes or proof.stage >= len(tier.stages):
                raise ValueError(f"tier {tier.name}: a proof for stage {proof.stage} that proves nothing")

    @property
    def spec(self) -> StepSpec:
        """The training step the plan was measured with."""
        return StepSpec(batch_size=self.batch_size, **self.step.model_dump())

    @property
    def verified(self) -> bool:
        """Whether every stage and every proof was measured."""
        steps = [step for tier in self.tiers for step in (*tier.stages, *tier.proofs)]
        return all(step.measured_peak_bytes is not None for step in steps)

    @property
    def feasible_tiers(self) -> tuple[TierPlan, ...]:
        """The tiers that take part."""
        return tuple(tier for tier in self.tiers if tier.status != "infeasible")

    @property
    def binding_tier(self) -> TierPlan:
        """The weakest feasible tier: its budget sets full_depth, and head_scale where tiers share it."""
        return min(self.feasible_tiers, key=lambda tier: tier.budget_bytes)

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write plan.json, whole or not at all.

        Raises:
            InputError: the file exists and `force` is False, or its folder cannot be written.
        """
        write_text(path, self.model_dump_json(indent=2) + "\n", force=force)


def load_plan(path: str | Path) -> Plan:
    """Read and check a plan.json.

    Raises:
        InputError: missing, not JSON, or not a valid plan; the message names the first offending field.
    """
    return read_record(path, Plan, "plan", "slt-plan")
