"""The largest step that a budget holds without a schedule: the widest network, or the one that trains deepest."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from slt_planner.config import Config
from slt_planner.planning.bench import Bench
from slt_planner.planning.search import SearchSpace, StageChoice, largest_scale, least_frozen

_Found: TypeAlias = tuple[Config | None, Config | None]
"""The largest that fits, and the next one, which does not; None where there is no such."""


@dataclass(frozen=True)
class Family:
    """Configurations from a smallest one up: how the smallest is made, and how the largest that fits is found."""

    smallest: Callable[[SearchSpace], Config]
    find: Callable[[SearchSpace, int], _Found]


def largest_fitting(family: Family, bench: Bench, budget: int) -> Config | None:
    """The largest of a family whose step was measured to fit, the next one being over; None if none fits."""
    while True:  # a search on predictions, until measurements agree
        fitting, beyond = family.find(bench.space(), budget)
        within = [] if fitting is None else [(fitting, budget)]
        if not bench.measure_all(within, [] if beyond is None else [beyond]):
            return fitting


def _widest(space: SearchSpace, budget: int) -> _Found:
    scale = largest_scale(space, 0, budget)
    wider = next((s for s in space.scales(0) if scale is None or s > scale), None)
    return (
        None if scale is None else space.deepest_frozen(0, scale),
        None if wider is None else space.deepest_frozen(0, wider),
    )


def _least_trained(space: SearchSpace) -> Config:
    return space.config(space.depth - 1, space.depth, 1.0)


def _deepest(space: SearchSpace, budget: int) -> _Found:
    if not space.fits(_least_trained(space), budget):
        return None, _least_trained(space)
    frozen = least_frozen(space, StageChoice(space.depth, 1.0, "full", space.depth - 1), budget)
    return space.config(frozen, space.depth, 1.0), space.config(frozen - 1, space.depth, 1.0) if frozen else None


WIDTHS = Family(lambda space: space.narrowest(0), _widest)
"""The network trained end to end at one width (0, 0, s)."""

DEPTHS = Family(_least_trained, _deepest)
"""The network at full width with its first units frozen (K_F, K, 1.0)."""
