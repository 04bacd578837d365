"""Plans and runs as one self-contained HTML page each, with a PNG beside it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from slt_planner.config import Config
from slt_planner.errors import InputError
from slt_planner.federated.result import RunResult
from slt_planner.files import refuse_existing, write_bytes, write_text
from slt_planner.memory.profile import CATEGORIES
from slt_planner.planning.costs import stage_cost
from slt_planner.planning.plan import Plan, TierPlan
from slt_planner.reporting import figures
from slt_planner.reporting.left_over import left_over
from slt_planner.reporting.run_groups import (
    dataset_titles,
    head_scales,
    mean,
    metric_title,
    round_seconds,
    run_groups,
    run_labels,
    stopped_sentence,
)
from slt_planner.reporting.trade_off_figure import trade_off_caption, trade_off_figure
from slt_planner.reporting.words import (
    DATA_DEPENDENT,
    NOTHING,
    count,
    how_known,
    lever_letters,
    lever_lines,
    model_title,
    percent,
    reason_text,
    ruler,
    scale_text,
    shorten,
    tier_headline,
)
from slt_planner.units import format_bytes

_SUFFIXES = (".html", ".htm")
_ESTIMATED_SAMPLES = 500
_PROOFS = {"wider_head": "a head one notch wider", "less_frozen": "one unit less frozen"}


@dataclass(frozen=True)
class Chart:
    """A drawing for a page, and what it shows in words."""

    name: str
    svg: Markup
    caption: str


@dataclass(frozen=True)
class Estimate:
    """An estimated quantity of one tier, a value a stage; None where a figure of the device is unknown."""

    title: str
    unit: str
    values: list[float | None]


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


def report_paths(html_path: str | Path, picture: str | Path | None = None) -> tuple[Path, Path]:
    """The two files that a report consists of: the page, and the PNG, beside it unless `picture` names another place.

    Raises:
        InputError: the name does not end in .html.
    """
    path = Path(html_path)
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(f"report {path}: its name must end in .html, for example {path.stem or 'report'}.html")
    return path, path.with_suffix(".png") if picture is None else Path(picture)


def plan_report(
    plan: Plan,
    path: str | Path,
    force: bool = False,
    command: str | None = None,
    picture: str | Path | None = None,
) -> None:
    """Write a plan as a page and a PNG; `command` is the command line to make it again, `picture` the PNG's own name.

    Raises:
        InputError: a name that does not end in .html, a file that exists without `force`, or one that cannot be
            written.
    """
    targets = _checked(path, picture, force)
    page = _render("plan.html.j2", {"plan": plan, "command": command, **_plan_page(plan)})
    _write(targets, page, figures.png_bytes(figures.plan_figure(plan)), force)


def run_report(
    results: Sequence[RunResult],
    path: str | Path,
    force: bool = False,
    command: str | None = None,
    picture: str | Path | None = None,
) -> None:
    """Write one or several runs as a page that compares them, and a PNG of their accuracy; as `plan_report`.

    Raises:
        InputError: no run, a name that does not end in .html, a file that exists without `force`, or one that cannot
            be written.
    """
    if not results:
        raise InputError("no run to report; give at least one run folder")
    targets = _checked(path, picture, force)
    page = _render("run.html.j2", {"command": command, **_run_page(results)})
    _write(targets, page, figures.png_bytes(figures.accuracy_figure(results)), force)


def _checked(path: str | Path, picture: str | Path | None, force: bool) -> tuple[Path, Path]:
    targets = report_paths(path, picture)
    if not force:
        refuse_existing(targets)
    return targets


def _write(targets: tuple[Path, Path], page: str, drawing: bytes, force: bool) -> None:
    write_bytes(targets[1], drawing, force=force)
    write_text(targets[0], page, force=force)


def _render(template: str, context: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("slt_planner.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": format_bytes,
        "operations": operations,
        "percent": percent,
        "reason": reason_text,
        "rough": rough,
        "scale": scale_text,
        "shorten": shorten,
        "unbroken": unbroken,
    }
    environment.globals |= {"CATEGORIES": CATEGORIES, "NOTHING": NOTHING, "PROOFS": _PROOFS}
    page = environment.get_template(template).render(context)
    return page.encode("utf-8", "replace").decode("utf-8")  # a command line can hold bytes that are no text


def operations(number: int) -> str:
    """A number of operations for people.

    >>> operations(40_551_424)
    '40.6 M'
    """
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def rough(number: float) -> str:
    """An estimate for people: two decimal places, fewer where it is large.

    >>> rough(0.0502), rough(29.74), rough(5400.4), rough(0.0002)
    ('0.05', '29.7', '5,400', '<0.01')
    """
    if number < 0.01:
        return "<0.01"
    return f"{number:,.0f}" if number >= 99.95 else f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"


def unbroken(sentence: str) -> str:
    """A sentence whose numbers stay with their units where it wraps.

    >>> unbroken("within 16.0 MB, tightest 99.8 %")
    'within 16.0\\xa0MB, tightest 99.8\\xa0%'
    """
    return re.sub(r"(?<=\d) (?=%|[kMG]?B\b)", "\u00a0", sentence)


def _chart(name: str, figure: Figure, caption: str) -> Chart:
    drawing = figures.svg_text(figure, name).removeprefix("<svg")
    return Chart(name, Markup(f'<svg role="img" aria-label="{escape(caption)}"{drawing}'), caption)


def _plan_page(plan: Plan) -> dict[str, Any]:
    names = ", ".join(shorten(tier.name, 24) for tier in plan.feasible_tiers)
    what = f"Which units are frozen, trained at full width and scaled, over the rounds, for {names}"
    return {
        "title": f"Training plan: {model_title(plan)}",
        "facts": [
            f"batch {plan.batch_size}",
            "tiers " + ", ".join(shorten(tier.name, 24) for tier in plan.tiers),
            count(plan.model.depth, "unit"),
            f"input {' × '.join(map(str, plan.input_shape))}",  # noqa: RUF001
            f"{plan.num_classes:,} classes",
        ],
        "ruler": ruler(plan),
        "how_known": how_known(plan),
        "data_dependent": DATA_DEPENDENT,
        "headlines": [(tier, tier_headline(tier, plan)) for tier in plan.tiers],
        "schedule": _chart("schedule", figures.schedule_figure(plan), what),
        "memory": [
            (_memory_chart(number, tier, how_known(plan)), tier) for number, tier in enumerate(plan.feasible_tiers)
        ],
        "left_over": left_over,
        "letters": lever_letters(plan),
        "lever_lines": lever_lines(plan),
        "predictions": _predictions(plan),
        "trade_off": _trade_off_chart(plan),
        "estimates": _estimates(plan),
        "estimated_samples": _ESTIMATED_SAMPLES,
        "settings": _side_by_side([("", _flat(plan.step.model_dump()))]),
        "environment": _side_by_side([("", plan.environment)]),
    }


def _memory_chart(number: int, tier: TierPlan, how: str) -> Chart:
    caption = (
        f"{shorten(tier.name, 24)}: {how} peak memory of each stage by category; "
        f"the dashed line is the budget, {format_bytes(tier.budget_bytes)}"
    )
    return _chart(f"memory-{number}", figures.memory_figure(tier, how), caption)


def _trade_off_chart(plan: Plan) -> Chart | None:
    if plan.trade_off is None:
        return None
    return _chart("trade-off", trade_off_figure(plan, plan.trade_off), trade_off_caption(plan, plan.trade_off))


def _predictions(plan: Plan) -> str | None:
    """How true the predictions were that were measured; None where nothing was both."""
    steps = [step for tier in plan.tiers for step in (*tier.stages, *tier.proofs)]
    pairs = [(step.predicted_peak_bytes, step.measured_peak_bytes) for step in steps]
    misses = [abs(predicted - measured) for predicted, measured in pairs if predicted and measured]
    if not misses:
        return None
    return f"at most {format_bytes(max(misses))} off" if any(misses) else "right to the byte"


def _estimates(plan: Plan) -> list[tuple[TierPlan, list[Estimate]]]:
    """What a round of each stage takes a client of the tiers whose devices are known: a column each quantity."""
    known = []
    for tier in plan.feasible_tiers:
        costs = [stage_cost(own, tier, _ESTIMATED_SAMPLES) for own in tier.stages]
        columns = (
            Estimate("training", "s", [cost.compute_s for cost in costs]),
            Estimate("transfer", "s", [cost.transfer_s for cost in costs]),
            Estimate("round", "s", [cost.round_s for cost in costs]),
            Estimate("energy", "J", [cost.energy_j for cost in costs]),
        )
        if own := [column for column in columns if column.values != [None] * len(costs)]:
            known.append((tier, own))
    return known


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A record's fields, those of records inside it too, as words."""
    flat: dict[str, str] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name} ")
        else:
            flat[f"{prefix}{name}".replace("_", " ")] = NOTHING if value is None else str(value)
    return flat


def _run_page(results: Sequence[RunResult]) -> dict[str, Any]:
    labelled = list(zip(run_labels(results), results, strict=True))
    data = dataset_titles(results)
    models = ", ".join(dict.fromkeys(model_title(run.plan) for run in results))
    images = dict.fromkeys(f"{run.train_images:,} training and {run.test_images:,} test images" for run in results)
    metric = metric_title(results)
    what = f"Test {metric} on {data} over rounds and over uploaded bytes; thin lines mark where a stage begins"
    peaks = "A client's highest measured peak in percent of its tier's budget, by run and tier"
    return {
        "title": f"Federated training: {models}",
        "facts": [data, *images, ", ".join(dict.fromkeys(run.settings.strategy for run in results))],
        "data": data,
        "metric": metric,
        "rulers": list(dict.fromkeys(ruler(run.plan) for run in results)),
        "runs": labelled,
        "stopped": [stopped_sentence(label, run) for label, run in labelled if run.status == "stopped"],
        "groups": run_groups(results),
        "accuracy": _chart("accuracy", figures.accuracy_figure(results, titled=False), what),
        "peaks": _chart("peaks", figures.peak_figure(results), peaks),
        "rounds": _round_rows(results),
        "stages": [(label, _stages_of_run(run)) for label, run in labelled],
        "settings": _side_by_side([(label, _flat(run.settings.model_dump())) for label, run in labelled]),
        "environment": _side_by_side([(label, run.environment) for label, run in labelled]),
        "mean": mean,
        "head_scales": head_scales,
        "round_seconds": round_seconds,
    }


def _round_rows(results: Sequence[RunResult]) -> list[tuple[int, list[tuple[float, int] | None]]]:
    """Accuracy and bytes uploaded so far of each run, by round; None where a run has no such round."""
    by_run: list[dict[int, tuple[float, int]]] = []
    for run in results:
        so_far, points = 0, {}
        for row in run.rows:
            so_far += row.bytes_up
            if row.accuracy is not None:
                points[row.round] = (row.accuracy, so_far)
        by_run.append(points)
    numbers = sorted(set().union(*by_run))
    return [(number, [points.get(number) for points in by_run]) for number in numbers]


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


def _side_by_side(records: Sequence[tuple[str, Mapping[str, str]]]) -> dict[str, Any]:
    """Columns' names, and a row a field; one column for all where the records are equal."""
    if all(record == records[0][1] for _, record in records):
        records = [("value" if len(records) == 1 else "all runs", records[0][1])]
    fields = dict.fromkeys(field for _, record in records for field in record)
    return {
        "columns": [f"<{shorten(label, 30)}" for label, _ in records],
        "rows": [(field, [record.get(field, NOTHING) for _, record in records]) for field in fields],
    }
