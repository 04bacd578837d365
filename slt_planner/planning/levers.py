"""What else would let the whole network train within a budget: the records of that. No torch here."""

from collections.abc import Iterable
from typing import Literal

from pydantic import Field, model_validator

from slt_planner.config import Record, StepSpec
from slt_planner.units import LARGEST_BYTES

Change = Literal["batch_statistics", "loss_weights", "number_format", "optimizer"]
"""What a lever changes in the mathematics, the mildest first."""

CHANGES: dict[Change, str] = {
    "batch_statistics": "batch norm sees one micro-batch at a time",
    "loss_weights": "the loss is averaged one micro-batch at a time",
    "number_format": "it computes in bf16",
    "optimizer": "it is another optimizer",
}
"""The same in words, and in order."""


class Alternative(Record):
    """The whole network trained with some levers, measured on this machine; without any, as it is.

    `peak_bytes` is on the allocator ruler. `step_s` is the median time of a step, `relative_time` the median ratio to
    the plain step that ran just before. Levers that this network does not take have neither, and `refused` says why.
    """

    levers: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    spec: StepSpec
    peak_bytes: int | None = Field(default=None, gt=0, le=LARGEST_BYTES)
    step_s: float | None = Field(default=None, gt=0)
    relative_time: float | None = Field(default=None, gt=0)
    refused: str | None = None

    @model_validator(mode="after")
    def _measured_or_refused(self) -> "Alternative":
        if {figure is None for figure in (self.peak_bytes, self.step_s, self.relative_time)} != {bool(self.refused)}:
            raise ValueError("an alternative has a peak and times, or a reason why not")
        return self

    @property
    def exact(self) -> bool:
        """The same mathematics as the plain step, but for the order of sums."""
        return not self.changes

    @property
    def words(self) -> str:
        """The levers, as they are said."""
        return joined(self.levers) or "nothing changed"

    def fits(self, budget_bytes: int) -> bool:
        """It was measured within a budget."""
        return self.peak_bytes is not None and self.peak_bytes <= budget_bytes


def joined(words: Iterable[str]) -> str:
    """Words as they are listed.

    >>> joined(["bf16"]), joined(["bf16", "channels_last", "no foreach"])
    ('bf16', 'bf16, channels_last and no foreach')
    """
    return " and ".join(", ".join(words).rsplit(", ", 1))


def severity(changes: tuple[Change, ...]) -> tuple[bool, ...]:
    """Compares what is changed: the gravest change decides.

    >>> severity(("batch_statistics", "loss_weights")) < severity(("number_format",))
    True
    """
    return tuple(change in changes for change in reversed(list(CHANGES)))


class TierAnswer(Record):
    """Whether a tier could train the whole network, and how: the number of an alternative, or None."""

    tier: str
    budget_bytes: int = Field(gt=0, le=LARGEST_BYTES)
    alternative: int | None = Field(default=None, ge=0)
    answer: str


class WhatIf(Record):
    """Which levers would let the whole network train at each tier's budget; the first alternative is the plain step."""

    spec: StepSpec
    environment: dict[str, str]
    alternatives: tuple[Alternative, ...] = Field(min_length=1)
    tiers: tuple[TierAnswer, ...]

    @model_validator(mode="after")
    def _answers_hold(self) -> "WhatIf":
        for tier in self.tiers:
            if tier.alternative is not None and (
                tier.alternative >= len(self.alternatives)
                or not self.alternatives[tier.alternative].fits(tier.budget_bytes)
            ):
                raise ValueError(f"tier {tier.tier}: the alternative {tier.alternative} does not fit")
        return self
