"""What Flower adds to a round, in time, bytes and memory, next to the local engine on the same run.

A plan runs on a SuperLink and three SuperNodes on loopback, and again on the local engine: the weights must be the same
to the bit. Seconds are of the rounds after the first; memory is the highest resident set of each process, as Linux
keeps it, by the program's name. Then a SuperLink's record of nodes is filled with thousands of them. Run on an idle
machine:

    python benchmarks/flower_overhead.py PLAN [--rounds 14] [--out FILE.json]
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager

from slt_planner.environment import environment
from slt_planner.federated.engines.flower.app_folder import write_app
from slt_planner.federated.engines.flower.options import FlowerOptions
from slt_planner.federated.engines.flower.processes import LocalFederation
from slt_planner.federated.experiment import run_experiment
from slt_planner.federated.result import RunSettings
from slt_planner.federated.run_folder import METRICS, WEIGHTS, load_run
from slt_planner.federated.setup import load_data, load_network, prepare
from slt_planner.files import write_text
from slt_planner.planning.plan import load_plan

CLIENTS = 3


def resident(pids: list[int]) -> dict[int, tuple[str, int]]:
    """The program and the highest resident set so far, bytes, of each process."""
    found = {}
    for pid in pids:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            status = Path(f"/proc/{pid}/status").read_text().splitlines()
            peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
        except (OSError, StopIteration):  # it has just ended
            continue
        name = next((Path(word).name for word in words[:2] if Path(word).name.startswith(("flwr", "flower"))), "")
        found[pid] = (name, peak)
    return found


def superlink_with(nodes: int) -> dict[str, float]:
    """What a SuperLink's own record of its nodes needs, asked directly: bytes on disk, seconds for what it does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "superlink.db"
        state = LinkStateFactory(str(path), NoOpFederationManager(), ObjectStoreFactory()).state()
        ids = [state.create_node("owner", "name", os.urandom(120), 30.0) for _ in range(nodes)]
        for node in ids:
            state.activate_node(node, 30.0)
        began = time.perf_counter()
        assert len(state.get_node_info(statuses=["online"])) == nodes
        listed = time.perf_counter()
        for node in ids[:500]:
            state.acknowledge_node_heartbeat(node, 30.0)
        ended = time.perf_counter()
        return {
            "nodes": nodes,
            "disk_bytes_a_node": path.stat().st_size / nodes,
            "seconds_to_list_them": listed - began,
            "seconds_a_heartbeat": (ended - listed) / 500,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    plan = load_plan(arguments.plan)
    settings = RunSettings(
        strategy="slt",
        dataset="digits",
        rounds=arguments.rounds,
        clients=CLIENTS,
        cohort_size=CLIENTS,
        local_batch=plan.batch_size,
    )
    with tempfile.TemporaryDirectory() as name:
        folder, peaks = Path(name), defaultdict(int)
        run = prepare(plan, settings, load_data(plan, "digits"), load_network(plan, 0))
        local = run_experiment(run, folder / "local")
        write_app(folder / "app", arguments.plan, folder / "flower", settings, FlowerOptions(), "")
        with LocalFederation(folder, CLIENTS) as federation:
            run_id = federation.submit(folder / "app")
            metrics = folder / "flower" / METRICS
            while not metrics.exists() or metrics.read_text().count("\n") < arguments.rounds:
                for program, peak in resident(federation.processes()).values():
                    peaks[program] = max(peaks[program], peak)
                time.sleep(0.05)
            status = federation.wait(run_id, 120)
        flower = load_run(folder / "flower")
        same = (folder / "local" / WEIGHTS).read_bytes() == (folder / "flower" / WEIGHTS).read_bytes()
    result = {
        "plan": arguments.plan.name,
        "clients": CLIENTS,
        "rounds": arguments.rounds,
        "same_weights_to_the_bit": same,
        "same_accuracies": [row.accuracy for row in flower.rows] == [row.accuracy for row in local.rows],
        "local_seconds_a_round": statistics.median(row.seconds for row in local.rows[1:]),
        "flower_seconds_a_round": statistics.median(row.seconds for row in flower.rows[1:]),
        "flower_seconds_first_round": flower.rows[0].seconds,
        "accounted_bytes_down": sum(row.bytes_down for row in flower.rows),
        "accounted_bytes_up": sum(row.bytes_up for row in flower.rows),
        "flower_bytes_down": status.sent_bytes,
        "flower_bytes_up": status.received_bytes,
        "highest_resident_bytes": dict(sorted(peaks.items())),
        "superlink": [superlink_with(1_000), superlink_with(5_000)],
        "environment": environment(1),
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if arguments.out:
        write_text(arguments.out, text, force=True)


if __name__ == "__main__":
    main()
