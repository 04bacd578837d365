"""Runs that end before their end and go on, and what a checkpoint is worth."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from slt_planner.errors import InputError
from slt_planner.federated import experiment
from slt_planner.federated.checkpoint import load_checkpoint, save_checkpoint
from slt_planner.federated.experiment import begin_run, continue_run, resume, run_experiment
from slt_planner.federated.progress import Holders, Plateau, Progress
from slt_planner.federated.result import TIMING_FIELDS
from slt_planner.federated.run_folder import RunFolder, load_run
from slt_planner.federated.setup import load_network, prepare
from slt_planner.federated.strategies.base import ServerState, init
from slt_planner.federated.tensorboard_log import scalars
from slt_planner.graph.trace import trace
from slt_planner.planning.solve import solve
from tests.unit import tiny_runs
from tests.unit.tiny_runs import GRAPH, SPEC, network, prepared

STATE = "checkpoint/state.safetensors"


def assert_same_run(one, other):
    """Two run folders of the same settings, to the bit but for times."""
    assert (one / "weights.safetensors").read_bytes() == (other / "weights.safetensors").read_bytes()
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, other)
    ]
    timeless = [[{k: v for k, v in row.items() if k not in TIMING_FIELDS} for row in run] for run in rows]
    assert timeless[0] == timeless[1]
    assert (one / "config.json").read_text() == (other / "config.json").read_text()
    for folder in (one, other):
        assert sorted(path.name for path in folder.iterdir()) == [
            "config.json",
            "metrics.jsonl",
            "split.safetensors",
            "tensorboard",
            "weights.safetensors",
        ]
        assert_logged_once(folder)


def assert_logged_once(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    rows = load_run(folder).rows
    assert set(events.Tags()["scalars"]) == set().union(*(scalars(row) for row in rows))
    for name in events.Tags()["scalars"]:
        wanted = [(row.round, scalars(row)[name]) for row in rows if name in scalars(row)]
        found = [(point.step, point.value) for point in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted])


@pytest.mark.parametrize("moments", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_end(tmp_path, moments):
    words = [sys.executable, "-m", "tests.killed_runs", str(tmp_path), "7", str(moments)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for number in range(moments):
        assert_same_run(tmp_path / "whole", tmp_path / f"killed-{number}")


class CrashError(Exception):
    """As if the process had died."""


def crash_after(number):
    def progress(row):
        if row.round == number:
            raise CrashError

    return progress


@pytest.fixture
def whole(tmp_path):
    run_experiment(prepared(tiny_runs.scheduled_plan(), tiny_runs.dataset(), checkpoint_every=4), tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def begun():
    return prepared(tiny_runs.scheduled_plan(), tiny_runs.dataset(), checkpoint_every=4)


@pytest.mark.parametrize("last", [3, 4, 5])
def test_rounds_past_the_checkpoint_are_dropped_and_made_again(whole, begun, tmp_path, last):
    folder = tmp_path / "run"
    with pytest.raises(CrashError):
        run_experiment(begun, folder, progress=crash_after(last))
    assert len(load_run(folder).rows) == last
    assert (folder / STATE).exists() == (last >= 4)
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"round": 6, "sta')  # the crash came in the middle of a line
    (folder / "checkpoint").mkdir(exist_ok=True)
    (folder / "checkpoint" / ".state.safetensors.x1y2").write_bytes(b"half a check")  # and of a checkpoint
    (folder / ".config.json.x1y2").write_bytes(b"{")
    made = []
    result = continue_run(begun, folder, progress=lambda row: made.append(row.round))
    assert made == list(range(1 if last < 4 else 5, 7))
    assert result == load_run(folder)
    assert result.status == "finished"
    assert_same_run(whole, folder)


def test_an_interrupted_run_goes_on_after_its_last_round(whole, begun, tmp_path):
    def interrupt(row):
        if row.round == 2:
            raise KeyboardInterrupt

    stopped = run_experiment(begun, tmp_path / "run", progress=interrupt)
    assert stopped.status == "stopped"
    assert (tmp_path / "run" / "weights.safetensors").exists()
    made = []
    continue_run(begun, tmp_path / "run", progress=lambda row: made.append(row.round))
    assert made == [3, 4, 5, 6]
    assert_same_run(whole, tmp_path / "run")


def test_a_run_that_was_stopped_while_it_was_judged_is_judged_again(whole, begun, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "judge", interrupt)
        assert run_experiment(begun, tmp_path / "run").status == "stopped"
    continue_run(begun, tmp_path / "run")
    assert_same_run(whole, tmp_path / "run")


def test_a_finished_run_is_left_as_it_is(whole):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert resume(whole) == load_run(whole)
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_a_run_of_a_network_that_was_given_goes_on_only_with_it(tmp_path, monkeypatch):
    """resume() finds plan and settings in the folder; the network, which is not a library's, is given again."""
    monkeypatch.setattr(experiment, "load_data", lambda *_: tiny_runs.dataset())
    begun = prepared(tiny_runs.full_plan(), tiny_runs.dataset())
    run_experiment(begun, tmp_path / "whole")
    with pytest.raises(CrashError):
        run_experiment(begun, tmp_path / "run", progress=crash_after(3))
    with pytest.raises(InputError, match="the plan names no model; pass the network it was made for"):
        resume(tmp_path / "run")
    with pytest.raises(InputError, match=r"the model is not the plan's: its unit 2 is 2, planned was 3"):
        resume(tmp_path / "run", nn.Sequential(*list(network())[:2], *list(network())[3:]))
    resume(tmp_path / "run", network(seed=5))  # its weights are those of the checkpoint
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.fixture
def crashed(begun, tmp_path):
    with pytest.raises(CrashError):
        run_experiment(begun, tmp_path / "run", progress=crash_after(5))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), r"state.safetensors: not a checkpoint \("),
        (lambda path: path.write_bytes(b""), r"state.safetensors: not a checkpoint \("),
        (lambda path: save_file({"x": torch.zeros(2)}, path), "not a checkpoint: Invalid JSON"),
        (
            lambda path: save_file(load_file(path), path, metadata={"checkpoint": '{"round": -1, "progress": {}}'}),
            "not a checkpoint: round: Input should be greater",
        ),
        (
            lambda path: save_file(load_file(path), path, metadata={"checkpoint": '{"round": 40, "progress": {}}'}),
            "metrics.jsonl has 5 rounds, but the checkpoint is of round 40",
        ),
        (
            lambda path: save_file(
                {**load_file(path), "8.bias": torch.zeros(4)},
                path,
                metadata={"checkpoint": '{"round": 4, "progress": {}}'},
            ),
            "8.bias is not the run's network's",
        ),
    ],
)
def test_a_checkpoint_that_is_none_is_refused_and_nothing_is_lost(crashed, begun, spoil, words):
    spoil(crashed / STATE)
    before = {path: path.read_bytes() for path in crashed.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=words) as caught:
        continue_run(begun, crashed)
    assert "\n" not in str(caught.value)
    assert "the run begins again at its first round" in str(caught.value)
    assert {path: path.read_bytes() for path in crashed.rglob("*") if path.is_file()} == before


def test_another_run_is_not_continued_in_this_folder(crashed, begun):
    def continued(**changes):
        plan = changes.pop("plan", tiny_runs.scheduled_plan())
        continue_run(prepared(plan, changes.pop("data", tiny_runs.dataset()), checkpoint_every=4, **changes), crashed)

    with pytest.raises(InputError, match="not the one that was begun here: it has other settings"):
        continued(seed=4)
    with pytest.raises(InputError, match="it has another plan"):
        continued(plan=tiny_runs.full_plan())
    data = tiny_runs.dataset()
    fewer = type(data)(**{**vars(data), "test_images": data.test_images[:9], "test_labels": data.test_labels[:9]})
    with pytest.raises(InputError, match=r"its data set has changed \(test images: 23 then, 9 now\)"):
        continued(data=fewer)
    other = type(data)(**{**vars(data), "mean": (0.5, 0.4, 0.4)})  # as many images, but not the same ones
    with pytest.raises(InputError, match="its data set has changed"):
        continued(data=other)


def test_one_process_at_a_time(crashed, begun):
    with RunFolder(crashed).alone(), pytest.raises(InputError, match="another process is at work on it"):
        continue_run(begun, crashed)
    assert continue_run(begun, crashed).status == "finished"


def test_forcing_a_new_run_leaves_nothing_of_the_old_one(crashed, begun):
    begin_run(begun, crashed, force=True)
    assert sorted(path.name for path in crashed.iterdir()) == ["config.json", "metrics.jsonl"]
    assert load_run(crashed).rows == ()


class SharedWeights(nn.Module):
    """Images in, with two layers that share their weight."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(8, 3)
        self.two.weight = self.one.weight

    def forward(self, x):
        seen = [self.one(x), self.two(x.flip(-1))]
        return self.last(torch.cat([part.relu().mean((2, 3)) for part in seen], 1))


def test_a_state_is_the_same_after_the_disk(tmp_path):
    progress = Progress(
        plateau=Plateau(stage=2, best_loss=0.1 + 0.2, waited=1),
        holders=Holders(stage=2, depth=1, clients=(3, 10**6)),
        recent_changes=(1 / 3, 5e-324, 1e300),
    )
    for graph, model in ((GRAPH, network()), (trace(SharedWeights(), (3, 16, 16)), SharedWeights())):
        start = init(model)
        weights = {name: torch.full_like(value, -0.0) + value for name, value in start.weights.items()}
        state = ServerState(7, {**weights, **{n: weights[graph.first_name(n)] for n in weights}}, progress)
        save_checkpoint(tmp_path, graph, state)
        again = load_checkpoint(tmp_path, graph, start)
        assert (again.round, again.progress) == (7, progress)
        assert list(again.weights) == list(start.weights)
        for name, value in state.weights.items():
            assert again.weights[name].numpy().tobytes() == value.numpy().tobytes()
    shutil.rmtree(tmp_path / "checkpoint")
    assert load_checkpoint(tmp_path, GRAPH, init(network())) is None


def test_a_network_with_shared_weights_can_be_run_and_saved(tmp_path):
    plan = solve(trace(SharedWeights(), (3, 16, 16)), ["1GB"], SPEC)
    run = prepare(plan, tiny_runs.settings_of(rounds=2), tiny_runs.dataset(), load_network(plan, 0, SharedWeights()))
    run_experiment(run, tmp_path / "run")
    weights = load_file(tmp_path / "run" / "weights.safetensors")
    assert torch.equal(weights["one.weight"], weights["two.weight"])
