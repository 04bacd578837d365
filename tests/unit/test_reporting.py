"""Reports show the records' own numbers, escape what people typed, and are written whole or not at all."""

import doctest
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from rich.console import Console, RenderableType

from slt_planner.config import DeviceFigures
from slt_planner.errors import InputError
from slt_planner.federated.result import RunResult
from slt_planner.planning.plan import Plan, TierPlan
from slt_planner.reporting import figures, html, run_groups, terminal, words
from slt_planner.reporting.left_over import left_over
from slt_planner.reporting.pages.page import rough
from slt_planner.units import format_bytes
from tests.unit.sample_records import also_predicted, as_predicted, on_devices, sample_plan, sample_run

PHONE = DeviceFigures(
    flops_per_s=5.6e9, upload_bytes_per_s=1e6, download_bytes_per_s=4e6, power_w=2.5, link_power_w=2.0
)
NASTY = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "--></svg></style><b>",
    "long" * 2500,
    "🦊 naïve 网络",
    "$x$ $\\frac{1}{",
    "[red]bell\x07\x1b[31m\nsecond line[/nothing]",
    "{{ 7 * 7 }}",
]


class Page(HTMLParser):
    """The tables of a page as rows of (text, data-value), its charts by name, its ids, tags and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.ids: list[str] = []
        self.roles: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.scripts: list[dict[str, str | None]] = []
        self.charts: dict[str, dict[str, Any]] = {}
        self.text = self._table = self._figure = ""
        self._in_script = False
        self._cell: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        fields = dict(attrs)
        self.tags.add(tag)
        self.attributes |= set(fields)
        self._in_script = tag == "script"
        if tag == "script":
            self.scripts.append(fields)
        if fields.get("id"):
            self.ids.append(str(fields["id"]))
        if tag == "figure":
            self._figure = str(fields["id"])
        if fields.get("class") == "chart":
            self.roles.append(f"{fields.get('role')}:{fields.get('aria-label')}")
        if tag == "table":
            self._table = str(fields["id"])
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self._cell, self._value = [], fields.get("data-value")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False
        if tag == "figure":
            self._figure = ""
        if tag in ("td", "th") and self._cell is not None:
            self.tables[self._table][-1].append(("".join(self._cell).strip(), self._value))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._in_script:
            if self._figure:
                self.charts[self._figure] = json.loads(data)
            return
        self.text += data
        if self._cell is not None:
            self._cell.append(data)

    def body(self, name: str) -> list[list[tuple[str, str | None]]]:
        return [row for row in self.tables[name] if any(value is not None for _, value in row)]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return sample_plan(infeasible_mb=16)


@pytest.fixture(scope="module")
def runs(plan: Plan) -> list[RunResult]:
    finished = [sample_run(plan=plan), sample_run(plan=plan, seed=1), sample_run("small", plan=plan)]
    return [*finished, sample_run(plan=plan, seed=2, finished_rounds=20)]


@pytest.fixture(scope="module")
def plan_page(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("plan") / "plan.html"
    html.plan_report(plan, path, command="slt-plan resnet20 --budgets '16,64MB' && echo <done>")
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run_page(runs: list[RunResult], tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("run") / "run.html"
    html.run_report(runs, path)
    return Page(path.read_text(encoding="utf-8"))


def plan_page_of(plan: Plan, folder: Path) -> Page:
    html.plan_report(plan, folder / "page.html", force=True)
    return Page((folder / "page.html").read_text(encoding="utf-8"))


def values(row: list[tuple[str, str | None]]) -> list[float]:
    return [float(value) for _, value in row if value is not None]


def printed(renderable: RenderableType, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def with_tier_name(plan: Plan, name: str) -> Plan:
    fields = json.loads(plan.model_dump_json())
    fields["tiers"][1]["name"] = fields["trade_off"]["frontiers"][1]["tier"] = name
    return plan.model_validate(fields)


# The plan's page


def test_stage_table_shows_the_records_numbers(plan: Plan, plan_page: Page) -> None:
    rows = plan_page.body("stages")
    assert len(rows) == len(plan.stages)
    for number, (stage, row) in enumerate(zip(plan.stages, rows, strict=True)):
        expected: list[float] = [number, stage.rounds_fraction, stage.full_depth, stage.head_scale]
        for tier in plan.feasible_tiers:
            own = tier.stages[number]
            peak = own.measured_peak_bytes
            expected += [own.freeze_depth, peak, peak / tier.budget_bytes]
        assert values(row) == expected
        assert row[5][0] == str(plan.feasible_tiers[0].stages[number].freeze_depth)
        assert row[6][0] == format_bytes(plan.feasible_tiers[0].stages[number].measured_peak_bytes)


def test_each_memory_chart_has_its_breakdown_which_adds_up(plan: Plan, plan_page: Page) -> None:
    for number, tier in enumerate(plan.feasible_tiers):
        rows = plan_page.body(f"memory-{number}-data")
        for own, row in zip(tier.stages, rows, strict=True):
            _, peak, _, *categories = values(row)
            assert peak == own.measured_peak_bytes == sum(categories)
            assert categories == list(own.measured_breakdown.values())


def test_proofs_and_units_are_all_there(plan: Plan, plan_page: Page) -> None:
    proofs = [(tier, proof) for tier in plan.feasible_tiers for proof in tier.proofs]
    assert proofs
    for (tier, proof), row in zip(proofs, plan_page.body("proofs"), strict=True):
        over = proof.measured_peak_bytes / tier.budget_bytes
        assert values(row) == [proof.stage, proof.measured_peak_bytes, tier.budget_bytes, over]
        assert (row[0][0], row[3][0]) == (tier.name, str(proof.config))
        assert over > 1
    for unit, row in zip(plan.full_network.units, plan_page.body("units"), strict=True):
        held = [unit.weights_bytes, unit.activations_bytes, unit.gradients_bytes, unit.optimizer_bytes]
        assert row[1][0] == unit.name
        assert values(row) == [unit.index, unit.parameters, *held, unit.forward_multiply_adds, unit.training_flops]


def test_work_table_shows_what_a_client_sends(plan: Plan, plan_page: Page) -> None:
    for number, row in enumerate(plan_page.body("work")):
        expected = [number]
        for own in (tier.stages[number] for tier in plan.feasible_tiers):
            expected += [own.trainable_parameters, own.upload_bytes, own.train_flops_per_sample]
        assert values(row) == expected, "plans of older versions do not say what travels down"


def test_estimates_are_those_of_the_formulas_for_500_samples(tmp_path: Path) -> None:
    """By hand: work over throughput, bytes over link speed, power times time."""
    plan = on_devices(sample_plan(), {"64MB": PHONE, "256MB": DeviceFigures(flops_per_s=1e9)})
    page = plan_page_of(plan, tmp_path)
    weak, _, strong = plan.tiers
    for number, row in enumerate(page.body("estimates")):
        own = weak.stages[number]
        train_s = own.train_flops_per_sample * 500 / 5.6e9
        link_s = own.upload_bytes / 1e6 + (own.upload_bytes + 4000) / 4e6
        alone = strong.stages[number].train_flops_per_sample * 500 / 1e9
        expected = [number, train_s, link_s, train_s + link_s, 2.5 * train_s + 2.0 * link_s, alone]
        assert values(row) == pytest.approx(expected)
        assert row[1][0] == f"{rough(train_s)} s"
        assert row[4][0] == f"{rough(2.5 * train_s + 2.0 * link_s)} J"
    heads, titles = page.tables["estimates"][:2]
    assert [title for title, _ in heads] == ["", "64MB", "256MB"], "nothing is known of the other tier's device"
    assert [title for title, _ in titles] == ["stage", "training", "transfer", "round", "energy", "training"]
    assert "500 samples and one local epoch" in " ".join(page.text.split())
    assert "docs/costs.md" in page.text
    assert [values(row)[3] for row in page.body("work")] == [own.upload_bytes + 4000 for own in weak.stages]


def test_without_device_figures_nothing_is_estimated(plan_page: Page) -> None:
    assert "estimates" not in plan_page.tables
    assert "estimate" not in plan_page.text.lower()


def test_trade_off_table_shows_the_records_numbers(plan: Plan, plan_page: Page) -> None:
    grid = plan.trade_off
    assert grid is not None
    for number, row in enumerate(plan_page.body("trade-off-data")):
        frontiers = [frontier.head_scales[number] for frontier in grid.frontiers]
        known = [scale for scale in frontiers if scale is not None]
        assert values(row) == [grid.freeze_depths[number], *grid.peak_bytes[number], *known]
        assert [cell[0] == words.NOTHING for cell in row[-len(frontiers) :]] == [scale is None for scale in frontiers]
    assert len(plan_page.body("trade-off-data")) == len(grid.freeze_depths)
    assert any(None in frontier.head_scales for frontier in grid.frontiers)


def test_a_plan_without_a_trade_off_has_no_such_section(plan: Plan, tmp_path: Path) -> None:
    page = plan_page_of(plan.model_copy(update={"trade_off": None}), tmp_path)
    assert "trade-off" not in page.ids
    assert "Trade-off" not in page.text


def test_an_unverified_plan_is_never_called_measured(plan: Plan, tmp_path: Path) -> None:
    foreseen = as_predicted(plan)
    page = plan_page_of(foreseen, tmp_path)
    drawn = texts_of(figures.plan_figure(foreseen))
    charts = json.dumps(page.charts)
    for text in (page.text, *page.roles, drawn, charts, printed(terminal.plan_table(foreseen))):
        assert "measured" not in text.lower()
    for text in (page.text, drawn, charts, printed(terminal.plan_table(foreseen))):
        assert "predicted" in text.lower()
    assert "Predicted: allocator ruler" in drawn
    assert "Measured: allocator ruler" in texts_of(figures.plan_figure(plan))
    stages = [own for tier in foreseen.feasible_tiers for own in tier.stages]
    shown = [values(row)[1] for n in range(3) for row in page.body(f"memory-{n}-data")]
    assert shown == [own.predicted_peak_bytes for own in stages]


def test_predictions_stand_beside_what_was_measured(plan: Plan, tmp_path: Path) -> None:
    page = plan_page_of(also_predicted(plan, off=4096), tmp_path)
    text = " ".join(page.text.split())
    assert "The predictions that the plan was found with were at most 4.1 kB off." in text
    for number, tier in enumerate(plan.feasible_tiers):
        for own, row in zip(tier.stages, page.body(f"memory-{number}-data"), strict=True):
            assert values(row)[3] == own.peak_bytes - 4096
            assert sum(values(row)[4:]) == own.peak_bytes
    for row in page.body("proofs"):
        assert values(row)[2] == values(row)[1] - 4096
    exact = plan_page_of(also_predicted(plan, off=0), tmp_path)
    assert "were right to the byte." in " ".join(exact.text.split())


def test_policy_per_tier_shows_each_tiers_own_head(tmp_path: Path) -> None:
    plan = sample_plan(policy="per-tier")
    page = plan_page_of(plan, tmp_path)
    for number, (stage, row) in enumerate(zip(plan.stages, page.body("stages"), strict=True)):
        expected: list[float] = [number, stage.rounds_fraction, stage.full_depth]
        for tier in plan.tiers:
            own = tier.stages[number]
            expected += [own.freeze_depth, own.head_scale, own.peak_bytes, own.peak_bytes / tier.budget_bytes]
        assert values(row) == expected
        limits = [page.body(f"memory-{n}-data")[number][3][0] for n in range(len(plan.tiers))]
        assert limits == [words.reason_text(tier.stages[number].limited_by) for tier in plan.tiers]


def test_what_is_left_over_is_said_with_its_reason(plan: Plan, plan_page: Page) -> None:
    text = " ".join(plan_page.text.split())
    for tier in plan.feasible_tiers:
        assert left_over(tier) in text
    weakest, middle, strongest = plan.feasible_tiers
    assert left_over(weakest).startswith(expected_sentence(weakest, max, "leaves least, "))
    assert left_over(weakest).endswith("a later stage fits no wider head, and nothing is frozen.")
    assert left_over(middle).endswith("the weakest tier sets its head, and nothing is frozen.")
    assert f"{expected_sentence(strongest, max, 'leaves least, ')}: the whole network trains." in left_over(strongest)
    assert expected_sentence(strongest, min, "leaves most, ") in left_over(strongest)
    alone = sample_plan((256,)).tiers[0]
    assert left_over(alone) == f"{expected_sentence(alone, max, 'leaves ')}: the whole network trains."


def expected_sentence(tier: TierPlan, of: Any, leaves: str) -> str:
    number, stage = of(enumerate(tier.stages), key=lambda pair: pair[1].peak_bytes)
    return f"Stage {number} {leaves}{format_bytes(tier.budget_bytes - stage.peak_bytes)}"


def test_what_is_left_over_names_how_far_the_next_notches_are_over(plan: Plan) -> None:
    tier = plan.binding_tier
    number = max(range(len(tier.stages)), key=lambda number: tier.stages[number].peak_bytes)
    over = {
        proof.kind: format_bytes(proof.peak_bytes - tier.budget_bytes) for proof in tier.proofs if proof.stage == number
    }
    assert set(over) == {"wider_head", "less_frozen"}
    reasons = (
        f"the next wider head is {over['wider_head']} over, and one unit less frozen is {over['less_frozen']} over"
    )
    assert f": {reasons}." in left_over(tier)


def test_headlines_say_what_each_tier_can_do(plan: Plan, plan_page: Page) -> None:
    text = " ".join(plan_page.text.split())
    assert f"{len(plan.stages)} stages, every one measured within budget, tightest 99.9 %" in text
    assert f"trains the whole network alone ({format_bytes(plan.full_network.peak_bytes)})" in text
    assert str(plan.tiers[0].reason) in text
    assert "allocator ruler, CPU, batch 128, fp32, SGD momentum 0.9, 2 threads" in text
    assert "slt-plan resnet20 --budgets '16,64MB' && echo <done>" in text


@pytest.mark.parametrize("fixture", ["plan_page", "run_page"])
def test_pages_are_self_contained_and_accessible(fixture: str, request: pytest.FixtureRequest) -> None:
    page: Page = request.getfixturevalue(fixture)
    assert len(page.ids) == len(set(page.ids)), "ids of several drawings in one page must differ"
    assert not page.tags & {"link", "img", "iframe", "object", "image"}
    assert "src" not in page.attributes
    assert [script for script in page.scripts if "type" not in script] == [{}], "one script of ours, the rest is data"
    assert [script["id"] for script in page.scripts if script.get("type") == "text/plain"] == ["plotly"], "once a page"
    assert page.roles
    assert all(role.startswith("img:") and len(role) > 20 for role in page.roles)


def test_a_plan_without_freezing_says_that_there_is_nothing_to_prove(tmp_path: Path) -> None:
    html.plan_report(sample_plan((256,)), tmp_path / "full.html")
    page = Page((tmp_path / "full.html").read_text(encoding="utf-8"))
    assert "Nothing to prove" in page.text
    assert len(page.body("stages")) == 1


# The runs' page


def test_every_run_is_shown_with_its_records_numbers(runs: list[RunResult], run_page: Page) -> None:
    rows = {row[0][0]: row for row in run_page.body("every-run")}
    for run in runs:
        row = rows[run.title]
        assert float(row[3][1] or 0) == run.mean_last_accuracy
        assert row[3][0] == f"{100 * (run.mean_last_accuracy or 0):.1f} %"
        assert row[4][1] == (None if run.status == "stopped" else str(run.accuracy_batch_statistics))
        assert row[5][1] == (None if run.status == "stopped" else str(run.accuracy_running_statistics))
        assert row[6] == (format_bytes(run.bytes_up), str(run.bytes_up))


def test_comparison_is_of_means_over_seeds(runs: list[RunResult], run_page: Page) -> None:
    row = {row[0][0]: row for row in run_page.body("comparison")}["slt, 2 seeds"]
    pair = [run.mean_last_accuracy or 0 for run in runs[:2]]
    assert float(row[4][1] or 0) == pytest.approx(sum(pair) / 2)
    assert float(row[5][1] or 0) == pytest.approx(abs(pair[0] - pair[1]) / math.sqrt(2)), "two values' deviation"
    assert float(row[7][1] or 0) == pytest.approx((runs[0].bytes_up + runs[1].bytes_up) / 2)
    assert len(run_page.body("comparison")) == 3


def test_round_table_is_the_data_behind_the_chart(runs: list[RunResult], run_page: Page) -> None:
    """Seeds of one strategy are together: the first group is the mean of two runs."""
    rows = run_page.body("accuracy-data")
    assert len(rows) == 60
    assert [cell[1] for cell in rows[-1][-2:]] == [None, None], "the stopped run has no round 60"
    pair = [run.rows[9].accuracy for run in runs[:2]]
    assert float(rows[9][1][1] or 0) == pytest.approx(sum(pair) / 2)
    assert float(rows[-1][2][1] or 0) == pytest.approx((runs[0].bytes_up + runs[1].bytes_up) / 2)
    curve = next(trace for trace in run_page.charts["accuracy"]["data"] if trace["mode"] == "lines+markers")
    assert curve["y"][9] == pytest.approx(100 * sum(pair) / 2)


def test_peaks_and_stages_of_runs(runs: list[RunResult], run_page: Page) -> None:
    measured = [tier for run in runs for tier in run.tiers]
    for tier, row in zip(measured, run_page.body("peaks-data"), strict=True):
        assert row[1][0] == tier.name
        assert row[4][1] == (None if tier.measured_peak_bytes is None else str(tier.measured_peak_bytes))
        assert int(row[5][1] or 0) == tier.budget_bytes
    stages = [row for row in run_page.body("run-stages") if row[0][0] == "slt-seed0"]
    assert sum(int(row[6][1] or 0) for row in stages) == runs[0].bytes_up
    assert [int(row[1][1] or 0) for row in stages] == sorted({row.stage for row in runs[0].rows})


def test_a_stopped_run_is_said_to_be_stopped(run_page: Page) -> None:
    assert "slt-seed2 was stopped after round 20 of 60: its figures are not final" in run_page.text


def test_the_data_is_named_wherever_accuracies_are(tmp_path: Path) -> None:
    html.run_report([sample_run(dataset_title="8x8 digits, 1,797 images")], tmp_path / "run.html")
    page = Page((tmp_path / "run.html").read_text(encoding="utf-8"))
    assert page.text.count("8x8 digits, 1,797 images") >= 8


def test_a_run_without_a_round_is_reported(tmp_path: Path) -> None:
    run = sample_run(finished_rounds=0)
    html.run_report([run], tmp_path / "run.html")
    assert "no round finished" in (tmp_path / "run.html").read_text(encoding="utf-8")
    assert "before its first round ended" in printed(terminal.run_table([run]))


def test_runs_of_one_name_are_told_apart() -> None:
    labels = run_groups.run_labels([sample_run(), sample_run(), sample_run(seed=1)])
    assert labels == ["slt-seed0 (1)", "slt-seed0 (2)", "slt-seed1"]


def test_only_seeds_of_the_same_run_are_averaged(plan: Plan) -> None:
    other = sample_plan((128, 256))
    groups = run_groups.run_groups(
        [sample_run(plan=plan), sample_run(plan=other, seed=1), sample_run(plan=plan, seed=2)]
    )
    assert [[run.settings.seed for run in group.runs] for group in groups] == [[0, 2], [1]]


# What people typed


@pytest.mark.parametrize("name", NASTY)
def test_names_do_no_harm(name: str, tmp_path: Path) -> None:
    plan = with_tier_name(sample_plan((64, 256), infeasible_mb=16, name=name, reason=name), name)
    plan = on_devices(plan, {name: PHONE})
    run = sample_run(plan=plan, dataset_title=name, rounds=20)
    html.plan_report(plan, tmp_path / "plan.html", command=name)
    html.run_report([run, run], tmp_path / "run.html", command=name)
    for file in ("plan.html", "run.html"):
        text = (tmp_path / file).read_text(encoding="utf-8")
        page = Page(text)
        assert not page.tags & {"img"}
        assert "onerror" not in page.attributes
        assert len(re.findall(r"<script", text)) == len(page.scripts) == text.count("</script>")
        assert [script for script in page.scripts if "type" not in script] == [{}]
        charts = json.dumps(page.charts)
        assert "<script" not in charts
        assert "<img" not in charts
        assert "long" * 30 not in charts
        assert words.shorten(name, 24) in page.text
        assert len(page.ids) == len(set(page.ids))
    shown = printed(terminal.plan_table(plan)) + printed(terminal.run_table([run]))
    assert "\x1b" not in shown
    assert "\x07" not in shown


@pytest.mark.parametrize(("name", "drawn"), [("$x$", "$x$"), ("n" * 10_000, "nnn…")])
def test_names_in_figures_are_short_and_no_mathematics(name: str, drawn: str) -> None:
    drawing = texts_of(figures.plan_figure(with_tier_name(sample_plan((64, 256)), name)))
    assert drawn in drawing
    assert "n" * 41 not in drawing


def texts_of(figure: Figure) -> str:
    """The words in a picture, its legends' too."""
    return "\n".join(text.get_text() for text in figure.findobj(Text))  # type: ignore[attr-defined]


def test_a_command_that_is_no_text_is_written(tmp_path: Path) -> None:
    html.plan_report(sample_plan((256,)), tmp_path / "plan.html", command="slt-plan \udcff")
    assert "slt-plan ?" in (tmp_path / "plan.html").read_text(encoding="utf-8")


# Files


def test_files_are_refused_before_any_is_written(tmp_path: Path, plan: Plan) -> None:
    page, picture = html.report_paths(tmp_path / "x.html")
    assert (page.name, picture.name) == ("x.html", "x.png")
    picture.write_bytes(b"mine")
    with pytest.raises(InputError, match=r"x\.png exists"):
        html.plan_report(plan, page)
    with pytest.raises(InputError, match=r"x\.png exists"):
        html.run_report([sample_run(plan=plan)], page)
    assert (page.exists(), picture.read_bytes()) == (False, b"mine")
    html.plan_report(plan, page, force=True)
    assert page.exists()
    assert Image.open(picture).size[0] == 1600


def test_a_picture_can_have_its_own_name(tmp_path: Path) -> None:
    run = sample_run(rounds=3)
    html.run_report([run], tmp_path / "report.html", picture=tmp_path / "accuracy.png")
    names = ["accuracy.png", "report.csv", "report.html", "report.md", "report.tex"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    with pytest.raises(InputError, match=r"accuracy\.png exists"):
        html.run_report([run], tmp_path / "new.html", picture=tmp_path / "accuracy.png")


@pytest.mark.parametrize("name", ["report", "report.png", "plan.v2"])
def test_other_suffixes_and_no_runs_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"must end in \.html"):
        html.report_paths(name)
    with pytest.raises(InputError, match="no run"):
        html.run_report([], name)


def test_reports_are_the_same_every_time(tmp_path: Path, runs: list[RunResult]) -> None:
    for name in ("a", "b"):
        html.run_report(runs, tmp_path / f"{name}.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_figures_leave_settings_alone(plan: Plan) -> None:
    before = dict(rcParams)
    figures.png_bytes(figures.plan_figure(plan))
    assert dict(rcParams) == before


def test_no_global_plotting_state_is_used() -> None:
    code = "import sys, slt_planner.reporting.html; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Figures


def test_many_tiers_and_a_far_budget_are_drawn() -> None:
    figure = figures.plan_figure(sample_plan((64, 80, 100, 128, 10**6)))
    assert Image.open(io.BytesIO(figures.png_bytes(figure))).size[0] == 1600
    assert "far above this picture" in texts_of(figure)


def test_schedule_picture_covers_all_units_and_rounds(plan: Plan) -> None:
    schedules = figures.plan_figure(plan).axes[: len(plan.feasible_tiers)]
    for axes, tier in zip(schedules, plan.feasible_tiers, strict=True):
        areas = [patch.get_width() * patch.get_height() for patch in axes.patches]  # type: ignore[attr-defined]
        assert sum(areas) == pytest.approx(100 * plan.model.depth), tier.name


# The terminal


@pytest.mark.parametrize("budgets", [(64,), (64, 128), (64, 128, 256), (64, 80, 100, 128, 256)])
def test_plan_table_fits_80_columns(budgets: tuple[int, ...]) -> None:
    plan = sample_plan(budgets, infeasible_mb=16)
    text = printed(terminal.plan_table(plan))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    assert text.count("allocator ruler") == 1
    for tier in plan.feasible_tiers:
        for own in tier.stages:
            peak = f"{own.freeze_depth} {own.measured_peak_bytes / 1e6:5.1f}"
            assert f"{peak} {100 * own.measured_peak_bytes / tier.budget_bytes:>3.0f}%" in text
    assert str(plan.tiers[0].reason) in reason_shown(text)
    assert "Stage 0 leaves most" in " ".join(text.split())


def reason_shown(text: str) -> str:
    """The first tier's sentence, put together from its lines."""
    first, *lines = text.splitlines()
    indent = first.index("infeasible  ") + len("infeasible  ")
    rest = takewhile(lambda line: line.startswith(" " * indent), lines)
    return " ".join(line[indent:].strip() for line in [first, *rest])


def test_a_long_reason_wraps_beside_the_status() -> None:
    reason = "the warm-up needs more than there is (in " + "encoder.layers.encoder_layer_11.mlp.3, " * 8 + "backward)"
    plan = sample_plan((64,), infeasible_mb=16, reason=reason)
    text = printed(terminal.plan_table(plan))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert reason in reason_shown(text)


@pytest.mark.parametrize("budgets", [(64,), (64, 128), (64, 100, 128), (64, 80, 100, 128, 256)])
def test_plan_table_with_each_tiers_own_head_fits_80_columns(budgets: tuple[int, ...]) -> None:
    plan = sample_plan(budgets, policy="per-tier")
    text = printed(terminal.plan_table(plan))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    for tier in plan.tiers:
        for own in tier.stages:
            share = f"{100 * own.peak_bytes / tier.budget_bytes:>3.0f}%"
            head = f"{100 * own.head_scale:.3g}"
            assert f"{own.freeze_depth:>2} {head:>4} {own.peak_bytes / 1e6:5.1f} {share}" in text


def test_plan_table_of_a_deep_network_fits_80_columns(plan: Plan) -> None:
    names = tuple(f"unit{number}" for number in range(120))
    deep = plan.model_copy(update={"model": plan.model.model_copy(update={"unit_names": names})})
    text = printed(terminal.plan_table(deep))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text


def test_run_table_fits_80_columns(runs: list[RunResult]) -> None:
    text = printed(terminal.run_table(runs))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    assert all(f"{100 * (run.mean_last_accuracy or 0):.1f}" in text for run in runs)
    assert "slt-seed2 was stopped after round 20 of 60" in text
    assert "Test accuracy on CIFAR-10" in text
    assert f" {100 * stdev([run.mean_last_accuracy or 0 for run in runs[:2]]):.1f} " in text


def test_run_table_of_long_names_fits_80_columns() -> None:
    plan = sample_plan((1600,), tier_names=("n" * 100,))
    run = sample_run(plan=plan, rounds=6)
    settings = run.settings.model_copy(update={"strategy": "federated-dropout"})
    alike = [run.model_copy(update={"settings": settings.model_copy(update={"seed": seed})}) for seed in range(10)]
    text = printed(terminal.run_table(alike))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert text.count("federated-dropout") == 10
    assert "after 6 rounds" in text
    stopped = sample_run(plan=plan, rounds=10**6, finished_rounds=6)
    text = printed(terminal.run_table([*alike, stopped.model_copy(update={"settings": stopped.settings})]))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "6/1000000" in text


@pytest.mark.parametrize("name", ["words", "run_groups", "charts.chart", "charts.memory", "pages.page"])
def test_the_examples_in_the_documentation_hold(name: str) -> None:
    result = doctest.testmod(import_module(f"slt_planner.reporting.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_terminal_text_has_no_colour_codes_where_nobody_wants_them(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(width=80, file=io.StringIO(), force_terminal=True)
    console.print(terminal.plan_table(plan))
    assert "\x1b[3" not in console.file.getvalue()  # type: ignore[attr-defined]
