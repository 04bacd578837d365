"""A real deployment on loopback: a SuperLink and SuperNodes as processes, some of them killed."""

import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("flwr")
pytest.importorskip("ray")

from slt_planner.config import StepSpec
from slt_planner.federated.engines.flower.app_folder import write_app
from slt_planner.federated.engines.flower.client import client_app
from slt_planner.federated.engines.flower.options import FlowerOptions
from slt_planner.federated.engines.flower.processes import LocalFederation
from slt_planner.federated.engines.flower.server import serve
from slt_planner.federated.engines.flower.simulation import simulate
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


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    graph = trace(load_model("resnet20", 10, (3, 8, 8)), (3, 8, 8))
    plan = solve(graph, ["1GB"], SPEC, verify=False)
    plan.model_copy(update={"model": plan.model.model_copy(update={"name": "resnet20"})}).save(path)
    return path


def app_of(folder, plan, **changes):
    values = {"strategy": "slt", "dataset": "digits", "rounds": 3, "local_batch": 16, "seed": 1, **changes}
    settings = RunSettings(**values)
    write_app(folder / "app", plan, folder / "run", settings, OPTIONS, "")
    return folder / "app", settings


def wait_for_rows(federation, run_id, folder, number):
    until = time.monotonic() + LONGEST_S
    while (rows := rows_in(folder)) < number:
        status = federation.status(run_id)
        assert status.ended is None, status.details
        assert time.monotonic() < until
        time.sleep(0.05)
    assert rows == number


def rows_in(folder: Path) -> int:
    return (folder / METRICS).read_text().count("\n") if (folder / METRICS).exists() else 0


def in_process(folder, plan, settings, gone_from_round):
    """The same run on nodes in this process, one of which is gone from a round on."""
    grid = InProcessGrid(client_app(), [{"partition-id": c} for c in range(settings.clients)])
    plain = grid.get_node_ids
    grid.get_node_ids = lambda: plain()[: 2 if rows_in(folder / "run") + 1 >= gone_from_round else None]
    config = {"plan": str(plan), "out": str(folder / "run")}
    config |= {
        name.replace("_", "-"): value
        for name, value in settings.model_dump(exclude={"workers"}).items()
        if value is not None
    }
    return serve(grid, config)


def comparable(row):
    return row.model_dump(exclude={*TIMING_FIELDS, "absent", "measured_peak_bytes"})


def test_a_federation_goes_on_without_a_node_that_is_killed(tmp_path, plan, one_thread):
    app, settings = app_of(tmp_path, plan, clients=3, cohort_size=3)
    with LocalFederation(tmp_path, 3, {"OMP_NUM_THREADS": "1"}) as federation:
        run_id = federation.submit(app)
        wait_for_rows(federation, run_id, tmp_path / "run", 1)
        federation.kill("node2")
        assert federation.wait(run_id, LONGEST_S).ended == "completed"
        mine = federation.processes()
        assert len(mine) > 3
    assert federation.processes() == []
    result = load_run(tmp_path / "run")
    assert result.status == "finished"
    assert [row.dropped_out for row in result.rows] == [0, 1, 1]
    assert [row.refused + row.stragglers for row in result.rows] == [0, 0, 0]
    named = [[(own.client, own.reason) for own in row.absent] for row in result.rows]
    assert named == [[], [(2, "its node is gone")], [(2, "its node is not connected")]]
    # To the bit what the same clients come to in one process.
    again = in_process(tmp_path / "again", plan, settings, gone_from_round=2)
    assert [comparable(row) for row in result.rows] == [comparable(row) for row in again.rows]
    weights = "run/weights.safetensors"
    assert (tmp_path / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()


@pytest.mark.slow
def test_a_run_goes_on_after_its_superlink_was_killed(tmp_path, plan, one_thread):
    app, settings = app_of(tmp_path, plan, clients=2, cohort_size=2, rounds=2)
    with LocalFederation(tmp_path, 2, {"OMP_NUM_THREADS": "1"}) as federation:
        wait_for_rows(federation, federation.submit(app), tmp_path / "run", 1)
        port = int(federation.address.rpartition(":")[2])
        federation.kill("superlink")
        federation.start_superlink(port)
        run_id = federation.submit(app, "resume=true")
        assert federation.wait(run_id, LONGEST_S).ended == "completed"
    result = load_run(tmp_path / "run")
    again = in_process(tmp_path / "again", plan, settings, gone_from_round=9)
    assert [comparable(row) for row in result.rows] == [comparable(row) for row in again.rows]


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
