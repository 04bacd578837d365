"""slt-train with several seeds, and runs that are killed and resumed, as a user does it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import torch

from slt_planner.config import StepSpec, Tier
from slt_planner.federated.result import TIMING_FIELDS
from slt_planner.federated.run_folder import load_run
from slt_planner.graph.trace import trace
from slt_planner.models.registry import load_model
from slt_planner.planning.solve import solve

SCRIPT = "import sys; from slt_planner.cli.main import slt_train; sys.argv[0] = 'slt-train'; slt_train()"
WORDS = ("--plan", "plan.json", "--rounds", "6", "--cohort-size", "3", "--client-dropout", "0.2")


@pytest.fixture(scope="module")
def made_plan(tmp_path_factory):
    """The two-convolution network on 8x8 digits, in less than the 2.8 MB that it needs."""
    path = tmp_path_factory.mktemp("planned") / "plan.json"
    spec = StepSpec(batch_size=16, threads=1)
    solve(trace(load_model("convnet", 10, (1, 8, 8)), (1, 8, 8)), ["2.5MB"], spec, "convnet").save(path)
    return path


@pytest.fixture
def plan(made_plan, tmp_path):
    return shutil.copy(made_plan, tmp_path / "plan.json")


def started(folder, *words):
    """The command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *words], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )


def timeless(folder):
    """What a run left, without times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    settings = json.loads((folder / "config.json").read_text())
    weights = (folder / "weights.safetensors").read_bytes()
    return [{k: v for k, v in row.items() if k not in TIMING_FIELDS} for row in rows], settings, weights


def test_several_strategies_and_seeds_in_one_command(command, plan, tmp_path):
    words = ["--strategy", "slt,small", "--seed", "4", "--seeds", "2", "--evaluate-every", "4"]
    done = command("slt-train", *WORDS, *words, "--rounds-policy", "plateau", "--out", "run")
    assert done.code == 0, done.err
    folders = sorted(path.parent.name for path in (tmp_path / "run").glob("*/config.json"))
    assert folders == ["slt-seed4", "slt-seed5", "small-seed4", "small-seed5"]
    runs = [load_run(tmp_path / "run" / name) for name in folders]
    assert [run.settings.rounds_policy for run in runs] == ["plateau", "plateau", "planned", "planned"]
    for run in runs:
        assert [row.round for row in run.rows if row.accuracy is not None] == [4, 6]
    assert runs[0].rows[0].train_loss != runs[1].rows[0].train_loss
    assert "mean" in done.out
    assert "slt-seed4 round 1/6  stage 0" in done.err
    assert "training loss" in done.err
    alone = command("slt-train", *WORDS, "--seed", "5", "--evaluate-every", "4", "--strategy", "small", "--out", "one")
    assert alone.code == 0, alone.err
    assert timeless(tmp_path / "one") == timeless(tmp_path / "run" / "small-seed5")


def runs(process):
    """Whether a process is there, and not only its number."""
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_for(file, lines, process):
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_bytes().count(b"\n") >= lines):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)


def test_resuming_a_folder_of_runs_after_kill_9(command, plan, tmp_path):
    words = [*WORDS, "--seeds", "2", "--rounds", "12"]
    whole = command("slt-train", *words, "--out", "whole")
    assert whole.code == 0, whole.err
    process = started(tmp_path, *words, "--out", "run")
    wait_for(tmp_path / "run" / "slt-seed0" / "metrics.jsonl", 3, process)
    process.kill()
    process.communicate()
    assert load_run(tmp_path / "run" / "slt-seed0").status == "stopped"
    assert load_run(tmp_path / "run" / "slt-seed1").rows == ()  # is there, though its turn had not come
    done = command("slt-train", "--resume", "run")
    assert done.code == 0, done.err
    assert "run/slt-seed0: goes on, " in done.err
    assert "run/slt-seed1: goes on, 0 of 12 rounds were done" in done.err
    for name in ("slt-seed0", "slt-seed1"):
        assert timeless(tmp_path / "run" / name) == timeless(tmp_path / "whole" / name)
    assert (tmp_path / "run" / "report.html").exists()
    again = command("slt-train", "--resume", "run")
    assert again.code == 0
    assert "run/slt-seed1: finished after 12 rounds, nothing is left to do" in again.err


@pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="workers are forked, on Linux and without a GPU"
)
def test_kill_9_ends_the_workers_and_the_run_goes_on_to_the_same_end(command, plan, tmp_path):
    words = [*WORDS, "--rounds", "12", "--workers", "2"]
    assert command("slt-train", *words[:-2], "--out", "alone").code == 0
    process = started(tmp_path, *words, "--out", "run")
    own = psutil.Process(process.pid)
    wait_for(tmp_path / "run" / "metrics.jsonl", 2, process)
    workers = []
    while not workers:  # there are some most of the time: they live as long as a round's training
        workers = own.children()
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while any(map(runs, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    done = command("slt-train", "--resume", "run")
    assert done.code == 0, done.err
    (rows, _, weights), (rows_alone, _, weights_alone) = timeless(tmp_path / "run"), timeless(tmp_path / "alone")
    assert rows == rows_alone
    assert weights == weights_alone


@pytest.mark.slow
def test_kill_9_at_ten_random_moments_of_the_command(command, plan, tmp_path):
    words = [*WORDS, "--rounds", "40", "--checkpoint-every", "3"]
    whole = started(tmp_path, *words, "--out", "whole")
    _, err = whole.communicate()
    assert whole.returncode == 0, err
    # Of the rounds and the end; a process that is killed before has nothing to resume.
    duration = (tmp_path / "whole/report.html").stat().st_mtime - (tmp_path / "whole/split.safetensors").stat().st_mtime
    chance, figures = random.Random(7), []
    for number in range(10):
        folder = tmp_path / f"run-{number}"
        process = started(tmp_path, *words, "--out", folder.name)
        wait_for(folder / "split.safetensors", 0, process)
        time.sleep(chance.uniform(0, duration))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        figures.append((folder / "metrics.jsonl").read_text().count("\n"))
        resumed = command("slt-train", "--resume", folder.name)
        assert resumed.code == 0, resumed.err
        assert timeless(folder) == timeless(tmp_path / "whole")
    print("rounds that were there after kill -9:", figures)


def test_what_was_not_used_and_who_sat_out_is_told(command, tmp_path):
    graph = trace(load_model("convnet", 10, (1, 8, 8)), (1, 8, 8))
    tiers = [Tier(name="tiny", budget_bytes=1000, share=0.3), Tier(name="roomy", budget_bytes=10**9, share=0.7)]
    solve(graph, tiers, StepSpec(batch_size=16, threads=1), "convnet").save(tmp_path / "plan.json")
    words = [
        "--plan",
        "plan.json",
        "--rounds",
        "3",
        "--strategy",
        "slt,small",
        "--learning-rate",
        "1e20",
        "--local-batch",
        "4",
    ]
    done = command("slt-train", *words, "--learning-rate", "1e20", "--out", "run")
    assert done.code == 0, done.err
    for name in ("slt", "small"):
        assert f"{name}: 3 of 10 clients sit out (tiny): nothing of the method fits them" in done.err
    told = " ".join(done.out.split())
    assert "slt-seed0: 21 updates refused (most often: its training loss is not finite)" in told
    assert "no update was used in 3 of 3 rounds" in told
    page = (tmp_path / "run" / "report.html").read_text()
    assert "3 of 10 clients sit out (tiny)" in page
    assert "Measured: allocator ruler, CPU, batch 4," in page  # at which clients trained
    assert "no update was used in 3 of 3 rounds" in page


@pytest.mark.parametrize(
    ("words", "needed"),
    [(["--deadline", "3"], "--engine flower"), (["--plateau-patience", "3"], "--rounds-policy plateau")],
)
def test_options_that_would_say_nothing_are_refused(command, plan, words, needed):
    done = command("slt-train", *WORDS, *words)
    assert done.code == 2
    assert f"{words[0]} says nothing without {needed}" in done.err


@pytest.fixture
def stopped(command, plan, tmp_path, monkeypatch):
    """A run that Ctrl-C ended after two of its rounds."""
    from slt_planner.cli.live import LiveRounds

    show = LiveRounds.show

    def interrupt(self, row):
        show(self, row)
        if row.round == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LiveRounds, "show", interrupt)
        done = command("slt-train", *WORDS, "--out", "run")
    assert done.code == 1
    assert done.err.endswith("slt-train: error: stopped after round 2 of 6; go on with slt-train --resume run\n")
    return tmp_path / "run"


def test_ctrl_c_and_resume_come_to_the_same_end(command, stopped, tmp_path):
    assert command("slt-train", *WORDS, "--out", "whole").code == 0
    done = command("slt-train", "--resume", "run", "--json")
    assert done.code == 0, done.err
    assert [run["status"] for run in json.loads(done.out)] == ["finished"]
    assert "run: goes on, 2 of 6 rounds were done" in done.err
    assert timeless(stopped) == timeless(tmp_path / "whole")


def test_what_does_not_go_with_resume_is_refused_in_one_line(command, stopped, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(stopped, cut)
    state = cut / "checkpoint" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    (tmp_path / "empty").mkdir()
    for words, message in [
        (["--resume", "run", "--rounds", "9"], "--rounds does not go with --resume: run goes on as it was begun, see "),
        (["--resume", "run", "--plan", "plan.json"], "--plan does not go with --resume"),
        (["--resume", "run", "--strategy", "slt"], "--strategy does not go with --resume"),
        (["--resume", "run", "--force"], "--force does not go with --resume"),
        (["--resume", "run", "--out", "x"], "--out does not go with --resume"),
        (["--resume", "run", "--model", "vgg9"], "the model is not the plan's: it has "),
        (["--resume", "none"], "none: no run to go on with; give a run folder, one with a config.json"),
        (["--resume", "empty"], "empty: no run to go on with"),
        (["--resume", "plan.json"], "plan.json: no run to go on with"),
        (["--resume", "cut"], "cut/checkpoint/state.safetensors: not a checkpoint ("),
        ([], "--plan is needed, a plan made by slt-plan; or --resume, a run to go on with"),
        (["--plan", "plan.json", "--client-dropout", "1"], "--client-dropout 1.0: "),
        (["--plan", "plan.json", "--stragglers", "-0.1"], "--stragglers -0.1: "),
        (["--plan", "plan.json", "--max-change", "1"], "--max-change 1.0: "),
        (["--plan", "plan.json", "--rounds-policy", "x"], "--rounds-policy 'x': known are planned, plateau"),
        (["--plan", "plan.json", "--rounds-policy", "plateau", "--strategy", "small"], "for stages; small has none"),
        (["--plan", "plan.json", "--rounds-policy", "plateau", "--plateau-patience", "0"], "--plateau-patience 0: "),
        (
            ["--plan", "plan.json", "--rounds-policy", "plateau", "--plateau-threshold", "nan"],
            "--plateau-threshold nan: ",
        ),
        (["--plan", "plan.json", "--seed", "4294967295", "--seeds", "2"], "--seed 4294967296: "),
        (["--plan", "plan.json", "--seeds", "0"], "--seeds"),
        (["--plan", "plan.json", "--checkpoint-every", "0"], "--checkpoint-every"),
        (["--plan", "plan.json", "--evaluate-every", "0"], "--evaluate-every"),
        (["--plan", "plan.json", "--prefix-cache", "9"], "memory budget '9' has no unit"),
        (
            ["--plan", "plan.json", "--prefix-cache", "9MB", "--enforce"],
            "a client under an enforced budget does not have",
        ),
        (["--plan", "plan.json", "--prefix-cache", "9MB", "--workers", "2"], "workers end with each round"),
        (
            ["--plan", "plan.json", "--prefix-cache", "9MB", "--engine", "flower"],
            "--prefix-cache is of the local engine",
        ),
        (["--plan", "plan.json", "--batched-clients", "2", "--enforce"], "an enforced budget is of one"),
        (["--plan", "plan.json", "--batched-clients", "2", "--workers", "2"], "neither with workers nor"),
        (["--plan", "plan.json", "--batched-clients", "2", "--engine", "flower"], "--batched-clients is of the local"),
        (["--plan", "plan.json", "--device", "cuda", "--engine", "flower"], "--device is of the local engine"),
        (["--plan", "plan.json", "--device", "tpu"], "--device 'tpu': known are cpu, cuda"),
    ]:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        done = command("slt-train", *words)
        assert done.code == 2, words
        assert message in done.err
        assert done.err.splitlines()[-1].startswith("slt-train: error: ")
        assert "Traceback" not in done.err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
