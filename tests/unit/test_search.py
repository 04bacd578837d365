"""The search against brute force over every configuration of random small problems."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from slt_planner.config import Config
from slt_planner.planning.search import (
    NoSchedule,
    SearchSpace,
    find_schedule,
    largest_scale,
    least_frozen,
    smallest_budget,
)


@dataclass
class Problem:
    """A made-up network: its peak grows with the head, and with what is trained at full width.

    s = 1.0 may need less than the notch below (no cut), and some full_depths more than their neighbours (holes).
    Kernels' scratch memory comes and goes with shapes, so that a wider head can fit where a narrower one does not.
    """

    depth: int
    notches: int
    frozen_cost: list[int]
    trained_cost: list[int]
    cut_cost: int
    bump: list[int]
    budget: int
    scratch: list[int]
    asked: set[Config] = field(default_factory=set)

    def scales(self, full_depth):
        return tuple(k / self.notches for k in range(1, self.notches + 1)) if full_depth < self.depth else (1.0,)

    def peak(self, config):
        self.asked.add(config)
        shape = (config.freeze_depth, config.full_depth, round(config.head_scale * self.notches))
        return self.at_least(config) + self.scratch[sum(shape) % len(self.scratch)]

    def at_least(self, config):
        """The peak without scratch memory; with what it asks for noted as an answer, where it decides."""
        f, t, s = config.freeze_depth, config.full_depth, config.head_scale
        if s == 1.0:
            needed = sum(self.frozen_cost[:f]) + sum(self.trained_cost[f:])
        else:
            scaled = int(s * sum(self.trained_cost[t:]))
            needed = sum(self.frozen_cost[:f]) + sum(self.trained_cost[f:t]) + scaled + self.cut_cost + self.bump[t]
        if needed > self.budget:
            self.asked.add(config)
        return needed

    def space(self):
        return SearchSpace(self.depth, self.scales, self.peak, self.at_least)


@st.composite
def problems(draw, kernels=True):
    depth = draw(st.integers(1, 6))
    costs = st.lists(st.integers(1, 40), min_size=depth, max_size=depth)
    trained = draw(costs)
    return Problem(
        depth=depth,
        notches=draw(st.integers(1, 9)),
        frozen_cost=[draw(st.integers(0, cost)) for cost in trained],
        trained_cost=trained,
        cut_cost=draw(st.integers(0, 30)),
        bump=draw(st.lists(st.sampled_from([0, 0, 25]), min_size=depth + 1, max_size=depth + 1)),
        budget=draw(st.integers(1, 260)),
        scratch=draw(st.lists(st.sampled_from([0, 0, 3, 20]), min_size=1, max_size=7)) if kernels else [0],
    )


def brute_scale(problem, full_depth):
    freeze = max(0, full_depth - 1)
    fitting = [s for s in problem.scales(full_depth) if fits(problem, freeze, full_depth, s)]
    return max(fitting, default=None)


def fits(problem, freeze, full, scale):
    full = problem.depth if scale == 1.0 else full
    return problem.peak(Config(freeze_depth=freeze, full_depth=full, head_scale=scale)) <= problem.budget


def brute_schedule(problem):
    """The definition, word for word; a list of (full_depth, scale), or the full_depth that has no head."""
    if fits(problem, 0, 0, 1.0):
        return [(problem.depth, 1.0)]
    largest = []
    for full_depth in range(problem.depth + 1):
        scale = brute_scale(problem, full_depth)
        if scale is None:
            return full_depth
        largest.append(scale)
        if scale == 1.0 and full_depth > 0:
            break
    stages = [(problem.depth, 1.0)]
    for full_depth in reversed(range(len(largest) - 1)):
        fitting = [
            s
            for s in problem.scales(full_depth)
            if s <= stages[0][1] and fits(problem, max(0, full_depth - 1), full_depth, s)
        ]
        if not fitting:
            return full_depth
        stages.insert(0, (full_depth, max(fitting)))
    return stages


@given(problems())
@settings(max_examples=400, deadline=None)
def test_the_schedule_is_the_one_that_brute_force_finds(problem):
    expected = brute_schedule(problem)
    found = find_schedule(problem.space(), problem.budget)
    if isinstance(expected, int):
        assert isinstance(found, NoSchedule)
        assert found.full_depth == expected
        assert problem.peak(found.floor) > problem.budget
    else:
        assert not isinstance(found, NoSchedule)
        assert [(stage.full_depth, stage.head_scale) for stage in found] == expected
        assert [s.head_scale for s in found] == sorted(s.head_scale for s in found)
        assert found[-1].limited_by == "full"
        for stage in found:
            assert (stage.wider_head is not None) == (stage.limited_by == "budget")
            if stage.wider_head is not None:
                assert problem.peak(stage.wider_head) > problem.budget


@given(problems(), st.integers(0, 6), st.integers(0, 200))
@settings(max_examples=400, deadline=None)
def test_the_least_frozen_is_the_one_that_brute_force_finds(problem, guess, extra):
    schedule = find_schedule(problem.space(), problem.budget)
    if isinstance(schedule, NoSchedule):
        return
    for stage in schedule:
        problem.budget += extra  # a stronger tier
        deepest = stage.enough_frozen
        assert fits(problem, deepest, stage.full_depth, stage.head_scale)
        expected = next(k for k in range(deepest + 1) if fits(problem, k, stage.full_depth, stage.head_scale))
        problem.asked.clear()
        found = least_frozen(problem.space(), stage, problem.budget, guess)
        assert found == expected
        proof = problem.space().config(max(0, found - 1), stage.full_depth, stage.head_scale)
        assert found == 0 or proof in problem.asked  # the next smaller one was looked at, not assumed
        problem.budget -= extra


@given(problems())
@settings(max_examples=200, deadline=None)
def test_more_budget_never_gives_a_smaller_head(problem):
    space = problem.space()
    for full_depth in range(problem.depth + 1):
        less = largest_scale(space, full_depth, problem.budget)
        more = largest_scale(space, full_depth, problem.budget + 17)
        assert less is None or (more is not None and more >= less)


@given(problems(kernels=False))
@settings(max_examples=200, deadline=None)
def test_the_smallest_budget_schedules_and_one_byte_less_does_not(problem):
    smallest = problem.peak(smallest_budget(problem.space()))
    assert not isinstance(find_schedule(problem.space(), smallest), NoSchedule)
    assert isinstance(find_schedule(problem.space(), smallest - 1), NoSchedule)
