"""What a plan promises: every stage within its budget, every proof over it, measured again in a fresh process.

    python benchmarks/promise.py [--models resnet20,vit_b_16] [--batch-size 8] [--out results/promise.json]

For each network: the smallest budget that has a schedule; one byte less, which must be refused for the right reason
(the stage that is named has no head that fits, all before it have one, and the smallest budget is named); then plans
for that budget and for 1.05, 1.5 and 2 times as much. Each plan is held against its budget as it is written, and again
as `slt verify` measures it in a fresh process; a proof that should be there and is not counts against it. The result
is written after every answer, and a run that was stopped goes on where it was: delete the file to begin anew. Ends
with an error if a promise is broken. vit_b_16 and mobilenet_v2 take long.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import slt_planner as slt
from slt_planner.environment import environment
from slt_planner.files import write_text
from slt_planner.models.registry import find_model
from slt_planner.units import LARGEST_BYTES, format_bytes

RESULT = Path(__file__).parent / "results" / "promise.json"
# Networks at their own input shapes, with their batch sizes.
NETWORKS = {"resnet20": 128, "resnet56": 32, "densenet40": 8, "mobilenet_v2": 2, "vit_b_16": 2}
TIMES_SMALLEST = (1.0, 1.05, 1.5, 2.0)
WHAT = "plans held against their budgets, as written and as measured again in a fresh process; allocator ruler"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(NETWORKS))
    parser.add_argument("--batch-size", type=int, help="of all networks; each its own by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.out.exists() else {"what": WHAT, "networks": []}
    for name in args.models.split(","):
        spec = slt.StepSpec(batch_size=args.batch_size or NETWORKS.get(name, 8), threads=args.threads)
        graph = slt.trace(slt.load_model(name, weights=False), find_model(name).input_shape)
        entry = entry_of(result["networks"], name, graph, spec)
        for answer in missing_answers(entry, graph, spec):
            write_text(args.out, json.dumps(result, indent=1) + "\n", force=True)
            print(f"{name}: {json.dumps(answer)}", flush=True)
    broken = [entry["model"] for entry in result["networks"] if not all(answer["holds"] for answer in answers(entry))]
    if broken:
        sys.exit(f"promises broken for {', '.join(broken)}")


def entry_of(networks: list[dict], name: str, graph: slt.ModelGraph, spec: slt.StepSpec) -> dict:
    """What is kept of a network at this step in this environment, or a new entry without answers."""
    step, here = spec.model_dump(mode="json"), environment(spec.threads or 0)
    for entry in networks:
        if (entry["model"], entry["step"], entry["environment"]) == (name, step, here):
            return entry
    networks.append(
        {
            "model": name,
            "input_shape": graph.input_shape,
            "units": graph.depth,
            "step": step,
            "environment": here,
            "below": None,
            "plans": [],
        }
    )
    return networks[-1]


def answers(entry: dict) -> list[dict]:
    return [entry["below"], *entry["plans"]]


def missing_answers(entry: dict, graph: slt.ModelGraph, spec: slt.StepSpec) -> Iterable[dict]:
    """Find what is not there yet, one answer after the other, and put it into the entry."""
    if entry["below"] is None:
        entry |= smallest_budget(graph, spec)
        entry["below"] = refused(graph, spec, entry["smallest_budget_bytes"])
        yield entry["below"]
    there = {plan["times_smallest"] for plan in entry["plans"]}
    for times in TIMES_SMALLEST:
        if times not in there:
            budget = int(times * entry["smallest_budget_bytes"])
            entry["plans"].append({"times_smallest": times, **planned(graph, spec, entry["model"], budget)})
            yield entry["plans"][-1]


def smallest_budget(graph: slt.ModelGraph, spec: slt.StepSpec) -> dict:
    """The smallest budget with a schedule, as a tier is told that has one byte; and what the whole network needs."""
    plan = slt.solve(graph, [tier(1, "none"), tier(LARGEST_BYTES, "all")], spec)
    return {
        "whole_network_bytes": plan.full_network.peak_bytes,
        "smallest_budget_bytes": plan.tiers[0].smallest_budget_bytes,
    }


def tier(budget: int, name: str = "device") -> slt.Tier:
    return slt.Tier(name=name, budget_bytes=budget, share=0.5)


def refused(graph: slt.ModelGraph, spec: slt.StepSpec, smallest: int) -> dict:
    """The answer to one byte less than the smallest budget."""
    budget = smallest - 1
    began = time.perf_counter()
    try:
        slt.solve(graph, [tier(budget)], spec)
        says, holds = "a schedule", False
    except slt.InfeasibleError as error:
        says = str(error)
        holds = format_bytes(smallest, round_up=True) in says and names_first_floor_over(graph, spec, says, budget)
    return {
        "budget_bytes": budget,
        "says": says,
        "holds": holds,
        "seconds": round(time.perf_counter() - began, 1),
    }


def names_first_floor_over(graph: slt.ModelGraph, spec: slt.StepSpec, says: str, budget: int) -> bool:
    """Whether the stage that a refusal names is the first that no head fits: neither the narrowest nor the whole."""
    number = re.search(r"stage (\d+) needs", says)
    if number is None and "the warm-up" not in says:
        return False
    named = int(number[1]) if number else 0

    def fits(full_depth: int, head_scale: float) -> bool:
        config = slt.Config(freeze_depth=max(0, full_depth - 1), full_depth=full_depth, head_scale=head_scale)
        return slt.measure(slt.extract(graph, None, config, spec.norms), spec, details=False).peak_bytes <= budget

    before = all(fits(full_depth, graph.head_scales(full_depth)[0]) for full_depth in range(named))
    return before and not any(fits(named, scale) for scale in {graph.head_scales(named)[0], 1.0})


def planned(graph: slt.ModelGraph, spec: slt.StepSpec, name: str, budget: int) -> dict:
    """The plan for a budget, as written and as measured again."""
    began = time.perf_counter()
    plan = slt.solve(graph, [tier(budget)], spec, name)
    solved = time.perf_counter()
    peaks = measured_again(plan)
    (only,) = plan.tiers
    missing = missing_proofs(plan)
    wrong = {figure: wrong_side(peaks, figure) for figure in ("planned_peak_bytes", "measured_peak_bytes")}
    return {
        "budget_bytes": budget,
        "status": only.status,
        "stages": len(only.stages),
        "tightest_percent": round(max(stage.measured_peak_bytes for stage in only.stages) / budget * 100, 3),
        "proofs": len(only.proofs),
        "proofs_missing": len(missing),
        "wrong_side_as_planned": wrong["planned_peak_bytes"],
        "wrong_side_again": wrong["measured_peak_bytes"],
        "peaks_that_moved": sum(peak["planned_peak_bytes"] != peak["measured_peak_bytes"] for peak in peaks),
        "holds": not missing and not any(wrong.values()),
        "solve_s": round(solved - began, 1),
        "verify_s": round(time.perf_counter() - solved, 1),
    }


def measured_again(plan: slt.Plan) -> list[dict]:
    """Every stage and proof as `slt verify` finds it, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        plan.save(path)
        command = [sys.executable, "-c", "from slt_planner.cli.main import slt; slt()", "verify", str(path), "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, slt.InfeasibleError.exit_code):  # that one is for stages over: an answer, too
        raise RuntimeError(f"slt verify ended with {done.returncode}: {done.stderr}")
    return json.loads(done.stdout)["peaks"]


def missing_proofs(plan: slt.Plan) -> set[tuple[int, str]]:
    """The (stage, kind) of proofs that the definition asks for (METHOD, section 1) and that the plan does not have."""
    (only,) = plan.tiers
    asked = {(n, "wider_head") for n, stage in enumerate(only.stages) if stage.limited_by == "budget"}
    asked |= {(n, "less_frozen") for n, stage in enumerate(only.stages) if stage.freeze_depth > 0}
    return asked - {(proof.stage, proof.kind) for proof in only.proofs}


def wrong_side(peaks: list[dict], figure: str) -> int:
    """How many stages are over their budget and how many proofs are not."""
    return sum((peak[figure] <= peak["budget_bytes"]) != (peak["kind"] == "stage") for peak in peaks)


if __name__ == "__main__":
    main()
