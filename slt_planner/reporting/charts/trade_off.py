"""What freezing more units and a narrower head buy: a map of peaks, and on it each tier's frontier."""

from collections.abc import Sequence
from typing import Any

from slt_planner.planning.plan import Frontier, Plan, TradeOff
from slt_planner.reporting.charts.chart import Chart, Trace, axis, label, line
from slt_planner.reporting.looks import LOOKS, Look
from slt_planner.reporting.words import byte_unit, count, scale_text, shorten
from slt_planner.units import format_bytes

_SCALE = [[0, "#f1f4f8"], [1, "#8195b8"]]  # dark text is readable on all of it, whatever the page's theme
_CLEAR = 0.2  # of a row: as near as a line may come to the middle of a number
_DARK, _LIGHT = "#111820", "#fefefe"
_ALL_OR_NOTHING: tuple[set[float | None], ...] = ({1.0}, {None})


def trade_off_chart(plan: Plan, trade_off: TradeOff) -> Chart:
    """Peaks over freeze depth and head scale, and on them the widest head of each tier at each freeze depth.

    Rows and columns are evenly spaced, whatever lies between them. A frontier runs along the upper edge of the widest
    head that fits, or through the next one where a scale between the two fits. Tiers that all or nothing fits have no
    line; the caption names them.
    """
    frontiers = [frontier for frontier in trade_off.frontiers if set(frontier.head_scales) not in _ALL_OR_NOTHING]
    heights = apart([_heights(frontier, trade_off.head_scales) for frontier in frontiers])
    traces: list[Trace] = [_map(trade_off)]
    for number, (frontier, line_heights) in enumerate(zip(frontiers, heights, strict=True)):
        traces += _frontier_traces(plan, trade_off, frontier, line_heights, number)
    traces.append(_numbers(trade_off, heights))
    layout = {
        "margin": {"l": 60, "r": 14, "t": 16, "b": 44},
        "xaxis": _category_axis("units frozen", list(map(str, trade_off.freeze_depths))),
        "yaxis": _category_axis("head scale", list(map(scale_text, trade_off.head_scales)), room=0.15),
    }
    height = 150 + 40 * len(trade_off.head_scales)
    return Chart("trade-off", trade_off_caption(plan, trade_off), height, tuple(traces), layout)


def _category_axis(title: str, names: list[str], room: float = 0) -> dict[str, Any]:
    """An axis with a name for each cell; `room` beyond the last one, in cells, is for a line along its edge."""
    places = [number + 0.5 for number in range(len(names))]
    return axis(title, range=[0, len(names) + room], tickvals=places, ticktext=names, showgrid=False, showline=False)


def _map(trade_off: TradeOff) -> Trace:
    unit, size = byte_unit(max(map(max, trade_off.peak_bytes)))
    rows = list(zip(*trade_off.peak_bytes, strict=True))
    words = [
        [
            f"{count(depth, 'unit')} frozen, head {scale_text(scale)}: <b>{format_bytes(peak)}</b>"
            for depth, peak in zip(trade_off.freeze_depths, row, strict=True)
        ]
        for scale, row in zip(trade_off.head_scales, rows, strict=True)
    ]
    return {
        "type": "heatmap",
        "name": f"peak in {unit}",
        "x": [number + 0.5 for number in range(len(trade_off.freeze_depths))],
        "y": [number + 0.5 for number in range(len(trade_off.head_scales))],
        "z": [[peak / size for peak in row] for row in rows],
        "hovertext": words,
        "hoverinfo": "text",
        "colorscale": _SCALE,
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
    }


def _numbers(trade_off: TradeOff, lines: Sequence[Sequence[float | None]]) -> Trace:
    """The peaks, written where no frontier runs."""
    _, size = byte_unit(max(map(max, trade_off.peak_bytes)))
    cells = [
        (column + 0.5, _clear_place(row + 0.5, [line[column] for line in lines]), _three_digits(peak / size))
        for column, peaks in enumerate(trade_off.peak_bytes)
        for row, peak in enumerate(peaks)
    ]
    return {
        "type": "scatter",
        "mode": "text",
        "x": [x for x, _, _ in cells],
        "y": [y for _, y, _ in cells],
        "text": [text for *_, text in cells],
        "textfont": {"color": _DARK, "size": 11.5},
        "hoverinfo": "skip",
        "showlegend": False,
        "meta": "wide",
    }


def _clear_place(middle: float, lines: Sequence[float | None]) -> float:
    """Where in its cell a number is not crossed: in the middle if it can be, else above or below."""

    def room(place: float) -> float:
        return min((abs(place - line) for line in lines if line is not None), default=1.0)

    return max((middle, middle + 0.26, middle - 0.26), key=lambda place: min(_CLEAR, room(place)))


def _frontier_traces(
    plan: Plan, trade_off: TradeOff, frontier: Frontier, heights: Sequence[float | None], number: int
) -> list[Trace]:
    """A pale line and the frontier on it; crosses where not even the narrowest head fits."""
    look = LOOKS[number % len(LOOKS)]
    budget = format_bytes(next(tier.budget_bytes for tier in plan.tiers if tier.name == frontier.tier))
    name = f"{label(frontier.tier, 20)}: widest head in {budget}"
    edges = [edge for column in range(len(heights)) for edge in (column, column + 1)]
    levels = [height for height in heights for _ in range(2)]
    words = [
        f"<b>{label(frontier.tier)}</b>, {count(depth, 'unit')} frozen: "
        + ("not even the narrowest head fits" if scale is None else f"head up to {scale_text(scale)}")
        for depth, scale in zip(trade_off.freeze_depths, frontier.head_scales, strict=True)
        for _ in range(2)
    ]
    pale = line("", edges, levels, {"color": _LIGHT, "width": 5}, showlegend=False) | {"hoverinfo": "skip"}
    drawn = line(name, edges, levels, {"color": look.colour, "width": 2.5, "dash": look.dash}, hovertext=words)
    missing = [column for column, height in enumerate(heights) if height is None]
    return [pale, drawn, *([_crosses(missing, look, words)] if missing else [])]


def _crosses(columns: Sequence[int], look: Look, words: Sequence[str]) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "not even the narrowest head fits",
        "x": [column + 0.5 for column in columns],
        "y": [0.14] * len(columns),
        "marker": {"symbol": "x-thin", "size": 7, "line": {"color": look.colour, "width": 2}},
        "hovertext": [words[2 * column] for column in columns],
        "hoverinfo": "text",
    }


def _three_digits(number: float) -> str:
    """As many digits as there is room for in a cell.

    >>> _three_digits(9.6), _three_digits(99.96), _three_digits(1204.3)
    ('9.60', '100', '1204')
    """
    return f"{number:.0f}" if number >= 99.95 else f"{number:#.3g}"


def trade_off_caption(plan: Plan, trade_off: TradeOff) -> str:
    """What the map shows, which tiers have no line in it, and how its peaks are known."""
    every, none = (
        [shorten(frontier.tier, 24) for frontier in trade_off.frontiers if set(frontier.head_scales) == extreme]
        for extreme in _ALL_OR_NOTHING
    )
    unit, _ = byte_unit(max(map(max, trade_off.peak_bytes)))
    parts = [
        f"Peak memory in {unit} of a step that freezes the first units, trains the next one at full width and the rest "
        "at the head scale; a tier's line is the widest head that fits its budget.",
        *([f"All of it fits {', '.join(every)}."] if every else []),
        *([f"None of it fits {', '.join(none)}."] if none else []),
        f"The peaks are predicted{', or measured where the plan was' if plan.verified else ''}.",
    ]
    return " ".join(parts)


def _heights(frontier: Frontier, scales: Sequence[float]) -> list[float | None]:
    """Where a frontier runs in each column, in rows; None where no head fits."""
    return [None if scale is None else _height(scale, scales) for scale in frontier.head_scales]


def _height(scale: float, scales: Sequence[float]) -> float:
    """Rows below a head scale: whole ones, and a part of the one that it ends in."""
    below = [row for row, own in enumerate(scales) if own <= scale]
    if not below:
        return 1.0
    row = below[-1]
    if row + 1 == len(scales):
        return row + 1.0
    return row + 1 + (scale - scales[row]) / (scales[row + 1] - scales[row])


def apart(heights: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    """The same lines, each moved a little, so that those that coincide are seen beside one another."""
    space, middle = min(0.1, 0.5 / max(1, len(heights))), (len(heights) - 1) / 2
    return [
        [None if height is None else height + (number - middle) * space for height in own]
        for number, own in enumerate(heights)
    ]
