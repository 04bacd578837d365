"""How long planning takes: from shell to prompt, and how it grows with the depth of the network.

    python benchmarks/planning_time.py [PART ...]

Parts: ``commands`` (slt-plan resnet20 with nothing known, with everything known, and with every stage measured),
``depths`` (resnet20, 56, 110 and 218, without measuring) and ``resnet152`` (at 224 x 224). Each figure is of a process
of its own. "Cold" begins with an empty cache: operators are calibrated, steps simulated. "Warm" is the same plan once
more, "near" one for budgets 3 % larger: their operators are mostly known, their configurations are not.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "planning_time.json"
COMMAND = ("resnet20", "--budgets", "64,128,256MB", "--force")
DEPTHS = (20, 56, 110, 218)
SHARES = {"resnet152": (0.6, 0.8, 1.1)}
OTHER_SHARES = (0.3, 0.6, 1.1)
"""Of what the whole network needs: two budgets with a schedule, and one that needs none."""


def commands() -> list[dict[str, object]]:
    """Shell to prompt, reports and imports included."""
    slt_plan = Path(sys.executable).with_name("slt-plan")
    runs = {
        "no-verify, cold": ["--no-verify"],
        "no-verify, warm": ["--no-verify"],
        "no-verify, warm again": ["--no-verify"],
        "every stage measured, warm": [],
    }
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for cache, names in (("a", list(runs)), ("b", ["every stage measured, cold"])):
            environment = {**os.environ, "SLT_CACHE": str(Path(folder) / cache)}
            for name in names:
                began = time.perf_counter()
                done = subprocess.run(
                    [str(slt_plan), *COMMAND, *runs.get(name, [])],
                    capture_output=True,
                    text=True,
                    check=True,
                    cwd=folder,
                    env=environment,
                )
                seconds = round(time.perf_counter() - began, 2)
                rows.append({"run": name, "shell_to_prompt_s": seconds, "says": done.stderr.strip()})
                print(rows[-1], flush=True)
    return rows


def network(name: str):
    """The network of this name, its input and its batch."""
    import slt_planner as slt
    from slt_planner.models.registry import find_model
    from slt_planner.models.resnet_cifar import CifarResNet

    if name == "resnet152":
        return slt.load_model(name, weights=False), find_model(name).input_shape, 4
    return CifarResNet((int(name.removeprefix("resnet")) - 2) // 6), (3, 32, 32), 128


def plan(name: str, larger: float) -> dict[str, object]:
    """One plan in this process; budgets are shares of what the whole network needs."""
    import slt_planner as slt

    model, shape, batch = network(name)
    began = time.perf_counter()
    graph = slt.trace(model, shape)
    traced = time.perf_counter()
    spec = slt.StepSpec(batch_size=batch)
    whole = slt.solve(graph, ["1000000GB"], spec, verify=False).full_network.peak_bytes
    looked: dict[str, int] = {}

    def tell(what: str, done: int, of: int | None) -> None:
        looked[what] = done

    solving = time.perf_counter()
    tiers = [f"{int(share * larger * whole)}B" for share in SHARES.get(name, OTHER_SHARES)]
    solved = slt.solve(graph, tiers, spec, verify=False, progress=tell)
    return {
        "units": graph.depth,
        "batch": batch,
        "budgets_bytes": [tier.budget_bytes for tier in solved.tiers],
        "stages": len(solved.stages),
        "trace_s": round(traced - began, 2),
        "solve_s": round(time.perf_counter() - solving, 3),
        "configurations": looked["searching"],
    }


def growth(names: list[str]) -> list[dict[str, object]]:
    """Cold, warm and near plans of networks."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "SLT_CACHE": folder}
        for name in names:
            for run, larger in (("cold", 1.0), ("warm", 1.0), ("near", 1.03)):
                done = subprocess.run(
                    [sys.executable, __file__, "plan", name, str(larger)],
                    capture_output=True,
                    text=True,
                    check=True,
                    env=environment,
                )
                rows.append({"model": name, "run": run, **json.loads(done.stdout)})
                print(rows[-1], flush=True)
    return rows


PARTS = {
    "commands": commands,
    "depths": lambda: growth([f"resnet{depth}" for depth in DEPTHS]),
    "resnet152": lambda: growth(["resnet152"]),
}


def main(parts: list[str]) -> None:
    import torch

    from slt_planner.environment import environment
    from slt_planner.files import write_text

    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for part in parts or PARTS:
        result[part] = {"environment": environment(torch.get_num_threads()), "rows": PARTS[part]()}
        write_text(RESULT, json.dumps(result, indent=1) + "\n", force=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["plan"]:
        print(json.dumps(plan(sys.argv[2], float(sys.argv[3]))))
    else:
        main(sys.argv[1:])
