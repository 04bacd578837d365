"""Charts are figures that plotly takes, and draw the records' own numbers."""

import json
import math
from typing import Any, get_args

import plotly.graph_objects as go
import pytest

from slt_planner.config import StepSpec
from slt_planner.federated.result import StrategyName
from slt_planner.memory.profile import MemoryProfile, TimelinePoint
from slt_planner.planning.levers import Alternative, TierAnswer, WhatIf
from slt_planner.planning.plan import Plan
from slt_planner.reporting.charts.accuracy import accuracy_charts
from slt_planner.reporting.charts.chart import Chart
from slt_planner.reporting.charts.classes import class_chart, confusion_charts
from slt_planner.reporting.charts.clients import peak_chart, split_charts
from slt_planner.reporting.charts.memory import memory_chart, unit_chart, what_if_chart
from slt_planner.reporting.charts.plans import plans_charts
from slt_planner.reporting.charts.schedule import schedule_chart
from slt_planner.reporting.charts.timeline import timeline_chart
from slt_planner.reporting.charts.trade_off import trade_off_caption, trade_off_chart
from slt_planner.reporting.figures import accuracy_figure, png_bytes
from slt_planner.reporting.looks import LOOKS, run_looks
from slt_planner.reporting.run_groups import run_groups
from tests.unit.sample_records import ENVIRONMENT, also_predicted, as_predicted, full_network, sample_plan, sample_run

STRATEGIES = get_args(StrategyName)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return sample_plan(infeasible_mb=16)


def run_of(strategy: str, seed: int, plan: Plan) -> Any:
    """A run of any strategy, also of one that is not there yet."""
    run = sample_run("slt" if strategy == "slt" else "small", seed, rounds=12, plan=plan)
    return run.model_copy(update={"settings": run.settings.model_copy(update={"strategy": strategy})})


def what_if() -> WhatIf:
    spec = StepSpec(batch_size=32, threads=2)
    rows = (
        Alternative(spec=spec, peak_bytes=200_000_000, step_s=0.1, relative_time=1.0),
        Alternative(spec=spec, levers=("bf16", "autocast"), refused="<b>no such kernel</b>"),
        Alternative(spec=spec, levers=("bf16",), peak_bytes=90_000_000, step_s=0.07, relative_time=0.7),
    )
    answer = TierAnswer(tier="<i>weak</i>", budget_bytes=100_000_000, alternative=2, answer="bf16 is enough")
    return WhatIf(spec=spec, environment=ENVIRONMENT, alternatives=rows, tiers=(answer,))


def profile_with_timeline(changes: int, timed: bool = True) -> MemoryProfile:
    """Resident weights, then activations that come and go, the most of them in the middle."""
    points, live = [], 4000
    for number in range(changes):
        change = 1000 if number < changes // 2 else -1000
        live += change
        time_us = 10.0 * number if timed else None
        where = {"category": "activations", "operator": "aten::<b>", "unit": 1 + number % 3}
        points.append(TimelinePoint(time_us=time_us, live_bytes=live, change_bytes=change, **where))
    fields = full_network().model_dump() | {"timeline": points, "resident": {"weights": 4000}}
    return MemoryProfile.model_validate(fields)


def all_charts(plan: Plan) -> list[Chart]:
    runs = [run_of(strategy, seed, plan) for strategy in STRATEGIES for seed in (0, 1)]
    groups = run_groups(runs)
    classes = class_chart(groups)
    assert plan.trade_off is not None
    assert classes is not None
    return [
        schedule_chart(plan),
        *(memory_chart(number, tier) for number, tier in enumerate(also_predicted(plan, 4096).feasible_tiers)),
        unit_chart(plan.full_network),
        trade_off_chart(plan, plan.trade_off),
        timeline_chart(profile_with_timeline(60)),
        what_if_chart(what_if()),
        *accuracy_charts(runs, groups),
        peak_chart(groups),
        classes,
        *confusion_charts(groups),
        *(chart for chart, _ in split_charts(runs)),
        *plans_charts([("one", plan), ("two", sample_plan(policy="per-tier"))]),
    ]


def without_variables(value: Any) -> Any:
    """Colours that the page looks up are no colours for plotly's own check."""
    if isinstance(value, str) and value.startswith("var("):
        return "#123456"
    if isinstance(value, list | tuple):
        return [without_variables(own) for own in value]
    return {name: without_variables(own) for name, own in value.items()} if isinstance(value, dict) else value


def test_every_chart_is_a_figure_that_plotly_takes(plan: Plan) -> None:
    charts = all_charts(plan)
    assert len({chart.name for chart in charts}) == len(charts)
    for chart in charts:
        figure = go.Figure(without_variables(chart.figure))
        assert figure.data, chart.name
        json.dumps(chart.figure, allow_nan=False)
        assert len(chart.caption) > 20


def test_schedule_covers_all_units_and_rounds_of_each_tier(plan: Plan) -> None:
    bars = [trace for trace in schedule_chart(plan).traces if trace["type"] == "bar"]
    for place in ("y", "y2", "y3"):
        own = [trace for trace in bars if trace["yaxis"] == place]
        areas = [height * width for trace in own for height, width in zip(trace["y"], trace["width"], strict=True)]
        assert sum(areas) == pytest.approx(100 * plan.model.depth)
    assert sorted(trace["name"] for trace in bars if trace["showlegend"]) == [
        "frozen",
        "head, at the scale written in it",
        "trained at full width",
    ]


def test_bars_add_up_to_the_peaks_measured_and_predicted(plan: Plan) -> None:
    for number, tier in enumerate(also_predicted(plan, 4096).feasible_tiers):
        traces = memory_chart(number, tier).traces
        for paler, off in ((False, 0), (True, 4096)):
            bars = [trace for trace in traces if trace["type"] == "bar" and ("opacity" in trace["marker"]) == paler]
            heights = [sum(heights) for heights in zip(*(trace["y"] for trace in bars), strict=True)]
            assert [round(height * 1e6) for height in heights] == [stage.peak_bytes - off for stage in tier.stages]
        (budget,) = [trace for trace in traces if trace["type"] == "scatter"]
        assert budget["y"][0] * 1e6 == tier.budget_bytes


def test_a_plan_of_predictions_has_no_bars_of_measurements(plan: Plan) -> None:
    chart = memory_chart(0, as_predicted(plan).feasible_tiers[0])
    assert not any("opacity" in trace.get("marker", {}) for trace in chart.traces)
    assert "predicted peak" in chart.caption
    assert "measured" not in json.dumps(chart.figure)


def test_a_budget_far_above_is_written_instead_of_drawn() -> None:
    chart = memory_chart(0, sample_plan((64, 10**6)).tiers[1])
    assert all(trace["type"] == "bar" for trace in chart.traces)
    assert "far above" in chart.layout["annotations"][0]["text"]
    assert "far above" in chart.caption


def test_frontiers_run_above_the_heads_that_fit_and_below_those_that_do_not(plan: Plan) -> None:
    """A row is 1 high; lines that coincide are drawn up to a quarter of it apart."""
    grid = plan.trade_off
    assert grid is not None
    traces = trade_off_chart(plan, grid).traces
    frontiers = [frontier for frontier in grid.frontiers if len(set(frontier.head_scales)) > 1]
    drawn = [trace for trace in traces if trace.get("mode") == "lines" and trace["name"]]
    assert len(drawn) == len(frontiers) > 0
    for frontier, trace in zip(frontiers, drawn, strict=True):
        for column, widest in enumerate(frontier.head_scales):
            left, right = trace["y"][2 * column : 2 * column + 2]
            assert left == right
            if widest is None:
                assert left is None
                continue
            fitting = sum(scale <= widest for scale in grid.head_scales)
            assert fitting - 0.25 <= left <= fitting + 1.25
    (numbers,) = [trace for trace in traces if trace.get("mode") == "text"]
    assert [float(text) for text in numbers["text"]] == pytest.approx(
        [peak / 1e6 for row in grid.peak_bytes for peak in row], rel=0.006
    )


def test_numbers_of_a_trade_off_are_not_crossed_and_stay_in_their_cells(plan: Plan) -> None:
    grid = plan.trade_off
    assert grid is not None
    traces = trade_off_chart(plan, grid).traces
    (numbers,) = [trace for trace in traces if trace.get("mode") == "text"]
    lines = [trace["y"] for trace in traces if trace.get("mode") == "lines" and trace["name"]]
    rows = len(grid.head_scales)
    for index, (x, y) in enumerate(zip(numbers["x"], numbers["y"], strict=True)):
        column, row = divmod(index, rows)
        assert x == column + 0.5
        assert row + 0.2 < y < row + 0.8
        assert all(line[2 * column] is None or abs(line[2 * column] - y) > 0.15 for line in lines)


def test_tiers_that_all_or_nothing_fits_are_named_and_have_no_line() -> None:
    plan = sample_plan((64, 10**6), infeasible_mb=4, tier_names=("weak", "a" * 50))
    grid = plan.trade_off
    assert grid is not None
    caption = trade_off_caption(plan, grid)
    assert f"All of it fits {'a' * 23}…. None of it fits 4MB. The peaks are predicted, or measured" in caption
    names = [trace.get("name") or "" for trace in trade_off_chart(plan, grid).traces]
    assert "weak: widest head in 64.0 MB" in names
    assert not any("4MB" in name or "aaa" in name for name in names if name)
    assert trade_off_caption(as_predicted(plan), grid).endswith("The peaks are predicted.")


@pytest.mark.parametrize("changes", [40, 9001])
def test_a_timeline_keeps_its_peak_and_its_sum(changes: int) -> None:
    profile = profile_with_timeline(changes)
    *areas, total = timeline_chart(profile).traces
    assert [trace["name"] for trace in areas] == ["weights", "activations"]
    stacked = [sum(parts) for parts in zip(*(trace["y"] for trace in areas), strict=True)]
    assert stacked == pytest.approx(total["y"])
    assert max(total["y"]) == pytest.approx(max(point.live_bytes for point in profile.timeline) / _size(profile))
    assert len(total["x"]) <= 3002
    assert total["x"][-1] == (changes - 1) / 100, "in ms"
    assert "&lt;b&gt; in unit" in total["hovertext"][1]


def _size(profile: MemoryProfile) -> float:
    return 1e6 if profile.peak_bytes >= 1.5e6 else 1e3


def test_a_predicted_timeline_is_counted_in_changes() -> None:
    assert timeline_chart(profile_with_timeline(10, timed=False)).traces[-1]["x"] == list(map(float, range(11)))


def test_alternatives_that_cannot_be_used_have_no_bar() -> None:
    bars, budget = what_if_chart(what_if()).traces
    assert bars["x"] == [90, 200]
    assert budget["x"] == [100, 100]
    assert budget["name"] == "budget &lt;i&gt;weak&lt;/i&gt;"


def test_each_strategy_has_a_look_of_its_own_and_always_the_same(plan: Plan) -> None:
    groups = run_groups([run_of(strategy, 0, plan) for strategy in STRATEGIES])
    looks = run_looks(groups)
    for field in ("colour", "dash", "marker", "symbol", "line"):
        assert len({str(getattr(look, field)) for look in looks}) == len(STRATEGIES)
    assert run_looks(groups[3:4]) == [looks[3]], "alone it looks as it does among others"
    twice = run_groups([run_of("small", 0, plan), run_of("small", 0, sample_plan((128, 256)))])
    assert len(set(run_looks(twice))) == 2
    many = run_groups([run_of("unheard of", 0, sample_plan((64 + number,))) for number in range(10)])
    assert set(run_looks(many)) == set(LOOKS)


def test_seeds_are_a_mean_in_a_band(plan: Plan) -> None:
    runs = [run_of("small", seed, plan) for seed in range(3)]
    over_rounds, over_bytes = accuracy_charts(runs, run_groups(runs))
    low, high, mean = over_rounds.traces
    for place in range(12):
        values = [100 * run.rows[place].accuracy for run in runs]
        assert low["y"][place] == pytest.approx(min(values))
        assert high["y"][place] == pytest.approx(max(values))
        assert mean["y"][place] == pytest.approx(sum(values) / 3)
    assert high["fill"] == "tonexty"
    assert over_bytes.traces[2]["x"][-1] == pytest.approx(runs[0].bytes_up / 1e6)


def test_stages_are_marked_where_they_begin(plan: Plan) -> None:
    run = sample_run(plan=plan)
    over_rounds, _ = accuracy_charts([run], run_groups([run]))
    (ticks,) = [trace for trace in over_rounds.traces if trace["name"] == "a stage begins"]
    stages = [row.stage for row in run.rows]
    assert ticks["x"] == [run.rows[n].round for n in range(1, 60) if stages[n] != stages[n - 1]]


def test_rounds_without_evaluation_are_left_out(plan: Plan) -> None:
    run = sample_run(plan=plan)
    rows = [row if row.round % 5 == 0 else row.model_copy(update={"accuracy": None, "loss": None}) for row in run.rows]
    sparse = run.model_copy(update={"rows": tuple(rows)})
    groups = run_groups([sparse, sample_run("small", plan=plan).model_copy(update={"rows": tuple(rows[:4])})])
    over_rounds, over_bytes = accuracy_charts([sparse], groups)
    line, ticks = over_rounds.traces
    assert line["x"] == list(range(5, 61, 5))
    assert line["y"] == [100 * (row.accuracy or 0) for row in rows[4::5]]
    assert over_bytes.traces[0]["x"][0] == pytest.approx(sum(row.bytes_up for row in rows[:5]) / 1e6)
    assert set(ticks["x"]) <= set(line["x"])
    assert png_bytes(accuracy_figure([sparse]))


def test_uploads_far_apart_are_drawn_logarithmically(plan: Plan) -> None:
    runs = [sample_run(plan=plan), sample_run("small", plan=plan)]
    _, over_bytes = accuracy_charts(runs, run_groups(runs))
    ratio = runs[0].bytes_up / runs[1].bytes_up
    assert (over_bytes.layout["xaxis"]["type"] == "log") == (ratio > 8)


def test_classes_show_the_counts_of_all_seeds_together(plan: Plan) -> None:
    runs = [sample_run(plan=plan, seed=seed) for seed in (0, 1)]
    groups = run_groups(runs)
    counts = [run.confusion for run in runs]
    (matrix,) = confusion_charts(groups)
    chart = class_chart(groups)
    assert chart is not None
    for given in range(10):
        together = [counts[0][given][predicted] + counts[1][given][predicted] for predicted in range(10)]
        assert matrix.traces[0]["z"][given] == pytest.approx([own / 20 for own in together])
        assert chart.traces[0]["y"][given] == pytest.approx(together[given] / 20)
    assert class_chart(run_groups([run.model_copy(update={"confusion": None}) for run in runs])) is None


def test_a_split_is_shown_once(plan: Plan) -> None:
    runs = [sample_run(plan=plan), sample_run("small", plan=plan)]
    ((chart, counts),) = split_charts(runs)
    assert counts == runs[0].images_per_class
    heights = chart.traces[0]["z"]
    assert (len(heights), len(heights[0])) == (10, 100)
    assert heights[3][7] == counts[7][3]
    assert split_charts([run.model_copy(update={"images_per_class": None}) for run in runs]) == []


def test_colours_stand_out_on_light_and_on_dark_paper() -> None:
    """Lines and bars: 2 to 1 at least on both (text is held to more, by the browser's tests)."""
    for look in LOOKS:
        for paper in ("#ffffff", "#1a2028"):
            one, other = sorted(map(_luminance, (look.colour, paper)))
            assert (other + 0.05) / (one + 0.05) > 1.9, look.colour


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else math.pow((part + 0.055) / 1.055, 2.4) for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
