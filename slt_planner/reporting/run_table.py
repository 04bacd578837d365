"""Runs as a table for a terminal."""

from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from slt_planner.federated.result import RunResult
from slt_planner.reporting.plan_table import plain_table
from slt_planner.reporting.run_groups import (
    RunGroup,
    dataset_titles,
    head_scales,
    mean,
    metric_title,
    round_seconds,
    run_groups,
    run_labels,
    spread,
    stopped_sentence,
    tightest_tier,
    unused_words,
)
from slt_planner.reporting.words import NOTHING, megabytes, shorten

_WIDTH = 80
_Column = tuple[str, Callable[[RunResult], str], Callable[[RunGroup], str]]


def run_table(results: Sequence[RunResult]) -> RenderableType:
    """Runs for a terminal of 80 columns: a row a run, and the mean and spread of those that differ in their seed alone.

    Rounds have a column where they are not the same for all runs, spreads where there are any.
    """
    labels, groups = run_labels(results), run_groups(results)
    rounds = list(dict.fromkeys(map(_rounds, results)))
    columns = _columns(rounds=len(rounds) > 1, spreads=any(len(group.runs) > 1 for group in groups))
    rows: list[tuple[list[str], str]] = []
    for group in groups:
        rows += [([cell(run) for _, cell, _ in columns], "") for run in group.runs]
        if len(group.runs) > 1:
            rows.append(([of_group(group) for *_, of_group in columns], "bold"))
    titles = [title for title, *_ in columns]
    others = sum(1 + max(len(line) for line in (*title.split("\n"), *cells)) for title, *cells in _rest(titles, rows))
    table = plain_table(*titles)
    table.columns[0].justify = "left"
    for (first, *cells), style in rows:
        table.add_row(shorten(first, max(8, _WIDTH - others - 1)), *cells, style=style)
    stopped = [
        Text(stopped_sentence(label, result) + ".", style="bold yellow")
        for label, result in zip(labels, results, strict=True)
        if result.status == "stopped"
    ]
    stopped += [
        Text(f"{label}: {words}.", style="bold yellow")
        for label, result in zip(labels, results, strict=True)
        if (words := unused_words(result))
    ]
    each = f", after {rounds[0]} rounds" if len(rounds) == 1 else ""
    note = (
        f"Test {metric_title(results)} on {dataset_titles(results)}{each}. "
        "Running: with the norms' running statistics. "
        "Peak: of the tier nearest to its budget, allocator ruler."
    )
    return Group(table, Text(""), *stopped, Text(note, style="dim"))


def _columns(rounds: bool, spreads: bool) -> list[_Column]:
    """A column's title, its cell of a run, and its cell of runs together."""
    columns: list[_Column] = [
        ("\n\nstrategy", lambda run: run.settings.strategy, lambda group: "mean"),
        ("\n\nseed", lambda run: str(run.settings.seed), lambda group: str(len(group.runs))),
    ]
    if rounds:
        columns.append(("\n\nrounds", _rounds, _nothing))
    columns += [
        ("\nhead\nscale", lambda run: head_scales(run).replace(" to ", "-").replace(" ", ""), _nothing),
        ("peak /\nbudget\nMB", _peak, _nothing),
        ("last 5\nrounds\n%", lambda run: _points(run.mean_last_accuracy), _mean_of("mean_last_accuracy")),
    ]
    if spreads:
        columns.append(("\n\n±", lambda run: "", _spread))
    running = "accuracy_running_statistics"
    columns += [
        ("final,\nrunning\n%", lambda run: _points(run.accuracy_running_statistics), _mean_of(running)),
        ("\nup\nMB", lambda run: megabytes(run.bytes_up), _nothing),
        ("\ns a\nround", _seconds, _nothing),
    ]
    return columns


def _rest(titles: Sequence[str], rows: Sequence[tuple[list[str], str]]) -> list[list[str]]:
    """The columns but the first, each its title and its cells."""
    return [list(column) for column in zip(titles, *(cells for cells, _ in rows), strict=True)][1:]


def _nothing(group: RunGroup) -> str:
    return ""


def _mean_of(field: str) -> Callable[[RunGroup], str]:
    return lambda group: _points(mean([getattr(run, field) for run in group.runs]))


def _spread(group: RunGroup) -> str:
    return _points(spread([run.mean_last_accuracy for run in group.runs]))


def _rounds(run: RunResult) -> str:
    done, asked = len(run.rows), run.settings.rounds
    return str(asked) if done == asked else f"{done}/{asked}"


def _peak(run: RunResult) -> str:
    tier = tightest_tier(run)
    return f"{megabytes(tier.measured_peak_bytes or 0)}/{megabytes(tier.budget_bytes)}" if tier else NOTHING


def _seconds(run: RunResult) -> str:
    seconds = round_seconds(run)
    return NOTHING if seconds is None else f"{seconds:.1f}"


def _points(fraction: float | None) -> str:
    return NOTHING if fraction is None else f"{100 * fraction:.1f}"
