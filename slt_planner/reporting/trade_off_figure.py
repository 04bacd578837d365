"""A picture of what freezing more units and a narrower head buy."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from slt_planner.planning.plan import Frontier, Plan, TradeOff
from slt_planner.reporting.figures import LINES, PAPER, RUN_COLOURS, WIDTH_IN, bytes_unit, styled
from slt_planner.reporting.words import scale_text, shorten
from slt_planner.units import format_bytes

_PEAKS = LinearSegmentedColormap.from_list("peaks", ["#f1f4f8", "#8195b8"])  # dark text is readable on all of it
_DARK, _LIGHT = "#111820", "#fefefe"  # of no theme: cells are as light on a dark page
_CROSS: dict[str, Any] = {"linestyle": "", "marker": "x", "markeredgewidth": 1.6, "markersize": 5}
_ALL_OR_NOTHING: tuple[set[float | None], ...] = ({1.0}, {None})
_ROW_IN = 0.4
_CLEAR = 0.2  # of a row: as near as a line may come to the middle of a number


@styled
def trade_off_figure(plan: Plan, trade_off: TradeOff) -> Figure:
    """Peaks over freeze depth and head scale, and on them the widest head of each tier at each freeze depth.

    Rows and columns are evenly spaced, whatever lies between them. A frontier runs along the upper edge of the widest
    head that fits, or through the next one where a scale between the two fits. Tiers that all or nothing fits have no
    line; `trade_off_caption` names them.
    """
    frontiers = [frontier for frontier in trade_off.frontiers if set(frontier.head_scales) not in _ALL_OR_NOTHING]
    lines = _apart([_heights(frontier, trade_off.head_scales) for frontier in frontiers])
    figure = Figure(figsize=(WIDTH_IN, 1.35 + _ROW_IN * len(trade_off.head_scales)), layout="constrained")
    axes = figure.subplots()
    _draw_peaks(axes, trade_off, lines)
    for number, line in enumerate(lines):
        _draw_frontier(axes, line, number, len(lines))
    handles = _legend_handles(plan, frontiers)
    figure.legend(handles=handles, loc="outside upper left", ncols=3, handlelength=2.4, columnspacing=1.3)
    return figure


def _draw_peaks(axes: Axes, trade_off: TradeOff, lines: Sequence[Sequence[float]]) -> None:
    """Coloured cells, a column a freeze depth, with their peaks written where no line runs."""
    axes.pcolormesh(np.transpose(trade_off.peak_bytes), cmap=_PEAKS, edgecolors=PAPER, linewidth=1.0)
    unit, size = bytes_unit(max(map(max, trade_off.peak_bytes)))
    middle: dict[str, Any] = {"ha": "center", "va": "center"}
    for column, peaks in enumerate(trade_off.peak_bytes):
        for row, peak in enumerate(peaks):
            y = _clear_place(row + 0.5, [line[column] for line in lines])
            axes.text(column + 0.5, y, _three_digits(peak / size), fontsize=8.5, color=_DARK, **middle)
    depths, scales = trade_off.freeze_depths, trade_off.head_scales
    axes.set_xticks([0.5 + column for column in range(len(depths))], map(str, depths))
    axes.set_yticks([0.5 + row for row in range(len(scales))], map(scale_text, scales))
    axes.set(xlabel="units frozen", ylabel="head scale", ylim=(0, len(scales) + 0.3))
    axes.set_title(f"Peak in {unit}")
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _three_digits(number: float) -> str:
    """As many digits as there is room for in a cell.

    >>> _three_digits(9.6), _three_digits(99.96), _three_digits(1204.3)
    ('9.60', '100', '1204')
    """
    return f"{number:.0f}" if number >= 99.95 else f"{number:#.3g}"


def trade_off_caption(plan: Plan, trade_off: TradeOff) -> str:
    """What the picture shows, which tiers have no line in it, and how its peaks are known."""
    every, none = (
        [shorten(frontier.tier, 24) for frontier in trade_off.frontiers if set(frontier.head_scales) == extreme]
        for extreme in _ALL_OR_NOTHING
    )
    parts = [
        "Peak memory of a step that freezes the first units, trains the next one at full width and the rest at the "
        "head scale; a tier's line is the widest head that fits its budget.",
        *([f"All of it fits {', '.join(every)}."] if every else []),
        *([f"None of it fits {', '.join(none)}."] if none else []),
        f"The peaks are predicted{', or measured where the plan was' if plan.verified else ''}.",
    ]
    return " ".join(parts)


def _heights(frontier: Frontier, scales: Sequence[float]) -> list[float]:
    """Where a frontier runs in each column, in rows; NaN where no head fits."""
    edges = [row + 1 for row in range(len(scales))]
    return [math.nan if scale is None else float(np.interp(scale, scales, edges)) for scale in frontier.head_scales]


def _apart(heights: Sequence[Sequence[float]]) -> list[list[float]]:
    """The same lines, each moved a little, so that those that coincide are seen beside one another."""
    space, middle = min(0.1, 0.5 / max(1, len(heights))), (len(heights) - 1) / 2
    return [[height + (number - middle) * space for height in line] for number, line in enumerate(heights)]


def _clear_place(middle: float, lines: Sequence[float]) -> float:
    """Where in its cell a number is not crossed: in the middle if it can be, else above or below."""

    def room(place: float) -> float:
        return min((abs(place - line) for line in lines if not math.isnan(line)), default=1.0)

    return max((middle, middle + 0.26, middle - 0.26), key=lambda place: min(_CLEAR, room(place)))


def _draw_frontier(axes: Axes, heights: Sequence[float], number: int, count: int) -> None:
    look = _look(number)
    edges = [edge for column in range(len(heights)) for edge in (column, column + 1)]
    levels = [height for height in heights for _ in range(2)]
    axes.plot(edges, levels, color=_LIGHT, linewidth=4.0)
    axes.plot(edges, levels, linewidth=2.0, **look)
    crosses = [column + (number + 1) / (count + 1) for column, height in enumerate(heights) if math.isnan(height)]
    axes.plot(crosses, [0.12] * len(crosses), **look | _CROSS)


def _look(number: int) -> dict[str, Any]:
    return {"color": RUN_COLOURS[number % len(RUN_COLOURS)], "linestyle": LINES[number % len(LINES)]}


def _legend_handles(plan: Plan, frontiers: Sequence[Frontier]) -> list[Line2D]:
    budgets = {tier.name: tier.budget_bytes for tier in plan.tiers}
    handles = []
    for number, frontier in enumerate(frontiers):
        label = f"{shorten(frontier.tier, 20)}: widest head in {format_bytes(budgets[frontier.tier])}"
        handles.append(Line2D([], [], linewidth=2.0, label=label, **_look(number)))
    if any(None in frontier.head_scales for frontier in frontiers):
        handles.append(Line2D([], [], color=RUN_COLOURS[-1], label="not even the narrowest head fits", **_CROSS))
    return handles
