"""Tables of comparisons, and commands that make a plan again."""

import csv
import io
import re
import shlex
from pathlib import Path
from statistics import mean, stdev

import pytest
import typer

from slt_planner.cli.train import train
from slt_planner.errors import InputError
from slt_planner.planning.plan import Plan, load_plan
from slt_planner.reporting.comparison import plan_comparison, plan_labels, run_comparison, table_texts
from slt_planner.reporting.make_again import plan_command, run_commands
from slt_planner.reporting.report import report
from slt_planner.reporting.run_groups import run_groups
from tests.unit.sample_records import as_predicted, sample_plan, sample_run

REPORTS = Path(__file__).parents[2] / "reports"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return sample_plan(infeasible_mb=16)


def test_a_row_a_strategy_with_mean_and_spread_over_seeds(plan: Plan) -> None:
    runs = [sample_run(plan=plan, seed=seed) for seed in range(3)] + [sample_run("small", plan=plan)]
    rows = run_comparison(run_groups(runs)).to_dict("records")
    last = [100 * (run.mean_last_accuracy or 0) for run in runs[:3]]
    assert [row["strategy"] for row in rows] == ["slt", "small"]
    assert rows[0]["seeds"] == 3
    assert rows[0]["accuracy (%)"] == pytest.approx(mean(last), abs=0.005)
    assert rows[0]["spread"] == pytest.approx(stdev(last), abs=0.005)
    assert rows[1]["spread"] != rows[1]["spread"], "one seed has no spread"
    assert rows[0]["up (MB)"] == pytest.approx(runs[0].bytes_up / 1e6, abs=0.05)
    tiers = [tier for tier in runs[0].tiers if tier.measured_peak_bytes]
    nearest = max(tiers, key=lambda tier: (tier.measured_peak_bytes or 0) / tier.budget_bytes)
    assert rows[0]["peak (MB)"] == pytest.approx((nearest.measured_peak_bytes or 0) / 1e6, abs=0.005)
    assert rows[0]["budget (MB)"] == nearest.budget_bytes / 1e6


def test_all_formats_hold_the_same_cells(plan: Plan) -> None:
    runs = [sample_run(plan=plan, seed=seed) for seed in range(2)] + [sample_run("small", plan=plan)]
    texts = table_texts(run_comparison(run_groups(runs)))
    titles, *rows = csv.reader(io.StringIO(texts["csv"]))
    markdown = [[cell.strip() for cell in line.strip("|").split("|")] for line in texts["md"].splitlines()]
    latex = [line.removesuffix(r" \\").replace(r"\%", "%").split(" & ") for line in texts["tex"].splitlines()]
    tables = (markdown[:1] + markdown[2:], [line for line in latex if len(line) == len(titles)])
    for heads, *cells in tables:
        assert heads == titles
        for own, row in zip(cells, rows, strict=True):
            assert all(_same(one, other) for one, other in zip(own, row, strict=True))
    assert texts["tex"].startswith(r"\begin{tabular}{lrlr")
    assert re.search(r"^\|:-+\|-+:\|", texts["md"], re.MULTILINE), "words to the left, numbers to the right"


def _same(one: str, other: str) -> bool:
    return one.strip() == other or float(one) == float(other)


def test_names_cannot_break_a_table() -> None:
    plans = [sample_plan(name="a|b & c_$x$", tier_names=("x|y", "\\end{tabular}", "z\nz")), sample_plan()]
    texts = table_texts(plan_comparison(list(zip(plan_labels(plans), plans, strict=True))))
    lines = texts["md"].splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert len(lines) == 2 + 6
    assert texts["tex"].count("\\end{tabular}") == 1
    assert r"a|b \& c\_\$x\$" in texts["tex"]


def test_a_row_a_tier_of_each_plan(plan: Plan) -> None:
    frame = plan_comparison([("first", plan), ("second", sample_plan((80,)))])
    assert list(frame["tier"]) == ["16MB", "64MB", "128MB", "256MB", "80MB"]
    assert list(frame["status"])[:2] == ["infeasible", "scheduled"]
    assert frame["stages"].isna().tolist() == [True, False, False, False, False]
    assert frame["stages"][1] == len(plan.stages)
    assert frame["most frozen"][1] == max(stage.freeze_depth for stage in plan.feasible_tiers[0].stages)


def test_plans_of_one_name_are_told_apart(plan: Plan) -> None:
    assert plan_labels([plan, plan, sample_plan((80,))]) == [
        "resnet20, 16 MB, 64 MB, 128 MB, 256 MB (1)",
        "resnet20, 16 MB, 64 MB, 128 MB, 256 MB (2)",
        "resnet20, 80 MB",
    ]


def test_budgets_are_what_was_asked_for() -> None:
    sample = sample_plan((80, 90, 100))
    budgets = (81_450_000, 90_040_000, 2_000_060_000)
    tiers = [tier.model_copy(update={"budget_bytes": own}) for tier, own in zip(sample.tiers, budgets, strict=True)]
    plan = sample.model_copy(update={"tiers": tuple(tiers)})
    assert plan_labels([plan]) == ["resnet20, 81.45 MB, 90.04 MB, 2 GB"]
    assert list(plan_comparison([("plan", plan)])["budget (MB)"]) == [81.45, 90.04, 2000.06]


def test_plans_and_runs_do_not_mix(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="plans and runs do not go into one report"):
        report([plan, sample_run(plan=plan, rounds=2)], tmp_path / "x.html")  # type: ignore[list-item]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("resnet20-64-128-256MB", "resnet20 --budgets 64MB,128MB,256MB --batch-size 128 --threads 2"),
        ("resnet20-10MB", "resnet20 --budgets 10MB --batch-size 32 --threads 2 --levers auto"),
        ("resnet20-16MB", "resnet20 --budgets 16MB --batch-size 32 --threads 2"),
    ],
)
def test_the_command_of_a_sample_plan_is_found_in_its_record(folder: str, words: str) -> None:
    plan = load_plan(REPORTS / folder / "plan.json")
    what_if = " --what-if" if plan.what_if else ""
    shape = " --input-shape 3,32,32 --num-classes 10"
    assert plan_command(plan) == f"slt-plan {words}{shape}{what_if}"


def test_a_command_says_what_is_unusual_and_is_quoted(plan: Plan) -> None:
    odd = sample_plan((64,), name="a b; rm -rf", tier_names=("phone a",), policy="per-tier")
    command = plan_command(as_predicted(odd).model_copy(update={"trade_off": None}))
    words = shlex.split(command)
    assert words[:6] == ["slt-plan", "a b; rm -rf", "--tiers", "FILE.toml", "--select", "phone a"]
    assert words[-2:] == ["--no-verify", "--no-trade-off"]
    assert "--policy per-tier" in command
    assert "--norms" not in command


def test_runs_that_differ_in_their_strategy_alone_are_one_command(plan: Plan) -> None:
    runs = [sample_run(plan=plan, rounds=7), sample_run("small", plan=plan, rounds=7), sample_run(plan=plan, seed=3)]
    assert run_commands(runs) == [
        "slt-train --plan PLAN.json --strategy slt,small --dataset parquet:data/cifar10 --rounds 7 --clients 100 "
        "--cohort-size 10 --local-batch 128",
        "slt-train --plan PLAN.json --strategy slt --dataset parquet:data/cifar10 --rounds 60 --clients 100 "
        "--cohort-size 10 --local-batch 128 --seed 3",
    ]


def test_the_command_of_runs_is_one_that_slt_train_takes(plan: Plan) -> None:
    own_code = plan.model_copy(update={"model": plan.model.model_copy(update={"name": "./net.py:Net"})})
    run = sample_run(plan=own_code)
    settings = run.settings.model_copy(update={"augment": False, "enforce": True})
    (command,) = run_commands([run.model_copy(update={"settings": settings})])
    words = shlex.split(command)
    assert words[words.index("--model") + 1] == "./net.py:Net"
    assert {"--no-augmentation", "--enforce"} < set(words)
    app = typer.Typer()
    app.command()(train)
    options = {option for parameter in typer.main.get_command(app).params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options
