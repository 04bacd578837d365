"""Ways to train a round's clients faster, next to the plain loop, on CIFAR-like images.

With ``prefix``: 10 clients of 500 images that are not augmented, all of them in every round of one stage of a plan with
norms running. The loop and the loop with a cache of the frozen prefix take turns in one process, round after round,
each on what its own last round gave. Run on an idle machine:

    slt-plan resnet20 --budgets 16MB --batch-size 32 --norms running --out plan.json
    python benchmarks/faster_clients.py prefix plan.json parquet:data/cifar10 [--stages 5,13] [--out FILE.json]
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slt_planner.data.datasets import Dataset, load_dataset
from slt_planner.environment import environment
from slt_planner.federated.engines.cached import CachingEngine
from slt_planner.federated.engines.local import LocalEngine
from slt_planner.federated.result import RunSettings
from slt_planner.federated.rounds import run_round
from slt_planner.federated.setup import Run, image_shape, load_network, prepare
from slt_planner.federated.strategies.base import ServerState
from slt_planner.files import write_text
from slt_planner.memory.step import threads
from slt_planner.planning.plan import Plan, load_plan
from slt_planner.planning.rounds import deal_rounds
from slt_planner.units import parse_bytes

_ROUNDS = 60


def plain_run(plan: Plan, dataset: Dataset) -> Run:
    """10 clients, all of them in every round."""
    settings = RunSettings(
        strategy="slt", dataset="-", rounds=_ROUNDS, clients=10, cohort_size=10, local_batch=plan.batch_size, seed=11
    )
    return prepare(plan, settings, dataset, load_network(plan, settings.seed))


def begin_of(run: Run, stage: int) -> ServerState:
    """Before a stage's first round."""
    rounds_of = deal_rounds(_ROUNDS, [own.rounds_fraction for own in run.plan.stages])
    return ServerState(sum(rounds_of[:stage]), run.start.weights)


def stay(state: ServerState, round_number: int) -> ServerState:
    """The state in the same stage: a stage may have fewer rounds than are timed."""
    return replace(state, round=round_number)


def prefix_rows(plan: Plan, dataset: Dataset, stages: list[int], repeats: int, limit: int) -> list[dict[str, Any]]:
    """Seconds of rounds with and without a cache, a row a stage."""
    few = torch.arange(5000)
    fewer = replace(
        dataset, train_images=dataset.train_images[few], train_labels=dataset.train_labels[few], augment=False
    )
    run, rows = plain_run(plan, fewer), []
    for stage in stages:
        begin, cached = begin_of(run, stage), CachingEngine(limit)
        run_round(run, begin)  # warm-up
        states, turns = [begin, begin], []
        for _ in range(repeats + 1):
            done = [run_round(run, state, own) for state, own in zip(states, (LocalEngine(), cached), strict=True)]
            states = [stay(state, begin.round) for state, _ in done]
            turns.append([row for _, row in done])
        equal = all(torch.equal(states[0].weights[name], states[1].weights[name]) for name in begin.weights)
        (_, filling), *later = turns
        seconds = {
            name: [[getattr(row, name) for row in turn] for turn in later] for name in ("train_seconds", "seconds")
        }
        rows.append(
            {
                "stage": stage,
                "config": str(run.strategy.evaluation_config(begin)),
                "train_seconds": statistics.median(plain for plain, _ in seconds["train_seconds"]),
                "train_seconds_with_cache": statistics.median(own for _, own in seconds["train_seconds"]),
                "train_seconds_of_the_round_that_fills_it": filling.train_seconds,
                "training_faster": statistics.median(plain / own for plain, own in seconds["train_seconds"]),
                "round_faster": statistics.median(plain / own for plain, own in seconds["seconds"]),
                "cache_bytes": cached.cache.bytes,
                "equal_to_the_bit": equal,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["prefix"])
    parser.add_argument("plan")
    parser.add_argument("dataset")
    parser.add_argument("--stages", default="5,13")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cache", default="4GB")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()

    plan = load_plan(options.plan)
    dataset = load_dataset(options.dataset, image_shape(plan), plan.num_classes)
    stages = [int(stage) for stage in options.stages.split(",")]
    with threads(plan.step) as number:
        rows = prefix_rows(plan, dataset, stages, options.repeats, parse_bytes(options.cache))
    result = {
        "what": "10 clients of 500 images, all test images evaluated; medians, ratios of pairs",
        "dataset": dataset.title,
        "batch": plan.batch_size,
        "environment": environment(number),
        "rows": rows,
    }
    out = options.out or Path(f"benchmarks/results/faster_clients_{options.part}.json")
    write_text(out, json.dumps(result, indent=2) + "\n", force=True)


if __name__ == "__main__":
    main()
