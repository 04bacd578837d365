"""Peak memory of federated rounds with up to 1,000,000 clients and cohorts of up to 1,000, each in a fresh process.

    python benchmarks/million_clients.py

Every case has the same 4,000,000 made-up images of 1x8x8, split iid, so that what grows is due to clients and cohort.
Writes benchmarks/results/million_clients.json.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import slt_planner as slt
from slt_planner.data.images import Dataset
from slt_planner.environment import environment
from slt_planner.federated.experiment import run_experiment
from slt_planner.federated.result import RunSettings
from slt_planner.federated.setup import prepare

RESULT = Path(__file__).parent / "results" / "million_clients.json"
IMAGES, ROUNDS, BATCH = 4_000_000, 3, 4
CASES = [(1_000, 10), (1_000_000, 10), (1_000_000, 1_000)]


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def made_up() -> Dataset:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES, 1, 8, 8), generator=random, dtype=torch.uint8)
    labels = torch.randint(10, (IMAGES,), generator=random)
    return Dataset("made up", images, labels, images[:1000], labels[:1000], 10, (0.5,), (0.3,), False)


def peak_bytes() -> int:
    """The most that was resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def case(clients: int, cohort_size: int) -> dict[str, float]:
    """Three rounds, and what they took."""
    data, model = made_up(), network()
    graph = slt.trace(model, (1, 8, 8))
    plan = slt.solve(graph, ["1GB"], slt.StepSpec(batch_size=BATCH, threads=1), verify=False)
    loaded = peak_bytes()
    settings = RunSettings(
        strategy="slt", dataset="made up", rounds=ROUNDS, clients=clients, cohort_size=cohort_size, local_batch=BATCH
    )
    began = time.perf_counter()
    run = prepare(plan, settings, data, (model, graph))
    prepared, split = time.perf_counter() - began, peak_bytes()
    with TemporaryDirectory() as folder:
        result = run_experiment(run, Path(folder) / "run")
    return {
        "clients": clients,
        "cohort_size": cohort_size,
        "prepared_s": round(prepared, 2),
        "round_s": round(sum(row.seconds for row in result.rows) / ROUNDS, 2),
        "peak_with_data_bytes": loaded,
        "peak_with_split_bytes": split,
        "peak_after_rounds_bytes": peak_bytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs=2, type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args().case
    if chosen:
        print(json.dumps(case(*chosen)))
        return
    cases = []
    for clients, cohort_size in CASES:
        words = [sys.executable, __file__, "--case", str(clients), str(cohort_size)]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        cases.append(json.loads(done.stdout))
        print(json.dumps(cases[-1]))
    result = {"images": IMAGES, "image_shape": [1, 8, 8], "rounds": ROUNDS, "batch": BATCH, "cases": cases}
    RESULT.write_text(json.dumps({**result, "environment": environment(1)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
