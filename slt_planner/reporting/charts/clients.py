"""A client's measured peak against its budget, and which data each client has."""

from collections.abc import Sequence
from typing import Any

from slt_planner.federated.result import RunResult
from slt_planner.reporting.charts.chart import INK, Chart, Trace, axis, bars, label, line
from slt_planner.reporting.looks import run_looks
from slt_planner.reporting.run_groups import RunGroup
from slt_planner.reporting.words import percent
from slt_planner.units import format_bytes

Counts = tuple[tuple[int, ...], ...]
HEAT = [[0, "var(--heat-low)"], [1, "var(--heat-high)"]]


def peak_chart(groups: Sequence[RunGroup]) -> Chart:
    """A client's highest measured peak in each group's runs and tier, in percent of the tier's budget."""
    rows = [
        (f"{label(group.label, 30)} · {label(tier.name, 14)}", max(peaks), tier.budget_bytes, look)
        for group, look in zip(groups, run_looks(groups), strict=True)
        for place, tier in enumerate(group.runs[0].tiers)
        if (peaks := [peak for run in group.runs if (peak := run.tiers[place].measured_peak_bytes) is not None])
    ]
    rows.reverse()  # the first at the top
    shares = [100 * peak / budget for _, peak, budget, _ in rows]
    words = [f"{format_bytes(peak)} of {format_bytes(budget)}" for _, peak, budget, _ in rows]
    numbers = list(range(len(rows)))
    trace = bars(
        "measured peak",
        [look.colour for *_, look in rows],
        orientation="h",
        x=shares,
        y=numbers,
        width=0.66,
        text=words,
        textposition="inside",
        insidetextanchor="start",
        hovertext=[
            f"<b>{name}</b><br>{own}, {percent(share / 100)}"
            for (name, *_), own, share in zip(rows, words, shares, strict=True)
        ],
        showlegend=False,
    )
    ends = [-0.6, len(rows) - 0.4]
    budget = line("budget", [100, 100], ends, {"color": INK, "width": 1.5, "dash": "dash"}, hovertext="the budget")
    layout: dict[str, Any] = {
        "xaxis": axis("measured peak in % of the budget", range=[0, max([105, *(1.05 * share for share in shares)])]),
        "yaxis": axis(showgrid=False, range=ends, tickvals=numbers, ticktext=[name for name, *_ in rows]),
        "showlegend": False,
        "uniformtext": {"minsize": 9, "mode": "hide"},
    }
    caption = "A client's highest measured peak in percent of its tier's budget (dashed line), by run and tier"
    return Chart("peaks", caption, 84 + 34 * max(1, len(rows)), (trace, budget), layout)


def split_charts(results: Sequence[RunResult]) -> list[tuple[Chart, Counts]]:
    """Which images each client has, for every split that there is: a column a client, a row a class; and the counts."""
    splits: dict[Counts, RunResult] = {}
    for run in results:
        if run.images_per_class:
            splits.setdefault(run.images_per_class, run)
    return [(_split_chart(number, run, counts), counts) for number, (counts, run) in enumerate(splits.items())]


def _split_chart(number: int, run: RunResult, by_client: Counts) -> Chart:
    by_class = list(zip(*by_client, strict=True))
    words = [
        [
            f"client {client}, class {own}: <b>{images:,}</b> of its {sum(by_client[client]):,} images"
            for client, images in enumerate(row)
        ]
        for own, row in enumerate(by_class)
    ]
    clients = len(by_client)
    trace: Trace = {
        "type": "heatmap",
        "z": [list(row) for row in by_class],
        "hovertext": words,
        "hoverinfo": "text",
        "colorscale": HEAT,
        "zmin": 0,
        "zmax": max(map(max, by_client)),
        "colorbar": {"title": {"text": "images"}, "thickness": 12, "outlinewidth": 0, "tickfont": {"color": INK}},
        "xgap": 0.5 if clients <= 200 else 0,
        "ygap": 0.5 if len(by_class) <= 60 else 0,
    }
    layout = {"xaxis": axis("client", showgrid=False), "yaxis": axis("class", showgrid=False, autorange="reversed")}
    settings = run.settings
    caption = f"Training images of each class that each client has ({settings.partition}, seed {settings.seed})"
    return Chart(f"split-{number}", caption, min(620, 130 + 22 * len(by_class)), (trace,), layout)
