"""The frozen records that everything else speaks in: Config, StepSpec, Tier. No torch here."""

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from slt_planner.errors import InputError
from slt_planner.units import LARGEST_BYTES, parse_budgets

Norms = Literal["static", "running"]
Metric = Literal["accuracy", "mean_iou"]
Granularity = Literal["layer", "block"]
OptimizerName = Literal["sgd", "adam", "adamw"]
MAX_BATCH = 2**16


class Record(BaseModel):
    """A frozen record that refuses unknown fields; invalid values raise pydantic's ValidationError, a ValueError."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Config(Record):
    """What is frozen, trained and scaled (SLT, arXiv 2305.17005, section 3).

    Units 1..freeze_depth are frozen, freeze_depth+1..full_depth are trained at full width, the later ones (the head)
    are trained at width head_scale. (0, 0, s) is the warm-up: the whole network at width s.

    >>> Config(freeze_depth=4, full_depth=5, head_scale=0.5)
    Config(freeze_depth=4, full_depth=5, head_scale=0.5)
    """

    freeze_depth: int = Field(ge=0)
    full_depth: int = Field(ge=0)
    head_scale: float = Field(gt=0, le=1)

    @model_validator(mode="after")
    def _something_trains_at_full_width(self) -> "Config":
        if self.freeze_depth > max(0, self.full_depth - 1):
            raise ValueError(
                f"freeze_depth {self.freeze_depth} must be below full_depth {self.full_depth} (or both 0, the warm-up)"
            )
        return self

    @classmethod
    def full_network(cls) -> "Config":
        """The whole network end to end."""
        return cls(freeze_depth=0, full_depth=0, head_scale=1.0)

    def __str__(self) -> str:
        """The three numbers, as in the paper: (K_F, K_T, s)."""
        return f"({self.freeze_depth}, {self.full_depth}, {self.head_scale:.4g})"


class Optimizer(Record):
    """The optimizer of a training step; `momentum` is used by SGD alone."""

    name: OptimizerName = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-3, ge=0)
    foreach: bool = False


class StepSettings(Record):
    """Everything but the batch size that moves the peak of a training step.

    `precision` is of weights, gradients and batch alike (fp32, bf16), or fp32 with a bf16 forward pass (autocast).
    """

    optimizer: Optimizer = Optimizer()
    loss: Literal["cross_entropy"] = "cross_entropy"
    precision: Literal["fp32", "bf16", "autocast"] = "fp32"
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    set_to_none: bool = True
    norms: Norms = "static"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = Field(default=None, ge=1, le=1024)

    @field_validator("optimizer", mode="before")
    @classmethod
    def _optimizer_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class StepSpec(StepSettings):
    """One training step as it is measured and run: its settings and the batch size.

    `threads` None means: as many as torch uses in this process; a plan records the number.

    >>> StepSpec(batch_size=32, optimizer="adam").optimizer.name
    'adam'
    """

    batch_size: int = Field(default=128, ge=1, le=MAX_BATCH)

    @property
    def settings(self) -> StepSettings:
        """The step without its batch size."""
        return StepSettings(**self.model_dump(exclude={"batch_size"}))


def parse_granularity(text: str) -> Granularity:
    """Of freeze units: `layer` or `block`.

    >>> parse_granularity("block")
    'block'

    Raises:
        InputError: something else.
    """
    for known in get_args(Granularity):
        if text == known:
            return known
    raise InputError(f"granularity {text!r}: give layer or block")


class Tier(Record):
    """A class of devices that share a memory budget; `share` is its fraction of all clients."""

    name: str
    budget_bytes: int = Field(gt=0, le=LARGEST_BYTES)
    share: float = Field(gt=0, le=1)


def equal_tiers(budgets: str | list[str]) -> tuple[Tier, ...]:
    """Tiers of equal shares, weakest first.

    >>> [tier.name for tier in equal_tiers("256,64MB")]
    ['64MB', '256MB']

    Raises:
        InputError: a budget that `units.parse_bytes` refuses, one given twice, or none at all.
    """
    text = budgets if isinstance(budgets, str) else ",".join(budgets)
    if not text.strip():
        raise InputError("no memory budget given; give at least one, such as 64MB")
    by_name = parse_budgets(text)
    ascending = sorted(by_name.items(), key=lambda item: item[1])
    return tuple(Tier(name=name, budget_bytes=size, share=1 / len(ascending)) for name, size in ascending)
