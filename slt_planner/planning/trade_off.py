"""What freezing more and a narrower head buy: peaks over both, and where each tier's budget ends."""

from collections.abc import Sequence
from typing import TypeVar

from slt_planner.config import Tier
from slt_planner.planning.bench import Bench
from slt_planner.planning.plan import Frontier, TradeOff
from slt_planner.planning.search import largest_scale

_MOST_DEPTHS = 10
_MOST_SCALES = 6
_T = TypeVar("_T")


def trade_off(bench: Bench, tiers: Sequence[Tier]) -> TradeOff:
    """The peaks of (K_F, K_F + 1, s) on a grid of at most 10 freeze depths and 6 head scales, and a frontier a tier."""
    space = bench.space()
    depths = _spread(range(space.depth), _MOST_DEPTHS)
    scales = _spread(space.scales(1), _MOST_SCALES)
    return TradeOff(
        freeze_depths=depths,
        head_scales=scales,
        peak_bytes=tuple(tuple(_peak(bench, depth, scale) for scale in scales) for depth in depths),
        frontiers=tuple(
            Frontier(
                tier=tier.name,
                head_scales=tuple(largest_scale(space, depth + 1, tier.budget_bytes) for depth in depths),
            )
            for tier in tiers
        ),
    )


def _peak(bench: Bench, freeze_depth: int, head_scale: float) -> int:
    space = bench.space()
    legal = _legal(space.scales(freeze_depth + 1), head_scale)
    return bench.peak(space.deepest_frozen(freeze_depth + 1, legal))


def _legal(scales: Sequence[float], wanted: float) -> float:
    """The widest legal scale that is not wider than wanted; the narrowest where none is."""
    return max((scale for scale in scales if scale <= wanted), default=scales[0])


def _spread(values: Sequence[_T], most: int) -> tuple[_T, ...]:
    """At most so many values, evenly spread, with the first and the last."""
    if len(values) <= most:
        return tuple(values)
    return tuple(values[round(i * (len(values) - 1) / (most - 1))] for i in range(most))
