"""How good a run's final network is class by class, and which classes it takes for which."""

from collections.abc import Sequence

from slt_planner.reporting.charts.chart import Chart, Trace, axis, label
from slt_planner.reporting.charts.clients import HEAT
from slt_planner.reporting.looks import run_looks
from slt_planner.reporting.run_groups import Confusion, RunGroup, class_accuracies, confusion
from slt_planner.reporting.words import percent

_WRITTEN = 12  # classes: more have no room for a number in each cell


def confusion_charts(groups: Sequence[RunGroup]) -> list[Chart]:
    """A matrix a group that has counts: given classes down, predicted across, in percent of what was given."""
    return [
        _confusion_chart(number, group.label, counts)
        for number, group in enumerate(groups)
        if (counts := confusion(group))
    ]


def _confusion_chart(number: int, name: str, counts: Confusion) -> Chart:
    totals = [max(1, sum(row)) for row in counts]
    shares = [[100 * own / total for own in row] for row, total in zip(counts, totals, strict=True)]
    words = [
        [
            f"class {given}, taken for {predicted}: <b>{own:,}</b> of {total:,} ({percent(own / total)})"
            for predicted, own in enumerate(row)
        ]
        for given, (row, total) in enumerate(zip(counts, totals, strict=True))
    ]
    trace: Trace = {
        "type": "heatmap",
        "z": shares,
        "zmin": 0,
        "zmax": 100,
        "hovertext": words,
        "hoverinfo": "text",
        "colorscale": HEAT,
        "showscale": False,
        "xgap": 1 if len(counts) <= 40 else 0,
        "ygap": 1 if len(counts) <= 40 else 0,
    }
    if len(counts) <= _WRITTEN:
        trace |= {"text": [[f"{own:.0f}" for own in row] for row in shares], "texttemplate": "%{text}"}
    own = {"showgrid": False, "dtick": 1 if len(counts) <= 20 else None}
    layout = {
        "xaxis": axis("predicted class", **own),
        "yaxis": axis("given class", autorange="reversed", **own),
    }
    caption = f"{label(name, 40)}: test images of each class by the class they were taken for, in percent of the class"
    return Chart(f"confusion-{number}", caption, 420, (trace,), layout)


def class_chart(groups: Sequence[RunGroup]) -> Chart | None:
    """Accuracy a class of every group that has counts; None where none has."""
    traces: list[Trace] = []
    for group, look in zip(groups, run_looks(groups), strict=True):
        if accuracies := class_accuracies(group):
            name = label(group.label, 36)
            known = [(number, share) for number, share in enumerate(accuracies) if share is not None]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": name,
                    "x": [number for number, _ in known],
                    "y": [100 * share for _, share in known],
                    "marker": {"color": look.colour, "symbol": look.symbol, "size": 11},
                    "hovertext": [f"<b>{name}</b>, class {number}: {percent(share)}" for number, share in known],
                    "hoverinfo": "text",
                }
            )
    if not traces:
        return None
    dtick = 1 if max(len(trace["x"]) for trace in traces) <= 20 else None
    layout = {
        "xaxis": axis("class", showgrid=False, dtick=dtick),
        "yaxis": axis("accuracy (%)", range=[0, 103]),
    }
    return Chart(
        "classes", "Accuracy of the final network on the test images of each class", 340, tuple(traces), layout
    )
