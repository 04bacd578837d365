"""What is alive at a peak, by category: of each stage against the budget, of each unit, and with other levers."""

from collections.abc import Mapping
from typing import Any

from slt_planner.memory.profile import CATEGORIES, Category, MemoryProfile
from slt_planner.planning.levers import WhatIf
from slt_planner.planning.plan import TierPlan, TierStage
from slt_planner.reporting.charts.chart import (
    INK,
    MUTED,
    Chart,
    Layout,
    Trace,
    axis,
    bars,
    label,
    line,
    note,
)
from slt_planner.reporting.looks import CATEGORY_COLOURS, LOOKS
from slt_planner.reporting.words import byte_unit, percent, shorten
from slt_planner.units import format_bytes

_FAR = 4  # a budget that many times the highest peak is written, not drawn
_DASHED: dict[str, Any] = {"color": INK, "width": 1.5, "dash": "dash"}


def memory_chart(number: int, tier: TierPlan) -> Chart:
    """A feasible tier's peak in each stage, by category, against its budget; what was predicted beside it."""
    highest = max(stage.peak_bytes for stage in tier.stages)
    in_sight = tier.budget_bytes < _FAR * highest
    top = 1.1 * (tier.budget_bytes if in_sight else highest)
    unit, size = byte_unit(top)
    kinds = [kind for kind in ("measured", "predicted") if all(_breakdown(stage, kind) for stage in tier.stages)]
    traces = [
        _beside(_category_bars(tier, kind, category, size), place, len(kinds))
        for category in CATEGORIES
        for place, kind in enumerate(kinds)
    ]
    traces = [trace for trace in traces if any(trace["y"])]
    budget, last = format_bytes(tier.budget_bytes), len(tier.stages) - 1
    layout: Layout = {
        "barmode": "stack",
        "xaxis": axis("stage", range=[-0.6, last + 0.6], showgrid=False, dtick=1 if last <= 30 else None),
        "yaxis": axis(unit, range=[0, top / size]),
    }
    if in_sight:
        level = tier.budget_bytes / size
        own = {"hovertext": f"budget {budget}", "showlegend": True}
        traces.append(line(f"budget {budget}", [-0.6, last + 0.6], [level, level], _DASHED, **own))
    else:
        far = f"budget {budget}, far above this chart ↑"
        layout["annotations"] = [note(far, xref="paper", x=0, yref="paper", y=1, font={"color": MUTED})]
    both = "; narrow and paler: as predicted" if len(kinds) == 2 else ""
    line_words = f"the dashed line is the budget, {budget}" if in_sight else f"the budget, {budget}, is far above"
    caption = f"{shorten(tier.name, 24)}: {kinds[0]} peak memory of each stage by category; {line_words}{both}"
    return Chart(f"memory-{number}", caption, 380, tuple(traces), layout)


def _breakdown(stage: TierStage, kind: str) -> Mapping[Category, int] | None:
    return stage.measured_breakdown if kind == "measured" else stage.predicted_breakdown


def _category_bars(tier: TierPlan, kind: str, category: Category, size: float) -> Trace:
    sizes = [(_breakdown(stage, kind) or {}).get(category, 0) for stage in tier.stages]
    peaks = [sum((_breakdown(stage, kind) or {}).values()) for stage in tier.stages]
    words = [
        f"<b>stage {number}, {kind}: {format_bytes(peak)}</b> ({percent(peak / tier.budget_bytes)} of the budget)"
        f"<br>{category} {format_bytes(own)} ({percent(own / peak)} of it)"
        for number, (own, peak) in enumerate(zip(sizes, peaks, strict=True))
    ]
    heights = [own / size for own in sizes]
    return bars(category, CATEGORY_COLOURS[category], y=heights, hovertext=words, legendgroup=category)


def _beside(trace: Trace, place: int, kinds: int) -> Trace:
    """A bar in the middle of its stage; of two kinds, what was measured left of what was predicted, which is paler."""
    numbers = range(len(trace["y"]))
    if kinds == 1:
        return trace | {"x": list(numbers), "width": 0.82}
    if place == 0:
        return trace | {"x": [number - 0.14 for number in numbers], "width": 0.52}
    paler = {"marker": trace["marker"] | {"opacity": 0.5}, "showlegend": False}
    return trace | paler | {"x": [number + 0.28 for number in numbers], "width": 0.26}


def unit_chart(profile: MemoryProfile, name: str = "unit-memory") -> Chart:
    """What each unit needs when the whole network trains, by category."""
    rows = profile.units
    held: dict[Category, list[int]] = {
        "weights": [row.weights_bytes for row in rows],
        "gradients": [row.gradients_bytes for row in rows],
        "optimizer": [row.optimizer_bytes for row in rows],
        "activations": [row.activations_bytes for row in rows],
    }
    unit, size = byte_unit(max(map(sum, zip(*held.values(), strict=True)), default=0))
    traces = [
        bars(
            category,
            CATEGORY_COLOURS[category],
            x=[row.index for row in rows],
            y=[own / size for own in sizes],
            hovertext=[
                f"<b>unit {row.index}: {label(row.name, 50)}</b><br>{category} {format_bytes(own)}"
                for row, own in zip(rows, sizes, strict=True)
            ],
        )
        for category, sizes in held.items()
    ]
    layout = {"barmode": "stack", "xaxis": axis("unit", showgrid=False), "yaxis": axis(unit), "bargap": 0.15}
    caption = "Weights, gradients, optimizer state and saved activations of each unit, when the whole network trains"
    return Chart(name, caption, 300, tuple(traces), layout)


def what_if_chart(what_if: WhatIf) -> Chart:
    """The whole network's peak with each alternative that could be measured, against the budgets."""
    rows = [row for row in reversed(what_if.alternatives) if row.peak_bytes is not None and row.relative_time]
    budgets = [(label(tier.tier, 16), tier.budget_bytes) for tier in what_if.tiers]
    peaks = [row.peak_bytes or 0 for row in rows]
    unit, size = byte_unit(max(peaks))
    in_sight = [(name, budget) for name, budget in budgets if budget < 1.5 * max(peaks)]
    words = [
        f"{format_bytes(peak)} · {row.relative_time:.2f} times the time" for row, peak in zip(rows, peaks, strict=True)
    ]
    traces = [
        bars(
            "peak",
            LOOKS[0].colour,
            orientation="h",
            x=[peak / size for peak in peaks],
            y=list(range(len(rows))),
            width=0.62,
            hovertext=[f"<b>{label(row.words, 80)}</b><br>{word}" for row, word in zip(rows, words, strict=True)],
            showlegend=False,
        )
    ]
    for name, budget in in_sight:
        level, own = budget / size, {"hovertext": f"{name}: budget {format_bytes(budget)}"}
        traces.append(line(f"budget {name}", [level, level], [-0.5, len(rows) - 0.5], _DASHED, **own))
    ticks: dict[str, Any] = {"tickvals": list(range(len(rows))), "ticktext": [_wrapped(row.words) for row in rows]}
    layout = {
        "xaxis": axis(unit, range=[0, 1.15 * max([*peaks, *(budget for _, budget in in_sight)]) / size]),
        "yaxis": axis(showgrid=False, range=[-0.5, len(rows) - 0.5], **ticks),
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"},
    }
    caption = "Measured peak and step time of the whole network with each lever; dashed lines are budgets"
    return Chart("what-if", caption, 110 + 40 * len(rows), tuple(traces), layout)


def _wrapped(words: str) -> str:
    """Words for a narrow column: a line break after each comma and before "and".

    >>> _wrapped("bf16, channels_last and no foreach")
    'bf16,<br>channels_last<br>and no foreach'
    """
    return label(words, 80).replace(", ", ",<br>").replace(" and ", "<br>and ")
