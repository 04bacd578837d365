"""What the page of one or several runs shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from slt_planner.config import Config
from slt_planner.federated.result import RunResult
from slt_planner.reporting.charts.accuracy import accuracy_charts
from slt_planner.reporting.charts.classes import class_chart, confusion_charts
from slt_planner.reporting.charts.clients import peak_chart, split_charts
from slt_planner.reporting.comparison import FORMATS, Summary
from slt_planner.reporting.make_again import run_commands
from slt_planner.reporting.pages.page import flat, render, side_by_side
from slt_planner.reporting.run_groups import (
    Curve,
    RunGroup,
    class_accuracies,
    confusion,
    dataset_titles,
    head_scales,
    metric_title,
    round_seconds,
    run_groups,
    run_labels,
    sitting_out_words,
    stopped_sentence,
    unused_words,
)
from slt_planner.reporting.words import model_title, ruler

_MOST_CLASSES = 30  # a table of a confusion matrix is for people; a larger one has its chart alone


@dataclass(frozen=True)
class StageOfRun:
    """The rounds that a run spent in one stage; accuracy and loss are of the last of them that was evaluated."""

    stage: int
    first_round: int
    last_round: int
    config: Config
    accuracy: float | None
    loss: float | None
    bytes_up: int
    refused: int
    seconds: float


def _notes(labelled: Sequence[tuple[str, RunResult]]) -> list[str]:
    """What a reader must know of some runs; what is the same for several is said once."""
    runs_of: dict[str, list[str]] = {}
    for label, run in labelled:
        for words in filter(None, (sitting_out_words(run), unused_words(run))):
            runs_of.setdefault(words, []).append(label)
    return [f"{', '.join(labels)}: {words}" for words, labels in runs_of.items()]


def _ruler(run: RunResult) -> str:
    """How clients' steps were measured: at the local batch, and those of workers on one thread."""
    spec = run.plan.spec.settings.with_batch(run.settings.local_batch)
    return ruler(run.plan, spec.model_copy(update={"threads": 1}) if run.settings.workers > 1 else spec)


def run_page(results: Sequence[RunResult], texts: Mapping[str, str], command: str | None) -> str:
    """Runs compared, as HTML; `texts` is the table in the formats that can be copied."""
    labelled = list(zip(run_labels(results), results, strict=True))
    groups = run_groups(results)
    data = dataset_titles(results)
    models = ", ".join(dict.fromkeys(model_title(run.plan) for run in results))
    images = dict.fromkeys(f"{run.train_images:,} training and {run.test_images:,} test images" for run in results)
    over_rounds, over_bytes = accuracy_charts(results, groups)
    classes = class_chart(groups)
    context: dict[str, Any] = {
        "title": f"Federated training: {models}",
        "facts": [data, *images, ", ".join(dict.fromkeys(run.settings.strategy for run in results))],
        "command": command,
        "data": data,
        "metric": metric_title(results),
        "commands": run_commands(results),
        "rulers": list(dict.fromkeys(map(_ruler, results))),
        "runs": labelled,
        "groups": groups,
        "summaries": [Summary.of(group) for group in groups],
        "notes": _notes(labelled),
        "stopped": [stopped_sentence(label, run) for label, run in labelled if run.status == "stopped"],
        "over_rounds": over_rounds,
        "over_bytes": over_bytes,
        "rounds": _round_rows(groups),
        "texts": texts,
        "formats": FORMATS,
        "peaks": peak_chart(groups),
        "splits": split_charts(results),
        "classes": classes,
        "class_rows": _class_rows(groups) if classes else [],
        "confusions": confusion_charts(groups),
        "matrices": [
            (group.label, counts) for group in groups if (counts := confusion(group)) and len(counts) <= _MOST_CLASSES
        ],
        "stages": [(label, _stages_of_run(run)) for label, run in labelled],
        "settings": side_by_side([(group.label, _settings(group)) for group in groups]),
        "environment": side_by_side([(label, run.environment) for label, run in labelled]),
        "head_scales": head_scales,
        "round_seconds": round_seconds,
    }
    return render("run.html.j2", context)


def _settings(group: RunGroup) -> dict[str, str]:
    """What a group's runs were made from, with all their seeds."""
    fields = flat(group.runs[0].settings.model_dump())
    return fields | {"seed": ", ".join(str(run.settings.seed) for run in group.runs)}


def _round_rows(groups: Sequence[RunGroup]) -> list[tuple[int, list[tuple[float, float] | None]]]:
    """Mean accuracy and bytes uploaded so far of each group, by round; None where a group has no such round."""
    by_group: list[dict[int, tuple[float, float]]] = []
    for group in groups:
        curve = Curve.of(group)
        points = zip(curve.rounds, curve.mean, curve.bytes_up, strict=True)
        by_group.append({number: (accuracy, sent) for number, accuracy, sent in points})
    numbers = sorted(set().union(*by_group))
    return [(number, [points.get(number) for points in by_group]) for number in numbers]


def _class_rows(groups: Sequence[RunGroup]) -> tuple[list[str], list[list[float | None]]]:
    """The groups whose classes are counted, and their accuracies: a row a class."""
    counted = [(group.label, own) for group in groups if (own := class_accuracies(group))]
    classes = max(len(own) for _, own in counted)
    rows = [[own[number] if number < len(own) else None for _, own in counted] for number in range(classes)]
    return [label for label, _ in counted], rows


def _stages_of_run(run: RunResult) -> list[StageOfRun]:
    stages = []
    for number, group in groupby(run.rows, key=lambda row: row.stage):
        rows = list(group)
        judged = next((row for row in reversed(rows) if row.accuracy is not None), rows[-1])
        stages.append(
            StageOfRun(
                stage=number,
                first_round=rows[0].round,
                last_round=rows[-1].round,
                config=rows[-1].config,
                accuracy=judged.accuracy,
                loss=judged.loss,
                bytes_up=sum(row.bytes_up for row in rows),
                refused=sum(row.refused for row in rows),
                seconds=sum(row.seconds for row in rows),
            )
        )
    return stages
