"""A picture of what freezing more units and a narrower head buy."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from slt_planner.planning.plan import Plan, TradeOff
from slt_planner.reporting.figures import LINES, PAPER, RUN_COLOURS, WIDTH_IN, bytes_unit, styled
from slt_planner.reporting.terminal import scale_text, shorten
from slt_planner.units import format_bytes

_PEAKS = LinearSegmentedColormap.from_list("peaks", ["#f1f4f8", "#8195b8"])  # dark text is readable on all of it
_DARK, _LIGHT = "#111820", "#fefefe"  # of no theme: cells are as light on a dark page
_CROSS: dict[str, Any] = {"linestyle": "", "marker": "x", "markeredgewidth": 1.6, "markersize": 5}
_ROW_IN = 0.4
_CLEAR = 0.2  # of a row: as near as a line may come to the middle of a number


@styled
def trade_off_figure(plan: Plan, trade_off: TradeOff) -> Figure:
    """Peaks over freeze depth and head scale, and on them the widest head of each tier at each freeze depth.

    Rows and columns are evenly spaced, whatever lies between them. A frontier runs along the upper edge of the widest
    head that fits, or through the next one where a scale between the two fits.
    """
    figure = Figure(figsize=(WIDTH_IN, 1.35 + _ROW_IN * len(trade_off.head_scales)), layout="constrained")
    axes = figure.subplots()
    heights = [_heights(trade_off, tier) for tier in range(len(trade_off.frontiers))]
    unit, size = bytes_unit(max(map(max, trade_off.peak_bytes)))
    axes.pcolormesh(np.transpose(trade_off.peak_bytes), cmap=_PEAKS, edgecolors=PAPER, linewidth=1.0)
    for column, peaks in enumerate(trade_off.peak_bytes):
        lines = [line[column] for line in heights]
        for row, peak in enumerate(peaks):
            y = _clear_place(row + 0.5, lines)
            axes.text(column + 0.5, y, _three_digits(peak / size), ha="center", va="center", fontsize=8.5, color=_DARK)
    for tier, line in enumerate(heights):
        _draw_frontier(axes, line, tier, len(heights))
    axes.set_xticks([0.5 + column for column in range(len(trade_off.freeze_depths))], map(str, trade_off.freeze_depths))
    axes.set_yticks([0.5 + row for row in range(len(trade_off.head_scales))], map(scale_text, trade_off.head_scales))
    axes.set(xlabel="units frozen", ylabel="head scale", ylim=(0, len(trade_off.head_scales) + 0.3))
    axes.set_title(f"Peak in {unit}")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    handles = _legend_handles(plan, trade_off)
    figure.legend(handles=handles, loc="outside upper left", ncols=3, handlelength=2.4, columnspacing=1.3)
    return figure


def _three_digits(number: float) -> str:
    """As many digits as there is room for in a cell.

    >>> _three_digits(9.6), _three_digits(99.96), _three_digits(1204.3)
    ('9.60', '100', '1204')
    """
    return f"{number:.0f}" if number >= 99.95 else f"{number:#.3g}"


def _heights(trade_off: TradeOff, number: int) -> list[float]:
    """Where a frontier runs in each column, in rows, a little beside one it would cover; NaN where no head fits."""
    scales, count = trade_off.head_scales, len(trade_off.frontiers)
    aside = (number - (count - 1) / 2) * min(0.1, 0.5 / count)
    edges = [row + 1 for row in range(len(scales))]
    return [
        math.nan if scale is None else float(np.interp(scale, scales, edges)) + aside
        for scale in trade_off.frontiers[number].head_scales
    ]


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


def _legend_handles(plan: Plan, trade_off: TradeOff) -> list[Line2D]:
    budgets = {tier.name: tier.budget_bytes for tier in plan.tiers}
    handles = []
    for number, frontier in enumerate(trade_off.frontiers):
        label = f"{shorten(frontier.tier, 20)}: widest head in {format_bytes(budgets[frontier.tier])}"
        handles.append(Line2D([], [], linewidth=2.0, label=label, **_look(number)))
    if any(None in frontier.head_scales for frontier in trade_off.frontiers):
        handles.append(Line2D([], [], color=RUN_COLOURS[-1], label="not even the narrowest head fits", **_CROSS))
    return handles
