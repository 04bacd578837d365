"""The exact problem of one stage, as pure search over a peak function (METHOD, section 1, "the exact problem").

`peak(config)` is the memory of one training step; `scales(full_depth)` the legal head scales, ascending, last 1.0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from slt_planner.config import Config
from slt_planner.planning.plan import LimitedBy

Peak: TypeAlias = Callable[[Config], int]


@dataclass(frozen=True)
class SearchSpace:
    """What is searched: depth = K units, the legal head scales behind each full_depth, and what each choice needs."""

    depth: int
    scales: Callable[[int], Sequence[float]]
    peak: Peak

    def config(self, freeze_depth: int, full_depth: int, head_scale: float) -> Config:
        """A configuration; where nothing is scaled full_depth is immaterial and set to K."""
        full_depth = self.depth if head_scale == 1.0 else full_depth
        return Config(freeze_depth=freeze_depth, full_depth=full_depth, head_scale=head_scale)

    def deepest_frozen(self, full_depth: int, head_scale: float) -> Config:
        """(K_T - 1, K_T, s): as much frozen as a stage allows; (0, 0, s) in the warm-up."""
        return self.config(max(0, full_depth - 1), full_depth, head_scale)

    def floor(self, full_depth: int) -> int:
        """What a stage needs with its narrowest head."""
        return self.peak(self.deepest_frozen(full_depth, self.scales(full_depth)[0]))


@dataclass(frozen=True)
class StageChoice:
    """A stage as the binding tier sets it.

    `enough_frozen` is a freeze depth that was found to fit; `wider_head` is the next notch, over budget, where the
    budget is what limits the head.
    """

    full_depth: int
    head_scale: float
    limited_by: LimitedBy
    enough_frozen: int
    wider_head: Config | None = None


@dataclass(frozen=True)
class NoSchedule:
    """Why a budget admits no schedule: the first full_depth on the way that has no head that fits, and its floor."""

    full_depth: int
    floor_bytes: int


def find_schedule(space: SearchSpace, budget: int) -> tuple[StageChoice, ...] | NoSchedule:
    """The schedule of the tier that binds: warm-up, then full_depth forward a unit a stage until nothing is scaled.

    Every head is the largest that fits and never shrinks later; a budget that holds the whole network is one stage.
    """
    if space.peak(space.deepest_frozen(0, 1.0)) <= budget:
        return (StageChoice(space.depth, 1.0, "full", 0),)
    largest: list[float] = []
    for full_depth in range(space.depth + 1):
        scale = largest_scale(space, full_depth, budget)
        if scale is None:
            return NoSchedule(full_depth, space.floor(full_depth))
        largest.append(scale)
        if scale == 1.0:
            break
    stages = [_limited(space, largest, full_depth) for full_depth in range(1, len(largest))]
    return (_warm_up(space, largest[0], stages[0].head_scale), *stages)


def _limited(space: SearchSpace, largest: Sequence[float], full_depth: int) -> StageChoice:
    own, scale = largest[full_depth], min(largest[full_depth:])
    enough_frozen = full_depth - 1
    if scale == 1.0:
        return StageChoice(space.depth, 1.0, "full", enough_frozen)
    if scale < own:
        return StageChoice(full_depth, scale, "later_stage", enough_frozen)
    return StageChoice(full_depth, scale, "budget", enough_frozen, _next_notch(space, full_depth, scale))


def _warm_up(space: SearchSpace, own: float, first_stage: float) -> StageChoice:
    """The whole network at the first stage's scale, or at its own largest if that does not fit."""
    if first_stage <= own:
        return StageChoice(0, first_stage, "later_stage", 0)
    return StageChoice(0, own, "budget", 0, _next_notch(space, 0, own))


def _next_notch(space: SearchSpace, full_depth: int, scale: float) -> Config:
    wider = next(s for s in space.scales(full_depth) if s > scale)
    return space.deepest_frozen(full_depth, wider)


def largest_scale(space: SearchSpace, full_depth: int, budget: int) -> float | None:
    """s*: the largest legal head scale at (K_T - 1, K_T) that fits; None if the narrowest does not.

    1.0 is tried first: there the identity cut is gone, and it can need less than the notch below. Below it the peak is
    taken to grow with the scale; both sides of the boundary are evaluated.
    """
    scales = space.scales(full_depth)

    def peak(notch: int) -> int:
        return space.peak(space.deepest_frozen(full_depth, scales[notch]))

    last = len(scales) - 1
    if peak(last) <= budget:
        return scales[last]
    if last == 0 or peak(0) > budget:
        return None
    fits, over = 0, last
    halve = False
    while over - fits > 1:
        # Peaks are nearly linear in the scale: interpolate, and halve every other time to keep the worst case short.
        share = 0.5 if halve else (budget - peak(fits)) / max(1, peak(over) - peak(fits))
        middle = min(max(fits + int(share * (over - fits)), fits + 1), over - 1)
        fits, over = (middle, over) if peak(middle) <= budget else (fits, middle)
        halve = not halve
    return scales[fits]


def least_frozen(space: SearchSpace, stage: StageChoice, budget: int, guess: int = 0) -> int:
    """The smallest freeze_depth that fits at a stage's scale; the stage's `enough_frozen` must fit.

    Both sides of the boundary are evaluated: the answer fits, one less is over. Elsewhere the peak is taken to fall
    with the freeze depth. `guess` is where to look first.
    """

    def fits(freeze_depth: int) -> bool:
        return space.peak(space.config(freeze_depth, stage.full_depth, stage.head_scale)) <= budget

    too_few, enough = -1, stage.enough_frozen
    while enough - too_few > 1:
        middle = min(max(guess, too_few + 1), enough - 1)
        if fits(middle):
            enough, guess = middle, middle - 1
        else:
            too_few, guess = middle, (middle + 1 + enough) // 2
    return enough


def smallest_budget(space: SearchSpace) -> int:
    """The smallest budget with a schedule: the least, over the stage it may end with, of what all up to it need."""
    answer = space.peak(space.deepest_frozen(0, 1.0))
    on_the_way = space.floor(0)
    for full_depth in range(1, space.depth + 1):
        whole = space.peak(space.deepest_frozen(full_depth, 1.0))
        answer = min(answer, max(on_the_way, whole))
        on_the_way = max(on_the_way, space.floor(full_depth))
        if on_the_way >= answer:
            break
    return answer
