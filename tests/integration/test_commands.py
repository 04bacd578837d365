"""The commands end to end: what they print, what they write, and how they refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from slt_planner.cli import main
from slt_planner.federated.run_folder import load_run
from slt_planner.planning.plan import load_plan
from tests.integration.conftest import write_images

PLAN = ("slt-plan", "resnet20", "--budgets", "3,6,20MB", "--batch-size", "8")


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A folder in which slt-plan was run as its own process."""
    folder = tmp_path_factory.mktemp("planned")
    script = "import sys; from slt_planner.cli.main import slt_plan; sys.argv[0] = 'slt-plan'; slt_plan()"
    done = subprocess.run(
        [sys.executable, "-c", script, *PLAN[1:]], cwd=folder, capture_output=True, text=True, check=True
    )
    return folder, done


@pytest.fixture
def plan(planned, tmp_path):
    shutil.copy(planned[0] / "plan.json", tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_slt_plan_prints_the_table_and_writes_plan_and_report(planned):
    folder, done = planned
    assert "infeasible" in done.stdout
    assert "scheduled" in done.stdout
    assert "full" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if not line.startswith("Written"))
    plan = load_plan(folder / "plan.json")
    assert [tier.status for tier in plan.tiers] == ["infeasible", "scheduled", "full"]
    for tier in plan.feasible_tiers:
        assert all(stage.measured_peak_bytes <= tier.budget_bytes for stage in tier.stages)
    assert (folder / "reports" / "plan.html").read_text().startswith("<!DOCTYPE html>")
    assert (folder / "reports" / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "slt-plan resnet20 --budgets 3,6,20MB --batch-size 8" in (folder / "reports" / "plan.html").read_text()
    # Nothing but progress goes to stderr, not even the profiler's own lines.
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["resnet20"]


def test_nothing_is_overwritten_unless_forced_and_that_is_said_at_once(command, plan, tmp_path):
    before = plan.read_bytes()
    refused = command(*PLAN)
    assert refused.code == 2
    assert refused.err == "slt-plan: error: plan.json exists; choose another name, or --force to overwrite it\n"
    assert plan.read_bytes() == before
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "other.png").touch()
    assert "reports/other.png exists" in command(*PLAN, "--out", "other.json").err


def test_json_goes_to_stdout_alone(command, tmp_path):
    done = command("slt-plan", "resnet20", "--budgets", "1GB", "--batch-size", "4", "--json", "--threads", "1")
    assert done.code == 0
    assert json.loads(done.out) == json.loads((tmp_path / "plan.json").read_text())
    assert "trains the whole network alone" in done.err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["resnet21", "--budgets", "64MB"], 2, "unknown model 'resnet21'; did you mean resnet"),
        (["resnet20", "--budgets", "64"], 2, "memory budget '64' has no unit; write for example 64MB"),
        (["resnet20", "--budgets", "-64MB"], 2, "memory budget '-64MB' is out of range"),
        (["resnet20", "--budgets", "999999999GB"], 2, "is out of range"),
        (["resnet20", "--budgets", "64,64MB"], 2, "given twice"),
        (["resnet20", "--budgets", ""], 2, "no memory budget given"),
        (["resnet20"], 2, "--budgets"),
        (["resnet20", "--budgets", "1MB", "--batch-size", "1"], 2, "--batch-size 1: "),
        (["resnet20", "--budgets", "1MB", "--optimizer", "lion"], 2, "--optimizer lion: "),
        (["resnet20", "--budgets", "1MB", "--weight-decay", "-1"], 2, "--weight-decay -1.0: "),
        (["resnet20", "--budgets", "1MB", "--device", "tpu"], 2, "--device tpu: "),
        (["resnet20", "--budgets", "1MB", "--policy", "best"], 2, "--policy 'best': known are coupled, per-tier"),
        (["resnet20", "--budgets", "1MB", "--input-shape", "3,x"], 2, "--input-shape '3,x': give positive whole"),
        (["resnet20", "--budgets", "1MB", "--input-shape", "1,32,32"], 2, "does not take inputs of 1x32x32"),
        (["resnet20", "--budgets", "1MB", "--report", "x.pdf"], 2, "must end in .html"),
        (["resnet20", "--budgets", "1MB", "--out", "x.html", "--report", "x.html"], 2, "give them different names"),
        (["resnet20", "--budgets", "1MB", "--out", "/proc/no/plan.json"], 2, "/proc/no/plan.json: cannot be written"),
        (["resnet20", "--budgets", "1MB", "--out", "n" * 300], 2, "cannot be written (File name too long)"),
        (["resnet20", "--budgets", "1MB", "--batch-size", "1000000000000"], 2, "--batch-size 1000000000000: "),
        (["resnet20", "--budgets", "1MB", "--threads", "1000000000000"], 2, "--threads 1000000000000: "),
        (["resnet20", "--budgets", "1MB", "--num-classes", "1000000000000"], 2, "--num-classes"),
        (["resnet20", "--budgets", "1MB", "--weight-decay", "inf"], 2, "--weight-decay inf: "),
        (["resnet20", "--budgets", "1MB", "--input-shape", ""], 2, "--input-shape '': give positive whole"),
        (["raft_small", "--budgets", "1MB"], 2, "optical flow networks cannot be planned; raft_small is one"),
        (["resnet20", "--budgets", "1MB", "--batch-size", "4"], 3, "1MB: stage 1 needs"),
    ],
)
def test_slt_plan_refuses_in_one_line(command, tmp_path, words, code, message):
    done = command("slt-plan", *words)
    assert done.code == code
    assert done.err.startswith("slt-plan: error: ")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_slt_train_runs_the_embedded_digits_without_any_option(command, plan, tmp_path):
    done = command("slt-train", "--plan", "plan.json", "--rounds", "15", "--out", "run")
    assert done.code == 0, done.err
    assert "handwritten digits" in done.err
    run = load_run(tmp_path / "run")
    assert run.status == "finished"
    assert len(run.rows) == 15
    assert run.rows[-1].accuracy > 0.2  # ten classes
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "accuracy.png",
        "config.json",
        "metrics.jsonl",
        "report.csv",
        "report.html",
        "report.md",
        "report.tex",
        "split.safetensors",
        "tensorboard",
        "weights.safetensors",
    }
    assert sum(map(sum, run.images_per_class)) == run.train_images
    assert [sum(own) for own in run.images_per_class] == sorted(map(sum, run.images_per_class), reverse=True)
    assert sum(map(sum, run.confusion)) == run.test_images
    right = sum(row[number] for number, row in enumerate(run.confusion))
    assert right / run.test_images == run.accuracy_batch_statistics
    assert f"{run.mean_last_accuracy:.1%}".replace("%", "") in done.out


def test_several_strategies_go_into_subfolders_and_are_reported_again_later(command, plan, images, tmp_path):
    words = ["--dataset", "parquet:images", "--clients", "4", "--cohort-size", "2", "--rounds", "14", "--seed", "7"]
    done = command("slt-train", "--plan", plan, "--strategy", "slt,small", *words, "--out", "run")
    assert done.code == 0, done.err
    slt, small = (load_run(tmp_path / "run" / name) for name in ("slt-seed7", "small-seed7"))
    assert slt.settings.model_copy(update={"strategy": "small"}) == small.settings
    assert 0 < small.head_scale < 1
    assert "images (PNG)" in done.out
    again = command("slt", "report", "run", "-o", "again.html")
    assert again.code == 0, again.err
    assert "small" in (tmp_path / "again.html").read_text()
    from_plan = command("slt", "report", "plan.json", "-o", "plan.html")
    assert from_plan.code == 0
    assert "is not a run folder" in command("slt", "report", "plan.json", "run", "-o", "x.html").err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan", "none.json"], "plan none.json: cannot be read (No such file or directory); make one with slt-plan"),
        (["--plan", "bad.json"], "plan bad.json: not JSON (line 1"),
        (["--plan", "empty.json"], "plan empty.json: model: Field required (and "),
        (["--plan", "."], "plan .: cannot be read"),
        (["--plan", "plan.json", "--dataset", "mnist"], "unknown dataset 'mnist'"),
        (["--plan", "plan.json", "--dataset", "parquet:nowhere"], "nowhere: no such folder"),
        (["--plan", "plan.json", "--dataset", "parquet:small"], "16x16"),
        (["--plan", "plan.json", "--dataset", "parquet:labels"], "label 10"),
        (["--plan", "plan.json", "--strategy", "best"], "unknown strategy 'best'; known are slt, small"),
        (["--plan", "plan.json", "--strategy", "slt,slt"], "one is given twice"),
        (["--plan", "plan.json", "--rounds", "0"], "--rounds"),
        (["--plan", "plan.json", "--rounds", "3"], "3 rounds for a schedule of"),
        (["--plan", "plan.json", "--clients", "0"], "--clients"),
        (["--plan", "plan.json", "--local-batch", "9"], "needs more memory than the plan's 8"),
        (["--plan", "plan.json", "--learning-rate", "0"], "--learning-rate 0.0: "),
        (["--plan", "plan.json", "--partition", "some"], "unknown partition 'some'"),
        (["--plan", "plan.json", "--seed", "-1"], "--seed -1: "),
        (["--plan", "plan.json", "--seed", "99999999999999999999"], "--seed 99999999999999999999: "),
        (["--plan", "plan.json", "--learning-rate", "inf"], "--learning-rate inf: "),
        (["--plan", "plan.json", "--strategy", "small,slt", "--rounds", "3"], "3 rounds for a schedule of"),
        (["--plan", "plan.json", "--out", "plan.json"], "plan.json exists"),
        (["--plan", "plan.json", "--out", "plan.json/run"], "plan.json/run"),
        (["--plan", "plan.json", "--out", "plan.json", "--force"], "plan.json"),
        ([], "--plan"),
    ],
)
def test_slt_train_refuses_in_one_line(command, plan, tmp_path, words, message):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "empty.json").write_text("{}")
    write_images(tmp_path / "small", "train", [0, 1, 2] * 8, size=16)
    write_images(tmp_path / "small", "test", [0, 1, 2], size=16)
    write_images(tmp_path / "labels", "train", [0, 10] * 8)
    write_images(tmp_path / "labels", "test", [0, 1])
    before = sorted(tmp_path.rglob("*"))
    done = command("slt-train", *words)
    assert done.code == 2
    assert message in done.err
    assert done.err.splitlines()[-1].startswith("slt-train: error: ")
    assert "Traceback" not in done.err
    assert sorted(tmp_path.rglob("*")) == before


def test_forcing_a_run_replaces_what_was_there_and_a_refused_one_keeps_it(command, plan, images, tmp_path):
    words = ["slt-train", "--plan", plan, "--dataset", "parquet:images", "--clients", "3", "--cohort-size", "1"]
    words += ["--out", "x[/b] run"]  # what looks like markup is a name
    done = command(*words, "--strategy", "small,slt", "--rounds", "14")
    assert done.code == 0, done.err
    folder = tmp_path / "x[/b] run"
    (folder / "notes.txt").write_text("mine")
    (folder / "another").mkdir()  # somebody else's folder, with a file of the same name as ours
    (folder / "another" / "config.json").write_text("{}")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refused = command(*words, "--strategy", "slt", "--rounds", "3", "--force")
    assert refused.code == 2
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    forced = command(*words, "--strategy", "small", "--rounds", "2", "--force")
    assert forced.code == 0, forced.err
    assert "Written: x[/b] run/" in forced.out
    assert sorted(path.name for path in folder.iterdir()) == [
        "accuracy.png",
        "another",
        "config.json",
        "metrics.jsonl",
        "notes.txt",
        "report.csv",
        "report.html",
        "report.md",
        "report.tex",
        "split.safetensors",
        "tensorboard",
        "weights.safetensors",
    ]
    assert (folder / "another" / "config.json").read_text() == "{}"
    assert len(load_run(folder).rows) == 2


def test_a_report_of_what_is_no_run_says_what_is_wrong(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    for text, words in [
        ("[]", "not a valid run: "),
        ("{}", "settings: Field required (and "),
        ("{", "not a valid run ("),
    ]:
        (tmp_path / "run" / "config.json").write_text(text)
        done = command("slt", "report", "run", "-o", "x.html")
        assert done.code == 2
        assert words in done.err
        assert done.err.count("\n") == 1


def test_a_plan_of_another_network_is_refused(command, plan, tmp_path):
    data = json.loads(plan.read_text())
    data["model"]["name"] = "resnet20_pad"
    plan.write_text(json.dumps(data))
    assert "the model is not the plan's" in command("slt-train", "--plan", "plan.json").err
    data["model"]["name"] = "os.system:x"
    plan.write_text(json.dumps(data))
    assert "the plan's model is your own code, os.system:x" in command("slt-train", "--plan", "plan.json").err


def test_ctrl_c_leaves_a_run_folder_that_can_be_read(plan, tmp_path):
    script = "import sys; from slt_planner.cli.main import slt_train; sys.argv[0] = 'slt-train'; slt_train()"
    words = ["--plan", "plan.json", "--rounds", "500", "--clients", "100", "--cohort-size", "1", "--out", "run"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    run = load_run(tmp_path / "run")
    assert run.status == "stopped"
    assert len(run.rows) >= 2
    assert f"stopped after round {len(run.rows)} of 500" in err.splitlines()[-1]
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "weights.safetensors").exists()


@pytest.mark.parametrize("entry", ["slt", "slt_plan", "slt_train"])
def test_help_fits_a_terminal_and_needs_no_torch(entry):
    code = (
        f"import sys; from slt_planner.cli.main import {entry}; sys.argv = ['{entry}', '--help']\n"
        f"try: {entry}()\nexcept SystemExit as e: assert not e.code\nassert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "Usage: " in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert callable(getattr(main, entry))
