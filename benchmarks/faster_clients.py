"""Ways to train a round's clients faster, next to the plain loop, on CIFAR-like images. Training alone is timed.

With ``prefix``: 10 clients of 500 images that are not augmented, all of them in every round of one stage of a plan with
norms running. The loop and the loop with a cache of the frozen prefix take turns in one process, round after round,
each on what its own last round gave. With ``batched``: clients that train the whole network, N at once, next to one
after the other, on a device. Run on an idle machine:

    slt-plan resnet20 --budgets 16MB --batch-size 32 --norms running --out plan.json
    python benchmarks/faster_clients.py prefix plan.json parquet:data/cifar10 [--stages 9,13] [--out FILE.json]
    python benchmarks/faster_clients.py batched plan.json parquet:data/cifar10 [--device cuda] [--clients 2,5,10]
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from slt_planner.data.datasets import Dataset, load_dataset
from slt_planner.environment import environment
from slt_planner.federated.engines.base import Engine
from slt_planner.federated.engines.batched import BatchedEngine
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


def prepared(plan: Plan, dataset: Dataset, **changes: Any) -> Run:
    """10 clients, all of them in every round; without evaluation."""
    settings = RunSettings(
        dataset="-",
        rounds=_ROUNDS,
        clients=10,
        cohort_size=10,
        local_batch=plan.batch_size,
        seed=11,
        evaluate_every=_ROUNDS,
        **changes,
    )
    return prepare(plan, settings, dataset, load_network(plan, settings.seed))


@dataclass(frozen=True)
class Turn:
    """What an engine's round took: seconds of training, and of all processors together (no waiting for other work)."""

    seconds: float
    cpu_seconds: float


def by_turns(
    run: Run, begin: ServerState, engines: list[Engine], rounds: int
) -> tuple[list[ServerState], list[list[Turn]]]:
    """Rounds of the stage that a state is in, each engine on what its own last one gave; the last states, the turns."""
    states, turns = [begin] * len(engines), []
    for _ in range(rounds):
        turn = []
        for place, engine in enumerate(engines):
            began = time.process_time()
            after, row = run_round(run, states[place], engine)
            turn.append(Turn(row.train_seconds, time.process_time() - began))
            states[place] = replace(after, round=begin.round)  # a stage may have fewer rounds than these
        turns.append(turn)
    return states, turns


def faster(turns: list[list[Turn]]) -> dict[str, float]:
    """Medians of the pairs' ratios."""
    return {
        "faster": statistics.median(plain.seconds / own.seconds for plain, own in turns),
        "less_cpu": statistics.median(plain.cpu_seconds / own.cpu_seconds for plain, own in turns),
    }


def prefix_rows(plan: Plan, dataset: Dataset, stages: list[int], repeats: int, limit: int) -> list[dict[str, Any]]:
    """Seconds of training with and without a cache, a row a stage."""
    run, rows = prepared(plan, dataset, strategy="slt", augment=False), []
    rounds_of = deal_rounds(_ROUNDS, [own.rounds_fraction for own in plan.stages])
    for stage in stages:
        begin, cached = ServerState(sum(rounds_of[:stage]), run.start.weights), CachingEngine(limit)
        run_round(run, begin)  # warm-up
        states, (filling, *turns) = by_turns(run, begin, [LocalEngine(), cached], repeats + 1)
        rows.append(
            {
                "stage": stage,
                "config": str(run.strategy.evaluation_config(begin)),
                "train_seconds": statistics.median(plain.seconds for plain, _ in turns),
                "train_seconds_with_cache": statistics.median(own.seconds for _, own in turns),
                **faster(turns),
                "of_the_round_that_fills_it": faster([filling]),
                "cache_bytes": cached.cache.bytes,
                "weights_equal_to_the_bit": all(
                    torch.equal(states[0].weights[name], states[1].weights[name]) for name in begin.weights
                ),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def batched_rows(plan: Plan, dataset: Dataset, counts: list[int], repeats: int, device: str) -> list[dict[str, Any]]:
    """Images a second of the plain loop and of stacked clients that train the whole network, a row a number of them."""
    run, rows = prepared(plan, dataset, strategy="full", device=device), []
    for count in counts:
        engines: list[Engine] = [LocalEngine(), BatchedEngine(count)]
        _, (_, *turns) = by_turns(run, run.start, engines, repeats + 1)  # the first warms up
        images = len(dataset.train_labels)
        rows.append(
            {
                "clients": count,
                "images_per_second": images / statistics.median(plain.seconds for plain, _ in turns),
                "images_per_second_batched": images / statistics.median(own.seconds for _, own in turns),
                **faster(turns),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["prefix", "batched"])
    parser.add_argument("plan")
    parser.add_argument("dataset")
    parser.add_argument("--stages", default="9,13")
    parser.add_argument("--clients", default="2,5,10")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=500, help="of a client")
    parser.add_argument("--threads", type=int, default=None, help="[the plan's]")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cache", default="4GB")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()

    plan = load_plan(options.plan)
    if options.threads is not None:
        plan = plan.model_copy(update={"step": plan.step.model_copy(update={"threads": options.threads})})
    whole = load_dataset(options.dataset, image_shape(plan), plan.num_classes)
    few = slice(0, 10 * options.images)
    dataset = replace(whole, train_images=whole.train_images[few], train_labels=whole.train_labels[few])
    with threads(plan.step) as number:
        if options.part == "prefix":
            stages = [int(stage) for stage in options.stages.split(",")]
            rows = prefix_rows(plan, dataset, stages, options.repeats, parse_bytes(options.cache))
        else:
            counts = [int(count) for count in options.clients.split(",")]
            rows = batched_rows(plan, dataset, counts, options.repeats, options.device)
    result = {
        "what": f"training of 10 clients of {options.images} images; medians, ratios of pairs",
        "dataset": dataset.title,
        "batch": plan.batch_size,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "environment": environment(number),
        "rows": rows,
    }
    out = options.out or Path(f"benchmarks/results/faster_clients_{options.part}.json")
    write_text(out, json.dumps(result, indent=2) + "\n", force=True)


if __name__ == "__main__":
    main()
