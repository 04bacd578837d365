"""From changes of live bytes, in order, to the peak, what it consists of, and a timeline."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from slt_planner.memory.profile import CATEGORIES, Category, Phase, TimelinePoint


@dataclass(frozen=True)
class Change:
    """Bytes that come to life (negative: go), what they are, and the operator and unit (0: none) it happens in."""

    size: int
    category: Category
    operator: str
    unit: int
    time_us: float | None = None
    phase: Phase | None = None


@dataclass(frozen=True)
class Peak:
    """The moment with the most live bytes; `breakdown` adds up to `size`."""

    size: int
    breakdown: dict[Category, int]
    operator: str
    unit: int
    phase: Phase | None = None


def most_at_once(lives: Iterable[tuple[int, int, int]]) -> int:
    """The most bytes that are there together, of (bytes, begin, end); what ends when another begins is gone by then.

    >>> most_at_once([(5, 0, 2), (4, 1, 3), (6, 2, 4)])
    10
    """
    changes = sorted(change for size, begin, end in lives for change in ((begin, size), (end, -size)))
    return max(accumulate((size for _, size in changes), initial=0))


def find_peak(resident: Mapping[Category, int], changes: Iterable[Change]) -> Peak:
    """The first moment with the most live bytes, from what is there at the begin."""
    live = dict.fromkeys(CATEGORIES, 0) | dict(resident)
    now = sum(live.values())
    peak = Peak(now, dict(live), "(none)", 0)
    most = now
    for change in changes:
        now += change.size
        live[change.category] += change.size
        if now > most:
            most = now
            peak = Peak(now, dict(live), change.operator or "(none)", change.unit, change.phase)
    return peak


def timeline(resident: Mapping[Category, int], changes: Iterable[Change]) -> tuple[TimelinePoint, ...]:
    """A point a change."""
    live, points = sum(resident.values()), []
    for change in changes:
        live += change.size
        points.append(
            TimelinePoint(
                time_us=change.time_us,
                live_bytes=live,
                change_bytes=change.size,
                category=change.category,
                operator=change.operator,
                unit=change.unit,
            )
        )
    return tuple(points)
