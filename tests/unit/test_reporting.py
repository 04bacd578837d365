"""Reports show the records' own numbers, escape what people typed, and are written whole or not at all."""

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib import rcParams
from PIL import Image
from rich.console import Console, RenderableType

from slt_planner.errors import InputError
from slt_planner.federated.result import RunResult
from slt_planner.planning.plan import Plan
from slt_planner.reporting import figures, html, terminal
from slt_planner.units import format_bytes
from tests.unit.sample_records import sample_plan, sample_run

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
    """The tables of a page as rows of (text, data-value), its ids, tags and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.ids: list[str] = []
        self.roles: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = self._table = ""
        self._cell: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        fields = dict(attrs)
        self.tags.add(tag)
        self.attributes |= set(fields)
        if fields.get("id"):
            self.ids.append(str(fields["id"]))
        if tag == "svg":
            self.roles.append(f"{fields.get('role')}:{fields.get('aria-label')}")
        if tag == "table":
            self._table = str(fields["id"])
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self._cell, self._value = [], fields.get("data-value")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[self._table][-1].append(("".join(self._cell).strip(), self._value))
            self._cell = None

    def handle_data(self, data: str) -> None:
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


def values(row: list[tuple[str, str | None]]) -> list[float]:
    return [float(value) for _, value in row if value is not None]


def printed(renderable: RenderableType, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def with_tier_name(plan: Plan, name: str) -> Plan:
    tiers = json.loads(plan.model_dump_json())["tiers"]
    tiers[1]["name"] = name
    return plan.model_validate({**plan.model_dump(), "tiers": tiers})


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
        assert values(row) == [unit.index, unit.parameters, *held, unit.forward_multiply_adds]


def test_work_table_shows_what_a_client_sends(plan: Plan, plan_page: Page) -> None:
    for number, row in enumerate(plan_page.body("work")):
        expected = [number]
        for own in (tier.stages[number] for tier in plan.feasible_tiers):
            expected += [own.trainable_parameters, own.upload_bytes, own.train_flops_per_sample]
        assert values(row) == expected


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
    assert not page.tags & {"script", "link", "img", "iframe", "object", "image"}
    assert "src" not in page.attributes
    assert page.roles
    assert all(role.startswith("img:") and len(role) > 20 for role in page.roles)


def test_a_plan_without_freezing_says_that_there_is_nothing_to_prove(tmp_path: Path) -> None:
    html.plan_report(sample_plan((256,)), tmp_path / "full.html")
    page = Page((tmp_path / "full.html").read_text(encoding="utf-8"))
    assert "Nothing to prove" in page.text
    assert len(page.body("stages")) == 1


# The runs' page


def test_comparison_shows_the_records_numbers(runs: list[RunResult], run_page: Page) -> None:
    rows = {row[0][0]: row for row in run_page.body("comparison")}
    for run in runs:
        row = rows[run.title]
        assert float(row[4][1] or 0) == run.mean_last_accuracy
        assert row[4][0] == f"{100 * (run.mean_last_accuracy or 0):.1f} %"
        assert row[5][1] == (None if run.status == "stopped" else str(run.accuracy_batch_statistics))
        assert row[6][1] == (None if run.status == "stopped" else str(run.accuracy_running_statistics))
        assert row[7] == (format_bytes(run.bytes_up), str(run.bytes_up))
    mean = rows["slt, 2 seeds: mean"]
    pair = [run.mean_last_accuracy or 0 for run in runs[:2]]
    assert float(mean[1][1] or 0) == pytest.approx(sum(pair) / 2)


def test_round_table_is_the_data_behind_the_chart(runs: list[RunResult], run_page: Page) -> None:
    rows = run_page.body("accuracy-data")
    assert len(rows) == 60
    assert [cell[1] for cell in rows[-1][-2:]] == [None, None], "the stopped run has no round 60"
    assert float(rows[9][1][1] or 0) == runs[0].rows[9].accuracy
    assert int(rows[-1][2][1] or 0) == runs[0].bytes_up


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
    labels = terminal.run_labels([sample_run(), sample_run(), sample_run(seed=1)])
    assert labels == ["slt-seed0 (1)", "slt-seed0 (2)", "slt-seed1"]


def test_only_seeds_of_the_same_run_are_averaged(plan: Plan) -> None:
    other = sample_plan((128, 256))
    groups = terminal.run_groups([sample_run(plan=plan), sample_run(plan=other, seed=1), sample_run(plan=plan, seed=2)])
    assert [[run.settings.seed for run in group.runs] for group in groups] == [[0, 2], [1]]


# What people typed


@pytest.mark.parametrize("name", NASTY)
def test_names_do_no_harm(name: str, tmp_path: Path) -> None:
    plan = with_tier_name(sample_plan((64, 256), infeasible_mb=16, name=name, reason=name), name)
    run = sample_run(plan=plan, dataset_title=name, rounds=20)
    html.plan_report(plan, tmp_path / "plan.html", command=name)
    html.run_report([run, run], tmp_path / "run.html", command=name)
    for file in ("plan.html", "run.html"):
        text = (tmp_path / file).read_text(encoding="utf-8")
        page = Page(text)
        assert not page.tags & {"script", "img"}
        assert "onerror" not in page.attributes
        assert not re.search(r"<(script|img)", text)
        assert terminal.shorten(name, 24) in page.text
        assert len(page.ids) == len(set(page.ids))
    shown = printed(terminal.plan_table(plan)) + printed(terminal.run_table([run]))
    assert "\x1b" not in shown
    assert "\x07" not in shown


@pytest.mark.parametrize(("name", "drawn"), [("$x$", "$x$"), ("n" * 10_000, "nnn…")])
def test_names_in_figures_are_short_and_no_mathematics(name: str, drawn: str) -> None:
    drawing = figures.svg_text(figures.schedule_figure(with_tier_name(sample_plan((64, 256)), name)), "a")
    assert drawn in drawing
    assert "n" * 41 not in drawing


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracy.png", "report.html"]
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
    plan = sample_plan((64, 80, 100, 128, 10**6))
    figure = figures.plan_figure(plan)
    assert Image.open(io.BytesIO(figures.png_bytes(figure))).size[0] == 1600
    written = figures.svg_text(figures.memory_figure(plan.tiers[-1]), "m")
    assert "far above this picture" in written


def test_schedule_picture_covers_all_units_and_rounds(plan: Plan) -> None:
    for axes, tier in zip(figures.schedule_figure(plan).axes, plan.feasible_tiers, strict=True):
        areas = [patch.get_width() * patch.get_height() for patch in axes.patches]  # type: ignore[attr-defined]
        assert sum(areas) == pytest.approx(100 * plan.model.depth), tier.name


def test_svgs_of_one_name_are_equal_and_of_two_names_share_no_id(plan: Plan) -> None:
    first, again, other = (figures.svg_text(figures.schedule_figure(plan), name) for name in "aab")
    assert first == again
    ids = [set(re.findall(r'\sid="([^"]+)"', drawing)) for drawing in (first, other)]
    assert not ids[0] & ids[1]
    assert set(re.findall(r"url\(#([^)]+)\)", first)) <= ids[0]


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
    assert "16MB" in text
    assert "infeasible  at full_depth 1 even the narrowest head needs 38.2 MB" in text


def test_run_table_fits_80_columns(runs: list[RunResult]) -> None:
    text = printed(terminal.run_table(runs))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    assert all(f"{100 * (run.mean_last_accuracy or 0):.1f}" in text for run in runs)
    assert "slt-seed2 was stopped after round 20 of 60" in text
    assert "Test accuracy on CIFAR-10" in text


def test_terminal_text_has_no_colour_codes_where_nobody_wants_them(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(width=80, file=io.StringIO(), force_terminal=True)
    console.print(terminal.plan_table(plan))
    assert "\x1b[3" not in console.file.getvalue()  # type: ignore[attr-defined]
