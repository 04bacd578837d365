"""The schedule as a picture: rounds across, units down."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from slt_planner.planning.plan import Plan, TierPlan
from slt_planner.reporting.charts.chart import MUTED, PAPER, Chart, Trace, axis, bars, label, note
from slt_planner.reporting.looks import PART_COLOURS, stage_parts, tint
from slt_planner.reporting.words import brief_scale, count, scale_text, shorten

_ROW, _GAP, _TOP, _BOTTOM = 165, 58, 74, 46  # pixels
_WRITTEN = 3.0  # percent of the rounds: a stage that has fewer has no room for its number
_TURNED = 1.2  # percent: a narrower head has no room for its scale, written upwards
_NAMES = {"frozen": "frozen", "trained": "trained at full width", "head": "head, at the scale written in it"}


def schedule_chart(plan: Plan, name: str = "schedule") -> Chart:
    """Which units each tier freezes, trains at full width and scales, over the rounds."""
    tiers = plan.feasible_tiers
    inside = len(tiers) * (_ROW + _GAP) - _GAP
    layout: dict[str, Any] = {
        "barmode": "overlay",
        "margin": {"l": 44, "r": 14, "t": _TOP, "b": _BOTTOM},
        "uniformtext": {"minsize": 10, "mode": "hide"},
        "annotations": [],
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1 + 36 / inside, "yanchor": "bottom"},
    }
    traces: list[Trace] = []
    for number, tier in enumerate(tiers):
        place = "" if number == 0 else str(number + 1)
        top = 1 - number * (_ROW + _GAP) / inside
        layout[f"yaxis{place}"] = _unit_axis(plan.model.depth, (max(0.0, top - _ROW / inside), top))
        title = f"<b>{label(tier.name)}</b> ({tier.status})"
        where = {"xref": "paper", "x": 0, "xanchor": "left", "yref": f"y{place} domain", "y": 1, "yanchor": "bottom"}
        layout["annotations"].append(note(title, yshift=15, **where))
        traces += _tier_traces(plan, tier, f"y{place}", {trace["legendgroup"] for trace in traces})
    last = "" if len(tiers) == 1 else str(len(tiers))
    layout["xaxis"] = axis("share of the rounds (%)", range=[0, 100], anchor=f"y{last}", showgrid=False)
    names = ", ".join(shorten(tier.name, 24) for tier in tiers)
    caption = f"Which units are frozen, trained at full width and scaled, over the rounds, for {names}"
    return Chart(name, caption, inside + _TOP + _BOTTOM, tuple(traces), layout)


def _unit_axis(depth: int, domain: tuple[float, float]) -> dict[str, Any]:
    every = max(1, round(depth / 4))
    shown = [1, *range(max(2, every), depth - every // 2, every), depth] if depth > 1 else [1]
    ticks = {"tickvals": [unit - 0.5 for unit in shown], "ticktext": [str(unit) for unit in shown]}
    return axis("unit", range=[depth, 0], domain=domain, showgrid=False, **ticks)


@dataclass(frozen=True)
class _Box:
    """A part of the network in one stage: units `top` + 1 to `bottom`, over a share of the rounds in percent."""

    stage: int
    left: float
    width: float
    top: int
    bottom: int
    scale: float

    @property
    def words(self) -> str:
        """Where it is."""
        units = f"unit {self.bottom}" if self.bottom == self.top + 1 else f"units {self.top + 1} to {self.bottom}"
        return f"stage {self.stage}, {self.left:.1f} to {self.left + self.width:.1f} % of the rounds<br>{units}"


def _boxes(plan: Plan, tier: TierPlan) -> dict[str, list[_Box]]:
    widths = [100 * stage.rounds_fraction for stage in plan.stages]
    lefts = accumulate(widths, initial=0.0)
    found: dict[str, list[_Box]] = {part: [] for part in PART_COLOURS}
    for number, (stage, left, width) in enumerate(zip(tier.stages, lefts, widths, strict=False)):
        for part, top, bottom in stage_parts(stage, plan.model.depth):
            found[part].append(_Box(number, left, width, top, bottom, stage.head_scale))
    return found


def _tier_traces(plan: Plan, tier: TierPlan, y_axis: str, shown: set[str]) -> list[Trace]:
    traces = [
        _part_trace(part, boxes, label(tier.name)) | {"yaxis": y_axis, "showlegend": part not in shown}
        for part, boxes in _boxes(plan, tier).items()
        if boxes
    ]
    return [*traces, _stage_numbers(plan) | {"yaxis": y_axis}]


def _part_trace(part: str, boxes: Sequence[_Box], tier: str) -> Trace:
    own: dict[str, str] = {box.words: _words(part, box) for box in boxes}
    trace = bars(
        _NAMES[part],
        [tint(PART_COLOURS[part], 0.3 + 0.7 * box.scale) if part == "head" else PART_COLOURS[part] for box in boxes],
        x=[box.left + box.width / 2 for box in boxes],
        y=[box.bottom - box.top for box in boxes],
        base=[box.top for box in boxes],
        width=[box.width for box in boxes],
        hovertext=[f"<b>{tier}</b>, {where}: {what}" for where, what in own.items()],
        legendgroup=part,
    )
    if part == "head":
        texts = [brief_scale(box.scale) if box.width >= _TURNED else "" for box in boxes]  # the others would be hidden
        font = {"color": "#3a2c00", "size": 12}
        trace |= {"text": texts, "textposition": "inside", "insidetextanchor": "middle", "insidetextfont": font}
        trace["marker"] = trace["marker"] | {"line": {"color": PAPER, "width": 1}}
    return trace


def _words(part: str, box: _Box) -> str:
    if part == "head":
        return f"trained at {scale_text(box.scale)} of the width"
    return _NAMES[part] + f" ({count(box.bottom - box.top, 'unit')})"


def _stage_numbers(plan: Plan) -> Trace:
    """Above each stage that is wide enough, its number."""
    widths = [100 * stage.rounds_fraction for stage in plan.stages]
    middles = [left + width / 2 for left, width in zip(accumulate(widths, initial=0.0), widths, strict=False)]
    wide = [number for number, width in enumerate(widths) if width >= _WRITTEN]
    return {
        "type": "scatter",
        "mode": "text",
        "x": [middles[number] for number in wide],
        "y": [0] * len(wide),
        "text": [str(number) for number in wide],
        "textposition": "top center",
        "textfont": {"color": MUTED, "size": 11},
        "cliponaxis": False,
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": "numbers",
    }
