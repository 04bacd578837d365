"""Live bytes through one training step, by category, and where in the network they are made."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from slt_planner.memory.profile import Category, MemoryProfile, TimelinePoint
from slt_planner.reporting.charts.chart import INK, Chart, Trace, axis, label, line
from slt_planner.reporting.looks import CATEGORY_COLOURS, STACK
from slt_planner.reporting.words import byte_unit
from slt_planner.units import format_bytes

_MOST_POINTS = 3000


def timeline_chart(profile: MemoryProfile) -> Chart:
    """Live bytes after each allocation and release, stacked by category; the profile must have a timeline.

    A timeline of more than 3,000 changes is thinned: of neighbouring ones the highest moment is kept.
    """
    points = profile.timeline
    kept = _kept([point.live_bytes for point in points])
    timed = all(point.time_us is not None for point in points)
    times = [0.0, *((points[n].time_us or 0) / 1000 if timed else n + 1 for n in kept)]
    unit, size = byte_unit(profile.peak_bytes)
    traces = [_area(profile, category, kept, times, size) for category in STACK]
    traces = [trace for trace in traces if any(trace["y"])]
    live = [(points[0].live_bytes - points[0].change_bytes) / size, *(points[n].live_bytes / size for n in kept)]
    words = ["the step begins", *(_words(points[n], profile) for n in kept)]
    total = line("all", times, live, {"color": INK, "width": 0.8, "shape": "hv"}, hovertext=words)
    label_x = "ms since the step began, slowed down by recording it" if timed else "allocations and releases, in order"
    layout: dict[str, Any] = {
        "hovermode": "x",
        "xaxis": axis(label_x, showgrid=False, range=[0, times[-1]]),
        "yaxis": axis(unit, rangemode="tozero"),
    }
    caption = f"Live memory through one training step by category; its peak is {format_bytes(profile.peak_bytes)}"
    return Chart("timeline", caption, 420, (*traces, total), layout)


def _kept(live: Sequence[int]) -> list[int]:
    """Which points are drawn: of each of at most 3,000 groups of neighbours the highest, and the last of all."""
    width = -(-len(live) // _MOST_POINTS)
    groups = (range(first, min(first + width, len(live))) for first in range(0, len(live), width))
    return sorted({*(max(group, key=lambda n: live[n]) for group in groups), len(live) - 1})


def _area(
    profile: MemoryProfile, category: Category, kept: Sequence[int], times: Sequence[float], size: float
) -> Trace:
    changes = (point.change_bytes if point.category == category else 0 for point in profile.timeline)
    live = list(accumulate(changes, initial=(profile.resident or {}).get(category, 0)))
    return {
        "type": "scatter",
        "mode": "lines",
        "name": category,
        "x": times,
        "y": [live[0] / size, *(live[n + 1] / size for n in kept)],
        "stackgroup": "live",
        "line": {"width": 0, "shape": "hv"},
        "fillcolor": CATEGORY_COLOURS[category],
        "hoverinfo": "skip",
    }


def _words(point: TimelinePoint, profile: MemoryProfile) -> str:
    sign = "+" if point.change_bytes >= 0 else "−"  # noqa: RUF001 - a minus sign
    name = profile.unit_name(point.unit)
    where = f" in unit {point.unit}" + (f" ({label(name, 40)})" if name else "") if point.unit else ""
    return (
        f"<b>{format_bytes(point.live_bytes)}</b>: {sign}{format_bytes(abs(point.change_bytes))} {point.category}"
        f"<br>{label(point.operator or 'between operators', 50)}{where}"
    )
