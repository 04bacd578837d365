"""Runs as a table for a terminal."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from slt_planner.federated.result import RunResult
from slt_planner.reporting.plan_table import plain_table
from slt_planner.reporting.run_groups import (
    dataset_titles,
    head_scales,
    mean,
    metric_title,
    round_seconds,
    run_groups,
    run_labels,
    stopped_sentence,
    tightest_tier,
)
from slt_planner.reporting.words import NOTHING, megabytes


def run_table(results: Sequence[RunResult]) -> RenderableType:
    """Runs for a terminal of 80 columns: a row a run, and the mean of runs that differ in their seed alone."""
    labels = run_labels(results)
    table = plain_table(
        "\n\nstrategy",
        "\n\nseed",
        "\n\nrounds",
        "\nhead\nscale",
        "peak /\nbudget\nMB",
        "last 5\nrounds\n%",
        "final,\nbatch\n%",
        "final,\nrunning\n%",
        "\nup\nMB",
        "\ns a\nround",
    )
    table.columns[0].justify = "left"
    for group in run_groups(results):
        for result in group.runs:
            table.add_row(*_run_cells(result))
        if len(group.runs) > 1:
            table.add_row(*_mean_cells(group.runs), style="bold")
    stopped = [
        Text(stopped_sentence(label, result) + ".", style="bold yellow")
        for label, result in zip(labels, results, strict=True)
        if result.status == "stopped"
    ]
    note = (
        f"Test {metric_title(results)} on {dataset_titles(results)}. "
        "Final: with the norms' statistics of the batch / running ones. "
        "Peak: of the tier nearest to its budget, allocator ruler."
    )
    return Group(table, Text(""), *stopped, Text(note, style="dim"))


def _run_cells(result: RunResult) -> list[str]:
    done, asked = len(result.rows), result.settings.rounds
    tier = tightest_tier(result)
    peak = f"{megabytes(tier.measured_peak_bytes or 0)}/{megabytes(tier.budget_bytes)}" if tier else NOTHING
    seconds = round_seconds(result)
    return [
        result.settings.strategy,
        str(result.settings.seed),
        str(asked) if done == asked else f"{done}/{asked}",
        head_scales(result).replace(" to ", "-").replace(" ", ""),
        peak,
        _points(result.mean_last_accuracy),
        _points(result.accuracy_batch_statistics),
        _points(result.accuracy_running_statistics),
        megabytes(result.bytes_up),
        NOTHING if seconds is None else f"{seconds:.1f}",
    ]


def _mean_cells(runs: Sequence[RunResult]) -> list[str]:
    return [
        "mean",
        str(len(runs)),
        "",
        "",
        "",
        _points(mean([run.mean_last_accuracy for run in runs])),
        _points(mean([run.accuracy_batch_statistics for run in runs])),
        _points(mean([run.accuracy_running_statistics for run in runs])),
        "",
        "",
    ]


def _points(fraction: float | None) -> str:
    return NOTHING if fraction is None else f"{100 * fraction:.1f}"
