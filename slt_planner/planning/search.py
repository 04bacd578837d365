"""The exact problem of one stage, as pure search over a peak function (METHOD, section 1, "the exact problem").

`peak(config)` is the memory of one training step, which decides; `at_least(config)` a bound below it that is cheap to
have and grows with the head scale below 1.0 and falls with the freeze depth. `scales(full_depth)` are the legal head
scales, ascending, last 1.0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from slt_planner.config import Config
from slt_planner.planning.plan import LimitedBy

Peak: TypeAlias = Callable[[Config], int]
_ChoiceT = TypeVar("_ChoiceT")

_MOST_TRIED_BEYOND = 16
"""How many choices beyond the first that is over are tried: kernels choose their scratch memory by shape, so that a
larger step may need less."""


@dataclass(frozen=True)
class SearchSpace:
    """What is searched: depth = K units, the legal head scales behind each full_depth, and what each choice needs."""

    depth: int
    scales: Callable[[int], Sequence[float]]
    peak: Peak
    at_least: Peak

    def config(self, freeze_depth: int, full_depth: int, head_scale: float) -> Config:
        """A configuration; where nothing is scaled full_depth is immaterial and set to K."""
        full_depth = self.depth if head_scale == 1.0 else full_depth
        return Config(freeze_depth=freeze_depth, full_depth=full_depth, head_scale=head_scale)

    def deepest_frozen(self, full_depth: int, head_scale: float) -> Config:
        """(K_T - 1, K_T, s): as much frozen as a stage allows; (0, 0, s) in the warm-up."""
        return self.config(max(0, full_depth - 1), full_depth, head_scale)

    def narrowest(self, full_depth: int) -> Config:
        """The stage with the least memory behind a full_depth."""
        return self.deepest_frozen(full_depth, self.scales(full_depth)[0])

    def fits(self, config: Config, budget: int) -> bool:
        """Whether a step needs no more than the budget."""
        return self.at_least(config) <= budget and self.peak(config) <= budget


@dataclass(frozen=True)
class StageChoice:
    """A stage as a tier's budget sets it.

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
    """Why a budget admits no schedule: the first full_depth on the way that has no head that fits, at its narrowest."""

    full_depth: int
    floor: Config


def find_schedule(space: SearchSpace, budget: int) -> tuple[StageChoice, ...] | NoSchedule:
    """The schedule of one budget: warm-up, then full_depth forward a unit a stage until nothing is scaled.

    Every head is the largest that fits and never shrinks later; a budget that holds the whole network is one stage.
    """
    if space.fits(space.config(0, 0, 1.0), budget):
        return (StageChoice(space.depth, 1.0, "full", 0),)
    frozen = _least(space, [space.config(f, space.depth, 1.0) for f in range(space.depth)], budget)
    last = space.depth + 1 if frozen is None else frozen + 1  # the first full_depth that can do without a scaled head
    largest: list[float] = []
    for full_depth in range(min(last, space.depth + 1)):
        scale = _largest_below(space, full_depth, budget, 1.0, largest[-1] if largest else None)
        if scale is None:
            return NoSchedule(full_depth, space.narrowest(full_depth))
        largest.append(scale)
    stages = [StageChoice(space.depth, 1.0, "full", last - 1)]
    for full_depth, own in reversed(list(enumerate(largest))):
        stage = _stage(space, budget, full_depth, own, stages[0].head_scale)
        if stage is None:
            return NoSchedule(full_depth, space.narrowest(full_depth))
        stages.insert(0, stage)
    return tuple(stages)


def _stage(space: SearchSpace, budget: int, full_depth: int, own: float, next_scale: float) -> StageChoice | None:
    """A stage whose own largest scale is known, and which may not be wider than the next one."""
    enough_frozen = max(0, full_depth - 1)
    if own > next_scale:
        if space.fits(space.deepest_frozen(full_depth, next_scale), budget):
            return StageChoice(full_depth, next_scale, "later_stage", enough_frozen)
        smaller = _largest_below(space, full_depth, budget, next_scale)
        if smaller is None:
            return None
        own = smaller
    return StageChoice(full_depth, own, "budget", enough_frozen, _next_notch(space, full_depth, own))


def _next_notch(space: SearchSpace, full_depth: int, scale: float) -> Config:
    wider = next(s for s in space.scales(full_depth) if s > scale)
    return space.deepest_frozen(full_depth, wider)


def largest_scale(space: SearchSpace, full_depth: int, budget: int) -> float | None:
    """s*: the largest legal head scale at (K_T - 1, K_T) that fits; None if the narrowest does not.

    1.0 is tried by itself: there the identity cut is gone, and it can need less than the notch below.
    """
    if space.fits(space.deepest_frozen(full_depth, 1.0), budget):
        return 1.0
    return _largest_below(space, full_depth, budget, 1.0)


def _largest_below(
    space: SearchSpace, full_depth: int, budget: int, limit: float, guess: float | None = None
) -> float | None:
    downwards = [scale for scale in reversed(space.scales(full_depth)) if scale < limit]
    near = None if guess is None else sum(scale > guess for scale in downwards)
    found = _least(space, [space.deepest_frozen(full_depth, scale) for scale in downwards], budget, near)
    return None if found is None else downwards[found]


def least_frozen(space: SearchSpace, stage: StageChoice, budget: int, guess: int = 0) -> int:
    """The smallest freeze_depth that fits at a stage's scale; the stage's `enough_frozen` must fit.

    `guess` is where to look first.
    """
    choices = [space.config(f, stage.full_depth, stage.head_scale) for f in range(stage.enough_frozen)]
    found = _least(space, choices, budget, guess)
    return stage.enough_frozen if found is None else found


def _least(space: SearchSpace, choices: Sequence[Config], budget: int, guess: int | None = None) -> int | None:
    """The first of the choices that fits, where memory falls from each to the next; None if none does.

    Both sides of the boundary are evaluated. Where the true peak is not monotone, a choice before the boundary may fit,
    too: those that the bound does not exclude are tried, all or at most 16 spread evenly.
    """

    def fits(config: Config) -> bool:
        return space.fits(config, budget)

    def may_fit(config: Config) -> bool:
        return space.at_least(config) <= budget

    found = boundary(choices, fits, guess)
    while True:
        beyond = range(boundary(choices[:found], may_fit, found - 1), found - 1)
        tried = beyond[:: max(1, -(-len(beyond) // _MOST_TRIED_BEYOND))]
        better = next((number for number in tried if fits(choices[number])), None)
        if better is None:
            return found if found < len(choices) else None
        found = boundary(choices[: better + 1], fits, better)


def boundary(choices: Sequence[_ChoiceT], good: Callable[[_ChoiceT], bool], guess: int | None = None) -> int:
    """The number of the first good choice, where bad ones come first; it and the one before it are looked at.

    Their number where all are bad.
    """
    bad, best = -1, len(choices)
    step, at = 1, min(max((len(choices) - 1) // 2 if guess is None else guess, 0), len(choices) - 1)
    while best - bad > 1:
        if good(choices[at]):
            best = at
            at = max(best - step, bad + 1)
        else:
            bad = at
            at = min(bad + step, best - 1)
        if bad >= 0 and best < len(choices):
            at = (bad + best) // 2
        step *= 2
    return best


def smallest_budget(space: SearchSpace) -> Config:
    """The configuration whose peak is the smallest budget with a schedule.

    That is the least, over the stage it may end with, of the most that is needed on the way there.
    """
    answer = space.config(0, 0, 1.0)
    on_the_way = space.narrowest(0)
    for full_depth in range(1, space.depth + 1):
        whole = space.deepest_frozen(full_depth, 1.0)
        if max(space.peak(on_the_way), space.at_least(whole)) < space.peak(answer):
            answer = min(answer, max(on_the_way, whole, key=space.peak), key=space.peak)
        on_the_way = max(on_the_way, space.narrowest(full_depth), key=space.peak)
        if space.peak(on_the_way) >= space.peak(answer):
            break
    return answer
