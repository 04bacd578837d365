"""How fast the federated trainer is next to a raw PyTorch loop over the same batches.

For some stages of a plan, a round of the trainer (cohort, extraction, augmentation, training, merging, evaluation), the
same with several workers, and the raw loop (the same sub-models on batches that lie ready, plain SGD, one forward pass
over the test images, in batches and a memory format as the trainer's) take turns, A B C A B C, in one process. Run on
an idle machine:

    python benchmarks/rounds_per_minute.py PLAN DATASET [--stages 0,5,9,13] [--workers 2] [--out FILE.json]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from slt_planner.data.datasets import load_dataset, normalise
from slt_planner.environment import environment
from slt_planner.federated.client import LocalTraining, client_seed, learning_rate, local_batches
from slt_planner.federated.engines.base import Engine
from slt_planner.federated.engines.local import LocalEngine
from slt_planner.federated.engines.workers import WorkerEngine
from slt_planner.federated.evaluate import BATCH, evaluation_format
from slt_planner.federated.result import RunSettings
from slt_planner.federated.rounds import draw_cohort, run_round
from slt_planner.federated.setup import Run, image_shape, load_network, prepare
from slt_planner.federated.strategies.base import ServerState
from slt_planner.files import write_text
from slt_planner.memory.step import threads
from slt_planner.planning.plan import load_plan
from slt_planner.planning.rounds import deal_rounds
from slt_planner.submodel.extract import extract


def timed_round(run: Run, state: ServerState, engine: Engine) -> float:
    """Seconds of the trainer's round."""
    began = time.perf_counter()
    run_round(run, state, engine)
    return time.perf_counter() - began


def raw_round(run: Run, state: ServerState, test_batches: list[torch.Tensor]) -> float:
    """Seconds of the bare work of a round; what a round must do at least."""
    settings = run.settings
    rate = learning_rate(state.round + 1, settings.rounds, settings.learning_rate, settings.final_learning_rate)
    training = LocalTraining(run.plan.step, settings.local_batch, settings.local_epochs, rate)
    work = []
    for assignment in draw_cohort(run, state):
        seed = client_seed(settings.seed, state.round + 1, assignment.client)
        generator = torch.Generator().manual_seed(seed)
        batches = list(local_batches(run.dataset, assignment.indices, training, generator))
        work.append((extract(run.graph, state.weights, assignment.config), batches))
    judged = extract(run.graph, state.weights, run.strategy.evaluation_config(state)).eval()
    layout = evaluation_format(judged)
    judged.to(memory_format=layout)
    began = time.perf_counter()
    for model, batches in work:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=rate, momentum=0.9, weight_decay=1e-3)
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    with torch.inference_mode():
        for images in test_batches:
            judged(images.to(memory_format=layout))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan")
    parser.add_argument("dataset")
    parser.add_argument("--stages", default="0,5,9,13")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rounds_per_minute.json"))
    options = parser.parse_args()

    plan = load_plan(options.plan)
    dataset = load_dataset(options.dataset, image_shape(plan), plan.num_classes)
    settings = RunSettings(
        strategy="slt",
        dataset=options.dataset,
        rounds=options.rounds,
        clients=100,
        cohort_size=10,
        local_batch=plan.batch_size,
        seed=11,
    )
    rounds_of = deal_rounds(options.rounds, [stage.rounds_fraction for stage in plan.stages])
    rows = []
    with threads(plan.step) as number:
        network = load_network(plan, settings.seed)
        run = prepare(plan, settings, dataset, network)
        at_once = prepare(plan, settings.model_copy(update={"workers": options.workers}), dataset, network)
        test_batches = list(normalise(dataset.test_images, dataset).split(BATCH))
        for stage in map(int, options.stages.split(",")):
            state = ServerState(sum(rounds_of[:stage]), run.start.weights)
            run_round(run, state)  # warm-up
            turns = [
                (
                    timed_round(run, state, LocalEngine()),
                    timed_round(at_once, state, WorkerEngine(options.workers)),
                    raw_round(run, state, test_batches),
                )
                for _ in range(options.repeats)
            ]
            ours, with_workers, raw = map(statistics.median, zip(*turns, strict=True))
            ratio = statistics.median(raw / ours for ours, _, raw in turns)
            ratio_with_workers = statistics.median(raw / theirs for _, theirs, raw in turns)
            rows.append(
                {
                    "stage": stage,
                    "config": str(run.strategy.evaluation_config(state)),
                    "seconds": ours,
                    "seconds_with_workers": with_workers,
                    "raw_seconds": raw,
                    "speed_of_raw": ratio,
                    "speed_of_raw_with_workers": ratio_with_workers,
                }
            )
            print(
                f"stage {stage}: {60 / ours:.1f} rounds/min, {60 / with_workers:.1f} with workers, "
                f"raw loop {60 / raw:.1f}: {ratio:.1%} and {ratio_with_workers:.1%} of its speed",
                flush=True,
            )
    result = {
        "what": "seconds a round: 10 clients, all test images evaluated; medians, ratio of pairs",
        "dataset": dataset.title,
        "batch": plan.batch_size,
        "workers": options.workers,
        "environment": environment(number),
        "rows": rows,
    }
    write_text(options.out, json.dumps(result, indent=2) + "\n", force=True)


if __name__ == "__main__":
    main()
