"""How far levers go: peaks and step times with each, and the smallest budgets with a complete schedule.

    python benchmarks/lean_steps.py [--only schedule,smallest,levers] [--out results/lean_steps.json]

schedule: resnet20, batch 32, at 10.0 MB with exact levers: each stage measured, timed next to the plain step (they
run by turns), and trained under `memory_limit` at the budget. smallest: the least budget with a schedule for plain
steps, exact levers, and exact levers in micro-batches of 8, each proven by a plan at it and a refusal one byte below.
levers: each lever alone and all together, on stages of resnet20 and on vit_b_16 (batch 8), whose weights dominate. The
tables are written beside the result as lean_steps.md. Ends with an error if a stage is over its budget. Times want an
idle machine.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import slt_planner as slt
from slt_planner.config import LeverSet
from slt_planner.environment import environment
from slt_planner.files import write_text
from slt_planner.memory.step import SteadyStep, threads
from slt_planner.models.registry import find_model
from slt_planner.planning.levers import EXACT, PARTLY
from slt_planner.planning.step_times import paired_times
from slt_planner.units import LARGEST_BYTES

RESULT = Path(__file__).parent / "results" / "lean_steps.json"
BUDGET = 10_000_000
# (freeze_depth, full_depth, what head: a place in the legal scales) of resnet20 and of vit_b_16, whole.
STAGES = {"resnet20": [(1, 2, 0), (6, 7, 0), (9, 10, 20), (0, 0, -1)], "vit_b_16": [(0, 0, -1)]}
BATCHES = {"resnet20": 32, "vit_b_16": 8}
ENOUGH_S = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="schedule,smallest,levers")
    parser.add_argument("--models", default=",".join(STAGES), help="of the part called levers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    result["environment"] = environment(args.threads)
    models = args.models.split(",")
    made = {"schedule": schedule, "smallest": smallest, "levers": partial(levers, models=models)}
    for name in args.only.split(","):
        result[name] = []
        for row in made[name](args.threads):
            result[name].append(row)
            print(json.dumps(row), flush=True)
            write_text(args.out, json.dumps(result, indent=1) + "\n", force=True)
            write_text(args.out.with_suffix(".md"), as_markdown(result), force=True)
    over = [row for row in result.get("schedule", []) if row["peak_bytes"] > BUDGET or not row["trains_under_limit"]]
    if over:
        sys.exit(f"{len(over)} stages over {BUDGET} bytes")


def network(name: str, number_of_threads: int) -> tuple[slt.ModelGraph, slt.StepSpec]:
    graph = slt.trace(slt.load_model(name, weights=False), find_model(name).input_shape)
    return graph, slt.StepSpec(batch_size=BATCHES[name], threads=number_of_threads)


def peak(graph: slt.ModelGraph, config: slt.Config, spec: slt.StepSpec) -> int:
    return slt.measure(slt.extract(graph, None, config, spec.norms), spec, details=False).peak_bytes


def times(graph: slt.ModelGraph, config: slt.Config, plain: slt.StepSpec, own: slt.StepSpec) -> tuple[float, float]:
    with threads(plain):
        steps = (SteadyStep.of(graph, config, spec) for spec in (plain, own))
        return paired_times(*steps, ENOUGH_S)


def schedule(number_of_threads: int) -> Iterator[dict]:
    """The stages of the plan for 10.0 MB."""
    graph, plain = network("resnet20", number_of_threads)
    plan = slt.solve(graph, [slt.Tier(name="device", budget_bytes=BUDGET, share=1.0)], plain, "resnet20", levers="auto")
    for number, stage in enumerate(plan.tiers[0].stages):
        spec = plain.with_levers(stage.levers)
        seconds, ratio = times(graph, stage.config, plain, spec)
        yield {
            "stage": number,
            "config": str(stage.config),
            "levers": stage.levers,
            "plain_peak_bytes": peak(graph, stage.config, plain),
            "peak_bytes": peak(graph, stage.config, spec),
            "step_s": seconds,
            "relative_time": ratio,
            **trains_under(graph, stage.config, spec, BUDGET),
        }


def trains_under(graph: slt.ModelGraph, config: slt.Config, spec: slt.StepSpec, budget: int) -> dict:
    """Whether three steps run under the budget's limit, and whether the limit knew every operator's scratch memory."""
    slt.calibrate(graph, [config], spec)
    with threads(spec):
        step = SteadyStep.of(graph, config, spec)
        limit = slt.memory_limit(budget, step.module, step.optimizer)
        try:
            for _ in range(3):
                batch, labels = step.example_batch()
                with limit:
                    step.train(batch, labels)
                del batch, labels
        except slt.BudgetExceeded:
            return {"trains_under_limit": False, "limit_exact": limit.exact}
    return {"trains_under_limit": True, "limit_exact": limit.exact}


def smallest(number_of_threads: int) -> Iterator[dict]:
    """The least budget with a schedule, by what levers are allowed."""
    graph, plain = network("resnet20", number_of_threads)
    for asked in ("none", "auto", ",".join([*EXACT, "micro_batches:8"])):
        tiers = [slt.Tier(name=name, budget_bytes=b, share=0.5) for name, b in (("none", 1), ("all", LARGEST_BYTES))]
        least = slt.solve(graph, tiers, plain, levers=asked).tiers[0].smallest_budget_bytes
        at_it = slt.solve(graph, [slt.Tier(name="device", budget_bytes=least, share=1.0)], plain, levers=asked)
        try:
            slt.solve(graph, [slt.Tier(name="device", budget_bytes=least - 1, share=1.0)], plain, levers=asked)
            refused = None
        except slt.InfeasibleError as error:
            refused = str(error)
        stages = at_it.tiers[0].stages
        yield {
            "levers": asked,
            "smallest_budget_bytes": least,
            "stages": len(stages),
            "highest_peak_bytes": max(stage.measured_peak_bytes or 0 for stage in stages),
            "refused_one_byte_below": refused,
        }


def levers(number_of_threads: int, models: list[str]) -> Iterator[dict]:
    """Each lever alone and all of them, on some stages."""
    for name, stages in ((name, STAGES[name]) for name in models):
        # vit_b_16 has no batch norm to make leaner, one convolution, and here no frozen layer and no cut.
        useful = (*EXACT, *PARTLY) if name == "resnet20" else ("early_updates", "recompute:4", "recompute")
        alone: list[LeverSet] = [(lever,) for lever in useful]
        graph, plain = network(name, number_of_threads)
        for freeze, full, place in stages:
            config = slt.Config(freeze_depth=freeze, full_depth=full, head_scale=graph.head_scales(full)[place])
            most = plain.batch_size // 4
            several = [
                EXACT,
                (f"micro_batches:{most}",),
                (*[x for x in EXACT if x != "early_updates"], f"micro_batches:{most}"),
            ]
            for own in [(), *alone, *several]:
                spec = plain.with_levers(own)
                yield {
                    "model": name,
                    "batch": plain.batch_size,
                    "config": str(config),
                    "levers": own,
                    "peak_bytes": peak(graph, config, spec),
                    "relative_time": times(graph, config, plain, spec)[1] if own else 1.0,
                }


def as_markdown(result: dict) -> str:
    lines = [
        "# Lean training steps",
        "",
        "Made by `benchmarks/lean_steps.py`; allocator ruler, SGD momentum 0.9, fp32.",
    ]
    lines += ["Times are medians of the ratio to the plain step; both run by turns on the same machine.", ""]
    made_on = result["environment"]
    lines += [f"Made on: {made_on['processor']}, {made_on['threads']} threads, torch {made_on['torch']}.", ""]
    if result.get("schedule"):
        lines += [f"## resnet20, batch 32: the schedule for {BUDGET / 1e6:.1f} MB with exact levers", ""]
        lines += [
            "| stage | (frozen, full width, head) | plain MB | lean MB | time | beside free levers | under the limit |"
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in result["schedule"]:
            beside = [lever for lever in row["levers"] if lever.startswith(("split_convolutions", "recompute"))]
            extra = " and ".join(beside)
            lines.append(
                f"| {row['stage']} | {row['config']} | {mb(row['plain_peak_bytes'])} | {mb(row['peak_bytes'])} | "
                f"{row['relative_time']:.2f} | {extra or ('none' if row['levers'] else 'plain')} | "
                f"{'yes' if row['trains_under_limit'] else 'NO'} |"
            )
        lines.append("")
    if result.get("smallest"):
        lines += ["## resnet20, batch 32: the smallest budget with a complete schedule", ""]
        lines += ["| levers | smallest budget | stages | one byte less |", "|---|---|---|---|"]
        names = {"none": "none (plain steps)", "auto": "exact ones"}
        for row in result["smallest"]:
            what = names.get(row["levers"], "exact ones and micro-batches of 8")
            below = "refused" if row["refused_one_byte_below"] else "NOT refused"
            lines.append(f"| {what} | {row['smallest_budget_bytes'] / 1e6:.3f} MB | {row['stages']} | {below} |")
        lines.append("")
    if result.get("levers"):
        lines += ["## Each lever", ""]
        lines += ["| network, (frozen, full width, head) | levers | peak MB | time |", "|---|---|---|---|"]
        for row in result["levers"]:
            what = ", ".join(row["levers"]) or "plain"
            if set(EXACT) <= set(row["levers"]):
                what = "all exact ones"
            elif len(row["levers"]) > 2:
                what = f"all exact ones but early_updates, {row['levers'][-1]}"
            where = f"{row['model']}, batch {row['batch']}, {row['config']}"
            lines.append(f"| {where} | {what} | {mb(row['peak_bytes'])} | {row['relative_time']:.2f} |")
        lines.append("")
    return "\n".join(lines)


def mb(number: int) -> str:
    return f"{number / 1e6:.2f}"


if __name__ == "__main__":
    main()
