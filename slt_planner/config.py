"""The frozen records that everything else speaks in: Config, StepSpec, Tier. No torch here."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    field_validator,
    model_serializer,
    model_validator,
)

from slt_planner.errors import InputError
from slt_planner.units import LARGEST_BYTES, parse_budgets

Norms = Literal["static", "running"]
Metric = Literal["accuracy", "mean_iou"]
Granularity = Literal["layer", "block"]
OptimizerName = Literal["sgd", "adam", "adamw"]
LeanLever = Literal[
    "in_place_prefix", "copied_cuts", "lean_norms", "early_updates", "split_convolutions",
    "recompute:1", "recompute:2", "recompute:4", "recompute",
]  # fmt: skip
"""How a training step is run in less memory without changing what it computes (docs/levers.md)."""
_LEVER_NAMES = "|".join([*get_args(LeanLever), "channels_last", "bf16", "autocast", r"micro_batches:[1-9]\d{0,4}"])
Lever = Annotated[str, StringConstraints(pattern=f"^({_LEVER_NAMES})$")]
"""Anything that makes a step need less memory: a `LeanLever`, or another layout, number format or micro-batch."""
LeverSet = tuple[Lever, ...]
MAX_BATCH = 2**16


class Record(BaseModel):
    """A frozen record that refuses unknown fields; invalid values raise pydantic's ValidationError, a ValueError."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Channels = Annotated[str, StringConstraints(pattern=r"^(first|rolling:\d{1,9}|random:\d{1,19})$")]
"""Which channels of a scaled layer are kept: the first ones, a window that begins at a place, or a seeded choice."""


class Config(Record):
    """What is frozen, trained and scaled (SLT, arXiv 2305.17005, section 3).

    Units 1..freeze_depth are frozen, freeze_depth+1..full_depth are trained at full width, the later ones (the head)
    are trained at width head_scale. (0, 0, s) is the warm-up: the whole network at width s. `channels` are the first
    ones everywhere but in methods that move through the network: ``rolling:N`` keeps those from place N on, around
    the end (FedRolex, arXiv 2212.01548), ``random:SEED`` some drawn by chance (federated dropout, arXiv 1812.07210).

    >>> Config(freeze_depth=4, full_depth=5, head_scale=0.5)
    Config(freeze_depth=4, full_depth=5, head_scale=0.5, channels='first')
    """

    freeze_depth: int = Field(ge=0)
    full_depth: int = Field(ge=0)
    head_scale: float = Field(gt=0, le=1)
    channels: Channels = "first"

    @model_validator(mode="after")
    def _something_trains_at_full_width(self) -> "Config":
        if self.freeze_depth > max(0, self.full_depth - 1):
            raise ValueError(
                f"freeze_depth {self.freeze_depth} must be below full_depth {self.full_depth} (or both 0, the warm-up)"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_what_goes_without_saying(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if (name, value) != ("channels", "first")}

    @classmethod
    def full_network(cls) -> "Config":
        """The whole network end to end."""
        return cls(freeze_depth=0, full_depth=0, head_scale=1.0)

    def __str__(self) -> str:
        """The three numbers, as in the paper: (K_F, K_T, s); and the channels, if they are not the first ones."""
        others = "" if self.channels == "first" else f", {self.channels}"
        return f"({self.freeze_depth}, {self.full_depth}, {self.head_scale:.4g}{others})"


class Optimizer(Record):
    """The optimizer of a training step; `momentum` is used by SGD alone."""

    name: OptimizerName = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-3, ge=0)
    foreach: bool = False


class StepSettings(Record):
    """Everything but the batch size that moves the peak of a training step.

    `precision` is of weights, gradients and batch alike (fp32, bf16), or fp32 with a bf16 forward pass (autocast).
    `micro_batch` is how many samples at most run forward and backward at once, their gradients added up before the
    optimizer steps; None is the whole batch. `levers` say how the step is run, in the order of `LeanLever`.
    """

    optimizer: Optimizer = Optimizer()
    loss: Literal["cross_entropy"] = "cross_entropy"
    precision: Literal["fp32", "bf16", "autocast"] = "fp32"
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    micro_batch: int | None = Field(default=None, ge=1, le=MAX_BATCH)
    set_to_none: bool = True
    norms: Norms = "static"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = Field(default=None, ge=1, le=1024)
    levers: tuple[LeanLever, ...] = ()

    @field_validator("levers")
    @classmethod
    def _levers_in_order(cls, value: tuple[LeanLever, ...]) -> tuple[LeanLever, ...]:
        return tuple(lever for lever in get_args(LeanLever) if lever in value)

    @model_validator(mode="after")
    def _updates_once(self) -> "StepSettings":
        if self.micro_batch is not None and "early_updates" in self.levers:
            raise ValueError("early_updates: with micro-batches gradients are added up first; leave one of them out")
        return self

    @field_validator("optimizer", mode="before")
    @classmethod
    def _optimizer_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def pieces(self, batch_size: int) -> tuple[int, ...]:
        """The sizes of the micro-batches of a batch: as few as can be, and as equal as can be.

        >>> StepSettings(micro_batch=8).pieces(20)
        (7, 7, 6)
        """
        count = 1 if self.micro_batch is None else -(-batch_size // self.micro_batch)
        return tuple(len(range(number, batch_size, count)) for number in range(count))

    def with_batch(self, batch_size: int) -> "StepSpec":
        """These settings for a batch; micro-batches that are not smaller than it are the batch at once.

        >>> StepSettings(micro_batch=8).with_batch(4).micro_batch is None
        True
        """
        at_once = self.micro_batch is None or self.micro_batch >= batch_size
        micro_batch = None if at_once else self.micro_batch
        return StepSpec(batch_size=batch_size, micro_batch=micro_batch, **self.model_dump(exclude={"micro_batch"}))


_FIELD_OF_LEVER = {
    "channels_last": "memory_format",
    "bf16": "precision",
    "autocast": "precision",
    "micro_batches": "micro_batch",
}


class StepSpec(StepSettings):
    """One training step as it is measured and run: its settings and the batch size.

    `threads` None means: as many as torch uses in this process; a plan records the number.

    >>> StepSpec(batch_size=32, optimizer="adam").optimizer.name
    'adam'
    """

    batch_size: int = Field(default=128, ge=1, le=MAX_BATCH)

    @model_validator(mode="after")
    def _micro_batches_are_of_the_batch(self) -> "StepSpec":
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            raise ValueError(f"micro-batches of {self.micro_batch} in a batch of {self.batch_size}: use at most that")
        return self

    @property
    def settings(self) -> StepSettings:
        """The step without its batch size."""
        return StepSettings(**self.model_dump(exclude={"batch_size"}))

    def with_levers(self, levers: Iterable[Lever]) -> "StepSpec":
        """This step with levers, beside those that it has.

        Raises:
            ValueError: levers that exclude each other.

        >>> StepSpec(batch_size=32).with_levers(["recompute", "micro_batches:8"]).micro_batch
        8
        """
        fields = self.settings.model_dump()
        by_field: dict[str, str] = {}
        for lever in levers:
            field = _FIELD_OF_LEVER.get(lever.partition(":")[0])
            if field is None:
                fields["levers"] = (*fields["levers"], lever)
            elif by_field.setdefault(field, lever) != lever:
                raise ValueError(f"{by_field[field]} and {lever} exclude each other; leave one of them out")
            else:
                fields[field] = int(lever.partition(":")[2]) if field == "micro_batch" else lever
        return StepSettings.model_validate(fields).with_batch(self.batch_size)


class DeviceFigures(Record):
    """What estimates of time and energy want to know of a device; each may be unknown (None).

    `flops_per_s` is what fp32 training sustains, a multiply and an add counted as two. `power_w` is the whole device's
    draw while it trains, `link_power_w` while it sends or receives.
    """

    flops_per_s: float | None = Field(default=None, gt=0)
    upload_bytes_per_s: float | None = Field(default=None, gt=0)
    download_bytes_per_s: float | None = Field(default=None, gt=0)
    power_w: float | None = Field(default=None, gt=0)
    link_power_w: float | None = Field(default=None, gt=0)


class Tier(DeviceFigures):
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
