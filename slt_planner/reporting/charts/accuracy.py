"""Accuracy of runs over rounds and over uploaded bytes."""

from collections.abc import Sequence
from typing import Any

from slt_planner.federated.result import RunResult
from slt_planner.reporting.charts.chart import MUTED, Chart, Trace, axis, label, line
from slt_planner.reporting.looks import Look, run_looks
from slt_planner.reporting.run_groups import Curve, RunGroup, dataset_titles, metric_title
from slt_planner.reporting.words import percent
from slt_planner.units import format_bytes

_MARKERS = 7
_TICKS = "a stage begins"


def accuracy_charts(results: Sequence[RunResult], groups: Sequence[RunGroup]) -> tuple[Chart, Chart]:
    """Over rounds, and over uploaded bytes; runs that differ in their seed alone are a mean and a range."""
    what = f"Test {metric_title(results)} on {dataset_titles(results)}"
    bands = "; a band is the range over seeds" if any(len(group.runs) > 1 for group in groups) else ""
    drawn = [(group, look, Curve.of(group)) for group, look in zip(groups, run_looks(groups), strict=True)]
    curves = [(group, look, curve) for group, look, curve in drawn if curve.rows]
    marks = "; a tick marks where a stage begins" if any(curve.stage_begins for *_, curve in curves) else ""
    over_rounds, over_bytes = list[Trace](), list[Trace]()
    for group, look, curve in curves:
        over_rounds += _traces(group, look, curve, list(curve.rounds))
        over_bytes += _traces(group, look, curve, [sent / 1e6 for sent in curve.bytes_up])
    for traces in (over_rounds, over_bytes):
        _tell_ticks_once(traces)
    totals = [curve.bytes_up[-1] for *_, curve in curves]
    wide_apart = bool(totals) and max(totals) > 8 * min(totals) > 0
    y_axis = axis(f"test {metric_title(results)} (%)", rangemode="tozero")
    uploaded = axis("uploaded so far (MB)")
    if wide_apart:
        uploaded = axis("uploaded so far (MB), logarithmic", type="log", **_log_ticks(curves))
    height = 400 + 12 * len(groups)
    return (
        Chart(
            "accuracy",
            f"{what} over rounds{marks}{bands}",
            height,
            tuple(over_rounds),
            {"xaxis": axis("round", showgrid=False), "yaxis": y_axis},
        ),
        Chart(
            "accuracy-bytes",
            f"{what} over the bytes that all clients uploaded{marks}{bands}",
            height,
            tuple(over_bytes),
            {"xaxis": uploaded, "yaxis": y_axis},
        ),
    )


def _log_ticks(curves: Sequence[tuple[RunGroup, Look, Curve]]) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 times powers of ten, between the smallest and the largest upload."""
    sent = [curve.bytes_up[place] / 1e6 for *_, curve in curves for place in (0, -1)]
    values = [digit * 10.0**power for power in range(-6, 10) for digit in (1, 2, 5)]
    shown = [value for value in values if min(sent) <= value <= max(sent)]
    return {"tickvals": shown, "ticktext": [f"{value:g}" for value in shown]}


def _traces(group: RunGroup, look: Look, curve: Curve, across: list[Any]) -> list[Trace]:
    name = label(group.label, 36)
    style = {"color": look.colour, "width": 2.2, "dash": look.dash}
    marker = {"color": look.colour, "symbol": look.symbol, "size": 8, "maxdisplayed": _MARKERS}
    own = {"legendgroup": name, "hovertext": _words(name, group, curve)}
    middle = line(name, across, _percents(curve.mean), style, marker=marker, **own) | {"mode": "lines+markers"}
    return [*_band(name, look, curve, across, len(group.runs) > 1), middle, *_stage_ticks(name, curve, across)]


def _band(name: str, look: Look, curve: Curve, across: list[Any], several: bool) -> list[Trace]:
    if not several:
        return []
    hidden: dict[str, Any] = {"legendgroup": name, "showlegend": False}
    low = line(name, across, _percents(curve.low), {"width": 0}, **hidden)
    high = line(name, across, _percents(curve.high), {"width": 0}, fill="tonexty", fillcolor=look.band, **hidden)
    return [low | {"hoverinfo": "skip"}, high | {"hoverinfo": "skip"}]


def _words(name: str, group: RunGroup, curve: Curve) -> list[str]:
    words = []
    for place, row in enumerate(curve.rows):
        spread = f" ({percent(curve.low[place])} to {percent(curve.high[place])})" if len(group.runs) > 1 else ""
        words.append(
            f"<b>{name}</b>, round {row.round}, stage {row.stage}<br>{percent(curve.mean[place])}{spread}"
            f", {format_bytes(round(curve.bytes_up[place]))} uploaded"
        )
    return words


def _stage_ticks(name: str, curve: Curve, across: list[Any]) -> list[Trace]:
    begins, rows = curve.stage_begins, curve.rows
    if not begins:
        return []
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": _TICKS,
            "legendrank": 2000,
            "legendgroup": name,
            "x": [across[place] for place in begins],
            "y": [100 * curve.mean[place] for place in begins],
            "marker": {"symbol": "line-ns", "size": 15, "line": {"color": MUTED, "width": 1.6}},
            "hovertext": [
                f"<b>{name}</b>: stage {rows[place].stage} begins<br>{rows[place].config}" for place in begins
            ],
            "hoverinfo": "text",
        }
    ]


def _tell_ticks_once(traces: Sequence[Trace]) -> None:
    """One entry in the legend for the ticks of all groups."""
    for trace in [trace for trace in traces if trace["name"] == _TICKS][1:]:
        trace["showlegend"] = False


def _percents(fractions: Sequence[float]) -> list[float]:
    return [100 * fraction for fraction in fractions]
