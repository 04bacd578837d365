"""Levers: which sets of them a planner may use, and what else would let the whole network train. No torch here."""

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from slt_planner.config import LeanLever, Lever, LeverSet, Record, StepSpec
from slt_planner.errors import InputError
from slt_planner.units import LARGEST_BYTES

_FREE: LeverSet = ("in_place_prefix", "copied_cuts", "lean_norms", "early_updates", "channels_last")
_SETS: tuple[LeverSet, ...] = (
    _FREE,
    (*_FREE, "recompute:1"),
    (*_FREE, "recompute:2"),
    (*_FREE, "recompute:4"),
    (*_FREE, "split_convolutions", "recompute:2"),
    (*_FREE, "recompute"),
    (*_FREE, "split_convolutions", "recompute"),
)
"""Sets of exact levers in the order of what they cost in step time (benchmarks/results/lean_steps.md)."""

PARTLY = ("recompute:1", "recompute:2", "recompute:4")
"""Smaller amounts of `recompute`: the first pieces of the trained part alone."""
EXACT: tuple[Lever, ...] = (*(lever for lever in get_args(LeanLever) if lever not in PARTLY), "channels_last")


def lever_sets(asked: str, spec: StepSpec, images: bool) -> tuple[LeverSet, ...]:
    """The sets of levers that a planner tries, the cheapest first.

    Args:
        asked: ``none``; ``auto``: sets of exact ones, and no lever; ``exact``: all exact ones, always; or a list with
            commas: sets of these alone. Levers that are not exact (``bf16``, ``autocast``, ``micro_batches:N``) are
            used where they are in the list, beside the exact ones.
        spec: the step; levers that it has already are left out.
        images: whether the network's input has a layout that can be channels_last.

    Raises:
        InputError: a lever that does not exist, or two that exclude each other.

    >>> lever_sets("lean_norms,recompute", StepSpec(), images=True)
    ((), ('lean_norms',), ('lean_norms', 'recompute'))
    """
    if asked == "none":
        return ((),)
    if asked in ("auto", "exact"):
        allowed: tuple[Lever, ...] = (*PARTLY, *EXACT)
    else:
        allowed = tuple(dict.fromkeys(name.strip() for name in asked.split(",")))
        try:
            TypeAdapter(LeverSet).validate_python(allowed)
        except ValidationError as error:
            wrong = error.errors()[0]["input"]
            raise InputError(
                f"--levers {wrong!r}: known are auto, none, exact, or a list of {', '.join((*EXACT, *PARTLY))}, bf16, "
                "autocast, micro_batches:N"
            ) from error
    present = {*spec.levers, spec.memory_format} | (set() if images else {"channels_last"})
    if "recompute" in present:
        present |= set(PARTLY)
    if spec.micro_batch is not None:
        present.add("early_updates")
    own = tuple(lever for lever in allowed if lever not in (*PARTLY, *EXACT))
    usable = set(allowed) - present
    sets: list[LeverSet] = [()]
    amounts = [lever for lever in (*PARTLY, "recompute") if lever in usable]
    together: LeverSet = (*_FREE, "split_convolutions", *amounts[-1:])
    sets += [tuple(lever for lever in exact if lever in usable) for exact in (*_SETS, together)]
    sets += [_joined(sets[-1], own[: number + 1]) for number in range(len(own))]
    sets = list(dict.fromkeys(sets))
    for levers in sets:
        try:
            spec.with_levers(levers)
        except ValueError as error:
            raise InputError(f"--levers {asked}: {error}") from error
    return (sets[-1],) if asked == "exact" else tuple(sets)


def _joined(levers: Sequence[Lever], more: Sequence[Lever]) -> LeverSet:
    """Both; where gradients are added up over micro-batches, nothing is updated early."""
    together = (*levers, *more)
    pieces = any(lever.startswith("micro_batches:") for lever in together)
    return tuple(lever for lever in together if not (pieces and lever == "early_updates"))


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
