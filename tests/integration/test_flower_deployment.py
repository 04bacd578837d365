"""A real deployment on loopback: a SuperLink and SuperNodes as processes, some of them killed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from uuid import uuid4

import pytest

pytest.importorskip("flwr")
pytest.importorskip("ray")

from flwr.app import Error

from slt_planner.config import StepSpec
from slt_planner.federated.engines.flower.app_folder import OF_ONE_MACHINE, write_app
from slt_planner.federated.engines.flower.client import client_app
from slt_planner.federated.engines.flower.options import FlowerOptions
from slt_planner.federated.engines.flower.processes import LocalFederation
from slt_planner.federated.engines.flower.server import serve
from slt_planner.federated.engines.flower.simulation import simulate
from slt_planner.federated.engines.flower.warden import end_marked, marked
from slt_planner.federated.experiment import begin_run, run_experiment
from slt_planner.federated.result import TIMING_FIELDS, RunSettings
from slt_planner.federated.run_folder import METRICS, load_run
from slt_planner.federated.setup import load_data, load_network, prepare
from slt_planner.graph.trace import trace
from slt_planner.models.registry import load_model
from slt_planner.planning.plan import load_plan
from slt_planner.planning.solve import solve
from tests.in_process_grid import InProcessGrid

pytestmark = pytest.mark.flower

SPEC = StepSpec(batch_size=16, threads=1)
OPTIONS = FlowerOptions(deadline_s=300)
LONGEST_S = 400
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
PROGRAMS = {"flower-superlink", "flower-supernode", "flower-superexec", "flwr-serverapp", "flwr-clientapp"}
GONE, LATE, FAILED = Error(5), None, Error(2)

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="only Linux tells whose processes run")


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    graph = trace(load_model("resnet20", 10, (3, 8, 8)), (3, 8, 8))
    plan = solve(graph, ["1GB"], SPEC, verify=False)
    plan.model_copy(update={"model": plan.model.model_copy(update={"name": "resnet20"})}).save(path)
    return path


def app_of(folder, plan, options=OPTIONS, **changes):
    values = {"strategy": "slt", "dataset": "digits", "rounds": 3, "local_batch": 16, "seed": 1, **changes}
    settings = RunSettings(**values)
    write_app(folder / "app", plan, folder / "run", settings, options, "")
    return folder / "app", settings


def wait_until(happened):
    """Until it has happened, which it must; gives what it came to."""
    until = time.monotonic() + LONGEST_S
    while not (came := happened()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return came


def wait_for(federation, run_id, happened):
    """As `wait_until`, while a run goes on."""

    def looked():
        if not (came := happened()):
            status = federation.status(run_id)
            assert status.ended is None, status.details
        return came

    return wait_until(looked)


def rows_in(folder: Path) -> int:
    return (folder / METRICS).read_text().count("\n") if (folder / METRICS).exists() else 0


def in_process(folder, plan, settings, missing):
    """The same run on nodes in this process; `missing` has what comes instead of a client's update, by round."""

    def spoil(node_id, message, reply):
        return missing.get((node_id - 100, message.metadata.group_id), reply)

    grid = InProcessGrid(client_app(), [{"partition-id": c} for c in range(settings.clients)], spoil)
    config = {"plan": str(plan), "out": str(folder / "run"), "deadline-s": 0.05}
    config |= {
        name.replace("_", "-"): value
        for name, value in settings.model_dump(exclude=OF_ONE_MACHINE).items()
        if value is not None
    }
    return serve(grid, config)


def comparable(row):
    of_clients = {"absent", "dropped_out", "stragglers", "refused", "refusals"}
    return row.model_dump(exclude={*TIMING_FIELDS, *of_clients, "measured_peak_bytes"})


def assert_the_same_run(tmp_path, plan, settings, missing=MappingProxyType({})):
    """To the bit what the same clients come to in one process; gives the run. `missing` as `in_process`."""
    result = load_run(tmp_path / "run")
    assert result.status == "finished"
    again = in_process(tmp_path / "again", plan, settings, missing)
    assert [comparable(row) for row in result.rows] == [comparable(row) for row in again.rows]
    weights = "run/weights.safetensors"
    assert (tmp_path / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()
    return result


def absent_in(result):
    return [[(own.client, own.reason) for own in row.absent] for row in result.rows]


def command_of(pid):
    """The command line of a process; of one that has ended, nothing."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def training_of(federation, number):
    """The processes in which a SuperNode's client trains, a new one in each round: those with torch in them."""
    found = set()
    for pid in federation.processes():
        with suppress(OSError):
            ours = "flwr-clientapp" in command_of(pid) and f"partition-id={number} " in command_of(os.getpgid(pid))
            if ours and "libtorch" in Path(f"/proc/{pid}/maps").read_text():
                found.add(pid)
    return found


def one_training(federation, run_id, folder, number):
    """The process of a SuperNode's client in the second round."""
    wait_for(federation, run_id, lambda: rows_in(folder))
    before = training_of(federation, number)  # which may not quite have ended
    (pid,) = wait_until(lambda: training_of(federation, number) - before)  # look often: it trains for seconds
    return pid


def counts_of(result):
    return [(row.dropped_out, row.stragglers, row.refused) for row in result.rows]


def test_a_federation_goes_on_without_a_node_that_is_killed(tmp_path, plan, one_thread):
    app, settings = app_of(tmp_path, plan, clients=3, cohort_size=3)
    with LocalFederation(tmp_path, 3, ENVIRONMENT) as federation:
        run_id = federation.submit(app)
        wait_for(federation, run_id, lambda: rows_in(tmp_path / "run"))
        federation.kill("node2")
        assert federation.wait(run_id, LONGEST_S).ended == "completed"
        mine = federation.processes()
        assert len(mine) > 3
    assert federation.processes() == []
    result = assert_the_same_run(tmp_path, plan, settings, {(2, "2"): GONE, (2, "3"): GONE})
    assert counts_of(result) == [(0, 0, 0), (1, 0, 0), (1, 0, 0)]
    assert absent_in(result) == [[], [(2, "its node is gone")], [(2, "its node is not connected")]]


@pytest.mark.slow
def test_a_node_that_was_killed_and_comes_back_takes_its_place(tmp_path, plan, one_thread):
    app, settings = app_of(tmp_path, plan, clients=3, cohort_size=3, rounds=4)
    with LocalFederation(tmp_path, 3, ENVIRONMENT) as federation:
        run_id = federation.submit(app)
        wait_for(federation, run_id, lambda: "ROUND 2]" in federation.log("node2"))
        federation.kill("node2")
        federation.start_node(2)
        assert federation.wait(run_id, LONGEST_S).ended == "completed"
    result = assert_the_same_run(tmp_path, plan, settings, {(2, "2"): GONE})
    assert absent_in(result) == [[], [(2, "its node is gone")], [], []]
    assert counts_of(result) == [(0, 0, 0), (1, 0, 0), (0, 0, 0), (0, 0, 0)]


@pytest.mark.slow
@needs_proc
def test_clients_that_fail_are_refused_by_name(tmp_path, plan, one_thread):
    app, settings = app_of(tmp_path, plan, clients=3, cohort_size=3)
    with LocalFederation(tmp_path, 2, ENVIRONMENT) as federation:
        federation.start_node(2, dataset="imagefolder:nowhere")
        run_id = federation.submit(app)
        os.kill(one_training(federation, run_id, tmp_path / "run", 1), signal.SIGKILL)
        assert federation.wait(run_id, LONGEST_S).ended == "completed"
    missing = {(1, "2"): FAILED, **dict.fromkeys([(2, "1"), (2, "2"), (2, "3")], FAILED)}
    result = assert_the_same_run(tmp_path, plan, settings, missing)
    assert counts_of(result) == [(0, 0, 1), (0, 0, 2), (0, 0, 1)]
    killed = result.rows[1].refusals[0]
    assert (killed.client, killed.reason) == (1, "its process was killed")
    raised = [row.refusals[-1] for row in result.rows]
    assert [own.client for own in raised] == [2, 2, 2]
    assert all("InputError" in own.reason and "nowhere" in own.reason for own in raised)


@pytest.mark.slow
@needs_proc
def test_a_client_that_is_late_is_a_straggler_and_takes_part_again(tmp_path, plan, one_thread):
    late = 50  # seconds; after 65 without a sign of life Flower takes a process for dead
    app, settings = app_of(tmp_path, plan, FlowerOptions(deadline_s=late), clients=2, cohort_size=2)
    with LocalFederation(tmp_path, 2, ENVIRONMENT) as federation:
        run_id = federation.submit(app)
        slow = one_training(federation, run_id, tmp_path / "run", 1)
        os.kill(slow, signal.SIGSTOP)
        wait_for(federation, run_id, lambda: rows_in(tmp_path / "run") == 2)
        os.kill(slow, signal.SIGCONT)
        assert federation.wait(run_id, LONGEST_S).ended == "completed"
    result = assert_the_same_run(tmp_path, plan, settings, {(1, "2"): LATE})
    assert absent_in(result) == [[], [(1, f"no answer within {late} s")], []]
    assert counts_of(result) == [(0, 0, 0), (0, 1, 0), (0, 0, 0)]
    assert result.rows[1].seconds > late


def kill_superlink(federation):
    """Kill the SuperLink, and start it again."""
    port = int(federation.address.rpartition(":")[2])
    federation.kill("superlink")
    federation.start_superlink(port)


def kill_server_app(federation):
    """Kill the process that makes the run."""
    (pid,) = [pid for pid in federation.processes() if "flwr-serverapp" in command_of(pid)]
    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [kill_superlink, pytest.param(kill_server_app, marks=needs_proc)])
def test_a_run_goes_on_after_its_server_was_killed(tmp_path, plan, one_thread, kill):
    app, settings = app_of(tmp_path, plan, clients=2, cohort_size=2)
    with LocalFederation(tmp_path, 2, ENVIRONMENT) as federation:
        run_id = federation.submit(app)
        wait_for(federation, run_id, lambda: rows_in(tmp_path / "run"))
        kill(federation)
        assert federation.wait(run_id, LONGEST_S).ended == "failed"
        run_id = federation.submit(app, "resume=true")
        assert federation.wait(run_id, LONGEST_S).ended == "completed"
    assert_the_same_run(tmp_path, plan, settings)


@pytest.mark.slow
def test_a_run_without_clients_stops_and_goes_on_when_they_are_there(tmp_path, plan, one_thread):
    app, settings = app_of(tmp_path, plan, clients=1, cohort_size=1, rounds=1)
    with LocalFederation(tmp_path, 0, ENVIRONMENT) as federation:
        status = federation.wait(federation.submit(app, "wait-s=2"), LONGEST_S)
        assert status.ended == "failed"
        assert "0 of 1 clients are connected after 2 s" in status.details
        federation.start_node(0)
        assert federation.wait(federation.submit(app, "resume=true"), LONGEST_S).ended == "completed"
    assert_the_same_run(tmp_path, plan, settings)


@pytest.fixture
def local_command():
    """`slt flower local` as a process, and what to find all processes with that come of it; they end with the test."""
    mark = f"SLT_TEST={uuid4().hex}"
    environment = {**os.environ, **ENVIRONMENT, **dict([mark.split("=")])}
    began = []

    def start(*words):
        code = "from slt_planner.cli.scripts import slt; slt()"
        command = [sys.executable, "-c", code, "flower", "local", *map(str, words)]
        began.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        return began[-1]

    yield start, lambda: marked(mark)
    for process in began:
        process.kill()
        process.wait()
    end_marked(mark)


def programs_of(pids):
    """The programs of Flower that run as these processes."""
    words = {Path(word).name for pid in pids for word in command_of(pid).split()[:2]}
    return {name for name in words if name.startswith(("flwr-", "flower-"))}


def kill_when(happened, command, started, app):
    """Run an app and kill the command; nothing that it has started is left."""
    process = command(app)
    wait_until(lambda: happened() or process.poll() is not None)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    wait_until(lambda: not started())


@needs_proc
def test_all_processes_end_with_a_command_that_is_killed(tmp_path, plan, local_command):
    app, _ = app_of(tmp_path, plan, clients=1, cohort_size=1)
    command, started = local_command
    kill_when(lambda: programs_of(started()) >= PROGRAMS, command, started, app)


@pytest.mark.slow
@needs_proc
def test_a_command_that_was_killed_goes_on(tmp_path, plan, local_command, one_thread):
    app, settings = app_of(tmp_path, plan, clients=2, cohort_size=2)
    command, started = local_command
    kill_when(lambda: rows_in(tmp_path / "run"), command, started, app)
    assert command(app, "--resume").wait(LONGEST_S) == 0
    assert started() == []
    assert_the_same_run(tmp_path, plan, settings)


def children():
    """The command lines of this process's children that run, by number; where the system does not tell, none."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    found = {}
    for number in listed.read_text().split() if listed.exists() else ():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            found[number] = Path(f"/proc/{number}/cmdline").read_text().replace("\0", " ")
    return {number: words for number, words in found.items() if words}  # what has ended has none


@pytest.mark.slow
def test_a_simulation_is_the_same_run_and_leaves_no_process(tmp_path, plan, one_thread):
    before = children()
    settings = RunSettings(strategy="slt", dataset="digits", rounds=2, local_batch=16, seed=1, clients=3, cohort_size=2)
    loaded = load_plan(plan)
    run = prepare(loaded, settings, load_data(loaded, "digits"), load_network(loaded, 1))
    local = run_experiment(run, tmp_path / "local")
    begin_run(run, tmp_path / "simulated")
    simulated = simulate(run, tmp_path / "simulated")
    assert [comparable(row) for row in simulated.rows] == [comparable(row) for row in local.rows]
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("local", "simulated")]
    assert weights[0] == weights[1]
    deadline = time.monotonic() + 30  # they are told to end, and take their time
    while (left := children()) != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == before
