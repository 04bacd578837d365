"""plan.json: the records of a plan, read and written. Plans are data, never code; no torch here."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from slt_planner.config import MAX_BATCH, Config, Granularity, Record, StepSettings, StepSpec
from slt_planner.files import read_record, write_text
from slt_planner.memory.profile import Category, MemoryProfile
from slt_planner.units import LARGEST_BYTES

LimitedBy = Literal["budget", "later_stage", "weakest_tier", "full"]

ProofKind = Literal["wider_head", "less_frozen"]


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


class Stage(Record):
    """One step of the schedule, shared by all tiers.

    `limited_by` says what set head_scale: the binding tier's ``budget``, a ``later_stage`` (a head never shrinks), or
    nothing (``full``).
    """

    full_depth: int = Field(ge=0)
    head_scale: float = Field(gt=0, le=1)
    rounds_fraction: float = Field(gt=0, le=1)
    limited_by: LimitedBy


class TierStage(Config):
    """A configuration that one tier holds for one stage, and what it costs there.

    `measured_peak_bytes` is on the allocator ruler; `measured_breakdown` adds up to it. `predicted_peak_bytes` is None
    where nothing was predicted. `upload_bytes` are the trained parameters (and their norms' running statistics, if
    there are any), sent once a round by each client.
    `train_flops_per_sample` counts a multiply and an add as two; the frozen part runs forward only.
    """

    limited_by: LimitedBy
    predicted_peak_bytes: int | None = None
    measured_peak_bytes: int = Field(gt=0)
    measured_breakdown: dict[Category, int]
    levers: tuple[str, ...] = ()
    trainable_parameters: int = Field(gt=0)
    upload_bytes: int = Field(gt=0)
    train_flops_per_sample: int = Field(gt=0)

    @property
    def config(self) -> Config:
        """The configuration alone."""
        return _config_of(self)


class Proof(Config):
    """A configuration measured over budget: one notch more than stage number `stage` (from 0) does not fit.

    ``wider_head`` is the next legal head scale at (K_T - 1, K_T), for the tier that binds; ``less_frozen`` is one
    freeze unit less at the stage's own scale, for every tier.
    """

    stage: int = Field(ge=0)
    kind: ProofKind
    measured_peak_bytes: int = Field(gt=0)

    @property
    def config(self) -> Config:
        """The configuration alone."""
        return _config_of(self)


def _config_of(record: Config) -> Config:
    return Config(freeze_depth=record.freeze_depth, full_depth=record.full_depth, head_scale=record.head_scale)


class TierPlan(Record):
    """One device tier's answer. `status` says what the tier could do alone: ``full`` = train the whole network."""

    name: str
    budget_bytes: int = Field(gt=0, le=LARGEST_BYTES)
    share: float = Field(gt=0, le=1)
    status: Literal["full", "scheduled", "infeasible"]
    reason: str | None = None
    smallest_budget_bytes: int | None = None
    stages: tuple[TierStage, ...] = ()
    proofs: tuple[Proof, ...] = ()


class Plan(Record):
    """A schedule for every tier, with the measurements that prove it. Saved as plan.json."""

    schema_version: Literal[1] = 1
    model: PlannedModel
    input_shape: tuple[Annotated[int, Field(ge=1, le=2**16)], ...] = Field(min_length=1)
    num_classes: int = Field(ge=1, le=10**6)
    batch_size: int = Field(ge=2, le=MAX_BATCH)
    step: StepSettings
    policy: Literal["coupled"] = "coupled"
    environment: dict[str, str]
    full_network: MemoryProfile
    stages: tuple[Stage, ...] = Field(min_length=1)
    tiers: tuple[TierPlan, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _tiers_hold_together(self) -> "Plan":
        if len({tier.name for tier in self.tiers}) < len(self.tiers):
            raise ValueError("two tiers have the same name")
        for tier in self.tiers:
            self._check_tier(tier)
        if not self.feasible_tiers:
            raise ValueError("no tier is feasible")
        return self

    def _check_tier(self, tier: TierPlan) -> None:
        if tier.status == "infeasible":
            if tier.stages or not tier.reason:
                raise ValueError(f"tier {tier.name}: an infeasible tier has a reason and no stages")
            return
        shared = [(stage.full_depth, stage.head_scale) for stage in self.stages]
        if [(stage.full_depth, stage.head_scale) for stage in tier.stages] != shared:
            raise ValueError(f"tier {tier.name}: its stages differ from the plan's")
        for number, stage in enumerate(tier.stages):
            if stage.full_depth > self.model.depth:
                raise ValueError(f"tier {tier.name}, stage {number}: full_depth is beyond unit {self.model.depth}")
            if stage.measured_peak_bytes > tier.budget_bytes:
                raise ValueError(f"tier {tier.name}, stage {number}: the measured peak is over the budget")
            if sum(stage.measured_breakdown.values()) != stage.measured_peak_bytes:
                raise ValueError(f"tier {tier.name}, stage {number}: the breakdown does not add up to the peak")
        for proof in tier.proofs:
            if proof.measured_peak_bytes <= tier.budget_bytes or proof.stage >= len(tier.stages):
                raise ValueError(f"tier {tier.name}: a proof for stage {proof.stage} that proves nothing")

    @property
    def spec(self) -> StepSpec:
        """The training step the plan was measured with."""
        return StepSpec(batch_size=self.batch_size, **self.step.model_dump())

    @property
    def feasible_tiers(self) -> tuple[TierPlan, ...]:
        """The tiers that take part."""
        return tuple(tier for tier in self.tiers if tier.status != "infeasible")

    @property
    def binding_tier(self) -> TierPlan:
        """The weakest feasible tier: its budget sets full_depth and head_scale."""
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
